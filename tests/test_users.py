from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.apps import apps
from django.contrib.auth import HASH_SESSION_KEY, SESSION_KEY, get_user_model
from django.contrib.auth.base_user import AbstractBaseUser
from django.contrib.auth.forms import PasswordResetForm, UserChangeForm
from django.contrib.auth.hashers import make_password
from django.contrib.auth.models import AbstractUser, User
from django.contrib.auth.tokens import PasswordResetTokenGenerator, default_token_generator
from django.core.exceptions import FieldDoesNotExist, ValidationError
from django.core.management import call_command
from django.core.validators import MaxLengthValidator
from django.db import DatabaseError, connection, transaction
from django.test import AsyncClient, Client
from django.test.utils import isolate_apps
from django.urls import reverse

from kms_hasher import encoding, exceptions, keyring, users
from kms_hasher.columns import Column
from kms_hasher.encoding import Argon2Parameters, Header, SealedHash
from kms_hasher.modes import MODES
from kms_hasher.providers.base import Provider
from kms_hasher.users import KMSUserMixin
from tests import modes, projects
from tests.hashers import CheapArgon2PasswordHasher

PASSWORD = "correct horse battery staple"
STOCK = {"PASSWORD_HASHERS": ["tests.hashers.CheapArgon2PasswordHasher"]}
KEYS = [encoding.key_ref(str(uuid.UUID(int=n))) for n in (1, 2)]


def sealed(salt: str = "0123456789abcdef", key: int = 0, size: int = 184) -> str:
    """A stored password as KMS's `size` of ciphertext makes it; about 340 characters."""
    header = Header("kms_argon2", Argon2Parameters(8, 1, 1), salt.encode())
    return str(SealedHash(header, "d1", KEYS[key], bytes([key]) * size))


def stock(salt: str = "0123456789abcdef") -> str:
    """The stock hash that `sealed` may have been before."""
    header = Header("kms_argon2", Argon2Parameters(8, 1, 1), salt.encode())
    return encoding.format_stock(header, b"d" * 32)


@pytest.fixture
def user(db: None) -> User:
    return User.objects.create(
        username="anna",
        email="anna@example.org",
        password=sealed(),
        is_staff=True,
        is_superuser=True,
    )


def put(user: User, password: str) -> None:
    """Write the column as rotation does: nothing else notices."""
    assert User.objects.filter(pk=user.pk).update(password=password) == 1


def is_signed_in(client: Client) -> bool:
    return client.get("/admin/").status_code == 200


# --- the field ----------------------------------------------------------------------


def test_the_stock_field_is_wide_and_the_abstract_one_untouched() -> None:
    for model, width in ((User, 1024), (AbstractUser, 128), (AbstractBaseUser, 128)):
        field: Any = model._meta.get_field("password")
        limits = [v.limit_value for v in field.validators if type(v) is MaxLengthValidator]
        assert (field.max_length, limits) == (width, [width])


def test_the_admin_accepts_a_sealed_password(user: User, client: Client) -> None:
    client.force_login(user)
    page = client.get(f"/admin/auth/user/{user.pk}/change/")
    assert page.status_code == 200
    form = page.context["adminform"].form
    data = {name: value for name, value in form.initial.items() if value is not None}
    bound = UserChangeForm(data | {"first_name": "Anna"}, instance=user)
    assert len(user.password) > 300
    assert bound.is_valid(), bound.errors
    bound.save()
    user.refresh_from_db()
    assert (user.first_name, user.password) == ("Anna", sealed())


@isolate_apps("tests")
def test_the_mixin_changes_the_width_and_nothing_else_of_the_model() -> None:
    class Plain(AbstractUser):
        class Meta(AbstractUser.Meta):
            app_label = "tests"
            verbose_name = "user"

    class Sealed(KMSUserMixin, AbstractUser):
        groups = user_permissions = None

        class Meta(AbstractUser.Meta):
            app_label = "tests"

    class Base(KMSUserMixin, AbstractBaseUser):
        class Meta:
            app_label = "tests"

    names = [field.name for field in Plain._meta.local_fields]
    assert [field.name for field in Sealed._meta.local_fields] == names
    assert [field.name for field in Base._meta.local_fields] == ["id", "password", "last_login"]
    for model in (Sealed, Base):
        *same, options = model._meta.get_field("password").deconstruct()
        *expected, narrow = Plain._meta.get_field("password").deconstruct()
        assert same == expected
        assert options == narrow | {"max_length": 1024}
        assert model._get_session_auth_hash is KMSUserMixin._get_session_auth_hash


# --- sessions and reset links -------------------------------------------------------


def test_the_session_hash_hangs_on_the_stable_part() -> None:
    def session(password: str, **options: Any) -> str:
        return User(password=password)._get_session_auth_hash(**options)

    assert session(sealed(key=0)) == session(sealed(key=1)) == session(stock())
    assert session(sealed()) != session(sealed(salt="another salt of it"))
    assert session(sealed()) != session(sealed(), secret="another secret")
    assert session("!unusable1") != session("!unusable2")
    # Not even for a value that is its own stable part.
    assert session("!") != AbstractBaseUser._get_session_auth_hash(User(password="!"))


def test_older_sessions_are_accepted(settings: Any) -> None:
    settings.SECRET_KEY_FALLBACKS = ["old", "older"]
    person = User(password=sealed())
    assert list(person.get_session_auth_fallback_hash()) == [
        person._get_session_auth_hash(secret="old"),
        person._get_session_auth_hash(secret="older"),
        AbstractBaseUser._get_session_auth_hash(person),
        AbstractBaseUser._get_session_auth_hash(person, secret="old"),
        AbstractBaseUser._get_session_auth_hash(person, secret="older"),
    ]


@pytest.mark.parametrize("before", [sealed(), stock()], ids=["re-wrapped", "sealed"])
def test_a_session_survives_and_dies_with_the_password(
    user: User, client: Client, before: str
) -> None:
    put(user, before)
    client.force_login(User.objects.get())
    assert is_signed_in(client)
    put(user, sealed(key=1))
    assert is_signed_in(client)
    put(user, sealed(salt="a changed password", key=1))
    assert not is_signed_in(client)


def test_a_session_from_before_the_app_is_accepted_and_upgraded(
    user: User, client: Client
) -> None:
    put(user, stock())
    client.force_login(user)
    session = client.session
    session[HASH_SESSION_KEY] = AbstractBaseUser._get_session_auth_hash(User.objects.get())
    session.save()
    assert is_signed_in(client)
    assert client.session[HASH_SESSION_KEY] == User.objects.get().get_session_auth_hash()
    put(user, sealed())
    assert is_signed_in(client)


def test_a_session_survives_a_new_secret_key(user: User, client: Client, settings: Any) -> None:
    settings.SESSION_ENGINE = "django.contrib.sessions.backends.db"
    client.force_login(user)
    settings.SECRET_KEY, settings.SECRET_KEY_FALLBACKS = "new", [settings.SECRET_KEY]
    put(user, sealed(key=1))
    assert is_signed_in(client)
    settings.SECRET_KEY_FALLBACKS = []
    assert is_signed_in(client)


def test_a_reset_link_survives_and_works_once(
    user: User, client: Client, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    mails: list[Any] = []
    monkeypatch.setattr(
        PasswordResetForm, "send_mail", lambda *args, **kwargs: mails.append(args[3])
    )
    settings.PASSWORD_HASHERS = STOCK["PASSWORD_HASHERS"]
    user.set_password("old")
    user.save()
    client.post("/accounts/password_reset/", {"email": user.email})
    link = reverse("password_reset_confirm", args=[mails[0]["uid"], mails[0]["token"]])
    salt = encoding.parse_stock(user.password)[0].salt.decode()
    put(user, sealed(salt=salt, key=1))
    page = client.get(link, follow=True)
    assert page.context["validlink"]
    form = {"new_password1": "kq38-fhw!lp", "new_password2": "kq38-fhw!lp"}
    answer = client.post(page.request["PATH_INFO"], form)
    assert answer.status_code == 302
    assert User.objects.get().check_password("kq38-fhw!lp")
    assert not client.get(link, follow=True).context["validlink"]


def test_a_reset_token_is_django_s_but_for_the_stable_part(user: User) -> None:
    django = users._django_make_hash_value
    for last_login in (None, user.date_joined):
        user.last_login = last_login
        ours = default_token_generator._make_hash_value(user, 5)
        theirs = django(default_token_generator, user, 5)
        assert ours == theirs.replace(user.password, encoding.stable_part(user.password))
    token = default_token_generator.make_token(user)
    user.password = sealed(key=1)
    assert default_token_generator.check_token(user, token)
    user.password = sealed(salt="another salt of it")
    assert not default_token_generator.check_token(user, token)


def test_a_token_generator_of_the_site_s_own_is_left_alone(user: User) -> None:
    class Own(PasswordResetTokenGenerator):
        def _make_hash_value(self, user: Any, timestamp: int) -> str:
            return f"{user.password}{timestamp}"

    token = Own().make_token(user)
    user.password = sealed(key=1)
    assert not Own().check_token(user, token)


# --- settings -----------------------------------------------------------------------


@pytest.fixture
def as_django_made_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        PasswordResetTokenGenerator, "_make_hash_value", users._django_make_hash_value
    )
    for name in ("_get_session_auth_hash", "get_session_auth_fallback_hash"):
        monkeypatch.setattr(User, name, getattr(AbstractBaseUser, name))


@pytest.mark.usefixtures("as_django_made_it")
@pytest.mark.parametrize(
    ("kms_hasher", "kept"),
    [
        ({"KEY": "alias/tests", "STABLE_SESSIONS": False}, False),
        ({"KEY": "alias/tests"}, True),
        # A mistake elsewhere must not decide over sessions.
        ({"KYE": "alias/tests"}, True),
        ({"KYE": "alias/tests", "STABLE_SESSIONS": False}, False),
        ("nonsense", True),
    ],
)
def test_ready_under_any_setting(settings: Any, kms_hasher: Any, kept: bool) -> None:
    settings.KMS_HASHER = kms_hasher
    apps.get_app_config("kms_hasher").ready()
    one, two = User(password=sealed(key=0)), User(password=sealed(key=1))
    assert (one.get_session_auth_hash() == two.get_session_auth_hash()) is kept
    token = default_token_generator.make_token(one)
    assert default_token_generator.check_token(two, token) is kept


def test_stock_hashes_log_in_under_settings_that_cannot_work(
    user: User, client: Client, settings: Any
) -> None:
    settings.KMS_HASHER = {"KYE": "alias/tests"}
    settings.PASSWORD_HASHERS = [*STOCK["PASSWORD_HASHERS"], *settings.PASSWORD_HASHERS]
    user.set_password("secret")
    user.save()
    assert client.login(username="anna", password="secret")
    assert is_signed_in(client)


# --- changes in Django --------------------------------------------------------------


def test_this_django_is_as_expected(settings: Any) -> None:
    assert users.changed_in_django() == []
    settings.SECRET_KEY_FALLBACKS = ["old"]
    assert users.changed_in_django() == []


@pytest.mark.parametrize(
    ("owner", "name", "changed"),
    [
        (AbstractBaseUser, "get_session_auth_hash", lambda self: "another"),
        (AbstractBaseUser, "_get_session_auth_hash", lambda self, secret=None: "another"),
        (AbstractBaseUser, "_get_session_auth_hash", lambda self: "another signature"),
        (AbstractBaseUser, "get_session_auth_fallback_hash", lambda self: ["another"]),
        (PasswordResetTokenGenerator, "make_token", lambda self, user: "another"),
    ],
)
def test_a_change_in_django_is_found(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, changed: Any
) -> None:
    monkeypatch.setattr(owner, name, changed)
    assert users.changed_in_django() == [f"{owner.__name__}.{name}"]


def test_a_change_of_what_was_replaced_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(users, "_django_make_hash_value", lambda self, user, timestamp: "")
    assert users.changed_in_django() == ["PasswordResetTokenGenerator._make_hash_value"]


# --- the column ---------------------------------------------------------------------


def column(model: Any = User, name: str = "password") -> Column:
    return Column(model, model._meta.get_field(name), "default")


def test_the_column_takes_what_kms_may_answer(user: User) -> None:
    assert users.column_width(column()) == 1024
    for size in (157 + 32, 512):
        put(user, sealed(size=size))
        assert User.objects.get().password == sealed(size=size)
    assert len(sealed(size=512)) > 700


def test_a_value_beyond_the_width_is_invalid() -> None:
    with pytest.raises(ValidationError):
        User(username="anna", password="x" * 1025).clean_fields()


def test_widths_of_other_columns(db: None) -> None:
    from django.contrib.sessions.models import Session

    assert users.column_width(column(name="first_name")) == 150
    assert users.column_width(column(Session, "session_data")) is None
    with pytest.raises(FieldDoesNotExist):
        missing = column()
        users.column_width(Column(Session, missing.field, "default"))


def test_the_width_of_a_missing_table(transactional_db: None) -> None:
    class Elsewhere:
        class _meta:
            db_table = "no_such_table"

    with pytest.raises(DatabaseError):
        users.column_width(Column(Elsewhere, column().field, "default"))  # type: ignore[arg-type]
    connection.close()


def test_dump_and_load(user: User, tmp_path: Any) -> None:
    dump = tmp_path / "users.json"
    call_command("dumpdata", "auth.user", output=dump)
    User.objects.all().delete()
    call_command("loaddata", dump, verbosity=0)
    assert get_user_model().objects.get().password == sealed()


# --- other sites --------------------------------------------------------------------


@pytest.mark.everywhere
def test_packages_that_copy_the_field_copy_its_width() -> None:
    script = """
        from django.apps import apps
        field = apps.get_model("historical.HistoricalUser")._meta.get_field("password")
        result = [field.max_length] + [
            v.limit_value for v in field.validators if hasattr(v, "limit_value")
        ]
    """
    assert projects.run("historical", script) == [1024, 1024]


@pytest.mark.everywhere
def test_starting_imports_no_aws_library() -> None:
    script = """
        import sys
        from django.conf import settings
        from django.core.checks import run_checks
        settings.KMS_HASHER = {"KEY": "alias/tests", "AUDIT": "off"}
        run_checks(include_deployment_checks=True)
        result = sorted({"boto3", "botocore"} & set(sys.modules))
    """
    assert projects.run("historical", script) == []


class TestUpgradeAtLogin:
    """A stock hash is sealed at its user's login, which never hangs on that."""

    @pytest.fixture
    def stock(self, db: None) -> User:
        user = User(username="stock")
        user.password = make_password("secret", hasher=CheapArgon2PasswordHasher())
        user.save()
        return user

    def test_sealed_with_the_password_kept(self, stock: User) -> None:
        assert stock.check_password("secret")
        assert stock.password.startswith("kms_argon2$")
        stock.refresh_from_db()
        assert stock.password.startswith("kms_argon2$")
        assert stock.check_password("secret")

    def test_async(self, stock: User) -> None:
        assert async_to_sync(stock.acheck_password)("secret")
        assert stock.password.startswith("kms_argon2$")

    def test_not_by_a_wrong_password(self, stock: User, calls: Callable[[], list[str]]) -> None:
        before = stock.password
        assert not stock.check_password("wrong")
        assert stock.password == before
        assert calls() == []

    @pytest.mark.parametrize("broken", [{"KYE": "x"}, {"KEY": "alias/gone"}])
    def test_kms_or_settings_that_do_not_work_fail_no_login(
        self, broken: dict[str, str], stock: User, client: Client, settings: Any
    ) -> None:
        before = stock.password
        settings.KMS_HASHER = {**settings.KMS_HASHER, **broken}
        answer = client.post("/accounts/login/", {"username": "stock", "password": "secret"})
        assert answer.status_code == 302
        stock.refresh_from_db()
        assert stock.password == before
        assert SESSION_KEY in client.session

    def test_a_password_changed_meanwhile_stays(self, stock: User) -> None:
        slow = User.objects.get(pk=stock.pk)
        stock.set_password("changed")
        stock.save()
        assert slow.check_password("secret")  # what it had read
        stock.refresh_from_db()
        assert stock.check_password("changed")

    def test_no_signal_and_no_write_for_a_user_without_a_row(self, stock: User) -> None:
        user = User(username="unsaved", password=stock.password)
        assert user.check_password("secret")
        assert user.password.startswith("kms_argon2$")
        assert not User.objects.filter(username="unsaved").exists()


LOGIN = {"username": "anna", "password": PASSWORD}


@pytest.mark.django_db
class TestMovedAtLogin:
    """What only the password can bring into the present mode, or under the present MAC key."""

    @pytest.fixture(autouse=True)
    def clean(self, kms: Provider) -> Iterator[None]:
        yield
        modes.restore()
        modes.forget()

    @pytest.fixture(params=[False, True], ids=["sync", "async"])
    def login(self, request: pytest.FixtureRequest) -> Callable[[], Any]:
        def sync() -> Client:
            client = Client()
            assert client.post("/admin/login/?next=/admin/", LOGIN).status_code == 302
            return client

        def on_loop() -> AsyncClient:
            client = AsyncClient()
            post: Any = async_to_sync(client.post)
            assert post("/admin/login/?next=/admin/", LOGIN).status_code == 302
            return client

        return on_loop if request.param else sync

    @staticmethod
    def make(settings: Any, mode: str) -> User:
        modes.use(settings, mode)
        return User.objects.create_superuser("anna", "anna@example.org", PASSWORD)

    @staticmethod
    def move_alias(kms: Provider, alias: str) -> str:
        """Move it to another key, which is seen here by the next new password."""
        found = kms.describe_key(alias)
        arn = kms.create_key(spec=found.spec, usage=found.usage).key_arn
        kms.update_alias(alias, arn)
        make_password("another's")
        return encoding.key_ref(arn)

    @pytest.mark.parametrize("mode", ["mac", "mac_in_direct"])
    def test_a_mac_comes_under_the_present_key(
        self,
        mode: str,
        login: Callable[[], Any],
        settings: Any,
        kms: Provider,
        calls: Callable[[], list[str]],
        events: list[Any],
    ) -> None:
        user = self.make(settings, mode)
        other = Client()
        other.force_login(user)
        ref = self.move_alias(kms, "alias/tests-mac")
        before = encoding.parse(User.objects.get().password)
        del events[:]
        login()
        after = encoding.parse(User.objects.get().password)
        assert calls() == modes.LOGIN[mode] + modes.SET[mode]
        assert {event.purpose for event in events} == {"login"}
        assert after.header == before.header
        assert after.key_ref.split(".")[-1] == ref != before.key_ref.split(".")[-1]
        assert is_signed_in(other)
        done = len(calls())
        login()
        assert calls()[done:] == modes.LOGIN[mode]
        assert encoding.parse(User.objects.get().password) == after

    @pytest.mark.parametrize("source", modes.NAMES)
    @pytest.mark.parametrize("target", modes.NAMES)
    def test_into_the_mode_of_the_settings(
        self,
        source: str,
        target: str,
        login: Callable[[], Any],
        settings: Any,
        calls: Callable[[], list[str]],
    ) -> None:
        user = self.make(settings, source)
        other = Client()
        other.force_login(user)
        modes.use(settings, target)
        done = len(calls())
        login()
        moved = encoding.parse(User.objects.get().password)
        assert moved.mode == MODES[target].code
        assert moved.header == encoding.parse(user.password).header
        if source != target:
            first = modes.FIRST[target]
            assert calls()[done:] in (
                modes.LOGIN[source] + first,
                modes.LOGIN[source] + modes.SET[target],
            )
        assert is_signed_in(other)
        done = len(calls())
        login()
        assert calls()[done:] == modes.LOGIN[target]

    def test_not_by_a_wrong_password(self, settings: Any) -> None:
        user = self.make(settings, "direct")
        modes.use(settings, "envelope")
        assert not user.check_password("wrong")
        assert not async_to_sync(user.acheck_password)("wrong")
        assert User.objects.get().password == user.password

    @pytest.mark.parametrize("awaited", [False, True])
    def test_by_the_model_s_own_method(self, awaited: bool, settings: Any) -> None:
        user = self.make(settings, "direct")
        modes.use(settings, "mac")
        check = async_to_sync(user.acheck_password) if awaited else user.check_password
        assert check(PASSWORD)
        assert User.objects.get().password == user.password
        assert "$m1$" in user.password
        assert not check(None)

    @pytest.mark.parametrize(
        "error",
        [
            exceptions.KMSTimeout(),
            exceptions.KMSAccessDenied(),
            exceptions.KeyNotFound(),
            exceptions.KMSCircuitOpen(),
            RuntimeError("a provider of the site's own"),
        ],
        ids=lambda error: type(error).__name__,
    )
    def test_kms_that_fails_there_fails_no_login(
        self,
        error: Exception,
        login: Callable[[], Any],
        settings: Any,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        def fail(*args: Any, **kwargs: Any) -> Any:
            raise error

        user = self.make(settings, "direct")
        modes.use(settings, "mac")
        monkeypatch.setattr(keyring.provider(), "generate_mac", fail)
        login()
        assert User.objects.get().password == user.password
        assert "A password could not be moved at a login: " in caplog.text
        assert PASSWORD not in caplog.text

    def test_a_password_changed_meanwhile_stays(
        self, settings: Any, kms: Provider, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        user = self.make(settings, "direct")
        changed = make_password("changed")
        modes.use(settings, "mac")
        real = kms.generate_mac

        def generate_mac(*args: Any, **kwargs: Any) -> Any:
            User.objects.update(password=changed)
            return real(*args, **kwargs)

        monkeypatch.setattr(kms, "generate_mac", generate_mac)
        old = user.password
        assert user.check_password(PASSWORD)
        assert User.objects.get().password == changed
        assert user.password == old

    def test_a_user_without_a_row(self, settings: Any) -> None:
        password = self.make(settings, "direct").password
        modes.use(settings, "mac")
        user = User(username="unsaved", password=password)
        assert user.check_password(PASSWORD)
        assert "$m1$" in user.password

    def test_not_if_the_settings_say_so(self, settings: Any, calls: Any) -> None:
        user = self.make(settings, "direct")
        modes.use(settings, "mac", REWRAP_ON_LOGIN=False)
        done = len(calls())
        assert user.check_password(PASSWORD)
        assert calls()[done:] == ["Decrypt"]
        assert "$d1$" in User.objects.get().password

    def test_not_where_it_would_end_the_session(
        self, settings: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        user = self.make(settings, "direct")
        modes.use(settings, "mac")
        monkeypatch.setattr(
            User, "_get_session_auth_hash", AbstractBaseUser._get_session_auth_hash
        )
        assert user.check_password(PASSWORD)
        assert "$d1$" in User.objects.get().password

    def test_a_key_is_named_and_no_alias(
        self, settings: Any, kms: Provider, calls: Any
    ) -> None:
        user = self.make(settings, "mac")
        arn = kms.describe_key("alias/tests-mac").key_arn
        settings.KMS_HASHER = {**settings.KMS_HASHER, "KEY": arn.rpartition("/")[2]}
        done = len(calls())
        assert user.check_password(PASSWORD)
        assert calls()[done:] == ["GenerateMac"]

    def test_nothing_is_known_of_the_alias(
        self, settings: Any, calls: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        user = self.make(settings, "mac")
        monkeypatch.setattr("kms_hasher.history.current_period", lambda alias: None)
        done = len(calls())
        assert user.check_password(PASSWORD)
        assert calls()[done:] == ["GenerateMac"]

    def test_an_upgrade_goes_into_the_mode_by_itself(self, settings: Any, calls: Any) -> None:
        modes.use(settings, "mac")
        make_password("another's")
        user = User.objects.create(
            username="stock",
            password=make_password(PASSWORD, hasher=CheapArgon2PasswordHasher()),
        )
        done = len(calls())
        assert user.check_password(PASSWORD)
        assert calls()[done:] == ["GenerateMac"]
        assert "$m1$" in User.objects.get(username="stock").password

    @pytest.mark.parametrize("place", ["history", "swap"])
    def test_the_request_s_transaction_lives_on(
        self,
        place: str,
        settings: Any,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """PostgreSQL refuses all that follows a failed statement."""

        def fail(*args: Any, **kwargs: Any) -> Any:
            with connection.cursor() as cursor:
                cursor.execute("SELECT 1 FROM no_such_table")

        if place == "history":
            user = self.make(settings, "mac")
            monkeypatch.setattr("kms_hasher.history.current_period", fail)
        else:
            user = self.make(settings, "direct")
            modes.use(settings, "mac")
            monkeypatch.setattr(Column, "swap", fail)
        with transaction.atomic():
            assert user.check_password(PASSWORD)
            assert User.objects.get().password == user.password
        assert "could not be moved at a login: " in caplog.text
        assert "no_such_table" not in caplog.text

    @pytest.mark.parametrize(
        ("password", "may"),
        [
            ("", False),
            ("!", False),
            ("argon2$x", False),
            ("kms_argon2$gibberish", False),
            ("sealed", False),
        ],
    )
    def test_may_move(self, password: str, may: bool, settings: Any) -> None:
        user = self.make(settings, "direct")
        user.password = user.password if password == "sealed" else password
        assert users.may_move(user) is may
        modes.use(settings, "mac")
        assert users.may_move(user) is (password == "sealed")
        settings.KMS_HASHER = {"KYE": "broken"}
        assert users.may_move(user) is False
