"""
That the events of old segments are given up: what may be, and how it is recorded first.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator

from django.db import IntegrityError, transaction
from django.db.models import F
from django.utils import timezone

from kms_hasher.audit import anchors, canonical, segments
from kms_hasher.exceptions import SealRefused
from kms_hasher.models import AuditSeal

TOO_YOUNG = "Seal {sequence} is not older than {cutoff:%Y-%m-%d %H:%M}: its events stay."


def prunable_before(cutoff: datetime.datetime) -> int:
    """
    Return up to which segment all events are older than `cutoff`, 0 for none.

    An event is at least as old as its seal, whose time is what counts: events have the times of
    many clocks.
    """
    younger = segments.seals().filter(sealed_at__gte=cutoff).order_by("sequence").first()
    if younger:
        return younger.sequence - 1
    last = segments.newest()
    return last.sequence if last else 0


def mark_pruned(seal: AuditSeal, cutoff: datetime.datetime) -> AuditSeal:
    """
    Record, here and by anchors in KMS, that the events of the segments up to the seal's are
    given up; return the seal of the last one. To be called before they are deleted.

    What is to be deleted afterwards, now or after a crash, are `segments.pruned_events` of that
    seal. If as much was pruned before, nothing is done. The seals stay. Raises `SealRefused`
    if the seal is not older than `cutoff`, and `KMSError`.
    """
    # What is anchored is the seal as it is looked at here, its time with it. Read once more,
    # it might be another: dated back while it was chosen, and put right by now.
    if seal.sealed_at >= cutoff:
        raise SealRefused(TOO_YOUNG.format(sequence=seal.sequence, cutoff=cutoff))
    former = segments.pruned()
    if former and former.sequence >= seal.sequence:
        return former
    seal.pruned_at = timezone.now()
    seal.pruning_anchors = anchors.of_pruning(seal)
    earlier = segments.seals().filter(sequence__lt=seal.sequence)
    with transaction.atomic(using=segments.database()):
        seal.save(using=segments.database(), update_fields=["pruned_at", "pruning_anchors"])
        earlier.exclude(pruned_at=None).update(pruned_at=None, pruning_anchors={})
    if former and not segments.pruned_events(former).exists():
        earlier.filter(sequence__lte=former.sequence).update(leaves=b"")
    return seal


@contextlib.contextmanager
def paused() -> Iterator[int]:
    """
    Let no seal be made during the block, a transaction; give the id up to which all is sealed.

    What is deleted in it above that id is in no seal, and will be in none: a sealer that locks
    the newest seal while it works is waited for, and another comes to its insert only after the
    block, and counts the events once more.
    """
    while True:
        last = segments.newest()
        with transaction.atomic(using=segments.database()):
            if last is None:
                first = _take_first()
                if first is None:
                    continue
                yield canonical.FLOOR
                first.delete()
                return
            # Locks it on every database.
            segments.seals().filter(pk=last.pk).update(sequence=F("sequence"))
            if segments.newest() == last:
                yield last.last_id
                return


def _take_first() -> AuditSeal | None:
    """Return a row in the place of the first seal, for a moment; None if that was made."""
    database = segments.database()
    first = AuditSeal(
        sequence=1, version=0, sealed_at=timezone.now(), after_id=0, last_id=0, count=0
    )
    try:
        with transaction.atomic(using=database):
            first.save(using=database, force_insert=True)
    except IntegrityError:
        return None
    return first
