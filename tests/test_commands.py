"""The management commands: what they parse, print, ask and end with."""

from __future__ import annotations

import datetime
import io
import json
import re
import time
from collections.abc import Callable
from typing import Any

import pytest
from django.conf import settings
from django.contrib.auth.hashers import make_password
from django.contrib.auth.models import User
from django.core.management import CommandError, call_command
from django.db import OperationalError
from django.test import override_settings
from django.utils import timezone

from kms_hasher import encoding, keyring
from kms_hasher import exceptions as errors
from kms_hasher.management.commands import _forecast, _walk
from kms_hasher.models import AliasPeriod, AuditEvent, Key, RotationRun
from kms_hasher.providers.base import Provider
from kms_hasher.rotation import engine, status, workers
from kms_hasher.rotation.sweeps import Progress
from tests.hashers import CheapArgon2PasswordHasher

pytestmark = pytest.mark.django_db

ALIAS = "alias/tests"
Calls = Callable[[], list[str]]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(workers, "BATCH", 1)


def make_users(number: int) -> list[User]:
    return User.objects.bulk_create(
        User(username=f"user{index}", password=make_password(f"pw{index}"))
        for index in range(number)
    )


def stock_users(number: int) -> list[User]:
    hasher = CheapArgon2PasswordHasher()
    return User.objects.bulk_create(
        User(username=f"stock{index}", password=hasher.encode("pw", hasher.salt()))
        for index in range(number)
    )


def run(name: str, *arguments: str, status: int = 0) -> tuple[str, str]:
    """Run a command; return what it wrote to standard output and error."""
    out, err = io.StringIO(), io.StringIO()
    if name in ("rotate_kms_key", "wrap_passwords", "unwrap_passwords"):
        arguments = ("--concurrency=1", *arguments)
    if name == "rotate_kms_key":
        arguments = ("--settle=0", *arguments)
    try:
        call_command(name, *arguments, stdout=out, stderr=err)
    except CommandError as error:
        assert error.returncode == status, error
        return out.getvalue(), f"{err.getvalue()}{error}"
    assert status == 0
    return out.getvalue(), err.getvalue()


def run_json(name: str, *arguments: str, status: int = 0) -> dict[str, Any]:
    out, _ = run(name, *arguments, "--json", status=status)
    parsed: dict[str, Any] = json.loads(out)
    return parsed


def everything() -> list[list[Any]]:
    return [
        list(model._base_manager.order_by("pk").values_list())
        for model in (User, Key, AliasPeriod, RotationRun)
    ]


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], None]:
    """Answer the next questions with a text, or as if nobody were there."""

    def answer_with(text: str | None) -> None:
        def read() -> str:
            if text is None:
                raise EOFError
            return text

        monkeypatch.setattr("builtins.input", read)

    answer_with(None)
    return answer_with


# --- rotate_kms_key -----------------------------------------------------------------


def test_rotate(kms: Provider) -> None:
    make_users(3)
    out, err = run("rotate_kms_key", "--new-key")
    target = kms.describe_key(ALIAS).key_arn
    assert f"Re-wrapped 3 stored values under {target}" in out
    assert "3 calls of KMS, 0 overtaken, 0 bad." in out
    assert not err
    out, _ = run("rotate_kms_key")
    assert "Re-wrapped 0 stored values" in out


def test_rotate_json(kms: Provider, key_arn: str) -> None:
    make_users(3)
    result = run_json("rotate_kms_key", "--new-key")
    assert result["state"] == "finished"
    assert result["kind"] == "new-key"
    assert result["alias"] == ALIAS
    assert result["present_key"] == key_arn
    assert result["key"] == kms.describe_key(ALIAS).key_arn
    assert (result["rewritten"], result["overtaken"], result["failed"]) == (3, 0, 0)
    assert (result["calls"], result["bad"], result["dry_run"]) == (3, [], False)
    assert result["rows"] == {"auth.User.password": {key_arn.rpartition("/")[2]: 3}}


@pytest.mark.parametrize(
    ("arguments", "would"),
    [
        ([], ["make 0 calls"]),
        (["--new-key"], ["create a key like arn:", "move alias/tests", "re-wrap 3 passwords"]),
        (["--new-material"], ["rotate the key material of arn:", "make 3 calls"]),
        (["--new-key", "--disable-old"], ["disable {key}, if then no row needs it"]),
        (
            ["--new-key", "--schedule-deletion=7"],
            ["schedule the deletion, in 7 days, of {key}"],
        ),
    ],
)
def test_a_dry_run_changes_nothing(
    kms: Provider, key_arn: str, calls: Calls, arguments: list[str], would: list[str]
) -> None:
    make_users(3)
    before, made = everything(), len(calls())
    out, _ = run("rotate_kms_key", "--dry-run", *arguments)
    for text in would:
        assert f"Would {text.format(key=key_arn.rpartition('/')[2])}" in out
    # What is only planned is never told as done.
    assert "Re-wrapped" not in out and "disabled" not in out and "moved" not in out
    assert everything() == before
    assert calls()[made:] == ["DescribeKey"]
    assert kms.describe_key(ALIAS).key_arn == key_arn


def test_a_dry_run_as_json(kms: Provider) -> None:
    users = make_users(2)
    User.objects.filter(pk=users[0].pk).update(password="kms_argon2$d1$nonsense$")
    result = run_json("rotate_kms_key", "--dry-run", "--new-key")
    assert result["dry_run"] is True
    assert result["calls"] == 2
    assert result["rows"]["auth.User.password"]["(not readable)"] == 1
    assert len(result["would"]) == 5


def test_a_dry_run_before_there_is_a_key(kms: Provider) -> None:
    name = f"alias/dry-{time.monotonic_ns()}"
    with override_settings(KMS_HASHER={**settings.KMS_HASHER, "KEY": name}):
        out, _ = run("rotate_kms_key", "--dry-run", "--new-key", "--disable-old")
        assert f"{name} points to nothing yet." in out
        assert "Would create a key.\n" in out
        assert f"Would create {name}, to point to the new key." in out
        _, err = run("rotate_kms_key", status=1)
        assert "--new-key` makes it" in err


def test_bad_rows_are_told(kms: Provider) -> None:
    users = make_users(3)
    User.objects.filter(pk=users[1].pk).update(password="kms_argon2$nonsense")
    _, err = run("rotate_kms_key", "--new-key", status=3)
    assert f"Left as it is: auth.User.password pk={users[1].pk}: " in err
    assert "nonsense" not in err
    assert _walk.BAD.format(number=1) in err
    result = run_json("rotate_kms_key", status=3)
    assert result["failed"] == 1
    assert result["bad"][0]["table"] == "auth.User.password"
    assert result["bad"][0]["pk"] == str(users[1].pk)


def test_an_outage_says_to_run_it_again(kms: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    make_users(1)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise errors.KMSThrottled

    monkeypatch.setattr(kms, "re_encrypt", fail)
    result = run_json("rotate_kms_key", "--new-key", status=1)
    assert result["state"] == "failed"
    assert "Run it again to go on" in result["error"]


def test_a_database_error_quotes_nothing(
    kms: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_users(1)

    def fail(*args: Any) -> bool:
        raise OperationalError("UPDATE secret")

    monkeypatch.setattr("kms_hasher.columns.Column.swap_all", fail)
    _, err = run("rotate_kms_key", "--new-key", status=1)
    assert "The database failed (OperationalError)" in err
    assert "secret" not in err


def test_ctrl_c(kms: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    make_users(1)

    def stop(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(kms, "re_encrypt", stop)
    _, err = run("rotate_kms_key", "--new-key", status=130)
    assert _walk.INTERRUPTED in err
    assert RotationRun.objects.get().state == "interrupted"
    monkeypatch.undo()
    out, _ = run("rotate_kms_key", "--new-key")
    assert "this one goes on with" in out


def test_ctrl_c_while_the_progress_is_shown(
    kms: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_users(1)

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_walk.Shown, "progress", stop)
    run("rotate_kms_key", "--new-key", status=130)
    assert RotationRun.objects.get().state == "interrupted"


def test_settings_that_cannot_work() -> None:
    with override_settings(KMS_HASHER={}):
        _, err = run("rotate_kms_key", "--skip-checks", status=1)
    assert "KMS_HASHER['KEY'] is missing" in err
    assert "Run it again" not in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--new-key", "--new-material"],
        ["--new-key", "--to=alias/other"],
        ["--disable-old", "--schedule-deletion=7"],
        ["--schedule-deletion=6"],
        ["--schedule-deletion=31"],
        ["--concurrency=0"],
        ["--batch-size=-1"],
        ["--rate=0"],
        ["--rate=nan"],
        ["--settle=-1"],
    ],
)
def test_arguments_that_make_no_sense(arguments: list[str]) -> None:
    with pytest.raises(CommandError):
        call_command("rotate_kms_key", *arguments)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("rotate_kms_key", "wrap_passwords", "unwrap_passwords", "kms_status"):
        with pytest.raises(SystemExit):
            call_command(name, "--help")
        out = capsys.readouterr().out
        assert "xit status: 0 " in out
    with pytest.raises(SystemExit):
        call_command("rotate_kms_key", "--help")
    assert "--new-key           a new key behind the alias" in capsys.readouterr().out


def test_the_old_key_is_disabled(kms: Provider, key_arn: str) -> None:
    make_users(2)
    out, _ = run("rotate_kms_key", "--new-key", "--disable-old")
    assert f"{key_arn} is now Disabled." in out
    assert kms.describe_key(key_arn).state == "Disabled"
    assert all(
        user.check_password(f"pw{i}") for i, user in enumerate(User.objects.order_by("pk"))
    )
    out, _ = run("rotate_kms_key", "--disable-old")
    assert f"{key_arn} was already Disabled." in out


def test_the_old_key_is_kept_while_a_row_needs_it(kms: Provider, key_arn: str) -> None:
    users = make_users(2)
    prefix = encoding.prefix_of("kms_argon2", "d1", encoding.key_ref(key_arn))
    User.objects.filter(pk=users[0].pk).update(password=f"{prefix}cut")
    result = run_json("rotate_kms_key", "--new-key", "--disable-old", status=1)
    assert "1 rows still need another key" in result["error"]
    assert (result["rewritten"], result["failed"]) == (1, 1)
    assert kms.describe_key(key_arn).state == "Enabled"


def test_deletion_is_asked_for(
    kms: Provider, key_arn: str, answer: Callable[[str | None], None]
) -> None:
    make_users(1)
    arguments = ("--new-key", "--schedule-deletion=7")
    before = everything()
    out, err = run("rotate_kms_key", *arguments, status=1)
    assert "Backups made before this run need them" in " ".join(out.split())
    assert _walk.NO_ANSWER in err
    answer("n")
    assert _walk.NOT_CONFIRMED in run("rotate_kms_key", *arguments, status=1)[1]
    assert everything() == before
    assert kms.describe_key(ALIAS).key_arn == key_arn
    answer("Y")
    out, _ = run("rotate_kms_key", *arguments)
    assert f"{key_arn} is now PendingDeletion." in out


def test_deletion_without_a_question(kms: Provider, key_arn: str) -> None:
    result = run_json("rotate_kms_key", "--schedule-deletion=30", "--noinput")
    assert result["given_up"] == []
    result = run_json("rotate_kms_key", "--new-key", "--schedule-deletion=30", "--noinput")
    assert result["given_up"] == [{"key": key_arn, "state": "PendingDeletion", "changed": True}]


def test_nothing_to_give_up(kms: Provider, answer: Callable[[str | None], None]) -> None:
    answer("yes")
    out, _ = run("rotate_kms_key", "--schedule-deletion=7")
    assert "(none is known yet)" in out
    assert "There is no key left behind." in out


def test_keys_of_rows_are_named_by_id(key_arn: str) -> None:
    assert _forecast.key_id(encoding.key_ref(key_arn)) == key_arn.rpartition("/")[2]


# --- progress -----------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal(kms: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    users = make_users(3)
    User.objects.filter(pk=users[2].pk).update(password="kms_argon2$nonsense")
    monkeypatch.setattr(engine, "EVERY", 0.0)
    err = Terminal()
    with pytest.raises(CommandError):
        call_command(
            "rotate_kms_key",
            "--new-key",
            "--concurrency=1",
            "--settle=0.01",
            stdout=io.StringIO(),
            stderr=err,
            no_color=True,
        )
    shown = err.getvalue()
    assert (
        "\r\033[K[#############.......] 67% sweep 1, 2 of 3 rows, 1 rewritten, 1 bad, " in shown
    )
    assert "\r\033[KWaiting for the moved alias" in shown
    assert "\r\033[KLeft as it is: auth.User.password" in shown
    assert shown.endswith("\r\033[K")


def test_progress_in_a_log(kms: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    make_users(2)
    monkeypatch.setattr(_walk, "LOG_EVERY", 0.0)
    _, err = run("rotate_kms_key", "--new-key")
    assert err.splitlines()[0].startswith("sweep 1, 2 of 2 rows, 2 rewritten, ")
    assert "\r" not in err


def test_a_line_of_progress() -> None:
    progress = Progress(
        sweep=1,
        looked=5000,
        total=1_000_000,
        rewritten=4998,
        overtaken=2,
        calls=5000,
        seconds=10,
    )
    assert _walk.line(progress) == (
        "sweep 1, 5,000 of 1,000,000 rows, 4,998 rewritten, 2 overtaken, 500 calls/s, "
        "33 min 10 s left"
    )
    assert _walk.line(Progress(sweep=2, looked=7, rewritten=1, failed=3)) == (
        "sweep 2, 7 rows, 1 rewritten, 3 bad, 0 calls/s"
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.4, "59 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert _walk.duration(seconds) == text


def test_a_command_must_do_something() -> None:
    with pytest.raises(NotImplementedError):
        _walk.WalkCommand().work()


# --- wrap_passwords -----------------------------------------------------------------


def test_wrap(kms: Provider, answer: Callable[[str | None], None]) -> None:
    stock_users(2)
    before = everything()
    out, _ = run("wrap_passwords", "--dry-run")
    assert "Would seal up to 2 passwords with alias/tests" in out
    assert run_json("wrap_passwords", "--dry-run")["calls"] == 2
    answer("no")
    assert _walk.NOT_CONFIRMED in run("wrap_passwords", status=1)[1]
    assert everything() == before
    answer("y")
    out, _ = run("wrap_passwords")
    assert re.search(r"Sealed 2 passwords in \d+ s: 2 calls, 0 overt.*, 0 bad.", out)
    out, _ = run("wrap_passwords")  # nothing to ask about
    assert "Sealed 0 passwords" in out


def test_wrap_as_json_with_a_warning(kms: Provider) -> None:
    stock_users(2)
    with override_settings(PASSWORD_HASHERS=settings.PASSWORD_HASHERS[::-1]):
        out, err = run("wrap_passwords", "--noinput", "--json", "--rate=1000")
    assert json.loads(out)["rewritten"] == 2
    assert "is the first of PASSWORD_HASHERS, and does not seal" in err


# --- unwrap_passwords ---------------------------------------------------------------


@pytest.fixture
def unsealing() -> Any:
    with override_settings(PASSWORD_HASHERS=settings.PASSWORD_HASHERS[::-1]):
        yield


def test_unwrap_needs_the_stock_hasher_first(kms: Provider) -> None:
    make_users(1)
    for arguments in (["--dry-run"], ["--confirm=unwrap 1 passwords"]):
        _, err = run("unwrap_passwords", *arguments, status=1)
        assert "The first of PASSWORD_HASHERS seals" in err


@pytest.mark.usefixtures("unsealing")
def test_unwrap(kms: Provider, answer: Callable[[str | None], None]) -> None:
    stock_users(2)
    run("wrap_passwords", "--noinput")
    before = everything()
    assert "Would unwrap up to 2 passwords" in run("unwrap_passwords", "--dry-run")[0]
    out, err = run("unwrap_passwords", status=1)
    assert "takes the seal off 2 passwords" in out
    assert 'Type "unwrap 2 passwords" to go on: ' in out
    assert _walk.NO_ANSWER in err
    for wrong in ("y", "unwrap 3 passwords"):
        answer(wrong)
        assert _walk.NOT_CONFIRMED in run("unwrap_passwords", status=1)[1]
    run("unwrap_passwords", "--confirm=yes", status=1)
    assert everything() == before
    answer("unwrap 2 passwords")
    assert "Unwrapped 2 passwords" in run("unwrap_passwords")[0]
    assert all(user.password.startswith("argon2$") for user in User.objects.all())
    assert "Unwrapped 0 passwords" in run("unwrap_passwords")[0]


@pytest.mark.usefixtures("unsealing")
def test_unwrap_from_a_script(kms: Provider) -> None:
    stock_users(2)
    run("wrap_passwords", "--noinput")
    result = run_json("unwrap_passwords", "--confirm=unwrap 2 passwords")
    assert (result["rewritten"], result["state"]) == (2, "finished")
    with pytest.raises(CommandError):
        call_command("unwrap_passwords", "--noinput")


# --- kms_status ---------------------------------------------------------------------


def test_status(kms: Provider, key_arn: str) -> None:
    users = make_users(3)
    users[0].set_unusable_password()
    users[0].save()
    stock_users(1)
    User.objects.filter(username="user1").update(password="")
    run("rotate_kms_key")
    out, _ = run("kms_status")
    assert f"key       {key_arn}" in out
    assert "state     Enabled, SYMMETRIC_DEFAULT, ENCRYPT_DECRYPT" in out
    assert "Decrypt   allowed" in out
    assert f"alias     {key_arn} since" in out and "until now" in out
    assert "auth.User.password (1024 characters)" in out
    assert f"1  kms_argon2 d1 {encoding.key_ref(key_arn)}" in out
    assert "1  argon2\n" in out
    assert "1  unusable" in out
    assert "1  (no hasher)" in out
    assert f"key {key_arn}: Enabled, 1 passwords" in out
    assert "last run: re-wrap" in out
    assert "Note: 1 passwords are not sealed" in out


def test_status_as_json(kms: Provider, key_arn: str, calls: Calls) -> None:
    make_users(2)
    made = len(calls())
    out, _ = run("kms_status", "--json", "--no-permissions")
    assert calls()[made:] == ["DescribeKey"]
    result = json.loads(out)
    assert result["ok"] is True
    assert result["key_arn"] == key_arn
    assert result["permissions"] == {}
    assert result["last_run"] is None
    assert result["columns"][0]["rows"] == [
        {
            "algorithm": "kms_argon2",
            "mode": "d1",
            "key_ref": encoding.key_ref(key_arn),
            "mac_ref": "",
            "number": 2,
        }
    ]
    run("rotate_kms_key", "--new-key")
    result = json.loads(run("kms_status", "--json")[0])
    assert result["last_run"]["rewritten"] == 2
    assert len(result["alias_history"]) == 2
    assert result["key_material_id"]


def test_status_when_something_is_wrong(kms: Provider, key_arn: str) -> None:
    make_users(1)
    run("rotate_kms_key", "--new-key")
    kms.disable_key(kms.describe_key(ALIAS).key_arn)
    out, err = run("kms_status", status=1)
    assert "Problem: The key arn:" in out
    assert "problems found: 1" in err
    out, _ = run("kms_status", "--json", status=1)
    assert json.loads(out)["ok"] is False
    with override_settings(KMS_HASHER={**settings.KMS_HASHER, "KEY": "alias/nowhere"}):
        assert "does not exist" in run("kms_status", status=1)[0]


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            errors.KeyNotFound(),
            "alias/tests does not exist. `manage.py rotate_kms_key --new-key`",
        ),
        (errors.KMSAccessDenied(), "KEY alias/tests: Access denied"),
        (errors.ConfigurationError("There is no Region."), "There is no Region."),
    ],
)
def test_status_where_the_key_cannot_be_described(
    error: Exception, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(key: str) -> None:
        raise error

    monkeypatch.setattr(keyring.provider(), "describe_key", fail)
    found = status.look()
    assert any(says in problem for problem in found.problems), found.problems
    assert found.described is None


@pytest.mark.parametrize(
    ("minutes", "outcome", "told"),
    [(5, "unavailable", True), (5, "success", False), (90, "unavailable", False)],
)
def test_status_tells_of_an_open_breaker(minutes: int, outcome: str, told: bool) -> None:
    AuditEvent.objects.create(
        time=timezone.now() - datetime.timedelta(minutes=minutes),
        operation="CircuitBreaker",
        purpose="login",
        outcome=outcome,
        requested_key="eu-central-1",
        latency_us=0,
    )
    problems = status.look().problems
    assert any("circuit breaker of Region 'eu-central-1'" in each for each in problems) is told


def test_status_with_settings_that_cannot_work() -> None:
    with override_settings(KMS_HASHER={}):
        _, err = run("kms_status", "--skip-checks", status=1)
        assert "KMS_HASHER['KEY'] is missing" in err
        out, _ = run("kms_status", "--skip-checks", "--json", status=1)
        assert json.loads(out)["ok"] is False


def test_status_without_limits_or_material(
    kms: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kms_hasher.users.column_width", lambda column: None)
    describe = kms.describe_key

    def nameless(key: str) -> Any:
        described = describe(key)
        object.__setattr__(described, "key_material_id", "")
        return described

    monkeypatch.setattr(kms, "describe_key", nameless)
    out, _ = run("kms_status")
    assert "(any length)" in out
    assert "material" not in out
