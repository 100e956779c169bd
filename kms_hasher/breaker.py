"""
A circuit breaker for each Region: while KMS is out, calls fail at once.

It opens after `FAILURES` calls in a row that KMS could not answer, and counts for the one
process it is in. While it is open, one call is let through in `SECONDS`: the probe. The
first call that KMS answers closes it, and a refusal (denied, disabled, throttled, a bad
ciphertext) is an answer.
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass, field

from django.dispatch import Signal

from kms_hasher.exceptions import KMSCircuitOpen

#: Unanswered calls in a row that open a breaker.
FAILURES = 5

#: Seconds between two probes.
SECONDS = 5.0

#: Sent with `region` and `is_open` when a breaker of this process opens or closes.
breaker_changed = Signal()


@dataclass
class Breaker:
    """The breaker of one Region; "" is where keys are that are not named by an ARN."""

    region: str
    failures: int = 0
    next_probe: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def is_open(self) -> bool:
        return self.failures >= FAILURES

    @property
    def retry_after(self) -> float:
        """Seconds until a call is let through; 0.0 while it is closed."""
        return max(0.0, self.next_probe - time.monotonic()) if self.is_open else 0.0

    def enter(self) -> None:
        """Return if a call may be made now. Raises `KMSCircuitOpen` if not."""
        if not self.is_open:
            return
        with self._lock:
            now = time.monotonic()
            if self.is_open and now < self.next_probe:
                raise KMSCircuitOpen
            # This call is the probe. Should it never end, another follows in time.
            self.next_probe = now + SECONDS

    def leave(self, *, answered: bool) -> bool:
        """Count what came of a call; return whether the breaker has opened or closed."""
        if answered and not self.failures:
            return False
        with self._lock:
            before = self.is_open
            self.failures = 0 if answered else self.failures + 1
            if not answered:
                self.next_probe = time.monotonic() + SECONDS
            changed = before != self.is_open
        if changed:
            # Not as it is by now: only a failure opens it, only an answer closes it.
            breaker_changed.send_robust(
                sender=Breaker, region=self.region, is_open=not answered
            )
        return changed


_breakers: dict[str, Breaker] = {}


def of(region: str) -> Breaker:
    """Return this process's breaker of a Region."""
    return _breakers.setdefault(region, Breaker(region))


def retry_after() -> float:
    """Return the longest time, in seconds, until an open breaker lets a call through."""
    return max((breaker.retry_after for breaker in list(_breakers.values())), default=0.0)


def reset() -> None:
    """Forget all that was counted: another provider, another process, another test."""
    _breakers.clear()


os.register_at_fork(after_in_child=reset)
