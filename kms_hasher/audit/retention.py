"""
How long events are kept, and how their roll-ups are kept few and true.

Everything here goes by batches and hours, each a short transaction of its own, so that it
may run beside logins, be killed at any moment and be run again.
"""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Iterator

from django.db import router, transaction
from django.db.models import F, Q, QuerySet, Sum
from django.utils import timezone

from kms_hasher.audit import store
from kms_hasher.audit.rollups import bucket_of, hour_of
from kms_hasher.models import AppendOnly, AuditEvent, AuditHour

#: How many events are deleted by one statement.
BATCH = 5_000

#: How long after its end an hour's roll-ups are left to those who write them.
SETTLED = datetime.timedelta(hours=1)


def prunable_before(cutoff: datetime.datetime) -> datetime.datetime:
    """
    Return the time before which events may be pruned: `cutoff`, or an earlier one.

    Where events are sealed, the place to keep those that no seal covers.
    """
    return cutoff


def prunable(cutoff: datetime.datetime) -> int:
    """Return how many events are older."""
    return int(_older(cutoff).count())


def prune(cutoff: datetime.datetime, batch: int = BATCH) -> Iterator[int]:
    """Delete events older than `cutoff`, the oldest first; yield how many in each batch."""
    events = _older(cutoff).order_by("time", "pk")
    while True:
        last = events.values_list("time", "pk")[batch - 1 : batch].first()
        some = events
        if last:
            time, pk = last
            # The first of these is what the index on the time is for.
            some = events.filter(time__lte=time).filter(Q(time__lt=time) | Q(pk__lte=pk))
        deleted = some.order_by()._prune()
        if deleted:
            yield deleted
        if not last:
            return


def _older(cutoff: datetime.datetime) -> AppendOnly:
    return AppendOnly(AuditEvent, using=router.db_for_write(AuditEvent)).filter(time__lt=cutoff)


def merge(now: datetime.datetime | None = None) -> int:
    """
    Bring the slots of each hour that is over into one row. Return how many rows went.

    What is read from roll-ups does not change by it, but is read faster.
    """
    rows = _hours().filter(hour__lt=_settled(now), slot__gt=0)
    gone = 0
    for hour in list(rows.order_by("hour").values_list("hour", flat=True).distinct()):
        with transaction.atomic(using=rows.db):
            found = rows.filter(hour=hour).order_by()
            found.update(slot=F("slot"))  # locks them, on every database
            sums: Counter[store.Row] = Counter()
            for *group, _slot, count in found.values_list(*store.GROUP, "count"):
                sums[(*group, 0)] += count
            gone += found.delete()[0]
            if sums:
                store.add(sums, rows.db)
    return gone


def rebuild(now: datetime.datetime | None = None) -> Iterator[tuple[datetime.datetime, int]]:
    """
    Count events that roll-ups do not count, as after an upgrade from before there were any.

    Yields each hour and its number of events. An hour whose roll-ups count as many events as
    there are, or more because some have been pruned, is left as it is.
    """
    events = AuditEvent.objects.using(router.db_for_write(AuditEvent))
    first = events.order_by("time").values_list("time", flat=True).first()
    hour = hour_of(first) if first else _settled(now)
    while hour < _settled(now):
        of_hour = events.filter(time__gte=hour, time__lt=hour + datetime.timedelta(hours=1))
        with transaction.atomic(using=events.db):
            rows = _hours().filter(hour=hour)
            number = of_hour.count()
            counted = rows.order_by().aggregate(number=Sum("count"))["number"] or 0
            if number > counted:
                rows.delete()
                store.add(_count(of_hour, hour), events.db)
        if number > counted:
            yield hour, number
        hour += datetime.timedelta(hours=1)


def _count(events: QuerySet[AuditEvent], hour: datetime.datetime) -> Counter[store.Row]:
    names = ("key_ref", "operation", "purpose", "outcome", "latency_us")
    return Counter(
        (hour, ref, operation, purpose, outcome, bucket_of(operation, us), 0)
        for ref, operation, purpose, outcome, us in events.order_by()
        .values_list(*names)
        .iterator(chunk_size=BATCH)
    )


def _hours() -> QuerySet[AuditHour]:
    return AuditHour.objects.using(router.db_for_write(AuditHour))


def _settled(now: datetime.datetime | None) -> datetime.datetime:
    return hour_of((now or timezone.now()) - SETTLED)
