from __future__ import annotations

import argparse
import datetime
import json
import re
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.core.serializers.json import DjangoJSONEncoder
from django.db import DatabaseError
from django.utils import timezone

from kms_hasher.audit import retention
from kms_hasher.audit.retention import Prunable
from kms_hasher.exceptions import KMSHasherError
from kms_hasher.management.commands.reconcile_kms_audit import DATABASE_FAILED

EPILOG = """\
Examples, of which the second is for cron:
  %(prog)s --older-than 400d --dry-run
  %(prog)s --older-than 400d

Figures by hour, on which the charts stand, stay for good; so do seals. Where the audit is
sealed, whole segments go, once all of their events are old enough. Each batch is a
transaction of its own: run it beside logins, end it at any moment, run it again. Exit
status: 0 done, 1 refused or failed, or events were kept that no seal covers.
"""

UNSEALED = (
    "Kept {number:,} events that are old enough, but that no seal covers yet. Run "
    "seal_kms_audit first, or give --force."
)


def days(text: str) -> datetime.timedelta:
    """Read a number of days, as in "400d" or "400"; at least one."""
    match = re.fullmatch(r"([1-9]\d{0,4})d?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of days, such as 400d")
    return datetime.timedelta(days=int(match[1]))


class Command(BaseCommand):
    help = "Delete old events of the audit, and bring the figures by hour into fewer rows."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.epilog = EPILOG
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.add_argument(
            "--older-than",
            type=days,
            required=True,
            metavar="DAYS",
            help="Events older than that are deleted, such as 400d.",
        )
        parser.add_argument(
            "--batch-size",
            type=int,
            default=retention.BATCH,
            help="Events deleted by one statement (default: %(default)s).",
        )
        parser.add_argument("--dry-run", action="store_true", help="Delete nothing.")
        parser.add_argument(
            "--force", action="store_true", help="Delete events that no seal covers as well."
        )
        parser.add_argument(
            "--json", action="store_true", help="Write one JSON object at the end."
        )

    def handle(self, **options: Any) -> None:
        if options["batch_size"] < 1:
            raise CommandError("--batch-size must be at least 1.")
        cutoff = timezone.now() - options["older_than"]
        try:
            what = retention.prunable(cutoff, force=options["force"])
            result = {
                "dry_run": options["dry_run"],
                "before": cutoff,
                "events": what.number,
                "up_to_seal": what.seal.sequence if what.seal else None,
                "kept_unsealed": what.kept,
                "merged": 0,
            }
            if not options["dry_run"]:
                result |= self._prune(what, result["events"], options["batch_size"])
        except KMSHasherError as error:
            raise CommandError(str(error)) from None
        except DatabaseError as error:
            # Only its kind: what the database says may quote a row.
            raise CommandError(DATABASE_FAILED.format(error=type(error).__name__)) from None
        if options["json"]:
            self.stdout.write(json.dumps(result, indent=2, cls=DjangoJSONEncoder))
        else:
            done = "Would delete" if options["dry_run"] else "Deleted"
            self.stdout.write(f"{done} {result['events']:,} events before {cutoff:%Y-%m-%d}.")
            if what.seal:
                self.stdout.write(f"Sealed ones go up to seal {what.seal.sequence}.")
            if result["merged"]:
                self.stdout.write(f"Merged {result['merged']:,} rows of figures into others.")
        if what.kept:
            raise CommandError(UNSEALED.format(number=what.kept))

    def _prune(self, what: Prunable, total: int, batch: int) -> dict[str, int]:
        deleted = 0
        for number in retention.prune(what, batch):
            deleted += number
            self.stderr.write(f"{deleted:,} of {total:,} events deleted")
        return {"events": deleted, "merged": retention.merge()}
