"""
A bad day at KMS: the breaker, replicas in other Regions, the overlap, faults, forks, outages.

Most of it runs against the double of KMS, over HTTP, through boto3 and the whole path of a
login. KMS_HASHER_FULL=1 makes the outage as long, and the fork as busy, as the requirements.
"""

from __future__ import annotations

import contextvars
import dataclasses
import datetime
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from django.contrib.auth import authenticate
from django.contrib.auth.hashers import check_password, make_password
from django.contrib.auth.models import User

from kms_hasher import backends, background, breaker, encoding, exceptions, keyring, signals
from kms_hasher.breaker import Breaker
from kms_hasher.encoding import Argon2Parameters, Header, SealedHash
from kms_hasher.signals import Event
from tests import kms_double
from tests.hashers import CheapKMSArgon2PasswordHasher
from tests.kms_double import REGION, SPOILT, KMSDouble

FULL = bool(os.environ.get("KMS_HASHER_FULL"))
ROOT = Path(__file__).resolve().parent.parent

PASSWORD = "correct horse battery staple"
HEADER = Header("kms_argon2", Argon2Parameters(8, 1, 1), b"saltsaltsaltsaltsalt00")
DIGEST = bytes(range(32))
ELSEWHERE, THIRD = "eu-west-1", "us-east-1"

#: Seconds that are never reached where all is well: a test that waits as long has failed.
LONG = 30.0

#: Not another module's: `keyring` keeps a provider, and its endpoint, as long as these.
OPTIONS: dict[str, Any] = {
    "region": REGION,
    "attempts": 3,
    "connect_timeout": LONG,
    "read_timeout": LONG,
    "role_session_name": "resilience",
}
#: Where KMS does not answer: on a busy machine others would take a pause for an outage.
HURRIED = {**OPTIONS, "connect_timeout": 0.4, "read_timeout": 0.4}

# Other tests' threads hold nothing that the children below need.
forks = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")


@pytest.fixture(scope="module", autouse=True)
def aws_environment() -> Iterator[None]:
    """Credentials and a Region, and nothing from the machine's own configuration."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        patch.setenv("AWS_CONFIG_FILE", os.devnull)
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_ACCESS_KEY_ID", "AKIATESTS")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        yield


@pytest.fixture(autouse=True)
def no_audit(settings: Any) -> None:
    settings.KMS_HASHER = {**settings.KMS_HASHER, "AUDIT": "off"}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting between attempts, and another however many have failed before."""
    for name in ("PAUSE", "PAUSE_THROTTLED"):
        monkeypatch.setattr(f"kms_hasher.providers.aws_http.{name}", 0)
    monkeypatch.setattr("kms_hasher.providers.aws_http.REFUND", 1000)


class Site:
    """A site on a double of KMS: what its settings name, and a password it has stored."""

    def __init__(self, double: KMSDouble, settings: Any, **values: Any) -> None:
        self.double, self.settings = double, settings
        self.key = double.engine.create_key(multi_region=True).key_arn
        self.alias = self.key.rpartition(":")[0] + ":alias/site"
        double.engine.create_alias("alias/site", self.key)
        settings.KMS_HASHER = {
            "PROVIDER": "aws",
            "KEY": self.alias,
            "OPTIONS": OPTIONS,
            "AUDIT": "off",
            **values,
        }
        self.stored = make_password(PASSWORD)
        backends.prewarm()
        double.requests.clear()

    def requests(self) -> list[tuple[str, str]]:
        return [(request.operation, request.region) for request in self.double.requests]


@pytest.fixture(scope="module")
def server() -> Iterator[KMSDouble]:
    """One double for many tests, so that one client does for all of them."""
    with KMSDouble() as double:
        yield double


@pytest.fixture
def site(server: KMSDouble, settings: Any, monkeypatch: pytest.MonkeyPatch) -> Site:
    server.reset()
    monkeypatch.setenv("AWS_ENDPOINT_URL_KMS", server.url)
    return Site(server, settings)


@pytest.fixture
def own_clients(settings: Any) -> Iterator[None]:
    """For a test with an endpoint of its own: no client made before, or kept afterwards."""
    settings.KMS_HASHER = {**settings.KMS_HASHER, "PROVIDER": "aws", "OPTIONS": OPTIONS}
    keyring.provider().close()
    yield
    keyring.provider().close()


# --- the breaker --------------------------------------------------------------------


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(breaker, "time", clock)
    return clock


@pytest.fixture
def changes() -> Iterator[list[tuple[str, bool]]]:
    """What `breaker_changed` has told."""
    seen: list[tuple[str, bool]] = []

    def listen(region: str, is_open: bool, **_: Any) -> None:
        seen.append((region, is_open))

    breaker.breaker_changed.connect(listen)
    yield seen
    breaker.breaker_changed.disconnect(listen)


class Calls:
    """The local provider's method, counted, that raises the next of `errors` if any."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self.method, self.count = method, 0
        self.error: Exception | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        if self.error:
            raise self.error
        return self.method(*args, **kwargs)


@pytest.fixture
def stored() -> SealedHash:
    return keyring.seal(HEADER, DIGEST)


@pytest.fixture
def decrypt(stored: SealedHash, monkeypatch: pytest.MonkeyPatch) -> Calls:
    """The provider's `decrypt`, to be counted and to be made to fail."""
    calls = Calls(keyring.provider().decrypt)
    monkeypatch.setattr(keyring.provider(), "decrypt", calls)
    return calls


def fail(stored: SealedHash, times: int = 1) -> None:
    for _ in range(times):
        with pytest.raises(exceptions.KMSError):
            keyring.open(stored)


def trip(decrypt: Calls, stored: SealedHash) -> None:
    """Open the breaker."""
    decrypt.error = exceptions.KMSTimeout()
    fail(stored, breaker.FAILURES)
    assert breaker.of("local-1").is_open or breaker.of("").is_open
    decrypt.count = 0


UNAVAILABLE = [
    exceptions.KMSUnavailable,
    exceptions.KMSTimeout,
    exceptions.KMSConnectionError,
    exceptions.KMSInternalError,
    exceptions.KMSBadResponse,
]
#: Not an outage but an answer, though nothing can be opened meanwhile.
ANSWERS = [
    exceptions.KMSAccessDenied,
    exceptions.KMSCredentialsError,
    exceptions.KeyDisabled,
    exceptions.KeyPendingDeletion,
    exceptions.KeyUnusable,
    exceptions.KeyNotFound,
    exceptions.InvalidCiphertext,
    exceptions.IncorrectKey,
    exceptions.InvalidRequest,
    exceptions.DryRunOperation,
    exceptions.KMSThrottled,
]


class TestBreaker:
    @pytest.mark.parametrize("kind", UNAVAILABLE)
    def test_opens_after_failures_in_a_row(
        self, decrypt: Calls, stored: SealedHash, kind: type[exceptions.KMSError]
    ) -> None:
        decrypt.error = kind()
        fail(stored, breaker.FAILURES - 1)
        assert breaker.retry_after() == 0.0
        fail(stored)
        assert breaker.retry_after() > 0.0
        with pytest.raises(exceptions.KMSCircuitOpen):
            keyring.open(stored)
        assert decrypt.count == breaker.FAILURES

    @pytest.mark.parametrize("kind", ANSWERS)
    def test_a_refusal_never_opens_it(
        self, decrypt: Calls, stored: SealedHash, kind: type[exceptions.KMSError]
    ) -> None:
        decrypt.error = kind()
        for _ in range(3 * breaker.FAILURES):
            with pytest.raises(kind):
                keyring.open(stored)
        assert decrypt.count == 3 * breaker.FAILURES

    @pytest.mark.parametrize("kind", ANSWERS)
    def test_a_refusal_between_begins_the_count_anew(
        self, decrypt: Calls, stored: SealedHash, kind: type[exceptions.KMSError]
    ) -> None:
        for _ in range(3):
            decrypt.error = exceptions.KMSTimeout()
            fail(stored, breaker.FAILURES - 1)
            decrypt.error = kind()
            fail(stored)
        assert breaker.retry_after() == 0.0

    def test_a_success_between_begins_the_count_anew(
        self, decrypt: Calls, stored: SealedHash
    ) -> None:
        for _ in range(3):
            decrypt.error = exceptions.KMSTimeout()
            fail(stored, breaker.FAILURES - 1)
            decrypt.error = None
            assert keyring.open(stored) == DIGEST
        assert breaker.retry_after() == 0.0

    def test_one_probe_in_each_interval(
        self, decrypt: Calls, stored: SealedHash, clock: Clock
    ) -> None:
        trip(decrypt, stored)
        for number in (1, 2, 3):
            clock.now += breaker.SECONDS - 0.001
            fail(stored, 5)
            assert decrypt.count == number - 1
            clock.now += 0.001
            fail(stored, 5)
            assert decrypt.count == number

    @pytest.mark.parametrize("kind", [None, *ANSWERS])
    def test_a_probe_that_is_answered_closes_it(
        self, decrypt: Calls, stored: SealedHash, clock: Clock, kind: Any
    ) -> None:
        trip(decrypt, stored)
        clock.now += breaker.SECONDS
        decrypt.error = kind and kind()
        if kind:
            fail(stored, 3)
        else:
            assert [keyring.open(stored) for _ in range(3)] == [DIGEST] * 3
        assert decrypt.count == 3
        # It takes as many failures as before to open it again.
        decrypt.error = exceptions.KMSTimeout()
        fail(stored, breaker.FAILURES - 1)
        assert breaker.retry_after() == 0.0

    def test_a_probe_that_never_ends_is_followed_by_another(self, clock: Clock) -> None:
        circuit = Breaker("x")
        for _ in range(breaker.FAILURES):
            circuit.enter()
            circuit.leave(answered=False)
        for _ in range(3):
            clock.now += breaker.SECONDS
            circuit.enter()  # and no leave()
            with pytest.raises(exceptions.KMSCircuitOpen):
                circuit.enter()
        clock.now += breaker.SECONDS
        circuit.enter()
        assert circuit.leave(answered=True)
        circuit.enter()

    def test_retry_after(self, clock: Clock) -> None:
        circuit, other = breaker.of("x"), breaker.of("y")
        for _ in range(breaker.FAILURES):
            assert circuit.retry_after == breaker.retry_after() == 0.0
            circuit.leave(answered=False)
        assert circuit.retry_after == breaker.retry_after() == breaker.SECONDS
        clock.now += 2
        for _ in range(breaker.FAILURES):
            other.leave(answered=False)
        assert circuit.retry_after == breaker.SECONDS - 2
        assert breaker.retry_after() == other.retry_after == breaker.SECONDS
        clock.now += breaker.SECONDS
        assert breaker.retry_after() == 0.0  # a call is let through now

    def test_told_once_each_way(
        self,
        decrypt: Calls,
        stored: SealedHash,
        clock: Clock,
        changes: list[tuple[str, bool]],
        events: list[Event],
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        trip(decrypt, stored)
        fail(stored, 3)
        clock.now += breaker.SECONDS
        fail(stored, 3)
        region = changes[0][0]
        assert changes == [(region, True)]
        clock.now += breaker.SECONDS
        decrypt.error = None
        for _ in range(3):
            keyring.open(stored)
        assert changes == [(region, True), (region, False)]
        opened, closed = (e for e in events if e.operation == signals.CIRCUIT_BREAKER)
        assert (opened.outcome, closed.outcome) == ("unavailable", "success")
        assert opened.error_code == "KMSTimeout"
        assert (opened.latency, opened.request_ids) == (0.0, ())
        texts = [r.getMessage() for r in caplog.records if "circuit breaker" in r.getMessage()]
        assert [("open" in text, "closed" in text) for text in texts] == [
            (True, False),
            (False, True),
        ]

    def test_each_call_it_refuses_is_one_event(
        self, decrypt: Calls, stored: SealedHash, events: list[Event]
    ) -> None:
        trip(decrypt, stored)
        events.clear()
        fail(stored, 3)
        assert [(e.operation, e.outcome, e.error_code) for e in events] == [
            ("Decrypt", "unavailable", "KMSCircuitOpen")
        ] * 3
        assert {e.request_ids for e in events} == {()}

    @pytest.mark.system
    def test_one_for_each_region(self, site: Site) -> None:
        for _ in range(breaker.FAILURES):
            breaker.of(ELSEWHERE).leave(answered=False)
        assert check_password(PASSWORD, site.stored)
        for _ in range(breaker.FAILURES):
            breaker.of(REGION).leave(answered=False)
        with pytest.raises(exceptions.KMSCircuitOpen):
            check_password(PASSWORD, site.stored)

    @pytest.mark.everywhere
    @forks
    def test_not_inherited_by_a_child(self, decrypt: Calls, stored: SealedHash) -> None:
        trip(decrypt, stored)
        circuit = next(c for c in (breaker.of(""), breaker.of("local-1")) if c.is_open)
        with circuit._lock:  # as another thread might hold it
            child = _fork(lambda: not breaker.retry_after() and keyring.open(stored) == DIGEST)
        assert os.waitpid(child, 0)[1] == 0
        assert circuit.is_open

    def test_a_new_provider_begins_anew(
        self, decrypt: Calls, stored: SealedHash, settings: Any
    ) -> None:
        trip(decrypt, stored)
        options = {"account": "000000000000"}
        settings.KMS_HASHER = {**settings.KMS_HASHER, "OPTIONS": options}
        assert keyring.open(stored) == DIGEST

    def test_other_purposes_neither_count_nor_wait(
        self, decrypt: Calls, stored: SealedHash
    ) -> None:
        decrypt.error = exceptions.KMSTimeout()
        for _ in range(2 * breaker.FAILURES):
            with pytest.raises(exceptions.KMSTimeout):
                keyring.open(stored, purpose="unwrap")
        assert breaker.retry_after() == 0.0
        trip(decrypt, stored)
        with pytest.raises(exceptions.KMSTimeout):
            keyring.open(stored, purpose="unwrap")

    def test_many_threads(self, monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
        """Of all that come at once exactly one is the probe, and one tells the change."""
        circuit, threads = Breaker("x"), 16
        told: list[bool] = []
        breaker.breaker_changed.connect(
            receiver := lambda is_open, **_: told.append(is_open)  # type: ignore[misc]
        )
        start = threading.Barrier(threads)

        def work(act: Callable[[], Any]) -> Any:
            start.wait(LONG)
            try:
                return act()
            except exceptions.KMSCircuitOpen:
                return "refused"

        with ThreadPoolExecutor(threads) as pool:

            def at_once(act: Callable[[], Any]) -> Counter[Any]:
                jobs = [pool.submit(work, act) for _ in range(threads)]
                return Counter(job.result(LONG) for job in jobs)

            for _ in range(50):
                assert at_once(lambda: circuit.leave(answered=False))[True] == 1
                assert at_once(circuit.enter) == {"refused": threads}
                clock.now += breaker.SECONDS
                assert at_once(circuit.enter) == {None: 1, "refused": threads - 1}
                assert at_once(lambda: circuit.leave(answered=True))[True] == 1
                assert at_once(circuit.enter) == {None: threads}
        breaker.breaker_changed.disconnect(receiver)
        assert told == [True, False] * 50

    def test_the_event_tells_the_change_though_the_next_has_come(
        self, decrypt: Calls, stored: SealedHash, events: list[Event]
    ) -> None:
        def close(region: str, is_open: bool, **_: Any) -> None:
            if is_open:  # as a call that is answered in another thread might
                breaker.of(region).leave(answered=True)

        breaker.breaker_changed.connect(close)
        try:
            decrypt.error = exceptions.KMSTimeout()
            fail(stored, breaker.FAILURES)
        finally:
            breaker.breaker_changed.disconnect(close)
        (told,) = (e for e in events if e.operation == signals.CIRCUIT_BREAKER)
        assert (told.outcome, told.error_code) == ("unavailable", "KMSTimeout")

    def test_a_broken_receiver_stops_no_login(self, decrypt: Calls, stored: SealedHash) -> None:
        def broken(**_: Any) -> None:
            raise RuntimeError

        breaker.breaker_changed.connect(broken)
        try:
            decrypt.error = exceptions.KMSTimeout()
            for _ in range(breaker.FAILURES):
                with pytest.raises(exceptions.KMSTimeout):
                    keyring.open(stored)
        finally:
            breaker.breaker_changed.disconnect(broken)

    def test_open_it_costs_neither_argon2_nor_a_call(
        self, decrypt: Calls, stored: SealedHash, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        computed: list[int] = []
        monkeypatch.setattr(
            CheapKMSArgon2PasswordHasher, "_digest", lambda *_: computed.append(1) or DIGEST
        )
        assert check_password(PASSWORD, str(stored))
        assert (len(computed), decrypt.count) == (1, 1)
        trip(decrypt, stored)
        for _ in range(10):
            with pytest.raises(exceptions.KMSCircuitOpen):
                check_password(PASSWORD, str(stored))
        assert (len(computed), decrypt.count) == (1, 0)


def _fork(check: Callable[[], Any]) -> int:
    """Return the child that runs `check` and ends with 0 if it returns something true."""
    child = os.fork()
    if child == 0:  # pragma: no cover - not seen by the parent
        signal.alarm(60)  # a child that hangs ends badly, too
        try:
            os._exit(0 if check() else 1)
        finally:
            os._exit(2)
    return child


# --- replicas in other Regions ------------------------------------------------------


class Regions(KMSDouble):
    """A double whose Regions can be out one by one: `out["eu-west-1"] = "<code>"`."""

    def reset(self) -> None:
        super().reset()
        self.out: dict[str, str] = {}

    def perform(self, request: kms_double.Request) -> dict[str, Any] | bytes:
        if code := self.out.get(request.region):
            raise exceptions.KMSError(code=code)
        return super().perform(request)

    def replicate(self, *regions: str) -> None:
        """Give other Regions all keys and aliases of the home Region."""
        for region in regions:
            home = self.engine._store.read()
            with self.engine_in(region)._store.change() as keys:
                keys.keys.update(home.keys)
                keys.aliases.update(home.aliases)


@pytest.fixture(scope="module")
def regions_server() -> Iterator[Regions]:
    with Regions() as double:
        yield double


@pytest.mark.system
@pytest.mark.usefixtures("impatient")
class TestFallback:
    OUT = ("KMSInternalException", "DependencyTimeoutException", "ServiceUnavailable")

    @pytest.fixture
    def site(
        self,
        regions_server: Regions,
        settings: Any,
        monkeypatch: pytest.MonkeyPatch,
    ) -> Site:
        regions_server.reset()
        monkeypatch.setenv("AWS_ENDPOINT_URL_KMS", regions_server.url)
        site = Site(
            regions_server,
            settings,
            FALLBACK_REGIONS=[REGION, ELSEWHERE, THIRD],
            OPTIONS={**OPTIONS, "role_session_name": "fallback", "attempts": 1},
        )
        regions_server.replicate(ELSEWHERE, THIRD)
        return site

    def test_home_alone_is_asked_while_it_answers(self, site: Site) -> None:
        assert check_password(PASSWORD, site.stored)
        assert not check_password("wrong", site.stored)
        make_password(PASSWORD)
        assert {region for _, region in site.requests()} == {REGION}

    @pytest.mark.parametrize("code", [*OUT, "ThrottlingException"])
    def test_decrypt_in_the_next_region(
        self, site: Site, code: str, events: list[Event]
    ) -> None:
        site.double.out[REGION] = code  # type: ignore[attr-defined]
        assert check_password(PASSWORD, site.stored)
        assert not check_password("wrong", site.stored)
        assert site.requests() == [("Decrypt", REGION), ("Decrypt", ELSEWHERE)] * 2
        # Each is an event with a request id of its own, in the order they were made.
        assert [(e.outcome, e.error_code, e.key.split(":")[3]) for e in events] == [
            ("unavailable", code, REGION),
            ("success", "", ELSEWHERE),
        ] * 2
        assert [e.request_ids for e in events] == [
            (request.request_id,) for request in site.double.requests
        ]
        assert len({e.sub for e in events}) == 1

    def test_encrypt_in_the_next_region_opens_at_home(
        self, site: Site, events: list[Event]
    ) -> None:
        site.double.out[REGION] = "KMSInternalException"  # type: ignore[attr-defined]
        there = make_password(PASSWORD)
        assert site.requests() == [("Encrypt", REGION), ("Encrypt", ELSEWHERE)]
        assert [e.outcome for e in events] == ["unavailable", "success"]
        assert [e.requested_key.split(":")[3] for e in events] == [REGION, ELSEWHERE]
        site.double.heal()
        site.double.out.clear()  # type: ignore[attr-defined]
        site.double.requests.clear()
        assert encoding.parse(there).key_ref == encoding.parse(site.stored).key_ref
        assert check_password(PASSWORD, there)
        assert not check_password("wrong", there)
        assert site.requests() == [("Decrypt", REGION)] * 2

    def test_regions_in_their_order_and_home_s_error_at_last(
        self, site: Site, events: list[Event]
    ) -> None:
        out: dict[str, str] = site.double.out  # type: ignore[attr-defined]
        out.update({REGION: self.OUT[0], ELSEWHERE: self.OUT[1]})
        assert check_password(PASSWORD, site.stored)
        assert [region for _, region in site.requests()] == [REGION, ELSEWHERE, THIRD]
        out[THIRD] = self.OUT[2]
        for call in (
            lambda: check_password(PASSWORD, site.stored),
            lambda: make_password(PASSWORD),
        ):
            site.double.requests.clear()
            events.clear()
            with pytest.raises(exceptions.KMSInternalError) as caught:
                call()
            assert caught.value.code == self.OUT[0]
            assert [region for _, region in site.requests()] == [REGION, ELSEWHERE, THIRD]
            assert [e.error_code for e in events] == list(self.OUT)

    @pytest.mark.parametrize(
        "code",
        [
            "AccessDeniedException",
            "DisabledException",
            "KMSInvalidStateException",
            "NotFoundException",
            "ExpiredTokenException",
            "InvalidCiphertextException",
            "IncorrectKeyException",
            "ValidationException",
        ],
    )
    def test_never_after_a_refusal(self, site: Site, code: str, events: list[Event]) -> None:
        site.double.out[REGION] = code  # type: ignore[attr-defined]
        if code in ("InvalidCiphertextException", "IncorrectKeyException"):
            assert not check_password(PASSWORD, site.stored)
        else:
            with pytest.raises(exceptions.KMSError):
                check_password(PASSWORD, site.stored)
        with pytest.raises(exceptions.KMSError):
            make_password(PASSWORD)
        assert site.requests() == [("Decrypt", REGION), ("Encrypt", REGION)]
        assert [e.error_code for e in events] == [code, code]

    def test_a_refusal_of_the_replica_is_the_answer(self, site: Site) -> None:
        out: dict[str, str] = site.double.out  # type: ignore[attr-defined]
        out.update({REGION: "KMSInternalException", ELSEWHERE: "AccessDeniedException"})
        with pytest.raises(exceptions.KMSAccessDenied):
            check_password(PASSWORD, site.stored)
        assert [region for _, region in site.requests()] == [REGION, ELSEWHERE]

    def test_a_key_of_one_region_has_no_other(self, site: Site) -> None:
        key = site.double.engine.create_key().key_arn
        site.double.engine.update_alias("alias/site", key)
        site.double.replicate(ELSEWHERE, THIRD)  # type: ignore[attr-defined]
        single = make_password(PASSWORD)
        site.double.requests.clear()
        site.double.out[REGION] = "KMSInternalException"  # type: ignore[attr-defined]
        with pytest.raises(exceptions.KMSInternalError):
            check_password(PASSWORD, single)
        assert site.requests() == [("Decrypt", REGION)]

    def test_without_the_setting_home_alone_is_asked(self, site: Site) -> None:
        site.settings.KMS_HASHER = {**site.settings.KMS_HASHER, "FALLBACK_REGIONS": []}
        site.double.out[REGION] = "KMSInternalException"  # type: ignore[attr-defined]
        for call in (
            lambda: check_password(PASSWORD, site.stored),
            lambda: make_password(PASSWORD),
        ):
            with pytest.raises(exceptions.KMSInternalError):
                call()
        assert {region for _, region in site.requests()} == {REGION}

    def test_an_open_breaker_leads_straight_to_the_replica(
        self,
        site: Site,
        clock: Clock,
        events: list[Event],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        compute = Calls(background.compute)
        monkeypatch.setattr(background, "compute", compute)
        site.double.out[REGION] = "KMSInternalException"  # type: ignore[attr-defined]
        for _ in range(breaker.FAILURES + 3):
            assert check_password(PASSWORD, site.stored)
        # Beside as many others as at any time, and off the event loop.
        assert compute.count == breaker.FAILURES + 3
        asked = Counter(region for _, region in site.requests())
        assert asked == {REGION: breaker.FAILURES, ELSEWHERE: breaker.FAILURES + 3}
        assert [e.error_code for e in events[-2:]] == ["KMSCircuitOpen", ""]
        # The probe finds home again, and nothing goes elsewhere from then on.
        site.double.out.clear()  # type: ignore[attr-defined]
        clock.now += breaker.SECONDS
        site.double.requests.clear()
        for _ in range(3):
            assert check_password(PASSWORD, site.stored)
        assert site.requests() == [("Decrypt", REGION)] * 3

    @pytest.mark.parametrize("key", ["alias/site", "mrk-" + "0" * 32])
    def test_settings_without_an_arn_are_refused(self, settings: Any, key: str) -> None:
        settings.KMS_HASHER = {
            **settings.KMS_HASHER,
            "KEY": key,
            "FALLBACK_REGIONS": [ELSEWHERE],
        }
        with pytest.raises(exceptions.ConfigurationError, match="FALLBACK_REGIONS"):
            make_password(PASSWORD)


# --- the overlap --------------------------------------------------------------------


class TestOverlap:
    def test_kms_is_asked_while_argon2_computes(
        self, stored: SealedHash, decrypt: Calls
    ) -> None:
        """Each waits for the other: one after the other they would never end."""
        asked, computing = threading.Event(), threading.Event()
        real = decrypt.method

        def ask(*args: Any, **kwargs: Any) -> Any:
            asked.set()
            assert computing.wait(LONG)
            return real(*args, **kwargs)

        def compute() -> str:
            computing.set()
            assert asked.wait(LONG)
            return "computed"

        decrypt.method = ask
        assert keyring.open_beside(stored, compute) == (DIGEST, "computed")

    @pytest.mark.parametrize("slower", ["kms", "argon2"])
    def test_it_waits_for_the_slower_one(
        self, stored: SealedHash, decrypt: Calls, slower: str
    ) -> None:
        done, real = threading.Event(), decrypt.method

        def ask(*args: Any, **kwargs: Any) -> Any:
            if slower == "kms":
                assert done.wait(LONG)
                time.sleep(0.05)
            result = real(*args, **kwargs)
            if slower == "argon2":
                done.set()
            return result

        def compute() -> str:
            if slower == "argon2":
                assert done.wait(LONG)
                time.sleep(0.05)
            done.set()
            return "computed"

        decrypt.method = ask
        assert keyring.open_beside(stored, compute) == (DIGEST, "computed")

    @pytest.mark.parametrize("password", [PASSWORD, "wrong"])
    def test_verify_overlaps_and_a_wrong_password_costs_the_same(
        self,
        password: str,
        monkeypatch: pytest.MonkeyPatch,
        events: list[Event],
    ) -> None:
        encoded = make_password(PASSWORD)
        calls = Calls(keyring.provider().decrypt)
        asked, computing = threading.Event(), threading.Event()
        digests: list[int] = []
        digest = CheapKMSArgon2PasswordHasher._digest

        def ask(*args: Any, **kwargs: Any) -> Any:
            asked.set()
            assert computing.wait(LONG)
            return calls(*args, **kwargs)

        def compute(*args: Any) -> bytes:
            computing.set()
            assert asked.wait(LONG)
            digests.append(1)
            return digest(*args)

        monkeypatch.setattr(keyring.provider(), "decrypt", ask)
        monkeypatch.setattr(CheapKMSArgon2PasswordHasher, "_digest", compute)
        events.clear()
        assert check_password(password, encoded) is (password == PASSWORD)
        assert (calls.count, len(digests)) == (1, 1)
        assert [(e.operation, e.outcome) for e in events] == [("Decrypt", "success")]

    def test_the_event_is_emitted_by_the_calling_thread(
        self, stored: SealedHash, decrypt: Calls
    ) -> None:
        seen: list[tuple[str, int]] = []
        threads: list[int] = []
        real = decrypt.method

        def ask(*args: Any, **kwargs: Any) -> Any:
            threads.append(threading.get_ident())
            return real(*args, **kwargs)

        def listen(event: Event, **_: Any) -> None:
            seen.append((event.operation, threading.get_ident()))

        decrypt.method = ask
        signals.kms_event.connect(listen)
        try:
            keyring.open_beside(stored, bool)
        finally:
            signals.kms_event.disconnect(listen)
        assert seen == [("Decrypt", threading.get_ident())]
        assert threads != [threading.get_ident()]

    def test_errors_of_kms_come_when_both_are_done(
        self, stored: SealedHash, decrypt: Calls, events: list[Event]
    ) -> None:
        computed: list[int] = []
        decrypt.error = exceptions.KeyDisabled()
        with pytest.raises(exceptions.KeyDisabled):
            keyring.open_beside(stored, lambda: computed.append(1))
        assert computed == [1]
        assert [e.outcome for e in events] == ["unusable"]

    def test_when_the_computation_fails_the_call_is_recorded_all_the_same(
        self, stored: SealedHash, decrypt: Calls, events: list[Event]
    ) -> None:
        begun, ended, real = threading.Event(), threading.Event(), decrypt.method

        def ask(*args: Any, **kwargs: Any) -> Any:
            assert begun.wait(LONG)
            ended.set()
            return real(*args, **kwargs)

        def compute() -> None:
            begun.set()
            raise MemoryError

        decrypt.method = ask
        events.clear()
        with pytest.raises(MemoryError):
            keyring.open_beside(stored, compute)
        assert ended.is_set()
        assert [(e.operation, e.outcome) for e in events] == [("Decrypt", "success")]

    def test_when_both_fail_the_call_is_recorded(
        self, stored: SealedHash, decrypt: Calls, events: list[Event]
    ) -> None:
        def compute() -> None:
            raise MemoryError

        decrypt.error = exceptions.KMSTimeout()
        events.clear()
        with pytest.raises(MemoryError):
            keyring.open_beside(stored, compute)
        assert [e.error_code for e in events] == ["KMSTimeout"]

    @pytest.fixture
    def unrecorded(self, stored: SealedHash) -> Iterator[list[str]]:
        """A strict audit that cannot write; what it was asked to."""
        asked: list[str] = []

        def listen(event: Event, **_: Any) -> None:
            asked.append(event.operation)
            raise exceptions.AuditError("full")

        signals.kms_event.connect(listen)
        yield asked
        signals.kms_event.disconnect(listen)

    def test_a_strict_audit_stops_the_login(
        self, stored: SealedHash, decrypt: Calls, unrecorded: list[str]
    ) -> None:
        with pytest.raises(exceptions.AuditError):
            keyring.open_beside(stored, bool)
        with pytest.raises(exceptions.AuditError):
            check_password(PASSWORD, str(stored))
        assert unrecorded == ["Decrypt"] * 2

    @pytest.mark.parametrize("kind", [exceptions.KMSTimeout, exceptions.InvalidCiphertext])
    def test_a_strict_audit_hides_no_error_of_kms(
        self, stored: SealedHash, decrypt: Calls, unrecorded: list[str], kind: Any
    ) -> None:
        decrypt.error = kind()
        with pytest.raises(kind):
            keyring.open_beside(stored, bool)
        with pytest.raises(kind):
            keyring.open(stored)
        assert unrecorded == ["Decrypt"] * 2

    def test_a_strict_audit_is_offered_every_event(
        self, stored: SealedHash, decrypt: Calls, unrecorded: list[str]
    ) -> None:
        decrypt.error = exceptions.KMSTimeout()
        for _ in range(breaker.FAILURES):
            with pytest.raises(exceptions.KMSTimeout):
                keyring.open_beside(stored, bool)
        assert unrecorded == ["Decrypt"] * breaker.FAILURES + [signals.CIRCUIT_BREAKER]

    def test_a_call_that_closes_the_breaker_is_told_though_the_audit_fails(
        self, stored: SealedHash, decrypt: Calls, unrecorded: list[str]
    ) -> None:
        circuit = breaker.of("")
        circuit.failures = breaker.FAILURES
        with pytest.raises(exceptions.AuditError):
            keyring.open(stored)
        assert unrecorded == ["Decrypt", signals.CIRCUIT_BREAKER]
        assert not circuit.is_open


class TestBackground:
    @pytest.fixture(autouse=True)
    def free(self) -> Iterator[None]:
        """No test leaves a thread busy."""
        yield
        deadline = time.monotonic() + LONG
        while background._free._value < background.MAX_THREADS:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    @pytest.fixture
    def busy(self) -> Iterator[list[int]]:
        """All threads wait for something; which they are."""
        go, threads = threading.Event(), list[int]()
        begun = threading.Semaphore(0)

        def wait() -> None:
            threads.append(threading.get_ident())
            begun.release()
            assert go.wait(LONG)

        waiting = [background.start(wait) for _ in range(background.MAX_THREADS)]
        for _ in waiting:
            assert begun.acquire(timeout=LONG)
        yield threads
        go.set()
        for future in waiting:
            future.result(LONG)

    def test_no_more_threads_than_allowed_and_nobody_waits_for_one(
        self, busy: list[int], stored: SealedHash, decrypt: Calls, events: list[Event]
    ) -> None:
        assert len(set(busy)) == background.MAX_THREADS
        own = threading.get_ident()
        assert background.start(threading.get_ident).result(0) == own
        failed = background.start(functools.partial(int, "x"))
        assert isinstance(failed.exception(0), ValueError)
        assert keyring.open_beside(stored, lambda: "computed") == (DIGEST, "computed")
        decrypt.error = exceptions.KMSTimeout()
        with pytest.raises(exceptions.KMSTimeout):
            keyring.open_beside(stored, bool)
        assert [e.outcome for e in events] == ["success", "unavailable"]
        names = [t.name for t in threading.enumerate() if t.name.startswith("kms_hasher_")]
        assert len(names) == background.MAX_THREADS

    def test_they_are_free_again_afterwards(self, stored: SealedHash) -> None:
        def fail() -> None:
            raise ValueError

        for _ in range(2 * background.MAX_THREADS):
            future = background.start(fail)
            with pytest.raises(ValueError):
                future.result(LONG)
        assert background.start(threading.get_ident).result(LONG) != threading.get_ident()

    def test_context_variables_go_with_the_call(self) -> None:
        variable = contextvars.ContextVar("variable", default="unset")
        token = variable.set("set")
        assert background.start(variable.get).result(LONG) == "set"
        background.start(lambda: variable.set("changed there")).result(LONG)
        assert variable.get() == "set"
        variable.reset(token)
        assert background.start(variable.get).result(LONG) == "unset"

    def test_where_no_thread_can_be_made_the_caller_makes_the_call_once(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        executor = ThreadPoolExecutor(background.MAX_THREADS)
        monkeypatch.setattr(background, "_executor", executor)
        made: list[int] = []
        with monkeypatch.context() as patch:

            def start(self: threading.Thread) -> None:
                raise RuntimeError("can't start new thread")

            patch.setattr(threading.Thread, "start", start)
            background.start(lambda: made.append(threading.get_ident())).result(0)
        assert made == [threading.get_ident()]
        # The executor has kept what it could not do, and must not do it a second time.
        background.start(bool).result(LONG)
        executor.shutdown()
        assert made == [threading.get_ident()]

    @pytest.mark.everywhere
    def test_when_the_interpreter_ends_the_caller_makes_the_call(self) -> None:
        script(
            """
            encoded = make_password("right")
            assert check_password("right", encoded)

            def last():
                assert check_password("right", encoded)
                assert not check_password("wrong", encoded)
                print("checked")
            # Run after the executors have been shut down.
            atexit.register(last)
            """,
            expect="checked",
        )

    @pytest.mark.everywhere
    @forks
    def test_a_child_has_threads_of_its_own(self, busy: list[int], stored: SealedHash) -> None:
        """All the parent's threads are busy for good, and its lock is held."""
        with background._lock:
            child = _fork(
                lambda: (
                    background.start(threading.get_ident).result(LONG) != threading.get_ident()
                    and keyring.open_beside(stored, bool) == (DIGEST, False)
                )
            )
        assert os.waitpid(child, 0)[1] == 0


@pytest.mark.everywhere
def test_under_gevent_kms_and_argon2_overlap_and_the_hub_goes_on() -> None:
    """
    Argon2 waits in C for a byte that only the call to KMS writes, and the call waits for
    Argon2 to begin: neither can end unless both run, and the hub in between.
    """
    script(
        """
        encoded = make_password("right")
        provider = keyring.provider()
        decrypt, digest = provider.decrypt, CheapKMSArgon2PasswordHasher._digest
        reader, writer = os.pipe()
        read = gevent.monkey.get_original("os", "read")
        native = gevent.monkey.get_original("_thread", "get_ident")
        hub, begun, threads = native(), [], []

        def ask(*args, **kwargs):
            while not begun:
                gevent.sleep(0.001)
            assert native() == hub
            begun.clear()
            os.write(writer, b"x")
            return decrypt(*args, **kwargs)

        def compute(*args):
            threads.append(native())
            begun.append(True)
            assert read(reader, 1) == b"x"
            return digest(*args)

        provider.decrypt = ask
        CheapKMSArgon2PasswordHasher._digest = compute
        assert check_password("right", encoded)
        assert not check_password("wrong", encoded)
        assert len(threads) == 2 and hub not in threads

        def check(password):
            return check_password(password, encoded)

        def ask(*args, **kwargs):
            gevent.sleep(0.01)
            return decrypt(*args, **kwargs)

        def compute(*args):
            threads.append(native())
            return digest(*args)

        provider.decrypt = ask
        CheapKMSArgon2PasswordHasher._digest = compute
        jobs = [gevent.spawn(check, p) for p in ["right", "wrong"] * 50]
        gevent.joinall(jobs, timeout=20, raise_error=True)
        assert [job.value for job in jobs] == [True, False] * 50
        assert len(threads) == 102 and hub not in threads
        print("checked")
        """,
        before="import gevent.monkey; gevent.monkey.patch_all()",
        expect="checked",
    )


def script(
    code: str, *, expect: str, before: str = "", environment: dict[str, str] | None = None
) -> None:
    """Run code in a process of its own, on the local provider, that must print `expect`."""
    setup = f"""
{before}
import atexit, os, signal, sys, threading, time
signal.alarm(60)
import django
django.setup()
from django.conf import settings
settings.KMS_HASHER["AUDIT"] = "off"
from django.contrib.auth.hashers import check_password, make_password
from kms_hasher import background, breaker, keyring
from tests import kms_double
from tests.hashers import CheapKMSArgon2PasswordHasher
keyring.provider().create_alias("alias/tests", keyring.provider().create_key().key_arn)
"""
    completed = subprocess.run(
        [sys.executable, "-c", setup + textwrap.dedent(code)],
        cwd=ROOT,
        env={
            **os.environ,
            "DJANGO_SETTINGS_MODULE": "tests.settings",
            **(environment or {}),
        },
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    assert completed.stdout.split() == expect.split()


# --- every fault, on the whole path of a login ----------------------------------------


class Fault(NamedTuple):
    """What KMS or the network does, and what it must become."""

    kind: type[exceptions.KMSError]
    outcome: str
    code: str
    #: Whether there is another attempt, and whether there is an id of this one.
    retried: bool = True
    answered: bool = True


def _spoilt(code: str) -> Fault:
    return Fault(exceptions.KMSBadResponse, "unavailable", code, retried=False)


FAULTS = {
    "hang": Fault(exceptions.KMSTimeout, "unavailable", "ReadTimeoutError", answered=False),
    "reset": Fault(
        exceptions.KMSConnectionError, "unavailable", "ConnectionClosedError", answered=False
    ),
    "http_500": Fault(exceptions.KMSInternalError, "unavailable", "HTTP500"),
    "http_503": Fault(exceptions.KMSInternalError, "unavailable", "HTTP503"),
    "http_429": Fault(exceptions.KMSThrottled, "unavailable", "HTTP429"),
    "http_403": _spoilt("HTTP403"),
    "http_302": _spoilt("HTTP302"),
    **{
        code: Fault(exceptions.KMSInternalError, "unavailable", code)
        for code in (
            "KMSInternalException",
            "DependencyTimeoutException",
            "KeyUnavailableException",
            "ServiceUnavailable",
        )
    },
    "ThrottlingException": Fault(exceptions.KMSThrottled, "unavailable", "ThrottlingException"),
    **{
        name: Fault(kind, outcome, name.partition(":")[0], retried=False)
        for name, kind, outcome in [
            ("AccessDeniedException", exceptions.KMSAccessDenied, "denied"),
            ("ExpiredTokenException", exceptions.KMSCredentialsError, "denied"),
            ("UnrecognizedClientException", exceptions.KMSCredentialsError, "denied"),
            ("DisabledException", exceptions.KeyDisabled, "unusable"),
            ("KMSInvalidStateException", exceptions.KeyUnusable, "unusable"),
            (
                "KMSInvalidStateException: key is pending deletion.",
                exceptions.KeyPendingDeletion,
                "unusable",
            ),
            ("NotFoundException", exceptions.KeyNotFound, "unusable"),
            ("InvalidCiphertextException", exceptions.InvalidCiphertext, "invalid"),
            ("IncorrectKeyException", exceptions.IncorrectKey, "invalid"),
            ("UnheardOfException", exceptions.InvalidRequest, "error"),
        ]
    },
    **{name: _spoilt("KMSBadResponse") for name in SPOILT},
}

#: Spoilt answers to Encrypt by alias that nothing in them gives away. What they make is
#: refused when it is opened.
UNDETECTABLE = {"short", "long", "wrong_key"}

OPERATIONS: dict[str, Callable[[Site], Any]] = {
    "make_password": lambda site: make_password(PASSWORD),
    "check_password": lambda site: check_password(PASSWORD, site.stored, _never),
    "check_password, wrong": lambda site: check_password("wrong", site.stored, _never),
    "authenticate": lambda site: authenticate(username="anna", password=PASSWORD),
    "authenticate, wrong": lambda site: authenticate(username="anna", password="wrong"),
    "authenticate, unknown": lambda site: authenticate(username="bela", password=PASSWORD),
}


def _never(password: str) -> None:
    raise AssertionError("nothing is to be upgraded")


def outcome_of(call: Callable[[], Any]) -> Any:
    """Return what comes of a call: "right", "wrong", a stored string, or the error's class."""
    try:
        result = call()
    except exceptions.KMSError as error:
        return type(error)
    return result if isinstance(result, str) else "right" if result else "wrong"


def expected_of(operation: str, kind: type[exceptions.KMSError] | None) -> Any:
    if kind is None:
        return "wrong" if operation.endswith(("wrong", "unknown")) else "right"
    refused = issubclass(kind, exceptions.InvalidCiphertext) and operation != "make_password"
    return "wrong" if refused else kind


@pytest.fixture
def anna(site: Site, db: None) -> Iterator[User]:
    """A user whose password stays as it is, whatever happens."""
    user = User.objects.create(username="anna", password=site.stored)
    yield user
    user.refresh_from_db()
    assert user.password == site.stored


@pytest.mark.system
@pytest.mark.usefixtures("impatient", "anna")
class TestFaults:
    @pytest.mark.parametrize("operation", OPERATIONS)
    @pytest.mark.parametrize("name", FAULTS)
    def test_fault(self, site: Site, events: list[Event], name: str, operation: str) -> None:
        positions: tuple[str, ...] = ("first", "middle", "last", "every")
        if name == "hang":
            site.settings.KMS_HASHER = {**site.settings.KMS_HASHER, "OPTIONS": HURRIED}
            backends.prewarm()
        if name == "hang" and not FULL:  # each of them takes its time
            plain = operation in ("make_password", "check_password")
            positions = ("first", "every") if plain else ("last",)
        for position in positions:
            events.clear()
            site.double.requests.clear()
            breaker.reset()
            self.check(site, events, name, operation, position)

    def check(
        self, site: Site, events: list[Event], name: str, operation: str, position: str
    ) -> None:
        """Attempts before the faulty one are throttled, and those after it would succeed."""
        fault, double = FAULTS[name], site.double
        number = {"first": 1, "middle": 2, "last": 3, "every": 1}[position]
        for _ in range(number - 1):
            double.fail("*", "ThrottlingException", times=1)
        # If the decoy's key may have been rotated away since, the decoy is made anew.
        again = operation.endswith("unknown") and fault.outcome in ("unusable", "denied")
        double.fail("*", name, times=None if position == "every" or again else 1)
        saved = fault.retried and position in ("first", "middle")
        kind = None if saved else fault.kind

        result = outcome_of(lambda: OPERATIONS[operation](site))
        double.heal()
        if again:
            del events[1:]
        (event,) = events
        ids = [request.request_id for request in double.requests]

        hidden = name in UNDETECTABLE and operation == "make_password"
        if isinstance(result, str) and encoding.PREFIX in result:
            assert kind is None or hidden
            # Whatever has been made, the right password alone opens it.
            assert outcome_of(lambda: check_password("wrong", result)) != "right"
            opened = outcome_of(lambda: check_password(PASSWORD, result))
            assert (opened == "right") is (kind is None)
        else:
            assert result == expected_of(operation, kind), position
        assert event.operation == ("Encrypt" if operation == "make_password" else "Decrypt")
        assert (event.outcome, event.error_code) == (
            ("success", "") if kind is None or hidden else (fault.outcome, fault.code)
        )
        if fault.answered:
            attempts = 3 if position == "every" and fault.retried else number + saved
            assert list(event.request_ids) == ids[:attempts]
        else:
            before, after = number - 1, number + (position != "every")
            assert list(event.request_ids) == ids[:before] + (
                ids[number:after] if saved else []
            )

    @pytest.mark.parametrize("operation", OPERATIONS)
    def test_a_slow_answer_is_an_answer(
        self, site: Site, events: list[Event], operation: str
    ) -> None:
        site.double.fail("*", "slow")
        if operation == "make_password":
            assert check_password(PASSWORD, make_password(PASSWORD))
        else:
            result = outcome_of(lambda: OPERATIONS[operation](site))
            assert result == expected_of(operation, None)
        assert {event.outcome for event in events} == {"success"}

    @pytest.mark.parametrize("operation", OPERATIONS)
    @pytest.mark.parametrize("state", ["disabled", "pending deletion", "deleted", "denied"])
    def test_a_key_out_of_use(
        self, site: Site, events: list[Event], state: str, operation: str
    ) -> None:
        """As the double itself answers, which keeps KMS's rules."""
        engine = site.double.engine
        kind: type[exceptions.KMSError] = exceptions.KeyDisabled
        outcome = "unusable"
        if state == "disabled":
            engine.disable_key(site.key)
        elif state == "denied":
            site.double.fail("*", "AccessDeniedException")
            kind, outcome = exceptions.KMSAccessDenied, "denied"
        else:
            kind = exceptions.KeyPendingDeletion
            engine.schedule_key_deletion(site.key, 7)
            if state == "deleted":
                now = engine.clock()
                engine.clock = lambda: now + datetime.timedelta(days=8)
                kind = exceptions.KeyNotFound
        assert outcome_of(lambda: OPERATIONS[operation](site)) is kind
        assert {event.outcome for event in events} == {outcome}

    @pytest.mark.parametrize("bit", range(0, 184 * 8, 97))
    def test_a_flipped_bit(self, site: Site, events: list[Event], bit: int) -> None:
        stored = encoding.parse(site.stored)
        sealed = bytearray(stored.sealed)
        sealed[bit // 8] ^= 1 << bit % 8
        flipped = str(dataclasses.replace(stored, sealed=bytes(sealed)))
        User.objects.create(username="carl", password=flipped)
        for password in (PASSWORD, "wrong"):
            assert check_password(password, flipped, _never) is False
            assert authenticate(username="carl", password=password) is None
        assert {event.outcome for event in events} == {"invalid"}

    def test_a_blob_of_another_row_or_key(self, site: Site, events: list[Event]) -> None:
        mine, other = encoding.parse(site.stored), encoding.parse(make_password("other"))
        swapped = str(dataclasses.replace(mine, sealed=other.sealed))
        site.double.engine.update_alias("alias/site", site.double.engine.create_key().key_arn)
        foreign = encoding.parse(make_password(PASSWORD))
        wrong_key = str(dataclasses.replace(foreign, key_ref=mine.key_ref))
        events.clear()
        for password in (PASSWORD, "other", "wrong"):
            assert not check_password(password, swapped)
            assert not check_password(password, wrong_key)
        assert [e.error_code for e in events] == [
            "InvalidCiphertextException",
            "IncorrectKeyException",
        ] * 3

    @pytest.mark.parametrize("operation", OPERATIONS)
    @pytest.mark.parametrize(
        ("endpoint", "code"),
        [
            ("http://kms.invalid", "EndpointConnectionError"),
            ("http://127.0.0.1:9", "EndpointConnectionError"),
            ("tls", "SSLError"),
        ],
        ids=["dns", "refused", "tls"],
    )
    def test_no_connection(
        self,
        site: Site,
        own_clients: None,
        monkeypatch: pytest.MonkeyPatch,
        events: list[Event],
        endpoint: str,
        code: str,
        operation: str,
    ) -> None:
        site.settings.KMS_HASHER = {**site.settings.KMS_HASHER, "KEY": site.alias}
        if endpoint == "tls":
            endpoint = site.double.url.replace("http:", "https:")
        monkeypatch.setenv("AWS_ENDPOINT_URL_KMS", endpoint)
        result = outcome_of(lambda: OPERATIONS[operation](site))
        assert result is exceptions.KMSConnectionError
        (event,) = events
        assert (event.outcome, event.error_code) == ("unavailable", code)
        assert event.request_ids == ()

    def test_credentials_that_have_expired(
        self, site: Site, own_clients: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        site.settings.KMS_HASHER = {**site.settings.KMS_HASHER, "KEY": site.alias}
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        for operation, call in OPERATIONS.items():
            result = outcome_of(functools.partial(call, site))
            assert result is exceptions.KMSCredentialsError, operation


@pytest.mark.system
@pytest.mark.parametrize("fault", ["hang", "http_503", "reset"])
def test_with_the_default_timeouts_no_login_takes_longer_than_6_5_s(
    site: Site, own_clients: None, fault: str, events: list[Event]
) -> None:
    site.settings.KMS_HASHER = {
        **site.settings.KMS_HASHER,
        "KEY": site.alias,
        "OPTIONS": {"region": REGION},
    }
    assert check_password(PASSWORD, site.stored)
    site.double.fail("*", fault)
    begun = time.monotonic()
    with pytest.raises(exceptions.KMSUnavailable):
        check_password(PASSWORD, site.stored)
    assert time.monotonic() - begun <= 6.5
    assert [e.outcome for e in events] == ["success", "unavailable"]
    assert len(site.double.requests) == 3
    keyring.provider().close()


# --- forks --------------------------------------------------------------------------


@pytest.mark.everywhere
def test_workers_forked_from_a_busy_process_get_their_own_answers(site: Site) -> None:
    """
    8 workers, client, threads and audit in use before the fork and during it: each Decrypt
    gives the digest it was asked for, and none hangs.
    """
    each = 200 if FULL else 40
    lines, digests = [], [os.urandom(32) for _ in range(8 * each)]
    for digest in digests:
        context = keyring.context_of(HEADER)
        sealed = site.double.engine.encrypt(site.key, digest, context).ciphertext
        stored = SealedHash(HEADER, "d1", encoding.key_ref(site.key), sealed)
        lines.append(f"{stored} {digest.hex()}")
    completed = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore::DeprecationWarning",
            "-m",
            "tests.projects.forks",
            site.alias,
        ],
        cwd=ROOT,
        input="\n".join(lines),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    assert json.loads(completed.stdout) == [{"right": each, "recorded": each}] * 8


# --- an outage under load -----------------------------------------------------------


class Phoenix(KMSDouble):
    """A double that can be gone for a while: its port refuses, and answers again later."""

    def stop(self) -> None:
        port = self._server.server_address
        super().stop()
        # Nobody listens, and no client of another test is given the port meanwhile.
        self._kept = socket.socket()
        self._kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._kept.bind(port)

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._kept.close()

    def restart(self) -> None:
        self._kept.close()
        port = self._server.server_address[1]
        self._server = kms_double._Server.__new__(kms_double._Server)
        ThreadingHTTPServer.__init__(
            self._server, ("127.0.0.1", int(port)), kms_double._Handler
        )
        self._server.double, self._server.connections = self, set()
        self.stopping = threading.Event()
        self.__enter__()


def client_sockets(port: int) -> Counter[str]:
    """This process's connections to a port of 127.0.0.1, by their state in /proc/net/tcp."""
    inodes = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            inodes.add(str(entry.readlink()).removeprefix("socket:[").rstrip("]"))
        except OSError:  # closed meanwhile
            continue
    remote = f"0100007F:{port:04X}"
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return Counter(row[3] for row in rows if row[2] == remote and row[9] in inodes)


class Load:
    """Threads that sign in all the time, with the right and with a wrong password."""

    THREADS = 8

    def __init__(self, stored: str) -> None:
        self.stored, self.done = stored, threading.Event()
        #: When each attempt began and ended, and what came of it.
        self.attempts: list[tuple[float, float, Any]] = []
        self.threads = [
            threading.Thread(target=self._run, args=[number], name=f"load-{number}")
            for number in range(self.THREADS)
        ]

    def __enter__(self) -> Load:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        for thread in self.threads:
            thread.join(LONG)
            assert not thread.is_alive()

    def _run(self, number: int) -> None:
        password = "wrong" if number % 4 == 3 else PASSWORD
        while not self.done.wait(0.005):
            begun = time.monotonic()
            result = outcome_of(lambda: check_password(password, self.stored))
            right = "wrong" if password == "wrong" else "right"
            known = "as it should" if result == right else result
            self.attempts.append((begun, time.monotonic(), known))

    def results(self, begin: float, end: float = float("inf")) -> Counter[Any]:
        """What came of the attempts that began and ended between two times."""
        made = list(self.attempts)
        return Counter(result for begun, ended, result in made if begin < begun < ended < end)

    def wait_for(self, number: int) -> None:
        """Wait until so many more attempts have been made."""
        goal, deadline = len(self.attempts) + number, time.monotonic() + LONG
        while len(self.attempts) < goal:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.system
@pytest.mark.parametrize("fault", ["refused", "http_503", "hang"])
def test_an_outage_under_load_and_the_recovery(
    fault: str,
    settings: Any,
    own_clients: None,
    monkeypatch: pytest.MonkeyPatch,
    changes: list[tuple[str, bool]],
) -> None:
    # A login that hangs takes three timeouts to count, and the breaker has to open meanwhile.
    seconds = 60.0 if FULL and fault == "refused" else 4.0 if fault == "hang" else 1.5
    if not FULL:
        monkeypatch.setattr(breaker, "SECONDS", 0.5)
    closed = threading.Event()

    def note(is_open: bool, **_: Any) -> None:
        if not is_open:
            closed.set()

    breaker.breaker_changed.connect(note)
    double = Phoenix()
    monkeypatch.setenv("AWS_ENDPOINT_URL_KMS", double.url)
    with double:
        site = Site(double, settings, OPTIONS=HURRIED if fault == "hang" else OPTIONS)
        with Load(site.stored) as load:
            load.wait_for(100)
            assert set(load.results(0)) == {"as it should"}
            double.requests.clear()
            out = time.monotonic()
            double.fail("*", fault)
            time.sleep(seconds)
            asked, during = len(double.requests), load.results(out)
            double.heal()
            if fault == "refused":
                double.restart()
            # One interval, and a generous share for the probe that finds it healed.
            assert closed.wait(breaker.SECONDS + 5)
            whole_again = time.monotonic()
            load.wait_for(200)
        deadline = time.monotonic() + LONG
        while background._free._value < background.MAX_THREADS:
            assert time.monotonic() < deadline, "a thread is stuck"
            time.sleep(0.01)
        sockets = client_sockets(int(double.url.rpartition(":")[2]))
    breaker.breaker_changed.disconnect(note)

    # An outage is never a wrong password, and a wrong one never right.
    assert {kind for kind in during if kind != "as it should"} <= {
        exceptions.KMSCircuitOpen,
        exceptions.KMSConnectionError,
        exceptions.KMSInternalError,
        exceptions.KMSTimeout,
    }
    assert during[exceptions.KMSCircuitOpen] > 0
    # Full rate from the first answered probe on; nothing that began later has failed.
    assert set(load.results(whole_again)) == {"as it should"}
    assert changes == [(REGION, True), (REGION, False)]

    # Asked were those that opened the breaker, those beside them, and the probes.
    probes = seconds / breaker.SECONDS + 1
    assert asked <= OPTIONS["attempts"] * (breaker.FAILURES + Load.THREADS + probes)
    assert asked < sum(during.values())

    # A connection for each login at a time, lost ones (which wait to be replaced) included.
    assert 0 < sum(sockets.values()) <= Load.THREADS
