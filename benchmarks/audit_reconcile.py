"""
What comparing CloudTrail with the audit finds, takes and needs of memory.

    [DATABASE_URL=postgres://…] python -m benchmarks.audit_reconcile [--calls 100000]

So many calls within a day, of which 1 % got no answer (half of these never arrived) and 1 %
needed a second attempt; 100 strange calls, half of them by the site's own role; one record
in fifty comes twice; CloudTrail's files lie as S3 has them, in no order of their records. It
is done with a tenth of the calls, too: each comparison runs in a process of its own, whose
peak of memory is told. "found" are strange calls that were, "false" all other findings.
Without DATABASE_URL it is SQLite, in a file.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import django
from django.conf import settings

from benchmarks import stub

if not settings.configured:
    project = stub.project(audit="inline")
    if "KMS_BENCHMARK_DATABASE" in os.environ:  # a child's
        project["DATABASES"]["default"] = json.loads(os.environ["KMS_BENCHMARK_DATABASE"])
    elif "DATABASE_URL" in os.environ:
        project["DATABASES"]["default"]["TEST"] = {"NAME": "kms_reconcile_benchmark"}
    else:
        name = str(Path(tempfile.mkdtemp(prefix="kms-reconcile-"), "db.sqlite3"))
        project["DATABASES"]["default"] |= {"NAME": name, "TEST": {"NAME": name}}
    settings.configure(**project)
    django.setup()

from django.contrib.auth.models import User
from django.db import connection
from django.test.runner import DiscoverRunner

from kms_hasher import encoding, history, signals
from kms_hasher.audit.reconcile import reconcile
from kms_hasher.models import AuditEvent, AuditEvidence, AuditFinding
from tests import trail

START = datetime.datetime(2026, 11, 20, tzinfo=datetime.timezone.utc)
NOW = START + datetime.timedelta(days=2)
DAY = 24 * 3600.0
STRANGE = 100

#: Records in a file, which CloudTrail starts anew every five minutes or so.
IN_FILE = 500


def users(number: int) -> list[str]:
    """Make users; return the `sub`s of their passwords."""
    costs = encoding.Argon2Parameters(102400, 2, 8)
    ref = encoding.key_ref(stub.ARN)
    stored = [
        encoding.SealedHash(
            encoding.Header("kms_argon2", costs, uuid.uuid4().hex[:22].encode()),
            "d1",
            ref,
            os.urandom(184),
        )
        for _ in range(number)
    ]
    User.objects.bulk_create(
        [User(username=str(n), password=str(each)) for n, each in enumerate(stored)],
        batch_size=500,
    )
    return [each.header.sub for each in stored]


def traffic(number: int, subs: list[str], chance: random.Random) -> Iterator[dict[str, Any]]:
    """Store the events of so many calls; yield their records."""
    events: list[AuditEvent] = []
    ref = encoding.key_ref(stub.ARN)
    for _ in range(number):
        at = START + datetime.timedelta(seconds=chance.uniform(0, DAY))
        ids = str(uuid.UUID(int=chance.getrandbits(128)))
        event = AuditEvent(
            time=at,
            operation="Decrypt",
            purpose="login",
            outcome=signals.SUCCESS,
            key_ref=ref,
            requested_key=stub.ARN,
            latency_us=chance.randint(5_000, 40_000),
            request_ids=ids,
            sub=chance.choice(subs),
        )
        lot = chance.random()
        before = at - datetime.timedelta(seconds=2)
        record: dict[str, Any] = {"sub": event.sub, "key": stub.ARN}
        if lot < 0.01:
            event.outcome, event.error_code = signals.UNAVAILABLE, "ReadTimeoutError"
            event.request_ids, event.latency_us = "", 4_050_000
            if lot < 0.005:
                yield trail.record(before, **record)
        else:
            if lot < 0.02:
                event.latency_us = 2_050_000
                yield trail.record(before, **record)
            yield trail.record(at, request_id=ids, **record)
        events.append(event)
        if len(events) == 1000:
            AuditEvent.objects.bulk_create(events)
            events = []
    AuditEvent.objects.bulk_create(events)


def fill(number: int, folder: Path) -> list[str]:
    """Store events, write the files; return the `eventID`s of the strange calls."""
    chance = random.Random(number)
    for model in (AuditEvidence, AuditFinding, User):
        model._base_manager.all().delete()
    AuditEvent._base_manager.all()._raw_delete(connection.alias)
    history.record_key(stub.ARN, START)
    subs = users(2000)
    strange = [
        trail.record(
            START + datetime.timedelta(seconds=chance.uniform(0, DAY)),
            sub=chance.choice(subs),
            key=stub.ARN,
            caller=trail.SITE if each % 2 else trail.THIEF,
        )
        for each in range(STRANGE)
    ]
    later = iter(strange)
    pile: list[dict[str, Any]] = []
    written = 0
    for at, record in enumerate(traffic(number, subs, chance)):
        pile.append(record)
        if chance.random() < 0.02:
            pile.append(record)
        if at % (number // STRANGE) == 0:
            pile += [each for each in [next(later, None)] if each]
        if len(pile) >= IN_FILE:
            chance.shuffle(pile)
            trail.write(folder, START + datetime.timedelta(minutes=5 * written), pile)
            pile, written = [], written + 1
    trail.write(folder, NOW, [*pile, *later])
    return [each["eventID"] for each in strange]


def work(folder: str) -> None:
    """Compare, and tell what it took. Runs in a process of its own."""
    began = time.perf_counter()
    report = reconcile([folder], now=NOW)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    told = {"seconds": seconds, "peak": peak, **vars(report)}
    print(json.dumps(told, default=str))


def measure(number: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        strange = fill(number, Path(folder))
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.gz"))
        database = {
            name: value
            for name, value in connection.settings_dict.items()
            if isinstance(value, str | int | dict) and name != "TEST"
        }
        connection.close()
        child = subprocess.run(
            [sys.executable, "-m", "benchmarks.audit_reconcile", "--worker", folder],
            env={**os.environ, "KMS_BENCHMARK_DATABASE": json.dumps(database)},
            stdout=subprocess.PIPE,
            check=True,
            text=True,
        )
    found = set(
        AuditEvidence.objects.filter(explained_at=None).values_list("reference", flat=True)
    )
    told: dict[str, Any] = json.loads(child.stdout)
    held = AuditEvidence.objects.exclude(holder="").exclude(holder=None).count()
    return {
        **told,
        "size": size / 1e6,
        "found": len(found & set(strange)),
        "false": len(found - set(strange)),
        "held": held,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--calls", type=int, default=100_000)
    parser.add_argument("--worker", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker)
        return
    runner = DiscoverRunner(verbosity=0, interactive=False)
    made = runner.setup_databases()
    try:
        print(f"{stub.environment()}, {connection.display_name}")
        print(
            f"{'calls':>9}{'gzip MB':>9}{'seconds':>9}{'calls/s':>9}{'peak MiB':>10}"
            f"{'by id':>9}{'by rest':>9}{'found':>7}{'whose':>7}{'false':>7}"
        )
        peaks = []
        for number in (options.calls // 10, options.calls):
            each = measure(number)
            peaks.append(each["peak"])
            print(
                f"{number:>9,}{each['size']:>9.1f}{each['seconds']:>9.1f}"
                f"{number / each['seconds']:>9,.0f}{each['peak']:>10.0f}{each['matched']:>9,}"
                f"{each['attempts']:>9,}{each['found']:>7}{each['held']:>7}{each['false']:>7}",
                flush=True,
            )
        print(f"memory: {peaks[1] / peaks[0]:.2f} times that of a tenth of the calls")
    finally:
        with contextlib.suppress(Exception):
            runner.teardown_databases(made)


if __name__ == "__main__":
    main()
