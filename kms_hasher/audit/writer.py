"""
The thread that writes events, on a connection of its own.

What it commits stands, whatever becomes of the transaction of the caller, and a caller on an
event loop, where the ORM refuses to work, may hand it events too. A caller waits until its
events are committed, or leaves them: then they are held back for a moment, to be committed
with others.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from concurrent.futures import TimeoutError as FutureTimeout
from typing import NamedTuple

from django.db import InterfaceError, OperationalError, connections

from kms_hasher.signals import Event

#: Seconds that a call waits for its event to be committed.
WAIT = 5.0

#: Seconds without an event after which the connection is given up.
IDLE = 60.0

#: How many events one commit may hold, beyond those of its first call.
MAX_BATCH = 5_000

#: Events that nobody waits for are committed once there are so many, or the first of them
#: has been held for so many seconds. While the database is out they are tried as often.
FLUSH_SIZE, FLUSH_AGE = 1_000, 1.0

#: How many of them may be held. Beyond that, callers wait.
MAX_HELD = 10_000

Write = Callable[[Sequence[Event]], None]


class _Job(NamedTuple):
    events: Sequence[Event]
    future: Future[None]
    held: bool  # nobody waits


class Writer:
    """A thread that calls `write` with the events that are put, in the order they came."""

    def __init__(self, write: Write) -> None:
        self._write = write
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._wanted = threading.Event()  # somebody waits, or there is enough to be done
        self._hanging: Future[None] | None = None
        #: Whether what was written last could not be.
        self.failing = False
        # Held events that came and went; each number has one thread that changes it, the
        # first under `_lock`.
        self._came = self._went = 0
        self._late: list[_Job] = []
        self._out = False  # the database could not be reached
        # A daemon, so that it outlives the threads that need it; close() ends it.
        self._thread = threading.Thread(target=self._run, name="kms_hasher-audit", daemon=True)
        self._thread.start()

    def put(self, events: Sequence[Event]) -> Future[None]:
        """Return a future that is done when the events are committed, or holds the error."""
        if self._hanging and not self._hanging.done():
            raise FutureTimeout("the database still does not answer")
        future: Future[None] = Future()
        self._jobs.put(_Job(events, future, held=False))
        self._wanted.set()
        return future

    def hold(self, events: Sequence[Event]) -> Future[None] | None:
        """
        Return the same, to be done before long, or None if too many are held.

        While the database is out they go on being held.
        """
        held = self._came - self._went + len(events)
        if held > MAX_HELD:
            return None
        future: Future[None] = Future()
        self._came += len(events)
        self._jobs.put(_Job(tuple(events), future, held=True))
        if held >= FLUSH_SIZE and not self._out:
            self._wanted.set()
        return future

    def wait(self, future: Future[None]) -> None:
        """
        Return when the events are committed. Raises what kept them from being so.

        Events given up while they waited for their turn are not written later.
        """
        try:
            future.result(WAIT)
        except FutureTimeout:
            if not future.cancel() and not future.done():
                self._hanging = future  # the calls after this one need not wait as long
            raise FutureTimeout(f"no answer from the database in {WAIT:g} s") from None

    def close(self) -> None:
        """Write what was put and close the connection. Nothing may be put afterwards."""
        self._jobs.put(None)
        self._wanted.set()
        self._thread.join(WAIT)
        if self._thread.is_alive():
            error = FutureTimeout(f"no answer from the database in {WAIT:g} s")
            with contextlib.suppress(queue.Empty):
                while True:
                    if job := self._jobs.get_nowait():
                        self._late.append(job)
            self._fail([job for job in self._late if job.held], error)
            self._jobs.put(None)  # taken out with the others

    def _run(self) -> None:
        going = True
        while going:
            going = self._take()
            self._late = self._commit(self._late)
            self._out = bool(self._late)
        self._fail(self._late, FutureTimeout("the database was out to the end"))
        connections.close_all()

    def _take(self) -> bool:
        """Add to `_late` what is to be committed now. Return whether there may be more."""
        going, size = True, 0
        if not self._late:
            going = self._add(self._next())
        if going and all(job.held for job in self._late):
            self._wanted.wait(FLUSH_AGE)
        self._wanted.clear()
        # What came in meanwhile is committed at once: one commit for many calls.
        while going and size < MAX_BATCH and not self._jobs.empty():
            going = self._add(self._jobs.get())
            size += len(self._late[-1].events) if self._late else 0
        if not self._jobs.empty():
            self._wanted.set()
        return going

    def _add(self, job: _Job | None) -> bool:
        if job and job.future.set_running_or_notify_cancel():
            self._late.append(job)
        return job is not None

    def _next(self) -> _Job | None:
        try:
            return self._jobs.get(timeout=IDLE)
        except queue.Empty:
            connections.close_all()
            return self._jobs.get()

    def _commit(self, jobs: list[_Job]) -> list[_Job]:
        """Write the events of all jobs. Return those to be tried again."""
        if not jobs:
            return []
        try:
            self._try([event for job in jobs for event in job.events])
        except Exception as error:  # noqa: BLE001  # raised where the event is waited for
            self.failing = True
            if isinstance(error, (OperationalError, InterfaceError)) and _database_is_out():
                self._fail([job for job in jobs if not job.held], error)
                return [job for job in jobs if job.held]
            if len(jobs) > 1:  # events that cannot be written fail alone
                half = len(jobs) // 2
                return self._commit(jobs[:half]) + self._commit(jobs[half:])
            self._fail(jobs, error)
        else:
            self.failing = False
            for job in jobs:
                self._end(job, None)
        return []

    def _fail(self, jobs: Sequence[_Job], error: BaseException) -> None:
        for job in jobs:
            self._end(job, error)

    def _end(self, job: _Job, error: BaseException | None) -> None:
        if job.held:
            self._went += len(job.events)
        with contextlib.suppress(InvalidStateError):  # given up while it was written
            if error is None:
                job.future.set_result(None)
            else:
                job.future.set_exception(error)

    def _try(self, events: Sequence[Event]) -> None:
        stale = False
        for connection in connections.all(initialized_only=True):
            # Django's 0 means "one request"; ours is "until nothing was written for IDLE".
            if connection.settings_dict["CONN_MAX_AGE"]:
                connection.close_if_unusable_or_obsolete()
            stale = stale or connection.connection is not None
        try:
            self._write(events)
        except (OperationalError, InterfaceError):
            if not stale:
                raise
            # The server or something on the way has hung up on us since the last event.
            connections.close_all()
            self._write(events)


def _database_is_out() -> bool:
    return any(
        connection.connection is None or not connection.is_usable()
        for connection in connections.all(initialized_only=True)
    )


# --- one thread for each way to write, made when it is first needed -----------------

_lock = threading.RLock()
_writers: dict[Write, Writer] = {}


def submit(write: Write, events: Sequence[Event]) -> Future[None]:
    """Have `write` called with the events, in its own thread."""
    with _lock:  # nothing is put to a writer that is being closed
        return _writer(write).put(events)


def submit_and_wait(write: Write, events: Sequence[Event]) -> None:
    """Have `write` called with the events in its own thread, and return when it has been."""
    with _lock:
        writer = _writer(write)
        future = writer.put(events)
    writer.wait(future)


def hold(
    write: Write,
    events: Sequence[Event],
    failed: Callable[[BaseException], object],
    *,
    strict: bool = False,
) -> None:
    """
    Have `write` called with the events before long; `failed` gets what kept it from being so.

    Where too many are held, or with `strict` while writing fails, it is `submit_and_wait`.
    """
    with _lock:
        writer = _writer(write)
        future = None if strict and writer.failing else writer.hold(events)
    if future is None:
        submit_and_wait(write, events)
    else:
        future.add_done_callback(
            lambda done: failed(problem) if (problem := done.exception()) else None
        )


def _writer(write: Write) -> Writer:
    if write not in _writers:
        _writers[write] = Writer(write)
    return _writers[write]


def close_all() -> None:
    """Write what was submitted, end the threads and close their connections."""
    with _lock:
        for writer in _writers.values():
            writer.close()
        _writers.clear()


def _before_fork() -> None:
    # A child must not inherit a connection: closing its copy would end the parent's.
    _lock.acquire()
    close_all()


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.RLock()
    _writers.clear()


os.register_at_fork(
    before=_before_fork,
    after_in_parent=lambda: _lock.release(),
    after_in_child=_after_fork_in_child,
)
