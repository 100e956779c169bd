"""
Attempts of ours that got no answer, and so left no request id with us but one in CloudTrail.

Such a call is matched by the rest: operation, key, `sub` and time, and by an event that got no
answer or took as long as a time-out. Whoever has the server's credentials could hide a call
behind one of ours only if that was such a call, for the same stored password, within seconds of
it, and only as often as it may have been tried in vain.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from django.db.models import Q

from kms_hasher import conf, signals
from kms_hasher.audit import workspace
from kms_hasher.audit.cloudtrail import Call
from kms_hasher.audit.site import key_ref, of_seconds, seconds_of
from kms_hasher.audit.workspace import Workspace
from kms_hasher.models import AuditEvent

#: Seconds that clocks may differ by, and that a request may be on its way.
TOLERANCE = 10

#: Seconds that a call may take in all with its attempts.
LONGEST = 15 * 60

#: What stands for a call that was not made.
NOT_CALLED = ("KMSCircuitOpen", "NoCredentialsError")


def match(space: Workspace) -> None:
    """Match calls that are left with the attempts in vain that events may hold."""
    tried = conf.get().options.get("attempts", 2)
    attempts = tried if isinstance(tried, int) else 2
    clients = space.clients()
    for page in space.unmatched():
        # Who never made a call that we know of has made none of our attempts. Where none is
        # known, none is: what is read again with one that is matched is explained then.
        asked = [call for call in page if not call.by_aws and call.client in clients]
        if not asked:
            continue
        events = _Events(asked)
        for call in asked:
            for event in events.near(call):
                spare = attempts - len(event.request_ids.split())
                if space.take(event.pk, spare):
                    space.match_one(call.event_id)
                    break


class _Events:
    """The events that some calls, which are near to each other in time, may belong to."""

    def __init__(self, calls: Sequence[Call]) -> None:
        times = [workspace.seconds(call.time) for call in calls]
        span = Q(
            time__gte=of_seconds(min(times) - TOLERANCE),
            time__lte=of_seconds(max(times) + TOLERANCE + LONGEST),
        )
        self._by_sub: dict[str, list[AuditEvent]] = defaultdict(list)
        self._by_operation: dict[str, list[AuditEvent]] = defaultdict(list)
        subs = {call.sub for call in calls if call.sub}
        if subs:
            for event in _read(span & Q(sub__in=subs)):
                self._by_sub[event.sub].append(event)
        operations = {call.operation for call in calls if not call.sub}
        if operations:
            for event in _read(span & Q(operation__in=operations)):
                self._by_operation[event.operation].append(event)

    def near(self, call: Call) -> Iterator[AuditEvent]:
        """Yield the events that may have made the call, the nearest in time first."""
        among = self._by_sub[call.sub] if call.sub else self._by_operation[call.operation]
        at = workspace.seconds(call.time)
        fitting = []
        for event in among:
            end = event.time.timestamp() if event.time.tzinfo else seconds_of(event.time)
            start = end - event.latency_us / 1_000_000
            if start - TOLERANCE - 1 <= at <= end + TOLERANCE and _fits(event, call):
                fitting.append((abs(end - at), event.pk, event))
        yield from (event for _, _, event in sorted(fitting, key=lambda each: each[:2]))


def _read(where: Q) -> Iterator[AuditEvent]:
    fields = (
        "time",
        "operation",
        "outcome",
        "error_code",
        "key_ref",
        "latency_us",
        "request_ids",
        "sub",
    )
    called = AuditEvent.objects.filter(where).exclude(error_code__in=NOT_CALLED)
    # One that got no answer at all, or an answer after it had waited for one in vain.
    late = Q(latency_us__gte=_patience_us()) & ~Q(request_ids="")
    called = called.filter(Q(outcome=signals.UNAVAILABLE) | late)
    return called.only(*fields).order_by("time", "pk").iterator()


def _fits(event: AuditEvent, call: Call) -> bool:
    if event.operation != call.operation:
        return False
    # What failed may have named an alias, and a ReEncrypt's event names one key of two.
    return not event.key_ref or event.key_ref in {key_ref(key) for key in call.keys}


def _patience_us() -> int:
    """Return how long an attempt waits for KMS's answer, in microseconds."""
    wait = conf.get().options.get("read_timeout", 2.0)
    return int((wait if isinstance(wait, int | float) else 2.0) * 1_000_000)
