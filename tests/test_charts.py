"""The chart of calls: right figures, sound SVG, nothing that a strict policy forbids."""

from __future__ import annotations

import datetime
import itertools
import math
import re
from collections import Counter
from typing import Any
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


# --- what the dashboard adds --------------------------------------------------------

HOUR = datetime.timedelta(hours=1)


def figures(*latencies_us: int) -> rollups.Figures:
    buckets = [rollups.bucket_of("Decrypt", us) for us in latencies_us]
    return rollups.Figures(len(buckets), 0, {each: buckets.count(each) for each in buckets})


def draw(series: charts.Series, **options: Any) -> ElementTree.Element:
    return parse(charts.draw(series, "A title", **options))


def test_latencies_reach_from_the_median_to_the_95th_percentile() -> None:
    with timezone.override("UTC"):
        found = draw(
            {
                NOW - HOUR: {signals.SUCCESS: figures(*[5_000] * 9, 1_000_000)},
                NOW: {signals.SUCCESS: figures(100_000), signals.DENIED: figures(100_000)},
            },
            latency=True,
        )
    [long, short] = bars(found)["kms-latency"]
    assert short == 2
    p50, p95 = (rollups.middle(rollups.bucket_of("Decrypt", us)) for us in (5_000, 1_000_000))
    # The scale has three powers of ten.
    assert abs(long - charts._HEIGHTS[2] * math.log10(p95 / p50) / 3) <= 1
    texts = [text.text for text in found.iter(f"{SVG}text")]
    assert "1 ms" in texts and "1,000 ms" in texts
    rows = [[cell.text for cell in row] for row in found.iter("tr")]
    assert rows[0][-2:] == ["Median", "95 % within"]
    assert rows[2][-2:] == [charts.milliseconds(p50), charts.milliseconds(p95)]


def test_what_is_no_call_has_no_latency() -> None:
    found = draw({NOW: {signals.INVALID: rollups.Figures(3, 3)}}, latency=True)
    assert "kms-latency" not in bars(found)
    [_, row] = [[cell.text for cell in row] for row in found.iter("tr")]
    assert row[-2:] == [None, None]


def test_marks_are_at_their_moment() -> None:
    series: charts.Series = {NOW + n * HOUR: {} for n in range(4)}
    marks = [
        charts.Mark(NOW + HOUR / 2, "half"),
        charts.Mark(NOW + 3.5 * HOUR, "in the last"),
        charts.Mark(NOW - HOUR, "before all"),
    ]
    found = draw(series, marks=marks)
    lines = [g[1] for g in found.iter(f"{SVG}g") if g.attrib.get("class") == "kms-mark"]
    assert [int(line.attrib["x1"]) - charts._LEFT for line in lines] == [96, 672]
    assert not list(charts._marks(marks, []))
    one = charts.Step(NOW, Counter())
    assert [mark.x for mark in charts._marks(marks[:1], [one])] == [charts._LEFT]


@pytest.mark.parametrize("number", [1, 24, 30, 48, 90, 168, 400])
def test_any_number_of_steps_fits(number: int) -> None:
    series: charts.Series = {
        NOW + n * HOUR: {signals.SUCCESS: rollups.Figures(1)} for n in range(number)
    }
    found = draw(series, step=rollups.DAY)
    rects = [
        (int(rect.attrib["x"]), int(rect.attrib["width"]))
        for rect in found.iter(f"{SVG}rect")
        if rect.find(f"{SVG}title") is not None
    ]
    assert len(rects) == number
    for (x, width), (following, _) in itertools.pairwise(rects):
        assert x + width <= following
    assert sum(rects[-1]) <= charts._WIDTH
    ticks = [text for text in found.iter(f"{SVG}text") if "November" in (text.text or "")]
    assert len(ticks) <= 8


def test_bars_and_rows_lead_where_they_are_told() -> None:
    html = charts.draw(
        {NOW: {signals.SUCCESS: rollups.Figures(1)}}, "t", url=lambda start: "/?a=1&b=<"
    )
    assert html.count('href="/?a=1&amp;b=&lt;"') == 2
    assert 'tabindex="-1"' in html  # the table's are the ones to step through
    parse(html)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, ""), (0.0005, "0.5 ms"), (0.001, "1 ms"), (0.0099, "9.9 ms"), (1.5, "1,500 ms")],
)
def test_latencies_in_words(seconds: float | None, text: str) -> None:
    assert charts.milliseconds(seconds) == text
