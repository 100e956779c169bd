"""
What the audit costs: a login that waits for it, the writer behind it, and the database.

    DATABASE_URL=postgres://... python -m benchmarks.audit_cost [--quick]

Makes a test database of its own and removes it. Three parts:

path     What reporting one event takes from a login, as a ratio to stock Django's Argon2
         verify in the same run. "buffered" reports back to back, so that the writer's thread
         is at work beside it, as it hardly ever is at a login.
flush    Events a second that get into the database, roll-ups included: by the writer alone,
         and from `emit` to the commit of the last. Then, those that are pruned.
slots    32 processes that commit one event at a time, all in the same hour: without a
         roll-up, with one row for all, with as many as we use, and with 32.
"""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import mean, median
from typing import Any
from unittest import mock

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.settings")

import django

django.setup()

from django.conf import settings
from django.contrib.auth.hashers import Argon2PasswordHasher
from django.db import connection, connections
from django.test.runner import DiscoverRunner
from django.test.utils import override_settings
from django.utils import timezone

from benchmarks import stub
from kms_hasher import signals
from kms_hasher.audit import recorder, retention, store
from kms_hasher.models import AuditEvent

WRITERS = 32


def event(number: int = 0) -> signals.Event:
    return signals.Event(
        time=timezone.now(),
        operation="Decrypt",
        purpose="login",
        outcome=signals.SUCCESS,
        requested_key=stub.ARN,
        key=stub.ARN,
        latency=0.009 + number % 7000 / 1_000_000,
        request_ids=(f"00000000-0000-4000-8000-{number:012x}",),
        sub=f"{number * 2654435761 % 2**32:08x}{number:024x}",
    )


@contextmanager
def audit(mode: str) -> Iterator[None]:
    recorder.close()
    with override_settings(KMS_HASHER={**settings.KMS_HASHER, "AUDIT": mode}):
        yield
        recorder.close()


def path(n: int) -> None:
    hasher = Argon2PasswordHasher()
    encoded = hasher.encode("correct horse", "0123456789abcdefghijkl")
    argon2 = median(timed(lambda: hasher.verify("correct horse", encoded)) for _ in range(20))
    print(f"\nStock Argon2 verify: {argon2 * 1000:.1f} ms. One event, {n:,} of them:")
    print(f"{'AUDIT':10}{'p50':>11}{'mean':>11}{'p50 / Argon2':>14}{'mean / Argon2':>15}")
    for mode in ("off", "buffered", "durable"):
        with audit(mode):
            for number in range(100):
                signals.emit(event(number))
            events = [event(number) for number in range(n)]
            times = [timed(lambda each=each: signals.emit(each)) for each in events]
        p50, average = median(times), mean(times)
        print(
            f"{mode:10}{p50 * 1e6:8.0f} µs{average * 1e6:8.0f} µs"
            f"{p50 / argon2:14.3%}{average / argon2:15.3%}",
            flush=True,
        )


def timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def flush(n: int) -> None:
    print(f"\nEvents a second, {n:,} of them:")
    events = [event(number) for number in range(n)]
    for size in (100, 500, 1000, 5000):
        batches = [events[at : at + size] for at in range(0, n, size)]
        taken = timed(lambda batches=batches: [store.write(batch) for batch in batches])
        print(f"writer alone, {size:5} in a commit {n / taken:12,.0f}", flush=True)
    before = AuditEvent.objects.count()
    started = time.perf_counter()
    with audit("buffered"):
        for each in events:
            signals.emit(each)
    taken = time.perf_counter() - started
    assert AuditEvent.objects.count() - before == n
    print(f"from emit to the last commit       {n / taken:12,.0f}", flush=True)
    gone = 0
    started = time.perf_counter()
    for number in retention.prune(retention.prunable(timezone.now())):
        gone += number
    print(f"pruned                             {gone / (time.perf_counter() - started):12,.0f}")


def write_for(seconds: float, barrier: Any, done: Any) -> None:
    connection.ensure_connection()
    barrier.wait()
    until, number = time.monotonic() + seconds, 0
    while time.monotonic() < until:
        number += 1
        store.write([event(number)])
    connections.close_all()
    with done.get_lock():
        done.value += number


def slots(seconds: float) -> None:
    print(f"\n{WRITERS} processes, one event a commit, {seconds:g} s: events a second")
    for text, number in (
        ("without roll-ups", 0),
        ("one row", 1),
        (f"{store.SLOTS} rows", store.SLOTS),
        (f"{WRITERS} rows", WRITERS),
    ):
        connections.close_all()
        fork = multiprocessing.get_context("fork")
        barrier, done = fork.Barrier(WRITERS), fork.Value("q", 0)
        plain = mock.patch.object(store, "write", write_without)
        with plain if not number else mock.patch.object(store, "SLOTS", number):
            workers = [
                fork.Process(target=write_for, args=(seconds, barrier, done))
                for _ in range(WRITERS)
            ]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        assert not any(worker.exitcode for worker in workers)
        print(f"{text:20}{done.value / seconds:10,.0f}", flush=True)


def write_without(events: list[signals.Event]) -> None:
    with connection.cursor() as cursor:
        cursor.execute(
            store._insert(connection, AuditEvent, store._EVENT, len(events)),
            [value for each in events for value in store._row(each)],
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.audit_cost",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="a few: to see it work")
    parts = ("path", "flush", "slots")
    parser.add_argument("--only", default=",".join(parts), help="some of: %(default)s")
    options = parser.parse_args()
    if connection.vendor == "sqlite":
        parser.error("needs DATABASE_URL, of a server: SQLite has no writer of its own")
    wanted, quick = options.only.split(","), options.quick
    runner = DiscoverRunner(verbosity=0, interactive=False)
    databases = runner.setup_databases()
    try:
        print(f"{stub.environment()}, {connection.vendor}")
        if "path" in wanted:
            path(200 if quick else 2_000)
        if "flush" in wanted:
            flush(5_000 if quick else 100_000)
        if "slots" in wanted:
            slots(0.5 if quick else 5)
        print(stub.environment())
    finally:
        recorder.close()
        runner.teardown_databases(databases)


if __name__ == "__main__":
    main()
