"""
Kept-alive HTTP/1.1 connections for one event loop: hundreds of calls at once, one thread.

A thread for each call costs more CPU time in switches than the call itself. What is here is
as much of RFC 9112 as answers of KMS and of what may stand in front of it need.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from botocore.httpsession import get_cert_path

from kms_hasher.exceptions import KMSBadResponse
from kms_hasher.providers._sigv4 import host_of

#: Longest answer that is read, in bytes. KMS's are below 20 KiB.
MAX_ANSWER = 1 << 20


class Response(NamedTuple):
    """`headers` has lower-case names."""

    status_code: int
    headers: dict[str, str]
    content: bytes


class Connections:
    """The connections to one address; each carries one call at a time."""

    def __init__(self, url: str, verify: bool | str, timeouts: tuple[float, float]) -> None:
        parts = urlsplit(url)
        self._host = parts.hostname or ""
        self._head = f"POST {parts.path or '/'} HTTP/1.1\r\nHost: {host_of(url)}\r\n"
        tls = parts.scheme == "https"
        self._port = parts.port or (443 if tls else 80)
        self._ssl = _tls(verify) if tls else None
        self._connect_timeout, self._read_timeout = timeouts
        self._idle: list[_Connection] = []

    async def send(self, headers: Mapping[str, str | bytes], body: bytes) -> Response:
        """
        Return the answer to a POST.

        Raises `OSError`, `asyncio.TimeoutError` or `KMSBadResponse`.

        A connection on which anything but a whole answer came is never used again: what
        comes late would be taken for the next call's answer.
        """
        connection = await self._connection()
        try:
            response = await connection.exchange(
                self._bytes_of(headers, body), self._read_timeout
            )
        except BaseException:
            connection.abort()
            raise
        if connection.is_open:
            self._idle.append(connection)
        return response

    def close(self) -> None:
        for connection in self._idle:
            connection.abort()
        self._idle.clear()

    async def _connection(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                return connection
        loop = asyncio.get_running_loop()
        made = loop.create_connection(_Connection, self._host, self._port, ssl=self._ssl)
        _, connection = await asyncio.wait_for(made, self._connect_timeout)
        return connection

    def _bytes_of(self, headers: Mapping[str, str | bytes], body: bytes) -> bytes:
        lines = [f"{name}: {_text(value)}\r\n" for name, value in headers.items()]
        return f"{self._head}{''.join(lines)}\r\n".encode("latin-1") + body


def _tls(verify: Any) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=get_cert_path(verify))


def _text(value: str | bytes) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else value


class _Connection(asyncio.BufferedProtocol):
    def __init__(self) -> None:
        # Without one of our own, asyncio allocates 256 KiB to receive an answer.
        self._buffer = memoryview(bytearray(1 << 14))
        self._transport: Any = None
        self._waiting: asyncio.Future[Response] | None = None
        self._received = b""

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def abort(self) -> None:
        if self._transport:
            self._transport.abort()

    async def exchange(self, request: bytes, timeout: float) -> Response:
        loop = asyncio.get_running_loop()
        self._waiting, self._received = loop.create_future(), b""
        timer = loop.call_later(timeout, self._fail, asyncio.TimeoutError())
        try:
            self._transport.write(request)
            return await self._waiting
        finally:
            timer.cancel()
            self._waiting = None

    # --- what the event loop calls -----------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        if self._waiting is None:
            self.abort()  # nobody has asked
            return
        self._received += self._buffer[:nbytes]
        self._look(ended=False)

    def eof_received(self) -> None:
        self._look(ended=True)

    def connection_lost(self, error: Exception | None) -> None:
        self._fail(error or ConnectionResetError())

    def _look(self, *, ended: bool) -> None:
        """Hand the answer over if it has come whole."""
        if len(self._received) > MAX_ANSWER:
            self._fail(KMSBadResponse("the answer is too long"))
            return
        try:
            response = parse(self._received, ended=ended)
        except (ValueError, IndexError):
            self._fail(KMSBadResponse("the answer is not HTTP"))
            return
        if response and self._waiting and not self._waiting.done():
            if ended or response.headers.get("connection", "").lower() == "close":
                self.abort()
            self._waiting.set_result(response)

    def _fail(self, error: Exception) -> None:
        if self._waiting and not self._waiting.done():
            self._waiting.set_exception(error)


def parse(received: bytes, *, ended: bool) -> Response | None:
    """
    Return the response, None while it is not whole. Raises `ValueError` or `IndexError`.

    RFC 9112, sections 4 to 7; `ended` says that the server has sent its last byte.
    """
    head, separator, body = received.partition(b"\r\n\r\n")
    if not separator:
        return None
    first, *lines = head.decode("latin-1").split("\r\n")
    status = int(first.split(" ", 2)[1])
    fields = (line.partition(":") for line in lines)
    headers = {name.strip().lower(): value.strip() for name, _, value in fields}
    if "chunked" in headers.get("transfer-encoding", "").lower():
        content = _chunks(body)
    elif "content-length" in headers:
        length = int(headers["content-length"])
        content = body if len(body) == length else None
        if len(body) > length:
            raise ValueError("more than was announced")
    else:
        content = body if ended else None
    return None if content is None else Response(status, headers, content)


def _chunks(body: bytes) -> bytes | None:
    content = b""
    while True:
        size, separator, rest = body.partition(b"\r\n")
        if not separator:
            return None
        length = int(size.partition(b";")[0], 16)
        if len(rest) < length + 2:
            return None
        if not length:
            return content
        content, body = content + rest[:length], rest[length + 2 :]
