"""Time limits and replicas."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
from django.db import DatabaseError, connection

from kms_hasher.exceptions import RotationRefused
from kms_hasher.rotation import database

pytestmark = pytest.mark.django_db

SLEEP = {"postgresql": "SELECT pg_sleep(5)", "mysql": "SELECT SLEEP(5)"}


def limit() -> str:
    asked = {
        "postgresql": "SHOW statement_timeout",
        "mysql": "SELECT @@max_statement_time",
        "sqlite": "SELECT 0",
    }
    with connection.cursor() as cursor:
        cursor.execute(asked[connection.vendor])
        return str(cursor.fetchone()[0])


def test_a_statement_that_takes_too_long_is_ended() -> None:
    if connection.vendor == "sqlite":
        pytest.skip("SQLite has no such limit")
    before = limit()
    started = time.monotonic()
    try:
        with database.statement_timeout("default", 0.2), connection.cursor() as cursor:
            assert limit() != before
            cursor.execute(SLEEP[connection.vendor])
            stopped = cursor.fetchone()[0] == 1  # MariaDB's SLEEP says that it was ended
    except DatabaseError:
        stopped = True
    assert stopped
    assert time.monotonic() - started < 4


@pytest.mark.parametrize("seconds", [0, 12.5])
def test_the_former_limit_comes_back(seconds: float) -> None:
    before = limit()
    with database.statement_timeout("default", seconds):
        if connection.vendor != "sqlite":
            assert (limit() == before) == (not seconds)
    assert limit() == before


def test_no_replica() -> None:
    with pytest.raises(RotationRefused, match="'default' does not say how far it is behind"):
        database.lag("default")


class Cursor:
    def __init__(self, names: list[str], row: Any) -> None:
        self.description = [(name, None) for name in names]
        self.row = row

    def __enter__(self) -> Cursor:
        return self

    def __exit__(self, *args: object) -> None:
        pass

    def execute(self, statement: str) -> None:
        if isinstance(self.row, Exception):
            raise self.row

    def fetchone(self) -> Any:
        return self.row


def replica(monkeypatch: pytest.MonkeyPatch, vendor: str, row: Any, *names: str) -> None:
    double = SimpleNamespace(vendor=vendor, cursor=lambda: Cursor(list(names), row))
    monkeypatch.setattr(database, "connections", {"replica": double})


def test_the_lag_of_a_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    replica(monkeypatch, "postgresql", (1.5,))
    assert database.lag("replica") == 1.5
    replica(monkeypatch, "mysql", ("running", 7), "State", "Seconds_Behind_Master")
    assert database.lag("replica") == 7


@pytest.mark.parametrize(
    ("vendor", "row"),
    [
        ("postgresql", (None,)),
        ("mysql", None),
        ("mysql", ("stopped", None)),
        ("mysql", DatabaseError("access denied")),
        ("sqlite", None),
    ],
)
def test_a_replica_that_does_not_tell(
    monkeypatch: pytest.MonkeyPatch, vendor: str, row: Any
) -> None:
    replica(monkeypatch, vendor, row, "State", "Seconds_Behind_Master")
    with pytest.raises(RotationRefused, match="--max-lag needs --replica"):
        database.lag("replica")
