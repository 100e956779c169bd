"""What `rotate_kms_key --plan` tells beyond a dry run: time, money, disk, permissions."""

from __future__ import annotations

from kms_hasher import encoding
from kms_hasher.calls import region_of
from kms_hasher.exceptions import MalformedHash, RotationRefused
from kms_hasher.management.commands._walk import WalkCommand, duration
from kms_hasher.rotation import estimate, permissions
from kms_hasher.rotation.engine import Options
from kms_hasher.rotation.plan import Plan

#: Calls in flight that an estimate assumes where the best number is looked for.
ASSUMED = 64

BOUNDS = {
    "rate": "cap",
    "quota": "quota",
    "latency": "latency of KMS with so many calls in flight",
    "cpu": "processors",
}
IS_DENIED = "{operation} is denied: check the IAM policy and the policies of the keys."


def tell(command: WalkCommand, planned: Plan, options: Options) -> None:
    """Tell what it takes at the present latency. Raises `RotationRefused` if it is denied."""
    calls = sum(planned.calls.values())
    if planned.present is None or not (calls or planned.rewraps):
        return
    arn, spec = planned.present.key_arn, planned.present.spec
    latency = estimate.measured_latency(arn)
    taken = estimate.estimate(
        calls,
        latency=latency,
        concurrency=options.concurrency or ASSUMED,
        processes=options.processes,
        rate=options.rate,
        quota=estimate.quota_of(region_of(arn), spec),
        price=estimate.price_of(spec),
    )
    rows = {column: sum(refs.values()) for column, refs in planned.rows_by_column().items()}
    disk = {str(column): estimate.disk(column, number) for column, number in rows.items()}
    operation = "ReEncrypt" if planned.rewraps else "Decrypt"
    allowed = permissions.try_rows(planned)
    sealing = {} if planned.rewraps else permissions.Trial(arn, "rotate").run().answers
    command.result["estimate"] = {
        "latency": round(latency, 4),
        "rate": round(taken.rate, 1),
        "bound": taken.bound,
        "seconds": round(taken.seconds, 1),
        "quota": taken.quota,
        "quota_share": round(taken.share, 4),
        "usd": round(taken.money, 2),
        "disk": disk,
        "rows_locked": taken.rows_locked,
        "permissions": {key_id(ref): answer for ref, answer in allowed.items()},
        "operations": sealing,
    }
    command.tell(
        f"KMS answers in {latency * 1000:.0f} ms: about {taken.rate:,.0f} calls a second, "
        f"bound by the {BOUNDS[taken.bound]}, {duration(taken.seconds)} in all."
    )
    command.tell(
        f"That is {taken.share:.0%} of a quota of {taken.quota:,} requests a second, and "
        f"{taken.money:,.2f} US dollars for requests."
    )
    command.tell(f"At most {taken.rows_locked} rows are locked at a time, for milliseconds.")
    for column, size in disk.items():
        if size:
            command.tell(
                f"{column} may take {size / 2**20:,.1f} MiB more until it is vacuumed."
            )
    for key, answer in command.result["estimate"]["permissions"].items():
        command.tell(f"{operation} from {key}: {answer}.")
    for name, answer in sealing.items():
        command.tell(f"{name} in the mode {planned.mode}: {answer}.")
    if permissions.DENIED in allowed.values():
        raise RotationRefused(IS_DENIED.format(operation=operation))
    sealing.pop("ReEncrypt", None)  # not asked for here
    if denied := [name for name, each in sealing.items() if each == permissions.DENIED]:
        raise RotationRefused(IS_DENIED.format(operation=" and ".join(denied)))


def key_id(ref: str) -> str:
    """Return the key id that a ref stands for, or that it is not readable, or a data key."""
    if not ref:
        return "data keys"
    try:
        return encoding.key_id(ref)
    except MalformedHash:
        return "(not readable)"
