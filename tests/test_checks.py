from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth.base_user import AbstractBaseUser
from django.contrib.auth.models import AbstractUser, Group, User
from django.core.checks import CheckMessage, Error, Warning, run_checks
from django.core.management import call_command
from django.db import connection, models
from django.test.utils import CaptureQueriesContext, isolate_apps

from kms_hasher import checks, columns, users
from tests.test_migrations import alter_column, migrate
from tests.test_users import sealed

MODES = ("direct", "public_key", "envelope", "mac", "mac_in_direct")
WIDE = ("direct", "public_key", "mac_in_direct")
KEY_ARN = "arn:aws:kms:eu-west-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"


def run(**options: Any) -> list[CheckMessage]:
    """Run the checks as `check --tag kms_hasher --tag database --database ...` does."""
    tags = [checks.TAG, checks.checks.Tags.database] if "databases" in options else [checks.TAG]
    found = run_checks(tags=tags, **options)
    ours = [message for message in found if message.id.startswith("kms_hasher.")]
    return sorted(ours, key=lambda message: (message.id, message.msg))


def only(messages: list[CheckMessage], id: str) -> CheckMessage:
    """The one message there is, which must say what to do."""
    assert [message.id for message in messages] == [f"kms_hasher.{id}"]
    assert messages[0].hint
    assert type(messages[0]) is (Error if id[0] == "E" else Warning)
    return messages[0]


def configure(settings: Any, **changes: Any) -> None:
    settings.KMS_HASHER = settings.KMS_HASHER | changes


# --- the table of ids ---------------------------------------------------------------


def test_each_id_stands_for_one_thing_and_has_a_test() -> None:
    source = Path(checks.__file__).read_text()
    used = re.findall(r'id="kms_hasher\.(\w+)"', source)
    assert (
        len(used)
        == len(set(used))
        == sum(source.count(f"checks.{kind}(") for kind in ("Error", "Warning", "Info"))
    )
    assert sorted(used) == re.findall(r"^    ([EWI]\d{3})  ", checks.__doc__ or "", re.M)
    tested = " ".join(name for name in globals() if name.startswith("test_"))
    assert [id for id in used if f"test_{id.lower()}_" not in tested] == []


@pytest.mark.django_db
def test_a_site_in_order() -> None:
    assert run(databases=["default"]) == []


def test_they_run_with_all_others(settings: Any) -> None:
    configure(settings, KYE="alias/tests")
    assert "kms_hasher.E001" in [message.id for message in run_checks()]


# --- settings -----------------------------------------------------------------------


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({}, "KEY"),
        ("alias/tests", "dictionary"),
        ({"KEY": "alias/tests", "PROVIDRE": "local"}, "'PROVIDER'"),
        ({"KEY": 5}, "type"),
        ({"KEY": "no key"}, "'no key'"),
        ({"KEY": "alias/tests", "PREVIOUS_KEYS": ["1"]}, "PREVIOUS_KEYS"),
        ({"KEY": "alias/tests", "AUDIT": "sometimes"}, "sometimes"),
        ({"KEY": "alias/tests", "MODE": "indirect"}, "indirect"),
    ],
)
def test_e001_settings_that_cannot_be_used(settings: Any, value: Any, said: str) -> None:
    settings.KMS_HASHER = value
    messages = run(databases=["default"], include_deployment_checks=True)
    messages = [message for message in messages if message.id != "kms_hasher.W005"]
    assert said in only(messages, "E001").msg


class Failing:
    def __init__(self) -> None:
        raise OSError("no such device")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"PROVIDER": "azure"}, "azure"),
        ({"PROVIDER": "no.such.Provider"}, "no.such.Provider"),
        ({"PROVIDER": "tests.test_checks.Failing", "OPTIONS": {}}, "OSError: no such device"),
        ({"OPTIONS": {"pth": "keys.json"}}, "pth"),
        ({"PROVIDER": "local", "OPTIONS": {"path": "keys.json"}}, "allow_without_debug"),
        ({"PROVIDER": "aws", "KEY": KEY_ARN, "OPTIONS": {"region": ""}}, "region"),
        ({"PROVIDER": "aws", "KEY": KEY_ARN, "OPTIONS": {"regoin": "eu-west-1"}}, "regoin"),
    ],
)
def test_e002_a_provider_that_cannot_be_made(
    settings: Any, changes: dict[str, Any], said: str
) -> None:
    configure(settings, **changes)
    assert said in only(run(), "E002").msg


def test_e002_a_key_file_that_cannot_be_read(settings: Any, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    options = {"path": path, "allow_without_debug": True}
    configure(settings, PROVIDER="local", OPTIONS=options)
    assert run() == []  # it is made with the first key
    path.write_text("{}")
    path.chmod(0o600)
    assert str(path) in only(run(), "E002").msg


@pytest.mark.django_db
@pytest.mark.parametrize("label", ["auth.User.passwort", "auth.Nobody.password", "x", 5])
def test_e003_password_fields(settings: Any, label: Any) -> None:
    configure(settings, PASSWORD_FIELDS=[label])
    assert repr(label) in only(run(databases=["default"]), "E003").msg
    configure(settings, PASSWORD_FIELDS=["auth.User.is_staff"])
    assert "text" in only(run(databases=["default"]), "E003").msg


@pytest.mark.django_db
def test_e004_databases(settings: Any) -> None:
    configure(settings, DATABASES=["default", "replica"])
    assert "replica" in only(run(databases=["default"]), "E004").msg


@pytest.fixture
def no_region(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in list(checks.os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)


@pytest.mark.usefixtures("no_region")
def test_w004_no_region(settings: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    configure(settings, PROVIDER="aws", OPTIONS={})
    only(run(), "W004")
    monkeypatch.setenv("AWS_REGION", "eu-west-1")  # botocore does not read it
    only(run(), "W004")
    configure(settings, OPTIONS={"region": "eu-west-1"})
    assert run() == []
    configure(settings, OPTIONS={}, KEY=KEY_ARN)
    assert run() == []
    configure(settings, KEY="alias/tests")
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws/config").touch()  # which may name one
    assert run() == []
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    only(run(), "W004")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "~nobody-of-this-name/file")
    only(run(), "W004")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    assert run() == []


def test_w005_the_local_provider_in_production(settings: Any, tmp_path: Path) -> None:
    options = {"path": tmp_path / "keys.json", "allow_without_debug": True}
    configure(settings, PROVIDER="local", OPTIONS=options)
    only(run(include_deployment_checks=True), "W005")
    configure(settings, PROVIDER="kms_hasher.testing.InMemoryProvider", OPTIONS={})
    only(run(include_deployment_checks=True), "W005")
    configure(settings, PROVIDER="aws", OPTIONS={"region": "eu-west-1"})
    assert run(include_deployment_checks=True) == []


# --- the user model and Django ------------------------------------------------------


def use(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    """Let the checks see another user model."""
    for module in (checks, columns):
        monkeypatch.setattr(module, "get_user_model", lambda: model)


@pytest.mark.django_db
def test_e005_no_user_model(monkeypatch: pytest.MonkeyPatch, settings: Any) -> None:
    settings.AUTH_USER_MODEL = "auth.Nobody"
    only(run(databases=["default"]), "E005")
    settings.AUTH_USER_MODEL = "auth.User"
    use(monkeypatch, Group)
    only(run(databases=["default"]), "E005")


@isolate_apps("tests")
def test_e006_a_short_field_of_the_user_model(monkeypatch: pytest.MonkeyPatch) -> None:
    class Person(users.KMSUserMixin, AbstractBaseUser):
        password = models.CharField(max_length=200)

        class Meta:
            app_label = "tests"

    use(monkeypatch, Person)
    message = only(run(), "E006")
    assert "200" in message.msg
    assert "class Person(KMSUserMixin, ...)" in str(message.hint)


def test_e006_a_short_field_in_password_fields(settings: Any) -> None:
    configure(
        settings, PASSWORD_FIELDS=["auth.User.first_name", "sessions.Session.session_data"]
    )
    message = only(run(), "E006")
    assert "max_length=1024" in str(message.hint)
    assert "auth.User.first_name" in message.msg


def test_e006_is_found_beside_other_mistakes(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.KMS_HASHER = {}
    monkeypatch.setattr(User._meta.get_field("password"), "max_length", 128)
    assert {"kms_hasher.E001", "kms_hasher.E006"} == {message.id for message in run()}


@pytest.mark.parametrize("mode", MODES)
def test_e006_in_each_mode(mode: str, settings: Any) -> None:
    configure(
        settings, PASSWORD_FIELDS=["auth.User.first_name"], MODE=mode, MAC_KEY="alias/mac"
    )
    found = [message for message in run() if message.id == "kms_hasher.E006"]
    assert bool(found) is (mode in WIDE)  # it holds 150 characters, and two modes need 128


@isolate_apps("tests")
def test_w002_sessions_of_a_custom_model(
    monkeypatch: pytest.MonkeyPatch, settings: Any
) -> None:
    class Person(AbstractUser):
        groups = user_permissions = None
        password = models.CharField(max_length=1024)

        class Meta:
            app_label = "tests"

    class Own(Person):
        class Meta:
            app_label = "tests"

        def _get_session_auth_hash(self, secret: Any = None) -> str:
            return "what the site likes"

    class Sealed(users.KMSUserMixin, AbstractBaseUser):
        class Meta:
            app_label = "tests"

    use(monkeypatch, Person)
    assert "KMSUserMixin" in str(only(run(), "W002").hint)
    for model in (Own, Sealed):
        use(monkeypatch, model)
        assert run() == []
    use(monkeypatch, Person)
    configure(settings, STABLE_SESSIONS=False)
    assert run() == []


def test_w003_changes_in_django(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AbstractBaseUser, "get_session_auth_hash", lambda self: "")
    assert "AbstractBaseUser.get_session_auth_hash" in only(run(), "W003").msg
    configure(settings, STABLE_SESSIONS=False)
    assert run() == []


STOCK = "tests.hashers.CheapArgon2PasswordHasher"
OURS = "tests.hashers.CheapKMSArgon2PasswordHasher"


@pytest.mark.parametrize("hashers", [[STOCK], [STOCK, OURS]])
def test_w001_new_passwords_are_not_sealed(settings: Any, hashers: list[str]) -> None:
    settings.PASSWORD_HASHERS = hashers
    only(run(), "W001")


@pytest.mark.django_db
@pytest.mark.parametrize("hasher", ["no.such.Hasher", "nonsense", "builtins.int", 5])
def test_e009_hashers_that_cannot_be_loaded(settings: Any, hasher: Any) -> None:
    settings.PASSWORD_HASHERS = [hasher]
    only(run(databases=["default"]), "E009")


def test_w001_no_hashers(settings: Any) -> None:
    settings.PASSWORD_HASHERS = []
    only(run(), "W001")


def test_w007_a_backend_that_tells_unknown_users(settings: Any) -> None:
    settings.AUTHENTICATION_BACKENDS = ["django.contrib.auth.backends.ModelBackend"]
    only(run(), "W007")
    settings.PASSWORD_HASHERS = ["tests.hashers.CheapArgon2PasswordHasher"]
    only(run(), "W001")  # where nothing is sealed, the stock backend is right


# --- the database -------------------------------------------------------------------


@pytest.fixture
def narrow_column(transactional_db: None) -> Any:
    """The column of users as it was before the app: 128 characters."""
    alter_column(128)
    yield
    migrate("kms_hasher", "0001")  # widens nothing, but lets 0002 be applied again
    migrate()


@pytest.mark.usefixtures("narrow_column")
def test_e007_a_column_that_is_too_short() -> None:
    message = only(run(databases=["default"]), "E007")
    assert "128" in message.msg
    assert "varchar(1024)" in str(message.hint)
    assert run() == []  # only with --database


@pytest.mark.usefixtures("narrow_column")
def test_w006_a_column_that_waits_for_its_migration() -> None:
    migrate("kms_hasher", "0001")
    only(run(databases=["default"]), "W006")
    # As from the command line: the checks must not stop it.
    call_command("migrate", verbosity=0, skip_checks=False)
    assert run(databases=["default"]) == []


@pytest.mark.usefixtures("narrow_column")
@pytest.mark.parametrize("mode", MODES)
def test_e007_and_w006_in_each_mode(mode: str, settings: Any) -> None:
    configure(settings, MODE=mode, MAC_KEY="alias/mac")

    def found() -> list[str]:
        messages = [message.id for message in run(databases=["default"])]
        return [id.partition(".")[2] for id in messages if id.endswith(("E007", "W006"))]

    assert found() == (["E007"] if mode in WIDE else [])
    configure(settings, MODE="direct")
    migrate("kms_hasher", "0001")
    configure(settings, MODE=mode)
    assert found() == (["W006"] if mode in WIDE else [])


@pytest.mark.django_db
def test_e008_a_hasher_that_rows_need(settings: Any) -> None:
    User.objects.create(username="anna", password=sealed())
    User.objects.create(username="bert", password="kms_argon2$not$ours")
    User.objects.create(username="carl", password="!unusable")
    User.objects.create(username="dora", password="argon2$stock")
    User.objects.create(username="emil", password=sealed().replace("argon2", "another", 1))
    message = only(run(databases=["default"]), "E008")
    assert "'kms_another'" in message.msg
    settings.PASSWORD_HASHERS = [STOCK]
    messages = run(databases=["default"])
    assert [message.id[11:] for message in messages] == ["E008", "E008", "W001"]
    assert "'kms_another'" in messages[0].msg
    assert "'kms_argon2'" in messages[1].msg
    User.objects.filter(username__in=("anna", "emil")).delete()
    only(run(databases=["default"]), "W001")


@pytest.mark.django_db
def test_databases_left_out_are_not_looked_at(settings: Any) -> None:
    settings.DATABASES["replica"] = settings.DATABASES["default"]
    try:
        configure(settings, DATABASES=["replica"])
        with CaptureQueriesContext(connection) as queries:
            assert run(databases=["default"]) == []
        # But for data keys: nobody could log in without them.
        assert not any("auth_user" in query["sql"] for query in queries)
    finally:
        del settings.DATABASES["replica"]


@pytest.mark.django_db
def test_a_column_to_come_is_passed_over(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(User._meta.get_field("password"), "column", "password_to_come")
    assert run(databases=["default"]) == []


# --- modes --------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["mac", "mac_in_direct"])
def test_i001_a_mode_that_is_not_left_without_passwords(mode: str, settings: Any) -> None:
    configure(settings, MODE=mode, MAC_KEY="alias/mac")
    (message,) = checks.check_settings(None)
    assert (message.id, message.level) == ("kms_hasher.I001", 20)


def test_e010_costs_that_are_written_too_long(settings: Any) -> None:
    configure(settings, MODE="envelope")
    assert checks.check_hashers(None) == []
    settings.PASSWORD_HASHERS = ["kms_hasher.hashers.KMSScryptPasswordHasher"]
    (message,) = checks.check_hashers(None)
    assert message.id == "kms_hasher.E010"
    assert "168 characters" in message.msg
    configure(settings, MODE="mac")
    assert checks.check_hashers(None) == []


@pytest.mark.parametrize("pem", ["", "no key"])
def test_e011_what_is_no_public_key(pem: str, settings: Any) -> None:
    arn = "arn:aws:kms:eu-west-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"
    configure(settings, MODE="public_key", KEY=arn, PUBLIC_KEY=pem)
    found = [message.id for message in checks.check_settings(None)]
    assert ("kms_hasher.E011" in found) == bool(pem)


@pytest.mark.parametrize("mode", ["mac", "public_key", "mac_in_direct", "direct", "envelope"])
def test_w008_an_audit_that_cannot_be_sealed(mode: str, settings: Any) -> None:
    def found() -> list[str]:
        ids = (str(message.id) for message in checks.check_settings(None))
        return [id for id in ids if id.endswith("W008")]

    configure(settings, MODE=mode, MAC_KEY="alias/mac")
    assert found() == []  # it may be a site that does not seal
    configure(settings, AUDIT_SEAL_KEY="alias/seals")
    assert len(found()) == (mode in ("mac", "public_key"))
    configure(settings, AUDIT_CONTEXT_KEY="alias/contexts")
    assert found() == []
