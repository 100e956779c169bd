"""
Worker processes on this machine, for `--processes`: each has a processor, a connection to the
database and calls in flight of its own.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import signal
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any

import django

if TYPE_CHECKING:
    from kms_hasher.models import RotationRun
    from kms_hasher.rotation.engine import Job, Options
    from kms_hasher.rotation.sweeps import Hands

#: Seconds that a process has to end in, before it is made to.
PATIENCE = 10.0

ALL_ENDED = (
    "All worker processes have ended (exit status {codes}). Every password is as good as it "
    "was."
)

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def processes(run: RotationRun, job: Job, options: Options) -> Iterator[Hands]:
    """
    Start `options.processes` processes, and end them with the block.

    They are started anew rather than forked, and read the settings as this one did. One that
    is killed is done without; raises `WorkerFailed` when none is left.
    """
    from django.db import connections

    from kms_hasher.exceptions import WorkerFailed
    from kms_hasher.rotation import sweeps

    context = multiprocessing.get_context("spawn")
    ended = context.Event()
    names = {alias: connections[alias].settings_dict["NAME"] for alias in connections}
    children: list[BaseProcess] = [
        context.Process(
            target=_main, args=(run.pk, names, ended), name=f"kms-hasher-{n}", daemon=True
        )
        for n in range(options.processes)
    ]
    for child in children:
        child.start()

    def work(run: RotationRun) -> Iterator[None]:
        while sweeps.goes_on(run):
            # Each is asked: one that has died has its shard until its status is taken.
            if not [child for child in children if child.is_alive()]:
                codes = ", ".join(str(child.exitcode) for child in children)
                raise WorkerFailed(ALL_ENDED.format(codes=codes))
            time.sleep(sweeps.LOOK)
            yield

    try:
        yield work
    finally:
        ended.set()
        until = time.monotonic() + PATIENCE
        for child in children:
            child.join(max(until - time.monotonic(), 0))
            if child.is_alive():
                child.kill()
                child.join()


def _main(run_id: int, names: dict[str, str], ended: Any) -> None:
    """Work on the shards of a run until it ends, or the process that started this one does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one that conducts
    django.setup()
    from django.db import connections

    from kms_hasher.models import RotationRun
    from kms_hasher.rotation import jobs, shards, sweeps
    from kms_hasher.rotation.engine import RESTING, Options, Walker
    from kms_hasher.rotation.workers import Workers

    for alias, name in names.items():
        connections[alias].settings_dict["NAME"] = name
    parent = multiprocessing.parent_process()
    run = RotationRun.objects.select_related("key").get(pk=run_id)
    options = Options(**run.plan["options"])

    def to_end() -> bool:
        return bool(ended.is_set() or (parent and not parent.is_alive()))

    try:
        with Workers(options.concurrency) as workers, shards.owner() as owner:
            walker = Walker(run, jobs.of(run), options, workers)
            while not to_end():
                run.refresh_from_db(fields=["state", "sweep"])
                shard = None if run.state in RESTING else shards.claim(run, owner)
                if shard is None:
                    ended.wait(sweeps.LOOK)
                    continue
                with contextlib.closing(walker.walk(shard)) as steps:
                    for _ in steps:
                        if to_end():
                            break
    except Exception as error:  # noqa: BLE001  # it stands in the shard, for the one that conducts
        logger.error("A worker process of run %s ends: %s", run_id, type(error).__name__)
        raise SystemExit(1) from None
