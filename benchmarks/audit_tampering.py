"""
Random tampering with a sealed audit, and whether it is found.

    [DATABASE_URL=postgres://…] python -m benchmarks.audit_tampering [--mutations 10000]

A log of events with gaps in their ids is sealed in many segments, as `seal_kms_audit` does it,
with keys of the local provider. Then, again and again, something is done to it that whoever
owns the database can do, `verify_kms_audit`'s function looks at all of it, and the change is
rolled back. Every hundred mutations the untouched log is looked at. What is expected of the
last seal is known from elsewhere, as it should be: without it nothing can tell that the newest
seals were deleted together with their events.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections import Counter
from pathlib import Path

import django
from django.conf import settings

from benchmarks import stub

if not settings.configured:
    project = stub.project()
    # Not the name that the other benchmarks use: one of them may be running.
    if "DATABASE_URL" in os.environ:
        project["DATABASES"]["default"]["TEST"] = {"NAME": "kms_tampering"}
    project["KMS_HASHER"] = {
        "PROVIDER": "local",
        "KEY": "alias/passwords",
        "AUDIT_SEAL_KEY": "alias/seals",
        "AUDIT": "off",
        "OPTIONS": {
            "path": Path(tempfile.mkdtemp(prefix="kms-tampering-")) / "keys.json",
            "allow_without_debug": True,
        },
    }
    settings.configure(**project)
    django.setup()

from django.db import connection
from django.test.runner import DiscoverRunner

from kms_hasher import keyring
from kms_hasher.audit import seals, segments, verification
from tests.tampering import MUTATIONS, fill, kept_elsewhere, undone, verify


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.audit_tampering",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--mutations", type=int, default=10_000)
    parser.add_argument("--events", type=int, default=600)
    parser.add_argument("--segment", type=int, default=75, help="events of a segment")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    provider = keyring.provider()
    provider.create_alias("alias/passwords", provider.create_key().key_arn)
    hmac_key = provider.create_key(spec="HMAC_256", usage="GENERATE_VERIFY_MAC")
    provider.create_alias("alias/seals", hmac_key.key_arn)
    print(f"{stub.environment()}; {connection.vendor}")
    runner = DiscoverRunner(verbosity=0, interactive=False)
    databases = runner.setup_databases()
    try:
        seals.SEGMENT = options.segment
        segments.PAGE, verification.PAGE = 20, 3  # so that there are many ends of pages
        random.seed(options.seed)
        fill(options.events, gaps=True)
        made = list(seals.seal(settle=0))
        print(f"{options.events:,} events in {len(made)} segments")
        tamper(options.mutations, random.Random(options.seed))
    finally:
        runner.teardown_databases(databases)


def tamper(number: int, rng: random.Random) -> None:
    expected, started = kept_elsewhere(), time.monotonic()
    done: Counter[str] = Counter()
    found: Counter[str] = Counter()
    missed, alarms, looks = [], 0, 0
    for at in range(number):
        if at % 100 == 0:
            looks, alarms = looks + 1, alarms + bool(verify(expected=expected).numbers)
        mutation = MUTATIONS[at % len(MUTATIONS)]
        with undone():
            told = mutation(rng)
            report = verify(expected=expected)
        assert report.unasked is None, report.unasked
        done[mutation.__name__] += 1
        found[mutation.__name__] += bool(report.numbers)
        if not report.numbers:
            missed.append(told)
    for name, times in done.items():
        print(f"{name:36}{found[name]:8,} of {times:,} found")
    print(f"{'all':36}{found.total():8,} of {number:,} found")
    print(f"alarms in {looks} looks at the untouched log: {alarms}")
    print(f"{(time.monotonic() - started) / max(number, 1) * 1000:.1f} ms a mutation")
    if missed:
        print(json.dumps(missed[:20], indent=2))
        raise SystemExit(1)


if __name__ == "__main__":
    main()
