"""The admin: read-only, translated, quick, and at peace with a strict content policy."""

from __future__ import annotations

import datetime
import re
import uuid
from typing import Any

import pytest
from django.contrib.auth.models import Permission, User
from django.contrib.messages import get_messages
from django.db import DatabaseError, connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse
from django.utils import timezone

from kms_hasher import encoding, history, signals
from kms_hasher.admin import events as events_admin
from kms_hasher.models import AliasPeriod, AuditEvent, Key, RotationRun

pytestmark = pytest.mark.django_db

ARN = "arn:aws:kms:eu-central-1:111122223333:key/{}"
EVENTS = "/admin/kms_hasher/auditevent/"
MODELS = (Key, AliasPeriod, RotationRun, AuditEvent)


def make_key(number: int = 0) -> Key:
    arn = ARN.format(uuid.UUID(int=number, version=4))
    return history.record_key(arn, timezone.now() - datetime.timedelta(days=1))


def make_event(**changes: Any) -> AuditEvent:
    values = {
        "time": timezone.now(),
        "operation": "Decrypt",
        "purpose": "login",
        "outcome": signals.SUCCESS,
        "latency_us": 12345,
        "request_ids": str(uuid.uuid4()),
        "sub": uuid.uuid4().hex,
    }
    return AuditEvent.objects.create(**{**values, **changes})


def make_rotation(key: Key, **changes: Any) -> RotationRun:
    now = timezone.now()
    values = {"kind": "rewrap", "started_at": now, "updated_at": now, "key": key}
    return RotationRun.objects.create(**{**values, **changes})


def populate(number: int) -> None:
    for at in range(number):
        key = make_key(at)
        history.record_alias(f"alias/{at}", key, timezone.now(), moved=True)
        make_rotation(key, previous_key=make_key(at + 1))
        make_event(key_ref=key.ref)
        make_event(key_ref=make_key(0).ref, outcome=signals.DENIED)


def list_url(model: type[Any]) -> str:
    return reverse(f"admin:kms_hasher_{model._meta.model_name}_changelist")


def page_url(row: Any) -> str:
    return reverse(f"admin:kms_hasher_{row._meta.model_name}_change", args=[row.pk])


def listed(client: Client, query: str = "") -> set[int]:
    response = client.get(EVENTS + query)
    assert response.status_code == 200
    return {row.pk for row in response.context["cl"].result_list}


@pytest.fixture
def staff(client: Client, django_user_model: type[User]) -> User:
    user = django_user_model.objects.create(username="staff", is_staff=True, password="!")
    client.force_login(user)
    return user


@pytest.fixture
def admin(client: Client, staff: User) -> Client:
    """A client of somebody who may view everything."""
    allow(staff, *MODELS)
    return client


def allow(user: User, *models: type[Any]) -> None:
    names = [f"view_{model._meta.model_name}" for model in models]
    user.user_permissions.add(*Permission.objects.filter(codename__in=names))


# --- who may what -------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_without_the_permission_nothing_is_seen(
    model: type[Any], client: Client, staff: User
) -> None:
    populate(1)
    assert client.get(list_url(model)).status_code == 403
    assert client.get(page_url(model.objects.first())).status_code == 403
    allow(staff, model)
    assert client.get(list_url(model)).status_code == 200
    assert client.get(page_url(model.objects.first())).status_code == 200


@pytest.mark.parametrize("model", MODELS)
def test_not_even_a_superuser_can_change_anything(
    model: type[Any], admin_client: Client
) -> None:
    populate(1)
    row = model.objects.first()
    before = list(model.objects.values())
    assert admin_client.get(list_url(model) + "add/").status_code == 403
    assert admin_client.post(page_url(row), {"time": "", "arn": "x"}).status_code == 403
    delete = reverse(f"admin:kms_hasher_{model._meta.model_name}_delete", args=[row.pk])
    assert admin_client.post(delete, {"post": "yes"}).status_code == 403
    admin_client.post(
        list_url(model), {"action": "delete_selected", "_selected_action": row.pk}
    )
    assert list(model.objects.values()) == before
    assert b"deletelink" not in admin_client.get(page_url(row)).content


def test_a_keys_page_shows_only_what_its_reader_may_see(client: Client, staff: User) -> None:
    populate(1)
    allow(staff, Key)
    url = page_url(make_key(0))
    assert not {"chart", "events", "periods", "rotations"} & set(_context(client, url))
    allow(staff, *MODELS)
    assert {"chart", "events", "periods", "rotations"} <= set(_context(client, url))


def _context(client: Client, url: str) -> dict[str, Any]:
    context = client.get(url).context
    names = ("chart", "events", "periods", "rotations")
    return {name: context[name] for name in names if name in context}


# --- the pages ----------------------------------------------------------------------


def test_the_number_of_queries_does_not_grow(admin: Client) -> None:
    def numbers() -> list[int]:
        found = []
        for url in (*map(list_url, MODELS), page_url(make_key(0))):
            with CaptureQueriesContext(connection) as captured:
                assert admin.get(url).status_code == 200
            found.append(len(captured))
        return found

    populate(2)
    few = numbers()
    populate(20)
    assert numbers() == few
    assert max(few) < 13


def test_no_page_breaks_a_strict_content_security_policy(admin_client: Client) -> None:
    populate(2)
    urls = [*map(list_url, MODELS), *(page_url(model.objects.first()) for model in MODELS)]
    for url in urls:
        html = admin_client.get(url).content.decode()
        assert "kms_hasher/admin.css" in html
        assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:", html)
        for script in re.findall(r"<script[^>]*>", html):
            assert "src=" in script or 'type="application/json"' in script


def test_a_keys_page(admin: Client) -> None:
    old, new = make_key(1), make_key(2)
    then = timezone.now() - datetime.timedelta(hours=2)
    history.record_alias("alias/a", old, then)
    history.record_alias("alias/a", new, timezone.now(), moved=True)
    make_rotation(new, previous_key=old, rewritten=4321)
    shown = make_event(key_ref=old.ref, error_code="Shown", time=then)
    make_event(key_ref=new.ref, error_code="Hidden")
    response = admin.get(page_url(old))
    html = response.content.decode()
    assert old.arn in html
    assert "alias/a" in html
    assert "4321" in html or "4,321" in html
    assert "<svg" in html
    assert "Shown" in html
    assert "Hidden" not in html
    assert page_url(shown) in html
    assert f"{EVENTS}?key_ref={old.ref}" in html


def test_the_list_of_keys_tells_what_points_there_now(admin: Client) -> None:
    old, new = make_key(1), make_key(2)
    history.record_alias("alias/a", old, timezone.now() - datetime.timedelta(hours=2))
    history.record_alias("alias/a", new, timezone.now(), moved=True)
    Key.objects.filter(pk=old.pk).update(rows=1234, rows_counted_at=timezone.now())
    rows = re.findall(r"<tr>.*?</tr>", admin.get(list_url(Key)).content.decode(), re.DOTALL)
    told = {key: next(row for row in rows if str(key) in row) for key in (old, new)}
    assert "alias/a" in told[new]
    assert "alias/a" not in told[old]
    assert "1,234 as of" in told[old]
    assert "not counted yet" in told[new]


def test_counting_stored_passwords(
    admin: Client, django_user_model: type[User], key_arn: str
) -> None:
    key, unused = history.record_key(key_arn, timezone.now()), make_key(5)
    for number in range(3):
        django_user_model.objects.create_user(f"user{number}", password="secret")
    response = admin.post(
        list_url(Key), {"action": "count_stored_passwords", "_selected_action": key.pk}
    )
    assert [str(message) for message in get_messages(response.wsgi_request)] == [
        "3 stored passwords are sealed by a key."
    ]
    key.refresh_from_db()
    unused.refresh_from_db()
    assert (key.rows, unused.rows) == (3, 0)
    assert key.rows_counted_at


def test_counting_that_fails_is_told(admin: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise DatabaseError("no such table")

    monkeypatch.setattr(history, "record_counts", fail)
    response = admin.post(
        list_url(Key),
        {"action": "count_stored_passwords", "_selected_action": make_key().pk},
    )
    assert "no such table" in [str(m) for m in get_messages(response.wsgi_request)]


@pytest.mark.parametrize(
    ("minutes", "state", "shown"),
    [
        (1, "running", "running"),
        (11, "running", "interrupted?"),
        (11, "finished", "finished"),
        (11, "failed", "failed"),
    ],
)
def test_a_rotation_without_sign_of_life(
    minutes: int, state: str, shown: str, admin: Client
) -> None:
    then = timezone.now() - datetime.timedelta(minutes=minutes)
    rotation = make_rotation(
        make_key(1),
        previous_key=make_key(2),
        state=state,
        started_at=then - datetime.timedelta(seconds=75),
        updated_at=then,
    )
    for url in (list_url(RotationRun), page_url(rotation)):
        html = admin.get(url).content.decode()
        assert shown in re.findall(
            r"field-state_now[^>]*>\s*(?:<[^>]*>\s*)*([\w?]+)", html
        ) or (f">{shown}<" in html)
        assert "0:01:15" in html
    assert "→" in admin.get(list_url(RotationRun)).content.decode()


# --- events -------------------------------------------------------------------------


def test_filters(admin: Client) -> None:
    key = make_key(1)
    denied = make_event(outcome=signals.DENIED)
    made = make_event(operation="CreateKey", purpose="rotate")
    sealed = make_event(key_ref=key.ref)
    assert listed(admin) == {denied.pk, made.pk, sealed.pk}
    assert listed(admin, "?outcome=denied") == {denied.pk}
    assert listed(admin, "?operation=CreateKey") == {made.pk}
    assert listed(admin, "?purpose=rotate") == {made.pk}
    assert listed(admin, f"?key_ref={key.ref}") == {sealed.pk}
    assert listed(admin, f"?key_ref={key.ref}&outcome=denied") == set()


def test_every_outcome_and_operation_can_be_chosen(admin: Client) -> None:
    make_event()
    html = admin.get(EVENTS).content.decode()
    for choice in (*signals.OUTCOMES, "ReEncrypt", "Parse", "unwrap"):
        assert f"={choice}" in html


def test_search(admin: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    one = make_event(sub="0123456789abcdef" * 2)
    two = make_event(sub="f" * 32)
    retried = make_event(request_ids=f"{uuid.uuid4()} {uuid.uuid4()}")
    assert listed(admin, f"?q={one.sub}") == {one.pk}
    assert listed(admin, "?q=%200123456789ABC%20") == {one.pk}
    assert listed(admin, "?q=ffffff") == {two.pk}
    assert listed(admin, f"?q={two.request_ids}") == {two.pk}
    for request_id in retried.request_ids.split():
        assert listed(admin, f"?q={request_id}") == {retried.pk}
    for nothing in ("0123456789abd0", "nonsense", "%25", "fffff"):
        assert listed(admin, f"?q={nothing}") == set()
    monkeypatch.setattr(events_admin, "MAX_SEARCHED", 1)
    response = admin.get(f"{EVENTS}?q={one.request_ids}")
    assert not response.context["cl"].result_list
    assert "Only the newest 1 events were searched" in response.content.decode()
    today = timezone.localtime(one.time)
    day = f"time__year={today.year}&time__month={today.month}&time__day={today.day}"
    assert listed(admin, f"?q={one.request_ids}&{day}") == {one.pk}


def test_pages_end_where_the_list_would_become_slow(
    admin: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events_admin, "MAX_LISTED", 3)
    for _ in range(2):
        make_event()
    assert "newest" not in admin.get(EVENTS).content.decode()
    for _ in range(3):
        make_event()
    response = admin.get(EVENTS)
    assert response.context["cl"].result_count == 3
    assert "These are the newest 3 of the events asked for" in response.content.decode()
    assert "about 5." in response.content.decode()


def choices(client: Client, query: str = "") -> tuple[str, list[str]]:
    """Return the link back and the choices of the date hierarchy."""
    dates = client.get(EVENTS + query).context["cl"].dates
    back = dates["back"]["title"] if dates["back"] else ""
    return back, [choice["title"] for choice in dates["choices"]]


def test_dates_of_a_few_days_and_of_many_months(admin: Client) -> None:
    assert choices(admin) == ("", [])
    noon = datetime.datetime(2026, 3, 3, 12, tzinfo=datetime.timezone.utc)
    last = make_event(time=noon)
    make_event(time=noon - datetime.timedelta(days=2))
    assert choices(admin) == ("", ["March 1", "March 2", "March 3"])
    make_event(time=noon - datetime.timedelta(days=35))
    assert choices(admin) == ("", ["January 2026", "February 2026", "March 2026"])
    march = "?time__year=2026&time__month=3"
    assert choices(admin, march) == ("All dates", ["March 1", "March 2", "March 3"])
    assert choices(admin, f"{march}&time__day=3") == ("March 2026", ["March 3"])
    assert listed(admin, f"{march}&time__day=3") == {last.pk}
    assert len(choices(admin, "?time__year=2026")[1]) == 3
    html = admin.get(f"{EVENTS}?outcome=success").content.decode()
    assert "?outcome=success&amp;time__month=3&amp;time__year=2026" in html


@pytest.mark.parametrize(
    "query", ["time__year=x", "time__year=2026&time__month=13", "p=999", "p=x", "q=%00"]
)
def test_nonsense_in_the_address(query: str, admin: Client) -> None:
    make_event()
    assert admin.get(f"{EVENTS}?{query}", follow=True).status_code == 200


def test_an_events_page(admin: Client) -> None:
    key = make_key(1)
    event = make_event(key_ref=key.ref, latency_us=1234567, request_ids="first second")
    html = admin.get(page_url(event)).content.decode()
    assert "1,234.6 ms" in html
    assert "first second" in html
    assert encoding.key_id(key.ref) in html
    assert f"?q={event.sub}" in html
    odd = make_event(key_ref="<odd>", sub="", error_code="<script>")
    html = admin.get(page_url(odd)).content.decode()
    assert "<odd>" not in html
    assert "&lt;odd&gt;" in html
    assert "<script>" not in html
