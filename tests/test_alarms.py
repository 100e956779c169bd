"""Alarms: told once, by whatever way is open, and never in the way of a login."""

from __future__ import annotations

import datetime
import io
import json
import logging
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import django
import pytest
from django.contrib.admin.models import LogEntry
from django.contrib.auth.hashers import check_password, make_password
from django.contrib.auth.models import Permission, User
from django.core import mail
from django.core.management import CommandError, call_command
from django.db import OperationalError, connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from kms_hasher import breaker, calls, encoding, history, signals
from kms_hasher.admin import findings as findings_admin
from kms_hasher.audit import alarms, detect, findings, reconcile, recorder, retention, seals
from kms_hasher.audit.findings import Found
from kms_hasher.exceptions import KMSConnectionError
from kms_hasher.models import AuditEvent, AuditEvidence, AuditFinding, Key
from kms_hasher.providers.base import Provider
from kms_hasher.signals import Event

ARN = "arn:aws:kms:eu-central-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"
ARN_2 = "arn:aws:kms:eu-central-1:111122223333:key/2234abcd-12ab-34cd-56ef-1234567890ab"
NOW = datetime.datetime(2026, 11, 21, 12, 30, tzinfo=datetime.timezone.utc)
Kind, Severity = AuditFinding.Kind, AuditFinding.Severity

pytestmark = pytest.mark.django_db
durable = pytest.mark.django_db(transaction=True)


def minutes(number: float) -> datetime.timedelta:
    return datetime.timedelta(minutes=number)


def hours(number: float) -> datetime.timedelta:
    return datetime.timedelta(hours=number)


@pytest.fixture(autouse=True)
def from_scratch() -> Iterator[None]:
    alarms.reset()
    yield
    recorder.close()
    alarms.reset()


@pytest.fixture
def configure(settings: Any) -> Callable[..., None]:
    def change(**values: Any) -> None:
        settings.KMS_HASHER = {**settings.KMS_HASHER, **values}

    return change


@pytest.fixture
def told() -> Iterator[list[AuditFinding]]:
    """The findings that the signal was sent for."""
    seen: list[AuditFinding] = []

    def listen(sender: Any, finding: AuditFinding, **kwargs: Any) -> None:
        seen.append(finding)

    alarms.audit_alarm.connect(listen)
    yield seen
    alarms.audit_alarm.disconnect(listen)


def a_finding(about: str = "a", time: datetime.datetime = NOW, **changes: Any) -> Found:
    values: dict[str, Any] = {
        "kind": Kind.UNKNOWN_CALL,
        "severity": Severity.CRITICAL,
        "about": (about,),
        "subject": f"Decrypt by {about}",
        "first": time,
        "last": time,
    }
    return Found(**{**values, **changes})


def made(time: datetime.datetime, number: int = 1, **changes: Any) -> None:
    values: dict[str, Any] = {
        "time": time,
        "operation": "Decrypt",
        "purpose": "login",
        "outcome": signals.SUCCESS,
        "key_ref": encoding.key_ref(ARN),
        "latency_us": 9000,
    }
    AuditEvent.objects.bulk_create([AuditEvent(**{**values, **changes}) for _ in range(number)])
    list(retention.rebuild(time + hours(3)))  # counts them


def event(**changes: Any) -> Event:
    values: dict[str, Any] = {
        "time": timezone.now(),
        "operation": "Decrypt",
        "purpose": "login",
        "outcome": signals.SUCCESS,
        "requested_key": ARN,
        "key": ARN,
    }
    return Event(**{**values, **changes})


def kinds() -> list[str]:
    return sorted(AuditFinding.objects.values_list("kind", flat=True))


# --- findings -----------------------------------------------------------------------


def test_the_same_thing_is_one_row() -> None:
    first, new = findings.record(a_finding(severity=Severity.WARNING))
    again, still = findings.record(a_finding(time=NOW + minutes(5), number=7))
    assert (first.pk, new, still) == (again.pk, True, False)
    again.refresh_from_db()
    assert (again.count, again.severity) == (7, Severity.CRITICAL)
    assert (again.first_seen, again.last_seen) == (NOW, NOW + minutes(5))
    assert findings.record(a_finding("b"))[0].pk != first.pk


def test_parts_of_what_it_is_about_are_kept_apart() -> None:
    one, _ = findings.record(a_finding()._replace(about=("ab", "c")))
    other, _ = findings.record(a_finding()._replace(about=("a", "bc")))
    assert one.pk != other.pk


def test_what_was_acknowledged_is_news_when_it_is_seen_again() -> None:
    finding, _ = findings.record(a_finding())
    assert findings.acknowledge(finding, "rose")
    assert findings.record(a_finding()) == (finding, False)
    again, news = findings.record(a_finding(time=timezone.now() + minutes(1)))
    assert news and again.is_open and again.acknowledged_by == ""


# --- telling ------------------------------------------------------------------------


def test_a_finding_is_told_once_a_day(
    told: list[AuditFinding], caplog: pytest.LogCaptureFixture
) -> None:
    finding, _ = findings.record(a_finding())
    assert alarms.give(finding) and not alarms.give(finding)
    assert told == [finding]
    (line,) = (r for r in caplog.records if r.name == "kms_hasher.alarms")
    assert line.levelno == logging.ERROR
    assert line.finding["subject"] == "Decrypt by a"  # type: ignore[attr-defined]
    AuditFinding.objects.update(alarmed_at=timezone.now() - hours(25))
    assert alarms.give(finding)


def test_what_is_seen_again_after_it_was_closed_is_told_at_once() -> None:
    (finding,) = alarms.found([a_finding()])
    findings.acknowledge(finding, "rose")
    alarms.found([a_finding()])
    finding.refresh_from_db()
    assert not finding.is_open
    (again,) = alarms.found([a_finding(time=timezone.now() + minutes(1))])
    assert again.is_open and again.alarmed_at > finding.alarmed_at


def test_receivers_and_handlers_that_fail_stop_nothing(
    told: list[AuditFinding], caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any, **kwargs: Any) -> bool:
        raise RuntimeError("no pager")

    alarms.audit_alarm.connect(fail)
    alarms.lines.addFilter(fail)
    try:
        (finding,) = alarms.found([a_finding()])
    finally:
        alarms.lines.removeFilter(fail)
        alarms.audit_alarm.disconnect(fail)
    assert told == [finding]
    assert "A receiver of an alarm failed" in caplog.text
    assert "An alarm could not be logged" in caplog.text


LOCMEM = "django.core.mail.backends.locmem.EmailBackend"


@pytest.fixture
def mailed(settings: Any) -> Callable[[str], None]:
    """Set the mail backend, and an admin to mail to."""

    def by(backend: str) -> None:
        if django.VERSION >= (6, 1):
            settings.MAILERS = {"default": {"BACKEND": backend}}
        else:
            settings.EMAIL_BACKEND = backend

    modern = django.VERSION >= (6, 0)
    settings.ADMINS = ["rose@example.com" if modern else ("Rose", "rose@example.com")]
    by(LOCMEM)
    return by


def test_mails_go_to_admins_if_wanted(
    configure: Callable[..., None], mailed: Callable[[str], None]
) -> None:
    alarms.found([a_finding("a"), a_finding("b")])
    assert alarms.mail() == 0
    configure(AUDIT_MAIL_ADMINS=True)
    assert alarms.mail() == 2 and alarms.mail() == 0
    assert "Decrypt by a" in mail.outbox[0].body
    assert mail.outbox[0].to == ["rose@example.com"]
    day = timezone.now() - hours(25)
    AuditFinding.objects.update(mailed_at=day)
    assert alarms.mail() == 0  # nothing has happened since
    AuditFinding.objects.filter(subject__endswith="a").update(last_seen=day + hours(1))
    assert alarms.mail() == 1
    findings.acknowledge(AuditFinding.objects.get(subject__endswith="b"), "rose")
    AuditFinding.objects.update(mailed_at=None)
    assert alarms.mail() == 1


def test_a_mail_server_that_fails_is_asked_again(
    configure: Callable[..., None],
    mailed: Callable[[str], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    configure(AUDIT_MAIL_ADMINS=True)
    alarms.found([a_finding()])
    mailed("tests.nowhere.Backend")
    assert alarms.mail() == 0
    assert "A finding could not be mailed" in caplog.text
    mailed(LOCMEM)
    assert alarms.mail() == 1


# --- in the events ------------------------------------------------------------------


def test_a_breaker_that_opened() -> None:
    made(NOW, operation=signals.CIRCUIT_BREAKER, outcome=signals.UNAVAILABLE, requested_key="r")
    made(NOW + minutes(1), operation=signals.CIRCUIT_BREAKER, requested_key="r")
    for _ in range(2):
        (finding,) = alarms.check(now=NOW + minutes(5))
        assert (finding.kind, finding.severity) == (Kind.BREAKER, Severity.WARNING)
    assert "'r'" in AuditFinding.objects.get().subject


def test_a_burst_of_tampered_values() -> None:
    for second in range(0, 9 * 6, 6):
        made(NOW + datetime.timedelta(seconds=second), outcome=signals.INVALID)
    assert alarms.check(now=NOW + minutes(5)) == []
    made(NOW + datetime.timedelta(seconds=55), outcome=signals.INVALID)
    assert {each.kind for each in alarms.check(now=NOW + minutes(5))} == {Kind.TAMPERED}
    assert AuditFinding.objects.count() == 1


def test_ten_in_an_hour_are_no_burst() -> None:
    for minute in range(0, 50, 5):
        made(NOW - minutes(minute), outcome=signals.INVALID)
    assert alarms.check(now=NOW) == []


def left_key(**changes: Any) -> Key:
    """Return a key that the alias left for another, and that no row needs since."""
    old = history.record_key(ARN, NOW - hours(48))
    new = history.record_key(ARN_2, NOW - hours(4))
    history.record_alias("alias/tests", old, NOW - hours(48))
    history.record_alias("alias/tests", new, NOW - hours(4))
    values: dict[str, Any] = {"rows": 0, "rows_counted_at": NOW - hours(3)}
    Key.objects.filter(pk=old.pk).update(**{**values, **changes})
    old.refresh_from_db()
    return old


def test_the_use_of_a_key_that_was_left() -> None:
    left_key()
    made(NOW - hours(3.5))  # a login, while the rotation went on
    made(NOW - hours(3) + minutes(5))  # had read the row before it was counted
    made(NOW - minutes(50), operation="DescribeKey")
    made(NOW - minutes(50), outcome=signals.DENIED)
    made(NOW - minutes(50), key_ref=encoding.key_ref(ARN_2))
    assert alarms.check(6, now=NOW) == []
    made(NOW - minutes(10))
    (finding,) = alarms.check(6, now=NOW)
    assert (finding.kind, finding.key_ref) == (Kind.RETIRED_KEY, encoding.key_ref(ARN))


@pytest.mark.parametrize(
    ("changes", "retired"),
    [
        ({"rows": 3}, False),
        ({"rows": None, "rows_counted_at": None}, False),
        ({"rows_counted_at": NOW - hours(20)}, False),  # before it was left
        ({"rows": 3, "state": "Disabled"}, True),
        ({"rows": None, "state": "PendingDeletion"}, True),
    ],
)
def test_which_keys_are_retired(changes: dict[str, Any], retired: bool) -> None:
    key = left_key(**changes)
    assert detect.retired_keys() == ([key] if retired else [])


@pytest.mark.parametrize(
    "changes",
    [
        {"PREVIOUS_KEYS": [ARN]},
        {"MAC_KEY": ARN.rpartition("/")[2], "MODE": "mac_in_direct"},
        {"AUDIT_SEAL_KEY": ARN.rpartition("/")[2]},
        {"AUDIT_CONTEXT_KEY": ARN},
    ],
)
def test_keys_in_the_settings_are_not_retired(
    configure: Callable[..., None], changes: dict[str, Any]
) -> None:
    left_key()
    configure(**changes)
    assert detect.retired_keys() == []


def test_seals_by_a_key_that_was_left_are_no_use_of_it() -> None:
    left_key()
    made(NOW - minutes(10), operation="GenerateMac", purpose="seal")
    made(NOW - minutes(10), operation="Encrypt", purpose="seal")
    made(NOW - minutes(10), operation="GenerateMac", purpose="verify")
    assert alarms.check(6, now=NOW) == []
    seal = event(time=NOW, operation="GenerateMac", purpose="seal")
    checked = event(time=NOW, purpose="verify")
    opened = event(time=NOW, purpose="verify", sub="0a")
    assert list(detect.in_events([seal, checked])) == []
    assert [each.kind for each in detect.in_events([opened])] == [Kind.RETIRED_KEY]
    made(NOW - minutes(10), purpose="verify", sub="0a")
    assert [each.kind for each in alarms.check(6, now=NOW)] == [Kind.RETIRED_KEY]


def test_a_rate_above_the_bound_that_is_set(configure: Callable[..., None]) -> None:
    configure(AUDIT_RATE_BOUND=20)
    made(NOW - minutes(10), 20)
    made(NOW - minutes(12), 40, purpose="verify")
    made(NOW - minutes(12), 40, operation="Encrypt")
    assert alarms.check(now=NOW) == []
    made(NOW - minutes(10), 1)
    (finding,) = alarms.check(now=NOW)
    assert (finding.kind, finding.count) == (Kind.RATE, 21)
    assert finding.subject == "21 Decrypts or MACs within one minute, above the bound of 20."


def test_a_rate_far_above_that_of_the_week_before() -> None:
    made(NOW, 400)
    assert alarms.check(now=NOW + minutes(5)) == []  # nothing is learned yet
    for hour in range(3, 33):
        made(NOW - hours(hour), 50)
    (finding,) = alarms.check(now=NOW + minutes(5))
    assert finding.subject == "400 Decrypts or MACs within one hour, above the bound of 150."
    assert detect.checked(NOW - hours(3), NOW, detect.HOUR)[NOW.replace(minute=0)] == 400


@pytest.mark.parametrize("purpose", ["verify", "unwrap", "rotate", "wrap"])
def test_runs_are_no_rate(configure: Callable[..., None], purpose: str) -> None:
    made(NOW - minutes(10), 200, purpose=purpose)
    assert not detect.checked(NOW - hours(1), NOW, detect.HOUR)
    configure(AUDIT_RATE_BOUND=20)
    assert alarms.check(now=NOW) == []


@pytest.mark.parametrize("bound", [0, 20])
def test_macs_count_as_decrypts_do(configure: Callable[..., None], bound: int) -> None:
    configure(AUDIT_RATE_BOUND=bound)
    for hour in range(3, 33):
        made(NOW - hours(hour), 50, operation="GenerateMac")
    for purpose in ("set", "seal"):
        made(NOW, 400, operation="GenerateMac", purpose=purpose)
    assert alarms.check(now=NOW + minutes(5)) == []
    made(NOW, 400, operation="GenerateMac")
    made(NOW, 400)  # of the same logins, where a MAC is sealed
    (finding,) = alarms.check(now=NOW + minutes(5))
    assert (finding.kind, finding.count) == (Kind.RATE, 400)


def test_a_quiet_site_has_no_rate_to_speak_of() -> None:
    made(NOW, 90)
    for hour in range(3, 33):
        made(NOW - hours(hour), 1)
    assert alarms.check(now=NOW + minutes(5)) == []


def test_other_checks_may_be_added_and_may_fail(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(start: datetime.datetime, end: datetime.datetime) -> list[Found]:
        raise LookupError("no seal")

    def overdue(start: datetime.datetime, end: datetime.datetime) -> list[Found]:
        return [detect.sealing_overdue(NOW, "Nothing was sealed for a day.")]

    monkeypatch.setattr(alarms, "CHECKS", [broken, overdue, *alarms.CHECKS])
    assert [each.kind for each in alarms.check(now=NOW)] == [Kind.SEALING_OVERDUE]
    assert "The check broken of the audit failed (LookupError)" in caplog.text


def test_sealing_that_is_overdue(kms: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    assert alarms.check() == []  # a site that does not seal
    made(timezone.now())
    list(seals.seal(settle=0))
    assert alarms.check() == []
    later = timezone.now() + hours(25)
    with monkeypatch.context() as patch:
        patch.setattr(seals.timezone, "now", lambda: later)
        (finding,) = alarms.check()
    assert finding.kind == Kind.SEALING_OVERDUE
    assert finding.subject.startswith("Sealing of the audit is overdue")


def test_a_sealer_that_never_ran_is_overdue(configure: Callable[..., None]) -> None:
    made(timezone.now() - hours(25), operation="Encrypt")
    assert alarms.check() == []  # a site that does not seal
    configure(AUDIT_SEAL_KEY="alias/seals", AUDIT_SEAL_HOURS=0)
    assert alarms.check() == []
    configure(AUDIT_SEAL_HOURS=26)
    assert alarms.check() == []
    configure(AUDIT_SEAL_HOURS=24)
    (finding,) = alarms.check()
    assert finding.kind == Kind.SEALING_OVERDUE and "no seal" in finding.subject


# --- as it happens ------------------------------------------------------------------


class Out:
    """A KMS that cannot be reached."""

    def decrypt(self, *args: Any) -> Any:
        raise KMSConnectionError


def test_a_breaker_that_opens_is_found_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "provider", Out)
    for _ in range(breaker.FAILURES):
        with pytest.raises(KMSConnectionError):
            calls.kms("login").decrypt(ARN, b"blob", {})
    assert kinds() == [Kind.BREAKER]


def test_a_burst_is_found_at_once(told: list[AuditFinding]) -> None:
    for _ in range(detect.BURST - 1):
        signals.emit(event(outcome=signals.INVALID))
    assert kinds() == []
    signals.emit(event(outcome=signals.INVALID))
    assert kinds() == [Kind.TAMPERED]
    for _ in range(3 * detect.BURST):
        signals.emit(event(outcome=signals.INVALID))
    assert kinds() == [Kind.TAMPERED] and len(told) == 1


def test_a_login_costs_no_query_more(
    kms: Provider,
) -> None:
    encoded = make_password("secret")
    check_password("secret", encoded)
    with _counted() as with_:
        check_password("secret", encoded)
    signals.kms_events.disconnect(dispatch_uid="kms_hasher.alarms")
    try:
        with _counted() as without:
            check_password("secret", encoded)
    finally:
        alarms.connect()
    assert len(with_) == len(without) > 0


def _counted() -> Any:
    return CaptureQueriesContext(connection)


@durable
@pytest.mark.skipif(connection.vendor == "sqlite", reason="there is no thread on SQLite")
def test_a_retired_key_is_found_by_a_thread(configure: Callable[..., None]) -> None:
    configure(AUDIT="durable")
    left_key()
    signals.emit(event(operation="ReEncrypt", requested_key=ARN, key=ARN_2))
    recorder.close()
    assert kinds() == [Kind.RETIRED_KEY]


@durable
@pytest.mark.skipif(connection.vendor == "sqlite", reason="there is no thread on SQLite")
def test_a_key_is_asked_after_once_in_ten_minutes(
    configure: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(AUDIT="durable")
    stored: list[Any] = []
    monkeypatch.setattr(alarms, "_store", stored.append)
    for _ in range(20):
        signals.emit(event())
    recorder.close()
    assert sum(map(len, stored)) == 1


@pytest.mark.parametrize("mode", ["durable", "inline"])
def test_a_database_that_fails_stops_no_login(
    configure: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    mode: str,
) -> None:
    def fail(events: Any) -> None:
        raise RuntimeError("no table")

    configure(AUDIT=mode)
    monkeypatch.setattr(alarms, "_store", fail)
    for _ in range(detect.BURST):
        alarms.watch([event(outcome=signals.INVALID)])
    recorder.close()
    if connection.vendor != "sqlite" or mode == "inline":
        assert "A finding could not be stored (RuntimeError)" in caplog.text


def test_nothing_is_watched_without_an_audit(configure: Callable[..., None]) -> None:
    configure(AUDIT="off")
    for _ in range(detect.BURST):
        signals.emit(event(outcome=signals.INVALID))
    assert kinds() == []


# --- the command --------------------------------------------------------------------


def run(*arguments: str) -> tuple[int, str]:
    out = io.StringIO()
    try:
        call_command("check_kms_audit", *arguments, stdout=out, no_color=True)
    except CommandError as error:
        return error.returncode, out.getvalue()
    return 0, out.getvalue()


def test_the_command_for_cron(
    configure: Callable[..., None], mailed: Callable[[str], None]
) -> None:
    assert run() == (0, "")
    configure(AUDIT_MAIL_ADMINS=True)
    made(timezone.now(), 10, outcome=signals.INVALID)
    status, text = run()
    assert status == 3 and "burst of tampered values" in text
    status, text = run("--json")
    told = json.loads(text)
    assert (status, told["open"], told["mailed"]) == (3, 1, 0)
    assert len(mail.outbox) == 1
    findings.acknowledge(AuditFinding.objects.get(), "rose")
    assert run()[0] == 0


def test_the_command_fails_if_a_check_does(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(start: datetime.datetime, end: datetime.datetime) -> list[Found]:
        raise LookupError

    monkeypatch.setattr(alarms, "CHECKS", [broken, *alarms.CHECKS])
    assert run()[0] == 1
    made(timezone.now(), 10, outcome=signals.INVALID)
    status, text = run("--json")
    told = json.loads(text)
    assert (status, told["ok"], told["failed"], told["open"]) == (1, False, ["broken"], 1)


@pytest.mark.parametrize(
    ("command", "function", "arguments"),
    [
        ("check_kms_audit", "kms_hasher.audit.findings.open_findings", ()),
        ("prune_kms_audit", "kms_hasher.audit.retention.prunable", ("--older-than=9d",)),
        ("roll_up_kms_audit", "kms_hasher.audit.retention.rebuild", ()),
    ],
)
def test_commands_tell_the_kind_of_a_database_error_alone(
    monkeypatch: pytest.MonkeyPatch, command: str, function: str, arguments: tuple[str, ...]
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OperationalError("rose's row")

    monkeypatch.setattr(function, fail)
    with pytest.raises(CommandError, match="OperationalError") as raised:
        call_command(command, *arguments)
    assert raised.value.returncode == 1
    assert "row" not in str(raised.value)


# --- the admin ----------------------------------------------------------------------


@pytest.fixture
def staff(client: Client) -> Callable[..., Client]:
    """Sign in somebody with these permissions."""

    def sign_in(*names: str) -> Client:
        user = User.objects.create(username="rose", is_staff=True)
        user.user_permissions.set(Permission.objects.filter(codename__in=names))
        client.force_login(user)
        return client

    return sign_in


LIST = "/admin/kms_hasher/auditfinding/"


def acknowledge(client: Client, finding: AuditFinding) -> None:
    answer = client.post(LIST, {"action": "acknowledge", "_selected_action": [finding.pk]})
    assert answer.status_code == 302


def test_findings_are_read_and_acknowledged(staff: Callable[..., Client]) -> None:
    finding, _ = findings.record(a_finding("<b>thief</b>", details={"callers": {"<i>": 1}}))
    AuditEvidence.objects.create(
        finding=finding, reference="e", time=NOW, operation="Decrypt", sub="ab" * 16
    )
    client = staff("view_auditfinding", "acknowledge_auditfinding")
    text = client.get(LIST, {"state": "open"}).content.decode()
    assert "&lt;b&gt;thief" in text and "<b>thief" not in text
    acknowledge(client, finding)
    finding.refresh_from_db()
    assert finding.acknowledged_by == "rose" and finding.acknowledged_at
    assert LogEntry.objects.get().object_id == str(finding.pk)
    assert "thief" not in client.get(LIST, {"state": "open"}).content.decode()
    for state in ("acknowledged", "resolved", ""):
        shown = client.get(LIST, {"state": state} if state else {}).content.decode()
        assert ("thief" in shown) == (state != "resolved")
    page = client.get(f"{LIST}{finding.pk}/change/").content.decode()
    assert "ab" * 16 in page and "<i>" not in page and "acknowledged" in page


def test_nobody_acknowledges_or_changes_without_the_permission(
    staff: Callable[..., Client],
) -> None:
    finding, _ = findings.record(a_finding())
    client = staff(
        "view_auditfinding", "change_auditfinding", "delete_auditfinding", "add_auditfinding"
    )
    assert 'value="acknowledge"' not in client.get(LIST).content.decode()
    client.post(LIST, {"action": "acknowledge", "_selected_action": [finding.pk]})
    client.post(LIST, {"action": "delete_selected", "_selected_action": [finding.pk]})
    client.post(f"{LIST}{finding.pk}/change/", {"subject": "nothing"})
    assert client.get(f"{LIST}add/").status_code == 403
    assert client.post(f"{LIST}{finding.pk}/delete/").status_code == 403
    finding.refresh_from_db()
    assert finding.acknowledged_at is None and finding.subject == "Decrypt by a"
    client.logout()
    assert client.get(LIST).status_code == 302


def resolve(client: Client, *chosen: AuditFinding) -> int:
    pks = [finding.pk for finding in chosen]
    return client.post(LIST, {"action": "resolve", "_selected_action": pks}).status_code


def test_who_may_reconcile_sees_and_resolves_what_comparisons_found(
    staff: Callable[..., Client],
) -> None:
    assert findings_admin.COMPARED == reconcile.KINDS
    finding, _ = findings.record(a_finding("thief", details={"callers": {"thief": 1}}))
    other, _ = findings.record(a_finding(kind=Kind.BREAKER, subject="x of nowhere"))
    AuditEvidence.objects.create(
        finding=finding, reference="e", time=NOW, operation="Decrypt", sub="ab" * 16
    )
    client = staff("reconcile_auditevent")
    shown = client.get(LIST).content.decode()
    assert "thief" in shown and "of nowhere" not in shown
    assert 'value="resolve"' in shown and 'value="acknowledge"' not in shown
    assert "ab" * 16 in client.get(f"{LIST}{finding.pk}/change/").content.decode()
    assert client.get(f"{LIST}{other.pk}/change/").status_code == 302  # there is none
    assert resolve(client, finding, other) == 302
    for each in (finding, other):
        each.refresh_from_db()
    assert finding.resolved_at and not finding.is_open and other.is_open
    assert LogEntry.objects.get().change_message == "Resolved."
    again, news = findings.record(a_finding("thief", time=timezone.now() + minutes(1)))
    assert news and again.is_open


def test_nobody_resolves_without_the_permission_or_what_no_comparison_found(
    staff: Callable[..., Client],
) -> None:
    finding, _ = findings.record(a_finding())
    other, _ = findings.record(a_finding(kind=Kind.BREAKER, subject="x of nowhere"))
    client = staff("view_auditfinding", "acknowledge_auditfinding")
    assert 'value="resolve"' not in client.get(LIST).content.decode()
    resolve(client, finding)
    assert LogEntry.objects.count() == 0
    user = User.objects.get()
    user.user_permissions.add(Permission.objects.get(codename="reconcile_auditevent"))
    resolve(client, finding, other)
    for each in (finding, other):
        each.refresh_from_db()
    assert not finding.is_open and other.is_open
    user.user_permissions.set(Permission.objects.filter(codename="view_auditevent"))
    assert client.get(LIST).status_code == 403


# --- the log line, and the recipe ---------------------------------------------------


def test_the_log_line_has_the_names_of_opentelemetry(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, "kms_hasher.audit"):
        signals.emit(event(latency=0.0123456, request_ids=("a", "b")))
        signals.emit(
            event(outcome=signals.DENIED, error_code="AccessDenied", key="alias/tests")
        )
        signals.emit(event(operation=signals.PARSE, outcome=signals.INVALID))
    good, bad, none = (r for r in caplog.records if r.name == "kms_hasher.audit")
    names = {
        "rpc.system": "aws-api",
        "rpc.service": "KMS",
        "rpc.method": "Decrypt",
        "rpc.client.call.duration": 0.012346,
        "cloud.region": "eu-central-1",
        "aws.request_id": "b",
    }
    assert names.items() <= json.loads(good.getMessage()).items()
    assert names.items() <= vars(good).items()
    assert vars(bad)["error.type"] == "AccessDenied"
    assert not hasattr(bad, "cloud.region")
    assert not any(name.startswith(("rpc.", "aws.")) for name in vars(none))


class Metric:
    """What `prometheus_client` gives, as far as the recipe goes."""

    made: dict[str, Metric] = {}

    def __init__(self, name: str, text: str, labels: list[str], **kwargs: Any) -> None:
        self.names, self.values = labels, {}
        Metric.made[name] = self

    def labels(self, *values: str) -> Metric:
        assert len(values) == len(self.names)
        self.present = values
        return self

    def inc(self) -> None:
        self.values[self.present] = self.values.get(self.present, 0) + 1

    def observe(self, value: float) -> None:
        self.values.setdefault(self.present, []).append(value)


def test_the_recipe_for_prometheus(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[1] / "docs/how-to/monitor.md").read_text()
    recipe = text.partition("## Prometheus")[2].partition("```python\n")[2].partition("```")[0]
    stand_in = types.ModuleType("prometheus_client")
    stand_in.Counter = stand_in.Histogram = Metric  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "prometheus_client", stand_in)
    there: dict[str, Any] = {}
    exec(recipe, there)
    try:
        signals.emit(event(latency=0.5, request_ids=("a",)))
        signals.emit(event(outcome=signals.UNAVAILABLE))
        alarms.found([a_finding()])
    finally:
        signals.kms_event.disconnect(there["count"])
        alarms.audit_alarm.disconnect(there["count_finding"])
    assert Metric.made["kms_calls"].values == {
        ("Decrypt", "login", "success"): 1,
        ("Decrypt", "login", "unavailable"): 1,
    }
    assert Metric.made["kms_call_seconds"].values == {("Decrypt",): [0.5]}
    assert Metric.made["kms_findings"].values == {("unknown-call", "critical"): 1}
