"""Runs and shards as rows: laid out, claimed, gone on with, paused and cancelled."""

from __future__ import annotations

import datetime
import os
import socket
import uuid
from collections import Counter
from collections.abc import Generator
from typing import Any
from unittest import mock

import pytest
from django.contrib.auth.hashers import make_password
from django.contrib.auth.models import User
from django.core.management import CommandError, call_command
from django.db import connection, models
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from kms_hasher import columns, encoding, exceptions
from kms_hasher.columns import Column
from kms_hasher.models import RotationRun, RotationShard
from kms_hasher.providers.base import Provider
from kms_hasher.rotation import (
    distribute,
    engine,
    jobs,
    plan,
    rotate,
    runs,
    shards,
    sweeps,
    workers,
)
from kms_hasher.rotation.engine import Options
from kms_hasher.rotation.sweeps import Progress

pytestmark = pytest.mark.django_db

ALIAS = "alias/tests"
OPTIONS = Options(concurrency=1, settle=0)
State = RotationRun.State


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "BATCH", 1)
    monkeypatch.setattr(engine, "EVERY", 0.0)
    monkeypatch.setattr(runs, "HEARTBEAT", 0.0)
    monkeypatch.setattr(sweeps, "LOOK", 0.001)
    monkeypatch.setattr(shards, "SMALLEST", 4)
    monkeypatch.setattr(shards, "LARGEST", 4)
    monkeypatch.setattr(shards.random, "shuffle", lambda found: None)


def make_users(number: int) -> list[User]:
    password = make_password("pw")
    return User.objects.bulk_create(
        User(username=f"user{index}", password=password) for index in range(number)
    )


def refs() -> Counter[str]:
    values = User.objects.values_list("password", flat=True)
    return Counter(encoding.parse(value).key_ref for value in values)


def all_under(arn: str) -> bool:
    return set(refs()) == {encoding.key_ref(arn)}


def column() -> Column:
    return columns.columns()[0]


def start(**wishes: Any) -> Generator[Progress, None, Any]:
    return rotate.rotate(plan.make(**wishes), OPTIONS)


# --- shards -------------------------------------------------------------------------


def test_shards_bound_all_keys_once() -> None:
    users = make_users(10)
    User.objects.filter(pk=users[5].pk).delete()
    found = list(shards.bounds(column(), 4))
    keys = [user.pk for user in users if user.pk]
    assert found == [("", str(keys[3])), (str(keys[3]), str(keys[8])), (str(keys[8]), "")]


def test_a_table_that_ends_with_a_shard() -> None:
    users = make_users(4)
    assert list(shards.bounds(column(), 4)) == [("", str(users[3].pk)), (str(users[3].pk), "")]
    User.objects.all().delete()
    assert list(shards.bounds(column(), 4)) == [("", "")]


def test_the_size_of_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SMALLEST", 500)
    monkeypatch.setattr(shards, "LARGEST", 50_000)
    assert shards.size(0, 1) == 500
    assert shards.size(80_000, 2) == 5_000
    assert shards.size(100_000_000, 20) == 50_000


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (models.BigAutoField(primary_key=True), 2**62),
        (models.UUIDField(primary_key=True), uuid.UUID(int=7)),
        (models.CharField(primary_key=True, max_length=9), 'a"\u00e9\n'),
    ],
)
def test_keys_of_all_kinds_as_text(field: Any, value: Any) -> None:
    class Model:
        _meta = type("Meta", (), {"pk": field})

    kind: Any = Column(Model, field, "default")  # type: ignore[arg-type]
    assert shards.load(kind, shards.dump(value)) == value


def test_keys_of_several_columns_as_text() -> None:
    class Model:
        _meta = type("Meta", (), {})

    Model._meta.pk = type(  # type: ignore[attr-defined]
        "Composite", (), {"fields": [models.IntegerField(), models.UUIDField()]}
    )
    kind: Any = Column(Model, None, "default")  # type: ignore[arg-type]
    value = (1, uuid.UUID(int=7))
    assert shards.load(kind, shards.dump(value)) == value


def make_run(**values: Any) -> RotationRun:
    now = timezone.now()
    values = {"kind": "rewrap", "started_at": now, "updated_at": now, **values}
    values.setdefault("plan", sweeps.plan_of(OPTIONS))
    return RotationRun.objects.create(**values)


def test_a_sweep_is_opened_once() -> None:
    make_users(9)
    run = make_run()
    other = RotationRun.objects.get()
    shards.open_sweep(run, columns.columns(), 4)
    shards.open_sweep(other, columns.columns(), 4)
    assert (run.sweep, other.sweep, run.shards.count()) == (1, 1, 3)
    shards.open_sweep(run, [], 1)
    assert run.sweep == 2
    fields = ("number", "column", "after", "upto")
    first, second = (list(run.shards.filter(sweep=n).values_list(*fields)) for n in (1, 2))
    assert first == second


def test_a_shard_is_claimed_by_one() -> None:
    make_users(3)
    run = make_run()
    shards.open_sweep(run, columns.columns(), 4)
    with shards.owner() as one, shards.owner() as two:
        mine = shards.claim(run, one)
        assert mine and mine.owner == one
        assert shards.claim(run, two) is None
        assert shards.claim(run, two, only=mine.pk) is None
        assert shards.at_work(run) == 1
    # The owners have ended, and with them what they held.
    with shards.owner() as three:
        again = shards.claim(run, three)
        assert again and again.pk == mine.pk
        assert not shards.keep(mine)
        assert shards.keep(again, state="done")
        assert shards.claim(run, three) is None


def test_two_claims_in_the_same_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    make_users(3)
    run = make_run()
    shards.open_sweep(run, columns.columns(), 4)

    def beaten(found: list[Any]) -> None:
        run.shards.update(state="working", owner="elsewhere:1:a", updated_at=timezone.now())

    monkeypatch.setattr(shards.random, "shuffle", beaten)
    with shards.owner() as one:
        assert shards.claim(run, one) is None


def test_who_is_gone() -> None:
    now, host = timezone.now(), socket.gethostname()
    late = now - shards.LEASE - datetime.timedelta(seconds=1)
    ended = 2**22 + 1  # above all that Linux gives
    with shards.owner() as me:
        assert not shards.is_gone(me, now)
    assert shards.is_gone(me, now)
    assert shards.is_gone("", now)
    assert shards.is_gone(me, None)
    assert shards.is_gone(f"{host}:{ended}:a", now)
    assert not shards.is_gone(f"{host}:{os.getppid()}:a", now)
    assert not shards.is_gone("elsewhere:1:a", now)
    assert shards.is_gone("elsewhere:1:a", late)
    assert not shards.is_gone("nonsense", now)


def test_a_process_of_somebody_else_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(pid: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(shards.os, "kill", denied)
    assert not shards.is_gone(f"{socket.gethostname()}:1:a", timezone.now())


def test_settings_that_lack_the_column() -> None:
    run = make_run()
    shard = RotationShard(run=run, sweep=1, number=1, database="default", column="a.B.c")
    with pytest.raises(exceptions.ConfigurationError, match="PASSWORD_FIELDS"):
        shards.column_of(shard)


# --- going on -----------------------------------------------------------------------


@pytest.mark.parametrize("stop", [KeyboardInterrupt, exceptions.KMSAccessDenied])
def test_an_unfinished_run_goes_on_where_it_stopped(
    kms: Provider, stop: type[BaseException]
) -> None:
    make_users(10)
    options = Options(concurrency=1, settle=0, batch_size=1)
    steps = rotate.rotate(plan.make(new_key=True), options)
    for _ in range(4):
        next(steps)
    with pytest.raises(stop):
        steps.throw(stop)
    run = RotationRun.objects.get()
    assert run.state == ("interrupted" if stop is KeyboardInterrupt else "failed")
    assert run.shards.get(number=1).cursor
    before = run.rewritten
    assert 0 < before < 10
    *_, last = start(new_key=True)
    run = RotationRun.objects.get()
    assert (run.state, run.rewritten, run.failed) == ("finished", 10, 0)
    assert last.rewritten == 10
    assert last.before >= before
    assert run.key and all_under(run.key.arn)


def test_a_failed_run_shows_its_error_until_it_goes_on(
    kms: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_users(6)

    def deny(*args: Any, **kwargs: Any) -> Any:
        raise exceptions.KMSAccessDenied("no", operation="ReEncrypt")

    with monkeypatch.context() as patched:
        patched.setattr(kms, "re_encrypt", deny)
        with pytest.raises(exceptions.KMSAccessDenied):
            list(start(new_key=True))
    run = RotationRun.objects.get()
    assert run.state == "failed" and run.error
    failed = run.shards.get(state="failed")
    assert failed.error == run.error
    list(start(new_key=True))
    run.refresh_from_db()
    assert (run.state, run.error) == ("finished", "")


def test_a_run_for_another_key_is_not_gone_on_with(kms: Provider) -> None:
    make_users(6)
    steps = start(to=kms.create_key().key_arn)
    next(steps)
    steps.close()
    list(start(to=kms.create_key().key_arn))
    assert list(RotationRun.objects.order_by("pk").values_list("state", flat=True)) == [
        "interrupted",
        "finished",
    ]


def test_a_live_run_is_left_to_its_process(kms: Provider) -> None:
    make_users(6)
    first = start(new_key=True)
    next(first)
    assert plan.make(new_key=True).begun is None
    list(start(new_key=True))
    list(first)
    assert list(RotationRun.objects.values_list("state", flat=True)) == ["finished"] * 2


def test_a_shard_that_is_lost_is_left(kms: Provider) -> None:
    """A worker that was thought dead, as its machine slept, finds its shard taken."""
    make_users(3)
    steps = start(new_key=True)
    next(steps)
    RotationShard.objects.update(owner="elsewhere:1:a", updated_at=timezone.now())
    for _ in range(3):
        next(steps)
    assert RotationShard.objects.get().owner == "elsewhere:1:a"
    RotationShard.objects.update(updated_at=timezone.now() - 2 * shards.LEASE)
    list(steps)
    run = RotationRun.objects.get()
    assert run.state == "finished"
    assert run.key and all_under(run.key.arn)


def test_what_another_worker_could_not_do_ends_the_run(kms: Provider) -> None:
    make_users(10)
    steps = start(new_key=True)
    next(steps)
    waiting = RotationShard.objects.filter(state="waiting")
    waiting.filter(number=3).update(state="failed", error="AccessDenied elsewhere")
    with pytest.raises(exceptions.WorkerFailed, match="AccessDenied elsewhere"):
        list(steps)
    assert RotationRun.objects.get().state == "failed"


# --- pause, resume, cancel ----------------------------------------------------------


def command(*arguments: str) -> None:
    call_command("rotate_kms_key", *arguments)


def test_pause_and_resume(kms: Provider, capsys: pytest.CaptureFixture[str]) -> None:
    make_users(10)
    steps = start(new_key=True)
    next(steps)
    command("--pause")
    while not (progress := next(steps)).paused:
        pass
    rewritten = progress.rewritten
    assert rewritten < 10
    for _ in range(5):
        assert next(steps).rewritten == rewritten
    run = RotationRun.objects.get()
    assert run.state == "paused"
    assert not run.shards.filter(state="working").exists()
    with pytest.raises(CommandError, match="only a running one can be paused"):
        command("--pause")
    command("--resume")
    *_, last = steps
    assert last.rewritten == 10
    assert RotationRun.objects.get().state == "finished"
    out = capsys.readouterr().out
    assert "pauses once the calls in flight are done" in out
    assert "goes on." in out


def test_cancel(kms: Provider) -> None:
    make_users(10)
    steps = start(new_key=True)
    next(steps)
    with pytest.raises(CommandError, match="only a paused one can be resumed"):
        command("--resume")
    command("--cancel")
    with pytest.raises(exceptions.RotationCancelled):
        list(steps)
    run = RotationRun.objects.get()
    assert (run.state, run.error) == ("cancelled", "")
    assert run.finished_at
    assert len(refs()) == 2
    assert all(user.check_password("pw") for user in User.objects.all())
    with pytest.raises(CommandError, match="There is no such run"):
        command("--cancel")
    with pytest.raises(CommandError, match="there is nothing to cancel"):
        command("--cancel", str(run.pk))
    # It is not gone on with: the next run is another.
    list(start())
    assert RotationRun.objects.count() == 2
    assert len(refs()) == 1


def test_cancelled_while_it_is_paused(kms: Provider) -> None:
    make_users(6)
    steps = start(new_key=True)
    next(steps)
    command("--pause")
    while not next(steps).paused:
        pass
    command("--cancel")
    with pytest.raises(exceptions.RotationCancelled):
        list(steps)


def test_a_cancelled_command_says_so(
    kms: Provider, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_users(6)
    real = sweeps.View.progress

    def cancel(self: sweeps.View, **more: Any) -> Progress:
        RotationRun.objects.update(state="cancelled")
        return real(self, **more)

    monkeypatch.setattr(sweeps.View, "progress", cancel)
    with pytest.raises(CommandError, match="The run was cancelled"):
        command("--new-key", "--json")
    assert '"state": "cancelled"' in capsys.readouterr().out


def test_steering_what_nobody_conducts(kms: Provider) -> None:
    old = timezone.now() - datetime.timedelta(hours=1)
    for kind, wanted in (
        ("new-key", "rotate_kms_key --new-key`"),
        ("to-key", "rotate_kms_key --to ...`"),
        ("new-material", "rotate_kms_key --new-material`"),
        ("rewrap", "rotate_kms_key`"),
        ("wrap", "manage.py wrap_passwords`"),
        ("unwrap", "manage.py unwrap_passwords`"),
    ):
        run = make_run(kind=kind, owner="elsewhere:1:a", updated_at=old)
        with pytest.raises(CommandError, match=wanted.replace(".", "[.]")):
            command("--resume", str(run.pk))
    with pytest.raises(CommandError, match="Which run"):
        command("--pause")


# --- workers of a queue -------------------------------------------------------------


def test_one_shard_at_a_time(kms: Provider) -> None:
    make_users(6)
    sent: list[int] = []
    with monkeypatched_engine(sent.append):
        steps = rotate.rotate(plan.make(new_key=True), OPTIONS, enlist=distribute.to("celery"))
        next(steps)
        assert len(sent) == 2
        assert sweeps.work_on(sent[0])
        assert not sweeps.work_on(sent[0])  # delivered twice
        next(steps)
        assert sweeps.work_on(sent[1])
        for _ in steps:
            for shard in sent[2:]:
                sweeps.work_on(shard)
    assert len(sent) == 6  # three sweeps of two: one finds them, one nothing, one late ones
    run = RotationRun.objects.get()
    assert (run.state, run.rewritten) == ("finished", 6)
    assert not sweeps.work_on(sent[0])  # delivered when all is over
    assert not sweeps.work_on(0)


def monkeypatched_engine(send: Any) -> Any:
    return mock.patch.object(distribute, "import_string", lambda path: lambda: send)


def test_an_engine_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(distribute.ENGINES, "celery", ("not.there", "the extra"))
    with pytest.raises(exceptions.ConfigurationError, match="needs the extra"):
        distribute.to("celery")


def test_messages_that_are_lost_are_sent_again(
    kms: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_users(3)
    sent: list[int] = []
    with monkeypatched_engine(sent.append):
        steps = rotate.rotate(plan.make(new_key=True), OPTIONS, enlist=distribute.to("celery"))
        for _ in range(3):
            next(steps)
        assert len(sent) == 1
        steps.close()
        monkeypatch.setattr(distribute, "RESEND", -1.0)
        steps = rotate.rotate(plan.make(new_key=True), OPTIONS, enlist=distribute.to("celery"))
        next(steps)
        assert len(sent) == 2
        next(steps)
        assert len(sent) == 3
        steps.close()


def test_a_shard_whose_worker_is_gone_is_sent_again(
    kms: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_users(3)
    sent: list[int] = []
    with monkeypatched_engine(sent.append):
        steps = rotate.rotate(plan.make(new_key=True), OPTIONS, enlist=distribute.to("celery"))
        next(steps)
        RotationShard.objects.update(state="working", owner="elsewhere:1:a", updated_at=None)
        next(steps)
        assert len(sent) == 1  # not at once: the engine may deliver it again itself
        monkeypatch.setattr(shards, "LEASE", datetime.timedelta(0))
        next(steps)
        assert len(sent) == 2
        assert sweeps.work_on(sent[0])
        steps.close()


def test_a_worker_that_fails_tells_the_one_that_conducts(
    kms: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_users(3)
    sent: list[int] = []
    with monkeypatched_engine(sent.append):
        steps = rotate.rotate(plan.make(new_key=True), OPTIONS, enlist=distribute.to("celery"))
        next(steps)

        def deny(*args: Any, **kwargs: Any) -> Any:
            raise exceptions.KMSAccessDenied("not you", operation="ReEncrypt")

        monkeypatch.setattr(kms, "re_encrypt", deny)
        with pytest.raises(exceptions.KMSAccessDenied):
            sweeps.work_on(sent[0])
        with pytest.raises(exceptions.WorkerFailed, match="not you"):
            list(steps)


def test_the_rate_is_shared_by_all_at_work(kms: Provider) -> None:
    make_users(6)
    run = make_run(rate=100.0, key=None)
    shards.open_sweep(run, columns.columns(), 4)
    run.shards.filter(number=2).update(
        state="working", owner="elsewhere:1:a", updated_at=timezone.now()
    )

    class Counted(workers.Workers):
        limits: list[float | None] = []

        def limit(self, rate: float | None) -> None:
            self.limits.append(rate)
            super().limit(rate)

    target = kms.create_key()
    with Counted(1) as pool, shards.owner() as me:
        claimed = shards.claim(run, me)
        assert claimed
        RotationRun.objects.update(rate=None)
        steps = engine.Walker(run, jobs.Rewrap(target), OPTIONS, pool).walk(claimed)
        next(steps)
        RotationRun.objects.update(rate=50.0)
        next(steps)
    assert Counted.limits[0] is None
    assert Counted.limits[-1] == 25.0


def test_jobs_are_made_from_their_rows(kms: Provider) -> None:
    key = plan.history.record_key(kms.create_key().key_arn, timezone.now())
    planned = {"material": "abc", "mode": "direct", "data_keys_up_to": 3}
    made = {
        kind: jobs.of(make_run(kind=kind, key=key, plan=planned)) for kind in RotationRun.Kind
    }
    renew = made[RotationRun.Kind.NEW_MATERIAL]
    assert isinstance(renew, jobs.Renew)
    assert renew.target.key_material_id == "abc"
    assert isinstance(made[RotationRun.Kind.WRAP], jobs.Wrap)
    assert isinstance(made[RotationRun.Kind.UNWRAP], jobs.Unwrap)
    for kind in ("rewrap", "new-key", "to-key"):
        assert type(made[RotationRun.Kind(kind)]) is jobs.Rewrap
    for kind in ("to-mode", "new-data-keys"):
        assert isinstance(made[RotationRun.Kind(kind)], jobs.Convert)


# --- what a run costs the database --------------------------------------------------


def test_a_second_run_looks_at_each_table_once(kms: Provider, calls: Any) -> None:
    make_users(20)
    list(start(new_key=True))
    made = len(calls())
    with CaptureQueriesContext(connection) as queries:
        list(start())
    table = connection.ops.quote_name(User._meta.db_table)
    looked = [each["sql"] for each in queries if f"FROM {table}" in each["sql"]]
    assert len(looked) == 1
    assert calls()[made:] == ["DescribeKey"]


def test_pauses_between_batches(kms: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    make_users(4)
    slept: list[float] = []
    monkeypatch.setattr(engine.time, "sleep", slept.append)
    options = Options(concurrency=1, settle=0, batch_size=2, sleep=0.01)
    list(rotate.rotate(plan.make(new_key=True), options))
    assert slept[:2] == [0.01, 0.01]


def test_progress_of_a_run_gone_on_with() -> None:
    progress = Progress(sweep=1, total=100, looked=60, calls=60, before=40, seconds=10)
    assert progress.rate == 2
    assert progress.seconds_left == 20
    assert Progress(sweep=2, calls=60, seconds=10).seconds_left is None
    assert Progress(sweep=1).seconds_left is None


def test_a_run_killed_before_it_had_its_key_is_the_same_run(
    kms: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_users(3)

    def killed(*args: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(rotate.keys, "make_like", killed)
        with pytest.raises(KeyboardInterrupt):
            list(start(new_key=True))
    assert RotationRun.objects.get().key is None
    list(start(new_key=True))
    run = RotationRun.objects.get()
    assert (run.state, run.rewritten) == ("finished", 3)
    assert run.key and all_under(run.key.arn)


def test_a_row_that_stays_locked_is_waited_for(
    kms: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_users(1)
    waited: list[float] = []
    real, swap_all = sweeps._wait, Column.swap_all
    tries = 0

    def wait(record: Any, view: Any, seconds: float) -> Any:
        waited.append(seconds)
        return real(record, view, 0)

    def locked(self: Column, changes: Any) -> set[Any]:
        nonlocal tries
        tries += 1
        return swap_all(self, changes) if tries > 4 else set()

    monkeypatch.setattr(sweeps, "_wait", wait)
    monkeypatch.setattr(Column, "swap_all", locked)
    *_, last = start(new_key=True)
    assert last.rewritten == 1
    assert waited == [0.5, 1.0, 0]  # and for the alias
