"""Policies for AWS: valid, about this site's keys, and no more than each part needs."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import pytest
from django.contrib.auth.hashers import make_password
from django.contrib.auth.models import User
from django.core.management import CommandError, call_command
from django.utils import timezone

from kms_hasher import history, policies
from kms_hasher.audit import store
from kms_hasher.audit.site import USES
from kms_hasher.encoding import ARN as Arn
from kms_hasher.encoding import key_ref
from kms_hasher.exceptions import ConfigurationError
from kms_hasher.providers.base import OPERATIONS
from kms_hasher.signals import SUCCESS, Event

REGION, ACCOUNT = "eu-central-1", "111122223333"
ARN = f"arn:aws:kms:{REGION}:{ACCOUNT}:key/1234abcd-12ab-34cd-56ef-1234567890ab"
OLD = f"arn:aws:kms:{REGION}:{ACCOUNT}:key/2234abcd-12ab-34cd-56ef-1234567890ab"
ALIAS = f"arn:aws:kms:{REGION}:{ACCOUNT}:alias/passwords"

pytestmark = pytest.mark.django_db


@pytest.fixture
def configure(settings: Any) -> Callable[..., None]:
    def change(**values: Any) -> None:
        settings.KMS_HASHER = {**settings.KMS_HASHER, **values}

    return change


@pytest.fixture
def site(configure: Callable[..., None]) -> Callable[..., None]:
    """A site with an alias that was moved from one key to another."""
    now = timezone.now()
    configure(KEY=ALIAS, DEPLOYMENT="shop")
    for arn in (OLD, ARN):
        history.record_alias(ALIAS, history.record_key(arn, now), now, moved=True)
    return configure


def statements(role: str, part: str = "iam") -> dict[str, dict[str, Any]]:
    """Return the statements of a role by their Sid, as AWS would read them."""
    found = json.loads(json.dumps(policies.policy(role)))[part]
    assert found["Version"] == "2012-10-17"
    listed = found["Statement"]
    assert len({each["Sid"] for each in listed}) == len(listed)
    for each in listed:
        assert each["Sid"].isalnum() and each["Effect"] == "Allow"
        assert all(":" in action and "*" not in action for action in each["Action"])
    return {each["Sid"]: each for each in listed}


def actions(role: str, part: str = "iam") -> set[str]:
    found = statements(role, part).values()
    return {action.partition(":")[2] for each in found for action in each["Action"]}


CONTEXT = {
    "kms:EncryptionContext:application": "kms_hasher",
    "kms:EncryptionContext:deployment": "shop",
    "kms:EncryptionContext:use": ["password", "status"],
}


def test_a_web_server(site: Callable[..., None]) -> None:
    found = statements("web")
    assert found["SealPasswords"] == {
        "Sid": "SealPasswords",
        "Effect": "Allow",
        "Action": ["kms:Encrypt"],
        "Resource": [ARN, OLD],
        "Condition": {"StringEquals": {**CONTEXT, "kms:RequestAlias": "alias/passwords"}},
    }
    assert found["OpenPasswords"]["Action"] == ["kms:Decrypt"]
    assert found["OpenPasswords"]["Resource"] == [ARN, OLD]
    assert found["OpenPasswords"]["Condition"] == {"StringEquals": CONTEXT}
    assert found["RewrapPasswords"]["Condition"] == {"StringEquals": CONTEXT}
    assert actions("web") == {
        "Encrypt",
        "Decrypt",
        "ReEncryptFrom",
        "ReEncryptTo",
        "DescribeKey",
    }


def test_a_web_server_that_does_not_re_wrap(site: Callable[..., None]) -> None:
    site(REWRAP_ON_LOGIN=False)
    assert actions("web") == {"Encrypt", "Decrypt", "DescribeKey"}


@pytest.mark.parametrize(
    ("mode", "seal", "opens"),
    [
        ("direct", {"Encrypt"}, {"Decrypt"}),
        ("public_key", {"GetPublicKey"}, {"Decrypt"}),
        # What seals by a data key has to have it, and so opens what it has sealed.
        ("envelope", {"GenerateDataKey", "Decrypt"}, {"Decrypt"}),
        ("mac", {"GenerateMac"}, {"GenerateMac"}),
    ],
)
def test_a_sign_up_tier_can_open_nothing_unless_mode_is_mac(
    site: Callable[..., None], mode: str, seal: set[str], opens: set[str]
) -> None:
    site(MODE=mode)
    assert actions("sign-up") == seal
    assert opens <= actions("web")
    for each in statements("web").values():
        text = json.dumps(each.get("Condition", {}))
        if mode in ("public_key", "mac"):  # these keys take no context
            assert "EncryptionContext" not in text
        if each["Sid"] in ("OpenPasswords", "RewrapPasswords"):
            assert text != "{}"


ALLOWED = {
    "web": {"Encrypt", "Decrypt", "ReEncryptFrom", "ReEncryptTo", "DescribeKey"},
    "sign-up": {"Encrypt"},
    "audit": {"LookupEvents"},
    "sealing": {"Encrypt", "Decrypt", "DescribeKey"},
    "read-only": {"DescribeKey", "GetKeyRotationStatus"},
}


@pytest.mark.parametrize("role", policies.ROLES)
def test_no_role_has_more_than_it_needs(site: Callable[..., None], role: str) -> None:
    found = statements(role)
    if role in ALLOWED:
        assert actions(role) == ALLOWED[role]
    assert not actions(role) & {"PutKeyPolicy", "CreateGrant", "DeleteAlias", "ListKeys"}
    known = {*OPERATIONS.values(), "ReEncryptFrom", "ReEncryptTo", "TagResource"}
    assert actions(role) <= known | {"LookupEvents"}
    for each in found.values():
        # Whoever uses a key says what for; only what knows no key is about all.
        used = {action.partition(":")[2] for action in each["Action"]}
        if used & (USES | {"ReEncryptFrom", "ReEncryptTo"}):
            assert each["Condition"]["StringEquals"]
        if each["Resource"] == "*":
            assert used <= {"CreateKey", "LookupEvents"}
        elif each["Sid"] != "TagNewKeys":
            assert set(each["Resource"]) <= {ARN, OLD, ALIAS}


MAC = ARN.replace("1234abcd", "3234abcd")
SEALS = ARN.replace("1234abcd", "4234abcd")
NOW_SEALS = ARN.replace("1234abcd", "5234abcd")
OTHER_MAC = ARN.replace("1234abcd", "8234abcd")


def test_the_uses_of_each_mode(site: Callable[..., None]) -> None:
    site(MODE="envelope")
    found = statements("web")
    assert "RewrapPasswords" not in found  # data keys are the command's
    for each, role in ((found["OpenPasswords"], "web"), (statements("rotation"), "rotation")):
        condition = each if role == "web" else each["RewrapPasswords"]
        equal = condition["Condition"]["StringEquals"]
        assert equal["kms:EncryptionContext:use"] == ["data-key", "status"]
    site(MODE="mac_in_direct", MAC_KEY=MAC)
    found = statements("web")
    equal = found["OpenPasswords"]["Condition"]["StringEquals"]
    assert equal["kms:EncryptionContext:use"] == ["password-mac", "status"]
    assert found["MakeMacs"]["Action"] == ["kms:GenerateMac"]
    assert found["MakeMacs"]["Resource"] == [MAC]
    assert "MakeMacs" in statements("sign-up")
    assert MAC not in found["OpenPasswords"]["Resource"]
    assert "MakeMacs" in statements("web", "key")


def test_a_sign_up_tier_with_the_public_key_needs_nothing(site: Callable[..., None]) -> None:
    site(MODE="public_key", KEY=ARN, PUBLIC_KEY="PEM")
    assert statements("sign-up") == {}


def test_sealing_by_keys_of_its_own(site: Callable[..., None]) -> None:
    now = timezone.now()
    history.record_key(SEALS, now)  # it has sealed before
    site(AUDIT_SEAL_KEY=SEALS, AUDIT_CONTEXT_KEY=OLD)
    found = statements("sealing")
    assert found["SealAudit"]["Action"] == ["kms:GenerateMac"]
    assert found["SealAudit"]["Resource"] == [SEALS]
    assert found["AnchorAudit"]["Resource"] == [OLD]
    assert found["DescribeKeys"]["Resource"] == [OLD, ARN]
    assert found["AnchorAudit"]["Condition"]["StringEquals"]["kms:EncryptionContext:use"] == [
        "audit-seal",
        "audit-pruning",
    ]
    assert SEALS not in statements("web")["OpenPasswords"]["Resource"]


def resources(role: str) -> set[str]:
    found = [each["Resource"] for each in statements(role).values() if each["Resource"] != "*"]
    return {arn for each in found for arn in each}


@pytest.mark.parametrize("changes", [{}, {"PREVIOUS_KEYS": [SEALS]}])
@pytest.mark.parametrize("mode", ["direct", "mac", "mac_in_direct"])
def test_no_key_that_ever_sealed_the_audit_is_anybody_elses(
    site: Callable[..., None], mode: str, changes: dict[str, Any]
) -> None:
    now = timezone.now()
    for arn in (SEALS, NOW_SEALS):
        key = history.record_key(arn, now)
        history.record_alias("alias/seals", key, now, moved=True)
    site(MODE=mode, MAC_KEY=MAC, AUDIT_SEAL_KEY="alias/seals", AUDIT_CONTEXT_KEY=OLD, **changes)
    for role in ("web", "sign-up", "rotation"):
        assert not resources(role) & {SEALS, NOW_SEALS}
    assert statements("sealing")["SealAudit"]["Resource"] == [NOW_SEALS]


def test_a_key_that_sealed_the_audit_by_its_arn_is_told_by_the_events(
    site: Callable[..., None],
) -> None:
    now = timezone.now()
    sealed = Event(now, "GenerateMac", "seal", SUCCESS, requested_key=SEALS, key=SEALS)
    store.write([sealed])
    site(MODE="mac", AUDIT_SEAL_KEY=NOW_SEALS, PREVIOUS_KEYS=[SEALS])
    assert SEALS not in resources("web")


def test_former_keys_of_macs(site: Callable[..., None]) -> None:
    now = timezone.now()
    needed, forged = (MAC.replace("3234abcd", f"{digit}234abcd") for digit in (6, 7))
    for arn in (OTHER_MAC, MAC):
        history.record_alias("alias/macs", history.record_key(arn, now), now, moved=True)
    history.record_key(needed, now)
    history.record_key(SEALS, now)
    for arn in (needed, forged, SEALS, OLD):
        refs = f"{key_ref(ARN)}.{key_ref(arn)}"
        User.objects.create(username=arn, password=f"kms_argon2$n1${refs}$v$0")
    User.objects.create(username="old", password=f"kms_argon2$d1${key_ref(OLD)}$v$0")
    site(MODE="mac_in_direct", MAC_KEY="alias/macs", AUDIT_SEAL_KEY=SEALS)
    assert set(policies.site().mac_keys) == {MAC, OTHER_MAC, needed}
    assert policies.site().mac_keys[0] == MAC
    assert set(policies.site().keys) == {ARN, OLD}
    assert statements("rotation")["DescribeMacKeys"]["Resource"][0] == MAC


@pytest.mark.parametrize(
    ("mode", "action"),
    [
        ("direct", "kms:Encrypt"),
        ("envelope", "kms:GenerateDataKey"),
        ("mac", "kms:GenerateMac"),
        ("public_key", "kms:GetPublicKey"),
        ("mac_in_direct", "kms:Encrypt"),
    ],
)
def test_a_rotation_seals_as_well(site: Callable[..., None], mode: str, action: str) -> None:
    site(MODE=mode, MAC_KEY=MAC)
    found, web = statements("rotation"), statements("web")
    assert found["SealPasswords"] == web["SealPasswords"]
    assert found["SealPasswords"]["Action"] == [action]
    assert ("MakeMacs" in found) == (mode == "mac_in_direct")


@pytest.mark.parametrize("mode", ["mac", "public_key"])
def test_a_key_that_is_not_symmetric_anchors_no_seal(
    site: Callable[..., None], mode: str
) -> None:
    site(MODE=mode, AUDIT_SEAL_KEY=SEALS)
    assert set(statements("sealing")) == {"SealAudit"}
    site(AUDIT_CONTEXT_KEY=OLD)
    assert set(statements("sealing")) == {"SealAudit", "AnchorAudit", "DescribeKeys"}


def test_only_a_rotation_manages_keys(site: Callable[..., None]) -> None:
    managing = {"CreateKey", "UpdateAlias", "DisableKey", "ScheduleKeyDeletion"}
    assert managing < actions("rotation")
    for role in set(policies.ROLES) - {"rotation"}:
        assert not actions(role) & managing
    assert statements("rotation")["MoveAlias"]["Resource"] == [ALIAS, ARN, OLD]
    assert set(statements("rotation")["DeleteKeys"]["Action"]) == {
        "kms:ScheduleKeyDeletion",
        "kms:CancelKeyDeletion",
    }


@pytest.mark.parametrize("role", policies.ROLES)
def test_a_keys_own_policy_is_about_that_key(site: Callable[..., None], role: str) -> None:
    found = statements(role, "key")
    for sid, each in found.items():
        assert each["Resource"] == "*"
        assert each["Principal"] == {"AWS": f"arn:aws:iam::{ACCOUNT}:role/django-{role}"}
        assert each.get("Condition") == statements(role)[sid].get("Condition")
    assert not {"MakeKeys", "TagNewKeys", "LookUpCalls"} & set(found)
    named = policies.policy(role, "arn:aws:iam::444455556666:role/web")["key"]["Statement"]
    assert all(each["Principal"]["AWS"].endswith("role/web") for each in named)


def test_replicas_and_keys_left_behind(site: Callable[..., None]) -> None:
    multi = f"arn:aws:kms:{REGION}:{ACCOUNT}:key/mrk-{'ab' * 16}"
    elsewhere = ARN.replace(ACCOUNT, "999988887777")
    site(KEY=multi, FALLBACK_REGIONS=["us-east-1"], PREVIOUS_KEYS=[elsewhere])
    keys = policies.site().keys
    assert keys[0] == multi
    assert set(keys) == {multi, multi.replace(REGION, "us-east-1"), ARN, OLD, elsewhere}
    assert "kms:RequestAlias" not in json.dumps(policies.policy("web"))
    assert "UpdateAlias" not in actions("rotation")


def test_other_partitions(configure: Callable[..., None]) -> None:
    configure(KEY=ARN.replace("arn:aws:", "arn:aws-us-gov:"))
    assert policies.policy("web")["key"]["Statement"][0]["Principal"]["AWS"].startswith(
        "arn:aws-us-gov:iam::"
    )


def test_kms_is_asked_where_nobody_knows_the_key(key_arn: str) -> None:
    assert policies.site().keys[0] == key_arn
    assert policies.site().alias == str(Arn.parse(key_arn)._replace(resource="alias/tests"))


def test_a_role_that_there_is_not() -> None:
    with pytest.raises(ConfigurationError, match="sign-up"):
        policies.policy("root")


def test_the_command_writes_json(site: Callable[..., None]) -> None:
    out = io.StringIO()
    call_command("kms_status", "--policy", "web", "--principal", "arn:x", stdout=out)
    told = json.loads(out.getvalue())
    assert told == policies.policy("web", "arn:x")
    with pytest.raises(CommandError):
        call_command("kms_status", "--policy", "root", stdout=out)


def test_what_the_status_tries_is_allowed(
    configure: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kms_hasher.rotation import status
    from kms_hasher.testing import InMemoryProvider

    configure(DEPLOYMENT="shop")
    make_password("secret")
    contexts = []
    encrypt = InMemoryProvider.encrypt

    def spy(self: Any, key: str, plaintext: bytes, context: Any, **kwargs: Any) -> Any:
        contexts.append(dict(context))
        return encrypt(self, key, plaintext, context, **kwargs)

    monkeypatch.setattr(InMemoryProvider, "encrypt", spy)
    status.look()
    condition = policies.policy("web")["iam"]["Statement"][0]["Condition"]["StringEquals"]
    assert contexts
    for context in contexts:
        for name, value in context.items():
            allowed = condition[f"kms:EncryptionContext:{name}"]
            assert value in ([allowed] if isinstance(allowed, str) else allowed)
