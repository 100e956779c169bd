"""
The audit is closed segment by segment, and each segment sealed: whoever owns the database
afterwards can change, remove or slip in no event that `verification` does not find.

A segment holds the events with ids above the last one's bound and up to its own, which is cut
where no event can still come in below (see `horizon`). Times play no part: clocks jump. Its
seal says the Merkle root of its events, the hash of the seal before and more (see
`canonical.seal_digest`), and is anchored in KMS (see `anchors`). It is written as one row when
all of that is done, so that a sealer may be killed at any instant.

A sealer checks the anchors of the seal it follows. So one good anchor, that of the newest
seal, vouches for all before it, and no rewritten past is made good by a new seal.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
from collections.abc import Iterator, Sequence
from hashlib import sha256
from typing import NamedTuple

from django.db import IntegrityError, connections, transaction
from django.utils import timezone

from kms_hasher import conf
from kms_hasher.audit import anchors, canonical, horizon, segments
from kms_hasher.exceptions import SealRefused
from kms_hasher.models import AuditSeal

#: Events of a segment at the most: of so many, tags are held in memory and in one row.
SEGMENT = 65_536

#: Events that can be admitted to one segment.
ADMITTED = 1_000

#: Ids that a segment leaves above it: once one is sealed that no other can follow, each event
#: to come would be in a segment that is closed.
ROOM = 2**40

OVERTAKEN = "Another sealer was faster, or unsealed events are being pruned. Try again later."
PRUNED_MEANWHILE = "Events that were to be sealed were pruned meanwhile. Try again."
FORGED = (
    "The newest seal ({sequence}) cannot be built on: {problem}. Look with verify_kms_audit; "
    "--unchecked goes on all the same."
)
PRUNING_FORGED = (
    "The audit is said to be pruned up to segment {sequence}, but {problem}. Look with "
    "verify_kms_audit; --unchecked goes on all the same."
)
PRUNING_GONE = "the former pruning, up to segment {sequence}, is no longer told"
NOT_LATE = "Event {id} cannot be admitted: it is not there, or sealed, or not sealed yet."
TOO_MANY = "At most {number} events can be admitted at a time."
TOO_HIGH = (
    "There is an event with the id {id}, which leaves no ids for those to come: no database "
    "has given it out. Nothing was sealed; look into it and delete the event."
)

logger = logging.getLogger("kms_hasher.audit")


# --- sealing ------------------------------------------------------------------------


def seal(
    *,
    every: int = 1,
    admit: Sequence[int] = (),
    unchecked: bool = False,
    settle: float = horizon.SETTLE,
    patience: float = horizon.PATIENCE,
) -> Iterator[AuditSeal]:
    """
    Seal all events there are, in as many segments as it takes; yield each seal made.

    Nothing is done while fewer than `every` events wait, unless half of `AUDIT_SEAL_HOURS`
    has passed since the last seal, and then a segment is closed even if it is empty; the first
    seal is made as soon as there is an event. `admit` are ids of events that came in after
    their segment was sealed. Two calls to KMS for each seal, and one for the seal before the
    first; they leave events, which belong to a later segment.

    Raises `SealRefused`, also where the newest seal is not what KMS vouches for, unless
    `unchecked`; and `KMSError`.
    """
    last = segments.newest()
    if not admit and not _is_due(last, every):
        return
    after = last.last_id if last else canonical.FLOOR
    end = horizon.find(segments.database(), after, settle=settle, patience=patience)
    if end > canonical.CEILING - ROOM:
        raise SealRefused(TOO_HIGH.format(id=end))
    pruned = segments.pruned()
    if not unchecked:
        _check(last, pruned)
    late = _late(admit, last)
    while True:
        made = _close(last, end, late, pruned)
        _log(made)
        yield made
        last, late = made, ()
        if made.last_id >= end:
            return


def _is_due(last: AuditSeal | None, every: int) -> bool:
    waiting = segments.unsealed(last, limit=every)
    if last is None or waiting >= every:
        return waiting > 0
    hours = conf.get().audit_seal_hours
    return bool(hours) and timezone.now() - last.sealed_at > _hours(hours / 2)


def _check(last: AuditSeal | None, pruned: AuditSeal | None) -> None:
    """Raise `SealRefused` unless KMS vouches for what the next seal will carry on."""
    if last is None:
        return
    # Where there is a key for MACs, nothing else will do: more people may Encrypt.
    if problem := anchors.check_seal(last, both=False):
        raise SealRefused(FORGED.format(sequence=last.sequence, problem=problem))
    if problem := check_pruning(last, pruned):
        sequence = pruned.sequence if pruned else 0
        raise SealRefused(PRUNING_FORGED.format(sequence=sequence, problem=problem))


def check_pruning(last: AuditSeal, pruned: AuditSeal | None) -> str:
    """
    Return what is wrong with what is said to be pruned, or "".

    A pruning that the newest seal knows of is vouched for by that seal; of a later one KMS is
    asked. Raises `KMSError` if KMS cannot tell.
    """
    sequence = pruned.sequence if pruned else 0
    if sequence < last.pruned:
        return PRUNING_GONE.format(sequence=last.pruned)
    if pruned is None:
        return ""
    if sequence == last.pruned and canonical.pruning_hash(pruned) == last.pruning:
        return ""
    return anchors.check_pruning(pruned)


def _late(admit: Sequence[int], last: AuditSeal | None) -> tuple[int, ...]:
    """Return the ids, if they are of events that belong to no segment yet."""
    late = tuple(sorted(set(admit)))
    if len(late) > ADMITTED:
        raise SealRefused(TOO_MANY.format(number=ADMITTED))
    for each in late:
        if last is None or each > last.last_id or not _is_late(each):
            raise SealRefused(NOT_LATE.format(id=each))
    return late


def _is_late(id_: int) -> bool:
    try:
        is_sealed = segments.is_sealed(id_)
    except ValueError:  # its segment's leaves are damaged, and tell nothing
        return False
    return not is_sealed and segments.all_events().filter(pk=id_).exists()


def _close(
    last: AuditSeal | None, end: int, late: tuple[int, ...], pruned: AuditSeal | None
) -> AuditSeal:
    """Make the next segment, of events up to `end`, and its seal."""
    with _alone(last):
        after = last.last_id if last else canonical.FLOOR
        segment = canonical.Segment()
        for values in segments.events(canonical.VERSION, after, end, late, limit=SEGMENT):
            segment.add(values)
        full = segment.count >= SEGMENT
        made = AuditSeal(
            sequence=last.sequence + 1 if last else 1,
            version=canonical.VERSION,
            sealed_at=timezone.now(),
            after_id=after,
            last_id=segment.last_id if full else end,
            late=" ".join(map(str, late)),
            count=segment.count,
            first_time=segment.first_time,
            last_time=segment.last_time,
            root=segment.root,
            leaves_hash=sha256(segment.leaves).hexdigest(),
            leaves=bytes(segment.leaves),
            previous=canonical.seal_hash(last) if last else "",
            pruned=pruned.sequence if pruned else 0,
            pruning=canonical.pruning_hash(pruned) if pruned else "",
        )
        made.anchors = anchors.of_seal(made)
        try:
            with transaction.atomic(using=segments.database()):
                made.save(using=segments.database(), force_insert=True)
                if segments.number(made) < made.count:  # see `pruning.paused`
                    raise SealRefused(PRUNED_MEANWHILE)
        except IntegrityError:
            raise SealRefused(OVERTAKEN) from None
    return made


@contextlib.contextmanager
def _alone(last: AuditSeal | None) -> Iterator[None]:
    """
    Keep other sealers out. Raises `SealRefused` where one was faster.

    Two would make anchors for the same sequence in KMS, of which CloudTrail would tell. Where
    the database locks no rows, and for the first seal, the unique sequence decides.
    """
    features = connections[segments.database()].features
    if last is None or not features.has_select_for_update:
        yield
        return
    skip = features.has_select_for_update_skip_locked
    with transaction.atomic(using=segments.database()):
        locked = segments.seals().select_for_update(skip_locked=skip).filter(pk=last.pk).first()
        found = segments.newest()
        if locked is None or found is None or found.pk != last.pk:
            raise SealRefused(OVERTAKEN)
        yield


def _log(made: AuditSeal) -> None:
    """Tell the log too, which may be kept where the database's owner cannot reach."""
    said = {
        "seal": made.sequence,
        "count": made.count,
        "root": made.root,
        "digest": canonical.seal_digest(made).hex(),
    }
    with contextlib.suppress(Exception):
        logger.info("%s", json.dumps(said, separators=(",", ":")), extra={"kms_seal": said})


# --- how it stands ------------------------------------------------------------------


class State(NamedTuple):
    """
    `unsealed` counts no further than `COUNTED`; `age` is the time since the last seal.

    `since` is when that was made or, if `AUDIT_SEAL_KEY` is set and there is no seal, the time
    of the oldest event: a sealer that never ran, or whose seals were deleted, is late as well.
    """

    last: AuditSeal | None
    age: datetime.timedelta | None
    unsealed: int
    is_overdue: bool
    since: datetime.datetime | None


def state() -> State:
    """Return how sealing stands, by two queries that cost the same however long the audit."""
    settings, now = conf.get(), timezone.now()
    last = segments.newest()
    since = last.sealed_at if last else _oldest() if settings.audit_seal_key else None
    hours = settings.audit_seal_hours
    overdue = bool(hours) and since is not None and now - since > _hours(hours)
    age = now - last.sealed_at if last else None
    return State(last, age, segments.unsealed(last), overdue, since)


def _oldest() -> datetime.datetime | None:
    return segments.all_events().order_by("time").values_list("time", flat=True).first()


def _hours(number: float) -> datetime.timedelta:
    return datetime.timedelta(hours=number)
