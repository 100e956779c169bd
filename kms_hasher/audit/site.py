"""
What of CloudTrail is this site's: the keys, the contexts, and times as the database has them.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import re
from typing import TYPE_CHECKING

from django.conf import settings
from django.db.models import Q
from django.utils import timezone

from kms_hasher import calls, conf, encoding
from kms_hasher.exceptions import MalformedHash
from kms_hasher.models import AliasPeriod, AuditEvent, AuditHour, Key

if TYPE_CHECKING:
    from kms_hasher.audit.cloudtrail import Call, Context

#: Operations that use a key. All others look at it or change it.
USES = frozenset(
    [
        "Decrypt",
        "DeriveSharedSecret",
        "Encrypt",
        "GenerateDataKey",
        "GenerateDataKeyPair",
        "GenerateDataKeyPairWithoutPlaintext",
        "GenerateDataKeyWithoutPlaintext",
        "GenerateMac",
        "ReEncrypt",
        "Sign",
        "Verify",
        "VerifyMac",
    ]
)


#: Seconds. A time before it is no event's, though the database may have one.
EARLIEST = 946_684_800

#: How the name of a Region looks, in the database as well.
_REGION = re.compile(r"[a-z0-9-]{1,32}")


class Keys:
    """
    The keys of this site and their Regions, as the settings and the key history have them.

    A row of the history can be deleted, so that a call is this site's as well if calls were
    counted on its key, or if its context names this deployment.
    """

    def __init__(self) -> None:
        now = conf.get()
        self._regions = dict(Key.objects.values_list("ref", "region"))
        keys = (now.key, now.mac_key, now.audit_seal_key, now.audit_context_key)
        self._refs = {*self._regions, *filter(None, map(key_ref, named_keys()))}
        self._home = now.home.region if now.home else str(now.options.get("region") or "")
        others = {*map(calls.region_of, now.previous_keys), *now.fallback_regions}
        stored = filter(_REGION.fullmatch, self._regions.values())
        self.regions = {*stored, self._home, *others} - {""}
        arns = [key for key in keys if key.startswith("arn:")]
        # Without a name its context is that of every site that has none.
        self._has_context = bool(now.deployment)
        self._aliases = {each for key in arns for each in (key, *now.replicas(key))}
        self._names = {key for key in keys if key.startswith("alias/")}

    def include(self, call: Call) -> bool:
        """Return whether the call is on a key or an alias of this site, or may be."""
        ours = self._has_context and any(map(is_ours, call.contexts))
        return ours or any(map(self._has, call.keys))

    def _has(self, key: str) -> bool:
        if key in self._aliases or self._is_named(key):
            return True
        ref = key_ref(key)
        return ref in self._refs or (bool(ref) and ref in self._used)

    @functools.cached_property
    def _used(self) -> set[str]:
        """The refs of all keys that calls were counted on."""
        return set(AuditHour.objects.order_by().values_list("key_ref", flat=True).distinct())

    def _is_named(self, key: str) -> bool:
        """Return whether it is the ARN of an alias that the settings have by its name alone."""
        region, account, name = key.split(":", 5)[3:]
        if name not in self._names:
            return False
        places = self._places.get(name)
        return (region, account) in places if places else self._home in ("", region)

    @functools.cached_property
    def _places(self) -> dict[str, set[tuple[str, str]]]:
        """Regions and accounts of each alias, which are those of the keys it pointed to."""
        rows = AliasPeriod.objects.filter(alias__in=self._names)
        found: dict[str, set[tuple[str, str]]] = {}
        for alias, text in rows.values_list("alias", "key__arn").distinct().order_by():
            with contextlib.suppress(MalformedHash):
                arn = encoding.ARN.parse(text)
                found.setdefault(alias, set()).add((arn.region, arn.account))
        return found

    def events_of(self, region: str) -> Q:
        """Return the condition for events whose `region_of` is that Region."""
        named = Q(requested_key__startswith="arn:")
        here = [ref for ref, among in self._regions.items() if among == region]
        found = Q(key_ref__in=here)
        if region == self._home:
            found |= ~Q(key_ref__in=[ref for ref, among in self._regions.items() if among])
        return named & Q(requested_key__contains=f":kms:{region}:") | ~named & found

    def region_of(self, event: AuditEvent) -> str:
        """Return the Region that the call of an event went to, as far as is known."""
        named = calls.region_of(event.requested_key)
        return named or self._regions.get(event.key_ref, "") or self._home


def named_keys() -> tuple[str, ...]:
    """Return the keys and aliases that the settings name, as they name them."""
    now = conf.get()
    keys = (now.key, now.mac_key, now.audit_seal_key, now.audit_context_key)
    return (*filter(None, keys), *now.previous_keys)


def is_ours(context: Context) -> bool:
    """Return whether a context is one that what this deployment has sealed may have."""
    mine = (context.application, context.deployment) == ("kms_hasher", conf.get().deployment)
    return mine and context.use != "status"


def key_ref(key: str) -> str:
    """Return the ref of a key id or ARN, "" for all else."""
    try:
        return encoding.key_ref(key)
    except MalformedHash:
        return ""


def utc(at: int) -> datetime.datetime:
    """Return seconds since 1970 as a time in UTC."""
    return datetime.datetime.fromtimestamp(at, datetime.timezone.utc)


def of_seconds(at: int) -> datetime.datetime:
    """Return seconds since 1970 as a time for the database."""
    return of_utc(utc(at))


def of_utc(time: datetime.datetime) -> datetime.datetime:
    """Return an aware time as one for the database."""
    if settings.USE_TZ:
        return time
    return timezone.make_naive(time, timezone.get_default_timezone())


def seconds_of(time: datetime.datetime) -> int:
    """Return a time of the database in seconds since 1970."""
    return int((timezone.make_aware(time) if timezone.is_naive(time) else time).timestamp())
