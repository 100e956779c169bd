"""Where events can be written from: here, later, or by the thread of `writer`."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Sequence

from django.db import connections, router, transaction
from django.db.models import Model

from kms_hasher.signals import Event

#: On the current connection; as soon as that can be; by the thread, which the caller waits
#: for; by the thread, before long.
HERE, LATER, THREAD, HELD = "here", "later", "thread", "held"


def place(mode: str, model: type[Model]) -> str:
    """Return where a row of the model is to be written from now, in that mode of `AUDIT`."""
    connection = connections[router.db_for_write(model)]
    sqlite = connection.vendor == "sqlite"
    if mode in ("durable", "buffered") and not sqlite:
        return THREAD if mode == "durable" else HELD
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


def write_here(
    model: type[Model], write: Callable[[Sequence[Event]], None], events: Sequence[Event]
) -> None:
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
