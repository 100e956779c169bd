from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.core.management import call_command
from django.db import DatabaseError, connection, connections, migrations, models
from django.db.migrations.loader import MigrationLoader
from django.db.migrations.optimizer import MigrationOptimizer
from django.db.migrations.state import ProjectState
from django.db.migrations.writer import MigrationWriter

from kms_hasher import users
from kms_hasher.columns import Column
from kms_hasher.operations import WidenStockUserPassword
from tests import projects

LONG = "x" * 700
WIDE = ("kms_hasher", "0002_widen_auth_user_password")
AUTH = ("auth", "0012_alter_user_first_name_max_length")
NARROW = ("kms_hasher", "0001_initial")


def width(database: str = "default") -> int | None:
    field: Any = User._meta.get_field("password")
    return users.column_width(Column(User, field, database))


def put(password: str) -> None:
    User.objects.update(password=password)
    assert User.objects.get().password == password


def migrate(*target: str) -> None:
    call_command("migrate", *target, verbosity=0)


def alter_column(width: int) -> None:
    """Give the real column of the stock user another width, past all migrations."""
    state = MigrationLoader(connection).project_state([AUTH, WIDE])
    altered = state.clone()
    field = models.CharField(max_length=width, verbose_name="password")
    operation = migrations.AlterField("user", "password", field)
    operation.state_forwards("auth", altered)
    with connection.schema_editor() as editor:
        operation.database_forwards("auth", editor, state, altered)


# --- the stock user model -----------------------------------------------------------


@pytest.fixture
def existing_site(transactional_db: None) -> Iterator[None]:
    """A site with a user and Django's own column, where our 0002 is not applied yet."""
    migrate(*NARROW)
    alter_column(128)
    User.objects.create(username="anna", password="argon2$old")
    yield
    migrate()


@pytest.mark.django_db
def test_no_migration_is_missing() -> None:
    call_command("makemigrations", check_changes=True, dry_run=True, verbosity=0)


@pytest.mark.usefixtures("existing_site")
def test_on_an_existing_site_forwards_backwards_and_forwards() -> None:
    assert width() == 128
    if connection.vendor != "sqlite":  # which takes any length
        with pytest.raises(DatabaseError):
            put(LONG)
    migrate(*WIDE)
    assert width() == 1024
    assert User.objects.get().password == "argon2$old"
    put(LONG)
    migrate(*NARROW)
    assert width() == 1024
    assert User.objects.get().password == LONG
    migrate(*WIDE)
    assert width() == 1024
    assert User.objects.get().password == LONG


@pytest.mark.django_db
@pytest.mark.parametrize("mode", ["direct", "public_key", "envelope", "mac", "mac_in_direct"])
def test_no_migration_is_missing_in_any_mode(mode: str, settings: Any) -> None:
    settings.KMS_HASHER = {**settings.KMS_HASHER, "MODE": mode, "MAC_KEY": "alias/mac"}
    call_command("makemigrations", check_changes=True, dry_run=True, verbosity=0)


@pytest.mark.usefixtures("existing_site")
@pytest.mark.parametrize("mode", ["envelope", "mac"])
def test_where_the_values_fit_the_table_of_users_is_left_alone(
    mode: str, settings: Any
) -> None:
    given = settings.KMS_HASHER
    settings.KMS_HASHER = {**given, "MODE": mode}
    statements: list[str] = []

    def watch(execute: Any, sql: str, *args: Any) -> Any:
        statements.append(sql)
        return execute(sql, *args)

    with connection.execute_wrapper(watch):
        migrate("kms_hasher")
        migrate(*NARROW)
        migrate("kms_hasher")
    altering = ("ALTER", "CREATE", "DROP", "UPDATE", "INSERT", "PRAGMA foreign_keys")
    touched = [each for each in statements if each.startswith(altering) and "auth_user" in each]
    assert statements and touched == []
    assert width() == 128
    assert User.objects.get().password == "argon2$old"
    settings.KMS_HASHER = given
    migrate(*NARROW)  # so that it is applied again, and widens
    migrate(*WIDE)
    assert width() == 1024


@pytest.mark.django_db
def test_historical_models_are_as_wide_as_their_migration_says() -> None:
    loader = MigrationLoader(connection)
    for target, expected in ((NARROW, 128), (WIDE, 1024)):
        state = loader.project_state([AUTH, target])
        field = state.apps.get_model("auth", "User")._meta.get_field("password")
        assert field.max_length == expected


@pytest.mark.django_db(transaction=True)
def test_sqlmigrate(capsys: pytest.CaptureFixture[str]) -> None:
    call_command("sqlmigrate", *WIDE)
    assert "varchar(1024)" in capsys.readouterr().out
    call_command("sqlmigrate", *WIDE, backwards=True)
    assert "varchar" not in capsys.readouterr().out


# --- several databases --------------------------------------------------------------


class Router:
    """Users, and what points to them, live in one database."""

    def __init__(self, database: str) -> None:
        self.database = database

    def allow_migrate(self, db: str, app_label: str, **hints: Any) -> bool | None:
        return db == self.database if app_label in ("auth", "admin") else None


@pytest.fixture
def make_other(django_db_setup: None, django_db_blocker: Any) -> Iterator[Callable[..., None]]:
    """Makes a second test database of the same kind: `make_other(MIGRATE=False)`."""

    def make(**test: Any) -> None:
        options = copy.deepcopy(connections["default"].settings_dict)
        name = None if connection.vendor == "sqlite" else f"test_other_{os.getpid()}"
        options["TEST"] |= {"NAME": name, **test}
        connections.databases["other"] = options
        connections["other"].creation.create_test_db(verbosity=0, autoclobber=True)

    with django_db_blocker.unblock():
        yield make
        connections["other"].creation.destroy_test_db("", verbosity=0)
        connections["other"].close()
    del connections["other"], connections.databases["other"]


def test_another_database_from_zero(make_other: Any, settings: Any) -> None:
    settings.DATABASE_ROUTERS = [Router("other")]
    make_other()
    assert width("other") == 1024
    User.objects.using("other").create(username="anna", password=LONG)
    assert User.objects.using("other").get().password == LONG


@pytest.mark.parametrize("mode", ["envelope", "mac"])
def test_another_database_from_zero_where_the_values_fit(
    mode: str, make_other: Any, settings: Any
) -> None:
    settings.KMS_HASHER = {**settings.KMS_HASHER, "MODE": mode}
    settings.DATABASE_ROUTERS = [Router("other")]
    make_other()
    assert width("other") == 128


def test_a_database_without_users(make_other: Any, settings: Any) -> None:
    settings.DATABASE_ROUTERS = [Router("default")]
    make_other()
    tables = connections["other"].introspection.table_names()
    assert "auth_user" not in tables
    assert "kms_hasher_key" in tables
    call_command("migrate", *NARROW, database="other", verbosity=0)
    call_command("migrate", database="other", verbosity=0)


def test_without_migrations(make_other: Any) -> None:
    make_other(MIGRATE=False)
    assert width("other") == 1024


# --- the operation ------------------------------------------------------------------


def test_it_can_be_written_and_is_kept_when_squashed() -> None:
    operation = WidenStockUserPassword(max_length=1024)
    migration = type("Migration", (migrations.Migration,), {"operations": [operation]})
    text = MigrationWriter(migration("0003_squashed", "kms_hasher")).as_string()
    assert "kms_hasher.operations.WidenStockUserPassword(\n            max_length=1024," in text
    assert operation.deconstruct() == ("WidenStockUserPassword", [], {"max_length": 1024})
    graph = MigrationLoader(None).graph
    operations = [*graph.nodes[NARROW].operations, *graph.nodes[WIDE].operations, operation]
    kept = MigrationOptimizer().optimize(operations, "kms_hasher")
    assert [new for new in kept if isinstance(new, WidenStockUserPassword)] == [operation]
    assert operation.describe() == "Widen auth.User.password to 1024 characters"


def test_it_does_nothing_to_a_swapped_model(settings: Any) -> None:
    settings.AUTH_USER_MODEL = "accounts.User"
    operation = WidenStockUserPassword(max_length=1024)
    state = ProjectState()
    operation.state_forwards("kms_hasher", state)
    assert not state.models
    operation.database_forwards("kms_hasher", None, state, state)  # type: ignore[arg-type]


# --- a user model of the site's own -------------------------------------------------


@pytest.mark.everywhere
def test_a_custom_model_with_the_mixin() -> None:
    script = """
        from django.contrib.auth import get_user_model
        from django.contrib.auth.models import User as Stock
        from django.contrib.auth.tokens import default_token_generator
        from django.core import checks
        from django.core.management import call_command
        from django.db import connection, connections
        from kms_hasher import columns, users
        from tests.test_users import sealed

        connection.creation.create_test_db(verbosity=0, autoclobber=True)
        try:
            call_command("makemigrations", check_changes=True, dry_run=True, verbosity=0)
            messages = checks.run_checks(tags=["kms_hasher"], databases=["default"])
            User = get_user_model()
            user = User.objects.create(username="anna", password=sealed(size=512))
            session, token = (
                user.get_session_auth_hash(),
                default_token_generator.make_token(user),
            )
            User.objects.update(password=sealed(key=1, size=512))
            user = User.objects.get()
            result = {
                "checks": [message.id for message in messages],
                "columns": [
                    (str(column), users.column_width(column)) for column in columns.columns()
                ],
                "names": str(User._meta.verbose_name_plural),
                "session": user.get_session_auth_hash() == session,
                "link": default_token_generator.check_token(user, token),
                "stock": Stock._meta.get_field("password").max_length,
            }
        finally:
            connection.creation.destroy_test_db("", verbosity=0)
    """
    found = projects.run("swapped", script, database=os.environ.get("DATABASE_URL"))
    assert found == {
        "checks": [],
        "columns": [["accounts.User.password", 1024]],
        "names": "users",
        "session": True,
        "link": True,
        "stock": 128,
    }


@pytest.mark.everywhere
def test_a_custom_model_without_the_mixin() -> None:
    script = """
        from django.core import checks
        messages = checks.run_checks(tags=["kms_hasher"])
        result = [[message.id, message.is_serious(), message.hint] for message in messages]
    """
    (short, sessions) = projects.run("plain", script)
    assert short[:2] == ["kms_hasher.E006", True]
    assert sessions[:2] == ["kms_hasher.W002", False]
    assert all("class User(KMSUserMixin, ...)" in message[2] for message in (short, sessions))
