"""What every mode is, and what it works with."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

from kms_hasher import encoding
from kms_hasher.conf import Conf
from kms_hasher.encoding import Header, SealedHash
from kms_hasher.exceptions import KMSBadResponse, KMSUnavailable, MalformedHash
from kms_hasher.providers.base import Context, Provider, ReEncrypted

T = TypeVar("T")

#: Classes of keys, as UpdateAlias compares them: the first part of KMS's key specs.
SYMMETRIC, RSA, HMAC = "SYMMETRIC", "RSA", "HMAC"


@dataclass(frozen=True)
class Access:
    """
    What a mode works with: the settings, the header that all is bound to, and KMS.

    `service` gives, for a `sub` and the bytes that a plaintext must have, the provider whose
    calls are reported.
    """

    header: Header
    settings: Conf
    service: Callable[[str, int | None], Any]

    def kms(self, size: int | None = None) -> Provider:
        """Return KMS; a plaintext that has not `size` bytes is a damaged answer."""
        service: Provider = self.service(self.header.sub, size)
        return service

    def of(self, header: Header) -> Access:
        """Return the same for another header."""
        return dataclasses.replace(self, header=header)

    @property
    def context(self) -> Context:
        """
        The encryption context. It stands in CloudTrail in plain text.

        It binds the blob to its own header, so that neither can be swapped for another row's.
        """
        header = self.header
        context = {"application": "kms_hasher", "use": header.use, "sub": header.sub}
        if self.settings.deployment:
            context["deployment"] = self.settings.deployment
        return context

    @property
    def binding(self) -> bytes:
        """32 bytes that stand for the context, where KMS takes none."""
        text = json.dumps(self.context, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode("ascii")).digest()

    def anywhere(self, key: str, call: Callable[[str], T]) -> T:
        """Return what `call` gives for the key or, while KMS is out there, for a replica."""
        try:
            return call(key)
        except KMSUnavailable as error:
            for replica in self.settings.replicas(key):
                with contextlib.suppress(KMSUnavailable):
                    return call(replica)
            raise error from None

    def home(self, ref: str) -> str:
        """Return how KMS is asked for the key with this ref. Raises `MalformedHash`."""
        return self.settings.key_for(encoding.key_id(ref))

    def ref(self, arn: str) -> str:
        """Return the ref of the ARN that KMS answered with, if we could ask for it again."""
        try:
            ref = encoding.key_ref(encoding.ARN.parse(arn).resource.removeprefix("key/"))
        except MalformedHash:
            raise KMSBadResponse("the answer names no key") from None
        known = self.home(ref)
        if arn not in (known, *self.settings.replicas(known)) and known.startswith("arn:"):
            raise KMSBadResponse("the answer names a key outside the account and Region of KEY")
        return ref


class Opener(NamedTuple):
    """
    The call that gives what a stored hash holds: from any thread, without the database.

    `key` is the KMS key that is asked, "" where KMS is not.
    """

    key: str
    call: Callable[[], bytes]


class Mode(Protocol):
    """
    How a digest is sealed, opened and re-wrapped.

    `opener` and `sealer` are called in the thread that has the database, and what they return
    in any thread. What a stored hash holds is the digest, or where `core` is "mac" a MAC of
    it, which `derive` makes of a digest.
    """

    #: What stands in the stored string: a letter, and the version of the layout.
    code: str
    #: The class of key that KEY must name, and KMS's name of its usage.
    spec: str
    usage: str
    #: What is held: "digest" or "mac". A MAC gives no digest back.
    core: str
    #: Whether ReEncrypt brings stored values under another key.
    rewraps: bool
    #: Whether a stored value names its KMS key.
    names_key: bool
    #: Whether stored values fit the 128 characters of Django's own column.
    fits_stock: bool

    def sealer(self, access: Access) -> Callable[[bytes], SealedHash]:
        """Return the call that seals a digest. It raises `KMSError`."""

    def opener(self, access: Access, stored: SealedHash) -> Opener:
        """
        Return the call that gives what is held. It raises `InvalidCiphertext` if it is not
        this hash's own, or another `KMSError`. Raises `MalformedHash`.
        """

    def derive(self, access: Access, stored: SealedHash, digest: bytes) -> bytes:
        """Return what is to be held if the password is right. Raises `KMSError`."""

    def rewrap(self, access: Access, stored: SealedHash, key_arn: str) -> Any:
        """Return what ReEncrypt answers, which may have to be awaited."""

    def rewrapped(self, access: Access, stored: SealedHash, answer: ReEncrypted) -> SealedHash:
        """Return the stored hash made of that answer."""
