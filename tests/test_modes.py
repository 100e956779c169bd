"""
One contract for all modes: Django's hashers, attacks, faults of KMS, and what each call costs.

The settings name each mode in turn: see the fixture `mode`.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.contrib.auth.hashers import (
    check_password,
    identify_hasher,
    is_password_usable,
    make_password,
)
from django.contrib.auth.models import User
from django.test import RequestFactory
from django.views.debug import ExceptionReporter

from kms_hasher import breaker, conf, data_keys, encoding, exceptions, keyring
from kms_hasher.encoding import SealedHash
from kms_hasher.modes import MODES, public_key
from kms_hasher.providers import base
from kms_hasher.providers.base import Provider
from kms_hasher.signals import Event
from tests import modes
from tests.hashers import CheapArgon2PasswordHasher, CheapKMSArgon2PasswordHasher
from tests.kms_double import KMSDouble

pytestmark = pytest.mark.django_db

PASSWORD = "correct horse battery staple"
SALT = "saltsaltsaltsaltsalt00"
Calls = Callable[[], list[str]]

#: Every error of KMS that is not about the blob.
ERRORS = [
    kind
    for kind in vars(exceptions).values()
    if isinstance(kind, type)
    and issubclass(kind, exceptions.KMSError)
    and not issubclass(kind, exceptions.InvalidCiphertext | exceptions.DryRunOperation)
]
OPERATIONS = ("encrypt", "decrypt", "generate_mac", "generate_data_key", "get_public_key")


@pytest.fixture
def hasher() -> CheapKMSArgon2PasswordHasher:
    return CheapKMSArgon2PasswordHasher()


@pytest.fixture
def encoded(mode: str, hasher: CheapKMSArgon2PasswordHasher) -> str:
    return hasher.encode(PASSWORD, SALT)


@pytest.fixture
def digest_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Argon2 is computed once for each password and header: attacks come in thousands."""
    real = functools.cache(CheapKMSArgon2PasswordHasher()._digest)
    monkeypatch.setattr(
        CheapKMSArgon2PasswordHasher,
        "_digest",
        lambda self, password, header: real(password, header),
    )


def seal_in(settings: Any, name: str, salt: str = SALT, password: str = PASSWORD) -> str:
    """A string sealed in another mode; the settings are as before afterwards."""
    before = settings.KMS_HASHER
    modes.use(settings, name)
    try:
        return CheapKMSArgon2PasswordHasher().encode(password, salt)
    finally:
        settings.KMS_HASHER = before


def other_key(kms: Provider, alias: str) -> str:
    """Another key that could take the place of the one behind the alias."""
    found = kms.describe_key(alias)
    return kms.create_key(spec=found.spec, usage=found.usage).key_arn


def no_match(encoded: str) -> bool:
    """Whether a string is one that matches nothing and does not raise anywhere."""
    hasher = CheapKMSArgon2PasswordHasher()
    hasher.decode(encoded)
    hasher.must_update(encoded)
    hasher.harden_runtime(PASSWORD, encoded)
    assert all(isinstance(label, str) for label in hasher.safe_summary(encoded))
    return not hasher.verify(PASSWORD, encoded)


def replaced(encoded: str, **fields: Any) -> str:
    return str(dataclasses.replace(encoding.parse(encoded), **fields))


class TestHashersOfDjango:
    def test_round_trip_and_what_it_costs(self, mode: str, calls: Calls) -> None:
        encoded = make_password(PASSWORD)
        assert calls() == modes.FIRST[mode]
        done = len(calls())
        assert check_password(PASSWORD, encoded)
        assert calls()[done:] == modes.LOGIN[mode]
        done = len(calls())
        assert not check_password(PASSWORD + "!", encoded)
        assert calls()[done:] == modes.LOGIN[mode]
        done = len(calls())
        make_password(PASSWORD)
        assert calls()[done:] == modes.SET[mode]

    def test_what_the_calls_are_for(self, mode: str, events: list[Event]) -> None:
        encoded = make_password(PASSWORD)
        check_password(PASSWORD, encoded)
        first = len(modes.FIRST[mode])
        assert [e.purpose for e in events] == ["set"] * first + ["login"] * (
            len(events) - first
        )
        assert {e.outcome for e in events} == {"success"}
        sub = encoding.parse(encoded).header.sub
        if mode == "envelope":  # what KMS opens is the data key
            assert sub not in {e.sub for e in events}
        else:
            assert {e.sub for e in events} == {sub}

    def test_what_is_stored(self, mode: str, encoded: str, kms: Provider) -> None:
        stored = encoding.parse(encoded)
        assert str(stored) == encoded
        assert stored.mode == MODES[mode].code
        assert stored.header.salt == SALT.encode()
        if MODES[mode].names_key:
            arns = [kms.describe_key(conf.get().key).key_arn]
            if mode == "mac_in_direct":
                arns.append(kms.describe_key("alias/tests-mac").key_arn)
            assert stored.key_ref == ".".join(map(encoding.key_ref, arns))
        if MODES[mode].fits_stock:
            assert len(encoded) <= 128

    def test_django_finds_the_hasher(self, encoded: str) -> None:
        assert isinstance(identify_hasher(encoded), CheapKMSArgon2PasswordHasher)
        assert is_password_usable(encoded)

    def test_bytes_and_other_passwords(
        self, encoded: str, hasher: CheapKMSArgon2PasswordHasher
    ) -> None:
        assert hasher.verify(PASSWORD.encode(), encoded)
        for password in ("", "ä€\N{GRINNING FACE}", "nul\0within", "x" * 5000):
            made = hasher.encode(password, SALT)
            assert hasher.verify(password, made)
            assert not hasher.verify(password + "x", made)

    @pytest.mark.parametrize("salt", ["sältsält", "salt salt|=", "你好你好"])
    def test_any_salt_that_django_allows(
        self, mode: str, salt: str, hasher: CheapKMSArgon2PasswordHasher
    ) -> None:
        encoded = hasher.encode(PASSWORD, salt)
        assert hasher.verify(PASSWORD, encoded)
        assert str(encoding.parse(encoded)) == encoded

    @pytest.mark.parametrize(
        ("password", "salt", "error"),
        [
            (None, "saltsalt", TypeError),
            ("x", "", ValueError),
            ("x", "salt$salt", ValueError),
            ("x", "short", ValueError),
        ],
    )
    def test_bad_arguments_make_no_call(
        self,
        mode: str,
        password: Any,
        salt: str,
        error: type[Exception],
        hasher: CheapKMSArgon2PasswordHasher,
        calls: Calls,
    ) -> None:
        with pytest.raises(error):
            hasher.encode(password, salt)
        assert calls() == []

    def test_nothing_but_encode_and_verify_calls_kms_or_the_database(
        self,
        encoded: str,
        hasher: CheapKMSArgon2PasswordHasher,
        calls: Calls,
        django_assert_num_queries: Any,
    ) -> None:
        before = calls()
        with django_assert_num_queries(0):
            hasher.decode(encoded)
            hasher.safe_summary(encoded)
            assert hasher.must_update(encoded) is False
            hasher.harden_runtime(PASSWORD, encoded)
            identify_hasher(encoded)
            encoding.stable_part(encoded)
        assert calls() == before

    def test_decode_and_summary(
        self, mode: str, encoded: str, hasher: CheapKMSArgon2PasswordHasher
    ) -> None:
        decoded, summary = hasher.decode(encoded), hasher.safe_summary(encoded)
        stored = encoding.parse(encoded)
        assert (decoded["algorithm"], decoded["salt"]) == ("kms_argon2", SALT)
        assert (decoded["memory_cost"], decoded["time_cost"]) == (8, 1)
        assert decoded["mode"] == MODES[mode].code
        if mode == "envelope":
            number = encoding.data_key_number(stored.key_ref)
            assert decoded["data_key"] == summary["sealed by data key"] == number
        else:
            assert decoded["key_id"] == summary["sealed by KMS key"] == stored.key_id
        assert summary["hash"].endswith("******")
        assert max(len(str(value)) for value in summary.values()) < 60
        # As Django's admin renders it.
        blob = encoding.b64encode(stored.sealed)
        assert all(blob[6:20] not in str(value) for value in summary.values())

    def test_must_update_by_costs_and_salt_alone(
        self, mode: str, encoded: str, kms: Provider, hasher: CheapKMSArgon2PasswordHasher
    ) -> None:
        class Dearer(CheapKMSArgon2PasswordHasher):
            time_cost = 2

        assert Dearer().must_update(encoded)
        assert hasher.must_update(hasher.encode(PASSWORD, "saltsalt"))
        kms.update_alias(conf.get().key, other_key(kms, conf.get().key))
        assert not hasher.must_update(encoded)

    def test_an_upgrade_at_login(self, mode: str, calls: Calls) -> None:
        stock = make_password(PASSWORD, hasher=CheapArgon2PasswordHasher())
        upgraded: list[str] = []
        assert check_password(PASSWORD, stock, setter=upgraded.append)
        assert upgraded == [PASSWORD]
        assert calls() == []

    def test_the_same_password_looks_different_each_time(self, mode: str) -> None:
        blobs = {encoding.parse(make_password(PASSWORD)).sealed for _ in range(5)}
        assert len(blobs) == 5


class TestSessions:
    """They hang on what no mode and no key changes."""

    def test_the_same_in_all_modes_and_for_the_stock_hash(
        self, mode: str, encoded: str, settings: Any
    ) -> None:
        stock = CheapArgon2PasswordHasher().encode(PASSWORD, SALT)
        direct = seal_in(settings, "direct")
        for text in (stock, direct):
            assert encoding.stable_part(text) == encoding.stable_part(encoded)
            one, two = User(password=text), User(password=encoded)
            assert one.get_session_auth_hash() == two.get_session_auth_hash()

    def test_another_with_every_new_password(self, mode: str) -> None:
        one, two = (User(password=make_password(PASSWORD)) for _ in range(2))
        assert one.get_session_auth_hash() != two.get_session_auth_hash()


class TestDigest:
    def test_what_is_held(self, mode: str, encoded: str) -> None:
        stored = encoding.parse(encoded)
        stock = CheapArgon2PasswordHasher().encode(PASSWORD, SALT)
        header, digest = encoding.parse_stock(stock)
        assert stored.header == header
        held = keyring.open(stored)
        if MODES[mode].core == "digest":
            assert held == digest
            assert encoding.format_stock(header, held) == stock
        else:
            assert len(held) == 24
            assert held != digest[:24]

    def test_only_digests_are_sealed(self, mode: str, calls: Calls) -> None:
        header = encoding.parse_stock(CheapArgon2PasswordHasher().encode(PASSWORD, SALT))[0]
        seal = keyring.sealer(header, purpose="set")
        done = calls()
        for size in (0, 31, 33):
            with pytest.raises(ValueError, match="32 bytes"):
                seal(bytes(size))
        assert calls() == done


# --- attacks --------------------------------------------------------------------------


@pytest.mark.system
@pytest.mark.usefixtures("digest_once")
class TestTampering:
    def test_every_bit_of_what_is_sealed(
        self, encoded: str, hasher: CheapKMSArgon2PasswordHasher
    ) -> None:
        stored = encoding.parse(encoded)
        for index in range(len(stored.sealed)):
            for bit in range(8):
                blob = bytearray(stored.sealed)
                blob[index] ^= 1 << bit
                changed = dataclasses.replace(stored, sealed=bytes(blob))
                assert not hasher.verify(PASSWORD, str(changed)), (index, bit)

    def test_every_character(self, encoded: str) -> None:
        for index, character in enumerate(encoded):
            for bit in (0, 1, 5, 6):
                changed = chr(ord(character) ^ (1 << bit))
                assert no_match(encoded[:index] + changed + encoded[index + 1 :])

    def test_every_character_left_out_and_doubled(self, encoded: str) -> None:
        for index, character in enumerate(encoded):
            assert no_match(encoded[:index] + encoded[index + 1 :])
            assert no_match(encoded[:index] + character + encoded[index:])

    def test_every_truncation(self, encoded: str) -> None:
        for end in range(len(encoded)):
            assert no_match(encoded[:end])
            assert no_match(encoded[end + 1 :])

    def test_every_truncation_of_what_is_sealed(self, encoded: str) -> None:
        blob = encoding.parse(encoded).sealed
        for end in range(1, len(blob)):
            assert no_match(replaced(encoded, sealed=blob[:end]))
            assert no_match(replaced(encoded, sealed=blob[end:]))
        assert no_match(replaced(encoded, sealed=blob + b"\0"))


class TestSwapped:
    def test_with_another_row(self, encoded: str, hasher: CheapKMSArgon2PasswordHasher) -> None:
        """Of a user whose password is the same, or whose password the attacker has set."""
        for password in (PASSWORD, "the attacker's"):
            other = encoding.parse(hasher.encode(password, SALT[::-1]))
            assert not hasher.verify(password, replaced(encoded, sealed=other.sealed))
            assert no_match(replaced(encoded, sealed=other.sealed))
            assert no_match(replaced(encoded, header=other.header))

    def test_it_opens_under_its_own_header_alone(self, mode: str, encoded: str) -> None:
        """Not only is the digest another's: what is sealed does not open at all."""
        if mode == "mac":
            return  # nothing is opened there: what is held is compared
        header = encoding.parse(encoded).header
        dearer = header.parameters._replace(time_cost=2)
        for other in (
            dataclasses.replace(header, salt=SALT[::-1].encode()),
            dataclasses.replace(header, parameters=dearer),
        ):
            moved = dataclasses.replace(encoding.parse(encoded), header=other)
            with pytest.raises((exceptions.InvalidCiphertext, exceptions.MalformedHash)):
                keyring.open(moved)

    def test_with_other_costs(self, encoded: str) -> None:
        header = encoding.parse(encoded).header
        dearer = dataclasses.replace(header, parameters=header.parameters._replace(time_cost=2))
        assert no_match(replaced(encoded, header=dearer))

    @pytest.mark.parametrize("other", modes.NAMES)
    def test_with_another_mode(
        self, mode: str, other: str, encoded: str, settings: Any
    ) -> None:
        """Sealed twice from the same password and salt, so that only the mode is another."""
        if mode == other or {mode, other} == {"direct", "mac_in_direct"}:
            return  # those two have a test of their own
        theirs = encoding.parse(seal_in(settings, other))
        for values in (
            {"sealed": theirs.sealed},
            {"sealed": theirs.sealed, "key_ref": theirs.key_ref},
            {"mode": theirs.mode},
            {"mode": theirs.mode, "key_ref": theirs.key_ref},
        ):
            assert no_match(replaced(encoded, **values))

    def test_direct_and_a_mac_within_it(
        self, settings: Any, kms: Provider, events: list[Event]
    ) -> None:
        """The same key of KMS has sealed both, and the context tells them apart."""
        nested = encoding.parse(seal_in(settings, "mac_in_direct"))
        modes.use(settings, "direct")
        direct = encoding.parse(make_password(PASSWORD))
        outer, of_mac = encoding.split_refs(nested.key_ref)
        for forged in (
            dataclasses.replace(nested, mode="d1", key_ref=outer),
            dataclasses.replace(direct, mode="n1", key_ref=f"{outer}.{of_mac}"),
        ):
            assert no_match(str(forged))
            assert events[-1].outcome == "invalid"

    def test_with_another_deployment(self, mode: str, encoded: str, settings: Any) -> None:
        def opens_nothing(encoded: str) -> bool:
            if mode != "envelope":
                return no_match(encoded)
            with pytest.raises(exceptions.DataKeyDamaged):  # the data key is another's, too
                check_password(PASSWORD, encoded)
            return True

        mine = settings.KMS_HASHER
        settings.KMS_HASHER = {**mine, "DEPLOYMENT": "staging"}
        assert opens_nothing(encoded)
        data_keys.retire()  # which are the other deployment's, too
        other = CheapKMSArgon2PasswordHasher().encode(PASSWORD, SALT)
        assert check_password(PASSWORD, other)
        settings.KMS_HASHER = mine
        assert opens_nothing(other)

    def test_with_another_hashers_header(self, encoded: str) -> None:
        """The sub says which hasher: no PBKDF2 digest is taken for an Argon2 one."""
        assert no_match(encoded.replace("kms_argon2", "kms_other"))


class TestKeys:
    def refs(self, mode: str, encoded: str, ref: str) -> list[str]:
        """The key refs of the string with each key in turn replaced by another."""
        present = encoding.parse(encoded).key_ref.split(".")
        return [".".join([*present[:n], ref, *present[n + 1 :]]) for n in range(len(present))]

    def test_another_key_does_not_open_it(self, mode: str, encoded: str, kms: Provider) -> None:
        if mode == "envelope":  # test_data_keys
            return
        for kind in ("alias/tests", "alias/tests-rsa", "alias/tests-mac"):
            ref = encoding.key_ref(other_key(kms, kind))
            for refs in self.refs(mode, encoded, ref):
                assert no_match(replaced(encoded, key_ref=refs)), kind

    def test_a_key_that_is_gone_is_an_error(self, mode: str, encoded: str) -> None:
        if mode == "envelope":
            return
        gone = encoding.key_ref("00000000-0000-4000-8000-000000000000")
        for refs in self.refs(mode, encoded, gone):
            with pytest.raises(exceptions.KeyNotFound):
                check_password(PASSWORD, replaced(encoded, key_ref=refs))

    def test_a_moved_alias(self, mode: str, encoded: str, kms: Provider) -> None:
        """What is stored opens by its own key; what is new is sealed by the new one."""
        settings = conf.get()
        new = [
            (alias, other_key(kms, alias))
            for alias in (settings.key, settings.mac_key)
            if alias
        ]
        for alias, arn in new:
            kms.update_alias(alias, arn)
        assert check_password(PASSWORD, encoded)
        modes.forget()  # of `public_key`, what KMS answered before
        fresh = make_password(PASSWORD)
        assert check_password(PASSWORD, fresh)
        assert check_password(PASSWORD, encoded)
        if mode != "envelope":
            refs = ".".join(encoding.key_ref(arn) for _, arn in new)
            assert encoding.parse(fresh).key_ref == refs

    def test_a_disabled_key_is_an_error(self, mode: str, encoded: str, kms: Provider) -> None:
        arn = kms.describe_key(conf.get().key).key_arn
        kms.disable_key(arn)
        modes.forget()
        with pytest.raises(exceptions.KeyDisabled):
            check_password(PASSWORD, encoded)
        with pytest.raises(exceptions.KeyDisabled):
            make_password(PASSWORD)
        kms.enable_key(arn)
        kms.schedule_key_deletion(arn, 7)
        with pytest.raises(exceptions.KeyPendingDeletion):
            check_password(PASSWORD, encoded)

    def test_both_keys_of_a_mac_in_direct_count(self, settings: Any, kms: Provider) -> None:
        modes.use(settings, "mac_in_direct")
        encoded = make_password(PASSWORD)
        arn = kms.describe_key("alias/tests-mac").key_arn
        kms.disable_key(arn)
        with pytest.raises(exceptions.KeyDisabled):
            check_password(PASSWORD, encoded)
        kms.enable_key(arn)
        assert check_password(PASSWORD, encoded)


# --- faults ---------------------------------------------------------------------------


def fail_with(error: Exception, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    for name in names or OPERATIONS:
        monkeypatch.setattr(keyring.provider(), name, fail)


class TestFaults:
    """A KMS that cannot answer is never a wrong password."""

    @pytest.mark.parametrize("error", ERRORS, ids=lambda kind: kind.__name__)
    def test_raised_and_reported(
        self,
        error: type[exceptions.KMSError],
        mode: str,
        encoded: str,
        events: list[Event],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        modes.forget()
        del events[:]
        fail_with(error(), monkeypatch)
        with pytest.raises(error):
            check_password(PASSWORD, encoded)
        with pytest.raises(error):
            make_password(PASSWORD)
        assert [event.error_code for event in events] == [error().code] * 2
        assert not {"success", "invalid"} & {event.outcome for event in events}

    def test_a_refused_blob_is_a_wrong_password(
        self, mode: str, encoded: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if modes.LOGIN[mode] == ["GenerateMac"]:
            return  # there is no blob
        for error in (exceptions.InvalidCiphertext, exceptions.IncorrectKey):
            fail_with(error(), monkeypatch, "decrypt")
            if mode == "envelope":  # it is the data key's, which is none of its user's doing
                with pytest.raises(exceptions.DataKeyDamaged):
                    check_password(PASSWORD, encoded)
            else:
                assert not check_password(PASSWORD, encoded)

    def test_other_invalid_requests_are_errors(
        self, mode: str, encoded: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fail_with(exceptions.InvalidRequest(code="ValidationException"), monkeypatch)
        with pytest.raises(exceptions.InvalidRequest):
            check_password(PASSWORD, encoded)

    @pytest.mark.parametrize("change", [lambda b: b"", lambda b: b[:-1], lambda b: b + b"x"])
    def test_an_answer_of_the_wrong_size(
        self,
        change: Callable[[bytes], bytes],
        mode: str,
        encoded: str,
        kms: Provider,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        for name, field in (("decrypt", "plaintext"), ("generate_mac", "mac")):
            real = getattr(kms, name)

            def spoilt(*args: Any, real: Any = real, field: str = field, **kwargs: Any) -> Any:
                answer = real(*args, **kwargs)
                return dataclasses.replace(answer, **{field: change(getattr(answer, field))})

            with monkeypatch.context() as patch:
                patch.setattr(kms, name, spoilt)
                if mode == "public_key":  # anybody can seal something of another size
                    assert check_password(PASSWORD, encoded) is (name != "decrypt")
                elif name.title().replace("_", "") in modes.LOGIN[mode]:
                    with pytest.raises(exceptions.KMSBadResponse):
                        check_password(PASSWORD, encoded)
        assert check_password(PASSWORD, encoded)

    @pytest.mark.parametrize("arn", ["", "no ARN", "arn:aws:kms:eu-west-1:1:key/x"])
    def test_an_answer_that_names_no_key_is_not_stored(
        self, arn: str, mode: str, kms: Provider, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in OPERATIONS:
            real = getattr(kms, name)
            monkeypatch.setattr(
                kms,
                name,
                lambda *args, real=real, **kwargs: dataclasses.replace(
                    real(*args, **kwargs), key_arn=arn
                ),
            )
        with pytest.raises(exceptions.KMSBadResponse):
            make_password(PASSWORD)

    def test_a_breaker_that_is_open(
        self, mode: str, encoded: str, calls: Calls, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Once KMS is known to be out nobody waits for it, in any mode."""
        asked: list[int] = []

        def out(*args: Any, **kwargs: Any) -> Any:
            asked.append(1)
            raise exceptions.KMSTimeout

        for name in OPERATIONS:
            monkeypatch.setattr(keyring.provider(), name, out)
        errors = []
        for _ in range(8):
            with pytest.raises(exceptions.KMSUnavailable) as caught:
                check_password(PASSWORD, encoded)
            errors.append(type(caught.value))
        assert errors == [exceptions.KMSTimeout] * 5 + [exceptions.KMSCircuitOpen] * 3
        assert len(asked) == 5

    def test_it_opens_while_the_breaker_is(
        self, mode: str, encoded: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A probe is let through then, without a thread of its own."""
        breaker.of("").failures = breaker.FAILURES
        assert breaker.of("").is_open
        assert check_password(PASSWORD, encoded)
        assert not breaker.of("").is_open


# --- nothing secret -------------------------------------------------------------------


class TestNothingSecret:
    """Django's error report shows the variables of every frame: see tests/test_leaks.py."""

    @pytest.mark.parametrize("error", [exceptions.KMSTimeout(), KeyError("of the site's own")])
    def test_in_frames_and_errors(
        self,
        error: Exception,
        mode: str,
        encoded: str,
        settings: Any,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        modes.forget()
        stored = encoding.parse(encoded)
        _, digest = encoding.parse_stock(CheapArgon2PasswordHasher().encode(PASSWORD, SALT))
        secrets = [PASSWORD.encode(), digest]
        if mode != "mac":  # where what is held is what is stored
            secrets.append(keyring.open(stored))
        modes.forget()
        fail_with(error, monkeypatch)
        for call in (
            lambda: CheapKMSArgon2PasswordHasher().encode(PASSWORD, SALT),
            lambda: check_password(PASSWORD, encoded),
        ):
            with pytest.raises(exceptions.KMSError) as caught:
                call()
            self.search(caught.value, secrets)

    @staticmethod
    def search(error: BaseException, secrets: list[bytes]) -> None:
        assert error.__cause__ is None
        assert error.__suppress_context__ or error.__context__ is None
        texts = {
            "traceback": "".join(traceback.format_exception(error)),
            "error": f"{error!r} {vars(error)}",
        }
        request = RequestFactory().get("/")
        reporter = ExceptionReporter(request, type(error), error, error.__traceback__)
        for frame in reporter.get_traceback_data()["frames"]:
            # Django's own frames are hidden by `KMSModelBackend`.
            if "/kms_hasher/" in frame["filename"]:
                texts[frame["function"]] = str(frame["vars"])
        assert len(texts) > 5
        for secret in secrets:
            for text in (
                repr(secret)[2:-1],
                secret.hex(),
                base64.b64encode(secret).decode().rstrip("=")[:-1],
                base64.urlsafe_b64encode(secret).decode().rstrip("=")[:-1],
            ):
                assert [place for place, shown in texts.items() if text in shown] == []

    def test_in_what_is_printed(self, mode: str, encoded: str) -> None:
        stored = encoding.parse(encoded)
        text = repr(stored) + repr(keyring.access(stored.header, "login"))
        assert repr(stored.sealed)[2:-1] not in text
        assert SALT not in text


# --- the modes' own -------------------------------------------------------------------


class TestPublicKey:
    @pytest.fixture(autouse=True)
    def used(self, settings: Any, kms: Provider) -> Iterator[None]:
        modes.use(settings, "public_key")
        yield
        modes.restore()
        modes.forget()

    @staticmethod
    def pem(kms: Provider, key: str) -> str:
        der = base64.encodebytes(kms.get_public_key(key).der).decode()
        return f"-----BEGIN PUBLIC KEY-----\n{der}-----END PUBLIC KEY-----\n"

    @pytest.mark.parametrize("by_arn", [False, True])
    def test_with_the_settings_key_nothing_is_asked_to_seal(
        self, by_arn: bool, settings: Any, kms: Provider, calls: Calls
    ) -> None:
        arn = kms.describe_key("alias/tests-rsa").key_arn
        settings.KMS_HASHER = {
            **settings.KMS_HASHER,
            "KEY": arn if by_arn else arn.rpartition("/")[2],
            "PUBLIC_KEY": self.pem(kms, arn),
        }
        with pytest.MonkeyPatch.context() as patch:
            fail_with(exceptions.KMSAccessDenied(), patch)
            encoded = make_password(PASSWORD)
        assert calls() == []
        assert encoding.parse(encoded).key_ref == encoding.key_ref(arn)
        assert check_password(PASSWORD, encoded)

    def test_it_is_asked_for_anew_when_its_time_is_over(
        self, kms: Provider, calls: Calls, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now = [1000.0]
        monkeypatch.setattr(public_key.time, "monotonic", lambda: now[0])
        make_password(PASSWORD)
        other = other_key(kms, "alias/tests-rsa")
        kms.update_alias("alias/tests-rsa", other)
        now[0] += public_key.KEPT - 1
        before = encoding.parse(make_password(PASSWORD))
        assert calls() == ["GetPublicKey"]
        now[0] += 1
        after = encoding.parse(make_password(PASSWORD))
        assert calls() == ["GetPublicKey"] * 2
        assert (before.key_id in other, after.key_id in other) == (False, True)

    @pytest.mark.parametrize("der", [b"", b"x", "alias/tests-ec"])
    def test_an_answer_that_is_no_rsa_key(
        self, der: Any, kms: Provider, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if isinstance(der, str):
            from cryptography.hazmat.primitives import serialization
            from cryptography.hazmat.primitives.asymmetric import ec

            der = (
                ec.generate_private_key(ec.SECP256R1())
                .public_key()
                .public_bytes(
                    serialization.Encoding.DER,
                    serialization.PublicFormat.SubjectPublicKeyInfo,
                )
            )
        real = kms.get_public_key
        monkeypatch.setattr(
            kms, "get_public_key", lambda key: dataclasses.replace(real(key), der=der)
        )
        with pytest.raises(exceptions.KMSBadResponse):
            make_password(PASSWORD)

    @pytest.mark.parametrize("pem", ["x", "-----BEGIN PUBLIC KEY-----\n\n-----END"])
    def test_a_setting_that_is_none(self, pem: str, settings: Any, kms: Provider) -> None:
        arn = kms.describe_key("alias/tests-rsa").key_arn
        settings.KMS_HASHER = {**settings.KMS_HASHER, "KEY": arn, "PUBLIC_KEY": pem}
        with pytest.raises(exceptions.ConfigurationError, match="PUBLIC_KEY"):
            make_password(PASSWORD)

    def test_a_key_too_short_for_kms(self) -> None:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import rsa

        pem = (
            rsa.generate_private_key(65537, 1024)
            .public_key()
            .public_bytes(
                serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
            )
        )
        with pytest.raises(exceptions.ConfigurationError):
            public_key.load(pem.decode())

    def test_the_fingerprint(self, kms: Provider) -> None:
        der = kms.get_public_key("alias/tests-rsa").der
        found = public_key.fingerprint(der)
        assert len(found) == 64
        assert found != public_key.fingerprint(der + b"x")

    def test_whoever_has_it_can_seal_but_only_for_a_header(
        self, settings: Any, kms: Provider, hasher: CheapKMSArgon2PasswordHasher
    ) -> None:
        """What the docs say: a writer to the database can forge a hash, and not move one."""
        real, forged = hasher.encode(PASSWORD, SALT), hasher.encode("forged", SALT[::-1])
        assert check_password("forged", forged)
        moved = replaced(real, sealed=encoding.parse(forged).sealed)
        assert not check_password("forged", moved)


class TestRewrap:
    """ReEncrypt, where the mode has it; and what is said where it has not."""

    def test_under_another_key(
        self, mode: str, encoded: str, kms: Provider, calls: Calls
    ) -> None:
        stored, arn = encoding.parse(encoded), other_key(kms, conf.get().key)
        done = len(calls())
        if not MODES[mode].rewraps:
            with pytest.raises(exceptions.MalformedHash):
                keyring.rewrap(stored, arn)
            with pytest.raises(exceptions.MalformedHash):
                MODES[mode].rewrapped(
                    keyring.access(stored.header, "rotate"),
                    stored,
                    base.ReEncrypted(key_arn=arn, ciphertext=b"x", source_key_arn=arn),
                )
            assert calls()[done:] == []
            return
        new, answer = keyring.rewrap(stored, arn)
        assert calls()[done:] == ["ReEncrypt"]
        assert answer.key_arn == arn
        assert new.key_ref.split(".")[0] == encoding.key_ref(arn)
        assert new.key_ref.split(".")[1:] == stored.key_ref.split(".")[1:]
        assert (new.header, new.mode) == (stored.header, stored.mode)
        assert new.sealed != stored.sealed
        assert check_password(PASSWORD, str(new))
        assert not check_password("wrong", str(new))
        assert encoding.stable_part(str(new)) == encoding.stable_part(encoded)

    @pytest.mark.parametrize("target", modes.NAMES)
    def test_into_another_mode(
        self, mode: str, target: str, encoded: str, settings: Any
    ) -> None:
        stored = encoding.parse(encoded)
        settings.KMS_HASHER = {**settings.KMS_HASHER, "MODE": target}
        modes.use(settings, target)
        if MODES[mode].core == "mac" != MODES[target].core:
            with pytest.raises(exceptions.MalformedHash, match="no digest back"):
                keyring.converter(stored)
            return
        moved = keyring.converter(stored)()
        assert moved.mode == MODES[target].code
        assert moved.header == stored.header
        assert check_password(PASSWORD, str(moved))
        assert not check_password("wrong", str(moved))


# --- over the wire --------------------------------------------------------------------


@pytest.mark.everywhere
class TestAWS:
    """The same through the `aws` provider, against a double of KMS on HTTP."""

    @pytest.fixture
    def double(
        self, mode: str, settings: Any, monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[KMSDouble]:
        with KMSDouble() as double:
            monkeypatch.setenv("AWS_ENDPOINT_URL_KMS", double.url)
            monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAIOSFODNN7EXAMPLE")
            monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "an example, and no secret")
            for alias, spec, usage in (
                ("alias/tests", "SYMMETRIC_DEFAULT", "ENCRYPT_DECRYPT"),
                ("alias/tests-rsa", "RSA_2048", "ENCRYPT_DECRYPT"),
                ("alias/tests-mac", "HMAC_256", "GENERATE_VERIFY_MAC"),
            ):
                made = double.engine.create_key(spec=spec, usage=usage)
                double.engine.create_alias(alias, made.key_arn)
            before = settings.KMS_HASHER
            settings.KMS_HASHER = {
                **before,
                "PROVIDER": "aws",
                "OPTIONS": {"region": "eu-central-1", "attempts": 1},
            }
            yield double
            keyring.provider().close()
            settings.KMS_HASHER = before

    def test_a_password(self, mode: str, double: KMSDouble, calls: Calls) -> None:
        encoded = make_password(PASSWORD)
        assert check_password(PASSWORD, encoded)
        assert not check_password("wrong", encoded)
        operations = [request.operation for request in double.requests]
        assert operations == modes.FIRST[mode] + modes.LOGIN[mode] * 2 == calls()
        sent = {request.operation: request.params for request in double.requests}
        self.check_sizes(mode, encoding.parse(encoded), sent)
        blob = bytearray(encoding.parse(encoded).sealed)
        blob[-1] ^= 1
        assert not check_password(PASSWORD, replaced(encoded, sealed=bytes(blob)))
        if MODES[mode].rewraps:
            self.rewrap(mode, encoding.parse(encoded), double)

    @staticmethod
    def check_sizes(mode: str, stored: SealedHash, sent: dict[str, Any]) -> None:
        plaintexts = {"direct": 32, "mac_in_direct": 24}
        if mode in plaintexts:
            text = base64.b64decode(sent["Encrypt"]["Plaintext"])
            assert len(text) == plaintexts[mode]
            assert len(stored.sealed) == plaintexts[mode] + 152
            context = sent["Encrypt"]["EncryptionContext"]
            assert context == sent["Decrypt"]["EncryptionContext"]
            assert context["sub"] == stored.header.sub
        if mode == "envelope":
            assert sent["GenerateDataKey"]["NumberOfBytes"] == 64
            assert sent["Decrypt"]["EncryptionContext"]["use"] == "data-key"
        if mode == "public_key":
            assert sent["Decrypt"]["EncryptionAlgorithm"] == "RSAES_OAEP_SHA_256"
            assert "EncryptionContext" not in sent["Decrypt"]
            assert len(base64.b64decode(sent["Decrypt"]["CiphertextBlob"])) == 256
        if MODES[mode].core == "mac":
            assert len(base64.b64decode(sent["GenerateMac"]["Message"])) == 64
            assert sent["GenerateMac"]["MacAlgorithm"] == "HMAC_SHA_256"

    @staticmethod
    def rewrap(mode: str, stored: SealedHash, double: KMSDouble) -> None:
        arn = other_key(double.engine, conf.get().key)
        new, _ = keyring.rewrap(stored, arn)
        sent = double.requests[-1].params
        assert double.requests[-1].operation == "ReEncrypt"
        assert sent["DestinationKeyId"] == arn
        if mode == "public_key":
            assert sent["SourceEncryptionAlgorithm"] == "RSAES_OAEP_SHA_256"
            assert sent["DestinationEncryptionAlgorithm"] == "RSAES_OAEP_SHA_256"
        assert check_password(PASSWORD, str(new))

    def test_faults(self, mode: str, double: KMSDouble) -> None:
        encoded = make_password(PASSWORD)
        for fault in (
            "ThrottlingException",
            "http_503",
            "empty",
            "not_base64",
            "short",
            "long",
            "no_fields",
        ):
            double.fail("*", fault)
            if mode == "public_key" and fault in ("short", "long"):
                assert not check_password(PASSWORD, encoded)  # as anybody may have sealed it
            else:
                with pytest.raises(exceptions.KMSUnavailable):
                    check_password(PASSWORD, encoded)
            double.heal()
            assert check_password(PASSWORD, encoded)


def test_a_hash_in_a_mode_nobody_knows(mode: str, encoded: str, calls: Calls) -> None:
    before = calls()
    assert no_match(replaced(encoded, mode="x9"))
    assert calls() == [*before, "Parse"]
