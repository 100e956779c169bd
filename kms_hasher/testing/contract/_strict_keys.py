"""What AWS KMS does with the states of its keys and their material, and moto does not."""

from __future__ import annotations

import datetime

import pytest

from kms_hasher.exceptions import (
    InvalidRequest,
    KeyDisabled,
    KeyNotFound,
    KeyPendingDeletion,
    KeyUnusable,
    LimitExceeded,
)
from kms_hasher.providers.base import OPERATIONS, Provider
from kms_hasher.testing.contract._expect import CONTEXT, RSA, SECRET, refused
from kms_hasher.testing.contract._strict import USES, Advance, StrictBase, World


class StrictKeys(StrictBase):
    """The key material and the states of keys."""

    # --- key material ----------------------------------------------------------------

    def test_key_material_is_named(self, provider: Provider, world: World) -> None:
        first = provider.describe_key(world.key).key_material_id
        assert len(bytes.fromhex(first)) == 32
        assert provider.decrypt(world.key, world.blob, CONTEXT).key_material_id == first
        moved = USES["ReEncrypt from"](provider, world)
        assert moved.source_key_material_id == first
        assert moved.key_material_id == provider.describe_key(world.other).key_material_id

    def test_rotation_on_demand_keeps_the_arn_and_old_blobs(
        self, provider: Provider, world: World
    ) -> None:
        first = provider.describe_key(world.key).key_material_id
        assert provider.rotate_key_on_demand(world.key).key_arn == world.key
        second = provider.describe_key(world.key).key_material_id
        assert second != first
        opened = provider.decrypt(world.key, world.blob, CONTEXT)
        assert (opened.plaintext, opened.key_material_id) == (SECRET, first)
        fresh = provider.encrypt(world.key, SECRET, CONTEXT)
        opened = provider.decrypt(world.key, fresh.ciphertext, CONTEXT)
        assert (opened.key_arn, opened.key_material_id) == (world.key, second)

    def test_re_encrypt_under_the_same_key_takes_the_new_material(
        self, provider: Provider, world: World
    ) -> None:
        first = provider.describe_key(world.key).key_material_id
        provider.rotate_key_on_demand(world.key)
        world.other = world.key
        moved = USES["ReEncrypt from"](provider, world)
        assert moved.source_key_material_id == first != moved.key_material_id
        opened = provider.decrypt(world.key, moved.ciphertext, CONTEXT)
        assert (opened.plaintext, opened.key_material_id) == (SECRET, moved.key_material_id)

    def test_a_key_rotates_on_demand_25_times(self, provider: Provider, arn: str) -> None:
        for _ in range(25):
            provider.rotate_key_on_demand(arn)
        with refused(LimitExceeded, "RotateKeyOnDemand", code="LimitExceededException"):
            provider.rotate_key_on_demand(arn)

    @pytest.mark.parametrize("method", ["enable_key_rotation", "rotate_key_on_demand"])
    def test_only_symmetric_keys_rotate(
        self, provider: Provider, rsa: str, mac_key: str, method: str
    ) -> None:
        for key in (rsa, mac_key):
            with refused(
                InvalidRequest, OPERATIONS[method], code="UnsupportedOperationException"
            ):
                getattr(provider, method)(key)
            assert provider.get_key_rotation_status(key).period_days is None

    @pytest.mark.parametrize("days", [89, 2561])
    def test_a_rotation_period_out_of_bounds(
        self, provider: Provider, arn: str, days: int
    ) -> None:
        with refused(InvalidRequest, "EnableKeyRotation", key=arn, answered=False):
            provider.enable_key_rotation(arn, days)

    def test_the_rotation_period(self, provider: Provider, arn: str) -> None:
        for days in (90, 2560):
            provider.enable_key_rotation(arn, days)
            assert provider.get_key_rotation_status(arn).period_days == days

    # --- states ----------------------------------------------------------------------

    def test_changes_of_state_tell_the_key(self, provider: Provider, arn: str) -> None:
        for change in (
            provider.disable_key,
            provider.enable_key,
            provider.schedule_key_deletion,
            provider.cancel_key_deletion,
        ):
            result = change(arn)
            assert result.key_arn == arn
            assert result.request_ids

    @pytest.mark.parametrize("use", USES)
    def test_a_disabled_key_does_nothing(
        self, provider: Provider, world: World, use: str
    ) -> None:
        provider.disable_key(world.key)
        with refused(
            KeyDisabled, use.split()[0], code="DisabledException", key=self.at(use, world)
        ):
            USES[use](provider, world)
        provider.enable_key(world.key)
        USES[use](provider, world)

    @pytest.mark.parametrize("use", USES)
    def test_a_key_pending_deletion_does_nothing(
        self, provider: Provider, world: World, use: str
    ) -> None:
        provider.schedule_key_deletion(world.key)
        with refused(KeyPendingDeletion, use.split()[0]):
            USES[use](provider, world)
        provider.cancel_key_deletion(world.key)
        with refused(KeyDisabled, use.split()[0]):
            USES[use](provider, world)
        provider.enable_key(world.key)
        USES[use](provider, world)

    def test_hmac_and_rsa_keys_have_states_too(
        self, provider: Provider, rsa: str, mac_key: str
    ) -> None:
        sealed = self.seal_with_public_key(provider, rsa, SECRET)
        for change, kind in (
            (provider.disable_key, KeyDisabled),
            (provider.schedule_key_deletion, KeyPendingDeletion),
        ):
            change(rsa)
            change(mac_key)
            with refused(kind, "GenerateMac", key=mac_key):
                provider.generate_mac(mac_key, SECRET)
            with refused(kind, "Decrypt", key=rsa):
                provider.decrypt(rsa, sealed, {}, **RSA)
            with refused(kind, "GetPublicKey", key=rsa):
                provider.get_public_key(rsa)

    @pytest.mark.parametrize("method", ["enable_key_rotation", "rotate_key_on_demand"])
    def test_a_key_must_be_enabled_to_rotate(
        self, provider: Provider, arn: str, method: str
    ) -> None:
        provider.disable_key(arn)
        with refused(KeyDisabled, OPERATIONS[method], key=arn):
            getattr(provider, method)(arn)
        provider.schedule_key_deletion(arn)
        with refused(KeyPendingDeletion, OPERATIONS[method], key=arn):
            getattr(provider, method)(arn)

    @pytest.mark.parametrize("method", ["disable_key", "enable_key", "schedule_key_deletion"])
    def test_a_key_pending_deletion_can_only_be_cancelled(
        self, provider: Provider, arn: str, method: str
    ) -> None:
        provider.schedule_key_deletion(arn)
        code = "KMSInvalidStateException"
        with refused(KeyPendingDeletion, OPERATIONS[method], code=code, key=arn):
            getattr(provider, method)(arn)
        assert provider.describe_key(arn).state == "PendingDeletion"

    def test_no_alias_for_a_key_pending_deletion(
        self, provider: Provider, world: World
    ) -> None:
        provider.create_alias("alias/tests/other", world.other)
        provider.schedule_key_deletion(world.key)
        with refused(KeyPendingDeletion, "CreateAlias"):
            provider.create_alias("alias/tests/dying", world.key)
        with refused(KeyPendingDeletion, "UpdateAlias"):
            provider.update_alias("alias/tests/other", world.key)

    def test_an_alias_may_leave_a_key_pending_deletion(
        self, provider: Provider, world: World
    ) -> None:
        provider.create_alias("alias/tests/leaves", world.key)
        provider.schedule_key_deletion(world.key)
        provider.update_alias("alias/tests/leaves", world.other)
        assert provider.describe_key("alias/tests/leaves").key_arn == world.other

    @pytest.mark.parametrize("method", ["disable_key", "schedule_key_deletion"])
    def test_unusable_keys_can_be_looked_at(
        self, provider: Provider, arn: str, method: str
    ) -> None:
        provider.enable_key_rotation(arn)
        getattr(provider, method)(arn)
        assert provider.describe_key(arn).key_arn == arn
        assert provider.get_key_policy(arn).policy
        assert provider.list_resource_tags(arn).tags == {}
        waits = method == "schedule_key_deletion"
        expected = None if waits else 365
        assert provider.get_key_rotation_status(arn).period_days == expected

    def test_nothing_to_cancel(self, provider: Provider, arn: str) -> None:
        code = "KMSInvalidStateException"
        with refused(KeyUnusable, "CancelKeyDeletion", code=code, key=arn):
            provider.cancel_key_deletion(arn)
        assert provider.describe_key(arn).state == "Enabled"

    @pytest.mark.parametrize("days", [6, 31])
    def test_a_waiting_period_out_of_bounds(
        self, provider: Provider, arn: str, days: int
    ) -> None:
        with refused(InvalidRequest, "ScheduleKeyDeletion", key=arn, answered=False):
            provider.schedule_key_deletion(arn, days)

    def test_a_key_is_gone_when_its_day_has_come(
        self, provider: Provider, world: World, advance: Advance
    ) -> None:
        provider.create_alias("alias/tests/gone", world.key)
        provider.schedule_key_deletion(world.key, 7)
        advance(datetime.timedelta(days=6, hours=23))
        assert provider.describe_key("alias/tests/gone").state == "PendingDeletion"
        advance(datetime.timedelta(hours=2))
        for name in (world.key, "alias/tests/gone"):
            with refused(KeyNotFound, "DescribeKey", code="NotFoundException", key=name):
                provider.describe_key(name)
        with refused(KeyNotFound, "Decrypt", key=world.key):
            provider.decrypt(world.key, world.blob, CONTEXT)
        with refused(KeyNotFound, "CancelKeyDeletion", key=world.key):
            provider.cancel_key_deletion(world.key)
        provider.create_alias("alias/tests/gone", world.other)
        assert provider.describe_key("alias/tests/gone").key_arn == world.other

    def test_a_cancelled_deletion_does_not_happen(
        self, provider: Provider, world: World, advance: Advance
    ) -> None:
        provider.schedule_key_deletion(world.key, 7)
        provider.cancel_key_deletion(world.key)
        provider.enable_key(world.key)
        advance(datetime.timedelta(days=40))
        assert provider.decrypt(world.key, world.blob, CONTEXT).plaintext == SECRET
