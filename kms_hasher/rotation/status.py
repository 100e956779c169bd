"""
How things stand: the key, what may be done with it, the columns, and who needs which key.
"""

from __future__ import annotations

import datetime
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from django.contrib.auth.hashers import get_hashers
from django.core.exceptions import FieldDoesNotExist
from django.db import DatabaseError
from django.utils import timezone

from kms_hasher import columns, conf, encoding, keyring, modes, signals, users
from kms_hasher.columns import Group
from kms_hasher.exceptions import (
    DryRunOperation,
    KeyNotFound,
    KMSAccessDenied,
    KMSError,
    KMSHasherError,
    MalformedHash,
)
from kms_hasher.models import AliasPeriod, AuditEvent, Key, RotationRun
from kms_hasher.providers import base
from kms_hasher.rotation import keys, plan, runs

ALLOWED, DENIED, NOT_CHECKED = "allowed", "denied", "not checked"

#: So many of the alias's last moves are told.
MOVES = 5

NO_KEY = "KEY {key}: {error}"
NOT_ENABLED = "The key {arn} is {state}: no password can be set or checked with it."
PERMISSION_DENIED = "{operation} is denied: check the IAM policy and the key policy."
NOT_TOLD = "Whether {operation} is allowed cannot be told: {error}"
NO_COLUMN = "{column} has no column in the database: migrate."
NARROW = "{column} holds {width} characters, and a sealed password may need {needed}: migrate."
NO_HASHER = "{number} passwords were made by the hasher {algorithm!r}, not in PASSWORD_HASHERS."
NO_MODE = (
    "{number} passwords are sealed in the mode {mode!r}, which this version does not know."
)
DAMAGED = "{number} sealed passwords name no readable key; their users cannot log in."
UNUSABLE = "{number} passwords need the key {arn}, which is {state}."
ELSEWHERE = (
    "{number} passwords need the key {arn}, which the settings do not lead to: put this ARN "
    "into PREVIOUS_KEYS."
)
UNKNOWN_KEY = (
    "{number} passwords need the key {key_id}, which does not exist in this account and "
    "Region. If it is in another, put its ARN into PREVIOUS_KEYS; if it was deleted, their "
    "users need new passwords."
)
UNDESCRIBED = "The key {key} cannot be described: {error}"
LAST_RUN = "The last run ({run}) is {state}{error}. Run it again to go on."
UNSEALED = (
    "{number} passwords are not sealed: `manage.py wrap_passwords` seals those of Django's "
    "Argon2 hasher, the next login all others."
)
UNFINISHED = "{number} passwords are under another key: `manage.py rotate_kms_key`."


BREAKER = (
    "The circuit breaker of Region {region!r} opened at {time:%Y-%m-%d %H:%M} in a process of "
    "the site, and none has closed since: KMS could not answer."
)


@dataclass
class ColumnStatus:
    """`width` is how many characters the real column holds, None for no limit."""

    name: str
    width: int | None
    rows: Counter[Group]


@dataclass
class KeyStatus:
    """A key that stored passwords need; `arn` is "" where nobody knows it."""

    ref: str
    arn: str
    state: str
    rows: int


@dataclass
class Status:
    """
    `problems` want a person, one line each; `notes` are worth knowing.

    `moves` holds what the alias pointed to, from when to when, the last first.
    """

    key: str
    provider: str
    mode: str
    alias: str = ""
    described: base.Key | None = None
    moves: list[tuple[str, datetime.datetime, datetime.datetime | None]] = field(
        default_factory=list
    )
    permissions: dict[str, str] = field(default_factory=dict)
    columns: list[ColumnStatus] = field(default_factory=list)
    keys: list[KeyStatus] = field(default_factory=list)
    last: RotationRun | None = None
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def look(*, permissions: bool = True) -> Status:
    """
    Return how things stand. Changes nothing; a few calls to KMS, one of them an Encrypt.

    What is wrong is in `problems`; raises `ConfigurationError` if the settings cannot work.
    """
    settings = conf.get()
    status = Status(
        key=settings.key, provider=settings.provider, mode=settings.mode, alias=settings.alias
    )
    kms = keyring.kms("status")
    try:
        status.described = kms.describe_key(settings.key)
    except KMSHasherError as error:
        text = NO_KEY.format(key=settings.key, error=error)
        if isinstance(error, KeyNotFound) and settings.alias:
            text = plan.NO_ALIAS.format(alias=settings.alias)
        status.problems.append(text)
    else:
        _look_at_key(status, status.described, permissions)
    if settings.alias:
        periods = AliasPeriod.objects.filter(alias=settings.alias).select_related("key")
        status.moves = [(each.key.arn, each.since, each.until) for each in periods[:MOVES]]
    _look_at_columns(status)
    _look_at_keys(status)
    _look_at_last_run(status)
    _look_at_breakers(status)
    return status


def _look_at_key(status: Status, key: base.Key, permissions: bool) -> None:
    if key.state != "Enabled":
        status.problems.append(NOT_ENABLED.format(arn=key.key_arn, state=key.state))
    elif permissions:
        _try_permissions(status, key.key_arn)


def _try_permissions(status: Status, arn: str) -> None:
    kms = keyring.kms("status")
    context = {"application": "kms_hasher", "use": "status"}
    if deployment := conf.get().deployment:
        context["deployment"] = deployment
    probe, blob = os.urandom(32), b""

    def attempt(operation: str, call: Callable[[], object]) -> None:
        status.permissions[operation] = NOT_CHECKED
        try:
            call()  # moto and others ignore DryRun: it is allowed, and done
        except DryRunOperation:
            pass
        except KMSAccessDenied:
            status.permissions[operation] = DENIED
            status.problems.append(PERMISSION_DENIED.format(operation=operation))
            return
        except KMSError as error:
            status.problems.append(NOT_TOLD.format(operation=operation, error=error))
            return
        status.permissions[operation] = ALLOWED

    def encrypt() -> None:
        nonlocal blob
        blob = kms.encrypt(status.key, probe, context).ciphertext

    attempt("Encrypt", lambda: kms.encrypt(status.key, probe, context, dry_run=True))
    if status.permissions["Encrypt"] == ALLOWED:
        attempt("Encrypt", encrypt)
    if not blob:
        status.permissions.update(Decrypt=NOT_CHECKED, ReEncrypt=NOT_CHECKED)
        return
    attempt("Decrypt", lambda: kms.decrypt(arn, blob, context, dry_run=True))
    attempt("ReEncrypt", lambda: kms.re_encrypt(arn, blob, context, arn, context, dry_run=True))


def _look_at_columns(status: Status) -> None:
    for column in columns.columns():
        try:
            width = users.column_width(column)
            rows = columns.count(column)
        except (FieldDoesNotExist, DatabaseError):
            status.problems.append(NO_COLUMN.format(column=column))
            continue
        needed = modes.width(status.mode)
        if width is not None and width < needed:
            status.problems.append(NARROW.format(column=column, width=width, needed=needed))
        status.columns.append(ColumnStatus(str(column), width, rows))
    _look_at_hashers(status)


def _look_at_hashers(status: Status) -> None:
    known = {hasher.algorithm for hasher in get_hashers()}
    algorithms: Counter[str] = Counter()
    strange: Counter[str] = Counter()
    for group, number in _counted(status).items():
        algorithms[group.algorithm] += number
        if group.is_sealed and not modes.is_known(group.mode):
            strange[group.mode] += number
    unsealed = 0
    for algorithm, number in algorithms.items():
        if algorithm not in ("", "!") and not algorithm.startswith(encoding.PREFIX):
            unsealed += number
        data_key = algorithm == encoding.DATA_KEY
        if algorithm.startswith(encoding.PREFIX) and algorithm not in known and not data_key:
            status.problems.append(NO_HASHER.format(number=number, algorithm=algorithm))
    if unsealed:
        status.notes.append(UNSEALED.format(number=unsealed))
    for mode, number in strange.items():
        status.problems.append(NO_MODE.format(number=number, mode=mode))


def _look_at_keys(status: Status) -> None:
    rows: Counter[str] = Counter()
    for group, number in _counted(status).items():
        if group.is_sealed and group.key_ref:
            rows[group.key_ref] += number
        if group.mac_ref:
            rows[group.mac_ref] += number
    present = encoding.key_ref(status.described.key_id) if status.described else ""
    damaged = 0
    for ref, number in rows.most_common():
        try:
            key_id = encoding.key_id(ref)
        except MalformedHash:
            damaged += number
            continue
        if ref == present and status.described:
            described = status.described
            status.keys.append(KeyStatus(ref, described.key_arn, described.state, number))
        else:
            status.keys.append(_look_at_key_of_rows(status, ref, key_id, number))
    if damaged:
        status.problems.append(DAMAGED.format(number=damaged))
    if present and (others := sum(rows.values()) - rows[present] - damaged):
        status.notes.append(UNFINISHED.format(number=others))


def _look_at_key_of_rows(status: Status, ref: str, key_id: str, number: int) -> KeyStatus:
    name = conf.get().key_for(key_id)
    seen = Key.objects.filter(ref=ref).first()
    found = KeyStatus(ref, seen.arn if seen else "", "", number)
    try:
        described = keyring.kms("status").describe_key(name)
    except KeyNotFound:
        found.state = "not found"
        if seen and status.described and not _leads_to(seen.arn, status.described.key_arn):
            text = ELSEWHERE.format(number=number, arn=seen.arn)
        else:
            text = UNKNOWN_KEY.format(number=number, key_id=key_id)
        status.problems.append(text)
    except KMSError as error:
        found.state = "unknown"
        status.problems.append(UNDESCRIBED.format(key=name, error=error))
    else:
        found.arn, found.state = described.key_arn, described.state
        if described.state != "Enabled":
            text = UNUSABLE.format(number=number, arn=found.arn, state=found.state)
            status.problems.append(text)
    return found


def _leads_to(arn: str, present: str) -> bool:
    return keys.is_beside(arn, present) or arn in conf.get().previous_keys


def _look_at_last_run(status: Status) -> None:
    last = status.last = RotationRun.objects.select_related("key", "previous_key").first()
    if last is None or last.state == RotationRun.State.FINISHED:
        return
    state = last.state
    if state == RotationRun.State.RUNNING:
        if last.updated_at >= timezone.now() - runs.SILENCE:
            return
        state = RotationRun.State.INTERRUPTED
    error = f" ({last.error})" if last.error else ""
    status.problems.append(LAST_RUN.format(run=last, state=state, error=error))


def _counted(status: Status) -> Counter[Group]:
    return sum((column.rows for column in status.columns), Counter())


def _look_at_breakers(status: Status) -> None:
    # An older one was of a process that has ended since, or that nobody has signed in at.
    since = timezone.now() - datetime.timedelta(hours=1)
    changes = AuditEvent.objects.filter(operation=signals.CIRCUIT_BREAKER, time__gte=since)
    last = changes.order_by("-time", "-pk").first()
    if last and last.outcome != signals.SUCCESS:
        status.problems.append(BREAKER.format(region=last.requested_key, time=last.time))
