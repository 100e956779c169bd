"""
What the commands that rewrite stored passwords have in common: their arguments, how they
show their progress, and what they end with.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import time
from collections.abc import Generator
from typing import Any, TypeVar

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import DEFAULT_DB_ALIAS, DatabaseError, connections

from kms_hasher import modes
from kms_hasher.exceptions import (
    ConfigurationError,
    KMSHasherError,
    RotationCancelled,
    RotationRefused,
)
from kms_hasher.rotation import distribute, sweeps
from kms_hasher.rotation.engine import BadRow, Options
from kms_hasher.rotation.processes import processes
from kms_hasher.rotation.sweeps import Enlist, Progress

T = TypeVar("T")

#: Exit statuses, besides 0 and 2, argparse's own.
FAILED, BAD_ROWS, STOPPED = 1, 3, 130

#: Seconds between two lines of progress where no terminal shows them.
LOG_EVERY = 5.0

#: How many bad rows `--json` names; all are told on standard error.
NAMED = 1000

GO_ON = "Every password is as good as it was. Run it again to go on."
INTERRUPTED = f"Stopped. {GO_ON}"
BAD = "Rows that could not be rewritten and were left as they are: {number}."
NO_REPLICA = "--max-lag says how far a --replica may be behind: name one."
NOT_CONFIRMED = "Not confirmed; nothing was done."
NO_ANSWER = "Nobody is there to confirm this."
ONE_WAY = (
    "The mode {mode!r} stores a MAC in the place of the digest. It cannot be left without "
    "passwords: from then on only users who sign in can be moved to another mode or another "
    "MAC key, and unwrap_passwords has no effect on the others."
)
DATABASE_FAILED = f"The database failed ({{error}}). {GO_ON}"


class WalkCommand(BaseCommand):
    """A command that does its work in `work` and fills `result`, for `--json`."""

    result: dict[str, Any]

    def add_arguments(self, parser: CommandParser) -> None:
        parser.formatter_class = _formatter(parser.formatter_class)
        parser.add_argument(
            "--dry-run", action="store_true", help="Tell what would be done; change nothing."
        )
        parser.add_argument(
            "--batch-size",
            type=positive_int,
            default=Options.batch_size,
            metavar="ROWS",
            help="Rows read at a time (default: %(default)s).",
        )
        parser.add_argument(
            "--concurrency",
            type=lambda text: None if text == "auto" else positive_int(text),
            default=Options.concurrency,
            metavar="N",
            help='Calls to KMS that a process makes at the same time, or "auto" to find as '
            "many as bring something (default: %(default)s). With any number it goes slower "
            "while KMS throttles.",
        )
        parser.add_argument(
            "--rate",
            type=_positive_float,
            metavar="N",
            help="Calls to KMS per second at the most. The quota is shared with logins and "
            "all else in the account and Region (default: no limit).",
        )
        parser.add_argument(
            "--sleep",
            type=seconds,
            default=Options.sleep,
            metavar="SECONDS",
            help="Pause between two batches, for replicas and for all else that the database "
            "has to do (default: none).",
        )
        parser.add_argument(
            "--statement-timeout",
            type=seconds,
            default=Options.statement_timeout,
            metavar="SECONDS",
            help="Let the database end a statement that takes longer; 0 for no limit "
            "(default: %(default)s).",
        )
        parser.add_argument(
            "--replica",
            type=_replica,
            action="append",
            default=[],
            dest="replicas",
            metavar="[DATABASE=]ALIAS",
            help="Read from this alias of DATABASES in the first sweep: a replica of "
            '"default", or of the database named before. May be given for each.',
        )
        parser.add_argument(
            "--max-lag",
            type=seconds,
            metavar="SECONDS",
            help="Wait while a --replica is further behind than that.",
        )
        workers = parser.add_mutually_exclusive_group()
        workers.add_argument(
            "--processes",
            type=positive_int,
            default=Options.processes,
            metavar="N",
            help="Processes that work on it on this machine (default: %(default)s). One is "
            "bound by a single processor; each makes CONCURRENCY calls at the same time.",
        )
        workers.add_argument(
            "--distribute",
            choices=distribute.ENGINES,
            help="Put the shards on a queue for workers on any machine: Celery's, or those of "
            "Django's tasks framework. This command watches over them to the end.",
        )
        parser.add_argument(
            "--json",
            action="store_true",
            help="Write one JSON object to standard output at the end; all else goes to "
            "standard error.",
        )

    def handle(self, **options: Any) -> None:
        self.result = {"state": "finished", "dry_run": options["dry_run"]}
        self.to_json: bool = options["json"]
        error, status, state = "", 0, "failed"
        try:
            self.work(**options)
        except KeyboardInterrupt:
            error, status, state = INTERRUPTED, STOPPED, "interrupted"
        except RotationCancelled as cancelled:
            error, status, state = str(cancelled), FAILED, "cancelled"
        except (RotationRefused, ConfigurationError) as refused:
            error, status = str(refused), FAILED
        except KMSHasherError as failed:
            error, status = f"{failed} {GO_ON}", FAILED
        except DatabaseError as failed:
            # Only its kind: what the database says may quote a row.
            error = DATABASE_FAILED.format(error=type(failed).__name__)
            status = FAILED
        if status:
            self.result.update(state=state, error=error)
        elif self.result.get("failed"):
            error, status = BAD.format(number=self.result["failed"]), BAD_ROWS
        if self.to_json:
            self.stdout.write(json.dumps(self.result, indent=2))
        if status:
            raise CommandError(error, returncode=status)

    def work(self, **options: Any) -> None:
        raise NotImplementedError

    def tell(self, text: str) -> None:
        """Say something to people: where `--json` is not in its way."""
        (self.stderr if self.to_json else self.stdout).write(text, lambda plain: plain)

    def ask(self, question: str) -> str:
        """Return what is answered. Raises `RotationRefused` if nobody is there."""
        out = self.stderr if self.to_json else self.stdout
        out.write(question, lambda plain: plain, ending="")
        out.flush()
        try:
            return input()
        except EOFError:
            raise RotationRefused(NO_ANSWER) from None

    def walk(self, steps: Generator[Progress, None, T]) -> T:
        """Run `steps` to their end, show the progress and note it in `result`."""
        show = Shown(self)
        with contextlib.closing(steps):
            while True:
                try:
                    progress = next(steps)
                except StopIteration as stop:
                    show.end()
                    returned: T = stop.value
                    return returned
                except BaseException:
                    show.end()
                    raise
                show.progress(progress)
                self._note(progress)

    def _note(self, progress: Progress) -> None:
        self.result.update(
            sweeps=progress.sweep,
            rewritten=progress.rewritten,
            overtaken=progress.overtaken,
            failed=progress.failed,
            calls=progress.calls,
            seconds=round(progress.seconds, 3),
        )
        named = self.result.setdefault("bad", [])
        named += [_plain(row) for row in progress.bad[: max(NAMED - len(named), 0)]]


class Shown:
    """The progress on standard error: one line that changes, or lines now and then."""

    def __init__(self, command: BaseCommand) -> None:
        self._out = command.stderr
        self._live = self._out.isatty()
        self._last = time.monotonic()

    def progress(self, progress: Progress) -> None:
        for row in progress.bad:
            self._write(f"{self._clear}Left as it is: {row}\n")
        if self._live:
            self._write(f"{self._clear}{bar(progress)}{line(progress)}")
        elif time.monotonic() - self._last >= LOG_EVERY:
            self._last = time.monotonic()
            self._write(f"{line(progress)}\n")

    def end(self) -> None:
        self._write(self._clear)

    @property
    def _clear(self) -> str:
        return "\r\033[K" if self._live else ""

    def _write(self, text: str) -> None:
        self._out.write(text, lambda plain: plain, ending="")
        self._out.flush()


def bar(progress: Progress) -> str:
    """Return a progress bar and a space, or "" where nobody knows how many rows there are."""
    if progress.sweep != 1 or not progress.total:
        return ""
    share = min(progress.looked / progress.total, 1)
    return f"[{'#' * int(20 * share):.<20}] {share:.0%} "


def line(progress: Progress) -> str:
    """Return a progress as one line: rows, rate and time left."""
    if progress.waiting:
        return "Waiting for the moved alias to spread, before a last sweep."
    if progress.paused:
        return "Paused; `manage.py rotate_kms_key --resume`, or Resume in the admin, goes on."
    parts = [f"sweep {progress.sweep}"]
    if progress.sweep == 1:
        parts.append(f"{progress.looked:,} of {progress.total:,} rows")
    else:
        parts.append(f"{progress.looked:,} rows")
    parts.append(f"{progress.rewritten:,} rewritten")
    if progress.overtaken:
        parts.append(f"{progress.overtaken:,} overtaken")
    if progress.failed:
        parts.append(f"{progress.failed:,} bad")
    parts.append(f"{progress.rate:,.0f} calls/s")
    if progress.seconds_left is not None:
        parts.append(f"{duration(progress.seconds_left)} left")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """Return seconds as people say them: 42 s, 3 min 05 s, 2 h 10 min."""
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def options_of(options: dict[str, Any]) -> Options:
    """Return the engine's options from the command's."""
    names = (each.name for each in dataclasses.fields(Options))
    if options["distribute"]:
        options = {**options, "processes": distribute.WORKERS}
    given = {name: options[name] for name in names if name in options}
    given["replicas"] = dict(options.get("replicas", ()))
    if given.get("max_lag") is not None and not given["replicas"]:
        raise RotationRefused(NO_REPLICA)
    return Options(**given)


def enlist_of(options: dict[str, Any]) -> Enlist:
    """Return who works on the shards. Raises `ConfigurationError` if that is not installed."""
    if options["distribute"]:
        return distribute.to(options["distribute"])
    return processes if options["processes"] > 1 else sweeps.here


def _plain(row: BadRow) -> dict[str, str]:
    return {"table": row.column, "pk": str(row.pk), "reason": row.reason}


def one_way(mode: str) -> str:
    """Return a warning about a mode that cannot be left, "" of all others."""
    return ONE_WAY.format(mode=mode) if modes.by_name(mode).core == "mac" else ""


def positive_int(text: str) -> int:
    """Read a number from the command line."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _positive_float(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError("must be above 0")
    return number


def _replica(text: str) -> tuple[str, str]:
    database, _, alias = text.rpartition("=")
    for name in (database or DEFAULT_DB_ALIAS, alias):
        if name not in connections:
            raise argparse.ArgumentTypeError(f"DATABASES has no {name!r}")
    return database or DEFAULT_DB_ALIAS, alias


def seconds(text: str) -> float:
    """Return an argument in seconds. Raises argparse's error."""
    if not 0 <= (number := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError("must be 0 or more seconds")
    return number


def _formatter(base: Any) -> Any:
    """Return Django's help formatter, but one that leaves the epilog's lines as they are."""
    return type(base.__name__, (base, argparse.RawDescriptionHelpFormatter), {})
