"""
What a rotation is going to do, found out without changing or recording anything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from django.utils import timezone

from kms_hasher import columns, conf, encoding, history, keyring, modes
from kms_hasher.columns import Column, Group
from kms_hasher.exceptions import KeyNotFound, RotationRefused
from kms_hasher.models import AliasPeriod, Key, RotationRun
from kms_hasher.providers import base
from kms_hasher.rotation import costs, keys, runs
from kms_hasher.rotation.engine import width_of

NO_ALIAS = (
    "{alias} does not exist. `manage.py rotate_kms_key --new-key` makes it and a key behind it."
)
NEEDS_ALIAS = (
    "KEY names the key {key} itself, and only an alias can be moved. Let KEY name an alias "
    "that points to this key; or let it name the other key and run this without --new-key "
    "and --to."
)
NO_SUCH_KEY = "There is no key {key!r} in this account and Region."
NOT_ENABLED = "The key {arn} is {state}; it must be Enabled."
OTHER_KIND = (
    "The key {arn} is {spec} for {usage}; the alias and the stored passwords need {wanted} "
    "for {wanted_usage}."
)
ELSEWHERE = (
    "The key {arn} is in another account or Region than {present}. Let KEY name a key or "
    "alias there, list the present key in PREVIOUS_KEYS, and run this without --to."
)
WRONG_KIND = (
    "The key {arn} is {spec} for {usage}; the mode {mode!r} needs a key that is {wanted} for "
    "{wanted_usage}. Let {setting} name such a key."
)
OTHER_MODE = (
    "KMS_HASHER['MODE'] is {present!r}, so that new passwords are still sealed in that mode. "
    "Set it to {mode!r} first, with the KEY that it needs, and restart the site: sealed "
    "passwords of every mode can be checked under each setting."
)
NO_DATA_KEYS = 'There are no data keys in the mode {mode!r}; they are of the mode "envelope".'
NO_MATERIAL = "Only symmetric keys have key material that can be rotated; use --new-key."
NO_MAC_KEY = "MAC_KEY leads to {key!r}, which does not exist in this account and Region."
MAC_ELSEWHERE = (
    "MAC_KEY leads to {arn}, in another account or Region than KEY: no password sealed with it "
    "could be checked. List this ARN in PREVIOUS_KEYS, or let both be in one place."
)
TOO_NARROW = (
    "{column} holds {width} characters, and values of the mode {mode!r} need up to {needed}: "
    "migrate, or run widen_password_column. Nothing was done."
)

#: Key specs that will do, by the class that a mode needs.
SPECS = {
    "SYMMETRIC": (base.SYMMETRIC_DEFAULT,),
    "RSA": ("RSA_2048", "RSA_3072", "RSA_4096"),
    "HMAC": ("HMAC_256",),
}

MAC = modes.MODES["mac"].code


@dataclass(frozen=True, kw_only=True)
class Plan:
    """
    What is to be done. `present` is where the alias points now, `target` the key that all
    rows are to be under: None where there is none yet.

    `alias` is as in the settings, "" if KEY names a key. `resumes` says that an earlier
    run of the same kind had not come to its end, and its key or material is used; `begun`
    is that run, if no process is at work on it: its row and shards are gone on with.
    `previous` is the ARN the alias pointed to before the present one, or "".
    """

    kind: RotationRun.Kind
    mode: str = "direct"
    alias: str = ""
    present: base.Key | None = None
    target: base.Key | None = None
    resumes: bool = False
    begun: RotationRun | None = None
    previous: str = ""
    #: In the mode `mac_in_direct`: the ref of the key that MAC_KEY leads to.
    mac_ref: str = ""
    #: Refs of keys that earlier runs into the same mode have left, or were to leave.
    former: frozenset[str] = frozenset()
    counts: Mapping[Column, Counter[Group]] = field(default_factory=dict)

    @property
    def moves_alias(self) -> bool:
        return bool(self.alias) and (
            not self.target or not self.present or self.target.key_arn != self.present.key_arn
        )

    @property
    def total(self) -> int:
        """How many rows are to be re-wrapped: calls to KMS, if none is tried again."""
        return sum(self.rows_by_ref().values())

    def rows_by_ref(self) -> Counter[str]:
        """Return how many rows are to be re-wrapped, by the ref of the key they are under."""
        return sum(self.rows_by_column().values(), Counter())

    def rows_by_column(self) -> dict[Column, Counter[str]]:
        """Return the same for each column."""
        found = {}
        for column, counted in self.counts.items():
            rows = found[column] = Counter[str]()
            for group, number in counted.items():
                if self._is_meant(group):
                    rows[group.key_ref] += number
        return found

    def _is_meant(self, group: Group) -> bool:
        if not group.is_sealed:
            return False
        if self.kind == RotationRun.Kind.NEW_DATA_KEYS:
            return group.is_password and modes.by_name(self.mode).code == group.mode
        if self.kind == RotationRun.Kind.TO_MODE:
            return group.is_password and modes.converts(group.mode, self.mode)
        if not modes.rewraps(group.mode, self.spec):
            return False
        target = encoding.key_ref(self.target.key_id) if self.target else None
        return self.kind == RotationRun.Kind.NEW_MATERIAL or group.key_ref != target

    @property
    def calls(self) -> Counter[str]:
        """How many calls of which operation of KMS that makes, if none is made again."""
        if self.rewraps:
            return +Counter(ReEncrypt=self.total)
        if self.kind == RotationRun.Kind.NEW_DATA_KEYS:
            return costs.renewing(self.total)
        rows: Counter[str] = Counter()
        for counted in self.counts.values():
            for group, number in counted.items():
                if self._is_meant(group):
                    rows[modes.name_of(group.mode)] += number
        moves = (costs.moving(name, self.mode, number) for name, number in rows.items())
        return sum(moves, Counter())

    @property
    def rewraps(self) -> bool:
        """Whether KMS does it by ReEncrypt; else what is sealed is opened and sealed again."""
        kinds = (RotationRun.Kind.TO_MODE, RotationRun.Kind.NEW_DATA_KEYS)
        return self.kind not in kinds

    @property
    def spec(self) -> str:
        """The spec of the key that rows come under."""
        known = self.target or self.present
        return known.spec if known else modes.by_name(self.mode).spec

    @property
    def waiting(self) -> int:
        """
        How many passwords no run can move: each moves when its user next signs in, or changes
        it. They hold a MAC made by another key, or are to leave a mode that holds one.
        """
        return sum(number for group, number in self._passwords() if self._waits(group))

    def _waits(self, group: Group) -> bool:
        if modes.name_of(group.mode) != self.mode:
            return modes.is_known(group.mode) and not modes.converts(group.mode, self.mode)
        if group.mac_ref:
            return group.mac_ref != self.mac_ref
        target = encoding.key_ref(self.target.key_id) if self.target else None
        return group.mode == MAC and group.key_ref != target

    @property
    def elsewhere(self) -> int:
        """How many passwords are in other modes, from which a run can move them."""
        passwords = self._passwords()
        return sum(n for group, n in passwords if modes.converts(group.mode, self.mode))

    def _passwords(self) -> Iterator[tuple[Group, int]]:
        for counted in self.counts.values():
            yield from ((each, n) for each, n in counted.items() if each.is_password)

    def old_refs(self) -> set[str]:
        """Return the refs of keys the alias has left or is to leave."""
        arns = {self.previous}
        if self.moves_alias and self.present:
            arns.add(self.present.key_arn)
        refs = {encoding.key_ref(arn) for arn in arns if arn} | self.former
        if self.kind == RotationRun.Kind.TO_MODE:
            refs |= self.refs_of_other_modes()
        kept = {encoding.key_ref(self.target.key_id)} if self.target else set()
        return refs - kept - {self.mac_ref}

    def refs_of_other_modes(self) -> set[str]:
        """
        Return the refs of the keys that rows need which are not in the mode of the plan.

        Those that KMS has answered with alone: a forged row may name any key of the account,
        which nobody is to disable for that.
        """
        mode, refs = modes.by_name(self.mode), set[str]()
        for counted in self.counts.values():
            for group in counted:
                if group.is_password and group.mode != mode.code and modes.is_known(group.mode):
                    kept = {group.mac_ref or group.key_ref} if mode.core == "mac" else set()
                    moved_with_mac = modes.by_code(group.mode).core == "mac"
                    refs |= {group.key_ref, group.mac_ref} - (kept if moved_with_mac else set())
                elif group.algorithm == encoding.DATA_KEY and mode.names_key:
                    refs.add(group.key_ref)
        return set(Key.objects.filter(ref__in=refs).values_list("ref", flat=True))


def make(
    *,
    new_key: bool = False,
    to: str = "",
    new_material: bool = False,
    to_mode: str = "",
    new_data_keys: bool = False,
) -> Plan:
    """
    Return the plan for at most one of the wishes; for none, re-wrap to the present key.

    `to` is a key id, a key ARN or an alias, `to_mode` the mode that the settings name. Raises
    `RotationRefused` if it cannot be done as asked, and `KMSError`.
    """
    settings = conf.get()
    mode = modes.by_name(settings.mode)
    if to_mode and to_mode != settings.mode:
        raise RotationRefused(OTHER_MODE.format(mode=to_mode, present=settings.mode))
    if new_data_keys and mode.names_key:
        raise RotationRefused(NO_DATA_KEYS.format(mode=settings.mode))
    if not settings.alias and (new_key or to):
        raise RotationRefused(NEEDS_ALIAS.format(key=settings.key))
    present = _present(settings)
    if present is None and not (new_key or to):
        missing = NO_ALIAS if settings.alias else NO_SUCH_KEY
        raise RotationRefused(missing.format(alias=settings.key, key=settings.key))
    if to_mode or new_data_keys:
        kind = RotationRun.Kind.TO_MODE if to_mode else RotationRun.Kind.NEW_DATA_KEYS
        target, resumes = present, False
    else:
        kind, target, resumes = _target(settings, present, new_key, to, new_material)
    if target is not None:
        _check(target, present)
    if like := target or present:
        check_mode(like, settings.mode)
    keys.check_public_half()
    mac = mac_key(settings, target or present)
    if to_mode:
        _check_widths(to_mode)
    previous = history.previous_key(settings.alias) if settings.alias else None
    begun = runs.unfinished(kind, settings.alias)
    if begun and begun.key and (not target or begun.key.arn != target.key_arn):
        begun = None
    if begun and begun.plan.get("mode", settings.mode) != settings.mode:
        begun = None  # its cursors have passed rows that are to be moved now
    return Plan(
        kind=kind,
        mode=settings.mode,
        alias=settings.alias,
        present=present,
        target=target,
        resumes=resumes,
        begun=begun if begun and not runs.is_live(begun) else None,
        previous=previous.arn if previous else "",
        mac_ref=encoding.key_ref(mac.key_id) if mac else "",
        former=_former(to_mode) if to_mode else frozenset(),
        counts={column: columns.count(column) for column in columns.columns()},
    )


def _present(settings: conf.Conf) -> base.Key | None:
    kms = keyring.kms("rotate")
    try:
        answer = kms.describe_key(settings.key)
    except KeyNotFound:
        return None
    period = history.current_period(settings.alias) if settings.alias else None
    if period and period.key.arn != answer.key_arn:
        since = timezone.now() - history.ALIAS_LAG
        left = AliasPeriod.objects.filter(
            alias=settings.alias, key__arn=answer.key_arn, until__gt=since
        )
        if left.exists():  # KMS answers late with a key that the alias has just left
            return kms.describe_key(period.key.arn)
    return answer


def _target(
    settings: conf.Conf, present: base.Key | None, new_key: bool, to: str, new_material: bool
) -> tuple[RotationRun.Kind, base.Key | None, bool]:
    kms = keyring.kms("rotate")
    if to:
        try:
            return RotationRun.Kind.TO_KEY, kms.describe_key(to), False
        except KeyNotFound:
            raise RotationRefused(NO_SUCH_KEY.format(key=to)) from None
    if new_key:
        begun = runs.unfinished(RotationRun.Kind.NEW_KEY, settings.alias)
        if begun and begun.key:
            arns = {key.arn for key in (begun.key, begun.previous_key) if key}
            if not begun.previous_key or (present and present.key_arn in arns):
                return RotationRun.Kind.NEW_KEY, kms.describe_key(begun.key.arn), True
        return RotationRun.Kind.NEW_KEY, None, False
    if new_material:
        if present and present.spec != base.SYMMETRIC_DEFAULT:
            raise RotationRefused(NO_MATERIAL)
        begun = runs.unfinished(RotationRun.Kind.NEW_MATERIAL, settings.alias)
        resumes = bool(begun and begun.key and present and begun.key.arn == present.key_arn)
        return RotationRun.Kind.NEW_MATERIAL, present, resumes
    return RotationRun.Kind.REWRAP, present, False


def _check(target: base.Key, present: base.Key | None) -> None:
    if target.state != "Enabled":
        raise RotationRefused(NOT_ENABLED.format(arn=target.key_arn, state=target.state))
    spec, usage = (present.spec, present.usage) if present else (target.spec, target.usage)
    if (_class(target.spec), target.usage) != (_class(spec), usage):
        raise RotationRefused(
            OTHER_KIND.format(
                arn=target.key_arn,
                spec=target.spec,
                usage=target.usage,
                wanted=spec,
                wanted_usage=usage,
            )
        )
    if present and not keys.is_beside(target.key_arn, present.key_arn):
        raise RotationRefused(ELSEWHERE.format(arn=target.key_arn, present=present.key_arn))


def check_mode(target: base.Key, name: str) -> None:
    """Raise `RotationRefused` if passwords of the mode cannot be sealed by such a key."""
    mode = modes.by_name(name)
    _check_kind(target, mode.spec, mode.usage, name, "KEY")


def _check_kind(key: base.Key, wanted: str, usage: str, mode: str, setting: str) -> None:
    specs = SPECS[wanted]
    if key.spec not in specs or key.usage != usage:
        raise RotationRefused(
            WRONG_KIND.format(
                arn=key.key_arn,
                spec=key.spec,
                usage=key.usage,
                mode=mode,
                wanted=" or ".join(specs),
                wanted_usage=usage,
                setting=setting,
            )
        )


def mac_key(settings: conf.Conf, present: base.Key | None) -> base.Key | None:
    """
    Return the key that MAC_KEY leads to, where the mode has one. `present` is the key that
    KEY leads to, if that is known.

    Raises `RotationRefused` if it is not fit for that, and `KMSError`.
    """
    if settings.mode != "mac_in_direct":
        return None
    try:
        key = keyring.kms("rotate").describe_key(settings.mac_key)
    except KeyNotFound:
        raise RotationRefused(NO_MAC_KEY.format(key=settings.mac_key)) from None
    if key.state != "Enabled":
        raise RotationRefused(NOT_ENABLED.format(arn=key.key_arn, state=key.state))
    mac = modes.by_name("mac")
    _check_kind(key, mac.spec, mac.usage, settings.mode, "MAC_KEY")
    beside = not present or keys.is_beside(key.key_arn, present.key_arn)
    if not beside and key.key_arn not in settings.previous_keys:
        raise RotationRefused(MAC_ELSEWHERE.format(arn=key.key_arn))
    return key


def _check_widths(mode: str) -> None:
    """Raise `RotationRefused` before KMS is asked for values that no column could hold."""
    needed = modes.width(mode)
    for column in columns.columns():
        width = width_of(column)
        if width is not None and width < needed:
            text = TOO_NARROW.format(column=column, width=width, needed=needed, mode=mode)
            raise RotationRefused(text)


def _former(mode: str) -> frozenset[str]:
    """Return the refs of keys that earlier runs into the mode have noted as left."""
    plans = RotationRun.objects.filter(kind=RotationRun.Kind.TO_MODE).values_list("plan")
    found = (plan.get("old", ()) for (plan,) in plans if plan.get("mode") == mode)
    return frozenset(ref for refs in found for ref in refs)


def _class(spec: str) -> str:
    """Return what UpdateAlias compares: SYMMETRIC, RSA, HMAC."""
    return spec.partition("_")[0]
