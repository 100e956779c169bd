"""
`mac`: a MAC of the digest is stored, made by an HMAC key that never leaves KMS.

What is held: the first 24 bytes of HMAC-SHA-256 (KMS GenerateMac) over 32 bytes of
`Access.binding` and the digest. Nobody can tell the digest by it, so that each guess takes a
call to KMS; and no key can be replaced but with the password. 192 bits are as good as 256
against forgery (NIST SP 800-107, section 5.3.3, asks for 32 and more), and the stored string
stays within 128 characters whatever the costs.

`mac_in_direct`: the same, encrypted by KMS once more. The outer key rotates by ReEncrypt.
Its key ref names both keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from django.views.decorators.debug import sensitive_variables

from kms_hasher.encoding import SealedHash, split_refs
from kms_hasher.exceptions import KMSBadResponse, MalformedHash
from kms_hasher.modes.base import HMAC, SYMMETRIC, Access, Opener
from kms_hasher.providers.base import ReEncrypted

#: Bytes of a MAC that are kept, of the 32 that KMS makes.
SIZE = 24
_WHOLE = 32


class Mac:
    code = "m1"
    spec, usage = HMAC, "GENERATE_VERIFY_MAC"
    core = "mac"
    rewraps, names_key = False, True
    fits_stock = True

    def sealer(self, access: Access) -> Callable[[bytes], SealedHash]:
        key = self._key(access)

        @sensitive_variables()
        def seal(digest: bytes) -> SealedHash:
            ref, mac = _mac(access, key, digest)
            return self.encloser(access, ref)(mac)

        return seal

    def _key(self, access: Access) -> str:
        return access.settings.key

    def encloser(self, access: Access, ref: str) -> Callable[[bytes], SealedHash]:
        """Return the call that makes a stored hash of a MAC made by the key with this ref."""
        return lambda mac: SealedHash(access.header, self.code, ref, mac)

    def opener(self, access: Access, stored: SealedHash) -> Opener:
        if len(stored.sealed) != SIZE:
            raise MalformedHash("the MAC has the wrong size")
        return Opener("", lambda: stored.sealed)

    @sensitive_variables()
    def derive(self, access: Access, stored: SealedHash, digest: bytes) -> bytes:
        return _mac(access, access.home(self.mac_ref(stored)), digest)[1]

    def mac_ref(self, stored: SealedHash) -> str:
        """Return the ref of the key that made the MAC."""
        return stored.key_ref

    def rewrap(self, access: Access, stored: SealedHash, key_arn: str) -> Any:
        raise MalformedHash("a MAC cannot be re-wrapped")

    def rewrapped(self, access: Access, stored: SealedHash, answer: ReEncrypted) -> SealedHash:
        raise MalformedHash("a MAC cannot be re-wrapped")


class MacInDirect(Mac):
    code = "n1"
    spec, usage = SYMMETRIC, "ENCRYPT_DECRYPT"
    rewraps = True
    fits_stock = False

    def _key(self, access: Access) -> str:
        return access.settings.mac_key

    def encloser(self, access: Access, ref: str) -> Callable[[bytes], SealedHash]:
        kms, key = access.kms(), access.settings.key

        @sensitive_variables()
        def enclose(mac: bytes) -> SealedHash:
            answer = access.anywhere(key, lambda key: kms.encrypt(key, mac, access.context))
            refs = f"{access.ref(answer.key_arn)}.{ref}"
            return SealedHash(access.header, self.code, refs, answer.ciphertext)

        return enclose

    def opener(self, access: Access, stored: SealedHash) -> Opener:
        kms, home = access.kms(SIZE), access.home(split_refs(stored.key_ref)[0])

        @sensitive_variables()
        def open_by(key: str) -> bytes:
            return kms.decrypt(key, stored.sealed, access.context).plaintext

        return Opener(home, lambda: access.anywhere(home, open_by))

    def mac_ref(self, stored: SealedHash) -> str:
        return split_refs(stored.key_ref)[1]

    def rewrap(self, access: Access, stored: SealedHash, key_arn: str) -> Any:
        context, source = access.context, access.home(split_refs(stored.key_ref)[0])
        return access.kms().re_encrypt(source, stored.sealed, context, key_arn, context)

    def rewrapped(self, access: Access, stored: SealedHash, answer: ReEncrypted) -> SealedHash:
        refs = f"{access.ref(answer.key_arn)}.{self.mac_ref(stored)}"
        return SealedHash(stored.header, self.code, refs, answer.ciphertext)


@sensitive_variables()
def _mac(access: Access, key: str, digest: bytes) -> tuple[str, bytes]:
    """Return the ref of the key that made the MAC, and the MAC."""
    kms, message = access.kms(), access.binding + digest
    answer = access.anywhere(key, lambda key: kms.generate_mac(key, message))
    if len(answer.mac) != _WHOLE:
        raise KMSBadResponse("the MAC has the wrong size", operation="GenerateMac", key=key)
    return access.ref(answer.key_arn), answer.mac[:SIZE]
