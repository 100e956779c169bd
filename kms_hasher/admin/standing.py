"""How the audit stands, for the dashboard: open findings, seals, and what was compared."""

from __future__ import annotations

import datetime
from typing import Any

from django.db.models import Case, Value, When
from django.http import HttpRequest
from django.urls import reverse
from django.utils import timezone
from django.utils.translation import ngettext

from kms_hasher.admin.base import NONE, ON_PAGE, may_view, number, time
from kms_hasher.audit import findings, seals, segments, site
from kms_hasher.models import AuditFinding, AuditSeal, TrailMark

#: So many open findings are listed; the rest are a link away.
TOP = 5

#: So many open findings are counted; more are said to be "more than" that many.
COUNTED = 1_000

#: A reconciliation that is older is marked: CloudTrail takes a quarter of an hour or so.
LATE = datetime.timedelta(days=1)


def findings_shown(request: HttpRequest) -> dict[str, Any] | None:
    if not may_view(request, AuditFinding):
        return None
    worst = [
        When(severity=severity, then=Value(-at))
        for at, severity in enumerate(findings.SEVERITIES)
    ]
    found = findings.open_findings()
    count = found.order_by()[: COUNTED + 1].count()
    top = found.order_by(Case(*worst, default=Value(0)), "-last_seen", "-pk").defer("details")
    listed = reverse("admin:kms_hasher_auditfinding_changelist")
    return {
        "count": f"> {number(COUNTED)}" if count > COUNTED else number(count),
        "any": bool(count),
        "url": f"{listed}?state=open",
        "top": [
            {
                "pk": each.pk,
                "severity": each.severity,
                "severity_shown": each.get_severity_display(),
                "kind": each.get_kind_display(),
                "subject": each.subject,
                "times": number(each.count),
                "last": time(each.last_seen),
            }
            for each in top[:TOP]
        ],
    }


def seals_shown(request: HttpRequest) -> dict[str, Any] | None:
    if not may_view(request, AuditSeal):
        return None
    state = seals.state()
    most = state.unsealed >= segments.COUNTED
    return {
        "url": reverse("admin:kms_hasher_auditseal_changelist"),
        "last": state.last,
        "time": time(state.last.sealed_at) if state.last else "",
        "age": age(state.age) if state.age is not None else NONE,
        "unsealed": f"≥ {number(state.unsealed)}" if most else number(state.unsealed),
        "is_overdue": state.is_overdue,
    }


def trail_shown(request: HttpRequest) -> dict[str, Any] | None:
    """
    Return up to when CloudTrail was compared, the Region that is furthest behind first.

    Late is what no comparison has come to: a Region where nobody calls may be far behind.
    """
    if not may_view(request, AuditFinding):
        return None
    now = timezone.now()
    marks = TrailMark.objects.all()
    if regions := site.Keys().regions:
        # Of others records were read, but none of this site's.
        marks = marks.filter(region__in=regions)
    rows = [
        {
            "region": mark.region,
            "until": time(mark.until),
            "age": age(now - mark.until),
            "is_late": abs(now - mark.updated_at) > LATE,  # nobody has looked tomorrow
            "at": time(mark.updated_at),
        }
        for mark in marks.order_by("until")[:ON_PAGE]
    ]
    return {"rows": rows}


def age(span: datetime.timedelta) -> str:
    """Return about how long ago something was."""
    seconds = max(span.total_seconds(), 0)
    if seconds < 3600:
        n = int(seconds / 60)
        text = ngettext("%(number)s minute ago", "%(number)s minutes ago", n)
    elif seconds < 48 * 3600:
        n = int(seconds / 3600)
        text = ngettext("%(number)s hour ago", "%(number)s hours ago", n)
    else:
        n = int(seconds / 86400)
        text = ngettext("%(number)s day ago", "%(number)s days ago", n)
    return text % {"number": number(n)}
