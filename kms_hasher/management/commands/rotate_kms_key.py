from __future__ import annotations

import argparse
from typing import Any

from django.core.management.base import CommandParser

from kms_hasher import conf, data_keys, encoding, modes
from kms_hasher.exceptions import RotationRefused
from kms_hasher.management.commands import _forecast as forecast
from kms_hasher.management.commands._walk import (
    NAMED,
    NOT_CONFIRMED,
    WalkCommand,
    duration,
    enlist_of,
    one_way,
    options_of,
    positive_int,
    seconds,
)
from kms_hasher.models import RotationRun, in_english
from kms_hasher.rotation import costs, keys, plan, rotate, runs, verify
from kms_hasher.rotation.engine import Options
from kms_hasher.rotation.plan import Plan
from kms_hasher.rotation.rotate import Rotated

EPILOG = """\
Examples:
  %(prog)s --dry-run           what would be done
  %(prog)s --new-key           a new key behind the alias, everything re-wrapped
  %(prog)s --to alias/next     the same with a key that exists
  %(prog)s                     re-wrap what is under another key than the alias's
  %(prog)s --plan              how long it takes, what it costs, whether it is allowed
  %(prog)s --processes 4       re-wrap by four processes
  %(prog)s --disable-old       verify, and disable the key the alias has left
  %(prog)s --to-mode envelope  bring what is sealed in other modes into that of the settings
  %(prog)s --new-data-keys     in the mode envelope: seal all anew, under new data keys
  %(prog)s --make-data-keys 50 in the mode envelope: make data keys before they are needed

No password is needed and no session ends, and but for --to-mode and --new-data-keys no digest
leaves KMS. It can be stopped at any instant and run again. Exit status: 0 done, 1 refused or
failed, 3 done but for bad rows.
"""

STEERING = {
    "pause": "Let a run that another process conducts pause: the one there is, or by number.",
    "resume": "Let it go on.",
    "cancel": "End it for good; its rows stay as they are.",
}
NOT_VERIFIED = (
    "{others} rows still need another key or mode, and {bad} could not be opened; no "
    "key was disabled or deleted. Run it again; a row that stays bad needs a new password."
)
DATA_KEY_COLUMN = "kms_hasher.DataKey."
APART = "in other modes, or with a MAC by another key"

WAITING = (
    "{number:,} passwords cannot be moved without the password: what is stored is a MAC, which "
    "gives no digest back. Each moves when its user next signs in or sets a password."
)
NO_REWRAP = (
    "A MAC cannot be re-wrapped, only made anew with the password: the new key is for "
    "passwords that are set, and for users who sign in, from now on. Keep the old key until "
    "kms_status says that none needs it."
)
ELSEWHERE = (
    "{number:,} passwords are sealed in other modes; `manage.py rotate_kms_key --to-mode "
    "{mode}` brings them into this one."
)
QUESTION = "Move {number:,} passwords into it? [y/N] "
DATA_KEYS = (
    "{number:,} retired data keys are named by no stored password. Backups made before need "
    "them: a password in such a backup can be checked only with the rows of its data keys, "
    "which are in the same backup if it is of the whole database.\n"
    "Delete their rows? [y/N] "
)
NOT_LIVE = "No process conducts {run} now; `{command}` goes on with it."

DELETION = (
    "In {days} days KMS deletes the keys below for ever. Backups made before this run need "
    "them: from then on no password in such a backup can be checked.\n{arns}\n"
    "Schedule their deletion once no stored password needs them? [y/N] "
)


class Command(WalkCommand):
    help = (
        "Bring all stored passwords under the KMS key that KEY leads to, or under a new one, "
        "by ReEncrypt and without any password."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        super().add_arguments(parser)
        parser.epilog = EPILOG
        target = parser.add_mutually_exclusive_group()
        target.add_argument(
            "--new-key",
            action="store_true",
            help="Make a key like the present one and move the alias to it first. Makes key "
            "and alias if there is no alias yet.",
        )
        target.add_argument(
            "--to",
            default="",
            metavar="KEY",
            help="Move the alias to this key first: a key id, an ARN or another alias.",
        )
        target.add_argument(
            "--new-material",
            action="store_true",
            help="Rotate the key's material on demand and re-wrap under the same ARN.",
        )
        target.add_argument(
            "--to-mode",
            choices=modes.MODES,
            help="Bring what is sealed in other modes into this one, which must be that of the "
            "settings. Each digest is opened, in the memory of this process, and sealed again; "
            "--dry-run tells the calls that it takes.",
        )
        target.add_argument(
            "--new-data-keys",
            action="store_true",
            help="In the mode envelope: seal every password again, under new data keys.",
        )
        target.add_argument(
            "--prune-data-keys",
            action="store_true",
            help="Delete the rows of data keys that were retired an hour ago or earlier and "
            "that no stored password names.",
        )
        target.add_argument(
            "--make-data-keys",
            type=positive_int,
            metavar="N",
            help="In the mode envelope: make N data keys in advance, by as many calls of "
            "GenerateDataKey. A pool that is empty fills itself, one at a time.",
        )
        parser.add_argument(
            "--settle",
            type=seconds,
            default=Options.settle,
            metavar="SECONDS",
            help="How long to wait for a moved alias to spread, before the last sweep "
            "(default: %(default)s).",
        )
        old = parser.add_mutually_exclusive_group()
        old.add_argument(
            "--disable-old",
            action="store_true",
            help="Afterwards disable the keys left behind; refused while any row needs one.",
        )
        old.add_argument(
            "--schedule-deletion",
            type=_days,
            metavar="DAYS",
            help="Afterwards schedule their deletion in 7 to 30 days; refused while any row "
            "needs one.",
        )
        parser.add_argument(
            "--plan",
            action="store_true",
            help="As --dry-run, and estimate calls, time, money, quota and disk for these "
            "options, and try by DryRun whether ReEncrypt is allowed. Makes some calls to KMS.",
        )
        parser.add_argument(
            "--verify",
            nargs="?",
            type=_sample,
            const=verify.SAMPLE,
            default=False,
            metavar="N|all",
            help="Afterwards count all rows by key and open N of each column again, or all, "
            "by Decrypt (default: %(const)s; 0 only counts). --disable-old and "
            "--schedule-deletion do so in any case, and do nothing if it fails.",
        )
        for action, text in STEERING.items():
            target.add_argument(
                f"--{action}", nargs="?", type=int, const=0, metavar="RUN", help=text
            )
        parser.add_argument(
            "--noinput",
            "--no-input",
            action="store_false",
            dest="interactive",
            help="Ask nothing.",
        )

    def work(self, **options: Any) -> None:
        for action in STEERING:
            if options[action] is not None:
                self._steer(action, options[action])
                return
        if options["prune_data_keys"]:
            self._prune_data_keys(options["dry_run"], options["interactive"])
            return
        if options["make_data_keys"]:
            self._make_data_keys(options["make_data_keys"], options["dry_run"])
            return
        planned = plan.make(
            new_key=options["new_key"],
            to=options["to"],
            new_material=options["new_material"],
            to_mode=options["to_mode"] or "",
            new_data_keys=options["new_data_keys"],
        )
        days = options["schedule_deletion"]
        self._describe(planned)
        if options["dry_run"] or options["plan"]:
            self.result["dry_run"] = True
            self._tell_what_would_be_done(planned, options["disable_old"], days)
            if options["plan"]:
                forecast.tell(self, planned, options_of(options))
            return
        if options["interactive"]:
            self._confirm(planned, days)
        rotated = self.walk(
            rotate.rotate(planned, options_of(options), enlist=enlist_of(options))
        )
        self._summarise(planned, rotated)
        gives_up = options["disable_old"] or days
        if gives_up or options["verify"] is not False:
            sample = verify.SAMPLE if options["verify"] is False else options["verify"]
            self._verify(planned, rotated, sample, options_of(options))
        if gives_up:
            self._give_up(planned, rotated, days)

    def _steer(self, action: str, run_id: int) -> None:
        run = runs.find(run_id)
        self.result.update(run=run.pk, kind=run.kind)
        name, ended = f"Run {run.pk} ({in_english(run)})", run.state
        if action == "cancel":
            if not runs.cancel(run):
                raise RotationRefused(f"{name} is {ended}; there is nothing to cancel.")
            self.tell(f"{name} is cancelled. Its rows stay as they are, and all of them work.")
        elif not runs.is_live(run):
            raise RotationRefused(NOT_LIVE.format(run=name, command=runs.command_of(run)))
        elif action == "pause":
            if not runs.pause(run):
                raise RotationRefused(f"{name} is {ended}; only a running one can be paused.")
            self.tell(f"{name} pauses once the calls in flight are done.")
        else:
            if not runs.resume(run):
                raise RotationRefused(f"{name} is {ended}; only a paused one can be resumed.")
            self.tell(f"{name} goes on.")

    def _describe(self, planned: Plan) -> None:
        target = planned.target.key_arn if planned.target else None
        self.result.update(
            kind=str(planned.kind),
            alias=planned.alias,
            key=target,
            present_key=planned.present.key_arn if planned.present else None,
            previous_key=planned.previous or None,
            moves_alias=planned.moves_alias,
            resumes=planned.resumes,
            rows=_rows(planned),
            mode=planned.mode,
            waiting=planned.waiting,
            elsewhere=planned.elsewhere,
        )
        name = planned.alias or "KEY"
        present = planned.present.key_arn if planned.present else "nothing yet"
        self.tell(f"{name} points to {present}.")
        if planned.resumes:
            self.tell(
                f"An earlier run had not come to its end; this one goes on with {target}."
            )

    def _tell_what_would_be_done(
        self, planned: Plan, disable_old: bool, days: int | None
    ) -> None:
        would = []
        target = planned.target.key_arn if planned.target else "the new key"
        if not planned.target:
            like = f" like {planned.present.key_arn}" if planned.present else ""
            would.append(f"create a key{like}")
        if planned.kind == RotationRun.Kind.NEW_MATERIAL and not planned.resumes:
            would.append(f"rotate the key material of {target}")
        if planned.moves_alias:
            verb = "move" if planned.present else "create"
            would.append(f"{verb} {planned.alias}, to point to {target}")
        verb = "re-wrap" if planned.rewraps else "open and seal again"
        for place, by_key in _rows(planned).items():
            for key, number in by_key.items():
                noun = "data keys" if place.startswith(DATA_KEY_COLUMN) else "passwords"
                would.append(f"{verb} {number:,} {noun} in {place} from {key} to {target}")
        calls = planned.calls
        would.append(f"make {costs.told(calls)}")
        if disable_old or days:
            verb = f"schedule the deletion, in {days} days, of" if days else "disable"
            would += [f"{verb} {key}, if then no row needs it" for key in _old(planned)]
        self.result.update(calls=calls.total(), operations=calls, would=would)
        for each in would:
            self.tell(f"Would {each}.")
        self._tell_what_is_left(planned)

    def _tell_what_is_left(self, planned: Plan) -> None:
        if planned.mode == "mac" and planned.kind != RotationRun.Kind.TO_MODE:
            self.tell(NO_REWRAP)
        if planned.waiting:
            self.tell(WAITING.format(number=planned.waiting))
        if planned.elsewhere and planned.kind != RotationRun.Kind.TO_MODE:
            self.tell(ELSEWHERE.format(number=planned.elsewhere, mode=planned.mode))

    def _verify(
        self, planned: Plan, rotated: Rotated, sample: int | None, options: Options
    ) -> None:
        to_mode = planned.mode if planned.kind == RotationRun.Kind.TO_MODE else ""
        steps = verify.verify(rotated.target, sample=sample, options=options, to_mode=to_mode)
        *_, found = steps
        self.result["verified"] = {
            "rows": found.under,
            "others": {forecast.key_id(ref): number for ref, number in found.others.items()},
            "apart": found.apart,
            "opened": found.opened,
            "unseen": found.unseen,
            "bad": [str(row) for row in found.bad[:NAMED]],
        }
        self.tell(
            f"Verified: {found.under:,} rows are under {rotated.target.key_arn}, "
            f"{sum(found.others.values()):,} are not; {found.opened:,} were opened again, "
            f"{len(found.bad):,} could not be."
        )
        if found.apart:
            self.tell(f"{found.apart:,} are not for this run: {APART}.")
        if found.unseen:
            self.tell(f"{found.unseen:,} hold a MAC, which cannot be tried without a password.")
        for row in found.bad:
            self.stderr.write(f"Cannot be opened: {row}")
        if not found.is_complete:
            others = sum(found.others.values())
            raise RotationRefused(NOT_VERIFIED.format(others=others, bad=len(found.bad)))

    def _confirm(self, planned: Plan, days: int | None) -> None:
        if days:
            arns = "\n".join(_old(planned)) or "(none is known yet)"
            self._sure(DELETION.format(days=days, arns=arns))
        moves = planned.kind == RotationRun.Kind.TO_MODE and planned.total
        if moves and (warning := one_way(planned.mode)):
            self._sure(f"{warning}\n{QUESTION.format(number=planned.total)}")

    def _sure(self, question: str) -> None:
        if self.ask(question).strip().lower() not in ("y", "yes"):
            raise RotationRefused(NOT_CONFIRMED)

    def _prune_data_keys(self, dry_run: bool, interactive: bool) -> None:
        numbers = data_keys.unneeded()
        self.result.update(kind="prune-data-keys", data_keys=len(numbers))
        if dry_run:
            self.tell(f"Would delete {len(numbers):,} retired data keys that nothing names.")
            return
        if numbers and interactive:
            self._sure(DATA_KEYS.format(number=len(numbers)))
            # Somebody may have thought about it for hours.
            numbers = sorted(set(numbers) & set(data_keys.unneeded()))
        deleted = data_keys.delete(numbers)
        self.result["deleted"] = deleted
        self.tell(f"Deleted {deleted:,} retired data keys that no stored password names.")

    def _make_data_keys(self, number: int, dry_run: bool) -> None:
        settings = conf.get()
        if modes.by_name(settings.mode).names_key:
            raise RotationRefused(plan.NO_DATA_KEYS.format(mode=settings.mode))
        self.result.update(kind="make-data-keys", data_keys=number)
        if dry_run:
            self.tell(f"Would make {number:,} data keys, by as many calls of GenerateDataKey.")
            return
        made = data_keys.prepare(number)
        self.result["made"] = made
        self.tell(
            f"Made {len(made):,} data keys, each for {settings.data_key_users:,} passwords and "
            f"{settings.data_key_days} days."
        )

    def _summarise(self, planned: Plan, rotated: Rotated) -> None:
        done = self.result
        done["key"] = rotated.target.key_arn
        verb = "Re-wrapped" if planned.rewraps else "Moved"
        self.tell(
            f"{verb} {done['rewritten']:,} stored values under {rotated.target.key_arn} in "
            f"{duration(done['seconds'])}: {done['calls']:,} calls of KMS, "
            f"{done['overtaken']:,} overtaken, {done['failed']:,} bad."
        )
        self._tell_what_is_left(planned)

    def _give_up(self, planned: Plan, rotated: Rotated, days: int | None) -> None:
        given_up = keys.give_up(rotated.left, rotated.target, alias=planned.alias, days=days)
        self.result["given_up"] = [
            {"key": key.arn, "state": key.state, "changed": key.changed} for key in given_up
        ]
        for key in given_up:
            verb = "is now" if key.changed else "was already"
            self.tell(f"{key.arn} {verb} {key.state}.")
        if not given_up:
            self.tell("There is no key left behind.")


def _rows(planned: Plan) -> dict[str, dict[str, int]]:
    """Return the rows to be re-wrapped, by column and key id."""
    return {
        str(column): {forecast.key_id(ref): number for ref, number in rows.items()}
        for column, rows in planned.rows_by_column().items()
    }


def _old(planned: Plan) -> list[str]:
    """Return the ids of the keys that will be left behind."""
    target = encoding.key_ref(planned.target.key_id) if planned.target else ""
    refs = planned.old_refs()
    if planned.rewraps:
        refs |= set(planned.rows_by_ref()) - {target}
    return sorted(forecast.key_id(ref) for ref in refs)


def _sample(text: str) -> int | None:
    if text == "all":
        return None
    if (number := int(text)) < 0:
        raise argparse.ArgumentTypeError("must be 0 or more rows, or all")
    return number


def _days(text: str) -> int:
    if not 7 <= (days := int(text)) <= 30:
        raise argparse.ArgumentTypeError("must be 7 to 30 days")
    return days
