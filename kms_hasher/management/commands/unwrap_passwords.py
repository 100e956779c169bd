from __future__ import annotations

from typing import Any

from django.core.management.base import CommandParser

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
Before: put Django's Argon2PasswordHasher first in PASSWORD_HASHERS, keep the sealing
hashers behind it, list Django's own of each, and restart the site. Passwords in the modes
"mac" and "mac_in_direct" cannot be unwrapped: their users set new ones. Exit status: 0 done,
1 refused or failed, 3 done but for bad rows.
"""

WARNING = (
    "This takes the seal off {number:,} passwords: from then on whoever steals the database "
    "can try to crack them."
)
PHRASE = "unwrap {number} passwords"


class Command(WalkCommand):
    help = "Turn sealed passwords back into the hashes of Django's hashers that they were."

    def add_arguments(self, parser: CommandParser) -> None:
        super().add_arguments(parser)
        parser.epilog = EPILOG
        parser.add_argument(
            "--confirm",
            default="",
            metavar="PHRASE",
            help='For scripts: the phrase that is asked for, "unwrap N passwords".',
        )

    def work(self, **options: Any) -> None:
        seal.check_unwrap()
        number = seal.count_sealed()
        self.result.update(kind="unwrap", rows=number)
        if options["dry_run"]:
            self.result["calls"] = number
            self.tell(f"Would unwrap up to {number:,} passwords, by as many calls of Decrypt.")
            return
        if number:
            self._confirm(PHRASE.format(number=number), number, options["confirm"])
        self.walk(seal.unwrap(options_of(options), enlist=enlist_of(options)))
        done = self.result
        self.tell(
            f"Unwrapped {done['rewritten']:,} passwords in {duration(done['seconds'])}: "
            f"{done['calls']:,} calls of Decrypt, {done['overtaken']:,} overtaken, "
            f"{done['failed']:,} bad."
        )

    def _confirm(self, phrase: str, number: int, given: str) -> None:
        if not given:
            self.tell(WARNING.format(number=number))
            given = self.ask(f'Type "{phrase}" to go on: ')
        if given.strip() != phrase:
            raise RotationRefused(NOT_CONFIRMED)
