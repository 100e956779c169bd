"""
A double of KMS on HTTP: KMS's protocol and rules in front, faults at will.

    with KMSDouble() as kms:
        key = kms.engine.create_key()
        AWSProvider(...)                       # with AWS_ENDPOINT_URL_KMS=kms.url
        kms.fail("Decrypt", "ThrottlingException", times=1)
        assert [request.operation for request in kms.requests] == [...]

The rules are `InMemoryProvider`'s. On the wire it is JSON 1.1 with an `x-amzn-requestid`, and
connections are kept alive without delay, as KMS's are; signatures are read, not verified.
There is one engine for each Region that a request is signed for. `AssumeRole` of STS is
answered too, so `AWS_ENDPOINT_URL_STS` may point here.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import re
import socket
import struct
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl

from kms_hasher.exceptions import KMSError
from kms_hasher.testing import InMemoryProvider
from tests.kms_wire import METHODS, dump, message, perform

REGION = "eu-central-1"
ACCOUNT = "111122223333"
OTHER_KEY = f"arn:aws:kms:{REGION}:{ACCOUNT}:key/ffffffff-0000-4000-8000-000000000000"

#: Errors KMS may answer with, and their HTTP status; 400 for all others.
STATUS = {
    "KMSInternalException": 500,
    "DependencyTimeoutException": 503,
    "KeyUnavailableException": 500,
    "InternalFailure": 500,
    "ServiceUnavailable": 503,
    "AccessDenied": 403,  # STS
}

#: Faults of HTTP and below: no answer, or one that is not KMS's.
PAGES = {"http_500": 500, "http_503": 503, "http_429": 429, "http_403": 403, "http_302": 302}
BROKEN = ("refused", "reset", "hang", "slow")


def _blobs(change: Callable[[bytes], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda answer: {
        name: change(value) if isinstance(value, bytes) else value
        for name, value in answer.items()
    }


def _keys(change: str | None) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def spoil(answer: dict[str, Any]) -> dict[str, Any]:
        if "KeyMetadata" in answer:
            return {"KeyMetadata": {**answer["KeyMetadata"], "Arn": change}}
        return {**answer, "KeyId": change}

    return spoil


#: Faults that spoil an answer that stays a "200 OK": what they make of its fields.
SPOILT: dict[str, Callable[[dict[str, Any]], Any]] = {
    "empty": lambda answer: b"",
    "no_fields": lambda answer: {},
    "truncated": lambda answer: dump(answer)[: len(dump(answer)) // 2],
    "html": lambda answer: b"<html><body>It works!</body></html>",
    "not_utf8": lambda answer: b"\xff\xfe{}",
    "not_an_object": lambda answer: [],
    "only_key": lambda answer: (
        {"KeyMetadata": {"Arn": answer["KeyMetadata"]["Arn"]}}
        if "KeyMetadata" in answer
        else {"KeyId": answer["KeyId"]}
    ),
    "no_key": _keys(None),
    "wrong_key": _keys(OTHER_KEY),
    "malformed_key": _keys("not a key"),
    "null_blobs": _blobs(lambda value: None),
    "empty_blobs": _blobs(lambda value: b""),
    "number_blobs": _blobs(lambda value: 5),
    "not_base64": _blobs(lambda value: "a"),
    "short": _blobs(lambda value: value[:-1]),
    "long": _blobs(lambda value: value + b"x"),
}


@dataclass(frozen=True)
class Request:
    """One request as it came in, whatever was answered."""

    operation: str
    params: dict[str, Any] = field(repr=False)
    request_id: str
    region: str
    access_key: str
    user_agent: str
    #: The client's port: one for each connection.
    port: int


class KMSDouble:
    """One KMS for all Regions of one account, on a port of 127.0.0.1."""

    def __init__(self) -> None:
        self.reset()
        self.stopping = threading.Event()
        self._server = _Server(self)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def reset(self) -> None:
        """Begin anew on the same port, without keys, requests and faults."""
        self.requests: list[Request] = []
        #: Seconds before each answer, and more of them for the fault "slow".
        self.latency, self.slow = 0.0, 0.1
        #: For how many cryptographic calls by alias an UpdateAlias stays unseen.
        self.alias_lag = 0
        #: Seconds that what AssumeRole hands out is valid for.
        self.role_lifetime = 3600
        self._stale: dict[str, tuple[str, int]] = {}
        self._faults: list[list[Any]] = []
        self._engines: dict[str, InMemoryProvider] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> KMSDouble:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Close the port and every connection: from now on connections are refused."""
        if not self.stopping.is_set():
            self.stopping.set()
            self._server.shutdown()
            self._server.server_close()
            self._server.hang_up()

    @property
    def engine(self) -> InMemoryProvider:
        """The keys of the home Region, for tests to look at and to change."""
        return self.engine_in(REGION)

    def engine_in(self, region: str) -> InMemoryProvider:
        with self._lock:
            if region not in self._engines:
                self._engines[region] = InMemoryProvider(region=region, account=ACCOUNT)
            return self._engines[region]

    def fail(self, operation: str, fault: str, times: int | None = None) -> None:
        """
        Answer the next `times` calls (None: all) of an operation ("*": any) with a fault.

        `fault` is one of `BROKEN`, `PAGES` or `SPOILT`, or an error code of AWS with,
        if wanted, a message: "DisabledException: ... is disabled".
        """
        if fault == "refused":
            self.stop()
        self._faults.append([operation, fault, times])

    def heal(self) -> None:
        self._faults.clear()

    def fault_for(self, operation: str) -> str:
        with self._lock:
            for entry in self._faults:
                if entry[0] in ("*", operation) and entry[2] != 0:
                    entry[2] = entry[2] and entry[2] - 1
                    return str(entry[1])
        return ""

    def perform(self, request: Request) -> dict[str, Any] | bytes:
        """Return the fields of the answer. Raises `KMSError`."""
        engine = self.engine_in(request.region)
        params = dict(request.params)
        if request.operation == "UpdateAlias" and self.alias_lag:
            alias, former = params["AliasName"], engine.describe_key(params["AliasName"])
            answer = perform(engine, request.operation, params)
            self._stale[alias] = (former.key_arn, self.alias_lag)
            return answer
        if request.operation != "DescribeKey":
            for name in {"KeyId", "DestinationKeyId"} & params.keys():
                params[name] = self._aged(params[name])
        return perform(engine, request.operation, params)

    def _aged(self, key: str) -> str:
        """Return what an alias stood for until its update is seen, or the key as it is."""
        alias = key.rpartition(":")[2]
        with self._lock:
            old, left = self._stale.get(alias, ("", 0))
            if left:
                self._stale[alias] = (old, left - 1)
        return old if left else key


# --- the wire -------------------------------------------------------------------------


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, double: KMSDouble) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.double = double
        self.connections: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # a client that has gone is no news
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def do_POST(self) -> None:
        double, self.request_id = self.server.double, str(uuid.uuid4())
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        request = self._read(body)
        double.requests.append(request)
        if double.latency:
            time.sleep(double.latency)
        fault = double.fault_for(request.operation)
        if fault == "hang":
            double.stopping.wait()
            self.close_connection = True
        elif fault == "reset":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{")
            self.connection.setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
            )
            self.connection.close()
            self.close_connection = True
        elif fault in PAGES:
            self._send(PAGES[fault], b"<html><body>An error.</body></html>")
        elif fault and fault not in SPOILT and fault not in BROKEN:
            code, _, message = fault.partition(": ")
            self._refuse(request, code, message)
        else:
            if fault == "slow":
                time.sleep(double.slow)
            self._answer(request, SPOILT.get(fault))

    def _read(self, body: bytes) -> Request:
        target = self.headers.get("X-Amz-Target", "")
        if target.startswith("TrentService."):
            operation, params = target.partition(".")[2], json.loads(body)
        else:
            params = dict(parse_qsl(body.decode("ascii")))
            operation = params.pop("Action", "")
        signed = re.search(
            r"Credential=([^/]+)/[0-9]+/([^/]+)/", self.headers.get("Authorization", "")
        )
        return Request(
            operation,
            params,
            self.request_id,
            region=signed[2] if signed else "",
            access_key=signed[1] if signed else "",
            user_agent=self.headers.get("User-Agent", ""),
            port=self.client_address[1],
        )

    def _answer(self, request: Request, spoil: Callable[[Any], Any] | None) -> None:
        if request.operation == "AssumeRole":
            self._send(200, _role(request.params, self.server.double.role_lifetime))
        elif not request.access_key:
            self._refuse(request, "MissingAuthenticationTokenException")
        elif request.operation not in METHODS:
            self._refuse(request, "UnknownOperationException")
        else:
            try:
                answer = self.server.double.perform(request)
            except KMSError as error:
                self._refuse(request, error.code, message(error))
            else:
                self._send(200, dump(spoil(answer) if spoil else answer))

    def _refuse(self, request: Request, code: str, message: str = "") -> None:
        body = dump({"__type": code, "message": message})
        if request.operation == "AssumeRole":
            text = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
            body = f"<ErrorResponse>{text}</ErrorResponse>".encode()
        self._send(STATUS.get(code, 400), body)

    def _send(self, status: int, body: bytes) -> None:
        # In one write: in two, a client without TCP_NODELAY waits 40 ms.
        head = (
            f"HTTP/1.1 {status} {'OK' if status == 200 else 'No'}\r\n"
            f"x-amzn-RequestId: {self.request_id}\r\n"
            "Content-Type: application/x-amz-json-1.1\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        self.wfile.write(head.encode("ascii") + body)


def _role(params: dict[str, Any], lifetime: int) -> bytes:
    """Return STS's answer to AssumeRole: the access key is named after the session."""
    now = datetime.datetime.now(datetime.timezone.utc)
    expiry = now + datetime.timedelta(seconds=lifetime)
    return f"""
        <AssumeRoleResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/">
        <AssumeRoleResult><Credentials>
        <AccessKeyId>ASIA-{params["RoleSessionName"]}</AccessKeyId>
        <SecretAccessKey>secret</SecretAccessKey><SessionToken>token</SessionToken>
        <Expiration>{expiry:%Y-%m-%dT%H:%M:%SZ}</Expiration>
        </Credentials></AssumeRoleResult></AssumeRoleResponse>""".encode()
