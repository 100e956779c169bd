"""
A plan carried out: first the key and the alias, then every row.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

from django.utils import timezone

from kms_hasher import columns, encoding, history, users
from kms_hasher.columns import Column
from kms_hasher.models import Key, Rotation
from kms_hasher.providers import base
from kms_hasher.rotation import engine, jobs, keys, runs
from kms_hasher.rotation.engine import Options, Progress
from kms_hasher.rotation.plan import Plan


@dataclass(frozen=True)
class Rotated:
    """The key that all rows are under now, and the refs of those that they have left."""

    target: base.Key
    left: frozenset[str]


def rotate(
    plan: Plan, options: Options, *, started_by: str = ""
) -> Generator[Progress, None, Rotated]:
    """
    Carry the plan out; yield the progress, at last the final one.

    Stopped anywhere, by an error or by force, every stored password is as good as it was,
    and another run does the rest. Raises `KMSError`, and `RotationRefused` if the alias is
    moved by somebody else meanwhile. Keys are given up by `keys.give_up` afterwards.
    """
    present, before = _record(plan)
    with runs.recorded(
        plan.kind,
        alias=plan.alias,
        previous=present if plan.moves_alias else before,
        started_by=started_by,
    ) as record:
        target = plan.target or keys.make_like(plan.present)
        if plan.kind == Rotation.Kind.NEW_MATERIAL and not plan.resumes:
            target = keys.renew_material(target)
        record.set_key(history.record_key(target.key_arn, timezone.now(), target))
        if plan.moves_alias:
            keys.move_alias(plan.alias, target, plan.present)
        # Where there was no alias, nothing can come late under its former key.
        moves = plan.moves_alias and present is not None
        moved = moves or (plan.resumes and plan.kind == Rotation.Kind.NEW_KEY)
        left = {key.arn for key in (present, before) if key} | {plan.previous}
        kind = jobs.Renew if plan.kind == Rotation.Kind.NEW_MATERIAL else jobs.Rewrap
        job = kind(target, alias=plan.alias, left=frozenset(left))
        yield from engine.walk(
            job, columns_and_widths(), options, record, total=plan.total, settle=moved
        )
    old = plan.old_refs() | job.sources
    return Rotated(target, frozenset(old - {encoding.key_ref(target.key_id)}))


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


def columns_and_widths() -> list[tuple[Column, int | None]]:
    """Return all columns, each with how many characters it is sure to hold, or None."""
    return [(column, width_of(column)) for column in columns.columns()]


def width_of(column: Column) -> int | None:
    """Return the characters that both the field and the real column hold."""
    widths = (column.field.max_length, users.column_width(column))
    return min((width for width in widths if width is not None), default=None)
