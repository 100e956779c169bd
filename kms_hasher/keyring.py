"""
From a stored hash to the KMS call: which provider, which mode, which key.

`seal`, `open` and `rewrap` are what the rest of the package needs. Key ids come from the
stored string; accounts and Regions from the settings, never from the database. Each call
to KMS emits one `kms_event`.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, cast

from django.utils import timezone
from django.views.decorators.debug import sensitive_variables

from kms_hasher import conf, encoding, modes, providers, signals
from kms_hasher.encoding import Header, SealedHash
from kms_hasher.exceptions import AuditError, KMSBadResponse, KMSError, MalformedHash
from kms_hasher.providers.base import OPERATIONS, Provider, ReEncrypted, Result

#: Bytes in an Argon2 digest: what Django's hasher makes, and what is sealed.
DIGEST_SIZE = 32


@sensitive_variables("digest")
def seal(header: Header, digest: bytes, *, purpose: str = "set") -> SealedHash:
    """
    Seal a digest with the key that the settings name.

    An alias is resolved by KMS itself, and the key that answered is the one recorded: a
    moved alias counts at once, in every process. Raises `KMSError`.
    """
    if len(digest) != DIGEST_SIZE:
        raise ValueError(f"only digests of {DIGEST_SIZE} bytes are sealed")
    settings = conf.get()
    mode = modes.by_name(settings.mode)
    arn, sealed = mode.seal(kms(purpose, header.sub), settings.key, digest, context_of(header))
    return SealedHash(header, mode.code, _ref(arn, settings), sealed)


def open(stored: SealedHash, *, purpose: str = "login") -> bytes:
    """
    Return the digest of a stored hash: 32 bytes, by one call to KMS.

    Raises `InvalidCiphertext` if it was altered or belongs to another hash,
    `MalformedHash` if its mode is unknown, or another `KMSError` if KMS cannot tell.
    """
    mode = modes.by_code(stored.mode)
    key = conf.get().key_for(stored.key_id)
    header = stored.header
    digest = mode.open(kms(purpose, header.sub), key, stored.sealed, context_of(header))
    if len(digest) != DIGEST_SIZE:
        raise KMSBadResponse("the digest has the wrong size", operation="Decrypt", key=key)
    return digest


def rewrap(
    stored: SealedHash, key_arn: str, *, purpose: str = "rotate"
) -> tuple[SealedHash, ReEncrypted]:
    """
    Return the stored hash sealed by another key, and KMS's answer. The digest stays in KMS.

    Raises `KMSError`, and `MalformedHash` if the mode is unknown.
    """
    settings = conf.get()
    mode = modes.by_code(stored.mode)
    answer = mode.rewrap(
        kms(purpose, stored.header.sub),
        settings.key_for(stored.key_id),
        stored.sealed,
        key_arn,
        context_of(stored.header),
    )
    ref = _ref(answer.key_arn, settings)
    return SealedHash(stored.header, stored.mode, ref, answer.ciphertext), answer


def context_of(header: Header) -> dict[str, str]:
    """
    Return the encryption context of a stored hash. It stands in CloudTrail in plain text.

    It binds the blob to its own header, so that neither can be swapped for another row's.
    """
    context = {"application": "kms_hasher", "use": "password", "sub": header.sub}
    if deployment := conf.get().deployment:
        context["deployment"] = deployment
    return context


def _ref(arn: str, settings: conf.Conf) -> str:
    """Return the key ref of the ARN that KMS answered with, if we could ask for it again."""
    try:
        ref = encoding.key_ref(encoding.ARN.parse(arn).resource.removeprefix("key/"))
    except MalformedHash:
        raise KMSBadResponse("the answer names no key") from None
    if settings.key_for(encoding.key_id(ref)) not in (arn, encoding.key_id(ref)):
        raise KMSBadResponse("the answer names a key outside the account and Region of KEY")
    return ref


# --- the provider, shared by all threads of a process -------------------------------

_lock = threading.Lock()
_shared: tuple[tuple[str, Mapping[str, Any]], Provider] | None = None


def provider() -> Provider:
    """
    Return the process's provider, made when it is first needed and after each fork.

    Raises `ConfigurationError` if the settings cannot make one.
    """
    global _shared
    settings = conf.get()
    wanted = (settings.provider, dict(settings.options))
    with _lock:
        if _shared is None or _shared[0] != wanted:
            _shared = wanted, providers.create(settings)
        return _shared[1]


def _after_fork() -> None:  # pragma: no cover: it runs in a child
    # A client shared with the parent has answered with the parent's plaintext.
    global _lock, _shared
    _lock, _shared = threading.Lock(), None


os.register_at_fork(after_in_child=_after_fork)


# --- one event for each call --------------------------------------------------------


def kms(purpose: str, sub: str = "") -> Provider:
    """
    Return the provider, with each call reported as one `kms_event`.

    `purpose` says what the calls are for: login, set, rotate, status.
    """
    return cast(Provider, _Reported(provider(), purpose, sub))


class _Reported:
    """A provider whose methods emit an event, whatever comes of the call."""

    def __init__(self, provider: Provider, purpose: str, sub: str) -> None:
        self._provider = provider
        self._purpose = purpose
        self._sub = sub

    def __getattr__(self, name: str) -> Callable[..., Result]:
        operation = OPERATIONS[name]
        method = getattr(self._provider, name)

        @sensitive_variables()
        def call(*args: Any, **kwargs: Any) -> Result:
            # What is named first is a key or an alias, in all methods but create_key.
            requested = str(args[0]) if args else ""
            started = time.perf_counter()
            try:
                result: Result = method(*args, **kwargs)
            except Exception as raised:  # noqa: BLE001  # a provider of the site's own
                error = raised if isinstance(raised, KMSError) else None
                # Another error is not passed on: its frames may hold the plaintext.
                error = error or KMSError(
                    f"the provider raised {type(raised).__name__}",
                    operation=operation,
                    key=requested,
                )
                with contextlib.suppress(AuditError):  # the call's own error says more
                    self._report(operation, requested, started, error=error)
                raise error from None
            self._report(operation, requested, started, result=result)
            return result

        return call

    def _report(
        self,
        operation: str,
        requested: str,
        started: float,
        *,
        result: Result | None = None,
        error: KMSError | None = None,
    ) -> None:
        source = result or error
        signals.emit(
            signals.Event(
                time=timezone.now(),
                operation=operation,
                purpose=self._purpose,
                outcome=signals.outcome_of(error) if error else signals.SUCCESS,
                error_code=error.code if error else "",
                requested_key=requested,
                key=result.key_arn if result else requested,
                latency=time.perf_counter() - started,
                request_ids=source.request_ids if source else (),
                sub=self._sub,
            )
        )
