"""
What a rotation is going to do, found out without changing or recording anything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from django.utils import timezone

from kms_hasher import columns, conf, encoding, history, keyring
from kms_hasher.columns import Column, Group
from kms_hasher.exceptions import KeyNotFound, RotationRefused
from kms_hasher.models import AliasPeriod, RotationRun
from kms_hasher.providers import base
from kms_hasher.rotation import keys, runs

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
NO_MATERIAL = "Only symmetric keys have key material that can be rotated; use --new-key."


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
    alias: str = ""
    present: base.Key | None = None
    target: base.Key | None = None
    resumes: bool = False
    begun: RotationRun | None = None
    previous: str = ""
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
        target = encoding.key_ref(self.target.key_id) if self.target else None
        renewed = self.kind == RotationRun.Kind.NEW_MATERIAL
        found = {}
        for column, counted in self.counts.items():
            rows = found[column] = Counter[str]()
            for group, number in counted.items():
                sealed = group.algorithm.startswith(encoding.PREFIX)
                if sealed and (renewed or group.key_ref != target):
                    rows[group.key_ref] += number
        return found

    def old_refs(self) -> set[str]:
        """Return the refs of keys the alias has left or is to leave."""
        arns = {self.previous}
        if self.moves_alias and self.present:
            arns.add(self.present.key_arn)
        if self.target:
            arns.discard(self.target.key_arn)
        return {encoding.key_ref(arn) for arn in arns if arn}


def make(*, new_key: bool = False, to: str = "", new_material: bool = False) -> Plan:
    """
    Return the plan for at most one of the three wishes; for none, re-wrap to the present key.

    `to` is a key id, a key ARN or an alias. Raises `RotationRefused` if it cannot be done
    as asked, and `KMSError`.
    """
    settings = conf.get()
    if not settings.alias and (new_key or to):
        raise RotationRefused(NEEDS_ALIAS.format(key=settings.key))
    present = _present(settings)
    if present is None and not (new_key or to):
        missing = NO_ALIAS if settings.alias else NO_SUCH_KEY
        raise RotationRefused(missing.format(alias=settings.key, key=settings.key))
    kind, target, resumes = _target(settings, present, new_key, to, new_material)
    if target is not None:
        _check(target, present)
    previous = history.previous_key(settings.alias) if settings.alias else None
    begun = runs.unfinished(kind, settings.alias)
    if begun and begun.key and (not target or begun.key.arn != target.key_arn):
        begun = None
    return Plan(
        kind=kind,
        alias=settings.alias,
        present=present,
        target=target,
        resumes=resumes,
        begun=begun if begun and not runs.is_live(begun) else None,
        previous=previous.arn if previous else "",
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
    spec, usage = (
        (present.spec, present.usage)
        if present
        else (base.SYMMETRIC_DEFAULT, "ENCRYPT_DECRYPT")
    )
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


def _class(spec: str) -> str:
    """Return what UpdateAlias compares: SYMMETRIC, RSA, HMAC."""
    return spec.partition("_")[0]
