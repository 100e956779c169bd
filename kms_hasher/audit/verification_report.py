"""
What a verification has found, and how it reads what anybody may have written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from django.db import Error

from kms_hasher.audit import segments
from kms_hasher.exceptions import KMSHasherError
from kms_hasher.models import AuditSeal

T = TypeVar("T")

#: Findings that are kept, one by one; all are counted.
KEPT = 1_000

#: Characters that are quoted of a value in a finding.
QUOTED = 200

# Kinds of findings.
CHANGED, DELETED, INSERTED = "changed", "deleted", "inserted"
SEGMENT, SEAL, MISSING, ANCHOR = "segment", "seal", "missing", "anchor"
PRUNING, EXPECTED, OVERDUE, UNSEALED = "pruning", "expected", "overdue", "unsealed"

#: SQLite gives back what anybody put in, whatever the column's type; the owner of any database
#: can change the types of columns, and nest JSON deeply.
UNREADABLE_AS = (ValueError, TypeError, OverflowError, AttributeError, RecursionError)


class Finding(NamedTuple):
    """`sequence` is of the segment or seal, `event` the id, where they can be told."""

    kind: str
    text: str
    sequence: int | None = None
    event: int | None = None


@dataclass
class Report:
    """
    What was looked at and what was found.

    `findings` holds the first `KEPT`, `numbers` how many there are of each kind. `unasked` is
    why KMS could not be asked, if it could not, and `failed` what the database failed by: then
    not all was looked at.
    """

    findings: list[Finding] = field(default_factory=list)
    numbers: Counter[str] = field(default_factory=Counter)
    unasked: KMSHasherError | None = None
    failed: Error | None = None
    last: AuditSeal | None = None
    pruned: int = 0
    events: int = 0
    unsealed: int = 0

    def add(self, kind: str, text: str, sequence: int | None = None, **values: Any) -> None:
        self.numbers[kind] += 1
        if len(self.findings) < KEPT:
            shown = {name: _shown(each) for name, each in values.items()}
            text = text.format(sequence=_shown(sequence), **shown)
            numbers = _number(sequence), _number(values.get("event"))
            self.findings.append(Finding(kind, text, *numbers))

    def add_all(self, other: Report) -> None:
        self.numbers.update(other.numbers)
        self.findings += other.findings[: KEPT - len(self.findings)]


def _shown(value: Any) -> Any:
    """Return what is told of a value from the database, whoever wrote it."""
    if isinstance(value, (int, float)):
        return value
    text = value if isinstance(value, str) and value.isprintable() else ascii(value)
    return text if len(text) <= QUOTED else f"{text[:QUOTED]}…"


def _number(value: Any) -> int | None:
    return value if type(value) is int else None


def read(
    report: Report, step: Callable[[], T], text: str, sequence: int | None = None
) -> T | None:
    """
    Return what the step returns, or None if it reads what was never written: that is a finding.

    So is what the database fails to give twice while it is not out: times that Python has not,
    or bytes that are no text. Raises `Error` if the database is out.
    """
    for _ in range(2):
        try:
            return step()
        except UNREADABLE_AS:
            break
        except Error:
            segments.probe()
    report.add(SEAL, text, sequence)
    return None
