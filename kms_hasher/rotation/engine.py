"""
Walks the rows of a shard and rewrites those that a job wants rewritten.

Rows are read in pages by primary key and changed in KMS, many at once; what comes back is
written by compare-and-swap, a hundred rows to a statement. The three overlap: the calling
thread has the database, another one KMS. Killed at any instant, every row holds its old
value or its new one, and whoever takes the shard next does the rest.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from django.db.models import QuerySet

from kms_hasher import data_keys, signals, users
from kms_hasher.columns import Change, Column
from kms_hasher.exceptions import KMSHasherError, MalformedHash
from kms_hasher.models import RotationRun, RotationShard
from kms_hasher.rotation import shards
from kms_hasher.rotation.database import lag, statement_timeout
from kms_hasher.rotation.workers import DROPPED, Outcome, Task, Workers

#: Seconds between two signs of life of a shard.
EVERY = 0.5

#: So many bad rows of a shard are named; all are counted.
NAMED = 1000

#: States of a run in which nobody works on it.
RESTING = (RotationRun.State.PAUSED, RotationRun.State.CANCELLED, RotationRun.State.FAILED)

TOO_LONG = "the rewritten value is longer than the column"


class Job(Protocol):
    """What is done to rows."""

    #: Whether sweeps go on until one finds nothing; else one is all.
    until_clean: bool

    #: Refs of the keys that rows were brought away from.
    sources: set[str]

    def candidates(self, rows: QuerySet[Any], name: str) -> QuerySet[Any]:
        """Narrow the rows by what a query can tell; at the least to sealed or stock ones."""

    def task(self, value: str) -> Task | None:
        """
        Return the call that rewrites a value, to be awaited in a thread without the database.

        None if there is nothing to do. Raises `MalformedHash`.
        """

    def blames_row(self, value: str, error: KMSHasherError) -> bool:
        """Return whether the error is this row's own matter, and the run may go on."""

    def check(self) -> None:
        """Called before each sweep but the first. Raises `RotationRefused` to stop."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """
    How a run goes about it. All of it is known to every process that works on it.

    `concurrency` is how many calls a process has in flight at once, None for as many as bring
    something, `rate` how many all
    processes together make per second at the most, None for no limit. `processes` work on it
    on this machine. `sleep` are the seconds between two pages, `settle` those to wait for a
    moved alias before the last sweep, `statement_timeout` those a statement may take, 0 for
    no limit. `replicas` name, by the alias of a database, that of a replica which is read in
    the first sweep, and waited for while it is more than `max_lag` seconds behind.
    """

    batch_size: int = 500
    concurrency: int | None = 32
    rate: float | None = None
    processes: int = 1
    sleep: float = 0.0
    settle: float = 5.0
    statement_timeout: float = 30.0
    replicas: Mapping[str, str] = field(default_factory=dict)
    max_lag: float | None = None


@dataclass(frozen=True)
class BadRow:
    """A row that was left as it is, and why. The value is never told."""

    column: str
    pk: Any
    reason: str

    def __str__(self) -> str:
        return f"{self.column} pk={self.pk}: {self.reason}"


@dataclass
class Page:
    """Rows that were read: how many are not done, and the last key, None for a second look."""

    rows: list[tuple[Any, str]]
    last: Any
    left: int


def width_of(column: Column) -> int | None:
    """Return the characters that both the field and the real column hold, or None."""
    widths = (column.field.max_length, users.column_width(column))
    return min((width for width in widths if width is not None), default=None)


class Walker:
    """
    Does a job on one shard of a run after another, in the calling thread.

    `rate` is shared evenly with all others that are at work, counted anew at each sign of
    life.
    """

    def __init__(self, run: RotationRun, job: Job, options: Options, workers: Workers) -> None:
        self._run, self._job, self._options, self._workers = run, job, options, workers
        # Bad rows and a hash of their values, which never leaves the process: one that has
        # not changed is not tried again in the next sweep.
        self._bad: dict[tuple[str, Any], tuple[int, str]] = {}
        self._widths: dict[Column, int | None] = {}
        #: Whether the last shard was left early, as the run rests or another has the shard.
        self.stopped = False

    def walk(self, shard: RotationShard) -> Generator[None, None, None]:
        """
        Work on a shard that is ours to its end, or until the run rests or the shard is lost.

        Yields now and then. Raises what the job does not blame on a row: KMS out of reach
        after all tries, access denied, a target that cannot be used.
        """
        self._begin(shard)
        limit = statement_timeout(shard.database, self._options.statement_timeout)
        try:
            with limit, data_keys.held():
                overtaken = yield from self._rewrite(self._pages())
                if overtaken:  # once more at once, and in the next sweep
                    yield from self._rewrite(self._again(overtaken))
        except Exception as error:
            # Errors that are not ours may quote a row.
            text = str(error) if isinstance(error, KMSHasherError) else type(error).__name__
            self._end(RotationShard.State.FAILED, text)
            raise
        except BaseException:
            self._end(RotationShard.State.WAITING)
            raise
        self._end(RotationShard.State.WAITING if self.stopped else RotationShard.State.DONE)

    def _begin(self, shard: RotationShard) -> None:
        self._shard, self._column = shard, shards.column_of(shard)
        if self._column not in self._widths:
            self._widths[self._column] = width_of(self._column)
        self._width = self._widths[self._column]
        self._open: deque[Page] = deque()
        self._named = {name for name, _ in shard.bad}
        self._calls = shard.calls - self._workers.calls
        self.stopped = False
        self._read_live()

    def _end(self, state: str, error: str = "") -> None:
        self._note()
        shards.keep(self._shard, state=state, error=error)

    def _note(self) -> None:
        while self._open and not self._open[0].left:
            self._shard.cursor = shards.dump(self._open.popleft().last)
        self._shard.calls = self._calls + self._workers.calls
        self._shard.sources = sorted(self._job.sources)

    def _beat(self) -> bool:
        """Give a sign of life if it is time for one; return whether it was."""
        if time.monotonic() - self._beaten < EVERY:
            return False
        self._note()
        if not shards.keep(self._shard):
            self.stopped = True
        self._read_live()
        return True

    def _read_live(self) -> None:
        """Read what others may change while we work: the state of the run and the rate."""
        self._beaten = time.monotonic()
        live = RotationRun.objects.filter(pk=self._run.pk).values_list("state", "rate")
        state, rate = live.get()
        self.stopped = self.stopped or state in RESTING
        if self.stopped:
            self._workers.drop()
        self._workers.limit(rate / max(shards.at_work(self._run), 1) if rate else None)

    def _rows(self, column: Column) -> QuerySet[Any]:
        name = column.field.attname
        return self._job.candidates(column.rows, name).values_list("pk", name)

    def _source(self) -> Column:
        """Return where to read: later sweeps must see all that was written."""
        replica = self._options.replicas.get(self._column.database)
        if replica and self._shard.sweep == 1:
            return dataclasses.replace(self._column, database=replica)
        return self._column

    def _rest(self) -> None:
        """Leave time to all else that the database has to do, with signs of life."""
        if self._options.sleep:
            time.sleep(self._options.sleep)
        replica = self._options.replicas.get(self._column.database)
        if replica and self._options.max_lag is not None:
            while not self.stopped and (lag(replica) or 0.0) > self._options.max_lag:
                time.sleep(EVERY)
                self._beat()

    def _pages(self) -> Iterator[Page]:
        # By key, not by offset, so that the last page costs what the first does.
        rows = self._rows(self._source()).order_by("pk")
        if self._shard.upto:
            rows = rows.filter(pk__lte=shards.load(self._column, self._shard.upto))
        if start := self._shard.cursor or self._shard.after:
            page = rows.filter(pk__gt=shards.load(self._column, start))
        else:
            page = rows
        while not self.stopped and (found := list(page[: self._options.batch_size])):
            self._open.append(Page(found, found[-1][0], len(found)))
            yield self._open[-1]
            self._rest()
            page = rows.filter(pk__gt=found[-1][0])

    def _again(self, pks: list[Any]) -> Iterator[Page]:
        for start in range(0, len(pks), self._options.batch_size):
            some = pks[start : start + self._options.batch_size]
            found = list(self._rows(self._column).filter(pk__in=some))
            yield Page(found, None, len(found))

    def _rewrite(self, pages: Iterator[Page]) -> Generator[None, None, list[Any]]:
        """
        Rewrite the rows of all pages; return the keys of those overtaken.

        A page is read, others are in KMS, and what came of earlier ones is written, all at
        the same time.
        """
        overtaken: list[Any] = []
        tasks = (self._tasks(page) for page in pages)
        for outcomes in self._workers.map(tasks, ahead=2 * self._options.batch_size):
            overtaken += self._write(outcomes)
            if self._beat():
                yield
        return overtaken

    def _tasks(self, page: Page) -> list[tuple[tuple[Page, Any, str], Task]]:
        tasks = []
        for pk, value in page.rows:
            known, reason = self._bad.get((str(self._column), pk), (None, ""))
            if known == hash(value):
                self._report(pk, value, reason)
                continue
            try:
                if task := self._job.task(value):
                    tasks.append(((page, pk, value), task))
            except MalformedHash as error:
                self._report(pk, value, str(error))
        self._done(page, len(page.rows) - len(tasks))
        page.rows = []
        return tasks

    def _write(self, outcomes: list[Outcome]) -> list[Any]:
        """Record what was called and write what came of it; return the keys overtaken."""
        signals.emit_all([event for outcome in outcomes for event in outcome.events])
        changes: list[Change] = []
        pages: list[Page] = []
        failure: Exception | None = None
        for (page, pk, old), new, _ in outcomes:
            if new is DROPPED:
                continue
            if isinstance(new, Exception):
                if not isinstance(new, KMSHasherError) or not self._job.blames_row(old, new):
                    failure = new
                    continue
                self._report(pk, old, str(new))
            elif new is not None and self._width is not None and len(new) > self._width:
                # A database that is not strict would cut it, and the password be lost.
                self._report(pk, old, TOO_LONG)
            elif new is not None:
                changes.append(Change(pk, old, new))
            pages.append(page)
        changed = self._column.swap_all(changes) if changes else set()
        overtaken = [change.pk for change in changes if change.pk not in changed]
        self._shard.rewritten += len(changed)
        self._shard.overtaken += len(overtaken)
        for page in pages:
            self._done(page, 1)
        if failure:  # what else was paid for is written
            raise failure
        return overtaken

    def _done(self, page: Page, rows: int) -> None:
        page.left -= rows
        if page.last is not None:
            self._shard.looked += rows

    def _report(self, pk: Any, value: str, reason: str) -> None:
        self._bad[str(self._column), pk] = (hash(value), reason)
        name = shards.dump(pk)
        if name in self._named:  # by the worker that had the shard before
            return
        self._named.add(name)
        self._shard.failed += 1
        if len(self._shard.bad) < NAMED:
            self._shard.bad.append([name, reason])
