"""
The hashes that Django's own hashers make: their costs, how they are written, and the header
that is kept when the digest is sealed.

Nothing here calls KMS or the database.
"""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol

from kms_hasher.exceptions import MalformedHash

#: The prefix of every sealed value, whatever hasher and mode made it.
PREFIX = "kms_"

#: Longer strings are refused unread: the widest column we make holds 1024.
MAX_LENGTH = 1024

#: Bytes of salt that Argon2 asks for at the least (RFC 9106, section 3.1).
MIN_SALT = 8

#: How many parsed costs are kept: all of a site's, if nobody forges.
KEPT = 256

_PLAIN_SALT = re.compile(r"[0-9A-Za-z]+\Z")


# --- base64url, strict: one text for each value ---------------------------------------


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


# --- costs --------------------------------------------------------------------------


class Parameters(Protocol):
    """The costs of one hash. `parse` and `str` are inverse; equal costs are equal."""

    @classmethod
    def parse(cls, text: str) -> Parameters:
        """Raises `MalformedHash`."""

    def _asdict(self) -> dict[str, Any]: ...


def _match(pattern: re.Pattern[str], text: str) -> re.Match[str]:
    if match := pattern.match(text):
        return match
    raise MalformedHash("the costs are not readable")


class Argon2Parameters(NamedTuple):
    """Argon2's costs (RFC 9106): `memory_cost` in KiB, `time_cost` in passes."""

    memory_cost: int
    time_cost: int
    parallelism: int
    variety: str = "argon2id"
    version: int = 19

    @classmethod
    @functools.lru_cache(KEPT)
    def parse(cls, text: str) -> Argon2Parameters:
        match = _match(_ARGON2, text)
        if int(match["memory"]) < 8 * int(match["lanes"]):
            raise MalformedHash("the Argon2 costs are not possible")
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


_ARGON2 = re.compile(
    r"(?:(?P<variety>[id]),)?(?:v=(?P<version>16),)?"
    r"m=(?P<memory>[1-9][0-9]{0,9}),t=(?P<time>[1-9][0-9]{0,9}),p=(?P<lanes>[1-9][0-9]{0,7})\Z"
)


class PBKDF2Parameters(NamedTuple):
    """PBKDF2's cost (RFC 8018, section 5.2)."""

    iterations: int

    @classmethod
    def parse(cls, text: str) -> PBKDF2Parameters:
        return cls(int(_match(_PBKDF2, text)[0]))

    def __str__(self) -> str:
        return str(self.iterations)


_PBKDF2 = re.compile(r"[1-9][0-9]{0,9}\Z")


class ScryptParameters(NamedTuple):
    """scrypt's costs (RFC 7914): the work factor N, the block size r, the parallelism p."""

    work_factor: int
    block_size: int
    parallelism: int

    @classmethod
    def parse(cls, text: str) -> ScryptParameters:
        found = cls(*map(int, _match(_SCRYPT, text).groups()))
        if found.work_factor < 2 or found.work_factor & (found.work_factor - 1):
            raise MalformedHash("scrypt's work factor is a power of 2")
        return found

    def __str__(self) -> str:
        return f"N={self.work_factor},r={self.block_size},p={self.parallelism}"


_SCRYPT = re.compile(r"N=([1-9][0-9]{0,9}),r=([1-9][0-9]{0,5}),p=([1-9][0-9]{0,5})\Z")


class BCryptParameters(NamedTuple):
    """bcrypt's cost: the logarithm of its rounds; and the variety as bcrypt marks it."""

    variety: str
    rounds: int

    @classmethod
    def parse(cls, text: str) -> BCryptParameters:
        match = _match(_BCRYPT, text)
        return cls(match[1], int(match[2]))

    def __str__(self) -> str:
        return f"{self.variety},{self.rounds:02}"


_BCRYPT = re.compile(r"(2[abxy]),([0-9]{2})\Z")


class NoParameters(NamedTuple):
    """Of what has no costs."""

    @classmethod
    def parse(cls, text: str) -> NoParameters:
        if text != "-":
            raise MalformedHash("the costs are not readable")
        return cls()

    def __str__(self) -> str:
        return "-"


# --- the header ---------------------------------------------------------------------


class Kind(NamedTuple):
    """What is sealed: bytes in its digest, its costs, and bytes of salt at the least."""

    size: int
    parameters: type[Any]
    min_salt: int = 1


ARGON2 = Kind(32, Argon2Parameters, MIN_SALT)

#: By the name of Django's hasher. A hasher of a site's own that is not here is Argon2's.
KINDS: Mapping[str, Kind] = {
    "argon2": ARGON2,
    "pbkdf2_sha256": Kind(32, PBKDF2Parameters),
    "pbkdf2_sha1": Kind(20, PBKDF2Parameters),
    "scrypt": Kind(64, ScryptParameters),
    "bcrypt_sha256": Kind(23, BCryptParameters),
    "bcrypt": Kind(23, BCryptParameters),
    "md5": Kind(16, NoParameters),
    # No hash: a key of two halves for AES-256-SIV (RFC 5297), see `modes.envelope`.
    "data_key": Kind(64, NoParameters, 16),
}

#: The hasher of ours that seals what one of Django's made.
HASHERS: Mapping[str, str] = {
    "argon2": "KMSArgon2PasswordHasher",
    "pbkdf2_sha256": "KMSPBKDF2PasswordHasher",
    "pbkdf2_sha1": "KMSPBKDF2SHA1PasswordHasher",
    "scrypt": "KMSScryptPasswordHasher",
    "bcrypt_sha256": "KMSBCryptSHA256PasswordHasher",
    "bcrypt": "KMSBCryptPasswordHasher",
    "md5": "KMSMD5PasswordHasher",
}

#: The algorithm of a wrapped data key, which is no password.
DATA_KEY = f"{PREFIX}data_key"


@dataclass(frozen=True)
class Header:
    """What a digest was made with. It is bound to the seal and never changes under it."""

    algorithm: str
    parameters: Any
    salt: bytes = field(repr=False)

    #: What the seal is for: the encryption context says it.
    PASSWORD: ClassVar[str] = "password"  # noqa: S105  # a use, not a password

    @property
    def kind(self) -> Kind:
        return kind_of(self.algorithm)

    @property
    def use(self) -> str:
        """What the seal is for, as the encryption context says it."""
        return "data-key" if self.algorithm == DATA_KEY else self.PASSWORD

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
            (self.algorithm.removeprefix(PREFIX), str(self.parameters), encode_salt(self.salt))
        )


def kind_of(algorithm: str) -> Kind:
    """Return what a hasher of ours seals."""
    return KINDS.get(algorithm.removeprefix(PREFIX), ARGON2)


def encode_salt(salt: bytes) -> str:
    text = salt.decode("latin-1")
    return text if _PLAIN_SALT.match(text) else f"={b64encode(salt)}"


def decode_salt(text: str, least: int = MIN_SALT) -> bytes:
    """Return the bytes of `encode_salt`. Raises `MalformedHash`, also for fewer bytes."""
    salt = b64decode(text[1:]) if text.startswith("=") else text.encode("latin-1", "replace")
    if len(salt) < least or encode_salt(salt) != text:
        raise MalformedHash("the salt is not readable, or shorter than its algorithm allows")
    return salt


# --- as Django writes them ------------------------------------------------------------


def parse_stock(encoded: str) -> tuple[Header, bytes]:
    """
    Return the header and the digest of a hash made by one of Django's hashers.

    The header is the one that sealing the digest keeps. Raises `MalformedHash` if the
    string is no such hash, or is not written as Django writes it, so that `format_stock`
    gives back the very same string.
    """
    name, _, rest = encoded.partition("$")
    if name not in _STOCK or len(encoded) > MAX_LENGTH:
        raise MalformedHash("not a hash of one of Django's hashers")
    parse, _ = _STOCK[name]
    kind = KINDS[name]
    try:
        parameters, salt, digest = parse(rest.split("$"))
        header = Header(f"{PREFIX}{name}", kind.parameters.parse(parameters), salt)
        good = len(salt) >= kind.min_salt and format_stock(header, digest) == encoded
    except ValueError:  # of which MalformedHash is one
        good = False
    if not good:
        raise MalformedHash(f"not written as Django's hasher {name!r} writes it")
    return header, digest


def format_stock(header: Header, digest: bytes) -> str:
    """
    Return the hash that Django's own hasher would have stored.

    Raises `MalformedHash` for a header that no such hasher has.
    """
    name = header.algorithm.removeprefix(PREFIX)
    if name not in _STOCK:
        raise MalformedHash("no hasher of Django's makes such a hash")
    _, format_ = _STOCK[name]
    return "$".join((name, *format_(header, digest)))


def is_stock(algorithm: str) -> bool:
    """Return whether hashes of one of Django's hashers can be sealed as they are."""
    return algorithm in _STOCK


#: Parameters as `Parameters.parse` takes them, salt and digest, of the fields after the name.
_Parse = Callable[[list[str]], tuple[str, bytes, bytes]]
_Format = Callable[[Header, bytes], tuple[str, ...]]

_TO_URLSAFE = str.maketrans("+/-_", "-_..")  # what was "-" or "_" must not decode
_FROM_URLSAFE = str.maketrans("-_", "+/")

# bcrypt's base64 packs bits as all others do, in another order of characters.
_URLSAFE = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
_BCRYPT64 = "./ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
_FROM_BCRYPT = str.maketrans(_BCRYPT64, _URLSAFE)
_TO_BCRYPT = str.maketrans(_URLSAFE, _BCRYPT64)


def _parse_argon2(fields: list[str]) -> tuple[str, bytes, bytes]:
    variety, version, costs, salt, digest = fields
    variety = variety.removeprefix("argon2").replace("id", "")
    parts = (variety, "" if version == "v=19" else version, costs)
    raw = (b64decode(part.translate(_TO_URLSAFE)) for part in (salt, digest))
    return ",".join(part for part in parts if part), *raw  # type: ignore[return-value]


def _format_argon2(header: Header, digest: bytes) -> tuple[str, ...]:
    costs = header.parameters
    return (
        costs.variety,
        f"v={costs.version}",
        f"m={costs.memory_cost},t={costs.time_cost},p={costs.parallelism}",
        *(b64encode(part).translate(_FROM_URLSAFE) for part in (header.salt, digest)),
    )


def _parse_pbkdf2(fields: list[str]) -> tuple[str, bytes, bytes]:
    iterations, salt, digest = fields
    return iterations, salt.encode(), base64.b64decode(digest, validate=True)


def _format_pbkdf2(header: Header, digest: bytes) -> tuple[str, ...]:
    text = base64.b64encode(digest).decode("ascii")
    return str(header.parameters), header.salt.decode(), text


def _parse_scrypt(fields: list[str]) -> tuple[str, bytes, bytes]:
    work, salt, block, lanes, digest = fields
    raw = base64.b64decode(digest, validate=True)
    return f"N={work},r={block},p={lanes}", salt.encode(), raw


def _format_scrypt(header: Header, digest: bytes) -> tuple[str, ...]:
    costs, text = header.parameters, base64.b64encode(digest).decode("ascii")
    work, block, lanes = map(str, costs)
    return work, header.salt.decode(), block, lanes, text


def _parse_bcrypt(fields: list[str]) -> tuple[str, bytes, bytes]:
    _, variety, rounds, data = fields
    salt, digest = data[:22], data[22:].translate(_FROM_BCRYPT)
    return f"{variety},{rounds}", salt.encode("ascii"), b64decode(digest)


def _format_bcrypt(header: Header, digest: bytes) -> tuple[str, ...]:
    text = b64encode(digest).translate(_TO_BCRYPT)
    variety, rounds = header.parameters
    return "", variety, f"{rounds:02}", header.salt.decode("ascii") + text


def _parse_md5(fields: list[str]) -> tuple[str, bytes, bytes]:
    salt, digest = fields
    return "-", salt.encode(), binascii.unhexlify(digest)


def _format_md5(header: Header, digest: bytes) -> tuple[str, ...]:
    return header.salt.decode(), digest.hex()


_STOCK: Mapping[str, tuple[_Parse, _Format]] = {
    "argon2": (_parse_argon2, _format_argon2),
    "pbkdf2_sha256": (_parse_pbkdf2, _format_pbkdf2),
    "pbkdf2_sha1": (_parse_pbkdf2, _format_pbkdf2),
    "scrypt": (_parse_scrypt, _format_scrypt),
    "bcrypt_sha256": (_parse_bcrypt, _format_bcrypt),
    "bcrypt": (_parse_bcrypt, _format_bcrypt),
    "md5": (_parse_md5, _format_md5),
}
