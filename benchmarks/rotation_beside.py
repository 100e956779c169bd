"""
What a rotation at full speed leaves to everybody else.

    export DATABASE_URL=postgres://…
    python -m benchmarks.rotation_beside memory [--rows 100000,1000000]
    python -m benchmarks.rotation_beside logins [--rate 200]
    python -m benchmarks.rotation_beside throttling [--quota 100]

"memory": by how much the resident memory of the rotating process grows over what Django and
the app take before it, the time per row, and by how much the table grows. "logins": p50 and
p99 of `authenticate()` before and during a rotation, which runs in a process of its own.
"throttling": a KMS that throttles beyond so many calls a second; a rotation with a cap below
that and one without any, and logins beside each. KMS is the stub of benchmarks.stub.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import time
from typing import Any

import django
from django.conf import settings

from benchmarks import stub

if not settings.configured:
    settings.configure(**stub.project())
    django.setup()

from django.contrib.auth import authenticate
from django.contrib.auth.models import User
from django.db import connection, connections
from django.test.runner import DiscoverRunner

from benchmarks import rotation
from kms_hasher.exceptions import KMSUnavailable
from kms_hasher.models import RotationRun

LOGINS = 60


def rotate(names: dict[str, str], rows: int, results: Any, options: dict[str, Any]) -> None:
    """Re-wrap all rows in this process, started anew; put what it took on a queue."""
    for alias, name in names.items():
        connections[alias].settings_dict["NAME"] = name
    User.objects.first()  # connects
    before = rotation.resident()
    wall, _, peak = rotation.measured(lambda: rotation.ours(rows, **options))
    results.put((wall, before, peak))


def started(rows: int, **options: Any) -> tuple[Any, Any]:
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    names = {alias: connections[alias].settings_dict["NAME"] for alias in connections}
    process = context.Process(target=rotate, args=(names, rows, results, options), daemon=True)
    process.start()
    return process, results


def table_size() -> int:
    if connection.vendor != "postgresql":
        return 0
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_total_relation_size('auth_user')")
        return int(cursor.fetchone()[0])


def memory(arguments: argparse.Namespace) -> None:
    print(
        f"{'rows':>10}{'rows/s':>9}{'us/row':>8}{'before':>9}{'peak +':>9}{'table':>9}"
        f"{'after':>9}   (MiB)"
    )
    for rows in map(int, arguments.rows.split(",")):
        rotation.fill(rows)
        with connection.cursor() as cursor:
            if connection.vendor == "postgresql":
                cursor.execute("VACUUM FULL auth_user")
        size = table_size()
        process, results = started(rows, concurrency=arguments.concurrency)
        wall, before, peak = results.get()
        process.join()
        grown = table_size()
        print(
            f"{rows:10,}{rows / wall:9,.0f}{wall / rows * 1e6:8.0f}{before:9.1f}{peak:9.1f}"
            f"{size / 2**20:9.0f}{grown / 2**20:9.0f}",
            flush=True,
        )


def log_in(number: int = LOGINS) -> tuple[float, float, int]:
    """Return p50 and p99 of a login in ms, and how many failed."""
    times, failed = [], 0
    for _ in range(number):
        start = time.perf_counter()
        try:
            failed += authenticate(None, username="one", password="secret") is None
        except KMSUnavailable:
            failed += 1
        times.append((time.perf_counter() - start) * 1000)
    return statistics.median(times), statistics.quantiles(times, n=100)[98], failed


def somebody() -> None:
    User.objects.filter(username="one").delete()
    User.objects.create_user("one", password="secret")
    log_in(3)


def tell(name: str, found: tuple[float, float, int], beside: tuple[float, float, int]) -> None:
    p50, p99, failed = found
    print(
        f"{name:44}{p50:8.1f}{p50 / beside[0]:7.2f}{p99:8.1f}{p99 / beside[1]:7.2f}{failed:8}",
        flush=True,
    )


HEAD = f"{'logins':44}{'p50 ms':>8}{'x':>7}{'p99 ms':>8}{'x':>7}{'failed':>8}"


def logins(arguments: argparse.Namespace) -> None:
    rates = [float(rate) for rate in arguments.rate.split(",")]
    print(HEAD)
    for rate in rates:
        rotation.fill(int(rate * 200))
        somebody()
        before = log_in()
        tell("before", before, before)
        process, _ = started(0, concurrency=32, rate=rate)
        while not RotationRun.objects.filter(rewritten__gt=0, state="running").exists():
            time.sleep(0.1)
        during = log_in()
        assert process.is_alive(), "the rotation ended before the logins: give it more rows"
        tell(f"beside a rotation at {rate:,.0f} calls a second", during, before)
        process.terminate()
        process.join()
        RotationRun.objects.all().delete()
        tell("after", log_in(), before)


def throttling(arguments: argparse.Namespace, kms: stub.Stub) -> None:
    quota = arguments.quota
    for rate in (0.8 * quota, None):
        rows = int(quota * 20)
        rotation.fill(rows)
        somebody()
        before = log_in(20)
        kms.quota(quota)
        answered, throttled = kms.counts()
        process, results = started(rows, concurrency=32, rate=rate)
        while not RotationRun.objects.filter(rewritten__gt=0).exists():
            time.sleep(0.1)
        found = log_in(40)
        wall, *_ = results.get()
        process.join()
        kms.quota(0)
        counts = kms.counts()
        answered, throttled = counts[0] - answered, counts[1] - throttled
        run = RotationRun.objects.latest("pk")
        print(
            f"quota {quota:.0f}/s, cap {rate or 'none'}: {run.state}, {run.rewritten:,} rows, "
            f"{run.failed} bad, {run.calls / wall:.1f} calls/s, KMS answered {answered:,} and "
            f"throttled {throttled:,}"
        )
        print(HEAD)
        tell("before", before, before)
        tell("beside it", found, before)


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.rotation_beside",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=["memory", "logins", "throttling"])
    parser.add_argument("--rows", default="100000,1000000", help="(default: %(default)s)")
    parser.add_argument("--rate", default="100,200", help="(default: %(default)s)")
    parser.add_argument("--quota", type=float, default=100, help="(default: %(default)s)")
    parser.add_argument("--concurrency", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--delay", type=float, default=10, help="of KMS in ms (%(default)s)")
    arguments = parser.parse_args()
    if "DATABASE_URL" not in os.environ:
        sys.exit("DATABASE_URL is to name a database on a server.")
    print(stub.environment())
    runner = DiscoverRunner(verbosity=0, interactive=False)
    databases = runner.setup_databases()
    try:
        with stub.running(arguments.delay) as kms:
            if arguments.what == "memory":
                memory(arguments)
            elif arguments.what == "logins":
                logins(arguments)
            else:
                throttling(arguments, kms)
    finally:
        rotation.recorder.close()
        runner.teardown_databases(databases)
    print(stub.environment())


if __name__ == "__main__":
    main()
