"""
A run from its first sweep to its last: shards are laid out, worked on, and laid out again
until a sweep finds nothing.

Whoever conducts a run gives shards to workers and works itself where there are none. What is
left to do is told by the rows alone, so that any process can go on with it.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

from django.db.models import Sum

from kms_hasher import columns
from kms_hasher.exceptions import (
    ConfigurationError,
    KMSHasherError,
    RotationRefused,
    WorkerFailed,
)
from kms_hasher.models import RotationRun, RotationShard
from kms_hasher.rotation import jobs, runs, shards
from kms_hasher.rotation.engine import RESTING, BadRow, Job, Options, Walker
from kms_hasher.rotation.runs import HEARTBEAT, Record
from kms_hasher.rotation.workers import Workers, patiently

State = RotationShard.State

#: Seconds between two looks at what others do.
LOOK = 0.2

#: So many sweeps in a row may find rows to rewrite and rewrite none. Seconds to wait after the
#: first of them, for who has a row locked; they double, up to the longest.
FRUITLESS = 10
PAUSE, LONGEST_PAUSE = 0.5, 30.0

UNSTABLE = (
    "{number} sweeps in a row rewrote nothing, although there are rows to rewrite: each was "
    "changed meanwhile, or the database does not find it by the value it gave. Every "
    "password is as good as it was."
)

GREEN = (
    "Workers under gevent or eventlet cannot rotate: an event loop needs a thread of its own. "
    "Use processes or threads (for Celery `--pool=prefork` or `--pool=threads`)."
)
FAILED_AT = "{error} (at {owner})"

#: Has the shards of the present sweep worked on; yields now and then, and ends when nobody
#: has anything left to do, or the run rests.
Hands: TypeAlias = "Callable[[RotationRun], Iterator[None]]"

#: Opens the hands for a run.
Enlist: TypeAlias = "Callable[[RotationRun, Job, Options], AbstractContextManager[Hands]]"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """
    How far a run is. The counts are of the whole run but for `looked`, which is of the
    sweep, and `failed`, the bad rows there are now; `bad` are those found since the last
    snapshot. `total` is how many rows were expected. `seconds` is the time since this process
    took the run on, `before` what of `calls` had been made by then.
    """

    sweep: int = 0
    looked: int = 0
    total: int = 0
    rewritten: int = 0
    overtaken: int = 0
    failed: int = 0
    calls: int = 0
    seconds: float = 0.0
    before: int = 0
    waiting: bool = False
    paused: bool = False
    bad: tuple[BadRow, ...] = field(default=(), repr=False)

    @property
    def rate(self) -> float:
        """Calls per second."""
        return (self.calls - self.before) / self.seconds if self.seconds else 0.0

    @property
    def seconds_left(self) -> float | None:
        """The time the first sweep still takes, or None where that cannot be told."""
        if self.sweep != 1 or not self.rate:
            return None
        return max(self.total - self.looked, 0) / self.rate


@contextlib.contextmanager
def here(run: RotationRun, job: Job, options: Options) -> Iterator[Hands]:
    """Work in this process."""
    with Workers(options.concurrency) as workers, shards.owner() as owner:
        walker = Walker(run, job, options, workers)

        def work(run: RotationRun) -> Iterator[None]:
            while shard := shards.claim(run, owner):
                for _ in walker.walk(shard):
                    yield
                yield
                if walker.stopped:
                    return

        yield work


def work_on(shard_id: int, seconds: float = float("inf")) -> bool:
    """
    Work on one shard in this process, until it is done; return whether it was ours to do.

    For workers of a queue. A shard that is done, somebody else's, or of a run that rests is
    left alone. After so many seconds no more rows are read: the shard is given back, and
    waits. Raises what `Walker.walk` does and `ConfigurationError`, once it is recorded.
    """
    until = time.monotonic() + seconds
    shard = RotationShard.objects.select_related("run__key").filter(pk=shard_id).first()
    if shard is None or shard.run.state != RotationRun.State.RUNNING:
        return False
    run = shard.run
    with shards.owner() as owner:
        claimed = shards.claim(run, owner, only=shard_id)
        if claimed is None:
            return False
        try:
            _check_threads()
            options = Options(**run.plan["options"])
            with Workers(options.concurrency) as workers:
                walker = Walker(run, jobs.of(run), options, workers)
                for _ in walker.walk(claimed):
                    if time.monotonic() >= until:
                        walker.stopped = True
        except Exception as error:
            # Whatever the walker has not recorded: the settings of this process, say.
            shards.keep(claimed, state=State.FAILED, error=told(error))
            raise
    return True


def told(error: Exception) -> str:
    """Return what may be told of an error: one that is not ours may quote a row."""
    return str(error) if isinstance(error, KMSHasherError) else type(error).__name__


def _check_threads() -> None:
    """Raise `ConfigurationError` if greenlets stand in for threads."""
    gevent, eventlet = (sys.modules.get(n) for n in ("gevent.monkey", "eventlet.patcher"))
    if (gevent and gevent.is_module_patched("threading")) or (
        eventlet and eventlet.is_monkey_patched("thread")
    ):
        raise ConfigurationError(GREEN)


def conduct(
    record: Record,
    job: Job,
    options: Options,
    *,
    settle: bool = False,
    total: int = 0,
    enlist: Enlist = here,
) -> Iterator[Progress]:
    """
    Do the job on all rows of all columns; yield the progress, at last the final one.

    With `settle`, a last sweep follows `options.settle` seconds after one that found nothing.
    Raises what the workers do, `RotationCancelled`, and `RotationRefused` if no row lets
    itself be written.
    """
    run = record.row
    if total > run.total:
        record.write(total=total)
    view = View(record)
    with enlist(run, job, options) as hands:
        while True:
            if _unfinished(run):
                yield from _work(record, hands, view)
                continue
            found, fruitless = _found(run)
            if fruitless:
                pause = min(PAUSE * 2 ** (fruitless - 1), LONGEST_PAUSE)
                yield from _wait(record, view, pause)
            if not found or (run.sweep and not job.until_clean):
                if not settle:
                    break
                settle = False
                yield from _wait(record, view, options.settle)
            if run.sweep:
                patiently(job.check)
            among = columns.columns()
            # Of all rows, as few of them as there may be to rewrite: each is looked at.
            rows = 0 if run.sweep else sum(column.rows.count() for column in among)
            shards.open_sweep(run, among, shards.size(rows, options.processes))
    record.write()
    yield view.progress()


def _work(record: Record, hands: Hands, view: View) -> Iterator[Progress]:
    run = record.row
    for _ in hands(run):
        record.beat()
        yield view.progress()
    record.write()
    for shard in run.shards.filter(sweep=run.sweep, state=State.FAILED):
        raise WorkerFailed(FAILED_AT.format(error=shard.error, owner=shard.owner))
    while run.state == RotationRun.State.PAUSED:
        yield view.progress(paused=True)
        time.sleep(LOOK)
        record.write()
    if _unfinished(run):  # others have it: wait for them
        time.sleep(LOOK)


def _wait(record: Record, view: View, seconds: float) -> Iterator[Progress]:
    """Let time pass, with signs of life."""
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        yield view.progress(waiting=True)
        time.sleep(min(left, HEARTBEAT))
        record.beat()


def goes_on(run: RotationRun) -> bool:
    """Return whether there is something to do for workers: not if one failed, or all rest."""
    open_ = run.shards.filter(sweep=run.sweep).exclude(state=State.DONE)
    states = set(open_.values_list("state", flat=True).distinct())
    return bool(states) and State.FAILED not in states and run.state not in RESTING


def _unfinished(run: RotationRun) -> bool:
    return run.shards.filter(sweep=run.sweep).exclude(state=State.DONE).exists()


def _found(run: RotationRun) -> tuple[bool, int]:
    """
    Return whether the last sweep found rows to rewrite, if there was one, and how many in a
    row found some and rewrote none.

    Raises `RotationRefused` if these are `FRUITLESS`.
    """
    last = run.shards.filter(sweep__gt=run.sweep - FRUITLESS).values("sweep").order_by("-sweep")
    sweeps = last.annotate(new=Sum("rewritten"), late=Sum("overtaken"))
    found = [(each["new"], each["late"]) for each in sweeps]
    fruitless = len(list(itertools.takewhile(lambda each: each[1] and not each[0], found)))
    if fruitless == FRUITLESS:
        raise RotationRefused(UNSTABLE.format(number=FRUITLESS))
    return not found or any(found[0]), fruitless


class View:
    """What is told of a run while it is under way."""

    def __init__(self, record: Record) -> None:
        self._run = record.row
        self._started, self._before = time.monotonic(), record.row.calls
        self._told: set[tuple[str, str]] = set()
        self._failed = 0

    def progress(self, **more: Any) -> Progress:
        run = self._run
        looked = run.shards.filter(sweep=run.sweep).aggregate(n=Sum("looked", default=0))["n"]
        counts: dict[str, Any] = runs.totals(run)
        bad = self._news() if counts["failed"] else ()
        return Progress(
            sweep=run.sweep,
            looked=looked,
            total=run.total,
            seconds=time.monotonic() - self._started,
            before=self._before,
            bad=bad,
            **counts,
            **more,
        )

    def _news(self) -> tuple[BadRow, ...]:
        news = []
        for shard in self._run.shards.filter(sweep=self._run.sweep, failed__gt=0):
            column = shards.column_of(shard)
            for pk, reason in shard.bad:
                if (name := (str(column), pk)) not in self._told:
                    self._told.add(name)
                    news.append(BadRow(name[0], shards.load(column, pk), reason))
        return tuple(news)


def sources(run: RotationRun) -> set[str]:
    """Return the refs of the keys that rows were brought away from."""
    return {ref for each in run.shards.values_list("sources", flat=True) for ref in each}


def plan_of(options: Options, **more: Any) -> dict[str, Any]:
    """Return what goes into `RotationRun.plan`."""
    return {"options": asdict(options), **more}
