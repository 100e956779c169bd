"""
Threads that ask KMS while the caller computes Argon2.

There are at most `MAX_THREADS`, made when they are first needed and anew after a fork. A
call that finds them all busy, or the interpreter about to end, is made by the caller.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")

#: As many as a process is likely to have threads that check passwords.
MAX_THREADS = 32

_lock = threading.Lock()
_executor: ThreadPoolExecutor | None = None
_free = threading.BoundedSemaphore(MAX_THREADS)


def _count_processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_processors = threading.BoundedSemaphore(_count_processors())

#: By how much the priority of a computation beside an event loop is lower, as of nice(1).
#: Argon2's eight threads together still weigh nearly what one of normal priority does.
NICE = 10

_beside_loop: ContextVar[bool] = ContextVar("kms_hasher_beside_loop", default=False)
_nice_executor: ThreadPoolExecutor | None = None


def start(call: Callable[[], T]) -> Future[T]:
    """Return the future of `call`, made by a thread of its own or, if none is free, now."""
    future: Future[T] = Future()
    context, claim = contextvars.copy_context(), threading.Lock()

    def run() -> None:
        context.run(_run, call, future, claim)

    if _free.acquire(blocking=False):
        future.add_done_callback(lambda _: _free.release())
        try:
            _threads().submit(run)
        except RuntimeError:  # no thread can be made, or the interpreter is about to end
            run()
    else:
        run()
    return future


def compute(call: Callable[[], T]) -> T:
    """
    Return what `call` computes, without holding up the calls that `start` has begun.

    No more of them run at once than there are processors: more would only wait for each
    other, each with its memory, and hold up whatever else the process has to do.
    Under gevent, whose threads are greenlets, a computation in C would: it is given to one
    of gevent's native threads.
    """
    monkey = sys.modules.get("gevent.monkey")
    if monkey is not None and monkey.is_module_patched("threading"):
        import gevent

        result: T = gevent.get_hub().threadpool.apply(call)
        return result
    with _processors:
        if _beside_loop.get():
            return _nice_threads().submit(contextvars.copy_context().run, call).result()
        return call()


@contextlib.contextmanager
def beside_loop() -> Iterator[None]:
    """
    Let computations of the block give way to the event loop of the process.

    Argon2 computes in several threads of the C library; at equal priority each has its
    turn before the loop has, which may be 30 ms later. With nothing else to do for the
    processors it takes as long as ever.
    """
    token = _beside_loop.set(True)
    try:
        yield
    finally:
        _beside_loop.reset(token)


def _nice_threads() -> ThreadPoolExecutor:
    global _nice_executor
    with _lock:
        if _nice_executor is None:
            _nice_executor = ThreadPoolExecutor(
                _count_processors(), "kms_hasher-nice", initializer=_be_nice
            )
        return _nice_executor


def _be_nice() -> None:
    if sys.platform == "linux":  # where a thread has a priority of its own
        thread = threading.get_native_id()
        with contextlib.suppress(OSError):
            nice = os.getpriority(os.PRIO_PROCESS, thread) + NICE
            os.setpriority(os.PRIO_PROCESS, thread, min(nice, 19))


def _threads() -> ThreadPoolExecutor:
    global _executor
    with _lock:
        if _executor is None:
            _executor = ThreadPoolExecutor(MAX_THREADS, thread_name_prefix="kms_hasher")
        return _executor


def _run(call: Callable[[], T], future: Future[T], claim: threading.Lock) -> None:
    # An executor that cannot make a thread keeps what it was given, for another one to do.
    if not claim.acquire(blocking=False):
        return
    try:
        future.set_result(call())
    except BaseException as error:  # noqa: BLE001  # raised by result()
        future.set_exception(error)
        del future  # which holds the error, which holds this frame


def _after_fork() -> None:  # pragma: no cover: it runs in a child
    # The parent's threads do not exist here: what is given to them would never be done.
    global _lock, _executor, _free, _processors, _nice_executor
    _lock, _executor, _nice_executor = threading.Lock(), None, None
    _free = threading.BoundedSemaphore(MAX_THREADS)
    _processors = threading.BoundedSemaphore(_count_processors())


os.register_at_fork(after_in_child=_after_fork)
