"""
Whether a run would be allowed what it does, tried by DryRun: nothing is changed.
"""

from __future__ import annotations

from kms_hasher import conf, encoding, keyring
from kms_hasher.encoding import SealedHash
from kms_hasher.exceptions import DryRunOperation, KMSAccessDenied, KMSError, MalformedHash
from kms_hasher.rotation.plan import Plan

ALLOWED, DENIED, NOT_TOLD = "allowed", "denied", "cannot be told"


def try_re_encrypt(planned: Plan) -> dict[str, str]:
    """
    Return, by the ref of each key that rows are to leave, whether ReEncrypt is allowed.

    A stored row of each is tried towards the target, or where that is not made yet towards
    the present key, whose policy it will have. Raises nothing that KMS answers.
    """
    target = planned.target or planned.present
    found: dict[str, str] = {}
    for column, rows in planned.rows_by_column().items():
        for ref in rows:
            if ref in found or target is None:
                continue
            sealed = {f"{column.field.attname}__startswith": encoding.PREFIX}
            named = {f"{column.field.attname}__contains": ref}
            values = column.rows.filter(**sealed, **named).values_list(column.field.attname)
            for (value,) in values[:1]:
                found[ref] = _try(value, target.key_arn)
    return found


def _try(value: str, target: str) -> str:
    try:
        stored: SealedHash = encoding.parse(value)
        source = conf.get().key_for(stored.key_id)
        context = keyring.context_of(stored.header)
        kms = keyring.kms("rotate", stored.header.sub)
        kms.re_encrypt(source, stored.sealed, context, target, context, dry_run=True)
    except DryRunOperation:
        return ALLOWED
    except KMSAccessDenied:
        return DENIED
    except (KMSError, MalformedHash) as error:
        return f"{NOT_TOLD}: {error}"
    return ALLOWED  # a service that ignores DryRun has done it; the answer is dropped
