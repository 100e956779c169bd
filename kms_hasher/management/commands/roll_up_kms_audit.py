from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand

from kms_hasher.audit import retention


class Command(BaseCommand):
    help = (
        "Count events that the figures by hour do not count: once, after an upgrade from a "
        "version that had none. Goes hour by hour; end it at any moment and run it again."
    )

    def handle(self, **options: Any) -> None:
        events = hours = 0
        for hour, number in retention.rebuild():
            events, hours = events + number, hours + 1
            self.stderr.write(f"{hour:%Y-%m-%d %H:%M}: {number:,} events")
        self.stdout.write(f"Counted {events:,} events of {hours:,} hours.")
