"""Fixtures that every test may use; see tests/settings.py for what they stand on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
from django.test import Client, TransactionTestCase

from kms_hasher import breaker, keyring
from kms_hasher.audit import recorder
from kms_hasher.providers.base import Provider
from kms_hasher.signals import Event, kms_event
from tests import browser, modes

# A busy machine is no failure.
hypothesis.settings.register_profile(
    "tests", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("tests")

# `python -m tests --all` refuses to run without it.
collect_ignore = [] if browser.find() else ["test_browser.py"]

if TYPE_CHECKING:
    from django.contrib.auth.models import User


# --- tiers, see CONTRIBUTING.md ----------------------------------------------

#: Fixtures of a test that uses the database without being marked so.
DATABASE = {"db", "django_db_setup", "transactional_db"}

#: What a test outside the system tier must not do, by Python's names of audit events.
BARRED = {
    *("os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system"),
    *("pty.spawn", "socket.bind", "socket.connect", "subprocess.Popen"),
}

#: What the running test has done of it, None while it may do all.
_caught: list[str] | None = None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give each test its tier: `system` if it is marked so, `database` or `fast`."""
    for item in items:
        if item.get_closest_marker("everywhere"):
            item.add_marker("system")
        if not item.get_closest_marker("system"):
            item.add_marker("database" if _uses_database(item) else "fast")


def _uses_database(item: pytest.Item) -> bool:
    case = getattr(item, "cls", None)
    return bool(
        item.get_closest_marker("django_db")
        or DATABASE & set(getattr(item, "fixturenames", ()))
        or (isinstance(case, type) and issubclass(case, TransactionTestCase))
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    global _caught
    _caught = None if item.get_closest_marker("system") else []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, object, object]:
    global _caught
    result = yield
    caught, _caught = _caught, None
    # Here as well: what the test calls may have taken the error for one of its own.
    if caught:
        pytest.fail(f"{', '.join(caught)}: mark the test `system` or `everywhere`.")
    return result


def _guard(event: str, arguments: object) -> None:
    if _caught is not None and event in BARRED:
        _caught.append(event)
        raise RuntimeError(f"{event}: mark the test `system` or `everywhere`.")


sys.addaudithook(_guard)


# --- fixtures -----------------------------------------------------------------------------


@pytest.fixture(scope="session", autouse=True)
def key_arn() -> str:
    """The ARN of the key behind alias/tests in the tests' provider, made once."""
    provider = keyring.provider()
    arn = provider.create_key(description="tests").key_arn
    provider.create_alias("alias/tests", arn)
    return arn


@pytest.fixture
def kms(key_arn: str) -> Iterator[Provider]:
    """The tests' provider, with the alias put back and the key enabled afterwards."""
    provider = keyring.provider()
    yield provider
    modes.put_back(provider, "alias/tests", key_arn)


@pytest.fixture(params=modes.NAMES)
def mode(request: pytest.FixtureRequest, settings: Any, kms: Provider) -> Iterator[str]:
    """The name of each mode in turn, which the settings name."""
    audit = settings.KMS_HASHER["AUDIT"]
    modes.use(settings, request.param)
    yield request.param
    settings.KMS_HASHER = {**settings.KMS_HASHER, "MODE": "direct", "AUDIT": audit}
    modes.restore()
    modes.forget()


@pytest.fixture(autouse=True)
def quiet_audit() -> Iterator[None]:
    """Events that a test without a database leaves behind do not turn up in the next."""
    yield
    recorder.close()
    breaker.reset()


@pytest.fixture
def events() -> Iterator[list[Event]]:
    """All events of KMS calls made in the test, in their order."""
    seen: list[Event] = []

    def listen(sender: Any, event: Event, **kwargs: Any) -> None:
        seen.append(event)

    kms_event.connect(listen)
    yield seen
    kms_event.disconnect(listen)


@pytest.fixture
def calls(events: list[Event]) -> Callable[[], list[str]]:
    """The operations of the calls made so far, as in `assert calls() == ["Decrypt"]`."""
    return lambda: [event.operation for event in events]


@pytest.fixture
def staff(client: Client, django_user_model: type[User]) -> User:
    """Somebody signed in who may see nothing yet. No password, so no event was made."""
    user = django_user_model.objects.create(username="staff", is_staff=True, password="!")
    client.force_login(user)
    return user


@pytest.fixture
def root(client: Client, staff: User) -> Client:
    """A client of a superuser."""
    staff.is_superuser = True
    staff.save()
    return client
