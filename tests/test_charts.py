"""The chart of calls: right figures, sound SVG, nothing that a strict policy forbids."""

from __future__ import annotations

import datetime
import itertools
import re
from xml.etree import ElementTree

import pytest
from django.utils import timezone, translation

from kms_hasher import signals
from kms_hasher.audit import charts, rollups
from kms_hasher.models import AuditHour

NOW = datetime.datetime(2026, 11, 21, 12, 34, 56, tzinfo=datetime.timezone.utc)
SVG = "{http://www.w3.org/2000/svg}"

pytestmark = pytest.mark.django_db


slots = itertools.count()


def add(
    hours_ago: float, outcome: str = signals.SUCCESS, number: int = 1, ref: str = "k"
) -> None:
    AuditHour.objects.create(
        hour=rollups.hour_of(NOW - datetime.timedelta(hours=hours_ago)),
        operation="Decrypt",
        purpose="login",
        outcome=outcome,
        key_ref=ref,
        bucket=0,
        slot=next(slots),
        count=number,
    )


def parse(html: str) -> ElementTree.Element:
    html = html.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ')
    return ElementTree.fromstring(html.strip())


def table(html: str) -> list[list[str | None]]:
    return [[cell.text for cell in row] for row in parse(html).iter("tr")]


def bars(root: ElementTree.Element) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for group in root.iter(f"{SVG}g"):
        for rect in group.findall(f"{SVG}rect"):
            if rect.find(f"{SVG}title") is not None:
                found.setdefault(group.attrib["class"], []).append(int(rect.attrib["height"]))
    return found


def test_calls_are_counted_by_hour_and_outcome_of_one_key() -> None:
    add(0)
    add(0.5)
    add(1, number=3)
    add(1, signals.DENIED)
    add(47)
    add(48)  # an hour too old
    add(1, ref="other")
    add(1, "unheard of")
    with timezone.override("UTC"):
        rows = table(charts.render("k", NOW))
    assert rows[1:] == [
        ["2026-11-21 12:00", "2", "0", "0", "0", "0", "0"],
        ["2026-11-21 11:00", "3", "0", "0", "0", "1", "1"],
        ["2026-11-19 13:00", "1", "0", "0", "0", "0", "0"],
    ]


def test_the_chart_is_well_formed_and_says_what_it_shows() -> None:
    add(1, number=3)
    add(2, signals.UNAVAILABLE, 2)
    root = parse(charts.render("k", NOW))
    svg = root.find(f".//{SVG}svg")
    assert svg is not None
    assert svg.attrib["role"] == "img"
    ids = svg.attrib["aria-labelledby"].split()
    described = [each for each in svg.iter() if each.attrib.get("id") in ids]
    assert [each.text for each in described] == [
        "KMS calls in the last 48 hours",
        "5 calls by hour and outcome; 2 failed.",
    ]
    assert {name: len(heights) for name, heights in bars(root).items()} == {
        "kms-success": 1,
        "kms-unavailable": 1,
    }


def test_a_single_failure_is_seen_among_very_many() -> None:
    add(1, number=3000)
    add(1, signals.INVALID, number=900)
    add(1, signals.DENIED)
    found = bars(parse(charts.render("k", NOW)))
    assert found["kms-denied"] == [2]
    assert found["kms-invalid"][0] > 30
    assert found["kms-success"][0] > 50


def test_the_table_holds_the_same_figures() -> None:
    add(1, number=3)
    add(2, signals.DENIED)
    assert table(charts.render("k", NOW))[0][:2] == ["Hour from", "Success"]
    with timezone.override("UTC"):
        rows = table(charts.render("k", NOW))
    assert rows[1:] == [
        ["2026-11-21 11:00", "3", "0", "0", "0", "0", "0"],
        ["2026-11-21 10:00", "0", "0", "0", "0", "1", "0"],
    ]


@pytest.mark.parametrize("zone", ["Asia/Kolkata", "America/New_York", "UTC"])
def test_times_are_in_the_current_time_zone(zone: str) -> None:
    add(1)
    with timezone.override(zone):
        html = charts.render("k", NOW)
        local = timezone.localtime(NOW.replace(hour=11, minute=0))
    assert f"{local:%Y-%m-%d %H:%M}: 1 success" in html
    assert zone in html


def test_no_locale_spoils_the_numbers(settings: object) -> None:
    settings.USE_THOUSAND_SEPARATOR = True  # type: ignore[attr-defined]
    add(1, number=1200)
    with translation.override("de"):
        html = charts.render("k", NOW)
    assert "1.200" in html
    for element in parse(html).iter(f"{SVG}rect"):
        for name in ("x", "y", "width", "height"):
            assert re.fullmatch(r"\d+", element.attrib[name])


def test_there_is_a_chart_before_the_first_call() -> None:
    root = parse(charts.render("k"))
    assert bars(root) == {}
    assert root.find("details") is None


def test_a_strict_content_security_policy_lets_it_pass() -> None:
    add(1, signals.INVALID)
    html = charts.render("k", NOW)
    assert not re.search(r"<script|<style|\sstyle=|\son\w+=|javascript:", html)


@pytest.mark.parametrize(
    ("number", "rounded"), [(0, 1), (1, 1), (3, 5), (5, 5), (6, 10), (101, 200), (2001, 5000)]
)
def test_axes_end_at_a_round_number(number: int, rounded: int) -> None:
    assert charts._round_up(number) == rounded
