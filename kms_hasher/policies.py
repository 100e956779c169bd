"""
The least that AWS has to allow each part of a site: IAM policies and key policies, to print.

Encryption contexts are conditions, so that a role can open what this site has sealed and no
more, and a key that is shared with something else stays apart. RSA and HMAC keys take no
context; there the algorithm is the condition.
See https://docs.aws.amazon.com/kms/latest/developerguide/conditions-kms.html.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kms_hasher import columns, conf, encoding, history, keyring, modes
from kms_hasher.audit.site import key_ref
from kms_hasher.exceptions import ConfigurationError, MalformedHash
from kms_hasher.models import AliasPeriod, AuditHour, Key
from kms_hasher.modes.base import SYMMETRIC
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

#: What blobs are for that these roles make and open, by mode, as their encryption context says
#: it. `kms_status` tries what is allowed.
STATUS = "status"
USES = {"envelope": "data-key", "mac_in_direct": "password-mac"}
PASSWORD = "password"  # noqa: S105  # a use, not a password

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
    the settings. `mac_keys` are those that MAC_KEY leads to in `mac_in_direct`; `seal_key` and
    `context_key` anchor the seals of the audit; either may be "".
    """

    keys: tuple[str, ...]
    mac_keys: tuple[str, ...]
    seal_key: str
    context_key: str
    alias: str
    mode: str
    context: Mapping[str, str]
    rewraps: bool
    has_public_key: bool = False

    @property
    def uses(self) -> tuple[str, str]:
        return USES.get(self.mode, PASSWORD), STATUS

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
    present = _present(settings.key)
    try:
        home = encoding.ARN.parse(present)
    except MalformedHash:
        raise ConfigurationError(NO_ARN) from None
    known = Key.objects.order_by("-last_seen")
    if settings.mode != "mac":
        known = known.exclude(spec__startswith="HMAC")
    if settings.audit_context_key:
        known = known.exclude(arn=_present(settings.audit_context_key))
    apart = _sealing_refs(settings)
    mac_keys = tuple(_mac_keys(settings, apart)) if settings.mode == "mac_in_direct" else ()
    apart.update(map(key_ref, mac_keys))
    listed = [*known.values_list("arn", flat=True), *settings.previous_keys]
    keys = dict.fromkeys([present, *(arn for arn in listed if key_ref(arn) not in apart)])
    for key in list(keys):
        keys.update(dict.fromkeys(settings.replicas(key)))
    # By a key that is not symmetric no seal can be anchored.
    own = settings.key if modes.by_name(settings.mode).spec == SYMMETRIC else ""
    context_key = settings.audit_context_key or own
    alias = settings.alias
    if alias and not alias.startswith("arn:"):
        alias = str(home._replace(resource=alias))
    context = {"application": "kms_hasher"}
    if settings.deployment:
        context["deployment"] = settings.deployment
    return Site(
        keys=tuple(keys),
        mac_keys=mac_keys,
        seal_key=_present(settings.audit_seal_key) if settings.audit_seal_key else "",
        context_key=_present(context_key) if context_key else "",
        alias=alias,
        mode=settings.mode,
        context=context,
        rewraps=settings.rewrap_on_login,
        has_public_key=bool(settings.public_key),
    )


def _behind(name: str) -> list[str]:
    """Return the ARNs of the keys that a setting has ever led to, the present one first."""
    periods = AliasPeriod.objects.filter(alias=name).order_by("-since", "-pk")
    return [_present(name), *periods.values_list("key__arn", flat=True)]


def _sealing_refs(settings: conf.Conf) -> set[str]:
    """
    Return the refs of all keys that MACs of seals were ever made by: whoever may ask for more
    of these can forge the audit.
    """
    made = AuditHour.objects.filter(purpose="seal", operation="GenerateMac")
    refs = set(made.exclude(key_ref="").values_list("key_ref", flat=True).distinct().order_by())
    name = settings.audit_seal_key
    return refs | (set(map(key_ref, _behind(name))) if name else set())


def _mac_keys(settings: conf.Conf, apart: Collection[str]) -> Iterator[str]:
    """Return the keys behind MAC_KEY, and those that MACs of stored passwords need."""
    present, *former = _behind(settings.mac_key)
    counted = [group for column in columns.columns() for group in columns.count(column)]
    # A forged row may name any key: of keys that KMS has answered with, none that opens others.
    refs = {group.mac_ref for group in counted} - {group.key_ref for group in counted}
    needed = Key.objects.filter(ref__in=refs, spec__in=["", "HMAC_256"])
    former += needed.order_by("-last_seen").values_list("arn", flat=True)
    yield from dict.fromkeys([present, *(arn for arn in former if key_ref(arn) not in apart)])


def _present(name: str) -> str:
    """Return the ARN of the key that a setting names, from the history where it knows it."""
    if ":key/" in name:
        return name
    if period := history.current_period(name):
        return period.key.arn
    return keyring.kms("status").describe_key(name).key_arn


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
                if not {
                    *found.keys,
                    *found.mac_keys,
                    found.seal_key,
                    found.context_key,
                }.difference({""}).isdisjoint(each["Resource"])
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


def _seal(of: Site) -> list[Statement]:
    if of.mode == "public_key":
        if of.has_public_key:  # it is in the settings
            return []
        return [_allow("SealPasswords", [SEAL["public_key"]], of.keys)]
    action = MAC if of.mode == "mac" else SEAL.get(of.mode, "kms:Encrypt")
    # By the alias the present key is meant, whichever it is: a moved alias counts at once.
    condition = _sealed(of, *of.uses, alias=True)
    return [_allow("SealPasswords", [action], of.keys, condition), *_macs(of)]


def _open(of: Site) -> Statement:
    action = MAC if of.mode == "mac" else "kms:Decrypt"
    return _allow("OpenPasswords", [action], of.keys, _sealed(of, *of.uses))


def _macs(of: Site) -> list[Statement]:
    """Return what the inner keys of `mac_in_direct` are asked for, at each password."""
    if not of.mac_keys:
        return []
    condition = {"StringEquals": ALGORITHMS["mac"]}
    return [_allow("MakeMacs", [MAC], of.mac_keys, condition)]


def _rewrap(of: Site) -> list[Statement]:
    if of.mode == "mac":  # it cannot be re-wrapped
        return []
    actions = ["kms:ReEncryptFrom", "kms:ReEncryptTo"]
    return [_allow("RewrapPasswords", actions, of.keys, _sealed(of, *of.uses))]


def _describe(of: Site) -> Statement:
    return _allow("DescribeKeys", ["kms:DescribeKey"], of.keys)


# --- roles --------------------------------------------------------------------------


def _web(of: Site) -> list[Statement]:
    # Data keys are re-wrapped by the command alone.
    rewrap = _rewrap(of) if of.rewraps and of.mode != "envelope" else []
    return [*_seal(of), _open(of), *rewrap, _describe(of)]


def _sign_up(of: Site) -> list[Statement]:
    # What seals by a data key has to have it, and so opens what it has sealed.
    return [*_seal(of), _open(of)] if of.mode == "envelope" else _seal(of)


def _rotation(of: Site) -> list[Statement]:
    key = of.key
    keys = f"arn:{key.partition}:kms:{key.region}:{key.account}:key/*"
    manage = (
        "DescribeKey GetKeyPolicy ListResourceTags GetKeyRotationStatus EnableKeyRotation "
        "RotateKeyOnDemand DisableKey EnableKey"
    )
    statements = [
        *_seal(of),  # for wrap_passwords, --to-mode and --new-data-keys
        *_rewrap(of),
        _open(of),  # for --verify
        _allow("ManageKeys", [f"kms:{name}" for name in manage.split()], of.keys),
        _allow("MakeKeys", ["kms:CreateKey"], "*"),
        _allow("TagNewKeys", ["kms:TagResource"], [keys]),
    ]
    if of.mac_keys:
        statements.append(_allow("DescribeMacKeys", ["kms:DescribeKey"], of.mac_keys))
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
    statements = []
    if of.seal_key:
        equal = {"kms:MacAlgorithm": HMAC_SHA_256}
        statements.append(_allow("SealAudit", [MAC], [of.seal_key], {"StringEquals": equal}))
    if not of.context_key:
        return statements
    context = {**of.context, "use": ["audit-seal", "audit-pruning"]}
    sealed = {f"kms:EncryptionContext:{name}": value for name, value in context.items()}
    leading = (of.context_key, of.keys[0])
    actions = ["kms:Encrypt", "kms:Decrypt"]  # it checks the seal that it goes on from
    return [
        *statements,
        _allow("AnchorAudit", actions, [of.context_key], {"StringEquals": sealed}),
        # To tell a key that a forger has named from those that the settings lead to.
        _allow("DescribeKeys", ["kms:DescribeKey"], list(dict.fromkeys(leading))),
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
