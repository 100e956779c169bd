"""
Published figures, and second implementations written from the standards alone.

What the modes seal is opened here without the libraries that sealed it: AES-SIV by RFC 5297,
with AES alone taken from a library, and RSAES-OAEP by RFC 8017, with Python's integers. Both
agree with the figures of their standards first, as does HMAC-SHA-256 with those of RFC 4231.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import itertools
import os
from pathlib import Path
from typing import Any

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.ciphers import modes as cipher_modes
from cryptography.hazmat.primitives.ciphers.aead import AESSIV
from django.contrib.auth.hashers import make_password
from hypothesis import given
from hypothesis import strategies as st

from kms_hasher import encoding, keyring
from kms_hasher.models import DataKey
from kms_hasher.providers import _software
from kms_hasher.providers._keyfile import Material
from kms_hasher.providers.local import LocalProvider
from tests import modes
from tests.hashers import CheapArgon2PasswordHasher

PASSWORD = "correct horse battery staple"


@pytest.fixture(autouse=True)
def no_audit(settings: Any) -> None:
    settings.KMS_HASHER = {**settings.KMS_HASHER, "AUDIT": "off"}


# --- RFC 5297, from the text ------------------------------------------------------------


def block(key: bytes, data: bytes) -> bytes:
    encryptor = Cipher(algorithms.AES(key), cipher_modes.ECB()).encryptor()
    return encryptor.update(data) + encryptor.finalize()


def xor(one: bytes, two: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(one, two, strict=True))


def dbl(data: bytes) -> bytes:
    """Section 2.3: multiplication by x in GF(2**128)."""
    number = int.from_bytes(data, "big") << 1
    return ((number ^ 0x87 if number >> 128 else number) % 2**128).to_bytes(16, "big")


def pad(data: bytes) -> bytes:
    return (data + b"\x80").ljust(16, b"\0")


def cmac(key: bytes, data: bytes) -> bytes:
    """NIST SP 800-38B, section 6.2."""
    k1 = dbl(block(key, bytes(16)))
    full = bool(data) and len(data) % 16 == 0
    cut = len(data) - 16 if full else len(data) - len(data) % 16
    last = xor(data[cut:], k1) if full else xor(pad(data[cut:]), dbl(k1))
    state = bytes(16)
    for start in range(0, cut, 16):
        state = block(key, xor(state, data[start : start + 16]))
    return block(key, xor(state, last))


def s2v(key: bytes, strings: list[bytes]) -> bytes:
    """Section 2.4."""
    state = cmac(key, bytes(16))
    for string in strings[:-1]:
        state = xor(dbl(state), cmac(key, string))
    last = strings[-1]
    if len(last) >= 16:
        return cmac(key, last[:-16] + xor(last[-16:], state))
    return cmac(key, xor(dbl(state), pad(last)))


def ctr(key: bytes, iv: bytes, data: bytes) -> bytes:
    """Section 2.5: two bits of the counter are cleared."""
    counter = int.from_bytes(iv, "big") & ~(1 << 63 | 1 << 31)
    stream = b"".join(
        block(key, ((counter + n) % 2**128).to_bytes(16, "big"))
        for n in range(-(-len(data) // 16))
    )
    return xor(data, stream[: len(data)])


def siv_encrypt(key: bytes, plaintext: bytes, associated: list[bytes]) -> bytes:
    """Section 2.6."""
    half = len(key) // 2
    iv = s2v(key[:half], [*associated, plaintext])
    return iv + ctr(key[half:], iv, plaintext)


def siv_decrypt(key: bytes, sealed: bytes, associated: list[bytes]) -> bytes | None:
    """Section 2.7. None stands for FAIL."""
    half, iv = len(key) // 2, sealed[:16]
    plaintext = ctr(key[half:], iv, sealed[16:])
    return plaintext if s2v(key[:half], [*associated, plaintext]) == iv else None


#: Appendix A.1 and A.2: key, associated data, plaintext, output.
RFC_5297 = [
    (
        "fffefdfcfbfaf9f8f7f6f5f4f3f2f1f0f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff",
        ["101112131415161718191a1b1c1d1e1f2021222324252627"],
        "112233445566778899aabbccddee",
        "85632d07c6e8f37f950acd320a2ecc9340c02b9690c4dc04daef7f6afe5c",
    ),
    (
        "7f7e7d7c7b7a79787776757473727170404142434445464748494a4b4c4d4e4f",
        [
            "00112233445566778899aabbccddeeffdeaddadadeaddadaffeeddccbbaa99887766554433221100",
            "102030405060708090a0",
            "09f911029d74e35bd84156c5635688c0",
        ],
        "7468697320697320736f6d6520706c61696e7465787420746f20656e63727970"
        "74207573696e67205349562d414553",
        "7bdb6e3b432667eb06f4d14bff2fbd0fcb900f2fddbe404326601965c889bf17"
        "dba77ceb094fa663b7a3f748ba8af829ea64ad544a272e9c485b62a3fd5c0d",
    ),
]


class TestSIV:
    @pytest.mark.parametrize(("key", "associated", "plaintext", "output"), RFC_5297)
    def test_the_figures_of_rfc_5297(
        self, key: str, associated: list[str], plaintext: str, output: str
    ) -> None:
        raw, data = bytes.fromhex(key), [bytes.fromhex(text) for text in associated]
        assert siv_encrypt(raw, bytes.fromhex(plaintext), data).hex() == output
        assert AESSIV(raw).encrypt(bytes.fromhex(plaintext), data).hex() == output
        assert siv_decrypt(raw, bytes.fromhex(output), data) == bytes.fromhex(plaintext)

    def test_the_intermediate_figures_of_rfc_5297(self) -> None:
        key = bytes.fromhex("fffefdfcfbfaf9f8f7f6f5f4f3f2f1f0")
        assert cmac(key, bytes(16)).hex() == "0e04dfafc1efbf040140582859bf073a"
        assert dbl(cmac(key, bytes(16))).hex() == "1c09bf5f83df7e080280b050b37e0e74"

    @pytest.mark.parametrize(
        ("size", "mac"),
        [
            (0, "bb1d6929e95937287fa37d129b756746"),
            (16, "070a16b46b4d4144f79bdd9dd04a287c"),
            (40, "dfa66747de9ae63030ca32611497c827"),
            (64, "51f0bebf7e3b9d92fc49741779363cfe"),
        ],
    )
    def test_the_figures_of_rfc_4493(self, size: int, mac: str) -> None:
        message = bytes.fromhex(
            "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
            "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710"
        )
        key = bytes.fromhex("2b7e151628aed2a6abf7158809cf4f3c")
        assert cmac(key, message[:size]).hex() == mac

    @given(
        st.binary(min_size=64, max_size=64),
        st.binary(min_size=1, max_size=70),
        st.lists(st.binary(max_size=40), max_size=3),
    )
    def test_the_library_agrees(self, key: bytes, text: bytes, data: list[bytes]) -> None:
        sealed = AESSIV(key).encrypt(text, data)
        assert sealed == siv_encrypt(key, text, data)
        assert siv_decrypt(key, sealed, data) == text
        changed = bytes([sealed[0] ^ 1]) + sealed[1:]
        assert siv_decrypt(key, changed, data) is None
        with pytest.raises(InvalidTag):
            AESSIV(key).decrypt(changed, data)

    @pytest.mark.django_db
    def test_opens_what_envelope_seals(self, settings: Any) -> None:
        """By the layout that the docs give: from the stored string and the data key alone."""
        modes.use(settings, "envelope", DEPLOYMENT="blue", AUDIT="inline")
        encoded = make_password(PASSWORD)
        data_key = keyring.open(encoding.parse(DataKey.objects.get().sealed))
        algorithm, mode, _, costs, salt, blob = encoded.split("$")
        assert (algorithm, mode) == ("kms_argon2", "e1")
        sub = hashlib.sha256(f"argon2|{costs}|{salt}".encode()).hexdigest()[:32]
        context = (
            f'{{"application":"kms_hasher","deployment":"blue","sub":"{sub}","use":"password"}}'
        )
        binding = hashlib.sha256(context.encode()).digest()
        sealed = base64.urlsafe_b64decode(blob + "=" * (-len(blob) % 4))
        digest = siv_decrypt(data_key, sealed, [binding])
        stock = CheapArgon2PasswordHasher().encode(PASSWORD, salt)
        assert digest == encoding.parse_stock(stock)[1]
        assert siv_decrypt(data_key, sealed, [bytes(32)]) is None


# --- RFC 4231 ---------------------------------------------------------------------------

#: Test cases 1, 2, 3, 4, 6 and 7: key, data, HMAC-SHA-256.
RFC_4231 = [
    (
        b"\x0b" * 20,
        b"Hi There",
        "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7",
    ),
    (
        b"Jefe",
        b"what do ya want for nothing?",
        "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843",
    ),
    (
        b"\xaa" * 20,
        b"\xdd" * 50,
        "773ea91e36800e46854db8ebd09181a72959098b3ef8c122d9635514ced565fe",
    ),
    (
        bytes(range(1, 26)),
        b"\xcd" * 50,
        "82558a389a443c0ea4cc819899f2083a85f0faa3e578f8077a2e3ff46729665b",
    ),
    (
        b"\xaa" * 131,
        b"Test Using Larger Than Block-Size Key - Hash Key First",
        "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54",
    ),
    (
        b"\xaa" * 131,
        b"This is a test using a larger than block-size key and a larger than block-size "
        b"data. The key needs to be hashed before being used by the HMAC algorithm.",
        "9b09ffa71b942fcb27635fbcd5b0e944bfdc63644f0713938a7f51535c3a35e2",
    ),
]


class TestHMAC:
    @pytest.mark.parametrize(("key", "data", "mac"), RFC_4231)
    def test_the_figures_of_rfc_4231(
        self, key: bytes, data: bytes, mac: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        provider = self.provider(key, tmp_path, monkeypatch)
        arn = provider.create_key(spec="HMAC_256", usage="GENERATE_VERIFY_MAC").key_arn
        assert provider.generate_mac(arn, data).mac.hex() == mac

    @staticmethod
    def provider(key: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalProvider:
        """The local provider, whose next key has this material."""
        material = Material(os.urandom(32).hex(), key)
        monkeypatch.setattr(_software, "new_material", lambda spec: material)
        return LocalProvider(tmp_path / "keys.json", allow_without_debug=True)

    def test_what_mac_stores(
        self, settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """24 bytes of the MAC over 32 of the binding and the digest, by the layout alone."""
        modes.use(settings, "mac")
        settings.KMS_HASHER = {
            **settings.KMS_HASHER,
            "PROVIDER": "local",
            "OPTIONS": {"path": tmp_path / "keys.json", "allow_without_debug": True},
        }
        secret = bytes(range(32))
        provider = self.provider(secret, tmp_path, monkeypatch)
        key = provider.create_key(spec="HMAC_256", usage="GENERATE_VERIFY_MAC")
        provider.create_alias("alias/tests-mac", key.key_arn)
        _, mode, _, costs, salt, blob = make_password(PASSWORD).split("$")
        sub = hashlib.sha256(f"argon2|{costs}|{salt}".encode()).hexdigest()[:32]
        context = f'{{"application":"kms_hasher","sub":"{sub}","use":"password"}}'
        stock = CheapArgon2PasswordHasher().encode(PASSWORD, salt)
        message = hashlib.sha256(context.encode()).digest() + encoding.parse_stock(stock)[1]
        mac = hmac.new(secret, message, hashlib.sha256).digest()
        assert (mode, blob) == ("m1", base64.urlsafe_b64encode(mac[:24]).decode())


# --- RFC 8017, from the text ------------------------------------------------------------


def mgf1(seed: bytes, length: int) -> bytes:
    """Appendix B.2.1, with SHA-256."""
    parts = (hashlib.sha256(seed + n.to_bytes(4, "big")).digest() for n in itertools.count())
    mask = b""
    while len(mask) < length:
        mask += next(parts)
    return mask[:length]


def oaep_decrypt(key: Any, sealed: bytes) -> bytes:
    """Section 7.1.2, with SHA-256 and the empty label."""
    numbers = key.private_numbers()
    modulus = numbers.public_numbers.n
    size = -(-modulus.bit_length() // 8)
    assert len(sealed) == size
    number = int.from_bytes(sealed, "big")
    assert number < modulus
    encoded = pow(number, numbers.d, modulus).to_bytes(size, "big")
    first, masked_seed, masked = encoded[0], encoded[1:33], encoded[33:]
    seed = xor(masked_seed, mgf1(masked, 32))
    data = xor(masked, mgf1(seed, len(masked)))
    label, rest = data[:32], data[32:].lstrip(b"\0")
    assert (first, label, rest[:1]) == (0, hashlib.sha256(b"").digest(), b"\x01")
    return rest[1:]


@pytest.mark.parametrize(
    "bits",
    [
        2048,
        3072,
        4096,
    ],
)
def test_opens_what_public_key_seals(bits: int, settings: Any, tmp_path: Path) -> None:
    """From the stored string and the private key alone, which only a provider of ours shows."""
    modes.use(settings, "public_key")
    options = {"path": tmp_path / "keys.json", "allow_without_debug": True}
    settings.KMS_HASHER = {**settings.KMS_HASHER, "PROVIDER": "local", "OPTIONS": options}
    provider: Any = keyring.provider()
    made = provider.create_key(spec=f"RSA_{bits}")
    provider.create_alias("alias/tests-rsa", made.key_arn)
    _, mode, _, costs, salt, blob = make_password(PASSWORD).split("$")
    stored = provider._file.read().keys[made.key_id]
    private = serialization.load_der_private_key(stored.materials[0].secret, None)
    sealed = base64.urlsafe_b64decode(blob + "=" * (-len(blob) % 4))
    opened = oaep_decrypt(private, sealed)
    sub = hashlib.sha256(f"argon2|{costs}|{salt}".encode()).hexdigest()[:32]
    context = f'{{"application":"kms_hasher","sub":"{sub}","use":"password"}}'
    stock = CheapArgon2PasswordHasher().encode(PASSWORD, salt)
    assert mode == "p1"
    assert opened[:32] == hashlib.sha256(context.encode()).digest()
    assert opened[32:] == encoding.parse_stock(stock)[1]
    modes.forget()
