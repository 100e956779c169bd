"""The list of runs: what their shards come to, from one query for all of them."""

from __future__ import annotations

from django.contrib.admin.views.main import ChangeList
from django.http import HttpRequest

from kms_hasher.admin import figures


class RotationList(ChangeList):
    """The list of runs, each with the sums of its shards."""

    def get_results(self, request: HttpRequest) -> None:
        super().get_results(request)
        self.result_list = list(self.result_list)
        sums = figures.sums_of(self.result_list)
        for run in self.result_list:
            run.sums = sums.get(run.pk, figures.Sums())
