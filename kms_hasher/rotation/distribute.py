"""
Shards put on a queue, for `--distribute`: workers on any machine take them.

The message is the id of a shard. Workers may come and go, and messages come twice or not at
all: what is done is told by the shard's row alone, and one whose worker is gone is sent again.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from django.utils.module_loading import import_string

from kms_hasher.exceptions import ConfigurationError
from kms_hasher.models import RotationRun, RotationShard
from kms_hasher.rotation import shards, sweeps
from kms_hasher.rotation.engine import Job, Options
from kms_hasher.rotation.sweeps import Enlist, Hands

State = RotationShard.State

#: Seconds after which a shard that nobody has begun is sent again if no worker is at work:
#: the message may be lost.
RESEND = 60.0

#: What puts a message on the queue, by the name of the engine; and what it needs.
ENGINES = {
    "celery": ("kms_hasher.tasks.send", "the extra django-kms-hasher[celery]"),
    "tasks": ("kms_hasher.rotation.tasks.send", "Django 6.0 or later"),
}
MISSING = "--distribute {engine} needs {needs} ({error})."


def to(engine: str) -> Enlist:
    """
    Return what puts shards on the queue of `engine`, "celery" or "tasks".

    Raises `ConfigurationError` if it is not installed.
    """
    path, needs = ENGINES[engine]
    try:
        send: Callable[[int], None] = import_string(path)
    except ImportError as error:
        raise ConfigurationError(
            MISSING.format(engine=engine, needs=needs, error=error)
        ) from None

    @contextlib.contextmanager
    def enlist(run: RotationRun, job: Job, options: Options) -> Iterator[Hands]:
        yield lambda run: _work(run, send)

    return enlist


def _work(run: RotationRun, send: Callable[[int], None]) -> Iterator[None]:
    sent: dict[int, float] = {}
    while sweeps.goes_on(run):
        idle = not shards.at_work(run)
        for shard in run.shards.filter(sweep=run.sweep).exclude(state=State.DONE):
            now = time.monotonic()
            if shard.state == State.WORKING:
                # The pause is for the next worker to take it.
                due = shards.is_gone(shard.owner, shard.updated_at)
                due = due and now - sent.get(shard.pk, 0) > shards.LEASE.total_seconds()
            else:
                due = shard.pk not in sent or (idle and now - sent[shard.pk] > RESEND)
            if due:
                sent[shard.pk] = now
                send(shard.pk)
        time.sleep(sweeps.LOOK)
        yield
