"""
Whether the audit is as it was sealed, and if not, what differs.

What is found are facts about the database. That KMS cannot be asked is none of them: it is
told apart, and the rest is checked all the same.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from functools import partial
from hashlib import sha256
from typing import Any, NamedTuple

from django.db import Error
from django.db.models import QuerySet

from kms_hasher.audit import anchors, canonical, seals, segments
from kms_hasher.audit.verification_report import (
    ANCHOR,
    CHANGED,
    DELETED,
    EXPECTED,
    INSERTED,
    MISSING,
    OVERDUE,
    PRUNING,
    SEAL,
    SEGMENT,
    UNREADABLE_AS,
    UNSEALED,
    Report,
    read,
)
from kms_hasher.exceptions import AuditError, KMSError
from kms_hasher.models import AuditSeal

#: Seals read at a time.
PAGE = 100

EVENT_CHANGED = "Event {event} of segment {sequence} was changed after it was sealed."
EVENT_DELETED = "Event {event} of segment {sequence} was deleted."
EVENT_INSERTED = (
    "Event {event} is not of segment {sequence}, in whose range it is: it was inserted or came "
    "in late."
)
EVENT_OUTSIDE = "Event {event} has an id that no segment can hold: it was inserted."
SEGMENT_DIFFERS = (
    "The events of segment {sequence} are not those that were sealed; which of them cannot be "
    "told."
)
NO_SEALS = "There is no seal: none was made yet, or all were deleted."
SEALS_MISSING = "Seals are missing: {first} to {last}."
OUT_OF_ORDER = "Seal {sequence} has no place in the sequence."
SAME_SEQUENCE = "There are several seals with one sequence."
NOT_REACHED = (
    "KMS was not asked for the newest seal ({sequence}): it does not follow the others."
)
BROKEN_CHAIN = (
    "Seal {sequence} does not follow seal {before} as it is now: the latter was changed, or "
    "the chain was."
)
BROKEN_RANGE = "Segment {sequence} does not begin where the one before ends."
LEAVES_DAMAGED = "The leaves of seal {sequence} are not those that were sealed."
UNREADABLE = "Seal {sequence} or its events cannot be read: they hold what was never written."
SEALS_UNREADABLE = "The seals cannot be read: they hold what was never written."
UNKNOWN_VERSION = (
    "Seal {sequence} has the version {version}, which is not of this release or was changed."
)
BAD_ANCHOR = "Seal {sequence} is not what KMS vouches for: {problem}."
BAD_PRUNING = "The audit is said to be pruned up to segment {sequence}, but {problem}."
STRAY_PRUNING = "Seal {sequence} tells of a pruning that is not the last one."
NOT_EXPECTED = "Seal {sequence} is not the one expected: it has the root {root}."
EXPECTED_GONE = "Seal {sequence}, which is expected, is not there: the log was cut off."
SEALING_OVERDUE = (
    "The last seal was made {hours:,.1f} hours ago: sealing is overdue (AUDIT_SEAL_HOURS)."
)


class Progress(NamedTuple):
    sequence: int
    last: int
    events: int
    seconds: float


def verify(
    *,
    since: int = 1,
    all_anchors: bool = False,
    expected: Sequence[tuple[int, str]] = (),
) -> Generator[Progress, None, Report]:
    """
    Check the audit from its first seal on; yield the progress, return the report.

    The chain of all seals is checked, and the events of segments from `since` on that were not
    pruned. KMS is asked for the newest seal, which vouches for the others, or with
    `all_anchors` for each. `expected` holds sequences and the root or digest that each
    must have, in hexadecimal, as they were printed and kept elsewhere.
    """
    report = Report()
    try:
        yield from _verify(report, since, all_anchors, expected)
    except UNREADABLE_AS:
        report.add(SEAL, SEALS_UNREADABLE)
    except Error as error:
        report.failed = error
    return report


def _verify(
    report: Report, since: int, all_anchors: bool, expected: Sequence[tuple[int, str]]
) -> Iterator[Progress]:
    started = time.monotonic()
    report.last = last = read(report, segments.newest, SEALS_UNREADABLE)
    is_readable = not report.numbers
    if is_readable:
        _check_state(report)
    _check_expected(report, expected)
    if last is None and is_readable:
        report.add(UNSEALED, NO_SEALS)
        return
    for id_ in read(report, segments.outside, SEALS_UNREADABLE) or ():
        report.add(INSERTED, EVENT_OUTSIDE, event=id_)
    _check_pruning(report)
    # By a number of another type the newest seal would be looked for in vain.
    upto = last.sequence if last and type(last.sequence) is int else canonical.CEILING
    elsewhere = read(report, partial(_late_in, upto), SEALS_UNREADABLE) or {}
    before: AuditSeal | None = None
    former = ""
    for seal in _in_order(report, upto):
        hash_ = read(report, partial(canonical.seal_hash, seal), UNREADABLE, seal.sequence)
        if hash_ is None or not _check_place(report, seal, before, former):
            continue
        before, former = seal, hash_
        if (seal.pruned_at or seal.pruning_anchors) and seal.sequence != report.pruned:
            _check_stray_pruning(report, seal)
        if all_anchors or seal.sequence == upto:
            _check_anchors(report, seal, strict=seal.sequence == upto)
        if seal.sequence >= since:
            _check_segment(report, seal, elsewhere)
        yield Progress(seal.sequence, upto, report.events, time.monotonic() - started)
    if last and former != read(report, partial(canonical.seal_hash, last), SEALS_UNREADABLE):
        report.add(SEAL, NOT_REACHED, last.sequence)


def _check_state(report: Report) -> None:
    state = read(report, seals.state, SEALS_UNREADABLE)
    if state is None:
        return
    report.unsealed = state.unsealed
    if state.is_overdue and state.age:
        report.add(OVERDUE, SEALING_OVERDUE, hours=state.age.total_seconds() / 3600)


def _check_expected(report: Report, expected: Sequence[tuple[int, str]]) -> None:
    for sequence, value in expected:
        told = read(report, partial(_told, sequence), UNREADABLE, sequence)
        if told is None:
            continue
        if not told:
            report.add(EXPECTED, EXPECTED_GONE, sequence)
        elif value.lower() not in told:
            report.add(EXPECTED, NOT_EXPECTED, sequence, root=told[0])


def _told(sequence: int) -> tuple[str, ...]:
    """Return what can be expected of a seal, its root and its digest; () if it is gone."""
    seal = segments.seals().filter(sequence=sequence).first()
    return (seal.root, canonical.seal_digest(seal).hex()) if seal else ()


def _check_pruning(report: Report) -> None:
    pruned = read(report, _pruned, SEALS_UNREADABLE)
    report.pruned = pruned.sequence if pruned else 0
    if report.last is None:
        return
    check = partial(seals.check_pruning, report.last, pruned)
    try:
        problem = read(report, check, UNREADABLE, report.pruned)
    except (KMSError, AuditError) as error:
        report.unasked = error
        return
    if problem:
        report.add(PRUNING, BAD_PRUNING, report.pruned, problem=problem)


def _pruned() -> AuditSeal | None:
    pruned = segments.pruned()
    if pruned and type(pruned.sequence) is not int:
        raise TypeError(pruned.sequence)
    return pruned


def _check_stray_pruning(report: Report, seal: AuditSeal) -> None:
    _check_for_pruning(report, report.pruned + 1)
    again = segments.seals().filter(pk=seal.pk)
    now = read(report, again.first, UNREADABLE, seal.sequence)
    if now and (now.pruned_at or now.pruning_anchors) and now.sequence != report.pruned:
        report.add(PRUNING, STRAY_PRUNING, seal.sequence)


def _check_for_pruning(report: Report, sequence: int) -> None:
    """Check anew what was pruned if segments up to this one were, meanwhile."""
    pruned = read(Report(), _pruned, SEALS_UNREADABLE)
    if pruned and pruned.sequence >= sequence:
        _check_pruning(report)


def _late_in(upto: int) -> dict[int, int]:
    """Return in which segment, by id, the events are that were admitted late."""
    found = segments.seals().only("sequence", "late").filter(sequence__lte=upto)
    return {
        id_: seal.sequence
        for seal in found.exclude(late="")
        for id_ in canonical.late_ids(seal)
    }


def _in_order(report: Report, upto: int) -> Iterator[AuditSeal]:
    """Yield the seals up to `upto` that can be read, a page in memory at a time."""
    seals_ = segments.seals().filter(sequence__lte=upto).order_by("sequence")
    after, number = canonical.FLOOR, 0
    while True:
        rows = seals_.filter(sequence__gt=after)[:PAGE]
        step = partial(list[int], rows.values_list("sequence", flat=True))
        sequences = read(report, step, SEALS_UNREADABLE)
        if not sequences:
            break
        yield from _page(report, rows, sequences)
        number += len(sequences)
        after = max(after + 1, math.floor(sequences[-1]))
    # Of two with one sequence the second would be on no page.
    if number != read(report, seals_.count, SEALS_UNREADABLE):
        report.add(SEAL, SAME_SEQUENCE)


def _page(
    report: Report, rows: QuerySet[AuditSeal], sequences: Sequence[int]
) -> Iterator[AuditSeal]:
    """Yield the seals of a page, one by one if they cannot be read at once."""
    page = read(Report(), partial(list[AuditSeal], rows), SEALS_UNREADABLE)
    if page is not None:
        yield from page
        return
    for at, sequence in enumerate(sequences):
        one = partial(list[AuditSeal], rows[at : at + 1])
        yield from read(report, one, UNREADABLE, sequence) or ()


def _check_place(
    report: Report, seal: AuditSeal, before: AuditSeal | None, former: str
) -> bool:
    """
    Check that the seal follows the one before it, which has the hash `former`; return whether
    it has a place at all.
    """
    sequence, due = seal.sequence, before.sequence + 1 if before else 1
    if type(sequence) is not int or sequence < due:
        report.add(SEAL, OUT_OF_ORDER, sequence)
        return False
    if sequence > due:
        report.add(MISSING, SEALS_MISSING, due, first=due, last=sequence - 1)
        return True
    if seal.previous != former:
        report.add(SEAL, BROKEN_CHAIN, sequence, before=sequence - 1)
    if seal.after_id != (before.last_id if before else canonical.FLOOR):
        report.add(SEAL, BROKEN_RANGE, sequence)
    return True


def _check_anchors(report: Report, seal: AuditSeal, *, strict: bool) -> None:
    check = partial(anchors.check_seal, seal, strict=strict)
    try:
        problem = read(report, check, UNREADABLE, seal.sequence)
    except (KMSError, AuditError) as error:
        report.unasked = error
        return
    if problem:
        report.add(ANCHOR, BAD_ANCHOR, seal.sequence, problem=problem)


# --- the events of a segment --------------------------------------------------------


def _check_segment(report: Report, seal: AuditSeal, elsewhere: Mapping[int, int]) -> None:
    if seal.version not in canonical.FIELDS:
        report.add(SEAL, UNKNOWN_VERSION, seal.sequence, version=seal.version)
        return
    compare = partial(_compare, seal, elsewhere, pruned=seal.sequence <= report.pruned)
    unread = Report()
    found = read(unread, compare, UNREADABLE, seal.sequence) or unread
    if found.numbers and seal.sequence > report.pruned:
        # It may have been pruned while it was read.
        _check_for_pruning(report, seal.sequence)
        if seal.sequence <= report.pruned:
            _check_segment(report, seal, elsewhere)
            return
    report.events += found.events
    report.add_all(found)


def _compare(seal: AuditSeal, elsewhere: Mapping[int, int], *, pruned: bool) -> Report:
    """Compare the events there are with the segment's root and leaves."""
    report = Report()
    leaves = segments.leaves(seal)
    told = sha256(leaves).hexdigest() == seal.leaves_hash
    if not told and (leaves or not pruned):
        report.add(SEAL, LEAVES_DAMAGED, seal.sequence)
    sealed = canonical.read_leaves(leaves if told else b"")
    found, differences = canonical.Segment(seal.version), Report()
    for kind, text, event in _differences(found, _events(seal, elsewhere), sealed):
        # Some are left while a pruning is under way, but none may be new.
        if not (pruned and kind == DELETED):
            differences.add(kind, text, seal.sequence, event=event)
    report.events = found.count
    if (found.root, found.count) == (seal.root, seal.count):
        return report
    if pruned or (told and differences.numbers):
        report.add_all(differences)
    else:
        report.add(SEGMENT, SEGMENT_DIFFERS, seal.sequence)
    return report


def _differences(
    found: canonical.Segment,
    events: Iterator[Sequence[Any]],
    sealed: Iterator[tuple[int, bytes]],
) -> Iterator[tuple[str, str, int]]:
    """Add the events to `found`; yield how they differ from those that were sealed."""
    expect = next(sealed, None)
    for values in events:
        id_, tag = values[0], found.add(values)
        while expect and expect[0] < id_:
            yield DELETED, EVENT_DELETED, expect[0]
            expect = next(sealed, None)
        if expect is None or expect[0] > id_:
            yield INSERTED, EVENT_INSERTED, id_
            continue
        if expect[1] != tag:
            yield CHANGED, EVENT_CHANGED, id_
        expect = next(sealed, None)
    while expect:
        yield DELETED, EVENT_DELETED, expect[0]
        expect = next(sealed, None)


def _events(seal: AuditSeal, elsewhere: Mapping[int, int]) -> Iterator[Sequence[Any]]:
    without = [id_ for id_, sequence in elsewhere.items() if sequence != seal.sequence]
    late = canonical.late_ids(seal)
    return segments.events(seal.version, seal.after_id, seal.last_id, late, without=without)
