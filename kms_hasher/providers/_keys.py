"""The keys of a KMS in software, wherever they are kept."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True)
class Material:
    """Key material: 32 bytes, or an RSA private key as PKCS #8 in DER."""

    id: str
    secret: bytes = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class StoredKey:
    """A key and all that KMS tells of it. `materials` begins with the oldest."""

    id: str
    spec: str
    usage: str
    materials: tuple[Material, ...]
    created_at: datetime.datetime
    enabled: bool = True
    deletion_at: datetime.datetime | None = None
    multi_region: bool = False
    description: str = ""
    policy: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
    rotation_days: int | None = None

    @property
    def state(self) -> str:
        """The key state as KMS names it."""
        if self.deletion_at:
            return "PendingDeletion"
        return "Enabled" if self.enabled else "Disabled"

    def is_deleted(self, now: datetime.datetime) -> bool:
        return self.deletion_at is not None and self.deletion_at <= now


@dataclass
class Keys:
    """All keys of one service. `aliases` maps "alias/..." to key ids."""

    keys: dict[str, StoredKey] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)

    def delete_due(self, now: datetime.datetime) -> None:
        """Forget the keys whose day has come, and the aliases that point to them."""
        self.keys = {id_: key for id_, key in self.keys.items() if not key.is_deleted(now)}
        self.aliases = {name: id_ for name, id_ in self.aliases.items() if id_ in self.keys}


class Store(Protocol):
    """Where the keys are. It may be shared between threads."""

    def read(self) -> Keys:
        """Return the keys, not to be changed by the caller."""

    def change(self) -> AbstractContextManager[Keys]:
        """Give the keys to be changed by one caller at a time; kept unless the block raises."""
