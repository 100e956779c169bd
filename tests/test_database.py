"""Time limits of statements, and the lag of replicas."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.db import (
    NotSupportedError,
    OperationalError,
    ProgrammingError,
    connection,
    transaction,
)

from kms_hasher.exceptions import RotationRefused
from kms_hasher.rotation import database
from kms_hasher.rotation.database import lag, statement_timeout

has_limits = pytest.mark.skipif(connection.vendor == "sqlite", reason="SQLite has no limit")


def sleep(seconds: float) -> None:
    name = "pg_sleep" if connection.vendor == "postgresql" else "SLEEP"
    with connection.cursor() as cursor:
        cursor.execute(f"SELECT {name}(%s)", [seconds])


def limit() -> str:
    query = {
        "postgresql": "SHOW statement_timeout",
        "mysql": "SELECT @@max_statement_time",
        "sqlite": "SELECT 0",
    }[connection.vendor]
    with connection.cursor() as cursor:
        cursor.execute(query)
        return str(cursor.fetchone()[0])


@has_limits
@pytest.mark.django_db(transaction=True)
class TestStatementTimeout:
    @pytest.mark.parametrize("atomic", [False, True])
    def test_a_statement_that_takes_too_long_is_ended(self, atomic: bool) -> None:
        before = limit()
        started = time.monotonic()
        block = transaction.atomic() if atomic else contextlib.nullcontext()
        with pytest.raises(OperationalError), block, statement_timeout("default", 0.1):
            sleep(20)
        assert time.monotonic() - started < 10
        assert limit() == before

    def test_what_is_quick_enough_is_not(self) -> None:
        before = limit()
        with statement_timeout("default", 20):
            sleep(0.01)
            assert limit() != before
        assert limit() == before

    def test_limits_within_limits(self) -> None:
        with statement_timeout("default", 20):
            outer = limit()
            with statement_timeout("default", 0):
                assert float(limit()) == 0
            assert limit() == outer

    def test_a_limit_is_never_rounded_to_none(self) -> None:
        with statement_timeout("default", 0.0001), contextlib.suppress(OperationalError):
            assert limit() in ("1ms", "0.001000", "0.001")

    def test_a_transaction_that_is_to_be_rolled_back(self) -> None:
        before = limit()
        with transaction.atomic(), statement_timeout("default", 20):
            transaction.set_rollback(True)
        assert limit() == before

    def test_a_connection_that_is_lost(self) -> None:
        with statement_timeout("default", 20):
            connection.close()
        assert float(limit()) == 0


@pytest.mark.django_db
def test_no_limit_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "vendor", "sqlite")
    monkeypatch.setattr(connection, "mysql_is_mariadb", False, raising=False)
    with statement_timeout("default", 0.001):
        assert limit() in ("0", "0.000000")


def test_a_negative_limit() -> None:
    with pytest.raises(ValueError, match="negative"), statement_timeout("default", -1):
        pass


# --- replicas -----------------------------------------------------------------------


@pytest.mark.django_db
def test_the_database_of_the_tests_is_no_replica() -> None:
    with pytest.raises(RotationRefused, match="'default' is no replica: ") as caught:
        lag("default")
    says = {"postgresql": "takes writes", "mysql": "no primary", "sqlite": "SQLite has none"}
    assert says[connection.vendor] in str(caught.value)


class Answers:
    """Stands in for a connection: each statement gets the next answer or error."""

    alias, display_name = "replica", "Double"

    def __init__(self, vendor: str, *answers: Any, mariadb: bool = True) -> None:
        self.vendor, self.mysql_is_mariadb = vendor, mariadb
        self.answers, self.statements = list(answers), list[str]()
        self.description: list[tuple[str]] = []

    @contextlib.contextmanager
    def cursor(self) -> Iterator[Answers]:
        yield self

    def execute(self, statement: str) -> None:
        self.statements.append(statement)
        if isinstance(self.answers[0], Exception):
            raise self.answers[0]
        if "Seconds" in str(self.answers[0]):
            rows = self.answers[0]
            self.description = [(name,) for name in rows[0]]
            self.answers[0] = [tuple(row.values()) for row in rows]
        elif not self.answers[0]:
            self.description = [("Slave_IO_State",), ("Seconds_Behind_Master",)]

    def fetchone(self) -> Any:
        return self.answers.pop(0)

    fetchall = fetchone


Replica = Callable[..., Answers]


@pytest.fixture
def replica(monkeypatch: pytest.MonkeyPatch) -> Replica:
    def make(*args: Any, **kwargs: Any) -> Answers:
        double = Answers(*args, **kwargs)
        monkeypatch.setattr(database, "connections", {"replica": double})
        return double

    return make


@pytest.mark.parametrize(
    ("answer", "seconds"),
    [
        ((True, 3600), 0),
        ((False, 2.5), 2.5),
        ((False, -0.2), 0),  # the clocks differ
        ((None, 7), 7),  # from an archive: nothing was received
        ((False, None), None),
    ],
)
def test_lag_on_postgresql(replica: Replica, answer: Any, seconds: float | None) -> None:
    replica("postgresql", (True,), answer)
    assert lag("replica") == seconds


def test_aurora_cannot_tell(replica: Replica) -> None:
    error = NotSupportedError("Function is currently not supported for Aurora")
    replica("postgresql", (True,), error)
    with pytest.raises(RotationRefused, match=r"does not tell.*for Aurora"):
        lag("replica")


def test_a_function_that_is_missing(replica: Replica) -> None:
    replica("postgresql", ProgrammingError("function pg_is_in_recovery() does not exist"))
    with pytest.raises(RotationRefused, match=r"does not tell.*does not exist"):
        lag("replica")


@pytest.mark.parametrize(("behind", "seconds"), [([0], 0), ([3], 3), ([1, 40, 0], 40)])
def test_lag_on_mariadb(replica: Replica, behind: list[int], seconds: float) -> None:
    rows = [{"Connection_name": "x", "Seconds_Behind_Master": each} for each in behind]
    double = replica("mysql", rows)
    assert lag("replica") == seconds
    assert double.statements == ["SHOW ALL SLAVES STATUS"]


def test_lag_on_mysql(replica: Replica) -> None:
    double = replica("mysql", [{"Seconds_Behind_Source": 5}], mariadb=False)
    assert lag("replica") == 5
    assert double.statements == ["SHOW REPLICA STATUS"]


def test_replication_that_has_stopped(replica: Replica) -> None:
    row = {"Seconds_Behind_Master": None, "Last_SQL_Error": "in 'UPDATE ... kms_argon2$...'"}
    replica("mysql", [{"Seconds_Behind_Master": 1, "Last_SQL_Error": ""}, row])
    with pytest.raises(RotationRefused, match="'replica' has stopped") as caught:
        lag("replica")
    assert "kms_argon2" not in str(caught.value)


def test_a_mariadb_that_follows_none(replica: Replica) -> None:
    replica("mysql", [])
    with pytest.raises(RotationRefused, match="'replica' is no replica"):
        lag("replica")


def test_a_privilege_is_missing(replica: Replica) -> None:
    replica("mysql", OperationalError(1227, "Access denied; you need ..."))
    with pytest.raises(RotationRefused, match="REPLICA MONITOR"):
        lag("replica")


def test_a_replica_out_of_reach(replica: Replica) -> None:
    replica("mysql", OperationalError(2006, "Server has gone away"))
    with pytest.raises(OperationalError, match="gone away"):
        lag("replica")


def test_an_unknown_database() -> None:
    with pytest.raises(Exception, match="nowhere"):
        lag("nowhere")
