"""
How many events there were and how long the calls took, by hour: the roll-ups.

Pages, charts and monitors read these and never the events, so that they answer at once
however many there are. Roll-ups are written in the transaction of the events they count
(see `recorder`), so the two always agree; they stay when the events are pruned.

A row counts the events of one hour, key, operation, purpose, outcome and *bucket*: buckets
are the bins of a histogram of latencies, four to the doubling, so that a quantile read from
them is within 9.1 % of the true one. Rows are added up, whatever the period and grouping.
"""

from __future__ import annotations

import datetime
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from django.db.models import Sum
from django.utils import timezone

from kms_hasher import signals
from kms_hasher.models import AuditHour

HOUR, DAY = "hour", "day"

#: What figures can be filtered and grouped by.
GROUPS = ("key_ref", "purpose", "operation", "outcome")

#: Buckets to the doubling of a latency.
RESOLUTION = 4

#: The bucket of what is no call and took no time: see `signals.PARSE`.
NO_CALL = -1

#: The most that a bucket and a row's number can be, unless somebody else put them there.
LAST_BUCKET, MOST = 63 * RESOLUTION, 2**40


@dataclass(frozen=True)
class Figures:
    """What some roll-ups come to. `histogram` has the number of calls in each bucket."""

    count: int = 0
    failures: int = 0
    histogram: Mapping[int, int] = field(default_factory=dict)

    def quantile(self, share: float) -> float | None:
        """
        Return the latency in seconds that `share` of the calls did not exceed.

        It is within 9.1 % of the true one. None if there was no call, or the histogram was
        not asked for.
        """
        calls = sum(self.histogram.values())
        rank = max(1, math.ceil(share * calls))
        for bucket, number in sorted(self.histogram.items()):
            rank -= number
            if rank <= 0:
                return middle(bucket)
        return None

    @property
    def p50(self) -> float | None:
        return self.quantile(0.5)

    @property
    def p95(self) -> float | None:
        return self.quantile(0.95)

    @property
    def p99(self) -> float | None:
        return self.quantile(0.99)


def totals(
    since: datetime.datetime,
    until: datetime.datetime | None = None,
    *,
    latency: bool = True,
    **filters: str,
) -> Figures:
    """
    Return the figures of a period: of the hour that `since` lies in up to `until`, or now.

    `filters` are values of `GROUPS`, as in `outcome="denied"`. Without `latency` there are
    no quantiles, and a fraction of the rows is read. As with all functions here, events of
    one hour are not told apart: an hour that has begun before `until` counts as a whole.
    """
    rows = _read((), since, until, latency, filters)
    return _figures(rows)


def grouped(
    by: str,
    since: datetime.datetime,
    until: datetime.datetime | None = None,
    *,
    latency: bool = True,
    **filters: str,
) -> dict[str, Figures]:
    """Return the figures for each value of one of `GROUPS`, the most frequent first."""
    found = _split(_read((by,), since, until, latency, filters))
    figures = {str(value): _figures(rows) for value, rows in found.items()}
    return dict(sorted(figures.items(), key=lambda item: (-item[1].count, item[0])))


def pairs(
    one: str,
    other: str,
    since: datetime.datetime,
    until: datetime.datetime | None = None,
    *,
    latency: bool = True,
    **filters: str,
) -> dict[tuple[str, str], Figures]:
    """Return the figures for each pair of values of two of `GROUPS`."""
    found: dict[tuple[str, str], list[_Row]] = {}
    for first, second, *rest in _read((one, other), since, until, latency, filters):
        found.setdefault((str(first), str(second)), []).append(tuple(rest))
    return {pair: _figures(rows) for pair, rows in found.items()}


def series(
    since: datetime.datetime,
    until: datetime.datetime | None = None,
    *,
    step: str = HOUR,
    latency: bool = True,
    **filters: str,
) -> dict[datetime.datetime, Figures]:
    """
    Return the figures of each hour or day (`step`) of a period, oldest first, without gaps.

    Hours are named by their beginning, in UTC; days by theirs in the current time zone. With
    USE_TZ off both are naive. An hour belongs to the day in which it begins.
    """
    found = _split(_read(("hour",), since, until, latency, filters), _start(step))
    return {start: _figures(found.get(start, [])) for start in _starts(since, until, step)}


def series_by(
    by: str,
    since: datetime.datetime,
    until: datetime.datetime | None = None,
    *,
    step: str = HOUR,
    latency: bool = True,
    **filters: str,
) -> dict[datetime.datetime, dict[str, Figures]]:
    """Return `series`, and in it the figures for each value of one of `GROUPS`."""
    found = _split(_read(("hour", by), since, until, latency, filters), _start(step))
    return {
        start: {
            str(value): _figures(rows)
            for value, rows in sorted(_split(found.get(start, [])).items())
        }
        for start in _starts(since, until, step)
    }


# --- hours, days and buckets ----------------------------------------------------------


def hour_of(time: datetime.datetime) -> datetime.datetime:
    """Return the beginning of the hour, in UTC; of a naive time, the naive one."""
    if timezone.is_aware(time):
        time = time.astimezone(datetime.timezone.utc)
    return time.replace(minute=0, second=0, microsecond=0)


def bucket_of(operation: str, latency_us: int) -> int:
    """Return the bucket of a latency in microseconds."""
    if operation in (signals.PARSE, signals.CIRCUIT_BREAKER):
        return NO_CALL
    return math.floor(RESOLUTION * math.log2(max(1, latency_us)))


def middle(bucket: int) -> float:
    """Return the latency in seconds that is as far from either end of a bucket, as a ratio."""
    bucket = min(max(bucket, 0), LAST_BUCKET)
    return float(2 ** ((bucket + 0.5) / RESOLUTION)) / 1_000_000


def _day_of(hour: datetime.datetime) -> datetime.datetime:
    if timezone.is_aware(hour):
        hour = timezone.localtime(hour)
    return _midnight(hour.date(), hour)


def _midnight(date: datetime.date, like: datetime.datetime) -> datetime.datetime:
    naive = datetime.datetime.combine(date, datetime.time())
    return timezone.make_aware(naive) if timezone.is_aware(like) else naive


def _start(step: str) -> Callable[[datetime.datetime], datetime.datetime]:
    # Many rows are of one hour. The time zone may be another at the next call.
    return functools.cache(hour_of if step == HOUR else _day_of)


def _starts(
    since: datetime.datetime, until: datetime.datetime | None, step: str
) -> Iterable[datetime.datetime]:
    until = until or timezone.now()
    start: datetime.datetime = _start(step)(hour_of(since))
    while start < until:
        yield start
        if step == HOUR:
            start += datetime.timedelta(hours=1)
        else:
            start = _midnight(start.date() + datetime.timedelta(days=1), start)


# --- reading ----------------------------------------------------------------------------

#: What was grouped by, without its first value each time it is split; then outcome, bucket
#: and number.
_Row = tuple[Any, ...]


def _read(
    by: tuple[str, ...],
    since: datetime.datetime,
    until: datetime.datetime | None,
    latency: bool,
    filters: Mapping[str, str],
) -> list[_Row]:
    if unknown := {*by, *filters} - {"hour", *GROUPS}:
        raise ValueError(f"not one of {', '.join(GROUPS)}: {', '.join(sorted(unknown))}")
    rows = AuditHour.objects.filter(hour__gte=hour_of(since), count__range=(1, MOST), **filters)
    if until is not None:
        rows = rows.filter(hour__lt=until)
    names = (*by, "outcome", *(["bucket"] if latency else []))
    # An outcome that is grouped by is read twice, which keeps `_figures` the same for all.
    distinct = dict.fromkeys(names)
    found = rows.order_by().values(*distinct).annotate(number=Sum("count"))
    return [
        (
            *(row[name] for name in by),
            row["outcome"],
            row["bucket"] if latency else NO_CALL,
            int(row["number"]),
        )
        for row in found
    ]


def _split(rows: Iterable[_Row], key: Any = lambda value: value) -> dict[Any, list[_Row]]:
    found: dict[Any, list[_Row]] = {}
    for value, *rest in rows:
        found.setdefault(key(value), []).append(tuple(rest))
    return found


def _figures(rows: Iterable[_Row]) -> Figures:
    count = failures = 0
    histogram: Counter[int] = Counter()
    for outcome, bucket, number in rows:
        count += number
        if outcome != signals.SUCCESS:
            failures += number
        if bucket != NO_CALL:
            histogram[bucket] += number
    return Figures(count, failures, dict(sorted(histogram.items())))
