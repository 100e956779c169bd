"""AWSProvider over moto, over our double of KMS, and against every fault we know."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import datetime
import ipaddress
import logging
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import botocore.exceptions
import botocore.handlers
import botocore.parsers
import moto
import pytest
from botocore.auth import AUTH_TYPE_MAPS, SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from django.test import override_settings
from django.views.debug import ExceptionReporter

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
)
from kms_hasher.providers.aws import AWSProvider
from kms_hasher.providers.aws_async import Connections, parse
from kms_hasher.providers.aws_errors import EXCEPTIONS, MISCONFIGURED, Answer, translate
from kms_hasher.testing.contract import ProviderContract, StrictProviderContract
from tests.kms_double import ACCOUNT, OTHER_KEY, REGION, SPOILT, KMSDouble

pytestmark = pytest.mark.everywhere

PLAINTEXT = b"the digest that must not leak!!!"
CONTEXT = {"app": "tests"}
ROLE = f"arn:aws:iam::{ACCOUNT}:role/passwords"
SHORT = {"connect_timeout": 0.5, "read_timeout": 0.5}


@pytest.fixture(scope="module", autouse=True)
def aws_environment():
    """Credentials and a Region, and nothing from the machine's own configuration."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        patch.setenv("AWS_CONFIG_FILE", os.devnull)
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_DEFAULT_REGION", REGION)
        patch.setenv("AWS_ACCESS_KEY_ID", "AKIATESTS")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        yield patch


@pytest.fixture(scope="module")
def server():
    with KMSDouble() as double:
        yield double


@pytest.fixture
def double(server, monkeypatch):
    """The double without keys and faults; new clients go there."""
    server.reset()
    monkeypatch.setenv("AWS_ENDPOINT_URL_KMS", server.url)
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", server.url)
    return server


@pytest.fixture
def impatient(monkeypatch):
    """No waiting between attempts, and a second one however many have failed before."""
    for name in ("PAUSE", "PAUSE_THROTTLED"):
        monkeypatch.setattr(f"kms_hasher.providers.aws_http.{name}", 0)
    monkeypatch.setattr("kms_hasher.providers.aws_http.REFUND", 1000)
    monkeypatch.setattr("kms_hasher.providers.aws_http.RETRIES", 1e9)
    # STS's are botocore's.
    monkeypatch.setattr(
        "botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0
    )


@pytest.fixture(scope="module")
def shared():
    """One provider for many tests: a new Session costs a tenth of a second."""
    provider = AWSProvider(read_timeout=30)  # making an RSA key may take its time
    yield provider
    provider.close()


@pytest.fixture(scope="module")
def hurried():
    provider = AWSProvider(**SHORT)
    yield provider
    provider.close()


@pytest.fixture
def world(double):
    return World(double)


class World:
    """A key with an alias, and a blob it has sealed."""

    def __init__(self, double):
        self.arn = double.engine.create_key().key_arn
        self.id = self.arn.rpartition("/")[2]
        self.blob = double.engine.encrypt(self.arn, PLAINTEXT, CONTEXT).ciphertext
        self.mac_key = double.engine.create_key(
            spec="HMAC_256", usage="GENERATE_VERIFY_MAC"
        ).key_arn
        double.engine.create_alias("alias/passwords", self.arn)
        double.requests.clear()


CALLS = {
    "Encrypt": lambda p, w: p.encrypt(w.arn, PLAINTEXT, CONTEXT),
    "Decrypt": lambda p, w: p.decrypt(w.arn, w.blob, CONTEXT),
    "ReEncrypt": lambda p, w: p.re_encrypt(w.arn, w.blob, CONTEXT, w.arn, CONTEXT),
    "DescribeKey": lambda p, w: p.describe_key(w.arn),
    "ReEncrypt, async": lambda p, w: asyncio.run(on_loop(p, w.arn, w.blob, CONTEXT, w.arn)),
}


async def on_loop(provider, *arguments):
    try:
        return await provider.are_encrypt(*arguments, CONTEXT)
    finally:
        await provider.aclose()


def name_of(operation):
    return operation.partition(",")[0]


# --- what every provider must do ------------------------------------------------------


@pytest.fixture(scope="module")
def without_endpoint():
    provider = AWSProvider()
    yield provider
    provider.close()


class TestMoto(ProviderContract):
    # moto's blobs have no room for the longer id of a multi-Region key.
    test_a_multi_region_key_says_so_in_its_id = None

    @pytest.fixture
    def provider(self, without_endpoint):
        with moto.mock_aws():
            yield without_endpoint


class TestDouble(StrictProviderContract):
    @pytest.fixture
    def provider(self, double, shared):
        return shared

    @pytest.fixture
    def advance(self, double):
        def advance(delta):
            now = double.engine.clock()
            double.engine.clock = lambda: now + delta

        return advance


# --- faults -----------------------------------------------------------------------------

# What KMS does: the error it must become, and the attempts made, each with a request id.
REFUSALS = {
    "ThrottlingException": (KMSThrottled, 2),
    "KMSInternalException": (KMSInternalError, 2),
    "DependencyTimeoutException": (KMSInternalError, 2),
    "KeyUnavailableException": (KMSInternalError, 2),
    "InternalFailure": (KMSInternalError, 2),
    "ServiceUnavailable": (KMSInternalError, 2),
    "RequestTimeout": (KMSTimeout, 2),
    "AccessDeniedException": (KMSAccessDenied, 1),
    "ExpiredTokenException": (KMSCredentialsError, 1),
    "UnrecognizedClientException": (KMSCredentialsError, 1),
    "InvalidSignatureException": (KMSCredentialsError, 1),
    "MissingAuthenticationTokenException": (KMSCredentialsError, 1),
    "DisabledException": (KeyDisabled, 1),
    "DisabledException: arn:key is pending deletion.": (KeyPendingDeletion, 1),
    "KMSInvalidStateException": (KeyUnusable, 1),
    "KMSInvalidStateException: arn:key is pending deletion.": (KeyPendingDeletion, 1),
    "KMSInvalidStateException: arn:key is disabled.": (KeyDisabled, 1),
    "ConflictException": (KeyUnusable, 1),
    "NotFoundException": (KeyNotFound, 1),
    "InvalidCiphertextException": (InvalidCiphertext, 1),
    "IncorrectKeyException": (IncorrectKey, 1),
    "AlreadyExistsException": (AlreadyExists, 1),
    "LimitExceededException": (LimitExceeded, 1),
    "DryRunOperationException": (DryRunOperation, 1),
    "InvalidKeyUsageException": (InvalidRequest, 1),
    "ValidationException": (InvalidRequest, 1),
    "UnheardOfException": (InvalidRequest, 1),
}
PAGES = {
    "http_500": (KMSInternalError, 2),
    "http_503": (KMSInternalError, 2),
    "http_429": (KMSThrottled, 2),
    "http_403": (KMSBadResponse, 1),
    "http_302": (KMSBadResponse, 1),
}
SPOILT_BLOBS = {"null_blobs", "empty_blobs", "number_blobs", "not_base64"}
UNDETECTABLE = {"short", "long"}  # the length of a digest is known to the caller alone
each_operation = pytest.mark.parametrize("operation", CALLS)


def failing(provider, world, operation):
    with pytest.raises(KMSError) as caught:
        CALLS[operation](provider, world)
    return caught.value


@pytest.mark.usefixtures("impatient")
class TestFaults:
    @each_operation
    @pytest.mark.parametrize("fault", {**REFUSALS, **PAGES})
    def test_refusal(self, double, shared, world, operation, fault):
        kind, attempts = {**REFUSALS, **PAGES}[fault]
        double.fail(name_of(operation), fault)
        error = failing(shared, world, operation)
        assert type(error) is kind
        assert error.code == fault.partition(": ")[0].replace("http_", "HTTP")
        assert (error.operation, error.key) == (name_of(operation), world.arn)
        assert error.request_ids == tuple(request.request_id for request in double.requests)
        assert len(error.request_ids) == attempts
        assert "<html>" not in str(error)

    @each_operation
    @pytest.mark.parametrize("fault", sorted(SPOILT.keys() - UNDETECTABLE))
    def test_spoilt_success(self, double, shared, world, operation, fault):
        double.fail(name_of(operation), fault)
        if operation == "DescribeKey" and fault in SPOILT_BLOBS:
            assert shared.describe_key(world.arn).key_arn == world.arn  # it has no blobs
            return
        error = failing(shared, world, operation)
        assert type(error) is KMSBadResponse
        assert (error.operation, error.key) == (name_of(operation), world.arn)
        # Asked once: a second answer would be no better founded than the first.
        assert error.request_ids == tuple(request.request_id for request in double.requests)
        assert len(error.request_ids) == 1

    @pytest.mark.parametrize("fault", ["short", "long"])
    def test_lengths_that_are_known(self, double, shared, world, fault):
        double.fail("*", fault)
        with pytest.raises(KMSBadResponse, match="Mac has the wrong length"):
            shared.generate_mac(world.mac_key, PLAINTEXT)
        with pytest.raises(KMSBadResponse, match="Plaintext has the wrong length"):
            shared.generate_data_key(world.arn, CONTEXT)

    @each_operation
    @pytest.mark.parametrize(
        ("fault", "kind"), [("hang", KMSTimeout), ("reset", KMSConnectionError)]
    )
    def test_no_answer(self, double, shared, hurried, world, operation, fault, kind):
        double.fail(name_of(operation), fault)
        begun = time.monotonic()
        error = failing(hurried if fault == "hang" else shared, world, operation)
        assert type(error) is kind
        assert time.monotonic() - begun < 20
        assert (error.operation, error.key) == (name_of(operation), world.arn)
        assert error.request_ids == ()
        assert len(double.requests) == 2

    @each_operation
    def test_refused_connection(self, monkeypatch, operation):
        with KMSDouble() as double:
            monkeypatch.setenv("AWS_ENDPOINT_URL_KMS", double.url)
            world, provider = World(double), AWSProvider()
            CALLS[operation](provider, world)
            double.fail("*", "refused")
            error = failing(provider, world, operation)
            assert type(error) is KMSConnectionError
            refused = "ConnectionRefusedError" if "async" in operation else None
            assert error.code == (refused or "EndpointConnectionError")
            assert error.request_ids == ()

    def test_a_host_that_is_not_there(self, monkeypatch, world):
        monkeypatch.setenv("AWS_ENDPOINT_URL_KMS", "http://kms.invalid")
        assert type(failing(AWSProvider(**SHORT), world, "Encrypt")) is KMSConnectionError

    def test_a_port_that_does_not_speak_tls(self, double, monkeypatch, world):
        monkeypatch.setenv("AWS_ENDPOINT_URL_KMS", double.url.replace("http:", "https:"))
        assert type(failing(AWSProvider(**SHORT), world, "Encrypt")) is KMSConnectionError

    def test_a_proxy_that_is_not_there(self, double, monkeypatch, world):
        monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
        assert type(failing(AWSProvider(**SHORT), world, "Encrypt")) is KMSConnectionError

    def test_a_slow_answer_is_an_answer(self, double, shared, world):
        double.fail("*", "slow")
        assert shared.decrypt(world.arn, world.blob, CONTEXT).plaintext == PLAINTEXT

    @pytest.mark.parametrize("fault", ["ThrottlingException", "http_500", "http_503"])
    def test_a_second_attempt_that_succeeds_tells_both_ids(self, double, shared, world, fault):
        double.fail("Decrypt", fault, times=1)
        result = shared.decrypt(world.arn, world.blob, CONTEXT)
        assert result.plaintext == PLAINTEXT
        assert result.request_ids == tuple(r.request_id for r in double.requests)
        assert len(result.request_ids) == 2

    def test_a_timeout_has_no_id_and_the_next_attempt_has(self, double, hurried, world):
        double.fail("Decrypt", "hang", times=1)
        result = hurried.decrypt(world.arn, world.blob, CONTEXT)
        assert result.request_ids == (double.requests[1].request_id,)

    @pytest.mark.parametrize("attempts", [1, 3])
    def test_attempts_are_counted_in_all(self, double, world, attempts):
        double.fail("*", "http_500")
        error = failing(AWSProvider(attempts=attempts), world, "Decrypt")
        assert len(error.request_ids) == len(double.requests) == attempts

    def test_the_environment_does_not_unpin(self, double, world, monkeypatch):
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "7")
        monkeypatch.setenv("AWS_RETRY_MODE", "adaptive")
        double.fail("*", "http_500")
        failing(AWSProvider(), world, "Decrypt")
        assert len(double.requests) == 2


def test_retries_wait_only_a_little(double, shared, world):
    double.fail("*", "http_500")
    begun = time.monotonic()
    failing(shared, world, "Decrypt")
    assert time.monotonic() - begun < 5


def test_an_outage_does_not_double_the_load(double, world, monkeypatch):
    """Attempts that fail use up a budget, which calls that KMS answers fill again."""
    monkeypatch.setattr("kms_hasher.providers.aws_http.RETRIES", 3.0)
    monkeypatch.setattr("kms_hasher.providers.aws_http.PAUSE", 0)
    provider = AWSProvider()
    double.fail("*", "http_500")
    for _ in range(10):
        failing(provider, world, "Decrypt")
    assert len(double.requests) == 10 + 3
    double.heal()
    for _ in range(5):
        CALLS["Decrypt"](provider, world)
    double.fail("*", "http_500")
    for _ in range(2):
        failing(provider, world, "Decrypt")
    assert len(double.requests) == 13 + 5 + 2 + 1
    double.heal()
    double.fail("*", "AccessDeniedException")  # that, too, is an answer
    for _ in range(10):
        failing(provider, world, "Decrypt")
    double.heal()
    double.fail("*", "ThrottlingException")
    monkeypatch.setattr("kms_hasher.providers.aws_http.PAUSE_THROTTLED", 0)
    assert len(failing(provider, world, "Decrypt").request_ids) == 2


def test_an_endpoint_with_a_path(double, world, monkeypatch):
    """Where another service's interface stands before KMS; handlers of the event see it."""
    seen = []
    monkeypatch.setenv("AWS_ENDPOINT_URL_KMS", f"{double.url}/kms")
    monkeypatch.setattr(
        "kms_hasher.providers.aws_http.Endpoint.answer_of",
        lambda self, request, operation: seen.append(request.url),
    )
    CALLS["Decrypt"](AWSProvider(), world)
    assert seen == [f"{double.url}/kms/"]


@pytest.mark.parametrize("operation", ["ReEncrypt", "ReEncrypt, async"])
def test_what_a_handler_of_the_event_changes_is_sent(double, world, monkeypatch, operation):
    def change(request, **_):
        name = request.headers["user-agent"]
        request.headers["USER-AGENT"] = f"{name} in tests".encode()
        if not seen:
            request.headers = dict(request.headers)
        seen.append(name)

    seen = []
    handlers = [*botocore.handlers.BUILTIN_HANDLERS, ("before-send.kms", change)]
    monkeypatch.setattr("botocore.handlers.BUILTIN_HANDLERS", handlers)
    provider = AWSProvider()
    for _ in range(2):
        CALLS[operation](provider, world)
    sent = [request.user_agent for request in double.requests]
    assert sent == [f"{name} in tests" for name in seen]
    assert seen[0].startswith("kms_hasher/")


@pytest.mark.parametrize("operation", ["ReEncrypt", "ReEncrypt, async"])
@pytest.mark.parametrize(("path", "version"), [("/a%20b", ""), ("", "v4a"), ("", "v9")])
def test_botocore_signs_what_our_signer_does_not(
    double, world, monkeypatch, tmp_path, caplog, operation, path, version
):
    signed, add_auth = [], SigV4Auth.add_auth

    def spy(self, request):
        signed.append(self._service_name)
        add_auth(self, request)

    monkeypatch.setattr(SigV4Auth, "add_auth", spy)
    provider = AWSProvider()
    CALLS[operation](provider, world)
    assert signed == []
    (tmp_path / "config").write_text(f"[default]\nkms =\n    signature_version = {version}\n")
    monkeypatch.setitem(AUTH_TYPE_MAPS, "v4a", SigV4Auth)
    if version:
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_ENDPOINT_URL_KMS", f"{double.url}{path}")
    caplog.set_level(logging.DEBUG)
    assert CALLS[operation](AWSProvider(), world).key_arn == world.arn
    assert signed == ["kms"]
    assert "CanonicalRequest" not in caplog.text


def test_states_are_told_apart(double, shared, world):
    double.engine.disable_key(world.arn)
    assert type(failing(shared, world, "Encrypt")) is KeyDisabled
    double.engine.schedule_key_deletion(world.arn)
    assert type(failing(shared, world, "Encrypt")) is KeyPendingDeletion


def test_text_of_kms_is_one_short_line(double, shared, world):
    double.fail("*", "ValidationException: one\n two\t" + "x" * 1000)
    message = failing(shared, world, "Encrypt").message
    assert message.startswith("one two xxx")
    assert len(message) == 300


def test_an_alias_may_lag(double, shared, world):
    other = double.engine.create_key().key_arn
    double.alias_lag = 2
    shared.update_alias("alias/passwords", other)
    used = [shared.encrypt("alias/passwords", PLAINTEXT, CONTEXT).key_arn for _ in range(4)]
    assert used == [world.arn, world.arn, other, other]


# --- on an event loop -----------------------------------------------------------------


async def many(provider, world, number):
    async def one(digest):
        sealed = await asyncio.to_thread(provider.encrypt, world.arn, digest, CONTEXT)
        moved = await provider.are_encrypt(
            world.arn, sealed.ciphertext, CONTEXT, world.arn, CONTEXT
        )
        opened = await asyncio.to_thread(provider.decrypt, world.arn, moved.ciphertext, CONTEXT)
        assert opened.plaintext == digest
        return moved.request_ids[-1]

    try:
        return await asyncio.gather(*(one(f"{n:032}".encode()) for n in range(number)))
    finally:
        await provider.aclose()


def test_each_caller_on_a_loop_gets_its_own_answer(double, world, impatient):
    provider = AWSProvider(attempts=25)
    double.fail("ReEncrypt", "ThrottlingException", times=20)
    for _ in range(2):  # each loop has connections of its own
        ids = asyncio.run(many(provider, world, 64))
        assert len(set(ids)) == 64
    asked = {r.request_id for r in double.requests if r.operation == "ReEncrypt"}
    assert set(ids) <= asked
    assert len(asked) == 2 * 64 + 20


def test_a_connection_of_a_loop_is_kept(double, world):
    provider = AWSProvider()

    async def some():
        for _ in range(5):
            await provider.are_encrypt(world.arn, world.blob, CONTEXT, world.arn, CONTEXT)
        await provider.aclose()

    asyncio.run(some())
    assert len({request.port for request in double.requests}) == 1


def test_after_a_timeout_a_connection_is_not_used_again(double, hurried, world):
    async def some():
        double.fail("ReEncrypt", "hang", times=1)
        for _ in range(2):
            await hurried.are_encrypt(world.arn, world.blob, CONTEXT, world.arn, CONTEXT)
        await hurried.aclose()

    asyncio.run(some())
    hung, *others = (request.port for request in double.requests)
    assert len(others) == 2
    assert hung not in others


def test_through_a_proxy_a_loop_uses_threads(double, monkeypatch, world):
    monkeypatch.setenv("HTTP_PROXY", double.url)
    provider = AWSProvider()
    moved = CALLS["ReEncrypt, async"](provider, world)
    assert moved.key_arn == world.arn
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    error = failing(AWSProvider(**SHORT), world, "ReEncrypt, async")
    assert type(error) is KMSConnectionError
    assert error.code == "ProxyConnectionError"


def test_moto_answers_on_a_loop_too(without_endpoint):
    with moto.mock_aws():
        arn = without_endpoint.create_key().key_arn
        blob = without_endpoint.encrypt(arn, PLAINTEXT, CONTEXT).ciphertext
        moved = asyncio.run(on_loop(without_endpoint, arn, blob, CONTEXT, arn))
        opened = without_endpoint.decrypt(arn, moved.ciphertext, CONTEXT)
    assert opened.plaintext == PLAINTEXT


def test_an_interrupted_call_is_not_answered_to_the_next(double, world):
    provider = AWSProvider()

    async def some():
        await provider.are_encrypt(world.arn, world.blob, CONTEXT, world.arn, CONTEXT)
        double.slow = 1.0
        double.fail("ReEncrypt", "slow", times=1)
        call = provider.are_encrypt(world.arn, world.blob, CONTEXT, world.arn, CONTEXT)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(call, 0.05)
        await provider.are_encrypt(world.arn, world.blob, CONTEXT, world.arn, CONTEXT)
        await provider.aclose()

    asyncio.run(some())
    first, second, third = (request.port for request in double.requests)
    assert first == second != third


# --- TLS, which KMS itself is reached by -------------------------------------------------


def certificate(directory, *names):
    """Make a certificate for these names, signed by itself; return its path and the key's."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "the double")])
    now = datetime.datetime.now(datetime.timezone.utc)
    day = datetime.timedelta(days=1)
    made = (
        x509.CertificateBuilder(subject, subject, key.public_key(), 1, now - day, now + day)
        .add_extension(x509.SubjectAlternativeName(list(names)), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    secret = key.private_bytes(
        pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (directory / "certificate.pem").write_bytes(made.public_bytes(pem))
    (directory / "key.pem").write_bytes(secret)
    return directory / "certificate.pem", directory / "key.pem"


class TestTLS:
    LOCALHOST = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    OPERATIONS = pytest.mark.parametrize("operation", ["ReEncrypt", "ReEncrypt, async"])

    @pytest.fixture
    def serve(self, tmp_path, monkeypatch):
        doubles = []

        def serve(*names, trusted=True):
            path, key = certificate(tmp_path, *names)
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(path, key)
            double = KMSDouble()
            double._server.socket = context.wrap_socket(double._server.socket, server_side=True)
            doubles.append(double.__enter__())
            monkeypatch.setenv("AWS_ENDPOINT_URL_KMS", double.url.replace("http:", "https:"))
            if trusted:
                monkeypatch.setenv("AWS_CA_BUNDLE", str(path))
            return World(double)

        yield serve
        for double in doubles:
            double.stop()

    @OPERATIONS
    def test_a_trusted_server(self, serve, operation):
        world, provider = serve(self.LOCALHOST), AWSProvider()
        for _ in range(2):
            assert CALLS[operation](provider, world).key_arn == world.arn
        provider.close()

    @OPERATIONS
    def test_a_server_that_nobody_vouches_for(self, serve, operation):
        world = serve(self.LOCALHOST, trusted=False)
        error = failing(AWSProvider(**SHORT), world, operation)
        assert type(error) is KMSConnectionError
        assert "SSL" in error.code

    @OPERATIONS
    def test_a_certificate_for_another_name(self, serve, operation):
        world = serve(x509.DNSName("kms.eu-central-1.amazonaws.com"))
        error = failing(AWSProvider(**SHORT), world, operation)
        assert type(error) is KMSConnectionError
        assert "SSL" in error.code


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("https://kms.eu-central-1.amazonaws.com/", "kms.eu-central-1.amazonaws.com"),
        ("https://kms.example.org:443/", "kms.example.org"),
        ("https://kms.example.org:8443/", "kms.example.org:8443"),
        ("http://localhost:80/", "localhost"),
        ("http://[::1]:4566/", "[::1]:4566"),
        ("http://KMS.example.org/", "kms.example.org"),
    ],
)
def test_the_host_is_named_as_it_is_signed(url, host):
    request = AWSRequest(method="POST", url=url, data=b"{}")
    signer = SigV4Auth(Credentials("a", "b"), "kms", REGION)
    assert signer.headers_to_sign(request)["host"] == host
    head = Connections(url, True, (1, 1))._bytes_of({}, b"{}").split(b"\r\n")
    assert f"Host: {host}".encode() in head


HEAD = b"HTTP/1.1 200 OK\r\nX-Amzn-RequestId: abc\r\n"


@pytest.mark.parametrize(
    ("received", "ended", "content"),
    [
        (HEAD + b"Content-Length: 2\r\n\r\n{}", False, b"{}"),
        (HEAD + b"content-length:2\r\n\r\n{", False, None),
        (HEAD + b"Content-Length: 0\r\n\r\n", False, b""),
        (HEAD[:-2], False, None),
        (HEAD, True, None),
        (HEAD + b"\r\n{}", False, None),
        (HEAD + b"\r\n{}", True, b"{}"),
        (
            HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n1;x=y\r\n}\r\n0\r\n\r\n",
            0,
            b"{}",
        ),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n", False, None),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{", False, None),
    ],
)
def test_an_answer_is_read_when_it_is_whole(received, ended, content):
    response = parse(received, ended=bool(ended))
    assert (response and response.content) == content
    if response:
        assert response.status_code == 200
        assert response.headers["x-amzn-requestid"] == "abc"


@pytest.mark.parametrize(
    "received",
    [
        b"HTTP/1.1\r\n\r\n",
        b"SSH-2.0 hello\r\n\r\n",
        HEAD + b"Content-Length: x\r\n\r\n",
        HEAD + b"Content-Length: 1\r\n\r\n{}",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_what_is_no_http_is_no_answer(received):
    with pytest.raises((ValueError, IndexError)):
        parse(received, ended=False)


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (b"SSH-2.0 hello\r\n\r\n", "KMSBadResponse"),
        (HEAD + b"Content-Length: 2000000\r\n\r\n" + b"x" * 1_100_000, "KMSBadResponse"),
        (b"", "ConnectionResetError"),
        (HEAD + b"\r\n" + b"<html>", "KMSBadResponse"),
    ],
)
def test_a_server_that_is_not_kms(answer, code, world, monkeypatch):
    def serve():
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listening.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve)
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL_KMS", url)
        error = failing(AWSProvider(**SHORT), world, "ReEncrypt, async")
        listening.shutdown(socket.SHUT_RDWR)
    thread.join()
    assert error.code == code
    assert isinstance(error, KMSUnavailable)


# --- what goes wrong inside the client ------------------------------------------------


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ValueError("x"), KMSError),
        (RuntimeError("Credentials were refreshed, but ..."), KMSCredentialsError),
        (RuntimeError("x"), KMSError),
        (OSError("x"), KMSConnectionError),
        (TimeoutError("x"), KMSTimeout),
        (MemoryError(), KMSError),
        (botocore.exceptions.HTTPClientError(error="x"), KMSConnectionError),
        (
            botocore.exceptions.IncompleteReadError(actual_bytes=1, expected_bytes=2),
            KMSBadResponse,
        ),
    ],
)
def test_whatever_botocore_raises(shared, world, monkeypatch, error, kind):
    def fail(*_):
        raise error

    monkeypatch.setattr("botocore.httpsession.URLLib3Session.send", fail)
    caught = failing(shared, world, "Encrypt")
    assert type(caught) is kind
    assert caught.code == type(error).__name__
    assert (caught.operation, caught.key) == ("Encrypt", world.arn)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interruption_is_not_an_error_of_kms(shared, world, monkeypatch, error):
    def interrupt(*_):
        raise error

    monkeypatch.setattr("botocore.httpsession.URLLib3Session.send", interrupt)
    with pytest.raises(error):
        shared.encrypt(world.arn, PLAINTEXT, CONTEXT)


@pytest.mark.parametrize("name", sorted({*EXCEPTIONS, *MISCONFIGURED} - {"LoginError"}))
def test_names_of_exceptions_exist(name):  # LoginError is not in the oldest boto3 we take
    places = (botocore.exceptions, botocore.parsers, sys.modules["builtins"])
    assert any(isinstance(getattr(place, name, None), type) for place in places)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("EndpointConnectionError", KMSConnectionError),
        ("ConnectionClosedError", KMSConnectionError),
        ("ProxyConnectionError", KMSConnectionError),
        ("SSLError", KMSConnectionError),
        ("ResponseStreamingError", KMSConnectionError),
        ("ConnectTimeoutError", KMSTimeout),
        ("ReadTimeoutError", KMSTimeout),
        ("NoCredentialsError", KMSCredentialsError),
        ("PartialCredentialsError", KMSCredentialsError),
        ("UnauthorizedSSOTokenError", KMSCredentialsError),
        ("ParamValidationError", InvalidRequest),
        ("ProfileNotFound", ConfigurationError),
        ("InfiniteLoopConfigError", ConfigurationError),
        ("BotoCoreError", KMSError),
    ],
)
def test_classes_of_botocore(name, kind):
    cls = getattr(botocore.exceptions, name)
    error = cls.__new__(cls)
    assert type(translate(error, operation="Encrypt")) is kind


@pytest.mark.parametrize(
    "response", [{}, {"Error": None}, {"Error": {}, "ResponseMetadata": {}}]
)
def test_an_error_of_sts_without_anything(response):
    error = botocore.exceptions.ClientError.__new__(botocore.exceptions.ClientError)
    error.response, error.operation_name = response, "AssumeRole"
    assert type(translate(error, operation="Encrypt")) is KMSBadResponse


# --- nothing leaks ---------------------------------------------------------------------

FORMS = (PLAINTEXT.decode(), base64.b64encode(PLAINTEXT).decode()[:40], PLAINTEXT.hex())
LEAKS = ["http_500", "reset", "truncated", "not_utf8", "number_blobs", "ValidationException"]


def reports(error):
    """Everything that anybody might print about an error."""
    yield str(error)
    yield repr(vars(error))
    kept = traceback.TracebackException.from_exception(error, capture_locals=True)
    yield "".join(kept.format())
    with override_settings(DEBUG=False):
        reporter = ExceptionReporter(None, type(error), error, error.__traceback__)
        yield reporter.get_traceback_text()
        yield reporter.get_traceback_html()
    while error is not None:
        frames = traceback.walk_tb(error.__traceback__)
        yield "\n".join(repr(frame.f_locals) for frame, _ in frames)
        error = error.__cause__ or error.__context__


def assert_silent(error):
    for text in reports(error):
        for form in FORMS:
            assert form not in text


@pytest.mark.parametrize("fault", LEAKS)
@pytest.mark.usefixtures("impatient")
class TestLeaks:
    def test_encrypt(self, double, shared, world, fault):
        double.fail("*", fault)
        assert_silent(failing(shared, world, "Encrypt"))

    def test_decrypt(self, double, shared, world, fault):
        double.fail("*", fault)
        assert_silent(failing(shared, world, "Decrypt"))

    def test_mac_by_keywords(self, double, shared, world, fault):
        double.fail("*", fault)
        with pytest.raises(KMSError) as caught:
            shared.generate_mac(key=world.mac_key, message=PLAINTEXT)
        assert_silent(caught.value)


@pytest.mark.parametrize(
    "call",
    [
        lambda p, w: p.encrypt(w.arn, PLAINTEXT.decode(), {"a": 5}),
        lambda p, w: p.encrypt(w.arn, [PLAINTEXT], CONTEXT),
        lambda p, w: p.encrypt(w.arn, PLAINTEXT, PLAINTEXT),
        lambda p, w: p.encrypt(w.arn, PLAINTEXT * 200, CONTEXT),
        lambda p, w: p.encrypt("arn:no", PLAINTEXT, CONTEXT),
        lambda p, w: p.encrypt(w.arn, PLAINTEXT),
        lambda p, w: p.encrypt(None, PLAINTEXT, CONTEXT),
    ],
)
def test_mistakes_of_the_caller_do_not_leak(shared, world, call):
    with pytest.raises(Exception) as caught:
        call(shared, world)
    assert_silent(caught.value)


def test_a_broken_answer_to_decrypt_does_not_leak(double, shared, world):
    double.fail("Decrypt", "wrong_key")
    error = failing(shared, world, "Decrypt")
    assert "another key" in error.message
    assert_silent(error)


def test_debug_logs_do_not_leak(double, shared, world, caplog):
    caplog.set_level(logging.DEBUG)
    for name in ("botocore", "botocore.endpoint", "botocore.parsers", "urllib3"):
        caplog.set_level(logging.DEBUG, logger=name)
    shared.encrypt(world.arn, PLAINTEXT, CONTEXT)
    shared.decrypt(world.arn, world.blob, CONTEXT)
    assert caplog.records
    for form in FORMS:
        assert form not in caplog.text


# --- configuration, Regions, credentials, roles -------------------------------------------


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("region", ""),
        ("region", 1),
        ("profile", b"x"),
        ("role_arn", "passwords"),
        ("role_session_name", "with space"),
        ("role_session_name", None),
        ("connect_timeout", 0),
        ("connect_timeout", "1"),
        ("read_timeout", -1),
        ("read_timeout", True),
        ("read_timeout", float("nan")),
        ("read_timeout", float("inf")),
        ("attempts", 0),
        ("attempts", 2.0),
        ("attempts", True),
        ("max_pool_connections", 0),
    ],
)
def test_options_are_validated(option, value):
    with pytest.raises(ConfigurationError, match=option):
        AWSProvider(**{option: value})


def test_the_arn_says_the_region(double, shared, world):
    engine = double.engine_in("us-west-2")
    key = engine.create_key().key_arn
    engine.create_alias("alias/there", key)
    sealed = shared.encrypt(key, PLAINTEXT, CONTEXT)
    assert shared.decrypt(key, sealed.ciphertext, CONTEXT).plaintext == PLAINTEXT
    alias = f"arn:aws:kms:us-west-2:{ACCOUNT}:alias/there"
    assert shared.encrypt(alias, PLAINTEXT, CONTEXT).key_arn == key
    other = shared.create_key().key_arn
    assert other.split(":")[3] == REGION
    shared.update_alias(alias, key)
    regions = [request.region for request in double.requests]
    assert regions == ["us-west-2"] * 3 + [REGION, "us-west-2"]
    assert len({request.port for request in double.requests}) == 2


def test_keys_of_two_regions_do_not_go_into_one_call(double, shared, world):
    there = double.engine_in("us-west-2").create_key().key_arn
    for source, target in ((world.arn, there), (there, world.id), ("alias/passwords", there)):
        with pytest.raises(InvalidRequest, match="one Region"):
            shared.re_encrypt(source, world.blob, CONTEXT, target, CONTEXT)
    with pytest.raises(InvalidRequest, match="one Region"):
        shared.create_alias("alias/x", there)
    assert double.requests == []


def test_no_region(double, world, monkeypatch):
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    provider = AWSProvider()
    with pytest.raises(ConfigurationError, match="AWS_DEFAULT_REGION"):
        provider.describe_key("alias/passwords")
    assert provider.describe_key(world.arn).key_arn == world.arn
    assert AWSProvider(region=REGION).describe_key(world.id).key_arn == world.arn


def test_a_profile(double, world, monkeypatch, tmp_path):
    path = tmp_path / "config"
    path.write_text(
        "[profile other]\nregion = us-west-2\n"
        "aws_access_key_id = AKIAOTHER\naws_secret_access_key = x\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(path))
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    AWSProvider(profile="other").create_key()
    assert double.requests[0].access_key == "AKIAOTHER"
    assert double.requests[0].region == "us-west-2"
    with pytest.raises(ConfigurationError, match="nobody"):
        AWSProvider(profile="nobody").describe_key(world.arn)


@pytest.mark.parametrize("options", [{}, {"role_arn": ROLE}])
def test_credentials_that_come_late(double, world, monkeypatch, options):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    provider = AWSProvider(**options)
    for _ in range(2):
        error = failing(provider, world, "Encrypt")
        assert type(error) is KMSCredentialsError
        assert error.operation == "Encrypt"
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIALATE")
    with pytest.raises(KMSCredentialsError):  # one half
        provider.describe_key(world.arn)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    assert provider.describe_key(world.arn).key_arn == world.arn
    assert double.requests[0].access_key == "AKIALATE"


def test_every_request_says_who_we_are(double, shared, world):
    shared.describe_key(world.arn)
    assert double.requests[0].user_agent.startswith("kms_hasher/")


class TestRole:
    @pytest.fixture
    def provider(self):
        return AWSProvider(
            role_arn=ROLE, role_session_name="web-1", connect_timeout=1, read_timeout=1
        )

    def test_assumed_once(self, double, world, provider):
        for _ in range(3):
            assert provider.describe_key(world.arn).key_arn == world.arn
        operations = [request.operation for request in double.requests]
        assert operations == ["AssumeRole"] + ["DescribeKey"] * 3
        assert double.requests[0].params["RoleArn"] == ROLE
        assert double.requests[0].access_key == "AKIATESTS"
        assert {request.access_key for request in double.requests[1:]} == {"ASIA-web-1"}

    def test_for_all_regions(self, double, world, provider):
        there = double.engine_in("us-west-2").create_key().key_arn
        provider.describe_key(world.arn)
        provider.describe_key(there)
        operations = [request.operation for request in double.requests]
        assert operations == ["AssumeRole", "DescribeKey", "DescribeKey"]

    def test_renewed_before_it_expires(self, double, world, provider):
        double.role_lifetime = 60
        provider.describe_key(world.arn)
        double.role_lifetime = 3600
        provider.describe_key(world.arn)
        provider.describe_key(world.arn)
        operations = [request.operation for request in double.requests]
        assert operations == ["AssumeRole", "DescribeKey"] * 2 + ["DescribeKey"]

    @pytest.mark.parametrize(
        ("fault", "kind"),
        [
            ("AccessDenied", KMSCredentialsError),
            ("ExpiredToken", KMSCredentialsError),
            ("Throttling", KMSThrottled),
            ("http_503", KMSInternalError),
            ("hang", KMSTimeout),
        ],
    )
    def test_not_assumed(self, double, world, provider, impatient, fault, kind):
        double.fail("AssumeRole", fault)
        begun = time.monotonic()
        error = failing(provider, world, "Encrypt")
        assert time.monotonic() - begun < 20
        assert type(error) is kind
        assert (error.operation, error.key, error.request_ids) == ("Encrypt", world.arn, ())
        assert len(double.requests) == (2 if issubclass(kind, KMSUnavailable) else 1)
        double.heal()
        CALLS["Encrypt"](provider, world)

    def test_over_moto(self, monkeypatch):
        provider = AWSProvider(role_arn=ROLE)
        with moto.mock_aws():
            assert provider.create_key().state == "Enabled"
        provider.close()


# --- what an answer must hold --------------------------------------------------------------

KEY_ID = "aaaaaaaa-2222-4333-8444-555555555555"
MULTI = "mrk-0123456789abcdef0123456789abcdef"
HOME = f"arn:aws:kms:{REGION}:{ACCOUNT}"


@pytest.mark.parametrize(
    ("asked", "answered", "expected"),
    [
        (f"{HOME}:key/{KEY_ID}", f"{HOME}:key/{KEY_ID}", True),
        (KEY_ID, f"{HOME}:key/{KEY_ID}", True),
        (MULTI, f"{HOME}:key/{MULTI}", True),
        ("alias/a", f"{HOME}:key/{KEY_ID}", True),
        (f"{HOME}:alias/a", f"{HOME}:key/{KEY_ID}", True),
        ("", f"{HOME}:key/{KEY_ID}", True),
        (f"{HOME}:key/{KEY_ID}", KEY_ID, True),
        (KEY_ID, OTHER_KEY, False),
        (f"{HOME}:key/{KEY_ID}", OTHER_KEY, False),
        (f"{HOME}:key/{KEY_ID}", f"arn:aws:kms:us-west-2:{ACCOUNT}:key/{KEY_ID}", False),
        (f"{HOME}:key/{KEY_ID}", f"arn:aws-cn:kms:{REGION}:{ACCOUNT}:key/{KEY_ID}", False),
        (f"{HOME}:alias/a", f"arn:aws:kms:{REGION}:999999999999:key/{KEY_ID}", False),
        (f"{HOME}:alias/a", f"{HOME}:alias/a", False),
        (f"{HOME}:key/{KEY_ID}", MULTI, False),
        (KEY_ID, MULTI, False),
        (KEY_ID, KEY_ID.upper(), False),
        (KEY_ID, f"x{KEY_ID}", False),
        (KEY_ID, "", False),
        (KEY_ID, 5, False),
    ],
)
def test_the_key_that_answers(asked, answered, expected):
    answer = Answer({"KeyId": answered}, "Decrypt", asked, ("id",))
    if expected:
        assert answer.arn(asked=asked).endswith(f":key/{MULTI if asked == MULTI else KEY_ID}")
    else:
        with pytest.raises(KMSBadResponse) as caught:
            answer.arn(asked=asked)
        assert caught.value.request_ids == ("id",)


@pytest.mark.parametrize("asked", [KEY_ID, "alias/a"])
def test_a_bare_key_id_is_an_answer(asked):
    assert Answer({"KeyId": KEY_ID}, "GenerateMac", asked, ()).arn(asked=asked) == KEY_ID


@pytest.mark.parametrize(
    ("read", "data"),
    [
        (lambda answer: answer.flag("X"), {"X": None}),
        (lambda answer: answer.flag("X"), {"X": 1}),
        (lambda answer: answer.number("X", 1), {"X": "365"}),
        (lambda answer: answer.items("X"), {}),
        (lambda answer: answer.items("X"), {"X": {}}),
        (lambda answer: answer.time("X"), {"X": "2026-01-01"}),
        (lambda answer: answer.inner("X"), {"X": {}}),
        (lambda answer: answer.text("X"), {"X": b"x"}),
        (lambda answer: answer.optional_text("X"), {"X": 5}),
        (lambda answer: answer.blob("X"), {"X": "x"}),
        (lambda answer: answer.blob("X"), {"X": b""}),
    ],
)
def test_fields_are_read_with_suspicion(read, data):
    with pytest.raises(KMSBadResponse, match="X"):
        read(Answer(data, "DescribeKey", "key", ()))


def test_times_are_in_utc(double, shared, world):
    assert shared.describe_key(world.arn).created_at.tzinfo is datetime.timezone.utc


def test_an_answer_tells_nothing_of_itself():
    assert "secret" not in repr(Answer({"Plaintext": b"secret"}, "Decrypt", "key", ()))


# --- processes and threads -----------------------------------------------------------------


def test_nothing_of_aws_is_imported_before_the_first_call():
    program = """
import sys
from django.conf import settings
settings.configure()
import kms_hasher, kms_hasher.conf, kms_hasher.exceptions, kms_hasher.providers
from kms_hasher.providers import aws
aws.AWSProvider(region="eu-central-1").close()
found = {name.partition(".")[0] for name in sys.modules} & {"boto3", "botocore", "urllib3"}
sys.exit(", ".join(found) or None)
"""
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_threads_share_one_client(double, world, impatient):
    provider = AWSProvider()
    double.fail("Decrypt", "ThrottlingException", times=20)
    ready = threading.Barrier(16)

    def work(number):
        ready.wait()
        seen = []
        for turn in range(6):
            plaintext = f"{number}:{turn}".encode()
            sealed = provider.encrypt(world.arn, plaintext, CONTEXT)
            seen += sealed.request_ids
            try:
                opened = provider.decrypt(world.arn, sealed.ciphertext, CONTEXT)
            except KMSThrottled as error:
                seen += error.request_ids
            else:
                assert opened.plaintext == plaintext
                seen += opened.request_ids
        return seen

    with ThreadPoolExecutor(16) as pool:
        seen = [id_ for ids in pool.map(work, range(16)) for id_ in ids]
    assert sorted(seen) == sorted(request.request_id for request in double.requests)
    assert len({request.port for request in double.requests}) <= 16
    assert len(set(map(id, provider._process.endpoints.values()))) == 1
    provider.close()


def test_a_connection_is_kept(double, world):
    provider = AWSProvider()
    for _ in range(5):
        provider.describe_key(world.arn)
    assert len({request.port for request in double.requests}) == 1


def test_close_ends_connections(double, world):
    provider = AWSProvider()
    for _ in range(2):
        provider.describe_key(world.arn)
        provider.close()
    assert len({request.port for request in double.requests}) == 2


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("closes", [False, True])
def test_a_fork_gets_connections_of_its_own(double, world, closes):
    provider = AWSProvider()
    provider.describe_key(world.arn)
    (client,) = set(provider._process.endpoints.values())
    lock = provider._process.lock
    lock.acquire()  # as another thread might hold it
    child = os.fork()
    if child == 0:
        try:
            client.close = lambda: os._exit(3)  # as it might wait for such a lock
            if closes:
                provider.close()
            opened = provider.decrypt(world.arn, world.blob, CONTEXT).plaintext
            os._exit(0 if opened == PLAINTEXT else 1)
        finally:
            os._exit(2)
    lock.release()
    assert os.waitpid(child, 0)[1] == 0
    provider.describe_key(world.arn)
    parent, forked, parent_again = (request.port for request in double.requests)
    assert forked != parent == parent_again


def test_all_errors_have_one_root():
    assert issubclass(KMSError, KMSHasherError)
