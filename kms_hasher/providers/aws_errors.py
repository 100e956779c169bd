"""
What AWS answers, checked, and what botocore raises, in our own terms.

Nothing here imports botocore: an exception is recognised by the names of its classes, so
one that an older botocore does not have yet needs no care.
"""

from __future__ import annotations

import binascii
import contextlib
import datetime
import json
import re
from base64 import b64decode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kms_hasher.encoding import ARN
from kms_hasher.exceptions import (
    AlreadyExists,
    ConfigurationError,
    DryRunOperation,
    IncorrectKey,
    InvalidCiphertext,
    InvalidRequest,
    KeyDisabled,
    KeyNotFound,
    KeyPendingDeletion,
    KeyUnusable,
    KMSAccessDenied,
    KMSBadResponse,
    KMSConnectionError,
    KMSCredentialsError,
    KMSError,
    KMSHasherError,
    KMSInternalError,
    KMSThrottled,
    KMSTimeout,
    KMSUnavailable,
    LimitExceeded,
    MalformedHash,
)

#: Error codes of KMS, STS and AWS's front end. A code that is not here goes by the status.
CODES: Mapping[str, type[KMSError]] = {
    code: kind
    for kind, codes in {
        KMSThrottled: (
            "ThrottlingException Throttling ThrottledException RequestThrottled "
            "RequestThrottledException RequestLimitExceeded TooManyRequestsException SlowDown"
        ),
        KMSInternalError: (
            "KMSInternalException DependencyTimeoutException KeyUnavailableException "
            "InternalFailure InternalError InternalServerError ServiceUnavailable "
            "ServiceUnavailableException"
        ),
        KMSTimeout: "RequestTimeout RequestTimeoutException",
        KMSAccessDenied: "AccessDeniedException AccessDenied NotAuthorized OptInRequired",
        KMSCredentialsError: (
            "ExpiredToken ExpiredTokenException RequestExpired UnrecognizedClientException "
            "InvalidClientTokenId InvalidAccessKeyId InvalidSignatureException AuthFailure "
            "SignatureDoesNotMatch IncompleteSignature IncompleteSignatureException "
            "MissingAuthenticationToken MissingAuthenticationTokenException"
        ),
        KeyDisabled: "DisabledException",
        KeyUnusable: (
            "KMSInvalidStateException ConflictException CustomKeyStoreInvalidStateException"
        ),
        KeyNotFound: "NotFoundException",
        InvalidCiphertext: "InvalidCiphertextException",
        IncorrectKey: "IncorrectKeyException",
        AlreadyExists: "AlreadyExistsException",
        LimitExceeded: "LimitExceededException",
        DryRunOperation: "DryRunOperationException",
    }.items()
    for code in codes.split()
}

#: Classes of botocore and of Python, by name. The most special class that is here counts.
EXCEPTIONS: Mapping[str, type[KMSError]] = {
    name: kind
    for kind, names in {
        KMSTimeout: "ReadTimeoutError ConnectTimeoutError TimeoutError",
        KMSConnectionError: "ConnectionError HTTPClientError OSError",
        KMSBadResponse: "ResponseParserError IncompleteReadError ChecksumError",
        KMSCredentialsError: (
            "NoCredentialsError PartialCredentialsError CredentialRetrievalError "
            "MetadataRetrievalError NoAuthTokenError TokenRetrievalError SSOError LoginError "
            "UnknownCredentialError RefreshWithMFAUnsupportedError"
        ),
        InvalidRequest: "ParamValidationError ValidationError",
    }.items()
    for name in names.split()
}

#: Classes of botocore that say that AWS's own configuration (files, variables) cannot work.
MISCONFIGURED = {
    "ProfileNotFound",
    "ConfigParseError",
    "ConfigNotFound",
    "InvalidConfigError",
    "InvalidRegionError",
    "NoRegionError",
    "UnknownEndpointError",
    "EndpointVariantError",
    "EndpointProviderError",
    "InvalidEndpointConfigurationError",
    "InvalidRetryConfigurationError",
    "InvalidDefaultsMode",
    "InvalidProxiesConfigError",
}

_CODE = re.compile(r"[A-Za-z][A-Za-z0-9.]{2,99}\Z")
_KEY_ID = re.compile(r"(?:mrk-[0-9a-f]{32}|[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12})\Z")
_MESSAGE_LENGTH = 300
_OK = 200


def translate(
    error: Exception,
    *,
    operation: str,
    key: str = "",
    request_ids: Sequence[str] = (),
) -> KMSHasherError:
    """
    Return our error for whatever came up while `operation` was called.

    It refers to nothing of an error of botocore's, whose frames hold the parameters.
    """
    if isinstance(error, KMSHasherError):
        if isinstance(error, KMSError):
            error.operation, error.key = operation, key
        return error.with_traceback(None)
    lineage = [cls.__name__ for cls in type(error).__mro__]
    code, message = lineage[0], ""
    if not MISCONFIGURED.isdisjoint(lineage):
        return ConfigurationError(f"AWS's configuration cannot work: {_line(error)}")
    if "ClientError" in lineage:
        kind, code, message = _of_credentials(error)
    elif lineage[0] == "RuntimeError" and str(error).startswith("Credentials were refreshed"):
        kind = KMSCredentialsError  # botocore: refreshed, but still expired
    else:
        # Without the text: botocore quotes parameters, and with them the plaintext.
        kind = next((EXCEPTIONS[name] for name in lineage if name in EXCEPTIONS), KMSError)
        if kind is KMSError:
            message = "The call failed inside the client."
    return kind(message, code=code, operation=operation, key=key, request_ids=request_ids)


def read(
    status: int, content: bytes, operation: str, key: str, request_ids: Sequence[str]
) -> Answer:
    """Return what an HTTP answer of KMS says. Raises the `KMSError` that it is instead."""
    data: Any = None
    with contextlib.suppress(ValueError, RecursionError):
        # Some operations answer with nothing when all is well, emulators with null.
        data = json.loads(content or b"{}") or {}
    if status == _OK:
        answer = Answer(data, operation, key, tuple(request_ids))
        if not isinstance(data, dict):
            raise answer.bad("it is no JSON object")
        return answer
    data = data if isinstance(data, dict) else {}
    code = str(data.get("__type") or "").rpartition("#")[2].partition(":")[0]
    kind, code, message = _refused(status, code, data.get("message") or data.get("Message"))
    raise kind(message, code=code, operation=operation, key=key, request_ids=request_ids)


def _refused(status: int, code: str, text: object) -> tuple[type[KMSError], str, str]:
    """Return class, code and message for an answer that says no."""
    message = _line(text or "")
    if not _CODE.match(code):  # not AWS's JSON but, say, a proxy's page: nothing to quote
        code, message = f"HTTP{status}", ""
    kind = CODES.get(code)
    if kind is None:
        named = not code.startswith("HTTP")
        kind = InvalidRequest if named and 400 <= status < 500 else KMSBadResponse
        kind = KMSThrottled if status == 429 else KMSInternalError if status >= 500 else kind
    # KMS has no code of its own for these states: only its text tells them apart.
    if issubclass(kind, KeyUnusable) and "is pending deletion" in message:
        kind = KeyPendingDeletion
    elif kind is KeyUnusable and "is disabled" in message:
        kind = KeyDisabled
    return kind, code, message


def _of_credentials(error: Any) -> tuple[type[KMSError], str, str]:
    """Return the same for a botocore ClientError: of STS, behind the role or token."""
    answer = error.response.get("Error") or {}
    status = (error.response.get("ResponseMetadata") or {}).get("HTTPStatusCode") or 0
    code = str(answer.get("Code") or "")
    kind, code, message = _refused(status, code, answer.get("Message"))
    kind = kind if issubclass(kind, KMSUnavailable) else KMSCredentialsError
    return kind, code, f"{error.operation_name}: {message or code}"


def _line(text: object) -> str:
    return " ".join(str(text).split())[:_MESSAGE_LENGTH]


@dataclass(frozen=True)
class Answer:
    """
    A successful answer of KMS, read with suspicion.

    Every field that is read must be there, of its type and not empty; else `KMSBadResponse`.
    """

    data: Mapping[str, Any] = field(repr=False)
    operation: str
    key: str
    request_ids: tuple[str, ...]

    def blob(self, name: str, size: int | None = None) -> bytes:
        """Return a field of bytes, `size` of them if it is given."""
        try:
            value = b64decode(self._field(name, str), validate=True)
        except (binascii.Error, ValueError):
            raise self.bad(f"{name} is not base64") from None
        if not value or (size is not None and len(value) != size):
            raise self.bad(f"{name} has the wrong length")
        return value

    def text(self, name: str) -> str:
        return str(self._field(name, str))

    def optional_text(self, name: str) -> str:
        return self.text(name) if self.data.get(name) else ""

    def flag(self, name: str) -> bool:
        value = self.data.get(name)
        if not isinstance(value, bool):
            raise self.bad(f"{name} is missing")
        return value

    def number(self, name: str, default: int) -> int:
        value = self.data.get(name, default)
        if not isinstance(value, int):
            raise self.bad(f"{name} is not a number")
        return value

    def items(self, name: str) -> list[Answer]:
        """Return a field's structures; there may be none, but the field must be there."""
        values = self.data.get(name)
        if not isinstance(values, list):
            raise self.bad(f"{name} is missing")
        return [Answer(value, self.operation, self.key, self.request_ids) for value in values]

    def time(self, name: str) -> datetime.datetime | None:
        """Return a date in UTC, or None where there is none."""
        if name not in self.data:
            return None
        seconds = self.data[name]
        if not isinstance(seconds, int | float) or isinstance(seconds, bool):
            raise self.bad(f"{name} is not a time")
        try:
            return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)
        except (OverflowError, OSError, ValueError):
            raise self.bad(f"{name} is not a time") from None

    def inner(self, name: str) -> Answer:
        """Return the structure in a field, to be read in the same way."""
        value = self._field(name, dict)
        return Answer(value, self.operation, self.key, self.request_ids)

    def arn(self, name: str = "KeyId", *, asked: str) -> str:
        """
        Return the ARN of the key that was used, which must be the one `asked` for.

        Some operations, and some emulators, answer with the bare key id; then `asked` is
        returned if it is an ARN, else the id.
        """
        value = self.text(name)
        bare = bool(_KEY_ID.match(value))
        home, _, wanted = asked.rpartition(":")
        try:
            resource = f"key/{value}" if bare else ARN.parse(value).resource
        except MalformedHash:
            raise self.bad(f"{name} is not a key's ARN") from None
        if wanted.startswith("alias/") or not wanted:
            right = resource.startswith("key/")
        else:
            right = resource == f"key/{wanted.removeprefix('key/')}"
        if home and not bare:  # an alias, too, only ever stands for a key of its own account
            right = right and value.startswith(f"{home}:")
        if not right:
            raise self.bad(f"{name} names another key than the one asked for")
        return asked if bare and wanted.startswith("key/") else value

    def _field(self, name: str, kind: type) -> Any:
        value = self.data.get(name)
        if not isinstance(value, kind) or value in ("", {}):
            raise self.bad(f"{name} is missing or empty")
        return value

    def bad(self, reason: str) -> KMSBadResponse:
        return KMSBadResponse(
            f"{KMSBadResponse.default_message[:-1]}: {reason}.",
            operation=self.operation,
            key=self.key,
            request_ids=self.request_ids,
        )
