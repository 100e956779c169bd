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
REENCRYPT_DENIED = "ReEncrypt is denied: check the IAM policy and the policies of the keys."


def tell(command: WalkCommand, planned: Plan, options: Options) -> None:
    """Tell what it takes at the present latency. Raises `RotationRefused` if it is denied."""
    if planned.present is None or not planned.rewraps:
        return
    arn = planned.present.key_arn
    latency = estimate.measured_latency(arn)
    taken = estimate.estimate(
        planned.total,
        latency=latency,
        concurrency=options.concurrency or ASSUMED,
        processes=options.processes,
        rate=options.rate,
        quota=estimate.quota_of(region_of(arn)),
    )
    rows = {column: sum(refs.values()) for column, refs in planned.rows_by_column().items()}
    disk = {str(column): estimate.disk(column, number) for column, number in rows.items()}
    allowed = permissions.try_re_encrypt(planned)
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
        command.tell(f"ReEncrypt from {key}: {answer}.")
    if any(answer == permissions.DENIED for answer in allowed.values()):
        raise RotationRefused(REENCRYPT_DENIED)


def key_id(ref: str) -> str:
    """Return the key id that a ref stands for, or that it is not readable, or a data key."""
    if not ref:
        return "data keys"
    try:
        return encoding.key_id(ref)
    except MalformedHash:
        return "(not readable)"
