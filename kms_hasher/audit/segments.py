"""
The segments of the audit as they are in the database: their seals and their events.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from django.db import router
from django.db.models import Q, QuerySet

from kms_hasher.audit import canonical
from kms_hasher.models import AuditEvent, AuditSeal

#: Events read at a time.
PAGE = 2_000

#: So many unsealed events are counted; more are said to be "at least" that many.
COUNTED = 100_000

SAME_ID = "there are several events with one id"


def database() -> str:
    """Return the alias of the database that the audit is in."""
    return router.db_for_write(AuditSeal)


def newest() -> AuditSeal | None:
    """Return the newest seal, without its leaves."""
    return seals().order_by("-sequence").first()


def seals() -> QuerySet[AuditSeal]:
    """Return all seals, without their leaves."""
    return AuditSeal.objects.using(database()).defer("leaves")


def leaves(seal: AuditSeal) -> bytes:
    """Return the leaves of a seal, b"" if it is gone."""
    rows = AuditSeal.objects.using(database()).filter(pk=seal.pk)
    return bytes(rows.values_list("leaves", flat=True).first() or b"")


def all_events() -> QuerySet[AuditEvent]:
    return AuditEvent.objects.using(database())


def probe() -> None:
    """Raise `django.db.Error` if the database is out."""
    all_events().exists()
    seals().exists()


def outside() -> list[int]:
    """Return the first ids, of those there are, that no database gives and no segment holds."""
    rows = all_events().filter(Q(pk__lte=canonical.FLOOR) | Q(pk=None))
    return list(rows.order_by("pk").values_list("pk", flat=True)[:PAGE])


def pruned() -> AuditSeal | None:
    """Return the seal of the last segment that was pruned; all before it were, too."""
    return seals().exclude(pruned_at=None).order_by("-sequence").first()


def pruned_events(upto: AuditSeal) -> QuerySet[AuditEvent]:
    """Return what is left of the events of the segments up to the seal."""
    later = seals().filter(sequence__gt=upto.sequence).exclude(late="")
    kept = [id_ for seal in later for id_ in canonical.late_ids(seal)]
    return all_events().filter(pk__lte=upto.last_id).exclude(pk__in=kept)


def is_sealed(id_: int) -> bool:
    """
    Return whether an event with the id is in a segment, as the segment's leaves tell.

    Raises `ValueError` if they are damaged.
    """
    found = seals().filter(after_id__lt=id_, last_id__gte=id_)
    late = seals().exclude(late="")
    if any(id_ in canonical.late_ids(each) for each in late.iterator()):
        return True
    read = (canonical.read_leaves(leaves(each)) for each in found)
    return any(id_ == event for each in read for event, _ in each)


def unsealed(last: AuditSeal | None, limit: int = COUNTED) -> int:
    """Return how many events, `limit` at the most, came after the last seal's segment."""
    rows = all_events().order_by()
    if last:
        rows = rows.filter(pk__gt=last.last_id)
    return rows[:limit].count()


def number(seal: AuditSeal) -> int:
    """Return how many events there are of the seal's segment."""
    rows = all_events().order_by()
    own = rows.filter(pk__gt=seal.after_id, pk__lte=seal.last_id).count()
    return own + rows.filter(pk__in=canonical.late_ids(seal)).count()


def events(
    version: int,
    after: int,
    end: int,
    late: Sequence[int] = (),
    *,
    without: Sequence[int] = (),
    limit: int | None = None,
) -> Iterator[tuple[Any, ...]]:
    """
    Yield the values of the events of a segment, by id, with a page in memory at a time.

    They are those above `after` and up to `end`, but those in `without`, and those in `late`.
    Raises `ValueError` where a page would end between two with one id, as there can be once
    the table has lost its primary key.
    """
    rows = all_events().order_by("pk")
    fields = canonical.FIELDS[version]
    if late:
        yield from rows.filter(pk__in=late).values_list(*fields)
        limit = limit and limit - len(late)
    left_out = frozenset(without)
    while limit is None or limit > 0:
        size = PAGE if limit is None else min(PAGE, limit)
        page = list(rows.filter(pk__gt=after, pk__lte=end).values_list(*fields)[:size])
        yield from (each for each in page if each[0] not in left_out)
        if len(page) < size:
            return
        after = page[-1][0]
        if rows.filter(pk=after)[:2].count() > 1:
            raise ValueError(SAME_ID)
        limit = limit and limit - len(page)
