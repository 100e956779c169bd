"""
What a rotation asks of a database besides its rows: to end statements that take too long,
and how far a replica is behind.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from django.db import Error, NotSupportedError, OperationalError, ProgrammingError, connections
from django.db.backends.base.base import BaseDatabaseWrapper

from kms_hasher.exceptions import RotationRefused

NO_REPLICA = (
    "The database {database!r} is no replica: {why}. Name the alias of a replica, or do "
    "without the limit on its lag."
)
CANNOT_TELL = (
    "The database {database!r} does not tell how far it is behind: {why}. Do without the limit "
    "on its lag, and watch it by other means."
)
BROKEN = (
    "Replication to the database {database!r} has stopped: SHOW REPLICA STATUS there gives no "
    "{column}, and says why. Start it again first, or do without the limit on its lag."
)
PRIVILEGE = "its user needs the privilege REPLICA MONITOR, on MySQL REPLICATION CLIENT"

# MariaDB's number for a privilege that is missing.
_DENIED = 1227


@contextlib.contextmanager
def statement_timeout(database: str, seconds: float) -> Iterator[None]:
    """
    Let the database end each statement in the block that takes longer, by an
    `OperationalError`; put the former limit back afterwards.

    `seconds` are rounded to milliseconds, and at least one; 0 is no limit. It is
    `statement_timeout` on PostgreSQL and `max_statement_time` on MariaDB, of the session: a
    pooler that shares one session among clients by transaction may pass it on to others. On
    SQLite and MySQL nothing is done. Raises `ValueError` for fewer than 0 seconds.
    """
    if seconds < 0:
        raise ValueError("the seconds of a time limit cannot be negative")
    connection = connections[database]
    milliseconds = max(1, round(seconds * 1000)) if seconds else 0
    if connection.vendor == "postgresql":
        read = "SELECT current_setting('statement_timeout')"
        write = "SELECT set_config('statement_timeout', %s, false)"
        limit: Any = str(milliseconds)
    elif getattr(connection, "mysql_is_mariadb", False):
        read = "SELECT @@SESSION.max_statement_time"
        write = "SET SESSION max_statement_time = %s"
        limit = milliseconds / 1000
    else:
        yield
        return
    with connection.cursor() as cursor:
        cursor.execute(read)
        (former,) = cursor.fetchone()
        cursor.execute(write, [limit])
    try:
        yield
    except BaseException:
        # Where PostgreSQL refuses because the transaction has failed, its end does the same.
        with contextlib.suppress(Error):
            _put_back(connection, write, former)
        raise
    _put_back(connection, write, former)


def _put_back(connection: BaseDatabaseWrapper, write: str, former: Any) -> None:
    if connection.connection is None:  # it was lost, and the next one has no limit of ours
        return
    # Past Django's own check: MariaDB takes it in a transaction that is to be rolled back.
    with connection.wrap_database_errors, connection.connection.cursor() as cursor:
        cursor.execute(write, [former])


def lag(database: str) -> float | None:
    """
    Return by how many seconds a replica is behind, 0.0 if it has all; None if it cannot be
    told yet, because it has replayed nothing since its start.

    On PostgreSQL it is the age of the last transaction replayed, unless all that was received
    is replayed and the primary is connected: after a long quiet it is too high for a moment.
    On MariaDB it is `Seconds_Behind_Master`, the largest where there are several primaries.

    Raises `RotationRefused` if the database is no replica, its replication has stopped, or it
    cannot tell (SQLite, Amazon Aurora, a privilege is missing), and `OperationalError` if it
    cannot be reached.
    """
    connection = connections[database]
    try:
        if connection.vendor == "postgresql":
            return _lag_of_postgresql(connection)
        if connection.vendor == "mysql":
            return _lag_of_mysql(connection)
    except (NotSupportedError, ProgrammingError) as error:
        raise RotationRefused(CANNOT_TELL.format(database=database, why=error)) from None
    except OperationalError as error:
        if error.args[:1] != (_DENIED,):
            raise
        raise RotationRefused(CANNOT_TELL.format(database=database, why=PRIVILEGE)) from None
    why = f"{connection.display_name} has none"
    raise RotationRefused(NO_REPLICA.format(database=database, why=why))


def _lag_of_postgresql(connection: BaseDatabaseWrapper) -> float | None:
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_is_in_recovery()")
        if not cursor.fetchone()[0]:
            why = "it takes writes itself (pg_is_in_recovery)"
            raise RotationRefused(NO_REPLICA.format(database=connection.alias, why=why))
        # Without a receiver nothing more comes, and what has come says little.
        cursor.execute(
            "SELECT pg_last_wal_receive_lsn() = pg_last_wal_replay_lsn() "
            "AND EXISTS (SELECT 1 FROM pg_stat_wal_receiver), "
            "EXTRACT(EPOCH FROM clock_timestamp() - pg_last_xact_replay_timestamp())"
        )
        has_all, age = cursor.fetchone()
    if has_all:
        return 0.0
    return None if age is None else max(0.0, float(age))


def _lag_of_mysql(connection: Any) -> float:
    if connection.mysql_is_mariadb:
        query, column = "SHOW ALL SLAVES STATUS", "Seconds_Behind_Master"
    else:
        query, column = "SHOW REPLICA STATUS", "Seconds_Behind_Source"
    with connection.cursor() as cursor:
        cursor.execute(query)
        names = [each[0] for each in cursor.description]
        behind = [row[names.index(column)] for row in cursor.fetchall()]
    if not behind:
        why = "it follows no primary (SHOW REPLICA STATUS is empty)"
        raise RotationRefused(NO_REPLICA.format(database=connection.alias, why=why))
    if None in behind:
        # The errors shown there are not quoted: they may hold what a row holds.
        raise RotationRefused(BROKEN.format(database=connection.alias, column=column))
    return float(max(behind))
