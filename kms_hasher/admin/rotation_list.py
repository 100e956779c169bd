"""
The list of runs, and what the shards of those not finished come to, from one query.

A run that is finished has done all of them, which may have been thousands.
"""

from __future__ import annotations

from django.contrib.admin.views.main import ChangeList
from django.http import HttpRequest

from kms_hasher.admin import figures


class RotationList(ChangeList):
    """The list of runs, each with the sums of its shards, but for those finished."""

    def get_results(self, request: HttpRequest) -> None:
        super().get_results(request)
        self.result_list = list(self.result_list)
        sums = figures.sums_of(
            run for run in self.result_list if run.state != figures.State.FINISHED
        )
        for run in self.result_list:
            run.sums = sums.get(run.pk, figures.Sums())
