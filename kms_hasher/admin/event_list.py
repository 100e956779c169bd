"""The list of events: links to dates that take no scan to find."""

from __future__ import annotations

import datetime
from typing import Any

from django.contrib.admin.views.main import ChangeList
from django.http import HttpRequest
from django.utils import formats, timezone
from django.utils.translation import gettext

from kms_hasher.admin import events
from kms_hasher.admin.base import number
from kms_hasher.models import AuditEvent


class EventList(ChangeList):
    """The list of events, with links to dates that take no scan to find."""

    def get_results(self, request: HttpRequest) -> None:
        super().get_results(request)
        ends = AuditEvent.objects.order_by("time", "pk").values_list("time", "pk")
        self.first, self.last = ends.first(), ends.last()

    @property
    def note(self) -> str:
        """What to say where there are more events than the pages show."""
        if self.result_count < events.MAX_LISTED or not (self.first and self.last):
            return ""
        # Rows are only added at the end, and removed at the beginning.
        return gettext(
            "These are the newest %(listed)s of the events asked for; all in all there are "
            "about %(all)s. Choose a date or a filter to see others."
        ) % {
            "listed": number(events.MAX_LISTED),
            "all": number(self.last[1] - self.first[1] + 1),
        }

    @property
    def dates(self) -> dict[str, Any]:
        """What Django's date_hierarchy.html needs: the days of a month, or the months."""
        year, month, day = (self.params.get(f"time__{part}") for part in _PARTS)
        days = self._days()
        if year and month and day:
            date = datetime.date(int(year), int(month), int(day))
            back = {"link": self._link(year=year, month=month), "title": _month(date)}
            return {"back": back, "choices": [{"title": _day(date)}]}
        if year and month:
            days = [date for date in days if (date.year, date.month) == (int(year), int(month))]
        months = sorted({(date.year, date.month): date for date in days}.items())
        if len(days) <= 31:
            choices = [
                {"link": self._link(year=d.year, month=d.month, day=d.day), "title": _day(d)}
                for d in days
            ]
        else:
            choices = [
                {"link": self._link(year=d.year, month=d.month), "title": _month(d)}
                for _year_and_month, d in months
            ]
        back = {"link": self._link(), "title": gettext("All dates")}
        return {"back": back if year else None, "choices": choices}

    def _days(self) -> list[datetime.date]:
        """Return all days from the first event to the last, whether or not they hold any."""
        if not (self.first and self.last):
            return []
        first, last = (
            (timezone.localtime(at) if timezone.is_aware(at) else at).date()
            for at in (self.first[0], self.last[0])
        )
        number_of_days = (last - first).days + 1
        return [first + datetime.timedelta(days=number) for number in range(number_of_days)]

    def _link(self, **parts: Any) -> str:
        filters = {f"time__{name}": value for name, value in parts.items()}
        return str(self.get_query_string(filters, ["time__"]))


_PARTS = ("year", "month", "day")


def _day(date: datetime.date) -> str:
    return str(formats.date_format(date, "MONTH_DAY_FORMAT"))


def _month(date: datetime.date) -> str:
    return str(formats.date_format(date, "YEAR_MONTH_FORMAT"))
