"""
The settings: one dictionary, `settings.KMS_HASHER`, read live.

`get()` validates it and returns a frozen `Conf`, made anew when the setting has changed, so
that Django's `override_settings` works everywhere.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from django.conf import settings

from kms_hasher.encoding import ARN, key_ref
from kms_hasher.exceptions import ConfigurationError, MalformedHash

#: What `AUDIT` may be; see `kms_hasher.audit.recorder`.
AUDIT_MODES = ("durable", "buffered", "inline", "off")


@dataclass(frozen=True)
class Conf:
    """The validated settings. The names are those of `settings.KMS_HASHER`, in lower case."""

    #: Alias name, alias ARN, key id or key ARN that new digests are sealed with.
    key: str = ""
    #: "aws", "local", or the dotted path of a class.
    provider: str = "aws"
    #: How digests are sealed, see `kms_hasher.modes`.
    mode: str = "direct"
    #: In "mac_in_direct": the HMAC key, named as `key` is.
    mac_key: str = ""
    #: In "public_key": the public half of the key that `key` names, in PEM; "" to ask KMS.
    public_key: str = ""
    #: In "envelope": how many passwords a data key seals, and for how many days.
    data_key_users: int = 1000
    data_key_days: int = 90
    #: Seconds for which a process keeps a data key in memory, 0 to ask KMS each time.
    data_key_cache_seconds: float = 0
    #: Handed to the provider as keyword arguments.
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    #: Key ARNs, in accounts or Regions left behind, that may still open digests.
    previous_keys: tuple[str, ...] = ()
    #: Regions that have replicas of multi-Region keys, asked in turn while KMS is out.
    fallback_regions: tuple[str, ...] = ()
    #: Further "app.Model.field" columns that hold hashes, besides the user model's.
    password_fields: tuple[str, ...] = ()
    #: Databases whose password columns are counted and rotated; empty for all that have
    #: the table. Leave read replicas out.
    databases: tuple[str, ...] = ()
    #: Bound into every seal, so that one site's blobs do not open on another's.
    deployment: str = ""
    #: How events are stored: "durable", "buffered", "inline" (for tests), "off" (log lines).
    audit: str = "durable"
    #: Whether a call whose event cannot be stored fails.
    audit_strict: bool = False
    #: Alias, key id or ARN of the HMAC key that seals of the audit are anchored by; may be "".
    audit_seal_key: str = ""
    #: The symmetric key of their anchor in CloudTrail; "" for `KEY`.
    audit_context_key: str = ""
    #: After how many hours without a seal sealing is overdue; 0 for never.
    audit_seal_hours: float = 24
    #: Whether findings are mailed to ADMINS.
    audit_mail_admins: bool = False
    #: Decrypts a minute above which there is a finding; 0 for a bound learned from last week.
    audit_rate_bound: int = 0
    #: Whether a password under an old key is re-wrapped when its user signs in.
    rewrap_on_login: bool = True
    #: Whether sessions and reset links of the stock user model survive re-wrapping.
    stable_sessions: bool = True

    @property
    def home(self) -> ARN | None:
        """Where keys named by id alone are: the parts of `KEY`, if it is an ARN."""
        return ARN.parse(self.key) if self.key.startswith("arn:") else None

    @property
    def alias(self) -> str:
        """The alias that `KEY` names ("alias/..." or its ARN), or "" if it names a key."""
        return _alias(self.key)

    @property
    def mac_alias(self) -> str:
        """The same of `MAC_KEY`."""
        return _alias(self.mac_key)

    def key_for(self, key_id: str) -> str:
        """
        Return how KMS is to be asked for a key id read from a stored value.

        Account and Region come from the settings alone: whoever can write a row can name
        a key id, but never a key in an account of his own.
        """
        for arn in self.previous_keys:
            if arn.endswith(f":key/{key_id}"):
                return arn
        return self.home.with_key(key_id) if self.home else key_id

    def replicas(self, key: str) -> list[str]:
        """
        Return the ARNs of the same alias or multi-Region key in `FALLBACK_REGIONS`.

        A key of one Region has none.
        """
        if not self.fallback_regions or not key.startswith("arn:"):
            return []
        arn = ARN.parse(key)
        if not arn.resource.startswith(("alias/", "key/mrk-")):
            return []
        others = (region for region in self.fallback_regions if region != arn.region)
        return [str(arn._replace(region=region)) for region in others]


def _alias(key: str) -> str:
    name = ARN.parse(key).resource if key.startswith("arn:") else key
    return key if name.startswith("alias/") else ""


#: What the setting was when it was last read, and the `Conf` that came of it.
_last: tuple[object, Conf] | None = None


def get() -> Conf:
    """Return the settings. Raises `ConfigurationError` that says what to change."""
    global _last
    raw = getattr(settings, "KMS_HASHER", {})
    last = _last
    if last is None or last[0] != raw:
        last = _last = copy.deepcopy(raw), _read(raw)
    return last[1]


def _read(raw: object) -> Conf:
    if not isinstance(raw, Mapping):
        raise ConfigurationError("KMS_HASHER must be a dictionary.")
    values: dict[str, Any] = {}
    for name, value in raw.items():
        if name not in _TYPES:
            raise ConfigurationError(f"KMS_HASHER has no setting {name!r}.{_suggestion(name)}")
        wrong_bool = isinstance(value, bool) and bool not in _TYPES[name]
        if not isinstance(value, _TYPES[name]) or wrong_bool:
            expected = " or ".join(kind.__name__ for kind in _TYPES[name])
            raise ConfigurationError(f"KMS_HASHER[{name!r}] must be of type {expected}.")
        values[name.lower()] = tuple(value) if isinstance(value, list) else value
    conf = Conf(**values)
    _validate(conf)
    return conf


_TYPES: dict[str, tuple[type, ...]] = {
    "KEY": (str,),
    "PROVIDER": (str,),
    "MODE": (str,),
    "MAC_KEY": (str,),
    "PUBLIC_KEY": (str,),
    "DATA_KEY_USERS": (int,),
    "DATA_KEY_DAYS": (int,),
    "DATA_KEY_CACHE_SECONDS": (int, float),
    "OPTIONS": (Mapping,),
    "PREVIOUS_KEYS": (list, tuple),
    "FALLBACK_REGIONS": (list, tuple),
    "PASSWORD_FIELDS": (list, tuple),
    "DATABASES": (list, tuple),
    "DEPLOYMENT": (str,),
    "AUDIT": (str,),
    "AUDIT_STRICT": (bool,),
    "AUDIT_SEAL_KEY": (str,),
    "AUDIT_CONTEXT_KEY": (str,),
    "AUDIT_SEAL_HOURS": (int, float),
    "AUDIT_MAIL_ADMINS": (bool,),
    "AUDIT_RATE_BOUND": (int,),
    "REWRAP_ON_LOGIN": (bool,),
    "STABLE_SESSIONS": (bool,),
}


def _suggestion(name: object) -> str:
    import difflib  # for a mistake alone

    close = difflib.get_close_matches(str(name).upper(), _TYPES, n=1)
    return f" Did you mean {close[0]!r}?" if close else f" Known: {', '.join(_TYPES)}."


def _validate(conf: Conf) -> None:
    if not conf.key:
        raise ConfigurationError(
            "KMS_HASHER['KEY'] is missing: give the alias, key id or ARN of the KMS key "
            'that seals passwords, such as "alias/django-passwords".'
        )
    for setting, key in (
        ("KEY", conf.key),
        ("AUDIT_SEAL_KEY", conf.audit_seal_key),
        ("AUDIT_CONTEXT_KEY", conf.audit_context_key),
    ):
        if key and not key.startswith("alias/"):
            _check_key(setting, key)
    for arn in conf.previous_keys:
        if not str(arn).startswith("arn:") or ":key/" not in arn:
            raise ConfigurationError(
                f"KMS_HASHER['PREVIOUS_KEYS'] holds {arn!r}: give full key ARNs "
                "(arn:aws:kms:REGION:ACCOUNT:key/ID); `manage.py kms_status` lists them."
            )
        _check_key("PREVIOUS_KEYS", arn)
    if conf.fallback_regions and not conf.home:
        raise ConfigurationError(
            "KMS_HASHER['FALLBACK_REGIONS'] needs KMS_HASHER['KEY'] as the ARN of a "
            "multi-Region key, or of an alias that each of the Regions has."
        )
    _validate_mode(conf)
    if conf.audit not in AUDIT_MODES:
        raise ConfigurationError(
            f"KMS_HASHER['AUDIT'] is {conf.audit!r}: use one of {', '.join(AUDIT_MODES)}."
        )
    if conf.audit_rate_bound < 0 or isinstance(conf.audit_rate_bound, bool):
        raise ConfigurationError(
            "KMS_HASHER['AUDIT_RATE_BOUND'] must be a number of Decrypts a minute, or 0 to "
            "learn it."
        )
    if not 0 <= conf.audit_seal_hours < float("inf"):
        raise ConfigurationError("KMS_HASHER['AUDIT_SEAL_HOURS'] must be 0 or more hours.")


def _validate_mode(conf: Conf) -> None:
    if conf.mac_key and not conf.mac_key.startswith("alias/"):
        _check_key("MAC_KEY", conf.mac_key)
    if conf.mode == "mac_in_direct" and not conf.mac_key:
        raise ConfigurationError(
            "KMS_HASHER['MODE'] \"mac_in_direct\" needs KMS_HASHER['MAC_KEY']: the alias, key "
            "id or ARN of an HMAC_256 key, beside the symmetric key that KEY names."
        )
    if conf.mode == "mac_in_direct" and not _is_within_reach(conf):
        raise ConfigurationError(
            "KMS_HASHER['MAC_KEY'] is an ARN: stored passwords name the key by its id, and KMS "
            "is asked for it in the account and Region of KMS_HASHER['KEY']. Let KEY be an ARN "
            "of the same account and Region, or list MAC_KEY's key ARN in PREVIOUS_KEYS."
        )
    if conf.mode == "public_key" and conf.public_key and conf.alias:
        raise ConfigurationError(
            "KMS_HASHER['KEY'] names an alias, and KMS_HASHER['PUBLIC_KEY'] is set: what the "
            "alias points to is not known without asking KMS. Let KEY be the id or the ARN of "
            "the key whose public half that is."
        )
    for name in ("data_key_users", "data_key_days"):
        if getattr(conf, name) < 1:
            raise ConfigurationError(f"KMS_HASHER[{name.upper()!r}] must be at least 1.")
    if not 0 <= conf.data_key_cache_seconds < float("inf"):
        raise ConfigurationError(
            "KMS_HASHER['DATA_KEY_CACHE_SECONDS'] must be 0 or more seconds."
        )


def _is_within_reach(conf: Conf) -> bool:
    """Return whether the key of a MAC is found by its id again, as far as the settings tell."""
    if not conf.mac_key.startswith("arn:") or conf.mac_key in conf.previous_keys:
        return True
    mac = ARN.parse(conf.mac_key)
    return conf.home is not None and conf.home._replace(resource=mac.resource) == mac


def _check_key(setting: str, key: str) -> None:
    try:
        resource = ARN.parse(key).resource if key.startswith("arn:") else f"key/{key}"
        if not resource.startswith("alias/"):
            key_ref(resource.removeprefix("key/"))
    except MalformedHash:
        raise ConfigurationError(
            f"KMS_HASHER[{setting!r}] holds {key!r}, which is neither an alias "
            '("alias/name"), a key id nor an ARN of KMS.'
        ) from None
