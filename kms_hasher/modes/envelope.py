"""
`envelope`: the digest is encrypted here, by a data key that KMS keeps wrapped.

Sealed digest: AES-256-SIV (RFC 5297) under the data key, with `Access.binding` as associated
data. The data keys are rows, each wrapped as a hash in `direct` is; the ref of a stored
string is the number of its data key. What one call to KMS opens is all that the data key
has sealed, and a key of KMS is replaced by wrapping the data keys anew.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, Protocol

from django.views.decorators.debug import sensitive_variables

from kms_hasher.encoding import SealedHash, data_key_number, data_key_ref
from kms_hasher.exceptions import ConfigurationError, MalformedHash
from kms_hasher.modes.base import SYMMETRIC, Access, Opener
from kms_hasher.providers.base import ReEncrypted

NO_STORE = (
    "The mode \"envelope\" needs 'kms_hasher' in INSTALLED_APPS, where its data keys are."
)
FOREIGN = "the digest was not sealed by its data key with this header"


class DataKeys(Protocol):
    """Where data keys are. Both are called in the thread that has the database."""

    def take(self, access: Access) -> tuple[int, Opener]:
        """
        Return the number of a data key to seal one digest with, and what gives the key.

        Both may raise `DataKeyDamaged`.
        """

    def find(self, access: Access, number: int) -> Opener:
        """
        Return what gives the data key. Raises `DataKeyMissing` if there is none; both may
        raise `DataKeyDamaged`.
        """


def _data_keys() -> DataKeys:
    # By name: nothing else here knows of the database.
    try:
        store: DataKeys = import_module("kms_hasher.data_keys").STORE
    except RuntimeError:
        raise ConfigurationError(NO_STORE) from None
    return store


class Envelope:
    code = "e1"
    spec, usage = SYMMETRIC, "ENCRYPT_DECRYPT"
    core = "digest"
    rewraps = names_key = False
    fits_stock = True

    def sealer(self, access: Access) -> Callable[[bytes], SealedHash]:
        from cryptography.hazmat.primitives.ciphers.aead import AESSIV

        number, opener = _data_keys().take(access)

        @sensitive_variables()
        def seal(digest: bytes) -> SealedHash:
            sealed = AESSIV(opener.call()).encrypt(digest, [access.binding])
            return SealedHash(access.header, self.code, data_key_ref(number), sealed)

        return seal

    def opener(self, access: Access, stored: SealedHash) -> Opener:
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import AESSIV

        found = _data_keys().find(access, data_key_number(stored.key_ref))

        @sensitive_variables()
        def open_() -> bytes:
            key = found.call()
            try:
                return AESSIV(key).decrypt(stored.sealed, [access.binding])
            except InvalidTag:
                raise MalformedHash(FOREIGN) from None

        return Opener(found.key, open_)

    def derive(self, access: Access, stored: SealedHash, digest: bytes) -> bytes:
        return digest

    def rewrap(self, access: Access, stored: SealedHash, key_arn: str) -> Any:
        raise MalformedHash("data keys are re-wrapped, not what they have sealed")

    def rewrapped(self, access: Access, stored: SealedHash, answer: ReEncrypted) -> SealedHash:
        raise MalformedHash("data keys are re-wrapped, not what they have sealed")
