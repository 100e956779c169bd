"""
What a KMS in software computes: KMS's algorithms.

A symmetric blob is a header of 136 bytes, which names the key and the key material and is
authenticated together with the encryption context, then AES-256-GCM's ciphertext and tag:
152 bytes more than the plaintext, as with KMS. An RSA blob is RSAES-OAEP-SHA256's output and
names nothing.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import os
import struct
import uuid
from typing import cast

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from kms_hasher.exceptions import InvalidCiphertext, InvalidRequest
from kms_hasher.providers._keys import Material, StoredKey
from kms_hasher.providers.base import SYMMETRIC_DEFAULT, Context

#: The RSA specs and their bits.
RSA_BITS = {"RSA_2048": 2048, "RSA_3072": 3072, "RSA_4096": 4096}

# magic, whether multi-Region, key id, key material id, nonce, padding
_HEADER = struct.Struct(">8s?16s32s12s67s")
_MAGIC = b"\x01localK\x01"
_OAEP = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), label=None)


def new_material(spec: str) -> Material:
    """Return new key material for a spec. RSA takes up to some seconds."""
    secret = os.urandom(32)
    if spec in RSA_BITS:
        secret = rsa.generate_private_key(65537, RSA_BITS[spec]).private_bytes(
            serialization.Encoding.DER,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    return Material(os.urandom(32).hex(), secret)


def plaintext_limit(spec: str) -> int:
    """Return how many bytes KMS encrypts at most under a key of `spec`."""
    return RSA_BITS[spec] // 8 - 66 if spec in RSA_BITS else 4096


def seal(key: StoredKey, plaintext: bytes, context: Context) -> bytes:
    """Return the ciphertext of `plaintext` under the key's newest material."""
    material = key.materials[-1]
    if key.spec != SYMMETRIC_DEFAULT:
        return _private_key(material.secret).public_key().encrypt(plaintext, _OAEP)
    nonce = os.urandom(12)
    multi_region, raw = key.id.startswith("mrk-"), uuid.UUID(key.id.removeprefix("mrk-")).bytes
    header = _HEADER.pack(
        _MAGIC, multi_region, raw, bytes.fromhex(material.id), nonce, os.urandom(67)
    )
    return header + AESGCM(material.secret).encrypt(nonce, plaintext, header + _aad(context))


def open_sealed(key: StoredKey, blob: bytes, context: Context) -> tuple[bytes, str]:
    """
    Return the plaintext and the id of the key material, the inverse of `seal`.

    Raises `InvalidCiphertext` for whatever `seal` did not write with this key and context.
    """
    if key.spec != SYMMETRIC_DEFAULT:
        try:
            return _private_key(key.materials[-1].secret).decrypt(blob, _OAEP), ""
        except ValueError:
            raise InvalidCiphertext from None
    header, body = blob[: _HEADER.size], blob[_HEADER.size :]
    if len(body) < 16:
        raise InvalidCiphertext
    *_, material_id, nonce, _ = _HEADER.unpack(header)
    for material in key.materials:
        if material.id == material_id.hex():
            try:
                plaintext = AESGCM(material.secret).decrypt(nonce, body, header + _aad(context))
            except InvalidTag:
                break
            return plaintext, material.id
    raise InvalidCiphertext


def key_of(blob: bytes) -> str:
    """Return the id of the key that a symmetric blob says it was made by, or ""."""
    if len(blob) < _HEADER.size or not blob.startswith(_MAGIC):
        return ""
    _, multi_region, raw, *_ = _HEADER.unpack(blob[: _HEADER.size])
    return f"mrk-{raw.hex()}" if multi_region else str(uuid.UUID(bytes=raw))


def mac(key: StoredKey, message: bytes) -> bytes:
    """Return HMAC-SHA-256 of `message`."""
    return hmac.digest(key.materials[-1].secret, message, hashlib.sha256)


def public_key(key: StoredKey) -> bytes:
    """Return the SubjectPublicKeyInfo, in DER, of an RSA key."""
    return (
        _private_key(key.materials[-1].secret)
        .public_key()
        .public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )


# Loading takes longer than decrypting; the file's checksum stands in for OpenSSL's.
@functools.lru_cache(maxsize=64)
def _private_key(der: bytes) -> rsa.RSAPrivateKey:
    key = serialization.load_der_private_key(
        der, password=None, unsafe_skip_rsa_key_validation=True
    )
    return cast(rsa.RSAPrivateKey, key)


def _aad(context: Context) -> bytes:
    """One byte string for each context: sorted, and every part with its length."""
    try:
        pairs = sorted((name.encode(), value.encode()) for name, value in context.items())
    except (UnicodeEncodeError, AttributeError):
        raise InvalidRequest(
            "The encryption context must map Unicode strings to strings."
        ) from None
    return b"".join(len(part).to_bytes(4, "big") + part for pair in pairs for part in pair)
