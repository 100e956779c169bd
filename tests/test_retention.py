"""Pruning: what is old goes, by bounded batches, and nothing else does."""

from __future__ import annotations

import contextlib
import datetime
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from io import StringIO
from typing import Any

import pytest
from django.core.management import call_command
from django.core.management.base import CommandError
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from kms_hasher.audit import anchors, retention, rollups, seals, segments, store, verification
from kms_hasher.exceptions import KMSTimeout, SealRefused
from kms_hasher.models import AppendOnly, AuditEvent, AuditHour, AuditSeal
from kms_hasher.providers.base import Provider
from tests.test_audit import event, subs

DAY = datetime.timedelta(days=1)

pytestmark = pytest.mark.django_db

durable = pytest.mark.django_db(transaction=True)
server_only = pytest.mark.skipif(
    connection.vendor == "sqlite", reason="SQLite has one writer at a time"
)


def write(days: float, number: int = 1) -> None:
    then = timezone.now() - days * DAY
    store.write([event(time=then, sub=f"{days:g} days") for _ in range(number)])


def prune(*args: str) -> tuple[str, str]:
    out, err = StringIO(), StringIO()
    call_command("prune_kms_audit", *args, stdout=out, stderr=err)
    return out.getvalue(), err.getvalue()


@pytest.mark.parametrize(("batch", "batches"), [(1, 7), (3, 3), (7, 1), (100, 1)])
def test_what_is_older_goes_by_batches_and_the_rest_stays(batch: int, batches: int) -> None:
    write(10)
    write(5, number=5)  # of one microsecond
    write(4)
    write(1, number=2)
    deleted = list(retention.prune(retention.prunable(timezone.now() - 2 * DAY), batch))
    assert (sum(deleted), len(deleted)) == (7, batches)
    assert max(deleted) <= batch
    assert subs() == ["1 days", "1 days"]


def test_no_statement_deletes_more_than_a_batch_or_names_each_event() -> None:
    write(5, number=7)
    what = retention.prunable(timezone.now())
    with CaptureQueriesContext(connection) as captured:
        list(retention.prune(what, 3))
    assert max(len(query["sql"]) for query in captured.captured_queries) < 800
    assert not AuditEvent.objects.exists()


def test_rollups_stay() -> None:
    write(500, number=3)
    before = rollups.totals(timezone.now() - 501 * DAY)
    out, err = prune("--older-than", "400d")
    assert "Deleted 3 events" in out
    assert "3 of 3 events deleted" in err
    assert not AuditEvent.objects.exists()
    assert rollups.totals(timezone.now() - 501 * DAY) == before


def test_a_dry_run_says_how_many_and_deletes_none() -> None:
    write(500, number=3)
    write(1)
    out, err = prune("--older-than", "400", "--dry-run")
    assert (out.startswith("Would delete 3 events"), err) == (True, "")
    assert AuditEvent.objects.count() == 4


def test_json() -> None:
    write(500, number=3)
    found = json.loads(prune("--older-than", "400d", "--json", "--batch-size", "2")[0])
    assert found.pop("before")
    assert found.pop("merged") in (0, 1)  # whichever slot this process writes to
    assert found == {
        "dry_run": False,
        "events": 3,
        "kept_unsealed": 0,
        "up_to_seal": None,
    }


def test_rollups_of_many_writers_are_merged() -> None:
    write(500)
    group = AuditHour.objects.values_list(*store.GROUP[:-1]).get()
    store.add({(*group, slot): 2 for slot in (11, 12)}, "default")
    assert "rows of figures into others" in prune("--older-than", "400d")[0]
    assert AuditHour.objects.get().count == 5


@pytest.fixture
def sealed(monkeypatch: pytest.MonkeyPatch, kms: Provider) -> None:
    """Two segments, of five and of two events, made 450 and 10 days ago; and three events."""
    for days, number in ((500, 5), (12, 2)):
        write(days, number=number)
        at = timezone.now() - (days - 2 if days < 100 else 450) * DAY
        with monkeypatch.context() as patch:
            patch.setattr(seals.timezone, "now", lambda at=at: at)
            list(seals.seal(settle=0))
    write(480, number=3)  # with an old time, and not sealed


def problems() -> list[str]:
    """What verification finds, but for sealing that is overdue in all of these tests."""
    steps = verification.verify()
    try:
        while True:
            next(steps)
    except StopIteration as stop:
        report: verification.Report = stop.value
    assert report.unasked is None
    return [each.text for each in report.findings if each.kind != verification.OVERDUE]


@pytest.mark.usefixtures("sealed")
def test_whole_segments_go_and_what_is_left_can_be_verified() -> None:
    assert problems() == []
    before = AuditEvent.objects.count()
    with pytest.raises(CommandError, match="Kept 3 events"):
        prune("--older-than", "400d", "--dry-run")
    assert AuditEvent.objects.count() == before
    with pytest.raises(CommandError, match="Kept 3 events"):
        prune("--older-than", "400d", "--batch-size", "2")
    assert subs().count("500 days") == 0
    assert subs().count("480 days") == 3
    assert subs().count("12 days") == 2
    assert problems() == []
    AuditEvent.objects.filter(sub="12 days").first()  # is there
    AppendOnly(AuditEvent).filter(sub="12 days")._prune()
    assert problems()


@pytest.mark.usefixtures("sealed")
def test_by_force_what_no_seal_covers_goes_as_well() -> None:
    prune("--older-than", "400d", "--force")
    assert subs().count("480 days") == 0
    assert subs().count("12 days") == 2
    assert problems() == []
    prune("--older-than", "400d")  # none is kept, so there is nothing to say


@pytest.mark.usefixtures("sealed")
def test_a_pruning_that_was_killed_is_ended_by_the_next() -> None:
    what = retention.prunable(timezone.now() - 400 * DAY)
    assert next(retention.prune(what, 2)) == 2
    assert problems() == []
    with pytest.raises(CommandError, match="Kept 3 events"):
        prune("--older-than", "400d")
    assert subs().count("500 days") == 0
    assert problems() == []


@pytest.mark.usefixtures("sealed")
def test_young_events_do_not_go_by_a_seal_dated_back_for_a_moment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever owns the database dates a seal back, and puts it right while prune counts."""
    second = AuditSeal.objects.filter(sequence=2)
    true = second.values_list("sealed_at", flat=True).get()
    second.update(sealed_at=true - 500 * DAY)
    number = retention.Prunable.number.fget  # type: ignore[attr-defined]

    def slow(what: retention.Prunable) -> int:
        found: int = number(what)
        second.update(sealed_at=true)
        return found

    monkeypatch.setattr(retention.Prunable, "number", property(slow))
    prune("--older-than", "400d", "--force")
    (problem,) = problems()
    assert "said to be pruned up to segment 2" in problem
    with pytest.raises(SealRefused, match="said to be pruned"):
        list(seals.seal(settle=0))


@pytest.mark.usefixtures("sealed")
def test_a_seal_that_is_not_old_enough_is_not_pruned() -> None:
    cutoff = timezone.now() - 400 * DAY
    young = AuditSeal.objects.get(sequence=2)
    what = retention.prunable(cutoff)._replace(seal=young)
    with pytest.raises(SealRefused, match="Seal 2 is not older than"):
        list(retention.prune(what))
    assert subs().count("12 days") == 2
    assert problems() == []


# --- beside a sealer ----------------------------------------------------------------


def loose(force: bool, batch: int = 2) -> Iterator[int]:
    """Store events with an old time and prune them as they are: with `force` or no seal."""
    if force:
        write(12)
        seal()
    write(500, number=7)
    return retention.prune(retention.prunable(timezone.now() - 400 * DAY, force=force), batch)


def seal() -> None:
    list(seals.seal(settle=0))


def in_thread(function: Callable[[], Any]) -> Future[Any]:
    """Start it on a connection of its own."""

    def run() -> Any:
        try:
            return function()
        finally:
            connection.close()

    pool = ThreadPoolExecutor(1)
    future = pool.submit(run)
    pool.shutdown(wait=False)
    return future


@pytest.mark.parametrize("force", [False, True])
def test_what_is_sealed_while_prune_runs_stays(force: bool, kms: Provider) -> None:
    steps = loose(force)
    assert next(steps) == 2
    seal()
    left = AuditEvent.objects.filter(sub="500 days").count()
    write(500)  # by a clock of the past, and not sealed
    assert list(steps) == [1]
    assert AuditEvent.objects.filter(sub="500 days").count() == left == 5
    assert problems() == []


@pytest.mark.parametrize("force", [False, True])
def test_what_is_sealed_as_a_batch_begins_stays(
    force: bool, kms: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, newest = loose(force), segments.newest

    def slow() -> AuditSeal | None:
        monkeypatch.setattr(segments, "newest", newest)
        found = newest()
        seal()
        return found

    monkeypatch.setattr(segments, "newest", slow)
    assert list(steps) == []
    assert subs().count("500 days") == 7
    assert problems() == []


@durable
@pytest.mark.parametrize("force", [False, True])
def test_what_is_pruned_while_it_is_sealed_is_in_no_seal(
    force: bool, kms: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sealer has read the events, and is asking KMS."""
    steps, of_seal = loose(force), anchors.of_seal
    pruning: list[Future[Any]] = []

    def slow(made: AuditSeal) -> dict[str, str]:
        monkeypatch.setattr(anchors, "of_seal", of_seal)
        anchored = of_seal(made)
        if connection.vendor == "sqlite":  # its database in memory has one connection
            pruning.append(Future())
            pruning[0].set_result(sum(steps))
        else:
            pruning.append(in_thread(lambda: sum(steps)))
            wait(pruning, timeout=1 if force else 30)  # with `force` it waits for the sealer
        return anchored

    monkeypatch.setattr(anchors, "of_seal", slow)
    if connection.vendor != "sqlite" and force:  # prune waits
        seal()
        assert pruning[0].result(30) == 0
    else:
        with pytest.raises(SealRefused, match="pruned meanwhile"):
            seal()
        assert pruning[0].result(30) == 7
        assert AuditSeal.objects.count() == force
        seal()
    assert problems() == []


@durable
@server_only
@pytest.mark.parametrize("force", [False, True])
def test_a_sealer_waits_for_a_batch_that_is_not_committed(
    force: bool, kms: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, prune_ = loose(force, batch=100), AppendOnly._prune
    deleted, sealing = threading.Event(), threading.Event()

    def slow(events: AppendOnly) -> int:
        number = prune_(events)
        deleted.set()
        sealing.wait(1)  # the sealer has come to where it waits by then
        return number

    monkeypatch.setattr(AppendOnly, "_prune", slow)
    pruning = in_thread(lambda: sum(steps))
    assert deleted.wait(10)
    with contextlib.suppress(SealRefused):
        seal()
    assert pruning.result(30) == 7
    seal()
    assert problems() == []


@durable
@server_only
@pytest.mark.parametrize("force", [False, True])
def test_a_batch_waits_for_a_seal_that_is_not_committed(
    force: bool, kms: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, save = loose(force, batch=100), AuditSeal.save
    pruning: list[Future[Any]] = []

    def slow(made: AuditSeal, **options: Any) -> None:
        save(made, **options)
        monkeypatch.setattr(AuditSeal, "save", save)
        pruning.append(in_thread(lambda: sum(steps)))
        wait(pruning, timeout=0.5)  # it has come to where it waits by then

    monkeypatch.setattr(AuditSeal, "save", slow)
    seal()
    assert pruning[0].result(30) == 0
    assert problems() == []


@pytest.mark.usefixtures("sealed")
def test_nothing_is_deleted_where_kms_cannot_record_it(
    kms: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out(*args: Any, **kwargs: Any) -> None:
        raise KMSTimeout

    before = AuditEvent.objects.count()
    monkeypatch.setattr(kms, "encrypt", out)
    with pytest.raises(CommandError, match="did not answer in time"):
        prune("--older-than", "400d")
    assert AuditEvent.objects.exclude(outcome="unavailable").count() == before


@pytest.mark.parametrize(
    "args",
    [
        ["--older-than", "0"],
        ["--older-than", "-3d"],
        ["--older-than", "4w"],
        ["--older-than", "400d", "--batch-size", "0"],
        [],
    ],
)
def test_nonsense_deletes_nothing(args: list[str]) -> None:
    write(500)
    with pytest.raises(CommandError):
        prune(*args)
    assert AuditEvent.objects.count() == 1


def test_the_audit_is_append_only_for_all_others() -> None:
    write(500)
    for refused in (
        AuditEvent.objects.all().delete,
        AuditEvent.objects.filter(purpose="login").delete,
        AuditEvent.objects.get().delete,
        AuditEvent.objects.get().save,
    ):
        with pytest.raises(TypeError, match="append-only"):
            refused()


def test_roll_up_counts_what_was_not() -> None:
    write(3, number=2)
    AuditHour.objects.all().delete()
    out, err = StringIO(), StringIO()
    call_command("roll_up_kms_audit", stdout=out, stderr=err)
    assert "Counted 2 events of 1 hours." in out.getvalue()
    assert "2 events" in err.getvalue()
    assert rollups.totals(timezone.now() - 4 * DAY).count == 2
