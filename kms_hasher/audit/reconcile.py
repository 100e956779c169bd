"""
The audit and CloudTrail, compared: each call that KMS had is to be one that this site made.

The calls are put into a `workspace` on disk; the events of the same hours are read past them
in pages, and what they name is marked. What is left over is judged: a call without an event
is one that this application never made, unless it is somebody else's by its encryption
context, or an attempt of ours that got no answer. An event without a call is a fault of the
trail or of the audit, once the trail has long gone past it.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from django.db.models import Q, QuerySet

from kms_hasher import conf, signals
from kms_hasher.audit import (
    alarms,
    attempts,
    evidence,
    findings,
    holders,
    segments,
    workspace,
)
from kms_hasher.audit.cloudtrail import Call
from kms_hasher.audit.site import EARLIEST, is_ours, of_seconds, seconds_of, utc
from kms_hasher.audit.trail import LATE, SETTLE, SKEW, Range, Trail
from kms_hasher.audit.workspace import BY_ID, BY_THE_REST, Workspace
from kms_hasher.exceptions import ConfigurationError
from kms_hasher.models import AuditEvent, AuditEvidence, AuditFinding
from kms_hasher.providers.base import OPERATIONS

#: Events read at a time.
PAGE = 2000

#: Seconds of events that CloudTrail may know nothing of before that is said.
SILENCE = 2 * 3600

#: How the operations begin that only look.
LOOKS = ("Describe", "Get", "List")

#: Seconds after which an event that comes late explains nothing by itself.
LATEST = 30 * 24 * 3600

#: Findings that stand on calls, and all of a comparison.
CALLS = (AuditFinding.Kind.UNKNOWN_CALL, AuditFinding.Kind.UNKNOWN_CHANGE)
KINDS = (*CALLS, AuditFinding.Kind.NOT_IN_TRAIL)

AUDIT_IS_OFF = "KMS_HASHER['AUDIT'] is \"off\": there are no events to compare with."
NOTHING_NAMED = "Name folders or files of CloudTrail, or give --lookup."
SILENT = (
    "The last of CloudTrail in {region} is of {last:%Y-%m-%d %H:%M} UTC, and there are later "
    "events: is the trail still written, and were all of its files fetched?"
)
UNREAD = (
    "Nothing was read of CloudTrail in {region}, and there are events since "
    "{since:%Y-%m-%d %H:%M} UTC: is there a trail for this Region, and were its files fetched?"
)


@dataclass
class Report:
    """
    What became of one comparison, in numbers.

    `records` are all that were read, `calls` those on keys of this site, each once. Of these,
    `matched` were matched by request id, `attempts` by the rest, and of the others `unknown`
    were made by nobody here (`new` of them were not known yet), `foreign` have the context
    of somebody else, `looks` only read what is no secret, `by_aws` AWS made itself,
    `waiting` are too fresh to be judged and `early` older than the audit. Of `events` read,
    CloudTrail lacks `missing`, of which `new_missing` were not known. `explained` is what had
    been found before and turned up since. `holders` are stored passwords that unknown calls
    were about. `until` says up to when events were looked for, by Region; `errors` what was
    not read.
    """

    files: int = 0
    passed_over: int = 0
    records: int = 0
    calls: int = 0
    duplicates: int = 0
    matched: int = 0
    attempts: int = 0
    unknown: int = 0
    new: int = 0
    foreign: int = 0
    looks: int = 0
    by_aws: int = 0
    waiting: int = 0
    early: int = 0
    events: int = 0
    missing: int = 0
    new_missing: int = 0
    explained: int = 0
    holders: int = 0
    until: dict[str, datetime.datetime] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)


def reconcile(
    paths: Sequence[str | os.PathLike[str]] = (),
    *,
    lookup: bool = False,
    since: datetime.datetime | None = None,
    until: datetime.datetime | None = None,
    now: datetime.datetime | None = None,
) -> Report:
    """
    Compare CloudTrail with the audit, store what does not fit as findings, and report.

    `since` and `until` are aware times: what is outside is not judged, and nothing is
    remembered of how far it came. Files that cannot be read and look-ups that fail are in
    `Report.errors`. Raises `TrailError` for a path that does not exist, and
    `ConfigurationError`.
    """
    if conf.get().audit == "off":
        raise ConfigurationError(AUDIT_IS_OFF)
    if not paths and not lookup:
        raise ConfigurationError(NOTHING_NAMED)
    now = now or datetime.datetime.now(datetime.timezone.utc)
    given = (None if time is None else workspace.seconds(time) for time in (since, until))
    with workspace.opened() as space:
        trail = Trail(space, Range(workspace.seconds(now), *given))
        if paths:
            trail.read_files(paths)
        if lookup:
            trail.look_up()
        report = Report(explained=_explain_late(trail.range.now))
        left = evidence.unfinished(KINDS)
        _tell(left)
        found = [*_match(space, trail, report), *_judge(space, trail.range, report)]
        # What is stored is not found anew: it is told before anything else may fail.
        _tell(found)
        report.holders = holders.find()
        evidence.describe([*left, *found])
        silences = _silences(trail)
        report.errors = [*trail.errors, *trail.gaps(), *silences.values()]
        report.files, report.passed_over = trail.files, trail.passed_over
        report.records, report.duplicates = trail.records, trail.duplicates
        report.until = trail.remember(silences)
    return report


def _tell(found: Sequence[int]) -> None:
    evidence.describe(found)
    for finding in findings.open_findings(*KINDS).filter(pk__in=set(found)):
        alarms.give(finding)


# --- matching -----------------------------------------------------------------------


def _match(space: Workspace, trail: Trail, report: Report) -> list[int]:
    """Read the events of the time past the calls; return findings of those without one."""
    report.calls, regions = len(space), trail.keys.regions
    judged = {region: trail.span(region) for region in trail.covered if region in regions}
    spans = [*space.spans(SKEW), *(span for span in judged.values() if span)]
    missing = evidence.Missing()
    # What was found before and may turn up now.
    before = AuditEvidence.objects.filter(explained_at=None).exists()
    for page in _events(workspace.merged(sorted(spans))):
        report.events += len(page)
        found = space.match([id_ for event in page for id_ in event.request_ids.split()])
        present = {e.pk for e in page if not found.isdisjoint(e.request_ids.split())}
        if before:
            report.explained += evidence.explain_events(present)
        for event in page:
            span = judged.get(trail.keys.region_of(event))
            if event.pk in present or span is None or not _leaves_a_record(event):
                continue
            if span[0] < seconds_of(event.time) <= span[1]:
                missing.add(event)
    stored, report.new_missing, report.missing = missing.store()
    attempts.match(space)
    report.matched, report.attempts = space.matched(BY_ID), space.matched(BY_THE_REST)
    for event_ids in space.matched_events() if before else ():
        report.explained += evidence.explain(event_ids)
    return stored


def _explain_late(now: int) -> int:
    """
    Explain calls by events that were stored after they had been found; return how many.

    The files that these calls stand in may be passed over by now.
    """
    rows = AuditEvidence.objects.filter(
        finding__in=findings.open_findings(*CALLS),
        explained_at=None,
        time__gte=of_seconds(now - LATEST),
    ).exclude(request_id="")
    number = last = 0
    while page := list(rows.filter(pk__gt=last).order_by("pk")[:PAGE]):
        last = page[-1].pk
        times = sorted(seconds_of(row.time) for row in page)
        spans = workspace.merged((time - SKEW, time + SKEW) for time in times)
        for events in _events(spans):
            present = {id_ for event in events for id_ in event.request_ids.split()}
            number += evidence.explain(
                row.reference for row in page if row.request_id in present
            )
    return number


def _events(spans: Iterable[tuple[int, int]]) -> Iterator[list[AuditEvent]]:
    """Yield the events of the spans that have request ids, by time, in pages."""
    fields = ("time", "operation", "outcome", "requested_key", "key_ref", "request_ids", "sub")
    rows = AuditEvent.objects.exclude(request_ids="").only(*fields).order_by("time", "pk")
    for start, end in spans:
        inside = rows.filter(time__lte=of_seconds(end))
        after = Q(time__gte=of_seconds(start))
        while page := list(inside.filter(after)[:PAGE]):
            yield page
            last = page[-1]
            later = Q(time__gt=last.time) | Q(time=last.time, pk__gt=last.pk)
            after = Q(time__gte=last.time) & later


def _answered() -> QuerySet[AuditEvent]:
    """Return the events that `_leaves_a_record` is true of, if their time is one."""
    rows = AuditEvent.objects.exclude(request_ids="").only("time")
    rows = rows.filter(time__gte=of_seconds(EARLIEST))
    return rows.filter(outcome=signals.SUCCESS, operation__in=OPERATIONS.values())


def _leaves_a_record(event: AuditEvent) -> bool:
    """Return whether CloudTrail must have the call: of refused ones it has some only."""
    return event.outcome == signals.SUCCESS and event.operation in OPERATIONS.values()


# --- judging ------------------------------------------------------------------------


def _judge(space: Workspace, times: Range, report: Report) -> list[int]:
    """Count the calls that were not matched; return findings of those nobody here made."""
    begun = _begun()
    unknown = evidence.Unknown()
    for page in space.unmatched():
        for call in page:
            kind = _kind(call, times, begun)
            setattr(report, kind, getattr(report, kind) + 1)
            if kind == "unknown":
                unknown.add(call)
    stored, report.new = unknown.store()
    return stored


def _begun() -> int | None:
    """
    Return since when the audit knows of all calls, None if that cannot be told.

    Only answered calls tell when it began: KMS answers none by a clock that is far off, and one
    such event would have all calls before the audit unknown. An event that was admitted late
    may be older than all that is known of its time; so what was pruned counts as well, as far
    as the events bear it out, since anybody with the database can say it.
    """
    first = _answered().order_by("time").first()
    if first is None:
        return None
    begun = seconds_of(first.time) - SKEW
    pruned = segments.pruned()
    if pruned and not segments.pruned_events(pruned).exists():
        after = _answered().filter(pk__gt=pruned.last_id).order_by("pk").first()
        if after:
            begun = max(begun, min(seconds_of(pruned.sealed_at), seconds_of(after.time)))
    return begun


def _kind(call: Call, times: Range, begun: int | None) -> str:
    """Return which number of the report a call without an event counts for."""
    at = workspace.seconds(call.time)
    if call.by_aws:
        return "by_aws"
    if call.contexts and not any(map(is_ours, call.contexts)):
        return "foreign"
    if call.operation.startswith(LOOKS):
        return "looks"
    if at > times.now - SETTLE or (times.until is not None and at > times.until):
        return "waiting"
    started = begun if times.since is None else times.since
    return "early" if started is not None and at < started else "unknown"


def _silences(trail: Trail) -> dict[str, str]:
    """Return a line for each Region in which events go on and CloudTrail does not."""
    if trail.range.is_given:
        return {}
    lines = {}
    end = trail.range.now - SILENCE
    for region in sorted(trail.keys.regions):
        cover = trail.covered.get(region)
        start = cover.last + LATE if cover else trail.unread_since(region)
        after = Q() if start is None else Q(time__gte=of_seconds(start))
        rows = _answered().filter(after, trail.keys.events_of(region))
        first = rows.filter(time__lte=of_seconds(end)).order_by("time", "pk").first()
        if first is None:
            continue
        if cover:
            lines[region] = SILENT.format(region=region, last=utc(cover.last))
        else:
            since = utc(seconds_of(first.time))
            lines[region] = UNREAD.format(region=region, since=since)
    return lines
