"""
Shards put on a queue, for `--distribute`: workers on any machine take them.

The message is the id of a shard. Workers may come and go, and messages come twice or not at
all: what is done is told by the shard's row alone, and one whose worker is gone is sent again.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from django.db import DatabaseError
from django.utils.module_loading import import_string

from kms_hasher.exceptions import ConfigurationError, KMSHasherError, WorkerFailed
from kms_hasher.models import RotationRun, RotationShard
from kms_hasher.rotation import shards, sweeps
from kms_hasher.rotation.engine import Job, Options
from kms_hasher.rotation.sweeps import Enlist, Hands

State = RotationShard.State

#: There are shards for so many workers; nobody knows how many will come.
WORKERS = 10

#: Seconds that a worker takes rows of a shard for before it gives it back, to be sent again:
#: shorter than what brokers let a message be unacknowledged for, and a worker that is to end
#: waits no longer.
SPELL = 120.0

#: Seconds after which a shard that nobody has begun is sent again if no worker is at work:
#: the message may be lost. From one time to the next they double, up to the longest.
RESEND = 60.0
LONGEST_RESEND = 1800.0

#: Seconds for which a queue may refuse messages before the run ends.
PATIENCE = 60.0

#: What makes a function that puts a message on the queue, by the name of the engine; and
#: what it needs.
ENGINES = {
    "celery": (
        "kms_hasher.rotation.celery.sender",
        "the extra django-kms-hasher[celery]",
    ),
    "tasks": ("kms_hasher.rotation.tasks.sender", "Django 6.0 or later"),
}
MISSING = "--distribute {engine} needs {needs} ({error})."
UNUSABLE = "--distribute {engine} cannot be used as it is set up: {error}"

NOBODY = (
    "No worker has begun any of %s shards that were sent. They are sent again; do workers run, "
    "with this queue and this database?"
)
REFUSED = "The queue does not take a message (%s); it is tried again for %g seconds."
OUT = "The queue has taken no message for {seconds:g} seconds ({error})."

logger = logging.getLogger(__name__)

Send = Callable[[int], object]


def to(engine: str) -> Enlist:
    """
    Return what puts shards on the queue of `engine`, "celery" or "tasks".

    Raises `ConfigurationError` if it is not installed or not set up.
    """
    path, needs = ENGINES[engine]
    try:
        send: Send = import_string(path)()
    except ImportError as error:
        raise ConfigurationError(
            MISSING.format(engine=engine, needs=needs, error=error)
        ) from None
    except ConfigurationError:
        raise
    except Exception as error:  # noqa: BLE001  # the engine's own, which may be not installed
        raise ConfigurationError(UNUSABLE.format(engine=engine, error=error)) from None

    @contextlib.contextmanager
    def enlist(run: RotationRun, job: Job, options: Options) -> Iterator[Hands]:
        yield lambda run: _work(run, Queue(send))

    return enlist


def work_on(shard_id: int) -> None:
    """
    Work on a shard for at most about `SPELL` seconds, as a worker of a queue.

    Raises `WorkerFailed` alone, without a context: what workers do with errors is theirs, and
    others than ours may quote a row.
    """
    problem = ""
    try:
        sweeps.work_on(shard_id, SPELL)
    except Exception as error:  # noqa: BLE001
        problem = sweeps.told(error)
    if problem:
        raise WorkerFailed(problem)


@dataclass
class Sent:
    """When a shard was sent, its last sign of life then, and the seconds until it is lost."""

    at: float
    updated_at: datetime.datetime | None
    resend: float


class Queue:
    """Where shards are sent to, and what was sent."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._sent: dict[int, Sent] = {}
        self._refused_since: float | None = None

    def send_due(self, run: RotationRun) -> None:
        """
        Send what waits for a worker and is not on the queue, as far as can be told.

        Raises `WorkerFailed` if the queue refuses for `PATIENCE` seconds.
        """
        idle = not shards.at_work(run)
        lost = 0
        open_ = run.shards.filter(sweep=run.sweep).exclude(state=State.DONE)
        for shard in open_.only("state", "owner", "updated_at"):
            last, now = self._sent.get(shard.pk), time.monotonic()
            if not self._is_due(shard, last, idle, now):
                continue
            sent = Sent(now, shard.updated_at, RESEND)
            if last and shard.state == State.WAITING and last.updated_at == shard.updated_at:
                lost += 1
                sent.resend = min(2 * last.resend, LONGEST_RESEND)
            if not self._put(shard.pk):
                break
            self._sent[shard.pk] = sent
            if time.monotonic() - now > sweeps.LOOK:
                break  # it was worked on just here, or the queue is slow: look again
        if lost:
            logger.warning(NOBODY, lost)

    def _is_due(self, shard: RotationShard, last: Sent | None, idle: bool, now: float) -> bool:
        if shard.state == State.WORKING:
            # The pause is for the next worker to take it.
            pause = shards.LEASE.total_seconds()
            gone = shards.is_gone(shard.owner, shard.updated_at)
            return gone and (last is None or now - last.at > pause)
        if last is None or last.updated_at != shard.updated_at:  # its worker gave it back
            return True
        return idle and now - last.at > last.resend

    def _put(self, shard_id: int) -> bool:
        try:
            self._send(shard_id)
        except (KMSHasherError, DatabaseError):
            raise
        except Exception as error:  # noqa: BLE001  # each broker has errors of its own
            now, text = time.monotonic(), f"{type(error).__name__}: {error}"
            if self._refused_since is None:
                self._refused_since = now
                logger.warning(REFUSED, text, PATIENCE)
            if now - self._refused_since < PATIENCE:
                return False
        else:
            self._refused_since = None
            return True
        raise WorkerFailed(OUT.format(seconds=PATIENCE, error=text))


def _work(run: RotationRun, queue: Queue) -> Iterator[None]:
    while sweeps.goes_on(run):
        queue.send_due(run)
        time.sleep(sweeps.LOOK)
        yield
