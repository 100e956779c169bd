"""What `KMSModelBackend` checks in the place of users that there are not, in `envelope`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.contrib.auth import aauthenticate, authenticate
from django.contrib.auth.models import User
from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper
from pytest_django import DjangoAssertNumQueries

from kms_hasher import backends, data_keys
from kms_hasher.models import DataKey

pytestmark = pytest.mark.django_db
PASSWORD = "correct horse battery staple"


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    data_keys.wipe()
    yield
    data_keys.close()


def use(settings: Any, **more: Any) -> None:
    settings.KMS_HASHER = {**settings.KMS_HASHER, "MODE": "envelope", **more}


def test_a_pruned_data_key_fails_no_login(settings: Any) -> None:
    use(settings)
    backends.prewarm()
    DataKey.objects.all().delete()

    assert authenticate(None, username="nobody", password=PASSWORD) is None
    assert authenticate(None, username="nobody", password=PASSWORD) is None


def test_a_lost_data_key_of_many_fails_no_login(settings: Any) -> None:
    use(settings, DATA_KEY_CACHE_SECONDS=60)
    backends.prewarm()
    assert authenticate(None, username="nobody", password=PASSWORD) is None
    data_keys.wipe()
    DataKey.objects.all().delete()

    assert authenticate(None, username="nobody", password=PASSWORD) is None


def test_no_data_key_at_all_fails_no_login(settings: Any) -> None:
    use(settings, DATA_KEY_CACHE_SECONDS=60)
    backends.prewarm()
    DataKey.objects.all().delete()

    assert authenticate(None, username="nobody", password=PASSWORD) is None
    assert DataKey.objects.count() == 1  # of a new decoy


@pytest.mark.django_db(transaction=True)
def test_unknown_names_are_spread_over_the_data_keys(
    settings: Any, calls: Callable[[], list[str]]
) -> None:
    """One decoy for all would be in memory always, and a user's own data key would not."""
    use(settings, DATA_KEY_CACHE_SECONDS=60, DATA_KEY_USERS=1)
    for number in range(8):
        User.objects.create_user(f"user{number}", password=PASSWORD)
    backends.prewarm()
    data_keys.wipe()
    before = len(calls())

    for number in range(40):
        assert authenticate(None, username=f"nobody{number}", password=PASSWORD) is None
    opened = calls()[before:]
    for number in range(40):
        assert authenticate(None, username=f"nobody{number}", password=PASSWORD) is None

    assert set(opened) == {"Decrypt"}
    assert 5 <= len(opened) <= DataKey.objects.count() == 9
    assert calls()[before:] == opened  # a name has its own, as a user has


@pytest.mark.django_db(transaction=True)  # data keys are committed beside the test otherwise
def test_a_name_costs_queries_and_calls_as_a_user_does(
    settings: Any,
    calls: Callable[[], list[str]],
    django_assert_num_queries: DjangoAssertNumQueries,
) -> None:
    use(settings, DATA_KEY_CACHE_SECONDS=60, AUDIT="off")
    User.objects.create_user("anna", password=PASSWORD)
    backends.prewarm()
    authenticate(None, username="nobody", password="wrong")  # looks the data keys up

    for is_kept, queries in ((False, 2), (True, 1)):
        for name in ("anna", "nobody"):
            if not is_kept:
                data_keys.wipe()
            before = len(calls())
            with django_assert_num_queries(queries):
                assert authenticate(None, username=name, password="wrong") is None
            assert calls()[before:] == ([] if is_kept else ["Decrypt"])


@pytest.mark.django_db(transaction=True)
def test_off_the_event_loop_too(settings: Any, calls: Callable[[], list[str]]) -> None:
    use(settings, DATA_KEY_CACHE_SECONDS=60, AUDIT="off")
    backends.prewarm()
    data_keys.wipe()
    before = len(calls())
    assert async_to_sync(aauthenticate)(None, username="nobody", password=PASSWORD) is None
    assert calls()[before:] == ["Decrypt"]
    # A database in memory is not closed by `close_all`.
    own = data_keys._thread().submit(lambda: BaseDatabaseWrapper.close(connections["default"]))
    own.result()
