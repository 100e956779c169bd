"""
A site to be run by servers, for tests/test_servers.py: `wsgi`, `asgi`, and the URLs of both.

    POST /login/    200 with the process id, or 401
    POST /alogin/   the same, by an async view
    GET  /          200, once it runs

`python -m tests.projects.served N` makes its tables and N users. With
KMS_HASHER_SERVED_EARLY=1 users sign in where this is imported: before a preloading server
forks its workers.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import django
from django.http import HttpRequest, HttpResponse
from django.urls import path

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.projects.served_settings")


def login(request: HttpRequest) -> HttpResponse:
    from django.contrib import auth

    user = auth.authenticate(request, **{k: str(v) for k, v in request.POST.items()})
    if user is None:
        return HttpResponse(status=401)
    auth.login(request, user)
    return HttpResponse(str(os.getpid()))


async def alogin(request: HttpRequest) -> HttpResponse:
    from django.contrib import auth

    user = await auth.aauthenticate(request, **{k: str(v) for k, v in request.POST.items()})
    if user is None:
        return HttpResponse(status=401)
    await auth.alogin(request, user)
    return HttpResponse(str(os.getpid()))


def alive(request: HttpRequest) -> HttpResponse:
    return HttpResponse(str(os.getpid()))


urlpatterns = [path("login/", login), path("alogin/", alogin), path("", alive)]


def sign_in_early() -> None:
    """Use client, threads and database as a busy process does."""
    from concurrent.futures import ThreadPoolExecutor

    from django.contrib.auth import authenticate
    from django.db import connections

    def sign_in(number: int) -> Any:
        try:
            return authenticate(username=f"user{number % 2}", password=f"pw{number % 2}")
        finally:
            connections.close_all()

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(sign_in, range(8)))


def setup(number: int) -> None:
    from django.contrib.auth.hashers import make_password
    from django.contrib.auth.models import User
    from django.core.management import call_command

    call_command("migrate", verbosity=0)
    User.objects.bulk_create(
        User(username=f"user{index}", password=make_password(f"pw{index}"))
        for index in range(number)
    )


def __getattr__(name: str) -> Any:
    """Return `wsgi` or `asgi`, made when a server asks for it."""
    if name == "wsgi":
        from django.core.wsgi import get_wsgi_application

        application: Any = get_wsgi_application()
    elif name == "asgi":
        from django.core.asgi import get_asgi_application

        application = get_asgi_application()
    else:
        raise AttributeError(name)
    if os.environ.get("KMS_HASHER_SERVED_EARLY"):
        sign_in_early()
    globals()[name] = application
    return application


if __name__ == "__main__":
    django.setup()
    setup(int(sys.argv[1]))
