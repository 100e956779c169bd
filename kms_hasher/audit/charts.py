"""
The chart of a key's calls by hour and outcome, drawn on the server as SVG.

There is no script and no inline style in it, so it shows under a strict Content Security
Policy; its colours are in `admin.css`. Calls that failed have a panel and a scale of their
own below: three among ten thousand would not be seen otherwise.
"""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from django.conf import settings
from django.template.loader import render_to_string
from django.utils import formats, timezone
from django.utils.safestring import SafeString
from django.utils.text import capfirst
from django.utils.translation import gettext

from kms_hasher import signals
from kms_hasher.audit import rollups

#: Hours shown, the present one included.
HOURS = 48

FAILURES = tuple(name for name in signals.OUTCOMES if name != signals.SUCCESS)

#: How many calls there were in an hour, by outcome.
Hours = Mapping[datetime.datetime, Mapping[str, int]]

# All in units of the SVG's view box. Whole numbers, so that no locale can spoil them.
_LEFT, _STEP, _BAR = 60, 16, 13
_WIDTH = _LEFT + HOURS * _STEP + 4
_LEGEND, _GAP, _TICKS = 46, 30, 24
_HEIGHTS = (110, 70)


@dataclass(frozen=True)
class Bar:
    x: int
    y: int
    width: int
    height: int
    outcome: str
    title: str


@dataclass(frozen=True)
class Panel:
    """One of the two sets of bars, with the scale they are drawn to."""

    title: str
    top: int
    bottom: int
    maximum: str
    bars: Sequence[Bar]


@dataclass(frozen=True)
class Label:
    x: int
    text: str
    outcome: str = ""


def calls_by_hour(
    ref: str, now: datetime.datetime | None = None
) -> dict[datetime.datetime, Counter[str]]:
    """Return the calls with the key of the last `HOURS` hours, oldest first, by outcome."""
    last = rollups.hour_of(now or timezone.now())
    since = last - datetime.timedelta(hours=HOURS - 1)
    until = last + datetime.timedelta(hours=1)
    found = rollups.series_by("outcome", since, until, latency=False, key_ref=ref)
    hours: dict[datetime.datetime, Counter[str]] = {}
    for hour, by_outcome in found.items():
        hours[hour] = Counter()
        for name, figures in by_outcome.items():
            known = name if name in signals.OUTCOMES else signals.ERROR
            hours[hour][known] += figures.count
    return hours


def render(ref: str, now: datetime.datetime | None = None) -> SafeString:
    """Return the chart of one key and, behind it, a table of the same figures, as HTML."""
    hours = calls_by_hour(ref, now)
    totals = sum(hours.values(), Counter())
    failed = sum(totals[name] for name in FAILURES)
    top = _LEGEND
    panels = []
    for title, outcomes, height in (
        (gettext("succeeded"), (signals.SUCCESS,), _HEIGHTS[0]),
        (gettext("failed"), FAILURES, _HEIGHTS[1]),
    ):
        panels.append(_panel(title, outcomes, hours, top, height))
        top += height + _GAP
    context = {
        "width": _WIDTH,
        "height": top - _GAP + _TICKS,
        "left": _LEFT,
        "panels": panels,
        "ticks": list(_ticks(hours)),
        "ticks_top": _LEGEND,
        "ticks_bottom": top - _GAP,
        "legend": [
            Label(
                _LEFT + at * (_WIDTH - _LEFT) // len(signals.OUTCOMES),
                f"{gettext(name)} {_number(totals[name])}",
                name,
            )
            for at, name in enumerate(signals.OUTCOMES)
        ],
        "title": gettext("KMS calls in the last %(hours)s hours") % {"hours": HOURS},
        "description": gettext("%(calls)s calls by hour and outcome; %(failed)s failed.")
        % {"calls": _number(totals.total()), "failed": _number(failed)},
        "outcomes": [capfirst(gettext(name)) for name in signals.OUTCOMES],
        "rows": [
            (_local(hour), [_number(found[name]) for name in signals.OUTCOMES])
            for hour, found in reversed(hours.items())
            if found
        ],
        "zone": timezone.get_current_timezone_name() if settings.USE_TZ else "",
    }
    return render_to_string("admin/kms_hasher/chart.html", context)


def _panel(title: str, outcomes: Sequence[str], hours: Hours, top: int, height: int) -> Panel:
    highest = max(sum(found[name] for name in outcomes) for found in hours.values())
    maximum = _round_up(highest)
    bars = []
    for at, (hour, found) in enumerate(hours.items()):
        bottom = top + height
        for name in outcomes:
            if found[name]:
                # A single call is to be seen, however high the others are.
                size = max(2, height * found[name] // maximum)
                bottom -= size
                text = f"{_local(hour)}: {_number(found[name])} {gettext(name)}"
                bars.append(Bar(_LEFT + at * _STEP, bottom, _BAR, size, name, text))
    return Panel(title, top, top + height, _number(maximum), bars)


def _ticks(hours: Hours) -> Iterable[Label]:
    for at, hour in enumerate(hours):
        local = timezone.localtime(hour) if settings.USE_TZ else hour
        if local.hour == 0:
            text = formats.date_format(local, "MONTH_DAY_FORMAT")
        elif local.hour % 6 == 0:
            text = formats.date_format(local, "H:i")
        else:
            continue
        yield Label(_LEFT + at * _STEP, text)


def _round_up(number: int) -> int:
    """Return the next number that looks well on an axis: 1, 2 or 5 and zeros."""
    step = 1
    while True:
        for factor in (1, 2, 5):
            if factor * step >= number:
                return factor * step
        step *= 10


def _local(hour: datetime.datetime) -> str:
    local = timezone.localtime(hour) if settings.USE_TZ else hour
    return formats.date_format(local, "Y-m-d H:i")


def _number(number: int) -> str:
    return str(formats.number_format(number, use_l10n=True, force_grouping=True))
