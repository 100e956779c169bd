"""
What is told of a run: how far it is, who works on it, what it left as it was.

All of it is text made here, in the reader's language, so that a page and the script that keeps
it up to date say the same. Values of rows are nowhere to be had.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from django.db.models import Case, Count, F, Q, Sum, Value, When
from django.utils import formats, timezone
from django.utils.translation import gettext, ngettext
from django.utils.translation import gettext_lazy as _

from kms_hasher.admin.base import NONE, ON_PAGE, number, per_cent, time
from kms_hasher.models import RotationRun, RotationShard
from kms_hasher.rotation import runs, shards
from kms_hasher.rotation.runs import SILENCE

State = RotationRun.State

#: States of a run whose figures still change.
UNDER_WAY = (State.RUNNING, State.PAUSED)

#: What people call what is in `RotationRun.plan`.
PLANNED = {
    "batch_size": _("rows read at a time"),
    "concurrency": _("calls at the same time"),
    "rate": _("calls per second at the most"),
    "processes": _("processes"),
    "sleep": _("seconds between two pages of rows"),
    "settle": _("seconds for a moved alias to spread"),
    "statement_timeout": _("seconds for a statement at the most"),
    "replicas": _("read replicas"),
    "max_lag": _("seconds that a replica may be late"),
    "left": _("keys the alias may still lead to"),
    "material": _("key material"),
    "spec": _("key spec"),
    "mode": _("mode"),
    "old": _("keys that are left"),
    "data_keys_up_to": _("data keys that are replaced, up to number"),
}

#: The moment and the calls of an earlier look, as a page hands them back.
_MARK = re.compile(r"(\d{1,12}\.\d{6})-(\d{1,18})\Z", re.ASCII)


@dataclass(frozen=True)
class Sums:
    """What the shards of a run come to: those of its present sweep, but for `bad_before`."""

    rows: int = 0
    shards: int = 0
    done: int = 0
    bad_now: int = 0
    bad_before: int = 0


def sums_of(among: Iterable[RotationRun]) -> dict[int, Sums]:
    """Return the sums of the runs that have shards, by the runs' keys, from one query."""
    present = Q(sweep=F("run__sweep"))
    done = present & Q(state=RotationShard.State.DONE)
    # Not "sweep - 1", which MySQL refuses for an unsigned 0.
    latest = RotationShard.objects.annotate(next=F("sweep") + 1).filter(
        run__in=[run.pk for run in among], next__gte=F("run__sweep")
    )
    sums = latest.order_by().values("run")
    sums = sums.annotate(
        rows=Sum("looked", filter=present, default=0),
        shards=Count("pk", filter=present),
        done=Count("pk", filter=done),
        bad_now=Sum("failed", filter=present, default=0),
        bad_before=Sum("failed", filter=~present, default=0),
    )
    names = ("rows", "shards", "done", "bad_now", "bad_before")
    return {run: Sums(*each) for run, *each in sums.values_list("run", *names)}


def share(run: RotationRun, sums: Sums) -> float:
    """Return how much of its present sweep a run has done, from 0 to 1."""
    if run.state == State.FINISHED:
        return 1.0
    if run.sweep == 1 and run.total:
        return min(sums.rows / run.total, 1.0)
    return sums.done / sums.shards if sums.shards else 0.0


def progress(run: RotationRun, sums: Sums) -> str:
    """Return the same in words."""
    if not run.sweep:
        return gettext("No sweep was needed.") if run.state == State.FINISHED else NONE
    values = {
        "sweep": number(run.sweep),
        "rows": number(sums.rows),
        "total": number(run.total),
        "done": number(sums.done),
        "shards": number(sums.shards),
    }
    if run.sweep == 1:
        text = gettext(
            "Sweep 1: %(rows)s of %(total)s rows, %(done)s of %(shards)s shards done"
        )
    else:  # nobody knows how many rows were changed meanwhile
        text = gettext("Sweep %(sweep)s: %(rows)s rows, %(done)s of %(shards)s shards done")
    return text % values


def percent(part: float) -> str:
    """Return a part as per cent. It is 100 of them only if it is all."""
    return per_cent(number(int(part * 100)))


def state_of(run: RotationRun) -> str:
    """Return the state for people: a killed command leaves "running" behind."""
    if run.state == State.RUNNING and timezone.now() - run.updated_at > SILENCE:
        return gettext("interrupted?")
    return str(run.get_state_display())


def duration(run: RotationRun) -> str:
    """Return the time from the start to the end, or to the last sign of life."""
    return _span(_seconds(run))


def mark(run: RotationRun) -> str:
    """Return what is to be handed to `measured` at the next look."""
    return f"{run.updated_at.timestamp():.6f}-{run.calls}"


def measured(run: RotationRun, since: str) -> float | None:
    """Return the calls per second since a mark, or None where that cannot be told."""
    if not (found := _MARK.match(since)):
        return None
    seconds, calls = run.updated_at.timestamp() - float(found[1]), run.calls - int(found[2])
    return calls / seconds if seconds > 0 and calls >= 0 else None


def rate(run: RotationRun, since: str) -> str:
    """Return the present rate if the run is under way, and the mean one if not."""
    if run.state in UNDER_WAY and since:
        now = measured(run, since)
        return NONE if now is None else _per_second(now)
    seconds = _seconds(run)
    if not (run.calls and seconds > 0):
        return NONE
    return gettext("%(rate)s on average") % {"rate": _per_second(run.calls / seconds)}


def time_left(run: RotationRun, sums: Sums, since: str) -> str:
    """
    Return the time that the first sweep still takes at the present rate.

    Nothing is told from the mean rate, which counts the time that the run was interrupted.
    """
    now = measured(run, since)
    if run.state != State.RUNNING or run.sweep != 1 or not now:
        return NONE
    return _span(max(run.total - sums.rows, 0) / now)


def _seconds(run: RotationRun) -> float:
    return float(((run.finished_at or run.updated_at) - run.started_at).total_seconds())


def _span(seconds: float) -> str:
    try:
        span = datetime.timedelta(seconds=round(seconds))
    except OverflowError:
        return NONE
    clock = str(datetime.timedelta(seconds=span.seconds))
    if not span.days:
        return clock
    text = ngettext("%(number)s day, %(time)s", "%(number)s days, %(time)s", abs(span.days))
    return text % {"number": number(span.days), "time": clock}


def _per_second(calls: float) -> str:
    digits = 0 if round(calls, 1) >= 10 else 1
    text = formats.number_format(round(calls, digits), digits, force_grouping=True)
    return gettext("%(number)s calls/s") % {"number": text}


def plan(run: RotationRun) -> list[str]:
    """Return what was planned, one thing to a line."""
    named = dict(run.plan) if isinstance(run.plan, dict) else {"plan": run.plan}
    if isinstance(options := named.pop("options", None), dict):
        named = {**options, **named}
    told = ((PLANNED.get(name, name), _plain(value)) for name, value in named.items())
    return [
        gettext("%(name)s: %(value)s") % {"name": name, "value": value}
        for name, value in told
        if value
    ]


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(filter(None, map(_plain, value)))
    if isinstance(value, bool):
        return gettext("yes") if value else gettext("no")
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return number(int(value))
    if isinstance(value, dict):
        return json.dumps(value) if value else ""
    return "" if value is None else str(formats.localize(value))


def note(run: RotationRun) -> tuple[str, str]:
    """Return what to say of a run that waits for somebody, and the command to give."""
    if run.state in runs.ENDED:
        return "", ""
    if run.state != State.FAILED and runs.is_live(run):
        if run.state == State.PAUSED:
            return gettext("Its process waits to be told to go on."), ""
        return "", ""
    if runs.unfinished(RotationRun.Kind(run.kind), run.alias) == run:
        return gettext("No process conducts it now. This goes on with it:"), runs.command_of(
            run
        )
    return gettext(
        "No process conducts it now, and none will: it had no key yet, or a later run has "
        "taken its place."
    ), ""


def shard_rows(run: RotationRun) -> list[list[str]]:
    """Return the shards of the present sweep as rows of a table, those at work first."""
    states = RotationShard.State
    order = (states.WORKING, states.FAILED, states.WAITING)
    rank = Case(
        *(When(state=state, then=Value(at)) for at, state in enumerate(order)), default=9
    )
    found = run.shards.filter(sweep=run.sweep).order_by(rank, "number")
    return [
        [
            _place(shard),
            _done(shard),
            _state(shard),
            shard.owner or NONE,
            number(shard.looked),
            number(shard.rewritten),
            number(shard.overtaken),
            number(shard.failed),
            number(shard.calls),
            shard.error,
        ]
        for shard in found.defer("bad", "sources")[:ON_PAGE]
    ]


def _place(shard: RotationShard) -> str:
    if shard.database == "default":
        return shard.column
    return f"{shard.column} ({shard.database})"


def _state(shard: RotationShard) -> str:
    working = shard.state == RotationShard.State.WORKING
    if working and shards.is_gone(shard.owner, shard.updated_at):
        return gettext("left by its worker")
    return str(shard.get_state_display())


def _done(shard: RotationShard) -> str:
    """Return how far a shard is: as per cent where its keys are numbers, or by its cursor."""
    if shard.state == RotationShard.State.DONE:
        return percent(1)
    if not shard.cursor:
        return NONE
    try:
        first, last, at = (int(text or 0) for text in (shard.after, shard.upto, shard.cursor))
    except ValueError:
        first, last, at = 0, 0, 0
    if first < last:
        return percent(min(max((at - first) / (last - first), 0), 1))
    return gettext("up to %(key)s") % {"key": _key(shard.cursor)}


def bad_rows(run: RotationRun, sums: Sums) -> list[list[str]]:
    """Return column, primary key and reason of rows left as they are, `ON_PAGE` at most."""
    left = sums.done < sums.shards  # until it is done, the sweep before may tell of more
    sweep = run.sweep - 1 if left and sums.bad_before > sums.bad_now else run.sweep
    named = run.shards.filter(sweep=sweep, failed__gt=0).order_by("number")
    wanted, enough = [], 0
    for pk, failed in named.values_list("pk", "failed")[:ON_PAGE]:
        if enough < ON_PAGE:  # each may name a thousand
            wanted.append(pk)
            enough += failed
    if not wanted:
        return []
    # A shard that was taken up again may name a row twice.
    rows = {
        (_place(shard), _key(pk), str(reason)): None
        for shard in run.shards.filter(pk__in=wanted).order_by("number")
        for pk, reason in shard.bad
    }
    return [list(row) for row in rows][:ON_PAGE]


def _key(text: str) -> str:
    """Return a primary key as people know it."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def live(run: RotationRun, since: str = "") -> dict[str, Any]:
    """Return all that changes while the run is under way. `since` is an earlier mark."""
    sums = sums_of([run]).get(run.pk, Sums())
    text, goes_on = note(run)
    return {
        "on": run.state in UNDER_WAY,
        "mark": mark(run),
        "share": f"{share(run, sums):.4f}",
        "texts": {
            "state": state_of(run),
            "progress": progress(run, sums),
            "percent": percent(share(run, sums)),
            "note": text,
            "command": goes_on,
            "rewritten": number(run.rewritten),
            "overtaken": number(run.overtaken),
            "failed": number(run.failed),
            "calls": number(run.calls),
            "rate": rate(run, since),
            "cap": _per_second(run.rate) if run.rate else NONE,
            "left": time_left(run, sums, since),
            "duration": duration(run),
            "owner": run.owner or NONE,
            "updated": time(run.updated_at),
            "finished": time(run.finished_at) or NONE,
            "error": run.error,
        },
        "shards": shard_rows(run) if sums.shards else [],
        "bad": bad_rows(run, sums) if sums.bad_now or sums.bad_before else [],
    }
