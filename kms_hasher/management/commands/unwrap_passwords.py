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
from kms_hasher.rotation import costs, seal

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
MACS = (
    "{number:,} passwords hold a MAC and cannot be unwrapped: they stay sealed until their "
    "users sign in, or set new ones."
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
        number, macs = seal.count_sealed(), seal.count_macs()
        self.result.update(kind="unwrap", rows=number, macs=macs)
        if options["dry_run"]:
            calls = seal.calls_of_unwrap()
            self.result.update(calls=calls.total(), operations=calls)
            self.tell(f"Would unwrap up to {number:,} passwords, by up to {costs.told(calls)}.")
            self._tell_of_macs(macs)
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
        self._tell_of_macs(macs)

    def _tell_of_macs(self, number: int) -> None:
        if number:
            self.tell(MACS.format(number=number))

    def _confirm(self, phrase: str, number: int, given: str) -> None:
        if not given:
            self.tell(WARNING.format(number=number))
            given = self.ask(f'Type "{phrase}" to go on: ')
        if given.strip() != phrase:
            raise RotationRefused(NOT_CONFIRMED)
