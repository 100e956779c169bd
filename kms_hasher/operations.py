"""The migration operation that widens a column of an app other than its own."""

from __future__ import annotations

from typing import Any

from django.db import models
from django.db.backends.base.schema import BaseDatabaseSchemaEditor
from django.db.migrations.operations import AlterField
from django.db.migrations.state import ProjectState

from kms_hasher import users


class WidenStockUserPassword(AlterField):
    """
    Alter the `password` of `auth.User` to hold `max_length` characters.

    It acts on the state and the tables of the app `auth`, wherever it stands, so that
    Django writes no migration into its own package; and on nothing where the site has a
    user model of its own. In a mode whose values fit Django's 128 characters the table is
    left alone; a site that leaves such a mode has the command widen_password_column.
    Backwards it leaves the column as wide as it is, since what it holds would not fit any
    more.
    """

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length
        super().__init__(
            "user", "password", models.CharField(max_length=max_length, verbose_name="password")
        )

    def deconstruct(self) -> tuple[str, list[Any], dict[str, Any]]:
        return type(self).__qualname__, [], {"max_length": self.max_length}

    def state_forwards(self, app_label: str, state: ProjectState) -> None:
        if users.is_stock():
            super().state_forwards("auth", state)

    def database_forwards(
        self,
        app_label: str,
        schema_editor: BaseDatabaseSchemaEditor,
        from_state: ProjectState,
        to_state: ProjectState,
    ) -> None:
        if users.is_stock() and users.needs_widening():
            super().database_forwards("auth", schema_editor, from_state, to_state)

    def database_backwards(
        self,
        app_label: str,
        schema_editor: BaseDatabaseSchemaEditor,
        from_state: ProjectState,
        to_state: ProjectState,
    ) -> None:
        pass

    def describe(self) -> str:
        return f"Widen auth.User.password to {self.max_length} characters"
