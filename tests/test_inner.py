"""The hashes that Django's hashers make: read, written back, sealed as they are, computed."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest
from django.contrib.auth import hashers as django_hashers
from django.contrib.auth.hashers import check_password, make_password
from hypothesis import given
from hypothesis import strategies as st

from kms_hasher import encoding, hashers, inner, keyring
from kms_hasher.encoding import Header
from kms_hasher.exceptions import MalformedHash
from kms_hasher.inner import (
    Argon2Parameters,
    BCryptParameters,
    NoParameters,
    PBKDF2Parameters,
    ScryptParameters,
)

PASSWORD = "correct horse battery staple"
Calls = Callable[[], list[str]]


@pytest.fixture(autouse=True)
def no_audit(settings: Any) -> None:
    settings.KMS_HASHER = {**settings.KMS_HASHER, "AUDIT": "off"}


#: Lowest costs, so that tests wait for nothing.
COSTS: dict[str, dict[str, int]] = {
    "argon2": {"time_cost": 1, "memory_cost": 8, "parallelism": 1},
    "pbkdf2_sha256": {"iterations": 3},
    "pbkdf2_sha1": {"iterations": 3},
    "scrypt": {"work_factor": 4, "block_size": 2, "parallelism": 2},
    "bcrypt_sha256": {"rounds": 4},
    "bcrypt": {"rounds": 4},
    "md5": {},
}
STOCK: dict[str, Any] = {
    "argon2": django_hashers.Argon2PasswordHasher,
    "pbkdf2_sha256": django_hashers.PBKDF2PasswordHasher,
    "pbkdf2_sha1": django_hashers.PBKDF2SHA1PasswordHasher,
    "scrypt": django_hashers.ScryptPasswordHasher,
    "bcrypt_sha256": django_hashers.BCryptSHA256PasswordHasher,
    "bcrypt": django_hashers.BCryptPasswordHasher,
    "md5": django_hashers.MD5PasswordHasher,
}
NAMES = tuple(inner.HASHERS)
BCRYPT = ("bcrypt_sha256", "bcrypt")


def cheap(name: str, **costs: int) -> Any:
    """The class of Django's hasher of this name, at low costs."""
    return type(f"Cheap_{name}", (STOCK[name],), COSTS[name] | costs)


def sealing(name: str, **costs: int) -> Any:
    """The class of ours that seals what that one makes."""
    return type(
        f"CheapKMS_{name}", (getattr(hashers, inner.HASHERS[name]),), COSTS[name] | costs
    )


class CheapKMSArgon2(hashers.KMSArgon2PasswordHasher):
    time_cost, memory_cost, parallelism = 1, 8, 1


for _name in NAMES:  # for PASSWORD_HASHERS, which names them
    globals()[f"Cheap_{_name}"] = cheap(_name)
    globals()[f"CheapKMS_{_name}"] = sealing(_name)


def seal(stock: str) -> str:
    """Seal a stock hash, as `wrap_passwords` does."""
    return str(keyring.seal(*encoding.parse_stock(stock)))


# --- read and written back --------------------------------------------------------------


class TestRealHashes:
    @pytest.mark.parametrize("name", NAMES)
    def test_inverse(self, name: str) -> None:
        for password in (PASSWORD, "", "pässwörd"):
            stock = make_password(password, hasher=cheap(name)())
            header, digest = inner.parse_stock(stock)
            assert header.algorithm == f"kms_{name}"
            assert len(digest) == header.kind.size == inner.KINDS[name].size
            assert inner.format_stock(header, digest) == stock
            assert inner.is_stock(name)
            assert header.parameters == sealing(name)()._parameters()

    @pytest.mark.parametrize("name", NAMES)
    def test_with_the_costs_of_django(self, name: str) -> None:
        hasher = type("Own", (getattr(hashers, inner.HASHERS[name]),), {})()
        parameters = hasher._parameters()
        assert type(parameters).parse(str(parameters)) == parameters
        assert hasher._bearable(parameters)

    @pytest.mark.parametrize("variety", ["ID", "I", "D"])
    @pytest.mark.parametrize("version", [16, 19])
    def test_every_argon2(self, variety: str, version: int) -> None:
        from argon2 import low_level

        made = low_level.hash_secret(
            PASSWORD.encode(),
            b"saltsaltsaltsaltsalt00",
            1,
            8,
            1,
            32,
            low_level.Type[variety],
            version,
        ).decode()
        stock = f"argon2{made}"
        header, digest = inner.parse_stock(stock)
        assert header.parameters == Argon2Parameters(
            8, 1, 1, f"argon2{variety.lower()}", version
        )
        assert inner.format_stock(header, digest) == stock
        assert Argon2Parameters.parse(str(header.parameters)) == header.parameters
        assert CheapKMSArgon2()._digest(PASSWORD, header) == digest
        assert CheapKMSArgon2().verify(PASSWORD, seal(stock))
        assert CheapKMSArgon2().must_update(seal(stock)) == ((variety, version) != ("ID", 19))

    @pytest.mark.parametrize("variety", ["2a", "2b", "2y"])
    @pytest.mark.parametrize("name", BCRYPT)
    def test_every_bcrypt(self, name: str, variety: str) -> None:
        stock = make_password(PASSWORD, hasher=cheap(name)()).replace("$2b$", f"${variety}$")
        header, digest = inner.parse_stock(stock)
        assert header.parameters == BCryptParameters(variety, 4)
        assert inner.format_stock(header, digest) == stock
        assert sealing(name)().verify(PASSWORD, seal(stock))


numbers = st.integers(1, 9_999_999_999)
few = st.integers(1, 999_999)
alphanumeric = st.from_regex(r"[0-9A-Za-z]{1,40}", fullmatch=True)
salts = alphanumeric | st.text(
    st.characters(exclude_characters="$", exclude_categories=["Cs"]), min_size=1, max_size=20
)
bcrypt_salts = st.from_regex(r"[./0-9A-Za-z]{22}", fullmatch=True)
headers = st.one_of(
    st.builds(
        Header,
        st.sampled_from(["kms_pbkdf2_sha256", "kms_pbkdf2_sha1"]),
        st.builds(PBKDF2Parameters, numbers),
        salts.map(str.encode),
    ),
    st.builds(
        Header,
        st.just("kms_scrypt"),
        st.builds(ScryptParameters, st.integers(1, 33).map(lambda n: 2**n), few, few),
        salts.map(str.encode),
    ),
    st.builds(
        Header,
        st.sampled_from(["kms_bcrypt", "kms_bcrypt_sha256"]),
        st.builds(
            BCryptParameters, st.sampled_from(["2a", "2b", "2x", "2y"]), st.integers(0, 99)
        ),
        bcrypt_salts.map(str.encode),
    ),
    st.builds(Header, st.just("kms_md5"), st.builds(NoParameters), salts.map(str.encode)),
    st.builds(
        Header,
        st.just("kms_argon2"),
        st.builds(
            Argon2Parameters,
            st.integers(8 * 255, 9_999_999_999),
            numbers,
            st.integers(1, 255),
            st.sampled_from(["argon2id", "argon2i", "argon2d"]),
            st.sampled_from([16, 19]),
        ),
        st.binary(min_size=8, max_size=40),
    ),
)


class TestAnyHash:
    @given(st.data(), headers)
    def test_inverse(self, data: st.DataObject, header: Header) -> None:
        size = header.kind.size
        digest = data.draw(st.binary(min_size=size, max_size=size))
        stock = inner.format_stock(header, digest)
        assert inner.parse_stock(stock) == (header, digest)
        costs = header.parameters
        assert type(costs).parse(str(costs)) == costs
        assert encoding.stable_part(stock) == str(header)
        least = header.kind.min_salt
        assert inner.decode_salt(inner.encode_salt(header.salt), least) == header.salt

    @given(
        st.sampled_from(NAMES),
        st.text(max_size=60)
        | st.text(alphabet="$./=+-abyZ0123456789,mtp", max_size=60)
        | st.lists(st.text(alphabet="=+/aZ019", max_size=24), max_size=6).map("$".join),
    )
    def test_any_text(self, name: str, rest: str) -> None:
        text = f"{name}${rest}"
        try:
            header, digest = inner.parse_stock(text)
        except MalformedHash:
            assert encoding.stable_part(text) == text
            return
        assert inner.format_stock(header, digest) == text

    @pytest.mark.parametrize("name", NAMES)
    def test_every_character_changed_or_left_out(self, name: str) -> None:
        stock = make_password(PASSWORD, hasher=cheap(name)())
        value = inner.parse_stock(stock)
        for index in range(len(stock)):
            for new in ("", "$", "=", "0", "é", "\ud800", "\0", " "):
                text = stock[:index] + new + stock[index + 1 :]
                try:
                    other = inner.parse_stock(text)
                except MalformedHash:
                    continue
                assert inner.format_stock(*other) == text
                assert text == stock or other != value

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "argon2",
            "unsalted_md5$",
            "kms_argon2$argon2id$v=19$m=8,t=1,p=1$c2FsdHNhbHQ$aaaa",
            "pbkdf2_sha256$0$salt$ZGlnZXN0",
            "pbkdf2_sha256$01$salt$ZGlnZXN0",
            "pbkdf2_sha256$+1$salt$ZGlnZXN0",
            "pbkdf2_sha256$1_0$salt$ZGlnZXN0",
            "pbkdf2_sha256$\u0661$salt$ZGlnZXN0",
            "pbkdf2_sha256$1$$ZGlnZXN0",
            "pbkdf2_sha256$1$salt$ZGlnZXN0\n",
            "pbkdf2_sha256$1$salt$ZGlnZXN1=",
            "pbkdf2_sha256$1$salt",
            "pbkdf2_sha256$1$salt$ZGlnZXN0$",
            "scrypt$3$salt$8$1$ZGlnZXN0",
            "scrypt$1$salt$8$1$ZGlnZXN0",
            "scrypt$16384$salt$08$1$ZGlnZXN0",
            "scrypt$16384$salt$8$1",
            "md5$$" + "0" * 32,
            "md5$salt$" + "A" * 32,
            "md5$salt$" + "0" * 31,
            "bcrypt$$2c$12$" + "s" * 22 + "d" * 30 + "O",
            "bcrypt$$2b$1$" + "s" * 22 + "d" * 30 + "O",
            "bcrypt$x$2b$12$" + "s" * 22 + "d" * 30 + "O",
            "bcrypt$$2b$12$" + "s" * 22 + "d" * 31,  # spare bits set
            "bcrypt$$2b$12$" + "s" * 22 + "-" * 31,
            "bcrypt$2b$12$" + "s" * 22 + "d" * 30 + "O",
        ],
    )
    def test_malformed(self, text: str) -> None:
        with pytest.raises(MalformedHash) as caught:
            inner.parse_stock(text)
        assert "salt" not in str(caught.value)

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("pbkdf2_sha256", ""),
            ("pbkdf2_sha256", "0"),
            ("scrypt", "N=4,r=8"),
            ("scrypt", "N=6,r=8,p=1"),
            ("bcrypt", "2b,4"),
            ("bcrypt", "2c,04"),
            ("md5", ""),
            ("md5", "m=8,t=1,p=1"),
            ("argon2", "m=8,t=1,p=2"),
            ("argon2", "-"),
        ],
    )
    def test_malformed_costs(self, name: str, text: str) -> None:
        with pytest.raises(MalformedHash):
            inner.KINDS[name].parameters.parse(text)

    @pytest.mark.parametrize("name", ["pbkdf2_sha256", "scrypt", "bcrypt", "md5"])
    @pytest.mark.parametrize("salt", [b"sa$lt", b"\xff\xfe", b"$", b"s" * 21 + b"\xff"])
    def test_a_salt_that_djangos_hasher_cannot_have(self, name: str, salt: bytes) -> None:
        costs = sealing(name)()._parameters()
        header = Header(f"kms_{name}", costs, salt)
        with pytest.raises(MalformedHash):
            inner.format_stock(header, bytes(header.kind.size))

    @pytest.mark.parametrize("algorithm", ["kms_data_key", "kms_other", "kms_unsalted_md5"])
    def test_what_no_hasher_of_djangos_makes(self, algorithm: str) -> None:
        with pytest.raises(MalformedHash):
            inner.format_stock(Header(algorithm, NoParameters(), b"salt" * 4), bytes(64))


# --- sealed as they are -----------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
class TestSealed:
    @pytest.mark.parametrize("password", [PASSWORD, "", "pässwörd €", "x" * 72])
    def test_the_sealing_hasher_verifies(self, name: str, password: str) -> None:
        stock = make_password(password, hasher=cheap(name)())
        header, digest = inner.parse_stock(stock)
        hasher = sealing(name)()
        assert hasher._digest(password, header) == digest
        assert hasher._digest(password.encode(), header) == digest
        sealed = seal(stock)
        assert sealed.startswith(f"kms_{name}$d1$")
        assert hasher.verify(password, sealed)
        assert not hasher.verify(password + "x" if len(password) < 72 else "y", sealed)
        assert inner.format_stock(header, keyring.open(encoding.parse(sealed))) == stock

    def test_what_it_makes_itself_is_djangos_within(self, name: str) -> None:
        sealed = sealing(name)().encode(PASSWORD, sealing(name)().salt())
        stored = encoding.parse(sealed)
        stock = inner.format_stock(stored.header, keyring.open(stored))
        assert cheap(name)().verify(PASSWORD, stock)
        assert not sealing(name)().must_update(sealed)

    @pytest.mark.parametrize("salt", ["sältsält", "你好你好", "s lt|s-lt", "0123456789"])
    def test_other_salts(self, name: str, salt: str) -> None:
        if name in BCRYPT:
            return  # bcrypt draws its own
        stock = cheap(name)().encode(PASSWORD, salt)
        sealed = seal(stock)
        assert sealing(name)().verify(PASSWORD, sealed)
        assert sealing(name)().encode(PASSWORD, salt).split("$")[3:5] == sealed.split("$")[3:5]
        assert encoding.stable_part(stock) == encoding.stable_part(sealed)

    def test_a_short_salt_of_old(self, name: str) -> None:
        """Django 1.4 drew five characters, and sites of their own made less."""
        if name in (*BCRYPT, "argon2"):
            return
        for salt in ("s", "seasalt"):
            sealed = seal(cheap(name)().encode(PASSWORD, salt))
            assert sealing(name)().verify(PASSWORD, sealed)
            assert sealing(name)().must_update(sealed)

    def test_only_encode_and_verify_call_kms(self, name: str, calls: Calls) -> None:
        hasher = sealing(name)()
        encoded = hasher.encode(PASSWORD, hasher.salt())
        assert calls() == ["Encrypt"]
        decoded = hasher.decode(encoded)
        assert decoded["algorithm"] == f"kms_{name}"
        summary = hasher.safe_summary(encoded)
        assert all(isinstance(label, str) for label in summary)
        hasher.must_update(encoded)
        hasher.harden_runtime(PASSWORD, encoded)
        assert calls() == ["Encrypt"]

    def test_garbage_makes_nothing_raise(self, name: str, calls: Calls) -> None:
        hasher = sealing(name)()
        encoded = hasher.encode(PASSWORD, hasher.salt())
        head, mode, ref, costs, salt, blob = encoded.split("$")
        for text in (
            "",
            "!",
            head,
            f"{head}$d1$$$$",
            "$".join((head, mode, ref, "x", salt, blob)),
            "$".join((head, mode, ref, costs, "", blob)),
            "$".join((head, mode, ref, costs, "=gIA", blob)),
            "$".join((head, mode, ref, costs, "a", blob)),
            "$".join((head, mode, ref, costs, "=" + inner.b64encode(b"\xff" * 22), blob)),
            "$".join((head, mode, ref, costs, salt, "A")),
            "$".join(("kms_other", mode, ref, costs, salt, blob)),
        ):
            hasher.decode(text)
            hasher.safe_summary(text)
            hasher.must_update(text)
            hasher.harden_runtime(PASSWORD, text)
            dearer(name).harden_runtime(PASSWORD, text)
            assert not hasher.verify(PASSWORD, text)

    def test_a_login_upgrades_to_argon2(self, name: str, settings: Any, calls: Calls) -> None:
        sealed = seal(make_password(PASSWORD, hasher=cheap(name)()))
        settings.PASSWORD_HASHERS = [
            f"{__name__}.CheapKMSArgon2",
            f"{__name__}.CheapKMS_{name}",
        ][name == "argon2" :]
        done = len(calls())
        upgraded: list[str] = []
        assert check_password(PASSWORD, sealed, setter=upgraded.append)
        assert upgraded == ([] if name == "argon2" else [PASSWORD])
        assert not check_password("wrong", sealed)
        assert calls()[done:] == ["Decrypt", "Decrypt"]
        assert django_hashers.identify_hasher(sealed).algorithm == f"kms_{name}"


def dearer(name: str) -> Any:
    """A sealing hasher whose own costs are higher."""
    raised = {
        "argon2": {"time_cost": 2},
        "pbkdf2_sha256": {"iterations": 5},
        "pbkdf2_sha1": {"iterations": 5},
        "scrypt": {"work_factor": 8},
        "bcrypt_sha256": {"rounds": 6},
        "bcrypt": {"rounds": 6},
        "md5": {},
    }
    return sealing(name, **raised[name])()


class TestCosts:
    #: Just beyond the limits of each hasher.
    BEYOND = [
        ("argon2", "m=1048577,t=1,p=1"),
        ("argon2", "m=1048576,t=5,p=1"),
        ("argon2", "m=8,t=524289,p=1"),
        ("argon2", "m=520,t=1,p=65"),
        ("pbkdf2_sha256", "20000001"),
        ("pbkdf2_sha1", "9999999999"),
        ("scrypt", "N=2097152,r=2,p=1"),
        ("scrypt", "N=1048576,r=8,p=1"),
        ("scrypt", "N=16384,r=8,p=65"),
        ("scrypt", "N=2,r=4,p=999999"),
        ("bcrypt_sha256", "2b,17"),
        ("bcrypt", "2b,99"),
        ("bcrypt", "2b,03"),
    ]

    @pytest.mark.parametrize(("name", "costs"), BEYOND)
    def test_beyond_the_limits_they_are_not_run(
        self, name: str, costs: str, calls: Calls, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hasher = sealing(name)()
        fields = hasher.encode(PASSWORD, hasher.salt()).split("$")
        encoded = "$".join((*fields[:3], costs, *fields[4:]))
        assert str(encoding.parse(encoded)) == encoded
        done = len(calls())

        def run(*args: Any) -> bytes:
            raise AssertionError("it was run")

        monkeypatch.setattr(type(hasher), "_digest", run)
        assert not hasher.verify(PASSWORD, encoded)
        assert calls()[done:] == ["Parse"]
        hasher.harden_runtime(PASSWORD, encoded)
        assert hasher.must_update(encoded) is False
        assert hasher.decode(encoded)["hash"] == ""

    @pytest.mark.parametrize(
        ("name", "costs"),
        [
            ("argon2", "m=1048576,t=4,p=64"),
            ("pbkdf2_sha256", "20000000"),
            ("scrypt", "N=262144,r=8,p=1"),
            ("scrypt", "N=131072,r=8,p=8"),
            ("bcrypt", "2b,16"),
        ],
    )
    def test_at_the_limits_they_are(self, name: str, costs: str) -> None:
        assert sealing(name)()._bearable(inner.KINDS[name].parameters.parse(costs))

    @pytest.mark.parametrize("name", ["pbkdf2_sha256", "pbkdf2_sha1", *BCRYPT])
    def test_a_wrong_password_takes_as_long_as_with_the_new_costs(
        self, name: str, monkeypatch: pytest.MonkeyPatch, calls: Calls
    ) -> None:
        hasher = dearer(name)
        encoded = sealing(name)().encode(PASSWORD, sealing(name)().salt())
        done: list[Any] = []
        if name in BCRYPT:
            monkeypatch.setattr(type(hasher), "_digest", lambda *args: done.append(2**4))
            wanted = 2**6 - 2**4
        else:
            monkeypatch.setattr(hashers, "pbkdf2", lambda *args, **kw: done.append(args[2]))
            wanted = 5 - 3
        assert hasher.must_update(encoded)
        before = calls()
        hasher.harden_runtime(PASSWORD, encoded)
        assert sum(done) == wanted
        done.clear()
        sealing(name)().harden_runtime(PASSWORD, encoded)
        assert done == []
        assert calls() == before

    def test_parameters_are_not_made_twice(self) -> None:
        assert Argon2Parameters.parse("m=8,t=1,p=1") is Argon2Parameters.parse("m=8,t=1,p=1")

    def test_the_base_has_no_inner_hasher(self) -> None:
        base: Any = hashers.SealingPasswordHasher()
        header = Header("kms_argon2", Argon2Parameters(8, 1, 1), b"saltsalt")
        for call in (
            base._parameters,
            lambda: base._bearable(header.parameters),
            lambda: base._digest(PASSWORD, header),
        ):
            with pytest.raises(NotImplementedError):
                call()


class TestBCrypt:
    def test_a_password_that_bcrypt_refuses(self, calls: Calls) -> None:
        """bcrypt 5 takes 72 bytes; before it cut the rest off."""
        hasher = sealing("bcrypt")()
        encoded = hasher.encode(PASSWORD, hasher.salt())
        for password in ("x" * 73, "nul\0"):
            try:
                own = cheap("bcrypt")().encode(password, b"$2b$04$" + hasher.salt().encode())
            except ValueError:
                with pytest.raises(ValueError, match="bcrypt"):
                    hasher.encode(password, hasher.salt())
            else:
                assert own.startswith("bcrypt$")
            assert not hasher.verify(password, encoded)
            dearer("bcrypt").harden_runtime(password, encoded)

    def test_a_long_password_with_its_sha256(self) -> None:
        hasher = sealing("bcrypt_sha256")()
        encoded = hasher.encode("x" * 100, hasher.salt())
        assert hasher.verify("x" * 100, encoded)
        assert not hasher.verify("x" * 101, encoded)

    def test_the_salt_is_bcrypts(self) -> None:
        for _ in range(20):
            assert re.fullmatch("[./0-9A-Za-z]{22}", sealing("bcrypt")().salt())


class TestHeader:
    @pytest.mark.parametrize("name", NAMES)
    def test_sub_says_which_hasher(self, name: str) -> None:
        header = Header(f"kms_{name}", NoParameters(), b"salt")
        subs = {dataclasses.replace(header, algorithm=f"kms_{other}").sub for other in NAMES}
        assert len(subs) == len(NAMES)
        assert header.use == "password"
        assert Header("kms_data_key", NoParameters(), b"salt").use == "data-key"

    def test_no_two_values_have_the_same_text(self) -> None:
        texts = {
            str(Header("kms_md5", NoParameters(), salt))
            for salt in (b"YQ", b"a", b"=YQ", b"=a", b"a|b", b"|", b"-|a")
        }
        assert len(texts) == 7

    def test_a_site_s_own_hasher_is_argon2s(self) -> None:
        assert inner.kind_of("kms_of_a_sites_own") == inner.ARGON2

    @pytest.mark.parametrize("text", ["", "=", "=YQ=", "=YQ", "a b", "é", "=é", "=ab-_~"])
    def test_salts_that_are_not_written_so(self, text: str) -> None:
        with pytest.raises(MalformedHash):
            inner.decode_salt(text, 1)
