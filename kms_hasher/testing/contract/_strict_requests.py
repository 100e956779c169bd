"""What AWS KMS does with RSA and HMAC keys, and what it refuses; moto does not."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

from kms_hasher.exceptions import InvalidCiphertext, InvalidRequest, KeyNotFound
from kms_hasher.providers.base import OPERATIONS, RSAES_OAEP_SHA_256, Provider
from kms_hasher.testing.contract._expect import CONTEXT, RSA, SECRET, refused, silent
from kms_hasher.testing.contract._strict import StrictBase, World


class StrictRequests(StrictBase):
    """Each kind of key does what it is for, and nothing else can be asked for."""

    # --- RSA, HMAC and multi-Region keys ----------------------------------------------

    @pytest.mark.parametrize(
        ("spec", "size", "limit"),
        [("RSA_2048", 256, 190), ("RSA_3072", 384, 318), ("RSA_4096", 512, 446)],
    )
    def test_rsa(self, provider: Provider, spec: str, size: int, limit: int) -> None:
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

    def test_rsa_refuses_what_it_has_not_sealed(self, provider: Provider, rsa: str) -> None:
        blob = bytearray(provider.encrypt(rsa, SECRET, {}, **RSA).ciphertext)
        other = provider.create_key(spec="RSA_2048").key_arn
        with refused(InvalidCiphertext, "Decrypt", key=other):
            provider.decrypt(other, bytes(blob), {}, **RSA)
        blob[100] ^= 1
        for spoilt in (bytes(blob), bytes(blob[:-1]), b"\xff" * 256, b"\x00" * 256, b"x"):
            with refused(InvalidCiphertext, "Decrypt", key=rsa):
                provider.decrypt(rsa, spoilt, {}, **RSA)

    def test_rsa_takes_no_context(self, provider: Provider, rsa: str) -> None:
        blob = provider.encrypt(rsa, SECRET, {}, **RSA).ciphertext
        with refused(InvalidRequest, "Encrypt", key=rsa):
            provider.encrypt(rsa, SECRET, CONTEXT, **RSA)
        with refused(InvalidRequest, "Decrypt", key=rsa):
            provider.decrypt(rsa, blob, CONTEXT, **RSA)

    def test_re_encrypt_between_rsa_and_symmetric(
        self, provider: Provider, rsa: str, world: World
    ) -> None:
        sealed = self.seal_with_public_key(provider, rsa, SECRET)
        there = provider.re_encrypt(
            rsa, sealed, {}, world.key, CONTEXT, source_algorithm=RSAES_OAEP_SHA_256
        )
        assert (there.source_key_arn, there.key_arn) == (rsa, world.key)
        assert there.source_key_material_id == ""
        assert provider.decrypt(world.key, there.ciphertext, CONTEXT).plaintext == SECRET
        back = provider.re_encrypt(world.key, there.ciphertext, CONTEXT, rsa, {}, **RSA)
        assert provider.decrypt(rsa, back.ciphertext, {}, **RSA).plaintext == SECRET

    def test_keys_are_used_for_what_they_are_for(
        self, provider: Provider, world: World, rsa: str, mac_key: str
    ) -> None:
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

    def test_only_rsa_keys_have_a_public_key(
        self, provider: Provider, arn: str, mac_key: str
    ) -> None:
        for key in (arn, mac_key):
            code = "UnsupportedOperationException"
            with refused(InvalidRequest, "GetPublicKey", code=code, key=key):
                provider.get_public_key(key)

    def test_an_algorithm_that_does_not_exist(self, provider: Provider, arn: str) -> None:
        with refused(InvalidRequest, "Encrypt", key=arn, answered=False):
            provider.encrypt(arn, SECRET, {}, algorithm="ROT13")

    @pytest.mark.parametrize("size", [0, 4097])
    def test_a_message_of_a_size_out_of_bounds(
        self, provider: Provider, mac_key: str, size: int
    ) -> None:
        with refused(InvalidRequest, "GenerateMac", key=mac_key, answered=size > 0):
            provider.generate_mac(mac_key, b"x" * size)

    def test_messages_of_the_allowed_sizes(self, provider: Provider, mac_key: str) -> None:
        for size in (1, 4096):
            assert len(provider.generate_mac(mac_key, b"x" * size).mac) == 32

    def test_public_key(self, provider: Provider) -> None:
        key = provider.create_key(spec="RSA_2048")
        result = provider.get_public_key(key.key_arn)
        assert (result.key_arn, result.spec) == (key.key_arn, "RSA_2048")
        assert result.usage == "ENCRYPT_DECRYPT"
        public = serialization.load_der_public_key(result.der)
        assert isinstance(public, RSAPublicKey)
        assert public.key_size == 2048
        assert provider.get_public_key(key.key_arn).der == result.der

    def test_mac_and_public_key_tell_the_arn(
        self, provider: Provider, rsa: str, mac_key: str
    ) -> None:
        provider.create_alias("alias/tests/mac", mac_key)
        provider.create_alias("alias/tests/rsa", rsa)
        for name in (mac_key.rpartition("/")[2], "alias/tests/mac"):
            assert provider.generate_mac(name, SECRET).key_arn == mac_key
        for name in (rsa.rpartition("/")[2], "alias/tests/rsa"):
            assert provider.get_public_key(name).key_arn == rsa

    def test_a_multi_region_key(self, provider: Provider) -> None:
        key_id = provider.create_key(multi_region=True).key_id
        assert len(bytes.fromhex(key_id.removeprefix("mrk-"))) == 16
        assert len(key_id) == 36
        blob = provider.encrypt(key_id, SECRET, CONTEXT).ciphertext
        assert len(blob) == 184
        assert provider.decrypt(key_id, blob, CONTEXT).plaintext == SECRET

    # --- what cannot be asked for ----------------------------------------------------

    @pytest.mark.parametrize(
        ("spec", "usage"),
        [
            ("SYMMETRIC_DEFAULT", "GENERATE_VERIFY_MAC"),
            ("HMAC_256", "ENCRYPT_DECRYPT"),
            ("RSA_2048", "GENERATE_VERIFY_MAC"),
            ("ROT_13", "ENCRYPT_DECRYPT"),
        ],
    )
    def test_specs_and_usages_that_do_not_go_together(
        self, provider: Provider, spec: str, usage: str
    ) -> None:
        with refused(InvalidRequest, "CreateKey", answered=False):
            provider.create_key(spec=spec, usage=usage)

    @pytest.mark.parametrize("policy", ["{", "[]", "no"])
    def test_a_malformed_policy(self, provider: Provider, policy: str) -> None:
        code = "MalformedPolicyDocumentException"
        with refused(InvalidRequest, "CreateKey", code=code):
            provider.create_key(policy=policy)

    def test_an_alias_keeps_to_one_type_and_usage(
        self, provider: Provider, arn: str, rsa: str, mac_key: str
    ) -> None:
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
    def test_more_names_that_are_no_aliases(
        self, provider: Provider, arn: str, alias: str
    ) -> None:
        with refused(InvalidRequest, "CreateAlias"):
            provider.create_alias(alias, arn)

    def test_an_alias_points_to_a_key(self, provider: Provider, arn: str) -> None:
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
    def test_management_takes_no_alias(
        self, provider: Provider, names: dict[str, str], method: str
    ) -> None:
        for kind in ("alias", "alias ARN"):
            with refused(KeyNotFound, OPERATIONS[method], key=names[kind]):
                getattr(provider, method)(names[kind])
