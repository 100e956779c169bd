"""
What every provider must do: the same tests over all of them, for pytest.

    from kms_hasher.testing.contract import ProviderContract

    class TestVault(ProviderContract):
        @pytest.fixture
        def provider(self):
            return VaultProvider(...)

`provider` must have no keys, or none that other tests' keys disturb. There are three
classes, each with the tests of the one before:

SealingContract         encrypt, decrypt, re_encrypt and describe_key
ProviderContract        the whole protocol
StrictProviderContract  as exact as AWS KMS: sizes, states, key material, RSA. A provider
                        without a `clock` overrides the fixture `advance` too

A test of what a service cannot do is taken out by name, `test_mac = None`, rather than
skipped. None uses Django's database. Failures show the values that were compared, unless
`kms_hasher.testing` was imported before pytest was: then first call
`pytest.register_assert_rewrite("kms_hasher.testing.contract")`.
"""

from __future__ import annotations

from kms_hasher.testing.contract._expect import CONTEXT, SECRET, refused, silent
from kms_hasher.testing.contract._keys import ProviderContract
from kms_hasher.testing.contract._sealing import SealingContract
from kms_hasher.testing.contract._strict import StrictBlobs
from kms_hasher.testing.contract._strict_keys import StrictKeys
from kms_hasher.testing.contract._strict_requests import StrictRequests

__all__ = [
    "CONTEXT",
    "SECRET",
    "ProviderContract",
    "SealingContract",
    "StrictProviderContract",
    "refused",
    "silent",
]


# Alter expectations in this package only with a source in AWS's documentation.
class StrictProviderContract(StrictBlobs, StrictKeys, StrictRequests):
    """What AWS KMS does, including what moto 5.2.5 does not."""
