"""The dashboard, the pages of seals and findings, and the way from a user to events."""

from __future__ import annotations

import datetime
import re
from html import unescape
from typing import Any

import pytest
from django.contrib.auth.hashers import make_password
from django.contrib.auth.models import Permission, User
from django.db import connection
from django.http import QueryDict
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse
from django.utils import timezone

from kms_hasher import encoding, signals
from kms_hasher.admin import dashboard, standing
from kms_hasher.audit import charts, rollups
from kms_hasher.models import (
    AliasPeriod,
    AuditEvent,
    AuditFinding,
    AuditHour,
    AuditSeal,
    Key,
    RotationRun,
    TrailMark,
)
from tests.test_admin import (
    EVENTS,
    allow,
    list_url,
    listed,
    make_event,
    make_finding,
    make_key,
    make_rotation,
    make_seal,
    page_url,
    populate,
)
from tests.test_charts import parse, slots

pytestmark = pytest.mark.django_db

URL = f"{EVENTS}dashboard/"
HOUR = datetime.timedelta(hours=1)

#: Session, user; series, keys and purposes, aliases, runs, findings, their number, last seal,
#: unsealed events, keys and marks of the reconciliation.
QUERIES = 12


def add(hours_ago: float = 0, number: int = 1, **changes: Any) -> None:
    values = {
        "operation": "Decrypt",
        "purpose": "login",
        "outcome": signals.SUCCESS,
        "key_ref": make_key(0).ref,
        "bucket": rollups.bucket_of("Decrypt", 10_000),
    }
    AuditHour.objects.create(
        hour=rollups.hour_of(timezone.now() - hours_ago * HOUR),
        slot=next(slots),
        count=number,
        **{**values, **changes},
    )


def shown(client: Client, query: str = "") -> dict[str, Any]:
    response = client.get(URL + query)
    assert response.status_code == 200
    found: dict[str, Any] = response.context_data
    return found


def links(client: Client, query: str = "") -> list[str]:
    html = client.get(URL + query).content.decode()
    return [unescape(link) for link in re.findall(r'href="([^"]*)"', html)]


# --- who sees what ------------------------------------------------------------------


def test_it_needs_the_permission_to_view_events(client: Client, staff: User) -> None:
    assert Client().get(URL).status_code == 302
    assert client.get(URL).status_code == 403
    allow(staff, AuditEvent)
    assert client.get(URL).status_code == 200
    assert client.post(URL).status_code == 405


def test_it_shows_only_what_its_reader_may_see(client: Client, staff: User) -> None:
    populate(1)
    add()
    allow(staff, AuditEvent)
    found = shown(client)
    assert [found[name] for name in ("runs", "findings", "seals", "trail")] == [None] * 4
    assert not any(row["about"] for row in found["keys"])
    html = client.get(URL).content.decode()
    assert "rotationrun" not in html and "auditfinding" not in html and "auditseal" not in html
    allow(staff, AuditFinding, AuditSeal, RotationRun, AliasPeriod)
    found = shown(client)
    assert all(found[name] for name in ("runs", "findings", "seals", "trail"))
    assert [row["about"] for row in found["keys"]] == ["alias/0"]


def test_links_lead_to_it_for_those_who_may(client: Client, staff: User) -> None:
    index = reverse("admin:app_list", args=["kms_hasher"])
    allow(staff, Key)
    assert URL not in client.get(index).content.decode()
    allow(staff, AuditEvent)
    assert f'href="{URL}"' in client.get(index).content.decode()
    assert f'href="{URL}"' in client.get(EVENTS).content.decode()


# --- what it costs ------------------------------------------------------------------


@pytest.mark.parametrize("query", ["", "?period=90d", "?period=7d&purpose=login"])
def test_the_number_of_queries_is_always_the_same(
    query: str, root: Client, django_assert_num_queries: Any
) -> None:
    for number in (0, 1, 20):
        populate(number)
        for hour in range(number):
            add(hour, outcome=signals.OUTCOMES[hour % 6], key_ref=make_key(hour).ref)
            TrailMark.objects.get_or_create(
                region=f"r{hour}", defaults={"until": timezone.now()}
            )
        with django_assert_num_queries(QUERIES):
            root.get(URL + query)


def test_no_event_is_read(root: Client) -> None:
    populate(3)
    with CaptureQueriesContext(connection) as captured:
        root.get(URL)
    asked = [q["sql"] for q in captured if AuditEvent._meta.db_table in q["sql"]]
    assert len(asked) == 1  # how many are not sealed: counted up to a bound, by primary key
    assert "COUNT(*)" in asked[0] and "LIMIT" in asked[0]


# --- figures ------------------------------------------------------------------------


def test_calls_failures_and_latencies(root: Client) -> None:
    add(0, 90)
    add(1, 9, bucket=rollups.bucket_of("Decrypt", 100_000))
    add(2, 1, outcome=signals.DENIED, bucket=rollups.bucket_of("Decrypt", 1_000_000))
    add(24, 1000)  # an hour too old
    found = shown(root)
    assert found["total"] == {
        "calls": "100",
        "failures": "1",
        "failed": True,
        "share": "1.00\N{NO-BREAK SPACE}%",
        "p50": charts.milliseconds(rollups.middle(rollups.bucket_of("Decrypt", 10_000))),
        "p95": charts.milliseconds(rollups.middle(rollups.bucket_of("Decrypt", 100_000))),
    }
    assert [(row["count"], row["share"]) for row in found["outcomes"]] == [
        ("99", "99.00\N{NO-BREAK SPACE}%"),
        ("1", "1.00\N{NO-BREAK SPACE}%"),
    ]
    assert shown(root, "?period=7d")["total"]["calls"] == "1,100"


def test_by_key_and_purpose(root: Client) -> None:
    one, two = make_key(1), make_key(2)
    add(0, 5, key_ref=one.ref)
    add(0, 3, key_ref=two.ref, outcome=signals.DENIED)
    add(0, 2, key_ref=two.ref, purpose="set")
    add(0, 1, key_ref="", operation="Parse", bucket=rollups.NO_CALL)

    def table(name: str, query: str = "") -> list[tuple[str, str]]:
        return [(row["calls"], row["failures"]) for row in shown(root, query)[name]]

    assert sorted(table("keys")) == [("1", "0"), ("5", "0"), ("5", "3")]
    assert table("purposes") == [("9", "3"), ("2", "0")]
    # Each table goes on naming what the other filter leaves to choose from.
    by_key = f"?key_ref={two.ref}"
    assert shown(root, by_key)["total"]["calls"] == "5"
    assert table("purposes", by_key) == [("3", "3"), ("2", "0")]
    assert len(table("keys", by_key)) == 3
    both = f"{by_key}&purpose=set"
    assert shown(root, both)["total"]["calls"] == "2"
    assert table("keys", both) == [("2", "0")]
    assert len(shown(root, both)["chosen"]) == 2


def test_filters_are_links_that_keep_each_other() -> None:
    ref = make_key(1).ref
    chosen = dashboard.Selection("30d", ref, "login")
    for url in (chosen.url(), chosen.url(period="7d"), chosen.url(key_ref="")):
        query = QueryDict(url.partition("?")[2])
        assert dashboard.Selection.parse(query).url() == url
    assert chosen.url(key_ref="", purpose="", period="24h") == f"{URL}?"


@pytest.mark.parametrize(
    "query",
    [
        "?period=1000d",
        "?key_ref=%00",
        "?key_ref=<script>",
        "?purpose=' or 1",
        "?x=1",
        "?key_ref=" + "a" * 9999,
    ],
)
def test_nonsense_in_the_address_is_left_out(query: str, root: Client) -> None:
    add(0, 7)
    found = shown(root, query)
    assert found["total"]["calls"] == "7"
    assert not found["chosen"]
    assert "<script>'" not in root.get(URL + query).content.decode()


def test_shares_are_never_rounded_to_all_or_nothing() -> None:
    space = "\N{NO-BREAK SPACE}%"
    for part, whole, text in (
        (0, 0, "0"),
        (0, 9, "0"),
        (9, 9, "100"),
        (1, 10**6, "< 0.01"),
        (10**6 - 1, 10**6, "> 99.99"),
        (1, 3, "33.33"),
        (2, 58, "3.45"),
    ):
        assert dashboard._share(part, whole) == text + space


def test_numbers_are_as_the_reader_writes_them(root: Client, settings: Any) -> None:
    add(0, 1234)
    settings.LANGUAGE_CODE = "de"
    html = root.get(URL).content.decode()
    assert "1.234" in html
    parse(shown(root)["chart"])


# --- the chart ----------------------------------------------------------------------


def test_days_are_those_of_the_readers_time_zone(root: Client, settings: Any) -> None:
    for zone in ("Asia/Kolkata", "America/New_York", "UTC"):
        settings.TIME_ZONE = zone
        since = dashboard.PERIODS["30d"].since()
        assert timezone.localtime(since).time() == datetime.time()
        assert timezone.localdate() - timezone.localtime(since).date() == datetime.timedelta(29)
        assert zone in shown(root, "?period=30d")["chart"]


def test_rotations_are_marked_in_the_chart(root: Client) -> None:
    old, new = make_key(1), make_key(2)
    make_rotation(new, previous_key=old, started_at=timezone.now() - 2 * HOUR)
    make_rotation(make_key(3), started_at=timezone.now() - 48 * HOUR)
    svg = parse(shown(root)["chart"])
    marks = [each for each in svg.iter() if each.attrib.get("class") == "kms-mark"]
    assert len(marks) == 1
    assert "re-wrap" in (marks[0][0].text or "")
    assert len(shown(root)["runs"]) == 1
    assert len(shown(root, "?period=7d")["runs"]) == 2
    for ref, number in ((old.ref, 1), (new.ref, 1), (make_key(3).ref, 0)):
        assert len(shown(root, f"?key_ref={ref}")["runs"]) == number


# --- down to the events -------------------------------------------------------------


def test_each_number_leads_to_its_events(root: Client) -> None:
    now = timezone.now()
    ref = make_key(0).ref
    fresh = make_event(time=now, key_ref=ref)
    failed = make_event(time=now, outcome=signals.DENIED, purpose="set", key_ref=ref)
    old = make_event(time=now - 3 * HOUR, key_ref=ref)
    make_event(time=now - 50 * HOUR, key_ref=ref)
    for event in (fresh, failed, old):
        hours = (now - event.time) / HOUR
        add(hours, outcome=event.outcome, purpose=event.purpose)
    found = shown(root)

    def led(url: str) -> set[int]:
        return listed(root, url.removeprefix(EVENTS))

    assert led(found["events_url"]) == {fresh.pk, failed.pk, old.pk}
    assert led(found["keys"][0]["events"]) == {fresh.pk, failed.pk, old.pk}
    by_purpose = {row["name"]: led(row["events"]) for row in found["purposes"]}
    assert by_purpose == {"login": {fresh.pk, old.pk}, "set": {failed.pk}}
    assert [led(row["url"]) for row in found["outcomes"]] == [
        {fresh.pk, old.pk},
        {failed.pk},
    ]
    of_hours = [unescape(url) for url in re.findall(r'"row"><a href="([^"]+)', found["chart"])]
    assert [led(url) for url in of_hours] == [{fresh.pk, failed.pk}, {old.pk}]
    by_day = shown(root, "?period=30d")["chart"]
    of_days = [unescape(url) for url in re.findall(r'"row"><a href="([^"]+)', by_day)]
    assert set().union(*map(led, of_days)) == {fresh.pk, failed.pk, old.pk}


def test_the_list_says_what_span_it_shows(root: Client) -> None:
    now = timezone.now()
    for _ in range(5):
        make_event(time=now)
    hour = rollups.hour_of(now)
    query = {"time__gte": hour.isoformat(), "time__lt": (hour + HOUR).isoformat()}
    html = root.get(EVENTS, query).content.decode()
    assert f"From {timezone.localtime(hour):%Y-%m-%d %H:%M:%S} to" in html
    assert "About 5 events in this period." in html
    assert "Since " in root.get(EVENTS, {"time__gte": hour}).content.decode()
    html = root.get(EVENTS, {"time__lt": query["time__lt"]}).content.decode()
    assert "Before " in html
    assert "About" not in html


@pytest.mark.parametrize("value", ["x", "", "2026-99-99T00:00Z", "2026-01-01", "%00"])
def test_a_span_that_is_none(value: str, root: Client) -> None:
    make_event()
    for name in ("time__gte", "time__lt"):
        response = root.get(f"{EVENTS}?{name}={value}", follow=True)
        assert response.status_code == 200


# --- how the audit stands -----------------------------------------------------------


def test_the_worst_findings_come_first_and_only_open_ones(root: Client) -> None:
    now = timezone.now()
    grave = make_finding(severity="critical", last_seen=now - 99 * HOUR)
    light = [make_finding(last_seen=now - n * HOUR) for n in range(standing.TOP)]
    make_finding(severity="critical", acknowledged_at=now)
    make_finding(severity="critical", resolved_at=now)
    found = shown(root)["findings"]
    assert found["count"] == str(standing.TOP + 1)
    assert [row["pk"] for row in found["top"]] == [grave.pk, *(f.pk for f in light[:-1])]
    assert found["url"] in links(root)
    assert root.get(found["url"]).status_code == 200


def test_findings_are_counted_up_to_a_bound(
    root: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(standing, "COUNTED", 2)
    for number in (2, 3):
        while AuditFinding.objects.count() < number:
            make_finding()
        told = shown(root)["findings"]["count"]
        assert told == ("2" if number == 2 else "> 2")


def test_the_state_of_seals(root: Client, settings: Any) -> None:
    assert "seal_kms_audit" in root.get(URL).content.decode()
    settings.KMS_HASHER = {**settings.KMS_HASHER, "AUDIT_SEAL_HOURS": 3}
    sealed = make_event()
    seal = make_seal(last_id=sealed.pk, sealed_at=timezone.now() - 2 * HOUR)
    for _ in range(4):
        make_event()
    found = shown(root)["seals"]
    assert (found["age"], found["unsealed"]) == ("2 hours ago", "4")
    assert page_url(seal) in links(root)
    assert "Sealing is overdue" not in root.get(URL).content.decode()
    AuditSeal.objects.update(sealed_at=timezone.now() - 4 * HOUR)
    assert "Sealing is overdue" in root.get(URL).content.decode()


def test_how_far_the_reconciliation_came(root: Client, settings: Any) -> None:
    assert "reconcile_kms_audit" in root.get(URL).content.decode()
    regions = ["us-east-1", "eu-west-1"]
    here = "arn:aws:kms:eu-central-1:111122223333:alias/tests"
    settings.KMS_HASHER = {**settings.KMS_HASHER, "KEY": here, "FALLBACK_REGIONS": regions}
    now = timezone.now()
    for region, until, looked_at in (
        ("eu-central-1", HOUR / 4, HOUR / 4),
        ("us-east-1", 50 * HOUR, 0 * HOUR),  # nobody calls there
        ("eu-west-1", 72 * HOUR, 25 * HOUR),
        ("ap-south-1", 100 * HOUR, 100 * HOUR),  # none of ours
    ):
        TrailMark.objects.create(region=region, until=now - until)
        TrailMark.objects.filter(region=region).update(updated_at=now - looked_at)
    rows = shown(root)["trail"]["rows"]
    assert [(row["region"], row["age"], row["is_late"]) for row in rows] == [
        ("eu-west-1", "3 days ago", True),
        ("us-east-1", "2 days ago", False),
        ("eu-central-1", "15 minutes ago", False),
    ]


def test_ages_in_words() -> None:
    for hours, text in (
        (-1, "0 minutes ago"),
        (1 / 60, "1 minute ago"),
        (47.9, "47 hours ago"),
        (1000, "41 days ago"),
    ):
        assert standing.age(hours * HOUR) == text


# --- seals --------------------------------------------------------------------------


def test_the_page_of_a_seal_does_not_read_its_leaves(root: Client) -> None:
    seal = make_seal(anchors={"mac": "ab", "mac_key": "k", "ciphertext": "cd"})
    for url in (list_url(AuditSeal), page_url(seal)):
        with CaptureQueriesContext(connection) as captured:
            html = root.get(url).content.decode()
        assert not any('"leaves"' in q["sql"] or "`leaves`" in q["sql"] for q in captured)
        assert seal.root[:8] in html
    assert "MAC, CloudTrail" in root.get(list_url(AuditSeal)).content.decode()
    assert seal.root in root.get(page_url(seal)).content.decode()


def test_ids_of_a_segment(root: Client) -> None:
    make_seal(sequence=1, after_id=-(2**63), last_id=1000)
    make_seal(sequence=2, after_id=1000, last_id=2500)
    html = root.get(list_url(AuditSeal)).content.decode()
    assert "up to 1,000" in html
    assert "1,001\N{EN DASH}2,500" in html


# --- from a user to events ----------------------------------------------------------


@pytest.fixture
def rose(django_user_model: type[User]) -> User:
    """A user with a sealed password."""
    return django_user_model.objects.create_user("rose", password="secret")


def of_user(user: Any) -> str:
    return reverse("admin:kms_hasher_auditevent_of_user", args=[user.pk])


def allow_users(staff: User) -> None:
    staff.user_permissions.add(Permission.objects.get(codename="view_user"))


def test_from_a_users_page_to_the_users_events(
    client: Client,
    staff: User,
    rose: User,
) -> None:
    sub = encoding.parse(rose.password).header.sub
    make_event()
    sealed = set(AuditEvent.objects.filter(sub=sub).values_list("pk", flat=True))
    assert sealed  # by create_user
    allow_users(staff)
    page = f"/admin/auth/user/{rose.pk}/change/"
    assert of_user(rose) not in client.get(page).content.decode()
    assert client.get(of_user(rose)).status_code == 403
    allow(staff, AuditEvent)
    assert of_user(rose) in client.get(page).content.decode()
    response = client.get(of_user(rose), follow=True)
    assert {event.pk for event in response.context["cl"].result_list} == sealed
    html = response.content.decode()
    assert f'The present password of <a href="{page}">rose</a>' in html
    assert "of=" not in "".join(re.findall(r'href="([^"]*)"', html))


def test_who_may_not_see_users_is_told_no_name(
    client: Client,
    staff: User,
    rose: User,
) -> None:
    allow(staff, AuditEvent)
    assert client.get(of_user(rose)).status_code == 403
    sub = encoding.parse(rose.password).header.sub
    html = client.get(EVENTS, {"q": sub, "of": rose.pk}).content.decode()
    assert sub in html
    assert "rose" not in html
    allow_users(staff)
    assert "rose" in client.get(EVENTS, {"q": sub, "of": rose.pk}).content.decode()


def test_nobody_is_named_whose_password_it_is_not(root: Client, rose: User) -> None:
    sub = encoding.parse(rose.password).header.sub
    make_event(sub="f" * 32)
    for query in (
        {"q": "f" * 32, "of": rose.pk},
        {"q": sub[:8], "of": rose.pk},
        {"of": rose.pk},
        {"q": sub, "of": "0"},
        {"q": sub, "of": "x_5F%00"},
    ):
        response = root.get(EVENTS, query)
        assert response.status_code == 200
        assert "rose" not in response.content.decode()
    assert root.get(of_user(rose).replace(f"/{rose.pk}/", "/0/")).status_code == 404
    assert root.post(of_user(rose)).status_code == 405


@pytest.mark.parametrize(
    ("mode", "told"), [("", "it is not sealed"), ("envelope", "sealed by a data key")]
)
def test_a_password_without_calls_of_its_own(
    mode: str, told: str, root: Client, rose: User, settings: Any
) -> None:
    if mode:
        settings.KMS_HASHER = {**settings.KMS_HASHER, "MODE": mode}
        rose.set_password("secret")
    else:
        rose.password = make_password("secret", hasher="argon2")
    rose.save()
    response = root.get(of_user(rose), follow=True)
    assert response.redirect_chain[-1][0] == f"/admin/auth/user/{rose.pk}/change/"
    assert told in response.content.decode()
