"""
The main job on whichever database there is: a site signs in, rotates its key, signs in.

Once with the local provider, and once with boto3 talking HTTP to the double of KMS. Both
make ciphertexts of AWS's size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.contrib.auth.tokens import default_token_generator
from django.core.management import call_command
from django.test import Client
from django.urls import reverse

from kms_hasher import encoding, exceptions, keyring
from kms_hasher.models import AliasPeriod, AuditEvent, Key, RotationRun
from tests.kms_double import KMSDouble

pytestmark = pytest.mark.django_db
PASSWORD = "correct horse battery staple"


@pytest.fixture(params=["local", pytest.param("aws", marks=pytest.mark.everywhere)])
def provider(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    settings: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[KMSDouble | None]:
    """The site's provider, with an alias and a key behind it."""
    options: dict[str, Any] = {"path": tmp_path / "keys.json", "allow_without_debug": True}
    if request.param == "aws":
        options = {"region": "eu-central-1", "read_timeout": 0.5}
    settings.KMS_HASHER = {
        "PROVIDER": request.param,
        "KEY": "alias/site",
        "OPTIONS": options,
        "AUDIT": "inline",
    }
    if request.param == "local":
        call_command("rotate_kms_key", new_key=True, settle=0)
        yield None
        return
    with KMSDouble() as double:
        monkeypatch.setenv("AWS_ENDPOINT_URL_KMS", double.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAIOSFODNN7EXAMPLE")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "an example, and no secret")
        call_command("rotate_kms_key", new_key=True, settle=0)
        yield double
        keyring.provider().close()


def sign_in(username: str, password: str = PASSWORD) -> Client | None:
    client = Client()
    answer = client.post(reverse("admin:login"), {"username": username, "password": password})
    return client if answer.status_code == 302 else None


def is_signed_in(client: Client) -> bool:
    return client.get(reverse("admin:index")).status_code == 200


@pytest.mark.usefixtures("provider")
def test_create_sign_in_rotate_sign_in() -> None:
    for name in ("anna", "bela", "carl"):
        User.objects.create_superuser(name, f"{name}@example.org", PASSWORD)
    before = dict(User.objects.values_list("username", "password"))
    assert {len(encoding.parse(text).sealed) for text in before.values()} == {184}

    client = sign_in("anna")
    assert client is not None
    assert is_signed_in(client)
    assert sign_in("anna", "wrong") is None
    bela = User.objects.get(username="bela")
    token = default_token_generator.make_token(bela)

    AuditEvent.objects.all()._raw_delete("default")
    call_command("rotate_kms_key", new_key=True, disable_old=True, settle=0, concurrency=1)

    calls = Counter(AuditEvent.objects.values_list("operation", "outcome", "purpose"))
    assert calls["ReEncrypt", "success", "rotate"] == 3
    assert calls["Decrypt", "success", "rotate"] == calls["Encrypt", "success", "rotate"] == 0
    # Before a key is disabled, rows are opened again.
    assert calls["Decrypt", "success", "verify"] == 3
    after = dict(User.objects.values_list("username", "password"))
    old, new = AliasPeriod.objects.order_by("pk")
    assert {encoding.parse(text).key_ref for text in before.values()} == {old.key.ref}
    assert {encoding.parse(text).key_ref for text in after.values()} == {new.key.ref}
    assert old.until is not None
    assert new.until is None
    assert Key.objects.get(ref=old.key.ref).state == "Disabled"
    assert RotationRun.objects.latest("pk").rewritten == 3

    assert is_signed_in(client)
    assert sign_in("carl") is not None
    assert sign_in("carl", "wrong") is None
    bela.refresh_from_db()
    assert default_token_generator.check_token(bela, token)

    bela.set_password("another password")
    bela.save()
    assert not default_token_generator.check_token(bela, token)
    client.post(
        reverse("admin:password_change"),
        {
            "old_password": PASSWORD,
            "new_password1": "Tr0ub4dor&3 and more",
            "new_password2": "Tr0ub4dor&3 and more",
        },
    )
    assert is_signed_in(client)
    assert sign_in("anna") is None
    assert sign_in("anna", "Tr0ub4dor&3 and more") is not None


@pytest.mark.usefixtures("provider")
def test_seal_an_existing_site_and_leave_again(settings: Any) -> None:
    ours, stock = settings.PASSWORD_HASHERS
    settings.PASSWORD_HASHERS = [stock, ours]
    User.objects.create_superuser("anna", "anna@example.org", PASSWORD)
    client = sign_in("anna")
    assert client is not None
    before = User.objects.get().password
    assert before.startswith("argon2$")

    settings.PASSWORD_HASHERS = [ours, stock]
    call_command("wrap_passwords", interactive=False, concurrency=1)
    assert User.objects.get().password.startswith("kms_argon2$")
    assert is_signed_in(client)
    assert sign_in("anna") is not None

    settings.PASSWORD_HASHERS = [stock, ours]
    call_command("unwrap_passwords", confirm="unwrap 1 passwords", concurrency=1)
    assert User.objects.get().password == before
    assert is_signed_in(client)
    assert sign_in("anna") is not None


@pytest.mark.everywhere
@pytest.mark.parametrize("provider", ["aws"], indirect=True)
@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("hang", exceptions.KMSTimeout),
        ("reset", exceptions.KMSConnectionError),
        ("http_503", exceptions.KMSInternalError),
        ("ThrottlingException", exceptions.KMSThrottled),
        ("AccessDeniedException", exceptions.KMSAccessDenied),
        ("DisabledException", exceptions.KeyDisabled),
        ("NotFoundException", exceptions.KeyNotFound),
        ("no_fields", exceptions.KMSBadResponse),
        ("truncated", exceptions.KMSBadResponse),
    ],
)
def test_an_outage_is_never_a_wrong_password(
    provider: KMSDouble, fault: str, error: type[Exception]
) -> None:
    user = User.objects.create_user("anna", "anna@example.org", PASSWORD)
    stored = user.password
    provider.fail("*", fault)
    client = Client()
    with pytest.raises(error):
        client.post(reverse("admin:login"), {"username": "anna", "password": PASSWORD})
    user.refresh_from_db()
    assert user.password == stored
    event = AuditEvent.objects.latest("pk")
    assert (event.operation, event.purpose) == ("Decrypt", "login")
    assert event.outcome != "success"
    assert event.error_code


def test_settings_that_aws_cannot_work_with_are_said_plainly(
    settings: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_DEFAULT_REGION", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    settings.KMS_HASHER = {"KEY": "alias/site", "AUDIT": "inline"}
    with pytest.raises(exceptions.ConfigurationError, match="There is no AWS Region"):
        User.objects.create_user("anna", "anna@example.org", PASSWORD)
    event = AuditEvent.objects.get()
    assert (event.outcome, event.error_code) == ("error", "ConfigurationError")
