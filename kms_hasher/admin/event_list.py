"""
The list of events, however many there are: no page counts them or skips others to begin.

A page begins where the one before it ended, at a time and a primary key in its address, and
is read from there along an index. The dates to choose from take no scan to find.
"""

from __future__ import annotations

import calendar
import datetime
import re
from typing import Any, NamedTuple, cast

from django.conf import settings
from django.contrib.admin.options import IncorrectLookupParameters
from django.contrib.admin.views.main import ChangeList
from django.db.models import Q, QuerySet
from django.http import HttpRequest
from django.utils import formats, timezone
from django.utils.dateparse import parse_datetime
from django.utils.translation import gettext

from kms_hasher.admin import user_events
from kms_hasher.admin.base import number, time
from kms_hasher.audit import rollups
from kms_hasher.models import AuditEvent

#: Parameters of an address: the page of the events before or after one.
BEFORE, AFTER = "before", "after"

#: The user whose events they are said to be: the parameter is left out of all links.
OF = "of"

#: So many months are offered to choose from; of more, the years.
MONTHS = 36

_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.timezone.utc)


class Position(NamedTuple):
    """Where an event stands among all: `str` and `parse` are inverse."""

    time: datetime.datetime
    pk: int

    @classmethod
    def parse(cls, text: str) -> Position | None:
        """Return the position, or None if the text is none."""
        if not (match := re.fullmatch(r"(\d{1,17})-(\d{1,18})", text)):
            return None
        time = _EPOCH + datetime.timedelta(microseconds=int(match[1]))
        return cls(time if settings.USE_TZ else timezone.make_naive(time), int(match[2]))

    def __str__(self) -> str:
        time = self.time if timezone.is_aware(self.time) else timezone.make_aware(self.time)
        return f"{(time - _EPOCH) // datetime.timedelta(microseconds=1)}-{self.pk}"

    def beyond(self, lookup: str) -> Q:
        """Return what selects the events before it (`lookup` "lt") or after ("gt")."""
        # The first of these is what an index on the time is for.
        near = Q(**{f"time__{lookup}e": self.time})
        return near & (Q(**{f"time__{lookup}": self.time}) | Q(**{f"pk__{lookup}": self.pk}))


class EventList(ChangeList):
    """A page of the list: Django's, but for how it is cut out of the whole."""

    before: Position | None = None
    after: Position | None = None
    owner: user_events.Owner | None = None

    def get_queryset(self, request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
        self._check_dates()
        # No link shall take a position along to where it means nothing.
        before, after, of = (self.params.pop(name, "") for name in _OWN)
        for name in _OWN:
            self.filter_params.pop(name, None)
        self.before, self.after = Position.parse(before), Position.parse(after)
        if of:
            site = self.model_admin.admin_site
            self.owner = user_events.owner(site, request, of, self.query)
        return super().get_queryset(request, *args, **kwargs)

    def _check_dates(self) -> None:
        """Refuse what is a date, or looks like one, and makes Python overflow."""
        for name in (*_PARAMETERS, *_SPAN):
            value = self.params.get(name, "")
            match = re.match(r"\s*[-+]?(\d+)", value)
            number = int(match[1][:5]) if match else 0
            # The ends of the first and of the last year there are in no other time zone.
            ends = (datetime.MINYEAR, datetime.MAXYEAR) if name in _WITH_YEAR else ()
            if number > datetime.MAXYEAR or number in ends:
                raise IncorrectLookupParameters(value)

    def get_results(self, request: HttpRequest) -> None:
        queryset = cast("QuerySet[AuditEvent]", self.queryset)
        size = self.list_per_page
        if self.after:
            newer = queryset.filter(self.after.beyond("gt")).order_by("time", "pk")
            found = list(newer[: size + 1])
            shown, has_newer, has_older = found[:size][::-1], len(found) > size, True
        else:
            older = queryset.filter(self.before.beyond("lt")) if self.before else queryset
            found = list(older.order_by("-time", "-pk")[: size + 1])
            shown, has_newer, has_older = found[:size], bool(self.before), len(found) > size
        self.newest = self._page() if has_newer else ""
        self.newer = self._page(AFTER, shown[0]) if has_newer and shown else ""
        self.older = self._page(BEFORE, shown[-1]) if has_older and shown else ""
        self.result_list = shown
        # Not known, and equal, so that Django does not tell how many were found.
        self.result_count = self.full_result_count = len(shown)
        self.show_full_result_count = self.can_show_all = self.multi_page = False
        self.show_admin_actions = False
        self.paginator = self.model_admin.get_paginator(request, queryset, size)
        self.first, self.last = _ends(AuditEvent.objects.all())

    def _page(self, name: str = "", event: AuditEvent | None = None) -> str:
        position = {name: str(Position(event.time, event.pk))} if event else {}
        return str(self.get_query_string(position))

    @property
    def note(self) -> str:
        """About how many events there are, where that can be told at once."""
        if self.query or not (self.first and self.last):
            return ""
        names = {name: self.params[name] for name in rollups.GROUPS if name in self.params}
        period = self._period()
        if self.params and not period:
            return ""
        if names and period:
            count = rollups.totals(*period, latency=False, **names).count
        else:
            # Rows are only added at the end, and removed at the beginning.
            events = AuditEvent.objects.all()
            if period:
                events = events.filter(time__gte=period[0], time__lt=period[1])
            first, last = _ends(events) if period else (self.first, self.last)
            count = last.pk - first.pk + 1 if first and last else 0
        text = gettext("About %(number)s events in all.")
        if period:
            text = gettext("About %(number)s events in this period.")
        return text % {"number": number(count)}

    def _period(self) -> tuple[datetime.datetime, datetime.datetime] | None:
        """Return the ends of the span, year, month or day that is chosen."""
        if _SPAN[0] in self.params:
            ends = (parse_datetime(self.params.get(name, "")) for name in _SPAN)
            since, until = ((at if _fits(at) else None) for at in ends)
            return (since, until or timezone.now()) if since else None
        year, month, day = (self.params.get(name) for name in _PARAMETERS)
        if not year:
            return None
        since = datetime.datetime(int(year), int(month or 1), int(day or 1))
        if day:
            until = since + datetime.timedelta(days=1)
        elif month:
            until = (since + datetime.timedelta(days=32)).replace(day=1)
        else:
            until = since.replace(year=since.year + 1)
        if settings.USE_TZ:
            return timezone.make_aware(since), timezone.make_aware(until)
        return since, until

    @property
    def span(self) -> str:
        """Return the span of time that a link from elsewhere has chosen, in words."""
        if not any(name in self.params for name in _SPAN):
            return ""
        since, until = (parse_datetime(self.params.get(name, "")) for name in _SPAN)
        if since and until:
            text = gettext("From %(since)s to %(until)s")
        elif since:
            text = gettext("Since %(since)s")
        else:
            text = gettext("Before %(until)s")
        return text % {"since": time(since), "until": time(until)}

    @property
    def dates(self) -> dict[str, Any]:
        """What Django's date_hierarchy.html needs: the days of a month, or the months."""
        year, month, day = (self.params.get(name) for name in _PARAMETERS)
        if year and month and day:
            date = datetime.date(int(year), int(month), int(day))
            back = {"link": self._link(year=year, month=month), "title": _month(date)}
            return {"back": back, "choices": [{"title": _day(date)}]}
        ends = self._days(int(year) if year else 0, int(month) if year and month else 0)
        back = {"link": self._link(), "title": gettext("All dates")}
        return {"back": back if year else None, "choices": self._choices(*ends) if ends else []}

    def _choices(self, first: datetime.date, last: datetime.date) -> list[dict[str, str]]:
        """Return the days, months or years of a time, whether or not they hold any event."""
        number_of_days = (last - first).days + 1
        if number_of_days <= 31:
            days = (first + datetime.timedelta(days=number) for number in range(number_of_days))
            return [
                {"link": self._link(year=d.year, month=d.month, day=d.day), "title": _day(d)}
                for d in days
            ]
        begin, end = (12 * date.year + date.month - 1 for date in (first, last))
        if end - begin < MONTHS:
            months = (datetime.date(n // 12, n % 12 + 1, 1) for n in range(begin, end + 1))
            return [
                {"link": self._link(year=d.year, month=d.month), "title": _month(d)}
                for d in months
            ]
        years = range(first.year, last.year + 1)
        return [{"link": self._link(year=year), "title": str(year)} for year in years]

    def _days(self, year: int, month: int) -> tuple[datetime.date, datetime.date] | None:
        """Return the days of the first and the last event, as far as they are in the period."""
        if not (self.first and self.last):
            return None
        first, last = (
            (timezone.localtime(at) if timezone.is_aware(at) else at).date()
            for at in (self.first.time, self.last.time)
        )
        if year:
            begin = datetime.date(year, month or 1, 1)
            end = datetime.date(year, month or 12, calendar.monthrange(year, month or 12)[1])
            first, last = max(first, begin), min(last, end)
        return (first, last) if first <= last else None

    def _link(self, **parts: Any) -> str:
        filters = {f"time__{name}": value for name, value in parts.items()}
        return str(self.get_query_string(filters, ["time__"]))


_OWN = (BEFORE, AFTER, OF)
_SPAN = ("time__gte", "time__lt")
_WITH_YEAR = (*_SPAN, "time__year")
_PARAMETERS = ("time__year", "time__month", "time__day")


def _fits(at: datetime.datetime | None) -> bool:
    return at is not None and timezone.is_aware(at) == bool(settings.USE_TZ)


def _ends(events: QuerySet[AuditEvent]) -> tuple[Position | None, Position | None]:
    """Return where the first and the last of the events stand."""
    found = events.order_by("time", "pk").values_list("time", "pk")
    first, last = found.first(), found.last()
    return first and Position(*first), last and Position(*last)


def _day(date: datetime.date) -> str:
    return str(formats.date_format(date, "MONTH_DAY_FORMAT"))


def _month(date: datetime.date) -> str:
    return str(formats.date_format(date, "YEAR_MONTH_FORMAT"))
