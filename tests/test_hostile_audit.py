"""Whoever owns the database, or a file of CloudTrail, neither hides a call nor stops a run."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kms_hasher import calls, encoding, history, signals
from kms_hasher.audit import cloudtrail, reconcile
from kms_hasher.audit.site import Keys
from kms_hasher.exceptions import KMSConnectionError
from kms_hasher.models import (
    AliasPeriod,
    AuditEvidence,
    AuditFinding,
    AuditHour,
    Key,
    TrailFile,
    TrailMark,
)
from tests import test_reconcile
from tests.test_reconcile import (
    NOW,
    START,
    UTC,
    at,
    compare,
    made,
    new_sub,
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


# --- whose a key is -----------------------------------------------------------------


def test_a_key_that_is_deleted_from_the_history_hides_no_call(tmp_path: Path) -> None:
    odd = strange(key=ARN_2)
    write(tmp_path, at(10), [*traffic(), odd])
    Key.objects.filter(arn=ARN_2).delete()
    compare(tmp_path)
    assert unknown() == {odd["eventID"]}


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


@pytest.mark.parametrize("deployment", ["", "mine"])
def test_a_site_of_another_account_is_not_ours(
    tmp_path: Path, configure: Callable[..., None], deployment: str
) -> None:
    configure(KEY=ARN, DEPLOYMENT=deployment)
    elsewhere = ARN_2.replace("2234", "9234").replace("111122223333", "999988887777")
    context = {"application": "kms_hasher", "sub": new_sub()}
    if deployment:
        context["deployment"] = deployment
    write(tmp_path, at(10), [*traffic(1), strange(key=elsewhere, context=context)])
    # Where the deployment has a name, the context alone says whose it is.
    assert compare(tmp_path).calls == (2 if deployment else 1)


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
