"""
KMS's operations: what each one is given and what its answer must hold.

How a call reaches KMS is `kms_hasher.providers.aws`'s affair.
See https://docs.aws.amazon.com/kms/latest/APIReference/.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ParamSpec, TypeVar

from kms_hasher.exceptions import InvalidCiphertext, KMSError
from kms_hasher.providers.aws_errors import Answer
from kms_hasher.providers.base import (
    HMAC_SHA_256,
    SYMMETRIC_DEFAULT,
    Context,
    DataKey,
    Decrypted,
    Encrypted,
    Key,
    KeyPolicy,
    Mac,
    PublicKey,
    ReEncrypted,
    Result,
    RotationStatus,
    Tags,
)

P = ParamSpec("P")
T = TypeVar("T")


def _opaque(method: Callable[P, T]) -> Callable[P, T]:
    """
    Let no frame that holds a plaintext leave with an error.

    Django's `sensitive_variables` hides them from Django's report alone; other reporters
    (Sentry, a plain traceback with locals) would still print them, its wrapper included.
    """

    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return method(*args, **kwargs)
        except Exception as error:  # noqa: BLE001  # raised again below
            del args, kwargs
            error.__cause__ = error.__context__ = None
            raise error.with_traceback(None) from None

    return call


class Operations:
    """The methods of `Provider`, in terms of `_call`."""

    def _call(self, method: str, key: str, *others: str, **params: Any) -> Answer:
        """
        Call an operation of KMS, in the Region that `key` and `others` are in.

        `method` is its name in snake_case. Raises `KMSError`.
        """
        raise NotImplementedError

    async def _acall(self, method: str, key: str, *others: str, **params: Any) -> Answer:
        """Do the same on an event loop."""
        raise NotImplementedError

    # --- what a login or a change of password needs ----------------------------------

    @_opaque
    def encrypt(
        self,
        key: str,
        plaintext: bytes,
        context: Context,
        *,
        algorithm: str = SYMMETRIC_DEFAULT,
        dry_run: bool = False,
    ) -> Encrypted:
        answer = self._call(
            "encrypt",
            key,
            KeyId=key,
            Plaintext=plaintext,
            EncryptionAlgorithm=algorithm,
            **_optional(EncryptionContext=dict(context), DryRun=dry_run),
        )
        return Encrypted(
            key_arn=answer.arn(asked=key),
            request_ids=answer.request_ids,
            ciphertext=answer.blob("CiphertextBlob"),
        )

    @_opaque
    def decrypt(
        self,
        key: str,
        ciphertext: bytes,
        context: Context,
        *,
        algorithm: str = SYMMETRIC_DEFAULT,
        dry_run: bool = False,
    ) -> Decrypted:
        answer = self._call(
            "decrypt",
            key,
            KeyId=key,
            CiphertextBlob=ciphertext,
            EncryptionAlgorithm=algorithm,
            **_optional(EncryptionContext=dict(context), DryRun=dry_run),
        )
        return Decrypted(
            key_arn=answer.arn(asked=key),
            request_ids=answer.request_ids,
            plaintext=answer.blob("Plaintext"),
            key_material_id=answer.optional_text("KeyMaterialId"),
        )

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
        params = _re_encryption(source_key, ciphertext, source_context, key, context)
        params |= {
            "SourceEncryptionAlgorithm": source_algorithm,
            "DestinationEncryptionAlgorithm": algorithm,
            **_optional(DryRun=dry_run),
        }
        with _blaming(source_key, key):
            answer = self._call("re_encrypt", key, source_key, **params)
        return _re_encrypted(answer, source_key, key)

    async def are_encrypt(
        self,
        source_key: str,
        ciphertext: bytes,
        source_context: Context,
        key: str,
        context: Context,
    ) -> ReEncrypted:
        """The same on an event loop: a rotation makes millions of these."""
        params = _re_encryption(source_key, ciphertext, source_context, key, context)
        with _blaming(source_key, key):
            answer = await self._acall("re_encrypt", key, source_key, **params)
        return _re_encrypted(answer, source_key, key)

    @_opaque
    def generate_mac(self, key: str, message: bytes) -> Mac:
        answer = self._call(
            "generate_mac", key, KeyId=key, Message=message, MacAlgorithm=HMAC_SHA_256
        )
        return Mac(
            key_arn=answer.arn(asked=key),
            request_ids=answer.request_ids,
            mac=answer.blob("Mac", 32),
        )

    @_opaque
    def generate_data_key(self, key: str, context: Context, size: int = 32) -> DataKey:
        answer = self._call(
            "generate_data_key",
            key,
            KeyId=key,
            NumberOfBytes=size,
            **_optional(EncryptionContext=dict(context)),
        )
        return DataKey(
            key_arn=answer.arn(asked=key),
            request_ids=answer.request_ids,
            plaintext=answer.blob("Plaintext", size),
            ciphertext=answer.blob("CiphertextBlob"),
        )

    def get_public_key(self, key: str) -> PublicKey:
        answer = self._call("get_public_key", key, KeyId=key)
        return PublicKey(
            key_arn=answer.arn(asked=key),
            request_ids=answer.request_ids,
            der=answer.blob("PublicKey"),
            # Emulators know its former name only.
            spec=answer.optional_text("KeySpec") or answer.text("CustomerMasterKeySpec"),
            usage=answer.text("KeyUsage"),
        )

    # --- what keys are managed with --------------------------------------------------

    def describe_key(self, key: str) -> Key:
        return _key(self._call("describe_key", key, KeyId=key), key)

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
        listed = [{"TagKey": name, "TagValue": text} for name, text in (tags or {}).items()]
        answer = self._call(
            "create_key",
            "",
            KeySpec=spec,
            KeyUsage=usage,
            **_optional(
                MultiRegion=multi_region, Description=description, Policy=policy, Tags=listed
            ),
        )
        return _key(answer, "")

    def get_key_policy(self, key: str) -> KeyPolicy:
        answer = self._call("get_key_policy", key, KeyId=key, PolicyName="default")
        return KeyPolicy(
            key_arn=key, request_ids=answer.request_ids, policy=answer.text("Policy")
        )

    def list_resource_tags(self, key: str) -> Tags:
        # 50 is both the largest page and the most tags a key may have.
        answer = self._call("list_resource_tags", key, KeyId=key, Limit=50)
        tags = {
            tag.text("TagKey"): tag.optional_text("TagValue") for tag in answer.items("Tags")
        }
        return Tags(key_arn=key, request_ids=answer.request_ids, tags=tags)

    def get_key_rotation_status(self, key: str) -> RotationStatus:
        answer = self._call("get_key_rotation_status", key, KeyId=key)
        period = answer.number("RotationPeriodInDays", 365)
        return RotationStatus(
            key_arn=key,
            request_ids=answer.request_ids,
            period_days=period if answer.flag("KeyRotationEnabled") else None,
        )

    def enable_key_rotation(self, key: str, period_days: int = 365) -> Result:
        return self._manage("enable_key_rotation", key, RotationPeriodInDays=period_days)

    def rotate_key_on_demand(self, key: str) -> Result:
        return self._manage("rotate_key_on_demand", key)

    def create_alias(self, alias: str, key: str) -> Result:
        return self._point("create_alias", alias, key)

    def update_alias(self, alias: str, key: str) -> Result:
        return self._point("update_alias", alias, key)

    def disable_key(self, key: str) -> Result:
        return self._manage("disable_key", key)

    def enable_key(self, key: str) -> Result:
        return self._manage("enable_key", key)

    def schedule_key_deletion(self, key: str, days: int = 30) -> Result:
        return self._manage("schedule_key_deletion", key, PendingWindowInDays=days)

    def cancel_key_deletion(self, key: str) -> Result:
        return self._manage("cancel_key_deletion", key)

    def _manage(self, method: str, key: str, **params: Any) -> Result:
        """Call an operation that answers with the key at most."""
        answer = self._call(method, key, KeyId=key, **params)
        arn = answer.arn(asked=key) if "KeyId" in answer.data else key
        return Result(key_arn=arn, request_ids=answer.request_ids)

    def _point(self, method: str, alias: str, key: str) -> Result:
        name = alias.rpartition(":")[2]  # KMS takes the name alone here, no ARN
        answer = self._call(method, alias, key, AliasName=name, TargetKeyId=key)
        return Result(key_arn=key, request_ids=answer.request_ids)


def _re_encryption(
    source_key: str, ciphertext: bytes, source_context: Context, key: str, context: Context
) -> dict[str, Any]:
    return {
        "SourceKeyId": source_key,
        "CiphertextBlob": ciphertext,
        "DestinationKeyId": key,
        **_optional(
            SourceEncryptionContext=dict(source_context),
            DestinationEncryptionContext=dict(context),
        ),
    }


@contextlib.contextmanager
def _blaming(source_key: str, key: str) -> Iterator[None]:
    """Let an error name the key it is about: KMS tells that by its text alone."""
    try:
        yield
    except KMSError as error:
        named = source_key in error.message and key not in error.message
        if named or isinstance(error, InvalidCiphertext):
            error.key = source_key
        raise


def _re_encrypted(answer: Answer, source_key: str, key: str) -> ReEncrypted:
    return ReEncrypted(
        key_arn=answer.arn(asked=key),
        request_ids=answer.request_ids,
        ciphertext=answer.blob("CiphertextBlob"),
        source_key_arn=answer.arn("SourceKeyId", asked=source_key),
        source_key_material_id=answer.optional_text("SourceKeyMaterialId"),
        key_material_id=answer.optional_text("DestinationKeyMaterialId"),
    )


def _optional(**params: Any) -> dict[str, Any]:
    """Leave out what is not asked for: RSA keys take not even an empty context."""
    return {name: value for name, value in params.items() if value}


def _key(answer: Answer, asked: str) -> Key:
    metadata = answer.inner("KeyMetadata")
    return Key(
        key_arn=metadata.arn("Arn", asked=asked),
        request_ids=answer.request_ids,
        spec=metadata.text("KeySpec"),
        usage=metadata.text("KeyUsage"),
        state=metadata.text("KeyState"),
        multi_region=bool(metadata.data.get("MultiRegion")),
        description=metadata.optional_text("Description"),
        created_at=metadata.time("CreationDate"),
        deletion_at=metadata.time("DeletionDate"),
        key_material_id=metadata.optional_text("CurrentKeyMaterialId"),
    )
