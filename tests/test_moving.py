"""
Rotation, moves between modes, data keys and the seals of all hashers, through the commands.
"""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding
from django.conf import settings as django_settings
from django.contrib.auth.hashers import check_password, make_password
from django.contrib.auth.models import User
from django.contrib.auth.tokens import default_token_generator
from django.core.management import CommandError, call_command
from django.db import connection
from django.db.backends.base.base import BaseDatabaseWrapper
from django.utils import timezone
from django.utils.module_loading import import_string

from kms_hasher import columns, data_keys, encoding, inner, keyring, modes, policies, users
from kms_hasher import exceptions as errors
from kms_hasher.management.commands import widen_password_column
from kms_hasher.models import DataKey, Key, RotationRun
from kms_hasher.modes import public_key
from kms_hasher.providers.base import Provider
from kms_hasher.rotation import (
    costs,
    engine,
    jobs,
    plan,
    rotate,
    runs,
    seal,
    status,
    sweeps,
    verify,
    workers,
)
from kms_hasher.rotation.engine import Options
from kms_hasher.signals import Event, kms_event
from tests.modes import make_keys
from tests.test_migrations import alter_column, migrate

pytestmark = pytest.mark.django_db

MODES = tuple(modes.MODES)
DIGEST = ("direct", "public_key", "envelope")
MACS = ("mac", "mac_in_direct")

ALIASES = {
    "direct": "alias/tests",
    "envelope": "alias/tests",
    "mac_in_direct": "alias/tests",
    "public_key": "alias/tests-rsa",
    "mac": "alias/tests-mac",
}
MAC_KEY = "alias/tests-mac"

#: What moves calls are made for; others look at keys.
WORK = ("Encrypt", "Decrypt", "ReEncrypt", "GenerateMac", "GenerateDataKey")

Enter = Callable[..., None]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(workers, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(sweeps, "PAUSE", 0.0)
    public_key.forget()
    data_keys.wipe()
    yield
    public_key.forget()


@pytest.fixture(scope="module")
def other_keys(key_arn: str) -> dict[str, str]:
    """The ARNs of an RSA key and an HMAC key by their aliases, made once."""
    return make_keys()


@pytest.fixture
def enter(kms: Provider, other_keys: dict[str, str], settings: Any) -> Iterator[Enter]:
    """Set the mode, and more settings, for the rest of the test."""
    given = dict(django_settings.KMS_HASHER)

    def enter_mode(mode: str, **more: Any) -> None:
        keys = {"MODE": mode, "KEY": ALIASES[mode]}
        if mode == "mac_in_direct":
            keys["MAC_KEY"] = MAC_KEY
        settings.KMS_HASHER = {**given, **keys, **more}

    yield enter_mode
    for alias, arn in other_keys.items():
        kms.enable_key(arn)
        kms.update_alias(alias, arn)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that runs would have waited for moved aliases to spread."""
    seen: list[float] = []

    def wait(record: Any, view: Any, seconds: float) -> Iterator[Any]:
        seen.append(seconds)
        yield view.progress(waiting=True)

    monkeypatch.setattr(sweeps, "_wait", wait)
    return seen


@pytest.fixture
def work(events: list[Event]) -> Callable[[], Counter[str]]:
    """The calls that moved passwords since the last look, by operation."""

    def look() -> Counter[str]:
        found = Counter(event.operation for event in events if event.operation in WORK)
        events.clear()
        return found

    return look


def make_users(number: int) -> list[User]:
    return User.objects.bulk_create(
        User(username=f"user{index}", password=make_password(f"pw{index}"))
        for index in range(number)
    )


def passwords() -> dict[Any, str]:
    return dict(User.objects.values_list("pk", "password"))


def modes_of_rows() -> Counter[str]:
    return Counter(modes.name_of(encoding.parse(each).mode) for each in passwords().values())


def all_can_sign_in() -> bool:
    found = enumerate(User.objects.order_by("pk"))
    return all(user.check_password(f"pw{index}") for index, user in found)


def ref_of(key: str) -> str:
    return encoding.key_ref(keyring.provider().describe_key(key).key_id)


def state_of(arn: str) -> str:
    return keyring.provider().describe_key(arn).state


def call(name: str, *arguments: str, status: int = 0) -> tuple[str, str]:
    """Run a command; return what it wrote to standard output, and to standard error."""
    out, err = io.StringIO(), io.StringIO()
    if name not in ("kms_status", "widen_password_column"):
        arguments = ("--concurrency=2", *arguments)
    if name == "rotate_kms_key":
        arguments = ("--settle=0", *arguments)
    try:
        call_command(name, *arguments, stdout=out, stderr=err)
    except CommandError as error:
        assert error.returncode == status, error
        return out.getvalue(), f"{err.getvalue()}{error}"
    assert status == 0, out.getvalue()
    return out.getvalue(), err.getvalue()


def rotate_(*arguments: str, status: int = 0) -> dict[str, Any]:
    out, _ = call("rotate_kms_key", *arguments, "--json", "--noinput", status=status)
    found: dict[str, Any] = json.loads(out)
    return found


def look() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(call("kms_status", "--json")[0])
    return found


# --- rotation in every mode ---------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_new_key(
    mode: str, enter: Enter, waits: list[float], work: Callable[[], Counter[str]]
) -> None:
    enter(mode, DATA_KEY_USERS=2)
    make_users(4)
    before, old = passwords(), keyring.provider().describe_key(ALIASES[mode]).key_arn
    expected = {"envelope": 2, "mac": 0}.get(mode, 4)
    planned = rotate_("--new-key", "--dry-run")
    assert planned["calls"] == expected
    work()
    done = rotate_("--new-key", "--verify=all")
    calls = work()
    assert calls["ReEncrypt"] == done["calls"] == done["rewritten"] == expected
    assert done["verified"]["bad"] == []
    # A process that has the former public key seals with it for so long.
    assert waits == [65.0 if mode == "public_key" else 0.0]
    if mode in ("envelope", "mac"):
        assert passwords() == before
    assert all_can_sign_in()
    if mode == "mac":
        return
    if mode == "mac_in_direct":
        ends = {encoding.split_refs(encoding.parse(v).key_ref)[1] for v in passwords().values()}
        assert ends == {ref_of(MAC_KEY)}
    assert done["waiting"] == done["elsewhere"] == 0
    given_up = rotate_("--disable-old")["given_up"]
    assert [each["key"] for each in given_up] == [old]
    assert state_of(old) == "Disabled"
    assert all_can_sign_in()


def test_a_new_mac_key_takes_over_as_users_sign_in(enter: Enter, waits: list[float]) -> None:
    enter("mac")
    made = make_users(3)
    old = keyring.provider().describe_key(MAC_KEY).key_arn
    out, _ = call("rotate_kms_key", "--new-key")
    assert "A MAC cannot be re-wrapped" in out
    assert "3 passwords cannot be moved without the password" in out
    assert made[0].check_password("pw0")
    assert rotate_()["waiting"] == 2
    assert rotate_("--verify=all")["verified"]["apart"] == 2
    for arguments in (["--disable-old"], ["--schedule-deletion=7"]):
        refused = rotate_(*arguments, status=1)
        assert "is still needed by 2 in auth.User.password" in refused["error"]
    assert state_of(old) == "Enabled"
    sessions = {user.pk: user.get_session_auth_hash() for user in User.objects.all()}
    assert all_can_sign_in()
    for user in User.objects.all():
        assert user.get_session_auth_hash() == sessions[user.pk]
    assert [each["key"] for each in rotate_("--disable-old")["given_up"]] == [old]
    assert state_of(old) == "Disabled"
    assert all_can_sign_in()


@pytest.mark.parametrize("mode", MODES)
def test_key_is_an_arn_and_the_former_is_among_previous_keys(mode: str, enter: Enter) -> None:
    provider = keyring.provider()
    old = provider.describe_key(ALIASES[mode])
    enter(mode, KEY=old.key_arn)
    make_users(3)
    new = provider.create_key(spec=old.spec, usage=old.usage).key_arn
    enter(mode, KEY=new, PREVIOUS_KEYS=[old.key_arn])
    assert all_can_sign_in()
    if mode == "mac":  # without an alias nothing tells a login of another key
        assert rotate_()["waiting"] == 3
        return
    done = rotate_("--verify=all")
    assert done["rewritten"] == (1 if mode == "envelope" else 3)
    enter(mode, KEY=new)
    provider.disable_key(old.key_arn)
    assert all_can_sign_in()
    assert "only an alias can be moved" in rotate_("--new-key", status=1)["error"]


@pytest.mark.parametrize("mode", MODES)
def test_new_material(
    mode: str, enter: Enter, work: Callable[[], Counter[str]], monkeypatch: Any
) -> None:
    enter(mode)
    make_users(3)
    before = passwords()
    if mode in ("public_key", "mac"):
        assert "Only symmetric keys" in rotate_("--new-material", status=1)["error"]
        return
    work()
    done = rotate_("--new-material", "--verify=all")
    assert work()["ReEncrypt"] == done["rewritten"] == (1 if mode == "envelope" else 3)
    assert (passwords() == before) is (mode == "envelope")
    assert all_can_sign_in()


@pytest.mark.parametrize("mode", MODES)
def test_verify_tells_a_row_that_does_not_open(mode: str, enter: Enter) -> None:
    enter(mode)
    one, two = make_users(2)
    sealed = encoding.parse(one.password).sealed
    stored = encoding.parse(two.password)
    swapped = encoding.SealedHash(stored.header, stored.mode, stored.key_ref, sealed)
    User.objects.filter(pk=two.pk).update(password=str(swapped))
    found = rotate_("--verify=all", status=0 if mode == "mac" else 1)["verified"]
    if mode == "mac":  # nobody can tell without the password, and it is not said
        assert (found["opened"], found["unseen"]) == (0, 2)
    else:
        data_key = mode == "envelope"
        assert (found["opened"], len(found["bad"])) == (1 + data_key, 1)


@pytest.mark.parametrize("mode", MODES)
def test_a_key_of_another_kind_is_refused(mode: str, enter: Enter) -> None:
    wrong = "direct" if mode in ("public_key", "mac") else "mac"
    enter(mode, KEY=ALIASES[wrong])
    for arguments in ([], ["--new-key"], ["--to-mode", mode]):
        refused = rotate_(*arguments, status=1)
        assert f"the mode '{mode}' needs a key that is" in refused["error"]
    out, _ = call("kms_status", status=1)
    assert f"the mode '{mode}' needs a key that is" in out


def test_an_hmac_key_of_another_size_is_refused(
    enter: Enter, kms: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = kms.create_key(spec="HMAC_256", usage="GENERATE_VERIFY_MAC")
    describe = kms.describe_key

    def longer(key: str) -> Any:
        found = describe(key)
        same = found.key_arn == other.key_arn
        return dataclasses.replace(found, spec="HMAC_512") if same else found

    monkeypatch.setattr(kms, "describe_key", longer)
    enter("mac", KEY=other.key_arn)
    assert "needs a key that is HMAC_256" in rotate_(status=1)["error"]
    enter("mac_in_direct", MAC_KEY=other.key_id)
    assert "Let MAC_KEY name such a key" in rotate_(status=1)["error"]
    kms.disable_key(other.key_arn)
    assert "it must be Enabled" in rotate_(status=1)["error"]
    enter("mac_in_direct", MAC_KEY="alias/none")
    assert "MAC_KEY leads to 'alias/none'" in rotate_(status=1)["error"]
    assert "MAC_KEY leads to 'alias/none'" in call("kms_status", status=1)[0]


# --- moves between modes ------------------------------------------------------------


def moves(source: str, target: str) -> bool:
    return source != target and (source in DIGEST or target in MACS)


@pytest.mark.parametrize("target", MODES)
@pytest.mark.parametrize("source", MODES)
def test_every_move(
    source: str, target: str, enter: Enter, work: Callable[[], Counter[str]]
) -> None:
    enter(source, DATA_KEY_USERS=2)
    made = make_users(3)
    before = passwords()
    sessions = {user.pk: user.get_session_auth_hash() for user in made}
    tokens = {user.pk: default_token_generator.make_token(user) for user in made}
    enter(target, DATA_KEY_USERS=2)
    public_key.forget()
    planned = rotate_("--to-mode", target, "--dry-run")
    assert passwords() == before
    assert not RotationRun.objects.exists()
    work()
    done = rotate_("--to-mode", target)
    assert work() == Counter(
        {name: n for name, n in planned["operations"].items() if name in WORK}
    )
    number = 3 if moves(source, target) else 0
    assert done["rewritten"] == number
    waiting = 3 if source in MACS and target in DIGEST else 0
    assert done["waiting"] == planned["waiting"] == waiting
    assert modes_of_rows() == {(source if waiting else target): 3}
    if not number:
        assert passwords() == before
    for user in User.objects.all():
        assert user.get_session_auth_hash() == sessions[user.pk]
        assert default_token_generator.check_token(user, tokens[user.pk])
    assert rotate_("--to-mode", target, "--verify=all")["verified"]["bad"] == []
    assert rotate_("--to-mode", target)["rewritten"] == 0
    assert all_can_sign_in()  # and what waited moves now
    assert modes_of_rows() == {target: 3}
    for user in User.objects.all():
        assert user.get_session_auth_hash() == sessions[user.pk]


@pytest.mark.parametrize(
    ("source", "target"),
    [("direct", "public_key"), ("public_key", "envelope"), ("direct", "mac")],
)
def test_the_key_of_the_mode_that_was_left_is_disabled(
    source: str, target: str, enter: Enter
) -> None:
    enter(source)
    make_users(2)
    old = keyring.provider().describe_key(ALIASES[source]).key_arn
    enter(target)
    given_up = rotate_("--to-mode", target, "--disable-old")["given_up"]
    assert [each["key"] for each in given_up] == [old]
    assert all_can_sign_in()


def test_a_key_that_a_forged_row_names_is_not_disabled(enter: Enter, kms: Provider) -> None:
    enter("direct")
    forged, user = make_users(2)
    stored = encoding.parse(forged.password)
    other = kms.create_key()  # somebody's in the same account
    value = dataclasses.replace(stored, key_ref=encoding.key_ref(other.key_id))
    User.objects.filter(pk=forged.pk).update(password=str(value))
    enter("public_key")
    rotate_("--to-mode", "public_key", status=3)
    User.objects.filter(pk=forged.pk).update(password=user.password)
    given_up = rotate_("--to-mode", "public_key", "--disable-old")["given_up"]
    assert other.key_arn not in {each["key"] for each in given_up}
    assert state_of(other.key_arn) == "Enabled"


def test_a_mac_that_is_moved_keeps_its_key(enter: Enter, key_arn: str) -> None:
    enter("mac")
    make_users(2)
    enter("mac_in_direct")
    assert rotate_("--to-mode", "mac_in_direct", "--disable-old")["given_up"] == []
    enter("mac")
    given_up = rotate_("--to-mode", "mac", "--disable-old")["given_up"]
    assert [each["key"] for each in given_up] == [key_arn]
    assert all_can_sign_in()


def test_data_keys_hold_their_key_until_they_are_pruned(enter: Enter, key_arn: str) -> None:
    enter("envelope")
    make_users(2)
    enter("public_key")
    refused = rotate_("--to-mode", "public_key", "--disable-old", status=1)
    assert "is still needed by 1 in kms_hasher.DataKey.sealed" in refused["error"]
    assert rotate_("--prune-data-keys")["deleted"] == 0  # retired just now
    DataKey.objects.update(retired_at=timezone.now() - data_keys.GRACE)
    assert rotate_("--prune-data-keys", "--dry-run")["data_keys"] == 1
    assert rotate_("--prune-data-keys")["deleted"] == 1
    given_up = rotate_("--to-mode", "public_key", "--disable-old")["given_up"]
    assert [each["key"] for each in given_up] == [key_arn]
    assert all_can_sign_in()


def test_the_mac_key_is_disabled_when_the_last_user_has_signed_in(enter: Enter) -> None:
    enter("mac")
    make_users(2)
    old = keyring.provider().describe_key(MAC_KEY).key_arn
    enter("direct")
    refused = rotate_("--to-mode", "direct", "--disable-old", status=1)
    assert "is still needed by 2 in auth.User.password" in refused["error"]
    assert all_can_sign_in()
    given_up = rotate_("--to-mode", "direct", "--disable-old")["given_up"]
    assert [each["key"] for each in given_up] == [old]
    assert all_can_sign_in()


@pytest.mark.parametrize("target", MACS)
@pytest.mark.parametrize("answer", ["y", "no"])
def test_a_mode_that_cannot_be_left_asks(
    target: str, answer: str, enter: Enter, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter("direct")
    make_users(2)
    enter(target)
    monkeypatch.setattr("builtins.input", lambda: answer)
    out, err = call("rotate_kms_key", "--to-mode", target, status=0 if answer == "y" else 1)
    assert "It cannot be left without passwords" in out
    assert modes_of_rows() == {target if answer == "y" else "direct": 2}
    assert ("Not confirmed" in err) is (answer == "no")


def test_a_mode_that_the_settings_do_not_name_is_refused(enter: Enter) -> None:
    enter("direct")
    make_users(1)
    refused = rotate_("--to-mode", "envelope", status=1)
    assert "KMS_HASHER['MODE'] is 'direct'" in refused["error"]
    assert (
        "There are no data keys in the mode 'direct'"
        in (rotate_("--new-data-keys", status=1)["error"])
    )
    assert "There are no data keys" in rotate_("--make-data-keys=1", status=1)["error"]


def on_call(operation: str, run: Callable[[], Any]) -> Callable[[], None]:
    """Have `run` called at the first such call; return what ends that."""
    seen: list[Event] = []

    def listen(event: Event, **kwargs: Any) -> None:
        if event.operation == operation and event.purpose == "rotate" and not seen:
            seen.append(event)
            run()

    kms_event.connect(listen, weak=False)
    return lambda: kms_event.disconnect(listen)


def test_a_password_that_is_changed_meanwhile_is_not_overwritten(enter: Enter) -> None:
    enter("direct")
    made = make_users(4)
    enter("envelope")
    changed: list[str] = []

    def change() -> None:
        changed.append(make_password("fresh"))
        User.objects.filter(pk=made[3].pk).update(password=changed[0])

    end = on_call("Decrypt", change)
    done = rotate_("--to-mode", "envelope")
    end()
    assert passwords()[made[3].pk] == changed[0]
    assert User.objects.get(pk=made[3].pk).check_password("fresh")
    assert modes_of_rows() == {"envelope": 4}
    assert (done["rewritten"], done["overtaken"]) == (3, 1)


def test_a_run_that_was_cut_short_is_gone_on_with(enter: Enter) -> None:
    enter("direct")
    make_users(6)
    enter("envelope")
    planned = plan.make(to_mode="envelope")
    options = Options(concurrency=1, batch_size=2, settle=0)

    def stop() -> None:
        raise errors.AuditError

    end = on_call("Decrypt", stop)
    with pytest.raises(errors.AuditError):
        list(rotate.rotate(planned, options))
    end()
    assert RotationRun.objects.get().state == "failed"
    again = plan.make(to_mode="envelope")
    assert again.begun == RotationRun.objects.get()
    assert runs.command_of(again.begun) == "manage.py rotate_kms_key --to-mode envelope"
    list(rotate.rotate(again, options))
    assert RotationRun.objects.get().state == "finished"
    assert modes_of_rows() == {"envelope": 6}
    assert all_can_sign_in()


def test_a_run_into_another_mode_is_not_gone_on_with(enter: Enter) -> None:
    enter("direct")
    make_users(2)
    enter("envelope")
    run = next(rotate_steps("envelope"))
    assert run.state == "interrupted"
    enter("direct")
    assert plan.make(to_mode="direct").begun is None
    with pytest.raises(errors.ConfigurationError, match="into the mode 'envelope'"):
        jobs.of(run)
    enter("envelope")
    assert plan.make(to_mode="envelope").begun == run


def rotate_steps(mode: str) -> Iterator[RotationRun]:
    """Begin a run and leave it."""
    steps = rotate.rotate(plan.make(to_mode=mode), Options(concurrency=1, settle=0))
    next(steps)
    steps.close()
    yield RotationRun.objects.latest("pk")


@pytest.mark.parametrize(
    ("source", "target"), [("direct", "public_key"), ("envelope", "direct")]
)
def test_rows_that_do_not_open_stop_no_move(source: str, target: str, enter: Enter) -> None:
    enter(source)
    one, two, three, four = make_users(4)
    stored = encoding.parse(two.password)
    stray = "00000000-0000-0000-0000-000000000000"
    ref = encoding.data_key_ref(999) if source == "envelope" else encoding.key_ref(stray)
    blob = encoding.parse(one.password).sealed
    headers = [encoding.parse(user.password).header for user in (two, three, four)]
    made = zip(
        headers,
        (stored.mode, stored.mode, "z9"),
        (stored.key_ref, ref, stored.key_ref),
        strict=True,
    )
    values = {
        user: str(encoding.SealedHash(*parts, blob))
        for user, parts in zip((two, three, four), made, strict=True)
    }
    for user, value in values.items():
        User.objects.filter(pk=user.pk).update(password=value)
    enter(target)
    done = rotate_("--to-mode", target, status=3)
    assert (done["rewritten"], done["failed"]) == (1, 3)
    assert {
        user.pk: str(value) for user, value in values.items()
    }.items() <= passwords().items()


@pytest.mark.parametrize("forged", [b"", b"1234", bytes(100)], ids=len)
def test_something_sealed_by_a_stranger_with_the_public_half_stops_nothing(
    forged: bytes, enter: Enter, kms: Provider, settings: Any
) -> None:
    enter("public_key")
    victim, *_ = make_users(3)
    stored = encoding.parse(victim.password)
    public = public_key.load_der(kms.get_public_key(ALIASES["public_key"]).der)
    oaep = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), None)
    value = str(dataclasses.replace(stored, sealed=public.encrypt(forged, oaep)))
    victim.password = value
    victim.save()
    assert not victim.check_password("pw0")
    enter("direct")
    done = rotate_("--to-mode", "direct", status=3)
    assert (done["rewritten"], done["failed"]) == (2, 1)
    list_hashers(settings, sealing_first=False)
    phrase = "--confirm=unwrap 3 passwords"
    done = json.loads(call("unwrap_passwords", phrase, "--json", status=3)[0])
    assert (done["rewritten"], done["failed"]) == (2, 1)
    assert passwords()[victim.pk] == value


def damage(kind: str) -> None:
    """Damage the row of the first data key: no string of ours, or not what KMS has given."""
    row = DataKey.objects.order_by("pk")[0]
    row.sealed = row.sealed.replace("$d1$", "$d1x$" if kind == "string" else "$d1$", 1)
    if kind == "blob":
        row.sealed = row.sealed[:-8] + "AAAAAAAA"
    row.save()


@pytest.mark.parametrize("kind", ["string", "blob"])
def test_a_damaged_data_key_is_its_own_rows_matter(kind: str, enter: Enter) -> None:
    enter("envelope", DATA_KEY_USERS=1)
    make_users(3)
    damage(kind)
    assert (
        len(rotate_("--verify=all", status=1)["verified"]["bad"]) == 2
    )  # itself, and its user
    done = rotate_("--new-data-keys", status=3)
    assert (done["rewritten"], done["failed"]) == (2, 1)


@pytest.mark.parametrize("kind", ["string", "blob"])
def test_a_damaged_data_key_that_is_moved_to_is_no_rows_fault(kind: str, enter: Enter) -> None:
    enter("direct")
    make_users(2)
    enter("envelope")
    data_keys.prepare(1)
    damage(kind)
    planned = plan.make(to_mode="envelope")
    with pytest.raises(errors.DataKeyDamaged):
        list(rotate.rotate(planned, Options(concurrency=1, settle=0)))
    assert modes_of_rows() == {"direct": 2}
    assert RotationRun.objects.get().failed == 0


@pytest.mark.parametrize("source", ["stock", "direct"])
@pytest.mark.parametrize(
    ("target", "operation"),
    [("envelope", "generate_data_key"), ("public_key", "get_public_key")],
)
def test_what_is_asked_for_before_a_row_is_asked_for_again(
    source: str,
    target: str,
    operation: str,
    enter: Enter,
    kms: Provider,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One throttled call ends no run."""
    made: list[int] = []
    method = getattr(kms, operation)

    def throttled_once(*args: Any, **kwargs: Any) -> Any:
        made.append(1)
        if len(made) == 1:
            raise errors.KMSThrottled
        return method(*args, **kwargs)

    enter("direct")
    stock, sealed = make_password("pw", hasher="argon2"), make_password("pw")
    enter(target)
    monkeypatch.setattr(kms, operation, throttled_once)
    task = jobs.Wrap().task(stock) if source == "stock" else jobs.Convert(target).task(sealed)
    assert task is not None
    assert len(made) == 2
    assert check_password("pw", asyncio.run(done(task)))


async def done(task: workers.Task) -> str:
    return str(await task())


def deny(method: Any, refused: Callable[[str], bool]) -> Any:
    def call_(key: str, *args: Any, **kwargs: Any) -> Any:
        if refused(key):
            raise errors.KMSAccessDenied("no", operation="Decrypt")
        return method(key, *args, **kwargs)

    return call_


def test_a_key_that_only_a_forged_row_names_stops_no_move(
    enter: Enter, kms: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter("direct")
    *_, forged = make_users(3)
    stray = "00000000-0000-0000-0000-000000000000"
    stored = encoding.parse(forged.password)
    value = encoding.SealedHash(stored.header, "d1", encoding.key_ref(stray), stored.sealed)
    User.objects.filter(pk=forged.pk).update(password=str(value))
    enter("public_key")
    monkeypatch.setattr(kms, "decrypt", deny(kms.decrypt, lambda key: stray in key))
    assert rotate_("--to-mode", "public_key", status=3)["rewritten"] == 2


def test_a_key_of_this_site_that_is_denied_stops_the_move(
    enter: Enter, kms: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter("direct")
    make_users(2)
    rotate_()  # the key is known from now on
    enter("public_key")
    monkeypatch.setattr(kms, "decrypt", deny(kms.decrypt, lambda key: True))
    assert "Decrypt: no" in rotate_("--to-mode", "public_key", status=1)["error"]
    assert modes_of_rows() == {"direct": 2}


def test_the_key_that_is_moved_to_is_no_rows_fault(enter: Enter, kms: Provider) -> None:
    enter("mac")
    make_users(2)
    enter("mac_in_direct")
    planned = plan.make(to_mode="mac_in_direct")
    kms.disable_key(keyring.provider().describe_key("alias/tests").key_arn)
    with pytest.raises(errors.KeyUnusable):
        list(rotate.rotate(planned, Options(concurrency=1, settle=0)))
    assert modes_of_rows() == {"mac": 2}
    assert RotationRun.objects.get().failed == 0


@pytest.mark.parametrize(
    "kind", [errors.KeyDisabled, errors.KeyNotFound, errors.KMSAccessDenied]
)
def test_the_key_of_a_data_key_that_is_moved_to_is_no_rows_fault(
    kind: type[errors.KMSError], enter: Enter, kms: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter("envelope", KEY=kms.create_key().key_arn)
    data_keys.prepare(1)
    (stored,) = (encoding.parse(row.sealed) for row in DataKey.objects.all())
    enter("direct")
    make_users(2)
    enter("envelope")
    monkeypatch.setattr(kms, "decrypt", failing(kms, stored, kind))
    planned = plan.make(to_mode="envelope")
    with pytest.raises(kind):
        list(rotate.rotate(planned, Options(concurrency=1, settle=0)))
    assert modes_of_rows() == {"direct": 2}
    assert RotationRun.objects.get().failed == 0


def test_the_key_of_a_data_key_that_is_left_makes_its_rows_bad(
    enter: Enter, kms: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter("envelope", KEY=kms.create_key().key_arn)
    make_users(2)
    (stored,) = (encoding.parse(row.sealed) for row in DataKey.objects.all())
    enter("direct")
    monkeypatch.setattr(kms, "decrypt", failing(kms, stored, errors.KeyDisabled))
    done = rotate_("--to-mode", "direct", status=3)
    assert (done["rewritten"], done["failed"]) == (0, 2)


def failing(kms: Provider, stored: encoding.SealedHash, kind: type[errors.KMSError]) -> Any:
    """Return a Decrypt that fails by the key of `stored`, and says which, as AWS's does."""
    decrypt, key_id = kms.decrypt, encoding.key_id(stored.key_ref)

    def call_(key: str, *args: Any, **kwargs: Any) -> Any:
        if key_id in key:
            raise kind("no", operation="Decrypt", key=key)
        return decrypt(key, *args, **kwargs)

    return call_


def test_a_key_that_is_disabled_makes_its_rows_bad(enter: Enter, kms: Provider) -> None:
    enter("direct")
    make_users(3)
    kms.disable_key(kms.describe_key("alias/tests").key_arn)
    enter("public_key")
    done = rotate_("--to-mode", "public_key", status=3)
    assert (done["rewritten"], done["failed"]) == (0, 3)


def test_the_keys_of_the_new_mode_are_looked_at_before_a_row_is_blamed(
    enter: Enter, kms: Provider
) -> None:
    arn = kms.create_key().key_arn
    enter("direct", KEY=arn)
    make_users(2)
    kms.disable_key(arn)
    enter("mac_in_direct")
    done = rotate_("--to-mode", "mac_in_direct", status=3)
    assert (done["rewritten"], done["failed"]) == (0, 2)


@pytest.mark.parametrize("source", DIGEST)
@pytest.mark.parametrize("target", MODES)
def test_no_call_of_a_move_uses_the_database(
    source: str, target: str, enter: Enter, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(source)
    make_users(4)
    enter(target)
    used: list[str] = []
    cursor = BaseDatabaseWrapper.cursor

    def watched(self: Any) -> Any:
        name = threading.current_thread().name
        if name.startswith("kms-hasher"):
            used.append(name)
            raise AssertionError("the database is used beside the event loop")
        return cursor(self)

    monkeypatch.setattr(BaseDatabaseWrapper, "cursor", watched)
    rotate_("--to-mode", target, "--verify=all")
    assert used == []
    assert modes_of_rows() == {target: 4}


# --- data keys ----------------------------------------------------------------------


def age() -> None:
    """Let the retired data keys have been retired long ago."""
    DataKey.objects.exclude(retired_at=None).update(retired_at=timezone.now() - data_keys.GRACE)


def numbers() -> set[int]:
    return {encoding.data_key_number(v.split("$")[2]) for v in passwords().values()}


def test_all_passwords_come_under_new_data_keys(
    enter: Enter, work: Callable[[], Counter[str]]
) -> None:
    enter("envelope", DATA_KEY_USERS=2)
    make_users(4)
    old = numbers()
    planned = rotate_("--new-data-keys", "--dry-run")
    assert DataKey.objects.filter(retired_at=None).count() == 2
    work()
    done = rotate_("--new-data-keys", "--verify=all")
    calls = work()
    assert calls["GenerateDataKey"] == planned["operations"]["GenerateDataKey"] == 2
    assert planned["operations"]["Decrypt"] == 2 <= calls["Decrypt"]
    assert done["rewritten"] == 4
    assert not numbers() & old
    assert set(DataKey.objects.exclude(retired_at=None).values_list("pk", flat=True)) == old
    assert all_can_sign_in()
    age()
    assert rotate_("--prune-data-keys")["deleted"] == 2
    assert all_can_sign_in()


def test_new_data_keys_are_gone_on_with(enter: Enter) -> None:
    enter("envelope")
    make_users(6)
    options = Options(concurrency=1, batch_size=2, settle=0)

    def stop() -> None:
        raise errors.AuditError

    planned = plan.make(new_data_keys=True)
    end = on_call("Decrypt", stop)
    with pytest.raises(errors.AuditError):
        list(rotate.rotate(planned, options))
    end()
    upto = RotationRun.objects.get().plan["data_keys_up_to"]
    fresh = data_keys.prepare(1)
    again = plan.make(new_data_keys=True)
    assert again.begun is not None
    assert runs.command_of(again.begun) == "manage.py rotate_kms_key --new-data-keys"
    list(rotate.rotate(again, options))
    run = RotationRun.objects.get()
    assert (run.state, run.plan["data_keys_up_to"]) == ("finished", upto)
    # What was made after it had begun is as good as new.
    assert not DataKey.objects.filter(pk__in=fresh).exclude(retired_at=None).exists()
    assert min(numbers()) > upto
    assert all_can_sign_in()


def test_data_keys_are_made_in_advance(enter: Enter, work: Callable[[], Counter[str]]) -> None:
    enter("envelope", DATA_KEY_USERS=1)
    assert rotate_("--make-data-keys=2", "--dry-run")["data_keys"] == 2
    assert not DataKey.objects.exists()
    work()
    out, _ = call("rotate_kms_key", "--make-data-keys=2")
    assert "Made 2 data keys, each for 1 passwords and 90 days" in out
    assert work() == {"GenerateDataKey": 2}
    make_users(2)
    assert work() == {"Decrypt": 2}
    make_password("pw")  # an empty pool fills itself, at the sign-up
    assert work() == {"GenerateDataKey": 1}
    assert DataKey.objects.count() == 3
    with pytest.raises(CommandError, match="--make-data-keys"):
        call_command("rotate_kms_key", "--make-data-keys=0")


@pytest.mark.parametrize("answer", ["y", ""])
def test_pruning_asks_and_looks_again(
    answer: str, enter: Enter, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter("envelope", DATA_KEY_USERS=1)
    make_users(2)
    before = passwords()
    rotate_("--new-data-keys")
    age()
    user = User.objects.earliest("pk")

    def think() -> str:
        # Meanwhile somebody saves a stale object.
        User.objects.filter(pk=user.pk).update(password=before[user.pk])
        return answer

    monkeypatch.setattr("builtins.input", think)
    out, _ = call("rotate_kms_key", "--prune-data-keys", status=0 if answer else 1)
    assert "2 retired data keys are named by no stored password" in out
    assert ("Deleted 1 retired data keys" in out) is bool(answer)
    assert all_can_sign_in()


def test_data_keys_are_rewrapped_where_databases_leaves_theirs_out(
    enter: Enter, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Router:
        def db_for_write(self, model: Any, **hints: Any) -> str | None:
            return "keys" if model is DataKey else None

    enter("envelope", DATABASES=["default"])
    monkeypatch.setattr(columns.router, "db_for_write", Router().db_for_write)
    assert columns.databases(DataKey) == ["default", "keys"]
    assert columns.databases(User) == columns.databases() == ["default"]


# --- the hashes of all hashers ------------------------------------------------------

BCRYPT_SALT = b"$2b$04$" + b"a" * 21 + b"e"

STOCK = {
    "argon2": lambda: make("tests.hashers.CheapArgon2PasswordHasher"),
    "pbkdf2_sha256": lambda: make("PBKDF2PasswordHasher", iterations=2),
    "pbkdf2_sha1": lambda: make("PBKDF2SHA1PasswordHasher", iterations=2),
    "scrypt": lambda: make("ScryptPasswordHasher", n=16),
    "bcrypt_sha256": lambda: make(
        "BCryptSHA256PasswordHasher", salt=b"$2b$04$" + b"a" * 21 + b"e"
    ),
    "bcrypt": lambda: make("BCryptPasswordHasher", salt=BCRYPT_SALT),
    "md5": lambda: make("MD5PasswordHasher"),
}


def make(path: str, salt: Any = "saltsaltsaltsaltsalt00", **costs: Any) -> str:
    if "." not in path:
        path = f"django.contrib.auth.hashers.{path}"
    encoded: str = import_string(path)().encode("pw", salt, **costs)
    return encoded


def stock_users() -> dict[Any, str]:
    """Make a user of each of Django's hashers; return what is stored."""
    User.objects.bulk_create(
        User(username=name, password=made()) for name, made in STOCK.items()
    )
    return passwords()


def list_hashers(settings: Any, *, sealing_first: bool, left_out: str = "") -> None:
    sealing = [
        f"kms_hasher.hashers.{name}"
        for algorithm, name in inner.HASHERS.items()
        if algorithm not in ("argon2", left_out)
    ]
    sealing.insert(0, "tests.hashers.CheapKMSArgon2PasswordHasher")
    stock = ["tests.hashers.CheapArgon2PasswordHasher"]
    stock += [
        f"django.contrib.auth.hashers.{name.removeprefix('KMS')}"
        for name in inner.HASHERS.values()
        if name != "KMSArgon2PasswordHasher"
    ]
    settings.PASSWORD_HASHERS = sealing + stock if sealing_first else stock + sealing


@pytest.mark.parametrize("mode", MODES)
def test_the_hashes_of_all_hashers_are_sealed_and_unsealed(
    mode: str, enter: Enter, settings: Any, work: Callable[[], Counter[str]]
) -> None:
    enter(mode)
    list_hashers(settings, sealing_first=True)
    before = stock_users()
    planned = json.loads(call("wrap_passwords", "--dry-run", "--json")[0])
    work()
    done = json.loads(call("wrap_passwords", "--noinput", "--json")[0])
    assert work() == {n: c for n, c in planned["operations"].items() if n in WORK}
    assert (done["rewritten"], done["failed"]) == (7, 0)
    assert modes_of_rows() == {mode: 7}
    sealed = passwords()
    assert all(user.check_password("pw") for user in User.objects.all())
    User.objects.bulk_update(
        [User(pk=pk, password=value) for pk, value in sealed.items()], ["password"]
    )
    list_hashers(settings, sealing_first=False)
    planned = json.loads(call("unwrap_passwords", "--dry-run", "--json")[0])
    work()
    status = 3 if mode in MACS else 0
    phrase = "--confirm=unwrap 7 passwords"
    done = json.loads(call("unwrap_passwords", phrase, "--json", status=status)[0])
    if mode in MACS:
        assert (done["rewritten"], done["failed"], done["macs"]) == (0, 7, 7)
        assert passwords() == sealed
        assert "7 passwords hold a MAC" in call("unwrap_passwords", "--dry-run")[0]
    else:
        assert work() == planned["operations"]
        assert passwords() == before  # byte for byte


def test_hashers_that_are_not_listed_are_told(enter: Enter, settings: Any) -> None:
    enter("direct")
    list_hashers(settings, sealing_first=True, left_out="md5")
    before = stock_users()
    _, err = call("wrap_passwords", "--noinput")
    assert "1 passwords were made by the hasher 'md5' and are left as they are" in err
    assert "kms_hasher.hashers.KMSMD5PasswordHasher" in err
    user = User.objects.get(username="md5")
    assert user.password == before[user.pk]


def test_wrapping_in_a_mode_that_cannot_be_left_says_so(
    enter: Enter, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter("mac")
    list_hashers(settings, sealing_first=True)
    stock_users()
    monkeypatch.setattr("builtins.input", lambda: "n")
    out, _ = call("wrap_passwords", status=1)
    assert "It cannot be left without passwords" in out


def test_a_mac_key_that_is_elsewhere_is_refused(
    enter: Enter, kms: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter("mac_in_direct")
    make_users(1)
    real = kms.describe_key
    there = real(MAC_KEY).key_arn.replace(":local-1:", ":local-2:")

    def describe(key: str) -> Any:
        return dataclasses.replace(real(key), key_arn=there) if key == MAC_KEY else real(key)

    monkeypatch.setattr(kms, "describe_key", describe)
    assert "in another account or Region than KEY" in rotate_(status=1)["error"]
    assert "in another account or Region than KEY" in call("kms_status", status=1)[0]
    enter("mac_in_direct", PREVIOUS_KEYS=[there])
    assert plan.make().mac_ref
    call("kms_status")


# --- the width of the column --------------------------------------------------------


@pytest.fixture
def narrow(transactional_db: None) -> Iterator[None]:
    """Django's own column of 128 characters."""
    alter_column(128)
    yield
    migrate("kms_hasher", "0001")
    migrate()


@pytest.mark.usefixtures("narrow")
def test_out_of_a_mode_that_fits_the_stock_column(enter: Enter, settings: Any) -> None:
    enter("envelope")
    list_hashers(settings, sealing_first=True)
    before = stock_users()
    done = json.loads(call("wrap_passwords", "--noinput", "--json", status=3)[0])
    assert done["rewritten"] == 7 - done["failed"]
    assert {row["reason"] for row in done["bad"]} == {engine.TOO_LONG}
    scrypt = User.objects.get(username="scrypt")
    assert scrypt.password == before[scrypt.pk]  # as it was, and not cut
    assert max(map(len, passwords().values())) <= 128
    number = done["rewritten"]
    enter("direct")
    refused = rotate_("--to-mode", "direct", status=1)
    assert (
        "holds 128 characters, and values of the mode 'direct' need up to 1024"
        in (refused["error"])
    )
    assert "holds 128 characters" in call("wrap_passwords", status=1)[1]
    out, _ = call("widen_password_column", "--dry-run")
    assert ("varchar(1024)" in out) is (connection.vendor != "sqlite")
    assert users.column_width(columns.columns()[0]) == 128
    assert "is widened" in call("widen_password_column")[0]
    assert users.column_width(columns.columns()[0]) == 1024
    assert "is wide enough" in call("widen_password_column")[0]
    assert rotate_("--to-mode", "direct")["rewritten"] == number
    assert json.loads(call("wrap_passwords", "--noinput", "--json")[0])["failed"] == 0
    assert modes_of_rows() == {"direct": 7}
    for user in User.objects.all():
        assert user.check_password("pw")


@pytest.mark.usefixtures("narrow")
def test_a_login_writes_no_hash_that_the_column_would_cut(
    enter: Enter,
    settings: Any,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(users, "_widths", {})
    enter("envelope")
    list_hashers(settings, sealing_first=True)
    people = [
        User.objects.create(username=name, password=make_password("pw", hasher=name))
        for name in ("argon2", "default")  # the one is upgraded, the other moved
    ]
    before = passwords()
    enter("direct")
    if connection.vendor == "mysql":
        with connection.cursor() as cursor:  # some sites have it so: what is too long is cut
            cursor.execute("SET SESSION sql_mode = ''")
    assert all(user.check_password("pw") for user in people)
    assert passwords() == before == {user.pk: user.password for user in people}
    assert caplog.text.count("auth.User.password holds 128 characters") == 2
    call("widen_password_column")
    connection.close()  # and its mode
    one, two = people
    assert one.check_password("pw")  # a column that was widened counts at once
    with monkeypatch.context() as patch:
        patch.setattr(users, "column_width", lambda column: pytest.fail("read again"))
        assert two.check_password("pw")
    assert modes_of_rows() == {"direct": 2}


@pytest.mark.usefixtures("narrow")
def test_widening_waits_for_no_long_transaction_and_leaves_nothing(
    enter: Enter, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter("direct")
    before = set(connection.introspection.table_names())
    if connection.vendor == "postgresql":
        other = connection.copy()
        try:
            with other.cursor() as cursor:
                cursor.execute("BEGIN")
                cursor.execute("SELECT count(*) FROM auth_user")
                with monkeypatch.context() as patch:
                    patch.setattr(widen_password_column, "LOCK_TIMEOUT", "50ms")
                    _, err = call("widen_password_column", status=1)
        finally:
            other.close()
        assert "could not be altered (OperationalError), and is as it was" in err
        assert users.column_width(columns.columns()[0]) == 128
    assert "is widened" in call("widen_password_column")[0]
    assert users.column_width(columns.columns()[0]) == 1024
    assert set(connection.introspection.table_names()) == before


def test_widening_says_what_to_change(enter: Enter) -> None:
    enter("direct", DATABASES=["default"], PASSWORD_FIELDS=["auth.User.nothing"])
    assert "PASSWORD_FIELDS" in call("widen_password_column", status=1)[1]
    enter("direct", DATABASES=["elsewhere"])
    assert "which DATABASES does not have" in call("widen_password_column", status=1)[1]


def test_widening_tells_of_a_database_that_is_left_out(
    enter: Enter, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter("direct")
    monkeypatch.setattr(columns, "databases", lambda model=None: ["another"])
    _, err = call("widen_password_column", status=1)
    assert "KMS_HASHER['DATABASES'] leaves 'default' out" in err


def test_the_column_of_another_user_model_is_not_widened(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(users, "is_stock", lambda: False)
    with pytest.raises(CommandError, match="is the site's own"):
        call_command("widen_password_column")


# --- kms_status and --plan ----------------------------------------------------------

PERMISSIONS = {
    "direct": {"Encrypt", "Decrypt", "ReEncrypt"},
    "public_key": {"GetPublicKey", "Decrypt", "ReEncrypt"},
    "envelope": {"GenerateDataKey", "Decrypt", "ReEncrypt"},
    "mac": {"GenerateMac"},
    "mac_in_direct": {"GenerateMac", "Encrypt", "Decrypt", "ReEncrypt"},
}


@pytest.mark.parametrize("mode", MODES)
def test_status_in_every_mode(mode: str, enter: Enter, other_keys: dict[str, str]) -> None:
    enter(mode, DATA_KEY_USERS=2)
    make_users(3)
    found = look()
    assert (found["ok"], found["notes"]) == (True, [])
    assert found["permissions"] == dict.fromkeys(PERMISSIONS[mode], "allowed")
    needed = {key["ref"]: (key["rows"], key["data_keys"], key["macs"]) for key in found["keys"]}
    expected = {ref_of(ALIASES[mode]): (3, 0, 0)}
    if mode == "mac":
        expected = {ref_of(MAC_KEY): (3, 0, 3)}
    if mode == "mac_in_direct":
        expected[ref_of(MAC_KEY)] = (3, 0, 3)
        assert found["mac_key_arn"] == other_keys[MAC_KEY]
    if mode == "envelope":
        expected = {ref_of(ALIASES[mode]): (0, 2, 0)}
        pool = found["data_keys"]
        assert (pool["number"], pool["open"], pool["retired"]) == (2, 1, 0)
        assert pool["oldest"]
    else:
        assert found["data_keys"] is None
    assert needed == expected
    out, _ = call("kms_status")
    told = {"mac": "3 passwords' MACs", "envelope": "2 data keys"}.get(mode, "3 passwords")
    assert told in out
    assert ("data keys: 2, 1 open, the oldest of" in out) is (mode == "envelope")
    assert ("MAC key   arn:" in out) is (mode == "mac_in_direct")
    half = Key.objects.filter(spec="RSA_2048").values_list("fingerprint", flat=True)
    if mode == "public_key":
        der = keyring.provider().get_public_key(ALIASES[mode]).der
        assert list(half) == [public_key.fingerprint(der)] == [found["fingerprint"]]
        assert f"SHA-256 {found['fingerprint']}" in out


@pytest.mark.parametrize(
    ("mode", "note"),
    [
        ("direct", "2 passwords are under another key"),
        ("envelope", "1 data keys are under another key"),
        ("mac", "2 passwords hold a MAC that no run can move"),
        ("mac_in_direct", "2 passwords are under another key"),
    ],
)
def test_status_of_what_is_under_another_key(mode: str, note: str, enter: Enter) -> None:
    provider = keyring.provider()
    enter(mode)
    make_users(2)
    old = provider.describe_key(ALIASES[mode])
    provider.update_alias(
        ALIASES[mode], provider.create_key(spec=old.spec, usage=old.usage).key_arn
    )
    (found,) = look()["notes"]
    assert note in found


def test_status_of_another_mode(enter: Enter) -> None:
    enter("mac")
    make_users(2)
    enter("envelope")
    make_password("pw")
    assert "2 passwords hold a MAC" in look()["notes"][0]
    enter("mac_in_direct")
    assert "2 passwords are sealed in other modes" in look()["notes"][0]
    assert rotate_()["elsewhere"] == 2
    provider = keyring.provider()
    provider.update_alias(
        MAC_KEY, provider.create_key(spec="HMAC_256", usage="GENERATE_VERIFY_MAC").key_arn
    )
    rotate_("--to-mode", "mac_in_direct")
    retired, waiting = sorted(look()["notes"])
    assert "1 data keys are retired" in retired
    assert "2 passwords hold a MAC" in waiting
    assert rotate_()["waiting"] == 2  # MACs by a key that MAC_KEY has left


@pytest.fixture
def halves(kms: Provider, other_keys: dict[str, str]) -> tuple[str, str, str]:
    """The ARN of an RSA key, its public half in PEM, and that of another key."""
    arn = other_keys["alias/tests-rsa"]
    own, other = (
        serialization.load_der_public_key(kms.get_public_key(each).der)
        .public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        .decode()
        for each in (arn, kms.create_key(spec="RSA_2048").key_arn)
    )
    return arn, own, other


def test_a_public_key_that_is_not_the_keys_own_is_found(
    enter: Enter, halves: tuple[str, str, str]
) -> None:
    arn, own, other = halves
    for text in (own, other):
        enter("public_key", KEY=arn, PUBLIC_KEY=text)
        out, _ = call("kms_status", status=0 if text == own else 1)
        assert ("is not the public half" in out) is (text == other)
    enter("public_key", KEY=arn, PUBLIC_KEY="nonsense")
    assert "is not, in PEM" in call("kms_status", status=1)[0]


@pytest.mark.parametrize("denied", [False, True], ids=["compared", "tried"])
@pytest.mark.parametrize("by_arn", [False, True])
def test_no_run_seals_with_a_public_key_that_is_not_the_keys_own(
    by_arn: bool,
    denied: bool,
    enter: Enter,
    halves: tuple[str, str, str],
    kms: Provider,
    settings: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arn, own, other = halves
    key = arn if by_arn else arn.rpartition("/")[2]
    enter("direct")
    list_hashers(settings, sealing_first=True)
    for name in ("default", "argon2"):
        User.objects.create(username=name, password=make_password("pw", hasher=name))
    before = passwords()
    if denied:
        monkeypatch.setattr(kms, "get_public_key", deny(kms.get_public_key, bool))
    enter("public_key", KEY=key, PUBLIC_KEY=other)
    assert "is not the public half" in rotate_("--to-mode", "public_key", status=1)["error"]
    assert "is not the public half" in rotate_(status=1)["error"]
    for arguments in (["--noinput"], ["--dry-run"]):
        assert "is not the public half" in call("wrap_passwords", *arguments, status=1)[1]
    with pytest.raises(errors.RotationRefused):
        next(seal.wrap(Options()))
    with monkeypatch.context() as patch:  # that cannot be told is no yes
        patch.setattr(kms, "get_public_key", deny(kms.get_public_key, bool))
        patch.setattr(kms, "decrypt", deny(kms.decrypt, bool))
        Key.objects.update(fingerprint="")
        assert "Decrypt" in rotate_("--to-mode", "public_key", status=1)["error"]
        assert "Decrypt" in call("wrap_passwords", "--noinput", status=1)[1]
    assert passwords() == before
    enter("public_key", KEY=key, PUBLIC_KEY=own)
    assert rotate_("--to-mode", "public_key")["rewritten"] == 1
    call("wrap_passwords", "--noinput")
    assert modes_of_rows() == {"public_key": 2}


def test_no_login_seals_with_a_public_key_that_is_not_the_keys_own(
    enter: Enter,
    halves: tuple[str, str, str],
    kms: Provider,
    settings: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    events: list[Event],
) -> None:
    arn, own, other = halves
    monkeypatch.setattr(users, "_proven", set())
    enter("direct")
    list_hashers(settings, sealing_first=True)
    people = [
        User.objects.create(username=f"{name}{n}", password=make_password("pw", hasher=name))
        for n in range(2)
        for name in ("argon2", "default")  # the one is upgraded, the other moved
    ]
    before = passwords()
    enter("public_key", KEY=arn, PUBLIC_KEY=other)
    for _again in range(2):
        assert all(user.check_password("pw") for user in people)
    assert passwords() == before == {user.pk: user.password for user in people}
    assert caplog.text.count("is not the public half") == 8
    enter("public_key", KEY=arn, PUBLIC_KEY=own)
    with monkeypatch.context() as patch:
        patch.setattr(kms, "decrypt", deny(kms.decrypt, lambda key: key == arn))
        assert all(user.check_password("pw") for user in people)
    assert passwords() == before
    events.clear()
    assert all(user.check_password("pw") for user in people)
    assert modes_of_rows() == {"public_key": 4}
    # One to prove the pair, and one for each of those who are moved.
    assert [event.operation for event in events] == ["Decrypt"] * 3
    assert all(user.check_password("pw") for user in people)


@pytest.mark.parametrize("mode", MODES)
def test_what_is_denied_is_told(
    mode: str, enter: Enter, kms: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(mode)
    make_users(1)

    def denied(*args: Any, **kwargs: Any) -> Any:
        raise errors.KMSAccessDenied

    def invalid(*args: Any, **kwargs: Any) -> Any:
        raise errors.InvalidRequest

    first = {
        "direct": "encrypt",
        "public_key": "get_public_key",
        "envelope": "generate_data_key",
    }.get(mode, "generate_mac")
    for method, said in ((denied, "is denied"), (invalid, "cannot be told")):
        monkeypatch.setattr(kms, first, method)
        out, _ = call("kms_status", status=1)
        operation = "".join(part.capitalize() for part in first.split("_"))
        assert f"{operation} {said}" in out or f"Whether {operation}" in out
        if mode in DIGEST:
            assert "Decrypt         not checked" in out


@pytest.mark.parametrize("rewraps", [True, False])
@pytest.mark.parametrize("mode", [*DIGEST, "mac_in_direct"])
def test_what_logins_do_not_need_is_no_problem(
    mode: str, rewraps: bool, enter: Enter, kms: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The policy that kms_status prints for web servers leaves it out as well."""

    def denied(*args: Any, **kwargs: Any) -> Any:
        raise errors.KMSAccessDenied

    enter(mode, REWRAP_ON_LOGIN=rewraps)
    make_users(1)
    monkeypatch.setattr(kms, "re_encrypt", denied)
    needed = rewraps and mode != "envelope"
    found = status.look()
    assert found.permissions["ReEncrypt"] == "denied"
    told = [each for each in found.problems if "ReEncrypt is denied" in each]
    noted = [each for each in found.notes if "ReEncrypt is denied" in each]
    assert (len(told), len(noted)) == (needed, not needed)
    assert bool(found.problems) == needed
    web = json.dumps(policies.policy("web")["iam"])
    assert ("kms:ReEncrypt" in web) == needed


@pytest.mark.parametrize("source", MODES)
@pytest.mark.parametrize("target", MODES)
def test_a_plan_tries_what_the_mode_needs(source: str, target: str, enter: Enter) -> None:
    enter(source)
    make_users(2)
    before, keys = passwords(), DataKey.objects.values_list("pk", "uses")
    listed = list(keys.all())
    enter(target)
    planned = rotate_("--to-mode", target, "--plan")
    assert passwords() == before
    assert list(keys.all()) == listed
    if not moves(source, target):
        assert "estimate" not in planned
        return
    answers = planned["estimate"]
    assert set(answers["operations"].values()) == {"allowed"}
    assert set(answers["permissions"].values()) <= {"allowed", "not checked"}
    call("rotate_kms_key", "--to-mode", target, "--plan")


@pytest.mark.parametrize("mode", MODES)
def test_the_plan_of_a_new_key(mode: str, enter: Enter) -> None:
    enter(mode)
    make_users(2)
    planned = rotate_("--new-key", "--plan")
    expected = [] if mode == "mac" else ["allowed"]
    assert list(planned["estimate"]["permissions"].values()) == expected
    assert planned["estimate"]["quota"] == (500 if mode == "public_key" else 10_000)


def test_a_plan_of_a_move_that_is_denied(
    enter: Enter, kms: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter("direct")
    make_users(1)
    enter("mac_in_direct")

    def denied(*args: Any, **kwargs: Any) -> Any:
        raise errors.KMSAccessDenied

    monkeypatch.setattr(kms, "generate_mac", denied)
    refused = rotate_("--to-mode", "mac_in_direct", "--plan", status=1)
    assert "GenerateMac is denied" in refused["error"]
    monkeypatch.setattr(kms, "decrypt", denied)
    refused = rotate_("--to-mode", "mac_in_direct", "--plan", status=1)
    assert "Decrypt is denied" in refused["error"]


def test_the_key_page_shows_the_fingerprint(enter: Enter, admin_client: Any) -> None:
    enter("public_key")
    rotate_()
    key = Key.objects.get(spec="RSA_2048")
    page = admin_client.get(f"/admin/kms_hasher/key/{key.pk}/change/").content.decode()
    assert key.fingerprint and key.fingerprint in page


# --- what is seldom -----------------------------------------------------------------


def test_a_move_takes_the_data_keys_that_there_are(
    enter: Enter, work: Callable[[], Counter[str]]
) -> None:
    enter("direct")
    make_users(5)
    enter("envelope", DATA_KEY_USERS=2)
    data_keys.prepare(2)
    planned = rotate_("--to-mode", "envelope", "--dry-run")["operations"]
    assert planned == {"Decrypt": 5 + 2, "GenerateDataKey": 1}
    work()
    rotate_("--to-mode", "envelope")
    assert work() == planned
    enter("direct")
    data_keys.prepare(3)
    enter("envelope", DATA_KEY_USERS=2)
    assert costs.sealing("envelope", 1) == {"Decrypt": 1}  # and not of all that are open


def test_a_mac_of_a_hasher_that_is_not_listed_waits_too(enter: Enter, settings: Any) -> None:
    enter("mac")
    list_hashers(settings, sealing_first=True)
    stock_users()
    call("wrap_passwords", "--noinput")
    before = passwords()
    list_hashers(settings, sealing_first=True, left_out="md5")
    enter("direct")
    done = rotate_("--to-mode", "direct")
    assert (done["rewritten"], done["failed"], done["waiting"]) == (0, 0, 7)
    assert passwords() == before


def test_what_a_sealing_hasher_of_the_sites_own_makes_is_no_stock_hash() -> None:
    User.objects.create(username="anna", password="own$hash")
    assert not jobs.stock(User.objects.all(), "password", ["kms_own"]).exists()


# --- what is seldom -------------------------------------------------------------------


def test_a_mac_by_a_hasher_that_is_not_listed_is_left_to_its_user(enter: Enter) -> None:
    enter("mac")
    (user,) = make_users(1)
    enter("direct")
    # No query leaves it out, for its hasher is none of the site's.
    assert jobs.Convert("direct").task(user.password) is None


def test_verifying_tells_what_a_move_has_left(enter: Enter, kms: Provider) -> None:
    enter("direct")
    make_users(2)
    enter("envelope")
    make_users_named("later", 1)
    *_, found = verify.verify(
        kms.describe_key("alias/tests"), options=Options(), to_mode="envelope"
    )
    assert sum(found.others.values()) == 2
    assert not found.is_complete


def make_users_named(name: str, number: int) -> None:
    User.objects.bulk_create(
        User(username=f"{name}{index}", password=make_password("pw")) for index in range(number)
    )


def test_nothing_is_unwrapped_that_nobody_could_read(enter: Enter, settings: Any) -> None:
    enter("direct")
    make_users(1)
    sealing = settings.PASSWORD_HASHERS[0]
    settings.PASSWORD_HASHERS = ["django.contrib.auth.hashers.PBKDF2PasswordHasher", sealing]
    _, err = call("unwrap_passwords", status=1)
    assert "'argon2' inside, which PASSWORD_HASHERS does not list" in err
