"""
From a stored hash to the KMS call: which provider, which mode, which key.

`seal`, `open` (or `open_beside`) and `rewrap` are what the rest of the package needs. Key
ids come from the stored string; accounts and Regions from the settings, never from the
database. Each call to KMS emits one `kms_event`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, TypeVar

from django.views.decorators.debug import sensitive_variables

from kms_hasher import background, breaker, conf, encoding, modes, signals
from kms_hasher.calls import akms, kms, provider, region_of
from kms_hasher.encoding import Header, SealedHash
from kms_hasher.exceptions import (
    AuditError,
    KMSBadResponse,
    KMSUnavailable,
    MalformedHash,
)
from kms_hasher.providers.base import Provider, ReEncrypted

__all__ = ["akms", "arewrap", "kms", "open", "open_beside", "provider", "rewrap", "seal"]

T = TypeVar("T")

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
    mode, context = modes.by_name(settings.mode), context_of(header)
    service = kms(purpose, header.sub)

    @sensitive_variables()
    def seal_by(key: str) -> tuple[str, bytes]:
        return mode.seal(service, key, digest, context)

    arn, sealed = _anywhere(seal_by, settings, settings.key)
    return SealedHash(header, mode.code, _ref(arn, settings), sealed)


def open(stored: SealedHash, *, purpose: str = "login") -> bytes:
    """
    Return the digest of a stored hash: 32 bytes, by one call to KMS.

    Raises `InvalidCiphertext` if it was altered or belongs to another hash,
    `MalformedHash` if its mode is unknown, or another `KMSError` if KMS cannot tell.
    """
    return _opener(stored, kms(purpose, stored.header.sub, size=DIGEST_SIZE))()


@sensitive_variables()
def open_beside(
    stored: SealedHash, compute: Callable[[], T], *, purpose: str = "login"
) -> tuple[bytes, T]:
    """
    Return the digest of a stored hash, and what `compute` has computed meanwhile.

    The call to KMS runs in a thread of its own, and its event is emitted by the calling
    thread. Where KMS is known to be out, nothing is computed. Raises what `open` does, when
    both are done.
    """
    settings = conf.get()
    region = region_of(settings.key_for(stored.key_id))
    if breaker.of(region).is_open:
        return open(stored, purpose=purpose), compute()
    events: list[signals.Event] = []
    service = kms(purpose, stored.header.sub, size=DIGEST_SIZE, report=events.append)
    future = background.start(_opener(stored, service))
    try:
        computed = background.compute(compute)
    finally:
        future.exception()  # waits
        unrecorded = _emit_all(events)
    digest = future.result()  # KMS's own error says more than an AuditError
    if unrecorded:
        raise unrecorded
    return digest, computed


def _emit_all(events: list[signals.Event]) -> AuditError | None:
    """Emit the events, each of them; return what kept the first from being recorded."""
    failure = None
    for event in events:
        try:
            signals.emit(event)
        except AuditError as error:
            failure = failure or error
    return failure


def _opener(stored: SealedHash, service: Provider) -> Callable[[], bytes]:
    """Return the call that opens a stored hash; what can be wrong with it is found here."""
    settings = conf.get()
    mode, context = modes.by_code(stored.mode), context_of(stored.header)
    home = settings.key_for(stored.key_id)

    def open_by(key: str) -> bytes:
        return mode.open(service, key, stored.sealed, context)

    return functools.partial(_anywhere, open_by, settings, home)


def _anywhere(call: Callable[[str], T], settings: conf.Conf, key: str) -> T:
    """Return what `call` gives for the key or, while KMS is out there, for a replica."""
    try:
        return call(key)
    except KMSUnavailable as error:
        for replica in settings.replicas(key):
            with contextlib.suppress(KMSUnavailable):
                return call(replica)
        raise error from None


def rewrap(
    stored: SealedHash, key_arn: str, *, purpose: str = "rotate"
) -> tuple[SealedHash, ReEncrypted]:
    """
    Return the stored hash sealed by another key, and KMS's answer. The digest stays in KMS.

    Raises `KMSError`, and `MalformedHash` if the mode is unknown.
    """
    answer = _rewrap(kms(purpose, stored.header.sub), stored, key_arn)
    return _rewrapped(stored, answer), answer


async def arewrap(
    stored: SealedHash, key_arn: str, *, purpose: str = "rotate"
) -> tuple[SealedHash, ReEncrypted]:
    """Do the same on an event loop."""
    answer: ReEncrypted = await _rewrap(akms(purpose, stored.header.sub), stored, key_arn)
    return _rewrapped(stored, answer), answer


def _rewrap(service: Provider, stored: SealedHash, key_arn: str) -> Any:
    """Return what the mode makes of the call, which may have to be awaited."""
    source = conf.get().key_for(stored.key_id)
    mode, context = modes.by_code(stored.mode), context_of(stored.header)
    return mode.rewrap(service, source, stored.sealed, key_arn, context)


def _rewrapped(stored: SealedHash, answer: ReEncrypted) -> SealedHash:
    ref = _ref(answer.key_arn, conf.get())
    return SealedHash(stored.header, stored.mode, ref, answer.ciphertext)


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
    known = settings.key_for(encoding.key_id(ref))
    if arn not in (known, *settings.replicas(known)) and known.startswith("arn:"):
        raise KMSBadResponse("the answer names a key outside the account and Region of KEY")
    return ref
