"""
What the database has to store and to write for a re-wrap: sizes, log, time of a statement.

    DATABASE_URL=postgres://… python -m benchmarks.storage [--rows 100000]

Every password is replaced by one as long, a hundred by one statement, as a rotation does it;
KMS is not asked. "estimated" is `kms_hasher.rotation.estimate.disk`. "log" is the write-ahead
log of PostgreSQL, or the redo log of MariaDB and MySQL. One event of the audit is stored for
each call of a real run; its size is measured with rows like a rotation's.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
import uuid

import django
from django.conf import settings

from benchmarks import stub

if not settings.configured:
    project = stub.project()
    # Not the name that the other benchmarks use: one of them may be running.
    project["DATABASES"]["default"]["TEST"] = {"NAME": "kms_storage"}
    settings.configure(**project)
    django.setup()

from django.contrib.auth.models import User
from django.db import connection
from django.test.runner import DiscoverRunner
from django.utils import timezone

from benchmarks.rotation import OLD, fill
from kms_hasher import columns, encoding
from kms_hasher.columns import Change
from kms_hasher.models import AuditEvent
from kms_hasher.rotation.estimate import ROWS_PER_STATEMENT, disk


def ask(question: str, *parameters: str) -> int:
    with connection.cursor() as cursor:
        cursor.execute(question, parameters)
        return int(cursor.fetchone()[-1])


def analyze(table: str) -> None:
    word = "" if connection.vendor == "postgresql" else "TABLE"
    with connection.cursor() as cursor:
        cursor.execute(f"ANALYZE {word} {table}")
        cursor.fetchall() if word else None


def sizes(table: str) -> tuple[int, int]:
    """Return the bytes of a table and of its indexes."""
    analyze(table)
    if connection.vendor == "postgresql":
        return ask("SELECT pg_relation_size(%s)", table), ask(
            "SELECT pg_indexes_size(%s)", table
        )
    where = "FROM information_schema.tables WHERE table_schema = DATABASE() AND table_name = %s"
    return (
        ask(f"SELECT data_length {where}", table),
        ask(f"SELECT index_length {where}", table),
    )


def log() -> int:
    """Return how many bytes of log were ever written."""
    if connection.vendor == "postgresql":
        return ask("SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')")
    return ask("SHOW GLOBAL STATUS LIKE 'Innodb_os_log_written'")


def show(name: str, bytes_: float, rows: int) -> None:
    print(f"{name:28}{bytes_ / 1e6:10.1f} MB{bytes_ / rows:10,.0f} bytes a row", flush=True)


def rewrap(rows: int) -> list[float]:
    """Replace every password; return the seconds of each statement, commit included."""
    (column,) = columns.columns()
    old, new = (encoding.key_ref(arn.rpartition("/")[2]) for arn in (OLD, stub.ARN))
    taken, last = [], 0
    while True:
        page = User.objects.filter(pk__gt=last).order_by("pk").values_list("pk", "password")
        changes = [
            Change(pk, value, value.replace(old, new))
            for pk, value in page[:ROWS_PER_STATEMENT]
        ]
        if not changes:
            return taken
        started = time.perf_counter()
        changed = column.swap_all(changes)
        taken.append(time.perf_counter() - started)
        assert len(changed) == len(changes)
        last = changes[-1].pk


def audit(rows: int) -> None:
    """Store as many events as a re-wrap of so many rows."""
    ref = encoding.key_ref(stub.ARN.rpartition("/")[2])
    for start in range(0, rows, 1000):
        AuditEvent.objects.bulk_create(
            AuditEvent(
                time=timezone.now(),
                operation="ReEncrypt",
                purpose="rotate",
                outcome="success",
                requested_key=OLD,
                key_ref=ref,
                sub=uuid.uuid4().hex[:22],
                request_ids=str(uuid.uuid4()),
                latency_us=10_000,
            )
            for _ in range(start, min(start + 1000, rows))
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.storage",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", type=int, default=100_000, help="(default: %(default)s)")
    rows = parser.parse_args().rows
    if "DATABASE_URL" not in os.environ:
        sys.exit("DATABASE_URL is to name a database on a server.")
    print(f"{stub.environment()}; {connection.vendor}")
    runner = DiscoverRunner(verbosity=0, interactive=False)
    databases = runner.setup_databases()
    try:
        fill(rows)
        (column,) = columns.columns()
        before = sizes("auth_user")
        show("table", before[0], rows)
        show("indexes", before[1], rows)
        show("estimated", disk(column, rows) or 0, rows)
        written, started = log(), time.perf_counter()
        taken = rewrap(rows)
        seconds, written = time.perf_counter() - started, log() - written
        after = sizes("auth_user")
        show("table grew by", after[0] - before[0], rows)
        show("indexes grew by", after[1] - before[1], rows)
        show("log written", written, rows)
        quantiles = statistics.quantiles(taken, n=100)
        print(
            f"{rows / seconds:,.0f} rows/s through one connection; a statement takes "
            f"{quantiles[49] * 1000:.1f} ms (p99 {quantiles[98] * 1000:.1f} ms)"
        )
        audit(rows)
        show("audit, with its indexes", sum(sizes(AuditEvent._meta.db_table)), rows)
    finally:
        runner.teardown_databases(databases)


if __name__ == "__main__":
    main()
