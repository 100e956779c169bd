"""
Whether the audit loses an event, or writes one twice, when much goes wrong.

    DATABASE_URL=postgres://... python -m benchmarks.audit_writers [--events 100000] [--kill]

Makes a test database of its own and removes it. 32 writers, threads in four processes, each
in transactions that are committed, rolled back or ended by an error at random, in turn with
AUDIT "durable" and "buffered". Afterwards events are compared with what was reported, one by
one, and the roll-ups with the events.

`--kill` ends a process by SIGKILL again and again while it reports to a buffered audit, and
counts what was lost; the bound is `writer.MAX_HELD` events, and what one second brings.
"""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import random
import signal
import threading
import time
from collections import Counter
from typing import Any

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.settings")

import django

django.setup()

from django.conf import settings
from django.contrib.auth.models import Group
from django.db import connection, connections, transaction
from django.db.models import Count, Sum
from django.test.runner import DiscoverRunner

from benchmarks import stub
from benchmarks.audit_cost import event
from kms_hasher import signals
from kms_hasher.audit import recorder, writer
from kms_hasher.models import AuditEvent, AuditHour

PROCESSES, THREADS = 4, 8


def report(first: int, number: int, seed: int, went: Counter[str]) -> None:
    """Report `number` events in transactions of all ends."""
    chance, at, last = random.Random(seed), first, first + number
    while at < last:
        some = range(at, min(last, at + chance.choice((1, 1, 1, 2, 5))))
        end = chance.choice(("committed", "rolled back", "raised", "outside"))
        at = some.stop
        went[end] += len(some)
        if end == "outside":
            for each in some:
                signals.emit(event(each))
            continue
        with contextlib.suppress(RuntimeError), transaction.atomic():
            if chance.random() < 0.1:  # most requests write little
                Group.objects.create(name=f"{some.start}")
            for each in some:
                signals.emit(event(each))
            if end == "rolled back":
                transaction.set_rollback(True)
            if end == "raised":
                raise RuntimeError
    connections.close_all()


def work(process: int, each: int, results: Any) -> None:
    went = [Counter[str]() for _ in range(THREADS)]
    threads = [
        threading.Thread(target=report, args=((process * THREADS + t) * each, each, t, went[t]))
        for t in range(THREADS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    results.put(dict(sum(went, Counter())))


def check(mode: str, events: int) -> bool:
    settings.KMS_HASHER["AUDIT"] = mode
    for table in (AuditEvent, AuditHour, Group):
        with connection.cursor() as cursor:
            cursor.execute(f"delete from {table._meta.db_table}")
    connections.close_all()
    fork, each = multiprocessing.get_context("fork"), events // (PROCESSES * THREADS)
    events, results = each * PROCESSES * THREADS, fork.SimpleQueue()
    started = time.monotonic()
    workers = [
        fork.Process(target=work, args=(number, each, results)) for number in range(PROCESSES)
    ]
    for worker in workers:
        worker.start()
    went: Counter[str] = Counter()
    for _worker in workers:
        went.update(results.get())
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    taken = time.monotonic() - started
    expected = {event(number).sub for number in range(events)}
    found = Counter(AuditEvent.objects.values_list("sub", flat=True).iterator())
    lost, twice = len(expected - set(found)), sum(number - 1 for number in found.values())
    names = ("key_ref", "operation", "purpose", "outcome")
    rolled = {
        tuple(row.values())
        for row in AuditHour.objects.order_by().values(*names).annotate(n=Sum("count"))
    }
    counted = {
        tuple(row.values())
        for row in AuditEvent.objects.order_by().values(*names).annotate(n=Count("pk"))
    }
    agree = rolled == counted
    print(
        f"{mode:9} {events:,} reported ({', '.join(f'{v:,} {k}' for k, v in went.items())}): "
        f"{lost} lost, {twice} twice, roll-ups {'agree' if agree else 'DIFFER'}; "
        f"{events / taken:,.0f} a second",
        flush=True,
    )
    return agree and not lost and not twice


def kill(times: int, rate: float = 500.0) -> None:
    settings.KMS_HASHER["AUDIT"] = "buffered"
    fork, lost = multiprocessing.get_context("fork"), []
    for _ in range(times):
        AuditEvent.objects.all()._raw_delete(connection.alias)
        connections.close_all()
        told = fork.Value("q", 0)

        def talk(told: Any = told) -> None:
            while True:
                signals.emit(event(told.value))
                told.value += 1
                time.sleep(1 / rate)

        worker = fork.Process(target=talk)
        worker.start()
        time.sleep(random.uniform(0.5, 4))
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()
        time.sleep(0.2)  # what the server was sent is committed
        lost.append(told.value - AuditEvent.objects.count())
    print(
        f"buffered, {rate:g} events a second at most, killed {times} times: lost "
        f"{min(lost)} to {max(lost)} events; at most {writer.MAX_HELD:,} can be held"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.audit_writers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--events", type=int, default=100_000)
    parser.add_argument("--kill", action="store_true", help="kill processes instead")
    options = parser.parse_args()
    runner = DiscoverRunner(verbosity=0, interactive=False)
    if connection.vendor == "sqlite":
        parser.error("needs DATABASE_URL, of a server or sqlite:///path")
    databases = runner.setup_databases()
    try:
        print(f"{stub.environment()}, {connection.vendor}")
        if options.kill:
            kill(20)
        elif not all([check(mode, options.events) for mode in ("durable", "buffered")]):
            raise SystemExit(1)
    finally:
        recorder.close()
        runner.teardown_databases(databases)


if __name__ == "__main__":
    main()
