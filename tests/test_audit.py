"""The recorder: each call leaves one row and one line, whatever becomes of the request."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import logging
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth.hashers import acheck_password, check_password, make_password
from django.core.signals import request_finished
from django.db import connection, connections, transaction
from django.utils import timezone

from kms_hasher import calls, encoding, exceptions, history, keyring, signals
from kms_hasher.audit import recorder, store, writer
from kms_hasher.models import AliasPeriod, AuditEvent, Key
from kms_hasher.providers import base

ARN = "arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"
ARN_2 = "arn:aws:kms:eu-central-1:111122223333:key/2234abcd-12ab-34cd-56ef-1234567890ab"
START = datetime.datetime(2026, 11, 21, 12, tzinfo=datetime.timezone.utc)

durable = pytest.mark.django_db(transaction=True)
server_only = pytest.mark.skipif(
    connection.vendor == "sqlite", reason="on SQLite the current connection writes"
)
sqlite_only = pytest.mark.skipif(
    connection.vendor != "sqlite", reason="elsewhere the writer thread writes"
)


def event(**changes: Any) -> signals.Event:
    values: dict[str, Any] = {
        "time": timezone.now(),
        "operation": "Decrypt",
        "purpose": "login",
        "outcome": signals.SUCCESS,
        "requested_key": ARN,
        "key": ARN,
        "latency": 0.0123456,
        "request_ids": ("first-id", "second-id"),
        "sub": "0123456789abcdef0123456789abcdef",
    }
    return signals.Event(**{**values, **changes})


def subs() -> list[str]:
    return sorted(AuditEvent.objects.values_list("sub", flat=True))


@pytest.fixture(autouse=True)
def from_scratch() -> Iterator[None]:
    recorder.close()
    yield
    recorder.close()


@pytest.fixture
def configure(settings: Any) -> Callable[..., None]:
    def change(**values: Any) -> None:
        settings.KMS_HASHER = {**settings.KMS_HASHER, **values}

    return change


@pytest.fixture
def durably(configure: Callable[..., None]) -> None:
    configure(AUDIT="durable")


# --- the row and the line -----------------------------------------------------------


@pytest.mark.django_db
def test_an_event_becomes_a_row() -> None:
    signals.emit(event(time=START, error_code="Some", requested_key="alias/tests"))
    row = AuditEvent.objects.get()
    assert row.time == START
    assert (row.operation, row.purpose, row.outcome) == ("Decrypt", "login", "success")
    assert row.key_ref == encoding.key_ref(ARN)
    assert row.requested_key == "alias/tests"
    assert (row.error_code, row.latency_us) == ("Some", 12346)
    assert row.request_ids == "first-id second-id"
    assert row.sub == "0123456789abcdef0123456789abcdef"


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("key", "ref"),
    [
        (ARN, encoding.key_ref(ARN)),
        (ARN.rpartition("/")[2], encoding.key_ref(ARN)),
        ("alias/tests", ""),
        ("", ""),
        ("nonsense $", ""),
    ],
)
def test_the_key_ref_of_what_a_failed_call_named(key: str, ref: str) -> None:
    signals.emit(event(key=key, outcome=signals.DENIED))
    assert AuditEvent.objects.get().key_ref == ref


@pytest.mark.django_db
def test_what_is_too_long_is_cut_and_still_recorded() -> None:
    signals.emit(
        event(
            operation="O" * 99,
            purpose="p" * 99,
            error_code="e" * 99,
            requested_key="k" * 999,
            outcome=signals.ERROR,
            latency=-1.0,
        )
    )
    assert AuditEvent.objects.get().latency_us == 0


@pytest.mark.django_db
def test_each_event_is_one_structured_log_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "kms_hasher.audit"):
        signals.emit(event())
        signals.emit(event(outcome=signals.DENIED, error_code="AccessDenied", sub="a\nb"))
    good, bad = (r for r in caplog.records if r.name == "kms_hasher.audit")
    assert (good.levelno, bad.levelno) == (logging.INFO, logging.WARNING)
    assert json.loads(good.getMessage())["request_ids"] == ["first-id", "second-id"]
    assert json.loads(good.getMessage()) == good.kms  # type: ignore[attr-defined]
    assert "error_code" not in good.kms  # type: ignore[attr-defined]
    assert "\n" not in bad.getMessage()


@pytest.mark.django_db
def test_a_broken_log_handler_stops_nothing() -> None:
    def fail(record: logging.LogRecord) -> bool:
        raise RuntimeError("no disk")

    recorder.lines.addFilter(fail)
    try:
        signals.emit(event(outcome=signals.DENIED))
    finally:
        recorder.lines.removeFilter(fail)
    assert AuditEvent.objects.count() == 1


@pytest.mark.django_db
def test_off_leaves_log_lines_only(
    configure: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    configure(AUDIT="off")
    with caplog.at_level(logging.INFO, "kms_hasher.audit"):
        signals.emit(event())
    assert len(caplog.records) == 1
    assert not AuditEvent.objects.exists()
    assert not Key.objects.exists()


@pytest.mark.django_db
def test_connecting_again_does_not_record_twice() -> None:
    recorder.connect()
    signals.emit(event())
    assert AuditEvent.objects.count() == 1


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (None, signals.SUCCESS),
        (exceptions.KMSTimeout, signals.UNAVAILABLE),
        (exceptions.KMSConnectionError, signals.UNAVAILABLE),
        (exceptions.KMSThrottled, signals.UNAVAILABLE),
        (exceptions.KMSInternalError, signals.UNAVAILABLE),
        (exceptions.KMSBadResponse, signals.UNAVAILABLE),
        (exceptions.KMSAccessDenied, signals.DENIED),
        (exceptions.KMSCredentialsError, signals.DENIED),
        (exceptions.KeyDisabled, signals.UNUSABLE),
        (exceptions.KeyPendingDeletion, signals.UNUSABLE),
        (exceptions.KeyNotFound, signals.UNUSABLE),
        (exceptions.InvalidCiphertext, signals.INVALID),
        (exceptions.IncorrectKey, signals.INVALID),
        (exceptions.InvalidRequest, signals.ERROR),
        (RuntimeError, signals.ERROR),
    ],
)
def test_each_call_leaves_exactly_one_event(
    error: type[Exception] | None, outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stub:
        def decrypt(self, *args: Any) -> base.Decrypted:
            if error:
                raise error("it failed")
            return base.Decrypted(key_arn=ARN, plaintext=b"p" * 32, request_ids=("id",))

    monkeypatch.setattr(calls, "provider", Stub)
    with contextlib.suppress(exceptions.KMSError):
        keyring.kms("login", "ab" * 16).decrypt(ARN, b"blob", {})
    row = AuditEvent.objects.get()
    assert (row.operation, row.purpose, row.outcome) == ("Decrypt", "login", outcome)
    assert (row.sub, row.key_ref) == ("ab" * 16, encoding.key_ref(ARN))


@pytest.mark.django_db
@pytest.mark.parametrize("cut", [asyncio.CancelledError, KeyboardInterrupt, SystemExit])
def test_a_call_that_is_cut_short_leaves_its_event(
    cut: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stub:
        def decrypt(self, *args: Any) -> None:
            raise cut

        async def adecrypt(self, *args: Any) -> None:
            raise cut

    monkeypatch.setattr(calls, "provider", Stub)
    with pytest.raises(cut):
        keyring.kms("login", "ab" * 16).decrypt(ARN, b"blob", {})
    awaiting = calls.akms("login").decrypt(ARN, b"blob", {})
    with pytest.raises(cut):
        awaiting.send(None)
    rows = AuditEvent.objects.values_list("outcome", "error_code", "key_ref")
    assert list(rows) == [(signals.ERROR, cut.__name__, encoding.key_ref(ARN))] * 2


@pytest.mark.django_db
def test_no_secret_is_recorded(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        encoded = make_password("correct horse", salt="saltsaltsaltsalt")
        assert check_password("correct horse", encoded)
        assert not check_password("wrong horse", encoded)
        flipped = encoded[:-5] + ("A" if encoded[-5] != "A" else "B") + encoded[-4:]
        assert not check_password("correct horse", flipped)
        assert not check_password("correct horse", encoded[:-300])
    text = caplog.text + str(list(AuditEvent.objects.values_list()))
    assert AuditEvent.objects.count() == 5
    sealed = encoded.rpartition("$")[2]
    for secret in ("horse", "saltsalt", sealed, sealed[:40]):
        assert secret not in text


# --- (a) a rollback takes nothing with it -------------------------------------------


@durable
def test_a_rollback_keeps_the_event(durably: None) -> None:
    with contextlib.suppress(RuntimeError), transaction.atomic():
        signals.emit(event(sub="rolled back"))
        raise RuntimeError
    signals.emit(event(sub="next"))
    assert subs() == ["next", "rolled back"]


@durable
@server_only
def test_the_event_is_committed_before_the_call_returns(durably: None) -> None:
    with transaction.atomic():
        signals.emit(event())
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(_in_thread, AuditEvent.objects.count).result() == 1


def _in_thread(function: Callable[[], Any]) -> Any:
    try:
        return function()
    finally:
        connections.close_all()


@durable
@server_only
def test_rows_the_caller_has_locked_do_not_hold_up_the_event(durably: None) -> None:
    started = time.monotonic()
    with transaction.atomic():
        history.record_key(ARN, timezone.now())  # the writer cannot see it yet
        signals.emit(event())
        signals.emit(event())
    assert time.monotonic() - started < writer.WAIT
    recorder.close()
    assert (AuditEvent.objects.count(), Key.objects.count()) == (2, 1)


@durable
@server_only
def test_a_connection_that_was_cut_is_made_anew(durably: None) -> None:
    signals.emit(event(sub="before"))
    with connection.cursor() as cursor:
        if connection.vendor == "postgresql":
            cursor.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity "
                "where datname = current_database() and pid <> pg_backend_pid()"
            )
        else:
            cursor.execute(
                "select id from information_schema.processlist "
                "where db = database() and id <> connection_id()"
            )
            for (number,) in cursor.fetchall():
                cursor.execute(f"kill {number}")
    signals.emit(event(sub="after"))
    assert subs() == ["after", "before"]


def connections_to_the_database() -> int:
    with connection.cursor() as cursor:
        cursor.execute(
            "select count(*) from pg_stat_activity "
            "where datname = current_database() and backend_type = 'client backend'"
            if connection.vendor == "postgresql"
            else "select count(*) from information_schema.processlist where db = database()"
        )
        (number,) = cursor.fetchone()
    return int(number)


@durable
@server_only
def test_an_idle_connection_is_given_up(durably: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "IDLE", 0.05)
    signals.emit(event(sub="before"))
    deadline = time.monotonic() + 20
    while connections_to_the_database() > 1:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    signals.emit(event(sub="after"))
    assert subs() == ["after", "before"]


@durable
def test_many_threads_lose_nothing_and_write_nothing_twice(durably: None) -> None:
    def work(number: int) -> None:
        for at in range(10):
            signals.emit(event(sub=f"{number}-{at}"))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    signals.emit(event(sub="last"))
    assert subs() == sorted([f"{n}-{at}" for n in range(8) for at in range(10)] + ["last"])


@durable
def test_an_event_loop_can_report(durably: None) -> None:
    async def call() -> None:
        signals.emit(event(sub="on the loop"))

    asyncio.run(call())
    recorder.flush()  # a database in memory is out of the writer's reach
    assert subs() == ["on the loop"]


@durable
def test_acheck_password_is_recorded(durably: None) -> None:
    encoded = make_password("secret")

    async def login() -> bool:
        return await acheck_password("secret", encoded)

    assert asyncio.run(login())
    recorder.flush()
    operations = AuditEvent.objects.order_by("pk").values_list("operation", flat=True)
    assert list(operations) == ["Encrypt", "Decrypt"]


# --- the writer thread --------------------------------------------------------------


@pytest.fixture
def write_slowly() -> Iterator[tuple[writer.Writer, list[list[str]], threading.Event]]:
    written: list[list[str]] = []
    gate = threading.Event()

    def write(events: Any) -> None:
        gate.wait(10)
        if any(each.sub == "bad" for each in events):
            raise ValueError("bad")
        written.append([each.sub for each in events])

    made = writer.Writer(write)
    yield made, written, gate
    gate.set()
    made.close()


def test_what_piles_up_is_committed_at_once_and_a_bad_event_fails_alone(
    write_slowly: tuple[writer.Writer, list[list[str]], threading.Event],
) -> None:
    made, written, gate = write_slowly
    first = made.put([event(sub="first")])
    while not first.running():
        time.sleep(0.01)
    good, bad, fine = (made.put([event(sub=name)]) for name in ("good", "bad", "fine"))
    gate.set()
    for future in (first, good, fine):
        made.wait(future)
    with pytest.raises(ValueError, match="bad"):
        made.wait(bad)
    assert written == [["first"], ["good"], ["fine"]]
    gate.clear()
    last = [made.put([event(sub=str(number))]) for number in range(5)]
    gate.set()
    for future in last:
        made.wait(future)
    assert [name for names in written[3:] for name in names] == list("01234")
    assert len(written[3:]) < 5


def test_one_that_waits_is_given_up_and_not_written_later(
    write_slowly: tuple[writer.Writer, list[list[str]], threading.Event],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, written, gate = write_slowly
    monkeypatch.setattr(writer, "WAIT", 0.5)
    running = made.put([event(sub="running")])
    while not running.running():
        time.sleep(0.01)
    waiting = made.put([event(sub="waiting")])
    for future in (waiting, running):
        with pytest.raises(FutureTimeout, match="no answer"):
            made.wait(future)
    monkeypatch.setattr(writer, "WAIT", 60.0)
    started = time.monotonic()
    with pytest.raises(FutureTimeout, match="still"):
        made.put([event()])
    assert time.monotonic() - started < 30  # at once
    gate.set()
    running.result(5)
    monkeypatch.undo()
    made.wait(made.put([event(sub="healed")]))
    assert written == [["running"], ["healed"]]


# --- (b) SQLite ---------------------------------------------------------------------


@durable
@sqlite_only
def test_sqlite_writes_at_once_between_transactions(durably: None) -> None:
    signals.emit(event())
    assert AuditEvent.objects.count() == 1
    assert not writer._writers


@durable
@sqlite_only
def test_sqlite_waits_for_the_end_of_a_transaction(durably: None) -> None:
    with transaction.atomic():
        signals.emit(event(sub="first"))
        with contextlib.suppress(RuntimeError), transaction.atomic():
            signals.emit(event(sub="second"))
            raise RuntimeError
        assert not AuditEvent.objects.exists()
    assert subs() == ["first", "second"]


@durable
@sqlite_only
def test_sqlite_writes_at_the_end_of_a_request_that_rolled_back(durably: None) -> None:
    with contextlib.suppress(RuntimeError), transaction.atomic():
        signals.emit(event())
        request_finished.send(None)
        assert recorder._pending
        raise RuntimeError
    request_finished.send(None)
    assert AuditEvent.objects.count() == 1


@durable
@sqlite_only
def test_what_waits_is_bounded_and_the_rest_is_logged(
    durably: None,
    configure: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(recorder, "MAX_PENDING", 2)
    with transaction.atomic():
        for name in ("one", "two", "three"):
            signals.emit(event(sub=name))
        configure(AUDIT_STRICT=True)
        with pytest.raises(exceptions.AuditError):
            signals.emit(event(sub="four"))
    assert subs() == ["one", "two"]
    assert [json_of(record)["sub"] for record in errors(caplog)] == ["three", "four"]


@durable
@sqlite_only
def test_what_cannot_be_written_after_the_transaction_is_logged(
    durably: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with transaction.atomic():
        signals.emit(event())
        monkeypatch.setattr(AuditEvent._meta, "db_table", "missing")
    assert len(errors(caplog)) == 1


# --- (c) inline, for tests ----------------------------------------------------------


@pytest.mark.django_db
def test_inline_uses_no_other_connection() -> None:
    with contextlib.suppress(RuntimeError), transaction.atomic():
        signals.emit(event())
        assert AuditEvent.objects.count() == 1
        raise RuntimeError
    assert not AuditEvent.objects.exists()
    assert not writer._writers


@pytest.mark.django_db
def test_inline_events_of_other_threads_come_to_the_tests_connection() -> None:
    opened = []

    def work() -> None:
        signals.emit(event(sub="thread"))
        opened.append(connection.connection)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert opened == [None]
    signals.emit(event(sub="main"))
    assert subs() == ["main", "thread"]
    assert not writer._writers


@pytest.mark.django_db
def test_inline_failure_leaves_the_transaction_usable(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with transaction.atomic():
        with monkeypatch.context() as patch:
            patch.setattr(AuditEvent._meta, "db_table", "missing")
            signals.emit(event())
        assert not AuditEvent.objects.exists()
    assert len(errors(caplog)) == 1


# --- (d) a broken audit table -------------------------------------------------------


def errors(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [r for r in caplog.records if r.name == "kms_hasher" and r.levelname == "ERROR"]


def json_of(record: logging.LogRecord) -> Any:
    return json.loads(record.getMessage().partition("): ")[2])


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AuditEvent._meta, "db_table", "missing")


@durable
def test_a_missing_table_stops_no_login(
    durably: None, broken: None, caplog: pytest.LogCaptureFixture
) -> None:
    encoded = make_password("secret")
    with transaction.atomic():
        assert check_password("secret", encoded)
    assert [json_of(record)["operation"] for record in errors(caplog)] == ["Encrypt", "Decrypt"]
    assert not any(record.exc_info for record in errors(caplog))
    recorder.close()
    assert Key.objects.count() == 1  # the history goes on


@durable
def test_a_missing_table_stops_a_strict_site(
    durably: None, broken: None, configure: Callable[..., None]
) -> None:
    configure(AUDIT_STRICT=True)
    with pytest.raises(exceptions.AuditError) as caught:
        make_password("secret")
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@durable
def test_a_failed_call_is_told_from_a_failed_audit(
    durably: None,
    broken: None,
    configure: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Stub:
        def decrypt(self, *args: Any) -> None:
            raise exceptions.KeyDisabled

    configure(AUDIT_STRICT=True)
    monkeypatch.setattr(calls, "provider", Stub)
    with pytest.raises(exceptions.KeyDisabled):
        keyring.kms("login").decrypt(ARN, b"blob", {})


@pytest.mark.django_db
def test_a_broken_history_is_logged_and_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Key._meta, "db_table", "missing")
        signals.emit(event())
    assert "key history" in errors(caplog)[0].getMessage()
    signals.emit(event())
    assert (AuditEvent.objects.count(), Key.objects.count()) == (2, 1)


# --- the key history ----------------------------------------------------------------


def encrypt(arn: str, at: datetime.datetime, **changes: Any) -> None:
    values = {"operation": "Encrypt", "requested_key": "alias/tests", "key": arn, "time": at}
    signals.emit(event(**{**values, **changes}))


def settled() -> list[tuple[str, str, bool]]:
    """Wait for the history's writer; return alias, key and whether it is so now."""
    writer.close_all()
    periods = AliasPeriod.objects.order_by("pk").select_related("key")
    return [(p.alias, p.key.arn, p.until is None) for p in periods]


@durable
@pytest.mark.parametrize("mode", ["durable", "inline"])
def test_a_moved_alias_is_seen_at_once(mode: str, configure: Callable[..., None]) -> None:
    configure(AUDIT=mode)
    encrypt(ARN, START)
    assert settled() == [("alias/tests", ARN, True)]
    moved = START + datetime.timedelta(seconds=1)
    encrypt(ARN_2, moved)
    assert settled() == [("alias/tests", ARN, False), ("alias/tests", ARN_2, True)]
    assert AliasPeriod.objects.first().since == moved  # type: ignore[union-attr]


@durable
def test_a_late_answer_is_no_move_back_but_a_later_one_is(durably: None) -> None:
    encrypt(ARN, START)
    encrypt(ARN_2, START + datetime.timedelta(minutes=1))
    encrypt(ARN, START + datetime.timedelta(minutes=2))
    assert [now for *_, now in settled()] == [False, True]
    encrypt(ARN, START + datetime.timedelta(minutes=2) + history.ALIAS_LAG)
    assert [(arn, now) for _, arn, now in settled()] == [
        (ARN, False),
        (ARN_2, False),
        (ARN, True),
    ]


@durable
def test_last_seen_is_kept_within_its_interval(durably: None) -> None:
    for minutes in (0, 5, 9, 11):
        at = START + datetime.timedelta(minutes=minutes)
        signals.emit(event(time=at))
    settled()
    key = Key.objects.get()
    assert (key.first_seen, key.last_seen) == (START, START + datetime.timedelta(minutes=11))


@durable
def test_in_steady_state_the_history_costs_no_query(
    durably: None, django_assert_num_queries: Any
) -> None:
    encrypt(ARN, START)
    signals.emit(event(time=START))
    settled()
    # A transaction with two statements; elsewhere they are the writer's.
    own = 4 if connection.vendor == "sqlite" else 0
    with django_assert_num_queries(own):
        encrypt(ARN, START + datetime.timedelta(seconds=1))
    with django_assert_num_queries(own):
        signals.emit(event(time=START + datetime.timedelta(seconds=1)))
    assert set(writer._writers) <= {store.write}


@pytest.mark.django_db
@pytest.mark.parametrize(
    "changes",
    [
        {"outcome": signals.DENIED},
        {"key": "alias/tests"},
        {"key": ""},
        {"key": ARN.rpartition("/")[2]},
        {"key": ARN.replace("key/", "alias/")},
    ],
)
def test_only_a_key_that_answered_enters_the_history(changes: dict[str, Any]) -> None:
    encrypt(ARN, START, **changes)
    assert not Key.objects.exists()
    assert not AliasPeriod.objects.exists()


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("changes", "alias"),
    [
        ({}, "alias/tests"),
        ({"operation": "DescribeKey"}, "alias/tests"),
        (
            {"requested_key": f"{ARN.rpartition(':')[0]}:alias/a"},
            f"{ARN.rpartition(':')[0]}:alias/a",
        ),
        ({"operation": "UpdateAlias"}, ""),  # the rotation itself says that it moved it
        ({"requested_key": ARN}, ""),
    ],
)
def test_what_shows_where_an_alias_points(changes: dict[str, Any], alias: str) -> None:
    encrypt(ARN, START, **changes)
    assert Key.objects.count() == 1
    assert [period.alias for period in AliasPeriod.objects.all()] == ([alias] if alias else [])


# --- whole processes: files, forks, exits -------------------------------------------


@pytest.fixture(scope="session")
def empty_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite file with all tables."""
    path = tmp_path_factory.mktemp("audit") / "empty.sqlite3"
    run("call_command('migrate', verbosity=0)", f"sqlite:///{path}")
    return path


def run(code: str, url: str, **environment: str) -> str:
    """Run code in a process of its own that takes a connection left open for an error."""
    setup = """
        import asyncio, contextlib, os, sys, threading
        import django
        django.setup()
        from django.conf import settings
        from django.core.management import call_command
        from django.db import connection, connections, transaction
        settings.KMS_HASHER["AUDIT"] = os.environ.get("AUDIT", "durable")
        from kms_hasher import signals
        from kms_hasher.models import AuditEvent
        from tests.test_audit import event
        def emit(sub): signals.emit(event(sub=sub))
    """
    completed = subprocess.run(
        [
            sys.executable,
            "-W",
            "error::ResourceWarning",
            "-W",  # a thread that has been joined is counted a little longer
            "ignore:This process:DeprecationWarning",
            "-c",
            textwrap.dedent(setup) + textwrap.dedent(code),
        ],
        env={
            **os.environ,
            "DATABASE_URL": url,
            "DJANGO_SETTINGS_MODULE": "tests.settings",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (completed.returncode, completed.stderr) == (0, ""), completed.stderr
    return completed.stdout


@pytest.fixture(params=["file", "server", "buffered"])
def site(
    request: pytest.FixtureRequest,
    transactional_db: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[str]:
    """
    The URL of a database with all tables: an SQLite file, and the suite's own server, with
    AUDIT "durable", and "buffered" on the server.
    """
    if request.param == "file":
        path = tmp_path / "site.sqlite3"
        shutil.copy(request.getfixturevalue("empty_site"), path)
        yield f"sqlite:///{path}"
        return
    if connection.vendor == "sqlite":
        pytest.skip("the suite runs on SQLite")
    if request.param == "buffered":
        monkeypatch.setenv("AUDIT", "buffered")
    values = connection.settings_dict
    scheme = "postgres" if connection.vendor == "postgresql" else "mysql"
    password = f":{values['PASSWORD']}" if values["PASSWORD"] else ""
    port = f":{values['PORT']}" if values["PORT"] else ""
    yield f"{scheme}://{values['USER']}{password}@{values['HOST']}{port}/{values['NAME']}"


def recorded(url: str) -> list[str]:
    printed = run(
        "print(*AuditEvent.objects.values_list('sub', flat=True))\nconnection.close()", url
    )
    return sorted(printed.split())


@pytest.mark.everywhere
def test_a_forked_child_writes_its_own_events(site: str) -> None:
    run(
        """
        emit("parent-before")
        pid = os.fork()
        if not pid:
            emit("child-1")
            with contextlib.suppress(RuntimeError), transaction.atomic():
                emit("child-2")
                raise RuntimeError
            sys.exit()
        emit("parent-after")
        assert os.waitpid(pid, 0)[1] == 0
        emit("parent-last")
        connection.close()
        """,
        site,
    )
    expected = ["child-1", "child-2", "parent-after", "parent-before", "parent-last"]
    assert recorded(site) == expected


@pytest.mark.everywhere
def test_a_child_forked_within_a_transaction_does_not_write_the_parents_events(
    site: str,
) -> None:
    run(
        """
        with transaction.atomic():
            emit("parent")
            connection.close = lambda: None
            pid = os.fork()
            if not pid:
                os._exit(0)
            os.waitpid(pid, 0)
        del connection.close
        connection.close()
        """,
        site,
    )
    assert recorded(site) == ["parent"]


@pytest.mark.everywhere
def test_what_was_rolled_back_last_is_written_at_exit(site: str) -> None:
    run(
        """
        with contextlib.suppress(RuntimeError), transaction.atomic():
            emit("last")
            raise RuntimeError
        connection.close()
        """,
        site,
    )
    assert recorded(site) == ["last"]


@pytest.mark.everywhere
def test_threads_and_loops_leave_no_connection_behind(site: str) -> None:
    run(
        """
        async def on_loop():
            emit("loop")
        def work(number):
            for at in range(5):
                emit(f"{number}-{at}")
            assert connection.connection is None
        threads = [threading.Thread(target=work, args=[number]) for number in range(4)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        asyncio.run(on_loop())
        connection.close()
        """,
        site,
    )
    assert recorded(site) == sorted(
        [f"{n}-{at}" for n in range(4) for at in range(5)] + ["loop"]
    )


@pytest.mark.everywhere
@pytest.mark.parametrize("module", ["multiprocessing", "billiard"])
def test_a_child_that_ends_without_atexit_writes_its_events(module: str, site: str) -> None:
    # billiard's are Celery's.
    run(
        """
        import importlib
        multiprocessing = importlib.import_module(os.environ["MODULE"])
        def work(number):
            with contextlib.suppress(RuntimeError), transaction.atomic():
                emit(f"child-{number}")
                raise RuntimeError
        fork = multiprocessing.get_context("fork")
        emit("parent")
        connection.close()
        children = [fork.Process(target=work, args=[number]) for number in range(2)]
        for child in children: child.start()
        for child in children: child.join()
        """,
        site,
        MODULE=module,
    )
    assert recorded(site) == ["child-0", "child-1", "parent"]


@pytest.mark.everywhere
def test_many_writers_lose_nothing_and_write_nothing_twice(site: str) -> None:
    run(
        """
        import random
        def work(writer):
            chance = random.Random(writer)
            for at in range(8):
                end = chance.choice(["committed", "rolled back", "raised", "none"])
                if end == "none":
                    emit(f"{writer}-{at}")
                    continue
                with contextlib.suppress(RuntimeError), transaction.atomic():
                    emit(f"{writer}-{at}")
                    transaction.set_rollback(end == "rolled back")
                    if end == "raised":
                        raise RuntimeError
            connection.close()
        def process(number):
            threads = [
                threading.Thread(target=work, args=[number * 8 + at]) for at in range(8)
            ]
            for thread in threads: thread.start()
            for thread in threads: thread.join()
            sys.exit()
        children = []
        for number in range(4):
            children.append(os.fork())
            if not children[-1]:
                process(number)
        assert all(os.waitpid(child, 0)[1] == 0 for child in children)
        """,
        site,
    )
    counted = "from django.db.models import Sum\nfrom kms_hasher.models import AuditHour\n"
    counted += "print(AuditHour.objects.aggregate(n=Sum('count'))['n'])\nconnection.close()"
    assert recorded(site) == sorted(f"{writer}-{at}" for writer in range(32) for at in range(8))
    assert run(counted, site).split() == ["256"]


@pytest.mark.everywhere
def test_sqlite_does_not_deadlock_with_the_requests_own_transaction(
    empty_site: Path, tmp_path: Path
) -> None:
    path = tmp_path / "site.sqlite3"
    shutil.copy(empty_site, path)
    run(
        """
        from django.contrib.auth.models import Group
        def work(number):
            for at in range(5):
                with transaction.atomic():
                    Group.objects.create(name=f"{number}-{at}")
                    emit(f"{number}-{at}")
            connection.close()
        threads = [threading.Thread(target=work, args=[number]) for number in range(3)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        assert Group.objects.count() == 15
        connection.close()
        """,
        f"sqlite:///{path}",
    )
    assert recorded(f"sqlite:///{path}") == sorted(
        f"{n}-{at}" for n in range(3) for at in range(5)
    )
