from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import DEFAULT_DB_ALIAS, connections, models

from kms_hasher import columns, encoding, users

NOT_STOCK = (
    "{model} is the site's own: declare it with KMSUserMixin, then run makemigrations and "
    "migrate."
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
        model = columns.fields()[0].model
        if not users.is_stock():
            raise CommandError(NOT_STOCK.format(model=model._meta.label))
        found = [each for each in columns.columns([database]) if each.model is model]
        if not found:
            raise CommandError(NO_TABLE.format(model=model._meta.label, database=database))
        width = users.column_width(found[0])
        if width is None or width >= encoding.MAX_LENGTH:
            self.stdout.write(f"{found[0]} is wide enough.")
            return
        statements = _widen(model, width, database, dry_run)
        for statement in statements:
            self.stdout.write(f"{statement};")
        verb = "would be" if dry_run else "is"
        self.stdout.write(f"{found[0]} held {width} characters and {verb} widened.")


def _widen(model: type[models.Model], width: int, database: str, dry_run: bool) -> list[str]:
    """Alter the column; return the statements that a database other than SQLite takes."""
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
        editor.alter_field(model, *fields)
    return [str(each).rstrip(";") for each in editor.collected_sql] if dry_run else []
