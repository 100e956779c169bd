"""
The places where events can be written from: here, later, or a thread of its own.

What the thread commits stands, whatever becomes of the transaction of the caller that waits
for it, and a caller on an event loop, where the ORM refuses to work, may wait for it too.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout

from django.db import InterfaceError, OperationalError, connections, router, transaction
from django.db.models import Model

from kms_hasher.signals import Event

#: Seconds that a call waits for its event to be committed.
WAIT = 5.0

#: Seconds without an event after which the connection is given up.
IDLE = 60.0

#: How many logins' events one commit may hold.
MAX_BATCH = 100

HERE, LATER, THREAD = "here", "later", "thread"

Write = Callable[[Sequence[Event]], None]


def place(mode: str, model: type[Model]) -> str:
    """Return where a row of the model is to be written from now, in that mode of `AUDIT`."""
    connection = connections[router.db_for_write(model)]
    sqlite = connection.vendor == "sqlite"
    if mode == "durable" and not sqlite:
        return THREAD
    in_memory = sqlite and connection.is_in_memory_db()  # type: ignore[attr-defined]
    # A test's transaction, and a database in memory, are out of reach of new connections.
    bound = in_memory or mode == "inline"
    if _on_event_loop():
        return LATER if bound else THREAD
    if connection.connection is None:
        main = threading.current_thread() is threading.main_thread()
        return LATER if bound and not main else HERE
    between = connection.autocommit and not connection.in_atomic_block
    return HERE if between or mode == "inline" else LATER


def _on_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def write_here(model: type[Model], write: Write, events: Sequence[Event]) -> None:
    """Write on the current thread's connection, and leave the connection as it was."""
    connection = connections[router.db_for_write(model)]
    unused = connection.connection is None
    try:
        # Within a transaction a savepoint keeps a failure from breaking it.
        inside = connection.in_atomic_block
        with transaction.atomic(connection.alias) if inside else contextlib.nullcontext():
            write(events)
    finally:
        if unused:
            connection.close()


_Job = tuple[Sequence[Event], "Future[None]"]


class Writer:
    """A thread that calls `write` with the events that are put, in the order they came."""

    def __init__(self, write: Write) -> None:
        self._write = write
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._hanging: Future[None] | None = None
        # A daemon, so that it outlives the threads that need it; close() ends it.
        self._thread = threading.Thread(target=self._run, name="kms_hasher-audit", daemon=True)
        self._thread.start()

    def put(self, events: Sequence[Event]) -> Future[None]:
        """Return a future that is done when the events are committed, or holds the error."""
        if self._hanging and not self._hanging.done():
            raise FutureTimeout("the database still does not answer")
        future: Future[None] = Future()
        self._jobs.put((events, future))
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
        self._thread.join(WAIT)

    def _run(self) -> None:
        going = True
        while going:
            jobs = [self._next()]
            # What came in meanwhile is committed at once: one commit for many calls.
            while len(jobs) < MAX_BATCH and not self._jobs.empty():
                jobs.append(self._jobs.get())
            going = None not in jobs
            self._commit([j for j in jobs if j and j[1].set_running_or_notify_cancel()])
        connections.close_all()

    def _next(self) -> _Job | None:
        try:
            return self._jobs.get(timeout=IDLE)
        except queue.Empty:
            connections.close_all()
            return self._jobs.get()

    def _commit(self, jobs: Sequence[_Job]) -> None:
        if not jobs:
            return
        try:
            self._try([event for events, _ in jobs for event in events])
        except Exception as error:  # noqa: BLE001  # raised where the event is waited for
            if len(jobs) > 1 and not isinstance(error, OperationalError):
                for job in jobs:  # events that cannot be written fail alone
                    self._commit([job])
                return
            for _, future in jobs:
                future.set_exception(error)
        else:
            for _, future in jobs:
                future.set_result(None)

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


# --- one thread for each way to write, made when it is first needed -----------------

_lock = threading.RLock()
_writers: dict[Write, Writer] = {}


def submit(write: Write, events: Sequence[Event]) -> Future[None]:
    """Have `write` called with the events, in its own thread."""
    return _submit(write, events)[1]


def submit_and_wait(write: Write, events: Sequence[Event]) -> None:
    """Have `write` called with the events in its own thread, and return when it has been."""
    writer, future = _submit(write, events)
    writer.wait(future)


def _submit(write: Write, events: Sequence[Event]) -> tuple[Writer, Future[None]]:
    with _lock:  # nothing is put to a writer that is being closed
        if write not in _writers:
            _writers[write] = Writer(write)
        return _writers[write], _writers[write].put(events)


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
