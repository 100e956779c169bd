"""
KMS in software, over any store of keys: what the local provider and the tests' own share.

It keeps to the documented behaviour of AWS KMS: sizes, states, errors and their codes, in
https://docs.aws.amazon.com/kms/latest/APIReference/ and, for what a key state allows,
https://docs.aws.amazon.com/kms/latest/developerguide/key-state.html. What it leaves out:
policies are stored and not obeyed, and no key rotates by itself when its period is over.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import os
import re
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Concatenate, ParamSpec, TypeVar

from django.views.decorators.debug import sensitive_variables

from kms_hasher.exceptions import (
    AlreadyExists,
    ConfigurationError,
    IncorrectKey,
    InvalidRequest,
    KeyNotFound,
    KMSError,
)
from kms_hasher.providers import _rules, _software
from kms_hasher.providers._keys import Keys, Store, StoredKey
from kms_hasher.providers.base import (
    OPERATIONS,
    SYMMETRIC_DEFAULT,
    Context,
    DataKey,
    Decrypted,
    Encrypted,
    Key,
    KeyPolicy,
    Mac,
    PublicKey,
    ReEncrypted,
    Result,
    RotationStatus,
    Tags,
)

_P = ParamSpec("_P")
_R = TypeVar("_R", bound=Result)


def _call(
    method: Callable[Concatenate[SoftwareProvider, _P], _R],
) -> Callable[Concatenate[SoftwareProvider, _P], _R]:
    """Make a method one call to KMS: a request id, and AWS's names on every error."""
    operation = OPERATIONS[method.__name__]

    # Covers every frame below this one too: they hold plaintexts and key material.
    @functools.wraps(method)
    @sensitive_variables()
    def call(self: SoftwareProvider, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        request_ids = (str(uuid.uuid4()),)
        try:
            return dataclasses.replace(method(self, *args, **kwargs), request_ids=request_ids)
        except KMSError as error:
            error.key = error.key or str(kwargs.get("key") or next(iter(args), ""))
            error.operation, error.request_ids = operation, request_ids
            if error.code == type(error).__name__:
                error.code = _rules.CODES.get(type(error), error.code)
            raise

    return call


@contextlib.contextmanager
def _about(name: str) -> Iterator[None]:
    """Put `name` on errors from inside, for calls that name more than one key."""
    try:
        yield
    except KMSError as error:
        error.key = error.key or name
        raise


def _utc_now() -> datetime.datetime:
    return datetime.datetime.now(datetime.timezone.utc)


class SoftwareProvider:
    """
    AWS KMS on the keys in `store`.

    `account` (12 digits) and `region` only form the ARNs. `clock` returns the current time,
    aware; a test may replace it. Raises `ConfigurationError` if they form none.
    """

    def __init__(self, store: Store, *, account: str, region: str) -> None:
        if not re.fullmatch("[0-9]{12}", account) or not re.fullmatch("[a-z0-9-]+", region):
            raise ConfigurationError(
                f"{account!r} and {region!r}: an account has 12 digits, and a Region is made "
                "of lower-case letters, digits and hyphens."
            )
        self.account = account
        self.region = region
        self.clock: Callable[[], datetime.datetime] = _utc_now
        self._arn_prefix = f"arn:aws:kms:{region}:{account}:"
        self._store = store

    # --- what a login or a change of password needs ---------------------------------

    @_call
    def encrypt(
        self,
        key: str,
        plaintext: bytes,
        context: Context,
        *,
        algorithm: str = SYMMETRIC_DEFAULT,
        dry_run: bool = False,
    ) -> Encrypted:
        stored, ciphertext = self._seal(key, plaintext, context, algorithm)
        _rules.stop_dry_run(dry_run)
        return Encrypted(key_arn=self._arn(stored), ciphertext=ciphertext)

    @_call
    def decrypt(
        self,
        key: str,
        ciphertext: bytes,
        context: Context,
        *,
        algorithm: str = SYMMETRIC_DEFAULT,
        dry_run: bool = False,
    ) -> Decrypted:
        stored, plaintext, material_id = self._open(key, ciphertext, context, algorithm)
        _rules.stop_dry_run(dry_run)
        return Decrypted(
            key_arn=self._arn(stored), plaintext=plaintext, key_material_id=material_id
        )

    @_call
    def re_encrypt(
        self,
        source_key: str,
        ciphertext: bytes,
        source_context: Context,
        key: str,
        context: Context,
        *,
        source_algorithm: str = SYMMETRIC_DEFAULT,
        algorithm: str = SYMMETRIC_DEFAULT,
        dry_run: bool = False,
    ) -> ReEncrypted:
        source, plaintext, source_material_id = self._open(
            source_key, ciphertext, source_context, source_algorithm
        )
        target, sealed = self._seal(key, plaintext, context, algorithm)
        _rules.stop_dry_run(dry_run)
        return ReEncrypted(
            key_arn=self._arn(target),
            ciphertext=sealed,
            source_key_arn=self._arn(source),
            source_key_material_id=source_material_id,
            key_material_id=_material_id(target),
        )

    @_call
    def generate_mac(self, key: str, message: bytes) -> Mac:
        _rules.check_range("The message's length", len(message), 1, 4096)
        stored = self._find(self._store.read(), key)
        _rules.require_enabled(stored)
        _rules.require_usage(stored, "GENERATE_VERIFY_MAC")
        return Mac(key_arn=self._arn(stored), mac=_software.mac(stored, message))

    @_call
    def generate_data_key(self, key: str, context: Context, size: int = 32) -> DataKey:
        _rules.check_range("NumberOfBytes", size, 1, 1024)
        plaintext = os.urandom(size)
        stored, ciphertext = self._seal(key, plaintext, context, SYMMETRIC_DEFAULT)
        return DataKey(key_arn=self._arn(stored), plaintext=plaintext, ciphertext=ciphertext)

    @_call
    def get_public_key(self, key: str) -> PublicKey:
        stored = self._find(self._store.read(), key)
        _rules.require_public_key(stored)
        return PublicKey(
            key_arn=self._arn(stored),
            der=_software.public_key(stored),
            spec=stored.spec,
            usage=stored.usage,
        )

    # --- what keys are managed with -------------------------------------------------

    @_call
    def describe_key(self, key: str) -> Key:
        return self._metadata(self._find(self._store.read(), key))

    @_call
    def create_key(
        self,
        *,
        spec: str = SYMMETRIC_DEFAULT,
        usage: str = "ENCRYPT_DECRYPT",
        multi_region: bool = False,
        description: str = "",
        policy: str = "",
        tags: Mapping[str, str] | None = None,
    ) -> Key:
        _rules.check_spec(spec, usage)
        policy = policy or _rules.default_policy(self.account)
        _rules.check_policy(policy)
        unique = uuid.uuid4()
        key = StoredKey(
            id=f"mrk-{unique.hex}" if multi_region else str(unique),
            spec=spec,
            usage=usage,
            materials=(_software.new_material(spec),),
            created_at=self.clock(),
            multi_region=multi_region,
            description=description,
            policy=policy,
            tags=dict(tags or {}),
        )
        with self._change() as keys:
            keys.keys[key.id] = key
        return self._metadata(key)

    @_call
    def get_key_policy(self, key: str) -> KeyPolicy:
        stored = self._find(self._store.read(), key, by_alias=False)
        return KeyPolicy(key_arn=self._arn(stored), policy=stored.policy)

    @_call
    def list_resource_tags(self, key: str) -> Tags:
        stored = self._find(self._store.read(), key, by_alias=False)
        return Tags(key_arn=self._arn(stored), tags=dict(stored.tags))

    @_call
    def get_key_rotation_status(self, key: str) -> RotationStatus:
        stored = self._find(self._store.read(), key, by_alias=False)
        # KMS: off while the key waits for its deletion, and back if that is cancelled.
        days = None if stored.deletion_at else stored.rotation_days
        return RotationStatus(key_arn=self._arn(stored), period_days=days)

    @_call
    def enable_key_rotation(self, key: str, period_days: int = 365) -> Result:
        _rules.check_range("RotationPeriodInDays", period_days, 90, 2560)
        return self._update(key, _rules.require_rotatable, rotation_days=period_days)

    @_call
    def rotate_key_on_demand(self, key: str) -> Result:
        with self._change() as keys:
            stored = self._find(keys, key, by_alias=False)
            _rules.require_rotations_left(stored)
            materials = (*stored.materials, _software.new_material(stored.spec))
            keys.keys[stored.id] = dataclasses.replace(stored, materials=materials)
        return Result(key_arn=self._arn(stored))

    @_call
    def create_alias(self, alias: str, key: str) -> Result:
        name = self._resource(alias)
        _rules.check_alias(name)
        with self._change() as keys:
            stored = self._alias_target(keys, key)
            if name in keys.aliases:
                raise AlreadyExists("The alias exists already.", key=alias)
            keys.aliases[name] = stored.id
        return Result(key_arn=self._arn(stored))

    @_call
    def update_alias(self, alias: str, key: str) -> Result:
        name = self._resource(alias)
        _rules.check_alias(name)
        with self._change() as keys:
            former = self._find(keys, alias)
            stored = self._alias_target(keys, key)
            _rules.require_same_kind(former, stored)
            keys.aliases[name] = stored.id
        return Result(key_arn=self._arn(stored))

    @_call
    def disable_key(self, key: str) -> Result:
        return self._update(key, _rules.require_kept, enabled=False)

    @_call
    def enable_key(self, key: str) -> Result:
        return self._update(key, _rules.require_kept, enabled=True)

    @_call
    def schedule_key_deletion(self, key: str, days: int = 30) -> Result:
        _rules.check_range("PendingWindowInDays", days, 7, 30)
        deletion_at = self.clock() + datetime.timedelta(days=days)
        return self._update(key, _rules.require_kept, deletion_at=deletion_at)

    @_call
    def cancel_key_deletion(self, key: str) -> Result:
        return self._update(
            key, _rules.require_pending_deletion, deletion_at=None, enabled=False
        )

    def close(self) -> None:
        """Nothing is held open between two calls."""

    # --- finding, sealing, changing -------------------------------------------------

    def _find(self, keys: Keys, name: str, *, by_alias: bool = True) -> StoredKey:
        """Return the key that KMS would take `name` for. Operations on keys take no alias."""
        kind, _, key_id = self._resource(name).partition("/")
        if kind == "alias":
            key_id = keys.aliases.get(f"alias/{key_id}", "") if by_alias else ""
        stored = keys.keys.get(key_id) if kind in ("key", "alias") else None
        if stored is None or stored.is_deleted(self.clock()):
            raise KeyNotFound(key=name)
        return stored

    def _resource(self, name: str) -> str:
        """Return "key/..." or "alias/...": what an ARN here ends in, or an id stands for."""
        if not name.startswith("arn:"):
            return name if name.startswith("alias/") else f"key/{name}"
        # Other accounts and Regions are other services, where nothing of ours exists.
        if not name.startswith(self._arn_prefix):
            raise KeyNotFound(key=name)
        return name[len(self._arn_prefix) :]

    def _seal(
        self, name: str, plaintext: bytes, context: Context, algorithm: str
    ) -> tuple[StoredKey, bytes]:
        with _about(name):
            _rules.check_range("The plaintext's length", len(plaintext), 1, 4096)
            stored = self._usable(name, context, algorithm)
            _rules.require_room(stored, len(plaintext))
            return stored, _software.seal(stored, plaintext, context)

    def _open(
        self, name: str, ciphertext: bytes, context: Context, algorithm: str
    ) -> tuple[StoredKey, bytes, str]:
        with _about(name):
            _rules.check_range("The ciphertext's length", len(ciphertext), 1, 6144)
            stored = self._usable(name, context, algorithm)
            if algorithm == SYMMETRIC_DEFAULT:
                made_by = _software.key_of(ciphertext)
                if made_by != stored.id and made_by in self._store.read().keys:
                    raise IncorrectKey
            return stored, *_software.open_sealed(stored, ciphertext, context)

    def _usable(self, name: str, context: Context, algorithm: str) -> StoredKey:
        _rules.check_algorithm(algorithm, context)
        stored = self._find(self._store.read(), name)
        _rules.require_enabled(stored)
        _rules.require_algorithm(stored, algorithm)
        return stored

    @contextlib.contextmanager
    def _change(self) -> Iterator[Keys]:
        with self._store.change() as keys:
            keys.delete_due(self.clock())
            yield keys

    def _update(
        self, name: str, require: Callable[[StoredKey], None], **changes: Any
    ) -> Result:
        with self._change() as keys:
            stored = self._find(keys, name, by_alias=False)
            require(stored)
            keys.keys[stored.id] = dataclasses.replace(stored, **changes)
        return Result(key_arn=self._arn(stored))

    def _alias_target(self, keys: Keys, name: str) -> StoredKey:
        with _about(name):
            if name.startswith("alias/") or ":alias/" in name:
                raise InvalidRequest("An alias points to a key, not to an alias.")
            stored = self._find(keys, name)
            _rules.require_kept(stored)
            return stored

    def _arn(self, stored: StoredKey) -> str:
        return f"{self._arn_prefix}key/{stored.id}"

    def _metadata(self, stored: StoredKey) -> Key:
        return Key(
            key_arn=self._arn(stored),
            spec=stored.spec,
            usage=stored.usage,
            state=stored.state,
            multi_region=stored.multi_region,
            description=stored.description,
            created_at=stored.created_at,
            deletion_at=stored.deletion_at,
            key_material_id=_material_id(stored),
        )


def _material_id(key: StoredKey) -> str:
    # KMS names the material of symmetric encryption keys only.
    return key.materials[-1].id if key.spec == SYMMETRIC_DEFAULT else ""
