"""
The least that AWS has to allow each part of a site: IAM policies and key policies, to print.

Encryption contexts are conditions, so that a role can open what this site has sealed and no
more, and a key that is shared with something else stays apart. RSA and HMAC keys take no
context; there the algorithm is the condition.
See https://docs.aws.amazon.com/kms/latest/developerguide/conditions-kms.html.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kms_hasher import conf, encoding, history, keyring
from kms_hasher.exceptions import ConfigurationError, MalformedHash
from kms_hasher.models import Key
from kms_hasher.providers.base import HMAC_SHA_256, RSAES_OAEP_SHA_256

Statement = dict[str, Any]

VERSION = "2012-10-17"

UNKNOWN_ROLE = "There is no role {role!r}: choose one of {roles}."
NO_ARN = (
    "The key has no ARN of AWS yet: give KMS_HASHER['KEY'] as an ARN, or let the site call KMS "
    "once."
)

#: What the calls of each mode are that make, open and re-wrap a seal.
SEAL = {"public_key": "kms:GetPublicKey", "envelope": "kms:GenerateDataKey"}
MAC = "kms:GenerateMac"

#: What blobs are for that these roles make and open: `kms_status` tries what is allowed.
USES = ("password", "status")

#: The modes whose keys take no encryption context, and the condition in its place.
ALGORITHMS = {
    "public_key": {"kms:EncryptionAlgorithm": RSAES_OAEP_SHA_256},
    "mac": {"kms:MacAlgorithm": HMAC_SHA_256},
}


@dataclass(frozen=True)
class Site:
    """
    What the policies are about: all keys of the site by ARN, the present one first.

    `alias` is the ARN of the alias, "" if there is none; `mode` and `context` are those of
    the settings.
    """

    keys: tuple[str, ...]
    alias: str
    mode: str
    context: Mapping[str, str]
    rewraps: bool

    @property
    def key(self) -> encoding.ARN:
        return encoding.ARN.parse(self.keys[0])


def site() -> Site:
    """
    Return what the settings and the key history say.

    KMS is asked where the history does not know yet what the alias points to. Raises
    `ConfigurationError` where no ARN of AWS is known, and `KMSError`.
    """
    settings = conf.get()
    present = _present(settings)
    try:
        home = encoding.ARN.parse(present)
    except MalformedHash:
        raise ConfigurationError(NO_ARN) from None
    known = Key.objects.order_by("-last_seen").values_list("arn", flat=True)
    keys = dict.fromkeys([present, *known, *settings.previous_keys])
    for key in list(keys):
        keys.update(dict.fromkeys(settings.replicas(key)))
    alias = settings.alias
    if alias and not alias.startswith("arn:"):
        alias = str(home._replace(resource=alias))
    context = {"application": "kms_hasher"}
    if settings.deployment:
        context["deployment"] = settings.deployment
    return Site(tuple(keys), alias, settings.mode, context, settings.rewrap_on_login)


def _present(settings: conf.Conf) -> str:
    if settings.alias:
        period = history.current_period(settings.alias)
        return (
            period.key.arn
            if period
            else keyring.kms("status").describe_key(settings.key).key_arn
        )
    if settings.home:
        return settings.key
    return keyring.kms("status").describe_key(settings.key).key_arn


def policy(role: str, principal: str = "", of: Site | None = None) -> dict[str, Any]:
    """
    Return the IAM policy and the statements for the key policy of a role, as JSON has them.

    `principal` is the ARN of the IAM role that is to have them. Raises `ConfigurationError`
    for a role that is not in `ROLES`, and what `site` does.
    """
    if role not in ROLES:
        raise ConfigurationError(UNKNOWN_ROLE.format(role=role, roles=", ".join(ROLES)))
    found = of or site()
    key = found.key
    principal = principal or f"arn:{key.partition}:iam::{key.account}:role/django-{role}"
    statements = ROLES[role](found)
    return {
        "role": role,
        "iam": {"Version": VERSION, "Statement": statements},
        "key": {
            "Version": VERSION,
            "Statement": [
                {
                    "Sid": each["Sid"],
                    "Effect": "Allow",
                    "Principal": {"AWS": principal},
                    **{name: each[name] for name in ("Action", "Condition") if name in each},
                    "Resource": "*",  # in a key policy, this key
                }
                for each in statements
                if not set(found.keys).isdisjoint(each["Resource"])
            ],
        },
    }


# --- statements ---------------------------------------------------------------------


def _allow(
    sid: str,
    actions: Sequence[str],
    resources: Sequence[str] | str,
    condition: Mapping[str, Mapping[str, Any]] | None = None,
) -> Statement:
    statement: Statement = {
        "Sid": sid,
        "Effect": "Allow",
        "Action": list(actions),
        "Resource": resources if isinstance(resources, str) else list(resources),
    }
    if condition:
        statement["Condition"] = condition
    return statement


def _sealed(of: Site, *uses: str, alias: bool = False) -> dict[str, dict[str, Any]]:
    """Return the condition that a call is about what this site has sealed for a use."""
    equal: dict[str, Any] = dict(ALGORITHMS.get(of.mode, {}))
    if not equal:
        context = {**of.context, "use": list(uses) if len(uses) > 1 else uses[0]}
        equal = {f"kms:EncryptionContext:{name}": value for name, value in context.items()}
    if alias and of.alias:
        # It is encrypted by the alias alone, so that whoever moves it decides by what.
        equal["kms:RequestAlias"] = encoding.ARN.parse(of.alias).resource
    return {"StringEquals": equal}


def _seal(of: Site) -> Statement:
    if of.mode == "public_key":
        return _allow("SealPasswords", [SEAL["public_key"]], of.keys)
    action = MAC if of.mode == "mac" else SEAL.get(of.mode, "kms:Encrypt")
    # By the alias the present key is meant, whichever it is: a moved alias counts at once.
    return _allow("SealPasswords", [action], of.keys, _sealed(of, *USES, alias=True))


def _open(of: Site) -> Statement:
    action = MAC if of.mode == "mac" else "kms:Decrypt"
    return _allow("OpenPasswords", [action], of.keys, _sealed(of, *USES))


def _rewrap(of: Site) -> list[Statement]:
    if of.mode == "mac":  # it cannot be re-wrapped
        return []
    actions = ["kms:ReEncryptFrom", "kms:ReEncryptTo"]
    return [_allow("RewrapPasswords", actions, of.keys, _sealed(of, *USES))]


def _describe(of: Site) -> Statement:
    return _allow("DescribeKeys", ["kms:DescribeKey"], of.keys)


# --- roles --------------------------------------------------------------------------


def _web(of: Site) -> list[Statement]:
    rewrap = _rewrap(of) if of.rewraps else []
    return [_seal(of), _open(of), *rewrap, _describe(of)]


def _sign_up(of: Site) -> list[Statement]:
    return [_seal(of)]


def _rotation(of: Site) -> list[Statement]:
    key = of.key
    keys = f"arn:{key.partition}:kms:{key.region}:{key.account}:key/*"
    manage = (
        "DescribeKey GetKeyPolicy ListResourceTags GetKeyRotationStatus EnableKeyRotation "
        "RotateKeyOnDemand DisableKey EnableKey"
    )
    statements = [
        *_rewrap(of),
        _open(of),  # for --verify
        _allow("ManageKeys", [f"kms:{name}" for name in manage.split()], of.keys),
        _allow("MakeKeys", ["kms:CreateKey"], "*"),
        _allow("TagNewKeys", ["kms:TagResource"], [keys]),
    ]
    if of.alias:
        actions = ["kms:CreateAlias", "kms:UpdateAlias"]
        statements.append(_allow("MoveAlias", actions, [of.alias, *of.keys]))
    # Apart, to be left out where nobody is to delete keys.
    delete = ["kms:ScheduleKeyDeletion", "kms:CancelKeyDeletion"]
    return [*statements, _allow("DeleteKeys", delete, of.keys)]


def _audit(of: Site) -> list[Statement]:
    del of  # it is told nothing by the keys
    return [_allow("LookUpCalls", ["cloudtrail:LookupEvents"], "*")]


def _sealing(of: Site) -> list[Statement]:
    equal = {"kms:MacAlgorithm": HMAC_SHA_256}
    context = {**of.context, "use": "seal"}
    sealed = {f"kms:EncryptionContext:{name}": value for name, value in context.items()}
    return [
        _allow("SealAudit", [MAC], of.keys, {"StringEquals": equal}),
        _allow("AnchorAudit", ["kms:Encrypt"], of.keys, {"StringEquals": sealed}),
    ]


def _read_only(of: Site) -> list[Statement]:
    return [_allow("LookAtKeys", ["kms:DescribeKey", "kms:GetKeyRotationStatus"], of.keys)]


#: What each part of a site does.
ROLES = {
    "web": _web,
    "sign-up": _sign_up,
    "rotation": _rotation,
    "audit": _audit,
    "sealing": _sealing,
    "read-only": _read_only,
}
