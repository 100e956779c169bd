"""
The ways to seal a digest. A value sealed in one is never tried in another.

Each mode is a small class with the methods of `Mode`, named in `settings` by its key in
`MODES` and in the stored string by its `code`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from kms_hasher.exceptions import ConfigurationError, MalformedHash
from kms_hasher.modes.direct import Direct
from kms_hasher.providers.base import Context, Provider, ReEncrypted


class Mode(Protocol):
    """How a digest of 32 bytes is sealed, opened and re-wrapped."""

    #: What stands in the stored string: a letter, and the version of the layout.
    code: str

    def seal(
        self, kms: Provider, key: str, digest: bytes, context: Context
    ) -> tuple[str, bytes]:
        """Return the ARN of the key that sealed, and the sealed digest."""

    def open(self, kms: Provider, key: str, sealed: bytes, context: Context) -> bytes:
        """Return the digest. Raises `InvalidCiphertext` if it is not this one's."""

    def rewrap(
        self, kms: Provider, source_key: str, sealed: bytes, key: str, context: Context
    ) -> ReEncrypted:
        """Return the digest sealed by another key, without opening it here."""


MODES: Mapping[str, Mode] = {"direct": Direct()}


def by_name(name: str) -> Mode:
    """Return the mode that the settings name. Raises `ConfigurationError`."""
    try:
        return MODES[name]
    except KeyError:
        raise ConfigurationError(
            f"KMS_HASHER['MODE'] is {name!r}: use {' or '.join(map(repr, MODES))}."
        ) from None


def by_code(code: str) -> Mode:
    """Return the mode that a stored string names. Raises `MalformedHash`."""
    for mode in MODES.values():
        if mode.code == code:
            return mode
    raise MalformedHash("the hash is sealed in a mode this version does not know")
