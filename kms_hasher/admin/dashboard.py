"""
The dashboard: calls, failures and latencies of a period, and how the audit stands.

It reads roll-ups and the few rows of seals, findings and marks, never the events, by a number
of queries that does not depend on how many there are of anything. What the reader may not see
elsewhere is not on it either.
"""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import urlencode

from django.conf import settings
from django.db.models import Q
from django.http import HttpRequest, QueryDict
from django.urls import reverse
from django.utils import formats, timezone
from django.utils.functional import Promise
from django.utils.safestring import SafeString
from django.utils.translation import gettext
from django.utils.translation import gettext_lazy as _

from kms_hasher import encoding, signals
from kms_hasher.admin import standing
from kms_hasher.admin.base import NONE, ON_PAGE, may_view, named, number, per_cent, short, time
from kms_hasher.admin.events import events_url, outcome
from kms_hasher.admin.figures import state_of
from kms_hasher.audit import charts, rollups
from kms_hasher.audit.rollups import DAY, HOUR, Figures
from kms_hasher.exceptions import MalformedHash
from kms_hasher.models import (
    AliasPeriod,
    RotationRun,
)

#: Figures by key and purpose.
Pairs = Mapping[tuple[str, str], Figures]


class Period(NamedTuple):
    """How far back a dashboard looks: so many hours or days, the present one included."""

    label: str | Promise
    step: str
    steps: int

    def since(self) -> datetime.datetime:
        """Return the beginning of its first hour or day."""
        now = timezone.now()
        if self.step == HOUR:
            return rollups.hour_of(now) - datetime.timedelta(hours=self.steps - 1)
        today = timezone.localdate() if settings.USE_TZ else now.date()
        first = today - datetime.timedelta(days=self.steps - 1)
        midnight = datetime.datetime.combine(first, datetime.time())
        return timezone.make_aware(midnight) if settings.USE_TZ else midnight


PERIODS = {
    "24h": Period(_("24 hours"), HOUR, 24),
    "7d": Period(_("7 days"), HOUR, 7 * 24),
    "30d": Period(_("30 days"), DAY, 30),
    "90d": Period(_("90 days"), DAY, 90),
}
DEFAULT = "24h"


class Selection(NamedTuple):
    """What is looked at: `parse` and `url` are inverse, but for nonsense."""

    period: str = DEFAULT
    key_ref: str = ""
    purpose: str = ""

    @classmethod
    def parse(cls, query: QueryDict) -> Selection:
        """Return what an address asks for; what it cannot ask for is left out."""
        period, purpose = query.get("period", ""), query.get("purpose", "")
        return cls(
            period if period in PERIODS else DEFAULT,
            ref if _is_ref(ref := query.get("key_ref", "")) else "",
            purpose if purpose in signals.PURPOSES else "",
        )

    def url(self, **changes: str) -> str:
        chosen = self._replace(**changes)._asdict()
        values = {n: v for n, v in chosen.items() if v and (n, v) != ("period", DEFAULT)}
        return f"{reverse('admin:kms_hasher_auditevent_dashboard')}?{urlencode(values)}"

    def filters(self, *, without: str = "") -> dict[str, Any]:
        """Return the filters of the roll-ups, and of the list of events."""
        names = ("key_ref", "purpose")
        return {n: v for n in names if n != without and (v := getattr(self, n))}


def context(request: HttpRequest) -> dict[str, Any]:
    """Return what the template shows."""
    chosen = Selection.parse(request.GET)
    period = PERIODS[chosen.period]
    since = period.since()
    runs = _runs(request, chosen, since)
    series = rollups.series_by("outcome", since, step=period.step, **chosen.filters())
    pairs = rollups.pairs("key_ref", "purpose", since)
    total = charts.merged(each for found in series.values() for each in found.values())
    by_outcome = sum((charts.calls(found) for found in series.values()), Counter[str]())
    return {
        "title": gettext("KMS calls and audit"),
        "periods": [
            {"label": each.label, "url": chosen.url(period=name), "on": name == chosen.period}
            for name, each in PERIODS.items()
        ],
        "chosen": [
            {"name": name, "value": value, "without": chosen.url(**{field: ""})}
            for field, name, value in (
                ("key_ref", gettext("key"), _key_id(chosen.key_ref)),
                ("purpose", gettext("purpose"), named(chosen.purpose)),
            )
            if getattr(chosen, field)
        ],
        "events_url": events_url(**_since(since), **chosen.filters()),
        "total": _row(total),
        "p99": charts.milliseconds(total.p99) or NONE,
        "chart": charts.draw(
            series,
            gettext("KMS calls in the last %(period)s") % {"period": period.label},
            step=period.step,
            latency=True,
            marks=[charts.Mark(run.started_at, _told(run)) for run in runs or ()],
            url=lambda start: events_url(**_step(start, period.step), **chosen.filters()),
        ),
        "outcomes": [
            {
                "name": outcome(name),
                "count": number(by_outcome[name]),
                "share": _share(by_outcome[name], total.count),
                "url": events_url(**_since(since), **chosen.filters(), outcome=name),
            }
            for name in signals.OUTCOMES
            if by_outcome[name]
        ],
        "keys": _keys(request, chosen, since, pairs),
        "purposes": _purposes(chosen, since, pairs),
        "runs": runs and [_run(run) for run in runs],
        "no_runs": runs is not None and not runs,
        "findings": standing.findings_shown(request),
        "seals": standing.seals_shown(request),
        "trail": standing.trail_shown(request),
    }


# --- calls --------------------------------------------------------------------------


def _grouped(pairs: Pairs, at: int, other: str) -> list[tuple[str, Figures]]:
    """
    Return the figures by key (`at` 0) or purpose (1), the most frequent first.

    `other` is what is chosen of the other of the two, and nothing is of this one: a table goes
    on naming what there is to choose from.
    """
    found: dict[str, list[Figures]] = {}
    for pair, figures in pairs.items():
        if not other or pair[1 - at] == other:
            found.setdefault(pair[at], []).append(figures)
    merged = [(name, charts.merged(each)) for name, each in found.items()]
    return sorted(merged, key=lambda item: (-item[1].count, item[0]))[:ON_PAGE]


def _keys(
    request: HttpRequest, chosen: Selection, since: datetime.datetime, pairs: Pairs
) -> list[dict[str, Any]]:
    aliases: dict[str, list[str]] = {}
    if may_view(request, AliasPeriod):
        now = AliasPeriod.objects.filter(open_alias__isnull=False).order_by("alias")
        for ref, alias in now.values_list("key__ref", "alias")[:ON_PAGE]:
            aliases.setdefault(ref, []).append(alias)
    filters = {**_since(since), **chosen.filters(without="key_ref")}
    return [
        {
            **_row(figures),
            "name": _short(ref),
            "about": ", ".join(aliases.get(ref, ())),
            "on": bool(ref) and ref == chosen.key_ref,
            "url": chosen.url(key_ref=ref) if _is_ref(ref) else "",
            "events": events_url(**filters, key_ref=ref) if ref else "",
        }
        for ref, figures in _grouped(pairs, 0, chosen.purpose)
    ]


def _purposes(
    chosen: Selection, since: datetime.datetime, pairs: Pairs
) -> list[dict[str, Any]]:
    filters = {**_since(since), **chosen.filters(without="purpose")}
    return [
        {
            **_row(figures),
            "name": named(name),
            "on": name == chosen.purpose,
            "url": chosen.url(purpose=name) if name in signals.PURPOSES else "",
            "events": events_url(**filters, purpose=name),
        }
        for name, figures in _grouped(pairs, 1, chosen.key_ref)
    ]


def _row(figures: Figures) -> dict[str, Any]:
    return {
        "calls": number(figures.count),
        "failures": number(figures.failures),
        "failed": bool(figures.failures),
        "share": _share(figures.failures, figures.count),
        "p50": charts.milliseconds(figures.p50) or NONE,
        "p95": charts.milliseconds(figures.p95) or NONE,
    }


def _share(part: int, whole: int) -> str:
    """Return a part in per cent; neither 0 nor 100 is said of what is not."""
    percent = 100 * part / whole if whole else 0
    if 0 < percent < 0.01:
        text = "< " + formats.number_format(0.01, 2)
    elif 99.99 < percent < 100:
        text = "> " + formats.number_format(99.99, 2)
    else:
        # It cuts off what it does not show.
        text = formats.number_format(round(percent, 2), 2 if 0 < percent < 100 else 0)
    return per_cent(text)


def _since(since: datetime.datetime) -> dict[str, str]:
    return {"time__gte": since.isoformat()}


def _step(start: datetime.datetime, step: str) -> Mapping[str, str]:
    """Return the filters of the events of an hour or a day."""
    if step == HOUR:
        until = start + datetime.timedelta(hours=1)
        return {"time__gte": start.isoformat(), "time__lt": until.isoformat()}
    return {f"time__{name}": str(getattr(start, name)) for name in ("year", "month", "day")}


def _is_ref(ref: str) -> bool:
    try:
        return bool(encoding.key_id(ref))
    except MalformedHash:
        return False


def _key_id(ref: str) -> str:
    return encoding.key_id(ref) if _is_ref(ref) else ref


def _short(ref: str) -> SafeString | str:
    return short(_key_id(ref)) if ref else gettext("KMS named none")


# --- rotations ----------------------------------------------------------------------


def _runs(
    request: HttpRequest, chosen: Selection, since: datetime.datetime
) -> list[RotationRun] | None:
    """Return the runs of the period, the newest first; None to those who may not see any."""
    if not may_view(request, RotationRun):
        return None
    found = RotationRun.objects.filter(started_at__gte=since)
    if chosen.key_ref:
        ref = chosen.key_ref
        found = found.filter(Q(key__ref=ref) | Q(previous_key__ref=ref))
    return list(found.select_related("key", "previous_key")[:ON_PAGE])


def _run(run: RotationRun) -> dict[str, Any]:
    return {
        "pk": run.pk,
        "time": time(run.started_at),
        "kind": run.get_kind_display(),
        "state": state_of(run),
        "from": short(str(run.previous_key)) if run.previous_key else NONE,
        "to": short(str(run.key)) if run.key else NONE,
        "rewritten": number(run.rewritten),
    }


def _told(run: RotationRun) -> str:
    return f"{time(run.started_at)}: {run.get_kind_display()}, {state_of(run)}"
