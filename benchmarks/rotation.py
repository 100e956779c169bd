"""
How fast stored passwords are re-wrapped, beside the loop that everybody writes first.

    DATABASE_URL=postgres://… python -m benchmarks.rotation [--rows 20000] [--delay 10]

"naive" is `for user in users: boto3.re_encrypt(…); user.save()`, on a few rows. "calls alone"
makes the same calls as "ours" on the same event loop, with no database at all. "of bound" is
the share of calls in flight / latency. KMS is the stub of benchmarks.stub; what it costs is
taken from the same processors. "peak" is by how much the resident memory of the process grew
while it ran.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import django
from django.conf import settings

from benchmarks import stub

if not settings.configured:
    settings.configure(**stub.project())
    django.setup()

from django.contrib.auth.models import User
from django.test.runner import DiscoverRunner
from django.test.utils import override_settings
from django.utils import timezone

from kms_hasher import encoding, history
from kms_hasher.audit import recorder
from kms_hasher.encoding import Argon2Parameters, Header, SealedHash
from kms_hasher.models import RotationRun
from kms_hasher.providers import base
from kms_hasher.rotation import engine, jobs, runs, sweeps, workers
from kms_hasher.rotation.processes import processes as several

OLD = stub.ARN.replace("5555", "4444")
NAIVE = 300


def fill(rows: int) -> None:
    """Store so many passwords sealed by the old key."""
    User.objects.all().delete()
    parameters, ref = Argon2Parameters(102400, 2, 8), encoding.key_ref(OLD)
    made: list[User] = []
    for number in range(rows):
        header = Header("kms_argon2", parameters, f"{number:022}".encode())
        sealed = SealedHash(header, "d1", ref, os.urandom(184))
        made.append(User(username=f"user{number}", password=str(sealed)))
        if len(made) == 5000 or number == rows - 1:
            User.objects.bulk_create(made)
            made = []


def naive() -> None:
    import boto3

    client = boto3.client("kms")
    for user in User.objects.all()[:NAIVE]:
        stored = encoding.parse(user.password)
        context = {"application": "kms_hasher", "use": "password", "sub": stored.header.sub}
        answer = client.re_encrypt(
            CiphertextBlob=stored.sealed,
            SourceKeyId=OLD,
            SourceEncryptionContext=context,
            DestinationKeyId=stub.ARN,
            DestinationEncryptionContext=context,
        )
        ref, sealed = encoding.key_ref(answer["KeyId"]), answer["CiphertextBlob"]
        user.password = str(SealedHash(stored.header, stored.mode, ref, sealed))
        user.save()


def job() -> jobs.Rewrap:
    target = base.Key(
        key_arn=stub.ARN, spec="SYMMETRIC_DEFAULT", usage="ENCRYPT_DECRYPT", state="Enabled"
    )
    return jobs.Rewrap(target)


def alone(rows: int, concurrency: int) -> None:
    header = Header("kms_argon2", Argon2Parameters(102400, 2, 8), b"0" * 22)
    stored = str(SealedHash(header, "d1", encoding.key_ref(OLD), os.urandom(184)))
    work = job()

    def pages() -> Iterator[list[tuple[int, workers.Task]]]:
        for _ in range(rows // 500):
            tasks = (work.task(stored) for _ in range(500))
            yield [(0, task) for task in tasks if task]

    with workers.Workers(concurrency) as pool:
        for _ in pool.map(pages()):
            pass


def ours(rows: int, concurrency: int | None, processes: int = 1, **more: Any) -> RotationRun:
    """Re-wrap all rows as the command does, but for the alias, which the stub has none of."""
    options = engine.Options(concurrency=concurrency, processes=processes, settle=0, **more)
    with runs.recorded(
        RotationRun.Kind.REWRAP,
        key=history.record_key(stub.ARN, timezone.now()),
        plan=sweeps.plan_of(options),
        rate=options.rate,
    ) as record:
        enlist = workers_of(processes)
        for _ in sweeps.conduct(record, job(), options, total=rows, enlist=enlist):
            pass
    if rows:
        assert record.row.rewritten == rows
    return record.row


def workers_of(processes: int) -> sweeps.Enlist:
    return several if processes > 1 else sweeps.here


def resident() -> float:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in x)
    return int(line.split()[1]) / 1024


def measured(call: Callable[[], Any]) -> tuple[float, float, float]:
    """Return wall and CPU seconds of a call, and by how many MiB the process grew."""
    gc.collect()
    before, peak, done = resident(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.05):
            peak = max(peak, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    done.set()
    watcher.join()
    return wall, cpu, max(peak - before, 0)


def show(
    name: str, rows: int, call: Callable[[], Any], beside: float, bound: float = 0
) -> float:
    wall, cpu, peak = measured(call)
    rate = rows / wall
    ratio = f"{rate / beside:10.1f}" if beside else f"{'':10}"
    share = f"{rate / bound:9.0%}" if bound else f"{'':9}"
    print(
        f"{name:42}{rows:9,}{rate:10,.0f}{ratio}{share}{cpu / rows * 1e6:12,.0f}{peak:9.1f}",
        flush=True,
    )
    return rate


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.rotation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", type=int, default=20_000, help="(default: %(default)s)")
    parser.add_argument("--delay", type=float, default=10, help="of KMS in ms (%(default)s)")
    parser.add_argument("--concurrency", default="8,32,64", help="(default: %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="(default: %(default)s)")
    options = parser.parse_args()
    if "DATABASE_URL" not in os.environ:
        sys.exit("DATABASE_URL is to name a database on a server.")
    print(stub.environment())
    runner = DiscoverRunner(verbosity=0, interactive=False)
    databases = runner.setup_databases()
    try:
        with stub.running(options.delay):
            print(
                f"{'':42}{'rows':>9}{'rows/s':>10}{'x naive':>10}{'of bound':>9}"
                f"{'CPU us/row':>12}{'peak MiB':>9}"
            )
            fill(NAIVE)
            beside = show("naive", NAIVE, naive, 0)
            for concurrency in map(int, options.concurrency.split(",")):
                bound = concurrency / options.delay * 1000
                text = f"calls alone, {concurrency} in flight"
                call = partial(alone, options.rows, concurrency)
                show(text, options.rows, call, beside, bound)
                for audit in ("off", "durable"):
                    values = {**settings.KMS_HASHER, "AUDIT": audit}
                    fill(options.rows)
                    with override_settings(KMS_HASHER=values):
                        text = f"ours, {concurrency} in flight, AUDIT {audit}"
                        call = partial(ours, options.rows, concurrency)
                        show(text, options.rows, call, beside, bound)
                if options.processes > 1:
                    fill(options.rows)
                    text = f"ours, {options.processes} processes, {concurrency} each, AUDIT off"
                    call = partial(ours, options.rows, concurrency, options.processes)
                    show(text, options.rows, call, beside, bound * options.processes)
    finally:
        recorder.close()
        runner.teardown_databases(databases)
    print(stub.environment())


if __name__ == "__main__":
    main()
