"""
The parts of workers that real processes and brokers drive in test_kill.py and
test_distribute.py, here in this process: what they do when something goes wrong.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import django
import pytest
from django.contrib.auth.hashers import make_password
from django.contrib.auth.models import User
from django.db import DatabaseError
from django.utils import timezone

from kms_hasher import columns, exceptions
from kms_hasher.models import RotationRun, RotationShard
from kms_hasher.providers.base import Provider
from kms_hasher.rotation import (
    distribute,
    engine,
    jobs,
    permissions,
    plan,
    processes,
    rotate,
    runs,
    seal,
    shards,
    sweeps,
    verify,
    workers,
)
from kms_hasher.rotation.engine import Options
from tests.test_sweeps import all_under

pytestmark = pytest.mark.django_db

OPTIONS = Options(concurrency=1, settle=0, processes=2)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(workers, "BATCH", 1)
    monkeypatch.setattr(engine, "EVERY", 0.0)
    monkeypatch.setattr(runs, "HEARTBEAT", 0.0)
    monkeypatch.setattr(sweeps, "LOOK", 0.001)
    monkeypatch.setattr(shards, "SMALLEST", 4)
    monkeypatch.setattr(shards, "LARGEST", 4)
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def make_users(number: int) -> None:
    password = make_password("pw")
    User.objects.bulk_create(
        User(username=f"user{index}", password=password) for index in range(number)
    )


# --- processes ----------------------------------------------------------------------


class Ended:
    """An event that is set after it was asked for so many times."""

    def __init__(self, asked: int = 10**9) -> None:
        self.left = asked

    def is_set(self) -> bool:
        self.left -= 1
        return self.left < 0

    def set(self) -> None:
        self.left = 0

    def wait(self, seconds: float) -> None:
        pass


class Child:
    """A process that works in this one, when it is looked at."""

    def __init__(self, target: Any, args: Any, **kwargs: Any) -> None:
        self.work, self.args, self.exitcode = target, args, None
        self.looks, self.stays = 0, False
        self.killed = False
        Context.children.append(self)

    def start(self) -> None:
        pass

    def is_alive(self) -> bool:
        self.looks += 1
        if self.stays:
            return not self.killed
        try:
            self.work(*self.args[:2], Ended(40))
        except SystemExit:
            return False
        return True

    def join(self, seconds: float | None = None) -> None:
        pass

    def kill(self) -> None:
        self.killed = True


class Context:
    children: list[Child] = []
    Process, Event = Child, Ended


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[Child]:
    Context.children = []
    monkeypatch.setattr(processes.multiprocessing, "get_context", lambda name: Context)
    return Context.children


def rotated() -> RotationRun:
    for _ in rotate.rotate(plan.make(new_key=True), OPTIONS, enlist=processes.processes):
        pass
    return RotationRun.objects.get()


def test_processes_do_what_one_does(kms: Provider, children: list[Child]) -> None:
    make_users(10)
    run = rotated()
    assert (run.state, run.rewritten) == ("finished", 10)
    assert run.key and all_under(run.key.arn)
    assert len(children) == 2


def test_a_process_that_does_not_end_is_killed(kms: Provider, children: list[Child]) -> None:
    make_users(3)
    steps = rotate.rotate(plan.make(new_key=True), OPTIONS, enlist=processes.processes)
    next(steps)
    children[1].stays = True
    steps.close()
    assert children[1].killed


def test_all_processes_have_ended(
    kms: Provider, children: list[Child], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_users(3)

    def dead(child: Child) -> bool:
        child.exitcode = -9
        return False

    monkeypatch.setattr(Child, "is_alive", dead)
    with pytest.raises(exceptions.WorkerFailed, match="exit status -9, -9"):
        rotated()


def test_what_a_process_cannot_do_ends_the_run(
    kms: Provider, children: list[Child], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_users(3)

    def deny(*args: Any, **kwargs: Any) -> Any:
        raise exceptions.KMSAccessDenied("not you", operation="ReEncrypt")

    monkeypatch.setattr(kms, "re_encrypt", deny)
    with pytest.raises(exceptions.WorkerFailed, match="not you"):
        rotated()


def test_a_process_ends_with_the_one_that_started_it(
    kms: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_users(10)
    steps = rotate.rotate(plan.make(new_key=True), Options(concurrency=1, settle=0))
    next(steps)
    run = RotationRun.objects.get()
    parent = SimpleNamespace(is_alive=lambda: False)
    monkeypatch.setattr(processes.multiprocessing, "parent_process", lambda: parent)
    processes._main(run.pk, {}, Ended())
    alive = iter([True, True, False, False, False])
    parent.is_alive = lambda: next(alive)
    before = User.objects.filter(password__contains=run.key.ref if run.key else "").count()
    processes._main(run.pk, {}, Ended())  # in the middle of a shard
    run.refresh_from_db()
    assert before <= 10
    assert not run.shards.filter(state="working", owner__contains="processes").exists()
    RotationRun.objects.update(state="paused")
    processes._main(run.pk, {}, Ended(3))
    steps.close()


# --- queues -------------------------------------------------------------------------


def start(monkeypatch: pytest.MonkeyPatch, send: Any) -> Any:
    monkeypatch.setattr(distribute, "import_string", lambda path: lambda: send)
    return rotate.rotate(plan.make(new_key=True), OPTIONS, enlist=distribute.to("celery"))


def test_a_queue_that_refuses_for_a_while(
    kms: Provider, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make_users(3)
    answers = [ConnectionError("refused"), ConnectionError("refused"), None]
    sent: list[int] = []

    def send(shard_id: int) -> None:
        if answers and (error := answers.pop(0)):
            raise error
        sent.append(shard_id)

    steps = start(monkeypatch, send)
    for _ in range(3):
        next(steps)
    assert len(sent) == 1
    assert "does not take a message (ConnectionError: refused)" in caplog.text
    steps.close()


def test_a_queue_that_refuses_for_good(kms: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    make_users(3)

    def send(shard_id: int) -> None:
        raise ConnectionError("refused")

    monkeypatch.setattr(distribute, "PATIENCE", -1.0)
    with pytest.raises(exceptions.WorkerFailed, match="ConnectionError: refused"):
        list(start(monkeypatch, send))


@pytest.mark.parametrize("error", [DatabaseError("a row"), exceptions.KMSAccessDenied("no")])
def test_errors_of_work_done_at_once(
    kms: Provider, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    make_users(3)

    def send(shard_id: int) -> None:
        raise error

    with pytest.raises(type(error)):
        list(start(monkeypatch, send))


def test_a_queue_that_works_at_once(kms: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    make_users(10)
    monkeypatch.setattr(sweeps, "LOOK", -1.0)  # each takes longer than that
    monkeypatch.setattr(distribute.time, "sleep", lambda seconds: None)
    list(start(monkeypatch, distribute.work_on))
    run = RotationRun.objects.get()
    assert (run.state, run.rewritten) == ("finished", 10)


@pytest.mark.parametrize(
    ("error", "match"),
    [
        (RuntimeError("no broker"), "cannot be used as it is set up: no broker"),
        (exceptions.ConfigurationError("make an app"), "^make an app$"),
    ],
)
def test_an_engine_that_is_not_set_up(
    monkeypatch: pytest.MonkeyPatch, error: Exception, match: str
) -> None:
    def sender() -> Any:
        raise error

    monkeypatch.setattr(distribute, "import_string", lambda path: sender)
    with pytest.raises(exceptions.ConfigurationError, match=match):
        distribute.to("celery")


def test_a_shard_is_given_back_in_time(kms: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    make_users(4)
    sent: list[int] = []
    options = Options(concurrency=1, settle=0, batch_size=1)
    monkeypatch.setattr(distribute, "import_string", lambda path: lambda: sent.append)
    steps = rotate.rotate(plan.make(new_key=True), options, enlist=distribute.to("celery"))
    next(steps)
    assert sweeps.work_on(sent[0], 0)
    assert RotationShard.objects.get(pk=sent[0]).state == "waiting"
    next(steps)
    assert sent.count(sent[0]) == 2  # and it is sent again
    steps.close()


@pytest.mark.parametrize(
    "error", [DatabaseError("quotes a row"), exceptions.KMSTimeout("late")]
)
def test_what_workers_tell_of_errors(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*args: Any) -> bool:
        raise error

    monkeypatch.setattr(sweeps, "work_on", fail)
    with pytest.raises(exceptions.WorkerFailed) as caught:
        distribute.work_on(1)
    assert "row" not in str(caught.value)
    assert caught.value.__context__ is None


@pytest.mark.parametrize(
    ("module", "asked"),
    [("gevent.monkey", "is_module_patched"), ("eventlet.patcher", "is_monkey_patched")],
)
def test_greenlets_are_refused(
    kms: Provider, monkeypatch: pytest.MonkeyPatch, module: str, asked: str
) -> None:
    make_users(3)
    sent: list[int] = []
    steps = start(monkeypatch, sent.append)
    next(steps)
    patched = SimpleNamespace(**{asked: lambda name: True})
    for name in ("gevent.monkey", "eventlet.patcher"):
        monkeypatch.setitem(sys.modules, name, patched if name == module else None)
    with pytest.raises(exceptions.ConfigurationError, match="gevent or eventlet"):
        sweeps.work_on(sent[0])
    assert RotationShard.objects.get(pk=sent[0]).state == "failed"
    steps.close()


def test_celery_puts_the_id_on_its_queue(
    kms: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    celery = pytest.importorskip("kms_hasher.rotation.celery")
    import kms_hasher.tasks  # noqa: F401  # as autodiscover_tasks() does

    monkeypatch.setattr(celery, "current_app", SimpleNamespace(main="default"))
    with pytest.raises(exceptions.ConfigurationError, match="Celery app in this process"):
        celery.sender()
    monkeypatch.setattr(celery, "current_app", SimpleNamespace(main="project"))
    sent: list[int] = []
    monkeypatch.setattr(celery.work_on, "delay", sent.append)
    celery.sender()(7)
    assert sent == [7]
    celery.work_on.run(0)  # no such shard


@pytest.mark.skipif(django.VERSION < (6, 0), reason="the tasks framework came with Django 6.0")
def test_a_run_by_djangos_tasks(kms: Provider, settings: Any) -> None:
    settings.TASKS = {
        "default": {"BACKEND": "django.tasks.backends.immediate.ImmediateBackend"}
    }
    make_users(10)
    steps = rotate.rotate(plan.make(new_key=True), OPTIONS, enlist=distribute.to("tasks"))
    for _ in steps:
        pass
    run = RotationRun.objects.get()
    assert (run.state, run.rewritten) == ("finished", 10)


@pytest.mark.skipif(django.VERSION >= (6, 0), reason="there is a tasks framework")
def test_no_tasks_framework(kms: Provider) -> None:
    with pytest.raises(exceptions.ConfigurationError, match=r"Django 6\.0"):
        distribute.to("tasks")


# --- what is seldom -----------------------------------------------------------------


def walker(kms: Provider, run: RotationRun, pool: workers.Workers) -> engine.Walker:
    return engine.Walker(run, engine_job(kms), Options(concurrency=1, settle=0), pool)


def engine_job(kms: Provider) -> Any:
    return jobs.Rewrap(kms.create_key())


def test_bad_rows_are_counted_once_and_not_all_named(
    kms: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_users(3)
    User.objects.update(password="kms_argon2$nonsense")
    monkeypatch.setattr(engine, "NAMED", 2)
    now = timezone.now()
    run = RotationRun.objects.create(kind="rewrap", started_at=now, updated_at=now)
    shards.open_sweep(run, columns.columns(), 4)
    with workers.Workers(1) as pool, shards.owner() as owner:
        claimed = shards.claim(run, owner)
        assert claimed
        list(walker(kms, run, pool).walk(claimed))
        assert (claimed.failed, len(claimed.bad)) == (3, 2)
        # Taken up by the next, before the cursor of the first.
        RotationShard.objects.update(state="waiting", cursor="")
        again = shards.claim(run, owner)
        assert again
        list(walker(kms, run, pool).walk(again))
        assert again.failed == 4  # the one that was not named


def test_what_was_dropped_is_left_for_the_next(
    kms: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_users(4)
    options = Options(concurrency=1, settle=0, rate=1)
    steps = rotate.rotate(plan.make(new_key=True), options)
    while next(steps).calls < 1:
        pass
    # The calls that wait begin a second apart.
    RotationRun.objects.update(state="paused")
    while not (progress := next(steps)).paused:
        pass
    assert progress.rewritten < 4
    RotationRun.objects.update(state="running", rate=None)
    *_, last = steps
    assert last.rewritten == 4


def test_a_wait_for_kms_gives_signs_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "PATIENCE", 0.01)

    async def task() -> str:
        await asyncio.sleep(1)
        return "done"

    with workers.Workers(1) as pool:
        found = list(pool.map(iter([[(1, task)]])))
    assert found[0] == []
    assert [outcome.value for outcome in found[-1]] == ["done"]


def test_two_columns_under_one_key_are_tried_once(kms: Provider, settings: Any) -> None:
    make_users(2)
    planned = plan.make(new_key=True)
    (column,) = planned.rows_by_column()
    twice = SimpleNamespace(
        target=planned.target,
        present=planned.present,
        rewraps=True,
        rows_by_column=lambda: {column: planned.rows_by_ref(), "b": planned.rows_by_ref()},
    )
    assert list(permissions.try_rows(twice).values()) == ["allowed"]  # type: ignore[arg-type]


def test_sealing_for_another_key_is_another_run(kms: Provider) -> None:
    now = timezone.now()
    RotationRun.objects.create(
        kind="wrap", alias="alias/tests", state="failed", started_at=now, updated_at=now
    )
    for _ in seal.wrap(Options(concurrency=1, settle=0)):
        pass
    assert RotationRun.objects.filter(kind="wrap").count() == 2


def test_what_is_not_sealed_is_no_matter_of_a_verification(kms: Provider) -> None:
    User.objects.create(username="x", password="pbkdf2_sha256$1$a$b")
    *_, found = verify.verify(kms.describe_key("alias/tests"), options=OPTIONS)
    assert found == verify.Verified()


def test_a_sample_of_a_table_that_has_fewer_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "load", lambda column, text: text)
    monkeypatch.setattr(shards, "bounds", lambda column, step: iter([("", "a"), ("a", "")]))
    rows = SimpleNamespace(count=lambda: 2, first=lambda: "k")
    rows.values_list = rows.order_by = lambda *args, **kwargs: rows
    column: Any = SimpleNamespace(rows=rows)
    assert list(verify._starts(column, 5)) == [None, "a"]
