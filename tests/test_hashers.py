"""Django's hasher contract, one call to KMS each, and nothing that makes a hasher raise."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import bcrypt
import pytest
from django.contrib.auth.hashers import (
    check_password,
    get_hasher,
    identify_hasher,
    make_password,
)
from django.core.exceptions import PermissionDenied
from django.test import override_settings
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from kms_hasher import encoding, exceptions, keyring
from kms_hasher.exceptions import KMSError
from kms_hasher.hashers import KMSArgon2PasswordHasher, KMSBCryptPasswordHasher
from kms_hasher.providers.base import Decrypted, Provider
from kms_hasher.signals import Event
from tests.hashers import CheapArgon2PasswordHasher, CheapKMSArgon2PasswordHasher

PASSWORD = "correct horse battery staple"

pytestmark = pytest.mark.usefixtures("no_audit")
Calls = Callable[[], list[str]]


@pytest.fixture
def no_audit(settings: Any) -> None:
    settings.KMS_HASHER = {**settings.KMS_HASHER, "AUDIT": "off"}


@pytest.fixture(scope="module")
def encoded() -> str:
    return CheapKMSArgon2PasswordHasher().encode(PASSWORD, "saltsaltsaltsaltsalt00")


@pytest.fixture
def hasher() -> CheapKMSArgon2PasswordHasher:
    return CheapKMSArgon2PasswordHasher()


class TestContract:
    def test_round_trip_by_one_call_each(self, calls: Calls) -> None:
        encoded = make_password(PASSWORD)
        assert calls() == ["Encrypt"]
        assert check_password(PASSWORD, encoded)
        assert calls() == ["Encrypt", "Decrypt"]
        assert not check_password(PASSWORD + "!", encoded)
        assert calls() == ["Encrypt", "Decrypt", "Decrypt"]

    def test_what_is_stored(self, key_arn: str) -> None:
        stored = encoding.parse(make_password(PASSWORD))
        assert stored.header.algorithm == "kms_argon2"
        assert stored.key_id == key_arn.rpartition("/")[2]
        assert len(stored.sealed) == 184  # as AWS KMS makes of 32 bytes
        assert len(stored.header.salt) == 22

    def test_default_costs_are_those_of_django(self) -> None:
        stored = encoding.parse(make_password(PASSWORD, hasher=KMSArgon2PasswordHasher()))
        assert str(stored.header.parameters) == "m=102400,t=2,p=8"
        assert len(str(stored)) == 330

    def test_django_finds_the_hasher(self, encoded: str) -> None:
        assert isinstance(identify_hasher(encoded), CheapKMSArgon2PasswordHasher)
        assert get_hasher().algorithm == "kms_argon2"

    def test_same_digest_as_django(self, encoded: str) -> None:
        stored = encoding.parse(encoded)
        stock = CheapArgon2PasswordHasher().encode(PASSWORD, "saltsaltsaltsaltsalt00")
        assert encoding.format_stock(stored.header, keyring.open(stored)) == stock

    def test_bytes_passwords(self, encoded: str, hasher: CheapKMSArgon2PasswordHasher) -> None:
        assert hasher.verify(PASSWORD.encode(), encoded)

    @pytest.mark.parametrize(
        "salt", ["s\u00e4lts\u00e4lt", "salt salt|=", "\u4f60\u597d\u4f60\u597d"]
    )
    def test_any_salt_that_django_allows(
        self, salt: str, hasher: CheapKMSArgon2PasswordHasher
    ) -> None:
        encoded = hasher.encode(PASSWORD, salt)
        assert hasher.verify(PASSWORD, encoded)
        assert str(encoding.parse(encoded)) == encoded

    @pytest.mark.parametrize(
        ("password", "salt", "error"),
        [
            (None, "saltsalt", TypeError),
            ("x", "", ValueError),
            ("x", "salt$salt", ValueError),
            ("x", "short", ValueError),
        ],
    )
    def test_bad_arguments_make_no_call(
        self,
        password: Any,
        salt: str,
        error: type[Exception],
        hasher: CheapKMSArgon2PasswordHasher,
        calls: Calls,
    ) -> None:
        with pytest.raises(error):
            hasher.encode(password, salt)
        assert calls() == []

    def test_nothing_but_encode_and_verify_calls_kms(
        self, encoded: str, hasher: CheapKMSArgon2PasswordHasher, calls: Calls
    ) -> None:
        hasher.decode(encoded)
        hasher.safe_summary(encoded)
        hasher.must_update(encoded)
        hasher.harden_runtime(PASSWORD, encoded)
        assert calls() == []

    def test_decode(self, encoded: str, hasher: CheapKMSArgon2PasswordHasher) -> None:
        decoded = hasher.decode(encoded)
        assert decoded["algorithm"] == "kms_argon2"
        assert decoded["salt"] == "saltsaltsaltsaltsalt00"
        assert (decoded["memory_cost"], decoded["time_cost"], decoded["parallelism"]) == (
            8,
            1,
            1,
        )
        assert (decoded["variety"], decoded["version"]) == ("argon2id", 19)

    def test_safe_summary_is_short_and_masked(
        self, encoded: str, hasher: CheapKMSArgon2PasswordHasher, key_arn: str
    ) -> None:
        summary = hasher.safe_summary(encoded)
        assert summary["sealed by KMS key"] == key_arn.rpartition("/")[2]
        assert summary["salt"] == "saltsa****************"
        assert summary["hash"].endswith("******")
        assert max(len(str(value)) for value in summary.values()) < 60

    def test_upgrade_of_a_stock_hash_at_login(self, calls: Calls) -> None:
        stock = make_password(PASSWORD, hasher=CheapArgon2PasswordHasher())
        upgraded: list[str] = []
        assert check_password(PASSWORD, stock, setter=upgraded.append)
        assert upgraded == [PASSWORD]
        assert calls() == []

    def test_users_of_other_hashers_need_no_kms(self) -> None:
        stock = make_password(PASSWORD, hasher=CheapArgon2PasswordHasher())
        with override_settings(KMS_HASHER={"KYE": "broken"}):
            assert check_password(PASSWORD, stock)
            assert not check_password("wrong", stock)


class TestMustUpdate:
    def test_not_for_a_fresh_hash(
        self, encoded: str, hasher: CheapKMSArgon2PasswordHasher
    ) -> None:
        assert hasher.must_update(encoded) is False

    def test_for_other_costs(self, encoded: str) -> None:
        assert KMSArgon2PasswordHasher().must_update(encoded) is True

    def test_for_a_weak_salt(self, hasher: CheapKMSArgon2PasswordHasher) -> None:
        assert hasher.must_update(hasher.encode(PASSWORD, "saltsalt")) is True

    def test_not_for_another_key(
        self, kms: Provider, encoded: str, hasher: CheapKMSArgon2PasswordHasher
    ) -> None:
        other = kms.create_key().key_arn
        kms.update_alias("alias/tests", other)
        assert encoding.parse(hasher.encode(PASSWORD, "saltsaltsaltsaltsalt00")).key_id in other
        assert hasher.must_update(encoded) is False
        assert hasher.verify(PASSWORD, encoded)

    def test_a_wrong_password_of_an_old_hash_costs_one_call(
        self, encoded: str, settings: Any, calls: Calls
    ) -> None:
        settings.PASSWORD_HASHERS = ["kms_hasher.hashers.KMSArgon2PasswordHasher"]
        assert not check_password("wrong", encoded)
        assert calls() == ["Decrypt"]


class TestMovedAlias:
    def test_new_passwords_use_the_new_key_at_once(self, kms: Provider) -> None:
        other = kms.create_key().key_arn
        kms.update_alias("alias/tests", other)
        stored = encoding.parse(make_password(PASSWORD))
        assert stored.key_id == other.rpartition("/")[2]

    def test_old_passwords_open_by_their_own_key(self, kms: Provider, encoded: str) -> None:
        kms.update_alias("alias/tests", kms.create_key().key_arn)
        assert check_password(PASSWORD, encoded)


def no_match(encoded: str) -> bool:
    """Whether a bad string is one that does not match and does not raise anywhere."""
    hasher = CheapKMSArgon2PasswordHasher()
    hasher.decode(encoded)
    hasher.must_update(encoded)
    hasher.harden_runtime(PASSWORD, encoded)
    assert all(isinstance(label, str) for label in hasher.safe_summary(encoded))
    return not hasher.verify(PASSWORD, encoded)


class TestBadStrings:
    """Whatever stands in the column: no match, a warning, an event, never a traceback."""

    @given(st.text() | st.text(alphabet="kms_argon2$d1=,tpv0a").map("kms_argon2$".__add__))
    @example("kms_argon2")
    @example("kms_argon2$d1$$$$")
    @hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_any_text(self, text: str) -> None:
        assert no_match(text)

    def test_every_bit(self, encoded: str) -> None:
        for index, character in enumerate(encoded):
            for bit in range(7):
                changed = chr(ord(character) ^ (1 << bit))
                assert no_match(encoded[:index] + changed + encoded[index + 1 :])

    def test_every_truncation(self, encoded: str) -> None:
        for end in range(len(encoded)):
            assert no_match(encoded[:end])

    def test_another_rows_blob(
        self, encoded: str, hasher: CheapKMSArgon2PasswordHasher
    ) -> None:
        other = hasher.encode(PASSWORD, "SALTsaltSALTsaltSALT00")
        head = encoded.rpartition("$")[0]
        assert no_match(f"{head}${other.rpartition('$')[2]}")

    def test_another_sites_blob(self, encoded: str, settings: Any) -> None:
        settings.KMS_HASHER = {**settings.KMS_HASHER, "DEPLOYMENT": "staging"}
        assert no_match(encoded)
        own = make_password(PASSWORD)
        assert check_password(PASSWORD, own)
        settings.KMS_HASHER = {**settings.KMS_HASHER, "DEPLOYMENT": ""}
        assert no_match(own)

    def test_another_keys_blob(self, kms: Provider, encoded: str) -> None:
        stored = encoding.parse(encoded)
        other = encoding.key_ref(kms.create_key().key_arn)
        assert no_match(str(encoding.SealedHash(stored.header, "d1", other, stored.sealed)))

    @pytest.mark.parametrize(
        ("mode", "asked"),
        [("p1", "Decrypt"), ("e1", "Parse"), ("m1", "Parse"), ("n1", "Parse"), ("d2", "Parse")],
    )
    def test_another_mode(self, mode: str, asked: str, encoded: str, calls: Calls) -> None:
        assert no_match(encoded.replace("$d1$", f"${mode}$"))
        assert calls() == [asked]

    @pytest.mark.parametrize(
        "costs",
        ["m=4294967295,t=1,p=1", "m=1048576,t=5,p=1", "m=8,t=4294967295,p=1", "m=800,t=1,p=65"],
    )
    def test_absurd_costs_are_not_run(self, costs: str, encoded: str, calls: Calls) -> None:
        assert no_match(encoded.replace("m=8,t=1,p=1", costs))
        assert calls() == ["Parse"]

    def test_the_sites_own_costs_are_never_absurd(self, encoded: str) -> None:
        class Heavy(CheapKMSArgon2PasswordHasher):
            time_cost = 9
            max_work = 8

        own = Heavy().encode(PASSWORD, "saltsaltsaltsaltsalt00")
        assert Heavy().verify(PASSWORD, own)

    def test_another_hashers_string(self, encoded: str) -> None:
        assert no_match(encoded.replace("kms_argon2", "kms_argon3"))

    def test_reported(
        self, events: list[Event], caplog: pytest.LogCaptureFixture, encoded: str
    ) -> None:
        with caplog.at_level(logging.WARNING, logger="kms_hasher"):
            assert no_match(encoded + "$")
            assert no_match(encoded[:-5] + "AAAAA")
        assert [event.outcome for event in events] == ["invalid", "invalid"]
        assert [event.operation for event in events] == ["Parse", "Decrypt"]
        assert [record.name for record in caplog.records].count("kms_hasher") == 2
        assert "saltsalt" not in caplog.text
        assert encoded[-20:-5] not in caplog.text

    @pytest.mark.parametrize("password", ["x" * 73, "x\0", "\0"], ids=["long", "NUL", "NULs"])
    def test_a_password_that_bcrypt_refuses_says_nothing_of_the_string(
        self,
        password: str,
        events: list[Event],
        caplog: pytest.LogCaptureFixture,
        settings: Any,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        settings.PASSWORD_HASHERS = ["kms_hasher.hashers.KMSBCryptPasswordHasher"]
        monkeypatch.setattr(KMSBCryptPasswordHasher, "rounds", 4)
        encoded = make_password(PASSWORD)
        real = bcrypt.hashpw

        def refuse(data: bytes, salt: bytes) -> bytes:  # as one version or another does
            if len(data) > 72 or 0 in data:
                raise ValueError("no such password")
            return real(data, salt)

        monkeypatch.setattr(bcrypt, "hashpw", refuse)
        with caplog.at_level(logging.INFO, logger="kms_hasher"):
            assert not check_password(password, encoded)
        assert [event.operation for event in events] == ["Encrypt", "Decrypt"]
        assert "cannot be read" not in caplog.text
        with pytest.raises(ValueError, match="does not take the password"):
            make_password(password)
        assert check_password(PASSWORD, encoded)


class TestNotAnswered:
    """A KMS that cannot answer is never a wrong password."""

    def test_disabled(self, kms: Provider, key_arn: str, encoded: str) -> None:
        kms.disable_key(key_arn)
        with pytest.raises(exceptions.KeyDisabled):
            check_password(PASSWORD, encoded)
        with pytest.raises(exceptions.KeyDisabled):
            make_password(PASSWORD)

    def test_pending_deletion(self, kms: Provider, key_arn: str, encoded: str) -> None:
        kms.schedule_key_deletion(key_arn, 7)
        with pytest.raises(exceptions.KeyPendingDeletion):
            check_password(PASSWORD, encoded)

    def test_deleted(self, encoded: str) -> None:
        stored = encoding.parse(encoded)
        gone = encoding.key_ref("00000000-0000-4000-8000-000000000000")
        with pytest.raises(exceptions.KeyNotFound):
            check_password(
                PASSWORD, str(encoding.SealedHash(stored.header, "d1", gone, stored.sealed))
            )

    @pytest.mark.parametrize(
        "error",
        [
            exceptions.KMSTimeout(),
            exceptions.KMSThrottled(),
            exceptions.KMSConnectionError(),
            exceptions.KMSInternalError(),
            exceptions.KMSAccessDenied(),
            exceptions.KMSCredentialsError(),
            exceptions.KMSBadResponse(),
        ],
        ids=lambda error: type(error).__name__,
    )
    def test_typed_and_reported(
        self,
        error: KMSError,
        encoded: str,
        events: list[Event],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def fail(*args: Any, **kwargs: Any) -> Any:
            raise error

        monkeypatch.setattr(keyring.provider(), "decrypt", fail)
        monkeypatch.setattr(keyring.provider(), "encrypt", fail)
        with pytest.raises(type(error)):
            check_password(PASSWORD, encoded)
        with pytest.raises(type(error)):
            make_password(PASSWORD)
        assert [event.error_code for event in events] == [error.code] * 2
        assert {event.outcome for event in events} <= {"unavailable", "denied"}

    @pytest.mark.parametrize("digest", [b"", b"x" * 31, b"x" * 33])
    def test_a_digest_of_the_wrong_size(
        self, digest: bytes, encoded: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        answer = Decrypted(key_arn="", plaintext=digest)
        monkeypatch.setattr(keyring.provider(), "decrypt", lambda *args, **kwargs: answer)
        with pytest.raises(exceptions.KMSBadResponse):
            check_password(PASSWORD, encoded)

    def test_no_error_is_one_that_django_swallows(self) -> None:
        # authenticate() takes PermissionDenied for "wrong password".
        assert not issubclass(exceptions.KMSHasherError, PermissionDenied)

    def test_settings_that_cannot_work(self, encoded: str) -> None:
        with override_settings(KMS_HASHER={"KYE": "broken"}):
            with pytest.raises(exceptions.ConfigurationError):
                check_password(PASSWORD, encoded)
            with pytest.raises(exceptions.ConfigurationError):
                make_password(PASSWORD)
