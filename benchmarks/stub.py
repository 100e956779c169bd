"""
What the benchmarks stand on: a KMS of constant latency, and a project that uses it.

`running()` starts the stub in a process of its own, so that its CPU time is not counted as
ours, though it takes some of a core. It answers Encrypt, Decrypt and ReEncrypt as KMS does,
from a dictionary and without any cryptography, over kept-alive HTTP/1.1 on 127.0.0.1.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import secrets
import subprocess
import sys
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REGION, ACCOUNT = "eu-central-1", "111122223333"
ARN = f"arn:aws:kms:{REGION}:{ACCOUNT}:key/11111111-2222-4333-8444-555555555555"
STOCK = "django.contrib.auth.hashers.Argon2PasswordHasher"
OURS = "kms_hasher.hashers.KMSArgon2PasswordHasher"


def project(*, app: bool = True, audit: str = "off") -> dict[str, Any]:
    """Return the settings of a small project, with or without kms_hasher."""
    contrib = ("admin", "auth", "contenttypes", "messages", "sessions", "staticfiles")
    middleware = (
        "django.contrib.sessions.middleware.SessionMiddleware",
        "django.contrib.auth.middleware.AuthenticationMiddleware",
        "django.contrib.messages.middleware.MessageMiddleware",
    )
    processors = ("template.context_processors.request", "contrib.auth.context_processors.auth")
    processors = (*processors, "contrib.messages.context_processors.messages")
    database: Any = {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}
    if "DATABASE_URL" in os.environ:
        import environ

        # Not the name that the test-suite uses: it may be running.
        database = environ.Env().db("DATABASE_URL") | {"TEST": {"NAME": "kms_benchmarks"}}
    backend = "kms_hasher.backends.KMSModelBackend"
    return {
        "SECRET_KEY": "benchmarks",
        "USE_TZ": True,
        "ROOT_URLCONF": "tests.urls",
        "ALLOWED_HOSTS": ["testserver"],
        "STATIC_URL": "static/",
        "DATABASES": {"default": database},
        "DEFAULT_AUTO_FIELD": "django.db.models.BigAutoField",
        "INSTALLED_APPS": ["kms_hasher"] * app + [f"django.contrib.{name}" for name in contrib],
        "MIDDLEWARE": list(middleware),
        "TEMPLATES": [
            {
                "BACKEND": "django.template.backends.django.DjangoTemplates",
                "APP_DIRS": True,
                "OPTIONS": {"context_processors": [f"django.{name}" for name in processors]},
            }
        ],
        "AUTHENTICATION_BACKENDS": [
            backend if app else "django.contrib.auth.backends.ModelBackend"
        ],
        "PASSWORD_HASHERS": [OURS, STOCK] if app else [STOCK],
        "KMS_HASHER": {"KEY": ARN, "AUDIT": audit},
    }


def environment() -> str:
    """Return one line that says what the figures were measured on."""
    import django

    pages = "?"
    with contextlib.suppress(OSError):
        setting = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
        pages = setting.partition("[")[2].partition("]")[0]
    load = ", ".join(f"{number:.1f}" for number in os.getloadavg())
    return (
        f"Python {platform.python_version()}, Django {django.__version__}, "
        f"{os.cpu_count()} CPUs, transparent huge pages: {pages}, load {load}"
    )


class Stub:
    """The running stub, for the process that started it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        assert process.stdout
        self.url = f"http://127.0.0.1:{int(process.stdout.readline())}"

    def delay(self, milliseconds: float) -> None:
        """Let every answer from now on take so long."""
        self._say(f"delay {milliseconds}")

    def quota(self, calls: float) -> None:
        """Throttle what is beyond so many calls a second from now on, 0 for no quota."""
        self._say(f"quota {calls}")

    def counts(self) -> tuple[int, int]:
        """Return how many calls were answered and how many throttled so far."""
        answered, throttled = self._say("counts").split()
        return int(answered), int(throttled)

    def _say(self, line: str) -> str:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        return self._process.stdout.readline()


@contextlib.contextmanager
def running(milliseconds: float = 0) -> Iterator[Stub]:
    """Start the stub, and let boto3 in this process and its children find it."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-m", __name__]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        stub = Stub(process)
        stub.delay(milliseconds)
        os.environ |= {
            "AWS_ENDPOINT_URL_KMS": stub.url,
            "AWS_ACCESS_KEY_ID": "stub",
            "AWS_SECRET_ACCESS_KEY": "stub",
            "AWS_DEFAULT_REGION": REGION,
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }
        try:
            yield stub
        finally:
            process.terminate()


# --- the process of the stub ----------------------------------------------------------


def serve() -> None:
    """Answer until stdin ends; a line on it is a new delay in ms, a quota or "counts"."""
    import asyncio

    delay = quota = tokens = last = 0.0
    answered = throttled = 0
    too_many = b'{"__type":"ThrottlingException","message":"Rate exceeded"}'
    refusal = b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/x-amz-json-1.1\r\n"
    refusal += b"Content-Length: %d\r\n\r\n%s" % (len(too_many), too_many)

    def is_over_quota() -> bool:
        """Take a token from a bucket that holds a second's worth, as AWS's do."""
        nonlocal tokens, last
        now = loop.time()
        tokens, last = min(tokens + (now - last) * quota, quota), now
        if tokens < 1:
            return True
        tokens -= 1
        return False

    plaintexts: dict[str, str] = {}

    def answer(head: bytes, body: bytes) -> bytes:
        nonlocal answered, throttled
        if quota and is_over_quota():
            throttled += 1
            return refusal
        answered += 1
        params = json.loads(body)
        fields = {"KeyId": ARN, "EncryptionAlgorithm": "SYMMETRIC_DEFAULT"}
        if b"TrentService.ReEncrypt" in head:  # nothing is opened afterwards
            fields = {"KeyId": params["DestinationKeyId"], "SourceKeyId": params["SourceKeyId"]}
            fields["CiphertextBlob"] = b64encode(secrets.token_bytes(184)).decode()
        elif b"TrentService.Encrypt" in head:
            # As long as KMS's own: 152 bytes more than the plaintext.
            blob = b64encode(secrets.token_bytes(184)).decode()
            plaintexts[blob] = params["Plaintext"]
            fields["CiphertextBlob"] = blob
        else:
            fields["Plaintext"] = plaintexts[params["CiphertextBlob"]]
        content = json.dumps(fields)
        request_id = "00000000-0000-4000-8000-000000000000"
        return (
            "HTTP/1.1 200 OK\r\nContent-Type: application/x-amz-json-1.1\r\n"
            f"x-amzn-RequestId: {request_id}\r\nContent-Length: {len(content)}\r\n\r\n{content}"
        ).encode()

    class Connection(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            self.transport, self.received = transport, b""  # asyncio sets TCP_NODELAY

        def data_received(self, data: bytes) -> None:
            self.received += data
            head, separator, body = self.received.partition(b"\r\n\r\n")
            length = head.lower().partition(b"content-length:")[2].partition(b"\r")[0]
            if separator and len(body) >= int(length):
                self.received = b""
                loop.call_later(delay, self.transport.write, answer(head, body))

    async def main() -> None:
        nonlocal delay, quota, loop
        loop = asyncio.get_running_loop()
        server = await loop.create_server(Connection, "127.0.0.1", 0)
        print(server.sockets[0].getsockname()[1], flush=True)
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            word, _, number = line.partition(" ")
            if word == "delay":
                delay = float(number) / 1000
            elif word == "quota":
                quota = float(number)
            print(answered, throttled, flush=True)

    loop: asyncio.AbstractEventLoop
    asyncio.run(main())


if __name__ == "__main__":
    serve()
