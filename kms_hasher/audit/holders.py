"""
Whose stored password a `sub` of CloudTrail is.

A `sub` is the digest of a stored password's header, so it can be computed from each stored
password and from nothing else: one pass over all of them, for all that is asked for at once.
"""

from __future__ import annotations

from collections.abc import Iterator

from kms_hasher import columns, encoding
from kms_hasher.columns import Column
from kms_hasher.exceptions import MalformedHash
from kms_hasher.models import AuditEvidence

#: Rows read at a time.
PAGE = 1000


def find() -> int:
    """
    Note on all evidence that has a `sub` and was not looked at yet whose it is.

    Return how many stored passwords were found. Evidence whose `sub` no stored password has
    (any more) is marked so.
    """
    wanted = AuditEvidence.objects.filter(holder=None).exclude(sub="")
    if not wanted.exists():
        return 0
    last = AuditEvidence.objects.order_by("-pk").values_list("pk", flat=True)[0]
    found = 0
    for column in columns.columns():
        for page in _pages(column):
            found += _note(column, page, last)
    AuditEvidence.objects.filter(holder=None, pk__lte=last).update(holder="")
    return found


def _note(column: Column, page: list[tuple[object, str]], last: int) -> int:
    subs: dict[str, list[object]] = {}
    for pk, value in page:
        try:
            subs.setdefault(encoding.parse(value).header.sub, []).append(pk)
        except MalformedHash:
            continue
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


def _pages(column: Column) -> Iterator[list[tuple[object, str]]]:
    name = column.field.attname
    sealed = column.rows.filter(**{f"{name}__startswith": encoding.PREFIX})
    rows = sealed.order_by("pk").values_list("pk", name)
    page = list(rows[:PAGE])
    while page:
        yield page
        page = list(rows.filter(pk__gt=page[-1][0])[:PAGE])
