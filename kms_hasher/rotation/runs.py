"""
The `Rotation` row of a run: who started it, how far it is, what became of it.

It is told for people; no run depends on it but to see what an interrupted one had made.
"""

from __future__ import annotations

import contextlib
import datetime
import getpass
import os
import socket
import time
from collections.abc import Iterator

from django.db import DatabaseError
from django.utils import timezone

from kms_hasher import history
from kms_hasher.exceptions import KMSHasherError
from kms_hasher.models import Key, Rotation

#: A run without a sign of life for this long is taken for interrupted.
SILENCE = datetime.timedelta(minutes=10)

#: Seconds between two signs of life.
HEARTBEAT = 1.0


class Record:
    """The row of one run. It is written at its steps and in between once a second."""

    def __init__(self, row: Rotation) -> None:
        self.row = row
        self._written = time.monotonic()

    def beat(self, *, rewritten: int, overtaken: int, failed: int) -> None:
        """Count, and write the counts if the last sign of life is a second ago."""
        row = self.row
        row.rewritten, row.overtaken, row.failed = rewritten, overtaken, failed
        if time.monotonic() - self._written >= HEARTBEAT:
            # Another run may have taken this one for dead while the machine slept.
            row.state = Rotation.State.RUNNING
            self._save()

    def set_key(self, key: Key) -> None:
        """Note the key that everything goes to, once it is ready."""
        self.row.key = key
        self._save()

    def end(self, state: Rotation.State, error: str = "") -> None:
        self.row.state, self.row.error = state, error
        self.row.finished_at = timezone.now()
        self._save()

    def _save(self) -> None:
        self.row.updated_at = timezone.now()
        self.row.save()
        self._written = time.monotonic()


@contextlib.contextmanager
def recorded(
    kind: Rotation.Kind, *, alias: str = "", previous: Key | None = None, started_by: str = ""
) -> Iterator[Record]:
    """
    Record the block as a run: finished, failed with its error, or interrupted.

    `started_by` is whoever asked for it, by default the user and host of the process.
    """
    now = timezone.now()
    silent = Rotation.objects.filter(state=Rotation.State.RUNNING, updated_at__lt=now - SILENCE)
    silent.update(state=Rotation.State.INTERRUPTED, finished_at=now)
    record = Record(
        Rotation.objects.create(
            kind=kind,
            alias=alias,
            previous_key=previous,
            started_at=now,
            updated_at=now,
            started_by=(started_by or _user())[:255],
        )
    )
    try:
        yield record
    except Exception as error:
        # Errors that are not ours may quote a row.
        text = str(error) if isinstance(error, KMSHasherError) else type(error).__name__
        with contextlib.suppress(DatabaseError):
            record.end(Rotation.State.FAILED, text)
        raise
    except BaseException:  # Ctrl-C, or the generator was closed
        with contextlib.suppress(DatabaseError):
            record.end(Rotation.State.INTERRUPTED)
        raise
    record.end(Rotation.State.FINISHED)
    if record.row.rewritten:
        history.record_counts()


def unfinished(kind: Rotation.Kind, alias: str) -> Rotation | None:
    """
    Return the last run over keys behind this alias, if it was of this kind, had its key
    ready, and did not come to its end: running it again goes on with that key.
    """
    runs = Rotation.objects.filter(alias=alias, kind__in=_OVER_KEYS)
    last: Rotation | None = (
        runs.select_related("key", "previous_key").order_by("-started_at", "-pk").first()
    )
    if last and last.kind == kind and last.key and last.state != Rotation.State.FINISHED:
        return last
    return None


_OVER_KEYS = (
    Rotation.Kind.REWRAP,
    Rotation.Kind.NEW_KEY,
    Rotation.Kind.TO_KEY,
    Rotation.Kind.NEW_MATERIAL,
)


def _user() -> str:
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # a container without an entry for the user
        name = str(os.getuid())
    return f"{name}@{socket.gethostname()}"
