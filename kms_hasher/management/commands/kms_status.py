from __future__ import annotations

import json
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.core.serializers.json import DjangoJSONEncoder

from kms_hasher import policies
from kms_hasher.audit import seals, segments
from kms_hasher.columns import Group
from kms_hasher.exceptions import KMSHasherError
from kms_hasher.management.commands._walk import duration
from kms_hasher.models import in_english
from kms_hasher.rotation import status
from kms_hasher.rotation.status import KeyStatus, Status

SEALING_OVERDUE = "The last seal of the audit was made {age} ago: sealing is overdue."
NEVER_SEALED = "There is no seal of the audit, and AUDIT_SEAL_KEY is set: sealing is overdue."
WRONG = "Something is wrong; problems found: {number}."


class Command(BaseCommand):
    help = (
        "Show the key, what may be done with it, the columns, and which key how many "
        "passwords need. Exit status: 0 all is well, 1 something is wrong."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--no-permissions",
            action="store_false",
            dest="permissions",
            help="Do not try what may be done with the key: some calls to KMS less.",
        )
        parser.add_argument(
            "--json", action="store_true", help="Write one JSON object instead of text."
        )
        parser.add_argument(
            "--policy",
            choices=policies.ROLES,
            metavar="ROLE",
            help="Only write the IAM policy and the statements for the key policy that a part "
            f"of the site needs, as JSON: {', '.join(policies.ROLES)}.",
        )
        parser.add_argument(
            "--principal",
            default="",
            metavar="ARN",
            help="The IAM role that the key policy is to name (default: django-ROLE in the "
            "key's account).",
        )

    def handle(self, **options: Any) -> None:
        try:
            if options["policy"]:
                policy = policies.policy(options["policy"], options["principal"])
                self.stdout.write(json.dumps(policy, indent=2))
                return
            found = status.look(permissions=options["permissions"])
        except KMSHasherError as error:
            if options["json"]:
                self.stdout.write(json.dumps({"ok": False, "problems": [str(error)]}, indent=2))
            raise CommandError(str(error)) from None
        sealing = seals.state()
        if sealing.is_overdue:
            late = SEALING_OVERDUE if sealing.last else NEVER_SEALED
            found.problems.append(late.format(age=_age(sealing)))
        if options["json"]:
            told = {**as_json(found), "sealing": _sealing_as_json(sealing)}
            self.stdout.write(json.dumps(told, indent=2, cls=DjangoJSONEncoder))
        else:
            self._show(found, sealing)
        if found.problems:
            raise CommandError(WRONG.format(number=len(found.problems)))

    def _show(self, found: Status, sealing: seals.State) -> None:
        write = self.stdout.write
        write(f"KEY {found.key}, provider {found.provider}, mode {found.mode}")
        if key := found.described:
            write(f"  key       {key.key_arn}")
            write(f"  state     {key.state}, {key.spec}, {key.usage}")
            if found.fingerprint:
                write(f"  public    SHA-256 {found.fingerprint}")
            if key.key_material_id:
                write(f"  material  {key.key_material_id}")
        if mac := found.mac_key:
            write(f"  MAC key   {mac.key_arn}, {mac.state}, {mac.spec}")
        for operation, answer in found.permissions.items():
            write(f"  {operation:<15} {answer}")
        for arn, since, until in found.moves:
            end = f"until {until:%Y-%m-%d %H:%M}" if until else "until now"
            write(f"  alias     {arn} since {since:%Y-%m-%d %H:%M} {end}")
        for column in found.columns:
            width = f"{column.width} characters" if column.width else "any length"
            write(f"{column.name} ({width})")
            for group, number in sorted(column.rows.items()):
                name = {"!": "unusable", "": "(no hasher)"}.get(
                    group.algorithm, group.algorithm
                )
                where = f" {group.mode} {_named(group)}" if group.mode else ""
                write(f"  {number:>12,}  {name}{where}")
        for needed in found.keys:
            write(f"key {needed.arn or needed.ref}: {needed.state}, {_what(needed)}")
        if pool := found.data_keys:
            oldest = f", the oldest of {pool.oldest:%Y-%m-%d %H:%M}" if pool.oldest else ""
            text = f"{pool.number:,}, {pool.open:,} open{oldest}, {pool.retired:,} retired"
            write(f"data keys: {text}")
        if last := found.last:
            write(
                f"last run: {in_english(last)}, {last.state}, {last.rewritten:,} rewritten, "
                f"{last.failed:,} bad"
            )
        if seal := sealing.last:
            more = "at least " if sealing.unsealed == segments.COUNTED else ""
            write(
                f"last seal: {seal}, {_age(sealing)} ago, root {seal.root}; {more}"
                f"{sealing.unsealed:,} events since"
            )
        for note in found.notes:
            write(f"Note: {note}")
        for problem in found.problems:
            write(self.style.ERROR(f"Problem: {problem}"))


def _named(group: Group) -> str:
    """Return what a group of stored passwords names: keys, or data keys."""
    refs = (ref for ref in (group.key_ref, group.mac_ref) if ref)
    return ".".join(refs) or "(data keys)"


def _what(needed: KeyStatus) -> str:
    """Return what needs a key."""
    numbers = {"data keys": needed.data_keys, "passwords": needed.rows - needed.macs}
    numbers["passwords' MACs"] = needed.macs
    return ", ".join(f"{number:,} {name}" for name, number in numbers.items() if number)


def as_json(found: Status) -> dict[str, Any]:
    """Return the status as what `--json` writes."""
    key, last = found.described, found.last
    return {
        "ok": not found.problems,
        "problems": found.problems,
        "notes": found.notes,
        "key": found.key,
        "provider": found.provider,
        "mode": found.mode,
        "alias": found.alias,
        "key_arn": key.key_arn if key else None,
        "key_state": key.state if key else None,
        "key_spec": key.spec if key else None,
        "key_material_id": key.key_material_id if key else None,
        "fingerprint": found.fingerprint or None,
        "mac_key_arn": found.mac_key.key_arn if found.mac_key else None,
        "mac_key_state": found.mac_key.state if found.mac_key else None,
        "permissions": found.permissions,
        "alias_history": [
            {"key_arn": arn, "since": since, "until": until}
            for arn, since, until in found.moves
        ],
        "columns": [
            {
                "name": column.name,
                "width": column.width,
                "rows": [
                    {**group._asdict(), "number": number}
                    for group, number in sorted(column.rows.items())
                ],
            }
            for column in found.columns
        ],
        "keys": [vars(needed) for needed in found.keys],
        "data_keys": found.data_keys and vars(found.data_keys),
        "last_run": last
        and {
            "kind": last.kind,
            "state": last.state,
            "started_at": last.started_at,
            "finished_at": last.finished_at,
            "started_by": last.started_by,
            "rewritten": last.rewritten,
            "overtaken": last.overtaken,
            "failed": last.failed,
            "error": last.error,
        },
    }


def _age(sealing: seals.State) -> str:
    return duration(sealing.age.total_seconds()) if sealing.age else ""


def _sealing_as_json(sealing: seals.State) -> dict[str, Any]:
    seal = sealing.last
    return {
        "sequence": seal.sequence if seal else None,
        "sealed_at": seal.sealed_at if seal else None,
        "root": seal.root if seal else None,
        "unsealed": sealing.unsealed,
        "is_overdue": sealing.is_overdue,
    }
