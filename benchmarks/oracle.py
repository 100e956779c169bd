"""
Whether what a login costs tells if there is such a user.

    [DATABASE_URL=postgres://…] python -m benchmarks.oracle [--n 2000] [--modes …] [--ms 4]

In each mode users with a wrong password ("known", "inactive"), a user whose password is
unusable, and names that nobody has sign in through a backend, `n` times each, in random
order. KMS is of constant latency (benchmarks.constant). "calls" are those to KMS for one
attempt, and must be the same for all. "diff" is the mean time in µs by which a class differs
from "known", "t" Welch's: above 4.5 in amount the two can be told apart. "halves" is the t of
known against known, for scale. Times beyond the 99th percentile of all, where the machine
did something else, are set to it. With Django's own ModelBackend, at the end, it should be
easy.

Argon2 is cheap, so that it hides nothing and its own scatter is small; AUDIT is "off".
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import time
from collections import Counter
from statistics import fmean, quantiles, variance
from typing import Any

import django
from django.conf import settings

from benchmarks import constant, stub

if not settings.configured:
    project = stub.project()
    project["PASSWORD_HASHERS"] = ["benchmarks.oracle.Cheap"]
    project["KMS_HASHER"] = constant.settings("direct", 0)
    if "DATABASE_URL" in os.environ:
        project["DATABASES"]["default"]["TEST"] = {"NAME": "kms_oracle"}
    settings.configure(**project)
    django.setup()

from django.contrib.auth.backends import ModelBackend
from django.contrib.auth.models import User
from django.test.runner import DiscoverRunner
from django.test.utils import override_settings

from kms_hasher import backends, conf
from kms_hasher.hashers import KMSArgon2PasswordHasher
from kms_hasher.signals import Event, kms_event

#: A t beyond this in amount is what tests of constant time take for proof.
LIMIT = 4.5

PASSWORD, WRONG = "correct horse battery staple", "incorrect horse battery staple"
CLASSES = ("known", "unknown", "inactive", "unusable")

#: Users of each class, so that no row is one that was just read.
USERS = 50


class Cheap(KMSArgon2PasswordHasher):
    time_cost, memory_cost, parallelism = 1, 1024, 1


def welch(first: list[float], second: list[float]) -> float:
    """Return Welch's t of two samples."""
    error = (variance(first) / len(first) + variance(second) / len(second)) ** 0.5
    return (fmean(second) - fmean(first)) / error


def fill() -> None:
    """Make the users anew, sealed in the mode of the settings."""
    User.objects.all().delete()
    for name in ("known", "inactive", "unusable"):
        for number in range(USERS):
            password = None if name == "unusable" else PASSWORD
            active = name != "inactive"
            User.objects.create_user(f"{name}{number}", password=password, is_active=active)


def attempts(backend: Any, n: int) -> tuple[dict[str, list[float]], dict[str, Counter[str]]]:
    """Return the seconds of each attempt, and the calls to KMS of all, by class."""
    order = [name for name in CLASSES for _ in range(n)]
    random.shuffle(order)
    times: dict[str, list[float]] = {name: [] for name in CLASSES}
    calls: dict[str, Counter[str]] = {name: Counter() for name in CLASSES}
    operations: list[str] = []

    def listen(sender: Any, event: Event, **kwargs: Any) -> None:
        operations.append(event.operation)

    kms_event.connect(listen)
    try:
        for name in order:
            username = f"{name}{random.randrange(USERS)}"
            gc.collect(0)
            operations.clear()
            started = time.perf_counter()
            backend.authenticate(None, username=username, password=WRONG)
            times[name].append(time.perf_counter() - started)
            calls[name].update(operations)
    finally:
        kms_event.disconnect(listen)
    return times, calls


def trimmed(times: dict[str, list[float]]) -> dict[str, list[float]]:
    """Return the times with those beyond the 99th percentile of all set to it."""
    most = quantiles([each for some in times.values() for each in some], n=100)[-1]
    return {name: [min(each, most) for each in some] for name, some in times.items()}


def show(mode: str, backend: Any, n: int) -> float:
    """Print the lines of a mode; return the greatest amount of t, infinite if calls differ."""
    times, calls = attempts(backend, n)
    times = trimmed(times)
    known, worst = times["known"], 0.0
    halves = welch(known[::2], known[1::2])
    for name in CLASSES:
        t = welch(known, times[name]) if name != "known" else 0.0
        diff = (fmean(times[name]) - fmean(known)) * 1e6
        # With data keys in memory calls are made by chance, for each class the same.
        same = calls[name] == calls["known"] or bool(conf.get().data_key_cache_seconds)
        text = " + ".join(f"{number / n:g} {each}" for each, number in calls[name].items())
        told = f"halves {halves:+.1f}"
        if name != "known":
            told = f"{'' if same else 'other calls, '}{'separable' * (abs(t) >= LIMIT) or '-'}"
            worst = max(worst, abs(t) if same else float("inf"))
        print(
            f"{mode:14}{type(backend).__name__:17}{name:10}{fmean(times[name]) * 1000:8.3f}"
            f"{diff:+9.1f}{t:+8.1f}  {text or 'none':28}{told}",
            flush=True,
        )
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.oracle",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--n", type=int, default=2000, help="attempts a class (%(default)s)")
    parser.add_argument(
        "--modes", default=",".join(constant.MODES), help="some of: %(default)s"
    )
    parser.add_argument("--ms", type=float, default=4, help="latency of KMS (%(default)s)")
    text = "DATA_KEY_CACHE_SECONDS (%(default)s); then with a data key for every 4 users"
    parser.add_argument("--cache", type=float, default=0, help=text)
    parser.add_argument("--skip-stock", action="store_true", help="without ModelBackend")
    options = parser.parse_args()
    print(stub.environment())
    runner = DiscoverRunner(verbosity=0, interactive=False)
    databases = runner.setup_databases()
    worst = {}
    chosen = [backends.KMSModelBackend(), *([] if options.skip_stock else [ModelBackend()])]
    try:
        with constant.keys():
            print(
                f"{'mode':14}{'backend':17}{'class':10}{'mean ms':>8}{'diff µs':>9}{'t':>8}  "
                "calls for one attempt"
            )
            for backend in chosen:
                for mode in options.modes.split(","):
                    more = {"DATA_KEY_CACHE_SECONDS": options.cache}
                    if options.cache:  # a data key for every few, so that few are in memory
                        more["DATA_KEY_USERS"] = 4
                    values = constant.settings(mode, options.ms, **more)
                    with override_settings(KMS_HASHER=values):
                        fill()
                        backends.prewarm()
                        gc.freeze()
                        attempts(backend, 20)
                        worst[mode, type(backend).__name__] = show(mode, backend, options.n)
    finally:
        runner.teardown_databases(databases)
    for (mode, name), t in worst.items():
        print(f"{mode:14}{name:17}greatest |t| {t:.1f}")
    print(stub.environment())


if __name__ == "__main__":
    main()
