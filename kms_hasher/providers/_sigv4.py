"""
AWS Signature Version 4, for the one shape of request that KMS is sent: a POST of JSON.

botocore's signer takes any request, and for each one parses the URL, sorts the headers and
derives the signing key again: that was most of the CPU time of a call.
See https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_sigv-create-signed-request.html.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import time
from typing import Protocol
from urllib.parse import urlsplit

TYPE = "application/x-amz-json-1.1"

_PLAIN = re.compile(r"(?:/[A-Za-z0-9_~-]+)*/?\Z")
_DEFAULT_PORTS = {"http": 80, "https": 443}


class Credentials(Protocol):
    """botocore's frozen credentials: they are compared, by value, from call to call."""

    @property
    def access_key(self) -> str: ...
    @property
    def secret_key(self) -> str: ...
    @property
    def token(self) -> str | None: ...


def host_of(url: str) -> str:
    """Return the Host header of requests to `url`: without user and default port."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    host = f"[{host}]" if ":" in host else host
    usual = parts.port in (None, _DEFAULT_PORTS.get(parts.scheme))
    return host if usual else f"{host}:{parts.port}"


def is_plain(url: str) -> bool:
    """Return whether the path of `url` is its own canonical form, and there is no query."""
    parts = urlsplit(url)
    return bool(_PLAIN.match(parts.path)) and not parts.query


class Signer:
    """Signs requests to one URL, which `is_plain`. Threads share it."""

    def __init__(self, url: str, region: str, service: str = "kms") -> None:
        self._path, self._host = urlsplit(url).path or "/", host_of(url)
        self._region, self._service = region, service
        #: The last credentials and date, and the key derived of them.
        self._derived: tuple[Credentials | None, str, bytes] = (None, "", b"")

    def headers(
        self, credentials: Credentials, target: str, body: bytes, timestamp: str = ""
    ) -> dict[str, str]:
        """
        Return the headers that are signed but for Host, and the signature.

        `target` is the operation, as X-Amz-Target; `timestamp` is now in UTC, unless it is
        given, as `20130524T000000Z`.
        """
        timestamp = timestamp or time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        date, token = timestamp[:8], credentials.token
        names = "content-type;host;x-amz-date;x-amz-target"
        of_token = ""
        headers = {"Content-Type": TYPE, "X-Amz-Target": target, "X-Amz-Date": timestamp}
        if token:
            names = "content-type;host;x-amz-date;x-amz-security-token;x-amz-target"
            of_token = f"x-amz-security-token:{' '.join(token.split())}\n"
            headers["X-Amz-Security-Token"] = token
        canonical = (
            f"POST\n{self._path}\n\ncontent-type:{TYPE}\nhost:{self._host}\n"
            f"x-amz-date:{timestamp}\n{of_token}x-amz-target:{target}\n\n{names}\n"
            f"{hashlib.sha256(body).hexdigest()}"
        )
        scope = f"{date}/{self._region}/{self._service}/aws4_request"
        hashed = hashlib.sha256(canonical.encode()).hexdigest()
        text = f"AWS4-HMAC-SHA256\n{timestamp}\n{scope}\n{hashed}"
        signature = _hmac(self._key(credentials, date), text).hex()
        headers["Authorization"] = (
            f"AWS4-HMAC-SHA256 Credential={credentials.access_key}/{scope}, "
            f"SignedHeaders={names}, Signature={signature}"
        )
        return headers

    def _key(self, credentials: Credentials, date: str) -> bytes:
        known, its_date, key = self._derived
        if known != credentials or its_date != date:
            key = f"AWS4{credentials.secret_key}".encode()
            for part in (date, self._region, self._service, "aws4_request"):
                key = _hmac(key, part)
            self._derived = credentials, date, key
        return key


def _hmac(key: bytes, text: str) -> bytes:
    return hmac.digest(key, text.encode(), "sha256")
