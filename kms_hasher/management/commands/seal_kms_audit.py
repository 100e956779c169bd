from __future__ import annotations

import argparse
import json
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import DatabaseError

from kms_hasher.audit import canonical, horizon, seals
from kms_hasher.exceptions import KMSHasherError
from kms_hasher.management.commands._walk import seconds
from kms_hasher.models import AuditSeal

SEALED = (
    "Sealed {sequence}: {count:,} events up to {last_id}, root {root}. Keep this where nobody "
    "who owns the database can change it: {sequence}:{digest}"
)
NOTHING = "There is nothing to seal yet."
DATABASE_FAILED = "The database failed ({error}). Run it again to go on."


class Command(BaseCommand):
    help = (
        "Seal the events of the audit that are not sealed yet, so that verify_kms_audit finds "
        "what is changed, deleted or inserted afterwards. To be run by cron. Exit status: "
        "0 done or nothing to do, 1 refused or failed."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--every",
            type=_at_least_one,
            default=1,
            metavar="N",
            help="Do nothing while fewer events wait, unless half of AUDIT_SEAL_HOURS has "
            "passed since the last seal (default: %(default)s).",
        )
        parser.add_argument(
            "--admit",
            type=int,
            action="append",
            default=[],
            metavar="ID",
            help="Seal this event too, which came in after its segment was sealed: one that "
            'verify_kms_audit calls "inserted" and that you know. May be given more than once.',
        )
        parser.add_argument(
            "--unchecked",
            action="store_true",
            help="Build on the newest seal even if KMS does not vouch for it: after tampering "
            "was found and looked into, or when its key is gone.",
        )
        parser.add_argument(
            "--settle",
            type=seconds,
            default=horizon.SETTLE,
            metavar="SECONDS",
            help="How long to let writers come to an end, on MySQL and MariaDB; more for a "
            "cluster (default: %(default)s).",
        )
        parser.add_argument(
            "--patience",
            type=seconds,
            default=horizon.PATIENCE,
            metavar="SECONDS",
            help="How long to wait for open transactions that have written to the audit, on "
            "PostgreSQL (default: %(default)s).",
        )
        parser.add_argument(
            "--json", action="store_true", help="Write one JSON object instead of text."
        )

    def handle(self, **options: Any) -> None:
        made: list[dict[str, Any]] = []
        error = ""
        try:
            for seal in seals.seal(
                every=options["every"],
                admit=options["admit"],
                unchecked=options["unchecked"],
                settle=options["settle"],
                patience=options["patience"],
            ):
                made.append(as_json(seal))
                if not options["json"]:
                    self.stdout.write(SEALED.format(**made[-1]))
        except KMSHasherError as failed:
            error = str(failed)
        except DatabaseError as failed:
            # Only its kind: what the database says may quote a row.
            error = DATABASE_FAILED.format(error=type(failed).__name__)
        if options["json"]:
            result = {"ok": not error, "error": error, "seals": made}
            self.stdout.write(json.dumps(result, indent=2))
        elif not made and not error:
            self.stdout.write(NOTHING)
        if error:
            raise CommandError(error)


def as_json(seal: AuditSeal) -> dict[str, Any]:
    """Return what there is to keep of a seal."""
    return {
        "sequence": seal.sequence,
        "count": seal.count,
        "last_id": seal.last_id,
        "root": seal.root,
        "digest": canonical.seal_digest(seal).hex(),
        "sealed_at": seal.sealed_at.isoformat(),
    }


def _at_least_one(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number
