"""
A look at what a rotation has left: rows are counted by key, and some or all are opened again.

Each opening is a Decrypt; the digest it gives stays in memory and is dropped.
"""

from __future__ import annotations

import functools
import random
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

from django.views.decorators.debug import sensitive_variables

from kms_hasher import columns, data_keys, encoding, keyring, modes, signals
from kms_hasher.calls import in_thread
from kms_hasher.columns import Column
from kms_hasher.exceptions import (
    DataKeyDamaged,
    DataKeyMissing,
    InvalidCiphertext,
    InvalidRequest,
    KeyNotFound,
    KeyUnusable,
    KMSBadResponse,
    KMSHasherError,
    MalformedHash,
)
from kms_hasher.providers import base
from kms_hasher.rotation import shards
from kms_hasher.rotation.engine import BadRow, Options
from kms_hasher.rotation.workers import Outcome, Task, Workers

#: Rows of each column that are opened where nobody says how many.
SAMPLE = 1000

ENVELOPE, MAC = modes.MODES["envelope"].code, modes.MODES["mac"].code

#: Rows read at a time.
PAGE = 500

#: Errors that come of one stored value or its key; others end the verification.
_OF_A_ROW = (
    DataKeyDamaged,
    DataKeyMissing,
    InvalidCiphertext,
    InvalidRequest,
    KeyNotFound,
    KeyUnusable,
    KMSBadResponse,
    MalformedHash,
)


@dataclass
class Verified:
    """
    What was found. `under` counts the rows under the target, `others` those by ref that
    another run would bring there, `apart` those that it would not: in other modes, or a MAC
    by another key. `opened` were opened again, `bad` could not be; `unseen` hold a MAC alone,
    which opens nothing.
    """

    under: int = 0
    others: Counter[str] = field(default_factory=Counter)
    apart: int = 0
    opened: int = 0
    unseen: int = 0
    bad: list[BadRow] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        """Whether another run would find nothing, and all that were tried opened."""
        return not self.others and not self.bad


def verify(
    target: base.Key, *, sample: int | None = SAMPLE, options: Options, to_mode: str = ""
) -> Generator[Verified, None, Verified]:
    """
    Count the rows of all columns by key, and open `sample` of each column, None for all. A
    column with no more rows than that is opened whole.
    `to_mode` is the mode that passwords were to be brought into, if they were.

    Yields what was found so far, and returns it at last. A row whose password is changed
    meanwhile is looked at once more. Raises `KMSError` where KMS cannot answer or denies.
    """
    found = Verified()
    ref = encoding.key_ref(target.key_id)
    for column in columns.columns():
        for group, number in columns.count(column).items():
            if not group.is_sealed:
                continue
            if to_mode and group.is_password and modes.converts(group.mode, to_mode):
                found.others[group.key_ref] += number
            # What is under data keys is, as these are, and they are counted themselves.
            elif group.key_ref == ref or group.mode == ENVELOPE:
                found.under += number
            elif modes.rewraps(group.mode, target.spec):
                found.others[group.key_ref] += number
            else:
                found.apart += number
    yield found
    with Workers(options.concurrency, options.rate) as workers, data_keys.held():
        for column in columns.columns():
            tasks = (list(_tasks(page, found)) for page in _pages(column, sample))
            for outcomes in workers.map(tasks):
                _take(column, outcomes, found)
                yield found
    return found


def _tasks(
    page: list[tuple[Any, str]], found: Verified
) -> Iterator[tuple[tuple[Any, str], Task]]:
    for row in page:
        if _is_mac(row[1]):
            found.unseen += 1
        else:
            yield _task(row)


def _is_mac(value: str) -> bool:
    try:
        return encoding.parse(value).mode == MAC
    except MalformedHash:
        return False  # told as bad


def _task(row: tuple[Any, str]) -> tuple[tuple[Any, str], Task]:
    try:
        opener = keyring.opener(encoding.parse(row[1]), purpose="verify")
    except (MalformedHash, DataKeyDamaged, DataKeyMissing) as error:
        return row, functools.partial(in_thread(_fail), error)

    @sensitive_variables()
    def open_() -> None:
        opener()

    return row, in_thread(open_)


def _fail(error: KMSHasherError) -> None:
    raise error


def _take(column: Column, outcomes: list[Outcome], found: Verified) -> None:
    signals.emit_all([event for outcome in outcomes for event in outcome.events])
    for (pk, value), error, _ in outcomes:
        if error is None:
            found.opened += 1
            continue
        if isinstance(error, Exception) and not isinstance(error, _OF_A_ROW):
            raise error
        name = column.field.attname
        if column.rows.filter(pk=pk, **{name: value}).exists():  # and not a fresh password
            found.bad.append(BadRow(str(column), pk, str(error)))


def _pages(column: Column, sample: int | None) -> Iterator[list[tuple[Any, str]]]:
    name = column.field.attname
    sealed = column.rows.filter(**{f"{name}__startswith": encoding.PREFIX})
    rows = sealed.order_by("pk").values_list("pk", name)
    # A draw from fewer rows than it asks for would take some twice, and leave others out.
    if sample is None or rows[: sample + 1].count() <= sample:
        page = list(rows[:PAGE])
        while page:
            yield page
            page = list(rows.filter(pk__gt=page[-1][0])[:PAGE])
        return
    seen: set[Any] = set()
    page = []
    for start in _starts(column, sample):
        at = rows.filter(pk__gt=start) if start is not None else rows
        for row in at[:1]:
            if row[0] not in seen:
                seen.add(row[0])
                page.append(row)
        if len(page) == PAGE:
            yield page
            page = []
    if page:
        yield page


def _starts(column: Column, sample: int) -> Iterator[Any]:
    """
    Yield keys after which to look for a row.

    Whole numbers are drawn at random between the least and the greatest, so that a row
    after a gap is likelier. Of other keys every n-th is taken, by one pass over their index.
    """
    keys = column.rows.values_list("pk", flat=True)
    least: Any = keys.order_by("pk").first()
    most: Any = keys.order_by("-pk").first()
    if isinstance(least, int):
        for _ in range(sample):
            yield random.randint(least - 1, int(most) - 1)  # noqa: S311  # no secret
        return
    step = max(column.rows.count() // max(sample, 1), 1)
    for number, (after, _) in enumerate(shards.bounds(column, step)):
        if number == sample:
            return
        yield shards.load(column, after) if after else None
