"""
Manners towards databases that have other things to do: time limits, and waiting for replicas.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from django.db import DatabaseError, connections

from kms_hasher.exceptions import RotationRefused

NO_REPLICA = (
    "{database!r} does not say how far it is behind ({reason}): --max-lag needs --replica to "
    "name a replica of PostgreSQL or MariaDB, and a user that may ask it."
)


@contextlib.contextmanager
def statement_timeout(database: str, seconds: float) -> Iterator[None]:
    """
    Let the database end every statement of this connection that takes longer, in the block.

    0 is no limit. SQLite knows none.
    """
    connection = connections[database]
    if not seconds or connection.vendor not in ("postgresql", "mysql"):
        yield
        return
    if connection.vendor == "postgresql":
        ask, put = "SHOW statement_timeout", "SET statement_timeout = %s"
        limit: Any = f"{round(seconds * 1000)}ms"
    else:
        ask, put = "SELECT @@max_statement_time", "SET max_statement_time = %s"
        limit = seconds
    with connection.cursor() as cursor:
        cursor.execute(ask)
        (former,) = cursor.fetchone()
        _set(cursor, put, limit)
    try:
        yield
    finally:
        with contextlib.suppress(DatabaseError), connection.cursor() as cursor:
            _set(cursor, put, former)


def _set(cursor: Any, statement: str, value: Any) -> None:
    # PostgreSQL takes no parameters in SET. What is put in is ours or the server's own.
    text = f"'{value}'" if isinstance(value, str) else str(value)
    cursor.execute(statement % text)


def lag(database: str) -> float:
    """
    Return by how many seconds the replica is behind.

    Raises `RotationRefused` if the database is no replica, has stopped to be one, or does
    not tell.
    """
    connection = connections[database]
    try:
        with connection.cursor() as cursor:
            if connection.vendor == "postgresql":
                cursor.execute(
                    "SELECT CASE WHEN NOT pg_is_in_recovery() THEN NULL "
                    "WHEN pg_last_wal_receive_lsn() = pg_last_wal_replay_lsn() THEN 0 "
                    "ELSE EXTRACT(EPOCH FROM now() - pg_last_xact_replay_timestamp()) END"
                )
                (seconds,) = cursor.fetchone()
            elif connection.vendor == "mysql":
                cursor.execute("SHOW REPLICA STATUS")
                row = cursor.fetchone()
                names = [each[0] for each in cursor.description or ()]
                seconds = dict(zip(names, row or (), strict=False)).get("Seconds_Behind_Master")
            else:
                seconds = None
    except DatabaseError as error:
        reason = type(error).__name__
        raise RotationRefused(NO_REPLICA.format(database=database, reason=reason)) from None
    if seconds is None:
        reason = "it is no replica, or has stopped"
        raise RotationRefused(NO_REPLICA.format(database=database, reason=reason))
    return float(seconds)
