"""
What the events themselves give away: each check returns what it found, and stores nothing.

All ask the database by an index and for the times given only; a finding holds for one hour or
for one key, so that finding it again changes nothing.
"""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from django.db.models import Count, F, Max, Min, Q, QuerySet
from django.db.models.functions import TruncMinute

from kms_hasher import conf, signals
from kms_hasher.audit import rollups
from kms_hasher.audit.findings import Found, Kind, Severity
from kms_hasher.audit.site import USES, key_ref, named_keys
from kms_hasher.models import AliasPeriod, AuditEvent, Key
from kms_hasher.signals import Event

#: So many invalid values within so many seconds are a burst.
BURST, BURST_SECONDS = 10, 60.0

#: The bound on Decrypts is so many times what the busiest hours of the time before had.
FACTOR = 3

#: Calls an hour below which nothing is out of the ordinary.
LEAST = 100

#: How long the time before is, and how many hours with such calls it must have.
LEARNED = datetime.timedelta(days=7)
LEARNED_HOURS = 24

#: What opens passwords by the thousand, and is told of as a run.
RUNS = ("verify", "unwrap", "rotate", "wrap")

#: The calls that a password is checked by, and the purposes for which they do not count.
CHECKING = {"Decrypt": RUNS, "GenerateMac": (*RUNS, "set", "seal")}

#: How long after the count a login may still open what it had read before.
GRACE = datetime.timedelta(minutes=15)

#: Calls that make and check the anchors of seals: of these no stored password tells.
ANCHORING = Q(purpose="seal") | Q(purpose="verify", sub="")

#: States of a key that nobody should use any more.
LEFT = ("Disabled", "PendingDeletion")

BREAKER = "The circuit breaker of Region {region!r} opened: KMS could not answer."
TAMPERED = "{number} or more values within a minute were not what they claimed to be."
RETIRED = "The key {arn} was used, which is no alias's and which no stored password needs."
RATE = "{number:,} Decrypts or MACs within one {unit}, above the bound of {bound:,}."

HOUR, MINUTE = "hour", "minute"


# --- in the database ----------------------------------------------------------------


def breakers(start: datetime.datetime, end: datetime.datetime) -> Iterator[Found]:
    """Return breakers that opened."""
    rows = _events(start, end, operation=signals.CIRCUIT_BREAKER)
    rows = rows.exclude(outcome=signals.SUCCESS)
    for time, region in rows.values_list("time", "requested_key"):
        yield _breaker(time, region)


def tampered(start: datetime.datetime, end: datetime.datetime) -> Iterator[Found]:
    """Return bursts of values that are not what they claim to be."""
    times = _events(start, end, outcome=signals.INVALID).order_by("time")
    last: list[datetime.datetime] = []
    for (time,) in times.values_list("time").iterator():
        last = [*last[1 - BURST :], time]
        if len(last) == BURST and (time - last[0]).total_seconds() <= BURST_SECONDS:
            yield _tampered(last[0], time)


def retired(start: datetime.datetime, end: datetime.datetime) -> Iterator[Found]:
    """Return retired keys that were used."""
    for key in retired_keys():
        since = max(start, _free_from(key) or start)
        used = _events(since, end, key_ref=key.ref, outcome=signals.SUCCESS)
        used = used.filter(operation__in=USES).exclude(ANCHORING)
        sums = used.aggregate(number=Count("pk"), first=Min("time"), last=Max("time"))
        if sums["number"]:
            yield _retired(key, sums["first"], sums["last"])


def rate(start: datetime.datetime, end: datetime.datetime) -> Iterator[Found]:
    """Return times with more passwords checked than the bound that is set, or was learned."""
    bound = conf.get().audit_rate_bound
    if bound:
        for minute, number in checked(start, end, MINUTE).items():
            if number > bound:
                yield _rate(minute, number, bound, MINUTE)
        return
    counted = checked(start - LEARNED, end, HOUR)
    first = start.replace(minute=0, second=0, microsecond=0)
    before = [number for hour, number in counted.items() if hour < first]
    if len(before) < LEARNED_HOURS:
        return
    # The highest hour alone may have been a thief's.
    busy = sorted(before)[int(len(before) * 0.95)]
    bound = max(LEAST, FACTOR * busy)
    for hour, number in counted.items():
        if hour >= first and number > bound:
            yield _rate(hour, number, bound, HOUR)


def checked(
    start: datetime.datetime, end: datetime.datetime, unit: str
) -> Counter[datetime.datetime]:
    """
    Return how many Decrypts, or MACs where those are more, there were in each hour or minute.

    A password takes one of either, or one of each. Those of runs are left out.
    """
    count = _by_hour if unit == HOUR else _by_minute
    decrypts, macs = (count(start, end, name) for name in CHECKING)
    return decrypts | macs


def _by_hour(
    start: datetime.datetime, end: datetime.datetime, operation: str
) -> Counter[datetime.datetime]:
    apart = CHECKING[operation]
    hours = rollups.series_by("purpose", start, end, latency=False, operation=operation)
    sums = {
        hour: sum(each.count for purpose, each in by.items() if purpose not in apart)
        for hour, by in hours.items()
    }
    return Counter({hour: number for hour, number in sums.items() if number})


def _by_minute(
    start: datetime.datetime, end: datetime.datetime, operation: str
) -> Counter[datetime.datetime]:
    trunc = TruncMinute("time", tzinfo=_utc(start))
    rows = _events(start, end, operation=operation).exclude(purpose__in=CHECKING[operation])
    counted = rows.annotate(at=trunc).values_list("at").annotate(number=Count("pk")).order_by()
    return Counter(dict(counted))


def retired_keys() -> list[Key]:
    """
    Return the keys that were left: no alias points there, and no stored password needed them
    when they were counted since, or they are disabled.
    """
    present = AliasPeriod.objects.filter(until=None).values("key")
    named = set(map(key_ref, named_keys()))
    empty = Q(rows=0) & (Q(left=None) | Q(rows_counted_at__gte=F("left")))
    keys = Key.objects.exclude(pk__in=present).annotate(left=Max("alias_periods__until"))
    return [key for key in keys.filter(Q(state__in=LEFT) | empty) if key.ref not in named]


def _free_from(key: Key) -> datetime.datetime | None:
    """Return from when on nobody has a reason to use a retired key; None if always."""
    if key.state in LEFT or key.rows_counted_at is None:
        return None
    return key.rows_counted_at + GRACE  # a login may have read the row before it was counted


#: What `alarms.check` asks. Whatever else is to be looked at is added to `alarms.CHECKS`.
CHECKS = (breakers, tampered, retired, rate)


# --- in events as they happen -------------------------------------------------------


def in_events(events: Sequence[Event]) -> Iterator[Found]:
    """Return what the last of the events gives away. Asks the database after keys alone."""
    names = {name for event in events for name in (event.key, event.requested_key)}
    refs = set(map(key_ref, names)) - {""}
    left = {key.ref: key for key in retired_keys()} if refs else {}
    for event in events:
        if event.operation == signals.CIRCUIT_BREAKER:
            yield _breaker(event.time, event.requested_key)
        elif event.outcome == signals.INVALID:
            yield _tampered(event.time, event.time)
        elif event.outcome == signals.SUCCESS and not anchors(event):
            # A ReEncrypt names the key it comes from, and answers with the one it goes to.
            for ref in {key_ref(event.key), key_ref(event.requested_key)} & set(left):
                free = _free_from(left[ref])
                if free is None or event.time >= free:
                    yield _retired(left[ref], event.time, event.time)


def anchors(event: Event) -> bool:
    """Return whether the event is one of `ANCHORING`."""
    return event.purpose == "seal" or (event.purpose == "verify" and not event.sub)


# --- what is found ------------------------------------------------------------------


def sealing_overdue(since: datetime.datetime, text: str) -> Found:
    """Return the finding that events have waited for a seal since a time."""
    about = (since.isoformat(),)
    return Found(Kind.SEALING_OVERDUE, Severity.CRITICAL, about, text, since, since)


def _breaker(time: datetime.datetime, region: str) -> Found:
    text = BREAKER.format(region=region)
    return Found(Kind.BREAKER, Severity.WARNING, (region, _hour(time)), text, time, time)


def _tampered(first: datetime.datetime, last: datetime.datetime) -> Found:
    text = TAMPERED.format(number=BURST)
    return Found(
        Kind.TAMPERED, Severity.CRITICAL, (_hour(last),), text, first, last, number=BURST
    )


def _retired(key: Key, first: datetime.datetime, last: datetime.datetime) -> Found:
    text = RETIRED.format(arn=key.arn)
    return Found(
        Kind.RETIRED_KEY, Severity.CRITICAL, (key.ref,), text, first, last, key_ref=key.ref
    )


def _rate(at: datetime.datetime, number: int, bound: int, unit: str) -> Found:
    text = RATE.format(number=number, unit=unit, bound=bound)
    about = (_hour(at),)
    return Found(Kind.RATE, Severity.CRITICAL, about, text, at, at, number=number)


def _hour(time: datetime.datetime) -> str:
    if time.tzinfo:
        time = time.astimezone(datetime.timezone.utc)
    return time.strftime("%Y-%m-%dT%H")


def _utc(time: datetime.datetime) -> datetime.tzinfo | None:
    return datetime.timezone.utc if time.tzinfo else None


def _events(
    start: datetime.datetime, end: datetime.datetime, **filters: Any
) -> QuerySet[AuditEvent]:
    rows = AuditEvent.objects.filter(time__gte=start, time__lte=end, **filters)
    return rows.order_by("time", "pk")
