"""Settings under which passwords are sealed, fast and without AWS."""

from __future__ import annotations

from typing import Any

from django.conf import settings
from django.test import override_settings
from django.utils.module_loading import import_string

from kms_hasher.hashers import KMSArgon2PasswordHasher

#: Passwords sealed by a key in memory behind "alias/tests"; `faults` can be used.
KMS_HASHER = {
    "KEY": "alias/tests",
    "PROVIDER": "kms_hasher.testing.FaultyProvider",
    "OPTIONS": {
        "provider": "kms_hasher.testing.InMemoryProvider",
        "options": {"aliases": ["alias/tests"]},
    },
    "AUDIT": "inline",
}


class FastKMSArgon2PasswordHasher(KMSArgon2PasswordHasher):
    """The hasher at the lowest costs Argon2 allows. It protects nothing."""

    time_cost, memory_cost, parallelism = 1, 8, 1


def override_kms(**changes: Any) -> override_settings:
    """
    Return Django's `override_settings` for tests of sealed passwords.

    As a decorator of a test or a test case, or in a `with` statement, it puts the fast
    hasher first and `KMS_HASHER` in the place of the project's own; `changes` are made to
    that: `override_kms(AUDIT="off")`.
    """
    fast = f"{__package__}.{FastKMSArgon2PasswordHasher.__name__}"
    # Of two hashers for one algorithm Django would verify with the later.
    others = [
        path
        for path in settings.PASSWORD_HASHERS
        if import_string(path).algorithm != FastKMSArgon2PasswordHasher.algorithm
    ]
    return override_settings(
        PASSWORD_HASHERS=[fast, *others], KMS_HASHER={**KMS_HASHER, **changes}
    )
