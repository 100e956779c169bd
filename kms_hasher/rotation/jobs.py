"""
What a run does to a row: re-wrap it, renew it, seal it, take the seal off, or bring it into
another mode or under another data key.

The calls are made beside an event loop and must not use the database; everything else here
runs in the thread that walks the rows.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Iterable
from typing import Any

from django.contrib.auth.hashers import get_hasher, get_hashers
from django.db.models import Q, QuerySet
from django.views.decorators.debug import sensitive_variables

from kms_hasher import conf, data_keys, encoding, keyring, modes
from kms_hasher.calls import in_thread
from kms_hasher.encoding import Header, SealedHash, data_key_number, split_refs
from kms_hasher.exceptions import (
    ConfigurationError,
    DataKeyDamaged,
    DataKeyMissing,
    InvalidCiphertext,
    InvalidRequest,
    KeyNotFound,
    KeyUnusable,
    KMSAccessDenied,
    KMSBadResponse,
    KMSError,
    KMSHasherError,
    KMSUnavailable,
    MalformedHash,
    RotationRefused,
)
from kms_hasher.inner import is_stock
from kms_hasher.models import Key, RotationRun
from kms_hasher.modes.base import HMAC
from kms_hasher.providers import base
from kms_hasher.rotation.workers import Task, patiently

ALIAS_MOVED = (
    "{alias} was moved to {arn} while this run was under way. All passwords are as good as "
    "they were; run it again to bring them under that key."
)
OLD_MATERIAL = "The key still seals with its former material."
WRONG_SIZE = (
    "its digest has {size} bytes, not {wanted}; it is sealed when its user next logs in"
)
TOO_COSTLY = (
    "its costs are beyond the limits of the hasher; it is sealed when its user next "
    "logs in, or raise the limits in a subclass"
)
NOT_STOCK = "{error}; it is sealed when its user next logs in, if it matches at all"

ONE_WAY = "it holds a MAC, which gives no digest back"
OTHER_MODE = (
    "The run brings passwords into the mode {wanted!r}, and KMS_HASHER['MODE'] of this process "
    "is {present!r}: give every worker the same settings and restart it."
)

#: Errors that come of one stored value, whatever the keys.
_ROW_ERRORS = (InvalidCiphertext, InvalidRequest, MalformedHash)
#: Errors that come of the state of a key.
_KEY_ERRORS = (KeyUnusable, KeyNotFound)

_ENVELOPE = modes.MODES["envelope"].code
_ANY_KEY = "00000000-0000-0000-0000-000000000000"


class Rewrap:
    """Bring all sealed rows under `target`. The digests stay in KMS."""

    until_clean = True

    def __init__(
        self, target: base.Key, *, alias: str = "", left: frozenset[str] = frozenset()
    ) -> None:
        self.target, self.ref = target, encoding.key_ref(target.key_id)
        #: Refs of the keys that rows were brought away from.
        self.sources: set[str] = set()
        self._alias, self._left = alias, left
        # What KMS said of keys that open nothing (any more), so that it is asked once.
        self._unusable: dict[str, KMSError] = {}

    def candidates(self, rows: QuerySet[Any], name: str) -> QuerySet[Any]:
        found = _sealed(rows, name)
        for algorithm in (*sealing_algorithms(), encoding.DATA_KEY):
            for mode in modes.MODES.values():
                rewraps = modes.rewraps(mode.code, self.target.spec)
                done = encoding.prefix_of(algorithm, mode.code, self.ref if rewraps else "")
                found = found.exclude(**{f"{name}__startswith": done})
        return found

    def task(self, value: str) -> Task | None:
        stored = encoding.parse(value)
        modes.by_code(stored.mode)
        if not modes.rewraps(stored.mode, self.target.spec) or _outer(stored) == self.ref:
            return None
        return functools.partial(self._rewrap, stored)

    async def _rewrap(self, stored: SealedHash) -> str | None:
        if error := self._unusable.get(_outer(stored)):
            raise error
        new, _ = await self._checked(stored)
        self.sources.add(_outer(stored))
        return str(new)

    async def _checked(self, stored: SealedHash) -> tuple[SealedHash, base.ReEncrypted]:
        new, answer = await keyring.arewrap(stored, self.target.key_arn)
        if _outer(new) != self.ref:
            raise KMSBadResponse("the answer names another key", operation="ReEncrypt")
        return new, answer

    def blames_row(self, value: str, error: KMSHasherError) -> bool:
        if isinstance(error, _ROW_ERRORS):
            return True
        source = _outer(encoding.parse(value))
        if source in self._unusable:
            return True
        if isinstance(error, _KEY_ERRORS):
            # KMS does not say which of the two keys it means.
            blamed = source != self.ref and _is_enabled(self.target.key_arn)
        elif isinstance(error, KMSAccessDenied):
            # A key that this site has never used is no reason to stop: a forged row may
            # name any. For one that it has used, somebody must look at the policies.
            blamed = not Key.objects.filter(ref=source).exists()
        else:
            return False
        if blamed and isinstance(error, KMSError):
            self._unusable[source] = error
        return blamed

    def check(self) -> None:
        """Stop if somebody else has moved the alias: two runs must not undo each other."""
        if self._alias:
            now = keyring.kms("rotate").describe_key(self._alias).key_arn
            if now != self.target.key_arn and now not in self._left:
                raise RotationRefused(ALIAS_MOVED.format(alias=self._alias, arn=now))


class Renew(Rewrap):
    """Bring all sealed rows under the current key material of `target`, by one pass."""

    until_clean = False

    def candidates(self, rows: QuerySet[Any], name: str) -> QuerySet[Any]:
        return _sealed(rows, name)

    def task(self, value: str) -> Task | None:
        stored = encoding.parse(value)
        modes.by_code(stored.mode)
        if not modes.rewraps(stored.mode, self.target.spec):
            return None
        return functools.partial(self._rewrap, stored)

    async def _rewrap(self, stored: SealedHash) -> str | None:
        if _outer(stored) != self.ref:
            return await super()._rewrap(stored)
        new, answer = await self._checked(stored)
        material, wanted = answer.key_material_id, self.target.key_material_id
        if material and wanted and material != wanted:
            raise KMSUnavailable(OLD_MATERIAL, operation="ReEncrypt", key=answer.key_arn)
        if material and material == answer.source_key_material_id:
            return None
        return str(new)


class Wrap:
    """Seal the hashes of Django's hashers with the key that the settings name."""

    until_clean = True

    def __init__(self) -> None:
        self.sources: set[str] = set()

    def candidates(self, rows: QuerySet[Any], name: str) -> QuerySet[Any]:
        return stock(rows, name, sealing_algorithms())

    @sensitive_variables()
    def task(self, value: str) -> Task:
        try:
            header, digest = encoding.parse_stock(value)
        except MalformedHash as error:
            raise MalformedHash(NOT_STOCK.format(error=error)) from None
        if len(digest) != header.kind.size:
            raise MalformedHash(WRONG_SIZE.format(size=len(digest), wanted=header.kind.size))
        if not _readable(header):
            raise MalformedHash(TOO_COSTLY)
        # It may make a data key, or ask for the public one.
        seal = patiently(lambda: keyring.sealer(header, purpose="wrap"))

        @sensitive_variables()
        def wrap() -> str:
            return str(seal(digest))

        return in_thread(wrap)

    def blames_row(self, value: str, error: KMSHasherError) -> bool:
        return False

    def check(self) -> None:
        pass


class _Opening(abc.ABC):
    """What opens rows: the state of a key, and a row that is damaged, are the row's matter."""

    until_clean = True

    def __init__(self) -> None:
        self.sources: set[str] = set()
        self._unusable: dict[str, KMSHasherError] = {}

    def task(self, value: str) -> Task | None:
        stored = encoding.parse(value)
        modes.by_code(stored.mode)
        if not self.wants(stored):
            return None
        try:
            call = self.call(stored)
        except (DataKeyDamaged, DataKeyMissing) as error:
            if not _is_sealed_by(stored, error.number):
                raise
            raise MalformedHash(str(error)) from None

        def checked() -> str:
            if error := self._unusable.get(stored.key_ref):
                raise error
            return call()

        return in_thread(checked)

    @abc.abstractmethod
    def wants(self, stored: SealedHash) -> bool:
        """Return whether the value is to be rewritten. Raises `MalformedHash`."""

    @abc.abstractmethod
    def call(self, stored: SealedHash) -> Callable[[], str]:
        """Return the call that gives the new value, from any thread."""

    def blames_row(self, value: str, error: KMSHasherError) -> bool:
        if isinstance(error, _ROW_ERRORS):
            return True
        stored = encoding.parse(value)
        if isinstance(error, DataKeyDamaged):
            return _is_sealed_by(stored, error.number)
        if stored.key_ref in self._unusable:
            return True
        if not _may_be_of(stored, error):
            return False
        if isinstance(error, _KEY_ERRORS):
            blamed = self.can_seal()
        elif isinstance(error, KMSAccessDenied) and error.operation == "Decrypt":
            # As for a re-wrap: a forged row may name any key.
            names_key = modes.by_code(stored.mode).names_key
            blamed = names_key and not Key.objects.filter(ref=_outer(stored)).exists()
        else:
            return False
        if blamed:
            self._unusable[stored.key_ref] = error
        return blamed

    def can_seal(self) -> bool:
        """Return whether the keys that the new values are sealed with are in order."""
        return True

    def check(self) -> None:
        """Nothing of what it goes by can change meanwhile."""
        return


class Unwrap(_Opening):
    """Take the seal off, so that Django's own hashers can read the hashes."""

    def candidates(self, rows: QuerySet[Any], name: str) -> QuerySet[Any]:
        return _passwords(rows, name)

    def wants(self, stored: SealedHash) -> bool:
        if modes.by_code(stored.mode).core != "digest":
            raise MalformedHash(ONE_WAY)
        return True

    def call(self, stored: SealedHash) -> Callable[[], str]:
        opener = keyring.opener(stored, purpose="unwrap")

        @sensitive_variables()
        def unwrap() -> str:
            return encoding.format_stock(stored.header, opener())

        return unwrap


class Convert(_Opening):
    """
    Bring all sealed passwords into a mode, which must be that of the settings, and where it
    has data keys, to one that is newer than `after`. Raises `ConfigurationError`.
    """

    def __init__(self, mode: str, *, after: int | None = None) -> None:
        super().__init__()
        self._settings = conf.get()
        if mode != self._settings.mode:
            text = OTHER_MODE.format(wanted=mode, present=self._settings.mode)
            raise ConfigurationError(text)
        self._target, self._after = modes.by_name(mode), after

    def candidates(self, rows: QuerySet[Any], name: str) -> QuerySet[Any]:
        found = _passwords(rows, name)
        for algorithm in sealing_algorithms():
            for mode in modes.MODES.values():
                same = mode.code == self._target.code and self._after is None
                if same or mode.core not in ("digest", self._target.core):
                    done = encoding.prefix_of(algorithm, mode.code)
                    found = found.exclude(**{f"{name}__startswith": done})
        return found

    def wants(self, stored: SealedHash) -> bool:
        if modes.by_code(stored.mode).core not in ("digest", self._target.core):
            return False  # it moves when its user next signs in
        if stored.mode != self._target.code:
            return True
        return self._after is not None and data_key_number(stored.key_ref) <= self._after

    def call(self, stored: SealedHash) -> Callable[[], str]:
        # It may make a data key, or ask for the public one.
        convert = patiently(lambda: keyring.converter(stored, purpose="rotate"))
        source = modes.by_code(stored.mode)

        def converted() -> str:
            new = str(convert())
            if source.names_key and source.spec != HMAC:  # moved with its MAC, it keeps that
                self.sources.add(_outer(stored))
            return new

        return converted

    def can_seal(self) -> bool:
        settings = self._settings
        names = [settings.key]
        if settings.mode == "mac_in_direct":
            names.append(settings.mac_key)
        return all(map(_is_enabled, names))


def of(run: RotationRun) -> Rewrap | Wrap | Unwrap | Convert:
    """
    Return the job of a run, for any process that works on it.

    Raises `ConfigurationError` if the settings of this process are not those of the run.
    """
    if run.kind == RotationRun.Kind.TO_MODE:
        return Convert(run.plan["mode"])
    if run.kind == RotationRun.Kind.NEW_DATA_KEYS:
        return Convert(run.plan["mode"], after=run.plan["data_keys_up_to"])
    if run.kind == RotationRun.Kind.WRAP:
        return Wrap()
    if run.kind == RotationRun.Kind.UNWRAP:
        return Unwrap()
    target = base.Key(
        key_arn=run.key.arn if run.key else "",
        key_material_id=run.plan.get("material", ""),
        spec=run.plan.get("spec") or base.SYMMETRIC_DEFAULT,
        usage="ENCRYPT_DECRYPT",
        state="Enabled",
    )
    kind = Renew if run.kind == RotationRun.Kind.NEW_MATERIAL else Rewrap
    return kind(target, alias=run.alias, left=frozenset(run.plan.get("left", ())))


def sealing_algorithms() -> list[str]:
    """Return the algorithms of the hashers in `PASSWORD_HASHERS` that seal."""
    names = (str(hasher.algorithm) for hasher in get_hashers())
    return [name for name in names if name.startswith(encoding.PREFIX)]


def stock(rows: QuerySet[Any], name: str, sealing: Iterable[str]) -> QuerySet[Any]:
    """Return the rows that one of Django's hashers made, whose like is among the sealing."""
    wanted = Q(pk__in=())
    for algorithm in sealing:
        if is_stock(inner := algorithm.removeprefix(encoding.PREFIX)):
            wanted |= Q(**{f"{name}__startswith": f"{inner}$"})
    return rows.filter(wanted)


def _sealed(rows: QuerySet[Any], name: str) -> QuerySet[Any]:
    return rows.filter(**{f"{name}__startswith": encoding.PREFIX})


def _passwords(rows: QuerySet[Any], name: str) -> QuerySet[Any]:
    data_key = encoding.prefix_of(encoding.DATA_KEY)
    return _sealed(rows, name).exclude(**{f"{name}__startswith": data_key})


def _outer(stored: SealedHash) -> str:
    """Return the ref of the key that sealed, and not that of a MAC's key."""
    return split_refs(stored.key_ref)[0]


def _is_sealed_by(stored: SealedHash, number: int) -> bool:
    """Return whether it is that data key by which it is sealed, and not a new one."""
    return stored.mode == _ENVELOPE and data_key_number(stored.key_ref) == number


def _may_be_of(stored: SealedHash, error: KMSHasherError) -> bool:
    """Return whether it may be the key that opens it that an error is of, and not a new one."""
    if not isinstance(error, KMSError) or not error.key:  # which not every provider says
        return True
    if stored.mode == _ENVELOPE:
        row = data_keys.rows().get(pk=data_key_number(stored.key_ref))
        stored = encoding.parse(row.sealed)
    settings = conf.get()
    home = settings.key_for(encoding.key_id(_outer(stored)))
    return error.key in (home, *settings.replicas(home))


def _is_enabled(key: str) -> bool:
    return keyring.kms("rotate").describe_key(key).state == "Enabled"


def _readable(header: Header) -> bool:
    """Return whether the hasher would read a sealed hash with this header."""
    sample = SealedHash(header, "d1", encoding.key_ref(_ANY_KEY), b"sealed")
    return "mode" in get_hasher(header.algorithm).decode(str(sample))
