"""What is looked at before and after a rotation: permissions, estimates, verification."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from django.conf import settings
from django.contrib.auth.hashers import make_password
from django.contrib.auth.models import User
from django.core.management import CommandError, call_command
from django.db import connection, models
from django.test import override_settings
from django.test.utils import CaptureQueriesContext

from kms_hasher import columns, encoding, exceptions
from kms_hasher.columns import Column
from kms_hasher.models import AuditEvent, RotationRun
from kms_hasher.providers.base import Provider
from kms_hasher.rotation import engine, permissions, plan, rotate, shards, verify, workers
from kms_hasher.rotation.engine import Options
from kms_hasher.rotation.verify import Verified

pytestmark = pytest.mark.django_db

ALIAS = "alias/tests"
OPTIONS = Options(concurrency=1, settle=0)
#: Tests of commands in a transaction, which no other thread may wait for.
QUIET = ("--concurrency=1", "--settle=0", "--noinput")


def make_users(number: int) -> list[User]:
    return User.objects.bulk_create(
        User(username=f"user{index}", password=make_password(f"pw{index}"))
        for index in range(number)
    )


def verified(kms: Provider, sample: int | None = None) -> Verified:
    target = kms.describe_key(ALIAS)
    *_, last = verify.verify(target, sample=sample, options=OPTIONS)
    return last


# --- verification -------------------------------------------------------------------


def test_all_is_opened_and_nothing_told(
    kms: Provider, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    make_users(5)
    found = verified(kms)
    assert (found.under, found.opened, found.bad) == (5, 5, [])
    assert found.is_complete
    made = AuditEvent.objects.filter(purpose="verify")
    assert Counter(made.values_list("operation", flat=True)) == {"Decrypt": 5}


def test_rows_under_another_key_and_bad_ones(kms: Provider) -> None:
    users = make_users(4)
    old = kms.describe_key(ALIAS)
    swapped = encoding.parse(users[1].password)
    blob = encoding.parse(users[0].password).sealed
    values = {
        users[1].pk: str(
            encoding.SealedHash(swapped.header, swapped.mode, swapped.key_ref, blob)
        ),
        users[2].pk: "kms_argon2$nonsense",
    }
    for pk, value in values.items():
        User.objects.filter(pk=pk).update(password=value)
    found = verified(kms)
    assert {row.pk for row in found.bad} == set(values)
    assert not any(value in str(row) for row in found.bad for value in values.values())
    assert found.opened == 2
    assert not found.is_complete
    kms.update_alias(ALIAS, kms.create_key().key_arn)
    found = verified(kms, sample=0)
    assert found.opened == found.under == 0
    assert found.others[encoding.key_ref(old.key_id)] == 3
    assert not found.is_complete


def test_a_password_changed_meanwhile_is_no_problem(
    kms: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    users = make_users(2)
    fresh = make_password("fresh")
    User.objects.filter(pk=users[0].pk).update(password="kms_argon2$nonsense")
    real = verify._take

    def change(*args: Any) -> None:
        User.objects.filter(pk=users[0].pk).update(password=fresh)
        real(*args)

    monkeypatch.setattr(verify, "_take", change)
    assert verified(kms).bad == []


def test_an_outage_is_no_bad_row(kms: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    make_users(2)

    def deny(*args: Any, **kwargs: Any) -> Any:
        raise exceptions.KMSAccessDenied("no", operation="Decrypt")

    monkeypatch.setattr(kms, "decrypt", deny)
    with pytest.raises(exceptions.KMSAccessDenied):
        verified(kms)


def test_pages_of_all_rows(kms: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "PAGE", 2)
    make_users(5)
    assert verified(kms).opened == 5
    assert verified(kms, sample=4).opened <= 4


def test_a_column_with_fewer_rows_than_the_sample_is_opened_whole(
    kms: Provider,
) -> None:
    make_users(5)
    assert verified(kms, sample=5).opened == 5
    with CaptureQueriesContext(connection) as queries:
        assert verified(kms, sample=1000).opened == 5
    # One counts by key, one how many there are, and two read pages.
    assert len([each for each in queries if User._meta.db_table in each["sql"]]) == 4


def test_a_sample_is_spread() -> None:
    users = User.objects.bulk_create(User(username=f"u{i}", password="x") for i in range(1000))
    starts = list(verify._starts(columns.columns()[0], 400))
    first = users[0].pk
    tenths = Counter((start - first + 1) // 100 for start in starts)
    assert len(starts) == 400
    assert all(tenths[tenth] > 10 for tenth in range(10))


def test_a_sample_by_keys_that_are_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    users = User.objects.bulk_create(User(username=f"u{i:02}", password="x") for i in range(20))
    monkeypatch.setattr(shards, "load", lambda column, text: text)
    monkeypatch.setattr(
        shards, "bounds", lambda column, step: ((str(n), "") for n in range(0, 20, step))
    )
    rows = columns.columns()[0].rows

    class Column:
        field = columns.columns()[0].field

        def __init__(self) -> None:
            self.rows = self

        def values_list(self, *args: Any, **kwargs: Any) -> Any:
            return self

        order_by = values_list

        def first(self) -> str:
            return "a key"

        def count(self) -> int:
            return rows.count()

    assert len(users) == 20
    assert list(verify._starts(Column(), 5)) == ["0", "4", "8", "12", "16"]  # type: ignore[arg-type]
    assert list(verify._starts(Column(), 3)) == ["0", "6", "12"]  # type: ignore[arg-type]
    assert list(verify._starts(Column(), 2)) == ["0", "10"]  # type: ignore[arg-type]


def test_nothing_to_open(kms: Provider) -> None:
    assert verified(kms) == Verified()
    assert verified(kms, sample=5) == Verified()


# --- the command --------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *arguments: str, fails: str = "") -> Any:
    if fails:
        with pytest.raises(CommandError, match=fails):
            call_command("rotate_kms_key", "--json", *QUIET, *arguments)
    else:
        call_command("rotate_kms_key", "--json", *QUIET, *arguments)
    return json.loads(capsys.readouterr().out)


def test_verify_after_a_rotation(kms: Provider, capsys: pytest.CaptureFixture[str]) -> None:
    make_users(3)
    found = run(capsys, "--new-key", "--verify=all")["verified"]
    assert found == {
        "rows": 3,
        "others": {},
        "apart": 0,
        "opened": 3,
        "unseen": 0,
        "bad": [],
    }
    assert run(capsys, "--verify=0")["verified"]["opened"] == 0
    assert "verified" not in run(capsys)


def test_keys_are_given_up_only_after_a_verification(
    kms: Provider, capsys: pytest.CaptureFixture[str]
) -> None:
    user, *_ = make_users(2)
    old = kms.describe_key(ALIAS).key_arn
    spoilt = encoding.parse(user.password)
    value = str(encoding.SealedHash(spoilt.header, spoilt.mode, spoilt.key_ref, b"x" * 184))
    run(capsys, "--new-key")
    present = encoding.key_ref(kms.describe_key(ALIAS).key_id)
    User.objects.filter(pk=user.pk).update(password=value.replace(spoilt.key_ref, present))
    result = run(capsys, "--disable-old", fails="no key was disabled")
    assert "given_up" not in result
    assert result["verified"]["bad"]
    assert kms.describe_key(old).state == "Enabled"
    User.objects.filter(pk=user.pk).delete()
    result = run(capsys, "--disable-old")
    assert [each["state"] for each in result["given_up"]] == ["Disabled"]
    assert result["verified"]["opened"] == 1


@pytest.mark.parametrize("text", ["-1", "some"])
def test_how_many_to_open(text: str) -> None:
    with pytest.raises(CommandError, match="--verify"):
        call_command("rotate_kms_key", f"--verify={text}")


def test_a_plan_estimates_and_tries(
    kms: Provider, capsys: pytest.CaptureFixture[str], key_arn: str
) -> None:
    make_users(3)
    result = run(capsys, "--new-key", "--plan", "--rate=1.5")
    assert result["dry_run"] is True
    found = result["estimate"]
    assert (found["rate"], found["bound"], found["seconds"]) == (1.5, "rate", 2.0)
    assert found["permissions"] == {key_arn.rpartition("/")[2]: "allowed"}
    assert found["quota"] == 10_000
    assert set(found["disk"]) == {"auth.User.password"}
    assert not RotationRun.objects.exists()
    call_command("rotate_kms_key", "--plan", "--new-key", "--concurrency=auto")
    out = capsys.readouterr().out
    assert "US dollars" in out
    assert "ReEncrypt from" in out


def test_a_plan_says_what_a_table_may_take(
    kms: Provider, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kms_hasher.rotation import estimate

    make_users(1)
    monkeypatch.setattr(estimate, "disk", lambda column, rows: 3 * 2**20)
    call_command("rotate_kms_key", "--plan", "--new-key")
    assert "auth.User.password may take 3.0 MiB more" in capsys.readouterr().out


def test_a_plan_without_any_key(kms: Provider, capsys: pytest.CaptureFixture[str]) -> None:
    with override_settings(KMS_HASHER={**settings.KMS_HASHER, "KEY": "alias/none"}):
        assert "estimate" not in run(capsys, "--plan", "--new-key")


def test_what_is_denied_is_told(
    kms: Provider, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_users(1)

    def deny(*args: Any, **kwargs: Any) -> Any:
        raise exceptions.KMSAccessDenied("no", operation="ReEncrypt")

    monkeypatch.setattr(kms, "re_encrypt", deny)
    result = run(capsys, "--new-key", "--plan", fails="ReEncrypt is denied")
    assert list(result["estimate"]["permissions"].values()) == ["denied"]


def test_permissions_that_cannot_be_told(
    kms: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_users(2)
    one, two = User.objects.order_by("pk")
    stray = encoding.key_ref("0" * 8 + "-0000-0000-0000-" + "0" * 12)
    prefix = encoding.prefix_of("kms_argon2", "d1", stray)
    User.objects.filter(pk=one.pk).update(password=f"{prefix}cut")
    found = permissions.try_rows(plan.make(new_key=True))
    assert found.pop(stray).startswith("cannot be told: ")
    assert list(found.values()) == ["allowed"]
    real = kms.re_encrypt
    monkeypatch.setattr(kms, "re_encrypt", lambda *args, **kwargs: real(*args))  # no DryRun
    planned = plan.make(new_key=True)
    ref = encoding.parse(two.password).key_ref
    assert permissions.try_rows(planned)[ref] == "allowed"
    assert permissions.try_rows(plan.Plan(kind=RotationRun.Kind.NEW_KEY)) == {}


# --- manners ------------------------------------------------------------------------


def test_the_first_sweep_reads_from_a_replica_that_keeps_up(
    kms: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "BATCH", 1)
    monkeypatch.setattr(engine, "EVERY", 0.0)
    make_users(3)
    read: list[str] = []
    real = Column.rows.fget
    assert real

    def rows(self: Column) -> models.QuerySet[Any]:
        read.append(self.database)
        return real(Column(self.model, self.field, "default"))  # type: ignore[no-any-return]

    monkeypatch.setattr(Column, "rows", property(rows))
    late = [3.0, 2.0, 0.5]
    asked: list[str] = []

    def lag(database: str) -> float:
        asked.append(database)
        return late.pop(0) if late else 0.0

    monkeypatch.setattr(engine, "lag", lag)
    options = Options(
        concurrency=1, settle=0, replicas={"default": "replica"}, max_lag=1.0, batch_size=1
    )
    *_, last = rotate.rotate(plan.make(new_key=True), options)
    assert last.rewritten == 3
    assert read.count("replica") == 1  # in the first sweep, and no later one
    assert asked.count("replica") >= 5
    assert not late


def test_arguments_for_replicas(kms: Provider) -> None:
    with pytest.raises(CommandError, match="name one"):
        call_command("rotate_kms_key", "--max-lag=1")
    with pytest.raises(CommandError, match="DATABASES has no 'there'"):
        call_command("rotate_kms_key", "--replica=there")
    with pytest.raises(CommandError, match="DATABASES has no 'there'"):
        call_command("rotate_kms_key", "--replica=there=default")
    make_users(1)
    call_command("rotate_kms_key", "--new-key", "--replica=default", *QUIET)
    with pytest.raises(CommandError, match="replica"):
        call_command("rotate_kms_key", "--new-key", "--replica=default", "--max-lag=1", *QUIET)


def test_an_engine_that_is_missing_is_said_before_anything_is_done(kms: Provider) -> None:
    from kms_hasher.rotation import distribute

    missing = {"celery": ("not.there", "the extra")}
    before = kms.describe_key(ALIAS).key_arn
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(distribute, "ENGINES", {**distribute.ENGINES, **missing})
        with pytest.raises(CommandError, match="needs the extra"):
            call_command("rotate_kms_key", "--new-key", "--distribute=celery")
    assert kms.describe_key(ALIAS).key_arn == before
    assert not RotationRun.objects.exists()
