"""The check for a readiness probe: it is cheap, it is true, and it never raises."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from kms_hasher import breaker, exceptions, health, keyring
from kms_hasher.health import Health, check
from kms_hasher.providers.base import Provider

Calls = Callable[[], list[str]]


class Clock:
    """The time of `health` and `breaker`, which a test may move on."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (health, breaker):
        monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture(autouse=True)
def fresh(settings: Any) -> Iterator[None]:
    settings.KMS_HASHER = {**settings.KMS_HASHER, "AUDIT": "off"}
    health._last = None
    yield
    health._last = None


def fail(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def describe_key(*args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr(keyring.provider(), "describe_key", describe_key)


def open_breaker(region: str = "") -> breaker.Breaker:
    circuit = breaker.of(region)
    while not circuit.is_open:
        circuit.leave(answered=False)
    return circuit


class TestWhatItCosts:
    def test_one_call_in_max_age(self, clock: Clock, calls: Calls) -> None:
        for _ in range(30):
            assert check(max_age=30).ok
            clock.now += 1
        assert calls() == ["DescribeKey"]
        assert check(max_age=30) == Health(ok=True)
        assert calls() == ["DescribeKey"] * 2

    def test_a_failure_is_kept_as_long(
        self, clock: Clock, calls: Calls, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fail(monkeypatch, exceptions.KMSTimeout())
        for _ in range(20):
            assert not check(max_age=10).ok
            clock.now += 1
        assert calls() == ["DescribeKey"] * 2

    def test_its_age_is_told(self, clock: Clock) -> None:
        assert check().age == 0
        clock.now += 12.5
        assert check().age == 12.5
        assert check().as_dict() == {"ok": True, "problem": "", "age": 12.5}

    def test_each_caller_has_his_own_max_age(self, clock: Clock, calls: Calls) -> None:
        check(max_age=60)
        clock.now += 10
        check(max_age=60)
        assert calls() == ["DescribeKey"]
        check(max_age=5)
        assert calls() == ["DescribeKey"] * 2

    def test_threads_share_one_call(
        self, calls: Calls, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        start = threading.Barrier(8)
        real = keyring.provider().describe_key
        waiting = threading.Event()

        def describe_key(*args: Any, **kwargs: Any) -> Any:
            waiting.wait(0.05)  # for the others to come and find nothing known yet
            return real(*args, **kwargs)

        monkeypatch.setattr(keyring.provider(), "describe_key", describe_key)

        def ask() -> Health:
            start.wait()
            return check()

        with ThreadPoolExecutor(8) as pool:
            found = [future.result() for future in [pool.submit(ask) for _ in range(8)]]
        assert [one.ok for one in found] == [True] * 8
        assert calls() == ["DescribeKey"]

    def test_none_while_the_breaker_is_open(self, clock: Clock, calls: Calls) -> None:
        open_breaker()
        for _ in range(4):
            found = check(max_age=0)
            assert (found.ok, found.problem) == (False, "KMS could not answer lately")
            clock.now += 1
        assert calls() == []

    def test_the_purpose_is_told(self, events: list[Any]) -> None:
        check()
        assert [event.purpose for event in events] == ["status"]


class TestWhatItFinds:
    def test_all_is_well(self) -> None:
        found = check()
        assert (found.ok, found.problem) == (True, "")

    def test_a_disabled_key(self, kms: Provider, key_arn: str, clock: Clock) -> None:
        kms.disable_key(key_arn)
        assert check() == Health(ok=False, problem="The key is Disabled")
        kms.enable_key(key_arn)
        clock.now += 31
        assert check() == Health(ok=True)

    def test_a_key_to_be_deleted(self, kms: Provider, key_arn: str) -> None:
        kms.schedule_key_deletion(key_arn)
        assert check().problem == "The key is PendingDeletion"

    def test_no_such_key(self, settings: Any) -> None:
        settings.KMS_HASHER = {**settings.KMS_HASHER, "KEY": "alias/no-such"}
        found = check()
        assert not found.ok
        assert "alias/no-such" in found.problem

    @pytest.mark.parametrize(
        "error",
        [
            exceptions.KMSTimeout(),
            exceptions.KMSAccessDenied(),
            exceptions.KMSCredentialsError(),
            exceptions.KMSBadResponse(),
            exceptions.ConfigurationError("no Region"),
            RuntimeError("a provider of the site's own"),
        ],
        ids=lambda error: type(error).__name__,
    )
    def test_an_outage_and_its_end(
        self, error: Exception, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as patch:
            fail(patch, error)
            found = check()
            assert not found.ok
            assert found.problem
        clock.now += 29
        assert not check().ok
        clock.now += 1
        assert check().ok

    @pytest.mark.parametrize(
        "value",
        [
            {},
            "nonsense",
            {"KEY": 5},
            {"KEY": "alias/x", "NONSENSE": 1},
            {"KEY": "alias/x", "PROVIDER": "no.such.Provider"},
            {"KEY": "alias/x", "PROVIDER": "aws", "OPTIONS": {"nonsense": 1}},
            {"KEY": "alias/x", "PROVIDER": "local"},
        ],
    )
    def test_settings_that_cannot_work(self, value: Any, settings: Any) -> None:
        good = settings.KMS_HASHER
        settings.KMS_HASHER = value
        found = check()
        assert not found.ok
        assert found.problem
        settings.KMS_HASHER = good
        assert check().ok

    def test_other_settings_are_asked_about_at_once(
        self, settings: Any, calls: Calls, kms: Provider
    ) -> None:
        assert check().ok
        settings.KMS_HASHER = {**settings.KMS_HASHER, "KEY": "alias/no-such"}
        assert not check().ok
        assert calls() == ["DescribeKey"] * 2


class TestBreaker:
    def test_a_good_answer_does_not_hide_it(self, clock: Clock) -> None:
        assert check().ok
        circuit = open_breaker()
        assert check() == Health(ok=False, problem="KMS could not answer lately")
        circuit.leave(answered=True)
        assert check().ok

    def test_what_is_wrong_besides_is_told(
        self, clock: Clock, kms: Provider, key_arn: str
    ) -> None:
        kms.disable_key(key_arn)
        check()
        open_breaker()
        assert check().problem == "The key is Disabled"

    def test_when_its_time_is_over_kms_is_asked(self, clock: Clock, calls: Calls) -> None:
        """A server that was taken out of service has no logins to find out by."""
        open_breaker()
        assert not check().ok
        clock.now += breaker.SECONDS
        assert check().ok
        assert calls() == ["DescribeKey"]

    def test_another_regions_breaker_is_of_no_account(self, clock: Clock) -> None:
        open_breaker("eu-west-1")
        assert check().ok


class TestFallbackRegions:
    KEY = "arn:aws:kms:eu-central-1:111122223333:key/mrk-1234abcd12ab34cd56ef1234567890ab"

    @pytest.fixture
    def out(self, key_arn: str, settings: Any, monkeypatch: pytest.MonkeyPatch) -> set[str]:
        """The Regions where KMS cannot answer; elsewhere the key is enabled."""
        settings.KMS_HASHER = {
            **settings.KMS_HASHER,
            "KEY": self.KEY,
            "FALLBACK_REGIONS": ["eu-west-1"],
        }
        found: set[str] = set()
        real = keyring.provider().describe_key

        def describe_key(key: str) -> Any:
            if key.split(":")[3] in found:
                raise exceptions.KMSTimeout
            return real(key_arn)

        monkeypatch.setattr(keyring.provider(), "describe_key", describe_key)
        return found

    def test_one_that_answers_is_enough(self, out: set[str], events: list[Any]) -> None:
        out.add("eu-central-1")
        assert check().ok
        assert [event.requested_key.split(":")[3] for event in events] == [
            "eu-central-1",
            "eu-west-1",
        ]

    def test_none_answers(self, out: set[str], clock: Clock) -> None:
        out.update({"eu-central-1", "eu-west-1"})
        assert "did not answer in time" in check().problem
        out.clear()
        clock.now += 30
        assert check().ok

    def test_one_open_breaker_is_not_the_end(self, out: set[str], clock: Clock) -> None:
        open_breaker("eu-central-1")
        assert check().ok
        open_breaker("eu-west-1")
        assert not check().ok


@pytest.mark.everywhere
def test_a_forked_process_asks_for_itself() -> None:
    assert check().ok
    with health._lock:  # as a thread of the parent may hold it
        child = os.fork()
        if child == 0:  # pragma: no cover
            os._exit(0 if health._last is None and check().ok else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_no_file_no_traceback(tmp_path: Path, settings: Any) -> None:
    options = {"path": tmp_path / "none" / "keys.json", "allow_without_debug": True}
    settings.KMS_HASHER = {**settings.KMS_HASHER, "PROVIDER": "local", "OPTIONS": options}
    assert not check().ok
