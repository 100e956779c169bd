"""
From a stored hash to the KMS call: which provider, which mode, which key.

`seal`, `open` (or `open_beside`) and `rewrap` are what the rest of the package needs. Key
ids come from the stored string; accounts and Regions from the settings, never from the
database. Each call to KMS emits one `kms_event`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from django.views.decorators.debug import sensitive_variables

from kms_hasher import background, breaker, conf, modes, signals
from kms_hasher.calls import akms, kms, provider, region_of
from kms_hasher.encoding import Header, SealedHash
from kms_hasher.exceptions import AuditError, MalformedHash
from kms_hasher.modes.base import Access
from kms_hasher.modes.mac import Mac
from kms_hasher.providers.base import Context, ReEncrypted

__all__ = [
    "access",
    "akms",
    "arewrap",
    "context_of",
    "converter",
    "kms",
    "open",
    "open_beside",
    "opener",
    "provider",
    "rewrap",
    "seal",
    "sealer",
]

T = TypeVar("T")


def access(
    header: Header,
    purpose: str,
    report: Callable[[signals.Event], None] = signals.emit,
) -> Access:
    """Return what a mode works with, for calls that are for `purpose`."""

    def service(sub: str, size: int | None) -> Any:
        return kms(purpose, sub, size=size, report=report)

    return Access(header, conf.get(), service)


def seal(header: Header, digest: bytes, *, purpose: str = "set") -> SealedHash:
    """
    Seal a digest with the key that the settings name, in the mode that they name.

    An alias is resolved by KMS itself, and the key that answered is the one recorded: a
    moved alias counts at once, in every process. Raises `KMSError`.
    """
    return sealer(header, purpose=purpose)(digest)


def sealer(header: Header, *, purpose: str) -> Callable[[bytes], SealedHash]:
    """Return the call that seals, from any thread; this one may read the database."""
    call = modes.by_name(conf.get().mode).sealer(access(header, purpose))
    size = header.kind.size

    @sensitive_variables()
    def seal(digest: bytes) -> SealedHash:
        if len(digest) != size:
            raise ValueError(f"only digests of {size} bytes are sealed")
        return call(digest)

    return seal


def open(stored: SealedHash, *, purpose: str = "login") -> bytes:
    """
    Return what a stored hash holds: its digest, or in the modes of a MAC that.

    Raises `InvalidCiphertext` or `MalformedHash` if it was altered or belongs to another
    hash, or its mode is unknown; or another `KMSError` if KMS cannot tell.
    """
    return opener(stored, purpose=purpose)()


def opener(stored: SealedHash, *, purpose: str) -> Callable[[], bytes]:
    """Return the call that opens, from any thread; this one may read the database."""
    mode = modes.by_code(stored.mode)
    return mode.opener(access(stored.header, purpose), stored).call


@sensitive_variables()
def open_beside(
    stored: SealedHash, compute: Callable[[], bytes], *, purpose: str = "login"
) -> tuple[bytes, bytes]:
    """
    Return what a stored hash holds, and what the digest that `compute` computes comes to:
    they are equal if the password is right.

    The call to KMS runs in a thread of its own, and its event is emitted by the calling
    thread. Where KMS is known to be out, nothing is computed. Raises what `open` does, when
    both are done.
    """
    mode, events = modes.by_code(stored.mode), list[signals.Event]()
    here = access(stored.header, purpose)
    held = mode.opener(access(stored.header, purpose, events.append), stored)
    if not held.key:  # KMS has no part in it, or is asked with what is computed
        digest = background.compute(compute)
        return held.call(), mode.derive(here, stored, digest)
    if breaker.of(region_of(held.key)).is_open:
        opened = open(stored, purpose=purpose)  # first: it may be all that there is to do
        return opened, mode.derive(here, stored, background.compute(compute))
    future = background.start(held.call)
    try:
        digest = background.compute(compute)
    finally:
        try:
            future.exception()  # waits
        except BaseException:  # a signal: the call goes on, and is told when it ends
            future.add_done_callback(lambda _: _emit_all(events))
            raise
        unrecorded = _emit_all(events)
    opened = future.result()  # KMS's own error says more than an AuditError
    if unrecorded:
        raise unrecorded
    return opened, mode.derive(here, stored, digest)


def _emit_all(events: list[signals.Event]) -> AuditError | None:
    """Emit the events, each of them; return what kept the first from being recorded."""
    failure = None
    for event in events:
        try:
            signals.emit(event)
        except AuditError as error:
            failure = failure or error
    return failure


def rewrap(
    stored: SealedHash, key_arn: str, *, purpose: str = "rotate"
) -> tuple[SealedHash, ReEncrypted]:
    """
    Return the stored hash sealed by another key, and KMS's answer. The digest stays in KMS.

    Raises `KMSError`, and `MalformedHash` if the mode is unknown or cannot be re-wrapped.
    """
    mode, own = modes.by_code(stored.mode), access(stored.header, purpose)
    answer = mode.rewrap(own, stored, key_arn)
    return mode.rewrapped(own, stored, answer), answer


async def arewrap(
    stored: SealedHash, key_arn: str, *, purpose: str = "rotate"
) -> tuple[SealedHash, ReEncrypted]:
    """Do the same on an event loop."""
    mode = modes.by_code(stored.mode)
    own = Access(stored.header, conf.get(), lambda sub, _: akms(purpose, sub))
    answer: ReEncrypted = await mode.rewrap(own, stored, key_arn)
    return mode.rewrapped(own, stored, answer), answer


def converter(stored: SealedHash, *, purpose: str = "rotate") -> Callable[[], SealedHash]:
    """
    Return the call that brings a stored hash into the mode that the settings name, from any
    thread; this one may read the database.

    What the hash holds is in memory for that time. Raises `MalformedHash` if the mode cannot
    be left without the password: a MAC gives no digest back.
    """
    source, target = modes.by_code(stored.mode), modes.by_name(conf.get().mode)
    if source.core not in ("digest", target.core):
        raise MalformedHash("a MAC gives no digest back")
    own = access(stored.header, purpose)
    held = source.opener(own, stored)
    if isinstance(source, Mac) and isinstance(target, Mac):
        finish = target.encloser(own, source.mac_ref(stored))
    else:
        finish = target.sealer(own)

    @sensitive_variables()
    def convert() -> SealedHash:
        return finish(held.call())

    return convert


def context_of(header: Header) -> Context:
    """Return the encryption context of a stored hash, see `modes.base.Access`."""
    return access(header, "").context
