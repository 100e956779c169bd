"""
The stored string, and the only code that knows its separators.

    kms_argon2$d1$<key ref>$m=102400,t=2,p=8$<salt>$<sealed digest>

algorithm     names the Django hasher; `kms_argon2` for Argon2.
mode          one letter for how the digest is sealed and the version of that layout.
key ref       the id of the KMS key that sealed it, see `key_ref`; after a dot, where a MAC
              is what was sealed, that of the key which made it. In `envelope`, the number
              of the data key, see `data_key_ref`.
parameters    the hasher's costs, see `inner`; for Argon2 with `i,` or `d,` in front for
              another variety than argon2id and `v=16,` for another version than 19.
salt          as Django drew it if alphanumeric, else `=` and its base64url.
sealed digest base64url without padding.

`parse` and `str` are inverse: exactly one string stands for a `SealedHash`, so that a
compare-and-swap on the column compares values. Nothing here calls KMS or the database.
"""

from __future__ import annotations

import base64
import binascii
import functools
import re
import uuid
from dataclasses import dataclass, field
from typing import NamedTuple

from kms_hasher.exceptions import MalformedHash
from kms_hasher.inner import (
    DATA_KEY,
    KEPT,
    MAX_LENGTH,
    MIN_SALT,
    PREFIX,
    Argon2Parameters,
    Header,
    b64decode,
    b64encode,
    decode_salt,
    encode_salt,
    format_stock,
    is_stock,
    kind_of,
    parse_stock,
)

__all__ = [
    "ARN",
    "DATA_KEY",
    "IN_ENVELOPE",
    "MAX_LENGTH",
    "MIN_SALT",
    "PREFIX",
    "Argon2Parameters",
    "Header",
    "SealedHash",
    "algorithm_of",
    "b64decode",
    "b64encode",
    "data_key_number",
    "data_key_ref",
    "format_stock",
    "key_id",
    "key_ref",
    "parse",
    "parse_stock",
    "prefix_of",
    "split_refs",
    "stable_part",
]

# An alias's target may be a multi-Region key, whose id says so: mrk-<32 hex digits>.
_MULTI_REGION = re.compile(r"mrk-([0-9a-f]{32})\Z")
_UUID = re.compile(r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}\Z")
_ARN = re.compile(
    r"arn:(?P<partition>aws[a-z-]*):kms:(?P<region>[a-z0-9-]+):(?P<account>[0-9]{12}):"
    r"(?P<resource>(?:key|alias)/[A-Za-z0-9/_-]+)\Z"
)
_ALGORITHM = re.compile(r"kms_[a-z0-9_]{1,40}\Z")
_MODE = re.compile(r"[a-z][1-9]\Z")

#: Of values in this mode the ref names a data key, and in this one two keys.
_ENVELOPE, _NESTED = "e1", "n1"

#: What only values under a data key hold, for queries.
IN_ENVELOPE = f"${_ENVELOPE}$"


# --- key refs -----------------------------------------------------------------------


@functools.lru_cache(KEPT)
def key_ref(key_id: str) -> str:
    """
    Return the key ref of a KMS key id or key ARN: `m`, if multi-Region, and 29 lower-case
    base32 characters for the 16 bytes of the id and their CRC-16.

    Lower case alone, because SQLite and MariaDB compare without case. The checksum is of
    the public id only; it tells a damaged row (does not match) from a key that KMS has
    deleted (an error that somebody must see). Raises `MalformedHash` for other ids.
    """
    key_id = key_id.rpartition(":key/")[2]
    if match := _MULTI_REGION.match(key_id):
        mark, raw = "m", bytes.fromhex(match[1])
    elif _UUID.match(key_id):
        mark, raw = "", uuid.UUID(key_id).bytes
    else:
        raise MalformedHash("a KMS key id is a UUID, or mrk- and 32 hexadecimal digits")
    body = base64.b32encode(raw + _checksum(mark, raw)).decode("ascii")
    return mark + body.rstrip("=").lower()


@functools.lru_cache(KEPT)
def key_id(ref: str) -> str:
    """Return the KMS key id a key ref stands for. Raises `MalformedHash`."""
    mark, body = ("m", ref[1:]) if len(ref) == 30 and ref[0] == "m" else ("", ref)
    if len(body) != 29 or body != body.lower():
        raise MalformedHash("the key ref has the wrong length or case")
    try:
        data = base64.b32decode(body.upper() + "===")
    except ValueError as error:
        raise MalformedHash("the key ref is not base32") from error
    raw, checksum = data[:16], data[16:]
    if checksum != _checksum(mark, raw):
        raise MalformedHash("the key ref is damaged")
    found = f"mrk-{raw.hex()}" if mark else str(uuid.UUID(bytes=raw))
    if key_ref(found) != ref:
        raise MalformedHash("the key ref is not canonical")
    return found


def split_refs(ref: str) -> tuple[str, str]:
    """Return the ref of the key that sealed and, where there is one, of the key of the MAC."""
    outer, _, of_mac = ref.partition(".")
    return outer, of_mac


def data_key_ref(number: int) -> str:
    """
    Return how a stored string names a data key: its number in lower-case base32 digits and
    two more for a checksum, as short as can be. `number` is 1 to 2**30 - 1.
    """
    if not 0 < number < 2**30:
        raise ValueError("the number of a data key is 1 to 2**30 - 1")
    return _base32(number) + _base32(_data_key_checksum(number)).rjust(2, "a")


@functools.lru_cache(KEPT)
def data_key_number(ref: str) -> int:
    """Return the number of a data key. Raises `MalformedHash`."""
    number = 0
    for digit in ref[:-2][:6]:
        number = 32 * number + _DIGITS.find(digit)
    if not 0 < number < 2**30 or data_key_ref(number) != ref:
        raise MalformedHash("the number of the data key is damaged")
    return number


_DIGITS = "abcdefghijklmnopqrstuvwxyz234567"


def _base32(number: int) -> str:
    digits = ""
    while number:
        number, digit = divmod(number, 32)
        digits = _DIGITS[digit] + digits
    return digits


def _data_key_checksum(number: int) -> int:
    return binascii.crc_hqx(number.to_bytes(4, "big"), 0) % 1024


def _checksum(mark: str, raw: bytes) -> bytes:
    return binascii.crc_hqx(mark.encode("ascii") + raw, 0).to_bytes(2, "big")


class ARN(NamedTuple):
    """The parts of a KMS ARN; `resource` is `key/<id>` or `alias/<name>`."""

    partition: str
    region: str
    account: str
    resource: str

    @classmethod
    @functools.lru_cache(KEPT)
    def parse(cls, text: str) -> ARN:
        """Raises `MalformedHash` if `text` is not the ARN of a KMS key or alias."""
        match = _ARN.match(text)
        if not match:
            raise MalformedHash("not the ARN of a KMS key or alias")
        return cls(**match.groupdict())

    def __str__(self) -> str:
        return f"arn:{self.partition}:kms:{self.region}:{self.account}:{self.resource}"

    def with_key(self, id_: str) -> str:
        """Return the ARN of another key in the same partition, Region and account."""
        return f"arn:{self.partition}:kms:{self.region}:{self.account}:key/{id_}"


# --- stored strings -----------------------------------------------------------------


@dataclass(frozen=True)
class SealedHash:
    """
    One stored password: its header, and the digest as `key_ref` sealed it.

    `key_ref` may name two keys, or a data key: see the module.
    """

    header: Header
    mode: str
    key_ref: str
    sealed: bytes = field(repr=False)

    @property
    def key_id(self) -> str:
        """The id of the KMS key that sealed. Raises `MalformedHash` if it was a data key."""
        return key_id(split_refs(self.key_ref)[0])

    def __str__(self) -> str:
        return "$".join(
            (
                self.header.algorithm,
                self.mode,
                self.key_ref,
                str(self.header.parameters),
                encode_salt(self.header.salt),
                b64encode(self.sealed),
            )
        )


def parse(encoded: str) -> SealedHash:
    """
    Return the `SealedHash` that `encoded` stands for.

    Raises `MalformedHash` for everything else, whatever it is; the message never quotes
    the string.
    """
    if not isinstance(encoded, str) or len(encoded) > MAX_LENGTH:
        raise MalformedHash("not a string, or too long")
    fields = encoded.split("$")
    if len(fields) != 6:
        raise MalformedHash("a sealed hash has six fields")
    algorithm, mode, ref, parameters, salt, sealed = fields
    if not _ALGORITHM.match(algorithm) or not _MODE.match(mode):
        raise MalformedHash("the algorithm or the mode is not readable")
    _check_refs(mode, ref)
    kind = kind_of(algorithm)
    header = Header(
        algorithm, kind.parameters.parse(parameters), decode_salt(salt, kind.min_salt)
    )
    blob = b64decode(sealed)
    if not blob:
        raise MalformedHash("the sealed digest is empty")
    return SealedHash(header, mode, ref, blob)


def _check_refs(mode: str, ref: str) -> None:
    if mode == _ENVELOPE:
        data_key_number(ref)
        return
    outer, of_mac = split_refs(ref)
    key_id(outer)
    if mode == _NESTED or of_mac:
        key_id(of_mac)
        if mode != _NESTED or ref != f"{outer}.{of_mac}":
            raise MalformedHash("the hash names more keys than its mode has")


def prefix_of(algorithm: str, mode: str = "", ref: str = "") -> str:
    """Return the start that all values of an algorithm, mode and key have in common."""
    start = "".join(f"{part}$" for part in (algorithm, mode) if part)
    if not ref:
        return start
    return f"{start}{ref}{'.' if mode == _NESTED and '.' not in ref else '$'}"


def algorithm_of(encoded: str) -> str:
    """Return the name of the hasher that made `encoded`, as Django reads it, or ""."""
    name, separator, _ = encoded.partition("$")
    return name if separator else ""


def stable_part(encoded: str) -> str:
    """
    Return the part of a stored password that sealing and re-wrapping leave alone.

    Inner algorithm, parameters and salt: equal for a stock hash and for the same hash
    sealed in any mode by any key, and never made of the digest. Sessions and password reset
    links hang on it. A value whose layout is not known, or that is unusable, is its own part.
    """
    algorithm = algorithm_of(encoded)
    try:
        if algorithm.startswith(PREFIX):
            return str(parse(encoded).header)
        if is_stock(algorithm):
            return str(parse_stock(encoded)[0])
    except MalformedHash:
        pass
    return encoded
