"""Roll-ups: they agree with the events, add up, and are read without them."""

from __future__ import annotations

import datetime
import random
from collections import Counter
from typing import Any

import pytest
from django.db import connection, transaction
from django.db.models import Count, Sum
from django.utils import timezone

from kms_hasher import encoding, signals
from kms_hasher.audit import retention, rollups, store
from kms_hasher.models import AuditEvent, AuditHour
from tests.test_audit import ARN, ARN_2, event

NOON = datetime.datetime(2026, 11, 21, 12, tzinfo=datetime.timezone.utc)
HOUR, DAY = datetime.timedelta(hours=1), datetime.timedelta(days=1)
REF, REF_2 = encoding.key_ref(ARN), encoding.key_ref(ARN_2)

pytestmark = pytest.mark.django_db


def write(*at: datetime.datetime, number: int = 1, **changes: Any) -> None:
    store.write([event(time=time, **changes) for time in at for _ in range(number)])


# --- what is written ------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 50])
def test_they_agree_with_the_events_whatever_those_are(size: int) -> None:
    chance = random.Random(size)
    for _ in range(200 // size):
        store.write(
            [
                event(
                    time=NOON + HOUR * chance.random() * 5,
                    key=chance.choice([ARN, ARN_2, "alias/a", ""]),
                    operation=chance.choice(["Decrypt", "Encrypt"]),
                    purpose=chance.choice(signals.PURPOSES),
                    outcome=chance.choice(signals.OUTCOMES),
                    latency=chance.lognormvariate(-4, 1),
                )
                for _ in range(size)
            ]
        )
    names = ("key_ref", "operation", "purpose", "outcome")
    events = AuditEvent.objects.order_by().values_list(*names).annotate(n=Count("pk"))
    hours = AuditHour.objects.order_by().values_list(*names).annotate(n=Sum("count"))
    assert Counter(events) == Counter(hours)
    latencies = AuditEvent.objects.values_list("latency_us", flat=True)
    expected = Counter(rollups.bucket_of("Decrypt", us) for us in latencies)
    assert rollups.totals(NOON, NOON + DAY).histogram == expected


def test_a_rollback_takes_both_where_the_audit_is_inline() -> None:
    with transaction.atomic():
        signals.emit(event())
        assert (AuditEvent.objects.count(), AuditHour.objects.count()) == (1, 1)
        transaction.set_rollback(True)
    assert (AuditEvent.objects.count(), AuditHour.objects.count()) == (0, 0)


def test_processes_share_few_rows_of_an_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    for slot in (*range(store.SLOTS), 0, 1):
        monkeypatch.setattr(store, "_slot", slot)
        write(NOON)
    # SQLite has one writer at a time anyhow.
    expected = 1 if connection.vendor == "sqlite" else store.SLOTS
    assert AuditHour.objects.count() == expected
    assert rollups.totals(NOON, NOON + HOUR).count == store.SLOTS + 2


# --- what is read ---------------------------------------------------------------------


def test_totals_and_filters() -> None:
    write(NOON, number=3)
    write(NOON + HOUR, key=ARN_2, outcome=signals.DENIED, purpose="set", operation="Encrypt")
    write(NOON + 2 * HOUR)
    figures = rollups.totals(NOON, NOON + 2 * HOUR)
    assert (figures.count, figures.failures) == (4, 1)
    for filters in (
        {"key_ref": REF_2},
        {"outcome": "denied"},
        {"purpose": "set"},
        {"operation": "Encrypt"},
    ):
        assert rollups.totals(NOON, NOON + DAY, **filters).count == 1
    assert rollups.totals(NOON, NOON + DAY, key_ref=REF, outcome="denied").count == 0
    # Hours are not told apart, and those of the future are none of "until now".
    assert rollups.totals(NOON + HOUR / 2, NOON + HOUR / 2).count == 3
    assert rollups.totals(NOON + HOUR).count == 2


def test_grouped_begins_with_the_most_frequent() -> None:
    write(NOON, number=2, key=ARN_2)
    write(NOON, number=3)
    write(NOON, key="", outcome=signals.UNAVAILABLE)
    found = rollups.grouped("key_ref", NOON)
    assert [(ref, figures.count) for ref, figures in found.items()] == [
        (REF, 3),
        (REF_2, 2),
        ("", 1),
    ]
    assert found[""].failures == 1
    for by in rollups.GROUPS:
        assert sum(each.count for each in rollups.grouped(by, NOON).values()) == 6


def test_series_have_no_gaps() -> None:
    write(NOON, NOON + HOUR * 2.5)
    hours = rollups.series(NOON + HOUR / 3, NOON + 3 * HOUR)
    assert {hour: figures.count for hour, figures in hours.items()} == {
        NOON: 1,
        NOON + HOUR: 0,
        NOON + 2 * HOUR: 1,
    }
    by_outcome = rollups.series_by("outcome", NOON, NOON + 2 * HOUR, latency=False)
    assert by_outcome == {
        NOON: {"success": rollups.Figures(1, 0, {})},
        NOON + HOUR: {},
    }


@pytest.mark.parametrize("zone", ["UTC", "Asia/Kolkata", "America/New_York"])
def test_days_are_those_of_the_time_zone(zone: str) -> None:
    # Including the day on which summer time ends in New York, of 25 hours.
    start = datetime.datetime(2026, 10, 30, 1, 30, tzinfo=datetime.timezone.utc)
    times = [start + number * HOUR for number in range(24 * 5)]
    write(*times)
    with timezone.override(zone):
        days = rollups.series(times[0], times[-1] + HOUR / 2, step=rollups.DAY)
        local = Counter(timezone.localtime(rollups.hour_of(time)).date() for time in times)
        assert {day.date(): figures.count for day, figures in days.items()} == local
        assert all(timezone.localtime(day).hour == 0 for day in days)


def test_naive_times(settings: Any) -> None:
    settings.USE_TZ = False
    noon = datetime.datetime(2026, 11, 21, 12, 34)
    write(noon)
    assert rollups.series(noon, noon)[noon.replace(minute=0)].count == 1
    assert (
        rollups.series(noon, noon, step=rollups.DAY)[noon.replace(hour=0, minute=0)].count == 1
    )
    assert rollups.totals(noon).count == 1


@pytest.mark.parametrize(
    "call", [lambda: rollups.grouped("sub", NOON), lambda: rollups.totals(NOON, pk="1")]
)
def test_what_is_not_counted_apart_cannot_be_asked_for(call: Any) -> None:
    with pytest.raises(ValueError, match="not one of key_ref"):
        call()


def test_each_is_one_query_that_reads_no_event(django_assert_num_queries: Any) -> None:
    write(NOON)
    for call in (
        lambda: rollups.totals(NOON),
        lambda: rollups.grouped("outcome", NOON),
        lambda: rollups.series(NOON, NOON + DAY),
        lambda: rollups.series_by("outcome", NOON, NOON + DAY, step=rollups.DAY),
    ):
        with django_assert_num_queries(1) as captured:
            call()
        assert AuditEvent._meta.db_table not in captured.captured_queries[0]["sql"]


# --- latencies ------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_quantiles_are_within_the_error_that_is_promised(seed: int) -> None:
    chance = random.Random(seed)
    latencies = [min(60, chance.lognormvariate(-4, seed / 2)) for _ in range(5000)]
    store.write([event(time=NOON, latency=latency) for latency in latencies])
    figures = rollups.totals(NOON, NOON + HOUR)
    latencies.sort()
    for share, found in ((0.5, figures.p50), (0.95, figures.p95), (0.99, figures.p99)):
        true = latencies[int(share * 5000) - 1]
        assert found == pytest.approx(true, rel=0.092)


def test_the_ends_of_a_bucket_are_equally_far_from_its_middle() -> None:
    for bucket in range(120):
        low, high = (2 ** (end / rollups.RESOLUTION) for end in (bucket, bucket + 1))
        middle = rollups.middle(bucket) * 1_000_000
        assert middle / low == pytest.approx(high / middle)
        assert middle / low - 1 < 0.091


def test_what_is_no_call_is_counted_and_has_no_latency() -> None:
    write(NOON, operation=signals.PARSE, outcome=signals.INVALID, latency=0.0)
    write(NOON, operation=signals.CIRCUIT_BREAKER, latency=0.0)
    figures = rollups.totals(NOON, NOON + HOUR)
    assert (figures.count, figures.failures) == (2, 1)
    assert figures.p50 is figures.p99 is None
    write(NOON, latency=0.01)
    assert rollups.totals(NOON, NOON + HOUR).p50 == pytest.approx(0.01, rel=0.092)
    assert rollups.totals(NOON, NOON + HOUR, latency=False).p50 is None


# --- few and true ---------------------------------------------------------------------


def spread(monkeypatch: pytest.MonkeyPatch) -> None:
    for row, slot in enumerate((0, 3, 5, 3)):
        hours = Counter({(NOON, REF, "Decrypt", "login", "success", row // 3, slot): row + 1})
        store.add(hours, "default")


def test_merging_leaves_one_row_and_the_same_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    spread(monkeypatch)
    before = rollups.totals(NOON, NOON + HOUR)
    assert retention.merge(NOON + 2 * HOUR - HOUR / 60) == 0  # it may still be written to
    assert retention.merge(NOON + 2 * HOUR) == 3
    assert rollups.totals(NOON, NOON + HOUR) == before
    assert sorted(AuditHour.objects.values_list("slot", "bucket", "count")) == [
        (0, 0, 6),
        (0, 1, 4),
    ]
    assert retention.merge(NOON + 2 * HOUR) == 0
    write(NOON)  # a late one
    assert rollups.totals(NOON, NOON + HOUR).count == before.count + 1


def test_a_row_that_comes_in_while_others_are_merged_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spread(monkeypatch)
    before = rollups.totals(NOON, NOON + HOUR).count
    late: list[str] = []

    def write_late(execute: Any, sql: str, *args: Any) -> Any:
        if sql.startswith("DELETE") and not late:
            late.append(sql)
            row = (NOON, REF, "Decrypt", "login", "success", 0, 9)
            store.add({row: 1}, "default")
        return execute(sql, *args)

    with connection.execute_wrapper(write_late):
        retention.merge(NOON + 2 * HOUR)
    assert late and rollups.totals(NOON, NOON + HOUR).count == before + 1
    retention.merge(NOON + 2 * HOUR)
    assert rollups.totals(NOON, NOON + HOUR).count == before + 1


def test_events_from_before_there_were_rollups_are_counted_once() -> None:
    write(NOON, NOON, NOON + HOUR, NOON + 3 * HOUR, latency=0.02)
    expected = rollups.series_by("key_ref", NOON, NOON + 4 * HOUR)
    AuditHour.objects.filter(hour__lt=NOON + 3 * HOUR).delete()
    assert list(retention.rebuild(NOON + DAY)) == [(NOON, 2), (NOON + HOUR, 1)]
    assert rollups.series_by("key_ref", NOON, NOON + 4 * HOUR) == expected
    assert list(retention.rebuild(NOON + DAY)) == []


def test_an_hour_that_is_not_over_is_not_counted_again() -> None:
    write(NOON)
    AuditHour.objects.all().delete()
    assert list(retention.rebuild(NOON + HOUR)) == []


def test_an_hour_whose_events_are_pruned_is_left_as_it_is() -> None:
    write(NOON, NOON + HOUR / 2)
    list(retention.prune(retention.prunable(NOON + HOUR / 4)))
    assert list(retention.rebuild(NOON + DAY)) == []
    assert rollups.totals(NOON, NOON + HOUR).count == 2


def test_without_events_there_is_nothing_to_count() -> None:
    assert list(retention.rebuild()) == []
