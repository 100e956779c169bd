"""Which calls to KMS a block makes."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from kms_hasher.exceptions import KMSCircuitOpen
from kms_hasher.providers.base import OPERATIONS
from kms_hasher.signals import Event, kms_event


@contextlib.contextmanager
def assert_kms_calls(*operations: str, **counts: int) -> Iterator[list[Event]]:
    """
    Check that the block makes just these calls to KMS, in whatever order and thread of this
    process.

        with assert_kms_calls("Decrypt"): ...
        with assert_kms_calls(Decrypt=1, Encrypt=2) as calls: ...
        with assert_kms_calls(): ...    # none

    Gives the list of the calls' events, which grows as they are made. A call that fails
    is a call; one that an open circuit breaker holds back is none, nor is a stored value
    that is refused unasked. Raises `AssertionError` with the calls that were made, and
    `ValueError` for what is no operation of KMS. An error of the block's own passes
    unchanged.
    """
    __tracebackhide__ = True
    expected = Counter(operations) + Counter(counts)
    if unknown := sorted({*operations, *counts} - set(OPERATIONS.values())):
        raise ValueError(f"{unknown}: KMS has {', '.join(OPERATIONS.values())}.")
    made: list[Event] = []

    def listen(sender: Any, event: Event, **kwargs: Any) -> None:
        if _is_call(event):
            made.append(event)

    kms_event.connect(listen, weak=False)
    try:
        yield made
    finally:
        kms_event.disconnect(listen)
    calls = list(made)
    if Counter(event.operation for event in calls) != expected:
        raise AssertionError(_message(expected, calls))


def _is_call(event: Event) -> bool:
    # Others are signals.PARSE and signals.CIRCUIT_BREAKER.
    known = event.operation in OPERATIONS.values()
    return known and event.error_code != KMSCircuitOpen.__name__


def _message(expected: Mapping[str, int], calls: list[Event]) -> str:
    wanted = ", ".join(f"{name}={count}" for name, count in expected.items()) or "none"
    lines = [f"Calls to KMS: expected {wanted}; {len(calls) or 'none'} made."]
    for number, event in enumerate(calls, 1):
        what = f"{event.operation} for {event.purpose}: {event.outcome}"
        code = f" ({event.error_code})" if event.error_code else ""
        lines.append(f"{number}. {what}{code}, key {event.requested_key or event.key}")
    return "\n".join(lines)
