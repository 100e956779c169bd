"""
A month of made-up audit, for pages to be looked at: roll-ups, and events of the last hours.

`python -m tests.projects.sample_audit` fills the empty database that DATABASE_URL names, with
a superuser "admin" and a password of the same name; `manage.py runserver` of the test settings
(DJANGO_SETTINGS_MODULE=tests.settings, DEBUG=1) then shows it.
"""

from __future__ import annotations

import datetime
import math
import random
import uuid
from typing import Any

import django

REGION = "eu-central-1"
ARN = f"arn:aws:kms:{REGION}:111122223333:key/{{}}"
DAYS = 30
HOUR = datetime.timedelta(hours=1)

#: Operation, purpose, calls in the busiest hour, median of their latency in µs.
KINDS = (
    ("Decrypt", "login", 900, 9_000),
    ("Encrypt", "set", 40, 11_000),
    ("DescribeKey", "status", 2, 15_000),
)


def fill(seed: int = 1) -> None:
    """Make all of it. What depends on time ends now."""
    from django.utils import timezone

    from kms_hasher import history
    from kms_hasher.models import RotationRun

    chance = random.Random(seed)
    now = timezone.now()
    keys = [
        history.record_key(ARN.format(uuid.UUID(int=chance.getrandbits(128), version=4)), now)
        for _ in range(2)
    ]
    history.record_alias("alias/passwords", keys[1], now, moved=True)
    moments = [now - 19 * 24 * HOUR, now - 5 * HOUR]
    kinds = (RotationRun.Kind.NEW_KEY, RotationRun.Kind.REWRAP)
    for moment, kind in zip(moments, kinds, strict=True):
        RotationRun.objects.create(
            kind=kind,
            state=RotationRun.State.FINISHED,
            previous_key=keys[0],
            key=keys[1],
            started_at=moment,
            updated_at=moment + HOUR / 2,
            finished_at=moment + HOUR / 2,
            total=48_210,
            rewritten=48_204,
            overtaken=6,
            calls=48_231,
        )
    _hours(chance, [key.ref for key in keys], now, moments)
    _events(chance, keys[1].ref, now)
    _audit(chance, keys[0].ref, now)


def _hours(
    chance: random.Random,
    refs: list[str],
    now: datetime.datetime,
    rotations: list[datetime.datetime],
) -> None:
    from kms_hasher.audit import rollups
    from kms_hasher.models import AuditHour

    rows: dict[tuple[Any, ...], int] = {}
    last = rollups.hour_of(now)
    for back in range(DAYS * 24):
        hour = last - back * HOUR
        wave = 0.25 + 0.75 * max(0.0, math.sin((hour.hour - 5) / 24 * 2 * math.pi))
        out = back in (9, 250)  # KMS could not answer for a while
        kinds = [(*kind, wave) for kind in KINDS]
        if any(hour <= at < hour + HOUR for at in rotations):
            kinds.append(("ReEncrypt", "rotate", 2_000, 14_000, 1.0))
        for operation, purpose, most, median, part in kinds:
            for _ in range(max(1, round(most * part * chance.uniform(0.8, 1.1)) // 4)):
                outcome, slow = "success", chance.lognormvariate(0, 0.35)
                if out and chance.random() < 0.3:
                    outcome, slow = "unavailable", 60
                elif chance.random() < 0.0006:
                    outcome = chance.choice(["invalid", "denied", "unusable"])
                ref = refs[hour >= rotations[0] and chance.random() < 0.97]
                bucket = rollups.bucket_of(operation, round(median * slow))
                row = (hour, ref, operation, purpose, outcome, bucket)
                rows[row] = rows.get(row, 0) + 4
    AuditHour.objects.bulk_create(
        [
            AuditHour(
                hour=hour,
                key_ref=ref,
                operation=operation,
                purpose=purpose,
                outcome=outcome,
                bucket=bucket,
                slot=0,
                count=count,
            )
            for (hour, ref, operation, purpose, outcome, bucket), count in rows.items()
        ],
        batch_size=500,
    )


def _events(chance: random.Random, ref: str, now: datetime.datetime) -> None:
    from kms_hasher.models import AuditEvent

    AuditEvent.objects.bulk_create(
        AuditEvent(
            time=now - datetime.timedelta(seconds=50 * back),
            operation="Encrypt" if back % 20 == 0 else "Decrypt",
            purpose="set" if back % 20 == 0 else "login",
            outcome="denied" if back % 190 == 7 else "success",
            error_code="AccessDeniedException" if back % 190 == 7 else "",
            key_ref=ref,
            requested_key="alias/passwords",
            latency_us=round(9_000 * chance.lognormvariate(0, 0.35)),
            request_ids=str(uuid.UUID(int=chance.getrandbits(128), version=4)),
            sub=f"{chance.getrandbits(128):032x}",
        )
        for back in range(1_000, -1, -1)
    )


def _audit(chance: random.Random, ref: str, now: datetime.datetime) -> None:
    """Make seals, findings and a mark of the reconciliation."""
    from kms_hasher.models import AuditEvent, AuditFinding, AuditSeal, TrailMark

    first, last = (AuditEvent.objects.order_by(order)[0].pk for order in ("pk", "-pk"))
    bounds = [first - 1, first + 499, last - 120]
    for at in (1, 2):
        AuditSeal.objects.create(
            sequence=at,
            version=1,
            sealed_at=now - (3 - at) * HOUR * 1.5,
            after_id=bounds[at - 1],
            last_id=bounds[at],
            count=bounds[at] - bounds[at - 1],
            root=f"{chance.getrandbits(256):064x}",
            previous=f"{chance.getrandbits(256):064x}",
            anchors={"mac_key": ref, "mac": "00", "context_key": ref, "ciphertext": "AA=="},
            leaves=b"",
        )
    kinds = AuditFinding.Kind
    for kind, severity, subject, count, hours in (
        (kinds.UNKNOWN_CALL, "critical", "Decrypt by an unknown role from 203.0.113.7", 3, 2),
        (kinds.RATE, "warning", "2,140 Decrypts in a minute, where 60 are usual", 1, 5),
        (kinds.TAMPERED, "warning", "6 stored passwords were altered or moved", 6, 30),
    ):
        AuditFinding.objects.create(
            kind=kind,
            severity=severity,
            dedup_key=f"{chance.getrandbits(256):064x}",
            subject=subject,
            first_seen=now - hours * HOUR,
            last_seen=now - hours * HOUR / 2,
            count=count,
        )
    TrailMark.objects.create(region=REGION, until=now - HOUR / 3)


def main() -> None:
    from django.contrib.auth import get_user_model
    from django.core.management import call_command

    call_command("migrate", verbosity=0)
    get_user_model().objects.create_superuser("admin", "", "admin")
    fill()


if __name__ == "__main__":
    django.setup()
    main()
