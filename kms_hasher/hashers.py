"""
The password hasher: Django's Argon2, and the digest sealed by KMS before it is stored.

Django makes one instance of every hasher in `PASSWORD_HASHERS`, keeps it for good and
shares it between threads and event loops. So there is no state here, no database and no
client: `encode` and `verify` are Argon2 on this side and `keyring` on the other.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from django.contrib.auth.hashers import Argon2PasswordHasher, mask_hash, must_update_salt
from django.utils import timezone
from django.utils.crypto import constant_time_compare
from django.utils.encoding import force_bytes
from django.utils.translation import gettext_noop as _
from django.views.decorators.debug import sensitive_variables

from kms_hasher import encoding, keyring, signals
from kms_hasher.encoding import Argon2Parameters, Header, SealedHash
from kms_hasher.exceptions import InvalidCiphertext, MalformedHash

logger = logging.getLogger("kms_hasher")


class KMSArgon2PasswordHasher(Argon2PasswordHasher):
    """
    Argon2id with Django's parameters, its digest encrypted by AWS KMS.

    To change the costs, subclass it and set `time_cost`, `memory_cost` and `parallelism`,
    as with Django's own hasher. `encode` and `verify` each make exactly one call to KMS
    and raise `KMSError` if it cannot be answered; nothing else here calls KMS, and no
    stored string, whatever it holds, makes anything here raise.
    """

    algorithm = "kms_argon2"

    #: The highest costs a stored string may ask for, beside the hasher's own: KiB of
    #: memory, KiB times passes, and lanes. More is an attack on this server, not a hash.
    max_memory_cost = 2**20
    max_work = 2**22
    max_parallelism = 64

    @sensitive_variables("password", "digest")
    def encode(self, password: str | bytes, salt: str) -> str:
        """
        Return the stored string for a password, by one KMS Encrypt.

        Raises `TypeError` or `ValueError` as Django's hashers do for bad arguments, and
        `KMSError` if the digest cannot be sealed.
        """
        self._check_encode_args(password, salt)  # type: ignore[attr-defined]
        header = Header(self.algorithm, self._parameters(), force_bytes(salt))
        if len(header.salt) < encoding.MIN_SALT:
            raise ValueError(f"salt must have at least {encoding.MIN_SALT} bytes.")
        digest = self._digest(password, header)
        return str(keyring.seal(header, digest))

    @sensitive_variables("password", "expected", "digest")
    def verify(self, password: str | bytes, encoded: str) -> bool:
        """
        Return whether the password is the one that `encoded` was made of, by one KMS Decrypt.

        A string that cannot be read, or a blob that is not this string's own, does not
        match and is reported. Raises `KMSError` if KMS cannot tell: an outage is never a
        wrong password.
        """
        try:
            stored = self._parse(encoded)
            # KMS is asked while Argon2 computes: a login takes the longer, not the sum.
            expected, digest = keyring.open_beside(
                stored, functools.partial(self._digest, password, stored.header)
            )
        except MalformedHash as error:
            _report_malformed(error)
            return False
        except InvalidCiphertext as error:
            logger.warning("A sealed password was refused by KMS: %s", error)
            return False
        return constant_time_compare(digest, expected)

    def decode(self, encoded: str) -> dict[str, Any]:
        """Return what the string says of itself; of a malformed one, the algorithm alone."""
        try:
            stored = self._parse(encoded)
        except MalformedHash:
            return {"algorithm": self.algorithm, "hash": "", "salt": ""}
        costs = stored.header.parameters
        return {
            "algorithm": self.algorithm,
            "mode": stored.mode,
            "key_id": stored.key_id,
            "hash": encoding.b64encode(stored.sealed),
            "salt": stored.header.salt.decode("latin-1"),
            "variety": costs.variety,
            "version": costs.version,
            "memory_cost": costs.memory_cost,
            "time_cost": costs.time_cost,
            "parallelism": costs.parallelism,
        }

    def safe_summary(self, encoded: str) -> dict[Any, Any]:
        """Return what Django's admin shows of a password."""
        decoded = self.decode(encoded)
        if "mode" not in decoded:
            return {_("algorithm"): self.algorithm, _("hash"): _("not readable")}
        return {
            _("algorithm"): decoded["algorithm"],
            _("sealed by KMS key"): decoded["key_id"],
            _("variety"): decoded["variety"],
            _("version"): decoded["version"],
            _("memory cost"): decoded["memory_cost"],
            _("time cost"): decoded["time_cost"],
            _("parallelism"): decoded["parallelism"],
            _("salt"): mask_hash(decoded["salt"]),
            # Of a ciphertext a few characters tell as much as all of them, masked.
            _("hash"): mask_hash(decoded["hash"][:12]),
        }

    def must_update(self, encoded: str) -> bool:
        """
        Return whether the password should be hashed anew at this login.

        The key does not count: an upgrade draws a new salt and ends the user's other
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
        """Do nothing, as in Django's Argon2 hasher: its run time cannot be bridged."""

    def _parameters(self) -> Argon2Parameters:
        params = self.params()
        return Argon2Parameters(
            memory_cost=params.memory_cost,
            time_cost=params.time_cost,
            parallelism=params.parallelism,
            variety=f"argon2{params.type.name.lower()}",
            version=params.version,
        )

    def _parse(self, encoded: str) -> SealedHash:
        stored = encoding.parse(encoded)
        if stored.header.algorithm != self.algorithm:
            raise MalformedHash("the hash is another hasher's")
        costs, own = stored.header.parameters, self._parameters()
        if costs != own and (
            costs.memory_cost > self.max_memory_cost
            or costs.memory_cost * costs.time_cost > self.max_work
            or costs.parallelism > self.max_parallelism
        ):
            raise MalformedHash("the Argon2 costs are beyond the limits of this hasher")
        return stored

    @sensitive_variables("password")
    def _digest(self, password: str | bytes, header: Header) -> bytes:
        low_level = self._load_library().low_level  # type: ignore[attr-defined]
        costs = header.parameters
        digest: bytes = low_level.hash_secret_raw(
            force_bytes(password),
            header.salt,
            time_cost=costs.time_cost,
            memory_cost=costs.memory_cost,
            parallelism=costs.parallelism,
            hash_len=keyring.DIGEST_SIZE,
            type=low_level.Type[costs.variety.removeprefix("argon2").upper()],
            version=costs.version,
        )
        return digest


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
