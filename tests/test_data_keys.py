"""
The data keys of `envelope`: counted, limited, made in time, kept in memory no longer than said.
"""

from __future__ import annotations

import asyncio
import datetime
import gc
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.contrib.auth.hashers import check_password, make_password
from django.contrib.auth.models import User
from django.db import connection, connections, transaction
from django.db.models import QuerySet
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from kms_hasher import breaker, conf, data_keys, encoding, exceptions, keyring
from kms_hasher.encoding import Header
from kms_hasher.inner import NoParameters
from kms_hasher.models import DataKey
from kms_hasher.providers.base import Provider
from kms_hasher.rotation import costs, status
from tests import modes
from tests.hashers import CheapKMSArgon2PasswordHasher

PASSWORD = "correct horse battery staple"
Calls = Callable[[], list[str]]
HEADER = Header("kms_argon2", CheapKMSArgon2PasswordHasher()._parameters(), b"s" * 22)


@pytest.fixture(autouse=True)
def envelope(settings: Any, kms: Provider) -> Iterator[None]:
    modes.use(settings, "envelope", AUDIT="inline")
    yield
    data_keys.close()


@pytest.fixture
def no_audit(settings: Any) -> None:
    """As in production, where data keys have a connection of their own."""
    change(settings, AUDIT="off")


def change(settings: Any, **values: Any) -> None:
    settings.KMS_HASHER = {**settings.KMS_HASHER, **values}


def number_of(encoded: str) -> int:
    return encoding.data_key_number(encoding.parse(encoded).key_ref)


def access() -> Any:
    return keyring.access(HEADER, "set")


def uses() -> dict[int, int]:
    return dict(DataKey.objects.order_by("pk").values_list("pk", "uses"))


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(data_keys.time, "monotonic", clock.monotonic)
    return clock


# --- rows -------------------------------------------------------------------------------


@pytest.mark.django_db
class TestRows:
    def test_one_seals_until_its_uses_are_over(self, settings: Any, calls: Calls) -> None:
        change(settings, DATA_KEY_USERS=3)
        made = [make_password(PASSWORD) for _ in range(7)]
        counted = Counter(map(number_of, made))
        assert sorted(counted.values()) == [1, 3, 3]
        assert uses() == dict(counted)
        assert calls() == [
            *("GenerateDataKey", "Decrypt", "Decrypt"),
            *("GenerateDataKey", "Decrypt", "Decrypt"),
            "GenerateDataKey",
        ]
        assert all(check_password(PASSWORD, encoded) for encoded in made)

    def test_one_is_too_old_after_its_days(self, settings: Any) -> None:
        change(settings, DATA_KEY_DAYS=7)
        first = number_of(make_password(PASSWORD))
        now = timezone.now()
        DataKey.objects.update(made_at=now - datetime.timedelta(days=6, hours=23))
        assert number_of(make_password(PASSWORD)) == first
        DataKey.objects.update(made_at=now - datetime.timedelta(days=7))
        assert number_of(make_password(PASSWORD)) != first

    def test_what_is_stored_of_it(self, key_arn: str, kms: Provider) -> None:
        make_password(PASSWORD)
        row = DataKey.objects.get()
        stored = encoding.parse(row.sealed)
        assert (stored.header.algorithm, stored.mode) == ("kms_data_key", "d1")
        assert stored.key_ref == encoding.key_ref(key_arn)
        assert keyring.context_of(stored.header)["use"] == "data-key"
        assert (row.uses, row.retired_at, str(row)) == (1, None, str(row.number))
        assert len(keyring.open(stored)) == 64

    def test_made_in_advance(self, calls: Calls) -> None:
        numbers = data_keys.make(access(), 2)
        assert calls() == ["GenerateDataKey"] * 2
        assert uses() == dict.fromkeys(numbers, 0)
        assert number_of(make_password(PASSWORD)) == numbers[0]
        assert calls()[2:] == ["Decrypt"]

    def test_kms_fails_while_one_is_made(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*args: Any, **kwargs: Any) -> Any:
            raise exceptions.KMSTimeout

        monkeypatch.setattr(keyring.provider(), "generate_data_key", fail)
        for call in (lambda: make_password(PASSWORD), lambda: data_keys.make(access(), 1)):
            with pytest.raises(exceptions.KMSTimeout):
                call()
        assert uses() == {}

    def test_retired_ones_open_and_seal_no_more(self) -> None:
        assert data_keys.retire() == 0
        old = make_password(PASSWORD)
        assert data_keys.retire() == number_of(old)
        new = make_password(PASSWORD)
        assert number_of(new) != number_of(old)
        assert check_password(PASSWORD, old)
        assert check_password(PASSWORD, new)
        row = DataKey.objects.get(pk=number_of(old))
        again = row.retired_at
        data_keys.retire()
        row.refresh_from_db()
        assert row.retired_at == again

    def test_one_made_while_others_are_retired_is_not_among_them(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Or a run would take what is sealed by it for old."""
        old = number_of(make_password(PASSWORD))
        update = QuerySet.update

        def and_somebody_signs_up(self: Any, **values: Any) -> int:
            count = update(self, **values)
            monkeypatch.undo()
            make_password(PASSWORD)
            return count

        monkeypatch.setattr(QuerySet, "update", and_somebody_signs_up)
        assert data_keys.retire() == old
        assert len(uses()) == 2

    def test_one_is_kept_for_a_while_after_it_was_retired(self) -> None:
        """What was being sealed by it just then may be committed after the pass."""
        late = make_password(PASSWORD)
        data_keys.retire()
        assert data_keys.unneeded() == []
        assert data_keys.delete([number_of(late)]) == 0
        User.objects.create(username="late", password=late)
        self.retired_long_ago()
        assert data_keys.unneeded() == []
        User.objects.all().delete()
        assert data_keys.unneeded() == [number_of(late)]
        assert data_keys.delete([number_of(late)]) == 1

    @staticmethod
    def retired_long_ago() -> None:
        past = timezone.now() - data_keys.GRACE
        DataKey.objects.exclude(retired_at=None).update(retired_at=past)

    def test_unneeded_ones_are_retired_and_named_by_no_row(self) -> None:
        first, second = make_password(PASSWORD), None
        User.objects.create(username="anna", password=first)
        assert data_keys.unneeded() == []
        data_keys.retire()
        second = make_password(PASSWORD)
        data_keys.retire()
        self.retired_long_ago()
        User.objects.create(username="bela", password="kms_argon2$e1$gibberish$x$y$z")
        User.objects.create(username="cleo", password="!unusable")
        third = make_password(PASSWORD)
        assert data_keys.unneeded() == [number_of(second)]
        assert data_keys.delete([number_of(second), number_of(third)]) == 1
        assert sorted(uses()) == sorted([number_of(first), number_of(third)])
        assert data_keys.unneeded() == []
        User.objects.filter(username="anna").delete()
        assert data_keys.unneeded() == [number_of(first)]

    def test_many_are_deleted_in_blocks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(data_keys, "BLOCK", 2)
        numbers = data_keys.make(access(), 5)
        data_keys.retire()
        self.retired_long_ago()
        assert data_keys.delete(numbers) == 5
        assert data_keys.delete([]) == 0

    def test_a_row_that_is_missing_is_an_error(self) -> None:
        """A table restored without its data keys is no wrong password of its users."""
        encoded = make_password(PASSWORD)
        DataKey.objects.all().delete()
        with pytest.raises(exceptions.DataKeyMissing) as caught:
            check_password(PASSWORD, encoded)
        assert caught.value.number == number_of(encoded)
        assert f"no data key {number_of(encoded)}," in str(caught.value)


@pytest.mark.django_db
class TestForgedRows:
    """Whoever writes to the database puts something else in a data key's place."""

    def put(self, sealed: str) -> None:
        assert DataKey.objects.update(sealed=sealed) == 1

    def is_told(self, encoded: str) -> None:
        for call in (lambda: check_password(PASSWORD, encoded), lambda: make_password("new")):
            with pytest.raises(exceptions.DataKeyDamaged) as caught:
                call()
            assert caught.value.number == number_of(encoded)
            assert f"the data key {number_of(encoded)}," in str(caught.value)

    @pytest.mark.parametrize("mode", [name for name in modes.NAMES if name != "envelope"])
    def test_a_password_s_own_blob(self, mode: str, settings: Any) -> None:
        """Its digest is known to its user, who could then seal what he likes."""
        encoded = make_password(PASSWORD)
        kept = settings.KMS_HASHER
        modes.use(settings, mode)
        password = make_password(PASSWORD)
        settings.KMS_HASHER = kept
        stored = encoding.parse(password)
        as_data_key = [
            password,
            password.replace("$m=8,t=1,p=1$", "$-$").replace("kms_argon2", "kms_data_key"),
        ]
        assert stored.header.algorithm == "kms_argon2"
        for sealed in as_data_key:
            self.put(sealed)
            self.is_told(encoded)

    @pytest.mark.parametrize("sealed", ["", "x", "kms_data_key$d1$$$$", "kms_md5$d1$a$-$b$c"])
    def test_garbage(self, sealed: str) -> None:
        encoded = make_password(PASSWORD)
        self.put(sealed)
        self.is_told(encoded)

    @pytest.mark.parametrize("part", range(1, 6))
    def test_every_part_of_it_damaged(self, part: int) -> None:
        """Which is no wrong password of its thousand users."""
        encoded = make_password(PASSWORD)
        parts = DataKey.objects.get().sealed.split("$")
        parts[part] = f"AAAA{parts[part]}"
        self.put("$".join(parts))
        self.is_told(encoded)

    def test_the_ref_of_a_key_of_another_kind(self) -> None:
        encoded = make_password(PASSWORD)
        sealed = DataKey.objects.get().sealed
        other = encoding.key_ref(modes.make_keys()["alias/tests-mac"].rpartition("/")[2])
        self.put(sealed.replace(f"${encoding.parse(sealed).key_ref}$", f"${other}$"))
        self.is_told(encoded)

    def test_another_data_key(self) -> None:
        first = make_password(PASSWORD)
        data_keys.retire()
        second = make_password(PASSWORD)
        rows = {row.number: row.sealed for row in DataKey.objects.all()}
        DataKey.objects.filter(pk=number_of(first)).update(sealed=rows[number_of(second)])
        assert not check_password(PASSWORD, first)
        assert check_password(PASSWORD, second)

    def test_every_bit_of_the_ref_of_a_stored_string(self) -> None:
        """Damage is told from a data key that is missing: see `encoding.data_key_ref`."""
        encoded = make_password(PASSWORD)
        data_keys.make(access(), 3)
        ref = encoding.parse(encoded).key_ref
        alphabet = "abcdefghijklmnopqrstuvwxyz234567"
        for index in range(len(ref)):
            for letter in set(alphabet) - {ref[index]}:
                damaged = ref[:index] + letter + ref[index + 1 :]
                assert not check_password(PASSWORD, encoded.replace(f"${ref}$", f"${damaged}$"))

    def test_the_ref_of_another(self) -> None:
        encoded = make_password(PASSWORD)
        ref = encoding.parse(encoded).key_ref
        (other,) = data_keys.make(access(), 1)
        moved = encoded.replace(f"${ref}$", f"${encoding.data_key_ref(other)}$")
        assert not check_password(PASSWORD, moved)


class TestRefs:
    def test_inverse_and_short(self) -> None:
        for number in (1, 31, 32, 1023, 1024, 10_000_000, 2**30 - 1):
            ref = encoding.data_key_ref(number)
            assert encoding.data_key_number(ref) == number
            assert len(ref) <= 8
        for number in (0, -1, 2**30):
            with pytest.raises(ValueError, match="number of a data key"):
                encoding.data_key_ref(number)

    @pytest.mark.parametrize(
        "ref", ["", "a", "ab", "aab", "zzzzzzzzzzzz", "BAB", "b.b", "é12", "1aa", "babab$"]
    )
    def test_others_are_refused(self, ref: str) -> None:
        with pytest.raises(exceptions.MalformedHash):
            encoding.data_key_number(ref)

    def test_every_single_wrong_character_is_found(self) -> None:
        alphabet = "abcdefghijklmnopqrstuvwxyz234567"
        for number in [*range(1, 2000), 10_000_000, 123_456_789, 2**30 - 1]:
            ref = encoding.data_key_ref(number)
            for index in range(len(ref)):
                for letter in set(alphabet) - {ref[index]}:
                    damaged = ref[:index] + letter + ref[index + 1 :]
                    with pytest.raises(exceptions.MalformedHash):
                        encoding.data_key_number(damaged)


# --- in memory --------------------------------------------------------------------------


@pytest.mark.django_db(transaction=True)
class TestCache:
    def test_none_by_default(self, calls: Calls) -> None:
        encoded = make_password(PASSWORD)
        for _ in range(3):
            assert check_password(PASSWORD, encoded)
        assert calls() == ["GenerateDataKey", *["Decrypt"] * 3]
        assert data_keys._cache._keys == {}

    def test_no_call_and_no_query_while_it_lasts(
        self, settings: Any, clock: Clock, calls: Calls, django_assert_num_queries: Any
    ) -> None:
        change(settings, DATA_KEY_CACHE_SECONDS=60)
        encoded = make_password(PASSWORD)
        with django_assert_num_queries(0):
            assert check_password(PASSWORD, encoded)
            assert not check_password("wrong", encoded)
        make_password(PASSWORD)
        assert calls() == ["GenerateDataKey"]
        clock.now += 59
        assert check_password(PASSWORD, encoded)
        assert calls() == ["GenerateDataKey"]
        clock.now += 1
        assert check_password(PASSWORD, encoded)
        assert check_password(PASSWORD, encoded)
        assert calls() == ["GenerateDataKey", "Decrypt"]

    def test_it_is_wiped_when_its_time_is_over(self, settings: Any, clock: Clock) -> None:
        """By a timer: nobody need come for it."""
        change(settings, DATA_KEY_CACHE_SECONDS=60)
        make_password(PASSWORD)
        cache = data_keys._cache
        ((held, until),) = cache._keys.values()
        assert (len(held), until) == (64, 1060.0)
        assert any(held)
        timer = cache._timer
        assert timer is not None
        assert timer.daemon
        assert 59 < timer.interval <= 60
        clock.now += 30
        data_keys.retire()
        make_password(PASSWORD)
        later, _ = cache._keys[max(cache._keys)]
        clock.now += 30
        timer.function()
        assert held == bytes(64)
        assert any(later)
        assert cache._timer is not timer
        assert cache._timer is not None
        assert cache._timer.interval == 30
        timer.cancel()
        clock.now += 30
        cache._timer.function()
        assert (later, cache._keys, cache._timer) == (bytes(64), {}, None)

    def test_a_timer_of_real_time(self, settings: Any) -> None:
        change(settings, DATA_KEY_CACHE_SECONDS=0.01)
        make_password(PASSWORD)
        timer = data_keys._cache._timer
        if timer is not None:
            timer.join(10)
        assert data_keys._cache._keys == {}

    def test_on_demand(self, settings: Any, calls: Calls) -> None:
        change(settings, DATA_KEY_CACHE_SECONDS=60)
        encoded = make_password(PASSWORD)
        ((held, _),) = data_keys._cache._keys.values()
        timer = data_keys._cache._timer
        data_keys.wipe()
        assert held == bytes(64)
        assert timer is not None
        assert timer.finished.is_set()
        assert check_password(PASSWORD, encoded)
        assert calls() == ["GenerateDataKey", "Decrypt"]
        data_keys.wipe()
        data_keys.wipe()

    def test_bounded(self, settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        change(settings, DATA_KEY_CACHE_SECONDS=60, DATA_KEY_USERS=1)
        monkeypatch.setattr(data_keys, "MOST", 2)
        make_password(PASSWORD)
        ((first, _),) = data_keys._cache._keys.values()
        for _ in range(3):
            make_password(PASSWORD)
        assert len(data_keys._cache._keys) == 2
        assert first == bytes(64)

    def test_a_key_put_again_is_wiped_before(self, settings: Any) -> None:
        change(settings, DATA_KEY_CACHE_SECONDS=60)
        data_keys._cache.put(1, b"a" * 64)
        ((first, _),) = data_keys._cache._keys.values()
        data_keys._cache.put(1, b"b" * 64)
        assert first == bytes(64)
        assert data_keys._cache.get(1) == b"b" * 64
        assert data_keys._cache.get(2) is None

    def test_what_a_rollback_takes_away_is_not_kept(self, settings: Any) -> None:
        """On SQLite, say, its number is given to another, and none must be sealed by it."""
        change(settings, DATA_KEY_CACHE_SECONDS=60)
        with transaction.atomic():
            make_password(PASSWORD)  # by one that is made
            make_password(PASSWORD)  # by one that is opened
            transaction.set_rollback(True)
        assert data_keys._cache._keys == {}
        data_keys.make(access(), 1)  # as another process does
        encoded = make_password(PASSWORD)
        data_keys.wipe()
        assert check_password(PASSWORD, encoded)

    def test_what_is_committed_is_kept(self, settings: Any, calls: Calls) -> None:
        change(settings, DATA_KEY_CACHE_SECONDS=60)
        with transaction.atomic():
            encoded = make_password(PASSWORD)
        assert check_password(PASSWORD, encoded)
        assert calls() == ["GenerateDataKey"]
        data_keys.wipe()
        with transaction.atomic():
            assert check_password(PASSWORD, encoded)
        assert check_password(PASSWORD, encoded)
        assert calls() == ["GenerateDataKey", "Decrypt"]

    def test_the_wrong_password_is_wrong_with_it_too(self, settings: Any) -> None:
        change(settings, DATA_KEY_CACHE_SECONDS=60)
        one, two = make_password("one"), make_password("two")
        assert check_password("one", one)
        assert not check_password("one", two)
        swapped = f"{one.rpartition('$')[0]}${two.rpartition('$')[2]}"
        assert not check_password("two", swapped)

    @pytest.mark.everywhere
    def test_wiped_in_a_child(self, settings: Any) -> None:
        change(settings, DATA_KEY_CACHE_SECONDS=60)
        make_password(PASSWORD)
        parents = data_keys._cache
        ((held, _),) = parents._keys.values()
        child = os.fork()
        if child == 0:  # pragma: no cover
            fresh = data_keys._cache is not parents and data_keys._cache._keys == {}
            os._exit(0 if fresh and held == bytes(64) else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert any(held)
        assert data_keys._cache is parents


@pytest.mark.django_db
class TestHeld:
    """For runs over many rows."""

    def test_one_call_for_each_data_key(self, calls: Calls) -> None:
        made = [make_password(PASSWORD) for _ in range(2)]
        done = len(calls())
        with data_keys.held():
            for encoded in made * 2:
                assert check_password(PASSWORD, encoded)
            ((held, until),) = data_keys._cache._keys.values()
            assert until == float("inf")
            assert data_keys._cache._timer is None
        assert calls()[done:] == ["Decrypt"]
        assert held == bytes(64)
        assert data_keys._cache._keys == {}

    def test_uses_are_counted_in_blocks_and_never_beyond(
        self, settings: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(data_keys, "BLOCK", 4)
        change(settings, DATA_KEY_USERS=6)
        with data_keys.held():
            made = [make_password(PASSWORD) for _ in range(2)]
            assert list(uses().values()) == [5]  # the one it was made for, and four
            made += [make_password(PASSWORD) for _ in range(8)]
        counted = Counter(map(number_of, made))
        assert max(counted.values()) <= 6
        assert all(uses()[number] >= counted[number] for number in counted)
        assert all(number <= 6 for number in uses().values())
        # What was counted and not used stays counted.
        again = [make_password(PASSWORD) for _ in range(6)]
        assert max(Counter(map(number_of, made + again)).values()) <= 6

    def test_a_block_ends_with_its_data_key(
        self, settings: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        change(settings, DATA_KEY_DAYS=1)
        with data_keys.held():
            first = [number_of(make_password(PASSWORD)) for _ in range(3)]
            assert len(set(first)) == 1
            late = timezone.now() + datetime.timedelta(days=2)
            monkeypatch.setattr(data_keys.timezone, "now", lambda: late)
            assert number_of(make_password(PASSWORD)) not in first

    def test_a_block_is_good_for_a_minute(self, clock: Clock) -> None:
        """A run that rests must not seal by a data key that is retired and deleted by then."""
        with data_keys.held():
            first = [number_of(make_password(PASSWORD)) for _ in range(3)]
            assert len(set(first)) == 1
            data_keys.retire()
            assert number_of(make_password(PASSWORD)) == first[0]
            clock.now += data_keys.BLOCK_SECONDS
            assert number_of(make_password(PASSWORD)) != first[0]

    def test_within_each_other(self, calls: Calls) -> None:
        encoded = make_password(PASSWORD)
        with data_keys.held():
            with data_keys.held():
                check_password(PASSWORD, encoded)
            assert len(data_keys._cache._keys) == 1
            check_password(PASSWORD, encoded)
        assert calls() == ["GenerateDataKey", "Decrypt"]
        assert data_keys._cache._keys == {}

    def test_by_many_threads(self) -> None:
        def hold() -> None:
            for _ in range(200):
                with data_keys.held():
                    pass

        threads = [threading.Thread(target=hold) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert data_keys._cache.held == 0

    @pytest.mark.everywhere
    def test_a_child_of_the_run_keeps_nothing(self) -> None:
        """It leaves the block as well, which must not look as if one more were entered."""
        child = 0
        with data_keys.held():
            make_password(PASSWORD)
            make_password(PASSWORD)
            child = os.fork()
        if child == 0:  # pragma: no cover
            cache = data_keys._cache
            os._exit(0 if (cache.held, cache._keys, cache.seconds) == (0, {}, 0) else 1)
        assert os.waitpid(child, 0)[1] == 0

    def test_wiped_though_the_run_fails(self) -> None:
        encoded = make_password(PASSWORD)
        with pytest.raises(RuntimeError), data_keys.held():
            check_password(PASSWORD, encoded)
            raise RuntimeError
        assert data_keys._cache._keys == {}


# --- transactions and threads -----------------------------------------------------------


@pytest.mark.django_db(transaction=True)
@pytest.mark.usefixtures("no_audit")
class TestConnections:
    def test_never_more_than_the_limit(self, settings: Any) -> None:
        """Eight threads at once, each with a connection of its own."""
        change(settings, DATA_KEY_USERS=5)
        if connection.vendor == "sqlite":
            count, threads = 24, 1  # which has one writer, and in memory one connection
        else:
            count, threads = 64, 8

        def seal(_: int) -> int:
            try:
                return number_of(make_password(PASSWORD))
            finally:
                connections.close_all() if threads > 1 else None

        if threads == 1:
            made = [seal(n) for n in range(count)]
        else:
            with ThreadPoolExecutor(threads) as pool:
                made = list(pool.map(seal, range(count)))
        counted = Counter(made)
        assert max(counted.values()) <= 5
        assert uses() == dict(counted)

    def test_never_more_with_runs_that_hold_them(
        self, settings: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        change(settings, DATA_KEY_USERS=7)
        monkeypatch.setattr(data_keys, "BLOCK", 3)
        if connection.vendor == "sqlite":
            with data_keys.held():
                made = [number_of(make_password(PASSWORD)) for _ in range(30)]
        else:
            with data_keys.held(), ThreadPoolExecutor(4) as pool:
                made = list(pool.map(lambda _: number_of(make_password(PASSWORD)), range(60)))
        counted = Counter(made)
        assert max(counted.values()) <= 7
        assert all(counted[number] <= used <= 7 for number, used in uses().items())

    def test_a_rollback_takes_no_data_key_away(self) -> None:
        """Another request may have sealed by it, and its password must open."""
        if connection.vendor == "sqlite":
            return  # there the row is the transaction's own, and nobody else sees it
        with transaction.atomic():
            first = make_password(PASSWORD)
            transaction.set_rollback(True)
        assert uses() == {number_of(first): 1}
        second = make_password(PASSWORD)
        assert number_of(second) == number_of(first)
        assert check_password(PASSWORD, first)
        assert check_password(PASSWORD, second)

    def test_on_sqlite_a_rollback_takes_all_of_it(self) -> None:
        if connection.vendor != "sqlite":
            return
        with transaction.atomic():
            make_password(PASSWORD)
            transaction.set_rollback(True)
        assert uses() == {}
        assert check_password(PASSWORD, make_password(PASSWORD))

    def test_no_lock_until_the_request_ends(self) -> None:
        """Others seal while a request is still in its transaction."""
        if connection.vendor == "sqlite":
            return
        with transaction.atomic():
            make_password(PASSWORD)
            make_password(PASSWORD)
            with ThreadPoolExecutor(1) as pool:
                other = pool.submit(make_password, PASSWORD).result(20)
            pool_number = number_of(other)
        assert uses() == {pool_number: 3}

    def test_a_failed_statement_of_the_caller_keeps_nothing_from_working(self) -> None:
        if connection.vendor == "sqlite":
            return
        with transaction.atomic():
            transaction.set_rollback(True)
            encoded = make_password(PASSWORD)
        assert check_password(PASSWORD, encoded)

    def test_a_thread_is_left_without_a_connection(self) -> None:
        """Nobody would close it."""
        if connection.vendor == "sqlite":
            return
        encoded = make_password(PASSWORD)
        left: list[Any] = []

        def check() -> bool:
            found = check_password(PASSWORD, encoded) and bool(make_password(PASSWORD))
            left.append(connections["default"].connection)
            return found

        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(check).result()
        assert left == [None]

    def test_one_query_for_a_login_on_the_caller_s_connection(self) -> None:
        encoded = make_password(PASSWORD)
        connection.ensure_connection()
        with CaptureQueriesContext(connection) as queries:
            assert check_password(PASSWORD, encoded)
        assert len(queries) == 1

    def test_on_an_event_loop(self, calls: Calls) -> None:
        """As with Django 5.2, which checks passwords on it."""
        encoded = make_password(PASSWORD)

        async def on_loop() -> list[bool]:
            asyncio.get_running_loop()
            fresh = make_password(PASSWORD)
            return [
                check_password(PASSWORD, encoded),
                check_password("wrong", encoded),
                check_password(PASSWORD, fresh),
            ]

        assert async_to_sync(on_loop)() == [True, False, True]
        assert uses() == {number_of(encoded): 2}
        if connection.vendor == "sqlite":  # Django never closes one in memory
            data_keys._thread().submit(lambda: connection.connection.close()).result()

    @pytest.mark.everywhere
    def test_a_forked_process_has_a_thread_and_a_connection_of_its_own(self) -> None:
        """And leaves the parent's as it was."""
        if connection.vendor == "sqlite":
            return
        encoded = make_password(PASSWORD)  # the thread has its connection now
        connections.close_all()
        for _ in range(3):
            child = os.fork()
            if child == 0:  # pragma: no cover
                ok = False
                try:
                    breaker.reset()
                    ok = check_password(PASSWORD, encoded) and bool(make_password(PASSWORD))
                    data_keys.close()
                    gc.collect()  # what it has inherited is closed, if anything is
                finally:
                    os._exit(0 if ok else 1)
            assert os.waitpid(child, 0)[1] == 0
            assert number_of(make_password(PASSWORD)) == number_of(encoded)
        assert uses() == {number_of(encoded): 7}

    def test_a_connection_that_was_lost_is_replaced(self) -> None:
        if connection.vendor == "sqlite":
            return
        make_password(PASSWORD)
        data_keys._thread().submit(lambda: connections["default"].close()).result()
        assert make_password(PASSWORD)

    def test_one_that_died_is_replaced_for_reading_too(self) -> None:
        """Or each login in a thread without a connection would fail until a restart."""
        if connection.vendor == "sqlite":
            return
        pid, kill = {
            "postgresql": ("pg_backend_pid()", "SELECT pg_terminate_backend(%s)"),
            "mysql": ("connection_id()", "KILL %s"),
        }[connection.vendor]

        def read_pid() -> Any:
            with connection.cursor() as cursor:
                cursor.execute(f"SELECT {pid}")
                return cursor.fetchone()

        encoded = make_password(PASSWORD)
        found = data_keys._thread().submit(read_pid).result()
        with connection.cursor() as cursor:
            cursor.execute(kill, found)
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(check_password, PASSWORD, encoded).result()

    def test_close_and_begin_anew(self) -> None:
        encoded = make_password(PASSWORD)
        data_keys.close()
        data_keys.close()
        assert data_keys._executor is None
        assert check_password(PASSWORD, encoded)


@pytest.mark.django_db
def test_nothing_is_read_from_a_replica(settings: Any) -> None:
    """It may be late: uses would be compared without end with what they were."""

    class Replica:
        def db_for_read(self, model: Any, **hints: Any) -> str | None:
            return "late" if model is DataKey else None  # there is no such database

    settings.DATABASE_ROUTERS = [Replica()]
    encoded = make_password(PASSWORD)
    assert number_of(make_password(PASSWORD)) == number_of(encoded)
    assert check_password(PASSWORD, encoded)
    assert data_keys.numbers() == [number_of(encoded)]
    assert costs.opening("envelope", 2) == {"Decrypt": 1}
    assert costs.sealing("envelope", 2) == {"Decrypt": 1}
    assert data_keys.retire() == number_of(encoded)
    assert data_keys.unneeded() == []
    assert data_keys.delete([number_of(encoded)]) == 0
    found = status.Status(key="", provider="", mode="envelope")
    status._look_at_data_keys(found)
    assert found.data_keys == status.DataKeys(number=1, open=0, retired=1, oldest=None)


@pytest.mark.django_db
def test_faster_than_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between reading and counting somebody else has taken the use: it is read again."""
    first = number_of(make_password(PASSWORD))
    seen: list[int] = []
    real = data_keys.F

    def counted_meanwhile(name: str) -> Any:
        if not seen:
            DataKey.objects.update(uses=9)
        seen.append(1)
        return real(name)

    monkeypatch.setattr(data_keys, "F", counted_meanwhile)
    make_password(PASSWORD)
    assert len(seen) == 2
    assert uses() == {first: 10}


def test_without_the_app_there_is_no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> Any:
        raise RuntimeError("Model class doesn't declare an explicit app_label")

    monkeypatch.setattr("kms_hasher.modes.envelope.import_module", fail)
    with pytest.raises(exceptions.ConfigurationError, match="INSTALLED_APPS"):
        make_password(PASSWORD)


def test_no_data_key_is_sealed_as_a_password_is(settings: Any) -> None:
    assert Header("kms_data_key", NoParameters(), b"x" * 16).kind.size == 64
    assert conf.get().data_key_cache_seconds == 0
