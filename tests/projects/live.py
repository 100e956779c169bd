"""
A site on a database of its own, for tests/live_site.py: `python -m tests.projects.live`.

    setup N     make key, alias and N users, each with a password of its own
    rotate ...  `rotate_kms_key ...`, after a line "ready"
    verify      check every password, and write the number of users by key
    shards      write the owners of the shards that are worked on
    busy ...    `rotate_kms_key --new-key ...` while users sign in and change their passwords
    answer      do `verify`, `shards` or `calls` each time a line on standard input asks for it
    worker ...  `db_worker ...`, of django-tasks-db

Where KMS_HASHER_LIVE_BROKER names one, the site has a Celery app: tests/projects/queue.py.
KMS_HASHER_LIVE_SHARD makes shards as small, and all waiting for the dead short.
"""

from __future__ import annotations

import datetime
import json
import os
import random
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable
from typing import Any

import django

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.projects.kill_settings")
django.setup()

from django.conf import settings  # noqa: E402
from django.contrib.auth import get_user  # noqa: E402
from django.contrib.auth.hashers import make_password  # noqa: E402
from django.contrib.auth.models import User  # noqa: E402
from django.contrib.auth.tokens import default_token_generator  # noqa: E402
from django.core.management import call_command  # noqa: E402
from django.db import connections  # noqa: E402
from django.db.models import Sum  # noqa: E402
from django.test import Client, override_settings  # noqa: E402

from kms_hasher import encoding, keyring  # noqa: E402
from kms_hasher.models import AuditEvent, RotationRun, RotationShard  # noqa: E402
from kms_hasher.rotation import distribute, workers  # noqa: E402
from kms_hasher.rotation import shards as rotation_shards  # noqa: E402

#: How many sessions and reset links are kept over a rotation.
KEPT = 30

if rows := os.environ.get("KMS_HASHER_LIVE_SHARD"):
    rotation_shards.SMALLEST = rotation_shards.LARGEST = int(rows)
    rotation_shards.LEASE = datetime.timedelta(seconds=2)
    distribute.RESEND = 2.0
    workers.FIRST_PAUSE = workers.LONGEST_PAUSE = 0.01
if os.environ.get("KMS_HASHER_LIVE_BROKER"):
    from tests.projects import queue  # noqa: F401


def quiet() -> override_settings:
    """Leave out the audit, which is no matter of the test."""
    return override_settings(KMS_HASHER={**settings.KMS_HASHER, "AUDIT": "off"})


def setup(number: str) -> None:
    call_command("migrate", verbosity=0)
    provider = keyring.provider()
    provider.create_alias("alias/tests", provider.create_key().key_arn)
    with quiet():
        User.objects.bulk_create(
            User(username=f"user{index}", password=make_password(f"pw{index}"))
            for index in range(int(number))
        )


def rotate(*arguments: str) -> None:
    print("ready", flush=True)
    call_command("rotate_kms_key", *arguments)


def verify() -> None:
    keys: Counter[str] = Counter()
    modes: Counter[str] = Counter()
    with quiet():
        for user in User.objects.order_by("pk"):
            assert user.check_password(f"pw{user.username[4:]}"), user.username
            stored = encoding.parse(user.password)
            keys[stored.key_ref] += 1
            modes[stored.mode] += 1
        present = encoding.key_ref(keyring.provider().describe_key("alias/tests").key_id)
    states = list(RotationRun.objects.values_list("state", flat=True))
    result = {"keys": keys, "modes": modes, "present": present, "states": states}
    result |= last_run()
    print(json.dumps(result), flush=True)


def last_run() -> dict[str, Any]:
    """What the last run says of itself, and the times of the calls made for it."""
    run = RotationRun.objects.first()
    if run is None:
        return {}
    made = AuditEvent.objects.filter(operation="ReEncrypt", time__gte=run.started_at)
    times = made.order_by("time").values_list("time", flat=True)
    owners = set(run.shards.filter(calls__gt=0).values_list("owner", flat=True))
    return {
        "calls": run.calls,
        "rewritten": run.rewritten,
        "events": [time.timestamp() for time in times],
        "owners": sorted({owner.rpartition(":")[0] for owner in owners}),
    }


def shards() -> None:
    """Write who works on shards now."""
    working = RotationShard.objects.filter(state="working")
    print(json.dumps(list(working.values_list("owner", flat=True))), flush=True)


def busy(*arguments: str) -> None:
    """Three thirds of the users: some sign in, some are saved, some change their password."""
    pks = list(User.objects.order_by("pk").values_list("pk", flat=True))
    signing_in, saved, changing = pks[0::3], pks[1::3], pks[2::3]
    expected: dict[int, str] = {}
    sessions: list[Client] = []
    for pk in signing_in[:KEPT]:
        client = Client()
        client.force_login(User.objects.get(pk=pk))
        sessions.append(client)
    # One of those that are saved is asked for: signing in ends reset links.
    tokens = {
        pk: default_token_generator.make_token(User.objects.get(pk=pk)) for pk in saved[:KEPT]
    }
    stop, done, problems = threading.Event(), Counter[str](), list[str]()

    def sign_in() -> None:
        user = User.objects.get(pk=random.choice(signing_in))
        client = Client()
        if not client.login(username=user.username, password=f"pw{user.username[4:]}"):
            problems.append(f"{user.username} could not sign in")
        if len(sessions) < 20 * KEPT:
            sessions.append(client)
        client = random.choice(sessions)
        if not get_user(client).is_authenticated:
            problems.append("a session ended")

    def save() -> None:
        user = User.objects.get(pk=random.choice(saved))
        user.first_name = str(random.random())
        user.save()  # writes the password as it was read

    def change() -> None:
        user = User.objects.get(pk=random.choice(changing))
        password = f"new{random.random()}"
        user.set_password(password)
        user.save()
        expected[user.pk] = password

    def repeat(action: Callable[[], None]) -> None:
        try:
            while not stop.is_set():
                action()
                done[action.__name__] += 1
        except Exception:  # noqa: BLE001  # the test tells it
            problems.append(traceback.format_exc())
        finally:
            connections.close_all()

    threads = [threading.Thread(target=repeat, args=[each]) for each in (sign_in, save, change)]
    for thread in threads:
        thread.start()
    try:
        call_command("rotate_kms_key", "--new-key", "--concurrency=4", "--settle=1", *arguments)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    call_command("rotate_kms_key", "--disable-old")

    with quiet():
        for user in User.objects.order_by("pk").iterator():
            if not user.check_password(expected.get(user.pk, f"pw{user.username[4:]}")):
                problems.append(f"the password of {user.username} is lost")
    problems += ["a session ended" for each in sessions if not get_user(each).is_authenticated]
    for pk, token in tokens.items():
        if not default_token_generator.check_token(User.objects.get(pk=pk), token):
            problems.append("a reset link died")
    runs = list(
        RotationRun.objects.order_by("pk").values("state", "rewritten", "overtaken", "failed")
    )
    result: dict[str, Any] = {"problems": problems[:20], "done": done, "runs": runs}
    result["sessions"] = len(sessions)
    print(json.dumps(result), flush=True)


def calls() -> None:
    print(
        RotationShard.objects.filter(run=RotationRun.objects.first()).aggregate(n=Sum("calls"))[
            "n"
        ],
        flush=True,
    )


def answer() -> None:
    for line in sys.stdin:
        {"verify": verify, "shards": shards, "calls": calls}[line.strip()]()


def worker(*arguments: str) -> None:
    call_command("db_worker", "--no-startup-delay", "--interval=0.1", *arguments)


if __name__ == "__main__":
    actions: dict[str, Callable[..., None]] = {
        each.__name__: each for each in (setup, rotate, verify, busy, shards, answer, worker)
    }
    actions[sys.argv[1]](*sys.argv[2:])
