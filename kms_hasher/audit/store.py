"""
How events get into the database, with the roll-ups that count them: in one transaction.

In SQL, as Django's ORM takes three times as long for many rows, and on PostgreSQL four round
trips for the one of a login where one statement will do.
"""

from __future__ import annotations

import functools
import os
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from django.db import connections, models, router, transaction

from kms_hasher import encoding
from kms_hasher.audit.rollups import bucket_of, hour_of
from kms_hasher.exceptions import MalformedHash
from kms_hasher.models import AuditEvent, AuditHour
from kms_hasher.signals import Event

#: How many rows of a roll-up concurrent processes share. One row would be locked by each
#: transaction in turn until it is committed.
SLOTS = 8

#: From how many events on PostgreSQL is given them by COPY.
COPY_FROM = 20

_EVENT = (
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
)
#: What is counted apart.
GROUP = ("hour", "key_ref", "operation", "purpose", "outcome", "bucket", "slot")

#: The values of one row of either table.
Row = tuple[Any, ...]

_slot = random.randrange(SLOTS)  # noqa: S311


def write(events: Sequence[Event]) -> None:
    """Write events and count them in their roll-ups, or neither."""
    database = router.db_for_write(AuditEvent)
    connection = connections[database]
    rows = [_row(event) for event in events]
    hours = _counted(rows, connection.vendor)
    if connection.vendor == "postgresql" and len(rows) < COPY_FROM:
        with connection.cursor() as cursor:  # one statement, so one transaction
            cursor.execute(
                f"WITH events AS ({_insert(connection, AuditEvent, _EVENT, len(rows))}) "
                f"{_add(connection, len(hours))}",
                [value for row in (*rows, *_summed(hours, connection)) for value in row],
            )
        return
    with transaction.atomic(using=database):
        with connection.cursor() as cursor:
            if connection.vendor == "postgresql" and hasattr(cursor, "copy"):
                _copy(cursor, connection, rows)
            else:
                adapt = connection.ops.adapt_datetimefield_value
                adapted = [(adapt(time), *rest) for time, *rest in rows]
                cursor.executemany(_insert(connection, AuditEvent, _EVENT), adapted)
        add(hours, database)


def add(hours: Mapping[Row, int], database: str) -> None:
    """Add to roll-ups the numbers of events by the values of `GROUP`."""
    connection = connections[database]
    rows = _summed(hours, connection)
    with connection.cursor() as cursor:
        if connection.vendor == "postgresql":
            values = [value for row in rows for value in row]
            cursor.execute(_add(connection, len(rows)), values)
        else:
            cursor.executemany(_add(connection), rows)


def _summed(hours: Mapping[Row, int], connection: Any) -> list[Row]:
    """Return the rows in an order that all writers have in common: none can deadlock."""
    adapt = connection.ops.adapt_datetimefield_value
    return [(adapt(hour), *rest, count) for (hour, *rest), count in sorted(hours.items())]


def _copy(cursor: Any, connection: Any, rows: Sequence[Row]) -> None:
    table = connection.ops.quote_name(AuditEvent._meta.db_table)
    with cursor.copy(f"COPY {table} ({_columns(connection, _EVENT)}) FROM STDIN") as copy:
        for row in rows:
            copy.write_row(row)


def _row(event: Event) -> Row:
    return (
        event.time,
        event.operation[:32],
        event.purpose[:16],
        event.outcome,
        event.error_code[:64],
        _key_ref(event.key),
        event.requested_key[:320],
        latency_us(event),
        " ".join(event.request_ids),
        event.sub,
    )


def latency_us(event: Event) -> int:
    """Return the latency in whole microseconds."""
    return max(0, round(event.latency * 1_000_000))


@functools.lru_cache(maxsize=256)
def _key_ref(key: str) -> str:
    try:
        return encoding.key_ref(key)
    except MalformedHash:
        return ""  # an alias, or nothing


def _counted(rows: Sequence[Row], vendor: str) -> Counter[Row]:
    # SQLite has one writer at a time, so there is nobody to get out of the way of.
    slot = 0 if vendor == "sqlite" else _slot
    return Counter(
        (hour_of(time), ref, operation, purpose, outcome, bucket_of(operation, us), slot)
        for time, operation, purpose, outcome, _code, ref, _requested, us, _ids, _sub in rows
    )


# --- the statements -------------------------------------------------------------------


def _columns(connection: Any, names: Sequence[str]) -> str:
    return ", ".join(connection.ops.quote_name(name) for name in names)


def _insert(
    connection: Any, model: type[models.Model], names: Sequence[str], rows: int = 1
) -> str:
    table = connection.ops.quote_name(model._meta.db_table)
    values = ", ".join([f"({', '.join(['%s'] * len(names))})"] * rows)
    return f"INSERT INTO {table} ({_columns(connection, names)}) VALUES {values}"  # noqa: S608


def _add(connection: Any, rows: int = 1) -> str:
    """Return the statement that makes the rows, or adds to those that are there."""
    count = connection.ops.quote_name("count")
    insert = _insert(connection, AuditHour, (*GROUP, "count"), rows)
    if connection.vendor == "mysql":
        return f"{insert} ON DUPLICATE KEY UPDATE {count} = {count} + VALUES({count})"
    table = connection.ops.quote_name(AuditHour._meta.db_table)
    return (
        f"{insert} ON CONFLICT ({_columns(connection, GROUP)}) "
        f"DO UPDATE SET {count} = {table}.{count} + excluded.{count}"
    )


def _after_fork_in_child() -> None:
    global _slot
    _slot = random.randrange(SLOTS)  # noqa: S311


os.register_at_fork(after_in_child=_after_fork_in_child)
