from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandError
from django.db import DatabaseError

from kms_hasher.audit import retention
from kms_hasher.management.commands.reconcile_kms_audit import DATABASE_FAILED


class Command(BaseCommand):
    help = (
        "Count events that the figures by hour do not count: once, after an upgrade from a "
        "version that had none. Goes hour by hour; end it at any moment and run it again."
    )

    def handle(self, **options: Any) -> None:
        events = hours = 0
        try:
            for hour, number in retention.rebuild():
                events, hours = events + number, hours + 1
                self.stderr.write(f"{hour:%Y-%m-%d %H:%M}: {number:,} events")
        except DatabaseError as error:
            # Only its kind: what the database says may quote a row.
            raise CommandError(DATABASE_FAILED.format(error=type(error).__name__)) from None
        self.stdout.write(f"Counted {events:,} events of {hours:,} hours.")
