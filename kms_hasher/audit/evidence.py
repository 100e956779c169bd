"""
The calls and events that findings of a comparison stand on: each is stored once.

A comparison may be run again over the same files: what is stored already is not counted anew,
and what is explained by something that came late ceases to count.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from django.db.models import Count, Max, Min
from django.utils import timezone

from kms_hasher.audit import findings, holders
from kms_hasher.audit.cloudtrail import Call
from kms_hasher.audit.findings import Found, Kind, Severity
from kms_hasher.audit.site import USES, key_ref, of_utc
from kms_hasher.audit.workspace import pages
from kms_hasher.models import AuditEvent, AuditEvidence, AuditFinding

#: Rows stored at a time.
PAGE = 500

#: How many addresses, agents and accounts a finding names; the evidence has them all.
NAMED = 20

#: Changes that destroy a key or give it away: as bad as a use.
WORST = frozenset(
    [
        "CreateAlias",
        "CreateGrant",
        "DeleteAlias",
        "DeleteImportedKeyMaterial",
        "DisableKey",
        "PutKeyPolicy",
        "ScheduleKeyDeletion",
        "UpdateAlias",
    ]
)

UNKNOWN = "{operation} by {caller}"
MISSING = "{operation} on {day:%Y-%m-%d}, which CloudTrail does not have"
NOBODY = "a caller whom CloudTrail does not name"


class _Group(NamedTuple):
    """What unknown calls have in common that are one finding."""

    operation: str
    role: str
    key: str
    refused: bool


class Unknown:
    """Calls that this application never made, stored in pages."""

    def __init__(self) -> None:
        self._calls: list[Call] = []
        self._new = 0
        self._found: set[int] = set()

    def add(self, call: Call) -> None:
        self._calls.append(call)
        if len(self._calls) == PAGE:
            self._flush()

    def store(self) -> tuple[list[int], int]:
        """Store what is left; return the findings, and how many calls were new."""
        self._flush()
        return sorted(self._found), self._new

    def _flush(self) -> None:
        known = _known(call.event_id for call in self._calls)
        groups: dict[_Group, list[Call]] = defaultdict(list)
        for call in self._calls:
            if call.event_id[:255] not in known:
                groups[_group(call)].append(call)
        for group, among in groups.items():
            self._new += len(among)
            finding, _ = findings.record(_unknown(group, among), fresh=True)
            self._found.add(finding.pk)
            AuditEvidence.objects.bulk_create(
                [_of_call(finding, call) for call in among], ignore_conflicts=True
            )
        self._calls = []


class Missing:
    """Events that CloudTrail lacks, stored in pages."""

    def __init__(self) -> None:
        self._events: list[AuditEvent] = []
        self._number = self._new = 0
        self._found: set[int] = set()

    def add(self, event: AuditEvent) -> None:
        self._number += 1
        self._events.append(event)
        if len(self._events) == PAGE:
            self._flush()

    def store(self) -> tuple[list[int], int, int]:
        """Store what is left; return the findings, how many were new, and how many in all."""
        self._flush()
        return sorted(self._found), self._new, self._number

    def _flush(self) -> None:
        known = _known(_reference(event.pk) for event in self._events)
        groups: dict[tuple[str, str, str], list[AuditEvent]] = defaultdict(list)
        for event in self._events:
            if _reference(event.pk) not in known:
                day = event.time.date().isoformat()
                groups[(event.operation, event.key_ref, day)].append(event)
        for (operation, ref, day), among in groups.items():
            self._new += len(among)
            times = [event.time for event in among]
            found = Found(
                Kind.NOT_IN_TRAIL,
                Severity.WARNING,
                (operation, ref, day),
                MISSING.format(operation=operation, day=times[0]),
                min(times),
                max(times),
                key_ref=ref,
            )
            finding, _ = findings.record(found, fresh=True)
            self._found.add(finding.pk)
            AuditEvidence.objects.bulk_create(
                [_of_event(finding, event) for event in among], ignore_conflicts=True
            )
        self._events = []


def explain(references: Iterable[str]) -> int:
    """Note that what was found is explained by now; return how many there were."""
    number = 0
    for page in pages(reference[:255] for reference in references):
        rows = AuditEvidence.objects.filter(reference__in=page, explained_at=None)
        touched = set(rows.values_list("finding", flat=True))
        if touched:
            number += rows.update(explained_at=timezone.now())
            describe(sorted(touched))
    return number


def explain_events(pks: Iterable[int]) -> int:
    """Do the same for events that were not in CloudTrail when it was looked at before."""
    return explain(map(_reference, pks))


def unfinished(kinds: Sequence[AuditFinding.Kind]) -> list[int]:
    """Return open findings that a run which died has not told of, or not to its end."""
    rows = findings.open_findings(*kinds)
    not_asked = AuditEvidence.objects.filter(holder=None, finding__in=rows).exclude(sub="")
    untold = rows.filter(findings.untold("alarmed_at")).values_list("pk", flat=True)
    return sorted({*untold, *not_asked.values_list("finding", flat=True)})


def describe(found: Sequence[int]) -> None:
    """Bring count, times and details of findings up to their evidence."""
    for finding in AuditFinding.objects.filter(pk__in=set(found)):
        rows = finding.evidence.filter(explained_at=None).order_by()
        sums = rows.aggregate(n=Count("pk"), first=Min("time"), last=Max("time"))
        finding.count = sums["n"]
        if sums["n"]:
            finding.first_seen, finding.last_seen = sums["first"], sums["last"]
        elif finding.resolved_at is None:
            finding.resolved_at = timezone.now()
        if finding.kind != Kind.NOT_IN_TRAIL:
            finding.details = {
                "source_ips": _most(rows, "source_ip"),
                "user_agents": _most(rows, "user_agent"),
                "callers": _most(rows, "caller"),
                "error_codes": _most(rows, "error_code"),
                "stored_passwords": holders.number(finding),
                "accounts": _accounts(rows),
            }
        finding.save(
            update_fields=["count", "first_seen", "last_seen", "resolved_at", "details"]
        )


def _accounts(rows: object) -> list[str]:
    held = rows.exclude(holder=None).exclude(holder="")  # type: ignore[attr-defined]
    names = held.order_by("pk").values_list("holder", flat=True)[: NAMED * 5]
    listed = dict.fromkeys(name for text in names for name in text.split("\n"))
    return list(listed)[:NAMED]


def _most(rows: object, name: str) -> dict[str, int]:
    return dict(
        rows.exclude(**{name: ""})  # type: ignore[attr-defined]
        .values_list(name)
        .annotate(number=Count("pk"))
        .order_by("-number", name)[:NAMED]
    )


def _known(references: Iterable[str]) -> set[str]:
    rows = AuditEvidence.objects.filter(reference__in=[each[:255] for each in references])
    return set(rows.values_list("reference", flat=True))


def _group(call: Call) -> _Group:
    key = next(iter(call.keys), "")
    return _Group(call.operation, call.role, key_ref(key) or key, bool(call.error_code))


def _unknown(group: _Group, among: Sequence[Call]) -> Found:
    use = group.operation in USES
    bad = not group.refused and (use or group.operation in WORST)
    times = [of_utc(call.time) for call in among]
    return Found(
        Kind.UNKNOWN_CALL if use else Kind.UNKNOWN_CHANGE,
        Severity.CRITICAL if bad else Severity.WARNING,
        (group.operation, group.role, group.key, str(group.refused)),
        UNKNOWN.format(operation=group.operation, caller=group.role or NOBODY)
        + (" (refused)" if group.refused else ""),
        min(times),
        max(times),
        key_ref=group.key if len(group.key) <= 30 else "",
    )


def _of_call(finding: AuditFinding, call: Call) -> AuditEvidence:
    return AuditEvidence(
        finding=finding,
        reference=call.event_id[:255],
        time=of_utc(call.time),
        operation=call.operation[:64],
        request_id=call.request_id,
        error_code=call.error_code,
        sub=call.sub[:64],
        caller=call.caller,
        source_ip=call.source_ip,
        user_agent=call.user_agent,
    )


def _of_event(finding: AuditFinding, event: AuditEvent) -> AuditEvidence:
    return AuditEvidence(
        finding=finding,
        reference=_reference(event.pk),
        time=event.time,
        operation=event.operation,
        request_id=event.request_ids[:320],
        sub=event.sub,
        holder="",
    )


def _reference(pk: int) -> str:
    return f"event {pk}"
