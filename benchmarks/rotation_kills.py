"""
Rotations killed at random moments, until it has been done so many times.

    [DATABASE_URL=…] python -m benchmarks.rotation_kills [--kills 1000] [--users 10000]

A child re-wraps all passwords to a new key, again and again, and is killed by SIGKILL after a
random time; the next one goes on. Meanwhile passwords are changed. Between two kills the state
of the runs is looked at, and at the end every password is opened: it must be the one that was
set last, and every session must be as good as it was. Exit status 1 if one is not. KMS is the
local provider; without DATABASE_URL the database is an SQLite file.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import django
from django.conf import settings

from benchmarks import stub

if not settings.configured:
    directory = Path(tempfile.mkdtemp())
    project = stub.project()
    if "DATABASE_URL" not in os.environ:
        name = str(directory / "kills.sqlite3")
        project["DATABASES"] = {
            "default": {
                "ENGINE": "django.db.backends.sqlite3",
                "NAME": name,
                "TEST": {"NAME": name},
            }
        }
    project["KMS_HASHER"] = {
        "KEY": "alias/kills",
        "PROVIDER": "local",
        "OPTIONS": {"path": str(directory / "keys.json"), "allow_without_debug": True},
        "AUDIT": "off",
    }
    settings.configure(**project)
    django.setup()

from django.contrib.auth.models import User
from django.db import connections
from django.test.runner import DiscoverRunner

from kms_hasher import encoding, keyring
from kms_hasher.encoding import Argon2Parameters, Header
from kms_hasher.models import RotationRun
from kms_hasher.rotation import engine, plan, rotate

#: Seconds that a child has at the most; the least lets it begin.
LONGEST = 0.8

OPTIONS = engine.Options(concurrency=8, batch_size=100, settle=0)


def seal(salt: bytes, digest: bytes) -> str:
    header = Header("kms_argon2", Argon2Parameters(102400, 2, 8), salt)
    return str(keyring.seal(header, digest, purpose="set"))


def new_password() -> tuple[str, bytes]:
    """Return a sealed hash and the digest in it; what Argon2 would take is no matter here."""
    digest = os.urandom(32)
    return seal(os.urandom(11).hex().encode(), digest), digest


def child() -> None:
    """Rotate for ever: go on with the run that is there, then make the next."""
    while True:
        for _ in rotate.rotate(plan.make(new_key=True), OPTIONS):
            pass


def finish() -> None:
    for wishes in ({"new_key": True}, {}):
        for _ in rotate.rotate(plan.make(**wishes), OPTIONS):
            pass


def killed(seconds: float, digests: dict[int, bytes]) -> int:
    """Let a child rotate for so long, and change passwords meanwhile; return how many."""
    connections.close_all()
    pid = os.fork()
    if not pid:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            child()
        finally:
            os._exit(9)
    until, changed = time.monotonic() + seconds, 0
    while time.monotonic() < until:
        time.sleep(min(0.1, max(until - time.monotonic(), 0)))
        pk = random.choice(list(digests))
        value, digest = new_password()
        User.objects.filter(pk=pk).update(password=value)
        digests[pk] = digest
        changed += 1
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return changed


def check(digests: dict[int, bytes], sessions: dict[int, str], changed: set[int]) -> list[str]:
    problems = []
    for user in User.objects.order_by("pk").iterator():
        stored = encoding.parse(user.password)
        if keyring.open(stored, purpose="login") != digests[user.pk]:
            problems.append(f"the password of {user.pk} is not the one that was set last")
        if user.pk not in changed and user.get_session_auth_hash() != sessions[user.pk]:
            problems.append(f"the sessions of {user.pk} ended")
    if User.objects.count() != len(digests):
        problems.append("a row is missing")
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.rotation_kills",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kills", type=int, default=1000, help="(default: %(default)s)")
    parser.add_argument("--users", type=int, default=10_000, help="(default: %(default)s)")
    arguments = parser.parse_args()
    print(stub.environment())
    runner = DiscoverRunner(verbosity=0, interactive=False)
    databases = runner.setup_databases()
    provider = keyring.provider()
    provider.create_alias("alias/kills", provider.create_key().key_arn)
    digests: dict[int, bytes] = {}
    made: list[Any] = []
    for number in range(arguments.users):
        value, digest = new_password()
        made.append((User(username=f"user{number}", password=value), digest))
    User.objects.bulk_create((user for user, _ in made), batch_size=500)
    digests = {user.pk: digest for user, digest in made}
    sessions = {user.pk: user.get_session_auth_hash() for user in User.objects.all()}
    first = dict(digests)
    changed, states, started = 0, Counter[str](), time.monotonic()
    try:
        for number in range(arguments.kills):
            changed += killed(random.uniform(0.01, LONGEST), digests)
            last = RotationRun.objects.order_by("-pk").first()
            states[last.state if last else "not begun"] += 1
            if (number + 1) % 100 == 0:
                print(
                    f"{number + 1:,} kills, {RotationRun.objects.count():,} runs, "
                    f"{time.monotonic() - started:,.0f} s",
                    flush=True,
                )
        finish()
        fresh = {pk for pk in digests if digests[pk] != first[pk]}
        problems = check(digests, sessions, fresh)
        unended = RotationRun.objects.exclude(state="finished").count()
        present = encoding.key_ref(provider.describe_key("alias/kills").key_id)
        elsewhere = User.objects.exclude(password__contains=present).count()
        rewritten = sum(RotationRun.objects.values_list("rewritten", flat=True))
        print(
            f"{arguments.kills:,} kills of {RotationRun.objects.count():,} runs over "
            f"{arguments.users:,} rows on {connections['default'].vendor}: at least "
            f"{rewritten:,} rewritten, {changed:,} passwords changed meanwhile; at the end "
            f"{len(problems)} lost, {elsewhere} not under the present key, {unended} runs not "
            f"ended. When killed, the last run was: {dict(states)}."
        )
    finally:
        runner.teardown_databases(databases)
    sys.exit("\n".join(problems[:20]) if problems or elsewhere or unended else 0)


if __name__ == "__main__":
    main()
