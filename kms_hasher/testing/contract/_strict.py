"""What AWS KMS does to ciphertexts, and moto 5.2.5 does not."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from kms_hasher.exceptions import (
    DryRunOperation,
    IncorrectKey,
    InvalidCiphertext,
    InvalidRequest,
    KeyDisabled,
    KeyNotFound,
)
from kms_hasher.providers.base import Provider
from kms_hasher.testing.contract._expect import (
    AMBIGUOUS,
    CONTEXT,
    CONTEXTS,
    SECRET,
    UNKNOWN,
    refused,
)
from kms_hasher.testing.contract._keys import ProviderContract

# Each use of a symmetric key, its operation, and how it is done to `world.key`.
USES: Mapping[str, Callable[..., Any]] = {
    "Encrypt": lambda p, w, **more: p.encrypt(w.key, SECRET, CONTEXT, **more),
    "Decrypt": lambda p, w, **more: p.decrypt(w.key, w.blob, CONTEXT, **more),
    "ReEncrypt from": lambda p, w, **more: p.re_encrypt(
        w.key, w.blob, CONTEXT, w.other, CONTEXT, **more
    ),
    "ReEncrypt to": lambda p, w, **more: p.re_encrypt(
        w.other, w.other_blob, CONTEXT, w.key, CONTEXT, **more
    ),
    "GenerateDataKey": lambda p, w: p.generate_data_key(w.key, CONTEXT),
}
CAN_DRY_RUN = [name for name in USES if name != "GenerateDataKey"]

Advance = Callable[[datetime.timedelta], None]


@dataclass
class World:
    """`key` and what it has sealed, and the same of an `other` key."""

    key: str
    blob: bytes
    other: str
    other_blob: bytes


class StrictBase(ProviderContract):
    """The fixtures of the classes that ask for more."""

    @pytest.fixture
    def advance(self, provider: Any) -> Advance:
        """Let time pass for a provider: one with a `clock`, if this is not overridden."""

        def advance(by: datetime.timedelta) -> None:
            now = provider.clock() + by
            provider.clock = lambda: now

        return advance

    @pytest.fixture
    def world(self, provider: Provider, arn: str) -> World:
        other = provider.create_key().key_arn
        return World(
            key=arn,
            blob=provider.encrypt(arn, SECRET, CONTEXT).ciphertext,
            other=other,
            other_blob=provider.encrypt(other, SECRET, CONTEXT).ciphertext,
        )

    @pytest.fixture
    def rsa(self, provider: Provider) -> str:
        return provider.create_key(spec="RSA_2048").key_arn

    @pytest.fixture
    def mac_key(self, provider: Provider) -> str:
        return self.hmac_key(provider).key_arn

    @staticmethod
    def at(use: str, world: World) -> str | None:
        # ReEncrypt names two keys; which of them an error stands for is the provider's.
        return None if use.startswith("ReEncrypt") else world.key


class StrictBlobs(StrictBase):
    """Whose a ciphertext is, how long, and for what."""

    # --- sizes -----------------------------------------------------------------------

    def test_the_size_of_a_sealed_digest(self, provider: Provider, arn: str) -> None:
        assert len(provider.encrypt(arn, SECRET, CONTEXT).ciphertext) == 184

    @pytest.mark.parametrize("size", [1, 31, 64, 4096])
    def test_the_size_of_a_blob(self, provider: Provider, arn: str, size: int) -> None:
        assert len(provider.encrypt(arn, b"x" * size, CONTEXT).ciphertext) == 152 + size
        assert len(provider.encrypt(arn, b"x" * size, {}).ciphertext) == 152 + size

    def test_the_size_of_a_wrapped_data_key(self, provider: Provider, arn: str) -> None:
        assert len(provider.generate_data_key(arn, CONTEXT, 64).ciphertext) == 152 + 64

    @pytest.mark.parametrize("size", [0, 6145])
    def test_a_blob_of_a_size_out_of_bounds(
        self, provider: Provider, arn: str, size: int
    ) -> None:
        with refused(InvalidRequest, "Decrypt", key=arn, answered=size > 0):
            provider.decrypt(arn, b"x" * size, CONTEXT)

    # --- whose blob it is ------------------------------------------------------------

    def test_a_blob_of_another_key(self, provider: Provider, world: World) -> None:
        for operation in ("Decrypt", "ReEncrypt from"):
            world.blob = world.other_blob
            code = "IncorrectKeyException"
            with refused(IncorrectKey, operation.split()[0], code=code, key=world.key):
                USES[operation](provider, world)

    def test_a_blob_of_the_key_an_alias_pointed_to(
        self, provider: Provider, world: World
    ) -> None:
        provider.create_alias("alias/tests/left", world.key)
        provider.update_alias("alias/tests/left", world.other)
        with refused(IncorrectKey, "Decrypt", key="alias/tests/left"):
            provider.decrypt("alias/tests/left", world.blob, CONTEXT)

    @pytest.mark.parametrize("index", [*range(0, 184, 7), 183])
    def test_a_blob_altered_anywhere(
        self, provider: Provider, world: World, index: int
    ) -> None:
        spoilt = bytearray(world.blob)
        spoilt[index] ^= 0x10
        with refused(InvalidCiphertext, "Decrypt", code="InvalidCiphertextException"):
            provider.decrypt(world.key, bytes(spoilt), CONTEXT)

    @pytest.mark.parametrize("size", [1, 8, 100, 136, 151, 152, 183])
    def test_a_blob_cut_short(self, provider: Provider, world: World, size: int) -> None:
        with refused(InvalidCiphertext, "Decrypt", key=world.key):
            provider.decrypt(world.key, world.blob[:size], CONTEXT)

    def test_a_blob_of_nobody(self, provider: Provider, arn: str) -> None:
        with refused(InvalidCiphertext, "Decrypt", key=arn):
            provider.decrypt(arn, b"\x00" * 184, CONTEXT)

    def test_other_accounts_and_regions(
        self, provider: Provider, arn: str, world: World
    ) -> None:
        _, _, _, region, account, key = arn.split(":")
        for place in ((region, "999999999999"), ("eu-elsewhere-9", account)):
            foreign = ":".join(("arn", "aws", "kms", *place, key))
            with refused(KeyNotFound, "DescribeKey", code="NotFoundException", key=foreign):
                provider.describe_key(foreign)
            with refused(KeyNotFound, "Decrypt", key=foreign):
                provider.decrypt(foreign, world.blob, CONTEXT)

    def test_re_encrypt_names_the_key_that_is_at_fault(
        self, provider: Provider, world: World
    ) -> None:
        for source, target in ((UNKNOWN, world.key), (world.key, UNKNOWN)):
            with refused(KeyNotFound, "ReEncrypt"):
                provider.re_encrypt(source, world.blob, CONTEXT, target, CONTEXT)

    def test_contexts_are_compared_pair_by_pair(self, provider: Provider, arn: str) -> None:
        taken = [CONTEXTS[name] for name in ("one", "two", "swapped")]
        self.check_contexts(provider, arn, [*taken, *AMBIGUOUS.values()])

    # --- DryRun ----------------------------------------------------------------------

    @pytest.mark.parametrize("use", CAN_DRY_RUN)
    def test_a_dry_run_of_what_is_allowed(
        self, provider: Provider, world: World, use: str
    ) -> None:
        code = "DryRunOperationException"
        with refused(DryRunOperation, use.split()[0], code=code, key=self.at(use, world)):
            USES[use](provider, world, dry_run=True)

    @pytest.mark.parametrize("use", CAN_DRY_RUN)
    def test_a_dry_run_of_what_is_not(self, provider: Provider, world: World, use: str) -> None:
        provider.disable_key(world.key)
        with refused(KeyDisabled, use.split()[0]):
            USES[use](provider, world, dry_run=True)
        world.key = UNKNOWN
        with refused(KeyNotFound, use.split()[0]):
            USES[use](provider, world, dry_run=True)
