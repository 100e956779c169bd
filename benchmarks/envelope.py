"""
What the mode `envelope` saves: how long a rotation of so many users takes, and what a login.

    DATABASE_URL=postgres://… python -m benchmarks.envelope [--users 1000000] [--delay 10]

A rotation is all that `rotate_kms_key --new-key` does: the rows counted, a key made, the
alias moved, everything re-wrapped and swept until nothing is left, the rows counted again.
The users are rows made by SQL, with strings as long as real ones; their data keys, a thousand,
are real, and some are opened again afterwards. Beside it the same is done in `direct`, on
fewer users, and the rate of its first sweep taken for as many. KMS is of constant latency
(benchmarks.constant); it and the database take of the same processors.

Logins are checks by KMSModelBackend in several threads, of users under many data keys, with
Argon2 as cheap as OWASP's minimum; the three ways take turns.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from statistics import median
from typing import Any

import django
from django.conf import settings

from benchmarks import constant, stub

if not settings.configured:
    project = stub.project()
    project["PASSWORD_HASHERS"] = ["benchmarks.envelope.Cheap"]
    project["KMS_HASHER"] = constant.settings("direct", 0)
    project["DATABASES"]["default"]["TEST"] = {"NAME": "kms_envelope"}
    settings.configure(**project)
    django.setup()

from django.contrib.auth.models import User
from django.db import connection, connections
from django.test.runner import DiscoverRunner
from django.test.utils import override_settings

from kms_hasher import backends, data_keys, encoding, keyring
from kms_hasher.encoding import DATA_KEY, Header
from kms_hasher.hashers import KMSArgon2PasswordHasher
from kms_hasher.inner import NoParameters
from kms_hasher.models import DataKey
from kms_hasher.rotation import plan, rotate
from kms_hasher.rotation.engine import Options
from kms_hasher.signals import Event, kms_event

PASSWORD = "correct horse battery staple"
DATA_KEYS = 1000

#: One user for each number: what `create_user` stores, with a hash as long as a real one.
INSERT = """
    INSERT INTO auth_user (username, password, is_superuser, is_staff, is_active, first_name,
                           last_name, email, date_joined)
    SELECT 'user' || n,
           (%s::text[])[n %% {heads} + 1] || '$m=19456,t=2,p=1$'
               || left(md5('salt' || n), 22) || '$' || left({sealed}, %s),
           false, false, true, '', '', 'user' || n || '@example.org', now()
    FROM generate_series(1, %s) AS n
"""
BLOB = " || ".join(f"md5('{part}' || n)" for part in range(12))

#: Characters of base64url: of 48 bytes of AES-SIV, of 184 bytes of KMS's.
SEALED = {"envelope": 64, "direct": 246}


class Cheap(KMSArgon2PasswordHasher):
    time_cost, memory_cost, parallelism = 2, 19456, 1


def insert(mode: str, heads: list[str], users: int) -> None:
    """Make the users anew, each with the beginning of a stored string that is its turn's."""
    with connection.cursor() as cursor:
        cursor.execute("TRUNCATE auth_user CASCADE")
        query = INSERT.format(heads=len(heads), sealed=BLOB)
        cursor.execute(query, [heads, SEALED[mode], users])
        cursor.execute("VACUUM (ANALYZE) auth_user")


def fill_envelope(users: int) -> None:
    access = keyring.access(Header(DATA_KEY, NoParameters(), os.urandom(16)), "set")
    DataKey.objects.all().delete()
    with constant.at_once():
        numbers = data_keys.make(access, DATA_KEYS)
    refs = [encoding.data_key_ref(number) for number in numbers]
    insert("envelope", [f"kms_argon2$e1${ref}" for ref in refs], users)


def fill_direct(users: int) -> None:
    """Make users whose blobs are real, a thousand, so that ReEncrypt takes them."""
    DataKey.objects.all().delete()
    hasher = Cheap()
    with connection.cursor() as cursor:
        cursor.execute("TRUNCATE auth_user CASCADE")
    made: list[User] = []
    with constant.at_once():
        for number in range(users):
            header = Header(hasher.algorithm, hasher._parameters(), f"{number:022}".encode())
            stored = str(keyring.seal(header, os.urandom(32)))
            made.append(User(username=f"user{number}", password=stored))
    User.objects.bulk_create(made, batch_size=5000)


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Count the calls to KMS."""
    calls: Counter[str] = Counter()

    def listen(sender: Any, event: Event, **kwargs: Any) -> None:
        calls[event.operation] += 1

    kms_event.connect(listen)
    try:
        yield calls
    finally:
        kms_event.disconnect(listen)


def rotation(name: str, settle: float) -> tuple[float, float, int]:
    """
    Do what the command does; print where the time went; return the seconds of all and of the
    first sweep, and the calls.
    """
    started = time.perf_counter()
    marks: list[tuple[str, float]] = []

    def mark(text: str) -> None:
        marks.append((text, time.perf_counter() - started - sum(each for _, each in marks)))

    with counted() as calls:
        planned = plan.make(new_key=True)
        mark("counted and planned")
        sweep, progress = 0, None
        for progress in rotate.rotate(planned, Options(settle=settle)):
            if progress.sweep != sweep:
                mark(f"sweep {sweep}" if sweep else "key and alias, shards laid out")
                sweep = progress.sweep
        mark("last sweep, and counted again")
    wall = time.perf_counter() - started
    assert progress is not None and not progress.failed
    print(f"{name}: {wall:.1f} s, {progress.rewritten:,} rows re-wrapped, {sweep} sweeps")
    for text, seconds in marks:
        print(f"    {seconds:7.2f} s  {text}")
    print(f"    {sum(calls.values()):,} calls: {dict(calls)}", flush=True)
    return wall, dict(marks)["sweep 1"], sum(calls.values())


def rotations(users: int, sample: int, delay: float, settle: float) -> None:
    with override_settings(KMS_HASHER=constant.settings("envelope", delay)):
        started = time.perf_counter()
        fill_envelope(users)
        print(f"{users:,} users made in {time.perf_counter() - started:.0f} s")
        ours, _, ours_calls = rotation(f"envelope, {users:,} users", settle)
        for row in DataKey.objects.order_by("?")[:20]:
            assert len(keyring.open(encoding.parse(row.sealed))) == 64
    with override_settings(KMS_HASHER=constant.settings("direct", delay)):
        fill_direct(sample)
        _, first, direct_calls = rotation(f"direct, {sample:,} users", settle)
    more = users / sample
    direct = first * more
    print(
        f"direct for {users:,} users, at the rate of its first sweep: {direct:,.0f} s, "
        f"{direct / ours:,.0f} times as long as envelope from end to end, with "
        f"{direct_calls * more / ours_calls:,.0f} times the calls",
        flush=True,
    )


# --- logins -------------------------------------------------------------------------


#: Settings that logins are compared under, by what is printed. Five users to a data key.
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "direct": ("direct", {}),
    "envelope, cache 0": ("envelope", {"DATA_KEY_USERS": 5}),
    "envelope, cache 60": ("envelope", {"DATA_KEY_USERS": 5, "DATA_KEY_CACHE_SECONDS": 60}),
}


def logins(delay: float, threads: int, seconds: float, rounds: int) -> None:
    """Let the ways take turns, so that what the machine does meanwhile happens to all."""
    print(f"\nLogins, KMS at {delay:g} ms, {threads} threads, {rounds} rounds of {seconds:g} s")
    names: dict[str, list[str]] = {}
    values = {}
    User.objects.all().delete()
    DataKey.objects.all().delete()
    for number, (way, (mode, more)) in enumerate(WAYS.items()):
        values[way] = constant.settings(mode, delay, **more)
        names[way] = [f"way{number}user{each}" for each in range(50)]
        with override_settings(KMS_HASHER=values[way]), constant.at_once():
            for each in names[way]:
                User.objects.create_user(each, password=PASSWORD)
    found: dict[str, list[tuple[float, float, int]]] = {way: [] for way in WAYS}
    calls: Counter[str] = Counter()
    for _ in range(rounds):
        for way in random.sample(list(WAYS), len(WAYS)):
            data_keys.wipe()
            with override_settings(KMS_HASHER=values[way]):
                logins_of(names[way], threads, 1)
                with counted() as made:
                    found[way].append(logins_of(names[way], threads, seconds))
                calls[way] += sum(made.values())
    head = ("a second", "x direct", "CPU ms each", "x direct", "calls each")
    print(f"{'':20}" + "".join(f"{each:>13}" for each in head))
    for way, rates in found.items():
        line = f"{way:20}"
        for what, factor in ((0, 1), (1, 1000)):
            ratio = median(
                a[what] / b[what] for a, b in zip(rates, found["direct"], strict=True)
            )
            line += f"{median(each[what] for each in rates) * factor:13.1f}{ratio:13.2f}"
        print(f"{line}{calls[way] / sum(each[2] for each in rates):13.2f}", flush=True)


def logins_of(names: list[str], threads: int, seconds: float) -> tuple[float, float, int]:
    """Return logins per second, seconds of CPU for each, and how many there were."""
    backend = backends.KMSModelBackend()

    def work(number: int) -> int:
        done = 0
        while time.perf_counter() < until:
            name = names[(number + done * threads) % len(names)]
            assert backend.authenticate(None, username=name, password=PASSWORD)
            done += 1
        connections.close_all()
        return done

    started, cpu = time.perf_counter(), time.process_time()
    until = started + seconds
    with ThreadPoolExecutor(threads) as pool:
        done = sum(pool.map(work, range(threads)))
    wall = time.perf_counter() - started
    return done / wall, (time.process_time() - cpu) / done, done


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.envelope",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--users", type=int, default=1_000_000, help="(default: %(default)s)")
    parser.add_argument("--sample", type=int, default=20_000, help="in direct (%(default)s)")
    parser.add_argument("--delay", type=float, default=10, help="of KMS in ms (%(default)s)")
    parser.add_argument("--settle", type=float, default=5, help="seconds (%(default)s)")
    parser.add_argument("--threads", type=int, default=8, help="of logins (%(default)s)")
    parser.add_argument("--seconds", type=float, default=4, help="a round of logins (4)")
    parser.add_argument("--rounds", type=int, default=10, help="of logins (%(default)s)")
    parser.add_argument("--only", default="rotations,logins", help="some of: %(default)s")
    options = parser.parse_args()
    if not os.environ.get("DATABASE_URL", "").startswith("postgres"):
        sys.exit("DATABASE_URL is to name a database on PostgreSQL.")
    print(stub.environment())
    runner = DiscoverRunner(verbosity=0, interactive=False)
    databases = runner.setup_databases()
    try:
        with constant.keys():
            if "rotations" in options.only:
                rotations(options.users, options.sample, options.delay, options.settle)
            if "logins" in options.only:
                logins(options.delay, options.threads, options.seconds, options.rounds)
                # Where KMS takes longer than Argon2, and nobody else is there.
                logins(5 * options.delay, 1, options.seconds, options.rounds)
    finally:
        data_keys.close()
        runner.teardown_databases(databases)
    print(stub.environment())


if __name__ == "__main__":
    main()
