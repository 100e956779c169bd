"""Whoever owns the database, or a file of CloudTrail, neither hides a call nor stops a run."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.db import connection
from django.test import Client
from django.utils import timezone

from kms_hasher import calls, encoding, history, signals
from kms_hasher.audit import alarms, cloudtrail, evidence, findings, reconcile, rollups
from kms_hasher.audit.site import Keys
from kms_hasher.exceptions import KMSConnectionError
from kms_hasher.models import (
    AliasPeriod,
    AuditEvent,
    AuditEvidence,
    AuditFinding,
    AuditHour,
    Key,
    RotationRun,
    TrailFile,
    TrailMark,
)
from tests import test_reconcile
from tests.test_admin import make_rotation
from tests.test_reconcile import (
    NOW,
    START,
    UTC,
    at,
    compare,
    made,
    new_sub,
    run,
    traffic,
    unknown,
)
from tests.trail import ARN, ARN_2, REGION, THIEF, record, write

pytestmark = pytest.mark.django_db

configure, known_keys = test_reconcile.configure, test_reconcile.known_keys
Kind, Severity = AuditFinding.Kind, AuditFinding.Severity

FAR = datetime.datetime(9999, 12, 31, 23, tzinfo=UTC)


def strange(minutes: float = 7, **changes: Any) -> dict[str, Any]:
    return record(at(minutes), **{"sub": new_sub(), "caller": THIEF, **changes})


def raw(model: Any, field: str, value: str) -> None:
    """Give all rows a value that no code of ours would, as an SQL literal."""
    with connection.cursor() as cursor:
        if connection.vendor == "mysql":
            cursor.execute("SET SESSION sql_mode = 'ALLOW_INVALID_DATES'")
        cursor.execute(f"UPDATE {model._meta.db_table} SET {field} = {value}")


@pytest.fixture
def told() -> Iterator[list[AuditFinding]]:
    heard: list[AuditFinding] = []

    def hear(finding: AuditFinding, **kwargs: Any) -> None:
        heard.append(finding)

    alarms.audit_alarm.connect(hear)
    yield heard
    alarms.audit_alarm.disconnect(hear)


@pytest.fixture
def root(client: Client) -> Client:
    client.force_login(User.objects.create_superuser("root"))
    return client


# --- whose a key is -----------------------------------------------------------------


@pytest.mark.parametrize("deployment", ["", "mine"])
def test_a_key_that_is_deleted_from_the_history_hides_no_call(
    tmp_path: Path, configure: Callable[..., None], deployment: str
) -> None:
    """Without a name the context may be another site's, which has none either."""
    configure(DEPLOYMENT=deployment)
    context = {"application": "kms_hasher", "sub": new_sub()}
    if deployment:
        context["deployment"] = deployment
    odd = strange(key=ARN_2, context=context)
    made(at(1))
    write(tmp_path, at(10), [odd])
    Key.objects.filter(arn=ARN_2).delete()
    compare(tmp_path)
    assert unknown() == ({odd["eventID"]} if deployment else set())


def counted(arn: str) -> None:
    AuditHour.objects.create(
        hour=START,
        key_ref=encoding.key_ref(arn),
        operation="GenerateMac",
        purpose="login",
        outcome=signals.SUCCESS,
        bucket=50,
        slot=0,
        count=1,
    )


def test_nor_does_it_where_calls_on_it_were_counted(tmp_path: Path) -> None:
    odd = strange(key=ARN_2, operation="GenerateMac", context={})
    write(tmp_path, at(10), [*traffic(), odd])
    Key.objects.filter(arn=ARN_2).delete()
    assert compare(tmp_path).calls == 30
    counted(ARN_2)
    compare(tmp_path)
    assert unknown() == {odd["eventID"]}


def test_aliases_of_a_key_that_is_none(configure: Callable[..., None]) -> None:
    configure(KEY="alias/tests")
    history.record_alias("alias/tests", Key.objects.get(arn=ARN), START)
    Key.objects.update(arn="nonsense")
    call = cloudtrail.read_record(
        strange(resources=None, requestParameters={"keyId": "alias/tests"})
    ).call
    assert call and Keys().include(call)
    assert AliasPeriod.objects.exists()


def test_a_region_that_is_none_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    Key.objects.filter(arn=ARN_2).update(region="evil.example/?")
    assert Keys().regions == {REGION}


# --- a finding that was there before --------------------------------------------------


def planted(odd: dict[str, Any], **changes: Any) -> None:
    """Store a finding of one's own where that of a call will be."""
    call = cloudtrail.read_record(odd).call
    assert call
    values = {"kind": Kind.BREAKER, "severity": Severity.WARNING, "subject": "x"}
    AuditFinding.objects.create(
        dedup_key=evidence._unknown(evidence._group(call), [call]).dedup_key,
        first_seen=START,
        last_seen=START,
        **{**values, **changes},
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"alarmed_at": FAR, "mailed_at": FAR},
        {"kind": Kind.UNKNOWN_CALL, "alarmed_at": FAR, "mailed_at": FAR},
        {"alarmed_at": timezone.now(), "mailed_at": timezone.now()},
        {"acknowledged_at": FAR, "alarmed_at": FAR},
        {"resolved_at": START, "key_ref": "y", "severity": "nonsense"},
        {"severity": "nonsense", "details": [1]},
    ],
)
def test_a_finding_that_was_put_there_before_hides_none(
    tmp_path: Path,
    told: list[AuditFinding],
    changes: dict[str, Any],
    configure: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    configure(AUDIT_MAIL_ADMINS=True)
    mails: list[Any] = []
    monkeypatch.setattr("django.core.mail.mail_admins", lambda *mail: mails.append(mail))
    odd = strange()
    planted(odd, **changes)
    write(tmp_path, at(10), [*traffic(), odd])
    status, text = run(str(tmp_path))
    assert status == 3 and "Decrypt by" in text
    finding = AuditFinding.objects.get()
    assert (finding.kind, finding.severity) == (Kind.UNKNOWN_CALL, Severity.CRITICAL)
    assert finding.key_ref == encoding.key_ref(ARN) and finding.details["callers"] == {THIEF: 1}
    assert told == [finding] and len(mails) == 1
    run(str(tmp_path))
    assert len(told) == 1 and len(mails) == 1


def test_the_exit_status_heeds_what_was_found_and_not_the_rows_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, at(10), [*traffic(), strange()])
    tell = reconcile._tell

    def acknowledged(found: Any) -> None:
        tell(found)
        AuditFinding.objects.update(acknowledged_at=timezone.now())

    monkeypatch.setattr(reconcile, "_tell", acknowledged)
    status, text = run("--json", str(tmp_path))
    assert status == 3 and not json.loads(text)["ok"]


def test_what_was_acknowledged_in_the_future_is_open_again() -> None:
    found = findings.Found(Kind.RATE, Severity.WARNING, ("a",), "x", START, START)
    findings.record(found)
    AuditFinding.objects.update(acknowledged_at=FAR)
    finding, news = findings.record(found)
    assert news and finding.is_open


# --- marks --------------------------------------------------------------------------


def test_a_mark_of_the_future_blinds_no_look_up(monkeypatch: pytest.MonkeyPatch) -> None:
    odd = strange()
    provider = test_reconcile.Provider([*traffic(), odd])
    monkeypatch.setattr(calls, "provider", lambda: provider)
    TrailMark.objects.create(region=REGION, until=NOW + datetime.timedelta(minutes=25))
    TrailMark.objects.create(region="us-west-9", until=FAR)  # none of ours
    report = reconcile.reconcile(lookup=True, now=NOW)
    (error,) = report.errors
    assert "eu-central-1 is marked as compared up to 2026-11-22 00:25 UTC" in error
    assert provider.asked[0][1] == NOW - datetime.timedelta(days=1)
    assert unknown() == {odd["eventID"]}
    assert not reconcile.reconcile(lookup=True, now=NOW).errors


@pytest.mark.parametrize("until", [NOW + datetime.timedelta(days=3650), FAR])
def test_a_mark_of_the_future_hides_no_event(tmp_path: Path, until: datetime.datetime) -> None:
    TrailMark.objects.create(region=REGION, until=until)
    write(tmp_path, at(10), traffic())
    write(tmp_path, at(300), traffic(1, start=300))
    lost = made(at(20) + datetime.timedelta(minutes=15))
    report = compare(tmp_path)
    assert report.missing == 1 and len(report.errors) == 1
    assert AuditEvidence.objects.get().reference == f"event {lost.pk}"


def test_a_region_where_the_look_up_fails_stops_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    history.record_key(ARN_2.replace(REGION, "aa-south-1").replace("2234", "3234"), START)
    odd = strange()

    class Provider(test_reconcile.Provider):
        def lookup_events(self, region: str, *asked: Any) -> Iterator[Any]:
            yield odd
            if region == "aa-south-1":
                raise KMSConnectionError(operation="LookupEvents")
            yield from self.records

    monkeypatch.setattr(calls, "provider", lambda: Provider(traffic()))
    report = reconcile.reconcile(lookup=True, now=NOW)
    (error,) = report.errors
    assert error.startswith("LookupEvents in aa-south-1 failed: ")
    assert unknown() == {odd["eventID"]} and report.matched == 30
    assert [mark.region for mark in TrailMark.objects.all()] == [REGION]


# --- records ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "when",
    [
        "0001-01-01T00:00:00Z",
        "1999-12-31T23:59:59Z",
        "2200-01-01T00:00:00Z",
        "9999-12-31T23:59:59Z",
    ],
)
def test_a_record_of_no_time_at_all_is_told(tmp_path: Path, when: str) -> None:
    odd = strange()
    path = write(tmp_path, at(10), [*traffic(), odd, strange(eventTime=when)])
    report = compare(tmp_path)
    assert report.errors == [f"{path}: 1 records are not as CloudTrail writes them."]
    assert unknown() == {odd["eventID"]}


@pytest.mark.parametrize("region", ["x" * 100, "", "eu central 1", "us-east-1"])
def test_records_of_other_regions_leave_no_mark(tmp_path: Path, region: str) -> None:
    others = [strange(minutes, awsRegion=region) for minutes in (1, 100)]
    write(tmp_path, at(10), [*traffic(), *others])
    write(tmp_path, at(700), traffic(1, start=699))
    assert compare(tmp_path).until.keys() == {REGION}
    report = compare(tmp_path)
    assert not report.errors
    assert unknown() == {each["eventID"] for each in others}
    assert [mark.region for mark in TrailMark.objects.all()] == [REGION]
    assert TrailFile.objects.count() == 1 and report.passed_over == 1


# --- rows ---------------------------------------------------------------------------


def test_a_number_that_is_too_long_for_one(tmp_path: Path) -> None:
    write(tmp_path, at(10), [*traffic(), strange()])
    compare(tmp_path)
    holder = f"kms_hasher.DataKey.sealed 1: {'9' * 5000} passwords"
    AuditEvidence.objects.update(holder=holder)
    write(tmp_path, at(11), [strange(8)])
    assert compare(tmp_path).new == 1
    finding = AuditFinding.objects.get()
    assert finding.count == 2 and finding.details["stored_passwords"] == 2
    status, text = run("--finding", str(finding.pk))
    assert status == 0 and text == f"{holder}\n"


def test_nothing_moves_the_cursor_of_a_terminal(tmp_path: Path) -> None:
    write(tmp_path, at(10), [*traffic(), strange()])
    compare(tmp_path)
    finding = AuditFinding.objects.get()
    AuditFinding.objects.update(subject="\x1b[2J\nFinding", kind=Kind.NOT_IN_TRAIL)
    AuditEvidence.objects.update(holder="\x1b[2Jrose")
    assert "?[2J?Finding" in run(str(tmp_path))[1]
    assert run("--finding", str(finding.pk))[1] == "?[2Jrose\n"


def test_an_event_before_all_times_silences_nothing(tmp_path: Path) -> None:
    made(datetime.datetime(1970, 1, 2, tzinfo=UTC))
    if connection.vendor == "postgresql":
        raw(AuditEvent, "time", "'-infinity'")
    write(tmp_path, at(10), [])
    assert not compare(tmp_path).errors
    write(tmp_path, at(11), [*traffic(), strange(-60), odd := strange()])
    report = compare(tmp_path)
    assert report.early == 1 and unknown() == {odd["eventID"]}


TIMES = {
    "postgresql": ["'infinity'", "'-infinity'", "'20000-01-01'", "'9999-12-31 23:59:59+00'"],
    "mysql": ["'9999-12-31 23:59:59'", "'2026-02-31 10:00:00'", "'1000-01-01'"],
    "sqlite": [
        "'x'",
        "''",
        "5",
        "2460000.5",
        "'2026-02-31 10:00:00'",
        "x'00ff'",
        "'9999-12-31 23:59:59'",
    ],
}[connection.vendor]


@pytest.mark.parametrize("value", TIMES)
@pytest.mark.parametrize(
    "field",
    ["first_seen", "last_seen", "alarmed_at", "mailed_at", "acknowledged_at", "resolved_at"],
)
def test_a_finding_at_no_time_at_all(
    tmp_path: Path, root: Client, field: str, value: str, told: list[AuditFinding]
) -> None:
    odd = strange()
    planted(odd, kind=Kind.UNKNOWN_CALL)
    raw(AuditFinding, field, value)
    shows(root, AuditFinding.objects.defer("details").get())
    write(tmp_path, at(10), [*traffic(), odd])
    assert run(str(tmp_path))[0] == 3
    assert AuditFinding.objects.get().count == 1
    shows(root, AuditFinding.objects.get())


@pytest.mark.parametrize("value", TIMES)
def test_evidence_and_marks_at_no_time_at_all(tmp_path: Path, root: Client, value: str) -> None:
    write(tmp_path, at(10), [*traffic(), strange()])
    write(tmp_path, at(300), traffic(1, start=300))
    compare(tmp_path)
    raw(AuditEvidence, "time", value)
    raw(TrailMark, "until", value)
    raw(TrailMark, "updated_at", value)
    shows(root, AuditFinding.objects.get())
    write(tmp_path, at(301), [strange(8)])
    assert run(str(tmp_path))[0] == 3
    finding = AuditFinding.objects.get(kind=Kind.UNKNOWN_CALL)
    assert finding.count == 2
    shows(root, finding)


def shows(client: Client, finding: AuditFinding) -> None:
    """Each page that shows a finding can be read."""
    for path in (
        "auditfinding/",
        f"auditfinding/{finding.pk}/change/",
        "auditevent/dashboard/",
    ):
        assert client.get(f"/admin/kms_hasher/{path}").status_code == 200


@pytest.mark.parametrize(
    "details",
    [
        [1],
        "x",
        5,
        {"callers": [[[[1]]]]},
        {"callers": {"x": {"y": {"z": [1]}}}},
    ],
)
def test_details_that_are_none(tmp_path: Path, root: Client, details: Any) -> None:
    write(tmp_path, at(10), [*traffic(), strange()])
    compare(tmp_path)
    AuditFinding.objects.update(details=details, severity="x", kind="y" * 32, subject="\x01<b>")
    shows(root, finding := AuditFinding.objects.get())
    assert finding.details == {}
    write(tmp_path, at(11), [strange(8)])
    assert run("--json", str(tmp_path))[0] == 3
    assert AuditFinding.objects.get().details["callers"] == {THIEF: 2}


@pytest.mark.parametrize("text", ['{"a": ' + "9" * 5000 + "}", "null", "[" * 900 + "]" * 900])
def test_details_that_python_cannot_read(root: Client, text: str, tmp_path: Path) -> None:
    if connection.vendor == "mysql" and text.startswith("["):
        pytest.skip("MariaDB takes no JSON as deep as that")
    planted(strange())
    raw(AuditFinding, "details", f"'{text}'")
    shows(root, finding := AuditFinding.objects.get())
    assert finding.details == {}


@pytest.mark.skipif(connection.vendor != "sqlite", reason="others take numbers alone")
def test_a_count_that_is_none(tmp_path: Path, root: Client) -> None:
    odd = strange()
    planted(odd, kind=Kind.UNKNOWN_CALL)
    raw(AuditFinding, "count", "'x'")
    shows(root, AuditFinding.objects.get())
    write(tmp_path, at(10), [*traffic(), odd])
    assert run(str(tmp_path))[0] == 3


# --- the dashboard --------------------------------------------------------------------


def test_a_comparison_of_the_future_is_late(root: Client) -> None:
    TrailMark.objects.create(region=REGION, until=timezone.now())
    TrailMark.objects.update(updated_at=FAR)
    rows = root.get("/admin/kms_hasher/auditevent/dashboard/").context_data["trail"]["rows"]
    assert [row["is_late"] for row in rows] == [True]


@pytest.mark.parametrize(
    "changes",
    [
        {"bucket": 32767},
        {"bucket": -32768},
        {"count": -5},
        {"count": 2**63 - 1},
        {"count": -(2**63)},
        {"key_ref": "<b>", "purpose": "", "operation": "\x01", "outcome": "strange"},
    ],
)
@pytest.mark.parametrize("period", ["24h", "90d"])
def test_roll_ups_that_nobody_here_counted(
    root: Client, changes: dict[str, Any], period: str
) -> None:
    counted(ARN)
    now = rollups.hour_of(timezone.now())
    for number in range(2):
        AuditHour.objects.create(
            **{
                "hour": now,
                "key_ref": encoding.key_ref(ARN),
                "operation": "Decrypt",
                "purpose": "login",
                "outcome": signals.SUCCESS,
                "bucket": 50,
                "slot": number,
                "count": 1,
                **changes,
            }
        )
    url = f"/admin/kms_hasher/auditevent/dashboard/?period={period}"
    assert root.get(url).status_code == 200


@pytest.mark.parametrize("value", TIMES)
def test_roll_ups_of_no_hour(root: Client, value: str) -> None:
    counted(ARN)
    raw(AuditHour, "hour", value)
    for period in ("24h", "90d"):
        url = f"/admin/kms_hasher/auditevent/dashboard/?period={period}"
        assert root.get(url).status_code == 200


@pytest.mark.parametrize("value", TIMES)
@pytest.mark.parametrize("field", ["started_at", "updated_at", "finished_at"])
def test_runs_of_no_time(root: Client, field: str, value: str) -> None:
    run = make_rotation(Key.objects.get(arn=ARN), finished_at=timezone.now())
    raw(RotationRun, field, value)
    for path in ("auditevent/dashboard/", "rotationrun/", f"rotationrun/{run.pk}/change/"):
        assert root.get(f"/admin/kms_hasher/{path}").status_code == 200
