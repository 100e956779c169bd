"""The admin in German: the catalogue is whole, and nothing but pages is translated."""

from __future__ import annotations

import datetime
import gettext
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from html import unescape
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import django
import pytest
from django.contrib.auth.hashers import make_password
from django.core import mail
from django.core.management import CommandError, call_command
from django.test import Client
from django.utils import timezone, translation

import kms_hasher
from kms_hasher import signals
from kms_hasher.admin import user_events
from kms_hasher.audit import alarms
from kms_hasher.models import (
    AliasPeriod,
    AuditEvent,
    AuditFinding,
    AuditSeal,
    Key,
    RotationRun,
    RotationShard,
)
from tests import test_alarms, translating
from tests.projects import sample_audit
from tests.test_admin import (
    EVENTS,
    list_url,
    make_event,
    make_key,
    make_rotation,
    make_shard,
    page_url,
    run_url,
)
from tests.test_charts import SVG

PACKAGE = Path(kms_hasher.__file__).parent
MESSAGES = Path("locale", "de", "LC_MESSAGES")

mailed = test_alarms.mailed

# `python -m tests --all` refuses to run without it.
needs_gettext = pytest.mark.skipif(not translating.find(), reason="GNU gettext is not there")


def read(path: Path) -> dict[Any, str]:
    """Return the translations of a .mo file; those in plural have tuples for keys."""
    with path.open("rb") as file:
        found: dict[Any, str] = gettext.GNUTranslations(file)._catalog  # type: ignore[attr-defined]
    return {message: text for message, text in found.items() if message}


def english(message: Any) -> str:
    return message[0] if isinstance(message, tuple) else message


GERMAN = read(PACKAGE / MESSAGES / "django.mo")


# --- the catalogue ------------------------------------------------------------------


def run(*command: str | Path, cwd: Path | None = None) -> str:
    # `makemessages` needs no settings, and finds those of the tests from nowhere else.
    env = {name: text for name, text in os.environ.items() if name != "DJANGO_SETTINGS_MODULE"}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.system
@needs_gettext
def test_every_message_of_the_source_is_translated(tmp_path: Path) -> None:
    copy = tmp_path / "kms_hasher"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "django", "makemessages", "-l", "de", "--no-wrap", cwd=copy)
    for wrong in ("--untranslated", "--only-fuzzy", "--only-obsolete"):
        assert run("msgattrib", wrong, copy / MESSAGES / "django.po") == "", wrong
    again = tmp_path / "again.mo"
    run("msgfmt", "--check-format", "-o", again, copy / MESSAGES / "django.po")
    assert read(again) == GERMAN


@pytest.mark.system
@needs_gettext
def test_what_is_shipped_compiled_is_what_is_shipped_to_read(tmp_path: Path) -> None:
    compiled = tmp_path / "django.mo"
    run("msgfmt", "--check-format", "-o", compiled, PACKAGE / MESSAGES / "django.po")
    assert read(compiled) == GERMAN


def test_what_is_filled_in_is_the_same() -> None:
    filled = re.compile(r"%\(\w+\)[a-z]|%%|</?\w+[^>]*>|[:…]$")
    for message, text in GERMAN.items():
        assert sorted(filled.findall(text)) == sorted(filled.findall(english(message))), message


def test_django_says_the_same() -> None:
    """A site has one catalogue: what is in it twice would change pages of Django's own."""
    theirs: dict[Any, str] = {}
    root = Path(django.__file__).parent
    for path in (root / "conf" / MESSAGES, *(root / "contrib").glob(f"*/{MESSAGES}")):
        theirs |= read(path / "django.mo")
    both = GERMAN.keys() & theirs.keys()
    assert len(both) > 10
    assert {each: GERMAN[each] for each in both} == {each: theirs[each] for each in both}


def test_every_purpose_and_outcome_has_a_name() -> None:
    with translation.override("de"):
        for name in (*signals.PURPOSES, *signals.OUTCOMES):
            assert translation.gettext(name) == GERMAN[name]


# --- pages --------------------------------------------------------------------------


#: A button of Django 6.1, which it has not translated yet.
DJANGOS = {"Run"}


class Words(HTMLParser):
    """Collects what a page says, and what is said where something is pointed at."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.headings: list[str] = []
        self._inside: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside.append(tag)
        shown = re.compile("title|aria-label|placeholder|data-(live|late|gone|over)")
        self.found += [text for name, text in attrs if text and shown.fullmatch(name)]

    def handle_endtag(self, tag: str) -> None:
        while tag in self._inside and self._inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if text := " ".join(data.split()):
            self.found.append(text)
            if {"h1", "h2", "th", "dt", "label", "summary"} & set(self._inside):
                self.headings.append(text.rstrip(":"))


@pytest.fixture
def german(settings: Any, root: Client) -> Client:
    """A client of a superuser whose browser asks for German, and much to look at."""
    before, *others = settings.MIDDLEWARE
    settings.MIDDLEWARE = [before, "django.middleware.locale.LocaleMiddleware", *others]
    settings.USE_THOUSAND_SEPARATOR = True
    sample_audit.fill()
    root.defaults["HTTP_ACCEPT_LANGUAGE"] = "de"
    return root


def make_run() -> RotationRun:
    now = timezone.now()
    before = now - datetime.timedelta(days=2, hours=3, minutes=4)
    key = Key.objects.first()
    assert key is not None
    plan = {"options": {"batch_size": 2000, "rate": 1.5}, "left": [key.ref], "mode": "direct"}
    values = {"sweep": 1, "total": 9000, "rewritten": 4000, "calls": 5000, "rate": 1234.5}
    run = make_rotation(key, started_at=before, updated_at=now, plan=plan, **values)
    for number, state in enumerate(RotationShard.State):
        make_shard(run, number, state=state, looked=1000, failed=1, bad=[["1", "bad"]])
    return run


def pages() -> Iterator[tuple[str, str]]:
    """Yield the addresses of all pages, each with words that stand at the head of something."""
    make_event(
        key_ref=make_key().ref, purpose="rotate", outcome="denied", error_code="AccessDenied"
    )
    board = "Stand des Audits|Offene Befunde|Nach Schlüssel|Nach Zweck|95 % binnen|Anteil"
    yield f"{EVENTS}dashboard/", board
    yield f"{EVENTS}dashboard/?period=30d&purpose=login", "Rotationen in diesem Zeitraum|Tag"
    yield f"{EVENTS}dashboard/?period=7d", "Letztes Siegel|Stunde ab|Median"
    yield "/admin/kms_hasher/", "KMS-Passwortschlüssel-Administration"
    yield list_url(Key), "Aktueller Alias|Gespeicherte Passwörter"
    key = Key.objects.get(arn=make_key().arn)
    yield page_url(key), "Fingerabdruck|Alias-Verlauf|Neueste Ereignisse|Latenz|Zweck"
    yield list_url(AliasPeriod), "Alias|Schlüssel|Seit|Bis"
    yield page_url(AliasPeriod.objects.first()), "Alias|Schlüssel|Seit|Bis"
    run = make_run()
    yield list_url(RotationRun), "Begonnen am|Fortschritt|Schlüssel (von → nach)|Überholt"
    figures = "Fortschritt|Ratenbegrenzung|Restzeit|Dauer|Shards des aktuellen Durchgangs|Plan"
    yield page_url(run), figures
    yield list_url(AuditEvent), "Zeit|Operation|Zweck|Ergebnis|Gespeichertes Passwort|Latenz"
    yield page_url(AuditEvent.objects.first()), "Angeforderter Schlüssel|Anfrage-IDs|Zweck"
    yield list_url(AuditSeal), "Versiegelt am|Merkle-Wurzel|Anker|Bereinigt am"
    yield page_url(AuditSeal.objects.first()), "Hash des vorherigen Siegels|Früheste Zeit"
    yield list_url(AuditFinding), "Gegenstand|Schweregrad|Zuerst gesehen|Status"
    yield page_url(AuditFinding.objects.first()), "Einzelheiten|Belege|Quittiert von"


@pytest.mark.django_db
def test_pages_are_german(german: Client) -> None:
    names = {
        form
        for message, text in GERMAN.items()
        for form in (english(message), english(message).capitalize())
        if text.lower() != english(message).lower()
    } - DJANGOS
    for url, wanted in pages():
        html = german.get(url).content.decode()
        assert '<html lang="de"' in html
        told = Words(html)
        assert not set(wanted.split("|")) - set(told.headings), url
        assert not names.intersection(told.found), url


@pytest.mark.django_db
def test_answers_are_german(german: Client) -> None:
    run = make_run()

    def answers(response: Any) -> list[str]:
        return [unescape(each) for each in Words(response.content.decode()).found]

    asked = german.post(run_url(run, "cancel"))
    assert "Den Lauf abbrechen?" in answers(asked)
    paused = german.post(run_url(run, "pause"), follow=True)
    assert any(text.startswith("Der Lauf ist pausiert:") for text in answers(paused))
    live = german.get(run_url(run, "progress")).json()
    assert live["texts"]["duration"] == "2 Tage, 3:04:00"
    assert live["texts"]["cap"] == "1.234 Aufrufe/s"
    finding = AuditFinding.objects.first()
    assert finding is not None
    data = {"action": "acknowledge", "_selected_action": [finding.pk]}
    done = german.post(list_url(AuditFinding), data, follow=True)
    assert "1 Befund wurde quittiert." in answers(done)


@pytest.mark.django_db
def test_the_way_from_a_user_is_german(german: Client, django_user_model: Any) -> None:
    user = django_user_model.objects.create(username="ada", password=make_password("secret"))
    page = Words(german.get(user_events.page(user)).content.decode())
    assert "KMS-Ereignisse" in page.found
    assert any("versiegelt mit KMS-Schlüssel" in text for text in page.found)


@pytest.mark.django_db
def test_whoever_asks_for_another_language_reads_english(german: Client) -> None:
    html = german.get(f"{EVENTS}dashboard/", headers={"Accept-Language": "en"}).content.decode()
    assert "How the audit stands" in html


# --- numbers ------------------------------------------------------------------------

#: Attributes of SVG that are numbers, or several of them.
NUMBERS = ("x", "y", "x1", "x2", "y1", "y2", "width", "height", "stroke-opacity", "font-size")
SEVERAL = ("viewBox", "stroke-dasharray")

#: About how wide a letter of the charts is, and the square before a text of the legend.
LETTER, SQUARE = 6.2, 16


def drawn(html: str) -> Iterator[ElementTree.Element]:
    """Yield the charts of a page, and the small squares that have their colours."""
    for chart in re.findall(r"<svg viewBox=.*?</svg>", html, re.DOTALL):  # Django's have more
        chart = chart.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
        yield ElementTree.fromstring(chart)


def numbers(html: str) -> list[float]:
    """Return all numbers of the charts in a page; raises where one is none."""
    found: list[float] = []
    for chart in drawn(html):
        for element in chart.iter():
            for name, text in element.attrib.items():
                if name in NUMBERS:
                    found.append(float(text))
                elif name in SEVERAL:
                    found += map(float, text.split())
                elif name == "d":
                    found += map(float, re.sub(r"[a-zA-Z]", " ", text).split())
    return found


@pytest.mark.django_db
@pytest.mark.parametrize("query", ["", "?period=30d"])
def test_no_number_of_a_chart_is_written_as_people_do(query: str, german: Client) -> None:
    board = german.get(f"{EVENTS}dashboard/{query}").content.decode()
    assert re.search(r"\d\.\d{3}\D", board)  # for people it is
    assert len(numbers(board)) > 100
    assert 'class="kms-mark"' in board
    make_run()
    for model in (Key, RotationRun):
        for row in model.objects.all():
            html = german.get(page_url(row)).content.decode()
            assert numbers(html) or model is RotationRun
            for bar in re.findall(r"<progress [^>]*value=\"([^\"]*)\"", html):
                assert 0 <= float(bar) <= 1


@pytest.mark.django_db
def test_the_legend_is_as_wide_as_its_texts(german: Client) -> None:
    html = german.get(f"{EVENTS}dashboard/?period=30d").content.decode()
    (chart,) = (each for each in drawn(html) if each.attrib.get("role") == "img")
    texts = [text for text in chart.iter(f"{SVG}text") if text.attrib["y"] == "14"]
    assert len(texts) == len(signals.OUTCOMES)
    width = float(chart.attrib["viewBox"].split()[2])
    begin, *others = (float(text.attrib["x"]) for text in texts)
    for text, end in zip(texts, (*(x - SQUARE for x in others), width), strict=True):
        assert end - begin > LETTER * len(text.text or ""), text.text
        begin = end + SQUARE


# --- what is no page ----------------------------------------------------------------


@pytest.mark.django_db
def test_logs_mails_and_commands_are_english(
    settings: Any, mailed: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    settings.LANGUAGE_CODE = "de"
    mailed(test_alarms.LOCMEM)
    settings.KMS_HASHER = {**settings.KMS_HASHER, "AUDIT_MAIL_ADMINS": True}
    sample_audit.fill()
    run = make_run()
    finding = AuditFinding.objects.get(kind=AuditFinding.Kind.TAMPERED)
    with translation.override("de"):
        assert str(finding).startswith("Häufung manipulierter Werte")
        assert str(run).startswith("Umverschlüsselung")
        alarms.give(finding)
        alarms.mail()
        told = [
            output(call_command, "check_kms_audit"),
            output(call_command, "kms_status", "--no-permissions"),
            output(call_command, "rotate_kms_key", "--cancel", str(run.pk)),
        ]
    assert caplog.messages[-1].startswith("burst of tampered values")
    assert {each.subject.rpartition(": ")[2] for each in mail.outbox} == {
        "burst of tampered values",
        "call this application never made",
        "more decrypts than usual",
    }
    texts = [*told, *(each.body for each in mail.outbox)]
    assert "burst of tampered values" in texts[0]
    assert "last run: re-wrap" in texts[1] and ", finished, " in texts[1]
    assert "re-wrap" in texts[2] and "is cancelled" in texts[2]
    german = {text for message, text in GERMAN.items() if " " in text and text != message}
    assert not [each for each in german for text in texts if each in text]


def output(call: Callable[..., Any], *arguments: str) -> str:
    """Return all that a command says, its error too."""
    out = StringIO()
    try:
        call(*arguments, stdout=out, stderr=out)
    except CommandError as error:
        out.write(str(error))
    return out.getvalue()
