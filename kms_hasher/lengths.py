"""
How long stored strings are: `python -m kms_hasher.lengths` prints the table of the docs.
"""

from __future__ import annotations

from typing import Any

from django.utils.module_loading import import_string

from kms_hasher import encoding, inner, modes
from kms_hasher.encoding import Header, SealedHash
from kms_hasher.modes.base import Mode

_MULTI_REGION = encoding.key_ref("mrk-" + 32 * "f")

#: Bytes that KMS adds to what it encrypts by a symmetric key, at the most; and the blob of RSA.
SYMMETRIC = 157
RSA = {"RSA_2048": 256, "RSA_3072": 384, "RSA_4096": 512}


def of(hasher: Any, mode: Mode, *, data_keys: int = 10_000_000, spec: str = "RSA_4096") -> int:
    """
    Return the characters of the longest string that a sealing hasher makes in a mode.

    `data_keys` is how many there may be, `spec` that of an RSA key.
    """
    salt = hasher.salt()
    header = Header(hasher.algorithm, hasher._parameters(), salt.encode())
    size = header.kind.size
    blobs: dict[str, tuple[str, int]] = {
        "d1": (_MULTI_REGION, SYMMETRIC + size),
        "p1": (_MULTI_REGION, RSA[spec]),
        "e1": (encoding.data_key_ref(data_keys), 16 + size),
        "m1": (_MULTI_REGION, 24),
        "n1": (f"{_MULTI_REGION}.{_MULTI_REGION}", SYMMETRIC + 24),
    }
    ref, blob = blobs[mode.code]
    return len(str(SealedHash(header, mode.code, ref, bytes(blob))))


def table() -> str:
    """Return, in Markdown, the length for each of Django's hashers in each mode."""
    lines = [
        "| hasher | " + " | ".join(f"`{name}`" for name in modes.MODES) + " |",
        "|---|" + "---|" * len(modes.MODES),
    ]
    for name in inner.HASHERS.values():
        hasher = import_string(f"kms_hasher.hashers.{name}")()
        found = (of(hasher, mode) for mode in modes.MODES.values())
        lines.append(f"| `{hasher.algorithm}` | " + " | ".join(map(str, found)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
