"""
Calls to KMS in AWS's JSON protocol, by botocore's HTTP session or on an event loop.

A client of boto3 validates, resolves and parses by AWS's whole model of KMS: that is half of
the CPU time of a login's call. Endpoint, credentials, proxies and certificates are the ones
a client would use, and handlers of its "before-send" event, such as moto's, are asked.
See https://smithy.io/2.0/aws/protocols/aws-json-1_1-protocol.html.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import random
import socket
import threading
import time
from base64 import b64encode
from collections.abc import Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from botocore.auth import AUTH_TYPE_MAPS, SigV4Auth
from botocore.awsrequest import AWSPreparedRequest, AWSRequest, HeadersDict
from botocore.httpsession import URLLib3Session
from botocore.utils import get_environ_proxies

from kms_hasher.exceptions import (
    KMSConnectionError,
    KMSHasherError,
    KMSInternalError,
    KMSThrottled,
    KMSTimeout,
)
from kms_hasher.providers import _sigv4
from kms_hasher.providers.aws_async import Connections
from kms_hasher.providers.aws_errors import Answer, read, translate

if TYPE_CHECKING:
    from botocore.client import BaseClient
    from botocore.credentials import Credentials
    from botocore.session import Session

#: What another attempt may help against.
TRANSIENT = (KMSConnectionError, KMSInternalError, KMSThrottled, KMSTimeout)

#: Longest wait before another attempt, in seconds.
PAUSE, PAUSE_THROTTLED = 0.05, 1.0

#: How many attempts may fail before calls have one attempt only, and what part of one each
#: call that KMS answers gives back: an outage must not double the load.
RETRIES, REFUND = 100.0, 0.2

_signing: ContextVar[bool] = ContextVar("kms_hasher_aws_signing", default=False)


def _not_ours(_: logging.LogRecord) -> bool:
    return not _signing.get()


# At level DEBUG it writes each request's SHA-256: whoever can compute an Encrypt's but for
# the digest could try passwords against that, without a call to KMS.
logging.getLogger("botocore.auth").addFilter(_not_ours)


class Request(AWSPreparedRequest):
    """
    A signed request.

    botocore's own mapping of the headers is slow, and made for whoever asks for `headers`:
    botocore's session and handlers of its event, which may change them there.
    """

    def __init__(self, url: str, fields: dict[str, str], body: bytes) -> None:
        self._fields: Mapping[str, str] = fields
        self.body: bytes
        self.method, self.url, self.body, self.stream_output = "POST", url, body, False
        self.context: Mapping[str, Any] = {}

    @property
    def fields(self) -> Mapping[str, str]:
        """The headers."""
        return self._fields

    @property
    def headers(self) -> Any:
        if not isinstance(self._fields, HeadersDict):
            self._fields = HeadersDict(self._fields)
        return self._fields

    @headers.setter
    def headers(self, headers: Any) -> None:
        self._fields = HeadersDict(headers)


class _Botocore:
    """botocore's signer of a kind, for what `_sigv4` does not do."""

    def __init__(self, kind: Any, url: str, region: str, service: str) -> None:
        self._kind, self._url, self._region, self._service = kind, url, region, service

    def headers(self, credentials: Any, target: str, body: bytes) -> dict[str, str]:
        headers = {"Content-Type": _sigv4.TYPE, "X-Amz-Target": target}
        request = AWSRequest(method="POST", url=self._url, data=body, headers=headers)
        token = _signing.set(True)
        try:
            self._kind(credentials, self._service, self._region).add_auth(request)
        finally:
            _signing.reset(token)
        return dict(request.headers.items())


def _signer(client: BaseClient, url: str) -> _sigv4.Signer | _Botocore:
    """Return what signs requests for the service of `client` to `url`."""
    config: Any = client.meta.config  # botocore's stubs do not know all of it
    version, region = config.signature_version, client.meta.region_name
    service = client.meta.service_model.signing_name
    if version == "v4" and _sigv4.is_plain(url):
        return _sigv4.Signer(url, region, service)
    return _Botocore(AUTH_TYPE_MAPS.get(version, SigV4Auth), url, region, service)


class Endpoint:
    """
    KMS in one Region, for one process. Threads share it.

    `client` tells the endpoint and the Region, and is not called.
    """

    def __init__(
        self,
        session: Session,
        credentials: Credentials,
        client: BaseClient,
        *,
        user_agent: str,
        timeouts: tuple[float, float],
        attempts: int,
        max_pool_connections: int,
    ) -> None:
        self.region: str = client.meta.region_name
        self.url = client.meta.endpoint_url.rstrip("/") + "/"
        self.timeouts, self.attempts = timeouts, attempts
        self.verify = session.get_config_variable("ca_bundle") or True
        self.proxies = get_environ_proxies(self.url)
        self._events = client.meta.events
        self._credentials = credentials
        self._user_agent = user_agent
        self._signer = _signer(client, self.url)
        session_class: Any = URLLib3Session  # botocore's stubs are wrong about it
        self._http = session_class(
            verify=self.verify,
            proxies=self.proxies,
            timeout=timeouts,
            max_pool_connections=max_pool_connections,
            socket_options=[
                (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
                (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
            ],
        )
        self._of_loops: WeakKeyDictionary[asyncio.AbstractEventLoop, Connections]
        self._of_loops = WeakKeyDictionary()
        self._retries, self._lock = RETRIES, threading.Lock()

    def close(self) -> None:
        self._http.close()

    def sign(self, operation: str, params: Mapping[str, Any]) -> Request:
        """Return a request ready to be sent, within minutes. May fetch credentials."""
        encoded = {
            name: b64encode(value).decode() if isinstance(value, bytes) else value
            for name, value in params.items()
        }
        body, target = json.dumps(encoded).encode(), f"TrentService.{operation}"
        frozen: Any = self._credentials.get_frozen_credentials()
        headers = self._signer.headers(frozen, target, body)
        headers |= {"User-Agent": self._user_agent, "Content-Length": str(len(body))}
        return Request(self.url, headers, body)

    def answer_of(self, request: Request, operation: str) -> Any:
        """Return the answer that a handler of botocore's event gives, None if none does."""
        answers = self._events.emit(f"before-send.kms.{operation}", request=request)
        return next((answer for _, answer in answers if answer is not None), None)

    def call(self, operation: str, key: str, params: Mapping[str, Any]) -> Answer:
        """Return KMS's answer. Raises `KMSError`, and what fetching credentials raises."""
        request = self.sign(operation, params)
        request_ids: list[str] = []
        for attempt in itertools.count(1):
            failure = None
            try:
                response = self.answer_of(request, operation) or self._http.send(request)
                answer = self._read(response, operation, key, request_ids)
            except Exception as error:  # noqa: BLE001  # whatever botocore comes upon
                failure = translate(
                    error, operation=operation, key=key, request_ids=request_ids
                )
            pause = self.pause(attempt, failure)
            if pause is None:
                break
            time.sleep(pause)
        if failure:  # out here, so that botocore's error is not its context
            raise failure
        return answer

    async def acall(self, operation: str, key: str, params: Mapping[str, Any]) -> Answer:
        """Do the same on an event loop; through a proxy, in a thread."""
        if self.proxies:
            return await asyncio.to_thread(self.call, operation, key, params)
        request = self.sign(operation, params)
        connections = self._connections()
        request_ids: list[str] = []
        for attempt in itertools.count(1):
            failure = None
            try:
                response = self.answer_of(request, operation)
                response = response or await connections.send(request.fields, request.body)
                answer = self._read(response, operation, key, request_ids)
            except Exception as error:  # noqa: BLE001
                failure = translate(
                    error, operation=operation, key=key, request_ids=request_ids
                )
            pause = self.pause(attempt, failure)
            if pause is None:
                break
            await asyncio.sleep(pause)
        if failure:
            raise failure
        return answer

    def _connections(self) -> Connections:
        loop = asyncio.get_running_loop()
        if loop not in self._of_loops:
            self._of_loops[loop] = Connections(self.url, self.verify, self.timeouts)
        return self._of_loops[loop]

    def close_loop(self) -> None:
        """Drop the connections of the running event loop."""
        if connections := self._of_loops.pop(asyncio.get_running_loop(), None):
            connections.close()

    def _read(self, response: Any, operation: str, key: str, request_ids: list[str]) -> Answer:
        if request_id := response.headers.get("x-amzn-requestid"):
            request_ids.append(request_id)
        return read(response.status_code, response.content, operation, key, request_ids)

    def pause(self, attempt: int, failure: KMSHasherError | None) -> float | None:
        """
        Return how long to wait before the next attempt in seconds; None for no other.

        To be called after each attempt, the first being 1, with what went wrong.
        """
        again = isinstance(failure, TRANSIENT) and attempt < self.attempts
        with self._lock:
            if not isinstance(failure, TRANSIENT):
                self._retries = min(self._retries + REFUND, RETRIES)
            if not again or self._retries < 1:
                return None
            self._retries -= 1
        throttled = isinstance(failure, KMSThrottled)
        return random.uniform(0, PAUSE_THROTTLED if throttled else PAUSE)  # noqa: S311
