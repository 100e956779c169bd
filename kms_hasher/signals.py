"""
What the hashers tell the rest: one `kms_event` for each call to KMS.

The audit listens to it, and so may a site. The event never holds a password, a digest, a
salt or a user's name.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import NamedTuple

from django.dispatch import Signal
from django.utils.translation import gettext_noop as _

from kms_hasher import exceptions

#: Sent with `event`, an `Event`, after each call to KMS and each refusal of a stored value.
kms_event = Signal()

#: Sent with `events`, a sequence of those that `kms_event` was just sent for: one for a
#: login, hundreds at once for a rotation. It is for what stores them.
kms_events = Signal()

_held: ContextVar[list[Event] | None] = ContextVar("kms_hasher_held_events", default=None)

# What came of a call; marked for translation in the admin.
SUCCESS = _("success")
INVALID = _("invalid")  # a blob or a stored value that is not what it claims to be
UNAVAILABLE = _("unavailable")  # KMS could not answer
UNUSABLE = _("unusable")  # the key is disabled, pending deletion or gone
DENIED = _("denied")  # policies or credentials
ERROR = _("error")

#: What calls are for.
PURPOSES = (
    _("login"),
    _("set"),
    _("rotate"),
    _("wrap"),
    _("unwrap"),
    _("status"),
    _("verify"),
    _("seal"),
)

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
    """Send `event` to all receivers, as `emit_all`; or hold it back, in a `held` block."""
    held = _held.get()
    if held is None:
        emit_all([event])
    else:
        held.append(event)


def emit_all(events: Sequence[Event]) -> None:
    """
    Send the events to all receivers.

    A receiver that fails is logged by Django and stops nothing, but for `AuditError`: the
    site has asked that a call which cannot be recorded shall fail.
    """
    responses = []
    for event in events:
        responses += kms_event.send_robust(sender=Event, event=event)
    if events:
        responses += kms_events.send_robust(sender=Event, events=events)
    for _receiver, response in responses:
        if isinstance(response, exceptions.AuditError):
            raise response


@contextlib.contextmanager
def held() -> Iterator[list[Event]]:
    """Hold back what the block emits, for `emit_all`: threads it starts copy this context."""
    events: list[Event] = []
    token = _held.set(events)
    try:
        yield events
    finally:
        _held.reset(token)
