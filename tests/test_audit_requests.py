"""Every call of a view leaves its event, whatever becomes of the request."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable
from typing import Any

import pytest
from django.contrib.auth.hashers import make_password
from django.contrib.auth.models import Group
from django.core.management import call_command
from django.db import connection, transaction
from django.http import HttpRequest, HttpResponse
from django.test import AsyncClient, Client
from django.urls import path

from kms_hasher import signals
from kms_hasher.audit import recorder, rollups
from kms_hasher.models import AuditEvent, AuditHour
from tests.test_audit import START, configure, durable, event, from_scratch

__all__ = ["configure", "from_scratch"]


def seals(request: HttpRequest) -> HttpResponse:
    Group.objects.create(name="of the request")
    make_password("secret")
    if request.GET.get("end") == "raise":
        raise RuntimeError
    transaction.set_rollback(request.GET.get("end") == "roll back")
    return HttpResponse()


async def aseals(request: HttpRequest) -> HttpResponse:
    await asyncio.to_thread(make_password, "secret")
    signals.emit(event())
    if request.GET.get("end") == "raise":
        raise RuntimeError
    if request.GET.get("end") == "time out":
        await asyncio.wait_for(asyncio.sleep(60), 0.01)
    return HttpResponse()


urlpatterns = [path("seals", seals), path("aseals", transaction.non_atomic_requests(aseals))]


@pytest.fixture(params=["durable", "buffered"])
def site(
    request: pytest.FixtureRequest,
    settings: Any,
    configure: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings.ROOT_URLCONF = __name__
    monkeypatch.setitem(connection.settings_dict, "ATOMIC_REQUESTS", True)
    configure(AUDIT=request.param)


def operations() -> list[str]:
    recorder.close()
    return sorted(AuditEvent.objects.values_list("operation", flat=True))


@durable
@pytest.mark.parametrize("end", ["", "raise", "roll back"])
def test_a_request_that_is_atomic(end: str, site: None) -> None:
    Client(raise_request_exception=False).get(f"/seals?end={end}")
    assert operations() == ["Encrypt"]
    assert Group.objects.count() == (0 if end else 1)
    assert sum(AuditHour.objects.values_list("count", flat=True)) == 1


@durable
@pytest.mark.parametrize("end", ["", "raise", "time out"])
def test_an_async_view(end: str, site: None) -> None:
    client = AsyncClient(raise_request_exception=False)
    asyncio.run(client.get(f"/aseals?end={end}"))  # type: ignore[arg-type]
    assert operations() == ["Decrypt", "Encrypt"]


@durable
def test_a_management_command(site: None, calls: Callable[[], list[str]]) -> None:
    call_command("kms_status", "--json", stdout=io.StringIO())
    assert "DescribeKey" in calls()
    assert operations() == sorted(calls())
    assert rollups.totals(START.replace(year=2020)).count == len(calls())
