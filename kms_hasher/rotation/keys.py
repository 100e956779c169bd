"""
What a rotation does to keys: makes one like the present, moves the alias, renews the
material, and gives up keys that not a single row needs.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass

from django.db.models import Q
from django.utils import timezone

from kms_hasher import columns, conf, encoding, history, keyring, modes
from kms_hasher.encoding import ARN, PREFIX, Header
from kms_hasher.exceptions import (
    AlreadyExists,
    InvalidCiphertext,
    KeyNotFound,
    KMSError,
    RotationRefused,
)
from kms_hasher.inner import NoParameters
from kms_hasher.models import Key
from kms_hasher.modes import public_key
from kms_hasher.providers import base

#: Described on a key that is made where there was none.
DESCRIPTION = "Seals the password hashes of a Django site (kms_hasher)"

#: Specs of such keys, by the class that a mode needs.
NEW_SPECS = {"SYMMETRIC": base.SYMMETRIC_DEFAULT, "RSA": "RSA_4096", "HMAC": "HMAC_256"}

#: Seconds to wait until KMS names the new key material, and between two looks.
MATERIAL_WAIT = 300.0
MATERIAL_LOOK = 1.0

ALIAS_EXISTS = (
    "{alias} was made by somebody else in this moment; the key {arn}, made for it here, is "
    "not used. Run it again without --new-key."
)
MATERIAL_LATE = (
    "The key has been rotated, but after {seconds:.0f} seconds KMS still names its former "
    "material, and nothing was re-wrapped. Run it again later; the key is rotated once more "
    "then."
)
STILL_NEEDED = "{arn} is still needed by {places}; nothing was done to it."
IN_SETTINGS = (
    "KMS_HASHER[{setting!r}] leads to {arn}; nothing was done to it. Change the setting first, "
    "if nothing needs the key."
)
STILL_ALIAS = "{alias} still answers with {arn}: KMS spreads moves late. Try again in minutes."
FOREIGN = (
    "{arn} is outside the account and Region of KEY and not in PREVIOUS_KEYS; nothing was "
    "done to it."
)


def make_like(present: base.Key | None) -> base.Key:
    """
    Make a key like the present one: spec, usage, description, policy, tags, and the period
    of its automatic rotation. With None, make one as KMS does by default.

    Everything is read before anything is made. Raises `KMSError`.
    """
    kms = keyring.kms("rotate")
    if present is None:
        mode = modes.by_name(conf.get().mode)
        return kms.create_key(
            spec=NEW_SPECS[mode.spec], usage=mode.usage, description=DESCRIPTION
        )
    arn = present.key_arn
    policy = kms.get_key_policy(arn).policy
    tags = kms.list_resource_tags(arn).tags
    period = None
    if present.spec == base.SYMMETRIC_DEFAULT:  # KMS rotates no others
        period = kms.get_key_rotation_status(arn).period_days
    key = kms.create_key(
        spec=present.spec,
        usage=present.usage,
        multi_region=present.multi_region,
        description=present.description,
        policy=policy,
        # Tags of AWS's own cannot be given by anybody else.
        tags={name: text for name, text in tags.items() if not name.startswith("aws:")},
    )
    if period:
        kms.enable_key_rotation(key.key_arn, period)
    return key


def record(key: base.Key) -> Key:
    """
    Return the row of a key as described, made if it is new; that of an RSA key has the
    fingerprint of its public half, where KMS may be asked for it.
    """
    row = history.record_key(key.key_arn, timezone.now(), key)
    if key.spec.startswith("RSA") and not row.fingerprint:
        with contextlib.suppress(KMSError):
            row.fingerprint = public_key.fingerprint(public_half(key.key_arn))
            Key.objects.filter(pk=row.pk).update(fingerprint=row.fingerprint)
    return row


def fingerprint_of(pem: str) -> str:
    """Return the fingerprint of a public key in PEM. Raises `ConfigurationError`."""
    from cryptography.hazmat.primitives import serialization

    der = serialization.PublicFormat.SubjectPublicKeyInfo
    key = public_key.load(pem)
    return public_key.fingerprint(key.public_bytes(serialization.Encoding.DER, der))


def check_public_half() -> None:
    """
    Raise `RotationRefused` if PUBLIC_KEY is not the public half of KEY: what is sealed then is
    lost. Nothing is done where the mode has no such setting.

    The fingerprints are compared; where KMS does not give its own, something is sealed and
    opened. Raises `ConfigurationError` and, if neither can be done, `KMSError`.
    """
    settings = conf.get()
    if settings.mode != "public_key" or not settings.public_key:
        return
    own = fingerprint_of(settings.public_key)
    # KEY is no alias here: the settings do not allow it.
    ref = encoding.key_ref(settings.key.rpartition("/")[2])
    known = Key.objects.filter(ref=ref).values_list("fingerprint", flat=True).first()
    if not known:
        with contextlib.suppress(KMSError):
            known = public_key.fingerprint(public_half(settings.key))
    if known != own if known else not _opens():
        raise RotationRefused(public_key.OTHER_HALF.format(key=settings.key))


def _opens() -> bool:
    """Return whether KEY opens what PUBLIC_KEY seals. Raises `KMSError` if KMS cannot tell."""
    header = Header(f"{PREFIX}md5", NoParameters(), secrets.token_bytes(16))
    sealed = keyring.seal(header, secrets.token_bytes(header.kind.size), purpose="rotate")
    try:
        keyring.open(sealed, purpose="rotate")
    except InvalidCiphertext:
        return False
    return True


def public_half(arn: str) -> bytes:
    """Return the SubjectPublicKeyInfo of an RSA key, from KMS. Raises `KMSError`."""
    return keyring.kms("rotate").get_public_key(arn).der


def move_alias(alias: str, key: base.Key, present: base.Key | None) -> None:
    """
    Point the alias to the key and record it; make the alias if there is none.

    Raises `RotationRefused` if somebody else has made it in the meantime, or `KMSError`.
    """
    kms = keyring.kms("rotate")
    name = alias.rpartition(":")[2]
    if present:
        kms.update_alias(name, key.key_arn)
    else:
        try:
            kms.create_alias(name, key.key_arn)
        except AlreadyExists:
            raise RotationRefused(ALIAS_EXISTS.format(alias=alias, arn=key.key_arn)) from None
    history.record_alias(alias, record(key), timezone.now(), moved=True)


def renew_material(key: base.Key) -> base.Key:
    """
    Rotate the key on demand; return it as described once KMS names the new material.

    Where the provider names none, there is nothing to wait for. Raises `RotationRefused`
    if it takes longer than `MATERIAL_WAIT`, or `KMSError`.
    """
    kms = keyring.kms("rotate")
    kms.rotate_key_on_demand(key.key_arn)
    until = time.monotonic() + MATERIAL_WAIT
    while True:
        described = kms.describe_key(key.key_arn)
        if not key.key_material_id or described.key_material_id != key.key_material_id:
            return described
        if time.monotonic() >= until:
            raise RotationRefused(MATERIAL_LATE.format(seconds=MATERIAL_WAIT))
        time.sleep(MATERIAL_LOOK)


@dataclass(frozen=True)
class GivenUp:
    """A key that no row needs, and what was done to it: its state now, as KMS names it."""

    arn: str
    state: str
    changed: bool


def give_up(
    refs: Iterable[str], present: base.Key, *, alias: str = "", days: int | None = None
) -> list[GivenUp]:
    """
    Disable the keys with these refs, or, with `days`, schedule their deletion.

    `present` is the key that seals now; it is never touched. First all columns in all
    databases are searched for each key. Raises `RotationRefused` before anything is done
    if a single row names one of them, readable or not, if a setting leads to one, or if a key
    is not this site's.
    """
    kms = keyring.kms("rotate")
    if alias and (now := kms.describe_key(alias).key_arn) != present.key_arn:
        raise RotationRefused(STILL_ALIAS.format(alias=alias, arn=now))
    found: list[base.Key] = []
    refused: list[str] = []
    left = sorted(set(refs) - {encoding.key_ref(present.key_id)})
    settings_of = _in_settings() if left else {}
    for ref in left:
        key_id = encoding.key_id(ref)
        seen = Key.objects.filter(ref=ref).first()
        arn = seen.arn if seen else ARN.parse(present.key_arn).with_key(key_id)
        if rows := rows_naming(ref):
            places = ", ".join(f"{number} in {place}" for place, number in rows.items())
            refused.append(STILL_NEEDED.format(arn=arn, places=places))
        elif setting := settings_of.get(ref):
            refused.append(IN_SETTINGS.format(setting=setting, arn=arn))
        elif not is_beside(arn, present.key_arn) and arn not in conf.get().previous_keys:
            refused.append(FOREIGN.format(arn=arn))
        else:
            with contextlib.suppress(KeyNotFound):  # deleted long ago
                found.append(kms.describe_key(conf.get().key_for(key_id)))
    if refused:
        raise RotationRefused(" ".join(refused))
    return [_give_up(key, days) for key in found]


def _in_settings() -> dict[str, str]:
    """
    Return the refs of the keys that other settings than KEY lead to, with the setting's name:
    KMS is asked, as an alias tells nothing. Raises `KMSError`.
    """
    kms, found = keyring.kms("rotate"), {}
    for setting in ("MAC_KEY", "AUDIT_SEAL_KEY", "AUDIT_CONTEXT_KEY"):
        if name := getattr(conf.get(), setting.lower()):
            with contextlib.suppress(KeyNotFound):  # so that nothing can be done to it
                found[encoding.key_ref(kms.describe_key(name).key_id)] = setting
    return found


def _give_up(key: base.Key, days: int | None) -> GivenUp:
    kms = keyring.kms("rotate")
    if key.state == "PendingDeletion" or (days is None and key.state == "Disabled"):
        return GivenUp(key.key_arn, key.state, changed=False)
    if days is None:
        kms.disable_key(key.key_arn)
    else:
        kms.schedule_key_deletion(key.key_arn, days)
    described = kms.describe_key(key.key_arn)
    history.record_key(key.key_arn, timezone.now(), described)
    return GivenUp(key.key_arn, described.state, changed=True)


def rows_naming(ref: str) -> dict[str, int]:
    """Return how many rows of each column name the key anywhere, readable or not."""
    found = {}
    for column in columns.columns():
        named = Q(**{f"{column.field.attname}__icontains": ref})
        if number := column.rows.filter(named).count():
            found[str(column)] = number
    return found


def is_beside(arn: str, present: str) -> bool:
    """Return whether the key is in the account and Region of the present one."""
    return ARN.parse(present).with_key(arn.rpartition("/")[2]) == arn
