"""
How long the event loop stands still while users sign in.

    python -m benchmarks.event_loop [--quick] [--logins 4] [--delay 25]

While `aauthenticate` runs for several users at once, a task asks to be woken every
millisecond; the stall is the most by which it was late in a round. "alone" is what the same
task sees while the loop has nothing to do, and "threads only" while as many threads compute
Argon2 and the loop has no part in it: the machine's own share. KMS is the stub of
benchmarks.stub. AUDIT is "off".
"""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from statistics import median

import django
from django.conf import settings

from benchmarks import stub

os.environ.pop("DATABASE_URL", None)
settings.configure(**stub.project())
django.setup()

from asgiref.sync import sync_to_async
from django.contrib.auth import aauthenticate
from django.contrib.auth.hashers import check_password, make_password
from django.contrib.auth.models import User
from django.test.runner import DiscoverRunner
from django.test.utils import override_settings

PASSWORD = "correct horse battery staple"
BACKENDS = {
    "stock": ("django.contrib.auth.backends.ModelBackend", stub.STOCK),
    "ours, stock backend": ("django.contrib.auth.backends.ModelBackend", stub.OURS),
    "ours": ("kms_hasher.backends.KMSModelBackend", stub.OURS),
}


async def stall_during(work: Awaitable[object]) -> tuple[float, float]:
    """Return by how many ms the ticks were late at most while `work` ran, and its ms."""
    worst, running = 0.0, True

    async def tick() -> None:
        nonlocal worst
        while running:
            asked = time.perf_counter()
            await asyncio.sleep(0.001)
            worst = max(worst, time.perf_counter() - asked - 0.001)

    ticking = asyncio.create_task(tick())
    await asyncio.sleep(0.01)
    worst, started = 0.0, time.perf_counter()
    await work
    taken = time.perf_counter() - started
    running = False
    await ticking
    return worst * 1000, taken * 1000


async def rounds(work: Callable[[], Awaitable[object]], n: int) -> None:
    found = [await stall_during(work()) for _ in range(n + 2)][2:]
    stalls, taken = zip(*found, strict=True)
    print(f"{median(stalls):12.1f}{max(stalls):8.1f}{median(taken):12.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.event_loop",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="a few rounds: to see it work")
    parser.add_argument("--logins", type=int, default=4, help="at once (default: %(default)s)")
    parser.add_argument("--delay", type=int, default=25, help="of KMS in ms (%(default)s)")
    options = parser.parse_args()
    n, logins = 4 if options.quick else 40, options.logins
    names = [f"user{number}" for number in range(logins)]

    async def sign_in() -> None:
        users = await asyncio.gather(
            *(aauthenticate(None, username=name, password=PASSWORD) for name in names)
        )
        assert all(users)

    stored = make_password(PASSWORD, hasher="argon2")

    async def threads_only() -> None:
        check = sync_to_async(check_password, thread_sensitive=False)
        await asyncio.gather(*(check(PASSWORD, stored) for _ in names))

    print(stub.environment())
    print(f"\n{logins} logins at once, KMS at {options.delay} ms; {n} rounds; in ms")
    print(f"{'':22}{'stall p50':>12}{'max':>8}{'all logins':>12}")
    with stub.running(options.delay):
        DiscoverRunner(verbosity=0, interactive=False).setup_databases()
        print(f"{'alone':22}", end="")
        asyncio.run(rounds(lambda: asyncio.sleep(0.3), n))
        print(f"{'threads only':22}", end="")
        asyncio.run(rounds(threads_only, n))
        for text, (backend, hasher) in BACKENDS.items():
            hashers = list(dict.fromkeys([hasher, *settings.PASSWORD_HASHERS]))
            with override_settings(AUTHENTICATION_BACKENDS=[backend], PASSWORD_HASHERS=hashers):
                User.objects.all().delete()
                User.objects.bulk_create(
                    User(username=name, password=make_password(PASSWORD)) for name in names
                )
                print(f"{text:22}", end="")
                asyncio.run(rounds(sign_in, n))
    print(stub.environment())


if __name__ == "__main__":
    main()
