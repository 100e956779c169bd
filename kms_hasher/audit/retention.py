"""
How long events are kept, and how their roll-ups are kept few and true.

Everything here goes by batches and hours, each a short transaction of its own, so that it
may run beside logins, be killed at any moment and be run again.
"""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from django.db import router, transaction
from django.db.models import F, Q, QuerySet, Sum
from django.utils import timezone

from kms_hasher.audit import pruning, segments, store
from kms_hasher.audit.rollups import bucket_of, hour_of
from kms_hasher.models import AppendOnly, AuditEvent, AuditHour, AuditSeal

#: How many events are deleted by one statement.
BATCH = 5_000

#: How many rows of roll-ups are deleted by one statement.
MERGED = 500

#: How long after its end an hour's roll-ups are left to those who write them.
SETTLED = datetime.timedelta(hours=1)


class Prunable(NamedTuple):
    """
    What may be pruned of the events older than `cutoff`: of sealed ones all up to `seal`, and
    the `loose` ones that no seal needs; and how many are `kept`, as no seal covers them yet.
    """

    cutoff: datetime.datetime
    seal: AuditSeal | None
    loose: AppendOnly | None
    kept: int

    @property
    def number(self) -> int:
        """How many events that is."""
        sealed = segments.pruned_events(self.seal).count() if self.seal else 0
        return int(sealed + (self.loose.count() if self.loose is not None else 0))


def prunable(cutoff: datetime.datetime, *, force: bool = False) -> Prunable:
    """
    Return what may be pruned of the events older than `cutoff`.

    Where the audit is sealed, whole segments go, the oldest first, so that what is left can
    still be verified; with `force` also what no seal covers yet. An event in a sealed segment
    that is not older as a whole is kept in any case, and not counted.
    """
    newest = segments.newest()
    older = _older(cutoff)
    if newest is None:
        return Prunable(cutoff, None, older, 0)
    upto = pruning.prunable_before(cutoff)
    seal = segments.seals().filter(sequence=upto).first()
    unsealed = older.filter(pk__gt=newest.last_id)
    if force:
        return Prunable(cutoff, seal, unsealed, 0)
    return Prunable(cutoff, seal, None, unsealed.count())


def prune(what: Prunable, batch: int = BATCH) -> Iterator[int]:
    """
    Delete the events, the oldest first; yield how many in each batch.

    Of sealed ones it is first recorded, in KMS too, that they are given up. Raises `KMSError`
    or `SealRefused` before anything is deleted.
    """
    if what.seal:
        # After a run that was killed, what it had not come to goes as well.
        seal = pruning.mark_pruned(what.seal, what.cutoff)
        yield from _delete(segments.pruned_events(seal), batch)
    while what.loose is not None:
        # A seal made since the last batch keeps what it covers.
        with pruning.paused() as sealed:
            events = what.loose.filter(pk__gt=sealed).order_by("time", "pk")
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


def _delete(events: QuerySet[AuditEvent], batch: int) -> Iterator[int]:
    while last := events.order_by("pk").values_list("pk", flat=True)[batch - 1 : batch].first():
        yield _prune(events.filter(pk__lte=last))
    if rest := _prune(events):
        yield rest


def _prune(events: QuerySet[AuditEvent]) -> int:
    pruned = AppendOnly(AuditEvent, query=events.query.chain(), using=events.db)
    return int(pruned.order_by()._prune())


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
            pks = []
            # A late event may have added a row since, or add one before these are deleted.
            read = found.select_for_update().values_list("pk", *store.GROUP, "count")
            for pk, *group, _slot, count in read:
                pks.append(pk)
                sums[(*group, 0)] += count
            for start in range(0, len(pks), MERGED):
                gone += found.filter(pk__in=pks[start : start + MERGED]).delete()[0]
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
