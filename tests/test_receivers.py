"""A password under an old key comes under the present one when its user signs in."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.contrib.auth.hashers import make_password
from django.contrib.auth.models import User
from django.contrib.auth.signals import user_logged_in
from django.db import DatabaseError, InterfaceError, connection
from django.db.models.signals import post_save, pre_save
from django.test import AsyncClient, Client
from django.test.utils import CaptureQueriesContext

from kms_hasher import columns, data_keys, encoding, exceptions, history, keyring, receivers
from kms_hasher.modes import MODES
from kms_hasher.providers.base import Provider
from tests import modes

pytestmark = pytest.mark.django_db
PASSWORD = "correct horse battery staple"
LOGIN = {"username": "anna", "password": PASSWORD}
Calls = Callable[[], list[str]]


@pytest.fixture
def user() -> User:
    return User.objects.create_superuser("anna", "anna@example.org", PASSWORD)


@pytest.fixture
def new_key(user: User, kms: Provider) -> str:
    """The ref of the key that the alias has moved to since, as it is known here."""
    arn = kms.create_key().key_arn
    kms.update_alias("alias/tests", arn)
    make_password("another's")
    ref = encoding.key_ref(arn.rpartition("/")[2])
    period = history.current_period("alias/tests")
    assert period is not None
    assert period.key.ref == ref
    return ref


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    return lambda: [
        record.getMessage()
        for record in caplog.records
        if record.name == "kms_hasher" and record.levelno >= logging.WARNING
    ]


def stored() -> encoding.SealedHash:
    return encoding.parse(User.objects.get(username="anna").password)


def sign_in() -> Client:
    client = Client()
    response = client.post("/admin/login/?next=/admin/", LOGIN)
    assert response.status_code == 302
    return client


def is_signed_in(client: Client) -> bool:
    return client.get("/admin/").status_code == 200


class TestUnderAnOldKey:
    def test_it_is_rewrapped_with_its_salt(
        self, user: User, new_key: str, calls: Calls, events: list[Any]
    ) -> None:
        before = stored()
        del events[:]
        assert is_signed_in(sign_in())
        after = stored()
        assert calls() == ["Decrypt", "ReEncrypt"]
        assert {event.purpose for event in events} == {"login"}
        assert (after.key_ref, after.header) == (new_key, before.header)
        assert before.key_ref != new_key
        # From now on there is nothing to do.
        sign_in()
        assert calls() == ["Decrypt", "ReEncrypt", "Decrypt"]
        assert stored() == after

    def test_all_sessions_stay(self, user: User, new_key: str, settings: Any) -> None:
        settings.KMS_HASHER = {**settings.KMS_HASHER, "REWRAP_ON_LOGIN": False}
        others = [sign_in() for _ in range(2)]
        settings.KMS_HASHER = {**settings.KMS_HASHER, "REWRAP_ON_LOGIN": True}
        this = sign_in()
        assert stored().key_ref == new_key
        assert [is_signed_in(client) for client in (this, *others)] == [True] * 3

    def test_under_asgi(self, user: User, new_key: str, calls: Calls) -> None:
        before = len(calls())
        client = AsyncClient()
        response: Any = async_to_sync(client.post)("/admin/login/?next=/admin/", LOGIN)
        assert response.status_code == 302
        assert calls()[before:] == ["Decrypt", "ReEncrypt"]
        assert stored().key_ref == new_key
        assert async_to_sync(client.get)("/admin/").status_code == 200

    def test_the_user_object_has_the_new_value(self, user: User, new_key: str) -> None:
        receivers.rewrap(sender=User, user=user)
        assert user.password == User.objects.get(username="anna").password
        assert encoding.parse(user.password).key_ref == new_key
        user.save()
        assert stored().key_ref == new_key

    def test_no_signal_of_the_model_is_sent(self, user: User, new_key: str) -> None:
        saved: list[Any] = []

        def listen(**kwargs: Any) -> None:
            saved.append(kwargs)

        for signal in (pre_save, post_save):
            signal.connect(listen, sender=User)
        receivers.rewrap(sender=User, user=user)
        for signal in (pre_save, post_save):
            signal.disconnect(listen, sender=User)
        assert stored().key_ref == new_key
        assert saved == []

    def test_not_if_the_setting_says_so(
        self, user: User, new_key: str, calls: Calls, settings: Any
    ) -> None:
        settings.KMS_HASHER = {**settings.KMS_HASHER, "REWRAP_ON_LOGIN": False}
        before, text = len(calls()), user.password
        sign_in()
        assert calls()[before:] == ["Decrypt"]
        assert User.objects.get(username="anna").password == text

    def test_not_if_it_would_end_the_session(
        self, user: User, new_key: str, calls: Calls, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With STABLE_SESSIONS False, sessions hang on the whole column, as Django's do."""

        def django(self: User, secret: Any = None) -> str:
            return f"{self.password} {secret}"

        monkeypatch.setattr(User, "_get_session_auth_hash", django)
        before, text = len(calls()), user.password
        client = sign_in()
        assert is_signed_in(client)
        assert calls()[before:] == ["Decrypt"]
        assert User.objects.get(username="anna").password == text


class TestNothingToDo:
    def test_the_key_is_the_present_one(self, user: User, calls: Calls) -> None:
        before, text = len(calls()), user.password
        sign_in()
        assert calls()[before:] == ["Decrypt"]
        assert User.objects.get(username="anna").password == text

    def test_it_costs_one_query(self, user: User) -> None:
        with CaptureQueriesContext(connection) as queries:
            receivers.rewrap(sender=User, user=user)
        statements = [q["sql"] for q in queries if "SAVEPOINT" not in q["sql"]]
        assert len(statements) == 1
        assert statements[0].startswith("SELECT")

    def test_and_none_where_nothing_is_sealed(
        self, user: User, settings: Any, django_assert_num_queries: Any
    ) -> None:
        stock = make_password(PASSWORD, hasher="argon2")
        values = [stock, "!unusable", "", None, "gibberish", "kms_argon2$gibberish"]
        with django_assert_num_queries(0):
            for value in values:
                receivers.rewrap(sender=User, user=User(pk=user.pk, password=value))
            receivers.rewrap(sender=object, user=object())
            settings.KMS_HASHER = {**settings.KMS_HASHER, "REWRAP_ON_LOGIN": False}
            receivers.rewrap(sender=User, user=user)

    def test_a_key_is_named_and_no_alias(
        self, user: User, new_key: str, calls: Calls, settings: Any, kms: Provider
    ) -> None:
        settings.KMS_HASHER = {**settings.KMS_HASHER, "KEY": encoding.key_id(new_key)}
        before = len(calls())
        sign_in()
        assert calls()[before:] == ["Decrypt"]

    def test_nothing_is_known_of_the_alias(
        self, user: User, calls: Calls, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(history, "current_period", lambda alias: None)
        before = len(calls())
        sign_in()
        assert calls()[before:] == ["Decrypt"]

    def test_it_is_connected_once(self) -> None:
        before = len(user_logged_in.receivers)
        receivers.connect()
        assert len(user_logged_in.receivers) == before


class TestTheLoginHasSucceeded:
    @pytest.mark.parametrize(
        "error",
        [
            exceptions.KMSTimeout(),
            exceptions.KMSThrottled(),
            exceptions.KMSCircuitOpen(),
            exceptions.KMSAccessDenied(),
            exceptions.KeyDisabled(),
            exceptions.KeyNotFound(),
            exceptions.InvalidCiphertext(),
            exceptions.KMSBadResponse(),
            RuntimeError("a provider of the site's own"),
        ],
        ids=lambda error: type(error).__name__,
    )
    def test_though_kms_fails(
        self,
        error: Exception,
        user: User,
        new_key: str,
        warnings: Callable[[], list[str]],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def fail(*args: Any, **kwargs: Any) -> Any:
            raise error

        monkeypatch.setattr(keyring.provider(), "re_encrypt", fail)
        assert is_signed_in(sign_in())
        assert User.objects.get(username="anna").password == user.password
        (warning,) = warnings()
        assert warning.startswith("A password could not be re-wrapped after a login: ")
        assert "Traceback" not in warning

    def test_though_the_audit_is_strict_and_full(
        self, user: User, new_key: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*args: Any, **kwargs: Any) -> Any:
            raise exceptions.AuditError("full")

        monkeypatch.setattr(keyring, "rewrap", fail)
        assert is_signed_in(sign_in())

    def test_though_the_settings_are_broken(self, user: User, settings: Any) -> None:
        settings.KMS_HASHER = {"NONSENSE": 1}
        receivers.rewrap(sender=User, user=user)

    @pytest.mark.parametrize("error", [DatabaseError, InterfaceError])
    @pytest.mark.parametrize("place", ["history", "swap"])
    def test_though_the_database_fails(
        self,
        place: str,
        error: type[Exception],
        user: User,
        new_key: str,
        warnings: Callable[[], list[str]],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def fail(*args: Any, **kwargs: Any) -> Any:
            raise error(f"DETAIL: {PASSWORD}")

        if place == "history":
            monkeypatch.setattr(history, "current_period", fail)
        else:
            monkeypatch.setattr(columns.Column, "swap", fail)
        assert is_signed_in(sign_in())
        assert User.objects.get(username="anna").password == user.password
        assert warnings() == [
            f"A password could not be re-wrapped after a login: {error.__name__}"
        ]

    @pytest.mark.parametrize("place", ["history", "swap"])
    def test_and_the_requests_transaction_lives_on(
        self, place: str, user: User, new_key: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With ATOMIC_REQUESTS; PostgreSQL refuses all that follows a failed statement."""

        def fail(*args: Any, **kwargs: Any) -> Any:
            with connection.cursor() as cursor:
                cursor.execute("SELECT 1 FROM no_such_table")

        if place == "history":
            monkeypatch.setattr(history, "current_period", fail)
        else:
            monkeypatch.setattr(columns.Column, "swap", fail)
        monkeypatch.setitem(connection.settings_dict, "ATOMIC_REQUESTS", True)
        client = sign_in()
        assert is_signed_in(client)
        user.refresh_from_db()
        assert user.last_login is not None


class TestChangedMeanwhile:
    def test_the_new_password_stays(
        self, user: User, new_key: str, kms: Provider, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        changed = make_password("another password")
        real = kms.re_encrypt

        def re_encrypt(*args: Any, **kwargs: Any) -> Any:
            User.objects.filter(pk=user.pk).update(password=changed)
            return real(*args, **kwargs)

        monkeypatch.setattr(kms, "re_encrypt", re_encrypt)
        client = sign_in()
        assert User.objects.get(username="anna").password == changed
        assert not is_signed_in(client)

    def test_and_the_object_keeps_what_it_had(self, user: User, new_key: str) -> None:
        old = user.password
        User.objects.filter(pk=user.pk).update(password=make_password("another password"))
        receivers.rewrap(sender=User, user=user)
        assert user.password == old

    def test_a_user_deleted_meanwhile_stays_deleted(self, user: User, new_key: str) -> None:
        User.objects.filter(pk=user.pk).delete()
        receivers.rewrap(sender=User, user=user)
        assert not User.objects.filter(pk=user.pk).exists()


class TestEveryMode:
    """Where the mode has ReEncrypt, by it; else nothing is done here."""

    @pytest.fixture(autouse=True)
    def moved(self, mode: str, kms: Provider, events: list[Any]) -> str:
        """The ref of the key that KEY's alias has moved to since a user was made."""
        User.objects.create_superuser("anna", "anna@example.org", PASSWORD)
        alias = modes.KEYS[mode]
        found = kms.describe_key(alias)
        arn = kms.create_key(spec=found.spec, usage=found.usage).key_arn
        kms.update_alias(alias, arn)
        modes.forget()
        data_keys.retire()
        make_password("another's")  # which shows it
        period = history.current_period(alias)
        assert period is not None
        assert period.key.arn == arn
        del events[:]
        return encoding.key_ref(arn)

    def test_after_a_login(self, mode: str, moved: str, calls: Calls) -> None:
        before = stored()
        client = sign_in()
        after = stored()
        again = {"mac": ["GenerateMac"], "envelope": []}.get(mode, ["ReEncrypt"])
        assert calls() == modes.LOGIN[mode] + again
        assert is_signed_in(client)
        assert after.header == before.header
        if mode != "envelope":  # of which the data keys are re-wrapped
            assert after.key_ref.split(".")[0] == moved != before.key_ref.split(".")[0]
            assert after.key_ref.split(".")[1:] == before.key_ref.split(".")[1:]
        else:
            assert after == before
        done = len(calls())
        sign_in()
        assert calls()[done:] == modes.LOGIN[mode]

    def test_the_receiver_alone(self, mode: str, moved: str, calls: Calls) -> None:
        user = User.objects.get(username="anna")
        text = user.password
        receivers.rewrap(sender=User, user=user)
        rewraps = MODES[mode].rewraps
        assert calls() == (["ReEncrypt"] if rewraps else [])
        assert (user.password != text) is rewraps
        assert User.objects.get(username="anna").password == user.password

    def test_kms_that_fails_there(
        self, mode: str, moved: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*args: Any, **kwargs: Any) -> Any:
            raise exceptions.KMSTimeout

        monkeypatch.setattr(keyring.provider(), "re_encrypt", fail)
        before = stored()
        client = sign_in()
        assert is_signed_in(client)
        if MODES[mode].rewraps:
            assert stored() == before


def test_what_is_in_another_mode_is_not_rewrapped_under_a_key_of_another_kind(
    user: User, settings: Any, kms: Provider, calls: Calls
) -> None:
    """The alias of KEY is an RSA key's, and what is stored `direct`."""
    modes.use(settings, "public_key")
    make_password("another's")
    done = len(calls())
    receivers.rewrap(sender=User, user=user)
    assert calls()[done:] == []
    modes.forget()


def test_a_mode_nobody_knows(user: User, new_key: str, calls: Calls) -> None:
    done = len(calls())
    user.password = user.password.replace("$d1$", "$x9$")
    receivers.rewrap(sender=User, user=user)
    assert calls()[done:] == []
