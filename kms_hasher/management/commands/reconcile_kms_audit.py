from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
from typing import Any, NoReturn

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.core.serializers.json import DjangoJSONEncoder
from django.db import DatabaseError

from kms_hasher.audit import alarms, findings, holders
from kms_hasher.audit.reconcile import KINDS, Report, reconcile
from kms_hasher.exceptions import KMSHasherError
from kms_hasher.fields import printable
from kms_hasher.management.commands._walk import _formatter
from kms_hasher.models import AuditFinding, in_english

#: Exit statuses, besides 0 and 2, argparse's own.
FAILED, FOUND = 1, 3

#: How many findings `--json` names; the admin has all.
NAMED = 1000

EPILOG = """\
Examples:
  aws s3 sync s3://TRAIL/AWSLogs/ /var/lib/cloudtrail/ && %(prog)s /var/lib/cloudtrail
  %(prog)s --lookup           ask CloudTrail itself: two requests, 100 calls a second
  %(prog)s --finding 7        list all accounts that a finding is about
  %(prog)s --since 2026-11-01 --until 2026-11-02 /var/lib/cloudtrail

What was compared before is passed over. Findings are rows in the admin, and stay open until
somebody acknowledges them. Exit status: 0 no open finding, 1 refused, failed or not all could
be read, 3 there are open findings, or some were found now. --finding: 0 listed, 1 refused or
failed.
"""

OPEN = "Open findings: {number}."
FOUND_NOW = "Calls and events found now: {number}, though no finding is open: see the admin."
NOT_READ = "Not all could be read or compared; problems: {number}."
ALONE = "--finding lists the accounts of one finding, and takes nothing but --json."
NO_FINDING = "There is no finding {pk}."
DATABASE_FAILED = "The database failed ({error}). Run it again."


class Command(BaseCommand):
    help = (
        "Compare CloudTrail with the audit: find the calls on this site's keys that this "
        "application never made, and the events that CloudTrail lacks."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.formatter_class = _formatter(parser.formatter_class)
        parser.epilog = EPILOG
        parser.add_argument(
            "paths",
            nargs="*",
            metavar="PATH",
            help="Folder or file of CloudTrail, .json or .json.gz, as S3 lays them out.",
        )
        parser.add_argument(
            "--lookup",
            action="store_true",
            help="Ask CloudTrail's LookupEvents, through the provider: for the last 90 days at "
            "the most, and some minutes late.",
        )
        parser.add_argument(
            "--since",
            type=_time,
            metavar="TIME",
            help="Judge what is of this time or later (ISO 8601, UTC where no zone is given), "
            "whether it was compared before or not; remember nothing.",
        )
        parser.add_argument(
            "--until", type=_time, metavar="TIME", help="The same for the end of the time."
        )
        parser.add_argument(
            "--finding",
            type=int,
            metavar="ID",
            help="Compare nothing: list all accounts that this finding is about, one a line, "
            "as column and primary key; those of a data key are looked for now.",
        )
        parser.add_argument(
            "--json", action="store_true", help="Write one JSON object instead of text."
        )

    def handle(self, **options: Any) -> None:
        if options["finding"] is not None:
            self._list(options)
            return
        names = ("paths", "lookup", "since", "until")
        try:
            report = reconcile(**{name: options[name] for name in names})
            alarms.mail()
            found = findings.open_findings(*KINDS)
            number, listed = found.count(), list(found[:NAMED])
        except KMSHasherError as error:
            self._fail(str(error), options["json"])
        except DatabaseError as error:
            # Only its kind: what the database says may quote a row.
            self._fail(DATABASE_FAILED.format(error=type(error).__name__), options["json"])
        # The rows are what whoever owns the database makes of them.
        new = report.new + report.new_missing
        if options["json"]:
            told = {
                "ok": not (number or new or report.errors),
                **dataclasses.asdict(report),
                "open": number,
                "findings": [findings.as_json(each) for each in listed],
            }
            self.stdout.write(json.dumps(told, indent=2, cls=DjangoJSONEncoder))
        else:
            self._show(report, listed)
        if number:
            raise CommandError(OPEN.format(number=number), returncode=FOUND)
        if new:
            raise CommandError(FOUND_NOW.format(number=new), returncode=FOUND)
        if report.errors:
            raise CommandError(NOT_READ.format(number=len(report.errors)), returncode=FAILED)

    def _list(self, options: dict[str, Any]) -> None:
        others = ("paths", "lookup", "since", "until")
        if any(options[name] for name in others):
            self._fail(ALONE, options["json"])
        pk = options["finding"]
        try:
            finding = AuditFinding.objects.filter(pk=pk).first()
            if finding is None:
                self._fail(NO_FINDING.format(pk=pk), options["json"])
            names = holders.names(finding)
            if options["json"]:
                told = {"ok": True, "finding": pk, "accounts": list(names)}
                self.stdout.write(json.dumps(told, indent=2))
            else:
                for name in names:
                    self.stdout.write(printable(name))
        except KMSHasherError as error:
            self._fail(str(error), options["json"])
        except DatabaseError as error:
            self._fail(DATABASE_FAILED.format(error=type(error).__name__), options["json"])

    def _fail(self, text: str, to_json: bool) -> NoReturn:
        if to_json:
            self.stdout.write(json.dumps({"ok": False, "errors": [text]}, indent=2))
        raise CommandError(text, returncode=FAILED) from None

    def _show(self, report: Report, listed: list[Any]) -> None:
        write = self.stdout.write
        write(
            f"{report.files:,} files read, {report.passed_over:,} passed over; "
            f"{report.records:,} records, {report.duplicates:,} of them twice"
        )
        write(f"{report.calls:,} calls on this site's keys, {report.events:,} events here")
        for name, text in _TEXTS.items():
            if number := getattr(report, name):
                write(f"  {number:>12,}  {text}")
        for region, until in report.until.items():
            write(f"Events in {region} were looked for up to {until:%Y-%m-%d %H:%M} UTC.")
        for error in report.errors:
            write(self.style.WARNING(f"Problem: {error}"))
        for finding in listed:
            write(
                self.style.ERROR(
                    f"Finding {finding.pk}: {in_english(finding)} ({finding.count:,} times)"
                )
            )


_TEXTS = {
    "matched": "matched by request id",
    "attempts": "matched by operation, key, sub and time: attempts without an answer",
    "unknown": "made by nobody here",
    "new": "of them not known before",
    "holders": "stored passwords that these were about",
    "foreign": "with the encryption context of something else",
    "looks": "that only read metadata, and not from here",
    "by_aws": "made by AWS itself",
    "waiting": "too fresh, or too late, to be judged",
    "early": "older than the audit",
    "missing": "events that CloudTrail lacks",
    "new_missing": "of them not known before",
    "explained": "found before and explained since",
}


def _time(text: str) -> datetime.datetime:
    try:
        time = datetime.datetime.fromisoformat(text.removesuffix("Z"))
    except ValueError:
        raise argparse.ArgumentTypeError("must be a time as in 2026-11-25T13:00") from None
    return time if time.tzinfo else time.replace(tzinfo=datetime.timezone.utc)
