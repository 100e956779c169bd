from __future__ import annotations

import json
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.core.serializers.json import DjangoJSONEncoder
from django.db import DatabaseError

from kms_hasher.audit import alarms, findings
from kms_hasher.exceptions import KMSHasherError
from kms_hasher.management.commands.reconcile_kms_audit import (
    DATABASE_FAILED,
    FAILED,
    FOUND,
    NAMED,
    OPEN,
)
from kms_hasher.models import in_english

CHECKS_FAILED = "Checks that failed, see the log: {number}."


class Command(BaseCommand):
    help = (
        "Look at the events of the last hour for what a person should see, and mail open "
        "findings if AUDIT_MAIL_ADMINS is set. For cron. Exit status: 0 no open finding, "
        "1 a check or all of it failed, 3 there are open findings."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--hours",
            type=float,
            default=1.0,
            metavar="N",
            help="How far to look back; more than the time between two runs (default: 1).",
        )
        parser.add_argument(
            "--json", action="store_true", help="Write one JSON object instead of text."
        )

    def handle(self, **options: Any) -> None:
        try:
            _, failed = alarms.run_checks(options["hours"])
            mailed = alarms.mail()
            found = findings.open_findings()
            number, listed = found.count(), list(found[:NAMED])
        except KMSHasherError as error:
            raise CommandError(str(error), returncode=FAILED) from None
        except DatabaseError as error:
            # Only its kind: what the database says may quote a row.
            text = DATABASE_FAILED.format(error=type(error).__name__)
            raise CommandError(text, returncode=FAILED) from None
        if options["json"]:
            told = {
                "ok": not (number or failed),
                "failed": failed,
                "open": number,
                "mailed": mailed,
                "findings": [findings.as_json(each) for each in listed],
            }
            self.stdout.write(json.dumps(told, indent=2, cls=DjangoJSONEncoder))
        else:
            for finding in listed:
                text = f"Finding {finding.pk}: {in_english(finding)} ({finding.count:,} times)"
                self.stdout.write(self.style.ERROR(text))
        if failed:
            # In the first place: nobody knows what it would have found.
            raise CommandError(CHECKS_FAILED.format(number=len(failed)), returncode=FAILED)
        if number:
            raise CommandError(OPEN.format(number=number), returncode=FOUND)
