"""
What the hashers tell the rest: one `kms_event` for each call to KMS.

The audit listens to it, and so may a site. The event never holds a password, a digest, a
salt or a user's name.
"""

from __future__ import annotations

import datetime
from typing import NamedTuple

from django.dispatch import Signal
from django.utils.translation import gettext_noop as _

from kms_hasher import exceptions

#: Sent with `event`, an `Event`, after each call to KMS and each refusal of a stored value.
kms_event = Signal()

# What came of a call; marked for translation in the admin.
SUCCESS = _("success")
INVALID = _("invalid")  # a blob or a stored value that is not what it claims to be
UNAVAILABLE = _("unavailable")  # KMS could not answer
UNUSABLE = _("unusable")  # the key is disabled, pending deletion or gone
DENIED = _("denied")  # policies or credentials
ERROR = _("error")

#: What calls are for.
PURPOSES = (_("login"), _("set"), _("rotate"), _("wrap"), _("unwrap"), _("status"))

OUTCOMES = (SUCCESS, INVALID, UNAVAILABLE, UNUSABLE, DENIED, ERROR)

_OUTCOMES: tuple[tuple[type[Exception], str], ...] = (
    (exceptions.KMSUnavailable, UNAVAILABLE),
    (exceptions.InvalidCiphertext, INVALID),
    (exceptions.MalformedHash, INVALID),
    (exceptions.KeyUnusable, UNUSABLE),
    (exceptions.KeyNotFound, UNUSABLE),
    (exceptions.KMSAccessDenied, DENIED),
    (exceptions.KMSCredentialsError, DENIED),
    (exceptions.DryRunOperation, SUCCESS),
)


#: Operations of events that are no calls to KMS: a stored value was refused unasked, and a
#: circuit breaker has opened (`unavailable`) or closed (`success`).
PARSE = "Parse"
CIRCUIT_BREAKER = "CircuitBreaker"


class Event(NamedTuple):
    """
    One call to KMS, or one of the two things above.

    `operation` and `error_code` are KMS's names. `requested_key` is what the call named,
    which may be an alias; `key` the resolved ARN where KMS gave it. `latency` is in
    seconds. `sub` is the digest of the stored value's header, see `encoding.Header`.
    """

    time: datetime.datetime
    operation: str
    purpose: str
    outcome: str
    error_code: str = ""
    requested_key: str = ""
    key: str = ""
    latency: float = 0.0
    request_ids: tuple[str, ...] = ()
    sub: str = ""


def outcome_of(error: Exception) -> str:
    """Return the `Event.outcome` that stands for an error."""
    return next((name for kind, name in _OUTCOMES if isinstance(error, kind)), ERROR)


def emit(event: Event) -> None:
    """
    Send `event` to all receivers.

    A receiver that fails is logged by Django and stops nothing, but for `AuditError`: the
    site has asked that a call which cannot be recorded shall fail.
    """
    for _receiver, response in kms_event.send_robust(sender=Event, event=event):
        if isinstance(response, exceptions.AuditError):
            raise response
