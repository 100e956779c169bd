"""
Alarms: a finding that is news is told by a signal, a log line and, if wanted, by mail.

Some things are seen in the events as they happen (`watch`): a breaker that opens, a burst of
tampered values, a retired key in use. It takes a look at each event in memory, and what there
is to store is stored where events are: by a thread, in no request. All that is seen so, and
what takes counting, is found by `check` as well, for cron: in the events of all processes.
Mails are sent by the commands alone, so that no request waits for a mail server.
"""

from __future__ import annotations

import datetime
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from django.db.models import F, Q
from django.dispatch import Signal
from django.utils import timezone, translation

from kms_hasher import conf, signals
from kms_hasher.audit import detect, findings, places, seals, site, writer
from kms_hasher.audit.findings import Found, Severity
from kms_hasher.models import AuditFinding, in_english
from kms_hasher.signals import Event

#: Sent with `finding`, an `AuditFinding`, when it is new or seen again after it was closed, and
#: once a day while it goes on.
audit_alarm = Signal()

#: How long the same finding gives no other alarm.
QUIET = datetime.timedelta(days=1)

#: Seconds after which a process asks again whether a key it uses is retired.
ASK_AGAIN = 600.0

#: Mails that go at a time; the rest go at the next.
MAILS = 20

OVERDUE = "Sealing of the audit is overdue: the last seal is of {since:%Y-%m-%d %H:%M}."
NEVER = "Sealing of the audit is overdue: no seal, and events since {since:%Y-%m-%d %H:%M}."

SUBJECT = "KMS audit: {kind}"
MAIL = """\
{finding}

Severity:   {finding.severity}
First seen: {finding.first_seen:%Y-%m-%d %H:%M:%S}
Last seen:  {finding.last_seen:%Y-%m-%d %H:%M:%S}
Times:      {finding.count}

It is in the admin among the findings, with all that it stands on, until somebody
acknowledges it there.
"""

logger = logging.getLogger("kms_hasher")
lines = logging.getLogger("kms_hasher.alarms")


# --- giving an alarm ----------------------------------------------------------------


def give(finding: AuditFinding) -> bool:
    """
    Tell of a finding, unless it was told of within `QUIET`; return whether it was.

    A receiver or log handler that fails stops nothing.
    """
    now = timezone.now()
    due = findings.untold("alarmed_at") | Q(alarmed_at__lt=now - QUIET)
    # One process of several tells of it.
    if not AuditFinding.objects.filter(due, pk=finding.pk).update(alarmed_at=now):
        return False
    finding.alarmed_at = now
    level = logging.ERROR if finding.severity == Severity.CRITICAL else logging.WARNING
    try:
        lines.log(
            level, "%s", in_english(finding), extra={"finding": findings.as_json(finding)}
        )
    except Exception as error:  # noqa: BLE001
        logger.error("An alarm could not be logged (%s)", type(error).__name__)
    for receiver, answer in audit_alarm.send_robust(sender=AuditFinding, finding=finding):
        if isinstance(answer, Exception):
            name = getattr(receiver, "__qualname__", type(receiver).__name__)
            logger.error("A receiver of an alarm failed: %s (%s)", name, type(answer).__name__)
    return True


def found(what: Iterable[Found]) -> list[AuditFinding]:
    """Store what was found, tell of it, and return the findings."""
    rows = []
    for each in what:
        finding, _ = findings.record(each)
        if finding.is_open:
            give(finding)
        rows.append(finding)
    return rows


def mail() -> int:
    """
    Mail what is open to ADMINS, if `AUDIT_MAIL_ADMINS` is set; return how many mails went.

    Each finding once, and again after `QUIET` if it has gone on. A mail server that fails is
    logged, and asked again at the next time.
    """
    if not conf.get().audit_mail_admins:
        return 0
    from django.core.mail import mail_admins  # for a command alone

    now, sent = timezone.now(), 0
    gone_on = Q(mailed_at__lte=now - QUIET, last_seen__gt=F("mailed_at"))
    due = findings.untold("mailed_at") | gone_on
    for finding in findings.open_findings().filter(due).order_by("first_seen", "pk"):
        if sent == MAILS:
            break
        before = finding.mailed_at
        if not AuditFinding.objects.filter(due, pk=finding.pk).update(mailed_at=now):
            continue  # another process has just done so
        try:
            with translation.override(None):  # in English, as all that is no page
                subject = SUBJECT.format(kind=finding.get_kind_display())
                text = MAIL.format(finding=finding)
            mail_admins(subject, text)
        except Exception as error:  # noqa: BLE001  # whatever a mail backend raises
            AuditFinding.objects.filter(pk=finding.pk).update(mailed_at=before)
            logger.error("A finding could not be mailed (%s)", type(error).__name__)
        else:
            sent += 1
    return sent


def sealing(start: datetime.datetime, end: datetime.datetime) -> Iterator[Found]:
    """Return that sealing is overdue; not on a site that does not seal."""
    del start, end
    state = seals.state()
    if state.is_overdue and state.since:
        text = OVERDUE if state.last else NEVER
        yield detect.sealing_overdue(state.since, text.format(since=state.since))


#: What `check` asks, each with the start and the end of the time to look at.
Check = Callable[[datetime.datetime, datetime.datetime], Iterable[Found]]
CHECKS: list[Check] = [*detect.CHECKS, sealing]


def check(hours: float = 1.0, now: datetime.datetime | None = None) -> list[AuditFinding]:
    """Look at the events of the last hours with all `CHECKS`, and return what was found."""
    return run_checks(hours, now)[0]


def run_checks(
    hours: float = 1.0, now: datetime.datetime | None = None
) -> tuple[list[AuditFinding], list[str]]:
    """
    Do the same, and return the names of the checks that failed as well.

    A check that fails is logged, and the others go on.
    """
    end = now or timezone.now()
    start = end - datetime.timedelta(hours=hours)
    rows, failed = list[AuditFinding](), list[str]()
    for each in CHECKS:
        try:
            rows += found(each(start, end))
        except Exception as error:  # noqa: BLE001
            name = getattr(each, "__name__", str(each))
            failed.append(name)
            logger.error("The check %s of the audit failed (%s)", name, type(error).__name__)
    return rows, failed


# --- as it happens ------------------------------------------------------------------


def connect() -> None:
    """Begin to watch. Called once, when Django is ready; harmless if called again."""
    signals.kms_events.connect(watch, dispatch_uid="kms_hasher.alarms")


#: When the last invalid values came, and when this process asked after each key.
_invalid: deque[float] = deque(maxlen=detect.BURST)
_asked: dict[str, float] = {}


def watch(events: Sequence[Event], **kwargs: Any) -> None:
    """Look at events as they happen; what is worth a finding is stored by a thread."""
    telling = [event for event in events if _tells(event)]
    mode = conf.get().audit
    if not telling or mode == "off":
        return
    try:
        place = places.place(mode, AuditFinding)
        if place in (places.THREAD, places.HELD):
            writer.submit(_store, telling).add_done_callback(
                lambda done: _complain(problem) if (problem := done.exception()) else None
            )
        elif place == places.HERE:
            # Keys are left to `check`: no login pays for that on its own connection. So is
            # all that comes while nothing can be written.
            failed = [event for event in telling if event.outcome != signals.SUCCESS]
            if failed:
                places.write_here(AuditFinding, _store, failed)
    except Exception as error:  # noqa: BLE001
        _complain(error)


def _tells(event: Event) -> bool:
    if event.operation == signals.CIRCUIT_BREAKER:
        return event.outcome != signals.SUCCESS
    now = time.monotonic()
    if event.outcome == signals.INVALID:
        _invalid.append(now)
        if len(_invalid) == detect.BURST and now - _invalid[0] <= detect.BURST_SECONDS:
            _invalid.clear()
            return True
        return False
    if event.outcome != signals.SUCCESS or event.operation not in site.USES:
        return False
    if detect.anchors(event):
        return False
    names = {event.key, event.requested_key}
    new = [name for name in names if now - _asked.get(name, -ASK_AGAIN) >= ASK_AGAIN]
    if len(_asked) > 1000:  # aliases and keys are few, unless somebody forges
        _asked.clear()
    _asked.update(dict.fromkeys(new, now))
    return bool(new)


def _store(events: Sequence[Event]) -> None:
    found(detect.in_events(events))


def _complain(error: BaseException) -> None:
    logger.error("A finding could not be stored (%s)", type(error).__name__)


def reset() -> None:
    """Forget what was seen: another process, another test."""
    _invalid.clear()
    _asked.clear()


os.register_at_fork(after_in_child=reset)
