"""
What a key management service must do for us: one small protocol, in KMS's own terms.

A provider is constructed with the keyword arguments in `KMS_HASHER["OPTIONS"]`. It must be
safe to share between threads, do no work in its constructor that needs the network, and
raise nothing from the methods below but `kms_hasher.exceptions.KMSError`, and
`ConfigurationError` there or in its constructor. It never writes a plaintext to a log or an
error.

`key` is a key id, key ARN, alias name or alias ARN, as KMS takes it (calls that manage a key
take no alias); every result names the key by its resolved ARN, or as it was asked for where
KMS does not name it. `context` is KMS's encryption context: additional authenticated
data, not secret, compared exactly.
See https://docs.aws.amazon.com/kms/latest/APIReference/.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

Context = Mapping[str, str]

#: Names as KMS gives them.
SYMMETRIC_DEFAULT = "SYMMETRIC_DEFAULT"
RSAES_OAEP_SHA_256 = "RSAES_OAEP_SHA_256"
HMAC_SHA_256 = "HMAC_SHA_256"


@dataclass(frozen=True, kw_only=True)
class Result:
    """What every call returns: the key that was used and an id for each attempt."""

    key_arn: str
    request_ids: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Encrypted(Result):
    ciphertext: bytes = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Decrypted(Result):
    plaintext: bytes = field(repr=False)
    key_material_id: str = ""


@dataclass(frozen=True, kw_only=True)
class ReEncrypted(Result):
    """`key_arn` is the destination's."""

    ciphertext: bytes = field(repr=False)
    source_key_arn: str
    source_key_material_id: str = ""
    key_material_id: str = ""


@dataclass(frozen=True, kw_only=True)
class DataKey(Result):
    plaintext: bytes = field(repr=False)
    ciphertext: bytes = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Mac(Result):
    mac: bytes = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class PublicKey(Result):
    """`der` is the SubjectPublicKeyInfo (RFC 5280)."""

    der: bytes
    spec: str
    usage: str


@dataclass(frozen=True, kw_only=True)
class Key(Result):
    """A key's description: DescribeKey's KeyMetadata."""

    spec: str
    usage: str
    state: str
    multi_region: bool = False
    description: str = ""
    created_at: datetime.datetime | None = None
    deletion_at: datetime.datetime | None = None
    key_material_id: str = ""

    @property
    def key_id(self) -> str:
        return self.key_arn.rpartition("/")[2]


@dataclass(frozen=True, kw_only=True)
class KeyPolicy(Result):
    policy: str


@dataclass(frozen=True, kw_only=True)
class Tags(Result):
    tags: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class RotationStatus(Result):
    """`period_days` is None where automatic rotation is off."""

    period_days: int | None


class Provider(Protocol):
    """A key management service. Every method is one call to it and may raise `KMSError`."""

    # What a login or a change of password needs.

    def encrypt(
        self,
        key: str,
        plaintext: bytes,
        context: Context,
        *,
        algorithm: str = SYMMETRIC_DEFAULT,
        dry_run: bool = False,
    ) -> Encrypted:
        """KMS Encrypt. With `dry_run`, raises `DryRunOperation` when it is allowed."""

    def decrypt(
        self,
        key: str,
        ciphertext: bytes,
        context: Context,
        *,
        algorithm: str = SYMMETRIC_DEFAULT,
        dry_run: bool = False,
    ) -> Decrypted:
        """
        KMS Decrypt, by the one key named.

        Raises `IncorrectKey` if another key made the blob, `InvalidCiphertext` if it was
        altered or belongs to another context.
        """

    def re_encrypt(
        self,
        source_key: str,
        ciphertext: bytes,
        source_context: Context,
        key: str,
        context: Context,
        *,
        source_algorithm: str = SYMMETRIC_DEFAULT,
        algorithm: str = SYMMETRIC_DEFAULT,
        dry_run: bool = False,
    ) -> ReEncrypted:
        """KMS ReEncrypt: the plaintext never leaves the service."""

    def generate_mac(self, key: str, message: bytes) -> Mac:
        """KMS GenerateMac with HMAC_SHA_256; `message` holds 1 to 4096 bytes."""

    def generate_data_key(self, key: str, context: Context, size: int = 32) -> DataKey:
        """KMS GenerateDataKey of `size` bytes."""

    def get_public_key(self, key: str) -> PublicKey:
        """KMS GetPublicKey."""

    # What keys are managed with.

    def describe_key(self, key: str) -> Key:
        """KMS DescribeKey. This is also how an alias is resolved."""

    def create_key(
        self,
        *,
        spec: str = SYMMETRIC_DEFAULT,
        usage: str = "ENCRYPT_DECRYPT",
        multi_region: bool = False,
        description: str = "",
        policy: str = "",
        tags: Mapping[str, str] | None = None,
    ) -> Key:
        """KMS CreateKey. An empty `policy` stands for the service's default."""

    def get_key_policy(self, key: str) -> KeyPolicy:
        """KMS GetKeyPolicy; the default policy's JSON."""

    def list_resource_tags(self, key: str) -> Tags:
        """KMS ListResourceTags."""

    def get_key_rotation_status(self, key: str) -> RotationStatus:
        """KMS GetKeyRotationStatus."""

    def enable_key_rotation(self, key: str, period_days: int = 365) -> Result:
        """KMS EnableKeyRotation."""

    def rotate_key_on_demand(self, key: str) -> Result:
        """KMS RotateKeyOnDemand: new material under the same ARN."""

    def create_alias(self, alias: str, key: str) -> Result:
        """KMS CreateAlias. Raises `AlreadyExists`."""

    def update_alias(self, alias: str, key: str) -> Result:
        """KMS UpdateAlias: the new key must have the old one's spec class and usage."""

    def disable_key(self, key: str) -> Result:
        """KMS DisableKey."""

    def enable_key(self, key: str) -> Result:
        """KMS EnableKey."""

    def schedule_key_deletion(self, key: str, days: int = 30) -> Result:
        """KMS ScheduleKeyDeletion after 7 to 30 days."""

    def cancel_key_deletion(self, key: str) -> Result:
        """KMS CancelKeyDeletion; the key is disabled afterwards."""

    def close(self) -> None:
        """Give up connections and other resources. Called after a fork, and at exit."""


#: Operation names, by method, as they stand in CloudTrail and in the audit.
OPERATIONS: Mapping[str, str] = {
    name: "".join(part.capitalize() for part in name.split("_"))
    for name, value in vars(Provider).items()
    if callable(value) and not name.startswith("_") and name != "close"
}
