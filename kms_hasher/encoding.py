"""
The stored string, and the only code that knows its separators.

    kms_argon2$d1$<key ref>$m=102400,t=2,p=8$<salt>$<sealed digest>

algorithm     names the Django hasher; `kms_argon2` for Argon2.
mode          one letter for how the digest is sealed and the version of that layout.
key ref       the id of the KMS key that sealed it, see `key_ref`.
parameters    Argon2's costs; `i,` or `d,` in front for another variety than argon2id
              and `v=16,` for another version than 19.
salt          as Django drew it if alphanumeric, else `=` and its base64url.
sealed digest base64url without padding.

`parse` and `str` are inverse: exactly one string stands for a `SealedHash`, so that a
compare-and-swap on the column compares values. Nothing here calls KMS or the database.
"""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
import re
import uuid
from dataclasses import dataclass, field
from typing import NamedTuple

from kms_hasher.exceptions import MalformedHash

#: The prefix of every sealed value, whatever hasher and mode made it.
PREFIX = "kms_"

#: Longer strings are refused unread: the widest column we make holds 1024.
MAX_LENGTH = 1024

#: Bytes of salt that Argon2 asks for at the least (RFC 9106, section 3.1).
MIN_SALT = 8

#: Of how many keys the ref, id and parsed ARN are kept, and how many parsed costs: all of a
#: site's, if nobody forges.
KEYS = 256

# An alias's target may be a multi-Region key, whose id says so: mrk-<32 hex digits>.
_MULTI_REGION = re.compile(r"mrk-([0-9a-f]{32})\Z")
_UUID = re.compile(r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}\Z")
_ARN = re.compile(
    r"arn:(?P<partition>aws[a-z-]*):kms:(?P<region>[a-z0-9-]+):(?P<account>[0-9]{12}):"
    r"(?P<resource>(?:key|alias)/[A-Za-z0-9/_-]+)\Z"
)
_PARAMETERS = re.compile(
    r"(?:(?P<variety>[id]),)?(?:v=(?P<version>16),)?"
    r"m=(?P<memory>[1-9][0-9]{0,9}),t=(?P<time>[1-9][0-9]{0,9}),p=(?P<lanes>[1-9][0-9]{0,7})\Z"
)
_PLAIN_SALT = re.compile(r"[0-9A-Za-z]+\Z")
_ALGORITHM = re.compile(r"kms_[a-z0-9_]{1,40}\Z")
_MODE = re.compile(r"[a-z][1-9]\Z")


# --- base64url and base32, strict: one text for each value --------------------------


def b64encode(data: bytes) -> str:
    """Return `data` as base64url without padding (RFC 4648, section 5)."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def b64decode(text: str) -> bytes:
    """
    Return the bytes of `text`, the inverse of `b64encode`.

    Raises `MalformedHash` for anything `b64encode` would not have written: padding,
    other alphabets, non-zero spare bits.
    """
    try:
        data = base64.urlsafe_b64decode(text.encode("ascii") + b"=" * (-len(text) % 4))
    except ValueError as error:
        raise MalformedHash("a field is not base64url") from error
    if b64encode(data) != text:
        raise MalformedHash("a field is not canonical base64url")
    return data


# --- key refs -----------------------------------------------------------------------


@functools.lru_cache(KEYS)
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


@functools.lru_cache(KEYS)
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


def _checksum(mark: str, raw: bytes) -> bytes:
    return binascii.crc_hqx(mark.encode("ascii") + raw, 0).to_bytes(2, "big")


class ARN(NamedTuple):
    """The parts of a KMS ARN; `resource` is `key/<id>` or `alias/<name>`."""

    partition: str
    region: str
    account: str
    resource: str

    @classmethod
    @functools.lru_cache(KEYS)
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


# --- the parts that sealing leaves alone --------------------------------------------


class Argon2Parameters(NamedTuple):
    """Argon2's costs (RFC 9106): `memory_cost` in KiB, `time_cost` in passes."""

    memory_cost: int
    time_cost: int
    parallelism: int
    variety: str = "argon2id"
    version: int = 19

    @classmethod
    @functools.lru_cache(KEYS)
    def parse(cls, text: str) -> Argon2Parameters:
        match = _PARAMETERS.match(text)
        if not match or int(match["memory"]) < 8 * int(match["lanes"]):
            raise MalformedHash("the Argon2 parameters are not readable or not possible")
        return cls(
            memory_cost=int(match["memory"]),
            time_cost=int(match["time"]),
            parallelism=int(match["lanes"]),
            variety=f"argon2{match['variety'] or 'id'}",
            version=int(match["version"] or 19),
        )

    def __str__(self) -> str:
        variety = "" if self.variety == "argon2id" else f"{self.variety[6:]},"
        version = "" if self.version == 19 else f"v={self.version},"
        return f"{variety}{version}m={self.memory_cost},t={self.time_cost},p={self.parallelism}"


@dataclass(frozen=True)
class Header:
    """What a digest was made with. It is bound to the seal and never changes under it."""

    algorithm: str
    parameters: Argon2Parameters
    salt: bytes = field(repr=False)

    @functools.cached_property
    def sub(self) -> str:
        """
        The header's digest: 32 hexadecimal digits of SHA-256.

        It binds a blob to its row through the encryption context and traces a line of
        CloudTrail to one stored credential. It is made of public parts only, never of
        the digest.
        """
        return hashlib.sha256(str(self).encode("ascii")).hexdigest()[:32]

    def __str__(self) -> str:
        return "|".join(
            (
                self.algorithm.removeprefix(PREFIX),
                str(self.parameters),
                _encode_salt(self.salt),
            )
        )


@dataclass(frozen=True)
class SealedHash:
    """One stored password: its header, and the digest as `key_ref` sealed it."""

    header: Header
    mode: str
    key_ref: str
    sealed: bytes = field(repr=False)

    @property
    def key_id(self) -> str:
        return key_id(self.key_ref)

    def __str__(self) -> str:
        return "$".join(
            (
                self.header.algorithm,
                self.mode,
                self.key_ref,
                str(self.header.parameters),
                _encode_salt(self.header.salt),
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
    key_id(ref)
    header = Header(algorithm, Argon2Parameters.parse(parameters), _decode_salt(salt))
    blob = b64decode(sealed)
    if not blob:
        raise MalformedHash("the sealed digest is empty")
    return SealedHash(header, mode, ref, blob)


def prefix_of(algorithm: str, mode: str = "", ref: str = "") -> str:
    """Return the start that all values of an algorithm, mode and key have in common."""
    return "".join(f"{part}$" for part in (algorithm, mode, ref) if part)


def algorithm_of(encoded: str) -> str:
    """Return the name of the hasher that made `encoded`, as Django reads it, or ""."""
    name, separator, _ = encoded.partition("$")
    return name if separator else ""


# --- Django's own hashes ------------------------------------------------------------


def parse_stock(encoded: str) -> tuple[Header, bytes]:
    """
    Return the header and the digest of a hash made by Django's Argon2PasswordHasher.

    The header is the one that sealing the digest keeps. Raises `MalformedHash` if the
    string is not such a hash, or is not written as Django writes it, so that
    `format_stock` gives back the very same string.
    """
    fields = encoded.split("$") if len(encoded) <= MAX_LENGTH else []
    if len(fields) != 6 or fields[0] != "argon2":
        raise MalformedHash("not a hash of Django's Argon2 hasher")
    variety = fields[1].removeprefix("argon2").replace("id", "")
    version = "" if fields[2] == "v=19" else f"{fields[2]},"
    parameters = Argon2Parameters.parse(
        (f"{variety}," if variety else "") + version + fields[3]
    )
    salt, digest = (b64decode(part.translate(_TO_URLSAFE)) for part in fields[4:])
    header = Header(f"{PREFIX}argon2", parameters, salt)
    if len(salt) < MIN_SALT or format_stock(header, digest) != encoded:
        raise MalformedHash("not written as Django's Argon2 hasher writes it")
    return header, digest


def format_stock(header: Header, digest: bytes) -> str:
    """Return the hash Django's Argon2PasswordHasher would have stored (PHC text)."""
    costs = header.parameters
    return "$".join(
        (
            header.algorithm.removeprefix(PREFIX),
            costs.variety,
            f"v={costs.version}",
            f"m={costs.memory_cost},t={costs.time_cost},p={costs.parallelism}",
            *(b64encode(part).translate(_FROM_URLSAFE) for part in (header.salt, digest)),
        )
    )


_TO_URLSAFE = str.maketrans("+/-_", "-_..")  # what was "-" or "_" must not decode
_FROM_URLSAFE = str.maketrans("-_", "+/")


def stable_part(encoded: str) -> str:
    """
    Return the part of a stored password that sealing and re-wrapping leave alone.

    Inner algorithm, parameters and salt: equal for a stock hash and for the same hash
    sealed by any key, and never made of the digest. Sessions and password reset links
    hang on it. A value whose layout is not known, or that is unusable, is its own part.
    """
    algorithm = algorithm_of(encoded)
    try:
        if algorithm.startswith(PREFIX):
            return str(parse(encoded).header)
        if algorithm == "argon2":
            return str(parse_stock(encoded)[0])
    except MalformedHash:
        return encoded
    if algorithm in ("pbkdf2_sha256", "pbkdf2_sha1", "scrypt"):
        return encoded.rpartition("$")[0]
    if algorithm in ("bcrypt_sha256", "bcrypt"):
        return encoded[:-31]  # 22 characters of salt, then 31 of digest
    return encoded


def _encode_salt(salt: bytes) -> str:
    text = salt.decode("latin-1")
    return text if _PLAIN_SALT.match(text) else f"={b64encode(salt)}"


def _decode_salt(text: str) -> bytes:
    salt = b64decode(text[1:]) if text.startswith("=") else text.encode("latin-1", "replace")
    if len(salt) < MIN_SALT or _encode_salt(salt) != text:
        raise MalformedHash("the salt is not readable, or shorter than Argon2 allows")
    return salt
