"""
`direct`: the digest itself is encrypted by KMS, one logged call for each and every hash.

Sealed digest: KMS's CiphertextBlob, with the context as additional authenticated data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from django.views.decorators.debug import sensitive_variables

from kms_hasher.encoding import SealedHash
from kms_hasher.modes.base import SYMMETRIC, Access, Opener
from kms_hasher.providers.base import ReEncrypted


class Direct:
    code = "d1"
    spec, usage = SYMMETRIC, "ENCRYPT_DECRYPT"
    core = "digest"
    rewraps = names_key = True
    fits_stock = False

    def sealer(self, access: Access) -> Callable[[bytes], SealedHash]:
        kms, settings = access.kms(), access.settings

        @sensitive_variables()
        def seal(digest: bytes) -> SealedHash:
            encrypted = access.anywhere(
                settings.key, lambda key: kms.encrypt(key, digest, access.context)
            )
            ref = access.ref(encrypted.key_arn)
            return SealedHash(access.header, self.code, ref, encrypted.ciphertext)

        return seal

    def opener(self, access: Access, stored: SealedHash) -> Opener:
        kms, home = access.kms(stored.header.kind.size), access.home(stored.key_ref)

        @sensitive_variables()
        def open_by(key: str) -> bytes:
            return kms.decrypt(key, stored.sealed, access.context).plaintext

        return Opener(home, lambda: access.anywhere(home, open_by))

    def derive(self, access: Access, stored: SealedHash, digest: bytes) -> bytes:
        return digest

    def rewrap(self, access: Access, stored: SealedHash, key_arn: str) -> Any:
        context, source = access.context, access.home(stored.key_ref)
        return access.kms().re_encrypt(source, stored.sealed, context, key_arn, context)

    def rewrapped(self, access: Access, stored: SealedHash, answer: ReEncrypted) -> SealedHash:
        ref = access.ref(answer.key_arn)
        return dataclasses.replace(stored, key_ref=ref, sealed=answer.ciphertext)
