"""
Fields and texts of rows that anybody may have written: they can always be read and shown.

Whoever owns the database can put values there that no code of ours would. One such row must
neither end a comparison nor hide the others.
"""

from __future__ import annotations

from typing import Any

from django.db import models

#: Times outside of these years nobody here writes, and not all of them can be computed with.
YEARS = range(2000, 2200)

_FIRST, _LAST = "2000-01-01 00:00:00", "2199-12-31 00:00:00"

_BOUNDED = (
    f"WHEN {{0}} < TIMESTAMP '{_FIRST}' THEN TIMESTAMP '{_FIRST}' "
    f"WHEN {{0}} > TIMESTAMP '{_LAST}' THEN TIMESTAMP '{_LAST}'"
)
_SELECTED = {
    "postgresql": f"CASE {_BOUNDED} ELSE {{0}} END",  # infinity, and years after 9999
    # The 31st of February.
    "mysql": (
        f"CASE {_BOUNDED} WHEN {{0}} IS NOT NULL AND {{0}} + INTERVAL 0 DAY IS NULL "
        f"THEN TIMESTAMP '{_LAST}' ELSE {{0}} END"
    ),
    # That as well, and all that is no time.
    "sqlite": (
        f"CASE WHEN {{0}} < '{_FIRST}' THEN '{_FIRST}' WHEN {{0}} IS NULL OR "
        f"{{0}} <= '{_LAST}' AND datetime({{0}}, '+0 days') = substr({{0}}, 1, 19) THEN {{0}} "
        f"ELSE '{_LAST}' END"
    ),
}

#: How deep details are: a name, and numbers by name in it.
_DEPTH = 3


class BoundedTime(models.DateTimeField):  # type: ignore[type-arg]
    """
    A time that is read as the first or last of `YEARS` where it is none of them.

    PostgreSQL has times that Python has not, and SQLite takes any text for one: each query
    that reads the row would fail.
    """

    def deconstruct(self) -> Any:
        name, _, args, kwargs = super().deconstruct()
        return name, "django.db.models.DateTimeField", args, kwargs

    def select_format(self, compiler: Any, sql: str, params: Any) -> tuple[str, Any]:
        form = _SELECTED.get(compiler.connection.vendor, "{0}")
        return form.format(sql), (*params,) * form.count("{0}")


class Number(models.BigIntegerField):  # type: ignore[type-arg]
    """A whole number on SQLite as well, which takes any text for one."""

    def deconstruct(self) -> Any:
        name, _, args, kwargs = super().deconstruct()
        return name, "django.db.models.BigIntegerField", args, kwargs

    def select_format(self, compiler: Any, sql: str, params: Any) -> tuple[str, Any]:
        sqlite = compiler.connection.vendor == "sqlite"
        return f"CAST({sql} AS INTEGER)" if sqlite else sql, params


class Details(models.JSONField):
    """A flat object of JSON, read as an empty one where it is something else."""

    def deconstruct(self) -> Any:
        name, _, args, kwargs = super().deconstruct()
        return name, "django.db.models.JSONField", args, kwargs

    def from_db_value(self, value: Any, expression: Any, connection: Any) -> Any:
        try:
            found = super().from_db_value(value, expression, connection)
        except (ValueError, TypeError, RecursionError):
            return {}
        return found if isinstance(found, dict) and _is_flat(found, _DEPTH) else {}


def _is_flat(value: Any, depth: int) -> bool:
    if not isinstance(value, dict | list):
        return True
    inner = value.values() if isinstance(value, dict) else value
    return depth > 0 and all(_is_flat(each, depth - 1) for each in inner)


def printable(text: str) -> str:
    """Return a text without what would move the cursor of a terminal or begin a line."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else "?" for char in text)
