"""
What a re-wrap of a hundred million passwords would take, by the formula and by a simulation.

    python -m benchmarks.simulation [--users 100000000] [--share 50] [--per-process 2000]

The tables come of `kms_hasher.rotation.estimate`. No KMS and no database is asked; only the
default of --per-process is measured, by benchmarks.rotation. They are in Markdown, as they
stand in docs/explanation/rotation-at-scale.md.

The simulation does what the formula leaves out, for fewer rows: every call has a latency of
its own (log-normal, with the mean asked for) and waits for the processor of its process; KMS
refuses what exceeds the quota (a token bucket that holds a second's worth), and the call is
made again after a pause that doubles; processes are killed at random, lose the calls in
flight and what was not yet written, and start again after a while; what they had claimed is
free again when their lease has run out. The same seed gives the same figures.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import math
import random
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import django
from django.conf import settings

from benchmarks import stub

if not settings.configured:
    settings.configure(**stub.project())
    django.setup()

from kms_hasher.rotation.estimate import PER_PROCESS, ROWS_PER_STATEMENT, Estimate, estimate

QUOTAS = (10_000, 20_000, 100_000)
LATENCIES = (0.002, 0.005, 0.010, 0.025, 0.050)
FLYING = (8, 32, 64)
MACHINES = (1, 2, 5, 20)

#: The spread of latencies: with 0.5 one call in a hundred takes 2.8 times the mean.
SIGMA = 0.5

#: So many runs with kills are simulated, because the moment of the last one decides much.
KILLED = 12

#: Seconds before a call that KMS has refused is made again: the first time, and at most.
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 8.0


# --- the tables -----------------------------------------------------------------------


def duration(seconds: float) -> str:
    """Return seconds as in "2 h 47 min"."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    if minutes < 120:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02} min"
    return f"{hours // 24} d {hours % 24} h"


def table(head: Sequence[str], rows: Iterable[Iterable[object]]) -> None:
    for cells in (head, ["---"] * len(head), *rows):
        print("| " + " | ".join(map(str, cells)) + " |")
    print(flush=True)


def tables(options: argparse.Namespace) -> None:
    latency = options.latency / 1000
    one = partial(
        estimate,
        options.users,
        latency=latency,
        concurrency=options.concurrency,
        per_process=options.per_process,
    )
    print(
        f"{options.users:,} users; {options.share:g} % of the quota at the most; a process "
        f"makes {options.per_process:,g} calls a second at the most and has "
        f"{options.concurrency} in flight; KMS answers in {options.latency:g} ms. "
        f"{one().money:,.2f} USD if a ReEncrypt counts once, "
        f"{one(requests_per_call=2).money:,.2f} USD if it counts twice.\n"
    )
    rows: list[list[object]] = []
    for quota in QUOTAS:
        cap = quota * options.share / 100
        processes = math.ceil(cap / one(quota=10**9).rate)
        found = one(quota=quota, rate=cap, processes=processes)
        rows.append(
            [f"{quota:,}", f"{cap:,.0f}", processes, duration(found.seconds), usd(found)]
        )
    head = ["quota, requests/s", "`--rate`", "processes needed", "time", "money"]
    table(head, rows)

    rows = []
    for each in LATENCIES:
        enough = math.ceil(each * options.per_process + 1)
        row: list[object] = [f"{each * 1000:g} ms", enough]
        for flying in FLYING:
            found = one(
                latency=each, concurrency=flying, processes=options.processes, quota=10**9
            )
            row.append(cell(found))
        rows.append([*row, usd(found)])
    print(f"One machine of {options.processes} processes, whatever the quota:\n")
    head = ["latency", "enough in flight", *(f"{flying} in flight" for flying in FLYING)]
    table([*head, "money"], rows)

    rows = []
    for machines in MACHINES:
        row = [machines, machines * options.processes]
        for quota in QUOTAS:
            cap = quota * options.share / 100
            found = one(quota=quota, rate=cap, processes=machines * options.processes)
            row.append(cell(found))
        rows.append([*row, usd(found)])
    table(["machines", "processes", *(f"quota {quota:,}" for quota in QUOTAS), "money"], rows)


def cell(found: Estimate) -> str:
    return f"{duration(found.seconds)} ({found.rate:,.0f}/s, {found.bound})"


def usd(found: Estimate) -> str:
    return f"{found.money:,.2f} USD"


# --- the simulation -------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One run to be simulated. Times in seconds; `kill_every` is a mean, 0 for never."""

    name: str
    latency: float
    concurrency: int
    processes: int
    per_process: float
    rate: float | None = None
    quota: int = 10_000
    kill_every: float = 0.0
    lease: float = 30.0
    restart: float = 5.0
    chunk: int = 500

    def expected(self, rows: int) -> tuple[Estimate, float]:
        """
        Return the estimate, and its seconds with the kills counted in.

        A kill takes `restart` seconds of one process, and its calls in flight, and half a
        statement's worth on average that was not yet written, are made again. At the end
        the rest of the last lease is waited for; the kill was an exponential time before.
        """
        found = estimate(
            rows,
            latency=self.latency,
            concurrency=self.concurrency,
            processes=self.processes,
            rate=self.rate,
            quota=self.quota,
            per_process=self.per_process,
        )
        if not self.kill_every:
            return found, found.seconds
        idle = self.restart / (self.kill_every * self.processes + self.restart)
        again = (self.concurrency + ROWS_PER_STATEMENT / 2) / self.kill_every
        wait = self.lease - self.kill_every * -math.expm1(-self.lease / self.kill_every)
        return found, rows / (found.rate - again) / (1 - idle) + wait


@dataclass
class Process:
    """A process: the rows it has claimed, and how often it was started."""

    claimed: int = 0
    unwritten: int = 0
    flying: int = 0
    life: int = 0
    up: bool = True
    cpu_free: float = 0.0
    turn: float = 0.0
    idle: int = 0


@dataclass
class Simulation:
    """One run, from the first call until the last row is written."""

    case: Case
    rows: int
    seed: int
    now: float = 0.0
    calls: int = 0
    throttled: int = 0
    kills: int = 0
    written: int = 0
    _events: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        case = self.case
        self._random = random.Random(self.seed)
        self._order = itertools.count()
        self._free = self.rows
        self._tokens, self._filled = float(case.quota), 0.0
        self._spacing = case.processes / case.rate if case.rate else 0.0
        self._mu = math.log(case.latency) - SIGMA**2 / 2
        self._processes = [Process() for _ in range(case.processes)]

    def run(self) -> Simulation:
        """Simulate it; `now` is how long it took."""
        for process in self._processes:
            self._start(process)
        if self.case.kill_every:
            self._at(self._random.expovariate(1 / self.case.kill_every), self._kill)
        while self.written < self.rows:
            self.now, _, event = heapq.heappop(self._events)
            event()
        return self

    def _at(self, moment: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (moment, next(self._order), event))

    def _start(self, process: Process) -> None:
        process.up, process.idle = True, 0
        process.cpu_free = process.turn = self.now
        for _ in range(self.case.concurrency):
            self._next(process)

    def _next(self, process: Process) -> None:
        """Let a slot of the process take a row, or wait until there is one."""
        if not process.claimed:
            process.claimed = min(self.case.chunk, self._free)
            self._free -= process.claimed
        if not process.claimed:
            process.idle += 1
            if process.idle == self.case.concurrency:  # nothing more comes: it is written
                self._write(process)
            return
        process.claimed -= 1
        process.flying += 1
        self._call(process, process.life, FIRST_PAUSE)

    def _call(self, process: Process, life: int, pause: float) -> None:
        if life != process.life:
            return
        cost = self._random.uniform(0.5, 1.5) / self.case.per_process
        process.cpu_free = max(self.now, process.cpu_free) + cost
        sent = process.cpu_free
        if self._spacing:
            sent = max(sent, process.turn)
            process.turn = sent + self._spacing
        self._at(sent, partial(self._arrive, process, life, pause))

    def _arrive(self, process: Process, life: int, pause: float) -> None:
        """KMS gets the call, and answers or refuses it."""
        if life != process.life:
            return
        self.calls += 1
        took = self._random.lognormvariate(self._mu, SIGMA)
        quota = self.case.quota
        self._tokens = min(quota, self._tokens + (self.now - self._filled) * quota)
        self._filled = self.now
        if self._tokens >= 1:
            self._tokens -= 1
            self._at(self.now + took, partial(self._done, process, life))
        else:
            self.throttled += 1
            again = self.now + took + pause * self._random.uniform(0.5, 1.0)
            later = min(2 * pause, LONGEST_PAUSE)
            self._at(again, partial(self._call, process, life, later))

    def _done(self, process: Process, life: int) -> None:
        if life != process.life:
            return
        process.flying -= 1
        process.unwritten += 1
        if process.unwritten == ROWS_PER_STATEMENT:
            self._write(process)
        self._next(process)

    def _write(self, process: Process) -> None:
        self.written += process.unwritten
        process.unwritten = 0

    def _kill(self) -> None:
        case, process = self.case, self._random.choice(self._processes)
        self._at(self.now + self._random.expovariate(1 / case.kill_every), self._kill)
        if not process.up:
            return
        self.kills += 1
        lost = process.claimed + process.flying + process.unwritten
        process.claimed = process.flying = process.unwritten = 0
        process.life += 1
        process.up = False
        self._at(self.now + case.lease, partial(self._expire, lost))
        self._at(self.now + case.restart, partial(self._start, process))

    def _expire(self, rows: int) -> None:
        """What a killed process had claimed is free again; who has nothing to do takes it."""
        self._free += rows
        for process in self._processes:
            idle, process.idle = (process.idle if process.up else 0), 0
            for _ in range(idle):
                self._next(process)


def cases(per_process: float) -> list[Case]:
    make = partial(Case, per_process=per_process)
    return [
        make("bound by latency", 0.050, 16, 2),
        make("bound by the processor", 0.005, 64, 2),
        make("both bounds alike", 0.025, 28, 2),
        make("capped at 500/s", 0.010, 32, 4, rate=500),
        make("no cap, quota 1,000/s", 0.010, 64, 2, quota=1000),
        make("a kill every 20 s", 0.010, 64, 2, kill_every=20),
        make("capped, a kill every 20 s", 0.010, 32, 4, rate=500, kill_every=20),
    ]


def simulate(options: argparse.Namespace) -> None:
    rows = []
    for case in cases(options.per_process):
        found, expected = case.expected(options.rows)
        number = KILLED if case.kill_every else 1
        seeds = range(options.seed, options.seed + number)
        runs = [Simulation(case, options.rows, seed).run() for seed in seeds]
        took = statistics.fmean(run.now for run in runs)
        rows.append(
            [
                case.name,
                f"{case.processes} x {case.concurrency}, {case.latency * 1000:g} ms",
                found.bound,
                f"{expected:,.1f} s",
                f"{took:,.1f} s",
                f"{(took / expected - 1) * 100:+.1f} %",
                f"{sum(run.calls for run in runs) / number / options.rows:.3f}",
                f"{sum(run.kills for run in runs) / number:.1f}",
            ]
        )
    print(
        f"{options.rows:,} rows, seed {options.seed}; with kills the mean of {KILLED} runs:\n"
    )
    head = ["run", "processes x in flight, latency", "bound by", "formula", "simulated"]
    table([*head, "difference", "calls a row", "kills"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.simulation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = partial(parser.add_argument, help="(default: %(default)s)")
    add("--users", type=int, default=100_000_000)
    add("--share", type=float, default=50, help="of the quota, in %% (default: %(default)s)")
    add("--per-process", type=float, default=PER_PROCESS, help="calls/s (default: %(default)s)")
    add("--concurrency", type=int, default=64, help="of a process (default: %(default)s)")
    add("--latency", type=float, default=10, help="of KMS, in ms (default: %(default)s)")
    add("--processes", type=int, default=4, help="on a machine (default: %(default)s)")
    add("--rows", type=int, default=500_000, help="simulated (default: %(default)s)")
    add("--seed", type=int, default=1)
    options = parser.parse_args()
    tables(options)
    simulate(options)


if __name__ == "__main__":
    main()
