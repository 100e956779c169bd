"""
Walks the rows of all password columns and rewrites those that a job wants rewritten.

Rows are read in pages by primary key and changed in KMS, many at once; what comes back is
written by compare-and-swap, a hundred rows to a statement. The three overlap: the calling
thread has the database, another one KMS. Killed at any instant, every row holds its old
value or its new one, and the next run does the rest. Two runs at once cost calls and do no
harm.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from django.db.models import QuerySet

from kms_hasher import signals
from kms_hasher.columns import Change, Column
from kms_hasher.exceptions import KMSHasherError, MalformedHash, RotationRefused
from kms_hasher.rotation.runs import HEARTBEAT, Record
from kms_hasher.rotation.workers import Outcome, Task, Workers, patiently

#: Seconds between two snapshots of the progress.
EVERY = 0.25

#: So many sweeps in a row may find rows to rewrite and rewrite none.
FRUITLESS = 10

UNSTABLE = (
    "{number} sweeps in a row rewrote nothing, although there are rows to rewrite: each was "
    "changed meanwhile, or the database does not find it by the value it gave. Every "
    "password is as good as it was."
)
TOO_LONG = "the rewritten value is longer than the column"


class Job(Protocol):
    """What is done to rows."""

    #: Whether sweeps go on until one finds nothing; else one is all.
    until_clean: bool

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
    How a run goes about it.

    `concurrency` is how many calls are in flight at once, `rate` their number per second at
    the most, None for no limit; `settle` the
    seconds to wait for a moved alias before the last sweep.
    """

    batch_size: int = 500
    concurrency: int = 32
    rate: float | None = None
    settle: float = 5.0


@dataclass(frozen=True)
class BadRow:
    """A row that was left as it is, and why. The value is never told."""

    column: str
    pk: Any
    reason: str

    def __str__(self) -> str:
        return f"{self.column} pk={self.pk}: {self.reason}"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """
    How far a run is. The counts are of the whole run but for `looked`, which is of the
    sweep, and `failed`, the bad rows there are now; `bad` are those found since the last
    snapshot. `total` is how many rows were expected, `seconds` the time since the start.
    """

    sweep: int = 0
    looked: int = 0
    total: int = 0
    rewritten: int = 0
    overtaken: int = 0
    failed: int = 0
    calls: int = 0
    seconds: float = 0.0
    waiting: bool = False
    bad: tuple[BadRow, ...] = field(default=(), repr=False)

    @property
    def rate(self) -> float:
        """Calls per second."""
        return self.calls / self.seconds if self.seconds else 0.0

    @property
    def seconds_left(self) -> float | None:
        """The time the first sweep still takes, or None where that cannot be told."""
        if self.sweep != 1 or not self.looked:
            return None
        return max(self.total - self.looked, 0) * self.seconds / self.looked


def walk(
    job: Job,
    columns: Sequence[tuple[Column, int | None]],
    options: Options,
    record: Record,
    *,
    total: int = 0,
    settle: bool = False,
) -> Iterator[Progress]:
    """
    Do the job on all rows of the columns; yield the progress, at last the final one.

    Each column comes with the characters it holds, or None. With `settle`, a last sweep
    follows `options.settle` seconds after one that found nothing. Raises what the job does
    not blame on a row: KMS out of reach after all tries, access denied, a target that
    cannot be used; and `RotationRefused` if no row lets itself be written.
    """
    with Workers(options.concurrency, options.rate) as workers:
        run = _Run(job, options, record, workers, total)
        while True:
            found = yield from run.sweep(columns)
            if not found or not job.until_clean:
                if not settle:
                    break
                settle = False
                yield from run.wait(options.settle)
            patiently(job.check)
        yield run.snapshot()


class _Run:
    """One run while it is under way."""

    def __init__(
        self, job: Job, options: Options, record: Record, workers: Workers, total: int
    ) -> None:
        self._job, self._options, self._record, self._workers = job, options, record, workers
        self._total = total
        self._started = self._told = time.monotonic()
        self._sweep = self._looked = self._rewritten = self._overtaken = 0
        self._fruitless = 0
        self._waiting = False
        self._news: list[BadRow] = []
        # Bad rows and a hash of their values, which never leaves the process: one that has
        # not changed is not tried again in the next sweep.
        self._bad: dict[tuple[Column, Any], int] = {}
        self._bad_before = self._bad

    @property
    def _failed(self) -> int:
        return max(len(self._bad), len(self._bad_before))

    def snapshot(self) -> Progress:
        self._told = time.monotonic()
        news, self._news = tuple(self._news), []
        return Progress(
            sweep=self._sweep,
            looked=self._looked,
            total=self._total,
            rewritten=self._rewritten,
            overtaken=self._overtaken,
            failed=self._failed,
            calls=self._workers.calls,
            seconds=self._told - self._started,
            waiting=self._waiting,
            bad=news,
        )

    def sweep(
        self, columns: Sequence[tuple[Column, int | None]]
    ) -> Generator[Progress, None, bool]:
        """Go over all rows once; return whether there was one to rewrite."""
        rewritten, before = self._rewritten, self._rewritten + self._overtaken
        self._sweep += 1
        self._looked = 0
        self._bad_before, self._bad = self._bad, {}
        for column, width in columns:
            overtaken = yield from self._rewrite(column, width, self._pages(column))
            if overtaken:  # once more at once, and in the next sweep
                yield from self._rewrite(column, width, self._again(column, overtaken))
            yield self.snapshot()
        self._bad_before = {}
        found = self._rewritten + self._overtaken > before
        self._fruitless = self._fruitless + 1 if found and self._rewritten == rewritten else 0
        if self._fruitless == FRUITLESS:
            raise RotationRefused(UNSTABLE.format(number=FRUITLESS))
        return found

    def wait(self, seconds: float) -> Iterator[Progress]:
        """Let time pass, with signs of life."""
        self._waiting = True
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            yield self.snapshot()
            time.sleep(min(left, HEARTBEAT))
            self._beat()
        self._waiting = False

    def _rows(self, column: Column) -> QuerySet[Any]:
        name = column.field.attname
        return self._job.candidates(column.rows, name).values_list("pk", name)

    def _pages(self, column: Column) -> Iterator[list[tuple[Any, str]]]:
        # By key, not by offset, so that the last page costs what the first does.
        rows = self._rows(column).order_by("pk")
        page = list(rows[: self._options.batch_size])
        while page:
            yield page
            page = list(rows.filter(pk__gt=page[-1][0])[: self._options.batch_size])

    def _again(self, column: Column, pks: list[Any]) -> Iterator[list[tuple[Any, str]]]:
        for start in range(0, len(pks), self._options.batch_size):
            some = pks[start : start + self._options.batch_size]
            yield list(self._rows(column).filter(pk__in=some))

    def _rewrite(
        self, column: Column, width: int | None, pages: Iterator[list[tuple[Any, str]]]
    ) -> Generator[Progress, None, list[Any]]:
        """
        Rewrite the rows of all pages; return the keys of those overtaken.

        A page is read, others are in KMS, and what came of earlier ones is written, all at
        the same time.
        """
        overtaken: list[Any] = []
        tasks = (self._tasks(column, page) for page in pages)
        for outcomes in self._workers.map(tasks, ahead=2 * self._options.batch_size):
            overtaken += self._write(column, width, outcomes)
            self._beat()
            if time.monotonic() - self._told >= EVERY:
                yield self.snapshot()
        return overtaken

    def _tasks(
        self, column: Column, page: list[tuple[Any, str]]
    ) -> list[tuple[tuple[Any, str], Task]]:
        tasks = []
        for pk, value in page:
            if self._bad_before.get((column, pk)) == hash(value):
                self._bad[column, pk] = hash(value)
                continue
            try:
                if task := self._job.task(value):
                    tasks.append(((pk, value), task))
            except MalformedHash as error:
                self._report(column, pk, value, str(error))
        self._looked += len(page) - len(tasks)
        return tasks

    def _write(self, column: Column, width: int | None, outcomes: list[Outcome]) -> list[Any]:
        """Record what was called and write what came of it; return the keys overtaken."""
        signals.emit_all([event for outcome in outcomes for event in outcome.events])
        changes: list[Change] = []
        failure: Exception | None = None
        for (pk, old), new, _ in outcomes:
            self._looked += 1
            if isinstance(new, Exception):
                if isinstance(new, KMSHasherError) and self._job.blames_row(old, new):
                    self._report(column, pk, old, str(new))
                else:
                    failure = new
            elif new is None:
                pass
            elif width is not None and len(new) > width:
                # A database that is not strict would cut it, and the password be lost.
                self._report(column, pk, old, TOO_LONG)
            else:
                changes.append(Change(pk, old, new))
        changed = column.swap_all(changes) if changes else set()
        overtaken = [change.pk for change in changes if change.pk not in changed]
        self._rewritten += len(changed)
        self._overtaken += len(overtaken)
        if failure:  # what else was paid for is written
            raise failure
        return overtaken

    def _report(self, column: Column, pk: Any, value: str, reason: str) -> None:
        self._bad[column, pk] = hash(value)
        self._news.append(BadRow(str(column), pk, reason))

    def _beat(self) -> None:
        self._record.beat(
            rewritten=self._rewritten, overtaken=self._overtaken, failed=self._failed
        )
