"""
Whether the audit is as it was sealed, and if not, what differs.

What is found are facts about the database. That KMS cannot be asked is none of them: it is
told apart, and the rest is checked all the same.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, NamedTuple

from kms_hasher.audit import anchors, canonical, seals, segments
from kms_hasher.exceptions import KMSError
from kms_hasher.models import AuditSeal

#: Findings that are kept, one by one; all are counted.
KEPT = 1_000

# Kinds of findings.
CHANGED, DELETED, INSERTED = "changed", "deleted", "inserted"
SEGMENT, SEAL, MISSING, ANCHOR = "segment", "seal", "missing", "anchor"
PRUNING, EXPECTED, OVERDUE, UNSEALED = "pruning", "expected", "overdue", "unsealed"

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


# SQLite gives back what anybody put in, whatever the column's type.
_UNREADABLE = (ValueError, TypeError, OverflowError)


class Finding(NamedTuple):
    """`sequence` is of the segment or seal, `event` the id, where they can be told."""

    kind: str
    text: str
    sequence: int | None = None
    event: int | None = None


class Progress(NamedTuple):
    sequence: int
    last: int
    events: int
    seconds: float


@dataclass
class Report:
    """
    What was looked at and what was found.

    `findings` holds the first `KEPT`, `numbers` how many there are of each kind. `unasked` is
    why KMS could not be asked, if it could not.
    """

    findings: list[Finding] = field(default_factory=list)
    numbers: Counter[str] = field(default_factory=Counter)
    unasked: KMSError | None = None
    last: AuditSeal | None = None
    pruned: int = 0
    events: int = 0
    unsealed: int = 0

    def add(self, kind: str, text: str, sequence: int | None = None, **values: Any) -> None:
        self.numbers[kind] += 1
        if len(self.findings) < KEPT:
            text = text.format(sequence=sequence, **values)
            self.findings.append(Finding(kind, text, sequence, values.get("event")))

    def add_all(self, other: Report) -> None:
        self.numbers.update(other.numbers)
        self.findings += other.findings[: KEPT - len(self.findings)]


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
    except _UNREADABLE:
        report.add(SEAL, SEALS_UNREADABLE)
    return report


def _verify(
    report: Report, since: int, all_anchors: bool, expected: Sequence[tuple[int, str]]
) -> Iterator[Progress]:
    started = time.monotonic()
    report.last = last = segments.newest()
    state = seals.state()
    report.unsealed = state.unsealed
    if state.is_overdue and state.age:
        report.add(OVERDUE, SEALING_OVERDUE, hours=state.age.total_seconds() / 3600)
    _check_expected(report, expected)
    if last is None:
        report.add(UNSEALED, NO_SEALS)
        return
    for id_ in segments.outside().values_list("pk", flat=True)[:KEPT]:
        report.add(INSERTED, EVENT_OUTSIDE, event=id_)
    _check_pruning(report, last)
    elsewhere = _late_in(last)
    before: AuditSeal | None = None
    for seal in _in_order(last):
        if not _check_place(report, seal, before):
            continue
        before = seal
        if (seal.pruned_at or seal.pruning_anchors) and seal.sequence != report.pruned:
            _check_stray_pruning(report, seal, last)
        if all_anchors or seal.sequence == last.sequence:
            _check_anchors(report, seal, strict=seal.sequence == last.sequence)
        if seal.sequence >= since:
            _check_segment(report, seal, elsewhere)
        yield Progress(seal.sequence, last.sequence, report.events, time.monotonic() - started)


def _check_expected(report: Report, expected: Sequence[tuple[int, str]]) -> None:
    for sequence, value in expected:
        seal = segments.seals().filter(sequence=sequence).first()
        if seal is None:
            report.add(EXPECTED, EXPECTED_GONE, sequence)
        elif value.lower() not in (seal.root, canonical.seal_digest(seal).hex()):
            report.add(EXPECTED, NOT_EXPECTED, sequence, root=seal.root)


def _check_pruning(report: Report, last: AuditSeal) -> None:
    pruned = segments.pruned()
    report.pruned = pruned.sequence if pruned else 0
    try:
        problem = seals.check_pruning(last, pruned)
    except KMSError as error:
        report.unasked = error
        return
    if problem:
        report.add(PRUNING, BAD_PRUNING, report.pruned, problem=problem)


def _check_stray_pruning(report: Report, seal: AuditSeal, last: AuditSeal) -> None:
    pruned = segments.pruned()
    if pruned and pruned.sequence > report.pruned:  # meanwhile
        _check_pruning(report, last)
    now = segments.seals().filter(pk=seal.pk).first()
    if now and (now.pruned_at or now.pruning_anchors) and now.sequence != report.pruned:
        report.add(PRUNING, STRAY_PRUNING, seal.sequence)


def _late_in(last: AuditSeal) -> dict[int, int]:
    """Return in which segment, by id, the events are that were admitted late."""
    found = segments.seals().filter(sequence__lte=last.sequence).exclude(late="")
    return {id_: seal.sequence for seal in found for id_ in canonical.late_ids(seal)}


def _in_order(last: AuditSeal) -> Iterator[AuditSeal]:
    """Yield the seals up to `last`, a page in memory at a time."""
    after = canonical.FLOOR
    while True:
        rows = segments.seals().filter(sequence__lte=last.sequence, sequence__gt=after)
        page = list(rows.order_by("sequence")[:100])
        yield from page
        if not page:
            return
        after = page[-1].sequence


def _check_place(report: Report, seal: AuditSeal, before: AuditSeal | None) -> bool:
    """Check that the seal follows the one before it; return whether it has a place at all."""
    sequence, due = seal.sequence, before.sequence + 1 if before else 1
    if sequence < due:
        report.add(SEAL, OUT_OF_ORDER, sequence)
        return False
    if sequence > due:
        report.add(MISSING, SEALS_MISSING, due, first=due, last=sequence - 1)
        return True
    if seal.previous != (canonical.seal_hash(before) if before else ""):
        report.add(SEAL, BROKEN_CHAIN, sequence, before=sequence - 1)
    if seal.after_id != (before.last_id if before else canonical.FLOOR):
        report.add(SEAL, BROKEN_RANGE, sequence)
    return True


def _check_anchors(report: Report, seal: AuditSeal, *, strict: bool) -> None:
    try:
        problem = anchors.check_seal(seal, strict=strict)
    except KMSError as error:
        report.unasked = error
        return
    if problem:
        report.add(ANCHOR, BAD_ANCHOR, seal.sequence, problem=problem)


# --- the events of a segment --------------------------------------------------------


def _check_segment(report: Report, seal: AuditSeal, elsewhere: Mapping[int, int]) -> None:
    found = Report()
    if seal.version not in canonical.FIELDS:
        report.add(SEAL, UNKNOWN_VERSION, seal.sequence, version=seal.version)
        return
    try:
        _compare(found, seal, elsewhere, pruned=seal.sequence <= report.pruned)
    except _UNREADABLE:
        found.add(SEAL, UNREADABLE, seal.sequence)
    if found.numbers and seal.sequence > report.pruned:
        # It may have been pruned while it was read.
        pruned = segments.pruned()
        if pruned and pruned.sequence >= seal.sequence and report.last:
            _check_pruning(report, report.last)
            _check_segment(report, seal, elsewhere)
            return
    report.events += found.events
    report.add_all(found)


def _compare(
    report: Report, seal: AuditSeal, elsewhere: Mapping[int, int], *, pruned: bool
) -> None:
    """Compare the events there are with the segment's root and leaves."""
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
        return
    if pruned or (told and differences.numbers):
        report.add_all(differences)
    else:
        report.add(SEGMENT, SEGMENT_DIFFERS, seal.sequence)


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
