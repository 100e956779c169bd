"""
`public_key`: the digest is encrypted here, with the public half of an RSA key of KMS's.

Sealed digest: RSAES_OAEP_SHA_256 (RFC 8017, section 7.1) of 32 bytes of `Access.binding` and
the digest: KMS takes no context for RSA, so the binding is inside. To seal one needs no
permission, to open one the private half, which never leaves KMS. Whoever can write to the
database can forge a hash, as the public half is no secret.

The public key is that of the settings, or KMS's own answer; never one from the database.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from django.views.decorators.debug import sensitive_variables

from kms_hasher import encoding
from kms_hasher.encoding import SealedHash
from kms_hasher.exceptions import (
    ConfigurationError,
    KMSBadResponse,
    MalformedHash,
)
from kms_hasher.modes.base import RSA, Access, Opener
from kms_hasher.modes.direct import Direct
from kms_hasher.providers.base import RSAES_OAEP_SHA_256

#: Seconds for which a process seals with the public key that KMS gave it: for so long after
#: an alias was moved new passwords may still come under the former key.
KEPT = 60.0

#: Bits of the moduli that KMS has.
SIZES = (2048, 3072, 4096)

_BINDING = 32

NO_PEM = (
    "KMS_HASHER['PUBLIC_KEY'] is not, in PEM, the public key of an RSA key of 2048, 3072 or "
    "4096 bits."
)
OTHER_HALF = (
    "KMS_HASHER['PUBLIC_KEY'] is not the public half of {key}: what is sealed with it can "
    "never be opened. Users whose passwords were set with it need new ones."
)


class _Public(NamedTuple):
    ref: str
    key: Any
    until: float


_lock = threading.Lock()
_kept: dict[tuple[str, str], _Public] = {}


class PublicKey(Direct):
    code = "p1"
    spec, usage = RSA, "ENCRYPT_DECRYPT"

    def sealer(self, access: Access) -> Callable[[bytes], SealedHash]:
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.asymmetric import padding

        public = _public_key(access)

        @sensitive_variables()
        def seal(digest: bytes) -> SealedHash:
            oaep = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None)
            sealed = public.key.encrypt(access.binding + digest, oaep)
            return SealedHash(access.header, self.code, public.ref, sealed)

        return seal

    def opener(self, access: Access, stored: SealedHash) -> Opener:
        size = _BINDING + stored.header.kind.size
        kms, home = access.kms(), access.home(stored.key_ref)

        @sensitive_variables()
        def open_by(key: str) -> bytes:
            answer = kms.decrypt(key, stored.sealed, {}, algorithm=RSAES_OAEP_SHA_256)
            if len(answer.plaintext) != size:
                # Not a damaged answer: anybody can encrypt something of this size.
                raise MalformedHash("what is sealed has the wrong size")
            if not hmac.compare_digest(answer.plaintext[:_BINDING], access.binding):
                raise MalformedHash("the digest is bound to another header")
            return answer.plaintext[_BINDING:]

        return Opener(home, lambda: access.anywhere(home, open_by))

    def rewrap(self, access: Access, stored: SealedHash, key_arn: str) -> Any:
        return access.kms().re_encrypt(
            access.home(stored.key_ref),
            stored.sealed,
            {},
            key_arn,
            {},
            source_algorithm=RSAES_OAEP_SHA_256,
            algorithm=RSAES_OAEP_SHA_256,
        )


def _public_key(access: Access) -> _Public:
    """Return the key to seal with, and its ref, which are the settings' own or KMS's answer."""
    settings = access.settings
    name = settings.key, settings.public_key
    found = _kept.get(name)
    if found and time.monotonic() < found.until:
        return found
    if settings.public_key:
        ref = encoding.key_ref(settings.key.rpartition("/")[2])
        found = _Public(ref, load(settings.public_key), float("inf"))
    else:
        asked = time.monotonic()
        answer = access.anywhere(settings.key, access.kms().get_public_key)
        try:
            key = load_der(answer.der)
        except ValueError:
            raise KMSBadResponse("the answer holds no RSA public key") from None
        found = _Public(access.ref(answer.key_arn), key, asked + KEPT)
    with _lock:
        _kept.clear()  # there is one at a time: another is another setting
        _kept[name] = found
    return found


def load(pem: str) -> Any:
    """Return the public key of a PEM text. Raises `ConfigurationError`."""
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        return _checked(load_pem_public_key(pem.encode()))
    except ValueError:
        raise ConfigurationError(NO_PEM) from None


def load_der(der: bytes) -> Any:
    """Return the public key of a SubjectPublicKeyInfo. Raises `ValueError`."""
    from cryptography.hazmat.primitives.serialization import load_der_public_key

    return _checked(load_der_public_key(der))


def fingerprint(der: bytes) -> str:
    """Return the SHA-256 of a SubjectPublicKeyInfo, as 64 hexadecimal digits."""
    return hashlib.sha256(der).hexdigest()


def _checked(key: Any) -> Any:
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

    if not isinstance(key, RSAPublicKey) or key.key_size not in SIZES:
        raise ValueError("no RSA key of a size that KMS has")
    return key


def forget() -> None:
    """Forget the public keys that KMS gave."""
    with _lock:
        _kept.clear()


def _after_fork() -> None:  # pragma: no cover: it runs in a child
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
