"""What a re-wrap takes: exact figures, and sizes as the database at hand gives them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.db import connection

from kms_hasher import columns
from kms_hasher.columns import Column
from kms_hasher.exceptions import KeyNotFound
from kms_hasher.providers.base import Provider
from kms_hasher.rotation import estimate as module
from kms_hasher.rotation.estimate import Estimate, disk, estimate, measured_latency, quota_of
from kms_hasher.rotation.workers import BATCH


def test_a_run_that_the_processor_bounds() -> None:
    # 32 / (0.010 + 0.001) = 2,909 calls a second could be in flight.
    found = estimate(1_000_050, latency=0.010, concurrency=32, per_process=1000)
    assert found == Estimate(
        rows=1_000_050,
        calls=1_000_050,
        requests=1_000_050,
        rate=1000.0,
        bound="cpu",
        quota=10_000,
        share=0.1,
        money=pytest.approx(3.00015),
        seconds=1000.05,
        statements=10_001,
        rows_locked=100,
    )


@pytest.mark.parametrize(
    ("options", "rate", "bound", "share"),
    [
        # 8 in flight, each for 39 ms and 1 ms of the processor's.
        ({"latency": 0.039, "concurrency": 8}, 200, "latency", 0.02),
        ({"latency": 0.039, "concurrency": 8, "processes": 5}, 1000, "latency", 0.1),
        ({"latency": 0, "concurrency": 1, "processes": 4}, 4000, "cpu", 0.4),
        ({"latency": 0, "concurrency": 9, "rate": 50}, 50, "rate", 0.005),
        ({"latency": 0, "concurrency": 9, "rate": 5000}, 1000, "cpu", 0.1),
        ({"latency": 0, "concurrency": 9, "processes": 30}, 10_000, "quota", 1),
        (
            {"latency": 0, "concurrency": 9, "processes": 30, "quota": 20_000},
            20_000,
            "quota",
            1,
        ),
        (
            {"latency": 0, "concurrency": 9, "processes": 30, "requests_per_call": 2},
            5000,
            "quota",
            1,
        ),
        ({"latency": 0, "concurrency": 9, "requests_per_call": 2}, 1000, "cpu", 0.2),
    ],
)
def test_the_lowest_bound_is_the_rate(
    options: Any, rate: float, bound: str, share: float
) -> None:
    found = estimate(6000, per_process=1000, **options)
    assert found.rate == pytest.approx(rate)
    assert found.bound == bound
    assert found.share == pytest.approx(share)
    assert found.seconds == pytest.approx(6000 / rate)


def test_one_hundred_million_users_cost_300_dollars() -> None:
    found = estimate(100_000_000, latency=0.010, concurrency=64, processes=10, rate=5000)
    assert (found.money, found.seconds, found.share) == (300, 20_000, 0.5)
    twice = estimate(100_000_000, latency=0.010, concurrency=64, requests_per_call=2)
    assert (twice.calls, twice.requests, twice.money) == (100_000_000, 200_000_000, 600)


def test_nothing_to_do_takes_nothing() -> None:
    found = estimate(0, latency=0.010, concurrency=32)
    assert (found.money, found.seconds, found.statements, found.rows_locked) == (0, 0, 0, 0)


def test_a_few_rows_are_one_statement() -> None:
    found = estimate(7, latency=0.010, concurrency=32)
    assert (found.statements, found.rows_locked) == (1, 7)


def test_a_statement_is_what_the_workers_hand_over() -> None:
    assert module.ROWS_PER_STATEMENT == BATCH


@pytest.mark.parametrize(
    "wrong",
    [
        {"rows": -1},
        {"latency": -0.001},
        {"rate": 0.0},
        {"rate": -1.0},
        {"concurrency": 0},
        {"processes": 0},
        {"quota": 0},
        {"requests_per_call": 0},
        {"per_process": 0.0},
    ],
)
def test_what_cannot_be_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="more"):
        estimate(**{"rows": 1, "latency": 0.01, "concurrency": 1, **wrong})


@pytest.mark.parametrize(
    ("region", "quota"),
    [
        ("us-east-1", 100_000),
        ("eu-west-1", 100_000),
        ("eu-central-1", 20_000),
        ("eu-west-2", 20_000),
        ("eu-north-1", 10_000),
        ("", 10_000),
    ],
)
def test_the_quota_of_a_region(region: str, quota: int) -> None:
    assert quota_of(region) == quota


# --- latency ------------------------------------------------------------------------


@pytest.mark.django_db
class TestLatency:
    def test_the_median_without_the_first_call(
        self, kms: Provider, calls: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Clock:
            # Two looks at it for each of the calls that count: 4, 1, 3, 9 and 2 seconds.
            looks = iter([0, 4, 10, 11, 20, 23, 30, 39, 40, 42])

            def perf_counter(self) -> float:
                return next(self.looks)

        monkeypatch.setattr(module, "time", Clock())
        assert measured_latency() == 3
        assert calls() == ["DescribeKey"] * 6

    def test_of_another_key(self, kms: Provider, events: list[Any]) -> None:
        arn = kms.create_key().key_arn
        started = time.perf_counter()
        assert 0 < measured_latency(arn, calls=1) < time.perf_counter() - started
        assert [event.key for event in events] == [arn, arn]

    def test_a_key_that_is_not_there(self, kms: Provider) -> None:
        with pytest.raises(KeyNotFound):
            measured_latency("alias/nobody")


# --- disk ---------------------------------------------------------------------------


def column() -> Column:
    (found,) = columns.columns()
    return found


def answer(monkeypatch: pytest.MonkeyPatch, question: str) -> None:
    """Let this be what the database at hand is asked."""
    monkeypatch.setattr(module, "_SIZES", {connection.vendor: question})


@pytest.mark.django_db
class TestDisk:
    @pytest.mark.parametrize(
        ("size", "total", "rows", "bytes_"),
        [
            ("8192", "100", 50, 4096),
            ("8192", "100", 100, 8192),
            ("8192", "100", 101, 8192),  # more than the database believes there are
            ("10", "3", 1, 4),
            ("8192", "100", 0, 0),
            ("8192", "-1", 50, 8192),  # PostgreSQL's "never looked"
            ("8192", "0", 50, 8192),
            ("8192", "NULL", 50, 8192),
            ("0", "100", 50, None),
            ("NULL", "NULL", 50, None),
        ],
    )
    def test_a_part_of_the_table(
        self,
        size: str,
        total: str,
        rows: int,
        bytes_: int | None,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        answer(monkeypatch, f"SELECT {size}, {total} WHERE %s <> ''")
        assert disk(column(), rows) == bytes_

    def test_no_such_table(self, monkeypatch: pytest.MonkeyPatch) -> None:
        answer(monkeypatch, "SELECT 8192, 100 WHERE %s = 'nothing'")
        assert disk(column(), 50) is None

    def test_a_database_that_refuses(self, monkeypatch: pytest.MonkeyPatch) -> None:
        answer(monkeypatch, "SELECT size FROM nowhere WHERE name = %s")
        User.objects.create(username="anna")
        assert disk(column(), 50) is None
        assert User.objects.count() == 1  # the transaction lives on

    def test_a_database_that_nothing_is_known_of(
        self, monkeypatch: pytest.MonkeyPatch, django_assert_num_queries: Any
    ) -> None:
        monkeypatch.setattr(module, "_SIZES", {})
        found = column()
        with django_assert_num_queries(0):
            assert disk(found, 50) is None


@pytest.mark.skipif(connection.vendor == "sqlite", reason="which writes in place")
@pytest.mark.django_db(transaction=True)
def test_the_size_is_that_of_the_real_table() -> None:
    User.objects.bulk_create(
        User(username=f"user{number}", password="x" * 320) for number in range(2000)
    )
    with connection.cursor() as cursor:
        cursor.execute(
            "ANALYZE auth_user"
            if connection.vendor == "postgresql"
            else "ANALYZE TABLE auth_user"
        )
    found = disk(column(), 2000)
    assert found is not None
    assert 2000 * 320 < found < 2000 * 1500
    half = disk(column(), 1000)
    assert half is not None
    assert 0.4 < half / found <= 0.6


@pytest.mark.skipif(connection.vendor != "sqlite", reason="of SQLite")
@pytest.mark.django_db
def test_nothing_is_told_of_sqlite() -> None:
    assert disk(column(), 50) is None
