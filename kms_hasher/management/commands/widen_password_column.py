from __future__ import annotations

from typing import Any

from django.apps import apps
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import DEFAULT_DB_ALIAS, DatabaseError, connections, models
from django.db.migrations.state import ProjectState

from kms_hasher import columns, encoding, users
from kms_hasher.exceptions import ConfigurationError

#: How long PostgreSQL waits for the table: logins queue up behind a statement that waits.
LOCK_TIMEOUT = "5s"

NOT_STOCK = (
    "{model} is the site's own: declare it with KMSUserMixin, then run makemigrations and "
    "migrate."
)
LEFT_OUT = (
    "KMS_HASHER['DATABASES'] leaves {database!r} out. If it is no replica, list it there first."
)
NOT_ALTERED = (
    "{column} could not be altered ({error}), and is as it was. If others are using the table, "
    "in a long transaction say, wait for them and run it again."
)
NO_TABLE = "There is no table of {model} in the database {database!r}."


class Command(BaseCommand):
    help = (
        "Widen the password column of Django's user model, for sites that were migrated in a "
        "mode which needs no more than 128 characters and are to move to one that does."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--database",
            default=DEFAULT_DB_ALIAS,
            choices=tuple(connections),
            help="Where the table is (default: %(default)s).",
        )
        parser.add_argument(
            "--dry-run", action="store_true", help="Write the statement; change nothing."
        )

    def handle(self, *, database: str, dry_run: bool, **options: Any) -> None:
        try:
            self._handle(database, dry_run)
        except ConfigurationError as error:
            raise CommandError(str(error)) from None

    def _handle(self, database: str, dry_run: bool) -> None:
        model = columns.fields()[0].model
        if not users.is_stock():
            raise CommandError(NOT_STOCK.format(model=model._meta.label))
        if database not in columns.databases(model):
            raise CommandError(LEFT_OUT.format(database=database))
        found = [each for each in columns.columns([database]) if each.model is model]
        if not found:
            raise CommandError(NO_TABLE.format(model=model._meta.label, database=database))
        width = users.column_width(found[0])
        if width is None or width >= encoding.MAX_LENGTH:
            self.stdout.write(f"{found[0]} is wide enough.")
            return
        try:
            statements = _widen(model, width, database, dry_run)
        except DatabaseError as error:
            text = NOT_ALTERED.format(column=found[0], error=type(error).__name__)
            raise CommandError(text) from None
        for statement in statements:
            self.stdout.write(f"{statement};")
        verb = "would be" if dry_run else "is"
        self.stdout.write(f"{found[0]} held {width} characters and {verb} widened.")


def _widen(model: type[models.Model], width: int, database: str, dry_run: bool) -> list[str]:
    """Alter the column; return the statements that a database other than SQLite takes."""
    # As migrations know it: SQLite makes the table of a model with abstract bases anew together
    # with tables of its relations, which it leaves behind.
    model = ProjectState.from_apps(apps).apps.get_model(model._meta.label)
    fields = []
    for length in (width, encoding.MAX_LENGTH):
        field: Any = models.CharField(max_length=length, verbose_name="password")
        field.set_attributes_from_name("password")
        field.model = model
        fields.append(field)
    connection = connections[database]
    if dry_run and connection.vendor == "sqlite":  # it would make the table anew
        return []
    with connection.schema_editor(collect_sql=dry_run) as editor:
        if connection.vendor == "postgresql" and not dry_run:
            editor.execute(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'")
        editor.alter_field(model, *fields)
    return [str(each).rstrip(";") for each in editor.collected_sql] if dry_run else []
