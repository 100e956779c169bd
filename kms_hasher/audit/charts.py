"""
Charts of calls by hour or day and outcome, drawn on the server as SVG.

There is no script and no inline style in them, so they show under a strict Content Security
Policy; their colours are in `admin.css`. Calls that failed have a panel and a scale of their
own below: three among ten thousand would not be seen otherwise.
"""

from __future__ import annotations

import datetime
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from django.conf import settings
from django.template.loader import render_to_string
from django.utils import formats, timezone
from django.utils.safestring import SafeString
from django.utils.text import capfirst
from django.utils.translation import gettext

from kms_hasher import signals
from kms_hasher.audit import rollups
from kms_hasher.audit.rollups import HOUR, Figures

#: Hours shown of a key, the present one included.
HOURS = 48

FAILURES = tuple(name for name in signals.OUTCOMES if name != signals.SUCCESS)

#: What is drawn: the figures of each hour or day by outcome, as `rollups.series_by` has them.
Series = Mapping[datetime.datetime, Mapping[str, Figures]]

# All in units of the SVG's view box. Whole numbers, so that no locale can spoil them.
_LEFT, _PLOT = 72, 768
_WIDTH = _LEFT + _PLOT + 4
_LEGEND, _MARKS, _GAP, _TICKS = 46, 14, 30, 24
_HEIGHTS = (110, 70, 70)

#: So much must be left of the plot for the text of a tick.
_TICK_WIDTH = 90

#: What the colour and the gap after a text of the legend take, in letters.
_AROUND = 5


@dataclass(frozen=True)
class Mark:
    """What is marked at a moment, such as a rotation."""

    time: datetime.datetime
    text: str


@dataclass(frozen=True)
class Step:
    """One hour or day: how many calls by outcome, all of their latencies, where it leads."""

    start: datetime.datetime
    calls: Counter[str]
    latency: Figures = field(default_factory=Figures)
    url: str = ""


@dataclass(frozen=True)
class Bar:
    x: int
    y: int
    width: int
    height: int
    outcome: str
    title: str
    url: str = ""


@dataclass(frozen=True)
class Panel:
    """One of the sets of bars, with the scale they are drawn to."""

    title: str
    top: int
    bottom: int
    maximum: str
    bars: Sequence[Bar]
    minimum: str = "0"


@dataclass(frozen=True)
class Label:
    x: int
    text: str
    outcome: str = ""


def render(ref: str, now: datetime.datetime | None = None) -> SafeString:
    """Return the chart of one key's last hours, and a table of the same figures, as HTML."""
    last = rollups.hour_of(now or timezone.now())
    since = last - datetime.timedelta(hours=HOURS - 1)
    until = last + datetime.timedelta(hours=1)
    series = rollups.series_by("outcome", since, until, latency=False, key_ref=ref)
    return draw(series, gettext("KMS calls in the last %(hours)s hours") % {"hours": HOURS})


def draw(
    series: Series,
    title: str,
    *,
    step: str = HOUR,
    latency: bool = False,
    marks: Sequence[Mark] = (),
    url: Callable[[datetime.datetime], str] | None = None,
) -> SafeString:
    """
    Return a chart of the series, with a table of the same figures behind it, as HTML.

    `step` is what the series was read by; `latency` adds a panel for it, `marks` are drawn
    over all panels, and `url` gives where the bars and rows of an hour or day lead.
    """
    steps = [
        Step(start, calls(found), merged(found.values()), url(start) if url else "")
        for start, found in series.items()
    ]
    totals = sum((each.calls for each in steps), Counter[str]())
    failed = sum(totals[name] for name in FAILURES)
    top = _LEGEND + (_MARKS if marks else 0)
    panels = [
        _panel(gettext("succeeded"), (signals.SUCCESS,), steps, step, top, _HEIGHTS[0]),
        _panel(gettext("failed"), FAILURES, steps, step, top + _HEIGHTS[0] + _GAP, _HEIGHTS[1]),
    ]
    if latency:
        panels.append(_latencies(steps, step, panels[-1].bottom + _GAP, _HEIGHTS[2]))
    description = gettext("%(calls)s calls by %(step)s and outcome; %(failed)s failed.") % {
        "calls": number(totals.total()),
        "failed": number(failed),
        "step": gettext("hour") if step == HOUR else gettext("day"),
    }
    if latency:
        description += " " + gettext(
            # xgettext:no-python-format
            "Bars of latency reach from the median to what 95 % of the calls did not exceed."
        )
    if marks:
        description += " " + gettext("Rotations are marked by a triangle and a dashed line.")
    context = {
        "width": _WIDTH,
        "height": panels[-1].bottom + _TICKS,
        "left": _LEFT,
        "panels": panels,
        "ticks": list(_ticks([each.start for each in steps], step)),
        "ticks_top": _LEGEND + (_MARKS if marks else 0),
        "ticks_bottom": panels[-1].bottom,
        "marks": list(_marks(marks, steps)),
        "marks_top": _LEGEND - 18,
        "legend": _legend(totals),
        "title": title,
        "description": description,
        "head": [
            gettext("Hour from") if step == HOUR else gettext("Day"),
            *(capfirst(gettext(name)) for name in signals.OUTCOMES),
            *((gettext("Median"), gettext("95 % within")) if latency else ()),
        ],
        "rows": [_row(each, step, latency) for each in reversed(steps) if each.calls],
        "empty": gettext("Hours without a call are left out.")
        if step == HOUR
        else gettext("Days without a call are left out."),
        "zone": timezone.get_current_timezone_name() if settings.USE_TZ else "",
    }
    return render_to_string("admin/kms_hasher/chart.html", context)


# --- figures ------------------------------------------------------------------------


def calls(found: Mapping[str, Figures]) -> Counter[str]:
    """Return how many calls there were by outcome; one unheard of is an error."""
    counted = Counter[str]()
    for name, figures in found.items():
        counted[name if name in signals.OUTCOMES else signals.ERROR] += figures.count
    return counted


def merged(among: Iterable[Figures]) -> Figures:
    """Return the figures of all together."""
    count = failures = 0
    histogram = Counter[int]()
    for each in among:
        count += each.count
        failures += each.failures
        histogram.update(each.histogram)
    return Figures(count, failures, histogram)


def milliseconds(seconds: float | None) -> str:
    """Return a latency as people read it, or "" for none."""
    if seconds is None:
        return ""
    value = seconds * 1000
    digits = 1 if value < 10 and round(value, 1) % 1 else 0
    text = formats.number_format(
        round(value, digits), digits, use_l10n=True, force_grouping=True
    )
    return gettext("%(number)s ms") % {"number": text}


def number(value: int) -> str:
    return str(formats.number_format(value, use_l10n=True, force_grouping=True))


# --- drawing ------------------------------------------------------------------------


def _panel(
    title: str, outcomes: Sequence[str], steps: Sequence[Step], step: str, top: int, height: int
) -> Panel:
    highest = max((sum(each.calls[name] for name in outcomes) for each in steps), default=0)
    maximum = _round_up(highest)
    bars = []
    for at, each in enumerate(steps):
        bottom = top + height
        for name in outcomes:
            if each.calls[name]:
                # A single call is to be seen, however high the others are.
                size = max(2, height * each.calls[name] // maximum)
                bottom -= size
                text = f"{_at(each.start, step)}: {number(each.calls[name])} {gettext(name)}"
                x, width = _place(at, len(steps))
                bars.append(Bar(x, bottom, width, size, name, text, each.url))
    return Panel(title, top, top + height, number(maximum), bars)


def _latencies(steps: Sequence[Step], step: str, top: int, height: int) -> Panel:
    """
    Return the panel of latencies, whose bars reach from p50 to p95.

    Its scale is logarithmic: hours of time-outs would make all others look alike.
    """
    quantiles = [(each.latency.p50, each.latency.p95) for each in steps]
    known = [(p50, p95) for p50, p95 in quantiles if p50 is not None and p95 is not None]
    # Powers of ten of a second.
    low = math.floor(math.log10(min((p50 for p50, _ in known), default=0.001)))
    high = max(math.ceil(math.log10(max((p95 for _, p95 in known), default=0.01))), low + 1)

    def level(seconds: float) -> int:
        return round(height * (math.log10(seconds) - low) / (high - low))

    bars = []
    for at, (each, (p50, p95)) in enumerate(zip(steps, quantiles, strict=True)):
        if p50 is None or p95 is None:
            continue
        size = max(2, level(p95) - level(p50))
        y = top + height - max(level(p95), size)
        text = gettext("%(time)s: median %(median)s, 95 %% within %(most)s") % {
            "time": _at(each.start, step),
            "median": milliseconds(p50),
            "most": milliseconds(p95),
        }
        x, width = _place(at, len(steps))
        bars.append(Bar(x, y, width, size, "latency", text, each.url))
    title = gettext("latency, from the median to the 95th percentile, on a logarithmic scale")
    ends = (milliseconds(10.0**high), bars, milliseconds(10.0**low))
    return Panel(title, top, top + height, *ends)


def _place(at: int, of: int) -> tuple[int, int]:
    """Return where a bar begins, and its width."""
    x, following = _PLOT * at // of, _PLOT * (at + 1) // of
    return _LEFT + x, max(1, following - x - max(1, (following - x) // 5))


def _marks(marks: Sequence[Mark], steps: Sequence[Step]) -> Iterable[Label]:
    """Place the marks that lie within the steps."""
    if not steps:
        return
    starts = [each.start for each in steps]
    for mark in marks:
        at = sum(start <= mark.time for start in starts) - 1
        if at < 0:
            continue
        before = starts[at]
        after = starts[at + 1] if at + 1 < len(starts) else before + (before - starts[at - 1])
        part = min((mark.time - before) / (after - before), 1) if after > before else 0
        yield Label(_LEFT + round(_PLOT * (at + part) / len(starts)), mark.text)


def _legend(totals: Mapping[str, int]) -> list[Label]:
    """Share the width by how long the texts are: in some languages they are longer."""
    texts = {name: f"{gettext(name)} {number(totals[name])}" for name in signals.OUTCOMES}
    parts = [len(text) + _AROUND for text in texts.values()]
    return [
        Label(_LEFT + (_WIDTH - _LEFT) * sum(parts[:at]) // sum(parts), text, name)
        for at, (name, text) in enumerate(texts.items())
    ]


def _ticks(starts: Sequence[datetime.datetime], step: str) -> Iterable[Label]:
    stride = -(-len(starts) // 8)  # of days
    for at, start in enumerate(starts):
        local = _local(start)
        if step != HOUR:
            wanted, form = at % stride == 0, "MONTH_DAY_FORMAT"
        elif local.hour == 0:
            wanted, form = True, "MONTH_DAY_FORMAT"
        else:
            wanted, form = local.hour % 6 == 0 and len(starts) <= HOURS, "H:i"
        x, _width = _place(at, len(starts))
        if wanted and x + _TICK_WIDTH <= _WIDTH + (50 if form == "H:i" else 0):
            yield Label(x, formats.date_format(local, form))


def _row(each: Step, step: str, latency: bool) -> dict[str, Any]:
    cells = [number(each.calls[name]) for name in signals.OUTCOMES]
    if latency:
        cells += [milliseconds(each.latency.p50), milliseconds(each.latency.p95)]
    return {"time": _at(each.start, step), "url": each.url, "cells": cells}


def _round_up(number: int) -> int:
    """Return the next number that looks well on an axis: 1, 2 or 5 and zeros."""
    step = 1
    while True:
        for factor in (1, 2, 5):
            if factor * step >= number:
                return factor * step
        step *= 10


def _local(start: datetime.datetime) -> datetime.datetime:
    return timezone.localtime(start) if timezone.is_aware(start) else start


def _at(start: datetime.datetime, step: str) -> str:
    return formats.date_format(_local(start), "Y-m-d H:i" if step == HOUR else "Y-m-d")
