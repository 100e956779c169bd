"""The engine and what stands around it: plans, keys, jobs, runs, workers."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import functools
import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
from django.contrib.auth.hashers import make_password
from django.contrib.auth.models import User
from django.db import connection
from django.test import override_settings
from django.utils import timezone

from kms_hasher import calls as calls_module
from kms_hasher import columns, encoding, history, keyring, signals, users
from kms_hasher import exceptions as errors
from kms_hasher.columns import Column
from kms_hasher.models import AliasPeriod, AuditEvent, Key, RotationRun
from kms_hasher.providers.base import Provider
from kms_hasher.rotation import (
    engine,
    jobs,
    keys,
    pace,
    plan,
    rotate,
    runs,
    seal,
    status,
    sweeps,
    workers,
)
from kms_hasher.rotation.engine import BadRow, Options
from kms_hasher.rotation.rotate import Rotated
from kms_hasher.rotation.sweeps import Progress
from kms_hasher.signals import Event, kms_event
from tests.hashers import CheapArgon2PasswordHasher

pytestmark = pytest.mark.django_db

T = TypeVar("T")
ALIAS = "alias/tests"
OPTIONS = Options(concurrency=1, settle=0)
Calls = Callable[[], list[str]]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(workers, "BATCH", 1)  # each row is written before the next call
    monkeypatch.setattr(keys, "MATERIAL_LOOK", 0.001)
    monkeypatch.setattr(sweeps, "PAUSE", 0.0)


def make_users(number: int, prefix: str = "user") -> list[User]:
    return User.objects.bulk_create(
        User(username=f"{prefix}{index}", password=make_password(f"pw{index}"))
        for index in range(number)
    )


def passwords() -> dict[Any, str]:
    return dict(User.objects.values_list("pk", "password"))


def refs() -> Counter[str]:
    return Counter(encoding.parse(value).key_ref for value in passwords().values())


def all_can_sign_in() -> bool:
    users = enumerate(User.objects.order_by("pk"))
    return all(user.check_password(f"pw{index}") for index, user in users)


def finish(steps: Generator[Progress, None, T]) -> tuple[T, Progress, list[BadRow]]:
    """Run to the end; return the result, the last progress and all bad rows."""
    seen: list[Progress] = []
    while True:
        try:
            seen.append(next(steps))
        except StopIteration as stop:
            return stop.value, seen[-1], [row for each in seen for row in each.bad]


def rotated(**wishes: Any) -> tuple[Rotated, Progress, list[BadRow]]:
    return finish(rotate.rotate(plan.make(**wishes), OPTIONS))


def damage(user: User, value: str) -> str:
    User.objects.filter(pk=user.pk).update(password=value)
    return value


class Interfering:
    """Stands in for a method of the provider, and does something else as well."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, kms: Provider, name: str, run: Callable[..., Any]
    ) -> None:
        self.calls = 0
        self.method = getattr(kms, name)

        def method(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return run(self, *args, **kwargs)

        monkeypatch.setattr(kms, name, method)


@contextlib.contextmanager
def after_each_call(run: Callable[[int], Any]) -> Iterator[None]:
    """Have `run` called with the number of each ReEncrypt, before what it gave is written."""
    numbers = itertools.count(1)

    def listen(event: Event, **kwargs: Any) -> None:
        if event.operation == "ReEncrypt":
            run(next(numbers))

    kms_event.connect(listen)
    try:
        yield
    finally:
        kms_event.disconnect(listen)


# --- re-wrapping --------------------------------------------------------------------


def test_a_new_key_takes_over_all_passwords(kms: Provider, calls: Calls) -> None:
    users = make_users(7)
    before = passwords()
    made = len(calls())
    result, progress, bad = rotated(new_key=True)
    assert refs() == {encoding.key_ref(result.target.key_id): 7}
    assert kms.describe_key(ALIAS).key_arn == result.target.key_arn
    assert all_can_sign_in()
    for user in users:
        assert encoding.stable_part(before[user.pk]) == encoding.stable_part(
            passwords()[user.pk]
        )
    assert (progress.rewritten, progress.overtaken, progress.failed) == (7, 0, 0)
    assert not bad
    rotation = Counter(calls()[made:])
    # One call for each row, and no digest ever leaves KMS.
    assert rotation["ReEncrypt"] == progress.calls == 7
    assert rotation["Decrypt"] == 7  # those of check_password above
    row = RotationRun.objects.get()
    assert (row.kind, row.state, row.alias) == ("new-key", "finished", ALIAS)
    assert (row.rewritten, row.overtaken, row.failed, row.error) == (7, 0, 0, "")
    assert row.key and row.key.arn == result.target.key_arn
    assert row.key.rows == 7
    assert row.previous_key and row.previous_key.arn != row.key.arn
    assert "@" in row.started_by
    assert row.finished_at is not None


def test_rotation_makes_only_reencrypt_calls(kms: Provider, events: list[Event]) -> None:
    make_users(5)
    before = len(events)
    rotated(new_key=True)
    made = Counter(event.operation for event in events[before:])
    assert made["ReEncrypt"] == 5
    assert not made.keys() & {"Decrypt", "Encrypt", "GenerateDataKey"}
    assert {event.purpose for event in events[before:]} == {"rotate"}


def test_nothing_to_do_is_one_lookup(kms: Provider, calls: Calls) -> None:
    make_users(3)
    made = len(calls())
    before = passwords()
    _, progress, _ = rotated()
    assert calls()[made:] == ["DescribeKey"]
    assert passwords() == before
    assert (progress.sweep, progress.looked, progress.rewritten) == (0, 0, 0)
    assert RotationRun.objects.get().state == "finished"


def test_an_alias_moved_in_aws_is_followed(kms: Provider) -> None:
    make_users(3)
    moved_to = kms.create_key().key_arn
    kms.update_alias(ALIAS, moved_to)
    result, progress, _ = rotated()
    assert result.target.key_arn == moved_to
    assert progress.rewritten == 3
    period = history.current_period(ALIAS)
    assert period and period.key.arn == moved_to


def test_pages_go_by_key(kms: Provider) -> None:
    make_users(10)
    planned = plan.make(new_key=True)
    _, progress, _ = finish(
        rotate.rotate(planned, Options(concurrency=1, settle=0, batch_size=3))
    )
    assert progress.rewritten == 10
    job = jobs.Rewrap(kms.create_key())
    column = columns.columns()[0]
    query = str(job.candidates(column.rows, "password").order_by("pk")[:3].query)
    assert "OFFSET" not in query


def test_stale_objects_are_swept_up(kms: Provider) -> None:
    user, *_ = make_users(4)
    stale = User.objects.get(pk=user.pk)

    def save_stale(number: int) -> None:
        if number == 3:
            stale.save()  # puts the old string back, after the row was rewritten

    with after_each_call(save_stale):
        result, progress, _ = rotated(new_key=True)
    assert refs() == {encoding.key_ref(result.target.key_id): 4}
    assert progress.rewritten == 5
    assert User.objects.get(pk=user.pk).check_password("pw0")


@pytest.mark.parametrize("batch", [1, 100])
def test_an_overtaken_password_is_not_lost(
    kms: Provider, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    monkeypatch.setattr(workers, "BATCH", batch)
    user, *_ = make_users(2)

    def change(number: int) -> None:
        if number == 1:  # between reading the row and writing it
            user.set_password("new")
            user.save()

    with after_each_call(change):
        result, progress, _ = rotated(new_key=True)
    assert (progress.rewritten, progress.overtaken) == (1, 1)
    assert User.objects.get(pk=user.pk).check_password("new")
    assert refs() == {encoding.key_ref(result.target.key_id): 2}
    assert RotationRun.objects.get().overtaken == 1


def test_rows_that_cannot_be_written_end_the_run(
    kms: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_users(1)
    before = passwords()
    monkeypatch.setattr(Column, "swap_all", lambda *args: set())
    with pytest.raises(errors.RotationRefused, match="10 sweeps in a row"):
        rotated(new_key=True)
    assert passwords() == before


def test_a_deleted_row_is_let_go(kms: Provider) -> None:
    user, *_ = make_users(2)
    with after_each_call(lambda number: User.objects.filter(pk=user.pk).delete()):
        assert rotated(new_key=True)[1].overtaken == 1


def test_a_late_alias_is_waited_for(kms: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    make_users(2)
    old = kms.describe_key(ALIAS).key_arn
    waited = []

    def slept(seconds: float) -> None:
        # A process that still sees the old key seals one more.
        waited.append(seconds)
        with override_settings(
            KMS_HASHER={**conf_dict(), "KEY": old.rpartition("/")[2]},
        ):
            make_users(1, prefix="late")

    monkeypatch.setattr(sweeps, "time", SimpleNamespace(monotonic=time.monotonic, sleep=slept))
    planned = plan.make(new_key=True)
    options = Options(concurrency=1, settle=0.001)
    steps = list(rotate.rotate(planned, options))
    assert len(waited) >= 1
    assert any(step.waiting for step in steps)
    assert User.objects.count() == sum(refs().values()) == 3
    assert len(refs()) == 1
    assert not steps[-1].waiting


def conf_dict() -> dict[str, Any]:
    from django.conf import settings

    return dict(settings.KMS_HASHER)


def test_a_late_answer_in_the_checks_is_no_move(
    kms: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_users(2)
    old = kms.describe_key(ALIAS)

    def lag(self: Interfering, key: str) -> Any:
        return old if key == ALIAS else self.method(key)

    planned = plan.make(new_key=True)
    Interfering(monkeypatch, kms, "describe_key", lag)
    result, progress, _ = finish(rotate.rotate(planned, OPTIONS))
    assert progress.rewritten == 2
    # Run again within the lag: the history knows better than KMS.
    again = plan.make()
    assert again.present and again.present.key_arn == result.target.key_arn
    assert again.total == 0
    with pytest.raises(errors.RotationRefused, match="spreads moves late"):
        keys.give_up(result.left, result.target, alias=ALIAS)


def test_an_answer_of_another_alias_target_long_ago_is_believed(kms: Provider) -> None:
    old = kms.describe_key(ALIAS)
    rotated(new_key=True)
    AliasPeriod.objects.filter(until__isnull=False).update(
        until=timezone.now() - history.ALIAS_LAG * 2
    )
    kms.update_alias(ALIAS, old.key_arn)
    with with_key(ALIAS, AUDIT="off"):  # or the audit would record the move before us
        present = plan.make().present
    assert present and present.key_arn == old.key_arn


def test_two_runs_that_move_the_alias_do_not_undo_each_other(kms: Provider) -> None:
    make_users(6)
    first = rotate.rotate(
        plan.make(new_key=True), Options(concurrency=1, settle=0, batch_size=2)
    )
    next(first)  # the alias is moved, and a first page done
    RotationRun.objects.update(state="finished")  # or the second would join the first
    second, progress, _ = rotated(new_key=True)
    assert progress.rewritten == 6
    with pytest.raises(errors.RotationRefused, match="was moved to"):
        list(first)
    assert RotationRun.objects.filter(state="failed").count() == 1
    # The first brought some rows to its own key before it noticed; a run puts that right.
    result, _, _ = rotated()
    assert result.target.key_arn == second.target.key_arn
    assert refs() == {encoding.key_ref(second.target.key_id): 6}
    assert all_can_sign_in()


def test_two_runs_at_once_share_the_work(kms: Provider) -> None:
    make_users(9)
    options = Options(concurrency=1, settle=0, batch_size=2)
    first = rotate.rotate(plan.make(new_key=True), options)
    next(first)
    joined = plan.make(new_key=True)
    assert joined.resumes and not joined.moves_alias
    second = rotate.rotate(joined, options)
    last: dict[int, Progress] = {}
    going = [first, second]
    while going:
        for steps in list(going):
            if progress := next(steps, None):
                last[id(steps)] = progress
            else:
                going.remove(steps)
    assert sum(progress.rewritten for progress in last.values()) == 9
    assert joined.target
    assert refs() == {encoding.key_ref(joined.target.key_id): 9}


def test_what_a_query_cannot_tell_the_parser_decides(kms: Provider) -> None:
    users = make_users(2)
    target = kms.describe_key(ALIAS)
    # Made by a hasher that is not listed (any more), and under the key already.
    value = damage(users[0], users[0].password.replace("kms_argon2$", "kms_former$"))
    _, progress, bad = rotated()
    assert (progress.looked, progress.calls, bad) == (0, 0, [])  # nothing is counted
    damage(users[1], "kms_argon2$nonsense")
    _, progress, bad = rotated()
    assert (progress.looked, progress.calls, len(bad)) == (2, 0, 1)
    assert passwords()[users[0].pk] == value
    assert encoding.parse(value).key_id == target.key_id


@pytest.mark.django_db(transaction=True)
def test_several_threads(kms: Provider, calls: Calls) -> None:
    if connection.vendor == "sqlite":
        pytest.skip("a thread has no way to the database in memory; see test_kill.py")
    make_users(40)
    made = len(calls())
    planned = plan.make(new_key=True)
    result, progress, bad = finish(
        rotate.rotate(planned, Options(concurrency=5, settle=0, batch_size=15, rate=2000))
    )
    assert (progress.rewritten, progress.overtaken, bad) == (40, 0, [])
    assert calls()[made:].count("ReEncrypt") == 40
    assert refs() == {encoding.key_ref(result.target.key_id): 40}
    assert AuditEvent.objects.filter(operation="ReEncrypt").count() == 40


# --- bad rows -----------------------------------------------------------------------


def test_bad_rows_are_reported_and_left(kms: Provider, calls: Calls) -> None:
    users = make_users(6)
    sealed = encoding.parse(users[0].password)
    ghost = encoding.key_ref("0" * 8 + "-0000-0000-0000-" + "0" * 12)
    values = {
        users[1].pk: damage(users[1], "kms_argon2$nonsense"),
        # another row's blob: refused by the encryption context
        users[2].pk: damage(
            users[2],
            str(
                encoding.SealedHash(
                    encoding.parse(users[2].password).header,
                    "d1",
                    sealed.key_ref,
                    sealed.sealed,
                )
            ),
        ),
        users[3].pk: damage(users[3], users[3].password.replace(sealed.key_ref, ghost)),
        users[4].pk: damage(users[4], users[4].password.replace("$d1$", "$z9$")),
    }
    made = len(calls())
    _, progress, bad = rotated(new_key=True)
    assert (progress.rewritten, progress.failed) == (2, 4)
    assert {row.pk for row in bad} == set(values)
    assert all(row.column == "auth.User.password" for row in bad)
    for row in bad:
        assert values[row.pk] not in str(row)
        assert sealed.key_ref not in str(row)
    assert {pk: value for pk, value in passwords().items() if pk in values} == values
    # None is tried again in the sweep that follows.
    assert calls()[made:].count("ReEncrypt") == 4
    assert progress.sweep > 1
    row = RotationRun.objects.get()
    assert (row.state, row.failed) == ("finished", 4)


def test_a_bad_row_that_changed_is_tried_again(kms: Provider) -> None:
    users = make_users(3)
    good = users[0].password
    damage(users[0], "kms_argon2$nonsense")
    with after_each_call(lambda number: damage(users[0], good)):
        _, progress, bad = rotated(new_key=True)
    assert len(bad) == 1
    assert (progress.rewritten, progress.failed) == (3, 0)


@pytest.mark.parametrize("state", ["disabled", "pending"])
def test_an_unusable_source_key_is_asked_once(kms: Provider, calls: Calls, state: str) -> None:
    make_users(4)
    old = kms.describe_key(ALIAS).key_arn
    kms.update_alias(ALIAS, kms.create_key().key_arn)
    make_users(1, prefix="new")
    kms.disable_key(old) if state == "disabled" else kms.schedule_key_deletion(old, 7)
    made = len(calls())
    _, progress, bad = rotated()
    assert (progress.rewritten, progress.failed, len(bad)) == (0, 4, 4)
    assert calls()[made:].count("ReEncrypt") == 1


def test_an_unusable_target_stops_at_once(
    kms: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_users(4)
    before = passwords()
    planned = plan.make(new_key=True)

    def disable(self: Interfering, source: str, *args: Any, **kwargs: Any) -> Any:
        kms.disable_key(kms.describe_key(ALIAS).key_arn)
        return self.method(source, *args, **kwargs)

    blocked = Interfering(monkeypatch, kms, "re_encrypt", disable)
    with pytest.raises(errors.KeyDisabled):
        list(rotate.rotate(planned, OPTIONS))
    assert blocked.calls == 1
    assert passwords() == before
    row = RotationRun.objects.get()
    assert (row.state, row.rewritten) == ("failed", 0)
    assert "disabled" in row.error


def test_denied_stops_at_once(kms: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    make_users(4)

    def deny(self: Interfering, *args: Any, **kwargs: Any) -> Any:
        raise errors.KMSAccessDenied

    blocked = Interfering(monkeypatch, kms, "re_encrypt", deny)
    with pytest.raises(errors.KMSAccessDenied):
        rotated(new_key=True)
    assert blocked.calls == 1


def test_denied_for_a_key_that_a_forged_row_names_stops_nothing(
    kms: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    users = make_users(3)
    ghost = "00000000-0000-0000-0000-000000000000"
    damage(
        users[0],
        users[0].password.replace(
            encoding.parse(users[0].password).key_ref, encoding.key_ref(ghost)
        ),
    )

    def deny(self: Interfering, source: str, *args: Any, **kwargs: Any) -> Any:
        if source.endswith(ghost):
            raise errors.KMSAccessDenied
        return self.method(source, *args, **kwargs)

    Interfering(monkeypatch, kms, "re_encrypt", deny)
    _, progress, bad = rotated(new_key=True)
    assert (progress.rewritten, [row.pk for row in bad]) == (2, [users[0].pk])


def test_errors_of_others_are_raised_as_they_are(
    kms: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_users(1)
    monkeypatch.setattr(keyring, "arewrap", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        rotated(new_key=True)
    assert RotationRun.objects.get().error == "ZeroDivisionError"


def test_a_value_too_long_for_the_column_is_not_written(
    kms: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_users(2)
    before = passwords()
    monkeypatch.setattr(users, "column_width", lambda column: 100)
    _, _, bad = rotated(new_key=True)
    assert [row.reason for row in bad] == [engine.TOO_LONG] * 2
    assert passwords() == before


def test_an_answer_that_names_another_key_is_not_stored(
    kms: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_users(1)
    before = passwords()
    other = kms.create_key().key_arn

    def stray(
        self: Interfering, source: str, blob: bytes, context: Any, key: str, to: Any
    ) -> Any:
        return self.method(source, blob, context, other, to)

    Interfering(monkeypatch, kms, "re_encrypt", stray)
    with pytest.raises(errors.KMSBadResponse):
        rotated(new_key=True)
    assert passwords() == before


# --- KMS out of reach ---------------------------------------------------------------


def test_throttling_is_waited_out(kms: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    make_users(4)

    def throttle(self: Interfering, *args: Any, **kwargs: Any) -> Any:
        if self.calls % 3:
            raise errors.KMSThrottled
        return self.method(*args, **kwargs)

    throttled = Interfering(monkeypatch, kms, "re_encrypt", throttle)
    _, progress, bad = rotated(new_key=True)
    assert (progress.rewritten, progress.calls, throttled.calls) == (4, 12, 12)
    assert not bad


def test_an_outage_stops_the_run_and_the_next_goes_on(
    kms: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_users(5)

    def fail(self: Interfering, *args: Any, **kwargs: Any) -> Any:
        if 2 < self.calls <= 2 + workers.TRIES:
            raise errors.KMSTimeout
        return self.method(*args, **kwargs)

    Interfering(monkeypatch, kms, "re_encrypt", fail)
    with pytest.raises(errors.KMSTimeout):
        rotated(new_key=True)
    failed = RotationRun.objects.get()
    assert (failed.state, failed.rewritten) == ("failed", 2)
    assert all_can_sign_in()
    # The same command again uses the key that was made.
    planned = plan.make(new_key=True)
    assert planned.resumes
    result, progress, _ = finish(rotate.rotate(planned, OPTIONS))
    assert failed.key and result.target.key_arn == failed.key.arn
    assert progress.rewritten == 5
    again = RotationRun.objects.get()  # it is the same run that came to its end
    assert (again.pk, again.state, again.error) == (failed.pk, "finished", "")
    assert refs() == {failed.key.ref: 5}
    # And once it is finished, another new key is another key.
    assert not plan.make(new_key=True).resumes


def test_the_check_between_sweeps_is_tried_again_too(
    kms: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_users(1)
    planned = plan.make(new_key=True)

    def fail_once(self: Interfering, key: str) -> Any:
        if self.calls == 1:
            raise errors.KMSInternalError
        return self.method(key)

    Interfering(monkeypatch, kms, "describe_key", fail_once)
    assert finish(rotate.rotate(planned, OPTIONS))[1].rewritten == 1


# --- workers ------------------------------------------------------------------------


async def nothing() -> None:
    """Do as a call does whose answer is dropped."""
    signals.emit(Event(timezone.now(), "ReEncrypt", "rotate", signals.SUCCESS))


def outcomes(
    pool: workers.Workers, tasks: list[workers.Task]
) -> Iterator[tuple[Any, str | Exception | None]]:
    for some in pool.map(iter([list(enumerate(tasks))])):
        yield from ((outcome.item, outcome.value) for outcome in some)


def test_the_rate_is_kept() -> None:
    with workers.Workers(4, rate=200) as pool:
        started = time.monotonic()
        done = list(outcomes(pool, [nothing] * 41))
        assert 0.19 < time.monotonic() - started < 10
    assert len(done) == pool.calls == 41


def test_the_rate_has_no_bursts(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(pace.time, "monotonic", lambda: now)
    limiter = pace.Pace(1, 10)
    waits = [limiter.turn() for _ in range(3)]
    now += 60  # idle for a minute: nothing is saved up
    waits += [limiter.turn() for _ in range(2)]
    assert waits == pytest.approx([0, 0.1, 0.2, 0, 0.1])
    assert limiter.calls == 5


def test_calls_are_made_at_the_same_time_and_no_thread_is_left() -> None:
    before = {thread.name for thread in threading.enumerate()}
    going, most = 0, 0

    async def task() -> str:
        nonlocal going, most
        going += 1
        most = max(most, going)
        await asyncio.sleep(0.01)
        going -= 1
        return "done"

    barrier = threading.Barrier(3, timeout=10)
    with workers.Workers(3) as pool:
        assert [value for _, value in outcomes(pool, [task] * 30)] == ["done"] * 30
        assert most == 3
        # And so are those of a provider that knows no event loop.
        waits = calls_module.in_thread(barrier.wait)
        assert len(list(outcomes(pool, [waits] * 3))) == 3
    assert {thread.name for thread in threading.enumerate()} == before


def test_leaving_early_drops_what_is_queued() -> None:
    began: list[int] = []

    async def task() -> None:
        began.append(1)
        await asyncio.sleep(0.05)

    with workers.Workers(2) as pool:
        next(outcomes(pool, [task] * 100))
    assert len(began) < 90


@pytest.mark.parametrize("batch", [1, 100])
def test_calls_in_flight_are_waited_for_and_recorded(
    events: list[Event], monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    monkeypatch.setattr(workers, "BATCH", batch)
    begun = threading.Event()

    def call(name: str, seconds: float) -> workers.Task:
        async def task() -> None:
            begun.set()
            await asyncio.sleep(seconds)
            signals.emit(Event(timezone.now(), name, "rotate", "success"))

        return task

    with workers.Workers(3) as pool:
        found = outcomes(pool, [call("one", 0.2), call("two", 0.2), call("three", 0.2)] * 2)
        with contextlib.suppress(ZeroDivisionError):
            next(found)
            begun.clear()
            begun.wait(1)
    number = len(events)
    assert {event.operation for event in events} == {"one", "two", "three"}
    assert 3 <= number <= 6


def test_stopping_ends_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "FIRST_PAUSE", 60.0)
    tried = threading.Event()

    async def task() -> None:
        tried.set()
        raise errors.KMSThrottled

    started = time.monotonic()
    with workers.Workers(2) as pool:
        next(outcomes(pool, [nothing, task]))
        tried.wait(10)
    assert time.monotonic() - started < 10


def test_after_an_error_nothing_is_begun_before_it_is_seen() -> None:
    began: list[int] = []

    async def task() -> None:
        began.append(1)
        raise errors.KMSAccessDenied

    with workers.Workers(1) as pool:
        found = outcomes(pool, [task] * 3)
        for number in (1, 2, 3):
            next(found)
            time.sleep(0.02)
            assert len(began) == number
        assert list(found) == []


def test_stopping_ends_a_wait_for_the_rate() -> None:
    started = time.monotonic()
    with workers.Workers(2, rate=0.01) as pool:
        next(outcomes(pool, [nothing] * 5))
    assert time.monotonic() - started < 10


def test_errors_that_come_apart_are_each_waited_for() -> None:
    """The second error comes between the first one's being seen and the going on."""
    began: list[int] = []

    def failing_after(seconds: float) -> workers.Task:
        async def task() -> None:
            began.append(1)
            await asyncio.sleep(seconds)
            raise errors.KMSAccessDenied

        return task

    with workers.Workers(2) as pool:
        tasks = [failing_after(0), failing_after(1), *[failing_after(0)] * 4]
        found = pool.map(iter([list(enumerate(tasks))]))
        assert len(next(found)) == 1
        time.sleep(1.3)  # and meanwhile the second has failed
        assert len(next(found)) == 1
        assert len(began) == 2


def test_a_loop_that_breaks_is_not_waited_for() -> None:
    async def task() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), workers.Workers(2) as pool:
        next(outcomes(pool, [task]))


@pytest.mark.parametrize("error", [errors.KMSAccessDenied(), ZeroDivisionError()])
def test_an_error_brings_no_frames_that_hold_a_digest(error: Exception) -> None:
    async def task(digest: bytes) -> None:
        raise error

    with workers.Workers(1) as pool:
        ((_, found),) = outcomes(pool, [functools.partial(task, b"digest")])
    assert found is error
    assert found.__traceback__ is None


@pytest.mark.parametrize(
    ("error", "tries"), [(errors.KMSAccessDenied, 1), (errors.KMSTimeout, workers.TRIES)]
)
def test_a_single_call_raises_at_last(error: type[errors.KMSError], tries: int) -> None:
    made: list[int] = []

    def fail() -> None:
        made.append(1)
        raise error

    with pytest.raises(error):
        workers.patiently(fail)
    assert len(made) == tries


# --- runs ---------------------------------------------------------------------------


def test_a_silent_run_is_marked_as_interrupted() -> None:
    now = timezone.now()
    silent, alive = (
        RotationRun.objects.create(
            kind="rewrap", started_at=now, updated_at=now - datetime.timedelta(minutes=minutes)
        )
        for minutes in (11, 9)
    )
    with runs.recorded(RotationRun.Kind.WRAP, started_by="the deployment"):
        pass
    silent.refresh_from_db()
    alive.refresh_from_db()
    assert (silent.state, alive.state) == ("interrupted", "running")
    assert RotationRun.objects.get(kind="wrap").started_by == "the deployment"


def test_a_run_gives_signs_of_life(kms: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    make_users(3)
    monkeypatch.setattr(runs, "HEARTBEAT", 0.0)
    monkeypatch.setattr(engine, "EVERY", 0.0)
    seen = []
    steps = rotate.rotate(plan.make(new_key=True), OPTIONS)
    for progress in steps:
        row = RotationRun.objects.get()
        seen.append((row.state, row.rewritten))
        assert row.rewritten == progress.rewritten
        # taken for dead by another run: the next sign of life says otherwise
        RotationRun.objects.update(state="interrupted")
    assert ("running", 2) in seen


@pytest.mark.parametrize("stop", [KeyboardInterrupt, GeneratorExit])
def test_a_stopped_run_says_so(kms: Provider, stop: type[BaseException]) -> None:
    make_users(3)
    steps = rotate.rotate(plan.make(new_key=True), OPTIONS)
    next(steps)
    with pytest.raises(stop):
        steps.throw(stop)
    assert RotationRun.objects.get().state == "interrupted"
    assert plan.make(new_key=True).resumes


def test_a_user_without_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> str:
        raise KeyError("uid not found")

    monkeypatch.setattr(runs.getpass, "getuser", unknown)
    with runs.recorded(RotationRun.Kind.WRAP) as record:
        assert record.row.started_by.partition("@")[0].isdigit()


# --- plans --------------------------------------------------------------------------


def test_a_plan_changes_nothing(kms: Provider) -> None:
    make_users(3)
    before = everything()
    for wishes in ({}, {"new_key": True}, {"new_material": True}):
        planned = plan.make(**wishes)
        assert planned.present and planned.alias == ALIAS
        assert planned.total == (0 if not wishes else 3)
    assert everything() == before


def everything() -> list[list[Any]]:
    """All rows that a rotation might write."""
    return [
        list(model._base_manager.order_by("pk").values_list())
        for model in (User, Key, AliasPeriod, RotationRun)
    ]


def with_key(key: str, **more: Any) -> override_settings:
    return override_settings(KMS_HASHER={**conf_dict(), "KEY": key, **more})


def test_key_without_an_alias(kms: Provider, key_arn: str) -> None:
    make_users(2)
    with with_key(kms.create_key().key_arn):
        for wishes in ({"new_key": True}, {"to": key_arn}):
            with pytest.raises(errors.RotationRefused, match="only an alias can be moved"):
                plan.make(**wishes)
        planned = plan.make()
        assert (planned.alias, planned.total, planned.moves_alias) == ("", 2, False)
        result, progress, _ = finish(rotate.rotate(planned, OPTIONS))
        assert progress.rewritten == 2
        assert result.left == {encoding.key_ref(key_arn)}
        assert not AliasPeriod.objects.filter(alias="").exists()
        assert [key.state for key in keys.give_up(result.left, result.target)] == ["Disabled"]


def test_key_that_does_not_exist(kms: Provider) -> None:
    with (
        with_key("00000000-0000-0000-0000-000000000000"),
        pytest.raises(errors.RotationRefused, match="There is no key"),
    ):
        plan.make()


def test_an_alias_that_does_not_exist_is_made_with_its_key(kms: Provider) -> None:
    name = f"alias/made-{time.monotonic_ns()}"
    with with_key(name):
        with pytest.raises(errors.RotationRefused, match="--new-key` makes it"):
            plan.make()
        planned = plan.make(new_key=True)
        assert planned.present is None and planned.moves_alias
        result, _, _ = finish(rotate.rotate(planned, OPTIONS))
        described = kms.describe_key(name)
        assert described.key_arn == result.target.key_arn
        assert described.description == keys.DESCRIPTION
        assert not result.left
        assert plan.make().total == 0


def test_an_alias_named_by_its_arn(kms: Provider, key_arn: str) -> None:
    home = key_arn.partition("key/")[0]
    name = f"alias/by-arn-{time.monotonic_ns()}"
    with with_key(f"{home}{name}"):
        result, _, _ = rotated(new_key=True)
        rotated(new_key=True)
    assert kms.describe_key(name).key_arn != result.target.key_arn


def test_a_bootstrap_that_was_stopped_is_gone_on_with(
    kms: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"alias/stopped-{time.monotonic_ns()}"

    def fail_once(self: Interfering, *args: Any) -> Any:
        if self.calls == 1:
            raise errors.KMSConnectionError
        return self.method(*args)

    Interfering(monkeypatch, kms, "create_alias", fail_once)
    with with_key(name):
        with pytest.raises(errors.KMSConnectionError):
            rotated(new_key=True)
        made = RotationRun.objects.get().key
        result, _, _ = rotated(new_key=True)
    assert made and result.target.key_arn == made.arn


def test_an_alias_that_somebody_else_makes_meanwhile(kms: Provider, key_arn: str) -> None:
    name = f"alias/race-{time.monotonic_ns()}"
    with with_key(name):
        planned = plan.make(new_key=True)
        kms.create_alias(name, key_arn)
        with pytest.raises(errors.RotationRefused, match="somebody else"):
            finish(rotate.rotate(planned, OPTIONS))


def test_an_unfinished_run_whose_alias_moved_on_is_not_gone_on_with(kms: Provider) -> None:
    steps = rotate.rotate(plan.make(new_key=True), OPTIONS)
    next(steps)
    steps.close()
    kms.update_alias(ALIAS, kms.create_key().key_arn)
    assert not plan.make(new_key=True).resumes


def test_to_an_existing_key(kms: Provider) -> None:
    make_users(2)
    key = kms.create_key()
    name = f"alias/next-{time.monotonic_ns()}"
    kms.create_alias(name, key.key_arn)
    for to in (key.key_id, key.key_arn, name):
        planned = plan.make(to=to)
        assert planned.target and planned.target.key_arn == key.key_arn
    result, progress, _ = finish(rotate.rotate(planned, OPTIONS))
    assert progress.rewritten == 2
    assert kms.describe_key(ALIAS).key_arn == key.key_arn
    assert refs() == {encoding.key_ref(key.key_id): 2}
    assert not plan.make(to=name).moves_alias
    assert RotationRun.objects.get().kind == "to-key"
    assert len(result.left) == 1


def test_to_a_key_that_will_not_do(kms: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(to: str, match: str) -> None:
        with pytest.raises(errors.RotationRefused, match=match):
            plan.make(to=to)

    refused("alias/nowhere", "There is no key")
    disabled = kms.create_key().key_arn
    kms.disable_key(disabled)
    refused(disabled, "is Disabled")
    mac = kms.create_key(spec="HMAC_256", usage="GENERATE_VERIFY_MAC").key_arn
    refused(mac, "HMAC_256 for GENERATE_VERIFY_MAC")
    with with_key("alias/none-yet"):
        refused(mac, "needs a key that is SYMMETRIC")
    foreign = SimpleNamespace(
        key_arn="arn:aws:kms:local-2:000000000000:key/00000000-0000-0000-0000-000000000000",
        key_id="00000000-0000-0000-0000-000000000000",
        spec="SYMMETRIC_DEFAULT",
        usage="ENCRYPT_DECRYPT",
        state="Enabled",
        request_ids=(),
    )

    def abroad(self: Interfering, key: str) -> Any:
        return foreign if "local-2" in key else self.method(key)

    Interfering(monkeypatch, kms, "describe_key", abroad)
    refused(foreign.key_arn, "another account or Region")


# --- keys ---------------------------------------------------------------------------


def test_a_new_key_is_like_the_present_one(kms: Provider) -> None:
    present = kms.create_key(
        multi_region=True,
        description="passwords",
        policy=kms.get_key_policy(kms.describe_key(ALIAS).key_arn).policy.replace(
            "key-default-1", "our-policy"
        ),
        tags={"team": "identity", "aws:cloudformation:stack-name": "kms"},
    )
    kms.enable_key_rotation(present.key_arn, 180)
    kms.update_alias(ALIAS, present.key_arn)
    make_users(1)
    key = rotated(new_key=True)[0].target
    assert key.key_arn != present.key_arn
    assert (key.spec, key.usage, key.multi_region, key.description) == (
        present.spec,
        present.usage,
        True,
        "passwords",
    )
    assert key.key_id.startswith("mrk-")
    assert "our-policy" in kms.get_key_policy(key.key_arn).policy
    assert kms.list_resource_tags(key.key_arn).tags == {"team": "identity"}
    assert kms.get_key_rotation_status(key.key_arn).period_days == 180


def test_a_new_key_like_one_that_does_not_rotate(kms: Provider, calls: Calls) -> None:
    present = kms.create_key(spec="HMAC_256", usage="GENERATE_VERIFY_MAC")
    made = len(calls())
    assert keys.make_like(present).spec == "HMAC_256"
    assert "GetKeyRotationStatus" not in calls()[made:]


def test_new_material(kms: Provider, calls: Calls) -> None:
    users = make_users(4)
    before = kms.describe_key(ALIAS)
    header = encoding.parse(users[0].password).header
    made = len(calls())
    result, progress, _ = rotated(new_material=True)
    assert result.target.key_arn == before.key_arn
    assert result.target.key_material_id != before.key_material_id
    assert progress.rewritten == 4
    assert not result.left
    assert calls()[made:].count("ReEncrypt") == 4
    stored = encoding.parse(passwords()[users[0].pk])
    assert stored.header == header
    opened = kms.decrypt(before.key_arn, stored.sealed, keyring.context_of(header))
    assert opened.key_material_id == result.target.key_material_id
    assert RotationRun.objects.get().kind == "new-material"


def test_new_material_that_was_interrupted_is_not_renewed_again(
    kms: Provider, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "BATCH", 2)
    monkeypatch.setattr(engine, "EVERY", 0.0)
    make_users(6)
    steps = rotate.rotate(
        plan.make(new_material=True), Options(concurrency=1, batch_size=2, settle=0)
    )
    next(steps)
    steps.close()
    before = passwords()
    planned = plan.make(new_material=True)
    assert planned.resumes and planned.total == 6
    made = len(calls())
    _, progress, _ = finish(rotate.rotate(planned, OPTIONS))
    assert "RotateKeyOnDemand" not in calls()[made:]
    # Those that had the new material already are not written.
    assert progress.rewritten == 6
    assert calls()[made:].count("ReEncrypt") == 4
    assert sum(before[pk] == value for pk, value in passwords().items()) == 2


def test_new_material_also_brings_home_other_keys_rows(kms: Provider) -> None:
    first, *_ = make_users(2)
    old = encoding.parse(first.password).key_ref
    kms.update_alias(ALIAS, kms.create_key().key_arn)
    second, *_ = make_users(1, prefix="other")

    def change(number: int) -> None:
        if number == 3:
            damage(second, make_password("changed"))

    with after_each_call(change):
        result, progress, _ = rotated(new_material=True)
    assert result.left == {old}
    assert len(refs()) == 1
    # The changed one was looked at again, and is under the new material already.
    assert (progress.rewritten, progress.overtaken, progress.calls) == (2, 1, 4)


def test_new_material_that_spreads_slowly(
    kms: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_users(1)
    before = kms.describe_key(ALIAS)

    def late(self: Interfering, key: str) -> Any:
        return before if self.calls < 4 else self.method(key)

    slow = Interfering(monkeypatch, kms, "describe_key", late)

    def stale(self: Interfering, *args: Any, **kwargs: Any) -> Any:
        answer = self.method(*args, **kwargs)
        if self.calls == 1:
            object.__setattr__(answer, "key_material_id", before.key_material_id)
        return answer

    Interfering(monkeypatch, kms, "re_encrypt", stale)
    _, progress, _ = rotated(new_material=True)
    assert slow.calls >= 4
    assert (progress.rewritten, progress.calls) == (1, 2)


def test_new_material_that_never_comes(kms: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "MATERIAL_WAIT", 0.005)
    before = kms.describe_key(ALIAS)
    Interfering(monkeypatch, kms, "describe_key", lambda self, key: before)
    with pytest.raises(errors.RotationRefused, match="still names its former material"):
        rotated(new_material=True)


def test_new_material_where_none_is_named(
    kms: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_users(2)

    def nameless(self: Interfering, *args: Any, **kwargs: Any) -> Any:
        answer = self.method(*args, **kwargs)
        object.__setattr__(answer, "key_material_id", "")
        return answer

    Interfering(monkeypatch, kms, "describe_key", nameless)
    Interfering(monkeypatch, kms, "re_encrypt", nameless)
    assert rotated(new_material=True)[1].rewritten == 2


def test_material_of_keys_that_have_none(kms: Provider) -> None:
    key = kms.create_key(spec="HMAC_256", usage="GENERATE_VERIFY_MAC").key_arn
    with with_key(key), pytest.raises(errors.RotationRefused, match="Only symmetric"):
        plan.make(new_material=True)


def test_old_keys_are_given_up_only_when_no_row_needs_them(kms: Provider) -> None:
    users = make_users(3)
    old = encoding.parse(users[0].password)
    result, _, _ = rotated(new_key=True)
    # Even a row that nobody can read any more may be mended one day.
    damage(users[0], encoding.prefix_of("kms_argon2", "d1", old.key_ref) + "cut")
    with pytest.raises(errors.RotationRefused, match=r"1 in auth\.User\.password"):
        keys.give_up(result.left, result.target, alias=ALIAS)
    assert kms.describe_key(old.key_id).state == "Enabled"
    users[0].delete()
    done = keys.give_up(result.left, result.target, alias=ALIAS)
    assert [(key.state, key.changed) for key in done] == [("Disabled", True)]
    assert kms.describe_key(old.key_id).state == "Disabled"
    assert Key.objects.get(ref=old.key_ref).state == "Disabled"
    # A second time there is nothing to do, and the present key is never touched.
    present = encoding.key_ref(result.target.key_id)
    again = keys.give_up(result.left | {present}, result.target, alias=ALIAS)
    assert [(key.state, key.changed) for key in again] == [("Disabled", False)]
    assert kms.describe_key(ALIAS).state == "Enabled"
    deleted = keys.give_up(result.left, result.target, days=7)
    assert [(key.state, key.changed) for key in deleted] == [("PendingDeletion", True)]
    again = keys.give_up(result.left, result.target, days=7)
    assert [(key.state, key.changed) for key in again] == [("PendingDeletion", False)]


@pytest.mark.parametrize("setting", ["AUDIT_SEAL_KEY", "AUDIT_CONTEXT_KEY", "MAC_KEY"])
@pytest.mark.parametrize("days", [None, 7], ids=["disabled", "deleted"])
def test_a_key_that_another_setting_leads_to_is_not_given_up(
    setting: str, days: int | None, kms: Provider
) -> None:
    result, _, _ = rotated(new_key=True)
    (ref,) = result.left
    former = kms.describe_key(encoding.key_id(ref))
    alias = f"alias/{setting}-{days}"
    kms.create_alias(alias, former.key_arn)
    for name in (former.key_id, former.key_arn, alias):
        with (
            with_key(ALIAS, **{setting: name}),
            pytest.raises(errors.RotationRefused, match=setting),
        ):
            keys.give_up(result.left, result.target, alias=ALIAS, days=days)
        assert kms.describe_key(former.key_arn).state == "Enabled"
    with with_key(ALIAS, **{setting: "alias/nothing"}):
        (done,) = keys.give_up(result.left, result.target, alias=ALIAS, days=days)
    assert (done.arn, done.changed) == (former.key_arn, True)


def test_keys_of_other_accounts_are_not_given_up(kms: Provider) -> None:
    result, _, _ = rotated(new_key=True)
    foreign = "arn:aws:kms:local-2:000000000000:key/00000000-0000-0000-0000-000000000000"
    row = history.record_key(foreign, timezone.now())
    with pytest.raises(errors.RotationRefused, match="outside the account"):
        keys.give_up({row.ref}, result.target)
    with with_key(ALIAS, PREVIOUS_KEYS=[foreign]):
        assert keys.give_up({row.ref}, result.target) == []  # gone, as far as KMS knows


def test_the_previous_key_is_given_up_by_a_later_run(kms: Provider, key_arn: str) -> None:
    make_users(2)
    rotated(new_key=True)
    later, progress, _ = rotated()
    assert progress.rewritten == 0
    assert later.left == {encoding.key_ref(key_arn)}


# --- sealing and unsealing ----------------------------------------------------------


def stock_users(number: int) -> list[User]:
    hasher = CheapArgon2PasswordHasher()
    return User.objects.bulk_create(
        User(username=f"stock{i}", password=hasher.encode(f"pw{i}", hasher.salt()))
        for i in range(number)
    )


def test_stock_hashes_are_sealed_in_place(kms: Provider, calls: Calls) -> None:
    users = stock_users(3)
    session_hash = User.objects.get(pk=users[0].pk).get_session_auth_hash()
    made = len(calls())
    _, progress, bad = finish(seal.wrap(OPTIONS))
    assert not bad
    assert progress.rewritten == 3
    assert calls()[made:] == ["DescribeKey", "Encrypt", "Encrypt", "Encrypt"]
    user = User.objects.get(pk=users[0].pk)
    assert user.password.startswith("kms_argon2$")
    assert user.check_password("pw0")
    assert user.get_session_auth_hash() == session_hash
    row = RotationRun.objects.get()
    assert (row.kind, row.state, row.rewritten) == ("wrap", "finished", 3)
    assert row.key and row.key.rows == 3


def test_stock_hashes_that_cannot_be_sealed_are_left(kms: Provider) -> None:
    class Long(CheapArgon2PasswordHasher):
        def params(self) -> Any:
            params = super().params()
            params.hash_len = 48
            return params

    users = stock_users(4)
    damage(users[0], Long().encode("pw", "saltsaltsalt"))
    damage(users[1], "argon2$argon2id$v=19$m=8,t=1,p=1$broken")
    damage(users[2], users[2].password.replace("m=8,", "m=99999999,"))
    _, progress, bad = finish(seal.wrap(OPTIONS))
    reasons = {row.pk: row.reason for row in bad}
    assert (progress.rewritten, progress.failed) == (1, 3)
    assert "48 bytes" in reasons[users[0].pk]
    assert "next logs in" in reasons[users[1].pk]
    assert "costs are beyond" in reasons[users[2].pk]


def test_an_outage_while_sealing_stops(kms: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    stock_users(2)
    before = passwords()

    def unusable(self: Interfering, *args: Any, **kwargs: Any) -> Any:
        raise errors.KeyDisabled

    Interfering(monkeypatch, kms, "encrypt", unusable)
    with pytest.raises(errors.KeyDisabled):
        finish(seal.wrap(OPTIONS))
    assert passwords() == before


def test_sealing_is_refused_where_nobody_could_log_in(
    kms: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock, sealing = (
        "tests.hashers.CheapArgon2PasswordHasher",
        "tests.hashers.CheapKMSArgon2PasswordHasher",
    )
    with (
        override_settings(PASSWORD_HASHERS=[stock]),
        pytest.raises(errors.RotationRefused, match="lists no sealing hasher"),
    ):
        seal.check_wrap()
    with override_settings(PASSWORD_HASHERS=[stock, sealing]):
        assert "does not seal" in seal.check_wrap()[0]
    assert seal.check_wrap() == []
    monkeypatch.setattr(users, "column_width", lambda column: 128)
    with pytest.raises(errors.RotationRefused, match="128 characters"):
        finish(seal.wrap(OPTIONS))


def unsealing() -> override_settings:
    return override_settings(
        PASSWORD_HASHERS=[
            "tests.hashers.CheapArgon2PasswordHasher",
            "tests.hashers.CheapKMSArgon2PasswordHasher",
        ]
    )


def test_there_is_a_way_back(kms: Provider) -> None:
    users = stock_users(3)
    stock = passwords()
    finish(seal.wrap(OPTIONS))
    with pytest.raises(errors.RotationRefused, match="The first of PASSWORD_HASHERS seals"):
        finish(seal.unwrap(OPTIONS))
    with unsealing():
        _, progress, _ = finish(seal.unwrap(OPTIONS))
        assert User.objects.get(pk=users[1].pk).check_password("pw1")
    assert progress.rewritten == 3
    assert passwords() == stock
    assert RotationRun.objects.first().kind == "unwrap"  # type: ignore[union-attr]


def test_the_way_back_leaves_bad_rows(kms: Provider, calls: Calls) -> None:
    users = make_users(3)
    kms.update_alias(ALIAS, kms.create_key().key_arn)
    others = make_users(2, prefix="other")
    kms.disable_key(encoding.parse(users[0].password).key_id)
    damage(others[0], "kms_argon2$")
    made = len(calls())
    with unsealing():
        _, progress, bad = finish(seal.unwrap(OPTIONS))
    assert (progress.rewritten, len(bad)) == (1, 4)
    assert calls()[made:].count("Decrypt") == 2


def test_the_way_back_stops_at_an_outage(
    kms: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_users(1)

    def fail(self: Interfering, *args: Any, **kwargs: Any) -> Any:
        raise errors.KMSTimeout

    Interfering(monkeypatch, kms, "decrypt", fail)
    with unsealing(), pytest.raises(errors.KMSTimeout):
        finish(seal.unwrap(OPTIONS))
    assert RotationRun.objects.get().state == "failed"


# --- progress -----------------------------------------------------------------------


def test_progress_tells_rate_and_time_left() -> None:
    progress = Progress(sweep=1, looked=50, total=200, calls=50, seconds=10)
    assert progress.rate == 5
    assert progress.seconds_left == 30
    assert Progress().rate == 0
    assert Progress(sweep=2, looked=1, seconds=1).seconds_left is None
    assert Progress(sweep=1).seconds_left is None


# --- how things stand ---------------------------------------------------------------


def test_all_is_well(kms: Provider, calls: Calls, key_arn: str) -> None:
    make_users(2)
    rotated()
    made = len(calls())
    found = status.look()
    assert found.problems == found.notes == []
    assert found.permissions == dict.fromkeys(("Encrypt", "Decrypt", "ReEncrypt"), "allowed")
    assert [(each.arn, each.rows) for each in found.keys] == [(key_arn, 2)]
    assert found.moves[0][0] == key_arn
    assert found.last and found.last.state == "finished"
    assert calls()[made:].count("Encrypt") <= 2
    assert status.look(permissions=False).permissions == {}


def test_all_is_well_without_an_alias(kms: Provider, key_arn: str) -> None:
    with with_key(key_arn):
        found = status.look()
    assert (found.problems, found.alias, found.moves) == ([], "", [])


def problems(**options: Any) -> str:
    return "\n".join(status.look(**options).problems)


def test_the_key_is_missing_or_unusable(kms: Provider, key_arn: str) -> None:
    with with_key("alias/nowhere"):
        assert "does not exist" in problems()
    make_users(1)
    kms.disable_key(key_arn)
    assert "is Disabled" in problems()
    kms.schedule_key_deletion(key_arn, 7)
    assert "is PendingDeletion" in problems()


@pytest.mark.parametrize("denied", ["encrypt", "decrypt", "re_encrypt"])
def test_permissions_are_tried(
    kms: Provider, monkeypatch: pytest.MonkeyPatch, denied: str
) -> None:
    def deny(self: Interfering, *args: Any, **kwargs: Any) -> Any:
        raise errors.KMSAccessDenied

    Interfering(monkeypatch, kms, denied, deny)
    found = status.look()
    assert "denied" in found.permissions.values()
    assert len(found.problems) == 1
    if denied == "encrypt":
        assert found.permissions["Decrypt"] == "not checked"


def test_permissions_where_dry_run_is_ignored(
    kms: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    def do_it(self: Interfering, *args: Any, **kwargs: Any) -> Any:
        return self.method(*args, **{**kwargs, "dry_run": False})

    for name in ("encrypt", "decrypt", "re_encrypt"):
        Interfering(monkeypatch, kms, name, do_it)
    assert set(status.look().permissions.values()) == {"allowed"}


def test_permissions_that_cannot_be_tried(
    kms: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Interfering, *args: Any, **kwargs: Any) -> Any:
        raise errors.KMSTimeout

    Interfering(monkeypatch, kms, "decrypt", fail)
    found = status.look()
    assert found.permissions["Decrypt"] == "not checked"
    assert "cannot be told" in found.problems[0]


def test_columns_that_are_too_narrow_or_missing(
    kms: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(users, "column_width", lambda column: 128)
    assert "128 characters" in problems()

    def missing(column: Column) -> None:
        raise users.FieldDoesNotExist

    monkeypatch.setattr(users, "column_width", missing)
    assert "has no column" in problems()


def test_rows_that_want_something_else(kms: Provider, key_arn: str) -> None:
    made = make_users(8)
    ref = encoding.key_ref(key_arn)
    foreign = "arn:aws:kms:local-2:000000000000:key/00000000-0000-0000-0000-00000000000"
    history.record_key(f"{foreign}1", timezone.now())
    damage(made[0], f"kms_argon2$d1${encoding.key_ref(f'{foreign}1')}$rest")
    damage(made[1], f"kms_argon2$d1${encoding.key_ref(f'{foreign}2')}$rest")
    damage(made[2], "kms_argon2$d1$nonsense$rest")
    damage(made[3], f"kms_argon2$z9${ref}$rest")
    damage(made[4], f"kms_other$d1${ref}$rest")
    damage(made[5], "pbkdf2_sha256$1$salt$hash")
    damage(made[6], "!unusable")
    other = kms.create_key().key_arn
    damage(made[7], f"kms_argon2$d1${encoding.key_ref(other)}$rest")
    found = status.look()
    text = "\n".join(found.problems)
    assert f"{foreign}1, which the settings do not lead to: put this ARN" in text
    assert "00000002, which does not exist in this account" in text
    assert "1 sealed passwords name no readable key" in text
    assert "mode 'z9'" in text
    assert "hasher 'kms_other'" in text
    assert len(found.problems) == 5
    assert "1 passwords are not sealed" in found.notes[0]
    assert "3 passwords are under another key" in found.notes[1]
    kms.disable_key(other)
    assert "1 passwords need the key" in problems()


def test_a_key_that_cannot_be_described(
    kms: Provider, monkeypatch: pytest.MonkeyPatch, key_arn: str
) -> None:
    make_users(1)
    kms.update_alias(ALIAS, kms.create_key().key_arn)

    def deny(self: Interfering, key: str) -> Any:
        if key == ALIAS:
            return self.method(key)
        raise errors.KMSAccessDenied

    with monkeypatch.context() as patch:
        Interfering(patch, kms, "describe_key", deny)
        assert "cannot be described" in problems()
        assert status.look().keys[0].state == "unknown"


def test_the_last_run(kms: Provider) -> None:
    now = timezone.now()
    row = RotationRun.objects.create(
        kind="rewrap", started_at=now, updated_at=now, state="failed", error="KMS was away"
    )
    assert "is failed (KMS was away). Run it again" in problems()
    RotationRun.objects.update(state="running", error="")
    assert problems() == ""
    RotationRun.objects.update(updated_at=now - datetime.timedelta(hours=1))
    assert "is interrupted. Run it again" in problems()
    row.delete()
    assert status.look().last is None


def test_what_has_not_begun_can_be_dropped() -> None:
    began: list[int] = []

    async def task() -> str:
        began.append(1)
        await asyncio.sleep(0.05)
        return "done"

    with workers.Workers(1) as pool:
        found = pool.map(iter([[(number, task) for number in range(50)]]))
        outcomes = next(found)
        pool.drop()
        for more in found:
            outcomes += more
    dropped = [outcome for outcome in outcomes if outcome.value is workers.DROPPED]
    assert len(outcomes) == 50
    assert len(began) + len(dropped) == 50
    assert dropped


def test_a_provider_leaves_the_loop_of_a_run(
    kms: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connections belong to the loop, which ends with the run."""
    left: list[asyncio.AbstractEventLoop] = []

    async def aclose() -> None:
        left.append(asyncio.get_running_loop())

    monkeypatch.setattr(kms, "aclose", aclose, raising=False)
    with workers.Workers(1) as pool:
        assert len(list(outcomes(pool, [nothing] * 3))) == 3
        assert left == []
    assert len(left) == 1
