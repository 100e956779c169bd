"""
The data keys of the mode `envelope`: rows, each wrapped by a KMS key.

A row's `sealed` is a stored string like those of passwords, in the mode `direct`, so that a
rotation re-wraps it as it does them. Rows are made in advance by `make`, or when none can
take another digest. What is counted or made is committed at once, by a thread with a
connection of its own, whatever becomes of the caller's transaction: no digest may be sealed by
a data key that a rollback takes away, and no lock is held until a request ends. On SQLite,
which has one writer, and with `AUDIT` "inline", for tests, it is done on the caller's
connection.

Plaintext keys are kept for `DATA_KEY_CACHE_SECONDS`, which is 0 by default: one call to KMS
for each password. They are wiped as far as Python allows: what the libraries copied is not
ours to wipe.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import os
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from django.db import connections, router, transaction
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.models import F, QuerySet
from django.utils import timezone
from django.views.decorators.debug import sensitive_variables

from kms_hasher import columns, conf, encoding, keyring, modes
from kms_hasher.encoding import DATA_KEY, PREFIX, Header, SealedHash
from kms_hasher.exceptions import (
    DataKeyDamaged,
    DataKeyMissing,
    InvalidCiphertext,
    InvalidRequest,
    MalformedHash,
)
from kms_hasher.inner import KINDS, NoParameters
from kms_hasher.models import DataKey
from kms_hasher.modes.base import Access, Opener

T = TypeVar("T")

#: Plaintext keys kept at the most.
MOST = 1000

#: So many uses are counted at once while data keys are held, by a run over many rows.
BLOCK = 500

#: Seconds for which uses counted at once are good.
BLOCK_SECONDS = 60.0

#: So long after it was retired a data key is kept in any case: what somebody was sealing by it
#: just then may be committed later.
GRACE = datetime.timedelta(hours=1)

#: KMS's code where a row names a key of another kind.
_WRONG_USAGE = "InvalidKeyUsageException"

_DIRECT = modes.MODES["direct"]
_SALT = 16


class Store:
    """A `modes.envelope.DataKeys`."""

    @sensitive_variables()
    def take(self, access: Access) -> tuple[int, Opener]:
        row = _run(_take)
        if row is not None:
            return row.number, self._opener(access, row)
        made, plaintext = _generate(access)
        number = _run(lambda: _insert(made, uses=1))
        _keeper(number)(plaintext)
        return number, Opener("", lambda: plaintext)

    @sensitive_variables()
    def find(self, access: Access, number: int) -> Opener:
        if key := _cache.get(number):
            return Opener("", lambda: key)
        row = _read(number)
        if row is None:
            raise DataKeyMissing(number)
        return self._opener(access, row)

    @sensitive_variables()
    def _opener(self, access: Access, row: DataKey) -> Opener:
        number = row.number
        with _damage_told(number):
            stored = encoding.parse(row.sealed)
            if stored.header.algorithm != DATA_KEY or stored.mode != _DIRECT.code:
                # A password's digest, which its user knows, must not come in a key's place.
                raise MalformedHash("the row of the data key holds no data key")
            found = _DIRECT.opener(access.of(stored.header), stored)
        if key := _cache.get(number):
            return Opener("", lambda: key)
        keep = _keeper(number)

        @sensitive_variables()
        def call() -> bytes:
            with _damage_told(number):
                key = found.call()
            keep(key)
            return key

        @sensitive_variables()
        def once() -> bytes:
            # A run begins many calls before the first is answered.
            with _cache.turn_of(number):
                return _cache.get(number) or call()

        return Opener(found.key, once if _cache.held else call)


#: What `modes.envelope` takes data keys from.
STORE = Store()


@contextlib.contextmanager
def _damage_told(number: int) -> Iterator[None]:
    """Let no damage of a data key's row look like that of a password, which is wrong then."""
    try:
        yield
    except (InvalidCiphertext, InvalidRequest, MalformedHash) as error:
        if isinstance(error, InvalidRequest) and error.code != _WRONG_USAGE:
            raise
        raise DataKeyDamaged(number) from error


def _keeper(number: int) -> Callable[[bytes], None]:
    """
    Return what keeps a plaintext key in memory, for as long as it may be; from any thread.

    Where the caller's transaction may have made the row, the key is not kept before that is
    committed: after a rollback the number is given to another data key.
    """

    @sensitive_variables()
    def put(key: bytes) -> None:
        if _cache.seconds:
            _cache.put(number, key)

    connection = connections[router.db_for_write(DataKey)]
    # What is held is wiped when the run ends, which is before a transaction around it does.
    if _cache.held or not (_is_here(connection) and connection.in_atomic_block):
        return put
    made: list[bytes] = []
    transaction.on_commit(lambda: [put(key) for key in made[:1]], using=connection.alias)
    return made.append


@sensitive_variables()
def make(access: Access, number: int) -> list[int]:
    """
    Make so many data keys that are unused, each by one GenerateDataKey; return their numbers.

    Raises `KMSError`.
    """
    made = []
    for _ in range(number):
        stored, _plaintext = _generate(access)
        made.append(_run(lambda stored=stored: _insert(stored, uses=0)))  # type: ignore[misc]
    return made


def prepare(number: int) -> list[int]:
    """Make so many data keys with the settings' own KEY, as `make`."""
    header = Header(DATA_KEY, NoParameters(), secrets.token_bytes(_SALT))
    return make(keyring.access(header, "set"), number)


def retire() -> int:
    """Let no more be sealed with any of the present data keys; return the highest number."""
    rows().filter(retired_at=None).update(retired_at=timezone.now())
    # Not of all: one may be made meanwhile, and others have begun to seal by it.
    last = rows().exclude(retired_at=None).order_by("-pk").first()
    return last.number if last else 0


def unneeded() -> list[int]:
    """
    Return the numbers of data keys that no stored password names, by one pass, of those that
    were retired more than `GRACE` ago.
    """
    retired = set(_retired().values_list("pk", flat=True))
    for column in columns.columns():
        if column.model is DataKey:
            continue
        name = column.field.attname
        named = column.rows.filter(
            **{f"{name}__startswith": PREFIX, f"{name}__contains": encoding.IN_ENVELOPE}
        )
        for value in named.values_list(name, flat=True).iterator():
            with contextlib.suppress(MalformedHash):
                retired.discard(encoding.data_key_number(value.split("$")[2]))
    return sorted(retired)


def delete(numbers: Sequence[int]) -> int:
    """Delete those that were retired more than `GRACE` ago; return how many."""
    deleted = 0
    for start in range(0, len(numbers), BLOCK):
        deleted += _retired().filter(pk__in=numbers[start : start + BLOCK]).delete()[0]
    return deleted


def _retired() -> QuerySet[DataKey]:
    return rows().filter(retired_at__lte=timezone.now() - GRACE)


@sensitive_variables()
def _generate(access: Access) -> tuple[SealedHash, bytes]:
    header = Header(DATA_KEY, NoParameters(), secrets.token_bytes(_SALT))
    own, size = access.of(header), KINDS["data_key"].size
    made = own.anywhere(
        own.settings.key,
        lambda key: own.kms(size).generate_data_key(key, own.context, size),
    )
    ref = own.ref(made.key_arn)
    return SealedHash(header, _DIRECT.code, ref, made.ciphertext), made.plaintext


# --- rows -----------------------------------------------------------------------------


def rows() -> QuerySet[DataKey]:
    """
    Return all data keys, where they are written.

    Not from a replica, which may not have one yet that a password was just sealed by.
    """
    return DataKey.objects.using(router.db_for_write(DataKey))


def _take() -> DataKey | None:
    """Return the first row that can take another digest, with that counted."""
    settings = conf.get()
    since = timezone.now() - datetime.timedelta(days=settings.data_key_days)
    if held := _cache.block(since):
        return held
    usable = rows().filter(retired_at=None, uses__lt=settings.data_key_users, made_at__gt=since)
    while row := usable.order_by("pk").first():
        uses = min(BLOCK if _cache.held else 1, settings.data_key_users - row.uses)
        same = rows().filter(pk=row.pk, uses=row.uses, retired_at=None)
        if same.update(uses=F("uses") + uses):  # and nobody was faster
            _cache.keep_block(row, uses - 1)
            return row
    return None


def _insert(stored: SealedHash, uses: int) -> int:
    row = DataKey(sealed=str(stored), made_at=timezone.now(), uses=uses)
    row.save(force_insert=True)
    return row.number


def numbers() -> list[int]:
    """Return the numbers of all data keys. Called in any thread."""
    return _ask(lambda: list(rows().order_by("pk").values_list("pk", flat=True)))


def _read(number: int) -> DataKey | None:
    return _ask(lambda: rows().filter(pk=number).first())


def _ask(read: Callable[[], T]) -> T:
    # A thread that has no connection yet is to be left without: nobody might close it.
    unused = connections[router.db_for_write(DataKey)].connection is None
    if _on_event_loop() or (unused and conf.get().audit != "inline"):
        return _in_thread(read)
    return read()


def _run(call: Callable[[], T]) -> T:
    """Return what a short transaction of its own comes to."""
    connection = connections[router.db_for_write(DataKey)]
    if _is_here(connection):
        # A failure within a transaction of the caller's is not to break it.
        inside = connection.in_atomic_block
        with transaction.atomic(connection.alias) if inside else contextlib.nullcontext():
            return call()
    return _in_thread(call)


def _in_thread(call: Callable[[], T]) -> T:
    """Return what a call comes to in our thread, whose connection is replaced if it died."""

    def run() -> T:
        connections[router.db_for_write(DataKey)].close_if_unusable_or_obsolete()
        return call()

    return _thread().submit(run).result()


def _is_here(connection: BaseDatabaseWrapper) -> bool:
    """Return whether data keys are counted and made on the caller's connection."""
    shared = connection.vendor == "sqlite" or conf.get().audit == "inline"
    return shared and not _on_event_loop()


def _on_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


_lock = threading.Lock()
_executor: ThreadPoolExecutor | None = None


def _thread() -> ThreadPoolExecutor:
    global _executor
    with _lock:
        if _executor is None:
            _executor = ThreadPoolExecutor(1, "kms_hasher-data-keys")
        return _executor


def close() -> None:
    """End the thread, and its connection; the next need makes another. Wipe all keys."""
    global _executor
    wipe()
    with _lock:
        executor, _executor = _executor, None
    if executor is not None:
        executor.submit(connections.close_all)
        executor.shutdown()


# --- plaintext keys -------------------------------------------------------------------


class _Cache:
    """Plaintext keys by number, wiped when their time is over."""

    def __init__(self) -> None:
        self.held = 0
        self._lock = threading.Lock()
        self._keys: OrderedDict[int, tuple[bytearray, float]] = OrderedDict()
        self._turns: dict[int, threading.Lock] = {}
        self._timer: threading.Timer | None = None
        self._block: tuple[DataKey, int, float] | None = None

    @property
    def seconds(self) -> float:
        """For how long a key is kept, 0 for not at all."""
        return float("inf") if self.held else conf.get().data_key_cache_seconds

    def hold(self, more: int) -> int:
        """Count one block more or less for which keys are kept; return how many there are."""
        with self._lock:
            self.held += more
            return self.held

    def get(self, number: int) -> bytes | None:
        with self._lock:
            found = self._keys.get(number)
            if found is None or found[1] <= time.monotonic():
                return None
            return bytes(found[0])

    @sensitive_variables()
    def put(self, number: int, key: bytes) -> None:
        seconds = self.seconds
        with self._lock:
            self._drop(number)
            self._keys[number] = bytearray(key), time.monotonic() + seconds
            while len(self._keys) > MOST:
                self._drop(next(iter(self._keys)))
            if self._timer is None and seconds < float("inf"):
                self._set_timer(seconds)

    def turn_of(self, number: int) -> threading.Lock:
        """Return the lock of those who want one and the same key."""
        with self._lock:
            return self._turns.setdefault(number, threading.Lock())

    def block(self, since: datetime.datetime) -> DataKey | None:
        """Return the row of a use that was counted before, if one is left."""
        with self._lock:
            if not self.held or not self._block:
                return None
            row, left, until = self._block
            self._block = (row, left - 1, until) if left > 1 else None
            return row if row.made_at > since and time.monotonic() < until else None

    def keep_block(self, row: DataKey, left: int) -> None:
        with self._lock:
            until = time.monotonic() + BLOCK_SECONDS
            self._block = (row, left, until) if self.held and left else None

    def wipe(self) -> None:
        with self._lock:
            for number in list(self._keys):
                self._drop(number)
            self._block = None
            self._turns.clear()
            if self._timer:
                self._timer.cancel()
                self._timer = None

    def _drop(self, number: int) -> None:
        if found := self._keys.pop(number, None):
            found[0][:] = bytes(len(found[0]))

    def _set_timer(self, seconds: float) -> None:
        self._timer = threading.Timer(seconds, self._expire)
        self._timer.daemon = True
        self._timer.start()

    def _expire(self) -> None:
        with self._lock:
            now, self._timer = time.monotonic(), None
            for number, (_, until) in list(self._keys.items()):
                if until <= now:
                    self._drop(number)
            ends = [until for _, until in self._keys.values() if until < float("inf")]
            if ends:
                self._set_timer(max(min(ends) - now, 0.01))


_cache = _Cache()


def wipe() -> None:
    """Overwrite and forget every plaintext key that this process keeps."""
    _cache.wipe()


@contextlib.contextmanager
def held() -> Iterator[None]:
    """
    Keep plaintext keys for as long as the block runs, and count uses many at a time.

    For runs over many rows, which would ask KMS for the same data key again and again.
    """
    cache = _cache  # a child made in the block has another, and leaves this one
    cache.hold(1)
    try:
        yield
    finally:
        if not cache.hold(-1):
            cache.wipe()


def _after_fork() -> None:  # pragma: no cover: it runs in a child
    global _lock, _executor, _cache
    old = _cache
    for key, _ in old._keys.values():
        key[:] = bytes(len(key))
    old._lock = threading.Lock()
    _lock, _executor, _cache = threading.Lock(), None, _Cache()


os.register_at_fork(after_in_child=_after_fork)
