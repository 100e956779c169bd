from __future__ import annotations

import argparse
import datetime
import json
import re
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.core.serializers.json import DjangoJSONEncoder
from django.utils import timezone

from kms_hasher.audit import retention

EPILOG = """\
Examples, of which the second is for cron:
  %(prog)s --older-than 400d --dry-run
  %(prog)s --older-than 400d

Figures by hour, on which the charts stand, stay for good; so do seals. Each batch is a
transaction of its own: run it beside logins, end it at any moment, run it again. Exit
status: 0 done, 1 refused or failed.
"""

UNSEALED = (
    "Kept {number:,} events since {since:%Y-%m-%d %H:%M:%S} that no seal covers yet. Seal them "
    "first, or give --force."
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
        wanted = timezone.now() - options["older_than"]
        cutoff = wanted if options["force"] else retention.prunable_before(wanted)
        number = retention.prunable(cutoff)
        kept = retention.prunable(wanted) - number if cutoff < wanted else 0
        result = {
            "dry_run": options["dry_run"],
            "before": cutoff,
            "events": number,
            "kept_unsealed": kept,
            "merged": 0,
        }
        if not options["dry_run"]:
            result |= self._prune(cutoff, number, options["batch_size"])
        if options["json"]:
            self.stdout.write(json.dumps(result, indent=2, cls=DjangoJSONEncoder))
        else:
            done = "Would delete" if options["dry_run"] else "Deleted"
            self.stdout.write(f"{done} {result['events']:,} events before {cutoff:%Y-%m-%d}.")
            if result["merged"]:
                self.stdout.write(f"Merged {result['merged']:,} rows of figures into others.")
        if kept:
            raise CommandError(UNSEALED.format(number=kept, since=cutoff))

    def _prune(self, cutoff: datetime.datetime, total: int, batch: int) -> dict[str, int]:
        deleted = 0
        for number in retention.prune(cutoff, batch):
            deleted += number
            self.stderr.write(f"{deleted:,} of {total:,} events deleted")
        return {"events": deleted, "merged": retention.merge()}
