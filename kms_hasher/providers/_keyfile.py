"""
The key file of the local provider: how its keys are stored and shared by processes.

One JSON file of mode 0600. A writer locks a sibling file, reads what is there, and puts a
whole new file in its place, so that a reader sees the old one or the new one and a crash
loses neither. A reader takes no lock: it looks at the file's metadata and reads again only
if they have changed. Nothing here is bound to a thread or lost by a fork.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import datetime
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kms_hasher.exceptions import KeyFileError
from kms_hasher.providers._keys import Keys, Material, StoredKey

#: The layout of the file. Raise it when an older release could not read a newer file.
VERSION = 1


class KeyFile:
    """The file at `path`. A file that is not there holds no keys."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).resolve()
        self._cached: tuple[tuple[int, ...], Keys] = ((), Keys())

    def read(self) -> Keys:
        """Return the keys, not to be changed by the caller. Raises `KeyFileError`."""
        try:
            signature = _signature(self.path.stat())
        except FileNotFoundError:
            return Keys()
        except OSError as error:
            raise self._out_of_reach(error) from error
        cached = self._cached  # once: another thread may replace it
        if cached[0] != signature:
            cached = self._cached = self._load()
        return cached[1]

    @contextlib.contextmanager
    def change(self) -> Iterator[Keys]:
        """
        Give the keys to be changed, and write them back unless the block raises.

        No other writer comes between. Raises `KeyFileError`.
        """
        try:
            with self._lock():
                signature, keys = self._load()
                yield keys
                self._replace(_dump(keys), signature)
        except OSError as error:
            raise self._out_of_reach(error) from error

    def _load(self) -> tuple[tuple[int, ...], Keys]:
        try:
            with self.path.open("rb") as file:
                stat = os.fstat(file.fileno())
                if stat.st_mode & 0o077:
                    raise KeyFileError(
                        f"The key file {self.path} is open to its group or to others: "
                        "replace its keys if anybody else could read it, else chmod 600."
                    )
                keys = _parse(file)
        except FileNotFoundError:
            return (), Keys()
        except OSError as error:
            raise self._out_of_reach(error) from error
        if keys is None:
            raise KeyFileError(
                f"The key file {self.path} is damaged, edited by hand or of another release: "
                "restore it. Without it nothing that its keys sealed can be opened."
            )
        return _signature(stat), keys

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        # flock, because it also keeps the threads of one process apart.
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(f"{self.path}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                yield
            finally:
                # Said aloud: a child forked in the meantime would keep it.
                fcntl.flock(lock, fcntl.LOCK_UN)
        finally:
            os.close(lock)

    def _replace(self, data: bytes, signature: tuple[int, ...]) -> None:
        # One name under the lock, so that what a crash left behind is cleared away.
        temporary = Path(f"{self.path}.tmp")
        temporary.unlink(missing_ok=True)
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            # Clocks tick slowly and inodes come back: readers must see a new time.
            stat = os.fstat(handle)
            changed_at = max(stat.st_mtime_ns, signature[0] + 1 if signature else 0)
            os.utime(handle, ns=(stat.st_atime_ns, changed_at))
            os.fsync(handle)
        temporary.replace(self.path)
        directory = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def _out_of_reach(self, error: OSError) -> KeyFileError:
        return KeyFileError(f"The key file {self.path} is out of reach: {error.strerror}.")


def _signature(stat: os.stat_result) -> tuple[int, ...]:
    return (stat.st_mtime_ns, stat.st_ino, stat.st_size, stat.st_mode)


def _dump(keys: Keys) -> bytes:
    body = {"version": VERSION, **json.loads(json.dumps(vars(keys), default=_plain))}
    return json.dumps({"sha256": _checksum(body), **body}, indent=1).encode("ascii")


def _plain(value: object) -> object:
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, datetime.datetime):
        return value.isoformat()
    return {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}  # type: ignore[arg-type]


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode("ascii")).hexdigest()


def _parse(file: Any) -> Keys | None:
    # None, not an error: those of the parsers quote what they were reading.
    try:
        body = json.loads(file.read())
        if body.pop("sha256") != _checksum(body) or body["version"] != VERSION:
            return None
        keys = {id_: _parse_key(value) for id_, value in body["keys"].items()}
        return Keys(keys, body["aliases"])
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None


def _parse_key(value: dict[str, Any]) -> StoredKey:
    times = {name: value[name] for name in ("created_at", "deletion_at")}
    materials = (
        Material(item["id"], base64.b64decode(item["secret"], validate=True))
        for item in value["materials"]
    )
    return StoredKey(
        **{
            **value,
            **{n: t and datetime.datetime.fromisoformat(t) for n, t in times.items()},
            "materials": tuple(materials),
        }
    )
