"""
The password hashers: Django's own, and the digest sealed by KMS before it is stored.

Django makes one instance of every hasher in `PASSWORD_HASHERS`, keeps it for good and
shares it between threads and event loops. So there is no state here, no database and no
client: `encode` and `verify` are the inner hasher on this side and `keyring` on the other.
"""

from __future__ import annotations

import binascii
import contextlib
import functools
import hashlib
import logging
from typing import Any

from django.contrib.auth import hashers as django_hashers
from django.contrib.auth.hashers import mask_hash, must_update_salt
from django.utils import timezone
from django.utils.crypto import constant_time_compare, pbkdf2
from django.utils.encoding import force_bytes
from django.utils.translation import gettext_noop as _
from django.views.decorators.debug import sensitive_variables

from kms_hasher import encoding, inner, keyring, signals
from kms_hasher.encoding import Argon2Parameters, Header, SealedHash
from kms_hasher.exceptions import InvalidCiphertext, InvalidRequest, MalformedHash
from kms_hasher.inner import (
    BCryptParameters,
    NoParameters,
    PBKDF2Parameters,
    ScryptParameters,
)

logger = logging.getLogger("kms_hasher")

#: KMS's answer where a stored string names a key that its mode cannot have.
WRONG_USAGE = "InvalidKeyUsageException"

#: Bytes of a password that bcrypt takes; it refuses more from its version 5 on.
BCRYPT_MAX = 72

#: How Django's admin names the costs.
LABELS = {
    "variety": _("variety"),
    "version": _("version"),
    "memory_cost": _("memory cost"),
    "time_cost": _("time cost"),
    "parallelism": _("parallelism"),
    "iterations": _("iterations"),
    "work_factor": _("work factor"),
    "block_size": _("block size"),
    "rounds": _("work factor"),
}


class _PasswordRefused(MalformedHash):
    """Raised where an inner hasher computes nothing for such a password."""


class SealingPasswordHasher(django_hashers.BasePasswordHasher):
    """
    What all sealing hashers have in common; those below add the inner hasher.

    `encode` and `verify` each make the calls to KMS that the mode makes, in most modes
    exactly one, and raise `KMSError` if it cannot be answered; nothing else here calls KMS,
    and no stored string, whatever it holds, makes anything here raise, but for `verify`
    where a key that it names is missing.
    """

    algorithm: str

    @sensitive_variables()
    def encode(self, password: str | bytes, salt: str) -> str:
        """
        Return the stored string for a password.

        Raises `TypeError` or `ValueError` as Django's hashers do for bad arguments, and
        `KMSError` if the digest cannot be sealed.
        """
        self._check_encode_args(password, salt)  # type: ignore[attr-defined]
        header = Header(self.algorithm, self._parameters(), force_bytes(salt))
        if len(header.salt) < header.kind.min_salt:
            raise ValueError(f"salt must have at least {header.kind.min_salt} bytes.")
        digest = self._digest(password, header)
        return str(keyring.seal(header, digest))

    @sensitive_variables()
    def verify(self, password: str | bytes, encoded: str) -> bool:
        """
        Return whether the password is the one that `encoded` was made of.

        A string that cannot be read, or a blob that is not this string's own, does not
        match and is reported. Raises `KMSError` if KMS cannot tell: an outage is never a
        wrong password.
        """
        try:
            stored = self._parse(encoded)
            # KMS is asked while the digest is computed: a login takes the longer, not the sum.
            expected, digest = keyring.open_beside(
                stored, functools.partial(self._digest, password, stored.header)
            )
        except _PasswordRefused:  # it cannot be the one; nothing is wrong with what is stored
            return False
        except MalformedHash as error:
            _report_malformed(error)
            return False
        except (InvalidCiphertext, InvalidRequest) as error:
            if isinstance(error, InvalidRequest) and error.code != WRONG_USAGE:
                raise
            logger.warning("A sealed password was refused by KMS: %s", error)
            return False
        return constant_time_compare(digest, expected)

    def decode(self, encoded: str) -> dict[str, Any]:
        """Return what the string says of itself; of a malformed one, the algorithm alone."""
        try:
            stored = self._parse(encoded)
        except MalformedHash:
            return {"algorithm": self.algorithm, "hash": "", "salt": ""}
        return {
            "algorithm": self.algorithm,
            "mode": stored.mode,
            **_sealed_by(stored),
            "hash": encoding.b64encode(stored.sealed),
            "salt": stored.header.salt.decode("latin-1"),
            **stored.header.parameters._asdict(),
        }

    def safe_summary(self, encoded: str) -> dict[Any, Any]:
        """Return what Django's admin shows of a password."""
        decoded = self.decode(encoded)
        if "mode" not in decoded:
            return {_("algorithm"): self.algorithm, _("hash"): _("not readable")}
        by = {_("sealed by KMS key"): decoded.get("key_id")}
        if "data_key" in decoded:
            by = {_("sealed by data key"): decoded["data_key"]}
        return {
            _("algorithm"): decoded["algorithm"],
            **by,
            **{LABELS[name]: decoded[name] for name in LABELS if name in decoded},
            _("salt"): mask_hash(decoded["salt"]),
            # Of a ciphertext a few characters tell as much as all of them, masked.
            _("hash"): mask_hash(decoded["hash"][:12]),
        }

    def must_update(self, encoded: str) -> bool:
        """
        Return whether the password should be hashed anew at this login.

        Key and mode do not count: an upgrade draws a new salt and ends the user's other
        sessions. Values under an old key are re-wrapped, with their salt kept.
        """
        try:
            header = self._parse(encoded).header
        except MalformedHash:
            return False
        salt = header.salt.decode("latin-1")
        return header.parameters != self._parameters() or must_update_salt(
            salt, self.salt_entropy
        )

    def harden_runtime(self, password: str | bytes, encoded: str) -> None:
        """Do nothing where Django's hasher does nothing: its run time cannot be bridged."""

    def _parse(self, encoded: str) -> SealedHash:
        stored = encoding.parse(encoded)
        if stored.header.algorithm != self.algorithm:
            raise MalformedHash("the hash is another hasher's")
        parameters = stored.header.parameters
        if parameters != self._parameters() and not self._bearable(parameters):
            raise MalformedHash("the costs are beyond the limits of this hasher")
        return stored

    def _parameters(self) -> Any:
        """Return the costs of new hashes."""
        raise NotImplementedError

    def _bearable(self, parameters: Any) -> bool:
        """Return whether a stored string may ask for these costs: more is an attack."""
        raise NotImplementedError

    def _digest(self, password: str | bytes, header: Header) -> bytes:
        """Return the inner hasher's raw digest."""
        raise NotImplementedError


class KMSArgon2PasswordHasher(SealingPasswordHasher, django_hashers.Argon2PasswordHasher):
    """
    Argon2id with Django's parameters, its digest sealed by AWS KMS.

    To change the costs, subclass it and set `time_cost`, `memory_cost` and `parallelism`,
    as with Django's own hasher.
    """

    algorithm = "kms_argon2"

    #: The highest costs a stored string may ask for, beside the hasher's own: KiB of
    #: memory, KiB times passes, and lanes.
    max_memory_cost = 2**20
    max_work = 2**22
    max_parallelism = 64

    def _parameters(self) -> Argon2Parameters:
        params = self.params()
        return Argon2Parameters(
            memory_cost=params.memory_cost,
            time_cost=params.time_cost,
            parallelism=params.parallelism,
            variety=f"argon2{params.type.name.lower()}",
            version=params.version,
        )

    def _bearable(self, parameters: Argon2Parameters) -> bool:
        return (
            parameters.memory_cost <= self.max_memory_cost
            and parameters.memory_cost * parameters.time_cost <= self.max_work
            and parameters.parallelism <= self.max_parallelism
        )

    @sensitive_variables()
    def _digest(self, password: str | bytes, header: Header) -> bytes:
        low_level = self._load_library().low_level  # type: ignore[attr-defined]
        costs = header.parameters
        digest: bytes = low_level.hash_secret_raw(
            force_bytes(password),
            header.salt,
            time_cost=costs.time_cost,
            memory_cost=costs.memory_cost,
            parallelism=costs.parallelism,
            hash_len=header.kind.size,
            type=low_level.Type[costs.variety.removeprefix("argon2").upper()],
            version=costs.version,
        )
        return digest


class KMSPBKDF2PasswordHasher(SealingPasswordHasher, django_hashers.PBKDF2PasswordHasher):  # type: ignore[misc]
    """PBKDF2 with HMAC-SHA-256 and Django's iterations, where FIPS asks for it, sealed."""

    algorithm = "kms_pbkdf2_sha256"

    max_iterations = 20_000_000

    def _parameters(self) -> PBKDF2Parameters:
        return PBKDF2Parameters(self.iterations)

    def _bearable(self, parameters: PBKDF2Parameters) -> bool:
        return parameters.iterations <= self.max_iterations

    @sensitive_variables()
    def _digest(self, password: str | bytes, header: Header) -> bytes:
        iterations = header.parameters.iterations
        return pbkdf2(password, header.salt, iterations, digest=self.digest)

    @sensitive_variables()
    def harden_runtime(self, password: str | bytes, encoded: str) -> None:
        """Compute the iterations that a hash with fewer of them has saved; KMS is not asked."""
        try:
            stored = self._parse(encoded)
        except MalformedHash:
            return
        extra = self.iterations - stored.header.parameters.iterations
        if extra > 0:
            pbkdf2(password, stored.header.salt, extra, digest=self.digest)


class KMSPBKDF2SHA1PasswordHasher(KMSPBKDF2PasswordHasher):
    """The same with HMAC-SHA-1: for hashes that a site has."""

    algorithm = "kms_pbkdf2_sha1"
    digest = hashlib.sha1


class KMSScryptPasswordHasher(SealingPasswordHasher, django_hashers.ScryptPasswordHasher):  # type: ignore[misc]
    """scrypt with Django's costs, sealed."""

    algorithm = "kms_scrypt"

    #: Bytes of memory, and block size times work factor times parallelism.
    max_memory = 2**28
    max_work = 2**23

    def _parameters(self) -> ScryptParameters:
        return ScryptParameters(self.work_factor, self.block_size, self.parallelism)

    def _bearable(self, parameters: ScryptParameters) -> bool:
        memory = (
            128 * parameters.block_size * max(parameters.work_factor, parameters.parallelism)
        )
        work = parameters.block_size * parameters.work_factor * parameters.parallelism
        return memory <= self.max_memory and work <= self.max_work

    @sensitive_variables()
    def _digest(self, password: str | bytes, header: Header) -> bytes:
        work, block, lanes = header.parameters
        return hashlib.scrypt(
            force_bytes(password),
            salt=header.salt,
            n=work,
            r=block,
            p=lanes,
            # OpenSSL counts all of it, and stops at 32 MiB unless told.
            maxmem=128 * block * (work + lanes + 2) + 2**20,
            dklen=header.kind.size,
        )


class KMSBCryptSHA256PasswordHasher(
    SealingPasswordHasher, django_hashers.BCryptSHA256PasswordHasher
):
    """bcrypt of the password's SHA-256, as Django has it, sealed. Needs the package bcrypt."""

    algorithm = "kms_bcrypt_sha256"

    max_rounds = 16

    def salt(self) -> str:
        """Return the 22 characters that bcrypt has for a salt of 16 bytes."""
        library: Any = self._load_library()  # type: ignore[attr-defined]
        return str(library.gensalt(self.rounds).decode("ascii")[-22:])

    def _parameters(self) -> BCryptParameters:
        return BCryptParameters("2b", self.rounds)

    def _bearable(self, parameters: BCryptParameters) -> bool:
        return 4 <= parameters.rounds <= self.max_rounds

    def must_update(self, encoded: str) -> bool:
        """Return whether the rounds are others; the salt cannot be."""
        try:
            rounds = self._parse(encoded).header.parameters.rounds
        except MalformedHash:
            return False
        return bool(rounds != self.rounds)

    @sensitive_variables()
    def harden_runtime(self, password: str | bytes, encoded: str) -> None:
        """Compute the rounds that a hash with fewer of them has saved; KMS is not asked."""
        try:
            header = self._parse(encoded).header
        except MalformedHash:
            return
        # 2**(rounds - 1) have been done: two times as many are 2**rounds.
        with contextlib.suppress(MalformedHash):  # bcrypt refuses it without computing it
            for _again in range(2 ** max(self.rounds - header.parameters.rounds, 0) - 1):
                self._digest(password, header)

    @sensitive_variables()
    def _digest(self, password: str | bytes, header: Header) -> bytes:
        library: Any = self._load_library()  # type: ignore[attr-defined]
        data = force_bytes(password)
        if self.digest is not None:
            data = binascii.hexlify(self.digest(data).digest())
        variety, rounds = header.parameters
        try:
            made = library.hashpw(data, f"${variety}${rounds:02}$".encode() + header.salt)
        except ValueError:
            if len(data) > BCRYPT_MAX or 0 in data:
                raise _PasswordRefused("bcrypt does not take the password") from None
            raise MalformedHash("bcrypt does not take the salt") from None
        return inner.parse_stock(f"bcrypt${made.decode('ascii')}")[1]


class KMSBCryptPasswordHasher(KMSBCryptSHA256PasswordHasher):
    """bcrypt of the password itself: for hashes that a site has."""

    algorithm = "kms_bcrypt"
    digest = None


class KMSMD5PasswordHasher(SealingPasswordHasher, django_hashers.MD5PasswordHasher):
    """Salted MD5: for hashes that a site has, which sealing makes bearable until the login."""

    algorithm = "kms_md5"

    def _parameters(self) -> NoParameters:
        return NoParameters()

    def _bearable(self, parameters: NoParameters) -> bool:
        return True

    @sensitive_variables()
    def _digest(self, password: str | bytes, header: Header) -> bytes:
        return hashlib.md5(header.salt + force_bytes(password), usedforsecurity=False).digest()


def _sealed_by(stored: SealedHash) -> dict[str, Any]:
    """Return the id of the KMS key, or the number of the data key."""
    try:
        return {"key_id": stored.key_id}
    except MalformedHash:
        return {"data_key": encoding.data_key_number(stored.key_ref)}


def _report_malformed(error: MalformedHash) -> None:
    logger.warning("A stored password cannot be read: %s", error)
    signals.emit(
        signals.Event(
            time=timezone.now(),
            operation=signals.PARSE,
            purpose="login",
            outcome=signals.INVALID,
            error_code="MalformedHash",
        )
    )
