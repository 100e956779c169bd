"""How long stored strings are, as predicted, as real ones are, and as the docs say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth.hashers import get_hashers
from django.core.checks import Error
from django.utils.module_loading import import_string
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from kms_hasher import checks, encoding, inner, lengths
from kms_hasher.encoding import SealedHash
from kms_hasher.hashers import KMSArgon2PasswordHasher
from kms_hasher.inner import Argon2Parameters
from kms_hasher.models import DataKey
from kms_hasher.modes import MODES, STOCK_WIDTH
from tests import modes
from tests.hashers import CheapKMSArgon2PasswordHasher

PASSWORD = "correct horse battery staple"
DOC = Path(__file__).parent.parent / "docs" / "reference" / "stored-string.md"
NARROW = [name for name in MODES if MODES[name].fits_stock]


class Any_(KMSArgon2PasswordHasher):
    """A hasher of a site's own, whose costs the tests choose."""

    parameters = Argon2Parameters(102400, 2, 8)

    def _parameters(self) -> Argon2Parameters:
        return self.parameters


limits = Any_()
bearable = (
    st.integers(1, limits.max_parallelism)
    .flatmap(
        lambda lanes: st.builds(
            Argon2Parameters,
            st.integers(8 * lanes, limits.max_memory_cost),
            st.integers(1, limits.max_work // 8),
            st.just(lanes),
            st.sampled_from(["argon2id", "argon2i", "argon2d"]),
            st.sampled_from([16, 19]),
        )
    )
    .filter(limits._bearable)
)
#: The longest that the limits allow, and the shortest.
EXTREMES = [
    Argon2Parameters(memory, passes, lanes, variety, version)
    for memory, passes, lanes in (
        (2**20, 4, 64),
        (2**19, 8, 64),
        (100_000, 41, 64),
        (99_999, 41, 10),
        (512, 8192, 64),
        (8, 524_288, 1),
        (8, 1, 1),
        (102_400, 2, 8),
    )
    for variety in ("argon2id", "argon2i", "argon2d")
    for version in (19, 16)
]


def made(parameters: Argon2Parameters, mode: str, number: int = 10_000_000) -> int:
    """The characters of a string with these costs, made by hand."""
    header = encoding.Header("kms_argon2", parameters, b"s" * 22)
    mrk = encoding.key_ref("mrk-" + 32 * "0")
    ref = encoding.data_key_ref(number) if mode == "envelope" else mrk
    sealed = bytes(48 if mode == "envelope" else 24)
    return len(str(SealedHash(header, MODES[mode].code, ref, sealed)))


def check(parameters: Argon2Parameters, settings: Any, mode: str) -> list[str | None]:
    settings.KMS_HASHER = {**settings.KMS_HASHER, "MODE": mode}
    settings.PASSWORD_HASHERS = [f"{__name__}.Any_"]
    found = get_hashers()[0]
    assert type(found).__name__ == "Any_"
    type(found).parameters = parameters
    return [message.id for message in checks.check_hashers(None)]


@pytest.fixture(autouse=True)
def usual_costs() -> Any:
    yield
    Any_.parameters = Argon2Parameters(102400, 2, 8)


class TestWithin128:
    @pytest.mark.parametrize("mode", NARROW)
    @pytest.mark.parametrize("parameters", EXTREMES, ids=str)
    def test_extremes(self, parameters: Argon2Parameters, mode: str, settings: Any) -> None:
        assert Any_()._bearable(parameters)
        fits = made(parameters, mode) <= STOCK_WIDTH
        assert check(parameters, settings, mode) == ([] if fits else ["kms_hasher.E010"])

    @given(bearable, st.sampled_from(NARROW))
    @hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_any_costs(self, settings: Any, parameters: Argon2Parameters, mode: str) -> None:
        length = made(parameters, mode)
        fits = length <= STOCK_WIDTH
        assert check(parameters, settings, mode) == ([] if fits else ["kms_hasher.E010"])
        assert lengths.of(Any_(), MODES[mode]) == length
        # Only costs that are told by more than any of argon2id's are too long.
        usual = (parameters.variety, parameters.version) == ("argon2id", 19)
        assert fits or not usual or len(str(parameters)) > 18

    def test_they_are_the_same_each_time(self) -> None:
        assert len({lengths.table() for _ in range(10)}) == 1

    @given(bearable)
    def test_mac_fits_with_all_that_the_limits_allow(
        self, parameters: Argon2Parameters
    ) -> None:
        assert made(parameters, "mac") <= STOCK_WIDTH

    def test_what_envelope_has_room_for(self) -> None:
        """With ten million data keys, which is ten thousand million passwords."""
        for parameters, length in (
            (Argon2Parameters(102400, 2, 8), 126),
            (Argon2Parameters(1048576, 4, 64), 128),
        ):
            assert made(parameters, "envelope") == length
        with_most = made(Argon2Parameters(102400, 2, 8), "envelope", 2**30 - 1)
        assert with_most <= STOCK_WIDTH

    @pytest.mark.parametrize("mode", NARROW)
    @pytest.mark.parametrize("name", [n for n in inner.HASHERS if n != "argon2"])
    def test_other_hashers_fit_or_the_check_says_so(
        self, name: str, mode: str, settings: Any
    ) -> None:
        settings.KMS_HASHER = {**settings.KMS_HASHER, "MODE": mode}
        settings.PASSWORD_HASHERS = [f"kms_hasher.hashers.{inner.HASHERS[name]}"]
        length = lengths.of(get_hashers()[0], MODES[mode])
        found = checks.check_hashers(None)
        assert [message.id for message in found] == (
            [] if length <= STOCK_WIDTH else ["kms_hasher.E010"]
        )
        assert all(
            isinstance(message, Error) and str(length) in message.msg for message in found
        )

    def test_a_library_that_is_missing_is_no_error_of_the_check(
        self, settings: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        settings.KMS_HASHER = {**settings.KMS_HASHER, "MODE": "envelope"}
        settings.PASSWORD_HASHERS = ["kms_hasher.hashers.KMSBCryptPasswordHasher"]
        monkeypatch.setitem(sys.modules, "bcrypt", None)
        assert checks.check_hashers(None) == []


@pytest.mark.django_db
class TestPredicted:
    def test_real_strings(self, mode: str) -> None:
        hasher = CheapKMSArgon2PasswordHasher()
        predicted = lengths.of(hasher, MODES[mode], data_keys=31, spec="RSA_2048")
        encoded = hasher.encode(PASSWORD, hasher.salt())
        stored = encoding.parse(encoded)
        # The refs of multi-Region keys, which are predicted, have one character more.
        refs = 0 if mode == "envelope" else len(stored.key_ref.split("."))
        if mode == "envelope":
            number = DataKey.objects.get().number
            predicted = lengths.of(hasher, MODES[mode], data_keys=number)
        assert len(encoded) <= predicted
        if mode in ("direct", "mac_in_direct"):  # 152 to 157 bytes more, as KMS has it
            shortest = len(inner.b64encode(bytes(len(stored.sealed))))
            longest = len(inner.b64encode(bytes(len(stored.sealed) + 5)))
            assert predicted - len(encoded) == refs + longest - shortest
        else:
            assert len(encoded) == predicted - refs

    @pytest.mark.parametrize("name", inner.HASHERS)
    def test_of_every_hasher(self, name: str, settings: Any, kms: Any) -> None:
        settings.KMS_HASHER = {**settings.KMS_HASHER, "AUDIT": "off"}
        modes.use(settings, "mac")
        # bcrypt's salts may have characters that are not written as they are.
        costs = {"rounds": 10} if name in ("bcrypt", "bcrypt_sha256") else {}
        kind = import_string(f"kms_hasher.hashers.{inner.HASHERS[name]}")
        hasher = type("Own", (kind,), costs)()
        salt = "." * 22 if costs else hasher.salt()
        encoded = hasher.encode(PASSWORD, salt)
        assert len(encoded) == lengths.of(hasher, MODES["mac"]) - 1


class TestTable:
    def test_the_docs_have_it(self) -> None:
        assert lengths.table() in DOC.read_text()

    def test_each_fits_the_column_of_its_mode(self) -> None:
        for name in inner.HASHERS.values():
            hasher = import_string(f"kms_hasher.hashers.{name}")()
            for mode in MODES.values():
                assert lengths.of(hasher, mode) <= encoding.MAX_LENGTH

    @pytest.mark.everywhere
    def test_the_command(self) -> None:
        found = subprocess.run(
            [sys.executable, "-m", "kms_hasher.lengths"],
            capture_output=True,
            text=True,
            check=True,
            env={"DJANGO_SETTINGS_MODULE": "tests.settings", "PATH": ""},
            cwd=DOC.parent.parent.parent,
        )
        assert found.stdout.strip() == lengths.table()
