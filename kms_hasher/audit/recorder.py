"""
One log line and one row for each `kms_event`, and the key history that follows from them.

Where a row is written depends on `AUDIT` and on the database (see `places.place`):

durable  On PostgreSQL, MySQL and the like by one background thread per process, on a
         connection of its own: a request that rolls back takes no event with it. The caller
         waits until the row is committed. On SQLite, where a second connection would fight
         with the request's own for the one write lock, on the current connection if it is
         between transactions, and otherwise as soon as one ends.
buffered By the same thread, but the caller does not wait: events are held in memory and
         committed together, after a second at the latest. Where too many are held, as when
         the database is out, the caller waits as in durable. On SQLite it is durable: a
         thread that writes when it likes makes requests fail with "database is locked".
inline   On the current connection, within its transaction: for tests. What other threads
         and event loops report waits until a thread with a connection has an event.
off      Nowhere: log lines only, and no key history.

An event that cannot be written is logged as an error with all it holds, and the call goes
on, unless `AUDIT_STRICT` is set. An event that waits for the end of a transaction, or is
held, counts as written: only the death of the process loses it. A strict site's events are
not held while writing fails: from then on each call waits, and fails.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import functools
import json
import logging
import os
import sys
import threading
from collections.abc import Sequence
from typing import Any

from django.core.signals import request_finished
from django.db import connections, router, transaction

from kms_hasher import conf, encoding, history, signals
from kms_hasher.audit import places, store, telemetry, writer
from kms_hasher.exceptions import AuditError, MalformedHash
from kms_hasher.models import AuditEvent, Key
from kms_hasher.signals import Event

#: How many events may wait for a transaction to end.
MAX_PENDING = 10_000

logger = logging.getLogger("kms_hasher")
lines = logging.getLogger("kms_hasher.audit")
# Not on standard error where a site configures no logging: the rows tell the same.
lines.addHandler(logging.NullHandler())


def connect() -> None:
    """Begin to record. Called once, when Django is ready; harmless if called again."""
    signals.kms_events.connect(receive, dispatch_uid="kms_hasher.audit")
    request_finished.connect(_flush_if_any, dispatch_uid="kms_hasher.audit")


def receive(events: Sequence[Event], **kwargs: Any) -> None:
    """Record events. Raises `AuditError` if they cannot be and `AUDIT_STRICT` is set."""
    for event in events:
        _log(event)
    settings = conf.get()
    if settings.audit == "off":
        return
    place = ""
    try:
        place = places.place(settings.audit, AuditEvent)
        if place == places.HELD:
            failed = functools.partial(_complain, events)
            writer.hold(store.write, events, failed, strict=settings.audit_strict)
        elif place == places.THREAD:
            writer.submit_and_wait(store.write, events)
        elif place == places.HERE:
            places.write_here(AuditEvent, store.write, events)
        else:
            _defer(events)
        if place in (places.HELD, places.LATER):
            _close_at_the_end_of_children()
    except Exception as error:  # noqa: BLE001  # a broken audit stops no login
        problem = _complain(events, error)
        if settings.audit_strict:
            raise AuditError(problem) from None  # the context may hold a plaintext
    for event in events:
        _note(event, settings.audit)
    if _pending and place == places.HERE:
        flush()


def flush() -> None:
    """Write the events that wait for a transaction to end, if this thread can do so now."""
    mode = conf.get().audit
    if not _pending or places.place(mode, AuditEvent) != places.HERE:
        return
    events = _take_pending()
    try:
        places.write_here(AuditEvent, store.write, events)
    except Exception as error:  # noqa: BLE001
        _complain(events, error)
    for event in events:
        _note(event, mode)


def close() -> None:
    """Write what waits, end the writer threads, close their connections: begin anew."""
    _flush_if_any()
    writer.close_all()
    _noted.clear()
    _complain(_take_pending(), "its transaction did not end")


def _flush_if_any(**kwargs: Any) -> None:
    if _pending:
        with contextlib.suppress(Exception):  # what is not written goes on waiting
            flush()


#: Modules that end the processes they have forked without `atexit`.
_FORKING = ("multiprocessing.util", "billiard.util")
_finalized: set[str] = set()


def _close_at_the_end_of_children() -> None:
    for name in _FORKING:
        if name in sys.modules and name not in _finalized:
            _finalized.add(name)
            sys.modules[name].Finalize(None, close, exitpriority=0)


# --- what is written ----------------------------------------------------------------


def _fields(event: Event) -> dict[str, Any]:
    fields = {
        "time": event.time.isoformat(),
        "operation": event.operation,
        "purpose": event.purpose,
        "outcome": event.outcome,
        "error_code": event.error_code,
        "key": event.key,
        "requested_key": event.requested_key,
        "latency_us": store.latency_us(event),
        "request_ids": list(event.request_ids),
        "sub": event.sub,
    }
    told = {name: value for name, value in fields.items() if value not in ("", [])}
    return {**told, **telemetry.attributes(event)}


def _log(event: Event) -> None:
    level = logging.INFO if event.outcome == signals.SUCCESS else logging.WARNING
    if lines.isEnabledFor(level):
        fields = _fields(event)
        with contextlib.suppress(Exception):  # a broken log handler stops no login
            extra = {"kms": fields, **telemetry.attributes(event)}
            lines.log(level, "%s", _json(fields), extra=extra)


def _json(fields: dict[str, Any]) -> str:
    return json.dumps(fields, separators=(",", ":"))


def _complain(events: Sequence[Event], error: BaseException | str) -> str:
    """Log events that did not get into the database, so that they are not lost."""
    problem = f"An audit event could not be written to the database ({_reason(error)})"
    for event in events:
        with contextlib.suppress(Exception):
            logger.error("%s: %s", problem, _json(_fields(event)))
    return problem


def _reason(error: BaseException | str) -> str:
    # Never a traceback: the error's context may be one out of KMS, whose frames hold the
    # plaintext, and Django's error reports show the variables of every frame.
    return error if isinstance(error, str) else f"{type(error).__name__}: {error}".strip()


# --- until a transaction ends -------------------------------------------------------

_lock = threading.Lock()
_pending: list[Event] = []


def _take_pending() -> list[Event]:
    with _lock:
        events = _pending[:]
        _pending.clear()
    return events


def _defer(events: Sequence[Event]) -> None:
    """Keep the events until a transaction ends, however it ends."""
    with _lock:
        if len(_pending) + len(events) > MAX_PENDING:
            raise OverflowError(f"{MAX_PENDING} others wait for a transaction to end")
        _pending.extend(events)
    database = router.db_for_write(AuditEvent)
    if connections[database].in_atomic_block:
        # After a rollback, the next event, the end of the request or the exit does it.
        transaction.on_commit(flush, using=database, robust=True)


# --- the key history ----------------------------------------------------------------

#: By key ARN and by alias: the ARN last noted and when, so that mostly no query is needed.
_noted: dict[str, tuple[str, datetime.datetime]] = {}


def _note(event: Event, mode: str) -> None:
    """Bring the key history up to date, if the event holds news for this process."""
    name = _alias(event) or event.key
    if event.outcome != signals.SUCCESS or not _is_key_arn(event.key):
        return
    arn, at = _noted.get(name, ("", event.time))
    if arn == event.key and abs(event.time - at) < history.LAST_SEEN_EVERY:
        return
    try:
        place = places.place(mode, Key)
        if place == places.LATER:
            return
        if mode != "inline":  # what is written inline may be rolled back
            _noted[name] = (event.key, event.time)
        if place in (places.THREAD, places.HELD):
            # Nobody waits for it: the caller's transaction may have locked these rows.
            writer.submit(_write_history, [event]).add_done_callback(
                lambda done: _forget(event, problem) if (problem := done.exception()) else None
            )
        else:
            places.write_here(Key, _write_history, [event])
    except Exception as error:  # noqa: BLE001
        _forget(event, error)


def _write_history(events: Sequence[Event]) -> None:
    for event in events:
        key = history.record_key(event.key, event.time)
        if alias := _alias(event):
            history.record_alias(alias, key, event.time)
            period = history.current_period(alias)
            if period is None or period.key_id != key.pk:
                _noted.pop(alias, None)  # taken for a late answer; it may yet prove true


def _forget(event: Event, error: BaseException) -> None:
    _noted.pop(_alias(event) or event.key, None)
    with contextlib.suppress(Exception):
        logger.error("The key history could not be written (%s)", _reason(error))


#: Operations whose answer shows what an alias points to.
SHOWING = ("Encrypt", "DescribeKey", "GenerateDataKey", "GenerateMac", "GetPublicKey")


def _alias(event: Event) -> str:
    """Return the alias that the event shows the target of, or ""."""
    name = event.requested_key
    shows = event.operation in SHOWING
    return name if shows and (name.startswith("alias/") or ":alias/" in name) else ""


def _is_key_arn(key: str) -> bool:
    try:
        return encoding.ARN.parse(key).resource.startswith("key/")
    except MalformedHash:
        return False


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.Lock()
    _pending.clear()  # the parent's to write
    _finalized.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)
atexit.register(close)
