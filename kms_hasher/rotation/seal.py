"""
Stock hashes sealed in place, and the way back. No password is needed for either.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator

from django.contrib.auth.hashers import get_hashers
from django.utils import timezone

from kms_hasher import columns, encoding, history, keyring
from kms_hasher.conf import get as get_conf
from kms_hasher.exceptions import RotationRefused
from kms_hasher.models import Key, RotationRun
from kms_hasher.rotation import jobs, runs, sweeps
from kms_hasher.rotation.engine import Options, width_of
from kms_hasher.rotation.sweeps import Enlist, Progress

#: What Django's Argon2 hasher and ours call themselves.
STOCK = "argon2"
SEALED = f"{encoding.PREFIX}{STOCK}"

NO_HASHER = (
    "PASSWORD_HASHERS does not list a hasher {algorithm!r}, so that nobody could log in with "
    'a sealed password. Add "kms_hasher.hashers.KMSArgon2PasswordHasher".'
)
NOT_FIRST = (
    "{algorithm!r} is not the first of PASSWORD_HASHERS: passwords set or upgraded at login "
    "are not sealed, and undo this one by one."
)
TOO_NARROW = (
    "{column} holds {width} characters, and a sealed password may need {needed}: migrate."
)
STOCK_NOT_FIRST = (
    "Django's Argon2 hasher must be the first of PASSWORD_HASHERS, or passwords would be "
    "sealed anew at the next login. Put "
    '"django.contrib.auth.hashers.Argon2PasswordHasher" first, keep the sealing hasher '
    "behind it until this is done, and restart the site."
)


def count(prefix: str) -> int:
    """Return how many rows of all columns begin with `prefix`."""
    return sum(
        column.rows.filter(**{f"{column.field.attname}__startswith": prefix}).count()
        for column in columns.columns()
    )


def check_wrap() -> list[str]:
    """
    Return warnings about sealing the stock hashes.

    Raises `RotationRefused` if their users could not log in afterwards.
    """
    algorithms = [hasher.algorithm for hasher in get_hashers()]
    if SEALED not in algorithms:
        raise RotationRefused(NO_HASHER.format(algorithm=SEALED))
    for column in columns.columns():
        width = width_of(column)
        if width is not None and width < encoding.MAX_LENGTH:
            raise RotationRefused(
                TOO_NARROW.format(column=column, width=width, needed=encoding.MAX_LENGTH)
            )
    return [] if algorithms[0] == SEALED else [NOT_FIRST.format(algorithm=SEALED)]


def wrap(
    options: Options, *, started_by: str = "", enlist: Enlist = sweeps.here
) -> Generator[Progress, None, None]:
    """
    Seal all hashes of Django's Argon2 hasher; yield the progress, at last the final one.

    Raises `RotationRefused` as `check_wrap`, and `KMSError`.
    """
    check_wrap()
    settings = get_conf()
    described = keyring.kms("wrap").describe_key(settings.key)
    key = history.record_key(described.key_arn, timezone.now(), described)
    yield from _run(RotationRun.Kind.WRAP, options, started_by, enlist, f"{STOCK}$", key)


def check_unwrap() -> None:
    """Raise `RotationRefused` if the hashes would be sealed again or not be readable."""
    if get_hashers()[0].algorithm != STOCK:
        raise RotationRefused(STOCK_NOT_FIRST)


def unwrap(
    options: Options, *, started_by: str = "", enlist: Enlist = sweeps.here
) -> Generator[Progress, None, None]:
    """
    Turn all sealed hashes into those of Django's Argon2 hasher; yield the progress.

    From then on a stolen table is worth cracking again. Raises `RotationRefused` as
    `check_unwrap`, and `KMSError`.
    """
    check_unwrap()
    yield from _run(RotationRun.Kind.UNWRAP, options, started_by, enlist, encoding.PREFIX)


def _run(
    kind: RotationRun.Kind,
    options: Options,
    started_by: str,
    enlist: Enlist,
    prefix: str,
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
        total = count(prefix)
        yield from sweeps.conduct(record, job, options, total=total, enlist=enlist)
