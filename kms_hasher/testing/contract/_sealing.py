"""What logins, changes of password and re-wrapping need of a provider."""

from __future__ import annotations

from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor

import pytest

from kms_hasher.exceptions import InvalidCiphertext, InvalidRequest, KeyNotFound, KMSError
from kms_hasher.providers.base import OPERATIONS, Context, Key, Provider
from kms_hasher.testing.contract._expect import (
    CONTEXT,
    CONTEXTS,
    SECRET,
    UNKNOWN,
    check_signature,
    refused,
    silent,
)

#: The methods that the class below tests.
SEALING = ("encrypt", "decrypt", "re_encrypt", "describe_key")


class SealingContract:
    """
    Encrypt, Decrypt, ReEncrypt and DescribeKey with symmetric keys.

    A provider that makes no keys overrides `key` and `target`: two keys that are there.
    """

    @pytest.fixture
    def key(self, provider: Provider) -> Key:
        return provider.create_key()

    @pytest.fixture
    def target(self, provider: Provider) -> str:
        """The ARN of another key, to which passwords are moved."""
        return provider.create_key().key_arn

    @pytest.fixture
    def arn(self, key: Key) -> str:
        return key.key_arn

    @pytest.fixture
    def names(self, arn: str) -> dict[str, str]:
        """All the ways to name one key."""
        return {"id": arn.rpartition("/")[2], "ARN": arn}

    @pytest.mark.parametrize("method", [*SEALING, "close"])
    def test_signatures_are_the_protocol_s(self, provider: Provider, method: str) -> None:
        check_signature(provider, method)

    def test_close_may_come_at_any_time(self, provider: Provider, arn: str) -> None:
        provider.close()
        provider.close()
        assert provider.describe_key(arn).key_arn == arn

    # --- Encrypt and Decrypt ---------------------------------------------------------

    def test_round_trip_by_every_name(
        self, provider: Provider, arn: str, names: dict[str, str]
    ) -> None:
        for name in names.values():
            sealed = silent(provider.encrypt(name, SECRET, CONTEXT))
            opened = silent(provider.decrypt(name, sealed.ciphertext, CONTEXT))
            assert opened.plaintext == SECRET
            assert sealed.key_arn == opened.key_arn == arn

    def test_arguments_may_be_named(self, provider: Provider, arn: str) -> None:
        blob = provider.encrypt(key=arn, plaintext=SECRET, context=CONTEXT).ciphertext
        moved = provider.re_encrypt(
            source_key=arn, ciphertext=blob, source_context=CONTEXT, key=arn, context=CONTEXT
        )
        opened = provider.decrypt(key=arn, ciphertext=moved.ciphertext, context=CONTEXT)
        assert opened.plaintext == SECRET
        assert provider.describe_key(key=arn).key_arn == arn

    def test_every_call_has_its_own_request_id(self, provider: Provider, arn: str) -> None:
        results = [provider.encrypt(arn, SECRET, CONTEXT) for _ in range(3)]
        assert len({id_ for result in results for id_ in result.request_ids}) == 3

    def test_sealing_twice_gives_two_blobs(self, provider: Provider, arn: str) -> None:
        blobs = {provider.encrypt(arn, SECRET, CONTEXT).ciphertext for _ in range(3)}
        assert len(blobs) == 3

    def test_results_hide_what_they_hold(self, provider: Provider, arn: str) -> None:
        sealed = provider.encrypt(arn, SECRET, CONTEXT)
        assert "ciphertext" not in repr(sealed)

    @pytest.mark.parametrize("size", [1, 15, 16, 17, 190, 4095, 4096])
    def test_plaintexts_of_every_size(self, provider: Provider, arn: str, size: int) -> None:
        plaintext = bytes(index % 256 for index in range(size))
        sealed = provider.encrypt(arn, plaintext, CONTEXT)
        assert provider.decrypt(arn, sealed.ciphertext, CONTEXT).plaintext == plaintext

    @pytest.mark.parametrize("size", [0, 4097])
    def test_plaintext_out_of_bounds(self, provider: Provider, arn: str, size: int) -> None:
        with refused(InvalidRequest, "Encrypt", key=arn, answered=size > 0):
            provider.encrypt(arn, b"x" * size, CONTEXT)

    def test_a_truncated_or_altered_end_does_not_open(
        self, provider: Provider, arn: str
    ) -> None:
        blob = provider.encrypt(arn, SECRET, CONTEXT).ciphertext
        for spoilt in (blob[:-1], blob[:-1] + bytes([blob[-1] ^ 1])):
            with refused(InvalidCiphertext, "Decrypt", key=arn):
                provider.decrypt(arn, spoilt, CONTEXT)

    def test_another_key_opens_nothing(self, provider: Provider, arn: str, target: str) -> None:
        blob = provider.encrypt(arn, SECRET, CONTEXT).ciphertext
        with pytest.raises(KMSError):
            provider.decrypt(target, blob, CONTEXT)

    # --- the encryption context ------------------------------------------------------

    def test_each_context_opens_only_its_own(self, provider: Provider, arn: str) -> None:
        self.check_contexts(provider, arn, CONTEXTS.values())

    def test_the_order_of_a_context_is_free(self, provider: Provider, arn: str) -> None:
        blob = provider.encrypt(arn, SECRET, {"b": "1", "a": "2", "ä": "3"}).ciphertext
        turned = {"ä": "3", "a": "2", "b": "1"}
        assert provider.decrypt(arn, blob, turned).plaintext == SECRET

    # --- ReEncrypt -------------------------------------------------------------------

    def test_re_encrypt_to_another_key_and_context(
        self, provider: Provider, arn: str, target: str
    ) -> None:
        blob = provider.encrypt(arn, SECRET, CONTEXT).ciphertext
        moved = silent(provider.re_encrypt(arn, blob, CONTEXT, target, {"new": "1"}))
        assert (moved.source_key_arn, moved.key_arn) == (arn, target)
        assert moved.request_ids
        assert "ciphertext" not in repr(moved)
        opened = provider.decrypt(target, moved.ciphertext, {"new": "1"})
        assert (opened.plaintext, opened.key_arn) == (SECRET, target)
        with refused(InvalidCiphertext, "Decrypt", key=target):
            provider.decrypt(target, moved.ciphertext, CONTEXT)

    def test_re_encrypt_under_the_same_key(self, provider: Provider, arn: str) -> None:
        blob = provider.encrypt(arn, SECRET, CONTEXT).ciphertext
        moved = provider.re_encrypt(arn, blob, CONTEXT, arn, CONTEXT)
        assert moved.ciphertext != blob
        assert provider.decrypt(arn, moved.ciphertext, CONTEXT).plaintext == SECRET

    def test_re_encrypt_with_the_wrong_source_context(
        self, provider: Provider, arn: str
    ) -> None:
        blob = provider.encrypt(arn, SECRET, CONTEXT).ciphertext
        with refused(InvalidCiphertext, "ReEncrypt"):
            provider.re_encrypt(arn, blob, {}, arn, CONTEXT)

    def test_describe_by_every_name(
        self, provider: Provider, key: Key, names: dict[str, str]
    ) -> None:
        for name in names.values():
            seen = provider.describe_key(name)
            assert (seen.key_arn, seen.state) == (key.key_arn, "Enabled")
            assert (seen.spec, seen.usage) == (key.spec, key.usage)

    @pytest.mark.parametrize("method", ["encrypt", "decrypt", "describe_key"])
    def test_a_key_that_is_not_there(self, provider: Provider, arn: str, method: str) -> None:
        arguments = {
            "encrypt": (SECRET, CONTEXT),
            "decrypt": (provider.encrypt(arn, SECRET, CONTEXT).ciphertext, CONTEXT),
            "describe_key": (),
        }
        for name in (UNKNOWN, arn.rpartition("/")[0] + "/" + UNKNOWN):
            with refused(KeyNotFound, OPERATIONS[method], code="NotFoundException"):
                getattr(provider, method)(name, *arguments[method])

    def test_threads_share_it(self, provider: Provider, arn: str) -> None:
        def round_trip(number: int) -> bool:
            secret, context = SECRET + bytes([number]), {"n": str(number)}
            sealed = provider.encrypt(arn, secret, context)
            return provider.decrypt(arn, sealed.ciphertext, context).plaintext == secret

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(round_trip, range(40)))

    @staticmethod
    def check_contexts(provider: Provider, arn: str, contexts: Collection[Context]) -> None:
        for context in contexts:
            blob = provider.encrypt(arn, SECRET, context).ciphertext
            assert provider.decrypt(arn, blob, dict(context)).plaintext == SECRET
            for other in contexts:
                if other != context:
                    with refused(InvalidCiphertext, "Decrypt", key=arn):
                        provider.decrypt(arn, blob, other)
