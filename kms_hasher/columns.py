"""
The columns that hold passwords: the user model's and those in `PASSWORD_FIELDS`.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from django.apps import apps
from django.contrib.auth import get_user_model
from django.core.exceptions import FieldDoesNotExist
from django.db import OperationalError, connections, models, router, transaction
from django.db.models import Case, Count, QuerySet, Value, When
from django.db.models.functions import StrIndex, Substr

from kms_hasher import conf, encoding
from kms_hasher.exceptions import ConfigurationError
from kms_hasher.models import DataKey

#: Milliseconds that a statement which locks rows waits for one that is locked.
PATIENCE = 50

#: PostgreSQL: lock_not_available, deadlock_detected. MariaDB: lock wait timeout, deadlock.
#: SQLite: the whole database is locked.
LOCKED = ("55P03", "40P01", 1205, 1213, "database is locked")


@dataclass(frozen=True)
class Column:
    """One column in one database."""

    model: type[models.Model]
    field: models.Field[Any, Any]
    database: str

    def __str__(self) -> str:
        return self.label if self.database == "default" else f"{self.label} ({self.database})"

    @property
    def label(self) -> str:
        """The name of the field, as `PASSWORD_FIELDS` has it."""
        return f"{self.model._meta.label}.{self.field.name}"

    @property
    def rows(self) -> QuerySet[Any]:
        """All rows, past any manager or default ordering of the site's own."""
        return self.model._base_manager.using(self.database).order_by()

    def swap(self, pk: Any, old: str, new: str) -> bool:
        """
        Put `new` in place of `old` and return True, unless the row holds something else.

        A password changed in the meantime is never overwritten, and no signal, validator or
        `auto_now` field takes notice.
        """
        name = self.field.attname
        return bool(self.rows.filter(pk=pk, **{name: old}).update(**{name: new}))

    def swap_all(self, changes: Sequence[Change]) -> set[Any]:
        """
        Do `swap` for many rows by one statement; return the keys of those that were changed.

        Rows are locked for that one statement, and it waits for no row that somebody else
        has locked for longer than `PATIENCE`. Where it cannot be done so, for that, a deadlock
        with another run or a key of several columns, it is done row by row, and a row that
        is still locked is left.
        """
        if self.model._meta.pk.column is not None:
            with contextlib.suppress(OperationalError), self._impatient() as cursor:
                if self._update(cursor, changes) == len(changes):
                    return {change.pk for change in changes}
                new = {change.pk: change.new for change in changes}
                rows = self.rows.filter(pk__in=new).values_list("pk", self.field.attname)
                return {pk for pk, value in rows if value == new[pk]}
            return {each.pk for each in changes if self._swap_unlocked(each)}
        return {each.pk for each in changes if self.swap(each.pk, each.old, each.new)}

    def _swap_unlocked(self, change: Change) -> bool:
        try:
            with self._impatient() as cursor:
                return bool(self._update(cursor, [change]))
        except OperationalError as error:
            if _is_locked(error):
                return False
            raise

    @contextlib.contextmanager
    def _impatient(self) -> Iterator[Any]:
        """Give a cursor in a transaction, which waits for locks no longer than `PATIENCE`."""
        connection = connections[self.database]
        with transaction.atomic(self.database), connection.cursor() as cursor:
            if connection.vendor == "postgresql":
                cursor.execute(f"SET LOCAL lock_timeout = '{PATIENCE}ms'")
            yield cursor

    def _update(self, cursor: Any, changes: Sequence[Change]) -> int:
        connection = connections[self.database]
        key = self.model._meta.pk
        quote = connection.ops.quote_name
        name, pk = quote(str(self.field.column)), quote(str(key.column))
        new: list[Any] = []
        old: list[Any] = []
        for change in changes:
            prepared = key.get_db_prep_value(change.pk, connection)
            new += [prepared, self.field.get_db_prep_save(change.new, connection)]
            old += [prepared, self.field.get_db_prep_save(change.old, connection)]
        case = " ".join(["WHEN %s THEN %s"] * len(changes))
        either = " OR ".join([f"({pk} = %s AND {name} = %s)"] * len(changes))
        table = quote(self.model._meta.db_table)
        # MariaDB counts in seconds, so that it does not wait at all.
        at_once = "SET STATEMENT innodb_lock_wait_timeout=0 FOR "
        before = at_once if getattr(connection, "mysql_is_mariadb", False) else ""
        cursor.execute(
            f"{before}UPDATE {table} SET {name} = CASE {pk} {case} END WHERE {either}",  # noqa: S608
            new + old,
        )
        return int(cursor.rowcount)


def _is_locked(error: OperationalError) -> bool:
    """Return whether the database gave up waiting for a lock, and nothing is wrong with it."""
    cause: Any = error.__cause__
    code = getattr(cause, "sqlstate", None) or (error.args[0] if error.args else None)
    return code in LOCKED


class Change(NamedTuple):
    """What is to be put in the place of what in one row."""

    pk: Any
    old: str
    new: str


class Group(NamedTuple):
    """
    Stored passwords that are alike.

    `algorithm` is the hasher's, "!" for unusable ones and "" for what names none; `mode` and
    `key_ref` are "" where nothing is sealed, and `key_ref` also where a data key has sealed.
    `mac_ref` is of the key of a MAC that is sealed.
    """

    algorithm: str
    mode: str
    key_ref: str
    mac_ref: str = ""

    @property
    def is_sealed(self) -> bool:
        return self.algorithm.startswith(encoding.PREFIX)

    @property
    def is_password(self) -> bool:
        """Whether it is sealed, and no data key."""
        return self.is_sealed and self.algorithm != encoding.DATA_KEY


def fields() -> list[models.Field[Any, Any]]:
    """
    Return the fields that hold passwords, the user model's first.

    Raises `ConfigurationError` for an entry of `PASSWORD_FIELDS` that names no text field.
    """
    found: list[models.Field[Any, Any]] = [get_user_model()._meta.get_field("password")]
    for label in conf.get().password_fields:
        try:
            model, _, name = str(label).rpartition(".")
            field = apps.get_model(model)._meta.get_field(name)
        except (LookupError, ValueError, FieldDoesNotExist) as error:
            raise ConfigurationError(
                f"KMS_HASHER['PASSWORD_FIELDS'] holds {label!r}: give "
                f'"app_label.Model.field" ({error}).'
            ) from None
        if not isinstance(field, models.CharField | models.TextField):
            raise ConfigurationError(
                f"KMS_HASHER['PASSWORD_FIELDS'] holds {label!r}, which is not a text field."
            )
        if field not in found:
            found.append(field)
    return found


def data_key_field() -> models.Field[Any, Any]:
    """Return the field that holds wrapped data keys, which are re-wrapped as passwords are."""
    field: models.Field[Any, Any] = DataKey._meta.get_field("sealed")
    return field


def databases(model: type[models.Model] | None = None) -> list[str]:
    """
    Return the databases that the settings name, or all; for data keys also that where they
    are written, as nobody could log in without them.

    Raises `ConfigurationError` for one that Django does not know.
    """
    wanted = conf.get().databases or list(connections)
    unknown = set(wanted) - set(connections)
    if unknown:
        raise ConfigurationError(
            f"KMS_HASHER['DATABASES'] names {sorted(unknown)}, which DATABASES does not have."
        )
    found = list(wanted)
    if model is DataKey and (own := router.db_for_write(DataKey)) not in found:
        found.append(own)
    return found


def columns(among: Collection[str] | None = None) -> list[Column]:
    """
    Return every column that holds passwords, in every database that has its table; and that
    of the data keys where there are any.

    Databases where a router does not allow the model are left out, and all but `databases`,
    or not `among` those given. Raises `ConfigurationError`.
    """
    found = []
    for field in (*fields(), data_key_field()):
        model = field.model
        for database in databases(model):
            if among is not None and database not in among:
                continue
            if not router.allow_migrate_model(database, model):
                continue
            if model._meta.db_table not in connections[database].introspection.table_names():
                continue
            column = Column(model, field, database)
            if model is not DataKey or column.rows.exists():
                found.append(column)
    return found


def count(column: Column) -> Counter[Group]:
    """Return how many rows there are of each kind, by one pass over the table."""
    name = column.field.attname
    envelope = {
        f"{name}__startswith": encoding.PREFIX,
        f"{name}__contains": encoding.IN_ENVELOPE,
    }
    head = Case(
        # As many groups as data keys would be too many.
        When(**envelope, then=_head(name, 2)),
        When(**{f"{name}__startswith": encoding.PREFIX}, then=_head(name, 3)),
        When(**{f"{name}__startswith": "!"}, then=Value("!$")),
        default=_head(name, 1),
        output_field=models.TextField(),
    )
    counted: Counter[Group] = Counter()
    for found, number in column.rows.values_list(head).annotate(Count("pk")):
        parts = [*str(found or "").split("$"), "", "", ""]
        key_ref, mac_ref = encoding.split_refs(parts[2])
        counted[Group(parts[0], parts[1], key_ref, mac_ref)] += number
    return counted


def _head(name: str, separators: int) -> Substr:
    """Return the column up to its n-th "$", as an expression each database can group by."""
    end: Any = Value(0)
    for _ in range(separators):
        end = end + StrIndex(Substr(name, end + 1), Value("$"))
    return Substr(name, 1, end)


@contextlib.contextmanager
def savepoint(database: str) -> Iterator[None]:
    """Keep a statement that fails from spoiling the transaction that the caller may be in."""
    if connections[database].in_atomic_block:
        with transaction.atomic(using=database):
            yield
    else:
        yield
