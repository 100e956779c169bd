"""The modes as the tests use them: their keys, settings, and what each costs in calls."""

from __future__ import annotations

import functools
from typing import Any

from kms_hasher import data_keys, keyring
from kms_hasher.modes import MODES, public_key
from kms_hasher.providers.base import Provider

NAMES = tuple(MODES)

#: What KEY is in each mode.
KEYS = {
    "direct": "alias/tests",
    "public_key": "alias/tests-rsa",
    "envelope": "alias/tests",
    "mac": "alias/tests-mac",
    "mac_in_direct": "alias/tests",
}
#: KMS's calls to seal a password, once the first has been sealed; and to check one.
SET = {
    "direct": ["Encrypt"],
    "public_key": [],
    "envelope": ["Decrypt"],
    "mac": ["GenerateMac"],
    "mac_in_direct": ["GenerateMac", "Encrypt"],
}
FIRST = {**SET, "public_key": ["GetPublicKey"], "envelope": ["GenerateDataKey"]}
LOGIN = {
    "direct": ["Decrypt"],
    "public_key": ["Decrypt"],
    "envelope": ["Decrypt"],
    "mac": ["GenerateMac"],
    "mac_in_direct": ["Decrypt", "GenerateMac"],
}


@functools.cache
def make_keys() -> dict[str, str]:
    """Make the keys that only some modes need; return their ARNs by alias."""
    provider = keyring.provider()
    made = {
        "alias/tests-rsa": provider.create_key(spec="RSA_2048"),
        "alias/tests-mac": provider.create_key(spec="HMAC_256", usage="GENERATE_VERIFY_MAC"),
    }
    for alias, key in made.items():
        provider.create_alias(alias, key.key_arn)
    return {alias: key.key_arn for alias, key in made.items()}


def use(settings: Any, name: str, **others: Any) -> None:
    """Let the settings name the mode, with its keys."""
    make_keys()
    forget()
    mac_key = {"MAC_KEY": "alias/tests-mac"} if name == "mac_in_direct" else {}
    kept = {k: v for k, v in settings.KMS_HASHER.items() if k != "MAC_KEY"}
    settings.KMS_HASHER = {**kept, "MODE": name, "KEY": KEYS[name], **mac_key, **others}


def restore() -> None:
    """Put the aliases back, and the keys into use."""
    for alias, arn in make_keys().items():
        put_back(keyring.provider(), alias, arn)


def put_back(provider: Provider, alias: str, arn: str) -> None:
    """Do so with one of them."""
    state = provider.describe_key(arn).state
    if state == "PendingDeletion":
        provider.cancel_key_deletion(arn)
    if state != "Enabled":
        provider.enable_key(arn)
    if provider.describe_key(alias).key_arn != arn:
        provider.update_alias(alias, arn)


def forget() -> None:
    """Forget what the process has kept of keys."""
    public_key.forget()
    data_keys.close()
