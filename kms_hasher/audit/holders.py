"""
Whose stored password a `sub` of CloudTrail is.

A `sub` is the digest of a stored password's header, so it can be computed from each stored
password and from nothing else: one pass over all of them, for all that is asked for at once.
That of a data key stands for all passwords that it seals.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from kms_hasher import columns, encoding, modes
from kms_hasher.columns import Column
from kms_hasher.encoding import SealedHash
from kms_hasher.exceptions import MalformedHash
from kms_hasher.models import AuditEvidence, AuditFinding, DataKey

#: Rows read at a time.
PAGE = 1000

#: The holder that is a data key.
OF_DATA_KEY = "{column} {pk}: {number} passwords"

_ENVELOPE = modes.MODES["envelope"].code
_DATA_KEY = DataKey._meta.label
_OF_DATA_KEY = re.compile(
    rf"{re.escape(_DATA_KEY)}\.\S+ (?:\(.*\) )?(\d{{1,18}}): (\d{{1,18}}) passwords"
)


class _DataKey(NamedTuple):
    """A data key that evidence is about."""

    column: Column
    number: int
    sub: str


class _Row(NamedTuple):
    pk: Any
    stored: SealedHash


def find() -> int:
    """
    Note on all evidence that has a `sub` and was not looked at yet whose it is.

    Return how many stored passwords were found. Evidence whose `sub` no stored password and no
    data key has (any more) is marked so.
    """
    wanted = AuditEvidence.objects.filter(holder=None).exclude(sub="")
    if not wanted.exists():
        return 0
    last = AuditEvidence.objects.order_by("-pk").values_list("pk", flat=True)[0]
    data_keys = list(_data_keys(last))
    sealed = Counter({each.number: 0 for each in data_keys})
    found = 0
    for column in _passwords():
        for page in _pages(column):
            found += _note(column, page, last)
            sealed.update(number for _, number in _sealed_by(page, sealed.keys()))
    for each in data_keys:
        number = sealed[each.number]
        rows = AuditEvidence.objects.filter(sub=each.sub, holder=None, pk__lte=last)
        rows.update(
            holder=OF_DATA_KEY.format(column=each.column, pk=each.number, number=number)
        )
    found += sum(sealed.values())
    AuditEvidence.objects.filter(holder=None, pk__lte=last).update(holder="")
    return found


def number(finding: AuditFinding) -> int:
    """Return how many stored passwords a finding is about, those of its data keys with them."""
    rows = finding.evidence.filter(explained_at=None).exclude(sub="").order_by()
    of_keys = rows.filter(holder__startswith=_DATA_KEY).values_list("sub", "holder").distinct()
    most: dict[str, int] = defaultdict(int)
    for sub, holder in of_keys:
        for _, number in _told_data_keys([holder or ""]):
            most[sub] = max(most[sub], number)
    return rows.values("sub").distinct().count() - len(most) + sum(most.values())


def names(finding: AuditFinding) -> Iterator[str]:
    """
    Yield all accounts that a finding is about, each once, as column and primary key.

    Those of a data key are looked for now, by a pass over all stored passwords.
    """
    rows = finding.evidence.filter(explained_at=None).exclude(holder=None).exclude(holder="")
    given: set[str] = set()
    asked: set[int] = set()
    for text in rows.order_by("holder").values_list("holder", flat=True).distinct().iterator():
        lines = (text or "").split("\n")
        of_keys = {number for number, _ in _told_data_keys(lines)}
        asked |= of_keys
        for line in lines:
            if line not in given and not _OF_DATA_KEY.fullmatch(line):
                given.add(line)
                yield line
    for column in _passwords() if asked else ():
        for page in _pages(column):
            for pk, _ in _sealed_by(page, asked):
                if (name := f"{column} {pk}") not in given:
                    yield name


def _told_data_keys(lines: Iterable[str]) -> Iterator[tuple[int, int]]:
    """Yield number and passwords of each data key that is told as a holder."""
    for line in lines:
        if told := _OF_DATA_KEY.fullmatch(line):
            yield int(told[1]), int(told[2])


def _passwords() -> list[Column]:
    return [column for column in columns.columns() if column.model is not DataKey]


def _data_keys(last: int) -> Iterator[_DataKey]:
    """Yield the data keys that evidence which was not looked at yet is about."""
    for column in columns.columns():
        if column.model is not DataKey:
            continue
        for page in _pages(column):
            subs = {row.stored.header.sub: row.pk for row in page}
            asked = AuditEvidence.objects.filter(sub__in=subs, holder=None, pk__lte=last)
            for sub in asked.order_by().values_list("sub", flat=True).distinct():
                yield _DataKey(column, subs[sub], sub)


def _sealed_by(page: Sequence[_Row], numbers: Collection[int]) -> Iterator[tuple[Any, int]]:
    """Yield the rows that one of these data keys has sealed, and by which."""
    if not numbers:
        return
    for pk, stored in page:
        if stored.mode == _ENVELOPE:
            try:
                number = encoding.data_key_number(stored.key_ref)
            except MalformedHash:
                continue
            if number in numbers:
                yield pk, number


def _note(column: Column, page: Sequence[_Row], last: int) -> int:
    subs: dict[str, list[object]] = {}
    for pk, stored in page:
        subs.setdefault(stored.header.sub, []).append(pk)
    asked = AuditEvidence.objects.filter(sub__in=subs, pk__lte=last)
    known = asked.values_list("pk", "sub", "holder")
    changes = []
    for pk, sub, holder in known:
        names = [f"{column} {each}" for each in subs[sub]]
        # One made by the caller with a salt of his own may be in several rows.
        told = [name for name in (holder or "").split("\n") if name]
        whole = "\n".join(dict.fromkeys([*told, *names]))
        if whole != holder:
            changes.append(AuditEvidence(pk=pk, holder=whole))
    AuditEvidence.objects.bulk_update(changes, ["holder"], batch_size=100)
    return len({sub for _, sub, _ in known})


def _pages(column: Column) -> Iterator[list[_Row]]:
    """Yield what is sealed in a column and can be parsed."""
    name = column.field.attname
    sealed = column.rows.filter(**{f"{name}__startswith": encoding.PREFIX})
    rows = sealed.order_by("pk").values_list("pk", name)
    page = list(rows[:PAGE])
    while page:
        yield list(_parsed(page))
        page = list(rows.filter(pk__gt=page[-1][0])[:PAGE])


def _parsed(page: Sequence[tuple[Any, str]]) -> Iterator[_Row]:
    for pk, value in page:
        try:
            yield _Row(pk, encoding.parse(value))
        except MalformedHash:
            continue
