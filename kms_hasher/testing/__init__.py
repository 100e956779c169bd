"""
For tests: of a project whose passwords are sealed, and of providers of one's own.

`InMemoryProvider` needs no file and no set-up, `FaultyProvider` and `faults` fail as asked,
`assert_kms_calls` counts calls, `override_kms` seals passwords in one test. The contract
that every provider must keep is in `kms_hasher.testing.contract`, which needs pytest;
nothing else here does. No other part of the package imports this one.
"""

from __future__ import annotations

import sys

if "pytest" in sys.modules:
    import pytest

    # Before the contract is imported, or else its failures would show no values.
    pytest.register_assert_rewrite(f"{__name__}.contract")

from kms_hasher.testing._calls import assert_kms_calls
from kms_hasher.testing._faults import FaultyProvider, faults
from kms_hasher.testing._memory import InMemoryProvider
from kms_hasher.testing._settings import FastKMSArgon2PasswordHasher, override_kms

__all__ = [
    "FastKMSArgon2PasswordHasher",
    "FaultyProvider",
    "InMemoryProvider",
    "assert_kms_calls",
    "faults",
    "override_kms",
]
