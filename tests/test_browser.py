"""
The admin in a browser: under a strict policy, without scripts, light and dark, on a phone.

Not collected where there is no Chromium or no Playwright: see `conftest`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.http import HttpRequest, HttpResponse
from django.test import Client

from kms_hasher.admin import user_events
from kms_hasher.models import AuditEvent, AuditFinding, AuditSeal, Key
from tests.live_site import ROOT
from tests.projects import sample_audit
from tests.test_admin import EVENTS, list_url, page_url


def strict_policy(
    get_response: Callable[[HttpRequest], HttpResponse],
) -> Callable[[HttpRequest], HttpResponse]:
    """Middleware: nothing but files of this site's own is allowed."""

    def middleware(request: HttpRequest) -> HttpResponse:
        response = get_response(request)
        response["Content-Security-Policy"] = "default-src 'self'"
        return response

    return middleware


@pytest.mark.everywhere
@pytest.mark.django_db(transaction=True)
def test_pages_in_a_browser(
    live_server: Any, client: Client, django_user_model: type[User], settings: Any
) -> None:
    settings.MIDDLEWARE = [f"{__name__}.strict_policy", *settings.MIDDLEWARE]
    sample_audit.fill()
    user = django_user_model.objects.create_superuser("admin", "", "secret")
    client.force_login(user)
    cookie = client.cookies[settings.SESSION_COOKIE_NAME].value
    board = f"{EVENTS}dashboard/"
    rows = [model.objects.last() for model in (Key, AuditSeal, AuditFinding)]
    paths = [board, f"{board}?period=30d", "/admin/kms_hasher/", list_url(AuditEvent)]
    paths += [user_events.page(user), *map(page_url, rows)]
    asked = {
        "pages": [live_server.url + path for path in paths],
        "cookie": {
            "name": settings.SESSION_COOKIE_NAME,
            "value": cookie,
            "url": live_server.url,
        },
    }
    found = subprocess.run(
        [sys.executable, "-m", "tests.browser"],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    seen = json.loads(found.stdout)
    assert len(seen) == 3 * len(paths)
    for page in seen:
        assert page["told"] == [], page
        assert "Log in" not in page["title"], page
        # Wide tables and charts are scrolled by themselves.
        if EVENTS + "dashboard" in page["url"]:
            assert page["too_wide"] <= 0, page
    charts = [page for page in seen if "fill" in page]
    assert {page["scripts"] for page in charts} == {True, False}
    assert all(page["table"] for page in charts)
    assert all(page["bars"] > 30 for page in charts)
    fills = {page["scheme"]: page["fill"] for page in charts}
    assert fills["light"] != fills["dark"]
