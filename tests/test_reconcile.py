"""CloudTrail and the audit compared: what one has and the other lacks is found, and no more."""

from __future__ import annotations

import datetime
import io
import json
import os
import random
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from django.contrib.auth.hashers import make_password
from django.contrib.auth.models import User
from django.core.management import CommandError, call_command
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from kms_hasher import calls, data_keys, encoding, history, keyring, signals
from kms_hasher.audit import alarms, attempts, findings, reconcile, retention, seals
from kms_hasher.audit.reconcile import Report
from kms_hasher.audit.workspace import Workspace
from kms_hasher.exceptions import ConfigurationError, TrailError
from kms_hasher.models import (
    AuditEvent,
    AuditEvidence,
    AuditFinding,
    AuditSeal,
    DataKey,
    Key,
    TrailFile,
    TrailMark,
)
from tests import modes
from tests.trail import ARN, ARN_2, REGION, SITE, THIEF, re_encryption, record, write

pytestmark = pytest.mark.django_db

UTC = datetime.timezone.utc
START = datetime.datetime(2026, 11, 21, 12, tzinfo=UTC)
NOW = START + datetime.timedelta(hours=12)
Kind, Severity = AuditFinding.Kind, AuditFinding.Severity


def at(minutes: float) -> datetime.datetime:
    return START + datetime.timedelta(minutes=minutes)


def new_sub() -> str:
    return uuid.uuid4().hex


@pytest.fixture(autouse=True)
def known_keys() -> None:
    for arn in (ARN, ARN_2):
        history.record_key(arn, START)


@pytest.fixture
def configure(settings: Any) -> Callable[..., None]:
    def change(**values: Any) -> None:
        settings.KMS_HASHER = {**settings.KMS_HASHER, **values}

    return change


def made(time: datetime.datetime, **changes: Any) -> AuditEvent:
    """Store an event as the recorder would."""
    values: dict[str, Any] = {
        "time": time,
        "operation": "Decrypt",
        "purpose": "login",
        "outcome": signals.SUCCESS,
        "key_ref": encoding.key_ref(ARN),
        "requested_key": ARN,
        "latency_us": 12_000,
        "request_ids": str(uuid.uuid4()),
        "sub": new_sub(),
    }
    return AuditEvent.objects.create(**{**values, **changes})


def seen(event: AuditEvent, **changes: Any) -> dict[str, Any]:
    """Return the record that CloudTrail has of an event."""
    values = {"sub": event.sub, "request_id": event.request_ids.split()[-1], **changes}
    return record(event.time, event.operation, **values)


def traffic(number: int = 30, start: float = 0, step: float = 1) -> list[dict[str, Any]]:
    """Make events, one a minute, and return their records."""
    return [seen(made(at(start + step * each))) for each in range(number)]


def compare(folder: Path, **options: Any) -> Report:
    options.setdefault("now", NOW)
    return reconcile.reconcile([folder], **options)


def unknown() -> set[str]:
    """Return the `eventID`s of calls that were found to be nobody's."""
    rows = AuditEvidence.objects.filter(
        finding__kind__in=[Kind.UNKNOWN_CALL, Kind.UNKNOWN_CHANGE], explained_at=None
    )
    return set(rows.values_list("reference", flat=True))


# --- both have it -------------------------------------------------------------------


def test_what_both_have_is_no_finding(tmp_path: Path) -> None:
    write(tmp_path, at(40), [*traffic(30), record(at(120), "ListBuckets")])
    report = compare(tmp_path)
    assert (report.calls, report.matched, report.events) == (31, 30, 30)
    assert report.errors == [] and not AuditFinding.objects.exists()
    assert TrailMark.objects.get().until == at(120) - datetime.timedelta(minutes=30)


def test_a_re_encryption_is_one_event(tmp_path: Path) -> None:
    event = made(at(1), operation="ReEncrypt", key_ref=encoding.key_ref(ARN_2))
    found = re_encryption(at(1), event.sub, requestID=event.request_ids)
    write(tmp_path, at(5), [found, seen(made(at(60)))])
    assert compare(tmp_path).matched == 2
    assert not AuditFinding.objects.exists()


def test_every_attempt_has_its_own_id(tmp_path: Path) -> None:
    event = made(at(1), request_ids="first second")
    write(
        tmp_path,
        at(5),
        [
            seen(event, request_id="first", errorCode="KMSInternalException"),
            seen(event, request_id="second"),
        ],
    )
    assert compare(tmp_path).matched == 2
    assert not AuditFinding.objects.exists()


def test_records_that_come_twice_are_one(tmp_path: Path) -> None:
    strange = record(at(2), sub=new_sub(), caller=THIEF)
    records = [*traffic(), strange]
    write(tmp_path, at(5), records)
    write(tmp_path, at(6), records)
    report = compare(tmp_path)
    assert (report.duplicates, report.matched, report.unknown) == (31, 30, 1)
    assert AuditFinding.objects.get().count == 1


# --- only in CloudTrail -------------------------------------------------------------


def test_a_call_that_nobody_here_made(tmp_path: Path) -> None:
    user = User.objects.create(username="rose", password=make_password("secret"))
    sub = encoding.parse(user.password).header.sub
    strange = record(at(7), sub=sub, caller=THIEF)
    write(tmp_path, at(10), [*traffic(), strange])
    report = compare(tmp_path)
    assert (report.unknown, report.new, report.holders) == (1, 1, 1)
    finding = AuditFinding.objects.get()
    assert (finding.kind, finding.severity) == (Kind.UNKNOWN_CALL, Severity.CRITICAL)
    assert finding.subject == f"Decrypt by {THIEF.rpartition('/')[0]}"
    assert finding.key_ref == encoding.key_ref(ARN)
    assert finding.first_seen == finding.last_seen == at(7)
    assert finding.details == {
        "source_ips": {"203.0.113.66": 1},
        "user_agents": {"aws-cli/2.0": 1},
        "callers": {THIEF: 1},
        "error_codes": {},
        "stored_passwords": 1,
        "accounts": [f"auth.User.password {user.pk}"],
    }
    evidence = finding.evidence.get()
    assert (evidence.reference, evidence.sub) == (strange["eventID"], sub)
    assert evidence.request_id == strange["requestID"]


@pytest.fixture
def envelope(settings: Any, kms: Any) -> Iterator[None]:
    modes.use(settings, "envelope", AUDIT="inline")
    yield
    data_keys.close()


def sub_of(data_key: DataKey) -> str:
    return encoding.parse(data_key.sealed).header.sub


@pytest.mark.usefixtures("envelope")
def test_whose_passwords_a_data_key_has_sealed(tmp_path: Path) -> None:
    for number in range(3):
        User.objects.create(username=f"u{number}", password=make_password("secret"))
    data_key = DataKey.objects.get()
    (unused,) = data_keys.make(keyring.access(encoding.parse(data_key.sealed).header, "set"), 1)
    user = User.objects.create(username="rose", password="!")
    strange = [
        record(at(7 + number), sub=sub, caller=THIEF)
        for number, sub in enumerate(
            [sub_of(data_key), sub_of(data_key), sub_of(DataKey.objects.get(pk=unused))]
        )
    ]
    write(tmp_path, at(10), [*traffic(), *strange])
    assert compare(tmp_path).holders == 3
    finding = AuditFinding.objects.get()
    assert finding.count == 3 and finding.details["stored_passwords"] == 3
    assert finding.details["accounts"] == [
        f"kms_hasher.DataKey.sealed {data_key.pk}: 3 passwords",
        f"kms_hasher.DataKey.sealed {unused}: 0 passwords",
    ]
    # One is sealed by it now; what was told is of the time when it was looked for.
    user.set_password("secret")
    user.save()
    write(tmp_path, at(11), [record(at(9.5), sub=sub_of(data_key), caller=THIEF)])
    assert compare(tmp_path).holders == 4
    assert AuditFinding.objects.get().details["stored_passwords"] == 4


def test_a_call_by_our_own_role_is_found_as_well(tmp_path: Path) -> None:
    strange = record(at(7), sub=new_sub(), caller=SITE, sourceIPAddress="203.0.113.9")
    write(tmp_path, at(10), [*traffic(), strange])
    compare(tmp_path)
    assert unknown() == {strange["eventID"]}
    assert AuditEvidence.objects.get().holder == ""  # no stored password has it


def test_calls_of_one_caller_are_one_finding(tmp_path: Path) -> None:
    strange = [record(at(7 + n), sub=new_sub(), caller=THIEF) for n in range(20)]
    refused = record(at(3), sub=new_sub(), caller=THIEF, errorCode="AccessDenied")
    write(tmp_path, at(10), [*traffic(60), *strange, refused])
    compare(tmp_path)
    many, one = AuditFinding.objects.order_by("-count")
    assert (many.count, one.count) == (20, 1)
    assert (many.severity, one.severity) == (Severity.CRITICAL, Severity.WARNING)
    assert (many.first_seen, many.last_seen) == (at(7), at(26))


@pytest.mark.parametrize(
    ("changes", "number"),
    [
        ({"operation": "DescribeKey"}, "looks"),
        ({"operation": "GetKeyPolicy"}, "looks"),
        ({"operation": "RotateKey", "eventType": "AwsServiceEvent"}, "by_aws"),
        ({"context": {"application": "shop"}}, "foreign"),
        ({"context": {"application": "kms_hasher", "deployment": "other"}}, "foreign"),
        ({"context": {"application": "kms_hasher", "use": "status"}}, "foreign"),
        ({"key": ARN.replace("1234abcd", "9999abcd")}, None),
    ],
)
def test_calls_that_are_no_finding(
    tmp_path: Path, changes: dict[str, Any], number: str | None
) -> None:
    write(tmp_path, at(10), [*traffic(), record(at(7), caller=THIEF, **changes)])
    report = compare(tmp_path)
    assert not AuditFinding.objects.exists()
    assert report.calls == (31 if number else 30)
    if number:
        assert getattr(report, number) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"context": {"application": "kms_hasher", "deployment": "mine", "sub": "ab" * 16}},
        {"context": {}},
        {"operation": "GenerateMac"},
        {"operation": "PutKeyPolicy"},
        {"operation": "CreateGrant"},
        {
            "resources": None,
            "requestParameters": {"keyId": "alias/tests"},
            "operation": "Encrypt",
        },
    ],
)
def test_calls_that_are_one(
    tmp_path: Path, changes: dict[str, Any], configure: Callable[..., None]
) -> None:
    configure(DEPLOYMENT="mine")
    strange = record(at(7), caller=THIEF, **changes)
    write(tmp_path, at(10), [*traffic_of("mine"), strange])
    compare(tmp_path)
    assert unknown() == {strange["eventID"]}


@pytest.mark.parametrize(
    ("operation", "severity"),
    [
        ("ScheduleKeyDeletion", Severity.CRITICAL),
        ("DisableKey", Severity.CRITICAL),
        ("PutKeyPolicy", Severity.CRITICAL),
        ("CreateGrant", Severity.CRITICAL),
        ("CreateAlias", Severity.CRITICAL),
        ("UpdateAlias", Severity.CRITICAL),
        ("DeleteAlias", Severity.CRITICAL),
        ("DeleteImportedKeyMaterial", Severity.CRITICAL),
        ("TagResource", Severity.WARNING),
        ("EnableKey", Severity.WARNING),
    ],
)
def test_how_bad_a_change_is(tmp_path: Path, operation: str, severity: str) -> None:
    done = record(at(7), operation, caller=THIEF)
    refused = record(at(7), operation, caller=THIEF, errorCode="AccessDenied")
    write(tmp_path, at(10), [*traffic(), done, refused])
    compare(tmp_path)
    rows = AuditEvidence.objects.values_list("reference", "finding__severity")
    assert dict(rows) == {done["eventID"]: severity, refused["eventID"]: Severity.WARNING}


STRANGE = ARN.replace("1234abcd", "9999abcd")
OURS = f"{ARN.partition(':key/')[0]}:alias/tests"


def moved(alias: str, minutes: float = 7) -> dict[str, Any]:
    """Return the record of an alias that was moved to a key which is none of ours."""
    return record(
        at(minutes),
        "UpdateAlias",
        caller=THIEF,
        requestParameters={"aliasName": "alias/tests", "targetKeyId": STRANGE},
        resources=[{"ARN": alias}, {"ARN": STRANGE}],
    )


@pytest.mark.parametrize("named", ["alias/tests", OURS])
def test_our_alias_on_the_key_of_a_stranger(
    tmp_path: Path, configure: Callable[..., None], named: str
) -> None:
    configure(KEY=named)
    strange = moved(OURS)
    write(tmp_path, at(10), [*traffic(), strange])
    compare(tmp_path)
    assert unknown() == {strange["eventID"]}


@pytest.mark.parametrize("named", ["alias/tests", OURS])
@pytest.mark.parametrize("part", [REGION, ARN.split(":")[4]])
def test_an_alias_of_that_name_elsewhere_is_not_ours(
    tmp_path: Path, configure: Callable[..., None], named: str, part: str
) -> None:
    configure(KEY=named)
    if named == "alias/tests":
        history.record_alias(named, Key.objects.get(arn=ARN), START)
    elsewhere = OURS.replace(part, "us-east-1" if part == REGION else "999988887777")
    write(tmp_path, at(10), [*traffic(), moved(OURS), moved(elsewhere)])
    assert compare(tmp_path).unknown == 1


def test_an_alias_in_a_region_to_fall_back_on_is_ours(
    tmp_path: Path, configure: Callable[..., None]
) -> None:
    configure(KEY=OURS, FALLBACK_REGIONS=["eu-west-1"])
    strange = moved(OURS.replace(REGION, "eu-west-1"))
    write(tmp_path, at(10), [*traffic(), strange])
    compare(tmp_path)
    assert unknown() == {strange["eventID"]}


def traffic_of(deployment: str) -> list[dict[str, Any]]:
    found = []
    for each in range(10):
        event = made(at(each))
        context = {"application": "kms_hasher", "sub": event.sub, "deployment": deployment}
        found.append(seen(event, context=context))
    return found


def test_what_is_too_fresh_or_too_old_is_not_judged(tmp_path: Path) -> None:
    old = record(at(-60), sub=new_sub(), caller=THIEF)
    fresh = record(at(28), sub=new_sub(), caller=THIEF)
    write(tmp_path, at(30), [*traffic(), old, fresh])
    report = compare(tmp_path, now=at(31))
    assert (report.early, report.waiting, report.unknown) == (1, 1, 0)
    report = compare(tmp_path)
    assert (report.waiting, report.unknown) == (0, 1)
    assert unknown() == {fresh["eventID"]}


def days(number: float) -> datetime.datetime:
    return at(number * 24 * 60)


@pytest.mark.parametrize(
    "changes",
    [
        {"outcome": signals.DENIED, "error_code": "InvalidSignatureException"},
        {"outcome": signals.UNAVAILABLE, "request_ids": ""},
        {"operation": "Parse", "outcome": signals.INVALID, "request_ids": ""},
    ],
)
def test_an_event_of_a_clock_in_the_past_makes_no_old_call_unknown(
    tmp_path: Path, changes: dict[str, str]
) -> None:
    """KMS answers no call of such a clock."""
    made(datetime.datetime(1970, 1, 2, tzinfo=UTC), **changes)
    old = [record(days(-each), sub=new_sub()) for each in range(1, 4)]
    strange = record(at(7), sub=new_sub(), caller=THIEF)
    write(tmp_path, at(10), [*old, *traffic(), strange])
    report = compare(tmp_path)
    assert (report.early, report.unknown) == (3, 1)
    assert unknown() == {strange["eventID"]}


def test_where_no_call_was_answered_none_is_too_old(tmp_path: Path) -> None:
    made(at(5), outcome=signals.DENIED, error_code="AccessDeniedException")
    strange = record(days(-9), sub=new_sub(), caller=THIEF)
    write(tmp_path, at(10), [strange])
    assert compare(tmp_path).unknown == 1


def test_calls_as_old_as_what_was_pruned_are_not_judged(tmp_path: Path) -> None:
    """An old event that was admitted late outlives the others of its time."""
    old = [made(days(-9) + datetime.timedelta(minutes=each)) for each in range(5)]
    late = AuditEvent.objects.filter(pk=old[1].pk)
    late._raw_delete("default")
    with mock.patch.object(timezone, "now", lambda: days(-8)):
        list(seals.seal(settle=0))
    late.bulk_create([old[1]])
    with mock.patch.object(timezone, "now", lambda: days(-1)):
        list(seals.seal(settle=0, admit=[old[1].pk]))
    list(retention.prune(retention.prunable(days(-7))))
    assert list(AuditEvent.objects.filter(time__lt=days(-8))) == [old[1]]
    strange = record(days(-8) + datetime.timedelta(minutes=1), sub=new_sub(), caller=THIEF)
    write(tmp_path, at(10), [*map(seen, old), strange, *traffic()])
    report = compare(tmp_path)
    assert (report.early, report.matched) == (4, 31)
    assert unknown() == {strange["eventID"]}


@pytest.mark.parametrize("forged", ["marked", "inserted"])
def test_a_pruning_that_never_was_hides_no_call(tmp_path: Path, forged: str) -> None:
    known = [made(at(each)) for each in range(10)]
    with mock.patch.object(timezone, "now", lambda: at(20)):
        (seal,) = seals.seal(settle=0)
    made(at(21))
    if forged == "inserted":
        seal.pk, seal.sequence, seal.last_id = None, 2, known[0].pk - 5
        seal.save(force_insert=True)
    AuditSeal.objects.filter(pk=seal.pk).update(pruned_at=at(20), pruning_anchors={})
    strange = record(at(5), sub=new_sub(), caller=THIEF)
    write(tmp_path, at(30), [*map(seen, known), strange])
    assert (compare(tmp_path).unknown, unknown()) == (1, {strange["eventID"]})


# --- attempts without an answer -----------------------------------------------------


def timed_out(minutes: float, **changes: Any) -> AuditEvent:
    """Store the event of a call that got no answer at all."""
    values = {
        "outcome": signals.UNAVAILABLE,
        "error_code": "ReadTimeoutError",
        "request_ids": "",
        "latency_us": 4_000_000,
    }
    return made(at(minutes), **{**values, **changes})


def attempt(event: AuditEvent, seconds: float = -2, **changes: Any) -> dict[str, Any]:
    time = event.time + datetime.timedelta(seconds=seconds)
    return record(time, event.operation, sub=event.sub, **changes)


def test_attempts_that_got_no_answer_are_ours(tmp_path: Path) -> None:
    event = timed_out(5)
    late = made(at(6), latency_us=2_100_000)  # the first timed out, the second did not
    write(
        tmp_path,
        at(10),
        [*traffic(), attempt(event, -4), attempt(event, -2), seen(late), attempt(late)],
    )
    report = compare(tmp_path)
    assert (report.matched, report.attempts, report.unknown) == (31, 3, 0)


def test_a_call_that_never_arrived_is_no_finding(tmp_path: Path) -> None:
    timed_out(5)
    made(at(6), outcome=signals.DENIED, error_code="AccessDeniedException")
    timed_out(7, error_code="KMSCircuitOpen", latency_us=1)
    write(tmp_path, at(10), [*traffic(), seen(made(at(90)))])
    report = compare(tmp_path)
    assert (report.missing, report.unknown) == (0, 0)


def test_no_more_calls_than_attempts_hide_behind_an_event(tmp_path: Path) -> None:
    event = timed_out(5)
    calls = [attempt(event, -n) for n in range(5)]
    write(tmp_path, at(10), [*traffic(), *calls])
    report = compare(tmp_path)
    assert (report.attempts, report.unknown) == (2, 3)


@pytest.mark.parametrize(
    "changes",
    [
        {"seconds": 30},
        {"seconds": -60},
        {"caller": THIEF},
        {"userAgent": "aws-cli/2.0"},
        {"key": ARN_2},
        {"context": {"application": "kms_hasher", "sub": "0" * 32}},
    ],
)
def test_no_call_of_another_hides_behind_an_attempt(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    strange = attempt(timed_out(5), **changes)
    write(tmp_path, at(10), [*traffic(), strange])
    compare(tmp_path)
    assert unknown() == {strange["eventID"]}


@pytest.mark.parametrize("caller", [SITE, THIEF])
def test_nobody_is_taken_for_us_where_no_call_was_matched(tmp_path: Path, caller: str) -> None:
    strange = attempt(timed_out(5), caller=caller)
    write(tmp_path, at(6), [strange])
    assert compare(tmp_path).unknown == 1
    # Once one of ours is known by its id, it is told which were ours.
    write(tmp_path, at(20), [seen(made(at(15)))])
    compare(tmp_path)
    assert unknown() == ({strange["eventID"]} if caller == THIEF else set())


def test_no_call_hides_behind_a_login_that_was_answered_at_once(tmp_path: Path) -> None:
    event = made(at(5))
    strange = attempt(event, 1)
    refused = made(at(7), outcome=signals.DENIED, error_code="AccessDeniedException")
    other = attempt(refused, 1)
    write(tmp_path, at(10), [*traffic(), seen(event), strange, other])
    compare(tmp_path)
    assert unknown() == {strange["eventID"], other["eventID"]}


def test_no_call_hides_behind_one_that_was_not_made(tmp_path: Path) -> None:
    strange = attempt(timed_out(5, error_code="KMSCircuitOpen", latency_us=9))
    parsed = made(at(9), operation="Parse", outcome=signals.INVALID, request_ids="")
    other = record(at(9), sub=parsed.sub, caller=SITE)
    write(tmp_path, at(10), [*traffic(), strange, other])
    compare(tmp_path)
    assert unknown() == {strange["eventID"], other["eventID"]}


def many_timed_out(number: int, minutes: float, step: float, **changes: Any) -> str:
    """Store events of one stored password that got no answer; return its `sub`."""
    sub, values = new_sub(), {"request_ids": "", "latency_us": 4_000_000, "key_ref": ""}
    AuditEvent.objects.bulk_create(
        AuditEvent(
            time=at(minutes + step * each),
            operation="Decrypt",
            outcome=signals.UNAVAILABLE,
            sub=sub,
            **{**values, **changes},
        )
        for each in range(number)
    )
    return sub


@pytest.mark.parametrize("request_ids", ["", "a b"])
def test_many_attempts_in_vain_are_not_gone_through_for_each_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request_ids: str
) -> None:
    asked: list[int] = []
    take = Workspace.take

    def counted(space: Workspace, event: int, capacity: int) -> bool:
        asked.append(event)
        return take(space, event, capacity)

    monkeypatch.setattr(Workspace, "take", counted)
    sub = many_timed_out(300, 5, 0, request_ids=request_ids)
    write(tmp_path, at(10), [*traffic(), *(record(at(5), sub=sub) for _ in range(650))])
    report = compare(tmp_path)
    matched = 0 if request_ids else 600
    assert (report.attempts, report.unknown) == (matched, 650 - matched)
    assert len(asked) <= 650 + 2 * 300  # in two pages


def test_no_more_events_are_in_memory_than_of_half_an_hour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[int] = []
    read = attempts._read

    def counted(where: Any) -> Any:
        rows = list(read(where))
        loaded.append(len(rows))
        return iter(rows)

    monkeypatch.setattr(attempts, "_read", counted)
    sub = many_timed_out(600, 0, 1)
    calls = [record(at(each) - datetime.timedelta(seconds=2), sub=sub) for each in range(600)]
    write(tmp_path, at(600), [*traffic(), *calls])
    assert compare(tmp_path).attempts == 600
    assert max(loaded) <= 32
    assert sum(loaded) <= 2 * 600 + 30


def test_the_nearest_attempt_in_vain_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    take = Workspace.take

    def noted(space: Workspace, event: int, capacity: int) -> bool:
        done = take(space, event, capacity)
        taken.extend([event] * done)
        return done

    monkeypatch.setattr(Workspace, "take", noted)
    near = timed_out(5)
    long = timed_out(8, sub=near.sub, latency_us=200_000_000)
    timed_out(7.9, sub=near.sub)  # began later than all calls
    calls = [attempt(near, seconds) for seconds in (-5, -4, -3, 60, 61)]
    write(tmp_path, at(10), [*traffic(), *calls])
    compare(tmp_path)
    assert taken == [near.pk, near.pk, long.pk, long.pk]
    assert unknown() == {calls[-1]["eventID"]}


def test_without_a_sub_operation_key_and_time_decide(tmp_path: Path) -> None:
    made(at(5), operation="GenerateMac")
    quick = record(at(5), "GenerateMac")
    made(at(15), operation="GenerateMac", latency_us=2_100_000)
    slow = record(at(15), "GenerateMac")
    write(tmp_path, at(20), [*traffic(), quick, slow])
    report = compare(tmp_path)
    assert unknown() == {quick["eventID"]}
    assert report.attempts == 1


# --- only here ----------------------------------------------------------------------


def test_events_that_cloudtrail_lacks(tmp_path: Path) -> None:
    records = traffic(60)
    lost = [made(at(25)), made(at(26))]
    write(tmp_path, at(60), [*records, seen(made(at(120)))])
    report = compare(tmp_path)
    assert (report.missing, report.new_missing) == (2, 2)
    finding = AuditFinding.objects.get()
    assert (finding.kind, finding.severity, finding.count) == (
        Kind.NOT_IN_TRAIL,
        Severity.WARNING,
        2,
    )
    assert {e.reference for e in finding.evidence.all()} == {f"event {e.pk}" for e in lost}


def test_late_records_are_no_finding(tmp_path: Path) -> None:
    write(tmp_path, at(60), traffic(60))
    late = [seen(made(at(40 + n))) for n in range(20)]  # the last half an hour
    assert compare(tmp_path).missing == 0
    write(tmp_path, at(75), [*late, *traffic(60, start=60)])
    report = compare(tmp_path)
    assert (report.missing, report.unknown) == (0, 0)
    assert report.matched >= 80


def test_what_turns_up_after_all_is_explained(tmp_path: Path) -> None:
    records = traffic(60)
    event = made(at(25))
    write(tmp_path, at(60), [*records, seen(made(at(120)))])
    compare(tmp_path)
    assert findings.open_findings().count() == 1
    write(tmp_path, at(300), [seen(event)])
    report = compare(tmp_path)
    assert (report.explained, report.missing, report.unknown) == (1, 0, 0)
    finding = AuditFinding.objects.get()
    assert finding.count == 0 and finding.resolved_at and not finding.is_open


def test_an_event_that_turns_up_explains_the_call(tmp_path: Path) -> None:
    strange = record(at(45), sub=new_sub(), request_id="late")
    write(tmp_path, at(60), [*traffic(60), strange])
    compare(tmp_path)
    assert unknown() == {strange["eventID"]}
    made(
        at(45), request_ids="late", sub=strange["requestParameters"]["encryptionContext"]["sub"]
    )
    assert compare(tmp_path).explained == 1
    assert unknown() == set() and not findings.open_findings().exists()


def test_an_event_that_is_stored_late_explains_the_call(tmp_path: Path) -> None:
    """As after an outage of the database, when the file is not read again."""
    strange = [record(at(5), sub=new_sub(), request_id=name) for name in ("late", "never")]
    write(tmp_path, at(30), [*traffic(30), *strange])
    write(tmp_path, at(300), traffic(30, start=270))
    compare(tmp_path)
    assert len(unknown()) == 2
    made(at(5), request_ids="first late")
    report = compare(tmp_path)
    assert (report.passed_over, report.explained) == (1, 1)
    assert unknown() == {strange[1]["eventID"]}
    assert AuditFinding.objects.get().count == 1
    made(at(5), request_ids="never")
    assert compare(tmp_path).explained == 1
    assert AuditFinding.objects.get().resolved_at


def test_the_other_region_is_not_judged(tmp_path: Path) -> None:
    elsewhere = ARN.replace(REGION, "us-east-1")
    made(at(25), requested_key=elsewhere)
    write(tmp_path, at(60), [*traffic(60), seen(made(at(120)))])
    assert compare(tmp_path).missing == 0


def test_a_trail_that_has_gone_silent_is_told(tmp_path: Path) -> None:
    write(tmp_path, at(30), traffic(30))
    made(at(200))
    assert not compare(tmp_path, now=at(210)).errors
    (error,) = compare(tmp_path, now=at(500)).errors
    assert "is the trail still written" in error
    assert not AuditFinding.objects.exists()


def test_no_trail_at_all_is_told(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    assert not compare(tmp_path).errors  # nothing to look for
    made(at(1))
    (error,) = compare(tmp_path).errors
    assert "Nothing was read of CloudTrail in eu-central-1" in error
    assert f"{at(1):%Y-%m-%d %H:%M}" in error
    assert not compare(tmp_path, since=at(0)).errors


REPLICA = ARN.replace(REGION, "us-east-1").replace("1234abcd", "3234abcd")


@pytest.mark.parametrize(
    "changes",
    [
        {"requested_key": REPLICA},
        {"requested_key": "alias/tests", "key_ref": encoding.key_ref(REPLICA)},
    ],
)
def test_a_region_without_a_trail_is_told(tmp_path: Path, changes: dict[str, str]) -> None:
    history.record_key(REPLICA, START)
    write(tmp_path, at(700), traffic(70, step=10))
    assert not compare(tmp_path).errors  # nobody called there
    made(at(25), **changes)
    (error,) = compare(tmp_path).errors
    assert "Nothing was read of CloudTrail in us-east-1" in error


def test_a_quiet_region_whose_files_are_gone_is_no_silence(tmp_path: Path) -> None:
    path = write(tmp_path, at(60), traffic(60))
    assert not compare(tmp_path, now=at(90)).errors
    path.unlink()
    assert not compare(tmp_path).errors
    made(at(200))
    assert len(compare(tmp_path).errors) == 1


def test_a_quiet_region_is_looked_at_all_the_same(tmp_path: Path) -> None:
    write(tmp_path, at(60), traffic(60))
    compare(tmp_path, now=at(90))

    def looked_at() -> bool:
        TrailMark.objects.update(updated_at=START)
        compare(tmp_path)
        return TrailMark.objects.get().updated_at > START

    assert looked_at()
    (tmp_path / "bad.json").write_text("{")
    assert not looked_at()
    (tmp_path / "bad.json").unlink()
    made(at(200))  # the trail goes on no more
    assert not looked_at()


# --- again and again ----------------------------------------------------------------


def test_running_it_again_changes_nothing(tmp_path: Path) -> None:
    strange = [record(at(7 + n), sub=new_sub(), caller=THIEF) for n in range(20)]
    made(at(20))
    write(tmp_path, at(60), [*traffic(60), *strange, seen(made(at(120)))])
    first = compare(tmp_path)
    before = list(AuditFinding.objects.order_by("pk").values())
    for _ in range(2):
        again = compare(tmp_path)
        assert (again.new, again.new_missing) == (0, 0)
        assert list(AuditFinding.objects.order_by("pk").values()) == before
    assert (first.new, first.new_missing) == (20, 1)


def test_files_that_were_compared_are_passed_over(tmp_path: Path) -> None:
    for hour in range(4):
        write(tmp_path, at(60 * hour), traffic(60, start=60 * hour))
    assert (first := compare(tmp_path)).files == 4 and not first.errors
    assert TrailFile.objects.count() == 3
    report = compare(tmp_path)
    assert (report.files, report.passed_over) == (1, 3)
    assert not AuditFinding.objects.exists() and not report.errors


def test_files_are_not_asked_after_one_by_one(tmp_path: Path) -> None:
    for number in range(40):
        write(tmp_path, at(number), traffic(1, start=number))
    write(tmp_path, at(600), traffic(1, start=599))
    asked = []
    for _ in range(2):
        with CaptureQueriesContext(connection) as captured:
            report = compare(tmp_path)
        table = TrailFile._meta.db_table
        asked.append(sum(table in query["sql"] for query in captured))
    assert report.passed_over == 40
    assert all(number <= 6 for number in asked)


def test_files_that_are_gone_are_forgotten(tmp_path: Path) -> None:
    paths = [write(tmp_path, at(hour), traffic(1, start=hour)) for hour in range(3)]
    write(tmp_path, at(600), traffic(1, start=599))
    compare(tmp_path)
    paths[1].unlink()
    compare(tmp_path, since=at(0))
    assert TrailFile.objects.count() == 3
    compare(tmp_path)
    kept = set(TrailFile.objects.values_list("path", flat=True))
    assert kept == {str(paths[0]), str(paths[2])}


def test_a_file_that_grew_is_read_again(tmp_path: Path) -> None:
    path = write(tmp_path, at(0), traffic(30), packed=False)
    write(tmp_path, at(300), traffic(30, start=270))
    compare(tmp_path)
    strange = record(at(7), sub=new_sub(), caller=THIEF)
    whole = json.loads(path.read_text())
    path.write_text(json.dumps({"Records": [*whole["Records"], strange]}))
    compare(tmp_path)
    assert unknown() == {strange["eventID"]}


def test_a_day_at_a_time_finds_no_more_than_all_at_once(tmp_path: Path) -> None:
    strange = []
    for hour in range(6):
        odd = record(at(60 * hour + 31.5), sub=new_sub(), caller=THIEF)
        strange.append(odd)
        write(tmp_path, at(60 * hour), [*traffic(60, start=60 * hour), odd])
        report = compare(tmp_path, now=at(60 * hour + 75))
        assert (report.new, report.missing, report.errors) == (1, 0, [])
    assert unknown() == {each["eventID"] for each in strange}
    assert AuditFinding.objects.get().count == 6


def test_a_time_that_was_never_read_is_told(tmp_path: Path) -> None:
    write(tmp_path / "a", at(60), traffic(60))
    compare(tmp_path / "a")
    traffic(10, start=100)
    write(tmp_path / "b", at(400), traffic(60, start=340))
    (error,) = compare(tmp_path / "b").errors
    assert "Nothing was read" in error and not AuditFinding.objects.exists()


def test_a_quiet_trail_has_no_gap(tmp_path: Path) -> None:
    write(tmp_path, at(30), traffic(30))
    write(tmp_path, at(600), traffic(1, start=600))
    assert not compare(tmp_path).errors
    report = compare(tmp_path)
    assert (report.passed_over, report.missing, report.errors) == (1, 0, [])


def test_a_range_of_time_is_looked_at_whatever_was(tmp_path: Path) -> None:
    strange = [record(at(n), sub=new_sub(), caller=THIEF) for n in (5, 35, 55)]
    write(tmp_path, at(60), [*traffic(60), *strange])
    write(tmp_path, at(300), traffic(10, start=300))
    report = compare(tmp_path, since=at(30), until=at(40))
    assert (report.early, report.waiting) == (1, 1)
    assert unknown() == {strange[1]["eventID"]}
    assert not TrailMark.objects.exists() and not TrailFile.objects.exists()


def test_what_is_seen_again_after_it_was_acknowledged_is_open_again(tmp_path: Path) -> None:
    write(tmp_path, at(60), [*traffic(60), record(at(5), sub=new_sub(), caller=THIEF)])
    compare(tmp_path)
    finding = AuditFinding.objects.get()
    assert findings.acknowledge(finding, "rose") and not findings.acknowledge(finding, "tim")
    compare(tmp_path)
    assert not findings.open_findings().exists()
    write(tmp_path, at(61), [record(at(6), sub=new_sub(), caller=THIEF)])
    compare(tmp_path)
    assert findings.open_findings().get().count == 2


def test_what_is_seen_again_after_it_was_acknowledged_is_mailed_again(
    tmp_path: Path, configure: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(AUDIT_MAIL_ADMINS=True)
    monkeypatch.setattr("django.core.mail.mail_admins", lambda *mail: None)
    write(tmp_path, at(60), [*traffic(60), record(at(5), sub=new_sub(), caller=THIEF)])
    compare(tmp_path)
    assert alarms.mail() == 1
    findings.acknowledge(AuditFinding.objects.get(), "rose")
    assert alarms.mail() == 0
    # Its time is before that of the mail.
    write(tmp_path, at(61), [record(at(6), sub=new_sub(), caller=THIEF)])
    compare(tmp_path)
    assert alarms.mail() == 1 and alarms.mail() == 0


@pytest.mark.parametrize("where", ["holders.find", "alarms.give"])
def test_an_alarm_is_not_lost_if_a_run_dies(
    tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = User.objects.create(username="rose", password=make_password("secret"))
    sub = encoding.parse(user.password).header.sub
    write(tmp_path, at(60), [*traffic(60), record(at(5), sub=sub, caller=THIEF)])
    told: list[AuditFinding] = []

    def hear(finding: AuditFinding, **kwargs: Any) -> None:
        told.append(finding)

    def die(*args: Any) -> Any:
        raise KeyboardInterrupt

    alarms.audit_alarm.connect(hear)
    try:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(f"kms_hasher.audit.{where}", die)
            compare(tmp_path)
        for _ in range(2):
            compare(tmp_path)
    finally:
        alarms.audit_alarm.disconnect(hear)
    assert [finding.count for finding in told] == [1]
    finding = AuditFinding.objects.get()
    assert finding.details["accounts"] == [f"auth.User.password {user.pk}"]


# --- what is wrong with it ----------------------------------------------------------


def test_a_damaged_file_is_told_and_the_others_are_compared(tmp_path: Path) -> None:
    strange = record(at(7), sub=new_sub(), caller=THIEF)
    first = write(tmp_path, at(10), [*traffic(), strange])
    second = write(tmp_path, at(5), [record(at(8), sub=new_sub(), caller=THIEF)])
    second.write_bytes(second.read_bytes()[:-30])
    (error,) = compare(tmp_path).errors
    assert error.startswith(str(second)) and first.exists()
    assert strange["eventID"] in unknown()
    assert not TrailFile.objects.filter(path=str(second)).exists()


def test_a_file_whose_name_is_not_utf_8_is_read_each_time(tmp_path: Path) -> None:
    strange = record(at(7), sub=new_sub(), caller=THIEF)
    path = write(tmp_path, at(10), [*traffic(), strange])
    odd = os.fsencode(path.parent) + b"/\xff.json.gz"
    path.rename(os.fsdecode(odd))
    write(tmp_path, at(600), traffic(1, start=599))
    for _ in range(2):
        report = compare(tmp_path)
        assert (report.files, report.unknown, report.errors) == (2, 1, [])
    Path(os.fsdecode(odd)).write_text("{")
    status, text = run(str(tmp_path))
    assert status == 3 and r"\udcff.json.gz" in text
    assert text.encode()


def test_hostile_records_are_stored_as_far_as_they_fit(tmp_path: Path) -> None:
    long = "x" * 9999
    strange = record(
        at(7),
        caller=long,
        sub=long,
        eventID=long,
        requestID="\x00" + long,
        errorCode=long,
        userAgent="=cmd|' /C calc'!A0\x1b",
        sourceIPAddress=["10.0.0.1"],
    )
    write(tmp_path, at(10), [*traffic(), strange])
    assert compare(tmp_path).new == 1
    assert compare(tmp_path).new == 0


@pytest.mark.parametrize(
    ("paths", "options", "error"),
    [
        ((), {}, ConfigurationError),
        (("/nowhere",), {}, TrailError),
        ((), {"lookup": True}, ConfigurationError),
    ],
)
def test_what_cannot_be_done_is_refused(
    paths: Any, options: Any, error: type[Exception]
) -> None:
    with pytest.raises(error):
        reconcile.reconcile(paths, **options)


def test_without_an_audit_there_is_nothing_to_compare(
    tmp_path: Path, configure: Callable[..., None]
) -> None:
    configure(AUDIT="off")
    with pytest.raises(ConfigurationError):
        compare(tmp_path)


# --- LookupEvents -------------------------------------------------------------------


class Provider:
    def __init__(self, records: list[Any]) -> None:
        self.records, self.asked = records, []

    def lookup_events(self, *asked: Any) -> Iterator[Any]:
        self.asked.append(asked)
        yield from self.records


def test_the_look_up_goes_on_where_it_came_to(monkeypatch: pytest.MonkeyPatch) -> None:
    now = at(120)
    strange = record(at(7), sub=new_sub(), caller=THIEF)
    provider = Provider([*traffic(), strange, None])
    monkeypatch.setattr(calls, "provider", lambda: provider)
    report = reconcile.reconcile(lookup=True, now=now)
    assert (report.matched, report.new) == (30, 1)
    assert report.errors == [
        "LookupEvents in eu-central-1: 1 records are not as CloudTrail writes them."
    ]
    assert provider.asked == [(REGION, now - datetime.timedelta(days=1), now)]
    reconcile.reconcile(lookup=True, now=now)
    # Up to where events were looked for, and what may be late before it.
    assert provider.asked[1][1] == at(120 - 5 - 30 - 30)


# --- the command --------------------------------------------------------------------


def run(*arguments: str) -> tuple[int, str]:
    out = io.StringIO()
    try:
        call_command("reconcile_kms_audit", *arguments, stdout=out, no_color=True)
    except CommandError as error:
        return error.returncode, out.getvalue()
    return 0, out.getvalue()


def test_the_exit_status_is_for_monitors(tmp_path: Path) -> None:
    write(tmp_path, at(30), traffic(30))
    assert run(str(tmp_path))[0] == 0
    write(tmp_path, at(31), [record(at(5), sub=new_sub(), caller=THIEF)])
    for _ in range(2):
        status, text = run(str(tmp_path))
        assert status == 3 and "Decrypt by" in text
    findings.acknowledge(AuditFinding.objects.get(), "rose")
    assert run(str(tmp_path))[0] == 0
    (tmp_path / "x.json").write_text("{")
    assert run(str(tmp_path))[0] == 1
    assert run("/nowhere")[0] == 1


def test_it_speaks_to_machines(tmp_path: Path) -> None:
    write(tmp_path, at(30), [*traffic(), record(at(5), sub=new_sub(), caller=THIEF)])
    status, text = run("--json", str(tmp_path))
    told = json.loads(text)
    assert status == 3 and not told["ok"]
    assert (told["matched"], told["unknown"], told["open"]) == (30, 1, 1)
    assert told["findings"][0]["kind"] == "unknown-call"
    status, text = run("--json", "/nowhere")
    assert status == 1 and json.loads(text)["errors"]


def test_all_accounts_of_a_finding_are_listed(tmp_path: Path) -> None:
    users = User.objects.bulk_create(
        User(username=f"u{n}", password=make_password("secret")) for n in range(60)
    )
    strange = [
        record(at(7), sub=encoding.parse(user.password).header.sub, caller=THIEF)
        for user in [*users, users[0]]
    ]
    write(tmp_path, at(30), [*traffic(), *strange, record(at(7), sub=new_sub(), caller=THIEF)])
    assert run(str(tmp_path))[0] == 3
    finding = AuditFinding.objects.get()
    names = {f"auth.User.password {user.pk}" for user in users}
    status, text = run("--finding", str(finding.pk))
    assert status == 0 and len(lines := text.splitlines()) == 60 and set(lines) == names
    status, text = run("--finding", str(finding.pk), "--json")
    told = json.loads(text)
    assert status == 0 and told["ok"] and set(told["accounts"]) == names


@pytest.mark.usefixtures("envelope")
def test_all_accounts_of_a_data_key_are_listed(tmp_path: Path) -> None:
    users = [User(username=f"u{n}", password=make_password("secret")) for n in range(3)]
    (*users, other) = User.objects.bulk_create(users)
    data_key = DataKey.objects.get()
    access = keyring.access(encoding.parse(data_key.sealed).header, "set")
    (new,) = data_keys.make(access, 1)
    sealed = other.password.replace(
        encoding.data_key_ref(data_key.pk), encoding.data_key_ref(new)
    )
    User.objects.filter(pk=other.pk).update(password=sealed)
    strange = record(at(7), sub=sub_of(data_key), caller=THIEF)
    write(tmp_path, at(30), [*traffic(), strange])
    assert run(str(tmp_path))[0] == 3
    _, text = run("--finding", str(AuditFinding.objects.get().pk))
    assert text.splitlines() == [f"auth.User.password {user.pk}" for user in users]


def test_a_finding_is_listed_alone() -> None:
    assert run("--finding", "7")[0] == 1
    assert run("--finding", "7", "--lookup")[0] == 1


def test_times_are_in_utc_where_no_zone_is_given(tmp_path: Path) -> None:
    write(tmp_path, at(30), [*traffic(), record(at(5), sub=new_sub(), caller=THIEF)])
    assert run(str(tmp_path), "--since", "2026-11-21T12:10:00Z")[0] == 0
    assert run(str(tmp_path), "--since", "2026-11-21T12:00")[0] == 3
    with pytest.raises((CommandError, SystemExit)):
        call_command("reconcile_kms_audit", str(tmp_path), "--until", "noon")


# --- many ---------------------------------------------------------------------------


def test_all_strange_calls_among_many_and_no_other(
    tmp_path: Path, django_assert_max_num_queries: Any
) -> None:
    chance = random.Random(6)
    events, records = [], []
    for number in range(3000):
        time = at(number / 20)
        event = AuditEvent(
            time=time,
            operation="Decrypt",
            purpose="login",
            outcome=signals.SUCCESS,
            key_ref=encoding.key_ref(ARN),
            requested_key=ARN,
            latency_us=9000,
            request_ids=str(uuid.uuid4()),
            sub=new_sub(),
        )
        lot = chance.random()
        if lot < 0.01:  # without an answer, and without arriving by half
            event.outcome, event.request_ids = signals.UNAVAILABLE, ""
            event.error_code, event.latency_us = "ReadTimeoutError", 4_000_000
            if lot < 0.005:
                records.append(attempt(event, -3))
        elif lot < 0.02:  # a second attempt
            event.latency_us = 2_050_000
            records += [attempt(event, -2), seen(event)]
        else:
            records.append(seen(event))
        events.append(event)
    AuditEvent.objects.bulk_create(events)
    strange = []
    for event in chance.sample(events, 100):
        after = event.time + datetime.timedelta(seconds=chance.uniform(60, 600))
        caller = chance.choice([SITE, THIEF])
        strange.append(record(after, sub=event.sub, caller=caller))
    records += [*strange, *chance.sample(records, 50)]
    chance.shuffle(records)
    for start in range(0, len(records), 100):
        write(tmp_path, at(start), records[start : start + 100])
    with django_assert_max_num_queries(200):
        report = compare(tmp_path)
    assert unknown() == {each["eventID"] for each in strange}
    assert (report.unknown, report.missing, report.errors) == (100, 0, [])
    assert report.duplicates == 50
