"""
The key history: which keys there were, and what each alias pointed to, from when to when.

It is written from what KMS answered and read by people, plans and the admin. No login
depends on it.
"""

from __future__ import annotations

import datetime
from collections import Counter
from typing import TYPE_CHECKING

from django.db import IntegrityError, router, transaction
from django.utils import timezone

from kms_hasher import columns, encoding
from kms_hasher.models import AliasPeriod, Key

if TYPE_CHECKING:
    from kms_hasher.providers import base

#: `Key.last_seen` is written at most once in this time for each key.
LAST_SEEN_EVERY = datetime.timedelta(minutes=10)

#: A moved alias spreads within minutes, and until then KMS may still answer with the key
#: it has left. Such an answer is not a move back.
ALIAS_LAG = datetime.timedelta(minutes=15)


def record_key(arn: str, at: datetime.datetime, described: base.Key | None = None) -> Key:
    """
    Return the row of the key with this ARN, seen at that time; made if it is new.

    `described` is KMS's own description, where one was asked for. Raises `MalformedHash`
    if `arn` is not the ARN of a key.
    """
    parts = encoding.ARN.parse(arn)
    key, _ = Key.objects.get_or_create(
        ref=encoding.key_ref(parts.resource.removeprefix("key/")),
        defaults={
            "arn": arn,
            "region": parts.region,
            "account": parts.account,
            "first_seen": at,
            "last_seen": at,
        },
    )
    news: dict[str, object] = {}
    if at - key.last_seen > LAST_SEEN_EVERY:
        news["last_seen"] = at
    if described and (key.spec, key.state) != (described.spec, described.state):
        news.update(spec=described.spec, state=described.state)
    if news:
        Key.objects.filter(pk=key.pk).update(**news)
        for name, value in news.items():
            setattr(key, name, value)
    return key


def record_alias(alias: str, key: Key, at: datetime.datetime, *, moved: bool = False) -> bool:
    """
    Record that the alias points to the key; return whether that was news.

    `moved` says that we moved it ourselves just now. Otherwise an answer with a key that
    the alias left less than `ALIAS_LAG` ago is taken for a late one and not recorded.
    """
    period = current_period(alias)
    if period and period.key_id == key.pk:
        return False
    if not moved and period:
        left = AliasPeriod.objects.filter(alias=alias, key=key, until__gt=at - ALIAS_LAG)
        if left.exists():
            return False
    try:
        with transaction.atomic(using=router.db_for_write(AliasPeriod)):
            AliasPeriod.objects.filter(open_alias=alias).exclude(key=key).update(
                until=at, open_alias=None
            )
            AliasPeriod.objects.create(alias=alias, key=key, since=at, open_alias=alias)
    except IntegrityError:
        return False  # another process has just recorded the same move
    return True


def current_period(alias: str) -> AliasPeriod | None:
    """Return what the alias points to now, as far as we have seen."""
    return AliasPeriod.objects.filter(open_alias=alias).select_related("key").first()


def previous_key(alias: str) -> Key | None:
    """Return the key that the alias pointed to before its present one."""
    period = (
        AliasPeriod.objects.filter(alias=alias, open_alias=None)
        .select_related("key")
        .order_by("-until", "-pk")
        .first()
    )
    return period.key if period else None


def record_counts() -> Counter[columns.Group]:
    """
    Count the stored passwords in all columns, note on each key how many it seals, and
    return how many there are of each kind.
    """
    counted: Counter[columns.Group] = Counter()
    for column in columns.columns():
        counted += columns.count(column)
    rows: Counter[str] = Counter()
    for group, number in counted.items():
        for ref in {group.key_ref, group.mac_ref}:
            rows[ref] += number
    keys = list(Key.objects.all())
    for key in keys:
        key.rows, key.rows_counted_at = rows[key.ref], timezone.now()
    Key.objects.bulk_update(keys, ["rows", "rows_counted_at"], batch_size=100)
    return counted
