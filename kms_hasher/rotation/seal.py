"""
Stock hashes sealed in place, and the way back. No password is needed for either.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterator

from django.contrib.auth.hashers import get_hashers

from kms_hasher import columns, encoding, keyring, modes
from kms_hasher.conf import get as get_conf
from kms_hasher.exceptions import RotationRefused
from kms_hasher.inner import HASHERS
from kms_hasher.models import Key, RotationRun
from kms_hasher.rotation import costs, jobs, keys, runs, sweeps
from kms_hasher.rotation.engine import Options, width_of
from kms_hasher.rotation.sweeps import Enlist, Progress

NO_HASHER = (
    "PASSWORD_HASHERS lists no sealing hasher, so that nobody could log in with a sealed "
    'password. Add "kms_hasher.hashers.KMSArgon2PasswordHasher".'
)
LEFT_OUT = (
    "{number} passwords were made by the hasher {algorithm!r} and are left as they are: to "
    "seal them too, list {hasher} in PASSWORD_HASHERS."
)
NOT_FIRST = (
    "{algorithm!r} is the first of PASSWORD_HASHERS, and does not seal: passwords set or "
    "upgraded at login are not sealed, and undo this one by one."
)
TOO_NARROW = (
    "{column} holds {width} characters, and a sealed password may need {needed}: migrate, or "
    "run widen_password_column."
)
STOCK_NOT_FIRST = (
    "The first of PASSWORD_HASHERS seals, so that passwords would be sealed anew at the next "
    "login. Put "
    '"django.contrib.auth.hashers.Argon2PasswordHasher" first, keep the sealing hashers '
    "behind it until this is done, and restart the site."
)
NOT_LISTED = (
    "{number} sealed passwords are Django's {algorithm!r} inside, which PASSWORD_HASHERS does "
    "not list: once unwrapped nobody could log in with them. Add Django's hasher."
)


def count_stock() -> int:
    """Return how many passwords wrapping seals, as far as a query can tell."""
    sealing = jobs.sealing_algorithms()
    return sum(
        jobs.stock(column.rows, column.field.attname, sealing).count()
        for column in columns.columns()
    )


def count_sealed() -> int:
    """Return how many passwords are sealed."""
    return sum(number for group, number in _groups().items() if group.is_password)


def count_macs() -> int:
    """Return how many of them hold a MAC, so that they cannot be unwrapped."""
    groups = _groups().items()
    return sum(n for group, n in groups if group.is_password and _core(group) == "mac")


def calls_of_unwrap() -> Counter[str]:
    """Return how many calls of which operation of KMS unwrapping takes."""
    rows: Counter[str] = Counter()
    for group, number in _groups().items():
        if group.is_password and _core(group) == "digest":
            rows[modes.name_of(group.mode)] += number
    return sum((costs.opening(mode, number) for mode, number in rows.items()), Counter())


def _core(group: columns.Group) -> str:
    return modes.by_code(group.mode).core if modes.is_known(group.mode) else ""


def check_wrap() -> list[str]:
    """
    Return warnings about sealing the stock hashes.

    Raises `RotationRefused` if their users could not log in afterwards, and `KMSError` if KMS
    cannot tell.
    """
    sealing = jobs.sealing_algorithms()
    if not sealing:
        raise RotationRefused(NO_HASHER)
    keys.check_public_half()
    needed = modes.width(get_conf().mode)
    for column in columns.columns():
        width = width_of(column)
        if width is not None and width < needed:
            raise RotationRefused(TOO_NARROW.format(column=column, width=width, needed=needed))
    first = get_hashers()[0].algorithm
    warnings = [] if first in sealing else [NOT_FIRST.format(algorithm=first)]
    for group, number in _groups().items():
        name = group.algorithm
        if name in HASHERS and f"{encoding.PREFIX}{name}" not in sealing:
            hasher = f'"kms_hasher.hashers.{HASHERS[name]}"'
            warnings.append(LEFT_OUT.format(number=number, algorithm=name, hasher=hasher))
    return warnings


def _groups() -> Counter[columns.Group]:
    return sum((columns.count(column) for column in columns.columns()), Counter())


def wrap(
    options: Options, *, started_by: str = "", enlist: Enlist = sweeps.here
) -> Generator[Progress, None, None]:
    """
    Seal the hashes of all hashers of Django's that a listed one seals; yield the progress,
    at last the final one.

    Raises `RotationRefused` as `check_wrap`, and `KMSError`.
    """
    check_wrap()
    settings = get_conf()
    described = keyring.kms("wrap").describe_key(settings.key)
    key = keys.record(described)
    yield from _run(RotationRun.Kind.WRAP, options, started_by, enlist, count_stock(), key)


def check_unwrap() -> None:
    """Raise `RotationRefused` if the hashes would be sealed again or not be readable."""
    listed = [str(hasher.algorithm) for hasher in get_hashers()]
    if listed[0].startswith(encoding.PREFIX):
        raise RotationRefused(STOCK_NOT_FIRST)
    for group, number in _groups().items():
        name = group.algorithm.removeprefix(encoding.PREFIX)
        if group.is_password and name in HASHERS and name not in listed:
            raise RotationRefused(NOT_LISTED.format(number=number, algorithm=name))


def unwrap(
    options: Options, *, started_by: str = "", enlist: Enlist = sweeps.here
) -> Generator[Progress, None, None]:
    """
    Turn all sealed hashes into those of Django's hashers; yield the progress. A hash in a
    mode of a MAC is a bad row: it gives no digest back.

    From then on a stolen table is worth cracking again. Raises `RotationRefused` as
    `check_unwrap`, and `KMSError`.
    """
    check_unwrap()
    yield from _run(RotationRun.Kind.UNWRAP, options, started_by, enlist, count_sealed())


def _run(
    kind: RotationRun.Kind,
    options: Options,
    started_by: str,
    enlist: Enlist,
    total: int,
    key: Key | None = None,
) -> Iterator[Progress]:
    alias = get_conf().alias if key else ""
    begun = runs.unfinished(kind, alias)
    if begun and (runs.is_live(begun) or begun.key != key):
        begun = None
    with runs.recorded(
        kind,
        alias=alias,
        started_by=started_by,
        begun=begun,
        key=key,
        rate=options.rate,
        plan=sweeps.plan_of(options),
    ) as record:
        job = jobs.of(record.row)
        yield from sweeps.conduct(record, job, options, total=total, enlist=enlist)
