"""
What every provider must do: the same tests over all of them.

A test module subclasses `ProviderContract`, or `StrictProviderContract` for a backend that
is as exact as AWS KMS, and gives it these fixtures:

provider  a provider without keys, or one that other tests' keys do not disturb
advance   (strict) a function that lets a timedelta pass for the provider

moto does not do what only the strict class asks for; its tests are then not there, instead
of skipped. Alter expectations here only with a source in AWS's documentation.
"""

import base64
import contextlib
import datetime
import inspect
import json
from types import SimpleNamespace

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding

from kms_hasher.exceptions import (
    AlreadyExists,
    DryRunOperation,
    IncorrectKey,
    InvalidCiphertext,
    InvalidRequest,
    KeyDisabled,
    KeyNotFound,
    KeyPendingDeletion,
    KeyUnusable,
    KMSError,
    LimitExceeded,
)
from kms_hasher.providers.base import OPERATIONS, RSAES_OAEP_SHA_256, Provider

SECRET = b"hunter2!hunter2!hunter2!hunter2!"  # 32 bytes, as a digest
CONTEXT = {"app": "tests", "sub": "0123456789abcdef"}
UNKNOWN = "11111111-2222-4333-8444-555555555555"
RSA = {"algorithm": RSAES_OAEP_SHA_256}
CONTEXTS = {
    "empty": {},
    "one": {"a": "b"},
    "empty value": {"a": ""},
    "separators": {'a":"b","c': "d=e&f\n$|\x00"},
    "not ASCII": {"Straße": "日本語 \N{GRINNING FACE}"},
    "composed": {"n": "\N{LATIN SMALL LETTER E WITH ACUTE}"},
    "decomposed": {"n": "e\N{COMBINING ACUTE ACCENT}"},
    "upper case": {"A": "b"},
    "two": {"a": "b", "c": "d"},
    "swapped": {"a": "d", "c": "b"},
}
# Without these pairs' borders they would be "one", "two" and "swapped".
AMBIGUOUS = {
    "moved border": {"ab": ""},
    "two in one": {"a": "bcd"},
    "two in one name": {"abc": "d"},
}

# Each use of a symmetric key, its operation, and how it is done to `world.key`.
USES = {
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


def silent(thing):
    """Check that neither the text nor the representation of `thing` tells the secret."""
    for text in (str(thing), repr(thing)):
        assert SECRET.decode() not in text
        assert SECRET.hex() not in text
        assert base64.b64encode(SECRET).decode()[:40] not in text
    return thing


@contextlib.contextmanager
def refused(kind, operation, *, code="", key=None, answered=True):
    """Check that the block raises just this error, with all that belongs to it."""
    with pytest.raises(KMSError) as caught:
        yield
    error = silent(caught.value)
    assert type(error) is kind
    assert error.operation == operation
    assert not code or error.code == code
    assert key is None or error.key == key
    # None of the frames a report would show may lead to a text with the secret.
    for link in (
        error.__cause__,
        error.__context__ if not error.__suppress_context__ else None,
    ):
        silent(link)
    if answered:
        assert len(set(error.request_ids)) == len(error.request_ids) >= 1


class ProviderContract:
    """What moto gets right as well."""

    @pytest.fixture
    def key(self, provider):
        return provider.create_key()

    @pytest.fixture
    def arn(self, key):
        return key.key_arn

    @pytest.fixture
    def names(self, provider, arn):
        """All the ways to name one key."""
        provider.create_alias("alias/tests/by_name", arn)
        home = arn.partition(":key/")[0]
        return {
            "id": arn.rpartition("/")[2],
            "ARN": arn,
            "alias": "alias/tests/by_name",
            "alias ARN": f"{home}:alias/tests/by_name",
        }

    # --- the protocol ---------------------------------------------------------------

    @pytest.mark.parametrize("method", [*OPERATIONS, "close"])
    def test_signatures_are_the_protocol_s(self, provider, method):
        def shape(function):
            parameters = inspect.signature(function).parameters.values()
            return [(p.name, p.kind, p.default) for p in parameters if p.name != "self"]

        assert shape(getattr(provider, method)) == shape(getattr(Provider, method))

    def test_close_may_come_at_any_time(self, provider, arn):
        provider.close()
        provider.close()
        assert provider.describe_key(arn).key_arn == arn

    # --- Encrypt and Decrypt --------------------------------------------------------

    def test_round_trip_by_every_name(self, provider, arn, names):
        for name in names.values():
            sealed = silent(provider.encrypt(name, SECRET, CONTEXT))
            opened = silent(provider.decrypt(name, sealed.ciphertext, CONTEXT))
            assert opened.plaintext == SECRET
            assert sealed.key_arn == opened.key_arn == arn

    def test_every_call_has_its_own_request_id(self, provider, arn):
        results = [provider.encrypt(arn, SECRET, CONTEXT) for _ in range(3)]
        assert len({id_ for result in results for id_ in result.request_ids}) == 3

    def test_sealing_twice_gives_two_blobs(self, provider, arn):
        blobs = {provider.encrypt(arn, SECRET, CONTEXT).ciphertext for _ in range(3)}
        assert len(blobs) == 3

    def test_results_hide_what_they_hold(self, provider, arn):
        sealed = provider.encrypt(arn, SECRET, CONTEXT)
        assert "ciphertext" not in repr(sealed)
        data_key = provider.generate_data_key(arn, CONTEXT)
        for secret in (data_key.plaintext, data_key.ciphertext):
            assert repr(secret)[-20:-1] not in repr(data_key)

    @pytest.mark.parametrize("size", [1, 15, 16, 17, 190, 4095, 4096])
    def test_plaintexts_of_every_size(self, provider, arn, size):
        plaintext = bytes(index % 256 for index in range(size))
        sealed = provider.encrypt(arn, plaintext, CONTEXT)
        assert provider.decrypt(arn, sealed.ciphertext, CONTEXT).plaintext == plaintext

    @pytest.mark.parametrize("size", [0, 4097])
    def test_plaintext_out_of_bounds(self, provider, arn, size):
        with refused(InvalidRequest, "Encrypt", key=arn, answered=size > 0):
            provider.encrypt(arn, b"x" * size, CONTEXT)

    def test_a_truncated_or_altered_end_does_not_open(self, provider, arn):
        blob = provider.encrypt(arn, SECRET, CONTEXT).ciphertext
        for spoilt in (blob[:-1], blob[:-1] + bytes([blob[-1] ^ 1])):
            with refused(InvalidCiphertext, "Decrypt", key=arn):
                provider.decrypt(arn, spoilt, CONTEXT)

    # --- the encryption context -----------------------------------------------------

    def test_each_context_opens_only_its_own(self, provider, arn):
        self.check_contexts(provider, arn, CONTEXTS.values())

    def test_the_order_of_a_context_is_free(self, provider, arn):
        blob = provider.encrypt(arn, SECRET, {"b": "1", "a": "2", "ä": "3"}).ciphertext
        turned = {"ä": "3", "a": "2", "b": "1"}
        assert provider.decrypt(arn, blob, turned).plaintext == SECRET

    # --- ReEncrypt ------------------------------------------------------------------

    def test_re_encrypt_to_another_key_and_context(self, provider, arn):
        target = provider.create_key().key_arn
        blob = provider.encrypt(arn, SECRET, CONTEXT).ciphertext
        moved = silent(provider.re_encrypt(arn, blob, CONTEXT, target, {"new": "1"}))
        assert (moved.source_key_arn, moved.key_arn) == (arn, target)
        assert moved.request_ids
        assert "ciphertext" not in repr(moved)
        opened = provider.decrypt(target, moved.ciphertext, {"new": "1"})
        assert (opened.plaintext, opened.key_arn) == (SECRET, target)
        with refused(InvalidCiphertext, "Decrypt", key=target):
            provider.decrypt(target, moved.ciphertext, CONTEXT)

    def test_re_encrypt_under_the_same_key(self, provider, arn):
        blob = provider.encrypt(arn, SECRET, CONTEXT).ciphertext
        moved = provider.re_encrypt(arn, blob, CONTEXT, arn, CONTEXT)
        assert moved.ciphertext != blob
        assert provider.decrypt(arn, moved.ciphertext, CONTEXT).plaintext == SECRET

    def test_re_encrypt_with_the_wrong_source_context(self, provider, arn):
        blob = provider.encrypt(arn, SECRET, CONTEXT).ciphertext
        with refused(InvalidCiphertext, "ReEncrypt"):
            provider.re_encrypt(arn, blob, {}, arn, CONTEXT)

    # --- GenerateMac and GenerateDataKey ----------------------------------------------

    def test_mac(self, provider):
        keys = [self.hmac_key(provider).key_arn for _ in range(2)]
        result = silent(provider.generate_mac(keys[0], SECRET))
        assert (len(result.mac), result.key_arn) == (32, keys[0])
        assert result.request_ids
        assert repr(result.mac)[2:20] not in repr(result)
        assert provider.generate_mac(keys[0], SECRET).mac == result.mac
        assert provider.generate_mac(keys[0], SECRET + b"!").mac != result.mac
        assert provider.generate_mac(keys[1], SECRET).mac != result.mac

    @pytest.mark.parametrize("size", [1, 32, 64, 1024])
    def test_data_key(self, provider, arn, size):
        made = provider.generate_data_key(arn, CONTEXT, size)
        assert (len(made.plaintext), made.key_arn) == (size, arn)
        assert provider.decrypt(arn, made.ciphertext, CONTEXT).plaintext == made.plaintext
        with refused(InvalidCiphertext, "Decrypt", key=arn):
            provider.decrypt(arn, made.ciphertext, {})

    def test_data_keys_are_never_the_same(self, provider, arn):
        made = [provider.generate_data_key(arn, CONTEXT) for _ in range(3)]
        assert {len(one.plaintext) for one in made} == {32}
        assert len({one.plaintext for one in made}) == 3

    @pytest.mark.parametrize("size", [0, 1025])
    def test_data_key_of_a_size_out_of_bounds(self, provider, arn, size):
        with refused(InvalidRequest, "GenerateDataKey", key=arn, answered=False):
            provider.generate_data_key(arn, CONTEXT, size)

    # --- keys -----------------------------------------------------------------------

    def test_a_new_key(self, provider):
        before = datetime.datetime.now(datetime.timezone.utc)
        key = provider.create_key(description="for tests")
        assert (key.spec, key.usage) == ("SYMMETRIC_DEFAULT", "ENCRYPT_DECRYPT")
        assert (key.state, key.multi_region) == ("Enabled", False)
        assert (key.description, key.deletion_at) == ("for tests", None)
        assert key.request_ids
        # KMS gives times to the millisecond.
        assert abs(key.created_at - before) < datetime.timedelta(minutes=1)
        assert key.key_arn.endswith(f":key/{key.key_id}")

    @pytest.mark.parametrize(
        ("spec", "usage"),
        [("RSA_2048", "ENCRYPT_DECRYPT"), ("HMAC_256", "GENERATE_VERIFY_MAC")],
    )
    def test_keys_of_other_specs(self, provider, spec, usage):
        key = provider.create_key(spec=spec, usage=usage)
        seen = provider.describe_key(key.key_arn)
        assert (seen.spec, seen.usage, seen.key_material_id) == (spec, usage, "")

    def test_a_multi_region_key_says_so_in_its_id(self, provider):
        key = provider.create_key(multi_region=True)
        assert key.multi_region
        assert key.key_id.startswith("mrk-")
        assert provider.describe_key(key.key_arn).multi_region

    def test_describe_by_every_name(self, provider, key, names):
        for name in names.values():
            seen = provider.describe_key(name)
            assert (seen.key_arn, seen.state) == (key.key_arn, "Enabled")
            assert (seen.spec, seen.usage) == (key.spec, key.usage)

    def test_the_default_policy_lets_the_account_decide(self, provider, arn):
        result = provider.get_key_policy(arn)
        assert result.key_arn == arn
        account = arn.split(":")[4]
        principals = [s["Principal"] for s in json.loads(result.policy)["Statement"]]
        assert {"AWS": f"arn:aws:iam::{account}:root"} in principals

    def test_policy_and_tags_are_kept(self, provider):
        policy = json.dumps({"Version": "2012-10-17", "Id": "ours", "Statement": []})
        tags = {"team": "Straße 1", "empty": ""}
        key = provider.create_key(policy=policy, tags=tags)
        assert json.loads(provider.get_key_policy(key.key_arn).policy) == json.loads(policy)
        result = provider.list_resource_tags(key.key_arn)
        assert (dict(result.tags), result.key_arn) == (tags, key.key_arn)

    def test_a_key_without_tags(self, provider, arn):
        assert provider.list_resource_tags(arn).tags == {}

    def test_automatic_rotation(self, provider, arn):
        off = provider.get_key_rotation_status(arn)
        assert (off.period_days, off.key_arn) == (None, arn)
        assert provider.enable_key_rotation(arn).key_arn == arn
        assert provider.get_key_rotation_status(arn).period_days == 365

    def test_states(self, provider, key):
        provider.disable_key(key.key_id)
        assert provider.describe_key(key.key_arn).state == "Disabled"
        provider.enable_key(key.key_id)
        assert provider.describe_key(key.key_arn).state == "Enabled"
        provider.schedule_key_deletion(key.key_id, 7)
        waiting = provider.describe_key(key.key_arn)
        due = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(days=7)
        assert waiting.state == "PendingDeletion"
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
    def test_unknown_keys(self, provider, arn, method, arguments):
        for name in (UNKNOWN, arn.rpartition("/")[0] + "/" + UNKNOWN):
            with refused(KeyNotFound, OPERATIONS[method], code="NotFoundException", key=name):
                getattr(provider, method)(name, *arguments)

    def test_an_unknown_alias(self, provider, arn):
        home = arn.partition(":key/")[0]
        for name in ("alias/tests/none", f"{home}:alias/tests/none"):
            with refused(KeyNotFound, "Encrypt", code="NotFoundException", key=name):
                provider.encrypt(name, SECRET, CONTEXT)

    # --- aliases --------------------------------------------------------------------

    def test_an_alias_moves_and_old_blobs_stay_with_their_key(self, provider, arn):
        provider.create_alias("alias/tests/moves", arn)
        old = provider.encrypt("alias/tests/moves", SECRET, CONTEXT)
        target = provider.create_key().key_arn
        provider.update_alias("alias/tests/moves", target)
        assert provider.describe_key("alias/tests/moves").key_arn == target
        assert provider.encrypt("alias/tests/moves", SECRET, CONTEXT).key_arn == target
        assert provider.decrypt(old.key_arn, old.ciphertext, CONTEXT).plaintext == SECRET

    def test_alias_calls_tell_the_key(self, provider, arn):
        assert provider.create_alias("alias/tests/told", arn).key_arn == arn
        assert provider.update_alias("alias/tests/told", arn).key_arn == arn

    def test_an_alias_may_be_given_by_its_arn(self, provider, arn):
        alias = f"{arn.partition(':key/')[0]}:alias/tests/by_arn"
        target = provider.create_key().key_arn
        provider.create_alias(alias, arn)
        assert provider.describe_key("alias/tests/by_arn").key_arn == arn
        provider.update_alias(alias, target)
        assert provider.describe_key("alias/tests/by_arn").key_arn == target

    def test_an_alias_that_exists(self, provider, arn):
        provider.create_alias("alias/tests/twice", arn)
        other = provider.create_key().key_arn
        with refused(AlreadyExists, "CreateAlias", code="AlreadyExistsException"):
            provider.create_alias("alias/tests/twice", other)
        assert provider.describe_key("alias/tests/twice").key_arn == arn

    @pytest.mark.parametrize("alias", ["tests", "key/tests", "alias/with space"])
    def test_names_that_are_no_aliases(self, provider, arn, alias):
        with refused(InvalidRequest, "CreateAlias"):
            provider.create_alias(alias, arn)

    def test_reserved_names(self, provider, arn):
        with pytest.raises(KMSError) as caught:
            provider.create_alias("alias/aws/s3", arn)
        assert caught.value.operation == "CreateAlias"

    def test_an_alias_for_a_key_that_is_not_there(self, provider, arn):
        missing = arn.rpartition("/")[0] + "/" + UNKNOWN
        with refused(KeyNotFound, "CreateAlias"):
            provider.create_alias("alias/tests/nowhere", missing)

    def test_an_alias_that_is_not_there_cannot_move(self, provider, arn):
        with refused(KeyNotFound, "UpdateAlias"):
            provider.update_alias("alias/tests/none", arn)

    # --- helpers --------------------------------------------------------------------

    @staticmethod
    def check_contexts(provider, arn, contexts):
        for context in contexts:
            blob = provider.encrypt(arn, SECRET, context).ciphertext
            assert provider.decrypt(arn, blob, dict(context)).plaintext == SECRET
            for other in contexts:
                if other != context:
                    with refused(InvalidCiphertext, "Decrypt", key=arn):
                        provider.decrypt(arn, blob, other)

    @staticmethod
    def hmac_key(provider):
        return provider.create_key(spec="HMAC_256", usage="GENERATE_VERIFY_MAC")

    @staticmethod
    def seal_with_public_key(provider, arn, plaintext):
        """Encrypt without KMS, as the public_key mode does."""
        public = serialization.load_der_public_key(provider.get_public_key(arn).der)
        sha = hashes.SHA256()
        return public.encrypt(plaintext, padding.OAEP(padding.MGF1(sha), sha, None))


class StrictProviderContract(ProviderContract):
    """What AWS KMS does and moto 5.2.5 does not."""

    @pytest.fixture
    def world(self, provider, arn):
        """`key` and what it has sealed, and the same of an `other` key."""
        other = provider.create_key().key_arn
        return SimpleNamespace(
            key=arn,
            blob=provider.encrypt(arn, SECRET, CONTEXT).ciphertext,
            other=other,
            other_blob=provider.encrypt(other, SECRET, CONTEXT).ciphertext,
        )

    @pytest.fixture
    def rsa(self, provider):
        return provider.create_key(spec="RSA_2048").key_arn

    @pytest.fixture
    def mac_key(self, provider):
        return self.hmac_key(provider).key_arn

    # --- sizes ----------------------------------------------------------------------

    def test_the_size_of_a_sealed_digest(self, provider, arn):
        assert len(provider.encrypt(arn, SECRET, CONTEXT).ciphertext) == 184

    @pytest.mark.parametrize("size", [1, 31, 64, 4096])
    def test_the_size_of_a_blob(self, provider, arn, size):
        assert len(provider.encrypt(arn, b"x" * size, CONTEXT).ciphertext) == 152 + size
        assert len(provider.encrypt(arn, b"x" * size, {}).ciphertext) == 152 + size

    def test_the_size_of_a_wrapped_data_key(self, provider, arn):
        assert len(provider.generate_data_key(arn, CONTEXT, 64).ciphertext) == 152 + 64

    @pytest.mark.parametrize("size", [0, 6145])
    def test_a_blob_of_a_size_out_of_bounds(self, provider, arn, size):
        with refused(InvalidRequest, "Decrypt", key=arn, answered=size > 0):
            provider.decrypt(arn, b"x" * size, CONTEXT)

    # --- whose blob it is -----------------------------------------------------------

    def test_a_blob_of_another_key(self, provider, world):
        for operation in ("Decrypt", "ReEncrypt from"):
            world.blob = world.other_blob
            code = "IncorrectKeyException"
            with refused(IncorrectKey, operation.split()[0], code=code, key=world.key):
                USES[operation](provider, world)

    def test_a_blob_of_the_key_an_alias_pointed_to(self, provider, world):
        provider.create_alias("alias/tests/left", world.key)
        provider.update_alias("alias/tests/left", world.other)
        with refused(IncorrectKey, "Decrypt", key="alias/tests/left"):
            provider.decrypt("alias/tests/left", world.blob, CONTEXT)

    @pytest.mark.parametrize("index", [*range(0, 184, 7), 183])
    def test_a_blob_altered_anywhere(self, provider, world, index):
        spoilt = bytearray(world.blob)
        spoilt[index] ^= 0x10
        with refused(InvalidCiphertext, "Decrypt", code="InvalidCiphertextException"):
            provider.decrypt(world.key, bytes(spoilt), CONTEXT)

    @pytest.mark.parametrize("size", [1, 8, 100, 136, 151, 152, 183])
    def test_a_blob_cut_short(self, provider, world, size):
        with refused(InvalidCiphertext, "Decrypt", key=world.key):
            provider.decrypt(world.key, world.blob[:size], CONTEXT)

    def test_a_blob_of_nobody(self, provider, arn):
        with refused(InvalidCiphertext, "Decrypt", key=arn):
            provider.decrypt(arn, b"\x00" * 184, CONTEXT)

    def test_other_accounts_and_regions(self, provider, arn, world):
        _, _, _, region, account, key = arn.split(":")
        for place in ((region, "999999999999"), ("eu-elsewhere-9", account)):
            foreign = ":".join(("arn", "aws", "kms", *place, key))
            with refused(KeyNotFound, "DescribeKey", code="NotFoundException", key=foreign):
                provider.describe_key(foreign)
            with refused(KeyNotFound, "Decrypt", key=foreign):
                provider.decrypt(foreign, world.blob, CONTEXT)

    def test_re_encrypt_names_the_key_that_is_at_fault(self, provider, world):
        for source, target in ((UNKNOWN, world.key), (world.key, UNKNOWN)):
            with refused(KeyNotFound, "ReEncrypt"):
                provider.re_encrypt(source, world.blob, CONTEXT, target, CONTEXT)

    def test_contexts_are_compared_pair_by_pair(self, provider, arn):
        taken = [CONTEXTS[name] for name in ("one", "two", "swapped")]
        self.check_contexts(provider, arn, [*taken, *AMBIGUOUS.values()])

    # --- key material ---------------------------------------------------------------

    def test_key_material_is_named(self, provider, world):
        first = provider.describe_key(world.key).key_material_id
        assert len(bytes.fromhex(first)) == 32
        assert provider.decrypt(world.key, world.blob, CONTEXT).key_material_id == first
        moved = USES["ReEncrypt from"](provider, world)
        assert moved.source_key_material_id == first
        assert moved.key_material_id == provider.describe_key(world.other).key_material_id

    def test_rotation_on_demand_keeps_the_arn_and_old_blobs(self, provider, world):
        first = provider.describe_key(world.key).key_material_id
        assert provider.rotate_key_on_demand(world.key).key_arn == world.key
        second = provider.describe_key(world.key).key_material_id
        assert second != first
        opened = provider.decrypt(world.key, world.blob, CONTEXT)
        assert (opened.plaintext, opened.key_material_id) == (SECRET, first)
        fresh = provider.encrypt(world.key, SECRET, CONTEXT)
        opened = provider.decrypt(world.key, fresh.ciphertext, CONTEXT)
        assert (opened.key_arn, opened.key_material_id) == (world.key, second)

    def test_re_encrypt_under_the_same_key_takes_the_new_material(self, provider, world):
        first = provider.describe_key(world.key).key_material_id
        provider.rotate_key_on_demand(world.key)
        world.other = world.key
        moved = USES["ReEncrypt from"](provider, world)
        assert moved.source_key_material_id == first != moved.key_material_id
        opened = provider.decrypt(world.key, moved.ciphertext, CONTEXT)
        assert (opened.plaintext, opened.key_material_id) == (SECRET, moved.key_material_id)

    def test_a_key_rotates_on_demand_25_times(self, provider, arn):
        for _ in range(25):
            provider.rotate_key_on_demand(arn)
        with refused(LimitExceeded, "RotateKeyOnDemand", code="LimitExceededException"):
            provider.rotate_key_on_demand(arn)

    @pytest.mark.parametrize("method", ["enable_key_rotation", "rotate_key_on_demand"])
    def test_only_symmetric_keys_rotate(self, provider, rsa, mac_key, method):
        for key in (rsa, mac_key):
            with refused(
                InvalidRequest, OPERATIONS[method], code="UnsupportedOperationException"
            ):
                getattr(provider, method)(key)
            assert provider.get_key_rotation_status(key).period_days is None

    @pytest.mark.parametrize("days", [89, 2561])
    def test_a_rotation_period_out_of_bounds(self, provider, arn, days):
        with refused(InvalidRequest, "EnableKeyRotation", key=arn, answered=False):
            provider.enable_key_rotation(arn, days)

    def test_the_rotation_period(self, provider, arn):
        for days in (90, 2560):
            provider.enable_key_rotation(arn, days)
            assert provider.get_key_rotation_status(arn).period_days == days

    # --- states ---------------------------------------------------------------------

    def test_changes_of_state_tell_the_key(self, provider, arn):
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
    def test_a_disabled_key_does_nothing(self, provider, world, use):
        provider.disable_key(world.key)
        with refused(
            KeyDisabled, use.split()[0], code="DisabledException", key=self.at(use, world)
        ):
            USES[use](provider, world)
        provider.enable_key(world.key)
        USES[use](provider, world)

    @pytest.mark.parametrize("use", USES)
    def test_a_key_pending_deletion_does_nothing(self, provider, world, use):
        provider.schedule_key_deletion(world.key)
        with refused(KeyPendingDeletion, use.split()[0]):
            USES[use](provider, world)
        provider.cancel_key_deletion(world.key)
        with refused(KeyDisabled, use.split()[0]):
            USES[use](provider, world)
        provider.enable_key(world.key)
        USES[use](provider, world)

    @staticmethod
    def at(use, world):
        # ReEncrypt names two keys; which of them an error stands for is the provider's.
        return None if use.startswith("ReEncrypt") else world.key

    def test_hmac_and_rsa_keys_have_states_too(self, provider, rsa, mac_key):
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
    def test_a_key_must_be_enabled_to_rotate(self, provider, arn, method):
        provider.disable_key(arn)
        with refused(KeyDisabled, OPERATIONS[method], key=arn):
            getattr(provider, method)(arn)
        provider.schedule_key_deletion(arn)
        with refused(KeyPendingDeletion, OPERATIONS[method], key=arn):
            getattr(provider, method)(arn)

    @pytest.mark.parametrize("method", ["disable_key", "enable_key", "schedule_key_deletion"])
    def test_a_key_pending_deletion_can_only_be_cancelled(self, provider, arn, method):
        provider.schedule_key_deletion(arn)
        code = "KMSInvalidStateException"
        with refused(KeyPendingDeletion, OPERATIONS[method], code=code, key=arn):
            getattr(provider, method)(arn)
        assert provider.describe_key(arn).state == "PendingDeletion"

    def test_no_alias_for_a_key_pending_deletion(self, provider, world):
        provider.create_alias("alias/tests/other", world.other)
        provider.schedule_key_deletion(world.key)
        with refused(KeyPendingDeletion, "CreateAlias"):
            provider.create_alias("alias/tests/dying", world.key)
        with refused(KeyPendingDeletion, "UpdateAlias"):
            provider.update_alias("alias/tests/other", world.key)

    def test_an_alias_may_leave_a_key_pending_deletion(self, provider, world):
        provider.create_alias("alias/tests/leaves", world.key)
        provider.schedule_key_deletion(world.key)
        provider.update_alias("alias/tests/leaves", world.other)
        assert provider.describe_key("alias/tests/leaves").key_arn == world.other

    @pytest.mark.parametrize("method", ["disable_key", "schedule_key_deletion"])
    def test_unusable_keys_can_be_looked_at(self, provider, arn, method):
        provider.enable_key_rotation(arn)
        getattr(provider, method)(arn)
        assert provider.describe_key(arn).key_arn == arn
        assert provider.get_key_policy(arn).policy
        assert provider.list_resource_tags(arn).tags == {}
        waits = method == "schedule_key_deletion"
        expected = None if waits else 365
        assert provider.get_key_rotation_status(arn).period_days == expected

    def test_nothing_to_cancel(self, provider, arn):
        code = "KMSInvalidStateException"
        with refused(KeyUnusable, "CancelKeyDeletion", code=code, key=arn):
            provider.cancel_key_deletion(arn)
        assert provider.describe_key(arn).state == "Enabled"

    @pytest.mark.parametrize("days", [6, 31])
    def test_a_waiting_period_out_of_bounds(self, provider, arn, days):
        with refused(InvalidRequest, "ScheduleKeyDeletion", key=arn, answered=False):
            provider.schedule_key_deletion(arn, days)

    def test_a_key_is_gone_when_its_day_has_come(self, provider, world, advance):
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

    def test_a_cancelled_deletion_does_not_happen(self, provider, world, advance):
        provider.schedule_key_deletion(world.key, 7)
        provider.cancel_key_deletion(world.key)
        provider.enable_key(world.key)
        advance(datetime.timedelta(days=40))
        assert provider.decrypt(world.key, world.blob, CONTEXT).plaintext == SECRET

    # --- DryRun ---------------------------------------------------------------------

    @pytest.mark.parametrize("use", CAN_DRY_RUN)
    def test_a_dry_run_of_what_is_allowed(self, provider, world, use):
        code = "DryRunOperationException"
        with refused(DryRunOperation, use.split()[0], code=code, key=self.at(use, world)):
            USES[use](provider, world, dry_run=True)

    @pytest.mark.parametrize("use", CAN_DRY_RUN)
    def test_a_dry_run_of_what_is_not(self, provider, world, use):
        provider.disable_key(world.key)
        with refused(KeyDisabled, use.split()[0]):
            USES[use](provider, world, dry_run=True)
        world.key = UNKNOWN
        with refused(KeyNotFound, use.split()[0]):
            USES[use](provider, world, dry_run=True)

    # --- RSA and HMAC ---------------------------------------------------------------

    @pytest.mark.parametrize(
        ("spec", "size", "limit"),
        [("RSA_2048", 256, 190), ("RSA_3072", 384, 318), ("RSA_4096", 512, 446)],
    )
    def test_rsa(self, provider, spec, size, limit):
        arn = provider.create_key(spec=spec).key_arn
        for plaintext in (SECRET, b"x" * limit):
            blob = silent(provider.encrypt(arn, plaintext, {}, **RSA)).ciphertext
            assert len(blob) == size
            for sealed in (blob, self.seal_with_public_key(provider, arn, plaintext)):
                opened = silent(provider.decrypt(arn, sealed, {}, **RSA))
                assert (opened.plaintext, opened.key_arn) == (plaintext, arn)
                assert opened.key_material_id == ""
        with refused(InvalidRequest, "Encrypt", code="ValidationException", key=arn):
            provider.encrypt(arn, b"x" * (limit + 1), {}, **RSA)

    def test_rsa_refuses_what_it_has_not_sealed(self, provider, rsa):
        blob = bytearray(provider.encrypt(rsa, SECRET, {}, **RSA).ciphertext)
        other = provider.create_key(spec="RSA_2048").key_arn
        with refused(InvalidCiphertext, "Decrypt", key=other):
            provider.decrypt(other, bytes(blob), {}, **RSA)
        blob[100] ^= 1
        for spoilt in (bytes(blob), bytes(blob[:-1]), b"\xff" * 256, b"\x00" * 256, b"x"):
            with refused(InvalidCiphertext, "Decrypt", key=rsa):
                provider.decrypt(rsa, spoilt, {}, **RSA)

    def test_rsa_takes_no_context(self, provider, rsa):
        blob = provider.encrypt(rsa, SECRET, {}, **RSA).ciphertext
        with refused(InvalidRequest, "Encrypt", key=rsa):
            provider.encrypt(rsa, SECRET, CONTEXT, **RSA)
        with refused(InvalidRequest, "Decrypt", key=rsa):
            provider.decrypt(rsa, blob, CONTEXT, **RSA)

    def test_re_encrypt_between_rsa_and_symmetric(self, provider, rsa, world):
        sealed = self.seal_with_public_key(provider, rsa, SECRET)
        there = provider.re_encrypt(
            rsa, sealed, {}, world.key, CONTEXT, source_algorithm=RSAES_OAEP_SHA_256
        )
        assert (there.source_key_arn, there.key_arn) == (rsa, world.key)
        assert there.source_key_material_id == ""
        assert provider.decrypt(world.key, there.ciphertext, CONTEXT).plaintext == SECRET
        back = provider.re_encrypt(world.key, there.ciphertext, CONTEXT, rsa, {}, **RSA)
        assert provider.decrypt(rsa, back.ciphertext, {}, **RSA).plaintext == SECRET

    def test_keys_are_used_for_what_they_are_for(self, provider, world, rsa, mac_key):
        signing = provider.create_key(spec="RSA_2048", usage="SIGN_VERIFY").key_arn
        for call, key, arguments, algorithm in (
            ("encrypt", mac_key, (SECRET, CONTEXT), {}),
            ("decrypt", mac_key, (world.blob, CONTEXT), {}),
            ("generate_data_key", mac_key, (CONTEXT,), {}),
            ("generate_data_key", rsa, (CONTEXT,), {}),
            ("generate_mac", world.key, (SECRET,), {}),
            ("generate_mac", rsa, (SECRET,), {}),
            ("encrypt", rsa, (SECRET, {}), {}),
            ("encrypt", world.key, (SECRET, {}), RSA),
            ("encrypt", signing, (SECRET, {}), RSA),
            ("decrypt", signing, (b"x" * 256, {}), RSA),
        ):
            code = "InvalidKeyUsageException"
            with refused(InvalidRequest, OPERATIONS[call], code=code, key=key):
                getattr(provider, call)(key, *arguments, **algorithm)

    def test_only_rsa_keys_have_a_public_key(self, provider, arn, mac_key):
        for key in (arn, mac_key):
            code = "UnsupportedOperationException"
            with refused(InvalidRequest, "GetPublicKey", code=code, key=key):
                provider.get_public_key(key)

    def test_an_algorithm_that_does_not_exist(self, provider, arn):
        with refused(InvalidRequest, "Encrypt", key=arn, answered=False):
            provider.encrypt(arn, SECRET, {}, algorithm="ROT13")

    @pytest.mark.parametrize("size", [0, 4097])
    def test_a_message_of_a_size_out_of_bounds(self, provider, mac_key, size):
        with refused(InvalidRequest, "GenerateMac", key=mac_key, answered=size > 0):
            provider.generate_mac(mac_key, b"x" * size)

    def test_messages_of_the_allowed_sizes(self, provider, mac_key):
        for size in (1, 4096):
            assert len(provider.generate_mac(mac_key, b"x" * size).mac) == 32

    def test_public_key(self, provider):
        key = provider.create_key(spec="RSA_2048")
        result = provider.get_public_key(key.key_arn)
        assert (result.key_arn, result.spec) == (key.key_arn, "RSA_2048")
        assert result.usage == "ENCRYPT_DECRYPT"
        assert serialization.load_der_public_key(result.der).key_size == 2048
        assert provider.get_public_key(key.key_arn).der == result.der

    def test_mac_and_public_key_tell_the_arn(self, provider, rsa, mac_key):
        provider.create_alias("alias/tests/mac", mac_key)
        provider.create_alias("alias/tests/rsa", rsa)
        for name in (mac_key.rpartition("/")[2], "alias/tests/mac"):
            assert provider.generate_mac(name, SECRET).key_arn == mac_key
        for name in (rsa.rpartition("/")[2], "alias/tests/rsa"):
            assert provider.get_public_key(name).key_arn == rsa

    def test_a_multi_region_key(self, provider):
        key_id = provider.create_key(multi_region=True).key_id
        assert len(bytes.fromhex(key_id.removeprefix("mrk-"))) == 16
        assert len(key_id) == 36
        blob = provider.encrypt(key_id, SECRET, CONTEXT).ciphertext
        assert len(blob) == 184
        assert provider.decrypt(key_id, blob, CONTEXT).plaintext == SECRET

    # --- what cannot be asked for ---------------------------------------------------

    @pytest.mark.parametrize(
        ("spec", "usage"),
        [
            ("SYMMETRIC_DEFAULT", "GENERATE_VERIFY_MAC"),
            ("HMAC_256", "ENCRYPT_DECRYPT"),
            ("RSA_2048", "GENERATE_VERIFY_MAC"),
            ("ROT_13", "ENCRYPT_DECRYPT"),
        ],
    )
    def test_specs_and_usages_that_do_not_go_together(self, provider, spec, usage):
        with refused(InvalidRequest, "CreateKey", answered=False):
            provider.create_key(spec=spec, usage=usage)

    @pytest.mark.parametrize("policy", ["{", "[]", "no"])
    def test_a_malformed_policy(self, provider, policy):
        code = "MalformedPolicyDocumentException"
        with refused(InvalidRequest, "CreateKey", code=code):
            provider.create_key(policy=policy)

    def test_an_alias_keeps_to_one_type_and_usage(self, provider, arn, rsa, mac_key):
        signing = provider.create_key(spec="RSA_2048", usage="SIGN_VERIFY").key_arn
        keys = [arn, rsa, mac_key, signing]
        for index, key in enumerate(keys):
            alias = f"alias/tests/kind-{index}"
            provider.create_alias(alias, key)
            for other in keys:
                if other != key:
                    with refused(InvalidRequest, "UpdateAlias"):
                        provider.update_alias(alias, other)
            assert provider.describe_key(alias).key_arn == key

    @pytest.mark.parametrize("alias", ["alias/", "alias/" + "x" * 251, "alias/a\n"])
    def test_more_names_that_are_no_aliases(self, provider, arn, alias):
        with refused(InvalidRequest, "CreateAlias"):
            provider.create_alias(alias, arn)

    def test_an_alias_points_to_a_key(self, provider, arn):
        provider.create_alias("alias/tests/first", arn)
        for call in (provider.create_alias, provider.update_alias):
            with pytest.raises(InvalidRequest):
                call("alias/tests/first", "alias/tests/first")

    @pytest.mark.parametrize(
        "method",
        [
            "get_key_policy",
            "list_resource_tags",
            "get_key_rotation_status",
            "enable_key_rotation",
            "rotate_key_on_demand",
            "disable_key",
            "enable_key",
            "schedule_key_deletion",
            "cancel_key_deletion",
        ],
    )
    def test_management_takes_no_alias(self, provider, names, method):
        for kind in ("alias", "alias ARN"):
            with refused(KeyNotFound, OPERATIONS[method], key=names[kind]):
                getattr(provider, method)(names[kind])
