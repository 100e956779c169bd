from __future__ import annotations

from typing import Any

from django.core.management.base import CommandParser

from kms_hasher import conf
from kms_hasher.exceptions import RotationRefused
from kms_hasher.management.commands._walk import (
    NOT_CONFIRMED,
    WalkCommand,
    duration,
    enlist_of,
    options_of,
)
from kms_hasher.rotation import seal

EPILOG = """\
Examples:
  %(prog)s --dry-run     how many there are
  %(prog)s --rate 500    leave the rest of the KMS quota to logins

Sessions that were opened or visited since the app was installed live on. Hashes that cannot
be sealed as they are, are sealed when their user next logs in. Exit status: 0 done, 1 refused
or failed, 3 done but for bad rows.
"""

QUESTION = (
    "Seal {number:,} passwords with {key}? From then on they can be checked with that key "
    "alone. [y/N] "
)


class Command(WalkCommand):
    help = (
        "Seal the stored hashes of Django's hashers in place, without any password: Argon2, "
        "PBKDF2, scrypt, bcrypt and MD5, each if PASSWORD_HASHERS lists what seals it."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        super().add_arguments(parser)
        parser.epilog = EPILOG
        parser.add_argument(
            "--noinput",
            "--no-input",
            action="store_false",
            dest="interactive",
            help="Ask nothing.",
        )

    def work(self, **options: Any) -> None:
        for warning in seal.check_wrap():
            self.stderr.write(warning)
        number, key = seal.count_stock(), conf.get().key
        self.result.update(kind="wrap", key=key, rows=number)
        if options["dry_run"]:
            self.result["calls"] = number
            self.tell(f"Would seal up to {number:,} passwords with {key}.")
            return
        if options["interactive"] and number:
            answer = self.ask(QUESTION.format(number=number, key=key))
            if answer.strip().lower() not in ("y", "yes"):
                raise RotationRefused(NOT_CONFIRMED)
        self.walk(seal.wrap(options_of(options), enlist=enlist_of(options)))
        done = self.result
        self.tell(
            f"Sealed {done['rewritten']:,} passwords in {duration(done['seconds'])}: "
            f"{done['calls']:,} calls, {done['overtaken']:,} overtaken, "
            f"{done['failed']:,} bad."
        )
