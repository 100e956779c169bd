"""Seals of the audit: what was sealed is found changed, and what was not raises no alarm."""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import random
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import pytest
from django.core.management import CommandError, call_command
from django.db import OperationalError, connection, connections, transaction
from django.db.models import F
from django.utils import timezone

from kms_hasher import encoding, exceptions, history, keyring
from kms_hasher.audit import (
    anchors,
    canonical,
    pruning,
    seals,
    segments,
    verification,
    verification_report,
)
from kms_hasher.models import AuditEvent, AuditSeal
from kms_hasher.providers.base import Provider
from tests.tampering import (
    MUTATIONS,
    can_loosen,
    duplicate,
    fill,
    kept_elsewhere,
    loosen,
    undone,
)
from tests.tampering import verify as verified

pytestmark = pytest.mark.django_db

durable = pytest.mark.django_db(transaction=True)
server_only = pytest.mark.skipif(
    connection.vendor == "sqlite", reason="SQLite has one writer at a time"
)

loose = pytest.mark.skipif(not can_loosen(), reason="no table is altered in a transaction")

START = datetime.datetime(2026, 11, 21, 12, tzinfo=datetime.timezone.utc)
SEAL_ALIAS = "alias/tests-seals"


@pytest.fixture
def configure(settings: Any) -> Callable[..., None]:
    def change(**values: Any) -> None:
        settings.KMS_HASHER = {**settings.KMS_HASHER, **values}

    return change


@pytest.fixture(scope="session")
def hmac_arn(key_arn: str) -> str:
    """The ARN of an HMAC key in the local provider, made once."""
    provider = keyring.provider()
    arn = provider.create_key(spec="HMAC_256", usage="GENERATE_VERIFY_MAC").key_arn
    provider.create_alias(SEAL_ALIAS, arn)
    return arn


@pytest.fixture
def hmac_key(hmac_arn: str, kms: Provider, configure: Callable[..., None]) -> Iterator[str]:
    """The same, behind `AUDIT_SEAL_KEY`; alias and key are put right afterwards."""
    configure(AUDIT_SEAL_KEY=SEAL_ALIAS)
    yield hmac_arn
    kms.enable_key(hmac_arn)
    kms.update_alias(SEAL_ALIAS, hmac_arn)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments of ten events, read three at a time."""
    monkeypatch.setattr(seals, "SEGMENT", 10)
    monkeypatch.setattr(segments, "PAGE", 3)
    monkeypatch.setattr(verification, "PAGE", 2)


def sealed(**options: Any) -> list[AuditSeal]:
    return list(seals.seal(settle=0, **options))


def kinds(**options: Any) -> dict[str, int]:
    report = verified(**options)
    assert report.unasked is None
    return dict(report.numbers)


def texts(**options: Any) -> str:
    return "\n".join(each.text for each in verified(**options).findings)


def raw(table: type[AuditEvent] | type[AuditSeal], statement: str, *values: Any) -> int:
    """Do what the owner of the database can do."""
    with connection.cursor() as cursor:
        cursor.execute(statement.format(table=table._meta.db_table), values)
        return cursor.rowcount


def ids() -> list[int]:
    return list(AuditEvent.objects.order_by("pk").values_list("pk", flat=True))


# --- an untouched log ---------------------------------------------------------------


def test_what_was_sealed_is_found_as_it_was(hmac_key: str, small: None) -> None:
    fill(25)
    made = sealed()
    assert [(each.sequence, each.count) for each in made] == [(1, 10), (2, 10), (3, 5)]
    report = verified()
    assert not report.numbers
    assert report.unasked is None
    assert (report.events, report.last) == (25, made[-1])


def test_sealing_goes_on_where_it_stopped(hmac_key: str, small: None) -> None:
    fill(3)
    for _ in range(4):
        sealed()
        fill(7)
    counts = list(AuditSeal.objects.order_by("sequence").values_list("count", flat=True))
    # Each time the calls of the sealing before: two, and one for the seal it builds on.
    assert counts == [3, 9, 10, 10]
    assert kinds() == {}


def test_a_seal_takes_two_calls_and_one_for_the_seal_before(
    hmac_key: str, small: None, calls: Callable[[], list[str]]
) -> None:
    fill(25)
    sealed()
    assert calls() == ["Encrypt", "GenerateMac"] * 3
    sealed()
    assert calls()[6:] == ["GenerateMac", "Encrypt", "GenerateMac"]
    verified()
    assert calls()[9:] == ["GenerateMac", "Decrypt"]


def test_without_an_hmac_key_the_context_is_the_anchor(
    small: None, calls: Callable[[], list[str]]
) -> None:
    fill(5)
    (made,) = sealed()
    assert set(made.anchors) == {"context_key", "ciphertext"}
    assert kinds() == {}
    assert calls() == ["Encrypt", "Decrypt"]


def test_sequence_count_and_root_stand_in_the_encryption_context(
    monkeypatch: pytest.MonkeyPatch, configure: Callable[..., None]
) -> None:
    configure(DEPLOYMENT="blue")
    seen = []
    encrypt = type(keyring.provider()).encrypt

    def spy(self: Any, key: str, plaintext: bytes, context: Any, **options: Any) -> Any:
        seen.append((key, dict(context)))
        return encrypt(self, key, plaintext, context, **options)

    monkeypatch.setattr(type(keyring.provider()), "encrypt", spy)
    fill(5)
    (made,) = sealed()
    assert seen == [
        (
            "alias/tests",
            {
                "application": "kms_hasher",
                "use": "audit-seal",
                "deployment": "blue",
                "sequence": "1",
                "count": "5",
                "root": made.root,
                "seal": canonical.seal_digest(made).hex(),
            },
        )
    ]


def test_gaps_in_ids_and_clocks_that_jump_raise_no_alarm(hmac_key: str, small: None) -> None:
    fill(30, gaps=True, clock=lambda at: START + datetime.timedelta(days=(at * 7919) % 999))
    sealed()
    AuditEvent.objects.create(
        time=START - datetime.timedelta(days=9999), operation="Decrypt", latency_us=1
    )
    sealed()
    assert kinds() == {}


@pytest.mark.parametrize("hours", [-100, 100])
def test_a_sealers_clock_that_jumps_stops_nothing(
    hours: int, hmac_key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(3)
    now = timezone.now()
    with mock.patch.object(timezone, "now", lambda: now + datetime.timedelta(hours=hours)):
        sealed()
    fill(3)
    assert len(sealed()) == 1
    assert kinds() == {}


def test_times_to_the_microsecond_and_any_text_survive_the_database(
    hmac_key: str,
) -> None:
    for micros in (0, 1, 999_999, 123_456):
        AuditEvent.objects.create(
            time=START.replace(microsecond=micros),
            operation="Decrypt",
            requested_key="alias/ünïcödé 🔑 'quoted' \\ % \t ",
            request_ids="  two  spaces ",
            latency_us=2**62,
        )
    sealed()
    assert kinds() == {}


def test_an_event_has_the_same_bytes_on_every_database() -> None:
    AuditEvent.objects.create(
        pk=2**40,
        time=START.replace(microsecond=120_000),
        operation="Decrypt",
        purpose="login",
        outcome="success",
        key_ref="ref",
        requested_key="alias/ä",
        latency_us=12,
        request_ids="a b",
        sub="0a",
    )
    (values,) = segments.events(1, 0, 2**40)
    assert canonical.frame(*values) == (
        b"i\0\0\0\x0d1099511627776"
        b"t\0\0\0\x101795262400120000"
        b"s\0\0\0\x07Decrypt"
        b"s\0\0\0\x05login"
        b"s\0\0\0\x07success"
        b"s\0\0\0\0"
        b"s\0\0\0\x03ref"
        b"s\0\0\0\x08alias/\xc3\xa4"
        b"i\0\0\0\x0212"
        b"s\0\0\0\x03a b"
        b"s\0\0\0\x020a"
    )


def test_every_stored_field_of_an_event_is_sealed() -> None:
    # If it fails: give canonical.FIELDS a new version with the new fields.
    fields = {field.attname for field in AuditEvent._meta.concrete_fields}
    assert fields == set(canonical.FIELDS[canonical.VERSION])


def test_framing_is_unambiguous() -> None:
    values = [("ab", "c"), ("a", "bc"), ("abc",), (b"ab", "c"), ("", "abc"), (1, 2), (12,)]
    values += [("1", "2"), (None,), ("None",), (1.5,), (1,)]
    assert len({canonical.frame(*each) for each in values}) == len(values)


def test_leaves_are_read_as_written() -> None:
    numbers = sorted({random.randrange(-(2**63) + 1, 2**63) for _ in range(500)} | {2**63 - 1})
    segment = canonical.Segment()
    written = [(n, segment.add([n, START])) for n in numbers]
    assert list(canonical.read_leaves(bytes(segment.leaves))) == written
    with pytest.raises(ValueError, match="damaged"):
        list(canonical.read_leaves(bytes(segment.leaves[:-1])))
    with pytest.raises(ValueError, match="damaged"):
        list(canonical.read_leaves(b"\xff" * 40))


# --- when it is sealed --------------------------------------------------------------


def test_nothing_is_sealed_while_there_is_nothing() -> None:
    assert sealed() == []


def test_every_waits_for_enough_events_or_half_the_hours(hmac_key: str) -> None:
    fill(1)
    assert len(sealed(every=5)) == 1  # the first is made at once
    assert sealed(every=5) == []  # two of its own wait
    fill(3)
    assert len(sealed(every=5)) == 1
    assert sealed(every=5) == []
    later = timezone.now() + datetime.timedelta(hours=13)
    with mock.patch.object(timezone, "now", lambda: later):
        assert len(sealed(every=5)) == 1


def test_a_quiet_site_seals_nothing_now_and_then(configure: Callable[..., None]) -> None:
    configure(AUDIT="off")
    fill(1)
    sealed()
    assert sealed() == []
    later = timezone.now() + datetime.timedelta(hours=13)
    with mock.patch.object(timezone, "now", lambda: later):
        assert [each.count for each in sealed()] == [0]
        assert kinds() == {}


def test_a_silent_sealer_is_a_finding(hmac_key: str, configure: Callable[..., None]) -> None:
    fill(3)
    sealed()
    later = timezone.now() + datetime.timedelta(hours=25)
    with mock.patch.object(timezone, "now", lambda: later):
        assert seals.state().is_overdue
        assert kinds() == {"overdue": 1}
        configure(AUDIT_SEAL_HOURS=26)
        assert kinds() == {}
        configure(AUDIT_SEAL_HOURS=0)
        assert kinds() == {}


def test_the_state_takes_two_queries(
    hmac_key: str, django_assert_num_queries: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(5)
    sealed()
    fill(5)
    with django_assert_num_queries(2):
        state = seals.state()
    assert (str(state.last), state.unsealed, state.is_overdue) == ("1", 7, False)
    monkeypatch.setattr(segments.unsealed, "__defaults__", (6,))
    assert seals.state().unsealed == 6


def test_no_seal_at_all_is_a_finding() -> None:
    fill(3)
    assert kinds() == {"unsealed": 1}


# --- writers, sealers and crashes ---------------------------------------------------


def _in_thread(function: Callable[[], Any]) -> Any:
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(function())
        except exceptions.SealRefused as refused:
            found.append(refused)
        finally:
            connections.close_all()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(30)
    return found[0]


@durable
@server_only
def test_an_event_that_commits_late_is_waited_for(hmac_key: str) -> None:
    """A lower id that is committed after a higher one belongs to the same segment."""
    written, higher, done = threading.Event(), threading.Event(), threading.Event()

    def write() -> None:
        with transaction.atomic():
            fill(1)
            written.set()
            assert higher.wait(10)
            done.wait(0.7)  # the sealer is waiting by now
        connections.close_all()

    thread = threading.Thread(target=write)
    thread.start()
    assert written.wait(10)
    fill(1)
    higher.set()
    (made,) = sealed()
    done.set()
    thread.join()
    assert made.count == 2
    assert kinds() == {}


@durable
@server_only
def test_a_transaction_that_does_not_end_is_not_passed_over(hmac_key: str) -> None:
    with connection.cursor() as cursor:
        if connection.vendor == "mysql":
            cursor.execute("SET SESSION innodb_lock_wait_timeout = 1")
    written, refused = threading.Event(), threading.Event()

    def write() -> None:
        with transaction.atomic():
            fill(1)
            written.set()
            refused.wait(20)
        connections.close_all()

    thread = threading.Thread(target=write)
    thread.start()
    assert written.wait(10)
    fill(1)
    with pytest.raises(exceptions.SealRefused, match="still open"):
        sealed(patience=0.2)
    refused.set()
    thread.join()
    assert not AuditSeal.objects.exists()
    assert sealed()[0].count == 2
    connection.close()


@durable
def test_writers_beside_the_sealer_raise_no_alarm(
    hmac_key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seals, "SEGMENT", 50)
    stop = threading.Event()

    def write() -> None:
        try:
            while not stop.is_set():
                with transaction.atomic():
                    fill(random.randrange(1, 4))
                    stop.wait(random.random() / 3)
                    # The ids of what is rolled back become gaps.
                    transaction.set_rollback(random.random() < 0.3)
        finally:
            connections.close_all()

    with ThreadPoolExecutor(3) as pool:
        writers = [pool.submit(write) for _ in range(3 * (connection.vendor != "sqlite"))]
        try:
            for _ in range(6):
                fill(2)
                list(seals.seal(settle=0.05))
                assert kinds() == {}
        finally:
            stop.set()
        for writer in writers:
            writer.result()
    sealed()
    assert kinds() == {}


@durable
def test_of_two_sealers_one_wins(hmac_key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(3)
    for number in range(2):  # the first seal, and one that has one before it
        of_seal, outcome = anchors.of_seal, []

        def beside(seal: AuditSeal, of_seal: Any = of_seal, outcome: Any = outcome) -> Any:
            monkeypatch.setattr(anchors, "of_seal", of_seal)
            if connection.vendor == "sqlite":  # its database in memory has one connection
                with contextlib.suppress(exceptions.SealRefused):
                    sealed()
                    outcome.append("sealed")
            else:
                outcome.append(_in_thread(sealed))
            return of_seal(seal)

        monkeypatch.setattr(anchors, "of_seal", beside)
        result: Any = None
        try:
            result = sealed()
        except exceptions.SealRefused as refused:
            result = refused
        refusals = [isinstance(each, exceptions.SealRefused) for each in (result, *outcome)]
        assert sorted(refusals) == [False, True]
        assert AuditSeal.objects.count() == number + 1
        assert kinds() == {}
        fill(3)


@pytest.mark.parametrize("where", ["of_seal", "after"])
def test_a_sealer_killed_at_any_instant_goes_on(
    where: str, hmac_key: str, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(25)
    steps = seals.seal(settle=0)
    next(steps)
    if where == "after":
        steps.close()  # type: ignore[attr-defined]
    else:
        with monkeypatch.context() as patched:
            patched.setattr(anchors, "of_seal", mock.Mock(side_effect=KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                next(steps)
    assert AuditSeal.objects.count() == 1
    assert kinds() == {}
    sealed()
    assert kinds() == {}


def test_an_outage_while_sealing_leaves_what_was_sealed(
    hmac_key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(3)
    failing = mock.Mock(side_effect=exceptions.KMSTimeout())
    with monkeypatch.context() as patched:
        patched.setattr(type(keyring.provider()), "encrypt", failing)
        with pytest.raises(exceptions.KMSTimeout):
            sealed()
    assert not AuditSeal.objects.exists()
    sealed()
    assert kinds() == {}


# --- tampering ----------------------------------------------------------------------


@pytest.fixture
def log(hmac_key: str, small: None) -> None:
    """A log of 25 sealed events in three segments."""
    fill(25, gaps=True)
    sealed()


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda each: each.__name__)
def test_mutations_are_found(mutation: Any, log: None, configure: Callable[..., None]) -> None:
    configure(AUDIT="off")
    expected = kept_elsewhere()
    for seed in range(40 if "change" in mutation.__name__ else 8):
        with undone():
            told = mutation(random.Random(seed))
            assert verified(expected=expected).numbers, told
    assert kinds(expected=expected) == {}


def test_it_is_told_which_event_was_changed(log: None) -> None:
    one = ids()[13]
    raw(AuditEvent, "UPDATE {table} SET outcome = 'denied' WHERE id = %s", one)
    report = verified()
    assert [(each.kind, each.sequence, each.event) for each in report.findings] == [
        ("changed", 2, one)
    ]


def test_it_is_told_which_events_were_deleted_inserted_or_swapped(log: None) -> None:
    at = ids()
    raw(AuditEvent, "DELETE FROM {table} WHERE id = %s", at[3])
    free = next(each for each in range(at[0], at[9]) if each not in at)
    fill(1, first=free)
    times = {one: AuditEvent.objects.get(pk=one).time for one in at[20:22]}
    for one, other in (at[20:22], at[21:19:-1]):
        raw(AuditEvent, "UPDATE {table} SET time = %s WHERE id = %s", times[one], other)
    found = {(each.kind, each.event) for each in verified().findings}
    assert found == {
        ("deleted", at[3]),
        ("inserted", free),
        ("changed", at[20]),
        ("changed", at[21]),
    }


def test_an_event_below_all_others_is_inserted(log: None) -> None:
    fill(1, first=-5)
    assert [each.event for each in verified().findings] == [-5]


def test_an_event_with_the_lowest_id_there_can_be_is_inserted(
    hmac_key: str, small: None
) -> None:
    """No segment begins below it."""
    fill(1, first=canonical.FLOOR)
    fill(5, first=7)
    for _ in range(2):
        sealed()
        assert {(each.kind, each.event) for each in verified().findings} == {
            ("inserted", canonical.FLOOR)
        }
    raw(AuditEvent, "DELETE FROM {table} WHERE id = %s", canonical.FLOOR)
    assert kinds() == {}


@loose
@pytest.mark.parametrize("at", range(10))
def test_a_second_event_with_the_same_id_is_found(
    at: int, log: None, configure: Callable[..., None]
) -> None:
    """Once the primary key is gone: at the end of a page too, of three here."""
    configure(AUDIT="off")
    loosen(AuditEvent)
    assert kinds() == {}
    duplicate(AuditEvent, ids()[at], sub="x", request_ids="a b c")
    assert verified().numbers


@loose
def test_an_event_without_an_id_is_found(log: None, configure: Callable[..., None]) -> None:
    configure(AUDIT="off")
    loosen(AuditEvent)
    duplicate(AuditEvent, ids()[3], id=None)
    assert verified().numbers == {"inserted": 1}


@loose
def test_a_seal_behind_the_newest_does_not_keep_kms_from_being_asked(log: None) -> None:
    """By a number that is no whole one, which Django would cut off."""
    last = AuditSeal.objects.get(sequence=3)
    if connection.vendor == "postgresql":
        raw(AuditSeal, "ALTER TABLE {table} ALTER COLUMN sequence TYPE double precision")
    raw(AuditEvent, "UPDATE {table} SET sub = 'x' WHERE id = %s", ids()[3])
    forge()
    assert verified().numbers
    duplicate(AuditSeal, last.pk, id=last.pk + 1000, sequence=3.5)
    report = verified()
    assert verification.NOT_REACHED.format(sequence=3.5) in texts()
    assert report.numbers["seal"]
    assert report.last and report.last.sequence == 3.5
    told = json.loads(run("verify_kms_audit", "--json", status=3)[0])
    assert told["last"]["sequence"] == 3.5
    AuditSeal.objects.filter(pk=last.pk + 1000).update(pruned_at=START)
    report = verified()
    assert (report.pruned, verification.SEALS_UNREADABLE in texts()) == (0, True)


@loose
def test_many_seals_between_two_come_to_an_end(log: None, configure: Any) -> None:
    configure(AUDIT="off")
    last = AuditSeal.objects.get(sequence=3)
    loosen(AuditSeal)
    if connection.vendor == "postgresql":
        raw(AuditSeal, "ALTER TABLE {table} ALTER COLUMN sequence TYPE double precision")
    for at in range(1, 8):
        duplicate(AuditSeal, last.pk, sequence=2 + at / 10)
    assert verified().numbers["seal"]


@loose
@pytest.mark.parametrize("sequence", [1, 2, 3])
def test_a_second_seal_with_the_same_sequence_is_found(
    sequence: int, log: None, configure: Callable[..., None]
) -> None:
    """At the end of a page, of two here, as well: it says that an inserted event came late."""
    configure(AUDIT="off")
    fill(1, first=-3)
    assert kinds() == {"inserted": 1}
    seal = AuditSeal.objects.get(sequence=sequence)
    loosen(AuditSeal)
    duplicate(AuditSeal, seal.pk, id=seal.pk + 1000, late="-3")
    assert verified().numbers["seal"]


@loose
def test_a_seal_below_all_others_is_found(log: None, configure: Callable[..., None]) -> None:
    configure(AUDIT="off")
    fill(1, first=-3)
    loosen(AuditSeal)
    last = AuditSeal.objects.get(sequence=3)
    duplicate(AuditSeal, last.pk, sequence=canonical.FLOOR, late="-3")
    assert verified().numbers["seal"]


@loose
def test_a_seal_without_a_sequence_is_no_last_one(
    log: None, configure: Callable[..., None]
) -> None:
    configure(AUDIT="off")
    loosen(AuditSeal)
    raw(AuditSeal, "UPDATE {table} SET sequence = NULL WHERE sequence = 3")
    assert verified(expected=[(3, "0" * 64)]).numbers["expected"]
    raw(AuditSeal, "UPDATE {table} SET sequence = NULL")
    assert verified().numbers


# --- values that cannot be read -----------------------------------------------------

#: By what a row cannot be read: a column, and what is put into it.
UNREADABLE = {
    "sqlite": {
        AuditEvent: [("sub", "CAST(x'ff' AS TEXT)"), ("time", "'2026-13-45 00:00:00'")],
        AuditSeal: [
            ("root", "CAST(x'ff' AS TEXT)"),
            ("late", "CAST(x'ff' AS TEXT)"),
            ("late", "NULL"),
            ("late", "x'ff'"),
            ("anchors", "'" + "[" * 200_000 + "]" * 200_000 + "'"),
            ("pruned_at", "'x'"),
            ("sealed_at", "'2026-13-45 00:00:00'"),
        ],
    },
    "postgresql": {
        AuditEvent: [("time", "'infinity'"), ("time", "'20000-01-01'")],
        AuditSeal: [
            ("sealed_at", "'infinity'"),
            ("pruned_at", "'infinity'"),
            ("late", "NULL"),
            ("anchors", "(repeat('[', 3000) || repeat(']', 3000))::jsonb"),
        ],
    },
}
HOSTILE = [
    pytest.param(table, column, value, id=f"{table.__name__}-{column}-{value[:12]}")
    for table, values in UNREADABLE.get(connection.vendor, {}).items()
    for column, value in values
]


@pytest.mark.skipif(connection.vendor != "sqlite", reason="others take as many values")
def test_more_late_events_than_can_be_asked_for(log: None, configure: Any) -> None:
    configure(AUDIT="off")
    late = " ".join(map(str, range(1000, 300_000)))
    raw(AuditSeal, "UPDATE {table} SET late = %s WHERE sequence = 1", late)
    assert verification.UNREADABLE.format(sequence=1) in texts()


@pytest.mark.skipif(connection.vendor != "sqlite", reason="others cannot compare them")
def test_sequences_that_are_texts(log: None, configure: Any) -> None:
    configure(AUDIT="off")
    columns = [field.column for field in AuditSeal._meta.concrete_fields]
    columns[columns.index("sequence")] = "CAST(sequence AS TEXT) AS sequence"
    raw(AuditSeal, f"CREATE TABLE texts AS SELECT {', '.join(columns)} FROM {{table}}")
    raw(AuditSeal, "DROP TABLE {table}")
    raw(AuditSeal, "ALTER TABLE texts RENAME TO {table}")
    assert verified().numbers["seal"]


@pytest.mark.parametrize(("table", "column", "value"), HOSTILE)
@pytest.mark.parametrize("sequence", [1, 3])
def test_one_row_that_cannot_be_read_hides_no_other(
    sequence: int,
    table: Any,
    column: str,
    value: str,
    log: None,
    configure: Callable[..., None],
) -> None:
    """The database is not out, and what else there is to find is found."""
    configure(AUDIT="off")
    one, row = ids()[13], AuditSeal.objects.get(sequence=sequence).pk
    row = row if table is AuditSeal else ids()[3 if sequence == 1 else 23]
    loosen(table)
    raw(table, f"UPDATE {{table}} SET {column} = {value} WHERE id = %s", row)
    raw(AuditEvent, "UPDATE {table} SET request_ids = 'x' WHERE id = %s", one)
    report = verified(expected=[(sequence, "0" * 64)])
    assert report.failed is None
    assert report.numbers.keys() & {"seal", "changed"}
    assert one in {each.event for each in report.findings if each.sequence == 2}
    out, err = run("verify_kms_audit", "--json", status=3)
    assert json.loads(out)["error"] == ""
    assert len(out) < 9_000
    assert "database" not in err


def test_an_outage_of_the_database_is_told_beside_what_was_found(
    log: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw(AuditEvent, "UPDATE {table} SET sub = 'x' WHERE id = %s", ids()[3])
    out = mock.Mock(side_effect=OperationalError("gone"))

    def events(version: int, after: int, *args: Any, **options: Any) -> Iterator[Any]:
        if after == canonical.FLOOR:
            return read(version, after, *args, **options)
        raise OperationalError("gone")

    read = segments.events
    with monkeypatch.context() as patched:
        patched.setattr(segments, "events", events)
        patched.setattr(segments, "probe", out)
        _, err = run("verify_kms_audit", status=3)
        assert "findings: 1" in err
        assert "The database failed (OperationalError)" in err
        patched.setattr(segments, "newest", out)
        result = json.loads(run("verify_kms_audit", "--json", status=1)[0])
        assert (result["ok"], result["findings"]) == (False, [])
        assert "OperationalError" in result["error"]
    assert kinds() == {"changed": 1}


def test_what_fails_once_is_read_again(log: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A deadlock or a lock of SQLite's is no finding."""
    read = segments.leaves
    answers: list[Any] = [OperationalError("locked"), *[mock.DEFAULT] * 3]
    leaves = mock.Mock(side_effect=answers, wraps=read)
    monkeypatch.setattr(segments, "leaves", leaves)
    assert kinds() == {}


def test_little_is_quoted_of_what_others_wrote() -> None:
    report = verification.Report()
    report.add("seal", verification.NOT_EXPECTED, 3, root="{x}" * 10_000)
    report.add("seal", verification.NOT_EXPECTED, 3, root="\x1b[2J")
    report.add("seal", verification.OUT_OF_ORDER, "9" * 10_000)  # type: ignore[arg-type]
    assert max(len(each.text) for each in report.findings) < 300
    assert report.findings[1].text.endswith(r"'\x1b[2J'.")
    assert report.findings[2].sequence is None


def test_a_rewritten_past_does_not_hold(log: None) -> None:
    """Whoever owns the database makes all consistent again, but cannot make the anchors."""
    raw(AuditEvent, "UPDATE {table} SET sub = 'x' WHERE id = %s", ids()[3])
    forge()
    assert kinds() == {"anchor": 1}
    assert kinds(all_anchors=True) == {"anchor": 3}
    with pytest.raises(exceptions.SealRefused, match="--unchecked"):
        sealed()
    assert kinds() == {"anchor": 1}


def forge(first: int = 1) -> None:
    """Rewrite the seals to fit the events there are now."""
    before: AuditSeal | None = None
    for seal in AuditSeal.objects.order_by("sequence"):
        if seal.sequence >= first:
            segment = canonical.Segment()
            for values in segments.events(1, seal.after_id, seal.last_id):
                segment.add(values)
            seal.count, seal.root = segment.count, segment.root
            seal.leaves = bytes(segment.leaves)
            seal.leaves_hash = canonical.sha256(segment.leaves).hexdigest()
            seal.previous = canonical.seal_hash(before) if before else ""
            seal.save()
        before = seal


def test_a_forged_newest_seal_is_not_built_on_without_an_hmac_key(small: None) -> None:
    fill(25)
    sealed()
    raw(AuditEvent, "UPDATE {table} SET sub = 'x' WHERE id = %s", ids()[24])
    forge(3)
    assert kinds() == {"anchor": 1}
    with pytest.raises(exceptions.SealRefused):
        sealed()


def test_no_anchor_of_one_seal_does_for_another(log: None) -> None:
    first, last = AuditSeal.objects.get(sequence=1), AuditSeal.objects.get(sequence=3)
    AuditSeal.objects.filter(pk=last.pk).update(anchors=first.anchors)
    assert kinds() == {"anchor": 1}


@pytest.mark.parametrize(
    "anchors_",
    [
        {},
        [],
        "x",
        5,
        {"mac": "zz", "mac_key": 5},
        {"ciphertext": 1, "context_key": "x"},
        {"mac": "zz", "mac_key": "x", "ciphertext": "!", "context_key": "x"},
        {"mac": None, "mac_key": None, "ciphertext": None, "context_key": None},
    ],
)
def test_nonsense_in_place_of_anchors(anchors_: Any, log: None) -> None:
    AuditSeal.objects.filter(sequence=3).update(anchors=anchors_)
    assert kinds() == {"anchor": 1}
    with pytest.raises(exceptions.SealRefused):
        sealed()


@pytest.mark.parametrize("name", ["context_key", "ciphertext"])
def test_the_next_seal_does_not_make_an_altered_anchor_good(name: str, log: None) -> None:
    """A sealer does not ask KMS to decrypt: the MAC tells that the ciphertext is another."""
    first, last = AuditSeal.objects.get(sequence=1), AuditSeal.objects.get(sequence=3)
    other = {**first.anchors, "context_key": encoding.key_ref(str(uuid.uuid4()))}
    last.anchors[name] = other[name]
    last.save(update_fields=["anchors"])
    assert kinds() == {"anchor": 1}
    with pytest.raises(exceptions.SealRefused, match=anchors.WRONG_MAC):
        sealed()


def test_a_mac_is_of_the_seal_and_of_its_ciphertext(
    hmac_key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, generate_mac = [], type(keyring.provider()).generate_mac

    def spy(self: Any, key: str, message: bytes) -> Any:
        seen.append(message)
        return generate_mac(self, key, message)

    monkeypatch.setattr(type(keyring.provider()), "generate_mac", spy)
    fill(5)
    (made,) = sealed()
    sealed_ = made.anchors["context_key"], made.anchors["ciphertext"]
    whole = canonical.frame(canonical.seal_digest(made), *sealed_)
    assert seen == [b"kms_hasher audit anchor 1\0" + canonical.sha256(whole).digest()]


in_other_ways = pytest.mark.parametrize(
    "change",
    [str.swapcase, lambda each: each + " ", lambda each: each + "\n", lambda each: each + "="],
    ids=["case", "blank", "line", "padding"],
)


@in_other_ways
@pytest.mark.parametrize("name", ["context_key", "ciphertext"])
def test_the_only_anchor_written_in_another_way_is_found(
    name: str, change: Callable[[str], str], small: None
) -> None:
    fill(3)
    (seal,) = sealed()
    seal.anchors[name] = change(seal.anchors[name])
    seal.save(update_fields=["anchors"])
    assert kinds() == {"anchor": 1}


@in_other_ways
@pytest.mark.parametrize("name", ["mac", "mac_key", "context_key", "ciphertext"])
def test_an_anchor_written_in_another_way_is_found(
    name: str, change: Callable[[str], str], log: None
) -> None:
    """What it says is the same, but the next seal would vouch for the change."""
    seal = AuditSeal.objects.get(sequence=3)
    seal.anchors[name] = change(seal.anchors[name])
    seal.save(update_fields=["anchors"])
    assert kinds() == {"anchor": 1}


@pytest.mark.parametrize("name", ["mac", "mac_key", "context_key", "ciphertext"])
def test_half_a_character_in_an_anchor_is_found(name: str, log: None) -> None:
    """JSON can hold what no encoding can; not every database takes it."""
    seal = AuditSeal.objects.get(sequence=3)
    seal.anchors[name] += "\ud800"
    assert anchors.check_seal(seal) in (anchors.WRONG_MAC, anchors.WRONG_CONTEXT)


@pytest.mark.parametrize(
    ("add", "drop"),
    [
        ({"more": ""}, []),
        ({}, ["mac_key"]),
        ({}, ["context_key"]),
        ({}, ["ciphertext"]),
        ({}, ["ciphertext", "context_key"]),
    ],
)
def test_adding_to_the_anchors_or_taking_away_is_found(
    add: dict[str, str], drop: list[str], log: None
) -> None:
    seal = AuditSeal.objects.get(sequence=3)
    left = {name: each for name, each in seal.anchors.items() if name not in drop}
    AuditSeal.objects.filter(pk=seal.pk).update(anchors=left | add)
    assert verification.BAD_ANCHOR.format(sequence=3, problem=anchors.WRONG_FORM) == texts()
    with pytest.raises(exceptions.SealRefused, match="not of the form"):
        sealed()


def test_stripping_the_mac_is_found(log: None) -> None:
    seal = AuditSeal.objects.get(sequence=3)
    left = {name: seal.anchors[name] for name in ("context_key", "ciphertext")}
    AuditSeal.objects.filter(pk=seal.pk).update(anchors=left)
    assert verification.BAD_ANCHOR.format(sequence=3, problem=anchors.NO_MAC) == texts()


def test_who_may_encrypt_cannot_forge_a_seal_without_its_mac(
    log: None, configure: Callable[..., None]
) -> None:
    """A web server has the key of passwords, but not that of seals."""
    raw(AuditEvent, "UPDATE {table} SET sub = 'x' WHERE id = %s", ids()[24])
    forge(3)
    configure(AUDIT_SEAL_KEY="")
    seal = AuditSeal.objects.get(sequence=3)
    AuditSeal.objects.filter(pk=seal.pk).update(anchors=anchors.of_seal(seal))
    assert kinds() == {}  # such a site has no better anchor
    configure(AUDIT_SEAL_KEY=SEAL_ALIAS)
    assert kinds() == {"anchor": 1}
    with pytest.raises(exceptions.SealRefused, match="no MAC"):
        sealed()


def test_a_mac_by_another_key_of_the_account_is_not_taken(
    log: None, kms: Provider, configure: Callable[..., None]
) -> None:
    other = kms.create_key(spec="HMAC_256", usage="GENERATE_VERIFY_MAC").key_arn
    configure(AUDIT_SEAL_KEY=other)
    AuditSeal.objects.filter(sequence=3).delete()
    forged = sealed(unchecked=True)
    assert forged[-1].anchors["mac_key"]
    configure(AUDIT_SEAL_KEY=SEAL_ALIAS)
    assert kinds() == {"anchor": 1}


def test_truncating_log_and_seals_is_found_by_what_was_kept_elsewhere(log: None) -> None:
    last = AuditSeal.objects.get(sequence=3)
    digest = canonical.seal_digest(last).hex()
    assert kinds(expected=[(3, digest), (3, last.root)]) == {}
    raw(AuditEvent, "DELETE FROM {table} WHERE id > %s", last.after_id)
    raw(AuditSeal, "DELETE FROM {table} WHERE sequence = 3")
    assert kinds() == {}  # the database alone cannot tell
    assert kinds(expected=[(3, digest)]) == {"expected": 1}
    fill(7)
    sealed()
    assert kinds(expected=[(3, digest)]) == {"expected": 1}
    assert kinds(expected=[(2, "0" * 64)]) == {"expected": 1}


@pytest.mark.skipif(
    connection.vendor != "sqlite", reason="others store no text in columns of other types"
)
@pytest.mark.parametrize(
    ("table", "column"),
    [
        (AuditEvent, "time"),
        (AuditEvent, "latency_us"),
        (AuditSeal, "sealed_at"),
        (AuditSeal, "after_id"),
        (AuditSeal, "count"),
        (AuditSeal, "root"),
    ],
)
@pytest.mark.parametrize("value", ["2026-13-45 00:00:00", "x", 1.5, b"\xff"])
def test_what_sqlite_stores_in_a_column_of_another_type_is_found(
    table: Any, column: str, value: Any, log: None
) -> None:
    with transaction.atomic():
        raw(table, f"UPDATE {{table}} SET {column} = %s WHERE id = %s", value, _last(table))
        assert verified().numbers
        json.loads(run("verify_kms_audit", "--json", status=3)[0])
        transaction.set_rollback(True)


def _last(table: Any) -> int:
    if table is AuditSeal:
        return int(AuditSeal.objects.get(sequence=3).pk)
    return ids()[24]


def test_findings_are_counted_and_the_first_kept(
    log: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification_report, "KEPT", 5)
    raw(AuditEvent, "UPDATE {table} SET latency_us = latency_us + 1 WHERE id <= %s", ids()[24])
    report = verified()
    assert report.numbers == {"changed": 25}
    assert len(report.findings) == 5


# --- an outage is no finding --------------------------------------------------------


@pytest.mark.parametrize(
    "error", [exceptions.KMSTimeout, exceptions.KMSAccessDenied, exceptions.AuditError]
)
def test_when_kms_cannot_tell_that_is_no_finding(
    error: type[exceptions.KMSError], log: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = mock.Mock(side_effect=error())
    monkeypatch.setattr(type(keyring.provider()), "generate_mac", failing)
    report = verified()
    assert not report.numbers
    assert isinstance(report.unasked, error)
    raw(AuditEvent, "UPDATE {table} SET sub = 'x' WHERE id = %s", ids()[3])
    report = verified()
    assert report.numbers == {"changed": 1}


# --- keys ---------------------------------------------------------------------------


def test_a_former_hmac_key_belongs_into_previous_keys(
    log: None, hmac_key: str, kms: Provider, configure: Callable[..., None]
) -> None:
    other = kms.create_key(spec="HMAC_256", usage="GENERATE_VERIFY_MAC").key_arn
    kms.update_alias(SEAL_ALIAS, other)
    assert "PREVIOUS_KEYS" in texts()
    configure(PREVIOUS_KEYS=[hmac_key])
    assert kinds() == {}
    sealed()
    assert kinds() == kinds(all_anchors=True) == {}
    configure(PREVIOUS_KEYS=[])
    assert kinds() == {}


def test_an_hmac_key_may_be_named_later(small: None, request: pytest.FixtureRequest) -> None:
    fill(3)
    sealed()
    request.getfixturevalue("hmac_key")
    assert anchors.NO_MAC in texts()
    with pytest.raises(exceptions.SealRefused, match="no MAC"):
        sealed()
    sealed(unchecked=True)
    assert kinds() == kinds(all_anchors=True) == {}


def test_rotating_the_key_of_passwords_changes_nothing(
    log: None, kms: Provider, key_arn: str
) -> None:
    kms.update_alias("alias/tests", kms.create_key().key_arn)
    assert kinds() == {}
    sealed()
    assert kinds() == kinds(all_anchors=True) == {}
    kms.disable_key(key_arn)  # of older seals, for which the newest vouches
    fill(2)
    sealed()
    assert kinds() == {}


def test_a_disabled_key_keeps_no_sealer_with_an_hmac_key_from_going_on(
    log: None, kms: Provider, key_arn: str
) -> None:
    kms.update_alias("alias/tests", kms.create_key().key_arn)
    kms.disable_key(key_arn)
    assert isinstance(verified().unasked, exceptions.KeyDisabled)
    sealed()
    assert kinds() == {}


def named(key_arn: str, **more: str) -> None:
    """Let the newest seal say that it was encrypted by a key."""
    last = AuditSeal.objects.latest("sequence")
    last.anchors |= {"context_key": encoding.key_ref(key_arn), **more}
    last.save(update_fields=["anchors"])


@pytest.mark.parametrize("more", [{}, {"mac_key": "x", "mac": "x"}])
def test_a_key_that_cannot_be_used_is_a_finding_if_no_setting_leads_to_it(
    more: dict[str, str], small: None, kms: Provider
) -> None:
    """Without a MAC: a forger could make it look as if KMS were out."""
    fill(3)
    sealed()
    other = kms.create_key().key_arn
    kms.disable_key(other)
    named(other, **more)
    history.record_key(other, START)  # who can forge a seal can write this as well
    (finding,) = verified().findings
    assert encoding.key_id(encoding.key_ref(other)) in finding.text
    assert kinds() == {"anchor": 1}
    with pytest.raises(exceptions.SealRefused, match="PREVIOUS_KEYS"):
        sealed()


def test_a_key_that_is_not_there_is_a_finding(small: None) -> None:
    fill(3)
    sealed()
    named(str(uuid.uuid4()))
    assert kinds() == {"anchor": 1}


@pytest.mark.parametrize("error", [exceptions.KMSAccessDenied, exceptions.KMSTimeout])
@pytest.mark.parametrize("is_known", [False, True])
def test_a_denied_key_and_an_outage(
    error: type[exceptions.KMSError],
    is_known: bool,
    small: None,
    kms: Provider,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fill(3)
    sealed()
    if not is_known:
        named(kms.create_key().key_arn)
    failing = mock.Mock(side_effect=error())
    monkeypatch.setattr(type(keyring.provider()), "decrypt", failing)
    report = verified()
    if error is exceptions.KMSAccessDenied and not is_known:
        assert (report.numbers, report.unasked) == ({"anchor": 1}, None)
    else:
        assert not report.numbers
        assert isinstance(report.unasked, error)


@pytest.mark.parametrize(
    "leading",
    [
        lambda former: {"PREVIOUS_KEYS": [former]},
        lambda former: {"AUDIT_CONTEXT_KEY": former},
        lambda former: {"AUDIT_CONTEXT_KEY": former.rpartition("/")[2]},
    ],
)
def test_a_disabled_former_key_is_no_finding_where_a_setting_leads_to_it(
    leading: Callable[[str], dict[str, Any]],
    small: None,
    kms: Provider,
    key_arn: str,
    configure: Callable[..., None],
) -> None:
    fill(3)
    sealed()
    kms.update_alias("alias/tests", kms.create_key().key_arn)
    assert kinds() == {}
    kms.disable_key(key_arn)
    assert kinds() == {"anchor": 1}
    configure(**leading(key_arn))
    report = verified()
    assert not report.numbers
    assert isinstance(report.unasked, exceptions.KeyDisabled)


def test_a_disabled_key_of_the_settings_is_an_outage(
    small: None, kms: Provider, key_arn: str
) -> None:
    fill(3)
    sealed()
    kms.disable_key(key_arn)
    report = verified()
    assert not report.numbers
    assert isinstance(report.unasked, exceptions.KeyDisabled)


def test_a_mac_by_a_key_that_makes_none_is_a_finding(
    log: None, key_arn: str, configure: Callable[..., None]
) -> None:
    """A former key of passwords, say: it must not look as if KMS were out."""
    configure(PREVIOUS_KEYS=[key_arn])
    last = AuditSeal.objects.get(sequence=3)
    last.anchors["mac_key"] = encoding.key_ref(key_arn)
    last.save(update_fields=["anchors"])
    assert kinds() == {"anchor": 1}
    configure(
        AUDIT_SEAL_KEY="alias/tests", PREVIOUS_KEYS=[]
    )  # that is a mistake in the settings
    assert isinstance(verified().unasked, exceptions.InvalidRequest)


def test_a_key_that_a_mac_vouches_for_may_be_gone(
    log: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = mock.Mock(side_effect=exceptions.KeyNotFound())
    monkeypatch.setattr(type(keyring.provider()), "decrypt", failing)
    report = verified()
    assert not report.numbers
    assert isinstance(report.unasked, exceptions.KeyNotFound)


# --- ids that are too high ---------------------------------------------------------


def test_an_id_that_leaves_no_room_is_not_sealed(
    log: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = ids()[-1]
    high = last + 10**6
    monkeypatch.setattr(seals, "ROOM", canonical.CEILING - high + 1)
    raw(AuditEvent, "UPDATE {table} SET id = %s WHERE id = %s", high, last)
    with pytest.raises(exceptions.SealRefused, match=f"the id {high}, "):
        sealed(unchecked=True)
    raw(AuditEvent, "DELETE FROM {table} WHERE id = %s", high)
    sealed()
    assert kinds() == {}


def test_the_way_back_from_a_high_id_that_was_sealed(
    log: None, configure: Callable[..., None]
) -> None:
    configure(AUDIT="off")
    last = ids()[-1]
    fill(1, first=last + 10**6)
    sealed()
    fill(3, first=last + 1)
    assert kinds() == {"inserted": 3}
    sealed(admit=[last + 1, last + 2, last + 3])
    fill(3, first=last + 10**6 + 1)
    sealed()
    assert kinds() == {}


# --- late events --------------------------------------------------------------------


def test_a_late_event_is_a_finding_until_it_is_admitted(log: None) -> None:
    at = ids()
    free = next(each for each in range(at[0], at[9]) if each not in at)
    fill(1, first=free)
    assert kinds() == {"inserted": 1}
    (made, *_) = sealed(admit=[free])
    assert made.late == str(free)
    assert kinds() == {}
    raw(AuditEvent, "UPDATE {table} SET sub = 'x' WHERE id = %s", free)
    assert {(each.kind, each.event) for each in verified().findings} == {("changed", free)}
    raw(AuditEvent, "DELETE FROM {table} WHERE id = %s", free)
    assert {(each.kind, each.event) for each in verified().findings} == {("deleted", free)}


def test_only_late_events_are_admitted(log: None) -> None:
    at = ids()
    missing = next(each for each in range(at[0], at[9]) if each not in at)
    for wrong in (at[3], missing, at[-1], at[-1] + 99):
        with pytest.raises(exceptions.SealRefused, match="cannot be admitted"):
            sealed(admit=[wrong])
    with pytest.raises(exceptions.SealRefused, match="At most"):
        sealed(admit=list(range(2000)))


# --- pruning ------------------------------------------------------------------------


def mark_pruned(upto: int) -> AuditSeal:
    later = timezone.now() + datetime.timedelta(days=1)
    return pruning.mark_pruned(segments.seals().get(sequence=upto), later)


def prune(upto: int) -> None:
    segments.pruned_events(mark_pruned(upto))._raw_delete("default")


def test_pruned_segments_keep_their_seal(log: None) -> None:
    prune(1)
    assert (len(ids()) > 15, kinds()) == (True, {})
    assert verified().pruned == 1
    prune(2)
    assert kinds() == {}
    sealed()
    assert kinds() == {}
    assert bytes(AuditSeal.objects.get(sequence=1).leaves) == b""
    prune(3)
    prune(3)
    assert kinds() == {}
    raw(AuditSeal, "DELETE FROM {table} WHERE sequence = 2")
    assert "Seals are missing: 2 to 2." in texts()


def test_a_pruning_cut_short_raises_no_alarm(log: None) -> None:
    mark_pruned(2)
    assert kinds() == {}
    raw(AuditEvent, "DELETE FROM {table} WHERE id = %s", ids()[4])
    assert kinds() == {}
    raw(AuditEvent, "UPDATE {table} SET sub = 'x' WHERE id = %s", ids()[4])
    assert kinds() == {"changed": 1}


def test_an_event_slipped_into_what_was_pruned_is_found(log: None) -> None:
    free = ids()[2]
    prune(1)
    fill(1, first=free + 10**9 if free in ids() else 1)
    prune(2)
    sealed()
    prune(3)
    raw(AuditEvent, "DELETE FROM {table} WHERE id < 0")
    fill(1, first=-7)
    assert kinds() == {"inserted": 1}


def test_deleting_is_not_made_pruning_by_saying_so(log: None) -> None:
    seal = AuditSeal.objects.get(sequence=1)
    raw(AuditEvent, "DELETE FROM {table} WHERE id <= %s", seal.last_id)
    assert kinds() == {"deleted": 10}
    AuditSeal.objects.filter(pk=seal.pk).update(pruned_at=timezone.now())
    assert kinds() == {"pruning": 1}
    AuditSeal.objects.filter(pk=seal.pk).update(pruning_anchors=seal.anchors)
    assert kinds() == {"pruning": 1}
    with pytest.raises(exceptions.SealRefused, match="pruned up to segment 1"):
        sealed()


def test_a_pruning_is_carried_on_by_the_next_seal(
    log: None, calls: Callable[[], list[str]]
) -> None:
    prune(1)
    made = len(calls())
    assert kinds() == {}
    assert calls()[made:] == ["GenerateMac", "Decrypt"] * 2
    sealed()
    made = len(calls())
    assert kinds() == {}
    assert calls()[made:] == ["GenerateMac", "Decrypt"]
    AuditSeal.objects.filter(sequence=1).update(
        pruned_at=F("pruned_at") + datetime.timedelta(seconds=1)
    )
    assert kinds() == {"pruning": 1}
    AuditSeal.objects.filter(sequence=1).update(pruned_at=None, pruning_anchors={})
    assert kinds() == {"pruning": 1, "deleted": 10}


def test_when_kms_cannot_tell_of_a_pruning_that_is_no_finding(
    log: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    prune(1)
    failing = mock.Mock(side_effect=exceptions.KMSTimeout())
    monkeypatch.setattr(type(keyring.provider()), "generate_mac", failing)
    report = verified()
    assert not report.numbers
    assert isinstance(report.unasked, exceptions.KMSTimeout)


def test_what_was_pruned_while_it_was_read_is_no_finding(
    log: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = segments.events

    def slow(*args: Any, **options: Any) -> Iterator[Any]:
        monkeypatch.setattr(segments, "events", read)
        prune(1)
        return read(*args, **options)

    monkeypatch.setattr(segments, "events", slow)
    assert kinds() == {}


def test_a_late_event_outlives_the_segment_it_came_too_late_for(log: None) -> None:
    at = ids()
    free = next(each for each in range(at[0], at[9]) if each not in at)
    fill(1, first=free)
    sealed(admit=[free])
    prune(3)
    assert free in ids()
    assert kinds() == {}
    prune(AuditSeal.objects.latest("sequence").sequence)
    assert free not in ids()
    assert kinds() == {}


def test_what_can_be_pruned_is_told_by_the_time_of_the_seal(log: None) -> None:
    now = timezone.now()
    assert pruning.prunable_before(now - datetime.timedelta(days=1)) == 0
    assert pruning.prunable_before(now + datetime.timedelta(days=1)) == 3
    second = AuditSeal.objects.get(sequence=2)
    assert pruning.prunable_before(second.sealed_at) == 1
    with pytest.raises(exceptions.SealRefused, match="Seal 2 is not older than"):
        pruning.mark_pruned(second, second.sealed_at)


def test_nothing_can_be_pruned_before_anything_is_sealed() -> None:
    assert pruning.prunable_before(timezone.now()) == 0


# --- the commands -------------------------------------------------------------------


def run(name: str, *arguments: str, status: int = 0) -> tuple[str, str]:
    out, err = io.StringIO(), io.StringIO()
    if name == "seal_kms_audit":
        arguments = ("--settle=0", *arguments)
    try:
        call_command(name, *arguments, stdout=out, stderr=err, no_color=True)
    except CommandError as error:
        assert error.returncode == status, error
        return out.getvalue(), f"{err.getvalue()}{error}"
    assert status == 0
    return out.getvalue(), err.getvalue()


def test_the_commands_seal_and_verify(hmac_key: str, small: None) -> None:
    assert run("seal_kms_audit") == ("There is nothing to seal yet.\n", "")
    fill(12)
    out, _ = run("seal_kms_audit")
    last = AuditSeal.objects.get(sequence=2)
    kept = f"2:{canonical.seal_digest(last).hex()}"
    assert "Sealed 1: 10 events" in out
    assert f"root {last.root}" in out
    assert out.rstrip().endswith(kept)
    out, _ = run("verify_kms_audit", "--expect", kept, "--all-anchors", "--from=2")
    assert "as it was sealed: 2 events up to segment 2." in out
    assert "Not sealed yet:" in out
    result = json.loads(run("seal_kms_audit", "--json")[0])
    assert result["ok"] is True
    assert result["seals"][0]["sequence"] == 3


def test_all_that_is_expected_of_a_seal_is_looked_at(log: None) -> None:
    digest = canonical.seal_digest(AuditSeal.objects.get(sequence=3)).hex()
    told = [f"--expect=3:{each}" for each in ("0" * 64, digest)]
    for arguments in (told, told[::-1]):
        assert "not the one expected" in run("verify_kms_audit", *arguments, status=3)[0]


def test_verify_tells_a_monitor(log: None) -> None:
    result = json.loads(run("verify_kms_audit", "--json")[0])
    assert (result["ok"], result["events"], result["last"]["sequence"]) == (True, 25, 3)
    raw(AuditEvent, "DELETE FROM {table} WHERE id = %s", one := ids()[3])
    out, err = run("verify_kms_audit", status=3)
    assert f"Event {one} of segment 1 was deleted." in out
    assert "findings: 1" in err
    result = json.loads(run("verify_kms_audit", "--json", status=3)[0])
    assert result["findings"] == [
        {
            "kind": "deleted",
            "text": f"Event {one} of segment 1 was deleted.",
            "sequence": 1,
            "event": one,
        }
    ]


def test_verify_tells_an_outage_from_a_finding(
    log: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = mock.Mock(side_effect=exceptions.KMSTimeout())
    monkeypatch.setattr(type(keyring.provider()), "decrypt", failing)
    _, err = run("verify_kms_audit", status=1)
    assert "KMS could not be asked" in err
    result = json.loads(run("verify_kms_audit", "--json", status=1)[0])
    assert (result["ok"], result["findings"]) == (False, [])


def test_seal_fails_with_a_message(log: None, kms: Provider, hmac_key: str) -> None:
    kms.disable_key(hmac_key)
    assert "disabled" in run("seal_kms_audit", status=1)[1]
    result = json.loads(run("seal_kms_audit", "--json", status=1)[0])
    assert (result["ok"], result["seals"]) == (False, [])


@pytest.mark.parametrize("value", ["3", "3:xyz", "x:" + "0" * 64, ":" + "0" * 64])
def test_what_is_expected_must_be_told_as_it_was_printed(value: str) -> None:
    with pytest.raises(CommandError, match="SEQUENCE:DIGEST"):
        call_command("verify_kms_audit", "--expect", value)


def test_status_tells_of_the_last_seal(log: None, kms: Provider) -> None:
    out, _ = run("kms_status", "--no-permissions")
    assert "last seal: 3, " in out
    told = json.loads(run("kms_status", "--json", "--no-permissions")[0])["sealing"]
    assert (told["sequence"], told["is_overdue"]) == (3, False)
    later = timezone.now() + datetime.timedelta(hours=30)
    with mock.patch.object(timezone, "now", lambda: later):
        assert "sealing is overdue" in run("kms_status", "--no-permissions", status=1)[0]
