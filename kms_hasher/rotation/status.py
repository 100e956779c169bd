"""
How things stand: the key, what may be done with it, the columns, and who needs which key.
"""

from __future__ import annotations

import datetime
from collections import Counter
from dataclasses import dataclass, field

from django.contrib.auth.hashers import get_hashers
from django.core.exceptions import FieldDoesNotExist
from django.db import DatabaseError
from django.utils import timezone

from kms_hasher import columns, conf, data_keys, encoding, keyring, modes, signals, users
from kms_hasher.columns import Group
from kms_hasher.exceptions import (
    ConfigurationError,
    KeyNotFound,
    KMSError,
    KMSHasherError,
    MalformedHash,
    RotationRefused,
)
from kms_hasher.models import AliasPeriod, AuditEvent, Key, RotationRun, in_english
from kms_hasher.providers import base
from kms_hasher.rotation import keys, permissions, plan, runs
from kms_hasher.rotation.permissions import DENIED

#: So many of the alias's last moves are told.
MOVES = 5

NO_KEY = "KEY {key}: {error}"
NOT_ENABLED = "The key {arn} is {state}: no password can be set or checked with it."
PERMISSION_DENIED = "{operation} is denied: check the IAM policy and the key policy."
ROTATION_ALONE = (
    "{operation} is denied: as the settings are, rotate_kms_key alone needs it, which may have "
    "permissions of its own."
)
NOT_TOLD = "Whether {operation} is allowed cannot be told: {error}"
NO_COLUMN = "{column} has no column in the database: migrate."
NARROW = (
    "{column} holds {width} characters, and a sealed password may need {needed}: migrate, or "
    "run widen_password_column."
)
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
    "{number} passwords are not sealed: `manage.py wrap_passwords` seals those of each of "
    "Django's hashers that a listed one seals, the next login all others."
)
UNFINISHED = "{number} {what} are under another key: `manage.py rotate_kms_key`."
OTHER_MODE = (
    "{number} passwords are sealed in other modes: `manage.py rotate_kms_key --to-mode {mode}`."
)
WAITING = (
    "{number} passwords hold a MAC that no run can move: each moves when its user next signs "
    "in or sets a password."
)
RETIRED = (
    "{number} data keys are retired: `manage.py rotate_kms_key --prune-data-keys` deletes "
    "those that no stored password names."
)

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
    """
    A key that stored values need; `arn` is "" where nobody knows it. `rows` is how many
    passwords, `data_keys` how many data keys; `macs` how many of the passwords hold a MAC that
    it made.
    """

    ref: str
    arn: str
    state: str
    rows: int = 0
    data_keys: int = 0
    macs: int = 0


@dataclass
class DataKeys:
    """How many data keys there are; `oldest` is when the oldest of the open ones was made."""

    number: int
    open: int
    retired: int
    oldest: datetime.datetime | None


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
    fingerprint: str = ""
    mac_key: base.Key | None = None
    moves: list[tuple[str, datetime.datetime, datetime.datetime | None]] = field(
        default_factory=list
    )
    permissions: dict[str, str] = field(default_factory=dict)
    columns: list[ColumnStatus] = field(default_factory=list)
    keys: list[KeyStatus] = field(default_factory=list)
    data_keys: DataKeys | None = None
    last: RotationRun | None = None
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def look(*, permissions: bool = True) -> Status:
    """
    Return how things stand. Changes nothing, but for the fingerprint of an RSA key that is
    noted; a few calls to KMS, one of which seals a probe.

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
    _look_at_mac_key(status, settings)
    if settings.alias:
        periods = AliasPeriod.objects.filter(alias=settings.alias).select_related("key")
        status.moves = [(each.key.arn, each.since, each.until) for each in periods[:MOVES]]
    _look_at_columns(status)
    _look_at_keys(status)
    _look_at_data_keys(status)
    _look_at_last_run(status)
    _look_at_breakers(status)
    return status


def _look_at_key(status: Status, key: base.Key, permissions: bool) -> None:
    try:
        plan.check_mode(key, status.mode)
    except RotationRefused as refused:
        status.problems.append(str(refused))
    if key.spec.startswith("RSA"):
        _look_at_public_half(status, key)
    if key.state != "Enabled":
        status.problems.append(NOT_ENABLED.format(arn=key.key_arn, state=key.state))
    elif permissions:
        _try_permissions(status, key.key_arn)


def _look_at_public_half(status: Status, key: base.Key) -> None:
    status.fingerprint = keys.record(key).fingerprint
    if not status.fingerprint:  # only a call to Decrypt would tell
        return
    try:
        keys.check_public_half()
    except (ConfigurationError, RotationRefused) as error:
        status.problems.append(str(error))


def _look_at_mac_key(status: Status, settings: conf.Conf) -> None:
    try:
        status.mac_key = plan.mac_key(settings, status.described)
    except (RotationRefused, KMSHasherError) as error:
        status.problems.append(str(error))


def _try_permissions(status: Status, arn: str) -> None:
    trial = permissions.Trial(arn).run()
    status.permissions = trial.answers
    for operation, answer in trial.answers.items():
        if answer == DENIED and operation == "ReEncrypt" and not _rewraps_at_login(status):
            status.notes.append(ROTATION_ALONE.format(operation=operation))
        elif answer == DENIED:
            status.problems.append(PERMISSION_DENIED.format(operation=operation))
    for operation, error in trial.errors.items():
        status.problems.append(NOT_TOLD.format(operation=operation, error=error))


def _rewraps_at_login(status: Status) -> bool:
    return conf.get().rewrap_on_login and modes.by_name(status.mode).rewraps


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
    needed: dict[str, KeyStatus] = {}
    for group, number in _counted(status).items():
        if not group.is_sealed:
            continue
        outer, mac = group.key_ref, group.mac_ref or (group.mode == plan.MAC and group.key_ref)
        for ref in {outer, mac} - {"", False}:
            found = needed.setdefault(str(ref), KeyStatus(str(ref), "", ""))
            if group.is_password:
                found.rows += number
                found.macs += number if ref == mac else 0
            else:
                found.data_keys += number
    damaged = 0
    known = {
        encoding.key_ref(key.key_id): key for key in (status.described, status.mac_key) if key
    }
    for ref, found in sorted(needed.items(), key=lambda each: (-each[1].rows, each[0])):
        try:
            key_id = encoding.key_id(ref)
        except MalformedHash:
            damaged += found.rows + found.data_keys
            continue
        status.keys.append(found)
        if key := known.get(ref):
            found.arn, found.state = key.key_arn, key.state
        else:
            _look_at_key_of_rows(status, found, key_id)
    if damaged:
        status.problems.append(DAMAGED.format(number=damaged))
    if status.described:
        _look_at_what_is_left(status, status.described, damaged)


def _look_at_what_is_left(status: Status, present: base.Key, damaged: int) -> None:
    """Note what a run would move, and what none can."""
    counts, mac = {None: _counted(status)}, status.mac_key
    rewrap = plan.Plan(
        kind=RotationRun.Kind.REWRAP,
        mode=status.mode,
        present=present,
        target=present,
        mac_ref=encoding.key_ref(mac.key_id) if mac else "",
        counts=counts,  # type: ignore[arg-type]  # of all columns together
    )
    if others := max(rewrap.total - damaged, 0):
        what = "data keys" if status.mode == "envelope" else "passwords"
        status.notes.append(UNFINISHED.format(number=others, what=what))
    if others := rewrap.elsewhere:
        status.notes.append(OTHER_MODE.format(number=others, mode=status.mode))
    if others := rewrap.waiting:
        status.notes.append(WAITING.format(number=others))


def _look_at_data_keys(status: Status) -> None:
    rows = data_keys.rows()
    number, retired = rows.count(), rows.exclude(retired_at=None).count()
    if not number and status.mode != "envelope":
        return
    settings = conf.get()
    since = timezone.now() - datetime.timedelta(days=settings.data_key_days)
    usable = rows.filter(
        retired_at=None, made_at__gt=since, uses__lt=settings.data_key_users
    ).order_by("made_at")
    oldest = usable.values_list("made_at", flat=True).first()
    status.data_keys = DataKeys(number, usable.count(), retired, oldest)
    if retired:
        status.notes.append(RETIRED.format(number=retired))


def _look_at_key_of_rows(status: Status, found: KeyStatus, key_id: str) -> None:
    name, number = conf.get().key_for(key_id), found.rows + found.data_keys
    seen = Key.objects.filter(ref=found.ref).first()
    found.arn = seen.arn if seen else ""
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
    status.problems.append(LAST_RUN.format(run=in_english(last), state=state, error=error))


def _counted(status: Status) -> Counter[Group]:
    return sum((column.rows for column in status.columns), Counter())


def _look_at_breakers(status: Status) -> None:
    # An older one was of a process that has ended since, or that nobody has signed in at.
    since = timezone.now() - datetime.timedelta(hours=1)
    changes = AuditEvent.objects.filter(operation=signals.CIRCUIT_BREAKER, time__gte=since)
    last = changes.order_by("-time", "-pk").first()
    if last and last.outcome != signals.SUCCESS:
        status.problems.append(BREAKER.format(region=last.requested_key, time=last.time))
