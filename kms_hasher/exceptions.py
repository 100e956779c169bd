"""
Every error this package raises, under one root.

A caller who wants to know "could KMS not answer, or is something wrong?" needs two
classes: `KMSUnavailable` passes by itself, every other `KMSError` wants a person.
None of them carries a password, a digest, a salt or a ciphertext.
"""

from __future__ import annotations

from collections.abc import Sequence

from django.core.exceptions import ImproperlyConfigured


class KMSHasherError(Exception):
    """The root of all errors raised by kms_hasher."""


class ConfigurationError(KMSHasherError, ImproperlyConfigured):
    """Raised when the settings cannot work; the message says what to change."""


class MalformedHash(KMSHasherError, ValueError):
    """Raised when a string is not a sealed hash that this version can read."""


class DataKeyMissing(KMSHasherError):
    """
    Raised when a stored hash names a data key that there is no row of.

    The table was restored without its data keys, say: what they sealed cannot be opened.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(
            f"There is no data key {number}, by which a stored password is sealed: restore "
            "the table of data keys."
        )


class DataKeyDamaged(KMSHasherError):
    """
    Raised when the row of a data key does not hold what was stored there.

    It was altered, say, or restored under another name of the deployment: what the data key
    sealed cannot be opened until the row is as it was.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(
            f"The row of the data key {number}, by which stored passwords are sealed, is "
            "damaged: restore it."
        )


class AuditError(KMSHasherError):
    """Raised when an event cannot be recorded and `AUDIT_STRICT` is set."""


class SealRefused(KMSHasherError):
    """Raised when the audit cannot be sealed or marked as pruned as things stand."""


class TrailError(KMSHasherError):
    """Raised when a file or answer of CloudTrail cannot be read, or not to its end."""


class RotationRefused(KMSHasherError):
    """Raised when a step of a rotation would lose data or cannot be done as asked."""


class RotationCancelled(KMSHasherError):
    """Raised where a run is under way that somebody has cancelled."""

    def __init__(self, message: str = "The run was cancelled.") -> None:
        super().__init__(message)


class WorkerFailed(KMSHasherError):
    """Raised when a process that worked on a run could not go on, or has ended."""


class KMSError(KMSHasherError):
    """
    Raised when a call to KMS does not give the result asked for.

    `code` is the error code as KMS (or the client) names it, `operation` KMS's name of
    the operation, `key` what was passed as the key, and `request_ids` one id for each
    attempt that got an answer: CloudTrail's `requestID`.
    """

    default_message = "KMS refused the call."

    def __init__(
        self,
        message: str = "",
        *,
        code: str = "",
        operation: str = "",
        key: str = "",
        request_ids: Sequence[str] = (),
    ) -> None:
        self.message = message or self.default_message
        self.code = code or type(self).__name__
        self.operation = operation
        self.key = key
        self.request_ids = tuple(request_ids)
        super().__init__(self.message)

    def __str__(self) -> str:
        place = " ".join(part for part in (self.operation, self.key) if part)
        text = f"{place}: {self.message}" if place else self.message
        return f"{text} ({self.code})"


class KMSUnavailable(KMSError):
    """Raised when KMS cannot answer now. It says nothing about the password."""

    default_message = "KMS cannot answer right now."


class KMSTimeout(KMSUnavailable):
    """Raised when no answer came within the pinned timeouts and attempts."""

    default_message = "KMS did not answer in time."


class KMSConnectionError(KMSUnavailable):
    """Raised when KMS could not be reached: DNS, TCP, TLS, a reset, a proxy."""

    default_message = "KMS could not be reached."


class KMSThrottled(KMSUnavailable):
    """Raised when the account's request quota is used up after all attempts."""

    default_message = "KMS throttled the call: the request quota is used up."


class KMSInternalError(KMSUnavailable):
    """Raised for a fault inside KMS: HTTP 5xx, KMSInternal, DependencyTimeout."""

    default_message = "KMS failed inside."


class KMSCircuitOpen(KMSUnavailable):
    """Raised in the place of a call while KMS is known to be out: see `breaker`."""

    default_message = "KMS could not answer lately; it is asked again within seconds."


class KMSBadResponse(KMSUnavailable):
    """
    Raised when a successful answer lacks what it must hold or is not what was asked.

    botocore reports success for a truncated, empty or malformed 200; such an answer
    must never be stored or compared.
    """

    default_message = "KMS answered, but the answer is damaged."


class KMSAccessDenied(KMSError):
    """Raised when IAM, the key policy or a grant does not allow the call."""

    default_message = "Access denied: check the IAM policy and the key policy."


class KMSCredentialsError(KMSError):
    """Raised when there are no credentials, or they are expired or not valid."""

    default_message = "The AWS credentials are missing, expired or not valid."


class KeyUnusable(KMSError):
    """Raised when the key exists but its state forbids the operation."""

    default_message = "The key cannot be used in its present state."


class KeyDisabled(KeyUnusable):
    """Raised when the key is disabled. Enabling it makes its blobs readable again."""

    default_message = "The key is disabled."


class KeyPendingDeletion(KeyUnusable):
    """Raised when the key waits for its deletion, which can still be cancelled."""

    default_message = "The key is scheduled for deletion."


class KeyNotFound(KMSError):
    """Raised when the key or alias does not exist (any more) in the account and Region."""

    default_message = "The key or alias does not exist in this account and Region."


class InvalidCiphertext(KMSError):
    """Raised when the blob was not made by this key with this context, or was altered."""

    default_message = "The ciphertext is not valid for this key and context."


class IncorrectKey(InvalidCiphertext):
    """Raised when the blob was sealed by another key than the one named."""

    default_message = "The ciphertext was made by another key."


class InvalidRequest(KMSError):
    """Raised when KMS finds the request itself wrong: wrong usage, spec or value."""

    default_message = "KMS finds the request not valid."


class AlreadyExists(KMSError):
    """Raised when an alias to be created exists already."""

    default_message = "It exists already."


class LimitExceeded(KMSError):
    """Raised when a quota other than the request rate is reached, such as rotations."""

    default_message = "A KMS quota is reached."


class DryRunOperation(KMSError):
    """Raised for a call with `dry_run=True` that would have been allowed."""

    default_message = "The call would have been allowed."


class KeyFileError(KMSError):
    """
    Raised when the local provider's file is damaged, open to others or out of reach.

    The message names the file and says what to do. It never quotes what is in the file.
    """

    default_message = "The key file cannot be used."
