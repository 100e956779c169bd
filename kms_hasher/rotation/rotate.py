"""
A plan carried out: first the key and the alias, then every row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator
from dataclasses import dataclass

from django.utils import timezone

from kms_hasher import conf, data_keys, encoding, history
from kms_hasher.models import Key, RotationRun
from kms_hasher.modes import public_key
from kms_hasher.providers import base
from kms_hasher.rotation import jobs, keys, runs, sweeps
from kms_hasher.rotation.engine import Options
from kms_hasher.rotation.plan import Plan
from kms_hasher.rotation.sweeps import Enlist, Progress

#: Seconds that a call which has the former public key may still take to store what it seals.
SLACK = 5.0


@dataclass(frozen=True)
class Rotated:
    """The key that all rows are under now, and the refs of those that they have left."""

    target: base.Key
    left: frozenset[str]


def rotate(
    plan: Plan, options: Options, *, started_by: str = "", enlist: Enlist = sweeps.here
) -> Generator[Progress, None, Rotated]:
    """
    Carry the plan out; yield the progress, at last the final one.

    Stopped anywhere, by an error or by force, every stored password is as good as it was,
    and another run does the rest. Raises `KMSError`, and `RotationRefused` if the alias is
    moved by somebody else meanwhile. Keys are given up by `keys.give_up` afterwards.
    """
    present, before = _record(plan)
    left = sorted(({key.arn for key in (present, before) if key} | {plan.previous}) - {""})
    with runs.recorded(
        plan.kind,
        alias=plan.alias,
        previous=present if plan.moves_alias else before,
        started_by=started_by,
        begun=plan.begun,
        rate=options.rate,
    ) as record:
        target = plan.target or keys.make_like(plan.present)
        if plan.kind == RotationRun.Kind.NEW_MATERIAL and not plan.resumes:
            target = keys.renew_material(target)
        record.write(
            key=history.record_key(target.key_arn, timezone.now(), target),
            plan=sweeps.plan_of(options, **_plan_of(plan, target, left, record.row)),
        )
        if plan.moves_alias:
            keys.move_alias(plan.alias, target, plan.present)
        # Where there was no alias, nothing can come late under its former key.
        moves = plan.moves_alias and present is not None
        moved = moves or (plan.resumes and plan.kind == RotationRun.Kind.NEW_KEY)
        if plan.total or moved or plan.begun or plan.kind == RotationRun.Kind.NEW_MATERIAL:
            job = jobs.of(record.row)
            if moved and plan.mode == "public_key" and not conf.get().public_key:
                # For so long processes may seal with the public key that they have.
                settle = max(options.settle, public_key.KEPT + SLACK)
                options = dataclasses.replace(options, settle=settle)
            yield from sweeps.conduct(
                record, job, options, total=plan.total, settle=moved, enlist=enlist
            )
        else:  # it was counted a moment ago: nothing is under another key
            yield Progress()
        old = plan.old_refs() | sweeps.sources(record.row)
    return Rotated(target, frozenset(old - {encoding.key_ref(target.key_id)}))


def _plan_of(
    plan: Plan, target: base.Key, left: list[str], run: RotationRun
) -> dict[str, object]:
    found: dict[str, object] = {
        "left": left,
        "material": target.key_material_id,
        "spec": target.spec,
    }
    if plan.kind == RotationRun.Kind.NEW_DATA_KEYS:
        # A run that goes on must not take those for old that it has begun to use.
        before = run.plan.get("data_keys_up_to")
        found["data_keys_up_to"] = data_keys.retire() if before is None else before
    return found


def _record(plan: Plan) -> tuple[Key | None, Key | None]:
    """Record where the alias points; return that key, and the one before it."""
    if plan.present is None:
        return None, None
    now = timezone.now()
    present = history.record_key(plan.present.key_arn, now, plan.present)
    if not plan.alias:
        return present, None
    history.record_alias(plan.alias, present, now)
    return present, history.previous_key(plan.alias)
