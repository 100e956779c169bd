"""
Calls to KMS, many at once, at a limited rate, tried again where KMS cannot answer.

They are made on an event loop in a thread of its own, where a call in flight costs next to
nothing. Nothing there touches the database: what the calls report is held back, and comes
with the outcome to the thread that writes.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, NamedTuple, TypeAlias, TypeVar

from kms_hasher import keyring, signals
from kms_hasher.exceptions import AuditError, KMSUnavailable
from kms_hasher.rotation.pace import MOST, PERIOD, Pace

T = TypeVar("T")

#: Makes one call to KMS; comes to the string to store, or None for nothing to store.
Task: TypeAlias = "Callable[[], Awaitable[str | None]]"

#: How often a call is made at most while KMS cannot answer, besides the provider's own
#: attempts, and the bounds of the pause between two in seconds: it doubles.
TRIES = 5
FIRST_PAUSE = 0.5
LONGEST_PAUSE = 8.0

#: Outcomes are handed over when there are so many, or after so many seconds.
BATCH = 100
GATHER = 0.05

#: Seconds after which nothing is handed over, so that the caller can give a sign of life.
PATIENCE = 1.0


#: What comes of a task that was never begun.
DROPPED = object()


class Outcome(NamedTuple):
    """
    What came of a task: the string or None, the error, or `DROPPED`; and what the call
    reported.
    """

    item: Any
    value: Any
    events: list[signals.Event]


class Workers:
    """
    Do tasks, `number` of them at once, or as many as bring something. A context manager.

    On leaving it, calls in flight are waited for and their events emitted, as KMS has made
    them; what they come to is not stored, and the rows are as they were.
    """

    def __init__(self, number: int | None, rate: float | None = None) -> None:
        self._most = number or MOST
        self._pace = Pace(number, rate)
        self._waiting: deque[tuple[Any, Task]] = deque()
        self._running: set[Any] = set()
        self._gathered: list[Outcome] = []
        self._done: SimpleQueue[list[Outcome]] = SimpleQueue()
        self._unseen_errors = 0
        self._broken: BaseException | None = None
        self._stopped = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="kms-hasher", daemon=True)

    @property
    def calls(self) -> int:
        """How many calls were made, those made again included."""
        return self._pace.calls

    def limit(self, rate: float | None) -> None:
        """Let calls through at most at this rate from now on, None for no limit."""
        self._pace.limit(rate)

    def drop(self) -> None:
        """Begin none of the tasks that wait: each comes to `DROPPED`."""
        self._loop.call_soon_threadsafe(self._drop)

    def __enter__(self) -> Workers:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with contextlib.suppress(RuntimeError):  # it has ended
            self._loop.call_soon_threadsafe(self._stop)
        self._thread.join()
        left = list(self._gathered)
        while not self._done.empty():
            left += self._done.get()
        with contextlib.suppress(AuditError):  # nothing of them is used
            signals.emit_all([event for outcome in left for event in outcome.events])

    def map(
        self, pages: Iterator[Sequence[tuple[Any, Task]]], *, ahead: int = 1000
    ) -> Iterator[list[Outcome]]:
        """
        Do all tasks; yield what they come to, some at a time and in no order, and now and
        then nothing.

        The next page is taken while at most `ahead` tasks are not done: reading, calling
        and what the caller does with the outcomes overlap. After an error no call is begun
        before the caller has seen it and asks for more.
        """
        left = 0
        page: Sequence[tuple[Any, Task]] | None = ()
        while True:
            while page is not None and left <= ahead:
                page = next(pages, None)
                if page:
                    left += len(page)
                    self._loop.call_soon_threadsafe(self._submit, page)
            if not left:
                return
            try:
                outcomes = self._done.get(timeout=PATIENCE)
            except Empty:
                outcomes = []
            if self._broken:
                raise self._broken
            left -= len(outcomes)
            yield outcomes
            if errors := sum(isinstance(outcome.value, Exception) for outcome in outcomes):
                self._loop.call_soon_threadsafe(self._go_on, errors)

    # --- in the thread of the event loop ------------------------------------------

    def _run(self) -> None:
        loop = self._loop
        asyncio.set_event_loop(loop)
        # For providers that know no event loop.
        loop.set_default_executor(ThreadPoolExecutor(self._most, "kms-hasher-call"))
        try:
            loop.run_until_complete(self._serve())
        except BaseException as error:  # noqa: BLE001  # the calling thread raises it
            self._broken = error
        finally:
            self._done.put([])  # nobody is to wait for more
            loop.close()

    async def _serve(self) -> None:
        while await self._pause(PERIOD):
            self._pace.look()
            self._start()
        await asyncio.gather(*self._running)
        if close := getattr(keyring.provider(), "aclose", None):
            await close()
        await asyncio.get_running_loop().shutdown_default_executor()

    def _stop(self) -> None:
        self._waiting.clear()
        self._stopped.set()

    async def _pause(self, seconds: float) -> bool:
        """Sleep; return False, at once, if all is to end."""
        try:
            await asyncio.wait_for(self._stopped.wait(), seconds)
        except asyncio.TimeoutError:
            return True
        return False

    def _submit(self, page: Sequence[tuple[Any, Task]]) -> None:
        self._waiting.extend(page)
        self._start()

    def _drop(self) -> None:
        self._gathered += [Outcome(item, DROPPED, []) for item, _ in self._waiting]
        self._waiting.clear()
        self._hand_over()

    def _go_on(self, errors: int) -> None:
        self._unseen_errors -= errors
        self._start()

    def _start(self) -> None:
        while (
            not self._unseen_errors and self._waiting and len(self._running) < self._pace.number
        ):
            running = self._loop.create_task(self._do(*self._waiting.popleft()))
            self._running.add(running)

    async def _do(self, item: Any, task: Task) -> None:
        turns: list[None] = []
        with signals.held() as events:
            value = await self._outcome(task, turns)
        self._running -= {asyncio.current_task()}
        self._pace.note(events, len(turns))
        self._gathered.append(Outcome(item, value, events))
        self._unseen_errors += isinstance(value, Exception)
        more = self._running or (self._waiting and not self._unseen_errors)
        if len(self._gathered) >= BATCH or not more:
            self._hand_over()
        elif len(self._gathered) == 1:
            self._loop.call_later(GATHER, self._hand_over)
        self._start()

    def _hand_over(self) -> None:
        if self._gathered:
            self._done.put(self._gathered)
            self._gathered = []

    async def _outcome(self, task: Task, turns: list[None]) -> str | Exception | None:
        pauses = _pauses()
        while True:
            turns.append(None)
            seconds = self._pace.turn()
            if seconds > 0 and not await self._pause(seconds):
                return None
            try:
                return await task()
            except KMSUnavailable as error:
                if not pauses or not await self._pause(pauses.pop(0)):
                    return error.with_traceback(None)
            except Exception as error:  # noqa: BLE001  # the calling thread raises it
                # Without these frames, which may hold what is to be sealed.
                return error.with_traceback(None)


def patiently(call: Callable[[], T]) -> T:
    """
    Make one call here, again where KMS cannot answer; return what it gives.

    Raises what it raises at last.
    """
    pauses = _pauses()
    while True:
        try:
            return call()
        except KMSUnavailable:
            if not pauses:
                raise
            time.sleep(pauses.pop(0))


def _pauses() -> list[float]:
    """Return the pauses between tries, in seconds: exponential, with jitter."""
    longest = (min(FIRST_PAUSE * 2**n, LONGEST_PAUSE) for n in range(TRIES - 1))
    return [seconds * random.uniform(0.5, 1) for seconds in longest]  # noqa: S311
