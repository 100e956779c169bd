"""What tests/conftest.py makes of a test: its tier, and what it must not do there."""

from __future__ import annotations

import sys

import pytest
from django.test import TestCase

from tests import conftest

TIERS = ("fast", "database", "system")


def tiers(request: pytest.FixtureRequest) -> list[str]:
    return [name for name in TIERS if request.node.get_closest_marker(name)]


def test_fast(request: pytest.FixtureRequest) -> None:
    assert tiers(request) == ["fast"]


def test_database_by_a_fixture(request: pytest.FixtureRequest, db: None) -> None:
    assert tiers(request) == ["database"]


@pytest.mark.django_db
def test_database_by_a_mark(request: pytest.FixtureRequest) -> None:
    assert tiers(request) == ["database"]


class DatabaseByACase(TestCase):
    @pytest.fixture(autouse=True)
    def note(self, request: pytest.FixtureRequest) -> None:
        self.tiers = tiers(request)

    def test_it(self) -> None:
        assert self.tiers == ["database"]


@pytest.mark.everywhere
def test_everywhere_is_of_the_system(request: pytest.FixtureRequest) -> None:
    assert tiers(request) == ["system"]
    sys.audit("os.fork")


@pytest.mark.parametrize("event", sorted(conftest.BARRED))
def test_outside_the_system_tier_it_is_refused_and_noted(
    event: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    caught: list[str] = []
    monkeypatch.setattr(conftest, "_caught", caught)
    with pytest.raises(RuntimeError, match=f"{event}: mark the test"):
        sys.audit(event)
    assert caught == [event]
