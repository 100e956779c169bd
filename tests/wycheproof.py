"""
The figures of Project Wycheproof, where there is a checkout of it:

    git clone https://github.com/C2SP/wycheproof
    python -m tests.wycheproof wycheproof

AES-SIV, HMAC-SHA-256 and RSAES-OAEP-SHA-256, through the libraries and the local provider as
the modes use them, and through the second implementations of `test_vectors`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import django

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.settings")
django.setup()

from cryptography.exceptions import InvalidTag  # noqa: E402
from cryptography.hazmat.primitives import serialization  # noqa: E402
from cryptography.hazmat.primitives.ciphers.aead import AESSIV  # noqa: E402
from django.utils import timezone  # noqa: E402

from kms_hasher.exceptions import InvalidCiphertext  # noqa: E402
from kms_hasher.providers import _software  # noqa: E402
from kms_hasher.providers._keyfile import Material, StoredKey  # noqa: E402
from tests.test_vectors import oaep_decrypt, siv_decrypt, siv_encrypt  # noqa: E402

REFUSED = (InvalidTag, InvalidCiphertext, AssertionError, ValueError)


def tests(directory: Path, name: str) -> Iterator[tuple[Any, Any]]:
    """Yield each test with its group, values as bytes."""
    for folder in ("testvectors_v1", "testvectors"):
        if (directory / folder / name).exists():
            break
    for group in json.loads((directory / folder / name).read_text())["testGroups"]:
        for test in group["tests"]:
            hexadecimal = {"key", "aad", "msg", "ct", "tag", "label"} & test.keys()
            yield group, test | {field: bytes.fromhex(test[field]) for field in hexadecimal}


def key(spec: str, secret: bytes) -> StoredKey:
    return StoredKey(
        id="",
        spec=spec,
        usage="",
        materials=(Material("", secret),),
        created_at=timezone.now(),
    )


def result(call: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return call(*arguments)
    except REFUSED:
        return None


def siv(directory: Path) -> Iterator[bool]:
    for _, test in tests(directory, "aes_siv_cmac_test.json"):
        wanted = test["msg"] if test["result"] == "valid" else None
        aad, ciphertext = [test["aad"]], test["ct"]
        yield siv_decrypt(test["key"], ciphertext, aad) == wanted
        if test["msg"]:  # the library takes no empty message; a digest never is
            yield result(AESSIV(test["key"]).decrypt, ciphertext, aad) == wanted
        if wanted:
            yield AESSIV(test["key"]).encrypt(wanted, aad) == ciphertext
            yield siv_encrypt(test["key"], wanted, aad) == ciphertext


def hmac(directory: Path) -> Iterator[bool]:
    for group, test in tests(directory, "hmac_sha256_test.json"):
        mac = _software.mac(key("HMAC_256", test["key"]), test["msg"])
        agrees = mac[: group["tagSize"] // 8] == test["tag"]
        yield agrees is (test["result"] == "valid")


def oaep(directory: Path) -> Iterator[bool]:
    for bits in (2048, 3072, 4096):
        name = f"rsa_oaep_{bits}_sha256_mgf1sha256_test.json"
        for group, test in tests(directory, name):
            der = bytes.fromhex(group["privateKeyPkcs8"])
            private = serialization.load_der_private_key(der, None)
            stored = key(f"RSA_{bits}", der)
            # KMS's label is empty: whatever has another is not KMS's.
            wanted = None if test["label"] or test["result"] == "invalid" else test["msg"]
            opened = result(_software.open_sealed, stored, test["ct"], {})
            yield (opened and opened[0]) == wanted
            yield result(oaep_decrypt, private, test["ct"]) == wanted


def main(directory: Path) -> int:
    failed = 0
    for check in (siv, hmac, oaep):
        found = list(check(directory))
        failed += found.count(False)
        print(f"{check.__name__}: {found.count(True)} of {len(found)} as they should be")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
