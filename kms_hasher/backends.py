"""
`KMSModelBackend`: Django's ModelBackend, with nothing to learn from what it costs.

Stock Django hashes a password for an unknown user and checks one for a known user. With a
sealed hash these are different calls to KMS, and only the second overlaps with Argon2.
Here every attempt is a check, of the user's own hash or of a decoy that nobody has the
password of: one call of one kind, whoever is asked for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import secrets
import time
from typing import Any

from asgiref.sync import sync_to_async
from django.contrib.auth import get_user_model
from django.contrib.auth.backends import ModelBackend
from django.contrib.auth.base_user import AbstractBaseUser
from django.contrib.auth.hashers import (
    check_password,
    get_hasher,
    identify_hasher,
    make_password,
)
from django.core.signals import setting_changed
from django.http import HttpRequest
from django.utils.crypto import salted_hmac
from django.views.decorators.debug import sensitive_variables

from kms_hasher import background, conf, encoding, keyring, users
from kms_hasher.exceptions import (
    ConfigurationError,
    DataKeyDamaged,
    DataKeyMissing,
    KeyNotFound,
    KeyUnusable,
    KMSAccessDenied,
    KMSHasherError,
    MalformedHash,
)


class KMSModelBackend(ModelBackend):
    """
    Put "kms_hasher.backends.KMSModelBackend" in the place of Django's ModelBackend.

    Permissions and all else are inherited. `authenticate` raises `KMSError` if KMS cannot
    tell whether the password is right. `aauthenticate` computes nothing on the event loop.
    """

    @sensitive_variables()
    def authenticate(
        self,
        request: HttpRequest | None,
        username: str | None = None,
        password: str | None = None,
        **kwargs: Any,
    ) -> Any:
        model = get_user_model()
        name = kwargs.get(model.USERNAME_FIELD) if username is None else username
        if name is None or password is None:
            return None
        try:
            user = model._default_manager.get_by_natural_key(name)
        except model.DoesNotExist:
            user = None
        if user is None or not _is_checkable(user.password):
            check_decoy(password, name)
            return None
        if type(user).check_password in _KNOWN_CHECKS:
            # Not by the method: a decorator nearer to Django's frames than ours would say
            # what error reports may show of them.
            matches = check_password(
                password, user.password, functools.partial(users.upgrade, user)
            )
            if matches and users.may_move(user):
                users.move(user, password)
        else:
            matches = user.check_password(password)
        return user if matches and self.user_can_authenticate(user) else None

    @sensitive_variables()
    async def aauthenticate(
        self,
        request: HttpRequest | None,
        username: str | None = None,
        password: str | None = None,
        **kwargs: Any,
    ) -> Any:
        model = get_user_model()
        name = kwargs.get(model.USERNAME_FIELD) if username is None else username
        if name is None or password is None:
            return None
        try:
            user = await model._default_manager.aget_by_natural_key(name)
        except model.DoesNotExist:
            user = None

        # What runs in another thread is hidden from error reports there, and takes no
        # arguments: asgiref's frames in between would show them.
        @sensitive_variables()
        def check() -> bool:
            with background.beside_loop():
                if user is None or not _is_checkable(user.password):
                    check_decoy(password, name)
                    return False
                return check_password(password, user.password, upgrade.append)

        @sensitive_variables()
        def do_upgrade() -> None:
            users.upgrade(user, password)

        @sensitive_variables()
        def do_move() -> None:
            users.move(user, password)

        upgrade: list[str] = []
        if user is not None and type(user).acheck_password not in _KNOWN_CHECKS:
            matches = await user.acheck_password(password)
        else:
            # In any thread, for none of the caller's is needed; the upgrade in Django's own.
            matches = await sync_to_async(check, thread_sensitive=_in_test(user))()
            if matches and not upgrade and users.may_move(user):
                await sync_to_async(do_move)()
        if upgrade:
            await sync_to_async(do_upgrade)()
        return user if matches and self.user_can_authenticate(user) else None


#: What is done here in their place. A model that checks passwords in its own way does so.
_KNOWN_CHECKS = (
    AbstractBaseUser.check_password,
    AbstractBaseUser.acheck_password,
    users.KMSUserMixin.check_password,
    users.KMSUserMixin.acheck_password,
)


# --- the decoy ----------------------------------------------------------------------

#: By the key that the settings name: a hash that no password matches.
_decoys: dict[str, str] = {}


def prewarm() -> None:
    """
    Make what the first attempts would otherwise wait for; call it when a worker starts.

    Library, provider, connection and decoy are made by one Encrypt, the threads with it.
    Raises nothing: what KMS cannot do now, the attempts themselves will.
    """
    background.start(bool).result()
    with contextlib.suppress(KMSHasherError):
        _make_decoy(conf.get().key)


@sensitive_variables()
def check_decoy(password: str, name: str = "") -> None:
    """
    Do what checking the password of a user of this name does.

    Raises `KMSError` if KMS cannot answer.
    """
    settings = conf.get()
    key = settings.key
    if key not in _decoys:
        _make_decoy(key)  # one call as well, if of another kind: see `prewarm`
        if settings.mode != "public_key":
            return
    try:
        if settings.mode == "envelope" and settings.data_key_cache_seconds:
            _check_elsewhere(password, name, _decoys[key])
        else:
            check_password(password, _decoys[key])
    except (KeyUnusable, KeyNotFound, KMSAccessDenied, DataKeyDamaged, DataKeyMissing):
        # The key has been rotated away since, or the data key pruned; or it is out of use,
        # which this tells.
        _make_decoy(key)


@sensitive_variables()
def _check_elsewhere(password: str, name: str, decoy: str) -> None:
    """
    Check the decoy as if it were under the data key that falls to the name.

    Data keys are kept for a while, and a user's own is in memory or not: one for all unknown
    names, which always is, would tell them. It opens nothing, and that matches nothing.
    """
    among = _data_keys()
    if not among:  # all were deleted since the decoy was made
        raise DataKeyMissing(0)
    share = int(salted_hmac("kms_hasher.backends", name, algorithm="sha256").hexdigest(), 16)
    ref = encoding.data_key_ref(among[share % len(among)])
    stored = dataclasses.replace(encoding.parse(decoy), key_ref=ref)
    hasher: Any = get_hasher(stored.header.algorithm)
    with contextlib.suppress(MalformedHash):
        keyring.open_beside(stored, functools.partial(hasher._digest, password, stored.header))


#: Seconds for which a process takes the data keys that there were for all.
LOOKED_UP = 60.0

_numbers: tuple[float, list[int]] = (0.0, [])


def _data_keys() -> list[int]:
    global _numbers
    from kms_hasher import data_keys  # of one mode alone

    until, found = _numbers
    if time.monotonic() >= until or not found:
        found = data_keys.numbers()
        _numbers = time.monotonic() + LOOKED_UP, found
    return found


def _make_decoy(key: str) -> None:
    _decoys[key] = make_password(secrets.token_urlsafe())


def _in_test(user: Any) -> bool:
    """Return whether the check needs a data key that a test's own transaction may hold."""
    with contextlib.suppress(ConfigurationError):
        settings = conf.get()
        sealed = user is not None and encoding.IN_ENVELOPE in str(user.password)
        return settings.audit == "inline" and (sealed or settings.mode == "envelope")
    return False


def _is_checkable(encoded: str) -> bool:
    """Return whether checking it calls a hasher: it is not unusable and not gibberish."""
    try:
        identify_hasher(encoded)
    except ValueError:
        return False
    return True


def _forget(*, setting: str, **kwargs: Any) -> None:
    global _numbers
    if setting in ("KMS_HASHER", "PASSWORD_HASHERS"):
        _decoys.clear()
        _numbers = 0.0, []


setting_changed.connect(_forget)
