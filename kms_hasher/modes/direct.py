"""
`direct`: the digest itself is encrypted by KMS, one logged call for each and every hash.

Sealed digest: KMS's CiphertextBlob, with the context as additional authenticated data.
"""

from __future__ import annotations

from django.views.decorators.debug import sensitive_variables

from kms_hasher.providers.base import Context, Provider, ReEncrypted


class Direct:
    code = "d1"

    @sensitive_variables("digest")
    def seal(
        self, kms: Provider, key: str, digest: bytes, context: Context
    ) -> tuple[str, bytes]:
        encrypted = kms.encrypt(key, digest, context)
        return encrypted.key_arn, encrypted.ciphertext

    def open(self, kms: Provider, key: str, sealed: bytes, context: Context) -> bytes:
        return kms.decrypt(key, sealed, context).plaintext

    def rewrap(
        self, kms: Provider, source_key: str, sealed: bytes, key: str, context: Context
    ) -> ReEncrypted:
        return kms.re_encrypt(source_key, sealed, context, key, context)
