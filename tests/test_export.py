"""Events as files: complete, harmless to spreadsheets, and no more than a page in memory."""

from __future__ import annotations

import csv
import datetime
import io
import json
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.contrib.auth.models import Permission, User
from django.db import connection
from django.test import AsyncClient, Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from kms_hasher import signals
from kms_hasher.admin import export
from kms_hasher.models import AuditEvent
from tests.test_admin import (
    EVENTS,
    allow,
    listed,
    make_event,
    make_key,
)

pytestmark = pytest.mark.django_db

FORMATS = tuple(export.FORMATS)


def url(name: str) -> str:
    return f"{EVENTS}export/{name}/"


def text_of(response: Any) -> str:
    assert response.status_code == 200
    return b"".join(response).decode()


def rows(client: Client, query: str = "") -> list[dict[str, str]]:
    text = text_of(client.get(url("csv") + query))
    return list(csv.DictReader(io.StringIO(text, newline="")))


def objects(client: Client, query: str = "") -> list[dict[str, Any]]:
    return [json.loads(line) for line in text_of(client.get(url("jsonl") + query)).splitlines()]


@pytest.mark.parametrize("name", FORMATS)
def test_it_takes_both_permissions(name: str, client: Client, staff: User) -> None:
    make_event()
    exports = Permission.objects.get(codename="export_auditevent")
    assert Client().get(url(name)).status_code == 302
    assert client.get(url(name)).status_code == 403
    staff.user_permissions.add(exports)
    assert client.get(url(name)).status_code == 403
    staff.user_permissions.remove(exports)
    allow(staff, AuditEvent)
    assert client.get(url(name)).status_code == 403
    assert url(name) not in client.get(EVENTS).content.decode()
    staff.user_permissions.add(exports)
    assert client.get(url(name)).status_code == 200
    assert url(name) in client.get(EVENTS).content.decode()
    assert client.post(url(name)).status_code == 405


def test_all_pages_of_what_the_list_shows(
    root: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "PAGE", 2)
    now = timezone.now()
    same = [make_event(time=now).pk for _ in range(3)]
    older = [make_event(time=now - datetime.timedelta(hours=h)).pk for h in (1, 2)]
    denied = make_event(outcome=signals.DENIED, sub="0123456789abcdef" * 2)
    expected = [denied.pk, *reversed(same), *older]
    assert [int(row["id"]) for row in rows(root)] == expected
    assert [each["id"] for each in objects(root)] == expected
    for query in ("?outcome=denied", "?q=012345678", "?outcome=denied&before=1-1", "?q=zzz"):
        found = {int(row["id"]) for row in rows(root, query)}
        assert found == {each["id"] for each in objects(root, query)}
        assert found == listed(root, query.replace("&before=1-1", ""))


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_read_at_a_time_is_bounded(
    name: str, root: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "PAGE", 3)
    for _ in range(9):
        make_event()
    response = root.get(url(name))
    queries, sizes = [], []
    parts = iter(response)
    while True:
        with CaptureQueriesContext(connection) as captured:
            part = next(parts, None)
        queries.append(len(captured))
        if part is None:
            break
        sizes.append(part.count(b"\n"))
        assert all("LIMIT 3" in q["sql"] for q in captured if "auditevent" in q["sql"])
        if b"Decrypt" in part:
            make_event()  # what comes in meanwhile is not exported, and moves nothing
    assert [size for size in sizes if size] == ([1] if name == "csv" else []) + [3, 3, 3]
    assert sum(queries) == (4 if name == "csv" else 5)  # of JSON one for the ARNs


@pytest.mark.parametrize("start", export.FORMULA)
def test_no_cell_is_a_formula(start: str, root: Client) -> None:
    evil = f'{start}cmd|" /C calc"!A0,"x"\r\n{start}1'
    make_event(error_code=evil[:64], requested_key=evil, operation=f"{start}1+1"[:32])
    [row] = rows(root)
    for name in ("error_code", "requested_key", "operation"):
        assert row[name].startswith("'" + start)
    assert row["requested_key"] == "'" + evil
    [told] = objects(root)
    assert told["requested_key"] == evil  # a SIEM computes nothing


def test_csv_is_quoted_and_names_its_columns(root: Client) -> None:
    event = make_event(error_code='a"b, c\nd', latency_us=7)
    text = text_of(root.get(url("csv")))
    head, _, body = text.partition("\r\n")
    assert head == ",".join(f'"{name}"' for name in export.FIELDS)
    assert body.startswith(f'"{event.pk}","')
    [row] = rows(root)
    assert (row["error_code"], row["latency_us"]) == ('a"b, c\nd', "7")
    assert datetime.datetime.fromisoformat(row["time"]) == event.time
    assert row["time"].endswith("+00:00")


def test_json_lines_are_named_as_in_the_log(root: Client) -> None:
    key = make_key(1)
    event = make_event(key_ref=key.ref, request_ids="a b", error_code="x\n\u2028y", sub="")
    make_event(key_ref="unknown", request_ids="", requested_key="alias/a")
    text = text_of(root.get(url("jsonl")))
    unknown, known = map(json.loads, text.split("\n")[:-1])
    assert known["key"] == key.arn
    assert known["request_ids"] == ["a", "b"]
    assert known["error_code"] == event.error_code
    assert datetime.datetime.fromisoformat(known["time"]) == event.time
    assert "sub" not in known
    assert "key" not in unknown and unknown["key_ref"] == "unknown"
    assert "request_ids" not in unknown


def test_it_is_sent_as_a_file(root: Client) -> None:
    for name, kind in (("csv", "text/csv; charset=utf-8"), ("jsonl", "application/x-ndjson")):
        response = root.get(url(name))
        assert response.streaming
        assert response["Content-Type"] == kind
        assert response["Content-Disposition"].startswith("attachment; filename=")
        assert response["Content-Disposition"].endswith(f'.{name}"')
        assert "no-store" in response["Cache-Control"]


def test_nonsense(root: Client) -> None:
    make_event()
    assert root.get(url("xls")).status_code == 404
    response = root.get(f"{url('csv')}?nonsense=1")
    assert (response.status_code, response["Location"]) == (302, f"{EVENTS}?e=1")
    assert text_of(root.get(f"{url('jsonl')}?q=none")) == ""
    assert rows(root, "?q=none") == []


@pytest.mark.parametrize("name", FORMATS)
def test_under_asgi_it_is_sent_page_by_page_too(
    name: str,
    staff: User,
    root: Client,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(export, "PAGE", 2)
    for _ in range(5):
        make_event()
    expected = text_of(root.get(url(name)))

    async def get() -> list[bytes]:
        client = AsyncClient()
        await client.aforce_login(staff)
        response = await client.get(url(name))
        assert response.is_async
        return [part async for part in response]

    parts = async_to_sync(get)()
    assert len(parts) == (4 if name == "csv" else 3)
    assert b"".join(parts).decode() == expected
