"""
Nothing secret comes out, wherever KMS fails: a crawl of everything a site may keep or show.

The sinks: Django's error report as text and as HTML, mails to ADMINS, all logs down to
DEBUG, the errors themselves, audit rows, pages of the admin, the answers. The secrets: the
password and every digest computed, as they are and as they may be written. `TestControl`
puts a secret into each sink in turn, to show that the crawl would find it.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import logging
import os
import pickle
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import django
import pytest
from asgiref.sync import async_to_sync
from django.contrib import admin
from django.contrib.auth import aauthenticate, alogin
from django.contrib.auth.hashers import make_password
from django.contrib.auth.models import User
from django.core.signals import got_request_exception
from django.http import HttpRequest, HttpResponse
from django.test import AsyncClient, Client
from django.urls import path
from django.utils import timezone
from django.utils.log import AdminEmailHandler
from django.views.debug import ExceptionReporter
from django.views.decorators.debug import sensitive_post_parameters, sensitive_variables

from kms_hasher import backends, breaker, encoding, exceptions, hashers, keyring, signals
from kms_hasher.models import AuditEvent
from kms_hasher.providers.base import Provider
from tests.kms_double import BROKEN, PAGES, SPOILT, KMSDouble

pytestmark = [pytest.mark.everywhere, pytest.mark.django_db, pytest.mark.urls(__name__)]

PASSWORD = "correct-Horse7battery"
LOCMEM = "django.core.mail.backends.locmem.EmailBackend"
MIDDLEWARE = "kms_hasher.middleware.KMSUnavailableMiddleware"
CODES = (
    "ThrottlingException",
    "KMSInternalException",
    "DependencyTimeoutException",
    "KeyUnavailableException",
    "AccessDeniedException",
    "DisabledException",
    "KMSInvalidStateException: ... is pending deletion.",
    "NotFoundException",
    "ExpiredTokenException",
    "InvalidKeyUsageException",
    "ValidationException",
    "SomethingNewException",
)
#: All faults take most of a minute; without this, every fourth is crawled.
FULL = bool(os.environ.get("KMS_HASHER_FULL"))

FAULTS = (*BROKEN, *PAGES, *SPOILT, *CODES)

#: Faults that do no harm to a call.
HARMLESS = {"slow"}
#: What only a Decrypt would tell of an Encrypt's answer; to a login it does no harm.
UNSEEN = {"wrong_key", "short", "long"}
#: Codes by which KMS says that the blob is not this key's: a wrong password.
REFUSED = {"InvalidCiphertextException", "IncorrectKeyException"}


# --- the site -----------------------------------------------------------------------


@sensitive_post_parameters("password")
async def asynchronous(request: HttpRequest) -> HttpResponse:
    user = await aauthenticate(
        request, username=request.POST["username"], password=request.POST["password"]
    )
    if user is None:
        return HttpResponse("wrong", status=401)
    await alogin(request, user)
    return HttpResponse("right")


def careless(request: HttpRequest) -> HttpResponse:
    secret = request.POST["secret"]  # noqa: F841  # Django's report shows it
    raise ValueError("what is planted is in a frame")


async def acareless(request: HttpRequest) -> HttpResponse:
    secret = request.POST["secret"]  # noqa: F841
    raise ValueError("what is planted is in a frame")


urlpatterns = [
    path("admin/", admin.site.urls),
    path("async/", asynchronous),
    path("careless/", careless),
    path("acareless/", acareless),
]


def post(url: str, data: dict[str, str], *, asgi: bool = False) -> Any:
    if asgi:
        return async_to_sync(AsyncClient(raise_request_exception=False).post)(url, data)
    return Client(raise_request_exception=False).post(url, data)


#: Where a password can be sent to. Django's login form is behind the first.
WAYS = [("/admin/login/", False), ("/async/", True)]


# --- the crawl ----------------------------------------------------------------------


def spellings(secret: bytes | str) -> Iterator[tuple[str, str]]:
    """The ways to write a secret that a log, a page or a report may take."""
    data = secret if isinstance(secret, bytes) else secret.encode()
    yield "raw", data.decode("latin-1")
    yield "repr", repr(data)[2:-1]
    yield "escaped repr", html.escape(repr(data)[2:-1])
    yield "hex", data.hex()
    yield "HEX", data.hex().upper()
    yield "numbers", ", ".join(str(number) for number in data)
    for name, encode in (("base64", base64.b64encode), ("base64url", base64.urlsafe_b64encode)):
        # The last character depends on what follows the secret.
        text = encode(data).decode().rstrip("=")[:-1]
        yield name, text
        yield f"quoted {name}", quote(text, safe="")


class Crawl:
    """What the sinks hold, and the secrets that must not be in them."""

    def __init__(self, caplog: pytest.LogCaptureFixture, mails: list[Any]) -> None:
        self.caplog, self.mails = caplog, mails
        self.secrets: dict[str, bytes | str] = {"the password": PASSWORD}
        self.reports: list[tuple[str, str]] = []
        self.answers: list[tuple[str, str]] = []
        self.errors: list[BaseException] = []
        self.frames: set[str] = set()

    def report(self, request: Any = None, **kwargs: Any) -> None:
        """Make Django's report of the error that it is about to answer with a 500."""
        kind, error, trace = sys.exc_info()
        assert kind is not None
        assert error is not None
        reporter = ExceptionReporter(request, kind, error, trace)
        self.reports += [
            ("report as HTML", reporter.get_traceback_html()),
            ("report as text", reporter.get_traceback_text()),
        ]
        for frame in reporter.get_traceback_data()["frames"]:
            name = f"{frame['filename'].rpartition('site-packages/')[2]}:{frame['function']}"
            self.frames.add(name)
            self.reports.append((f"frame {name}", str(frame["vars"])))
        self.take(error)

    def take(self, error: BaseException) -> None:
        self.errors.append(error)
        for text in (str(error), repr(error), f"{error.__dict__} {error.args}"):
            self.reports.append(("the error", text))
        self.reports.append(("the traceback", "".join(traceback.format_exception(error))))
        with_context = error.__cause__ or (
            None if error.__suppress_context__ else error.__context__
        )
        if isinstance(error, exceptions.KMSHasherError):
            assert with_context is None  # a context has frames, and frames have secrets
            self.reports.append(("pickled", pickle.dumps(error).decode("latin-1")))

    def answer(self, response: Any) -> None:
        self.answers.append(
            ("the answer", f"{response.headers} {response.content.decode('latin-1')}")
        )

    def sinks(self) -> Iterator[tuple[str, str]]:
        yield from self.reports
        yield from self.answers
        for mail in self.mails:
            yield "a mail's subject", mail.subject
            yield "a mail", mail.body
            for part in mail.alternatives:
                yield "a mail's HTML", str(part[0])
        for record in self.caplog.records:
            yield f"log {record.name}", record.getMessage()
            yield (
                f"record of {record.name}",
                str(
                    {name: value for name, value in vars(record).items() if name != "exc_info"}
                ),
            )
        yield "the log", self.caplog.text
        for row in AuditEvent.objects.values():
            yield "an audit row", str(row)

    def found(self) -> set[tuple[str, str, str]]:
        """Return each sink, secret and spelling that came together."""
        wanted = [
            (what, spelling, text)
            for what, secret in self.secrets.items()
            for spelling, text in spellings(secret)
        ]
        sinks = [(sink, content) for sink, content in self.sinks() if content]
        everything = "\0".join({content for _, content in sinks})
        wanted = [entry for entry in wanted if entry[2] in everything]
        return {
            (sink, what, spelling)
            for sink, content in sinks
            for what, spelling, text in wanted
            if text in content
        }


@pytest.fixture
def crawl(
    settings: Any,
    caplog: pytest.LogCaptureFixture,
    mailoutbox: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Crawl]:
    address = "ops@example.org"
    settings.ADMINS = [address if django.VERSION >= (6, 0) else ("Ops", address)]
    if django.VERSION >= (6, 1):
        settings.MAILERS = {"default": {"BACKEND": LOCMEM}}
    assert not settings.DEBUG
    crawl = Crawl(caplog, mailoutbox)
    real = hashers.KMSArgon2PasswordHasher._digest

    @sensitive_variables()  # as what it stands for; that is nearer to what fails
    def digest(self: Any, password: Any, header: Any) -> bytes:
        found = real(self, password, header)
        crawl.secrets[f"digest {len(crawl.secrets)}"] = found
        return found

    monkeypatch.setattr(hashers.KMSArgon2PasswordHasher, "_digest", digest)
    mailer = AdminEmailHandler(include_html=True)
    mailer.setLevel(logging.ERROR)
    root = logging.getLogger()
    root.addHandler(mailer)
    # It writes the whole context of the error report, which is a sink itself, many times.
    caplog.set_level(logging.INFO, logger="django.template")
    caplog.set_level(logging.DEBUG)
    for name in ("django", "django.server", "botocore", "boto3", "urllib3", "kms_hasher"):
        caplog.set_level(logging.DEBUG, logger=name)
    got_request_exception.connect(crawl.report)
    yield crawl
    got_request_exception.disconnect(crawl.report)
    root.removeHandler(mailer)


@pytest.fixture
def people() -> None:
    """Made while all is well: a sealed password, and one that is not sealed yet."""
    User.objects.create_superuser("anna", "anna@example.org", PASSWORD)
    stock = make_password(PASSWORD, hasher="argon2")
    User.objects.create(username="bela", password=stock, is_staff=True)


@pytest.fixture
def double(settings: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[KMSDouble]:
    """KMS behind the real `aws` provider."""
    with KMSDouble() as double:
        monkeypatch.setenv("AWS_ENDPOINT_URL_KMS", double.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAIOSFODNN7EXAMPLE")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "an example, and no secret")
        double.engine.create_alias("alias/site", double.engine.create_key().key_arn)
        settings.KMS_HASHER = {
            "PROVIDER": "aws",
            "KEY": "alias/site",
            "OPTIONS": {"region": "eu-central-1", "attempts": 1},
            "AUDIT": "inline",
        }
        yield double
        keyring.provider().close()


def sign_in_everywhere(crawl: Crawl, settings: Any) -> list[int]:
    """
    Sign in as each kind of user in each way; return the answers' status codes.

    As anna KMS decrypts, as bela it encrypts after the login, and as nobody it encrypts a
    decoy. Once with the middleware, once without: then Django makes its report.
    """
    found = []
    stock = settings.MIDDLEWARE
    for middleware in ([*stock, MIDDLEWARE], stock):
        settings.MIDDLEWARE = middleware
        for name in ("anna", "bela", "nobody"):
            for url, asgi in WAYS:
                breaker.reset()
                backends._decoys.clear()
                data = {"username": name, "password": PASSWORD}
                response = post(url, data, asgi=asgi)
                crawl.answer(response)
                found.append(response.status_code)
    settings.MIDDLEWARE = stock
    return found


class TestAWS:
    @pytest.mark.parametrize("fault", FAULTS if FULL else FAULTS[::4])
    def test_whatever_kms_answers(
        self, fault: str, double: KMSDouble, people: None, crawl: Crawl, settings: Any
    ) -> None:
        if fault == "hang":
            settings.KMS_HASHER["OPTIONS"]["read_timeout"] = 0.1
        double.slow = 0.01
        double.fail("*", fault)
        statuses = sign_in_everywhere(crawl, settings)
        with_it, without = statuses[:6], statuses[6:]
        if fault in HARMLESS:
            assert set(statuses) <= {200, 302, 401}
        else:
            # Bela's is not sealed yet: she gets in without KMS. What nobody could see of the
            # answer to her upgrade is seen when she comes again.
            assert (with_it[:3], without[:2]) == ([503, 503, 302], [500, 500])
            if fault not in UNSEEN:
                assert with_it[3:] == [200, 503, 503]
                assert without[2:] == [302, 200, 500, 500]
            assert len(crawl.errors) == without.count(500)
            assert len(crawl.mails) >= 4
        assert len(crawl.secrets) > 8
        assert AuditEvent.objects.count() >= 8
        assert crawl.found() == set()

    def test_refusals_of_the_blob(
        self, double: KMSDouble, people: None, crawl: Crawl, settings: Any
    ) -> None:
        for fault in REFUSED:
            double.heal()
            double.fail("*", fault)
            for url, asgi in WAYS:
                data = {"username": "anna", "password": PASSWORD}
                response = post(url, data, asgi=asgi)
                crawl.answer(response)
                assert response.status_code in (200, 401)
        assert crawl.found() == set()

    def test_all_goes_well(
        self, double: KMSDouble, people: None, crawl: Crawl, settings: Any
    ) -> None:
        statuses = sign_in_everywhere(crawl, settings)
        assert statuses == [302, 200, 302, 200, 200, 401] * 2
        assert any(record.name.startswith("urllib3") for record in crawl.caplog.records)
        assert crawl.found() == set()

    def test_no_hash_of_a_request_either(
        self, double: KMSDouble, people: None, crawl: Crawl, settings: Any
    ) -> None:
        """
        At DEBUG botocore writes the SHA-256 of each request that it signs.

        All of an Encrypt but the digest is known: whoever reads the log could try passwords
        against it, without a call to KMS.
        """
        sign_in_everywhere(crawl, settings)
        bodies = [
            json.dumps(request.params).encode()
            for request in double.requests
            if request.operation == "Encrypt"
        ]
        assert bodies
        crawl.secrets = {
            f"body {number}": hashlib.sha256(body).digest()
            for number, body in enumerate(bodies)
        }
        assert crawl.found() == set()

    def test_frames_of_django_are_hidden_and_not_missing(
        self, double: KMSDouble, people: None, crawl: Crawl, settings: Any
    ) -> None:
        """The reports do go through Django's own frames that hold the password."""
        double.fail("*", "DisabledException")
        sign_in_everywhere(crawl, settings)
        functions = crawl.frames
        assert {
            "django/contrib/auth/__init__.py:authenticate",
            "django/contrib/auth/__init__.py:aauthenticate",
            "django/contrib/auth/forms.py:clean",
            "django/contrib/auth/hashers.py:check_password",
            "django/contrib/auth/hashers.py:verify_password",
            "django/contrib/auth/hashers.py:make_password",
        } <= functions
        assert any(name.endswith("kms_hasher/backends.py:authenticate") for name in functions)
        assert any(name.endswith("kms_hasher/backends.py:aauthenticate") for name in functions)
        assert crawl.found() == set()

    @pytest.mark.parametrize("fault", ["http_500", "AccessDeniedException", "not_base64"])
    def test_a_new_password(
        self, fault: str, double: KMSDouble, people: None, crawl: Crawl, settings: Any
    ) -> None:
        """With the middleware: without it, Django's own frames of `set_password` show it."""
        settings.MIDDLEWARE = [*settings.MIDDLEWARE, MIDDLEWARE]
        client = Client(raise_request_exception=False)
        client.force_login(User.objects.get(username="anna"))
        crawl.secrets["the new password"] = new = "Tr0ub4dor&3-and-more"
        double.fail("Encrypt", fault)
        data = {"old_password": PASSWORD, "new_password1": new, "new_password2": new}
        response = client.post("/admin/password_change/", data)
        crawl.answer(response)
        assert response.status_code == 503
        assert len(crawl.secrets) == 4
        assert crawl.found() == set()

    def test_rewrapping_after_a_login(
        self, double: KMSDouble, people: None, crawl: Crawl
    ) -> None:
        double.engine.update_alias("alias/site", double.engine.create_key().key_arn)
        make_password("another's")
        double.fail("ReEncrypt", "AccessDeniedException")
        for url, asgi in WAYS:
            response = post(url, {"username": "anna", "password": PASSWORD}, asgi=asgi)
            crawl.answer(response)
            assert response.status_code in (302, 200)
        assert "could not be re-wrapped" in crawl.caplog.text
        assert crawl.found() == set()

    def test_pages_of_the_admin(
        self, double: KMSDouble, people: None, crawl: Crawl, settings: Any
    ) -> None:
        double.fail("Decrypt", "html", times=2)
        double.fail("*", "AccessDeniedException")
        sign_in_everywhere(crawl, settings)
        double.heal()
        crawl.answers.clear()
        read_the_admin(crawl)
        assert len(crawl.answers) > 6
        assert crawl.found() == set()


def read_the_admin(crawl: Crawl) -> None:
    """Read what the admin shows of users, keys, events and rotations."""
    client = Client()
    anna = User.objects.get(username="anna")
    client.force_login(anna)
    pages = [f"/admin/auth/user/{anna.pk}/change/", "/admin/auth/user/", "/admin/"]
    for model in ("auditevent", "key", "aliasperiod", "rotationrun"):
        listing = f"/admin/kms_hasher/{model}/"
        pages.append(listing)
        objects = admin.site._registry
        (kind,) = [found for found in objects if found._meta.model_name == model]
        pages += [f"{listing}{obj.pk}/change/" for obj in kind._default_manager.all()[:3]]
    for page in pages:
        response = client.get(page)
        assert response.status_code == 200, page
        crawl.answer(response)


class TestLocal:
    @pytest.mark.parametrize(
        "fault", ["disabled", "to be deleted", "deleted", "damaged", "open to all", "gone"]
    )
    def test_whatever_the_key_file_says(
        self,
        fault: str,
        tmp_path: Path,
        crawl: Crawl,
        settings: Any,
        request: pytest.FixtureRequest,
    ) -> None:
        file = tmp_path / "keys.json"
        settings.KMS_HASHER = {
            **settings.KMS_HASHER,
            "PROVIDER": "local",
            "OPTIONS": {"path": file, "allow_without_debug": True},
        }
        provider: Any = keyring.provider()
        arn = provider.create_key().key_arn
        provider.create_alias("alias/tests", arn)
        request.getfixturevalue("people")
        if fault == "disabled":
            provider.disable_key(arn)
        elif fault == "to be deleted":
            provider.schedule_key_deletion(arn)
        elif fault == "deleted":
            file.write_text(json.dumps({**json.loads(file.read_text()), "keys": {}}))
        elif fault == "damaged":
            file.write_text(file.read_text()[:-40])
        elif fault == "open to all":
            file.chmod(0o644)
        else:
            file.unlink()
        crawl.secrets |= materials(file)
        statuses = sign_in_everywhere(crawl, settings)
        assert statuses[:2] + statuses[4:6] == [503] * 4
        assert statuses[6:8] + statuses[10:] == [500] * 4
        assert crawl.found() == set()

    def test_a_provider_of_the_sites_own_that_fails(
        self, kms: Provider, people: None, crawl: Crawl, settings: Any, monkeypatch: Any
    ) -> None:
        def fail(key: str, text: bytes, context: Any, **kwargs: Any) -> Any:
            raise KeyError(text, PASSWORD)

        for operation in ("encrypt", "decrypt"):
            monkeypatch.setattr(kms, operation, fail)
        statuses = sign_in_everywhere(crawl, settings)
        assert statuses[:2] + statuses[4:6] == [503] * 4
        assert crawl.found() == set()


def materials(file: Path) -> dict[str, bytes]:
    """The key material in a key file, if it can be read."""
    try:
        keys = json.loads(file.read_text())["keys"]
    except (OSError, ValueError):
        return {}
    secrets = [
        material["secret"]
        for key in (keys.values() if isinstance(keys, dict) else keys)
        for material in key["materials"]
    ]
    return {f"material {n}": base64.b64decode(text) for n, text in enumerate(secrets)}


#: What each hasher computes by, and what to change so that `harden_runtime` computes too.
INNER: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "argon2.low_level.lib": (hashers.KMSArgon2PasswordHasher, {}),
    "kms_hasher.hashers.pbkdf2": (hashers.KMSPBKDF2PasswordHasher, {"iterations": 2}),
    "hashlib.scrypt": (hashers.KMSScryptPasswordHasher, {}),
    "bcrypt.hashpw": (hashers.KMSBCryptPasswordHasher, {"rounds": 5}),
    "hashlib.md5": (hashers.KMSMD5PasswordHasher, {}),
}


@pytest.mark.parametrize("computes", INNER)
def test_an_inner_hasher_that_fails(
    computes: str, kms: Provider, crawl: Crawl, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frames below ours hold the password too, in Argon2's own library say."""
    kind, harder = INNER[computes]
    monkeypatch.setattr(hashers.KMSPBKDF2PasswordHasher, "iterations", 1)
    monkeypatch.setattr(hashers.KMSBCryptPasswordHasher, "rounds", 4)
    hasher = kind()
    encoded = hasher.encode(PASSWORD, hasher.salt())
    for name, value in harder.items():
        monkeypatch.setattr(kind, name, value)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OSError("no memory")

    library = SimpleNamespace(argon2_hash=fail) if computes.endswith("lib") else fail
    monkeypatch.setattr(computes, library)
    asked = [
        lambda: hasher.encode(PASSWORD, hasher.salt()),
        lambda: hasher.verify(PASSWORD, encoded),
        lambda: hasher._digest(PASSWORD, encoding.parse(encoded).header),
    ]
    if harder:
        asked.append(lambda: hasher.harden_runtime(PASSWORD, encoded))
    for ask in asked:
        try:
            ask()
        except OSError:
            crawl.report()
    assert len(crawl.errors) == len(asked)
    if computes.endswith("lib"):
        assert "argon2/low_level.py:hash_secret_raw" in crawl.frames
    assert crawl.found() == set()


class TestControl:
    """The crawl finds a secret in each of the sinks, however it is written."""

    @pytest.fixture(params=["the password", "digest 1"])
    def what(self, request: pytest.FixtureRequest, crawl: Crawl) -> str:
        make_password(PASSWORD)
        assert set(crawl.secrets) == {"the password", "digest 1"}
        assert crawl.found() == set()
        return str(request.param)

    @pytest.fixture(
        params=["raw", "repr", "escaped repr", "hex", "HEX", "numbers", "base64", "base64url"]
    )
    def text(self, request: pytest.FixtureRequest, what: str, crawl: Crawl) -> str:
        return dict(spellings(crawl.secrets[what]))[request.param]

    @staticmethod
    def places(crawl: Crawl, what: str) -> set[str]:
        return {sink for sink, found, _ in crawl.found() if found == what}

    def test_a_log(self, text: str, what: str, crawl: Crawl) -> None:
        logging.getLogger("botocore.endpoint").debug("sent: %s", text)
        assert {"log botocore.endpoint", "the log"} <= self.places(crawl, what)

    def test_a_field_of_a_record(self, what: str, crawl: Crawl) -> None:
        logging.getLogger("x").info("sent", extra={"it": crawl.secrets[what]})
        assert self.places(crawl, what) == {"record of x"}

    def test_a_mail(self, what: str, crawl: Crawl) -> None:
        text = dict(spellings(crawl.secrets[what]))["hex"]  # a subject has one line
        logging.getLogger("x").error("it is %s", text)
        assert {"a mail", "a mail's subject"} <= self.places(crawl, what)

    @pytest.mark.parametrize("asgi", [False, True])
    def test_a_frame_of_the_report(self, asgi: bool, crawl: Crawl) -> None:
        secret = crawl.secrets["digest 1"] = "n0-frame-may-show-it"
        response = post("/acareless/" if asgi else "/careless/", {"secret": secret}, asgi=asgi)
        assert response.status_code == 500
        assert {"report as HTML", "a mail's HTML"} <= self.places(crawl, "digest 1")

    def test_what_was_posted(self, crawl: Crawl) -> None:
        post("/careless/", {"secret": "-", "other": PASSWORD})
        assert {"report as text", "report as HTML", "a mail"} <= self.places(
            crawl, "the password"
        )

    def test_bytes_in_a_frame(self, what: str, crawl: Crawl) -> None:
        held = crawl.secrets[what]
        try:
            assert held == 5
        except AssertionError:
            crawl.report()
        assert "report as HTML" in self.places(crawl, what)

    def test_the_error_itself(self, text: str, what: str, crawl: Crawl) -> None:
        crawl.take(exceptions.KMSError(text))
        assert {"the error", "pickled"} & self.places(crawl, what)
        crawl.reports.clear()
        crawl.take(exceptions.KMSError(code=text))
        assert {"the error", "pickled"} & self.places(crawl, what)

    def test_the_error_before_it(self, crawl: Crawl) -> None:
        error = exceptions.KMSError()
        error.__context__ = KeyError(PASSWORD)
        with pytest.raises(AssertionError):
            crawl.take(error)

    def test_an_audit_row(self, what: str, crawl: Crawl) -> None:
        sub = dict(spellings(crawl.secrets[what]))["base64url"][:43]
        signals.emit(
            signals.Event(
                time=timezone.now(),
                operation="Encrypt",
                purpose="set",
                outcome=signals.ERROR,
                error_code=sub,
            )
        )
        assert "an audit row" in self.places(crawl, what)

    def test_an_answer(self, text: str, what: str, crawl: Crawl) -> None:
        crawl.answer(HttpResponse(text.encode("latin-1")))
        assert self.places(crawl, what) == {"the answer"}

    def test_a_header_of_an_answer(self, crawl: Crawl) -> None:
        crawl.answer(HttpResponse("", headers={"X-Debug": PASSWORD}))
        assert self.places(crawl, "the password") == {"the answer"}

    def test_a_page_of_the_admin(self, people: None, crawl: Crawl) -> None:
        User.objects.filter(username="anna").update(first_name=PASSWORD)
        read_the_admin(crawl)
        assert "the answer" in self.places(crawl, "the password")

    def test_the_frames_of_django_without_our_backend(
        self, kms: Provider, people: None, crawl: Crawl, settings: Any, key_arn: str
    ) -> None:
        """Why `KMSModelBackend` hides all frames below its own."""
        settings.AUTHENTICATION_BACKENDS = ["django.contrib.auth.backends.ModelBackend"]
        kms.disable_key(key_arn)
        sign_in_everywhere(crawl, settings)
        assert "report as HTML" in self.places(crawl, "the password")

    def test_a_hash_in_the_log_of_botocore(
        self,
        double: KMSDouble,
        crawl: Crawl,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Where it signs, and without our filter, it does hold the request's SHA-256."""
        monkeypatch.setattr("kms_hasher.providers._sigv4.is_plain", lambda url: False)
        keyring.provider().close()
        keyring.provider().describe_key("alias/site")
        monkeypatch.setattr(logging.getLogger("botocore.auth"), "filters", [])
        encoding.parse(make_password(PASSWORD))
        body = json.dumps(double.requests[-1].params).encode()
        crawl.secrets["body"] = hashlib.sha256(body).digest()
        assert "log botocore.auth" in self.places(crawl, "body")
