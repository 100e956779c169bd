"""The admin: read-only, translated, quick, and at peace with a strict content policy."""

from __future__ import annotations

import contextlib
import datetime
import json
import re
import uuid
from collections.abc import Iterator
from html import unescape
from typing import Any

import pytest
from django.contrib.admin.models import CHANGE, LogEntry
from django.contrib.auth.models import Permission, User
from django.contrib.messages import get_messages
from django.db import DatabaseError, connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse
from django.utils import timezone

from kms_hasher import encoding, history, signals
from kms_hasher.admin import event_list
from kms_hasher.admin import events as events_admin
from kms_hasher.admin.base import NONE, ON_PAGE
from kms_hasher.audit import store
from kms_hasher.models import (
    AliasPeriod,
    AuditEvent,
    AuditFinding,
    AuditSeal,
    Key,
    RotationRun,
    RotationShard,
)
from kms_hasher.rotation import runs, shards
from tests import test_audit

pytestmark = pytest.mark.django_db

ARN = "arn:aws:kms:eu-central-1:111122223333:key/{}"
EVENTS = "/admin/kms_hasher/auditevent/"
MODELS = (Key, AliasPeriod, RotationRun, AuditEvent, AuditSeal, AuditFinding)


def make_arn(number: int) -> str:
    return ARN.format(uuid.UUID(int=number, version=4))


def make_key(number: int = 0) -> Key:
    return history.record_key(make_arn(number), timezone.now() - datetime.timedelta(days=1))


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


def make_shard(run: RotationRun, number: int = 1, **changes: Any) -> RotationShard:
    values = {"sweep": run.sweep, "database": "default", "column": "auth.User.password"}
    return RotationShard.objects.create(run=run, number=number, **{**values, **changes})


def make_finding(**changes: Any) -> AuditFinding:
    now = timezone.now()
    values = {
        "kind": AuditFinding.Kind.UNKNOWN_CALL,
        "severity": "warning",
        "dedup_key": uuid.uuid4().hex,
        "subject": "Decrypt by nobody here",
        "first_seen": now,
        "last_seen": now,
    }
    return AuditFinding.objects.create(**{**values, **changes})


def make_seal(**changes: Any) -> AuditSeal:
    values = {
        "sequence": AuditSeal.objects.count() + 1,
        "version": 1,
        "sealed_at": timezone.now(),
        "after_id": 0,
        "last_id": 0,
        "count": 1,
        "root": uuid.uuid4().hex * 2,
        "previous": uuid.uuid4().hex * 2,
        "leaves": b"",
    }
    return AuditSeal.objects.create(**{**values, **changes})


def populate(number: int) -> None:
    for at in range(number):
        key = make_key(at)
        history.record_alias(f"alias/{at}", key, timezone.now(), moved=True)
        run = make_rotation(key, previous_key=make_key(at + 1), sweep=1, total=9)
        make_shard(run, failed=1, bad=[["1", "bad"]])
        make_event(key_ref=key.ref)
        make_event(key_ref=make_key(0).ref, outcome=signals.DENIED)
        make_finding()
        make_seal()


def list_url(model: type[Any]) -> str:
    return reverse(f"admin:kms_hasher_{model._meta.model_name}_changelist")


def page_url(row: Any) -> str:
    return reverse(f"admin:kms_hasher_{row._meta.model_name}_change", args=[row.pk])


def listed(client: Client, query: str = "") -> set[int]:
    response = client.get(EVENTS + query)
    assert response.status_code == 200
    return {row.pk for row in response.context["cl"].result_list}


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
        run = RotationRun.objects.order_by("pk").first()
        for url in (*map(list_url, MODELS), page_url(make_key(0)), page_url(run)):
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
    urls = [f"{EVENTS}dashboard/", *map(list_url, MODELS)]
    urls += [page_url(model.objects.first()) for model in MODELS]
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


# --- runs: how far they are ---------------------------------------------------------


def live(client: Client, run: RotationRun, since: str = "") -> dict[str, Any]:
    """Return what the script on the run's page is told."""
    response = client.get(run_url(run, "progress"), {"since": since} if since else {})
    assert response.status_code == 200
    assert "no-store" in response["Cache-Control"]
    told: dict[str, Any] = response.json()
    return told


def run_url(run: RotationRun, name: str) -> str:
    return reverse(f"admin:kms_hasher_rotationrun_{name}", args=[run.pk])


def texts(client: Client, run: RotationRun, since: str = "") -> dict[str, str]:
    """Return the figures; those on the page and those for its script are the same."""
    told: dict[str, str] = live(client, run, since)["texts"]
    html = client.get(page_url(run), {"since": since} if since else {}).content.decode()
    on_page = dict(re.findall(r'data-kms="(\w+)">([^<]*)<', html))
    assert {name: unescape(text) for name, text in on_page.items()} == told
    return told


def test_how_far_the_first_sweep_is(admin: Client) -> None:
    run = make_rotation(make_key(), sweep=1, total=4000, rewritten=1234, overtaken=5, failed=6)
    make_shard(run, 1, looked=1000, state="done")
    make_shard(run, 2, looked=240)
    told = texts(admin, run)
    assert told["progress"] == "Sweep 1: 1,240 of 4,000 rows, 1 of 2 shards done"
    assert told["percent"] == "31\N{NO-BREAK SPACE}%"
    assert (told["rewritten"], told["overtaken"], told["failed"]) == ("1,234", "5", "6")
    assert live(admin, run)["share"] == "0.3100"
    html = admin.get(list_url(RotationRun)).content.decode()
    assert '<progress max="1" value="0.3100"' in html
    assert "31\N{NO-BREAK SPACE}%" in html


@pytest.mark.parametrize(
    ("values", "share"),
    [
        ({"sweep": 1, "total": 500}, "1.0000"),  # rows were added since they were counted
        ({"sweep": 1, "total": 0}, "0.5000"),
        ({"sweep": 3, "total": 10**9}, "0.5000"),  # later sweeps count shards
        ({"sweep": 3, "state": "finished"}, "1.0000"),
        ({"sweep": 7, "total": 10**9}, "0.0000"),  # it has no shards yet
        ({"sweep": 0, "state": "failed"}, "0.0000"),
    ],
)
def test_the_share(values: dict[str, Any], share: str, admin: Client) -> None:
    run = make_rotation(make_key(), **values)
    for number, state in enumerate(("done", "waiting")):
        for sweep in (1, 2, 3):
            make_shard(run, number, sweep=sweep, state=state, looked=400)
    assert live(admin, run)["share"] == share


def test_the_rate_is_measured_between_two_looks(admin: Client) -> None:
    now = timezone.now()
    run = make_rotation(
        make_key(), sweep=1, total=4000, calls=600, started_at=now - datetime.timedelta(0, 60)
    )
    make_shard(run, looked=1000)
    told = live(admin, run)
    assert told["texts"]["rate"] == "10 calls/s on average"
    assert told["texts"]["left"] == NONE
    same = live(admin, run, told["mark"])["texts"]
    assert (same["rate"], same["left"]) == (NONE, NONE)
    later = now + datetime.timedelta(seconds=4)
    RotationRun.objects.update(calls=1000, updated_at=later, rate=2.5)
    measured = texts(admin, run, told["mark"])
    assert measured["rate"] == "100 calls/s"
    assert measured["left"] == "0:00:30"
    assert measured["cap"] == "2.5 calls/s"
    RotationRun.objects.update(state="paused")
    assert texts(admin, run, told["mark"])["left"] == NONE
    RotationRun.objects.update(state="finished", finished_at=later)
    assert texts(admin, run, told["mark"])["rate"] == "16 calls/s on average"


@pytest.mark.parametrize(
    "since",
    ["x", "nan-1", "1.000000-99999999999999999999", "1-1", "9" * 999, "<b>", "٣.٣٣٣٣٣٣-٣"],
)
def test_nonsense_for_a_mark(since: str, admin: Client) -> None:
    run = make_rotation(make_key(), sweep=1, total=5, calls=5)
    assert texts(admin, run, since)["rate"] == NONE


def test_a_rate_next_to_nothing(admin: Client) -> None:
    run = make_rotation(make_key(), sweep=1, total=10**18, calls=5)
    for since in ("0.000000-4", "0.000000-999"):
        assert texts(admin, run, since)["left"]


def test_the_shards_that_matter_come_first(admin: Client) -> None:
    run = make_rotation(make_key(), sweep=2, total=5)
    make_shard(run, 1, sweep=1)
    for number, state in enumerate(("done", "waiting", "failed", "working")):
        make_shard(run, number, state=state)
    assert [row[2] for row in live(admin, run)["shards"]] == [
        "left by its worker",
        "failed",
        "waiting",
        "done",
    ]
    for number in range(10, 10 + ON_PAGE):
        make_shard(run, number, state="done")
    assert len(live(admin, run)["shards"]) == ON_PAGE
    assert admin.get(page_url(run)).content.decode().count("auth.User.password") == ON_PAGE


@pytest.mark.parametrize(
    ("after", "upto", "cursor", "state", "shown"),
    [
        ("100", "300", "150", "working", "25\N{NO-BREAK SPACE}%"),
        ("", "200", "100", "working", "50\N{NO-BREAK SPACE}%"),
        ("100", "200", "900", "failed", "100\N{NO-BREAK SPACE}%"),
        ("100", "", "150", "working", "up to 150"),
        ("", "", "", "waiting", NONE),
        ("", "", '"b6"', "waiting", "up to b6"),
        ("[1, 2]", "[9, 9]", '[3, "x"]', "waiting", "up to 3, x"),
        ("", "", "not json", "waiting", "up to not json"),
        ("", "", "", "done", "100\N{NO-BREAK SPACE}%"),
    ],
)
def test_how_far_a_shard_is(
    after: str, upto: str, cursor: str, state: str, shown: str, admin: Client
) -> None:
    run = make_rotation(make_key(), sweep=1, total=5)
    make_shard(run, after=after, upto=upto, cursor=cursor, state=state)
    assert live(admin, run)["shards"][0][1] == shown


def test_a_shard_that_somebody_works_on(admin: Client) -> None:
    run = make_rotation(make_key(), sweep=1, total=5)
    with shards.owner() as owner:
        shard = make_shard(run, database="other")
        RotationShard.objects.filter(pk=shard.pk).update(
            state="working", owner=owner, updated_at=timezone.now()
        )
        row = live(admin, run)["shards"][0]
    assert row[0] == "auth.User.password (other)"
    assert row[2:4] == ["being worked on", owner]


def test_bad_rows_are_named(admin: Client) -> None:
    run = make_rotation(make_key(), sweep=2, total=5, failed=3)
    twice = [["1", "why"], ['"u-2"', "because"], ["1", "why"]]
    make_shard(run, 1, sweep=1, failed=3, bad=twice, state="done")
    shard = make_shard(run, 2, failed=1, bad=[["3", "new"]])
    column = "auth.User.password"
    # The sweep has not come far, and the one before found more.
    assert live(admin, run)["bad"] == [[column, "1", "why"], [column, "u-2", "because"]]
    RotationShard.objects.filter(pk=shard.pk).update(state="done")
    assert live(admin, run)["bad"] == [[column, "3", "new"]]
    many = [[str(pk), "many"] for pk in range(ON_PAGE * 2)]
    RotationShard.objects.filter(pk=shard.pk).update(bad=many, failed=len(many))
    assert len(live(admin, run)["bad"]) == ON_PAGE


def test_the_plan_is_readable(admin: Client) -> None:
    options = {"batch_size": 1500, "rate": None, "sleep": 0.5, "settle": 5.0, "odd": True}
    planned = {"options": options, "left": ["", "arn:a"], "material": "", "more": {"a": 1}}
    run = make_rotation(make_key(), plan=planned)
    html = unescape(admin.get(page_url(run)).content.decode())
    for line in (
        "rows read at a time: 1,500",
        "seconds between two pages of rows: 0.5",
        "seconds for a moved alias to spread: 5",
        "odd: yes",
        "keys the alias may still lead to: arn:a",
        'more: {"a": 1}',
    ):
        assert f"<div>{line}</div>" in html
    assert "key material" not in html
    for other in ([], ["<i>"], "text", 5, None, {"options": 5}):
        run = make_rotation(make_key(), plan=other if other is not None else {})
        assert admin.get(page_url(run)).status_code == 200


HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&{{ 7|add:7 }}"


def test_hostile_strings_stay_text(admin: Client) -> None:
    run = make_rotation(
        make_key(),
        sweep=1,
        total=5,
        failed=1,
        owner=HOSTILE,
        started_by=HOSTILE,
        alias=HOSTILE,
        error=HOSTILE,
        state="failed",
        plan={"options": {HOSTILE: HOSTILE}, HOSTILE: [HOSTILE]},
    )
    bad = [[json.dumps(HOSTILE), HOSTILE], [HOSTILE, HOSTILE]]
    names = {"column": HOSTILE, "database": HOSTILE, "owner": HOSTILE, "error": HOSTILE}
    make_shard(run, failed=2, bad=bad, cursor=HOSTILE, **names)
    response = admin.get(page_url(run))
    assert response.content.decode().count("&lt;script&gt;alert(1)") > 10
    for url in (page_url(run), list_url(RotationRun)):
        html = admin.get(url).content.decode()
        assert "<script>" not in html
        assert "<img src=x" not in html
        assert "14" not in re.findall(r"&amp;(\S+)", html)
    response = admin.get(run_url(run, "progress"))
    assert response["Content-Type"] == "application/json"
    assert response.json()["shards"][0][3] == HOSTILE


def test_what_the_script_asks_for_is_cheap(admin: Client) -> None:
    run = make_rotation(make_key(), previous_key=make_key(1), sweep=2, total=5, failed=9)

    def queries() -> int:
        with CaptureQueriesContext(connection) as captured:
            live(admin, run)
        assert not any("UPDATE" in query["sql"] for query in captured.captured_queries)
        return len(captured)

    for number in range(3):
        make_shard(run, number, failed=1, bad=[["1", "bad"]])
    few = queries()
    for number in range(3, 100):
        make_shard(run, number, failed=1, bad=[[str(number), "bad"]])
    # Session, user, two of permissions; run, sums, whether it is gone on with, shards, bad.
    assert queries() == few == 10


def test_the_script_is_told_of_the_end(admin: Client) -> None:
    run = make_rotation(make_key())
    html = admin.get(page_url(run)).content.decode()
    assert "kms_hasher/rotation.js" in html
    assert f'data-url="{run_url(run, "progress")}"' in html
    assert "data-mark=" in html
    assert "?since=" in html  # without the script
    for state in runs.State:
        RotationRun.objects.update(state=state)
        on = state in ("running", "paused")
        assert live(admin, run)["on"] is on
        assert ("data-mark=" in admin.get(page_url(run)).content.decode()) is on


# --- runs: steering them ------------------------------------------------------------

WISHES = ("pause", "resume", "cancel")


@pytest.fixture
def controller(admin: Client, staff: User) -> Client:
    """A client of somebody who may view everything and steer runs."""
    staff.user_permissions.add(Permission.objects.get(codename="control_rotationrun"))
    return admin


def steer(client: Client, run: RotationRun, wish: str) -> tuple[str, list[str]]:
    """Return the run's state then and what its page says."""
    response = client.post(run_url(run, wish), {"sure": "yes"}, follow=True)
    assert response.redirect_chain == [(page_url(run), 302)]
    told = [f"{message.level_tag}: {message}" for message in response.context["messages"]]
    run.refresh_from_db()
    return run.state, told


@contextlib.contextmanager
def conducted(run: RotationRun) -> Iterator[None]:
    with shards.owner() as owner:
        values = {"owner": owner, "updated_at": timezone.now()}
        RotationRun.objects.filter(pk=run.pk).update(**values)
        yield


def test_pause_resume_and_cancel(controller: Client, staff: User) -> None:
    run = make_rotation(make_key())
    with conducted(run):
        state, [told] = steer(controller, run, "pause")
        assert (state, told.split(":")[0]) == ("paused", "success")
        assert "waits to be told" in texts(controller, run)["note"]
        state, [told] = steer(controller, run, "resume")
        assert (state, told) == ("running", "success: The run may go on.")
        assert texts(controller, run)["note"] == ""
        state, [told] = steer(controller, run, "cancel")
        assert (state, told.split(":")[0]) == ("cancelled", "success")
        assert texts(controller, run)["note"] == ""
    entries = LogEntry.objects.order_by("pk")
    assert [entry.get_change_message() for entry in entries] == [
        "Paused the run.",
        "Resumed the run.",
        "Cancelled the run.",
    ]
    for entry in entries:
        assert (entry.user, entry.action_flag) == (staff, CHANGE)
        assert entry.get_edited_object() == run
    assert "Cancelled the run." in controller.get(run_url(run, "history")).content.decode()
    assert run_url(run, "history") in controller.get(page_url(run)).content.decode()


@pytest.mark.parametrize("wish", WISHES)
@pytest.mark.parametrize("state", list(runs.State))
def test_what_the_state_does_not_allow(wish: str, state: str, controller: Client) -> None:
    run = make_rotation(make_key(), state=state)
    allowed = {
        "pause": state == "running",
        "resume": state == "paused",
        "cancel": state not in ("finished", "cancelled"),
    }
    assert live(controller, run)["allowed"] == [name for name in WISHES if allowed[name]]
    html = controller.get(page_url(run)).content.decode()
    for name in WISHES:
        button = re.search(rf'<button[^>]*data-kms-wish="{name}"[^>]*>', html)
        assert button and (" hidden" not in button[0]) is allowed[name]
    then, [told] = steer(controller, run, wish)
    assert (then != state) is allowed[wish]
    assert LogEntry.objects.exists() is allowed[wish]
    if not allowed[wish]:
        assert told.startswith("error: Not ")
        assert told.endswith(f"Its state is: {state}.")


def test_cancel_asks_first(controller: Client) -> None:
    commands = {
        "rewrap": "manage.py rotate_kms_key",
        "new-key": "manage.py rotate_kms_key",  # not one more new key
        "to-key": "manage.py rotate_kms_key",
        "new-material": "manage.py rotate_kms_key --new-material",
        "wrap": "manage.py wrap_passwords",
        "unwrap": "manage.py unwrap_passwords",
        "to-mode": "manage.py rotate_kms_key --to-mode envelope",
        "new-data-keys": "manage.py rotate_kms_key --new-data-keys",
    }
    assert set(commands) == set(RotationRun.Kind)
    for kind, command in commands.items():
        run = make_rotation(make_key(), kind=kind, plan={"mode": "envelope"})
        response = controller.post(run_url(run, "cancel"))
        html = response.content.decode()
        assert response.status_code == 200
        assert "Rows stay as they are." in html
        assert re.search(r"both( keys)? work", html)
        assert f"<code>{command}</code>" in html
        assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:|<script>", html)
        assert f'href="{page_url(run)}"' in html
        run.refresh_from_db()
        assert run.state == "running"
    assert not LogEntry.objects.exists()


@pytest.mark.parametrize(
    ("kind", "command"),
    [
        ("rewrap", "rotate_kms_key"),
        ("new-key", "rotate_kms_key --new-key"),
        ("to-key", f"rotate_kms_key --to {make_arn(0)}"),
        ("new-material", "rotate_kms_key --new-material"),
        ("wrap", "wrap_passwords"),
        ("unwrap", "unwrap_passwords"),
        ("to-mode", "rotate_kms_key --to-mode envelope"),
        ("new-data-keys", "rotate_kms_key --new-data-keys"),
    ],
)
@pytest.mark.parametrize("state", ["running", "paused", "interrupted", "failed"])
def test_what_goes_on_with_a_run_that_nobody_conducts(
    state: str, kind: str, command: str, controller: Client
) -> None:
    plan = {"mode": "envelope"}
    run = make_rotation(make_key(), kind=kind, state=state, plan=plan)
    told = texts(controller, run)
    assert told["command"] == f"manage.py {command}"
    assert told["note"] == "No process conducts it now. This goes on with it:"
    if state == "paused":
        then, [message] = steer(controller, run, "resume")
        assert then == "running"
        assert message.startswith("warning: The run may go on. No process conducts it now.")
        assert message.endswith(f"manage.py {command}")
    make_rotation(make_key(), kind=kind)
    told = texts(controller, run)
    assert told["command"] == ""
    assert "a later run has taken its place" in told["note"]


@pytest.mark.parametrize("wish", WISHES)
def test_steering_needs_its_own_permission(wish: str, client: Client, staff: User) -> None:
    run = make_rotation(make_key(), state="paused" if wish == "resume" else "running")
    url = run_url(run, wish)
    assert Client().post(url, {"sure": "yes"}).status_code == 302  # to the login
    assert client.post(url, {"sure": "yes"}).status_code == 403
    control = Permission.objects.get(codename="control_rotationrun")
    staff.user_permissions.add(control)
    assert client.post(url, {"sure": "yes"}).status_code == 403  # may not even see it
    staff.user_permissions.remove(control)
    allow(staff, RotationRun)
    assert client.post(url, {"sure": "yes"}).status_code == 403
    assert client.post(url).status_code == 403
    html = client.get(page_url(run)).content.decode()
    assert "data-kms-wish" not in html
    assert "formaction" not in html
    before = run.state
    run.refresh_from_db()
    assert run.state == before
    staff.user_permissions.add(control)
    assert client.get(url).status_code == 405
    assert steer(client, run, wish)[0] != before


@pytest.mark.parametrize("wish", WISHES)
def test_steering_is_safe_from_other_sites(wish: str, controller: Client, staff: User) -> None:
    run = make_rotation(make_key(), state="paused" if wish == "resume" else "running")
    strict = Client(enforce_csrf_checks=True)
    strict.force_login(staff)
    assert strict.post(run_url(run, wish), {"sure": "yes"}).status_code == 403
    before = run.state
    run.refresh_from_db()
    assert run.state == before
    html = strict.get(page_url(run)).content.decode()
    found = re.search(r'name="csrfmiddlewaretoken" value="(\w+)"', html)
    assert found
    token = {"csrfmiddlewaretoken": found[1]}
    if wish == "cancel":
        html = strict.post(run_url(run, wish), token).content.decode()
        assert 'name="csrfmiddlewaretoken"' in html
    assert strict.post(run_url(run, wish), {**token, "sure": "yes"}).status_code == 302
    run.refresh_from_db()
    assert run.state != before


def test_the_figures_need_the_view_permission(client: Client, staff: User) -> None:
    run = make_rotation(make_key())
    url = run_url(run, "progress")
    assert Client().get(url).status_code == 302
    assert client.get(url).status_code == 403
    assert client.get(url.replace(f"/{run.pk}/", "/0/")).status_code == 403
    allow(staff, RotationRun)
    assert client.get(url).status_code == 200
    assert client.post(url).status_code == 405
    for nothing in ("0", "x", "1_2F2"):
        assert client.get(url.replace(f"/{run.pk}/", f"/{nothing}/")).status_code == 404


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


def test_pages_follow_each_other_and_hold_each_event_once(
    admin: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events_admin.AuditEventAdmin, "list_per_page", 2)
    now = timezone.now()
    same = [make_event(time=now).pk for _ in range(3)]  # a rotation's, of one microsecond
    older = [make_event(time=now - datetime.timedelta(hours=h)).pk for h in (1, 2)]
    expected = [*reversed(same), *older]
    query, pages = "", []
    while True:
        page = admin.get(EVENTS + query).context["cl"]
        pages.append([event.pk for event in page.result_list])
        if not page.older:
            break
        make_event(outcome=signals.DENIED)  # what comes in meanwhile moves nothing
        query = page.older
    assert [pk for page in pages for pk in page] == expected
    assert [len(page) for page in pages] == [2, 2, 1]
    assert page.newest == "?"
    assert [event.pk for event in admin.get(EVENTS + page.newer).context["cl"].result_list] == (
        pages[1]
    )


def test_a_position_is_left_behind_where_it_means_nothing(admin: Client) -> None:
    make_event(time=timezone.now() - datetime.timedelta(days=2))
    position = event_list.Position(timezone.now(), 10**6)
    assert event_list.Position.parse(str(position)) == position
    html = admin.get(f"{EVENTS}?before={position}&outcome=success").content.decode()
    assert f"before={position}" not in html
    assert admin.get(f"{EVENTS}?before={position}").context["cl"].newest == "?"


def test_the_list_reads_as_many_rows_as_it_shows(
    admin: Client, django_assert_max_num_queries: Any
) -> None:
    make_event()
    with django_assert_max_num_queries(10) as captured:
        admin.get(f"{EVENTS}?outcome=success")
    assert not any("COUNT(" in query["sql"] for query in captured.captured_queries)


def test_how_many_there_are_comes_from_the_rollups(admin: Client) -> None:
    now = timezone.localtime()
    store.write([test_audit.event(time=now, sub="a", outcome=o) for o in ("success", "denied")])
    month = f"time__year={now.year}&time__month={now.month}"
    assert "About 2 events in all." in admin.get(EVENTS).content.decode()
    year = f"time__year={now.year}"
    for query, number in ((year, 2), (month, 2), (f"{month}&time__day={now.day}", 2)):
        assert (
            f"About {number} events in this" in admin.get(f"{EVENTS}?{query}").content.decode()
        )
    assert "About 0 events" in admin.get(f"{EVENTS}?time__year=2020").content.decode()
    html = admin.get(f"{EVENTS}?{month}&outcome=denied").content.decode()
    assert "About 1 events in this" in html
    assert "About" not in admin.get(f"{EVENTS}?outcome=denied").content.decode()


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


def test_one_event_of_a_clock_that_was_wrong_makes_no_list_of_days(admin: Client) -> None:
    make_event(time=datetime.datetime(1970, 1, 2, tzinfo=datetime.timezone.utc))
    make_event(time=datetime.datetime(2026, 3, 3, tzinfo=datetime.timezone.utc))
    assert choices(admin)[1] == [str(year) for year in range(1970, 2027)]
    assert choices(admin, "?time__year=1980")[1][:2] == ["January 1980", "February 1980"]
    assert choices(admin, "?time__year=2026")[1][-1] == "March 2026"
    assert len(choices(admin, "?time__year=1980&time__month=2")[1]) == 29
    assert choices(admin, "?time__year=2030") == ("All dates", [])


@pytest.mark.parametrize(
    "query",
    [
        "time__year=x",
        "time__year=2026&time__month=13",
        "p=999",
        "p=x",
        "q=%00",
        "before=x",
        "time__month=1&time__day=40",
        "time__year=2028&time__month=2&time__day=29",
        "after=1-1&time__day=3",
        "time__year=9999",
        "time__year=1",
        "time__year=9999&time__month=12&time__day=31",
        "time__gte=9999-12-31T23:59:59-05:00",
        "time__lt=0001-01-01T00:00:00%2B05:00",
        "time__year=10000",
        "time__year=99999999999999999999",
        "time__year=2026&time__month=-99999999999999999999",
    ],
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
