"""The stored string: one string for each value, and every other string refused."""

from __future__ import annotations

import uuid

import pytest
from django.contrib.auth.hashers import (
    PBKDF2PasswordHasher,
    ScryptPasswordHasher,
    make_password,
)
from hypothesis import given
from hypothesis import strategies as st

from kms_hasher import encoding
from kms_hasher.encoding import ARN, Argon2Parameters, Header, SealedHash
from kms_hasher.exceptions import MalformedHash
from tests.hashers import CheapArgon2PasswordHasher

KEY_ID = "1234abcd-12ab-34cd-56ef-1234567890ab"
REF = "ci2kxtisvm2m2vxpci2fm6eqvot5e"
STORED = f"kms_argon2$d1${REF}$m=102400,t=2,p=8$abcdefghijklmnopqrstuv${'eHh4' * 61}eA"

key_ids = st.uuids().map(str) | st.uuids().map(lambda value: f"mrk-{value.hex}")
parameters = st.integers(1, 255).flatmap(
    lambda lanes: st.builds(
        Argon2Parameters,
        memory_cost=st.integers(8 * lanes, 2**32 - 1),
        time_cost=st.integers(1, 2**32 - 1),
        parallelism=st.just(lanes),
        variety=st.sampled_from(["argon2id", "argon2i", "argon2d"]),
        version=st.sampled_from([16, 19]),
    )
)
headers = st.builds(
    Header,
    algorithm=st.sampled_from(["kms_argon2", "kms_other_2"]),
    parameters=parameters,
    salt=st.binary(min_size=8, max_size=64)
    | st.from_regex(rb"[0-9A-Za-z]{22}", fullmatch=True),
)
sealed_hashes = st.builds(
    SealedHash,
    header=headers,
    mode=st.sampled_from(["d1", "p1"]),
    key_ref=key_ids.map(encoding.key_ref),
    sealed=st.binary(min_size=1, max_size=512),
)


class TestSealedHash:
    def test_the_layout_is_stable(self) -> None:
        stored = encoding.parse(STORED)
        assert stored == SealedHash(
            Header("kms_argon2", Argon2Parameters(102400, 2, 8), b"abcdefghijklmnopqrstuv"),
            "d1",
            REF,
            b"x" * 184,
        )
        assert str(stored) == STORED
        assert stored.key_id == KEY_ID
        assert stored.header.sub == "475641d6cab6e66a7fd38b498ae9f65d"

    @given(sealed_hashes)
    def test_parse_and_str_are_inverse(self, value: SealedHash) -> None:
        assert encoding.parse(str(value)) == value

    @given(st.text() | st.text(alphabet="kms_argon2$d1=,tpv0a").map("kms_argon2$d1".__add__))
    def test_whatever_parses_is_written_alike(self, text: str) -> None:
        try:
            value = encoding.parse(text)
        except MalformedHash:
            return
        assert str(value) == text

    @given(st.data())
    def test_a_changed_string_is_refused_or_another_value(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(STORED) - 1))
        changed = STORED[:index] + chr(ord(STORED[index]) ^ 1) + STORED[index + 1 :]
        try:
            value = encoding.parse(changed)
        except MalformedHash:
            return
        assert value != encoding.parse(STORED)
        assert str(value) == changed

    @pytest.mark.parametrize("end", range(0, len(STORED) - 1, 7))
    def test_a_truncated_string_is_refused_or_another_value(self, end: int) -> None:
        try:
            value = encoding.parse(STORED[:end])
        except MalformedHash:
            return
        assert value.header == encoding.parse(STORED).header
        assert value.sealed != encoding.parse(STORED).sealed

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "!unusable",
            "kms_argon2",
            "$" * 5,
            STORED + "$",
            STORED + "=",
            STORED + "\n",
            STORED.upper(),
            STORED.replace("kms_", "", 1),
            STORED.replace("$d1$", "$d0$"),
            STORED.replace(REF, REF.upper()),
            STORED.replace(REF, REF[:-1] + "f"),  # a spare bit set
            STORED.replace(REF, "d" + REF[1:]),  # another id under this one's checksum
            STORED.replace(REF, "m" + REF),
            STORED.replace(REF, "0" + REF[1:]),
            STORED.replace(REF, ""),
            STORED.replace("m=102400", "m=0102400"),
            STORED.replace("m=102400", "v=19,m=102400"),
            STORED.replace("m=102400", "id,m=102400"),
            STORED.replace("m=102400", "m=63"),  # below 8 KiB a lane
            STORED.replace("m=102400", "m=\u0661\u0662"),
            STORED.replace("t=2", "t=0"),
            STORED.replace("abcdefghijklmnopqrstuv", "abcdefg"),
            STORED.replace("abcdefghijklmnopqrstuv", ""),
            STORED.replace("abcdefghijklmnopqrstuv", "abc-efghijk"),
            STORED.replace("abcdefghijklmnopqrstuv", "=YWJjZGVmZ2hpag"),  # is alphanumeric
            STORED.replace("eHh4", "eH+4", 1),
            STORED.replace("eHh4", "eH 4", 1),
            STORED.replace("eHh4", "eHé4", 1),
            STORED[:-1] + "B",  # a spare bit set
            STORED.rpartition("$")[0] + "$",
            STORED + "eHh4" * 1000,
        ],
    )
    def test_malformed_strings_are_refused(self, text: str) -> None:
        with pytest.raises(MalformedHash) as caught:
            encoding.parse(text)
        assert "eHh4" not in str(caught.value)

    @pytest.mark.parametrize("value", [None, b"kms_argon2$", 7])
    def test_what_is_no_string_is_refused(self, value: object) -> None:
        with pytest.raises(MalformedHash):
            encoding.parse(value)  # type: ignore[arg-type]

    def test_nothing_secret_in_repr(self) -> None:
        text = repr(encoding.parse(STORED))
        assert "abcdefghijklmnopqrstuv" not in text
        assert "xxxx" not in text

    @pytest.mark.parametrize("size", [184, 189])
    def test_length_with_sizes_of_aws(self, size: int) -> None:
        stored = SealedHash(
            Header("kms_argon2", Argon2Parameters(102400, 2, 8), b"a" * 22),
            "d1",
            encoding.key_ref("mrk-" + "f" * 32),
            b"x" * size,
        )
        assert len(str(stored)) <= 340


class TestKeyRef:
    @given(key_ids)
    def test_inverse(self, key_id: str) -> None:
        ref = encoding.key_ref(key_id)
        assert encoding.key_id(ref) == key_id
        assert len(ref) == (30 if key_id.startswith("mrk-") else 29)
        assert ref == ref.lower()

    def test_the_arn_of_a_key_has_the_ref_of_its_id(self) -> None:
        arn = f"arn:aws:kms:eu-west-1:111122223333:key/{KEY_ID}"
        assert encoding.key_ref(arn) == encoding.key_ref(KEY_ID) == REF

    def test_every_single_wrong_character_is_found(self) -> None:
        # So a damaged row never looks like the row of a key that KMS has deleted.
        alphabet = "abcdefghijklmnopqrstuvwxyz234567"
        for index, right in enumerate(REF):
            for wrong in set(alphabet) - {right}:
                with pytest.raises(MalformedHash):
                    encoding.key_id(REF[:index] + wrong + REF[index + 1 :])

    @pytest.mark.parametrize(
        "key_id",
        [
            "",
            "alias/x",
            "mrk-xyz",
            KEY_ID.upper(),
            uuid.UUID(KEY_ID).hex,
            KEY_ID + "\n",
            "a" * 36,
        ],
    )
    def test_other_ids_have_none(self, key_id: str) -> None:
        with pytest.raises(MalformedHash):
            encoding.key_ref(key_id)

    @given(st.text(max_size=40))
    def test_any_text_as_a_ref(self, text: str) -> None:
        try:
            found = encoding.key_id(text)
        except MalformedHash:
            return
        assert encoding.key_ref(found) == text

    def test_letters_that_upper_case_makes_ascii_are_refused(self) -> None:
        with pytest.raises(MalformedHash):
            encoding.key_id(REF.replace("i", "\u0131"))


class TestARN:
    @pytest.mark.parametrize(
        "text",
        [
            f"arn:aws:kms:eu-west-1:111122223333:key/{KEY_ID}",
            "arn:aws-us-gov:kms:us-gov-west-1:111122223333:alias/app/passwords",
        ],
    )
    def test_inverse(self, text: str) -> None:
        assert str(ARN.parse(text)) == text

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "alias/x",
            "arn:aws:s3:eu-west-1:111122223333:key/x",
            "arn:aws:kms:eu-west-1:1:key/x",
            f"arn:aws:kms:eu-west-1:111122223333:key/{KEY_ID}\n",
            "arn:aws:kms:eu-west-1:111122223333:grant/x",
        ],
    )
    def test_others_are_refused(self, text: str) -> None:
        with pytest.raises(MalformedHash):
            ARN.parse(text)

    def test_another_key_in_the_same_place(self) -> None:
        arn = ARN.parse("arn:aws:kms:eu-west-1:111122223333:alias/x")
        assert arn.with_key(KEY_ID) == f"arn:aws:kms:eu-west-1:111122223333:key/{KEY_ID}"


class TestStockHashes:
    def test_sealing_keeps_what_django_wrote(self) -> None:
        encoded = make_password("secret", hasher=CheapArgon2PasswordHasher())
        header, digest = encoding.parse_stock(encoded)
        assert header.parameters == Argon2Parameters(8, 1, 1)
        assert len(digest) == 32
        assert encoding.format_stock(header, digest) == encoded

    @given(headers, st.binary(min_size=4, max_size=64))
    def test_inverse(self, header: Header, digest: bytes) -> None:
        header = Header("kms_argon2", header.parameters, header.salt)
        encoded = encoding.format_stock(header, digest)
        assert encoding.parse_stock(encoded) == (header, digest)

    @given(st.text() | st.text(alphabet="argon2$vid=,mtp189").map("argon2$argon2".__add__))
    def test_any_text(self, text: str) -> None:
        try:
            header, digest = encoding.parse_stock(text)
        except MalformedHash:
            return
        assert encoding.format_stock(header, digest) == text

    @pytest.mark.parametrize(
        "encoded",
        [
            "argon2$argon2id$m=8,t=1,p=1$c2FsdHNhbHQ$aaaa",  # before Argon2 1.3: no version
            "argon2$argon2id$v=19$m=8,t=1,p=1$c2FsdA$aaaa",  # a salt of 4 bytes
            "argon2$argon2id$v=19$m=8,t=1,p=1$c2FsdHNhbHQ$aa-_",
            "argon2$argon2id$v=19$m=8,t=1,p=1$c2FsdHNhbHQ$aaa.",
            "argon2$argon2x$v=19$m=8,t=1,p=1$c2FsdHNhbHQ$aaaa",
            "argon2$id$v=19$m=8,t=1,p=1$c2FsdHNhbHQ$aaaa",
            "argon2$argon2idid$v=19$m=8,t=1,p=1$c2FsdHNhbHQ$aaaa",
            "pbkdf2_sha256$1$c2FsdHNhbHQ$aaaa$a$a",
            "argon2$" + "a" * 2000,
        ],
    )
    def test_what_cannot_be_written_back_alike_is_refused(self, encoded: str) -> None:
        with pytest.raises(MalformedHash):
            encoding.parse_stock(encoded)


class TestStablePart:
    def test_equal_for_a_stock_hash_and_the_same_hash_sealed(self) -> None:
        encoded = make_password("secret", hasher=CheapArgon2PasswordHasher())
        header, _ = encoding.parse_stock(encoded)
        one = SealedHash(header, "d1", REF, b"one")
        two = SealedHash(header, "d1", encoding.key_ref("mrk-" + "0" * 32), b"two")
        parts = {encoding.stable_part(text) for text in (encoded, str(one), str(two))}
        assert parts == {str(header)}

    @pytest.mark.parametrize(
        "hasher",
        [PBKDF2PasswordHasher(), ScryptPasswordHasher(), CheapArgon2PasswordHasher()],
        ids=lambda hasher: hasher.algorithm,
    )
    def test_a_new_password_has_another(self, hasher: object) -> None:
        one, two = (make_password("secret", hasher=hasher) for _ in range(2))  # type: ignore[arg-type]
        assert encoding.stable_part(one) != encoding.stable_part(two)

    @pytest.mark.parametrize(
        ("encoded", "part"),
        [
            ("pbkdf2_sha256$1000$salt$ZGlnZXN0", "pbkdf2_sha256|1000|salt"),
            ("pbkdf2_sha1$1000$salt$ZGlnZXN0", "pbkdf2_sha1|1000|salt"),
            ("scrypt$16384$salt$8$1$ZGlnZXN0", "scrypt|N=16384,r=8,p=1|salt"),
            (
                "bcrypt_sha256$$2b$12$" + "s" * 22 + "d" * 30 + "O",
                "bcrypt_sha256|2b,12|" + "s" * 22,
            ),
            ("md5$salt$6469676573740000", "md5|-|salt"),
            # No salt, or a layout that is not known: the whole value, as stock Django does.
            ("md5$salt$digest", "md5$salt$digest"),
            ("pbkdf2_sha256$1000$salt$not base64", "pbkdf2_sha256$1000$salt$not base64"),
            ("argon2$broken", "argon2$broken"),
            ("kms_argon2$broken", "kms_argon2$broken"),
            ("!random", "!random"),
            ("", ""),
        ],
    )
    def test_by_layout(self, encoded: str, part: str) -> None:
        assert encoding.stable_part(encoded) == part


def test_prefixes_select_by_algorithm_mode_and_key() -> None:
    assert STORED.startswith(encoding.prefix_of("kms_argon2"))
    assert STORED.startswith(encoding.prefix_of("kms_argon2", "d1"))
    assert STORED.startswith(encoding.prefix_of("kms_argon2", "d1", REF))
    assert encoding.prefix_of("kms_argon2", "d1", REF).endswith("$")


@pytest.mark.parametrize(
    ("encoded", "algorithm"),
    [("md5$a$b", "md5"), ("", ""), ("plain", ""), ("!x", ""), (STORED, "kms_argon2")],
)
def test_algorithm_of(encoded: str, algorithm: str) -> None:
    assert encoding.algorithm_of(encoded) == algorithm
