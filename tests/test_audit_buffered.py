"""AUDIT "buffered": nobody waits, nothing is lost, and what is held is bounded."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from django.contrib.auth.hashers import check_password, make_password
from django.db import OperationalError, connection, transaction

from kms_hasher import exceptions, signals
from kms_hasher.audit import recorder, writer
from kms_hasher.models import AuditEvent, AuditHour
from tests.test_audit import (
    broken,
    configure,
    durable,
    errors,
    event,
    from_scratch,
    json_of,
    recorded,
    run,
    server_only,
    site,
    sqlite_only,
    subs,
)

__all__ = ["broken", "configure", "empty_site", "from_scratch", "site"]

from tests.test_audit import empty_site


@pytest.fixture
def buffered(configure: Callable[..., None]) -> None:
    configure(AUDIT="buffered")


@pytest.fixture
def held_for_long(buffered: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "FLUSH_AGE", 60.0)


# --- what becomes of requests ---------------------------------------------------------


@durable
@server_only
def test_a_request_waits_for_nothing(
    held_for_long: None, django_assert_num_queries: Any
) -> None:
    signals.emit(event(sub="first"))
    with django_assert_num_queries(0):
        signals.emit(event(sub="second"))
    assert not AuditEvent.objects.exists()
    recorder.close()
    assert subs() == ["first", "second"]


@durable
@server_only
def test_a_rollback_and_an_error_take_nothing_along(buffered: None) -> None:
    with transaction.atomic():
        signals.emit(event(sub="rolled back"))
        transaction.set_rollback(True)
    with contextlib.suppress(RuntimeError), transaction.atomic():
        signals.emit(event(sub="raised"))
        raise RuntimeError
    asyncio.run(on_loop())
    with ThreadPoolExecutor(1) as pool:
        pool.submit(signals.emit, event(sub="thread")).result()
    recorder.close()
    assert subs() == ["loop", "raised", "rolled back", "thread"]


async def on_loop() -> None:
    signals.emit(event(sub="loop"))


@durable
@server_only
def test_the_first_event_is_not_held_for_long(
    buffered: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "FLUSH_AGE", 0.05)
    signals.emit(event(sub="alone"))
    until = time.monotonic() + 10
    while not AuditEvent.objects.exists() and time.monotonic() < until:
        time.sleep(0.01)
    assert subs() == ["alone"]


@durable
@server_only
def test_where_too_many_are_held_a_call_waits_as_in_durable(
    held_for_long: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "MAX_HELD", 2)
    for name in ("a", "b"):
        signals.emit(event(sub=name))
    assert not AuditEvent.objects.exists()
    signals.emit(event(sub="c"))
    assert subs() == ["a", "b", "c"]


@durable
@sqlite_only
def test_on_sqlite_it_is_durable(held_for_long: None) -> None:
    signals.emit(event(sub="at once"))
    assert subs() == ["at once"]
    with contextlib.suppress(RuntimeError), transaction.atomic():
        signals.emit(event(sub="rolled back"))
        raise RuntimeError
    recorder.flush()
    assert subs() == ["at once", "rolled back"]
    assert not writer._writers


@pytest.mark.everywhere
def test_sigkill_loses_no_more_than_what_is_held(site: str) -> None:
    run(
        """
        import signal, time
        from kms_hasher.audit import writer
        pid = os.fork()
        if not pid:
            writer.FLUSH_AGE = 0.05
            emit("old")
            while not AuditEvent.objects.exists():
                time.sleep(0.01)
            time.sleep(0.1)
            writer.FLUSH_AGE, writer.MAX_HELD = 60.0, 2
            for name in "abcd":
                emit(name)  # with the third, those before it are committed
            os.kill(os.getpid(), signal.SIGKILL)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL
        """,
        site,
    )
    # Durable: nothing. Buffered: what came after the last commit.
    assert recorded(site) in (["a", "b", "c", "d", "old"], ["a", "b", "c", "old"])


# --- a broken audit -------------------------------------------------------------------


@durable
@server_only
def test_a_missing_table_stops_no_login_and_loses_no_line(
    buffered: None, broken: None, caplog: pytest.LogCaptureFixture
) -> None:
    encoded = make_password("secret")
    assert check_password("secret", encoded)
    recorder.close()
    found = [json_of(r)["operation"] for r in errors(caplog) if "could not be" in r.message]
    assert found == ["Encrypt", "Decrypt"]
    assert not any(record.exc_info for record in errors(caplog))


@durable
@server_only
def test_a_strict_site_waits_while_writing_fails(
    held_for_long: None,
    configure: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    configure(AUDIT="buffered", AUDIT_STRICT=True)
    monkeypatch.setattr(writer, "FLUSH_SIZE", 1)
    with monkeypatch.context() as patch:
        patch.setattr(AuditEvent._meta, "db_table", "missing")
        signals.emit(event(sub="held"))  # that it fails is not known yet
        until = time.monotonic() + 10
        while not errors(caplog) and time.monotonic() < until:
            time.sleep(0.01)
        for _ in range(2):
            with pytest.raises(exceptions.AuditError):
                signals.emit(event(sub="waited for"))
    signals.emit(event(sub="healed"))
    signals.emit(event(sub="held again"))
    recorder.close()
    assert subs() == ["healed", "held again"]
    assert [json_of(r)["sub"] for r in errors(caplog)] == ["held", "waited for", "waited for"]


# --- the writer alone -----------------------------------------------------------------


class Database:
    """What a writer writes to: it can be out, and it takes no event called "bad"."""

    def __init__(self) -> None:
        self.commits: list[list[str]] = []
        self.out = False
        self.tries = 0
        self.tried = threading.Event()

    def write(self, events: Sequence[signals.Event]) -> None:
        self.tries += 1
        self.tried.set()
        names = [each.sub for each in events]
        if self.out:
            raise OperationalError("no route to host")
        if "bad" in names:
            raise ValueError("bad")
        self.commits.append(names)

    @property
    def names(self) -> list[str]:
        return [name for commit in self.commits for name in commit]


@pytest.fixture
def database(monkeypatch: pytest.MonkeyPatch) -> Iterator[Database]:
    made = Database()
    monkeypatch.setattr(writer, "_database_is_out", lambda: made.out)
    monkeypatch.setattr(writer, "FLUSH_AGE", 60.0)
    yield made
    made.out = False
    writer.close_all()


def hold(database: Database, *names: str, failed: Callable[..., object] = print) -> None:
    for name in names:
        writer.hold(database.write, [event(sub=name)], failed)


def test_what_is_held_is_committed_together_once_there_is_enough(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "FLUSH_SIZE", 3)
    hold(database, "a", "b")
    assert not database.tries
    hold(database, "c")
    assert database.tried.wait(10)
    writer.close_all()
    assert database.commits == [["a", "b", "c"]]


def test_one_who_waits_takes_along_what_is_held(database: Database) -> None:
    hold(database, "a", "b")
    writer.submit_and_wait(database.write, [event(sub="c")])
    assert database.commits == [["a", "b", "c"]]


def test_the_end_writes_what_is_held(database: Database) -> None:
    hold(database, *"abc")
    writer.close_all()
    assert database.names == list("abc")


def test_a_bad_event_fails_alone(database: Database) -> None:
    failures: list[BaseException] = []
    hold(database, "a", "b", "bad", "c", failed=failures.append)
    writer.close_all()
    assert database.names == list("abc")
    assert [str(error) for error in failures] == ["bad"]


def test_while_the_database_is_out_events_go_on_being_held(database: Database) -> None:
    failures: list[BaseException] = []
    database.out = True
    hold(database, "a", "b", failed=failures.append)
    for _ in range(2):  # who waits is told at once
        with pytest.raises(OperationalError):
            writer.submit_and_wait(database.write, [event(sub="waited for")])
    hold(database, "c", failed=failures.append)
    database.out = False
    writer.submit_and_wait(database.write, [event(sub="d")])
    writer.close_all()
    assert database.names == list("abcd")
    assert not failures


def test_what_is_held_is_tried_again_by_itself(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "FLUSH_AGE", 0.01)
    database.out = True
    hold(database, "a")
    until = time.monotonic() + 10
    while database.tries < 3 and time.monotonic() < until:
        time.sleep(0.01)
    database.out = False
    writer.close_all()
    assert database.names == ["a"]


def test_a_database_that_is_out_to_the_end_leaves_the_events_to_the_log(
    database: Database,
) -> None:
    failures: list[BaseException] = []
    database.out = True
    hold(database, *"abc", failed=failures.append)
    writer.close_all()
    assert len(failures) == 3
    assert not database.commits


def test_a_database_that_hangs_to_the_end_leaves_the_events_to_the_log(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(writer, "WAIT", 0.05)
    monkeypatch.setattr(writer, "FLUSH_AGE", 0.0)
    begun, gate, failures = threading.Event(), threading.Event(), []

    def write(events: Sequence[signals.Event]) -> None:
        begun.set()
        gate.wait(10)

    writer.hold(write, [event(sub="a")], failures.append)
    assert begun.wait(10)
    writer.hold(write, [event(sub="b")], failures.append)
    thread = writer._writers[write]._thread
    writer.close_all()
    assert len(failures) == 2
    gate.set()
    thread.join(10)
    assert not thread.is_alive()


def test_what_is_held_is_bounded_also_while_the_database_is_out(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "MAX_HELD", 3)
    database.out = True
    hold(database, *"abc")
    with pytest.raises(OperationalError):
        hold(database, "d")
    database.out = False
    hold(database, "e")  # waited for, with those before it
    hold(database, "f")
    writer.close_all()
    assert database.names == list("abcef")


@durable
def test_events_and_what_counts_them_are_one_transaction(
    configure: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(AUDIT="durable")
    with monkeypatch.context() as patch:
        patch.setattr(AuditHour._meta, "db_table", "missing")
        for number in (1, 100):  # one statement, and many rows at once
            signals.emit_all([event() for _ in range(number)])
    recorder.close()
    assert not AuditEvent.objects.exists()
    signals.emit_all([event() for _ in range(100)])
    signals.emit(event())
    assert AuditEvent.objects.count() == 101
    assert sum(AuditHour.objects.values_list("count", flat=True)) == 101
    assert connection.vendor != "sqlite" or not writer._writers
