from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Generator
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from kms_hasher.audit import verification
from kms_hasher.audit.verification import Progress
from kms_hasher.audit.verification_report import UNREADABLE_AS, Report
from kms_hasher.exceptions import KMSHasherError
from kms_hasher.management.commands._walk import LOG_EVERY, duration
from kms_hasher.management.commands.seal_kms_audit import as_json
from kms_hasher.models import AuditSeal

#: Exit statuses, besides 0 and 2, argparse's own.
FAILED, FOUND = 1, 3

GOOD = "The audit is as it was sealed: {events:,} events up to segment {last}.{pruned}"
PRUNED = " Those up to segment {pruned} were pruned."
UNSEALED = "Not sealed yet: {number:,} events."
BAD = "The audit is not as it was sealed; findings: {number:,}."
UNASKED = "KMS could not be asked, and so vouches for nothing now: {error}"
DATABASE_FAILED = "The database failed ({error}); not all was looked at."

#: Characters that a seal takes in JSON at the most.
LENGTH = 1_000

_EXPECTED = re.compile(r"([0-9]+):([0-9a-fA-F]{64})")


class Command(BaseCommand):
    help = (
        "Check that no sealed event of the audit was changed, deleted or inserted, and that "
        "sealing goes on. Exit status: 0 all is well, 1 it could not be checked (KMS or the "
        "database is out), 3 something was found."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--from",
            type=int,
            default=1,
            dest="since",
            metavar="SEQUENCE",
            help="Read the events of this segment and later ones only. The chain of seals is "
            "checked from the first on in any case.",
        )
        parser.add_argument(
            "--all-anchors",
            action="store_true",
            help="Ask KMS for each seal, one or two calls a time, and not for the newest "
            "alone, which vouches for all before it: tells since when the chain is forged.",
        )
        parser.add_argument(
            "--expect",
            type=_expected,
            action="append",
            default=[],
            metavar="SEQUENCE:DIGEST",
            help="A seal as seal_kms_audit printed it and you kept it elsewhere, or as its "
            "encryption context in CloudTrail says (seal, or root). May be given more than "
            "once.",
        )
        parser.add_argument(
            "--json", action="store_true", help="Write one JSON object instead of text."
        )

    def handle(self, **options: Any) -> None:
        report, error = Report(), ""
        try:
            report = self._run(
                verification.verify(
                    since=options["since"],
                    all_anchors=options["all_anchors"],
                    expected=options["expect"],
                )
            )
        except KMSHasherError as failed:
            error = str(failed)
        if report.unasked:
            error = UNASKED.format(error=report.unasked)
        if report.failed:
            # Only its kind: what the database says may quote a row.
            error = DATABASE_FAILED.format(error=type(report.failed).__name__)
        number = report.numbers.total()
        if options["json"]:
            self.stdout.write(json.dumps(_as_json(report, error), indent=2))
        else:
            self._show(report, error)
        if number:
            text = BAD.format(number=number)
            raise CommandError(f"{text} {error}".strip(), returncode=FOUND)
        if error:
            raise CommandError(error, returncode=FAILED)

    def _run(self, steps: Generator[Progress, None, Report]) -> Report:
        """Run the steps to their end; tell now and then how far they are."""
        last = time.monotonic()
        while True:
            try:
                progress = next(steps)
            except StopIteration as stop:
                report: Report = stop.value
                return report
            if time.monotonic() - last >= LOG_EVERY:
                last = time.monotonic()
                self.stderr.write(_line(progress), lambda plain: plain)

    def _show(self, report: Report, error: str) -> None:
        for each in report.findings:
            self.stdout.write(self.style.ERROR(each.text))
        if report.numbers.total() > len(report.findings):
            self.stdout.write(f"… {dict(report.numbers)} in all.")
        if report.last and not report.findings and not error:
            pruned = PRUNED.format(pruned=report.pruned) if report.pruned else ""
            self.stdout.write(
                GOOD.format(events=report.events, last=report.last.sequence, pruned=pruned)
            )
        if report.unsealed:
            self.stdout.write(UNSEALED.format(number=report.unsealed))


def _line(progress: Progress) -> str:
    share = progress.sequence / progress.last
    left = progress.seconds / share - progress.seconds if share else 0
    return (
        f"segment {progress.sequence:,} of {progress.last:,}, {progress.events:,} events, "
        f"{duration(left)} left"
    )


def _as_json(report: Report, error: str) -> dict[str, Any]:
    return {
        "ok": not error and not report.numbers,
        "error": error,
        "findings": [each._asdict() for each in report.findings],
        "numbers": dict(report.numbers),
        "events": report.events,
        "unsealed": report.unsealed,
        "pruned": report.pruned,
        "last": _last(report.last) if report.last else None,
    }


def _last(seal: AuditSeal) -> dict[str, Any] | None:
    """Return what there is to keep of a seal, None if it holds what was never written."""
    try:
        told = as_json(seal)
        return told if len(json.dumps(told)) <= LENGTH else None
    except UNREADABLE_AS:
        return None


def _expected(text: str) -> tuple[int, str]:
    match = _EXPECTED.fullmatch(text)
    if not match:
        raise argparse.ArgumentTypeError(
            "must be SEQUENCE:DIGEST, as seal_kms_audit printed it"
        )
    return int(match[1]), match[2]
