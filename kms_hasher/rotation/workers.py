"""
Calls to KMS from several threads, at a limited rate, tried again where KMS cannot answer.
"""

from __future__ import annotations

import functools
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue
from types import TracebackType
from typing import TypeAlias, TypeVar

from django.db import connections

from kms_hasher.exceptions import KMSUnavailable

T = TypeVar("T")

#: One call to KMS, and what came of it: the string to store, None for nothing to store, or
#: the error.
Task: TypeAlias = "Callable[[], str | None]"
Outcome: TypeAlias = "str | Exception | None"

#: How often a call is made at most while KMS cannot answer, besides the provider's own
#: attempts, and the bounds of the pause between two in seconds: it doubles.
TRIES = 5
FIRST_PAUSE = 0.5
LONGEST_PAUSE = 8.0


class Limiter:
    """
    Spaces calls evenly: at most `rate` in a second over all threads, with no bursts.

    `rate` None is no limit. `calls` is how many calls were let through.
    """

    def __init__(self, rate: float | None, sleep: Callable[[float], object]) -> None:
        self.calls = 0
        self._interval = 1 / rate if rate else 0.0
        self._next = 0.0
        self._lock = threading.Lock()
        self._sleep = sleep

    def wait(self) -> None:
        """Return when the next call may be made."""
        with self._lock:
            self.calls += 1
            if not self._interval:
                return
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + self._interval
        if turn > now:
            self._sleep(turn - now)


class Workers:
    """
    `number` threads that run the tasks given to `map`; with 1, the calling thread does.

    A context manager. On leaving it the threads end after the call each is in, and close
    whatever database connections the receivers of `kms_event` opened there.
    """

    def __init__(self, number: int, rate: float | None = None) -> None:
        self._stopped = threading.Event()
        self._limiter = Limiter(rate, self._stopped.wait)
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"kms-hasher-{index}", daemon=True)
            for index in range(number if number > 1 else 0)
        ]

    @property
    def calls(self) -> int:
        """How many calls were made, those made again included."""
        return self._limiter.calls

    def __enter__(self) -> Workers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stopped.set()
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def map(self, tasks: Sequence[tuple[T, Task]]) -> Iterator[tuple[T, Outcome]]:
        """Do all tasks; yield what each was given with and came to, as they are done."""
        if not self._threads:
            for item, task in tasks:
                yield item, self._outcome(task)
            return
        done: SimpleQueue[tuple[T, Outcome]] = SimpleQueue()
        for item, task in tasks:
            self._jobs.put(functools.partial(self._put, done, item, task))
        for _ in tasks:
            yield done.get()

    def _put(self, done: SimpleQueue[tuple[T, Outcome]], item: T, task: Task) -> None:
        done.put((item, self._outcome(task)))

    def _work(self) -> None:
        try:
            while job := self._jobs.get():
                if not self._stopped.is_set():
                    job()
        finally:
            connections.close_all()

    def call(self, task: Callable[[], None]) -> None:
        """Do one task here, outside the rate and the count. Raises what it raises at last."""
        error = self._outcome(task, wait=lambda: None)
        if isinstance(error, Exception):
            raise error

    def _outcome(self, task: Task, wait: Callable[[], None] | None = None) -> Outcome:
        pauses = _pauses()
        while True:
            (wait or self._limiter.wait)()
            try:
                return task()
            except KMSUnavailable as error:
                if not pauses or self._stopped.wait(pauses.pop(0)):
                    return error
            except Exception as error:  # noqa: BLE001  # the calling thread raises it
                return error


def _pauses() -> list[float]:
    """Return the pauses between tries, in seconds: exponential, with jitter."""
    longest = (min(FIRST_PAUSE * 2**n, LONGEST_PAUSE) for n in range(TRIES - 1))
    return [seconds * random.uniform(0.5, 1) for seconds in longest]  # noqa: S311
