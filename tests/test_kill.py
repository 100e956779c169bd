"""
The rotation killed at random moments, and beside a busy site: nothing is lost.

Each test runs processes of its own (tests/live_site.py). KMS_HASHER_FULL=1 makes them as
large as the requirements: 50 kills, 10,000 users.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.live_site import Site, finish, open_site, workers_at

pytestmark = pytest.mark.everywhere

FULL = bool(os.environ.get("KMS_HASHER_FULL"))
KILLS = 50 if FULL else 5
USERS = 10_000 if FULL else 500

#: Users in the database that is killed, and calls per second: a run takes half a second.
KILLED_USERS = 200
RATE = 400


@pytest.fixture
def site(tmp_path: Path, django_db_blocker: Any) -> Iterator[Site]:
    """A site with a new database: `site("setup", "10")` starts a process of it."""
    with open_site(tmp_path, django_db_blocker) as site:
        yield site


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
    assert rotations > 0 or not FULL
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


def test_processes_share_a_move_between_modes(site: Site) -> None:
    finish(site("setup", "600"))
    site.env["KMS_HASHER_LIVE_MODE"] = "envelope"
    arguments = ("--to-mode=envelope", "--processes=2", "--concurrency=4", "--json")
    process = site("rotate", *arguments)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    result = json.loads(out[out.index("{") :])
    assert (result["rewritten"], result["failed"]) == (600, 0)
    found = json.loads(finish(site("verify")))
    assert found["modes"] == {"e1": 600}
    assert found["states"] == ["finished"]


def test_a_move_that_is_killed_is_gone_on_with(site: Site) -> None:
    finish(site("setup", str(KILLED_USERS)))
    there = "direct"
    for _ in range(KILLS):
        there = random.choice([mode for mode in ("direct", "envelope") if mode != there])
        site.env["KMS_HASHER_LIVE_MODE"] = there
        arguments = ("--concurrency=4", "--batch-size=20", f"--rate={RATE}")
        process = site("rotate", f"--to-mode={there}", *arguments)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(random.uniform(0, 1.3 * KILLED_USERS / RATE))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        found = json.loads(finish(site("verify")))
        assert sum(found["modes"].values()) == KILLED_USERS
    finish(site("rotate", f"--to-mode={there}"))
    found = json.loads(finish(site("verify")))
    assert found["modes"] == {"d1" if there == "direct" else "e1": KILLED_USERS}
    assert found["states"][0] == "finished"
