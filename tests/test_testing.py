"""`kms_hasher.testing`: what it offers to others' tests, and that each part fails when due."""

from __future__ import annotations

import asyncio
import base64
import datetime
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth import get_user_model
from django.contrib.auth.hashers import check_password, make_password
from django.core.management import call_command
from django.test import RequestFactory, TestCase, modify_settings
from django.utils import timezone
from django.views.debug import ExceptionReporter

from kms_hasher import breaker, calls, conf, signals
from kms_hasher.exceptions import (
    ConfigurationError,
    DryRunOperation,
    IncorrectKey,
    InvalidRequest,
    KeyDisabled,
    KMSBadResponse,
    KMSCircuitOpen,
    KMSError,
    KMSThrottled,
    KMSTimeout,
)
from kms_hasher.providers.base import Provider
from kms_hasher.testing import (
    FastKMSArgon2PasswordHasher,
    FaultyProvider,
    InMemoryProvider,
    assert_kms_calls,
    faults,
    override_kms,
)
from kms_hasher.testing.contract import (
    CONTEXT,
    SECRET,
    ProviderContract,
    SealingContract,
    StrictProviderContract,
    silent,
)
from tests.own_provider import SettingsProvider

ROOT = Path(__file__).parents[1]
ALIASES = {
    "alias/tests": "SYMMETRIC_DEFAULT",
    "alias/mac": "HMAC_256",
    "alias/rsa": "RSA_2048",
}


@pytest.fixture
def sealing() -> Iterator[None]:
    """Passwords sealed by a key in memory, and no audit."""
    with override_kms(AUDIT="off"):
        yield


# --- the provider in memory -----------------------------------------------------------


class TestInMemoryContract(StrictProviderContract):
    @pytest.fixture
    def provider(self) -> Provider:
        return InMemoryProvider()


class TestInMemory:
    def test_aliases_are_there_from_the_start(self) -> None:
        provider = InMemoryProvider(aliases=ALIASES)
        assert {name: provider.describe_key(name).spec for name in ALIASES} == ALIASES
        assert provider.generate_mac("alias/mac", b"message").mac
        assert provider.get_public_key("alias/rsa").der
        blob = provider.encrypt("alias/tests", SECRET, CONTEXT).ciphertext
        assert provider.decrypt("alias/tests", blob, CONTEXT).plaintext == SECRET

    @pytest.mark.parametrize("names", [["alias/a", "alias/b"], ("alias/a", "alias/b")])
    def test_names_alone_are_of_symmetric_keys(self, names: Any) -> None:
        provider = InMemoryProvider(aliases=names)
        keys = {provider.describe_key(name).key_arn for name in names}
        assert len(keys) == 2

    @pytest.mark.parametrize(
        ("aliases", "message"),
        [
            (["tests"], "An alias is"),
            (["alias/aws/s3"], "reserved"),
            ({"alias/tests": "ROT_13"}, "ROT_13"),
            ("alias/tests", "a list of aliases"),
        ],
    )
    def test_aliases_that_cannot_be(self, aliases: Any, message: str) -> None:
        with pytest.raises(ConfigurationError, match=message):
            InMemoryProvider(aliases=aliases)

    @pytest.mark.parametrize("options", [{"account": "1"}, {"region": "a:b"}])
    def test_arns_need_an_account_and_a_region(self, options: Any) -> None:
        with pytest.raises(ConfigurationError, match="12 digits"):
            InMemoryProvider(**options)

    def test_an_instance_opens_what_another_has_sealed(self) -> None:
        one, other = (InMemoryProvider(aliases=ALIASES) for _ in range(2))
        sealed = one.encrypt("alias/tests", SECRET, CONTEXT)
        assert other.decrypt(sealed.key_arn, sealed.ciphertext, CONTEXT).plaintext == SECRET

    def test_nothing_else_is_shared(self) -> None:
        one, other = (InMemoryProvider(aliases=["alias/tests"]) for _ in range(2))
        made = one.create_key().key_arn
        one.disable_key(one.describe_key("alias/tests").key_id)
        one.update_alias("alias/tests", made)
        assert other.describe_key("alias/tests").state == "Enabled"
        assert other.describe_key("alias/tests").key_arn != made
        with pytest.raises(KMSError):
            other.describe_key(made)

    def test_another_account_region_or_spec_has_other_keys(self) -> None:
        made = [
            InMemoryProvider(aliases=["alias/tests"], **options)
            for options in ({}, {"account": "1" * 12}, {"region": "eu-west-1"})
        ]
        made.append(InMemoryProvider(aliases={"alias/tests": "HMAC_256"}))
        assert len({one.describe_key("alias/tests").key_id for one in made}) == len(made)

    def test_threads_lose_nothing_of_one_another(self) -> None:
        provider = InMemoryProvider()
        with ThreadPoolExecutor(8) as pool:
            ids = list(pool.map(lambda _: provider.create_key().key_id, range(100)))
        assert {provider.describe_key(id_).key_id for id_ in ids} == set(ids)

    def test_threads_find_the_same_key(self) -> None:
        barrier = threading.Barrier(8)

        def made(_: int) -> str:
            barrier.wait()
            provider = InMemoryProvider(aliases=["alias/tests/raced"])
            return provider.describe_key("alias/tests/raced").key_arn

        with ThreadPoolExecutor(8) as pool:
            assert len(set(pool.map(made, range(8)))) == 1

    def test_a_refused_change_changes_nothing(self) -> None:
        provider = InMemoryProvider(aliases=["alias/tests"])
        before = provider._store.read()
        with pytest.raises(KMSError):
            provider.create_alias("alias/tests", provider.describe_key("alias/tests").key_id)
        assert provider._store.read() is before

    def test_keys_are_not_in_representations(self) -> None:
        provider = InMemoryProvider(aliases=["alias/tests"])
        (stored,) = provider._store.read().keys.values()
        secret = repr(stored.materials[0].secret)[2:12]
        assert secret not in repr(vars(provider)) + repr(vars(provider._store))

    # Other tests' threads hold nothing that the child needs.
    @pytest.mark.everywhere
    @pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
    def test_a_forked_child_has_the_same_keys(self, sealing: None) -> None:
        encoded = make_password("secret")
        child = os.fork()
        if child == 0:  # pragma: no cover - not seen by the parent
            try:
                opened = check_password("secret", encoded)
            except BaseException:  # noqa: BLE001
                os._exit(2)
            os._exit(0 if opened else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# --- faults -----------------------------------------------------------------------------


class TestFaultyContract(ProviderContract):
    @pytest.fixture
    def provider(self) -> FaultyProvider:
        return FaultyProvider("kms_hasher.testing.InMemoryProvider")


@pytest.fixture
def faulty() -> FaultyProvider:
    return FaultyProvider(options={"aliases": ALIASES})


def seal(provider: Any) -> Any:
    return provider.encrypt("alias/tests", SECRET, CONTEXT)


def open_(provider: Any, sealed: Any) -> bytes:
    plaintext: bytes = provider.decrypt(sealed.key_arn, sealed.ciphertext, CONTEXT).plaintext
    return plaintext


class TestFaults:
    def test_without_a_fault_there_is_none(self, faulty: FaultyProvider) -> None:
        assert open_(faulty, seal(faulty)) == SECRET

    @pytest.mark.parametrize("kind", [KMSTimeout, KMSThrottled, KeyDisabled, RuntimeError])
    def test_every_call_until_the_block_ends(
        self, faulty: FaultyProvider, kind: type[Exception]
    ) -> None:
        sealed = seal(faulty)
        with faulty.faults(kind) as fault:
            for call in (seal, lambda p: open_(p, sealed), lambda p: p.create_key()):
                with pytest.raises(kind):
                    call(faulty)
        assert fault.count == 3
        assert open_(faulty, sealed) == SECRET

    def test_an_error_says_what_a_provider_s_own_says(self, faulty: FaultyProvider) -> None:
        with faulty.faults(KeyDisabled), pytest.raises(KeyDisabled) as caught:
            seal(faulty)
        error = caught.value
        assert (error.operation, error.key) == ("Encrypt", "alias/tests")
        assert error.code == "DisabledException"
        with faulty.faults(KMSTimeout), pytest.raises(KMSTimeout) as timeout:
            faulty.describe_key(key="alias/tests")
        assert (timeout.value.operation, timeout.value.key) == ("DescribeKey", "alias/tests")

    def test_an_error_as_it_is_given(self, faulty: FaultyProvider) -> None:
        given = KMSThrottled("slow down", code="ThrottlingException", request_ids=("1",))
        raised = []
        with faulty.faults(given):
            for _ in range(2):
                with pytest.raises(KMSThrottled, match="slow down") as caught:
                    seal(faulty)
                raised.append(caught.value)
        assert [(one.code, one.request_ids) for one in raised] == [
            ("ThrottlingException", ("1",))
        ] * 2
        # Each call has an error of its own, and the test's is as it was.
        assert raised[0] is not raised[1]
        assert (given.operation, given.__traceback__) == ("", None)

    def test_one_operation_alone(self, faulty: FaultyProvider) -> None:
        sealed = seal(faulty)
        with faulty.faults(KMSTimeout, "Decrypt", "ReEncrypt"):
            assert seal(faulty).ciphertext
            with pytest.raises(KMSTimeout):
                open_(faulty, sealed)

    def test_the_next_calls_alone(self, faulty: FaultyProvider) -> None:
        sealed = seal(faulty)
        with faulty.faults(KMSTimeout, "Decrypt", times=2) as fault:
            for _ in range(2):
                with pytest.raises(KMSTimeout):
                    open_(faulty, sealed)
            assert open_(faulty, sealed) == SECRET
        assert fault.count == 2

    def test_the_inner_block_counts(self, faulty: FaultyProvider) -> None:
        with faulty.faults(KMSTimeout):
            with faulty.faults(KMSThrottled, times=1), pytest.raises(KMSThrottled):
                seal(faulty)
            with pytest.raises(KMSTimeout):
                seal(faulty)

    def test_a_block_that_fails_ends_too(self, faulty: FaultyProvider) -> None:
        with pytest.raises(ZeroDivisionError), faulty.faults(KMSTimeout):
            _ = 1 / 0
        assert seal(faulty).ciphertext

    def test_before_the_call_or_after(self, faulty: FaultyProvider) -> None:
        arn = faulty.describe_key("alias/tests").key_arn
        with faulty.faults(KMSTimeout), pytest.raises(KMSTimeout):
            faulty.disable_key(arn)
        assert faulty.describe_key(arn).state == "Enabled"
        with faulty.faults(KMSTimeout, after=True), pytest.raises(KMSTimeout):
            faulty.disable_key(arn)
        assert faulty.describe_key(arn).state == "Disabled"

    def test_what_the_provider_refuses_it_refuses(self, faulty: FaultyProvider) -> None:
        for fault in ({"what": KMSTimeout, "after": True}, {"what": "short"}):
            with (
                faulty.faults(fault.pop("what"), **fault),
                pytest.raises(DryRunOperation),
            ):
                faulty.encrypt("alias/tests", SECRET, CONTEXT, dry_run=True)

    @pytest.mark.parametrize(
        ("damage", "expected"),
        [("missing", b""), ("short", SECRET[:-1]), ("long", SECRET + b"\x00")],
    )
    def test_damaged_answers(
        self, faulty: FaultyProvider, damage: str, expected: bytes
    ) -> None:
        sealed = seal(faulty)
        with faulty.faults(damage, "Decrypt"):
            assert open_(faulty, sealed) == expected
        assert open_(faulty, sealed) == SECRET

    def test_every_answer_with_bytes_can_be_damaged(self, faulty: FaultyProvider) -> None:
        sealed = seal(faulty)
        with faulty.faults("missing") as fault:
            assert seal(faulty).ciphertext == b""
            assert faulty.generate_mac("alias/mac", b"message").mac == b""
            data_key = faulty.generate_data_key("alias/tests", CONTEXT)
            assert (data_key.plaintext, data_key.ciphertext) == (b"", b"")
            moved = faulty.re_encrypt(
                sealed.key_arn, sealed.ciphertext, CONTEXT, "alias/tests", CONTEXT
            )
            assert (moved.ciphertext, moved.source_key_arn) == (b"", sealed.key_arn)
            assert faulty.get_public_key("alias/rsa").der == b""
            # Not damaged, and not counted.
            assert faulty.describe_key("alias/tests").key_arn == sealed.key_arn
        assert fault.count == 5

    @pytest.mark.parametrize(
        ("arguments", "options", "error"),
        [
            ((KMSTimeout, "decrypt"), {}, ValueError),
            ((KMSTimeout, "Sign"), {}, ValueError),
            (("short", "DescribeKey"), {}, ValueError),
            (("shorter",), {}, ValueError),
            ((KMSTimeout,), {"times": 0}, ValueError),
            ((None,), {}, TypeError),
            ((KeyboardInterrupt,), {}, TypeError),
        ],
    )
    def test_what_is_no_fault(
        self,
        faulty: FaultyProvider,
        arguments: tuple[Any, ...],
        options: dict[str, Any],
        error: type[Exception],
    ) -> None:
        with pytest.raises(error), faulty.faults(*arguments, **options):
            pytest.fail("the block is not entered")

    def test_threads_share_the_calls_that_fail(self, faulty: FaultyProvider) -> None:
        def fails(_: int) -> bool:
            try:
                seal(faulty)
            except KMSTimeout:
                return True
            return False

        with faulty.faults(KMSTimeout, times=30) as fault, ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(fails, range(100))) == fault.count == 30

    def test_coroutine_functions_fail_as_well(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async def aencrypt(self: Any, *args: Any, **kwargs: Any) -> Any:
            return self.encrypt(*args, **kwargs)

        monkeypatch.setattr(InMemoryProvider, "aencrypt", aencrypt, raising=False)
        faulty = FaultyProvider(options={"aliases": ["alias/tests"]})

        async def attempt() -> Any:
            return await faulty.aencrypt("alias/tests", SECRET, CONTEXT)

        assert len(asyncio.run(attempt()).ciphertext) == 184
        with faulty.faults("short", "Encrypt"):
            assert len(asyncio.run(attempt()).ciphertext) == 183
        for after in (False, True):
            with faulty.faults(KMSTimeout, "Encrypt", after=after), pytest.raises(KMSTimeout):
                asyncio.run(attempt())
        with pytest.raises(AttributeError):
            _ = faulty.adecrypt

    def test_the_rest_of_the_provider_is_there(self, faulty: FaultyProvider) -> None:
        assert faulty.clock() <= datetime.datetime.now(datetime.timezone.utc)
        assert (faulty.region, faulty.provider.region) == ("local-1", "local-1")
        faulty.close()
        with pytest.raises(AttributeError):
            _ = faulty.nothing

    @pytest.mark.parametrize(
        "arguments",
        [("nowhere.Provider",), ("local",), ("kms_hasher.testing.InMemoryProvider", {"x": 1})],
    )
    def test_providers_that_cannot_be_made(self, arguments: Any) -> None:
        with pytest.raises(ConfigurationError):
            FaultyProvider(*arguments)

    def test_django_s_error_report_shows_no_plaintext(self, faulty: FaultyProvider) -> None:
        for after in (False, True):
            try:
                with faulty.faults(KMSTimeout, after=after):
                    seal(faulty)
            except KMSTimeout:
                report = ExceptionReporter(RequestFactory().get("/"), *sys.exc_info())
            frames = report.get_traceback_frames()
            assert any(frame["filename"].endswith("_faults.py") for frame in frames)
            silent([frame["vars"] for frame in frames[1:]])


@pytest.mark.usefixtures("sealing")
class TestFaultsOfTheProviderInUse:
    def test_an_outage_is_no_wrong_password(self) -> None:
        encoded = make_password("secret")
        with faults(KMSTimeout), pytest.raises(KMSTimeout):
            check_password("secret", encoded)
        assert check_password("secret", encoded)

    @pytest.mark.parametrize("damage", ["missing", "short", "long"])
    def test_a_damaged_digest_is_no_wrong_password(self, damage: str) -> None:
        encoded = make_password("secret")
        with faults(damage, "Decrypt"), pytest.raises(KMSBadResponse):
            check_password("secret", encoded)

    def test_the_breaker_does_not_outlast_the_block(self) -> None:
        encoded = make_password("secret")
        with faults(KMSTimeout) as fault:
            for _ in range(breaker.FAILURES):
                with pytest.raises(KMSTimeout):
                    check_password("secret", encoded)
            with pytest.raises(KMSCircuitOpen):
                check_password("secret", encoded)
        assert fault.count == breaker.FAILURES
        assert check_password("secret", encoded)

    def test_another_provider_is_told_of(self) -> None:
        with (
            override_kms(PROVIDER="kms_hasher.testing.InMemoryProvider", OPTIONS={}),
            pytest.raises(ConfigurationError, match=r"FaultyProvider.*InMemoryProvider"),
            faults(KMSTimeout),
        ):
            pytest.fail("the block is not entered")


# --- calls ------------------------------------------------------------------------------


def event(operation: str, **more: Any) -> signals.Event:
    return signals.Event(timezone.now(), operation, "login", signals.SUCCESS, **more)


@pytest.mark.usefixtures("sealing")
class TestCalls:
    def test_just_these_calls(self) -> None:
        with assert_kms_calls("Encrypt") as made:
            encoded = make_password("secret")
        assert [call.purpose for call in made] == ["set"]
        with assert_kms_calls("Decrypt", "Encrypt"):
            make_password("secret")
            check_password("secret", encoded)
        with assert_kms_calls(Encrypt=2, Decrypt=1), assert_kms_calls("Decrypt", Encrypt=2):
            make_password("secret")
            check_password("secret", encoded)
            make_password("secret")
        with assert_kms_calls(), assert_kms_calls(Decrypt=0):
            make_password(None)

    def test_it_shows_what_was_made(self) -> None:
        with pytest.raises(AssertionError) as caught, assert_kms_calls(Decrypt=2):
            make_password("secret")
        assert str(caught.value) == (
            "Calls to KMS: expected Decrypt=2; 1 made.\n"
            "1. Encrypt for set: success, key alias/tests"
        )
        with pytest.raises(AssertionError) as caught, assert_kms_calls("Encrypt"):
            pass
        assert str(caught.value) == "Calls to KMS: expected Encrypt=1; none made."

    def test_more_calls_than_expected(self) -> None:
        more = pytest.raises(AssertionError, match="expected Encrypt=1; 2 made")
        with more, assert_kms_calls("Encrypt"):
            make_password("secret")
            make_password("secret")
        with pytest.raises(AssertionError, match="expected none; 1 made"), assert_kms_calls():
            make_password("secret")

    def test_a_call_that_fails_is_a_call(self) -> None:
        encoded = make_password("secret")
        with (
            pytest.raises(AssertionError) as caught,
            assert_kms_calls(),
            faults(KMSTimeout),
            pytest.raises(KMSTimeout),
        ):
            check_password("secret", encoded)
        assert "1. Decrypt for login: unavailable (KMSTimeout), key " in str(caught.value)

    def test_calls_of_all_threads(self) -> None:
        encoded = make_password("secret")
        with assert_kms_calls(Decrypt=20), ThreadPoolExecutor(4) as pool:
            assert all(pool.map(lambda _: check_password("secret", encoded), range(20)))

    def test_what_is_no_call(self) -> None:
        encoded = make_password("secret")
        with assert_kms_calls(Decrypt=breaker.FAILURES) as made, faults(KMSTimeout):
            # The last opens the breaker, which is an event, and holds back the next call.
            for _ in range(breaker.FAILURES + 1):
                with pytest.raises(KMSError):
                    check_password("secret", encoded)
            assert not check_password("secret", "kms_argon2$not$readable")
        assert {call.operation for call in made} == {"Decrypt"}
        with assert_kms_calls():
            signals.emit(event(signals.PARSE))
            signals.emit(event(signals.CIRCUIT_BREAKER))

    def test_an_error_of_the_block_passes(self) -> None:
        with pytest.raises(ZeroDivisionError), assert_kms_calls("Decrypt"):
            _ = 1 / 0

    def test_nobody_listens_afterwards(self) -> None:
        before = len(signals.kms_event.receivers)
        with assert_kms_calls() as made:
            assert len(signals.kms_event.receivers) == before + 1
        make_password("secret")
        assert made == []
        assert len(signals.kms_event.receivers) == before

    @pytest.mark.parametrize("name", ["decrypt", "Parse", "CircuitBreaker", "Sign"])
    def test_what_is_no_operation(self, name: str) -> None:
        with pytest.raises(ValueError, match=name), assert_kms_calls(name):
            pytest.fail("the block is not entered")
        with pytest.raises(ValueError, match=name), assert_kms_calls(**{name: 1}):
            pytest.fail("the block is not entered")


# --- a project's tests ------------------------------------------------------------------


@override_kms()
class ProjectTests(TestCase):
    """A test case of a project, as docs/how-to/test.md has it."""

    @classmethod
    def setUpTestData(cls) -> None:
        cls.user = get_user_model().objects.create_user("ada", password="secret")

    def test_passwords_are_sealed(self) -> None:
        self.assertTrue(self.user.password.startswith("kms_argon2$"))

    def test_a_login_is_one_call(self) -> None:
        with assert_kms_calls("Decrypt"):
            self.assertTrue(self.client.login(username="ada", password="secret"))

    def test_an_outage(self) -> None:
        with faults(KMSTimeout), self.assertRaises(KMSTimeout):
            self.client.login(username="ada", password="secret")

    @modify_settings(MIDDLEWARE={"prepend": "kms_hasher.middleware.KMSUnavailableMiddleware"})
    def test_an_outage_is_a_page(self) -> None:
        credentials = {"username": "ada", "password": "secret"}
        with faults(KMSTimeout):
            response = self.client.post("/admin/login/", credentials)
        self.assertEqual(response.status_code, 503)

    def test_events_roll_back_with_the_test(self) -> None:
        from kms_hasher.models import AuditEvent

        before = AuditEvent.objects.count()
        self.client.login(username="ada", password="secret")
        self.assertGreater(AuditEvent.objects.count(), before)

    def test_settings_may_be_overridden_once_more(self) -> None:
        with override_kms(OPTIONS={"options": {"aliases": ["alias/tests", "alias/other"]}}):
            self.assertTrue(self.user.check_password("secret"))
        self.assertTrue(self.user.check_password("secret"))


@pytest.mark.django_db
def test_a_rotation_with_faults() -> None:
    with override_kms():
        user = get_user_model().objects.create_user("ada", password="secret")
        with faults(KMSTimeout, "ReEncrypt", times=1, after=True) as fault:
            call_command(
                "rotate_kms_key", new_key=True, settle=0, verbosity=0, interactive=False
            )
        assert fault.count == 1
        before, _ = user.password, user.refresh_from_db()
        assert user.password != before
        assert user.check_password("secret")


def test_the_hasher_is_django_s_first_and_the_only_one_of_its_kind(settings: Any) -> None:
    own = "kms_hasher.hashers.KMSArgon2PasswordHasher"
    stock = "django.contrib.auth.hashers.PBKDF2PasswordHasher"
    settings.PASSWORD_HASHERS = [own, stock]
    fast = "kms_hasher.testing.FastKMSArgon2PasswordHasher"
    assert override_kms().options["PASSWORD_HASHERS"] == [fast, stock]
    assert (FastKMSArgon2PasswordHasher.time_cost, FastKMSArgon2PasswordHasher.memory_cost) == (
        1,
        8,
    )


def test_changes_to_the_settings(settings: Any) -> None:
    before = settings.KMS_HASHER
    with override_kms(AUDIT="off", DEPLOYMENT="blue"):
        assert (conf.get().audit, conf.get().deployment) == ("off", "blue")
        assert isinstance(calls.provider(), FaultyProvider)
    assert before == settings.KMS_HASHER


@pytest.mark.everywhere
def test_nothing_here_needs_pytest_or_models() -> None:
    code = (
        "import sys, kms_hasher.testing\n"
        "assert 'pytest' not in sys.modules, 'pytest'\n"
        "assert 'kms_hasher.models' not in sys.modules, 'models'\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "DJANGO_SETTINGS_MODULE": "tests.settings"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# --- a provider of one's own ------------------------------------------------------------

KEYS = {
    "3a7bd3e2-360a-43d8-9ee5-6f6e2c1f0b57": base64.b64encode(bytes(range(32))).decode(),
    "8c2f5a0e-91d4-4b6c-8a53-0f4d7e9b1c66": base64.b64encode(bytes(range(32, 64))).decode(),
}
OLD, NEW = KEYS


class TestTheDocumentedProvider(SealingContract):
    """As docs/reference/providers.md has it."""

    @pytest.fixture
    def provider(self) -> Any:
        return SettingsProvider(keys=KEYS)

    @pytest.fixture
    def key(self, provider: Any) -> Any:
        return provider.describe_key(OLD)

    @pytest.fixture
    def target(self, provider: Any) -> Any:
        return provider.describe_key(NEW).key_arn

    def test_keys_are_not_managed_by_it(self, provider: Any) -> None:
        for call in (provider.create_key, lambda: provider.disable_key(OLD)):
            with pytest.raises(InvalidRequest) as caught:
                call()
            assert caught.value.code == "UnsupportedOperationException"
        assert (caught.value.operation, caught.value.key) == ("DisableKey", OLD)

    @pytest.mark.parametrize("keys", [{OLD: "c2hvcnQ="}, {OLD: "*"}, {"1": KEYS[OLD]}, []])
    def test_keys_that_cannot_be(self, keys: Any) -> None:
        with pytest.raises(ConfigurationError) as caught:
            SettingsProvider(keys=keys)
        assert KEYS[OLD] not in str(caught.value)

    def test_there_is_no_rsa(self, provider: Any) -> None:
        with pytest.raises(InvalidRequest):
            provider.encrypt(OLD, SECRET, {}, algorithm="RSAES_OAEP_SHA_256")

    def test_another_key_s_blob(self, provider: Any) -> None:
        blob = provider.encrypt(OLD, SECRET, CONTEXT).ciphertext
        with pytest.raises(IncorrectKey):
            provider.decrypt(NEW, blob, CONTEXT)

    def test_a_dry_run(self, provider: Any) -> None:
        with pytest.raises(DryRunOperation):
            provider.encrypt(OLD, SECRET, {}, dry_run=True)


def test_the_page_shows_the_provider_that_is_tested() -> None:
    # The documentation is beside the tests in a checkout, and not under tox.
    source = (ROOT / "tests" / "own_provider.py").read_text()
    page = ROOT / "docs" / "reference" / "providers.md"
    assert source in (page.read_text() if page.exists() else source)


@pytest.mark.django_db
def test_passwords_move_to_another_key_of_the_documented_provider() -> None:
    options = {
        "PROVIDER": "tests.own_provider.SettingsProvider",
        "OPTIONS": {"keys": KEYS},
    }
    with override_kms(KEY=OLD, **options):
        user = get_user_model().objects.create_user("ada", password="secret")
    with override_kms(KEY=NEW, **options):
        call_command("rotate_kms_key", settle=0, verbosity=0, interactive=False)
        before, _ = user.password, user.refresh_from_db()
        assert user.password != before
        with assert_kms_calls("Decrypt") as made:
            assert user.check_password("secret")
        assert made[0].key.endswith(NEW)


# --- the contract fails when it should --------------------------------------------------

BROKEN = """
import dataclasses
import os
import pytest
from kms_hasher.exceptions import InvalidCiphertext, InvalidRequest
from kms_hasher.testing import InMemoryProvider
from kms_hasher.testing.contract import StrictProviderContract

class Contract(StrictProviderContract):
    @pytest.fixture
    def provider(self):
        return self.Provider()

class TestSound(Contract):
    Provider = InMemoryProvider

class TestNoContext(Contract):
    class Provider(InMemoryProvider):
        def encrypt(self, key, plaintext, context, **options):
            return super().encrypt(key, plaintext, {}, **options)

        def decrypt(self, key, ciphertext, context, **options):
            return super().decrypt(key, ciphertext, {}, **options)

class TestTrusting(Contract):
    class Provider(InMemoryProvider):
        def decrypt(self, key, ciphertext, context, **options):
            try:
                return super().decrypt(key, ciphertext, context, **options)
            except InvalidCiphertext:
                return dataclasses.replace(super().encrypt(key, b"x", {}), key_arn=key)

class TestTalkative(Contract):
    class Provider(InMemoryProvider):
        def encrypt(self, key, plaintext, context, **options):
            if len(plaintext) > 4096:
                raise InvalidRequest(f"too long: {plaintext}", operation="Encrypt", key=key)
            return super().encrypt(key, plaintext, context, **options)

class TestNoIds(Contract):
    class Provider(InMemoryProvider):
        def encrypt(self, *args, **kwargs):
            return dataclasses.replace(super().encrypt(*args, **kwargs), request_ids=())

class TestStatesNoArn(Contract):
    class Provider(InMemoryProvider):
        def encrypt(self, key, *args, **kwargs):
            return dataclasses.replace(super().encrypt(key, *args, **kwargs), key_arn=key)

class TestForeignErrors(Contract):
    class Provider(InMemoryProvider):
        def describe_key(self, key):
            try:
                return super().describe_key(key)
            except Exception:
                raise LookupError(key)

class TestCuts(Contract):
    class Provider(InMemoryProvider):
        def decrypt(self, *args, **kwargs):
            opened = super().decrypt(*args, **kwargs)
            return dataclasses.replace(opened, plaintext=opened.plaintext[:31])

class TestDrawsMacs(Contract):
    class Provider(InMemoryProvider):
        def generate_mac(self, key, message):
            return dataclasses.replace(super().generate_mac(key, message), mac=os.urandom(32))

class TestLeavesAliases(Contract):
    class Provider(InMemoryProvider):
        def update_alias(self, alias, key):
            return self.describe_key(key)

class TestLongBlobs(Contract):
    class Provider(InMemoryProvider):
        def encrypt(self, *args, **kwargs):
            sealed = super().encrypt(*args, **kwargs)
            return dataclasses.replace(sealed, ciphertext=sealed.ciphertext + b"x")

class TestNeverDisables(Contract):
    class Provider(InMemoryProvider):
        def disable_key(self, key):
            return self.enable_key(key)

class TestNeverDeletes(Contract):
    class Provider(InMemoryProvider):
        def schedule_key_deletion(self, key, days=30):
            return super().schedule_key_deletion(key, 30)

class TestForgetsMaterial(Contract):
    class Provider(InMemoryProvider):
        def rotate_key_on_demand(self, key):
            result = super().rotate_key_on_demand(key)
            with self._store.change() as keys:
                for id_, stored in keys.keys.items():
                    newest = stored.materials[-1:]
                    keys.keys[id_] = dataclasses.replace(stored, materials=newest)
            return result

class TestNeverDry(Contract):
    class Provider(InMemoryProvider):
        def encrypt(self, *args, dry_run=False, **kwargs):
            return super().encrypt(*args, **kwargs)

class TestDropsContext(Contract):
    class Provider(InMemoryProvider):
        def encrypt(self, key, plaintext, context, *, algorithm="SYMMETRIC_DEFAULT"):
            context = context if algorithm == "SYMMETRIC_DEFAULT" else {}
            return super().encrypt(key, plaintext, context, algorithm=algorithm)
"""

#: The test that must fail for each of the classes above.
FAILS = {
    "TestNoContext": "test_each_context_opens_only_its_own",
    "TestTrusting": "test_a_truncated_or_altered_end_does_not_open",
    "TestTalkative": "test_plaintext_out_of_bounds",
    "TestNoIds": "test_every_call_has_its_own_request_id",
    "TestStatesNoArn": "test_round_trip_by_every_name",
    "TestForeignErrors": "test_a_key_that_is_not_there",
    "TestCuts": "test_round_trip_by_every_name",
    "TestDrawsMacs": "test_mac",
    "TestLeavesAliases": "test_an_alias_moves_and_old_blobs_stay_with_their_key",
    "TestLongBlobs": "test_the_size_of_a_sealed_digest",
    "TestNeverDisables": "test_a_disabled_key_does_nothing",
    "TestNeverDeletes": "test_a_key_is_gone_when_its_day_has_come",
    "TestForgetsMaterial": "test_rotation_on_demand_keeps_the_arn_and_old_blobs",
    "TestNeverDry": "test_a_dry_run_of_what_is_allowed",
    "TestDropsContext": "test_rsa_takes_no_context",
}


@pytest.mark.everywhere
def test_the_contract_finds_what_is_broken(tmp_path: Path) -> None:
    path = tmp_path / "test_broken.py"
    path.write_text(BROKEN)
    ids = [f"{path}::{cls}::{name}" for cls, name in FAILS.items()]
    ids += [f"{path}::TestSound::{name}" for name in sorted(set(FAILS.values()))]
    options = ["-q", "-rf", "-p", "no:cacheprovider", f"--rootdir={tmp_path}"]
    options += ["-o", "addopts=", "-o", "filterwarnings=error"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *ids],
        env={**os.environ, "DJANGO_SETTINGS_MODULE": "tests.settings"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    failed = {
        line.split("::")[1] for line in done.stdout.splitlines() if line.startswith("FAILED")
    }
    assert failed == set(FAILS), done.stdout + done.stderr
    # pytest has rewritten the asserts: it shows what was compared.
    assert "AssertionError: assert b'hunter2!" in done.stdout
