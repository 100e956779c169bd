"""KMS's parameters to those of a `Provider`, and its results back: `kms_double`'s words."""

from __future__ import annotations

import base64
import datetime
import json
from typing import Any

from kms_hasher.exceptions import KeyDisabled, KeyPendingDeletion, KMSError
from kms_hasher.providers.base import OPERATIONS, Key, Provider

METHODS = {operation: method for method, operation in OPERATIONS.items()}
_PARAMETERS = {
    "KeyId": "key",
    "Plaintext": "plaintext",
    "CiphertextBlob": "ciphertext",
    "EncryptionContext": "context",
    "EncryptionAlgorithm": "algorithm",
    "DryRun": "dry_run",
    "SourceKeyId": "source_key",
    "SourceEncryptionContext": "source_context",
    "SourceEncryptionAlgorithm": "source_algorithm",
    "DestinationKeyId": "key",
    "DestinationEncryptionContext": "context",
    "DestinationEncryptionAlgorithm": "algorithm",
    "Message": "message",
    "NumberOfBytes": "size",
    "KeySpec": "spec",
    "KeyUsage": "usage",
    "MultiRegion": "multi_region",
    "Description": "description",
    "Policy": "policy",
    "Tags": "tags",
    "AliasName": "alias",
    "TargetKeyId": "key",
    "RotationPeriodInDays": "period_days",
    "PendingWindowInDays": "days",
}
_FIELDS = {
    "key_arn": "KeyId",
    "plaintext": "Plaintext",
    "ciphertext": "CiphertextBlob",
    "key_material_id": "KeyMaterialId",
    "source_key_arn": "SourceKeyId",
    "source_key_material_id": "SourceKeyMaterialId",
    "mac": "Mac",
    "der": "PublicKey",
    "spec": "KeySpec",
    "usage": "KeyUsage",
    "state": "KeyState",
    "multi_region": "MultiRegion",
    "description": "Description",
    "created_at": "CreationDate",
    "deletion_at": "DeletionDate",
    "policy": "Policy",
    "period_days": "RotationPeriodInDays",
}
_BLOBS = ("Plaintext", "CiphertextBlob", "Message")
_CONTEXTS = {
    "ReEncrypt": ("source_context", "context"),
    **dict.fromkeys(("Encrypt", "Decrypt", "GenerateDataKey"), ("context",)),
}
# What KMS answers with a body of no bytes, and what with the bare key id.
_SILENT = {"CreateAlias", "UpdateAlias", "DisableKey", "EnableKey", "EnableKeyRotation"}
_BARE = {"GetKeyRotationStatus", "RotateKeyOnDemand"}


def perform(engine: Provider, operation: str, params: dict[str, Any]) -> dict[str, Any] | bytes:
    arguments: dict[str, Any] = {name: {} for name in _CONTEXTS.get(operation, ())}
    for name, value in params.items():
        if name == "Tags":
            value = {tag["TagKey"]: tag["TagValue"] for tag in value}
        if name in _PARAMETERS:
            decoded = base64.b64decode(value) if name in _BLOBS else value
            arguments[_PARAMETERS[name]] = decoded
    result = getattr(engine, METHODS[operation])(**arguments)
    if operation in _SILENT:
        return b""
    fields = {
        _FIELDS[name]: value
        for name, value in vars(result).items()
        if name in _FIELDS and value not in (None, "")
    }
    if operation in _BARE:
        fields["KeyId"] = result.key_arn.rpartition("/")[2]
    if operation == "GetKeyRotationStatus":
        fields["KeyRotationEnabled"] = result.period_days is not None
    elif operation == "ListResourceTags":
        tags = result.tags.items()
        return {"Tags": [{"TagKey": key, "TagValue": value} for key, value in tags]}
    elif operation == "GetKeyPolicy":
        return {"Policy": result.policy, "PolicyName": "default"}
    elif operation == "ReEncrypt" and "KeyMaterialId" in fields:
        fields["DestinationKeyMaterialId"] = fields.pop("KeyMaterialId")
    elif isinstance(result, Key):
        fields |= {
            "Arn": result.key_arn,
            "KeyId": result.key_id,
            "AWSAccountId": result.key_arn.split(":")[4],
        }
        if "KeyMaterialId" in fields:
            fields["CurrentKeyMaterialId"] = fields.pop("KeyMaterialId")
        return {"KeyMetadata": fields}
    return fields


def message(error: KMSError) -> str:
    """Return the text as KMS words it, where the text is all that tells states apart."""
    if isinstance(error, KeyPendingDeletion):
        return f"{error.key} is pending deletion."
    return f"{error.key} is disabled." if isinstance(error, KeyDisabled) else error.message


def dump(value: Any) -> bytes:
    return value if isinstance(value, bytes) else json.dumps(value, default=_wire).encode()


def _wire(value: Any) -> Any:
    if isinstance(value, datetime.datetime):
        return value.timestamp()
    return base64.b64encode(value).decode("ascii")
