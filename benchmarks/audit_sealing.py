"""
What sealing and verifying a long audit take: events a second, CPU time, memory.

    [DATABASE_URL=…] python -m benchmarks.audit_sealing [--events 200000]

KMS is the local provider; without DATABASE_URL the database is an SQLite file. There is
nothing of stock Django's to compare with. "peak" is the process's largest resident size so far.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import django
from django.conf import settings

from benchmarks import stub

if not settings.configured:
    directory = Path(tempfile.mkdtemp(prefix="kms-sealing-"))
    project = stub.project()
    if "DATABASE_URL" in os.environ:
        # Not the name that the other benchmarks use: one of them may be running.
        project["DATABASES"]["default"]["TEST"] = {"NAME": "kms_sealing"}
    else:
        name = str(directory / "audit.sqlite3")
        project["DATABASES"]["default"] |= {"NAME": name, "TEST": {"NAME": name}}
    project["KMS_HASHER"] = {
        "PROVIDER": "local",
        "KEY": "alias/passwords",
        "AUDIT_SEAL_KEY": "alias/seals",
        "AUDIT": "off",
        "OPTIONS": {"path": directory / "keys.json", "allow_without_debug": True},
    }
    settings.configure(**project)
    django.setup()

from django.db import connection
from django.test.runner import DiscoverRunner

from kms_hasher import keyring
from kms_hasher.audit import seals
from tests.tampering import fill, verify

PAGE = 5_000


def measure(name: str, work: Callable[[], int]) -> None:
    wall, cpu = time.perf_counter(), time.process_time()
    events = work()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{name:8}{events:12,} events{events / wall:12,.0f} a second"
        f"{cpu / events * 1e6:8.1f} us of CPU an event, peak {peak:.0f} MB"
    )


def check() -> int:
    report = verify()
    assert not report.numbers, report.findings
    return report.events


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.audit_sealing",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--events", type=int, default=200_000, help="(default: %(default)s)")
    events = parser.parse_args().events
    provider = keyring.provider()
    provider.create_alias("alias/passwords", provider.create_key().key_arn)
    hmac_key = provider.create_key(spec="HMAC_256", usage="GENERATE_VERIFY_MAC")
    provider.create_alias("alias/seals", hmac_key.key_arn)
    print(f"{stub.environment()}; {connection.vendor}")
    runner = DiscoverRunner(verbosity=0, interactive=False)
    databases = runner.setup_databases()
    try:
        for _ in range(-(-events // PAGE)):
            fill(PAGE)
        measure("seal", lambda: sum(seal.count for seal in seals.seal(settle=0)))
        measure("verify", check)
    finally:
        runner.teardown_databases(databases)


if __name__ == "__main__":
    main()
