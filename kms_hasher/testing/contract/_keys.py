"""What every provider does that has all of the protocol."""

from __future__ import annotations

import datetime
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

from kms_hasher.exceptions import (
    AlreadyExists,
    InvalidCiphertext,
    InvalidRequest,
    KeyNotFound,
    KMSError,
)
from kms_hasher.providers.base import OPERATIONS, Key, Provider
from kms_hasher.testing.contract._expect import (
    CONTEXT,
    SECRET,
    UNKNOWN,
    check_signature,
    refused,
    silent,
)
from kms_hasher.testing.contract._sealing import SealingContract


class ProviderContract(SealingContract):
    """The whole protocol, as far as moto does it as well: no sizes of blobs, no RSA."""

    @pytest.fixture
    def names(self, provider: Provider, arn: str) -> dict[str, str]:
        provider.create_alias("alias/tests/by_name", arn)
        home = arn.partition(":key/")[0]
        return {
            "id": arn.rpartition("/")[2],
            "ARN": arn,
            "alias": "alias/tests/by_name",
            "alias ARN": f"{home}:alias/tests/by_name",
        }

    @pytest.mark.parametrize("method", [*OPERATIONS, "close"])
    def test_signatures_are_the_protocol_s(self, provider: Provider, method: str) -> None:
        check_signature(provider, method)

    # --- GenerateMac and GenerateDataKey ---------------------------------------------

    def test_mac(self, provider: Provider) -> None:
        keys = [self.hmac_key(provider).key_arn for _ in range(2)]
        result = silent(provider.generate_mac(keys[0], SECRET))
        assert (len(result.mac), result.key_arn) == (32, keys[0])
        assert result.request_ids
        assert repr(result.mac)[2:20] not in repr(result)
        assert provider.generate_mac(keys[0], SECRET).mac == result.mac
        assert provider.generate_mac(keys[0], SECRET + b"!").mac != result.mac
        assert provider.generate_mac(keys[1], SECRET).mac != result.mac

    @pytest.mark.parametrize("size", [1, 32, 64, 1024])
    def test_data_key(self, provider: Provider, arn: str, size: int) -> None:
        made = provider.generate_data_key(arn, CONTEXT, size)
        assert (len(made.plaintext), made.key_arn) == (size, arn)
        assert provider.decrypt(arn, made.ciphertext, CONTEXT).plaintext == made.plaintext
        with refused(InvalidCiphertext, "Decrypt", key=arn):
            provider.decrypt(arn, made.ciphertext, {})

    def test_data_keys_are_hidden(self, provider: Provider, arn: str) -> None:
        data_key = provider.generate_data_key(arn, CONTEXT)
        for secret in (data_key.plaintext, data_key.ciphertext):
            assert repr(secret)[-20:-1] not in repr(data_key)

    def test_data_keys_are_never_the_same(self, provider: Provider, arn: str) -> None:
        made = [provider.generate_data_key(arn, CONTEXT) for _ in range(3)]
        assert {len(one.plaintext) for one in made} == {32}
        assert len({one.plaintext for one in made}) == 3

    @pytest.mark.parametrize("size", [0, 1025])
    def test_data_key_of_a_size_out_of_bounds(
        self, provider: Provider, arn: str, size: int
    ) -> None:
        with refused(InvalidRequest, "GenerateDataKey", key=arn, answered=False):
            provider.generate_data_key(arn, CONTEXT, size)

    # --- keys ------------------------------------------------------------------------

    def test_a_new_key(self, provider: Provider) -> None:
        before = datetime.datetime.now(datetime.timezone.utc)
        key = provider.create_key(description="for tests")
        assert (key.spec, key.usage) == ("SYMMETRIC_DEFAULT", "ENCRYPT_DECRYPT")
        assert (key.state, key.multi_region) == ("Enabled", False)
        assert (key.description, key.deletion_at) == ("for tests", None)
        assert key.request_ids
        # KMS gives times to the millisecond.
        assert key.created_at is not None
        assert abs(key.created_at - before) < datetime.timedelta(minutes=1)
        assert key.key_arn.endswith(f":key/{key.key_id}")

    @pytest.mark.parametrize(
        ("spec", "usage"),
        [("RSA_2048", "ENCRYPT_DECRYPT"), ("HMAC_256", "GENERATE_VERIFY_MAC")],
    )
    def test_keys_of_other_specs(self, provider: Provider, spec: str, usage: str) -> None:
        key = provider.create_key(spec=spec, usage=usage)
        seen = provider.describe_key(key.key_arn)
        assert (seen.spec, seen.usage, seen.key_material_id) == (spec, usage, "")

    def test_a_multi_region_key_says_so_in_its_id(self, provider: Provider) -> None:
        key = provider.create_key(multi_region=True)
        assert key.multi_region
        assert key.key_id.startswith("mrk-")
        assert provider.describe_key(key.key_arn).multi_region

    def test_the_default_policy_lets_the_account_decide(
        self, provider: Provider, arn: str
    ) -> None:
        result = provider.get_key_policy(arn)
        assert result.key_arn == arn
        account = arn.split(":")[4]
        principals = [s["Principal"] for s in json.loads(result.policy)["Statement"]]
        assert {"AWS": f"arn:aws:iam::{account}:root"} in principals

    def test_policy_and_tags_are_kept(self, provider: Provider) -> None:
        policy = json.dumps({"Version": "2012-10-17", "Id": "ours", "Statement": []})
        tags = {"team": "Straße 1", "empty": ""}
        key = provider.create_key(policy=policy, tags=tags)
        assert json.loads(provider.get_key_policy(key.key_arn).policy) == json.loads(policy)
        result = provider.list_resource_tags(key.key_arn)
        assert (dict(result.tags), result.key_arn) == (tags, key.key_arn)

    def test_a_key_without_tags(self, provider: Provider, arn: str) -> None:
        assert provider.list_resource_tags(arn).tags == {}

    def test_automatic_rotation(self, provider: Provider, arn: str) -> None:
        off = provider.get_key_rotation_status(arn)
        assert (off.period_days, off.key_arn) == (None, arn)
        assert provider.enable_key_rotation(arn).key_arn == arn
        assert provider.get_key_rotation_status(arn).period_days == 365

    def test_states(self, provider: Provider, key: Key) -> None:
        provider.disable_key(key.key_id)
        assert provider.describe_key(key.key_arn).state == "Disabled"
        provider.enable_key(key.key_id)
        assert provider.describe_key(key.key_arn).state == "Enabled"
        provider.schedule_key_deletion(key.key_id, 7)
        waiting = provider.describe_key(key.key_arn)
        due = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(days=7)
        assert waiting.state == "PendingDeletion"
        assert waiting.deletion_at is not None
        assert abs(waiting.deletion_at - due) < datetime.timedelta(minutes=1)
        provider.cancel_key_deletion(key.key_id)
        cancelled = provider.describe_key(key.key_arn)
        assert (cancelled.state, cancelled.deletion_at) == ("Disabled", None)

    @pytest.mark.parametrize(
        ("method", "arguments"),
        [
            ("encrypt", (SECRET, CONTEXT)),
            ("generate_data_key", (CONTEXT,)),
            ("generate_mac", (SECRET,)),
            ("get_public_key", ()),
            ("describe_key", ()),
            ("get_key_policy", ()),
            ("list_resource_tags", ()),
            ("get_key_rotation_status", ()),
            ("enable_key_rotation", ()),
            ("disable_key", ()),
            ("enable_key", ()),
            ("schedule_key_deletion", ()),
            ("cancel_key_deletion", ()),
        ],
    )
    def test_unknown_keys(
        self, provider: Provider, arn: str, method: str, arguments: tuple[Any, ...]
    ) -> None:
        for name in (UNKNOWN, arn.rpartition("/")[0] + "/" + UNKNOWN):
            with refused(KeyNotFound, OPERATIONS[method], code="NotFoundException", key=name):
                getattr(provider, method)(name, *arguments)

    # --- aliases ---------------------------------------------------------------------

    def test_an_unknown_alias(self, provider: Provider, arn: str) -> None:
        home = arn.partition(":key/")[0]
        for name in ("alias/tests/none", f"{home}:alias/tests/none"):
            with refused(KeyNotFound, "Encrypt", code="NotFoundException", key=name):
                provider.encrypt(name, SECRET, CONTEXT)

    def test_an_alias_moves_and_old_blobs_stay_with_their_key(
        self, provider: Provider, arn: str
    ) -> None:
        provider.create_alias("alias/tests/moves", arn)
        old = provider.encrypt("alias/tests/moves", SECRET, CONTEXT)
        target = provider.create_key().key_arn
        provider.update_alias("alias/tests/moves", target)
        assert provider.describe_key("alias/tests/moves").key_arn == target
        assert provider.encrypt("alias/tests/moves", SECRET, CONTEXT).key_arn == target
        assert provider.decrypt(old.key_arn, old.ciphertext, CONTEXT).plaintext == SECRET

    def test_alias_calls_tell_the_key(self, provider: Provider, arn: str) -> None:
        assert provider.create_alias("alias/tests/told", arn).key_arn == arn
        assert provider.update_alias("alias/tests/told", arn).key_arn == arn

    def test_an_alias_may_be_given_by_its_arn(self, provider: Provider, arn: str) -> None:
        alias = f"{arn.partition(':key/')[0]}:alias/tests/by_arn"
        target = provider.create_key().key_arn
        provider.create_alias(alias, arn)
        assert provider.describe_key("alias/tests/by_arn").key_arn == arn
        provider.update_alias(alias, target)
        assert provider.describe_key("alias/tests/by_arn").key_arn == target

    def test_an_alias_that_exists(self, provider: Provider, arn: str) -> None:
        provider.create_alias("alias/tests/twice", arn)
        other = provider.create_key().key_arn
        with refused(AlreadyExists, "CreateAlias", code="AlreadyExistsException"):
            provider.create_alias("alias/tests/twice", other)
        assert provider.describe_key("alias/tests/twice").key_arn == arn

    @pytest.mark.parametrize("alias", ["tests", "key/tests", "alias/with space"])
    def test_names_that_are_no_aliases(self, provider: Provider, arn: str, alias: str) -> None:
        with refused(InvalidRequest, "CreateAlias"):
            provider.create_alias(alias, arn)

    def test_reserved_names(self, provider: Provider, arn: str) -> None:
        with pytest.raises(KMSError) as caught:
            provider.create_alias("alias/aws/s3", arn)
        assert caught.value.operation == "CreateAlias"

    def test_an_alias_for_a_key_that_is_not_there(self, provider: Provider, arn: str) -> None:
        missing = arn.rpartition("/")[0] + "/" + UNKNOWN
        with refused(KeyNotFound, "CreateAlias"):
            provider.create_alias("alias/tests/nowhere", missing)

    def test_an_alias_that_is_not_there_cannot_move(self, provider: Provider, arn: str) -> None:
        with refused(KeyNotFound, "UpdateAlias"):
            provider.update_alias("alias/tests/none", arn)

    # --- helpers ---------------------------------------------------------------------

    @staticmethod
    def hmac_key(provider: Provider) -> Key:
        return provider.create_key(spec="HMAC_256", usage="GENERATE_VERIFY_MAC")

    @staticmethod
    def seal_with_public_key(provider: Provider, arn: str, plaintext: bytes) -> bytes:
        """Encrypt without KMS, as the public_key mode does."""
        public = serialization.load_der_public_key(provider.get_public_key(arn).der)
        assert isinstance(public, RSAPublicKey)
        sha = hashes.SHA256()
        return public.encrypt(plaintext, padding.OAEP(padding.MGF1(sha), sha, None))
