"""
What KMS allows, as a KMS in software enforces it.

Each function raises the error KMS would, or returns. Sources: the API reference of each
operation, and the table of key states,
https://docs.aws.amazon.com/kms/latest/developerguide/key-state.html.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from kms_hasher.exceptions import (
    AlreadyExists,
    DryRunOperation,
    IncorrectKey,
    InvalidCiphertext,
    InvalidRequest,
    KeyDisabled,
    KeyNotFound,
    KeyPendingDeletion,
    KeyUnusable,
    KMSError,
    LimitExceeded,
)
from kms_hasher.providers._keys import StoredKey
from kms_hasher.providers._software import RSA_BITS, plaintext_limit
from kms_hasher.providers.base import RSAES_OAEP_SHA_256, SYMMETRIC_DEFAULT, Context

#: AWS's error codes, for errors that do not bring a narrower one.
CODES: Mapping[type[KMSError], str] = {
    AlreadyExists: "AlreadyExistsException",
    DryRunOperation: "DryRunOperationException",
    IncorrectKey: "IncorrectKeyException",
    InvalidCiphertext: "InvalidCiphertextException",
    InvalidRequest: "ValidationException",
    KeyDisabled: "DisabledException",
    KeyNotFound: "NotFoundException",
    KeyPendingDeletion: "KMSInvalidStateException",
    KeyUnusable: "KMSInvalidStateException",
    LimitExceeded: "LimitExceededException",
}

#: Rotations on demand that one key can have.
ON_DEMAND_ROTATIONS = 25

_USAGES: Mapping[str, tuple[str, ...]] = {
    SYMMETRIC_DEFAULT: ("ENCRYPT_DECRYPT",),
    "HMAC_256": ("GENERATE_VERIFY_MAC",),
    **dict.fromkeys(RSA_BITS, ("ENCRYPT_DECRYPT", "SIGN_VERIFY")),
}
_ALIAS = re.compile(r"alias/[A-Za-z0-9/_-]{1,250}\Z")


# --- the request --------------------------------------------------------------------


def check_range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise InvalidRequest(f"{name} must lie within {low} and {high}, and is {value}.")


def check_spec(spec: str, usage: str) -> None:
    if usage not in _USAGES.get(spec, ()):
        raise InvalidRequest(f"KeySpec {spec!r} and KeyUsage {usage!r} do not go together.")


def check_policy(policy: str) -> None:
    try:
        valid = isinstance(json.loads(policy), dict)
    except ValueError:
        valid = False
    if not valid:
        raise InvalidRequest(
            "The policy is not a JSON object.", code="MalformedPolicyDocumentException"
        )


def default_policy(account: str) -> str:
    """Return the policy of a key created without one: IAM decides."""
    statement = {
        "Sid": "Enable IAM User Permissions",
        "Effect": "Allow",
        "Principal": {"AWS": f"arn:aws:iam::{account}:root"},
        "Action": "kms:*",
        "Resource": "*",
    }
    policy = {"Version": "2012-10-17", "Id": "key-default-1", "Statement": [statement]}
    return json.dumps(policy, indent=2)


def check_alias(alias: str) -> None:
    if not _ALIAS.match(alias):
        raise InvalidRequest(
            'An alias is "alias/" and up to 250 letters, digits, "/", "_" and "-".'
        )
    if alias.startswith("alias/aws/"):
        raise InvalidRequest(
            'Names that begin with "alias/aws/" are reserved for AWS.',
            code="NotAuthorizedException",
        )


def check_algorithm(algorithm: str, context: Context) -> None:
    if algorithm not in (SYMMETRIC_DEFAULT, RSAES_OAEP_SHA_256):
        raise InvalidRequest(f"The encryption algorithm {algorithm!r} is not supported here.")
    if context and algorithm != SYMMETRIC_DEFAULT:
        raise InvalidRequest("An encryption context needs a symmetric encryption key.")


def stop_dry_run(dry_run: bool) -> None:
    """Raise `DryRunOperation` where a call has turned out to be allowed."""
    if dry_run:
        raise DryRunOperation


# --- the key ------------------------------------------------------------------------


def require_enabled(key: StoredKey) -> None:
    require_kept(key)
    if not key.enabled:
        raise KeyDisabled("The key is disabled.")


def require_kept(key: StoredKey) -> None:
    if key.deletion_at:
        raise KeyPendingDeletion("The key is pending deletion.")


def require_pending_deletion(key: StoredKey) -> None:
    if not key.deletion_at:
        raise KeyUnusable("The key is not pending deletion.")


def require_usage(key: StoredKey, usage: str) -> None:
    if key.usage != usage:
        raise InvalidRequest(
            f"KeyUsage is {key.usage}; the operation needs {usage}.",
            code="InvalidKeyUsageException",
        )


def require_algorithm(key: StoredKey, algorithm: str) -> None:
    require_usage(key, "ENCRYPT_DECRYPT")
    if algorithm != (RSAES_OAEP_SHA_256 if key.spec in RSA_BITS else SYMMETRIC_DEFAULT):
        raise InvalidRequest(
            f"A key of KeySpec {key.spec} does not do {algorithm}.",
            code="InvalidKeyUsageException",
        )


def require_room(key: StoredKey, size: int) -> None:
    check_range("The plaintext's length", size, 1, plaintext_limit(key.spec))


def require_public_key(key: StoredKey) -> None:
    require_enabled(key)
    if key.spec not in RSA_BITS:
        raise InvalidRequest(
            f"A key of KeySpec {key.spec} has no public key.",
            code="UnsupportedOperationException",
        )


def require_rotatable(key: StoredKey) -> None:
    require_enabled(key)
    if key.spec != SYMMETRIC_DEFAULT:
        raise InvalidRequest(
            f"A key of KeySpec {key.spec} cannot be rotated: a new key takes its place.",
            code="UnsupportedOperationException",
        )


def require_rotations_left(key: StoredKey) -> None:
    require_rotatable(key)
    if len(key.materials) > ON_DEMAND_ROTATIONS:
        raise LimitExceeded(f"Rotated on demand {ON_DEMAND_ROTATIONS} times already.")


def require_same_kind(former: StoredKey, key: StoredKey) -> None:
    """An alias may only move to a key of the same type and usage."""
    if _kind(former) != _kind(key):
        raise InvalidRequest(
            "The alias's new key must have the type and usage of its present one."
        )


def _kind(key: StoredKey) -> tuple[str, str]:
    # Symmetric, asymmetric or HMAC: the bits of an RSA key do not matter.
    return key.spec.partition("_")[0], key.usage
