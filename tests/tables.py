"""Tables with a column of passwords and keys of other kinds than Django's users have."""

from __future__ import annotations

import contextlib
import itertools
import random
import uuid
from collections.abc import Iterator
from typing import Any

from django.db import connection, models
from django.test.utils import isolate_apps

from kms_hasher.columns import Column

#: Kinds of keys.
KEYS = ("integer", "uuid", "text")

_numbers = itertools.count(1)


def key(kind: str) -> Any:
    """Return a key that no other row has."""
    number = next(_numbers)
    if kind == "integer":
        return 2**40 + number * 1000
    if kind == "uuid":
        return uuid.uuid4()
    return f"it's {random.random()} {number} %s"


@contextlib.contextmanager
def made(kind: str) -> Iterator[Column]:
    """Make the table for the block, outside any transaction; yield its column."""
    field = {
        "integer": models.BigIntegerField(primary_key=True),
        "uuid": models.UUIDField(primary_key=True),
        "text": models.CharField(primary_key=True, max_length=64),
    }[kind]
    with isolate_apps("tests"):

        class Account(models.Model):  # noqa: DJ008
            id = field
            password = models.CharField(max_length=1024)

            class Meta:
                app_label = "tests"
                db_table = "tests_account"

    with connection.schema_editor() as editor:
        editor.create_model(Account)
    try:
        yield Column(Account, Account._meta.get_field("password"), "default")
    finally:
        with connection.schema_editor() as editor:
            editor.delete_model(Account)
