"""
Findings: one row for one thing that a person should look at, however often it is found.
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from django.db.models import Q, QuerySet
from django.utils import timezone

from kms_hasher.models import AuditFinding

Kind, Severity = AuditFinding.Kind, AuditFinding.Severity

#: The worst last.
SEVERITIES = (Severity.WARNING, Severity.CRITICAL)

#: How far the clock of another process may be ahead. A later time is none of ours.
AHEAD = datetime.timedelta(minutes=5)


class Found(NamedTuple):
    """
    What was found.

    `about` tells it from others of its kind: what is found again is the same row. `number` is
    how often it was seen in all, as far as whoever found it can tell.
    """

    kind: AuditFinding.Kind
    severity: AuditFinding.Severity
    about: tuple[str, ...]
    subject: str
    first: datetime.datetime
    last: datetime.datetime
    number: int = 1
    key_ref: str = ""
    details: Mapping[str, Any] = {}

    @property
    def dedup_key(self) -> str:
        parts = "\x1f".join((str(self.kind.value), *self.about))
        return hashlib.sha256(parts.encode("utf-8", "replace")).hexdigest()


def record(found: Found, *, fresh: bool | None = None) -> tuple[AuditFinding, bool]:
    """
    Return the row of what was found, and whether it is news.

    It is if it is new, or was acknowledged or resolved and has been seen again: `fresh` says
    so, by default a later time does. Anybody can work out `dedup_key`, so of a row that was
    there before nothing counts that may hide what was found.
    """
    finding, made = AuditFinding.objects.get_or_create(
        dedup_key=found.dedup_key,
        defaults={
            "kind": found.kind,
            "severity": found.severity,
            "subject": found.subject,
            "key_ref": found.key_ref,
            "first_seen": found.first,
            "last_seen": found.last,
            "count": found.number,
            "details": dict(found.details),
        },
    )
    if made:
        return finding, True
    closed = finding.acknowledged_at or finding.resolved_at
    if fresh is None and closed is not None:
        fresh = found.last > closed or closed > timezone.now() + AHEAD
    reopened = (closed is not None and bool(fresh)) or finding.kind != found.kind
    finding.kind, finding.key_ref, finding.subject = found.kind, found.key_ref, found.subject
    known = [each for each in SEVERITIES if each == finding.severity]
    finding.severity = max([found.severity, *known], key=SEVERITIES.index)
    finding.first_seen = min(finding.first_seen, found.first)
    finding.last_seen = max(finding.last_seen, found.last)
    finding.count = max(finding.count, found.number)
    finding.details = {**finding.details, **found.details}
    if reopened:
        finding.acknowledged_at = finding.resolved_at = None
        finding.alarmed_at = finding.mailed_at = None
        finding.acknowledged_by = ""
    names = ["kind", "key_ref", "subject", "severity", "details"]
    names += ["first_seen", "last_seen", "count"]
    if reopened:
        names += ["acknowledged_at", "acknowledged_by", "resolved_at"]
        names += ["alarmed_at", "mailed_at"]
    finding.save(update_fields=names)
    return finding, reopened


def acknowledge(finding: AuditFinding, by: str) -> bool:
    """Note that somebody has seen it; return whether that is new."""
    return bool(
        AuditFinding.objects.filter(pk=finding.pk, acknowledged_at=None).update(
            acknowledged_at=timezone.now(), acknowledged_by=by[:255]
        )
    )


def open_findings(*kinds: AuditFinding.Kind) -> QuerySet[AuditFinding]:
    """Return what nobody has acknowledged and nothing has explained, of some kinds or all."""
    found = AuditFinding.objects.filter(acknowledged_at=None, resolved_at=None)
    return found.filter(kind__in=kinds) if kinds else found


def untold(name: str) -> Q:
    """Return the condition for findings that were never told of, as a field has it."""
    return Q(**{name: None}) | Q(**{f"{name}__gt": timezone.now() + AHEAD})


def as_json(finding: AuditFinding) -> dict[str, Any]:
    """Return a finding as the commands write it with `--json`."""
    return {
        "id": finding.pk,
        "kind": finding.kind,
        "severity": finding.severity,
        "subject": finding.subject,
        "key_ref": finding.key_ref,
        "first_seen": finding.first_seen,
        "last_seen": finding.last_seen,
        "count": finding.count,
        "details": finding.details,
    }
