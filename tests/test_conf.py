"""The settings: read live, and an error that says what to change."""

from __future__ import annotations

from typing import Any

import pytest
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.test import override_settings

from kms_hasher import conf, keyring, modes, providers
from kms_hasher.exceptions import ConfigurationError, MalformedHash
from kms_hasher.providers.local import LocalProvider

KEY_ID = "1234abcd-12ab-34cd-56ef-1234567890ab"
HOME = "arn:aws:kms:eu-west-1:111122223333"
MAC_ARN = f"{HOME}:key/mrk-{'0' * 32}"
ELSEWHERE = "arn:aws:kms:us-east-1:444455556666"


def get(**settings: Any) -> conf.Conf:
    with override_settings(KMS_HASHER={"KEY": "alias/x", **settings}):
        return conf.get()


def test_defaults() -> None:
    settings = get()
    assert (settings.provider, settings.mode, settings.audit) == ("aws", "direct", "durable")
    assert settings.stable_sessions is True
    assert settings.audit_strict is False


def test_read_live() -> None:
    assert get(DEPLOYMENT="one").deployment == "one"
    assert get(DEPLOYMENT="two").deployment == "two"


@override_settings(KMS_HASHER={"KEY": "alias/a", "PREVIOUS_KEYS": [], "OPTIONS": {}})
def test_read_live_where_a_value_is_changed_in_place() -> None:
    assert conf.get().previous_keys == ()
    arn = "arn:aws:kms:us-east-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"
    settings.KMS_HASHER["PREVIOUS_KEYS"].append(arn)
    settings.KMS_HASHER["OPTIONS"]["attempts"] = 3
    assert conf.get().previous_keys == (arn,)
    assert conf.get().options == {"attempts": 3}


@pytest.mark.parametrize(
    "key",
    [
        "alias/app/passwords",
        KEY_ID,
        "mrk-" + "0" * 32,
        f"{HOME}:key/{KEY_ID}",
        f"{HOME}:alias/passwords",
    ],
)
def test_keys_that_kms_takes(key: str) -> None:
    assert get(KEY=key).key == key


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"KEY": ""}, "KMS_HASHER['KEY'] is missing"),
        ({"KEY": None}, "must be of type str"),
        ({"KEY": "passwords"}, "neither an alias"),
        ({"KEY": "arn:aws:s3:::x"}, "neither an alias"),
        ({"KEY": f"{HOME}:key/x"}, "neither an alias"),
        ({"KYE": "alias/x"}, "Did you mean 'KEY'?"),
        ({"key": "alias/x"}, "Did you mean 'KEY'?"),
        ({"ZZZZZZ": 1}, "Known: KEY, PROVIDER"),
        ({7: 1}, "Known: KEY, PROVIDER"),
        ({"OPTIONS": "region"}, "must be of type Mapping"),
        ({"PREVIOUS_KEYS": "alias/x"}, "must be of type list or tuple"),
        ({"PREVIOUS_KEYS": [KEY_ID]}, "give full key ARNs"),
        ({"PREVIOUS_KEYS": [7]}, "give full key ARNs"),
        ({"PREVIOUS_KEYS": [f"{HOME}:alias/x"]}, "give full key ARNs"),
        ({"PREVIOUS_KEYS": [f"{HOME}:key/x"]}, "neither an alias"),
        ({"FALLBACK_REGIONS": ["eu-west-1"]}, "needs KMS_HASHER['KEY'] as the ARN"),
        ({"AUDIT": "loud"}, "use one of durable, buffered, inline, off"),
        ({"AUDIT_STRICT": 1}, "must be of type bool"),
        ({"MODE": None}, "must be of type str"),
        ({"MODE": "mac_in_direct"}, "needs KMS_HASHER['MAC_KEY']"),
        ({"MODE": "mac_in_direct", "MAC_KEY": "hmac"}, "KMS_HASHER['MAC_KEY'] holds 'hmac'"),
        ({"MAC_KEY": f"{HOME}:key/x"}, "neither an alias"),
        ({"MODE": "mac_in_direct", "MAC_KEY": MAC_ARN}, "MAC_KEY'] is an ARN"),
        ({"MODE": "mac_in_direct", "MAC_KEY": MAC_ARN, "KEY": KEY_ID}, "MAC_KEY'] is an ARN"),
        *(
            ({"MODE": "mac_in_direct", "MAC_KEY": MAC_ARN, "KEY": key}, "MAC_KEY'] is an ARN")
            for key in (
                f"{HOME.replace('arn:aws:', 'arn:aws-cn:')}:alias/x",
                f"{HOME[:-1]}9:alias/x",
                f"{HOME.replace('eu-', 'us-')}:alias/x",
            )
        ),
        ({"MODE": "public_key", "PUBLIC_KEY": "PEM"}, "KMS_HASHER['KEY'] names an alias"),
        ({"DATA_KEY_USERS": 0}, "must be at least 1"),
        ({"DATA_KEY_USERS": True}, "must be of type int"),
        ({"DATA_KEY_USERS": 1.5}, "must be of type int"),
        ({"DATA_KEY_DAYS": -1}, "must be at least 1"),
        ({"DATA_KEY_CACHE_SECONDS": -0.1}, "must be 0 or more seconds"),
        ({"DATA_KEY_CACHE_SECONDS": float("inf")}, "must be 0 or more seconds"),
        ({"DATA_KEY_CACHE_SECONDS": float("nan")}, "must be 0 or more seconds"),
        ({"DATA_KEY_CACHE_SECONDS": False}, "must be of type int or float"),
        ({"AUDIT_SEAL_KEY": "seals"}, "KMS_HASHER['AUDIT_SEAL_KEY'] holds 'seals'"),
        ({"AUDIT_CONTEXT_KEY": "x"}, "KMS_HASHER['AUDIT_CONTEXT_KEY'] holds 'x'"),
        ({"AUDIT_SEAL_HOURS": "24"}, "must be of type int or float"),
        ({"AUDIT_SEAL_HOURS": -1}, "must be 0 or more hours"),
        ({"AUDIT_SEAL_HOURS": float("nan")}, "must be 0 or more hours"),
    ],
)
def test_settings_that_cannot_work(settings: dict[Any, Any], says: str) -> None:
    with (
        pytest.raises(ConfigurationError) as caught,
        override_settings(KMS_HASHER={"KEY": "alias/x", **settings}),
    ):
        conf.get()
    assert says in str(caught.value)
    assert isinstance(caught.value, ImproperlyConfigured)


@pytest.mark.parametrize("raw", [None, [], "alias/x"])
def test_not_a_dictionary(raw: Any) -> None:
    with (
        override_settings(KMS_HASHER=raw),
        pytest.raises(ConfigurationError, match="dictionary"),
    ):
        conf.get()


@pytest.mark.parametrize(
    "settings",
    [
        {"MODE": "mac_in_direct", "MAC_KEY": "alias/hmac"},
        {"MODE": "mac_in_direct", "MAC_KEY": KEY_ID},
        {"MODE": "mac_in_direct", "MAC_KEY": f"{HOME}:alias/hmac", "KEY": f"{HOME}:alias/x"},
        {"MODE": "mac_in_direct", "MAC_KEY": MAC_ARN, "KEY": f"{HOME}:key/{KEY_ID}"},
        {"MODE": "mac_in_direct", "MAC_KEY": MAC_ARN, "PREVIOUS_KEYS": (MAC_ARN,)},
        {"MODE": "direct", "MAC_KEY": MAC_ARN},
        {"MODE": "public_key"},
        {"MODE": "public_key", "KEY": KEY_ID, "PUBLIC_KEY": "PEM"},
        {"MODE": "public_key", "KEY": f"{HOME}:key/{KEY_ID}", "PUBLIC_KEY": "PEM"},
        {"MODE": "envelope", "DATA_KEY_CACHE_SECONDS": 0.5, "DATA_KEY_USERS": 1},
        {"MODE": "direct", "MAC_KEY": "alias/hmac", "PUBLIC_KEY": "PEM"},
    ],
)
def test_settings_of_the_modes(settings: dict[str, Any]) -> None:
    found = get(**settings)
    assert modes.by_name(found.mode)
    for name, value in settings.items():
        assert getattr(found, name.lower()) == value


@pytest.mark.parametrize(
    ("key", "alias"), [("", ""), (KEY_ID, ""), ("alias/x", "alias/x"), (f"{HOME}:alias/x",) * 2]
)
def test_the_alias_of_the_mac_key(key: str, alias: str) -> None:
    assert get(MAC_KEY=key).mac_alias == alias


class TestWhereAKeyIs:
    """Account and Region come from the settings, never from a stored value."""

    def test_by_id_alone_where_the_settings_name_no_account(self) -> None:
        assert get(KEY="alias/x").key_for(KEY_ID) == KEY_ID
        assert get(KEY=KEY_ID).key_for(KEY_ID) == KEY_ID

    def test_beside_the_key_where_its_arn_is_given(self) -> None:
        settings = get(KEY=f"{HOME}:alias/x")
        assert settings.key_for(KEY_ID) == f"{HOME}:key/{KEY_ID}"

    def test_in_a_place_left_behind_if_the_settings_say_so(self) -> None:
        previous = f"{ELSEWHERE}:key/{KEY_ID}"
        settings = get(KEY=f"{HOME}:alias/x", PREVIOUS_KEYS=[previous])
        assert settings.key_for(KEY_ID) == previous
        other = "mrk-" + "0" * 32
        assert settings.key_for(other) == f"{HOME}:key/{other}"

    @pytest.mark.parametrize(
        ("key", "alias"),
        [
            ("alias/x", "alias/x"),
            (f"{HOME}:alias/x", f"{HOME}:alias/x"),
            (KEY_ID, ""),
            (f"{HOME}:key/{KEY_ID}", ""),
        ],
    )
    def test_the_alias(self, key: str, alias: str) -> None:
        assert get(KEY=key).alias == alias


class TestReplicas:
    """The same key or alias in another Region, for when KMS is out in the first."""

    REGIONS = ["us-east-1", "eu-west-1"]

    @pytest.mark.parametrize("resource", ["alias/x", "key/mrk-" + "0" * 32])
    def test_of_aliases_and_multi_region_keys(self, resource: str) -> None:
        settings = get(KEY=f"{HOME}:alias/x", FALLBACK_REGIONS=self.REGIONS)
        here = f"{HOME}:{resource}"
        there = f"arn:aws:kms:us-east-1:111122223333:{resource}"
        assert settings.replicas(here) == [there]
        assert settings.replicas(there) == [here]

    @pytest.mark.parametrize("key", [f"{HOME}:key/{KEY_ID}", KEY_ID, "alias/x"])
    def test_others_have_none(self, key: str) -> None:
        settings = get(KEY=f"{HOME}:alias/x", FALLBACK_REGIONS=self.REGIONS)
        assert settings.replicas(key) == []
        assert get(KEY=f"{HOME}:alias/x").replicas(f"{HOME}:alias/x") == []


class TestProviders:
    def test_by_dotted_path(self, tmp_path: Any) -> None:
        made = providers.create(
            get(
                PROVIDER="kms_hasher.providers.local.LocalProvider",
                OPTIONS={"path": tmp_path / "k", "allow_without_debug": True},
            )
        )
        assert isinstance(made, LocalProvider)

    @pytest.mark.parametrize("name", ["vault", "kms_hasher.providers.local.Nothing", ""])
    def test_unknown(self, name: str) -> None:
        with pytest.raises(ConfigurationError, match="'aws', 'local' or the dotted path"):
            providers.create(get(PROVIDER=name))

    def test_options_it_does_not_take(self) -> None:
        with pytest.raises(ConfigurationError, match="does not fit the provider 'local'"):
            providers.create(get(PROVIDER="local", OPTIONS={"paht": "x"}))

    def test_one_for_all_threads_until_the_settings_change(self, tmp_path: Any) -> None:
        first = keyring.provider()
        assert keyring.provider() is first
        options = {"path": str(tmp_path / "k"), "allow_without_debug": True}
        with override_settings(
            KMS_HASHER={"KEY": "alias/x", "PROVIDER": "local", "OPTIONS": options}
        ):
            assert keyring.provider() is not first
            assert keyring.provider() is keyring.provider()


class TestModes:
    def test_unknown_name(self) -> None:
        with pytest.raises(ConfigurationError, match="use 'direct'"):
            modes.by_name("drect")

    def test_unknown_code(self) -> None:
        with pytest.raises(MalformedHash):
            modes.by_code("x9")
        assert not modes.is_known("x9")
        assert modes.name_of("x9") == "x9"
        assert modes.rewraps("x9", "SYMMETRIC_DEFAULT")  # so that its rows are told as bad
        assert not modes.converts("x9", "direct")

    def test_codes_are_names(self) -> None:
        for name, mode in modes.MODES.items():
            assert modes.by_code(mode.code) is modes.by_name(name) is mode
            assert modes.is_known(mode.code)
            assert modes.name_of(mode.code) == name

    @pytest.mark.parametrize(
        ("name", "specs"),
        [
            ("direct", {"SYMMETRIC_DEFAULT"}),
            ("public_key", {"RSA_2048", "RSA_4096"}),
            ("envelope", set()),
            ("mac", set()),
            ("mac_in_direct", {"SYMMETRIC_DEFAULT"}),
        ],
    )
    def test_what_re_encrypt_reaches(self, name: str, specs: set[str]) -> None:
        code = modes.by_name(name).code
        every = ("SYMMETRIC_DEFAULT", "RSA_2048", "RSA_4096", "HMAC_256")
        assert {spec for spec in every if modes.rewraps(code, spec)} == specs

    def test_what_converts(self) -> None:
        held = {"direct", "public_key", "envelope"}
        for source in modes.MODES:
            for target in modes.MODES:
                may = source != target and (source in held or target not in held)
                assert modes.converts(modes.by_name(source).code, target) is may

    def test_widths(self) -> None:
        found = {name: modes.width(name) for name in modes.MODES}
        assert found == {
            "direct": 1024,
            "public_key": 1024,
            "envelope": 128,
            "mac": 128,
            "mac_in_direct": 1024,
        }
