"""The pace of a run: the cap, backing off where KMS throttles, and the best concurrency."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from django.utils import timezone

from kms_hasher import signals
from kms_hasher.rotation import pace
from kms_hasher.rotation.pace import Pace


class World:
    """A KMS that answers so many calls per second, and what a `Pace` makes of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(pace.time, "monotonic", lambda: self.now)

    def run(self, subject: Pace, seconds: int, taken: Callable[[Pace], tuple[int, int]]) -> int:
        """Let time pass; `taken` says how many calls succeed in a second, how many do not."""
        done = 0
        for _ in range(seconds):
            good, bad = taken(subject)
            done += good
            for number in range(good + bad):
                subject.note([GOOD if number < good else BAD])
            self.now += pace.PERIOD
            subject.look()
        return done


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def event(good: bool = True, attempts: int = 1) -> signals.Event:
    return signals.Event(
        time=timezone.now(),
        operation="ReEncrypt",
        purpose="rotate",
        outcome=signals.SUCCESS if good else signals.UNAVAILABLE,
        request_ids=("id",) * attempts,
    )


GOOD, BAD = event(), event(False)


def rate_of(subject: Pace, world: World, seconds: float = 1.0) -> float:
    """Return how many calls are let through in a second from now."""
    first = world.now + subject.turn()
    waits = [world.now + subject.turn() for _ in range(20)]
    return 20 / (waits[-1] - first) if waits[-1] > first else float("inf")


def test_as_many_in_flight_as_bring_something(world: World) -> None:
    subject = Pace(None)
    assert subject.number == pace.FIRST
    seen = []

    def bound(subject: Pace) -> tuple[int, int]:
        seen.append(subject.number)
        return min(subject.number * 100, 4000), 0  # 10 ms, and a processor for 4,000

    world.run(subject, 12, bound)
    assert 40 <= subject.number <= 40 * pace.MORE
    assert max(seen) <= 40 * pace.MORE**2 + 2
    assert rate_of(subject, world) == float("inf")


def test_the_best_number_is_looked_for_again(world: World) -> None:
    subject = Pace(None)
    world.run(subject, 12, lambda subject: (min(subject.number * 100, 2000), 0))
    few = subject.number
    world.run(subject, 60, lambda subject: (subject.number * 100, 0))
    assert subject.number > 2 * few
    world.run(subject, 200, lambda subject: (subject.number * 100, 0))
    assert subject.number == pace.MOST


def test_a_given_number_stays(world: World) -> None:
    subject = Pace(5)
    world.run(subject, 20, lambda subject: (subject.number * 100, 0))
    world.run(subject, 5, lambda subject: (100, 50))
    assert subject.number == 5


def test_throttled_it_goes_slower_and_then_on(world: World) -> None:
    subject = Pace(64)
    world.run(subject, 1, lambda subject: (100, 20))
    assert rate_of(subject, world) == pytest.approx(120 * pace.BACK)

    def quota(subject: Pace) -> tuple[int, int]:
        wanted = round(min(rate_of(subject, world), 1000))
        return min(wanted, 100), max(wanted - 100, 0)

    done = world.run(subject, 100, quota)
    assert 85 * 100 <= done <= 100 * 100


def test_calls_made_again_by_the_provider_count_as_throttled(world: World) -> None:
    subject = Pace(None)
    subject.note([event(attempts=2)])
    world.now += 1
    subject.look()
    assert rate_of(subject, world) == pytest.approx(1)
    assert subject.number < pace.FIRST


def test_what_no_longer_holds_is_forgotten(world: World) -> None:
    subject = Pace(64)
    world.run(subject, 1, lambda subject: (1000, 20))
    world.run(subject, 1, lambda subject: (10, 0))  # the rows come slower than that
    assert rate_of(subject, world) == float("inf")


def test_the_cap_holds_beside_it(world: World) -> None:
    subject = Pace(64, rate=50)
    assert rate_of(subject, world) == pytest.approx(50)
    world.run(subject, 1, lambda subject: (100, 20))
    assert rate_of(subject, world) == pytest.approx(50)
    subject.limit(None)
    assert rate_of(subject, world) == pytest.approx(120 * pace.BACK)
    subject.limit(10)
    assert rate_of(subject, world) == pytest.approx(10)


def test_nothing_is_learnt_from_nothing(world: World) -> None:
    subject = Pace(None)
    world.run(subject, 5, lambda subject: (0, 0))
    assert subject.number == pace.FIRST


@pytest.mark.parametrize("pressed", [event(False), event(attempts=2)])
def test_what_was_throttled_leaves_kms_to_others_at_once(
    pressed: signals.Event, world: World
) -> None:
    subject = Pace(32)
    assert subject.turn() == 0
    subject.note([event()])
    assert subject.turn() == 0
    subject.note([pressed])
    assert subject.turn() == pytest.approx(0.25)
