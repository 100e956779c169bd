"""
Attempts of ours that got no answer, and so left no request id with us but one in CloudTrail.

Such a call is matched by the rest: operation, key, `sub` and time, and by an event that got no
answer or took as long as a time-out. Whoever has the server's credentials could hide a call
behind one of ours only if that was such a call, for the same stored password, within seconds of
it, and only as often as it may have been tried in vain.
"""

from __future__ import annotations

import heapq
import itertools
import operator
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

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


_end = operator.attrgetter("end")


def match(space: Workspace) -> None:
    """Match calls that are left with the attempts in vain that events may hold."""
    clients = space.clients()
    for page in space.unmatched():
        # Who never made a call that we know of has made none of our attempts. Where none is
        # known, none is: what is read again with one that is matched is explained then.
        asked = [call for call in page if not call.by_aws and call.client in clients]
        for _, near in itertools.groupby(asked, _part):
            calls = list(near)
            events = _Events(calls)
            for call in calls:
                if events.take(call, space):
                    space.match_one(call.event_id)


def _part(call: Call) -> int:
    return workspace.seconds(call.time) // LONGEST


class _Event(NamedTuple):
    """Times in seconds, and how many calls it may answer for."""

    end: float
    pk: int
    start: float
    spare: int


class _Alike:
    """Events that a call may belong to if the time fits; calls ask by their times."""

    def __init__(self) -> None:
        self._later: list[tuple[float, _Event]] = []  # a heap, by the start
        self._fitting: list[_Event] = []  # by the end

    def add(self, event: _Event) -> None:
        heapq.heappush(self._later, (event.start, event))

    def nearest(self, at: int) -> _Event | None:
        """Return the one that ended nearest to a time, which is no earlier than the last."""
        while self._later and self._later[0][0] - TOLERANCE - 1 <= at:
            insort(self._fitting, heapq.heappop(self._later)[1])
        del self._fitting[: bisect_left(self._fitting, at - TOLERANCE, key=_end)]
        after = bisect_left(self._fitting, at, key=_end)
        beside = self._fitting[max(after - 1, 0) : after + 1]
        return min(beside, key=lambda event: abs(event.end - at), default=None)

    def remove(self, event: _Event) -> None:
        del self._fitting[bisect_left(self._fitting, event)]


class _Events:
    """The events that some calls, which are near to each other in time, may belong to."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self._attempts = _attempts()
        self._alike: dict[tuple[str, str, str], _Alike] = defaultdict(_Alike)
        times = [workspace.seconds(call.time) for call in calls]
        span = Q(
            time__gte=of_seconds(min(times) - TOLERANCE),
            time__lte=of_seconds(max(times) + TOLERANCE + LONGEST),
        )
        subs = {call.sub for call in calls if call.sub}
        if subs:
            for event in _read(span & Q(sub__in=subs)):
                self._add(event, event.sub)
        operations = {call.operation for call in calls if not call.sub}
        if operations:
            for event in _read(span & Q(operation__in=operations)):
                self._add(event, "")

    def _add(self, event: AuditEvent, sub: str) -> None:
        spare = self._attempts - len(event.request_ids.split())
        if spare > 0:
            end = event.time.timestamp() if event.time.tzinfo else seconds_of(event.time)
            start = end - event.latency_us / 1_000_000
            alike = self._alike[sub, event.operation, event.key_ref]
            alike.add(_Event(end, event.pk, start, spare))

    def take(self, call: Call, space: Workspace) -> bool:
        """Let the nearest event in time that may have made the call answer for it, if any."""
        at = workspace.seconds(call.time)
        # What failed may have named an alias, and a ReEncrypt's event names one key of two.
        refs = {"", *map(key_ref, call.keys)}
        among = [self._alike[call.sub, call.operation, ref] for ref in refs]
        while found := [(event, each) for each in among if (event := each.nearest(at))]:
            event, alike = min(found, key=lambda each: abs(each[0].end - at))
            if space.take(event.pk, event.spare):
                return True
            alike.remove(event)
        return False


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


def _attempts() -> int:
    tried = conf.get().options.get("attempts", 2)
    return tried if isinstance(tried, int) else 2


def _patience_us() -> int:
    """Return how long an attempt waits for KMS's answer, in microseconds."""
    wait = conf.get().options.get("read_timeout", 2.0)
    return int((wait if isinstance(wait, int | float) else 2.0) * 1_000_000)
