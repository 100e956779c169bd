"""
The `RotationRun` row of a run: who started it, how far it is, what became of it.

A run that was killed, failed or paused is gone on with by the same command: its row and its
shards say where. People pause, resume and cancel by its state.
"""

from __future__ import annotations

import contextlib
import datetime
import getpass
import os
import socket
import time
from collections.abc import Iterator
from typing import Any

from django.db import DatabaseError
from django.db.models import Sum
from django.utils import timezone

from kms_hasher import history
from kms_hasher.exceptions import KMSHasherError, RotationCancelled, RotationRefused
from kms_hasher.models import Key, RotationRun, RotationShard, in_english
from kms_hasher.rotation import shards

State = RotationRun.State

NO_RUN = "There is no such run, or none that has not ended."
WHICH_RUN = "Which run? Give its number: {runs}."

#: A run without a sign of life for this long is taken for interrupted.
SILENCE = datetime.timedelta(minutes=10)

#: Seconds between two signs of life.
HEARTBEAT = 1.0

#: What has come to its end and is not gone on with.
ENDED = (State.FINISHED, State.CANCELLED)

OVER_KEYS = (
    RotationRun.Kind.REWRAP,
    RotationRun.Kind.NEW_KEY,
    RotationRun.Kind.TO_KEY,
    RotationRun.Kind.NEW_MATERIAL,
    RotationRun.Kind.TO_MODE,
    RotationRun.Kind.NEW_DATA_KEYS,
)


class Record:
    """The row of one run, as the process that conducts it writes it."""

    def __init__(self, row: RotationRun) -> None:
        self.row = row
        self._written = time.monotonic()

    def beat(self) -> None:
        """Sum up the shards if the last sign of life is a second ago."""
        if time.monotonic() - self._written >= HEARTBEAT:
            self.write()

    def write(self, **values: Any) -> None:
        """Sum up the shards, and write that and the values. Raises `RotationCancelled`."""
        self._save(**values)
        if self.row.state == State.INTERRUPTED:
            # Another run has taken this one for dead while the machine slept.
            self._save(state=State.RUNNING)
        elif self.row.state == State.CANCELLED:
            raise RotationCancelled

    def end(self, state: State, error: str = "") -> None:
        self._save(state=state, error=error, finished_at=timezone.now())

    def _save(self, **values: Any) -> None:
        self._written = time.monotonic()
        values |= {"updated_at": timezone.now(), **totals(self.row)}
        RotationRun.objects.filter(pk=self.row.pk).update(**values)
        self.row.refresh_from_db()


def totals(run: RotationRun) -> dict[str, int]:
    """
    Return what the shards come to: the rows and calls of all sweeps, and the bad rows of the
    sweep that found most of the present one and the one before.
    """
    names = ("rewritten", "overtaken", "calls")
    sums: dict[str, int] = run.shards.aggregate(
        **{name: Sum(name, default=0) for name in names}
    )
    latest = run.shards.filter(sweep__gte=run.sweep - 1).values("sweep").order_by()
    failed = {each["sweep"]: each["number"] for each in latest.annotate(number=Sum("failed"))}
    left = run.shards.filter(sweep=run.sweep).exclude(state=RotationShard.State.DONE)
    if left.exists():
        return {**sums, "failed": max(failed.values(), default=0)}
    return {**sums, "failed": failed.get(run.sweep, 0)}


@contextlib.contextmanager
def recorded(
    kind: RotationRun.Kind,
    *,
    alias: str = "",
    previous: Key | None = None,
    started_by: str = "",
    begun: RotationRun | None = None,
    **values: Any,
) -> Iterator[Record]:
    """
    Record the block as a run: finished, failed with its error, cancelled or interrupted.

    `begun` is an earlier run to go on with. `started_by` is whoever asked for it, by default
    the user and host of the process; `values` are those of more fields.
    """
    now = timezone.now()
    silent = RotationRun.objects.filter(state=State.RUNNING, updated_at__lt=now - SILENCE)
    silent.update(state=State.INTERRUPTED, finished_at=now)
    with shards.owner() as owner:
        values |= {"state": State.RUNNING, "owner": owner, "updated_at": now}
        if begun:
            values |= {"error": "", "finished_at": None}
            RotationRun.objects.filter(pk=begun.pk).update(**values)
            begun.shards.filter(state=RotationShard.State.FAILED).update(
                state=RotationShard.State.WAITING
            )
            row = RotationRun.objects.select_related("key", "previous_key").get(pk=begun.pk)
        else:
            row = RotationRun.objects.create(
                kind=kind,
                alias=alias,
                previous_key=previous,
                started_at=now,
                started_by=(started_by or _user())[:255],
                **values,
            )
        record = Record(row)
        try:
            yield record
        except RotationCancelled:
            with contextlib.suppress(DatabaseError):
                record.end(State.CANCELLED)
            raise
        except Exception as error:
            # Errors that are not ours may quote a row.
            text = str(error) if isinstance(error, KMSHasherError) else type(error).__name__
            with contextlib.suppress(DatabaseError):
                record.end(State.FAILED, text)
            raise
        except BaseException:  # Ctrl-C, or the generator was closed
            with contextlib.suppress(DatabaseError):
                record.end(State.INTERRUPTED)
            raise
        record.end(State.FINISHED)
    if record.row.rewritten:
        history.record_counts()


def unfinished(kind: RotationRun.Kind, alias: str) -> RotationRun | None:
    """
    Return the last run of its sort behind this alias, if it was of this kind and did not come
    to its end: running it again goes on with it, and with its key if it had one ready.
    """
    kinds = OVER_KEYS if kind in OVER_KEYS else (kind,)
    runs = RotationRun.objects.filter(alias=alias, kind__in=kinds)
    last: RotationRun | None = (
        runs.select_related("key", "previous_key").order_by("-started_at", "-pk").first()
    )
    return last if last and last.kind == kind and last.state not in ENDED else None


def is_live(run: RotationRun) -> bool:
    """Return whether a process conducts the run now, as far as can be told from here."""
    states = (State.RUNNING, State.PAUSED, State.INTERRUPTED)
    return run.state in states and not shards.is_gone(run.owner, run.updated_at)


def find(run_id: int | None = None) -> RotationRun:
    """
    Return the run with this id, or the only one that has not ended.

    Raises `RotationRefused` if there is none, or more than one to choose from.
    """
    runs = RotationRun.objects.select_related("key")
    runs = runs.filter(pk=run_id) if run_id else runs.exclude(state__in=ENDED)
    found = list(runs[:10])
    if len(found) == 1:
        return found[0]
    if not found:
        raise RotationRefused(NO_RUN)
    names = "; ".join(f"{run.pk}: {in_english(run)}, {run.state}" for run in found)
    raise RotationRefused(WHICH_RUN.format(runs=names))


def command_of(run: RotationRun) -> str:
    """Return the command that goes on with a run that no process conducts."""
    mode = run.plan.get("mode", "...") if isinstance(run.plan, dict) else "..."
    wishes = {
        RotationRun.Kind.NEW_KEY: "rotate_kms_key --new-key",
        RotationRun.Kind.TO_KEY: f"rotate_kms_key --to {run.key.arn if run.key else '...'}",
        RotationRun.Kind.NEW_MATERIAL: "rotate_kms_key --new-material",
        RotationRun.Kind.WRAP: "wrap_passwords",
        RotationRun.Kind.UNWRAP: "unwrap_passwords",
        RotationRun.Kind.TO_MODE: f"rotate_kms_key --to-mode {mode}",
        RotationRun.Kind.NEW_DATA_KEYS: "rotate_kms_key --new-data-keys",
    }
    return f"manage.py {wishes.get(RotationRun.Kind(run.kind), 'rotate_kms_key')}"


def pause(run: RotationRun) -> bool:
    """Let all that work on the run stop after the calls in flight; return whether it ran."""
    return _set(run, State.PAUSED, State.RUNNING)


def resume(run: RotationRun) -> bool:
    """Let a paused run go on, if its process still waits; return whether it was paused."""
    return _set(run, State.RUNNING, State.PAUSED)


def cancel(run: RotationRun) -> bool:
    """End the run for good; return whether it had not ended. Rows stay as they are."""
    states = [state for state in State if state not in ENDED]
    return _set(run, State.CANCELLED, *states)


def _set(run: RotationRun, state: State, *among: State) -> bool:
    found = RotationRun.objects.filter(pk=run.pk, state__in=among)
    values: dict[str, Any] = {"state": state}
    if state == State.CANCELLED:
        values["finished_at"] = timezone.now()
    return bool(found.update(**values))


def _user() -> str:
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # a container without an entry for the user
        name = str(os.getuid())
    return f"{name}@{socket.gethostname()}"
