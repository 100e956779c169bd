"""Which columns hold passwords, and how many rows of each kind."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from django.contrib.auth.models import Group as AuthGroup
from django.contrib.auth.models import User
from django.db import OperationalError, connection, transaction

from kms_hasher import columns, encoding
from kms_hasher.columns import Change, Column, Group
from kms_hasher.encoding import Argon2Parameters, Header, SealedHash
from kms_hasher.exceptions import ConfigurationError

HEADER = Header("kms_argon2", Argon2Parameters(8, 1, 1), b"saltsaltsaltsaltsalt00")
REF = encoding.key_ref("1234abcd-12ab-34cd-56ef-1234567890ab")
MULTI_REGION = encoding.key_ref("mrk-1234abcd12ab34cd56ef1234567890ab")


def configure(settings: Any, **changes: Any) -> None:
    settings.KMS_HASHER = {**settings.KMS_HASHER, **changes}


@pytest.mark.django_db
def test_counts_by_hasher_mode_and_key() -> None:
    stored = {
        str(SealedHash(HEADER, "d1", REF, b"a" * 184)): 2,
        str(SealedHash(HEADER, "d1", MULTI_REGION, b"b" * 184)): 1,
        "argon2$argon2id$v=19$m=8,t=1,p=1$c2FsdHNhbHQ$aaaa": 3,
        "pbkdf2_sha256$1$salt$one": 1,
        "pbkdf2_sha256$1$salt$two": 1,
        "!unusable": 1,
        "": 1,
        "kms_argon2$": 1,
        "kms_other$x1$ref$and$more$fields": 1,
    }
    for number, (password, rows) in enumerate(stored.items()):
        for row in range(rows):
            User.objects.create(username=f"{number}.{row}", password=password)
    (column,) = columns.columns()
    assert columns.count(column) == {
        Group("kms_argon2", "d1", REF): 2,
        Group("kms_argon2", "d1", MULTI_REGION): 1,
        Group("argon2", "", ""): 3,
        Group("pbkdf2_sha256", "", ""): 2,
        Group("!", "", ""): 1,
        Group("", "", ""): 1,
        Group("kms_argon2", "", ""): 1,
        Group("kms_other", "x1", "ref"): 1,
    }


@pytest.mark.django_db
def test_count_takes_one_query(django_assert_num_queries: Any) -> None:
    (column,) = columns.columns()
    with django_assert_num_queries(1):
        columns.count(column)


@pytest.mark.django_db
class TestSwap:
    def test_only_what_was_read_is_replaced(self) -> None:
        user = User.objects.create(username="anna", password="old")
        (column,) = columns.columns()
        assert column.swap(user.pk, "old", "new") is True
        assert column.swap(user.pk, "old", "newer") is False
        user.refresh_from_db()
        assert user.password == "new"

    def test_a_row_that_is_gone(self) -> None:
        (column,) = columns.columns()
        assert column.swap(0, "old", "new") is False


class TestPasswordFields:
    def test_the_user_model_comes_first_and_once(self, settings: Any) -> None:
        configure(settings, PASSWORD_FIELDS=["auth.User.password", "auth.Group.name"])
        assert columns.fields() == [
            User._meta.get_field("password"),
            AuthGroup._meta.get_field("name"),
        ]

    @pytest.mark.parametrize(
        ("label", "says"),
        [
            ("password", 'give "app_label.Model.field"'),
            ("auth.Nobody.password", 'give "app_label.Model.field"'),
            ("auth.User.nothing", 'give "app_label.Model.field"'),
            ("auth.User.is_active", "not a text field"),
            (7, 'give "app_label.Model.field"'),
        ],
    )
    def test_entries_that_name_none(self, label: Any, says: str, settings: Any) -> None:
        configure(settings, PASSWORD_FIELDS=[label])
        with pytest.raises(ConfigurationError, match=says):
            columns.fields()


@pytest.mark.django_db
class TestDatabases:
    def test_named(self, settings: Any) -> None:
        configure(settings, DATABASES=["default"])
        assert [str(column) for column in columns.columns()] == ["auth.User.password"]

    def test_unknown(self, settings: Any) -> None:
        configure(settings, DATABASES=["replica"])
        with pytest.raises(ConfigurationError, match=r"\['replica'\]"):
            columns.columns()

    def test_among_others(self) -> None:
        assert columns.columns(["default"]) == columns.columns()
        assert columns.columns([]) == []

    def test_a_router_may_forbid_one(self, settings: Any) -> None:
        settings.DATABASE_ROUTERS = [Nowhere()]
        assert columns.columns() == []

    def test_the_name_tells_another_database(self) -> None:
        field = User._meta.get_field("password")
        assert str(columns.Column(User, field, "eu")) == "auth.User.password (eu)"


class Nowhere:
    def allow_migrate(self, db: str, app_label: str, **hints: Any) -> bool | None:
        return False if app_label == "auth" else None


# --- many at once -------------------------------------------------------------------


def users(number: int) -> list[User]:
    made = [User(username=f"user{index}", password=f"old{index}") for index in range(number)]
    return User.objects.bulk_create(made)


def changes_of(users: list[User]) -> list[Change]:
    return [Change(user.pk, user.password, f"new of {user.username}") for user in users]


@pytest.mark.django_db
def test_many_rows_are_changed_by_one_statement(django_assert_num_queries: Any) -> None:
    (column,) = columns.columns()
    made = users(100)
    changes = changes_of(made)
    # A savepoint, the statement, its release; and how long to wait for locks.
    with django_assert_num_queries(4 if connection.vendor == "postgresql" else 3):
        assert column.swap_all(changes) == {user.pk for user in made}
    assert dict(User.objects.values_list("pk", "password")) == {
        change.pk: change.new for change in changes
    }


@pytest.mark.django_db
def test_of_many_rows_those_that_hold_something_else_are_left() -> None:
    (column,) = columns.columns()
    same, changed, deleted, swapped, other = users(5)
    changes = changes_of([same, changed, deleted, swapped])
    User.objects.filter(pk=changed.pk).update(password="fresh")
    User.objects.filter(pk=swapped.pk).update(password=same.password)
    deleted.delete()
    assert column.swap_all(changes) == {same.pk}
    assert dict(User.objects.values_list("pk", "password")) == {
        same.pk: "new of user0",
        changed.pk: "fresh",
        swapped.pk: "old0",
        other.pk: "old4",
    }


@pytest.mark.django_db
def test_text_that_looks_like_sql_is_text() -> None:
    (column,) = columns.columns()
    user = User.objects.create(username="x", password="%s'; -- \\ \"{}")
    change = Change(user.pk, user.password, "%(x)s' OR 1=1 -- \\")
    assert column.swap_all([change]) == {user.pk}
    user.refresh_from_db()
    assert user.password == change.new


@pytest.mark.django_db
def test_after_a_deadlock_it_is_done_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    (column,) = columns.columns()
    made = users(3)
    User.objects.filter(pk=made[1].pk).update(password="fresh")

    update = Column._update

    def deadlock(self: Column, cursor: Any, changes: Any) -> int:
        if len(changes) > 1:
            raise OperationalError("deadlock detected")
        return update(self, cursor, changes)

    monkeypatch.setattr(Column, "_update", deadlock)
    assert column.swap_all(changes_of(made)) == {made[0].pk, made[2].pk}
    assert User.objects.get(pk=made[1].pk).password == "fresh"


@pytest.mark.django_db
def test_a_key_of_several_columns_is_done_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    (column,) = columns.columns()
    made = users(2)
    monkeypatch.setattr(User._meta.pk, "column", None)
    monkeypatch.setattr(Column, "swap", lambda self, pk, old, new: pk == made[0].pk)
    assert column.swap_all(changes_of(made)) == {made[0].pk}


@pytest.mark.django_db
def test_a_database_that_fails_is_no_locked_row(monkeypatch: pytest.MonkeyPatch) -> None:
    (column,) = columns.columns()

    def fail(*args: Any) -> int:
        raise OperationalError("server closed the connection unexpectedly")

    made = users(2)
    monkeypatch.setattr(Column, "_update", fail)
    with pytest.raises(OperationalError, match="server closed"):
        column.swap_all(changes_of(made))


@pytest.mark.django_db(transaction=True)
def test_a_locked_row_is_left_and_holds_up_no_other() -> None:
    if connection.vendor == "sqlite":
        pytest.skip("SQLite locks the whole database, and waits for it by its own timeout")
    (column,) = columns.columns()
    made = users(100)
    locked, go, done = threading.Event(), threading.Event(), threading.Event()

    def sign_in() -> None:
        try:
            with transaction.atomic():
                User.objects.filter(pk=made[50].pk).update(first_name="locked")
                locked.set()
                go.wait(20)
        finally:
            connection.close()

    waited: list[float] = []

    def others() -> None:
        """Write to the rows before the locked one, which the statement locks first."""
        try:
            while not done.is_set():
                started = time.monotonic()
                User.objects.filter(pk=made[0].pk).update(first_name="other")
                waited.append(time.monotonic() - started)
        finally:
            connection.close()

    threads = [threading.Thread(target=each) for each in (sign_in, others)]
    for thread in threads:
        thread.start()
    locked.wait(20)
    started = time.monotonic()
    changed = column.swap_all(changes_of(made))
    taken = time.monotonic() - started
    done.set()
    go.set()
    for thread in threads:
        thread.join()
    # The first is left too if the other writer has it at that very moment.
    assert changed - {made[0].pk} == {user.pk for user in made[1:]} - {made[50].pk}
    assert taken < 5
    assert max(waited) < 5
    assert column.swap_all(changes_of([made[50]])) == {made[50].pk}
