"""
Which calls to KMS it takes to open and to seal so many stored passwords, in each mode.

What is told is what a run comes to if no call is made again. Data keys are opened once by
each process, and blocks of their uses that a process does not use up are lost, so that with
several processes it may be more.
"""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Mapping

from django.utils import timezone

from kms_hasher import conf, data_keys, modes

_OPENS: Mapping[str, tuple[str, ...]] = {
    "direct": ("Decrypt",),
    "public_key": ("Decrypt",),
    "mac": (),
    "mac_in_direct": ("Decrypt",),
}
_SEALS: Mapping[str, tuple[str, ...]] = {
    "direct": ("Encrypt",),
    "mac": ("GenerateMac",),
    "mac_in_direct": ("GenerateMac", "Encrypt"),
}


def opening(mode: str, rows: int) -> Counter[str]:
    """Return the calls by operation; `mode` is a mode's name."""
    if mode == "envelope":
        return +Counter(Decrypt=min(rows, data_keys.rows().count()))
    return _each(_OPENS.get(mode, ()), rows)


def sealing(mode: str, rows: int) -> Counter[str]:
    """Return the calls by operation for digests; `mode` is a mode's name."""
    if mode == "envelope":
        return _under_data_keys(rows)
    if mode == "public_key":
        return +Counter(GetPublicKey=bool(rows and not conf.get().public_key))
    return _each(_SEALS.get(mode, ()), rows)


def moving(source: str, target: str, rows: int) -> Counter[str]:
    """Return the calls that bring rows from the one mode into the other."""
    if modes.by_name(source).core == "mac":  # with its MAC, of which no other is made
        return opening(source, rows) + _each(("Encrypt",) * (target == "mac_in_direct"), rows)
    return opening(source, rows) + sealing(target, rows)


def told(calls: Counter[str]) -> str:
    """Return the calls as people say them: "3 calls of Decrypt and 1 of Encrypt"."""
    parts = [f"{number:,} of {name}" for name, number in sorted(calls.items())]
    return " and ".join(parts).replace(" of ", " calls of ", 1) or "0 calls of KMS"


def _each(operations: tuple[str, ...], rows: int) -> Counter[str]:
    return +Counter(dict.fromkeys(operations, rows))


def _under_data_keys(rows: int, *, new: bool = False) -> Counter[str]:
    settings, opened, left = conf.get(), 0, rows
    if not new:
        since = timezone.now() - datetime.timedelta(days=settings.data_key_days)
        usable = data_keys.rows().filter(retired_at=None, made_at__gt=since)
        usable = usable.filter(uses__lt=settings.data_key_users)
        for uses in usable.order_by("pk").values_list("uses", flat=True):
            if left <= 0:
                break
            opened, left = opened + 1, left - (settings.data_key_users - uses)
    made = -(-max(left, 0) // settings.data_key_users)
    return +Counter(Decrypt=opened, GenerateDataKey=made)


def renewing(rows: int) -> Counter[str]:
    """Return the calls that bring rows of the mode `envelope` under new data keys."""
    return opening("envelope", rows) + _under_data_keys(rows, new=True)
