"""
`KMSUnavailableMiddleware`, in each kind of view; and django-axes, which limits guesses.

The part with django-axes needs tables of its own: it runs in a second process, where this
file is collected again with axes installed.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import django
import pytest
from asgiref.sync import async_to_sync
from django.apps import apps
from django.contrib import admin
from django.contrib.auth import aauthenticate, alogin, authenticate, login
from django.contrib.auth import views as auth_views
from django.contrib.auth.decorators import login_required
from django.contrib.auth.models import User
from django.http import Http404, HttpRequest, HttpResponse
from django.test import AsyncClient, Client
from django.urls import path, re_path
from django.utils import translation
from rest_framework.authentication import BasicAuthentication
from rest_framework.permissions import IsAuthenticated
from rest_framework.response import Response
from rest_framework.views import APIView

from kms_hasher import backends, breaker, exceptions, keyring
from kms_hasher.middleware import RETRY_AFTER

ROOT = Path(__file__).parents[1]
MIDDLEWARE = "kms_hasher.middleware.KMSUnavailableMiddleware"
PASSWORD = "correct horse battery staple"
LOCMEM = "django.core.mail.backends.locmem.EmailBackend"
BASIC = "Basic YW5uYTpjb3JyZWN0IGhvcnNlIGJhdHRlcnkgc3RhcGxl"
TEXT = "Signing in is not possible right now."

#: docs/how-to/limit-guesses.md shows just this.
AXES_SETTINGS = """\
INSTALLED_APPS += ["axes"]
AUTHENTICATION_BACKENDS = [
    "axes.backends.AxesStandaloneBackend",  # the first: whoever is locked out costs no call
    "kms_hasher.backends.KMSModelBackend",
]
MIDDLEWARE += [
    "kms_hasher.middleware.KMSUnavailableMiddleware",
    "axes.middleware.AxesMiddleware",  # the last, as axes asks for
]
AXES_FAILURE_LIMIT = 5
AXES_COOLOFF_TIME = 1  # hours
AXES_LOCKOUT_PARAMETERS = ["username", "ip_address"]  # either of them
"""
AXES_BACKEND = """\
from axes.backends import AxesStandaloneBackend
from django.contrib.auth.backends import BaseBackend


class AsyncAxesBackend(AxesStandaloneBackend, BaseBackend):
    pass
"""

pytestmark = [pytest.mark.django_db, pytest.mark.urls(__name__)]


# --- the views ----------------------------------------------------------------------


def plain(request: HttpRequest) -> HttpResponse:
    data = (
        json.loads(request.body) if request.content_type == "application/json" else request.POST
    )
    user = authenticate(request, username=data["username"], password=data["password"])
    if user is None:
        return HttpResponse("wrong", status=401)
    login(request, user)
    return HttpResponse("right")


async def asynchronous(request: HttpRequest) -> HttpResponse:
    user = await aauthenticate(
        request, username=request.POST["username"], password=request.POST["password"]
    )
    if user is None:
        return HttpResponse("wrong", status=401)
    await alogin(request, user)
    return HttpResponse("right")


class BasicView(APIView):
    authentication_classes = [BasicAuthentication]
    permission_classes = [IsAuthenticated]

    def get(self, request: Any) -> Response:
        return Response({"user": request.user.get_username()})


class LoginView(APIView):
    authentication_classes: list[Any] = []

    def post(self, request: Any) -> Response:
        user = authenticate(request, **request.data)
        return Response({"right": user is not None}, status=200 if user else 401)


@login_required
def private(request: HttpRequest) -> HttpResponse:
    return HttpResponse(request.user.get_username())


class raised:
    """What the view `broken` raises."""

    error: Exception


def broken(request: HttpRequest) -> HttpResponse:
    raise raised.error


async def abroken(request: HttpRequest) -> HttpResponse:
    raise raised.error


urlpatterns = [
    path("admin/", admin.site.urls),
    path("accounts/login/", auth_views.LoginView.as_view(template_name="admin/login.html")),
    path("plain/", plain),
    path("async/", asynchronous),
    path("basic/", BasicView.as_view()),
    path("api/", LoginView.as_view()),
    path("private/", private),
    path("broken/", broken),
    re_path("^broken/.", broken),
    path("abroken/", abroken),
]


# --- signing in ---------------------------------------------------------------------


def by_form(url: str) -> Callable[..., Any]:
    def post(password: str = PASSWORD, **kwargs: Any) -> Any:
        return Client().post(url, {"username": "anna", "password": password}, **kwargs)

    return post


def by_async_form(url: str) -> Callable[..., Any]:
    def post(password: str = PASSWORD, **kwargs: Any) -> Any:
        data = {"username": "anna", "password": password}
        return async_to_sync(AsyncClient().post)(url, data, **kwargs)

    return post


def by_json(url: str) -> Callable[..., Any]:
    def post(password: str = PASSWORD, **kwargs: Any) -> Any:
        data = {"username": "anna", "password": password}
        return Client().post(url, data, content_type="application/json", **kwargs)

    return post


def by_header(url: str) -> Callable[..., Any]:
    def get(password: str = PASSWORD, **kwargs: Any) -> Any:
        header = BASIC if password == PASSWORD else "Basic YW5uYTp3cm9uZw=="
        headers = {"Authorization": header, **kwargs.pop("headers", {})}
        return Client().get(url, headers=headers, **kwargs)

    return get


WAYS = {
    "the admin": by_form("/admin/login/"),
    "the login view": by_form("/accounts/login/?next=/admin/"),
    "a plain view": by_form("/plain/"),
    "a plain view with JSON": by_json("/plain/"),
    "an async view": by_async_form("/async/"),
    "a view under ASGI": by_async_form("/plain/"),
    "the admin under ASGI": by_async_form("/admin/login/"),
    "REST, authenticate()": by_json("/api/"),
    "REST, basic authentication": by_header("/basic/"),
}


@pytest.fixture(params=WAYS.values(), ids=list(WAYS))
def post(request: pytest.FixtureRequest) -> Callable[..., Any]:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def user() -> User:
    backends.prewarm()
    return User.objects.create_superuser("anna", "anna@example.org", PASSWORD)


@pytest.fixture
def outage(user: User, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """From the call on KMS cannot answer."""

    def begin(error: Exception | None = None) -> None:
        def fail(*args: Any, **kwargs: Any) -> Any:
            raise error or exceptions.KMSTimeout(operation="Decrypt", key="alias/a-secret-name")

        for operation in ("encrypt", "decrypt", "re_encrypt", "describe_key"):
            monkeypatch.setattr(keyring.provider(), operation, fail)

    return begin


KMS_ERRORS = [
    kind
    for kind in vars(exceptions).values()
    if isinstance(kind, type) and issubclass(kind, exceptions.KMSError)
]


class Cases:
    """The middleware by itself, without axes."""

    @pytest.fixture(autouse=True)
    def middleware(self, settings: Any) -> None:
        settings.MIDDLEWARE = [*settings.MIDDLEWARE, MIDDLEWARE]

    # --- each kind of view

    def test_each_view_is_503_while_kms_is_out(
        self, post: Callable[..., Any], outage: Callable[..., None], settings: Any
    ) -> None:
        outage()
        response = post()
        assert response.status_code == 503
        assert response.headers["Retry-After"] == str(RETRY_AFTER)
        assert response.headers["Cache-Control"] == "no-store"
        assert TEXT in response.content.decode()

    def test_each_view_is_itself_while_kms_answers(
        self, post: Callable[..., Any], user: User
    ) -> None:
        right, wrong = post(), post("wrong")
        assert right.status_code in (200, 302)
        assert (wrong.status_code, wrong.content) != (right.status_code, right.content)
        assert wrong.status_code in (200, 401)
        assert "Retry-After" not in right.headers
        assert "Retry-After" not in wrong.headers

    @pytest.mark.parametrize("backend", ["django.contrib.auth.backends.ModelBackend"])
    def test_djangos_own_backend(
        self,
        backend: str,
        post: Callable[..., Any],
        outage: Callable[..., None],
        settings: Any,
    ) -> None:
        settings.AUTHENTICATION_BACKENDS = [backend]
        outage()
        assert post().status_code == 503

    def test_a_new_password_that_cannot_be_sealed(
        self, user: User, client: Client, outage: Callable[..., None]
    ) -> None:
        client.force_login(user)
        outage()
        new = {"old_password": PASSWORD, "new_password1": "Tr0ub4dor&3", "new_password2": "x"}
        assert client.post("/admin/password_change/", new).status_code == 503

    # --- which errors

    @pytest.mark.parametrize("url", ["/broken/", "/abroken/"])
    @pytest.mark.parametrize("kind", KMS_ERRORS)
    def test_every_error_of_kms(self, kind: type[Exception], url: str) -> None:
        raised.error = kind("a secret detail")
        get = Client().get if url == "/broken/" else async_to_sync(AsyncClient().get)
        response: Any = get(url)
        assert response.status_code == 503
        assert b"secret" not in response.content

    @pytest.mark.parametrize(
        "error",
        [
            exceptions.ConfigurationError("KEY"),
            exceptions.AuditError("full"),
            exceptions.MalformedHash("x"),
            RuntimeError("another"),
            KeyError("x"),
        ],
        ids=lambda error: type(error).__name__,
    )
    @pytest.mark.parametrize("url", ["/broken/", "/abroken/"])
    def test_no_other(self, error: Exception, url: str) -> None:
        raised.error = error
        get = Client().get if url == "/broken/" else async_to_sync(AsyncClient().get)
        with pytest.raises(type(error)):
            get(url)

    def test_djangos_own_answers_stay(self, client: Client) -> None:
        raised.error = Http404()
        assert client.get("/broken/").status_code == 404

    # --- what is answered

    def test_a_page_for_people(self, client: Client, outage: Callable[..., None]) -> None:
        outage()
        data = {"username": "anna", "password": PASSWORD}
        response = client.post("/plain/", data, headers={"Accept": "text/html,*/*;q=0.8"})
        assert response.headers["Content-Type"] == "text/html; charset=utf-8"
        page = response.content.decode()
        assert page.startswith("<!doctype html>")
        assert '<html lang="en-us">' in page
        assert "Nothing is wrong with your password." in page
        assert f"Try again in {RETRY_AFTER} seconds." in page

    @pytest.mark.parametrize(
        ("accept", "is_json"),
        [
            ("application/json", True),
            ("application/json, text/plain, */*", False),
            ("application/vnd.api+json, application/json;q=0.9", True),
            ("*/*", False),
            ("text/html", False),
            ("text/html, application/json", False),
            ("image/png", False),
            ("nonsense", False),
            ("", False),
        ],
    )
    def test_json_for_who_asks_for_it(
        self, accept: str, is_json: bool, client: Client, outage: Callable[..., None]
    ) -> None:
        outage()
        data = {"username": "anna", "password": PASSWORD}
        response = client.post("/plain/", data, headers={"Accept": accept})
        assert response.status_code == 503
        kind = response.headers["Content-Type"]
        assert kind == ("application/json" if is_json else "text/html; charset=utf-8")

    @pytest.mark.parametrize("accept", ["application/json", "*/*", "text/html"])
    def test_json_for_who_sends_it(self, accept: str, outage: Callable[..., None]) -> None:
        outage()
        response = by_json("/plain/")(headers={"Accept": accept})
        assert response.json() == {
            "error": "service_unavailable",
            "detail": f"{TEXT} Nothing is wrong with your password.",
            "retry_after": RETRY_AFTER,
        }
        assert response.headers["Retry-After"] == str(RETRY_AFTER)
        assert response.headers["Cache-Control"] == "no-store"

    def test_nothing_of_the_error_is_told(
        self, post: Callable[..., Any], outage: Callable[..., None]
    ) -> None:
        secret = "arn:aws:kms:eu-central-1:111122223333:key/1234"
        outage(
            exceptions.KMSAccessDenied(
                f"role r may not use {secret}",
                code="AccessDeniedException",
                operation="Decrypt",
                key=secret,
                request_ids=["a-request-id"],
            )
        )
        response = post()
        assert response.status_code == 503
        told = str(response.headers) + response.content.decode()
        for word in (secret, "1111", "Denied", "Decrypt", "a-request-id", "role r", "KMS"):
            assert word not in told

    def test_the_address_is_not_on_the_page(self, client: Client) -> None:
        raised.error = exceptions.KMSTimeout()
        for url in ("/broken/<script>alert(1)</script>", "/broken/?next=<script>"):
            response = client.get(url, headers={"User-Agent": "<script>"})
            assert response.status_code == 503
            assert b"<script" not in response.content

    def test_no_line_of_the_log_can_be_forged(
        self, client: Client, caplog: pytest.LogCaptureFixture
    ) -> None:
        raised.error = exceptions.KMSTimeout()
        client.get("/broken/a%0aERROR%1b[2J a line of mine")
        (record,) = [r for r in caplog.records if r.name == "kms_hasher"]
        assert record.getMessage() == (
            r"503 for '/broken/a\nERROR\x1b[2J a line of mine': KMS did not answer in time. "
            "(KMSTimeout)"
        )
        assert record.exc_info is None

    def test_what_was_posted_is_in_no_mail(
        self,
        post: Callable[..., Any],
        outage: Callable[..., None],
        settings: Any,
        mailoutbox: list[Any],
    ) -> None:
        """Django mails each 5xx to ADMINS, with POST unless the view has forbidden that."""
        address = "ops@example.org"
        settings.ADMINS = [address if django.VERSION >= (6, 0) else ("Ops", address)]
        if django.VERSION >= (6, 1):
            settings.MAILERS = {"default": {"BACKEND": LOCMEM}}
        outage()
        assert post().status_code == 503
        (mail,) = mailoutbox
        assert "POST" in mail.body
        assert PASSWORD not in mail.body
        assert BASIC.split()[1] not in mail.body

    # --- when to come back

    def test_retry_after_follows_the_breaker(
        self, client: Client, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        raised.error = exceptions.KMSCircuitOpen()
        circuit = breaker.of("")
        while not circuit.is_open:
            circuit.leave(answered=False)
        now = circuit.next_probe - 3.2
        monkeypatch.setattr(breaker.time, "monotonic", lambda: now)
        response = client.get("/broken/")
        assert response.headers["Retry-After"] == "4"
        assert b"Try again in 4 seconds." in response.content
        now += 2.5
        response = client.get("/broken/")
        assert response.headers["Retry-After"] == "1"
        assert b"Try again in 1 second." in response.content
        now += 60
        assert client.get("/broken/").headers["Retry-After"] == str(RETRY_AFTER)

    def test_an_outage_that_opens_it(self, outage: Callable[..., None]) -> None:
        outage()
        waits = [int(by_form("/plain/")().headers["Retry-After"]) for _ in range(7)]
        assert waits[: breaker.FAILURES - 1] == [RETRY_AFTER] * (breaker.FAILURES - 1)
        assert all(0 < wait <= breaker.SECONDS for wait in waits[breaker.FAILURES :])

    # --- translations

    @pytest.fixture
    def german(self, tmp_path: Path, settings: Any) -> Iterator[None]:
        messages = {
            "": "Content-Type: text/plain; charset=UTF-8\n"
            "Plural-Forms: nplurals=2; plural=(n != 1);\n",
            f"{TEXT} Nothing is wrong with your password.": "Anmelden <geht> gerade nicht.",
            "Please try again in a moment": "Bitte gleich noch einmal",
            "Try again in %(seconds)s second.\0Try again in %(seconds)s seconds.": (
                "In einer Sekunde.\0In %(seconds)s Sekunden."
            ),
        }
        folder = tmp_path / "de" / "LC_MESSAGES"
        folder.mkdir(parents=True)
        (folder / "django.mo").write_bytes(catalogue(messages))
        settings.LOCALE_PATHS = [str(tmp_path)]
        forget_translations()
        settings.MIDDLEWARE = [
            settings.MIDDLEWARE[0],
            "django.middleware.locale.LocaleMiddleware",
            *settings.MIDDLEWARE[1:],
        ]
        yield
        settings.LOCALE_PATHS = []
        forget_translations()

    @pytest.mark.usefixtures("german")
    @pytest.mark.parametrize("url", ["/broken/", "/abroken/"])
    def test_the_page_is_translated_and_escaped(self, url: str) -> None:
        raised.error = exceptions.KMSTimeout()
        get: Any = Client().get if url == "/broken/" else async_to_sync(AsyncClient().get)
        page = get(url, headers={"Accept-Language": "de"}).content.decode()
        assert '<html lang="de">' in page
        assert "Anmelden &lt;geht&gt; gerade nicht." in page
        assert "<title>Bitte gleich noch einmal</title>" in page
        assert f"In {RETRY_AFTER} Sekunden." in page
        api = get(url, headers={"Accept-Language": "de", "Accept": "application/json"})
        assert api.json()["detail"] == "Anmelden <geht> gerade nicht."
        assert TEXT in get(url).content.decode()

    def test_a_page_of_the_sites_own(
        self, tmp_path: Path, settings: Any, client: Client
    ) -> None:
        (tmp_path / "kms_hasher").mkdir()
        own = tmp_path / "kms_hasher" / "unavailable.html"
        own.write_text("{{ text }} {{ seconds }} {{ request.path }}")
        settings.TEMPLATES = [{**settings.TEMPLATES[0], "DIRS": [str(tmp_path)]}]
        raised.error = exceptions.KMSTimeout()
        response = client.get("/broken/")
        assert response.content.decode() == (
            f"{TEXT} Nothing is wrong with your password. {RETRY_AFTER} /broken/"
        )

    # --- sessions

    def test_who_is_signed_in_notices_nothing(
        self, client: Client, user: User, outage: Callable[..., None], calls: Any
    ) -> None:
        assert client.login(username="anna", password=PASSWORD)
        before = len(calls())
        outage()
        for url in ("/private/", "/admin/", f"/admin/auth/user/{user.pk}/change/"):
            assert client.get(url).status_code == 200
        aclient = AsyncClient()
        aclient.cookies = client.cookies
        assert async_to_sync(aclient.get)("/private/").status_code == 200
        assert calls()[before:] == []
        assert by_form("/plain/")().status_code == 503

    def test_an_outage_signs_nobody_out_who_tries_to_sign_in_again(
        self, client: Client, user: User, outage: Callable[..., None]
    ) -> None:
        assert client.login(username="anna", password=PASSWORD)
        outage()
        data = {"username": "anna", "password": PASSWORD}
        assert client.post("/plain/", data).status_code == 503
        assert client.get("/private/").status_code == 200


def catalogue(messages: dict[str, str]) -> bytes:
    """Return translations as gettext's .mo file."""
    pairs = sorted((a.encode(), b.encode()) for a, b in messages.items())
    tables, texts, start = [b"", b""], b"", 28 + 16 * len(pairs)
    for side in (0, 1):
        for pair in pairs:
            tables[side] += struct.pack("<2I", len(pair[side]), start + len(texts))
            texts += pair[side] + b"\0"
    head = struct.pack(
        "<7I", 0x950412DE, 0, len(pairs), 28, 28 + 8 * len(pairs), 0, 28 + 16 * len(pairs)
    )
    return head + tables[0] + tables[1] + texts


def forget_translations() -> None:
    from django.utils.translation import trans_real

    trans_real._translations = {}
    trans_real._default = None
    translation.activate("en-us")
    translation.deactivate()


# --- with django-axes ---------------------------------------------------------------


class AxesCases:
    @pytest.fixture(autouse=True)
    def empty(self) -> None:
        from axes.handlers.proxy import AxesProxyHandler

        AxesProxyHandler.reset_attempts()

    @staticmethod
    def attempt(password: str, username: str = "anna", address: int = 1) -> int:
        data = {"username": username, "password": password}
        remote = {"REMOTE_ADDR": f"10.0.0.{address}"}
        status: int = (
            Client().post("/accounts/login/?next=/private/", data, **remote).status_code
        )
        return status

    @staticmethod
    def counted() -> list[tuple[str, int]]:
        from axes.models import AccessAttempt

        return sorted(AccessAttempt.objects.values_list("username", "failures_since_start"))

    def test_a_flood_for_one_name_is_cut_off_before_it_costs_calls(
        self, user: User, calls: Callable[[], list[str]]
    ) -> None:
        before = len(calls())
        found = [self.attempt("wrong", address=n) for n in range(20)]
        assert found == [200] * 4 + [429] * 16
        assert calls()[before:] == ["Decrypt"] * 5
        # The right password gets nobody in now, and costs nothing either.
        assert self.attempt(PASSWORD, address=99) == 429
        assert calls()[before:] == ["Decrypt"] * 5

    def test_so_is_one_for_a_name_that_nobody_has(
        self, user: User, calls: Callable[[], list[str]]
    ) -> None:
        before = len(calls())
        for n in range(20):
            self.attempt("wrong", "nobody", n)
        assert calls()[before:] == ["Decrypt"] * 5

    def test_so_is_one_from_one_address(
        self, user: User, calls: Callable[[], list[str]]
    ) -> None:
        before = len(calls())
        for n in range(20):
            self.attempt("wrong", f"name{n}")
        assert calls()[before:] == ["Decrypt"] * 5
        assert self.attempt(PASSWORD, address=2) == 302

    def test_an_outage_counts_no_failure(
        self, user: User, outage: Callable[..., None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert self.attempt("wrong") == 200
        assert self.counted() == [("anna", 1)]
        with monkeypatch.context():
            outage()
            for password in (PASSWORD, "wrong") * 6:
                assert self.attempt(password) == 503
                assert self.attempt(password, "nobody", 2) == 503
        assert self.counted() == [("anna", 1)]
        monkeypatch.undo()
        breaker.reset()
        assert self.attempt(PASSWORD) == 302

    def test_the_other_order_costs_a_call_for_each(
        self, user: User, calls: Callable[[], list[str]], settings: Any
    ) -> None:
        """Why the page says which comes first; and that these tests would notice."""
        settings.AUTHENTICATION_BACKENDS = settings.AUTHENTICATION_BACKENDS[::-1]
        before = len(calls())
        for n in range(20):
            self.attempt("wrong", address=n)
        assert len(calls()[before:]) == 20

    def test_async_views(
        self, user: User, calls: Callable[[], list[str]], settings: Any
    ) -> None:
        settings.AUTHENTICATION_BACKENDS = [
            "axes_backend.AsyncAxesBackend",
            "kms_hasher.backends.KMSModelBackend",
        ]
        before = len(calls())
        found = [by_async_form("/async/")("wrong").status_code for _ in range(20)]
        assert found == [401] * 4 + [429] * 16
        assert calls()[before:] == ["Decrypt"] * 5
        assert by_async_form("/async/")().status_code == 429

    def test_async_views_with_axes_own_backend(self, user: User) -> None:
        """Should this begin to work, the page needs no backend of its own any more."""
        with pytest.raises(AttributeError, match="aauthenticate"):
            by_async_form("/async/")()


if apps.is_installed("axes"):

    class TestAxes(AxesCases):
        pass

else:

    class TestMiddleware(Cases):
        pass

    @pytest.mark.everywhere
    def test_with_django_axes(tmp_path: Path) -> None:
        """The set-up of docs/how-to/limit-guesses.md."""
        (tmp_path / "axes_settings.py").write_text(
            f"from tests.settings import *\n{AXES_SETTINGS}"
        )
        (tmp_path / "axes_backend.py").write_text(AXES_BACKEND)
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        done = subprocess.run(
            [*command, "--ds=axes_settings", f"{__file__}::TestAxes"],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]),
                "DATABASE_URL": "sqlite://:memory:",
                "DJANGO_SETTINGS_MODULE": "axes_settings",
            },
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        tests = [name for name in vars(AxesCases) if name.startswith("test_")]
        assert f"{len(tests)} passed" in done.stdout

    def test_the_page_shows_the_set_up_that_is_tested() -> None:
        # The documentation is beside the tests in a checkout, and not under tox.
        page = ROOT / "docs" / "how-to" / "limit-guesses.md"
        text = page.read_text() if page.exists() else AXES_SETTINGS + AXES_BACKEND
        assert AXES_SETTINGS in text
        assert AXES_BACKEND in text
