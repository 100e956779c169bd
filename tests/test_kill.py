"""
The rotation killed at random moments, and beside a busy site: nothing is lost.

Each test runs processes of its own (tests/projects/live.py) on a new database of the kind
that DATABASE_URL names; on SQLite that is a file. KMS_HASHER_FULL=1 makes them as large as
the requirements: 50 kills, 10,000 users.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from django.db import connection

pytestmark = pytest.mark.slow

FULL = bool(os.environ.get("KMS_HASHER_FULL"))
KILLS = 50 if FULL else 5
USERS = 10_000 if FULL else 500

#: Users in the database that is killed, and calls per second: a run takes half a second.
KILLED_USERS = 200
RATE = 400

ROOT = Path(__file__).resolve().parent.parent

Site = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def site(tmp_path: Path, django_db_blocker: Any) -> Iterator[Site]:
    """Start a process of a site with a new database: `site("setup", "10")`."""
    named = ("ENGINE", "USER", "PASSWORD", "HOST", "PORT", "OPTIONS")
    database = {name: connection.settings_dict[name] for name in named}
    if connection.vendor == "sqlite":
        database["NAME"] = str(tmp_path / "site.sqlite3")
    else:
        database["NAME"] = f"kms_hasher_{uuid.uuid4().hex}"
        with django_db_blocker.unblock():
            execute(f"CREATE DATABASE {database['NAME']}")
    env = {
        **os.environ,
        "DJANGO_SETTINGS_MODULE": "tests.projects.kill_settings",
        "KMS_HASHER_LIVE_DATABASE": json.dumps(database),
        "KMS_HASHER_LIVE_KEYS": str(tmp_path / "keys.json"),
    }
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.projects.live", *arguments],
            cwd=ROOT,
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()
    if connection.vendor != "sqlite":
        with django_db_blocker.unblock():
            execute(f"DROP DATABASE {database['NAME']}")


def execute(statement: str) -> None:
    with connection._nodb_cursor() as cursor:
        cursor.execute(statement)


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for the process; return the last line it wrote."""
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err
    return out.rstrip().rpartition("\n")[2]


def test_killed_at_any_moment_every_password_still_verifies(site: Site) -> None:
    finish(site("setup", str(KILLED_USERS)))
    arguments = ("--new-key", "--settle=0.05", f"--rate={RATE}", "--concurrency=4")
    rotations = 0
    partly = 0
    for _ in range(KILLS):
        process = site("rotate", *arguments, "--batch-size=20")
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(random.uniform(0, 1.3 * KILLED_USERS / RATE))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        found = json.loads(finish(site("verify")))
        assert sum(found["keys"].values()) == KILLED_USERS
        partly += len(found["keys"]) > 1
        rotations = len(found["states"])
    # The same command goes on with the key that is there, and does the rest.
    finish(site("rotate", *arguments))
    finish(site("rotate"))
    found = json.loads(finish(site("verify")))
    assert found["keys"] == {found["present"]: KILLED_USERS}
    assert found["states"][0] == "finished"
    assert rotations > 0
    assert partly > 0 or not FULL


def test_users_of_a_busy_site_notice_nothing(site: Site) -> None:
    finish(site("setup", str(USERS)))
    result = json.loads(finish(site("busy")))
    assert result["problems"] == []
    assert [run["state"] for run in result["runs"]] == ["finished"] * 2
    assert [run["failed"] for run in result["runs"]] == [0, 0]
    # Passwords that were changed after the alias had moved need no rewriting.
    assert sum(run["rewritten"] for run in result["runs"]) >= USERS / 2
    assert set(result["done"]) == {"sign_in", "save", "change"}
    assert result["sessions"] > 30


def test_processes_share_the_work_and_one_may_be_killed(site: Site) -> None:
    finish(site("setup", "1500"))
    process = site("rotate", "--new-key", "--settle=0", "--processes=3", "--rate=300", "--json")
    children: list[int] = []
    until = time.monotonic() + 60
    while not children and time.monotonic() < until:
        time.sleep(0.2)
        children = workers_at(finish(site("shards")))
    os.kill(children[0], signal.SIGKILL)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    result = json.loads(out[out.index("{") :])
    # What the killed one wrote after its last sign of life is not counted.
    assert 1200 < result["rewritten"] <= 1500
    found = json.loads(finish(site("verify")))
    assert found["keys"] == {found["present"]: 1500}
    assert found["states"] == ["finished"]


def workers_at(line: str) -> list[int]:
    """Return the ids of the processes that have a shard."""
    return [int(owner.split(":")[1]) for owner in json.loads(line)]
