"""
The bytes that are sealed, the same on every database: of an event, of a segment of events, of
its seal, and of a pruning.

Values are framed by a letter for their type and their length, so that no two different
sequences of values give the same bytes. A time is the microseconds since 1970 in UTC; one
without a zone (`USE_TZ = False`) is taken as it is written.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from typing import Any

from kms_hasher import conf
from kms_hasher.audit import merkle
from kms_hasher.models import AuditEvent, AuditSeal

#: The fields of an event that are sealed, in their order, by `AuditSeal.version`. Seals stay
#: checkable when the model grows: add a version, and never change one.
FIELDS: Mapping[int, tuple[str, ...]] = {
    1: (
        "id",
        "time",
        "operation",
        "purpose",
        "outcome",
        "error_code",
        "key_ref",
        "requested_key",
        "latency_us",
        "request_ids",
        "sub",
    ),
}
VERSION = max(FIELDS)

#: Below every id a table can hold.
FLOOR = -(2**63)

#: The highest id there can be.
CEILING = 2**63 - 1

#: Bytes of each leaf's hash that are kept in `AuditSeal.leaves`. They only tell which event
#: differs; that one does, is told by the root.
TAG = 8

_ID = re.compile(r"-?[0-9]{1,19}")
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.timezone.utc)
_MICROSECOND = datetime.timedelta(microseconds=1)


def frame(*values: Any) -> bytes:
    """Return the values as bytes that stand for these values alone."""
    parts: list[bytes] = []
    for value in values:
        if isinstance(value, str):
            kind, raw = b"s", value.encode()
        elif isinstance(value, int):
            kind, raw = b"i", b"%d" % value
        elif isinstance(value, (bytes, memoryview)):
            kind, raw = b"b", bytes(value)
        elif isinstance(value, datetime.datetime):
            kind, raw = b"t", b"%d" % _microseconds(value)
        elif value is None:
            kind, raw = b"n", b""
        else:  # SQLite stores what it is given; it differs from what was sealed
            kind, raw = b"?", repr(value).encode()
        parts += (kind, len(raw).to_bytes(4, "big"), raw)
    return b"".join(parts)


def _microseconds(time: datetime.datetime) -> int:
    if time.tzinfo is None:
        time = time.replace(tzinfo=datetime.timezone.utc)
    return (time - _EPOCH) // _MICROSECOND


# --- a segment of events ------------------------------------------------------------


class Segment:
    """The hashes of events that are added in the order of their ids."""

    def __init__(self, version: int = VERSION) -> None:
        self._tree = merkle.Tree()
        self._time = FIELDS[version].index("time")
        self.leaves = bytearray()
        self.last_id = FLOOR
        self.first_time: datetime.datetime | None = None
        self.last_time: datetime.datetime | None = None

    def add(self, values: Sequence[Any]) -> bytes:
        """Add the values of an event's `FIELDS`; return its tag."""
        tag = self._tree.append(frame(*values))[:TAG]
        self.leaves += _varint(values[0] - self.last_id) + tag
        self.last_id = values[0]
        time = values[self._time]
        if self.first_time is None or self.last_time is None:
            self.first_time = self.last_time = time
        elif time < self.first_time:
            self.first_time = time
        elif time > self.last_time:
            self.last_time = time
        return tag

    @property
    def count(self) -> int:
        return self._tree.size

    @property
    def root(self) -> str:
        return self._tree.root().hex()


def read_leaves(leaves: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the id and the tag of each event. Raises `ValueError` if they are damaged."""
    at, last = 0, FLOOR
    while at < len(leaves):
        delta = shift = 0
        while True:
            if at >= len(leaves) or shift > 63:
                raise ValueError("the leaves are damaged")
            byte = leaves[at]
            at, delta, shift = at + 1, delta | (byte & 0x7F) << shift, shift + 7
            if byte < 0x80:
                break
        tag = leaves[at : at + TAG]
        if len(tag) < TAG or not delta:
            raise ValueError("the leaves are damaged")
        at, last = at + TAG, last + delta
        yield last, tag


def _varint(number: int) -> bytes:
    """Return a number above 0 in groups of seven bits, the lowest first (LEB128)."""
    if number < 0x80:
        return bytes((number,))
    found = bytearray()
    while number >= 0x80:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    found.append(number)
    return bytes(found)


def late_ids(seal: AuditSeal) -> tuple[int, ...]:
    """Return the ids of the events admitted late. What is no number is left out."""
    found = (int(each) for each in seal.late.split() if _ID.fullmatch(each))
    return tuple(each for each in found if FLOOR <= each <= CEILING)


# --- a seal, and a pruning ----------------------------------------------------------


def seal_digest(seal: AuditSeal) -> bytes:
    """Return the hash of what a seal says. This is what KMS makes its anchors for."""
    return sha256(
        frame(
            "kms_hasher audit seal 1",
            conf.get().deployment,
            seal.sequence,
            seal.version,
            seal.sealed_at,
            seal.after_id,
            seal.last_id,
            seal.late,
            seal.count,
            seal.first_time,
            seal.last_time,
            seal.root,
            seal.leaves_hash,
            seal.previous,
            seal.pruned,
            seal.pruning,
        )
    ).digest()


def seal_hash(seal: AuditSeal) -> str:
    """Return the hash of a seal and its anchors: `previous` of the next one."""
    return sha256(frame(seal_digest(seal), as_json(seal.anchors))).hexdigest()


def pruning_digest(seal: AuditSeal) -> bytes:
    """Return the hash of the statement that all up to the seal was pruned."""
    return sha256(
        frame(
            "kms_hasher audit pruning 1",
            conf.get().deployment,
            seal.sequence,
            seal_digest(seal),
            seal.pruned_at,
        )
    ).digest()


def pruning_hash(seal: AuditSeal) -> str:
    """Return the hash of a pruning and its anchors: `pruning` of the seals after it."""
    return sha256(frame(pruning_digest(seal), as_json(seal.pruning_anchors))).hexdigest()


def as_json(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def values_of(version: int, **where: Any) -> Any:
    """Return a query of the values of events' `FIELDS`, by id."""
    return AuditEvent.objects.filter(**where).order_by("pk").values_list(*FIELDS[version])
