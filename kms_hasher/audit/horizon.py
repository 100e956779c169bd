"""
Up to which id the audit is complete: no event with such an id can still come in.

Ids are given out when an event is written, and events come to be seen when their transactions
are committed, which may be in another order. A segment that was cut at the highest id seen
would miss what is committed a moment later.
"""

from __future__ import annotations

import time

from django.db import OperationalError, connections

from kms_hasher.exceptions import SealRefused
from kms_hasher.models import AuditEvent

#: Seconds that events may take between getting their id and being written, where the database
#: cannot be asked who is writing.
SETTLE = 1.0

#: Seconds to wait for transactions that have written to the audit.
PATIENCE = 30.0

OPEN_TRANSACTION = (
    "A transaction that has written to the audit is still open after {seconds:g} s; nothing "
    "was sealed. Try again later."
)

# Writers hold this lock from before they take an id until after their commit is seen.
_WRITERS = """
    SELECT virtualtransaction FROM pg_locks
    WHERE locktype = 'relation' AND mode = 'RowExclusiveLock' AND granted
    AND relation = %s::regclass AND pid IS DISTINCT FROM pg_backend_pid()
    AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""
# Waits for rows that are not committed yet: a plain read would pass over them.
_BARRIER = "SELECT COUNT(*) FROM {table} WHERE id > %s AND id <= %s LOCK IN SHARE MODE"
#: Rows locked by one statement.
_PART = 100_000
_LOCK_WAIT_TIMEOUT = 1205


def find(
    database: str, after: int, *, settle: float = SETTLE, patience: float = PATIENCE
) -> int:
    """
    Return the highest id up to which the audit is complete: `after` if nothing came later.

    It is the highest id seen, once all transactions that may have taken a lower one have
    ended. On PostgreSQL these are watched; on MySQL and MariaDB rows that are not committed
    are waited for, after `settle` seconds in which those with an id are written; SQLite has
    one writer at a time. Raises `SealRefused` if one has not ended after `patience` seconds.
    Not to be called within a transaction.
    """
    ids = AuditEvent.objects.using(database).order_by("-pk").values_list("pk", flat=True)
    highest = ids.first()
    if highest is None or highest <= after:
        return after
    vendor = connections[database].vendor
    if vendor == "postgresql":
        _watch(database, patience)
    elif vendor == "mysql":
        time.sleep(settle)
        _pass_barrier(database, after, highest)
    return highest


def _watch(database: str, patience: float) -> None:
    writers = _writers(database)
    until = time.monotonic() + patience
    pause = 0.01
    while writers:
        if time.monotonic() > until:
            raise SealRefused(OPEN_TRANSACTION.format(seconds=patience))
        time.sleep(pause)
        pause = min(2 * pause, 1.0)
        writers &= _writers(database)


def _writers(database: str) -> set[str]:
    connection = connections[database]
    table = connection.ops.quote_name(AuditEvent._meta.db_table)
    with connection.cursor() as cursor:
        cursor.execute(_WRITERS, [table])
        return {each for (each,) in cursor.fetchall()}


def _pass_barrier(database: str, after: int, highest: int) -> None:
    connection = connections[database]
    table = connection.ops.quote_name(AuditEvent._meta.db_table)
    ids = AuditEvent.objects.using(database).order_by("pk").values_list("pk", flat=True)
    try:
        while after < highest:
            part = ids.filter(pk__gt=after, pk__lte=highest)[_PART - 1 : _PART]
            end = part[0] if part else highest
            with connection.cursor() as cursor:
                cursor.execute(_BARRIER.format(table=table), [after, end])
                cursor.fetchall()
            after = end
    except OperationalError as error:
        if error.args[:1] != (_LOCK_WAIT_TIMEOUT,):
            raise
        with connection.cursor() as cursor:
            cursor.execute("SELECT @@SESSION.innodb_lock_wait_timeout")
            (seconds,) = cursor.fetchone()
        raise SealRefused(OPEN_TRANSACTION.format(seconds=seconds)) from None
