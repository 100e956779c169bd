"""
Findings: read, and acknowledged or resolved by those who may.

Who may view findings sees all of them; who may reconcile sees those of comparisons with
CloudTrail, and resolves them.
"""

from __future__ import annotations

import json
from typing import Any

from django.contrib import admin, messages
from django.contrib.admin.models import CHANGE, LogEntry
from django.contrib.admin.options import get_content_type_for_model
from django.db.models import QuerySet
from django.http import HttpRequest
from django.utils import timezone
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString
from django.utils.translation import gettext, ngettext
from django.utils.translation import gettext_lazy as _

from kms_hasher.admin.base import NONE, ON_PAGE, ReadOnlyAdmin, number, time
from kms_hasher.admin.events import events_url
from kms_hasher.audit import findings
from kms_hasher.models import AuditEvidence, AuditFinding

Kind = AuditFinding.Kind

#: What `reconcile_kms_audit` finds.
COMPARED = (Kind.UNKNOWN_CALL, Kind.UNKNOWN_CHANGE, Kind.NOT_IN_TRAIL)

RECONCILE = "kms_hasher.reconcile_auditevent"


class StateFilter(admin.SimpleListFilter):
    title, parameter_name = _("state"), "state"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [
            ("open", gettext("open")),
            ("acknowledged", gettext("acknowledged")),
            ("resolved", gettext("resolved")),
        ]

    def queryset(
        self, request: HttpRequest, queryset: QuerySet[AuditFinding]
    ) -> QuerySet[AuditFinding]:
        value = self.value()
        if value == "open":
            return queryset.filter(acknowledged_at=None, resolved_at=None)
        if value == "acknowledged":
            return queryset.exclude(acknowledged_at=None)
        return queryset.exclude(resolved_at=None) if value == "resolved" else queryset


@admin.register(AuditFinding)
class AuditFindingAdmin(ReadOnlyAdmin):
    list_display = ("subject", "kind", "severity", "times", "first", "last", "state")
    list_filter = (StateFilter, "kind", "severity")
    list_select_related = ()
    show_full_result_count = False
    show_facets = admin.ShowFacets.NEVER
    actions = ("acknowledge", "resolve")
    fields = (
        "subject",
        "kind",
        "severity",
        "times",
        "first",
        "last",
        "key_ref",
        "told",
        "stands_on",
        "state",
        "acknowledged_by",
    )
    readonly_fields = fields

    def has_acknowledge_permission(self, request: HttpRequest) -> bool:
        """Return whether the user may acknowledge findings: Django asks for the action."""
        return bool(request.user.has_perm("kms_hasher.acknowledge_auditfinding"))

    def has_reconcile_permission(self, request: HttpRequest) -> bool:
        """Return whether the user may see and resolve what comparisons found."""
        return bool(request.user.has_perm(RECONCILE))

    def has_view_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        if super().has_view_permission(request, obj):
            return True
        may = self.has_reconcile_permission(request)
        return may and (obj is None or obj.kind in COMPARED)

    def get_queryset(self, request: HttpRequest) -> QuerySet[AuditFinding]:
        found: QuerySet[AuditFinding] = super().get_queryset(request)
        return (
            found if super().has_view_permission(request) else found.filter(kind__in=COMPARED)
        )

    @admin.action(description=_("Acknowledge the findings chosen"), permissions=["acknowledge"])
    def acknowledge(self, request: HttpRequest, queryset: QuerySet[AuditFinding]) -> None:
        name = request.user.get_username()
        done = [each for each in queryset if findings.acknowledge(each, name)]
        text = ngettext(
            "%(number)s finding was acknowledged.",
            "%(number)s findings were acknowledged.",
            len(done),
        )
        self._note(request, done, gettext("Acknowledged."), text)

    @admin.action(
        description=_("Resolve the findings of comparisons chosen"), permissions=["reconcile"]
    )
    def resolve(self, request: HttpRequest, queryset: QuerySet[AuditFinding]) -> None:
        """Close what somebody has explained; it is opened again by what is found later."""
        compared = AuditFinding.objects.filter(kind__in=COMPARED, resolved_at=None)
        now = timezone.now()
        done = [
            each for each in queryset if compared.filter(pk=each.pk).update(resolved_at=now)
        ]
        text = ngettext(
            "%(number)s finding was resolved.",
            "%(number)s findings were resolved.",
            len(done),
        )
        self._note(request, done, gettext("Resolved."), text)

    def _note(
        self, request: HttpRequest, done: list[AuditFinding], what: str, text: str
    ) -> None:
        """Keep who has done it in the history of each finding, and tell how many there were."""
        for finding in done:
            LogEntry.objects.create(
                user_id=str(request.user.pk),
                content_type=get_content_type_for_model(finding),
                object_id=str(finding.pk),
                object_repr=str(finding)[:200],
                action_flag=CHANGE,
                change_message=what,
            )
        self.message_user(request, text % {"number": len(done)}, messages.SUCCESS)

    @admin.display(description=_("count"), ordering="count")
    def times(self, finding: AuditFinding) -> str:
        return number(finding.count)

    @admin.display(description=_("first seen"), ordering="first_seen")
    def first(self, finding: AuditFinding) -> str:
        return time(finding.first_seen)

    @admin.display(description=_("last seen"), ordering="last_seen")
    def last(self, finding: AuditFinding) -> str:
        return time(finding.last_seen)

    @admin.display(description=_("state"))
    def state(self, finding: AuditFinding) -> str:
        if finding.acknowledged_at:
            return gettext("acknowledged %(time)s") % {"time": time(finding.acknowledged_at)}
        if finding.resolved_at:
            return gettext("resolved %(time)s") % {"time": time(finding.resolved_at)}
        return gettext("open")

    @admin.display(description=_("details"))
    def told(self, finding: AuditFinding) -> SafeString | str:
        if not finding.details:
            return NONE
        return format_html("<pre>{}</pre>", json.dumps(finding.details, indent=2))

    @admin.display(description=_("evidence"))
    def stands_on(self, finding: AuditFinding) -> SafeString | str:
        """List the calls and events, the newest first, `ON_PAGE` at most."""
        rows = finding.evidence.filter(explained_at=None).order_by("-time", "-pk")[:ON_PAGE]
        if not rows:
            return NONE
        lines = format_html_join("", "<li>{} {} {} {} {}</li>", map(_line, rows))
        return format_html("<ul>{}</ul>", lines)


def _line(row: AuditEvidence) -> tuple[Any, ...]:
    sub = format_html('<a href="{}">{}</a>', events_url(q=row.sub), row.sub) if row.sub else ""
    return time(row.time), row.operation, row.source_ip, sub, row.holder or ""
