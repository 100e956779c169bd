"""
Runs whose shards are on a queue, with the workers that sites have: Celery's, on Redis and on
RabbitMQ, and those of Django's tasks framework.

tests/servers.py says where the brokers are; tests whose broker is not there are skipped.
KMS_HASHER_KILLS=30 kills so often on each.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests import servers
from tests.live_site import Process, Site, finish, kill_group, open_site, workers_at
from tests.servers import BROKERS

celery = pytest.importorskip("celery")

pytestmark = pytest.mark.system

#: How often each kind of process is killed on each broker.
KILLS = int(os.environ.get("KMS_HASHER_KILLS", "1"))

#: Seconds that nothing here takes where all is well.
LONG = 20.0

USERS = 450
RATE = 300
#: A run of these takes some two seconds, and has 18 shards.
RUN = ("--new-key", "--settle=0", f"--rate={RATE}", "--concurrency=4", "--batch-size=10")


class Queue:
    """A site whose runs are on a queue of their own, and its workers."""

    def __init__(self, site: Site, url: str) -> None:
        self.site, self.url, self.name = site, url, f"kms-{uuid.uuid4().hex}"
        self.answers = site.start("-m", "tests.projects.live", "answer", stdin=subprocess.PIPE)
        self.workers: list[Process] = []
        self.logs: list[Path] = []
        site.env |= {
            "KMS_HASHER_LIVE_BROKER": url,
            "KMS_HASHER_LIVE_QUEUE": self.name,
            "KMS_HASHER_LIVE_SHARD": "25",
        }

    def worker(self, *arguments: str) -> Process:
        """Start a worker; its pool has one process."""
        log = Path(self.site.env["KMS_HASHER_LIVE_KEYS"]).with_name(f"{uuid.uuid4().hex}.log")
        with log.open("w") as file:
            worker = self.site.start(
                *("-m", "celery", "-A", "tests.projects.queue", "worker"),
                *("--loglevel=INFO", "--concurrency=1", f"--hostname={uuid.uuid4().hex}@%h"),
                *("--without-gossip", "--without-mingle", *arguments),
                stdout=file,
                stderr=file,
            )
        self.workers.append(worker)
        self.logs.append(log)
        return worker

    def wait_for_workers(self) -> None:
        """Have two workers that are ready."""
        while len(self.workers) < 2:
            self.worker()
        for worker, log in zip(self.workers, self.logs, strict=True):
            wait_until(lambda log=log: " ready." in log.read_text(), worker)

    def kill_worker(self) -> None:
        """Kill the process that started first, and its pool."""
        kill_group(self.workers[0])
        self.workers.pop(0).wait()
        self.logs.pop(0)

    def log(self, since: Mapping[Path, int] | None = None) -> str:
        """Return what the workers have written, from these lengths of each one's log on."""
        return "".join(log.read_text()[(since or {}).get(log, 0) :] for log in self.logs)

    def lengths(self) -> dict[Path, int]:
        return {log: len(log.read_text()) for log in self.logs}

    def run(self, *arguments: str, distribute: str = "celery") -> Process:
        process = self.site("rotate", *RUN, f"--distribute={distribute}", "--json", *arguments)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    def ask(self, question: str) -> str:
        assert self.answers.stdin and self.answers.stdout
        self.answers.stdin.write(f"{question}\n")
        self.answers.stdin.flush()
        return self.answers.stdout.readline()

    def working(self) -> list[int]:
        """Return the processes that have a shard now."""
        return list(workers_at(self.ask("shards")))

    def wait_for_work(self, number: int = 1) -> list[int]:
        """Return the processes that have a shard, once there are so many."""
        until = time.monotonic() + LONG
        while len(found := self.working()) < number:
            assert time.monotonic() < until, self.log()
            time.sleep(0.02)
        return found

    def calls(self) -> int:
        """Return how many calls the shards of the last run tell of."""
        return int(self.ask("calls"))

    def verify(self) -> dict[str, Any]:
        """Check that all is under the new key, and return what the last run says of itself."""
        found: dict[str, Any] = json.loads(self.ask("verify"))
        assert found["keys"] == {found["present"]: sum(found["keys"].values())}
        assert found["states"][0] == "finished"
        return found

    def forget(self) -> None:
        """Remove what there is of the queue on the broker."""
        app = celery.Celery(broker=self.url, set_as_current=False)
        with app.connection_for_write() as connection:
            if self.url.startswith("redis"):
                client = connection.default_channel.client
                if keys := client.keys(f"{self.name}*"):
                    client.delete(*keys)
            else:
                connection.default_channel.queue_delete(self.name)
                connection.default_channel.exchange_delete(self.name)


def wait_until(done: Callable[[], bool], process: Process) -> None:
    until = time.monotonic() + LONG
    while not done():
        assert process.poll() is None, process.args
        assert time.monotonic() < until, process.args
        time.sleep(0.05)


def end(process: Process) -> dict[str, Any]:
    """Wait for a command with --json; return what it wrote."""
    out, err = process.communicate(timeout=4 * LONG)
    assert process.returncode == 0, err
    result: dict[str, Any] = json.loads(out[out.index("{") :])
    return result


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, django_db_blocker: Any) -> Iterator[Site]:
    """A site with users that all tests here rotate to new keys."""
    with open_site(tmp_path_factory.mktemp("site"), django_db_blocker) as site:
        finish(site("setup", str(USERS)))
        yield site


@pytest.fixture(scope="module", params=BROKERS)
def queue(request: pytest.FixtureRequest, site: Site) -> Iterator[Queue]:
    """
    A queue of the site on each of the brokers, and workers that are kept from test to test.

    What one test leaves on the queue does no harm in the next.
    """
    yield from open_queue(site, request.param)


def open_queue(site: Site, broker: str) -> Iterator[Queue]:
    try:
        servers.connect(BROKERS[broker])
    except OSError as error:
        pytest.skip(f"{broker}: {error}")
    queue = Queue(site, BROKERS[broker])
    yield queue
    for worker in queue.workers:
        kill_group(worker)
        worker.wait()
    kill_group(queue.answers)
    queue.forget()


# --- workers join, are killed, and steered ------------------------------------------


def test_workers_join_and_messages_come_twice(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(queue.site.env, "KMS_HASHER_LIVE_TWICE", "1")
    queue.worker()
    process = queue.run("--rate=50")
    first = queue.wait_for_work()
    queue.worker()
    result = end(process)
    found = queue.verify()
    # On a busy machine a worker may be thought dead, and some calls be made twice.
    assert 0 < result["rewritten"] <= USERS
    assert result["failed"] == 0
    # The parent of each pool has used KMS, database and audit thread before it forked.
    assert USERS <= len(found["events"]) <= 1.2 * USERS
    assert len(found["owners"]) == 2
    assert f"{socket.gethostname()}:{first[0]}" in found["owners"]
    assert "Traceback" not in queue.log()


@pytest.fixture(params=BROKERS)
def own(
    request: pytest.FixtureRequest, tmp_path: Path, django_db_blocker: Any
) -> Iterator[Queue]:
    """A site, a queue and workers that no other test has."""
    with open_site(tmp_path, django_db_blocker) as site:
        finish(site("setup", str(USERS)))
        yield from open_queue(site, request.param)


def test_a_move_between_modes_by_workers_with_its_settings(
    own: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = own
    move = ("--distribute=celery", "--json", "--concurrency=4")
    queue.worker()
    with monkeypatch.context() as patch:
        patch.setitem(queue.site.env, "KMS_HASHER_LIVE_MODE", "envelope")
        _, err = queue.site("rotate", "--to-mode=envelope", *move).communicate(timeout=120)
        assert "into the mode 'envelope'" in err  # the worker was not restarted
        queue.kill_worker()
        queue.worker()
        result = end(queue.site("rotate", "--to-mode=envelope", *move))
        # A shard that is worked on twice, as one worker was slow to tell of it, counts less.
        assert 0 < result["rewritten"] <= USERS
        assert result["failed"] == 0
        assert json.loads(finish(queue.site("verify")))["modes"] == {"e1": USERS}


@pytest.mark.parametrize("what", ["pool", "worker", "command"])
def test_what_is_killed_does_no_harm(queue: Queue, what: str) -> None:
    for _ in range(KILLS):
        queue.wait_for_workers()
        process = queue.run()
        pids = queue.wait_for_work()
        time.sleep(random.uniform(0, 0.5))
        if what == "pool":
            os.kill(pids[0], signal.SIGKILL)
        elif what == "worker":
            queue.kill_worker()
        else:
            kill_group(process)
            process.communicate()
            process = queue.run()
        end(process)
        found = queue.verify()
        assert found["rewritten"] <= USERS
        # Calls that were in flight are made again, and those of a worker thought dead.
        assert USERS - 8 <= len(found["events"]) <= 1.2 * USERS


def test_pause_resume_and_cancel(queue: Queue) -> None:
    queue.wait_for_workers()
    process = queue.run("--rate=15")
    queue.wait_for_work()
    finish(queue.site("rotate", "--pause"))
    until = time.monotonic() + LONG
    while queue.working():
        assert time.monotonic() < until
    paused = queue.calls()
    assert 0 < paused < USERS
    time.sleep(1)
    assert queue.calls() == paused
    finish(queue.site("rotate", "--resume"))
    queue.wait_for_work()
    finish(queue.site("rotate", "--cancel"))
    _, err = process.communicate(timeout=LONG)
    assert process.returncode == 1
    assert "The run was cancelled." in err
    until = time.monotonic() + LONG
    while queue.working():
        assert time.monotonic() < until
    assert paused < queue.calls() < USERS
    end(queue.run())
    queue.verify()


@pytest.mark.parametrize("fault", ["KMSAccessDenied", "KMSUnavailable"])
def test_a_worker_that_kms_refuses_ends_the_run(queue: Queue, fault: str) -> None:
    queue.wait_for_workers()
    before = queue.lengths()
    process = queue.run("--rate=200")
    queue.wait_for_work()
    file = Path(queue.site.env["KMS_HASHER_LIVE_KEYS"]).with_name("fault")
    file.write_text(fault)
    try:
        out, err = process.communicate(timeout=LONG)
    finally:
        file.unlink()
    assert process.returncode == 1
    assert json.loads(out[out.index("{") :])["state"] == "failed"
    assert f"ReEncrypt: of the test ({fault}) (at {socket.gethostname()}:" in err
    assert "Run it again to go on." in err
    assert "kms_argon2" not in err
    log = queue.log(before)
    assert f"raised expected: WorkerFailed('ReEncrypt: of the test ({fault})')" in log
    assert "Traceback" not in log
    assert "kms_argon2" not in log
    end(queue.run())
    assert queue.verify()["states"][:1] == ["finished"]


def test_the_rate_is_held_over_two_workers(queue: Queue) -> None:
    queue.wait_for_workers()
    end(queue.run("--rate=50"))
    found = queue.verify()
    assert len(found["owners"]) == 2
    events = found["events"]
    # On a busy machine a worker may be thought dead, and some calls be made twice.
    assert USERS <= len(events) <= 1.2 * USERS
    seconds = events[-1] - events[0]
    assert seconds > 8
    # Each alone would make 25; on a busy machine they do not come to the 50.
    assert 30 <= (len(events) - 1) / seconds <= 55
