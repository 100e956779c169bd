"""
What sealing costs a password check, beside Django's own Argon2 hasher.

    python -m benchmarks.login [--quick] [--pairs 60] [--only latency,threads,allocator]

KMS is a stub of constant latency in a process of its own, reached by the aws provider.
Stock and ours take turns, check by check, in one process, and each takes the first turn in
half of the pairs: what the machine does meanwhile happens to both. "p50 x" is the ratio of
the medians, "diff" the median of the pairwise differences, "CPU" the same of the CPU time of
all threads. AUDIT is "off", but for the line that says otherwise, which needs DATABASE_URL.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from statistics import median, quantiles
from typing import Any

import django
from django.conf import settings

from benchmarks import stub

if not settings.configured:
    settings.configure(**stub.project(app="--worker=stock" not in sys.argv))
    django.setup()

from django.contrib.auth.hashers import Argon2PasswordHasher
from django.test import Client
from django.test.runner import DiscoverRunner
from django.test.utils import override_settings

from kms_hasher import keyring
from kms_hasher.hashers import KMSArgon2PasswordHasher

PASSWORD, SALT = "correct horse battery staple", "0123456789abcdefghijkl"
TUNABLES = "glibc.malloc.hugetlb=1"

#: Argon2's time, memory and parallelism: Django's default, and OWASP's minimum.
COSTS = {"default": (2, 102400, 8), "cheap": (2, 19456, 1)}

Check = Callable[[], object]


class Sequential(KMSArgon2PasswordHasher):
    """First KMS, then Argon2: what a login costs that does not overlap the two."""

    def verify(self, password: str | bytes, encoded: str) -> bool:
        stored = self._parse(encoded)
        return keyring.open(stored) == self._digest(password, stored.header)


def check(hasher: type[Any], costs: tuple[int, int, int]) -> Check:
    """Return the check of the right password by a hasher of these costs."""
    names = ("time_cost", "memory_cost", "parallelism")
    own = type(hasher.__name__, (hasher,), dict(zip(names, costs, strict=True)))()
    encoded = own.encode(PASSWORD, SALT)

    def verify() -> None:
        assert own.verify(PASSWORD, encoded)

    return verify


def pairs(first: Check, second: Check, n: int) -> list[tuple[tuple[float, float], ...]]:
    """Return wall and CPU milliseconds of both, `n` times, taking turns in going first."""

    def timed(call: Check) -> tuple[float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        return (time.perf_counter() - wall) * 1000, (time.process_time() - cpu) * 1000

    first(), second()
    found = []
    for turn in range(n):
        if turn % 2:
            of_second, of_first = timed(second), timed(first)
        else:
            of_first, of_second = timed(first), timed(second)
        found.append((of_first, of_second))
    return found


def latency(kms: stub.Stub, n: int, delays: Iterable[int], audit: str = "off") -> None:
    stock_p50, ours_p50 = "stock p50", "ours p50"
    print(
        f"\nOne check, in ms; AUDIT {audit!r}; {n} pairs a line\n"
        f"{'Argon2':8}{'KMS':>5}{'as seen':>9}  {'how':12}{stock_p50:>10}{'p95':>8}"
        f"{ours_p50:>10}{'p95':>8}{'p50 x':>8}{'diff':>8}{'over max':>10}{'CPU':>7}"
    )
    for name, costs in COSTS.items():
        stock = check(Argon2PasswordHasher, costs)
        for delay in delays:
            kms.delay(delay)
            seen = round_trip()
            for how, hasher in (
                ("overlapped", KMSArgon2PasswordHasher),
                ("sequential", Sequential),
            ):
                found = pairs(stock, check(hasher, costs), n)
                theirs, ours = ([pair[side][0] for pair in found] for side in (0, 1))
                diff = median(b[0] - a[0] for a, b in found)
                cpu = median(b[1] - a[1] for a, b in found)
                over = median(ours) - max(median(theirs), seen)
                print(
                    f"{name:8}{delay:5}{seen:9.1f}  {how:12}{median(theirs):10.1f}"
                    f"{p95(theirs):8.1f}{median(ours):10.1f}{p95(ours):8.1f}"
                    f"{median(ours) / median(theirs):8.3f}{diff:+8.1f}{over:+10.1f}{cpu:+7.1f}",
                    flush=True,
                )


def p95(values: list[float]) -> float:
    return quantiles(values, n=20)[-1]


def round_trip() -> float:
    """Return the median time in ms that one Decrypt takes when nothing else is done."""
    hasher = KMSArgon2PasswordHasher()
    hasher.time_cost, hasher.memory_cost, hasher.parallelism = 1, 8, 1
    stored = hasher._parse(hasher.encode(PASSWORD, SALT))
    times = []
    for _ in range(25):
        started = time.perf_counter()
        keyring.open(stored)
        times.append((time.perf_counter() - started) * 1000)
    return median(times[5:])


def batch(pool: ThreadPoolExecutor, call: Check, n: int) -> None:
    list(pool.map(lambda _: call(), range(n)))


def threads(kms: stub.Stub, rounds: int, delay: int = 25) -> None:
    kms.delay(delay)
    print(f"\nChecks per second at {delay} ms; AUDIT 'off'; {rounds} rounds of stock and ours")
    print(f"{'Argon2':8}{'threads':>8}{'stock':>9}{'ours':>9}{'ours / stock':>14}{'CPU':>7}")
    for name, costs in COSTS.items():
        stock = check(Argon2PasswordHasher, costs)
        ours = check(KMSArgon2PasswordHasher, costs)
        n = 16 if name == "default" else 80
        for count in (1, 8):
            with ThreadPoolExecutor(count) as pool:
                both = [partial(batch, pool, call, n) for call in (stock, ours)]
                found = pairs(*both, rounds)
            rates = [median(n * 1000 / pair[side][0] for pair in found) for side in (0, 1)]
            ratio = median(a[0] / b[0] for a, b in found)
            cpu = median(b[1] - a[1] for a, b in found) / n
            print(
                f"{name:8}{count:8}{rates[0]:9.1f}{rates[1]:9.1f}{ratio:14.3f}{cpu:+7.1f}",
                flush=True,
            )


def allocator(kms: stub.Stub, n: int, delay: int = 25) -> None:
    kms.delay(delay)
    print(
        f"\nWhole login (user, check, session; SQLite) at {delay} ms, in ms; {n} pairs a line"
    )
    print(f"{'':32}{'untuned stock':>14}{'this':>8}{'p50 x':>8}{'diff':>8}")
    tuned = {"GLIBC_TUNABLES": TUNABLES}
    for text, side, env in (
        ("ours", "ours", {}),
        (f"ours, {TUNABLES}", "ours", tuned),
        (f"stock, {TUNABLES}", "stock", tuned),
    ):
        with worker("stock", {}) as plain, worker(side, env) as other:
            found = pairs(partial(turn, plain), partial(turn, other), n)
            plain.stdin.close(), other.stdin.close()
        theirs, ours = (median(pair[side][0] for pair in found) for side in (0, 1))
        diff = median(b[0] - a[0] for a, b in found)
        print(f"{text:32}{theirs:14.1f}{ours:8.1f}{ours / theirs:8.3f}{diff:+8.1f}", flush=True)


def worker(side: str, env: dict[str, str]) -> Any:
    command = [sys.executable, "-m", "benchmarks.login", f"--worker={side}"]
    pipe = subprocess.PIPE
    child = {name: value for name, value in os.environ.items() if name != "DATABASE_URL"}
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=child | env)


def turn(process: Any) -> None:
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "True\n"


def work() -> None:
    """Sign in once for each line of stdin."""
    from django.contrib.auth.models import User

    DiscoverRunner(verbosity=0, interactive=False).setup_databases()
    User.objects.create_user("ann", password=PASSWORD)
    for _ in sys.stdin:
        print(Client().login(username="ann", password=PASSWORD), flush=True)


def durable(kms: stub.Stub, n: int) -> None:
    from kms_hasher.audit import recorder

    runner = DiscoverRunner(verbosity=0, interactive=False)
    databases = runner.setup_databases()
    try:
        with override_settings(KMS_HASHER={**settings.KMS_HASHER, "AUDIT": "durable"}):
            latency(kms, n, (10, 25), audit="durable")
    finally:
        recorder.close()
        runner.teardown_databases(databases)


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.login",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="a few pairs: to see it work")
    parts = ("latency", "durable", "threads", "allocator")
    parser.add_argument("--only", default=",".join(parts), help="some of: %(default)s")
    parser.add_argument("--pairs", type=int, default=60, help="a line (default: %(default)s)")
    parser.add_argument("--delays", default="0,5,10,25,50", help="of KMS in ms (%(default)s)")
    parser.add_argument("--worker", choices=("stock", "ours"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work()
    wanted = options.only.split(",")
    n = 6 if options.quick else options.pairs
    print(stub.environment())
    with stub.running() as kms:
        if "latency" in wanted:
            latency(kms, n, [int(delay) for delay in options.delays.split(",")])
        if "durable" in wanted and "DATABASE_URL" in os.environ:
            durable(kms, n)
        if "threads" in wanted:
            threads(kms, max(2, n // 6))
        if "allocator" in wanted:
            allocator(kms, n)
    print(stub.environment())
    return None


if __name__ == "__main__":
    main()
