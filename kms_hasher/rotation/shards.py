"""
The shards of a run: which part of which column is done, and by whom.

They are the queue that every kind of worker takes from. A shard is claimed by an update that
only one can win, its owner says twice a second how far it is, and one whose owner is gone is
claimed by the next. Worked on twice, by a delivery too many or an owner that was thought dead,
it costs calls and does no harm: rows are only ever compared and swapped.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import random
import socket
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from django.core.serializers.json import DjangoJSONEncoder
from django.db import router, transaction
from django.db.models import F
from django.utils import timezone

from kms_hasher import columns
from kms_hasher.columns import Column
from kms_hasher.exceptions import ConfigurationError
from kms_hasher.models import RotationRun, RotationShard

State = RotationShard.State

#: Rows in a shard at the most, and at the least where there are enough for all workers; and
#: how many shards there shall be for each worker, so that none waits long for the last.
LARGEST = 50_000
SMALLEST = 500
PER_WORKER = 8

#: An owner on another host that was silent for so long is taken for dead.
LEASE = datetime.timedelta(seconds=30)

NO_COLUMN = (
    "The run works on {label} in the database {database!r}, which the settings of this "
    "process do not know: PASSWORD_FIELDS and DATABASES must be the same everywhere."
)

_owners: set[str] = set()


@contextlib.contextmanager
def owner() -> Iterator[str]:
    """Give the block a name to own runs and shards by: host, process id and a token."""
    name = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
    _owners.add(name)
    try:
        yield name
    finally:
        _owners.discard(name)


def is_gone(name: str, updated_at: datetime.datetime | None) -> bool:
    """Return whether an owner has ended, as far as can be told from here."""
    if not name or updated_at is None:
        return True
    host, _, rest = name.rpartition(":")[0].rpartition(":")
    if host == socket.gethostname() and rest.isdigit():
        if int(rest) == os.getpid():
            return name not in _owners
        try:
            os.kill(int(rest), 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass  # it lives, as somebody else's
    return updated_at < timezone.now() - LEASE


def size(total: int, workers: int) -> int:
    """Return how many rows a shard is to hold, of `total` rows for so many workers."""
    return min(max(total // (workers * PER_WORKER), SMALLEST), LARGEST)


def bounds(column: Column, rows: int) -> Iterator[tuple[str, str]]:
    """
    Cut a column into parts of so many rows; yield the keys that bound each, as text.

    "" is no bound: the last part takes whatever comes after it. It is one pass over the
    index of the primary key.
    """
    keys = column.rows.order_by("pk").values_list("pk", flat=True)
    after = ""
    while True:
        rest = keys.filter(pk__gt=load(column, after)) if after else keys
        last = list(rest[rows - 1 : rows])
        if not last:
            yield after, ""
            return
        upto = dump(last[0])
        yield after, upto
        after = upto


def open_sweep(run: RotationRun, among: Sequence[Column], rows: int) -> None:
    """Make the shards of the run's next sweep, unless somebody else has done it just now."""
    former = list(
        run.shards.filter(sweep=run.sweep).values(
            "number", "database", "column", "after", "upto"
        )
    )
    if not former:
        for column in among:
            for after, upto in bounds(column, rows):
                former.append(
                    {
                        "number": len(former) + 1,
                        "database": column.database,
                        "column": column.label,
                        "after": after,
                        "upto": upto,
                    }
                )
    with transaction.atomic(using=router.db_for_write(RotationShard)):
        opened = RotationRun.objects.filter(pk=run.pk, sweep=run.sweep)
        if opened.update(sweep=F("sweep") + 1):
            made = (RotationShard(run=run, sweep=run.sweep + 1, **each) for each in former)
            RotationShard.objects.bulk_create(made, batch_size=200)
    run.refresh_from_db(fields=["sweep"])


def claim(run: RotationRun, name: str, only: int | None = None) -> RotationShard | None:
    """Return a shard of the sweep that is now the owner's, or None if none can be had."""
    shards = run.shards.filter(sweep=run.sweep)
    if only is not None:
        shards = shards.filter(pk=only)
    waiting = list(shards.filter(state=State.WAITING).order_by("number")[:PER_WORKER])
    random.shuffle(waiting)  # so that many who ask at once do not all want the same
    for shard in waiting or shards.filter(state=State.WORKING):
        if shard.state == State.WORKING and not is_gone(shard.owner, shard.updated_at):
            continue
        mine = {"state": State.WORKING, "owner": name, "updated_at": timezone.now()}
        same = run.shards.filter(pk=shard.pk, state=shard.state, owner=shard.owner)
        if same.update(**mine):
            for field, value in mine.items():
                setattr(shard, field, value)
            return shard
    return None


_KEPT = (
    "state",
    "error",
    "updated_at",
    "cursor",
    "looked",
    "rewritten",
    "overtaken",
    "failed",
    "calls",
    "bad",
    "sources",
)


def keep(shard: RotationShard, *, state: str = State.WORKING, error: str = "") -> bool:
    """Write how far the shard is; return False if it is somebody else's by now."""
    shard.state, shard.error, shard.updated_at = state, error, timezone.now()
    mine = RotationShard.objects.filter(pk=shard.pk, owner=shard.owner, state=State.WORKING)
    return bool(mine.update(**{field: getattr(shard, field) for field in _KEPT}))


def at_work(run: RotationRun) -> int:
    """Return how many workers have a shard of the run now."""
    since = timezone.now() - LEASE
    return run.shards.filter(state=State.WORKING, updated_at__gte=since).count()


def column_of(shard: RotationShard) -> Column:
    """Return the shard's column. Raises `ConfigurationError` if the settings lack it."""
    for field in (*columns.fields(), columns.data_key_field()):
        column = Column(field.model, field, shard.database)
        if column.label == shard.column and shard.database in columns.databases():
            return column
    raise ConfigurationError(NO_COLUMN.format(label=shard.column, database=shard.database))


def dump(pk: Any) -> str:
    """Return a primary key as text."""
    return json.dumps(pk, cls=DjangoJSONEncoder)


def load(column: Column, text: str) -> Any:
    """Return the primary key that `dump` made the text from."""
    key: Any = column.model._meta.pk
    value = json.loads(text)
    if isinstance(value, list):  # of several columns
        return tuple(part.to_python(each) for part, each in zip(key.fields, value, strict=True))
    return key.to_python(value)
