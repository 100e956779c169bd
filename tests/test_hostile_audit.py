"""Whoever owns the database, or a file of CloudTrail, neither hides a call nor stops a run."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kms_hasher import encoding, history, signals
from kms_hasher.audit import cloudtrail
from kms_hasher.audit.site import Keys
from kms_hasher.models import (
    AliasPeriod,
    AuditFinding,
    AuditHour,
    Key,
)
from tests import test_reconcile
from tests.test_reconcile import (
    START,
    UTC,
    at,
    compare,
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
