"""
How fast a run goes: under the cap it was given, slower where KMS throttles, and with as many
calls in flight as bring something.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from kms_hasher import signals

#: Seconds between two looks at what came of the calls.
PERIOD = 1.0

#: After throttling, go on at this share of the rate that KMS took, and go faster by this
#: factor in each period without.
BACK, FORTH = 0.8, 1.05

#: Seconds for which no call is let through after one that was throttled: what KMS takes by then
#: is for logins, which try again at once and only once.
HOLD = 0.25

#: Calls in flight to begin with and at the most, where the best number is looked for; by what
#: factor more are tried, and by what factor the rate must rise for that.
FIRST, MOST = 8, 256
MORE, WORTH = 1.5, 1.05

#: So many periods until more are tried again.
REST = 15


class Pace:
    """
    Spaces calls evenly, with no bursts, and says how many may be in flight.

    `number` is that number, None to look for the best. `rate` caps the calls per second, None
    for no cap. `calls` is how many calls were let through.
    """

    def __init__(self, number: int | None, rate: float | None = None) -> None:
        self.calls = 0
        self.number = number or FIRST
        self._tunes = number is None
        self._cap, self._back = rate, float("inf")
        self._next = 0.0
        self._interval = 0.0
        self._finished = self._pressed = 0
        self._since = time.monotonic()
        # The number before the present one, the rate it gave, and when to try more again.
        self._former, self._former_rate, self._rest = self.number, 0.0, 0
        self.limit(rate)

    def limit(self, rate: float | None) -> None:
        """Change the cap, for the calls that are not let through yet."""
        self._cap = rate
        lowest = min(rate or float("inf"), self._back)
        self._interval = 0.0 if lowest == float("inf") else 1 / lowest

    def turn(self) -> float:
        """Count a call; return for how many seconds it has to wait."""
        self.calls += 1
        now = time.monotonic()
        turn = max(now, self._next)
        self._next = turn + self._interval
        return turn - now

    def note(self, events: Sequence[signals.Event]) -> None:
        """Take note of what a task's calls reported."""
        self._finished += 1
        for event in events:
            # More than one id: the provider had to make the call again.
            if event.outcome == signals.UNAVAILABLE or len(event.request_ids) > 1:
                self._pressed += 1
                self._next = max(self._next, time.monotonic() + HOLD)

    def look(self) -> None:
        """Draw conclusions. To be called each `PERIOD`."""
        now = time.monotonic()
        rate = self._finished / max(now - self._since, 1e-9)
        pressed, self._finished, self._pressed = self._pressed, 0, 0
        self._since = now
        if pressed:
            self._back = max(rate * BACK, 1.0)
        elif self._back < float("inf"):
            self._back *= FORTH
            if rate < self._back / 2:  # it is no longer what holds us
                self._back = float("inf")
        self.limit(self._cap)
        if self._tunes:
            self._tune(rate, bool(pressed))

    def _tune(self, rate: float, pressed: bool) -> None:
        if pressed:
            self.number, self._rest = max(int(self.number / MORE), 1), REST
            self._former, self._former_rate = self.number, rate
        elif self._rest:
            self._rest -= 1
        elif self.number > self._former and rate < self._former_rate * WORTH:
            self.number, self._rest = self._former, REST  # more brought nothing
        elif rate:
            self._former, self._former_rate = self.number, rate
            self.number = min(int(self.number * MORE) + 1, MOST)
