"""
The KMS of the tests: keys in memory, the same however often the provider is made anew.

A child that is forked begins with a copy. Tests of processes that share keys name "local".
"""

from __future__ import annotations

from typing import Any

from kms_hasher.testing import InMemoryProvider

_first = InMemoryProvider()


class Provider(InMemoryProvider):
    """All instances hold the same keys, whatever changed them."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._store = _first._store
