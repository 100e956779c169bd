"""
`KMSModelBackend`: one call of one kind for every attempt, on and off the event loop.

"Attempt" runs each test twice: through `authenticate` and through `aauthenticate`.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.contrib.auth import aauthenticate, authenticate
from django.contrib.auth.backends import ModelBackend
from django.contrib.auth.hashers import make_password
from django.contrib.auth.models import Group, Permission, User
from django.contrib.auth.signals import user_login_failed
from django.contrib.contenttypes.models import ContentType

from kms_hasher import backends, background, exceptions, hashers, keyring
from kms_hasher.backends import KMSModelBackend
from kms_hasher.models import DataKey
from kms_hasher.providers.base import Provider

pytestmark = pytest.mark.django_db
PASSWORD = "correct horse battery staple"
STOCK = "tests.hashers.CheapArgon2PasswordHasher"

Calls = Callable[[], list[str]]
Attempt = Callable[..., Any]


def sign_in(username: Any = "anna", password: Any = PASSWORD, **kwargs: Any) -> Any:
    return authenticate(None, username=username, password=password, **kwargs)


def asign_in(username: Any = "anna", password: Any = PASSWORD, **kwargs: Any) -> Any:
    return async_to_sync(aauthenticate)(None, username=username, password=password, **kwargs)


@pytest.fixture(params=[sign_in, asign_in], ids=["sync", "async"])
def attempt(request: pytest.FixtureRequest) -> Attempt:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def no_decoy() -> Iterator[None]:
    """A process in which nobody has tried to sign in yet."""
    backends._decoys.clear()
    yield
    backends._decoys.clear()


@pytest.fixture
def user() -> User:
    return User.objects.create_user("anna", "anna@example.org", PASSWORD)


@pytest.fixture
def failures() -> Iterator[list[dict[str, Any]]]:
    """The credentials of each `user_login_failed`."""
    seen: list[dict[str, Any]] = []

    def listen(sender: Any, credentials: dict[str, Any], **kwargs: Any) -> None:
        seen.append(credentials)

    user_login_failed.connect(listen)
    yield seen
    user_login_failed.disconnect(listen)


def out(monkeypatch: pytest.MonkeyPatch, *operations: str, error: Any = None) -> None:
    """From now on KMS cannot answer these operations, or refuses them with `error`."""

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error or exceptions.KMSTimeout()

    for operation in operations:
        monkeypatch.setattr(keyring.provider(), operation, fail)


# --- what an attempt costs ----------------------------------------------------------


class TestOneCallOfOneKind:
    @pytest.fixture(autouse=True)
    def prewarmed(self, user: User, request: pytest.FixtureRequest) -> None:
        User.objects.create_user("inactive", password=PASSWORD, is_active=False)
        User.objects.create_user("unusable", password=None)
        for name, password in {
            "gibberish": "what a gibberish",
            "empty": "",
            "foreign": "no_such_hasher$1$salt$hash",
            "barred": f"!{user.password}",
        }.items():
            User.objects.create(username=name, password=password)
        backends.prewarm()

    @pytest.mark.parametrize(
        ("name", "password", "lets_in"),
        [
            ("anna", PASSWORD, True),
            ("anna", "wrong", False),
            ("anna", "", False),
            ("nobody", PASSWORD, False),
            ("nobody", "", False),
            ("", PASSWORD, False),
            ("inactive", PASSWORD, False),
            ("inactive", "wrong", False),
            ("unusable", PASSWORD, False),
            ("gibberish", PASSWORD, False),
            ("empty", PASSWORD, False),
            ("foreign", PASSWORD, False),
            ("barred", PASSWORD, False),
        ],
    )
    def test_whoever_is_asked_for(
        self, name: str, password: str, lets_in: bool, attempt: Attempt, events: list[Any]
    ) -> None:
        found = attempt(name, password)
        assert (found is not None) == lets_in
        assert [(e.operation, e.purpose, e.outcome) for e in events] == [
            ("Decrypt", "login", "success")
        ]

    def test_again_and_again(self, attempt: Attempt, calls: Calls) -> None:
        for name in ("nobody", "anna", "nobody", "inactive", "nobody"):
            attempt(name, "wrong")
        assert calls() == ["Decrypt"] * 5

    def test_argon2_is_computed_once_too(
        self, attempt: Attempt, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        computed: list[Any] = []
        real = hashers.KMSArgon2PasswordHasher._digest

        def digest(self: Any, password: Any, header: Any) -> bytes:
            computed.append(header.parameters)
            return real(self, password, header)

        monkeypatch.setattr(hashers.KMSArgon2PasswordHasher, "_digest", digest)
        attempt("anna")
        attempt("nobody")
        assert len(computed) == 2
        assert computed[0] == computed[1]

    @pytest.mark.parametrize(
        "credentials",
        [
            {"username": None, "password": PASSWORD},
            {"username": "anna", "password": None},
            {"username": None, "password": None},
        ],
    )
    def test_no_credentials_cost_nothing(
        self, credentials: dict[str, Any], attempt: Attempt, calls: Calls
    ) -> None:
        assert attempt(**credentials) is None
        assert calls() == []


class TestDecoy:
    def test_without_prewarm_the_first_attempt_makes_it(
        self, attempt: Attempt, calls: Calls
    ) -> None:
        attempt("nobody")
        assert calls() == ["Encrypt"]
        attempt("nobody")
        attempt("nobody else")
        assert calls() == ["Encrypt", "Decrypt", "Decrypt"]

    def test_prewarm_makes_it_by_one_call(self, calls: Calls) -> None:
        backends.prewarm()
        assert calls() == ["Encrypt"]

    def test_prewarm_raises_nothing(
        self, monkeypatch: pytest.MonkeyPatch, calls: Calls
    ) -> None:
        with monkeypatch.context() as patch:
            out(patch, "encrypt")
            backends.prewarm()
        assert backends._decoys == {}
        assert sign_in("nobody") is None
        assert calls() == ["Encrypt", "Encrypt"]

    @pytest.mark.parametrize("value", [{"KEY": 5}, {}, "nonsense"])
    def test_prewarm_with_settings_that_cannot_work(self, value: Any, settings: Any) -> None:
        settings.KMS_HASHER = value
        backends.prewarm()

    def test_no_password_matches_it(self, attempt: Attempt) -> None:
        backends.prewarm()
        (decoy,) = backends._decoys.values()
        for password in ("", decoy, "None", PASSWORD):
            assert attempt("nobody", password) is None

    @pytest.mark.parametrize("state", ["disabled", "to be deleted", "denied"])
    def test_its_key_is_rotated_away(
        self,
        state: str,
        attempt: Attempt,
        kms: Provider,
        key_arn: str,
        calls: Calls,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        backends.prewarm()
        kms.update_alias("alias/tests", kms.create_key().key_arn)
        if state == "disabled":
            kms.disable_key(key_arn)
        elif state == "to be deleted":
            kms.schedule_key_deletion(key_arn)
        else:
            # The policy of the servers names the new key alone.
            real = kms.decrypt

            def decrypt(key: str, *args: Any, **kwargs: Any) -> Any:
                if key_arn.endswith(key):
                    raise exceptions.KMSAccessDenied
                return real(key, *args, **kwargs)

            monkeypatch.setattr(kms, "decrypt", decrypt)
        assert attempt("nobody") is None
        assert calls() == ["Encrypt", "Decrypt", "Encrypt"]
        assert attempt("nobody") is None
        assert attempt("nobody") is None
        assert calls() == ["Encrypt", "Decrypt", "Encrypt", "Decrypt", "Decrypt"]

    def test_its_key_is_out_of_use_and_no_other_took_its_place(
        self, attempt: Attempt, kms: Provider, key_arn: str, user: User
    ) -> None:
        backends.prewarm()
        kms.disable_key(key_arn)
        for name in ("nobody", "anna"):
            with pytest.raises(exceptions.KeyDisabled):
                attempt(name)
        kms.enable_key(key_arn)
        assert attempt("nobody") is None

    def test_other_settings_make_another(self, calls: Calls, settings: Any) -> None:
        backends.prewarm()
        settings.PASSWORD_HASHERS = [STOCK]
        assert sign_in("nobody") is None
        assert sign_in("nobody") is None
        assert calls() == ["Encrypt"]  # stock hashes cost no call

    def test_attempts_at_the_same_time(self, events: list[Any]) -> None:
        backends.prewarm()
        attempts = [
            threading.Thread(target=backends.check_decoy, args=("x",)) for _ in range(8)
        ]
        for thread in attempts:
            thread.start()
        for thread in attempts:
            thread.join()
        assert [event.operation for event in events] == ["Encrypt"] + ["Decrypt"] * 8


# --- what it inherits ---------------------------------------------------------------


def test_permissions_are_djangos(user: User) -> None:
    kind = ContentType.objects.get_for_model(User)
    own, of_group = Permission.objects.filter(content_type=kind).order_by("codename")[:2]
    group = Group.objects.create(name="editors")
    group.permissions.add(of_group)
    user.groups.add(group)
    user.user_permissions.add(own)
    found = sign_in()
    assert found.backend == "kms_hasher.backends.KMSModelBackend"
    assert found.has_perms([f"auth.{own.codename}", f"auth.{of_group.codename}"])
    assert not found.has_perm("auth.no_such")
    assert found.get_group_permissions() == {f"auth.{of_group.codename}"}
    assert async_to_sync(found.ahas_perm)(f"auth.{own.codename}")
    assert list(User.objects.with_perm(own)) == [user]
    assert KMSModelBackend().get_user(user.pk) == user
    assert async_to_sync(KMSModelBackend().aget_user)(user.pk) == user


def test_what_a_subclass_decides_counts(user: User, attempt: Attempt, settings: Any) -> None:
    settings.AUTHENTICATION_BACKENDS = [f"{__name__}.EveryoneBackend"]
    User.objects.update(is_active=False)
    assert attempt() == user


class EveryoneBackend(KMSModelBackend):
    def user_can_authenticate(self, user: Any) -> bool:
        return True


def test_the_name_under_the_models_own_field(
    user: User, monkeypatch: pytest.MonkeyPatch, calls: Calls
) -> None:
    monkeypatch.setattr(User, "USERNAME_FIELD", "email")
    backends.prewarm()
    for found in (
        authenticate(None, email="anna@example.org", password=PASSWORD),
        async_to_sync(aauthenticate)(None, email="anna@example.org", password=PASSWORD),
    ):
        assert found == user
    assert authenticate(None, email="x@example.org", password=PASSWORD) is None
    assert authenticate(None, email=None, password=PASSWORD) is None
    assert calls() == ["Encrypt", "Decrypt", "Decrypt", "Decrypt"]


def test_a_custom_check_of_the_model_is_asked(
    user: User, attempt: Attempt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that refuses some passwords itself is heard on either path."""

    def check_password(self: Any, raw_password: str) -> bool:
        return False

    async def acheck_password(self: Any, raw_password: str) -> bool:
        return False

    monkeypatch.setattr(User, "check_password", check_password)
    monkeypatch.setattr(User, "acheck_password", acheck_password)
    assert attempt() is None


# --- the event loop -----------------------------------------------------------------


class TestEventLoop:
    @pytest.mark.parametrize("name", ["anna", "nobody"])
    def test_nothing_is_computed_on_it(
        self, name: str, user: User, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        backends.prewarm()
        on_loop: list[bool] = []
        real = hashers.KMSArgon2PasswordHasher._digest

        def digest(self: Any, password: Any, header: Any) -> bytes:
            on_loop.append(asyncio._get_running_loop() is not None)
            return real(self, password, header)

        monkeypatch.setattr(hashers.KMSArgon2PasswordHasher, "_digest", digest)
        asign_in(name)
        assert on_loop == [False]

    def test_the_decoy_is_not_made_on_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        on_loop: list[bool] = []
        real = keyring.provider().encrypt

        def encrypt(*args: Any, **kwargs: Any) -> Any:
            on_loop.append(asyncio._get_running_loop() is not None)
            return real(*args, **kwargs)

        monkeypatch.setattr(keyring.provider(), "encrypt", encrypt)
        asign_in("nobody")
        assert on_loop == [False]

    def test_an_upgrade_is_not_made_on_it(
        self, monkeypatch: pytest.MonkeyPatch, user: User, settings: Any
    ) -> None:
        user.password = make_password(PASSWORD, hasher="argon2")
        user.save()
        on_loop: list[bool] = []
        real = keyring.seal

        def seal(*args: Any, **kwargs: Any) -> Any:
            on_loop.append(asyncio._get_running_loop() is not None)
            return real(*args, **kwargs)

        monkeypatch.setattr(keyring, "seal", seal)
        assert asign_in() == user
        assert on_loop == [False]

    @pytest.mark.parametrize("name", ["anna", "nobody"])
    def test_it_goes_on_while_four_sign_in(
        self, name: str, user: User, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """
        KMS answers when all four wait for it and the loop has seen that.

        A loop that waits for one of them never comes to the other three.
        """
        backends.prewarm()
        waiting, entered, released = threading.Barrier(4), threading.Event(), threading.Event()
        real = keyring.provider().decrypt

        def decrypt(*args: Any, **kwargs: Any) -> Any:
            waiting.wait(timeout=10)
            entered.set()
            assert released.wait(timeout=10)
            return real(*args, **kwargs)

        monkeypatch.setattr(keyring.provider(), "decrypt", decrypt)

        async def release() -> None:
            while not entered.is_set():
                await asyncio.sleep(0.001)
            released.set()

        async def everyone() -> list[Any]:
            attempts = (aauthenticate(None, username=name, password=PASSWORD) for _ in range(4))
            return (await asyncio.gather(release(), *attempts))[1:]

        assert async_to_sync(everyone)() == [user if name == "anna" else None] * 4


@pytest.mark.parametrize("name", ["anna", "nobody"])
def test_argon2_gives_way_to_the_event_loop_and_to_nothing_else(
    name: str, user: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Off the loop it runs at a lower priority; elsewhere, and the call to KMS, at its own."""
    backends.prewarm()
    asked: list[int] = []
    computed: list[int] = []
    provider = keyring.provider()
    decrypt, digest = provider.decrypt, hashers.KMSArgon2PasswordHasher._digest

    def nice() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    def ask(*args: Any, **kwargs: Any) -> Any:
        asked.append(nice())
        return decrypt(*args, **kwargs)

    def compute(*args: Any) -> bytes:
        computed.append(nice())
        return digest(*args)

    monkeypatch.setattr(provider, "decrypt", ask)
    monkeypatch.setattr(hashers.KMSArgon2PasswordHasher, "_digest", compute)
    own = nice()
    for attempt in (asign_in, sign_in, asign_in):
        attempt(name)
    lower = min(own + background.NICE, 19) if sys.platform == "linux" else own
    assert asked == [own] * 3
    assert computed == [lower, own, lower]


def test_a_priority_that_cannot_be_lowered_stops_no_login(
    user: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> None:
        raise PermissionError

    monkeypatch.setattr(background, "_nice_executor", None)
    monkeypatch.setattr(os, "setpriority", refuse)
    assert asign_in() == user


# --- the upgrade of a hash that is not sealed yet -----------------------------------


class TestUpgrade:
    @pytest.fixture
    def old(self, user: User) -> str:
        user.password = make_password(PASSWORD, hasher="argon2")
        user.save()
        backends.prewarm()
        return user.password

    def test_at_the_first_login(
        self, old: str, user: User, attempt: Attempt, calls: Calls
    ) -> None:
        found = attempt()
        user.refresh_from_db()
        assert user.password.startswith("kms_argon2$")
        assert found.password == user.password
        assert found.get_session_auth_hash() == user.get_session_auth_hash()
        assert attempt() == user
        assert calls() == ["Encrypt", "Decrypt"]

    def test_not_with_a_wrong_password(self, old: str, user: User, attempt: Attempt) -> None:
        assert attempt(password="wrong") is None
        user.refresh_from_db()
        assert user.password == old

    def test_a_password_changed_meanwhile_stays(
        self, old: str, user: User, attempt: Attempt, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        changed = make_password("another password")
        real = keyring.seal

        def seal(*args: Any, **kwargs: Any) -> Any:
            User.objects.update(password=changed)
            return real(*args, **kwargs)

        monkeypatch.setattr(keyring, "seal", seal)
        found = attempt()
        assert found == user
        assert User.objects.get().password == changed
        # What the session of this login hangs on is not what is stored: it ends at once.
        assert found.get_session_auth_hash() != User.objects.get().get_session_auth_hash()

    @pytest.mark.parametrize(
        "error",
        [
            exceptions.KMSTimeout(),
            exceptions.KMSAccessDenied(),
            exceptions.KeyDisabled(),
            exceptions.KMSCircuitOpen(),
            exceptions.ConfigurationError("KEY"),
            exceptions.AuditError("full"),
        ],
        ids=lambda error: type(error).__name__,
    )
    def test_that_cannot_be_sealed_fails_no_login(
        self,
        error: Exception,
        old: str,
        user: User,
        attempt: Attempt,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        def fail(*args: Any, **kwargs: Any) -> Any:
            raise error

        monkeypatch.setattr(keyring, "seal", fail)
        assert attempt() == user
        user.refresh_from_db()
        assert user.password == old
        assert "could not be brought up to date" in caplog.text

    def test_of_changed_costs(
        self, user: User, attempt: Attempt, monkeypatch: pytest.MonkeyPatch, calls: Calls
    ) -> None:
        user.set_password(PASSWORD)
        user.save()
        before = len(calls())
        monkeypatch.setattr("tests.hashers.CheapKMSArgon2PasswordHasher.time_cost", 2)
        assert attempt() == user
        assert calls()[before:] == ["Decrypt", "Encrypt"]
        assert attempt() == user
        assert calls()[before:] == ["Decrypt", "Encrypt", "Decrypt"]
        assert "t=2," in User.objects.get().password


# --- when KMS cannot tell -----------------------------------------------------------

ERRORS = [
    kind
    for kind in vars(exceptions).values()
    if isinstance(kind, type)
    and issubclass(kind, exceptions.KMSError)
    and not issubclass(kind, exceptions.InvalidCiphertext)
]


class TestOutage:
    @pytest.fixture(params=[KMSModelBackend, ModelBackend], ids=["ours", "stock"])
    def backend(self, request: pytest.FixtureRequest, settings: Any) -> None:
        kind = request.param
        settings.AUTHENTICATION_BACKENDS = [f"{kind.__module__}.{kind.__name__}"]

    @pytest.mark.parametrize("name", ["anna", "nobody"])
    @pytest.mark.parametrize("error", ERRORS)
    @pytest.mark.usefixtures("backend")
    def test_is_no_failed_login(
        self,
        error: type[exceptions.KMSError],
        name: str,
        user: User,
        attempt: Attempt,
        failures: list[Any],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        backends.prewarm()
        out(monkeypatch, "encrypt", "decrypt", error=error())
        with pytest.raises(error):
            attempt(name)
        assert failures == []

    @pytest.mark.usefixtures("backend")
    def test_a_wrong_password_is(
        self, user: User, attempt: Attempt, failures: list[Any]
    ) -> None:
        assert attempt() == user
        assert failures == []
        assert attempt(password="wrong") is None
        assert [found["username"] for found in failures] == ["anna"]
        assert attempt("nobody") is None
        assert [found["username"] for found in failures] == ["anna", "nobody"]

    @pytest.mark.parametrize("sealed", ["kms_argon2$", "kms_argon2$d1$x$y$z$=", "another's"])
    def test_what_is_damaged_is_a_wrong_password(
        self, sealed: str, user: User, attempt: Attempt, failures: list[Any]
    ) -> None:
        if sealed == "another's":
            blob = make_password("x").rpartition("$")[2]
            sealed = f"{user.password.rpartition('$')[0]}${blob}"
        User.objects.update(password=sealed)
        assert attempt() is None
        assert len(failures) == 1


@pytest.mark.django_db
def test_a_decoy_whose_data_key_is_gone_is_made_anew(settings: Any) -> None:
    settings.KMS_HASHER = {**settings.KMS_HASHER, "MODE": "envelope"}
    for _ in range(2):
        assert authenticate(username="nobody", password="secret") is None
    DataKey.objects.all().delete()
    for _ in range(2):
        assert authenticate(username="nobody", password="secret") is None
    assert DataKey.objects.count() == 1
