"""
The events of the audit.

No page counts, sorts or searches all of them, however many there are: each of its queries
is answered from the end of an index.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from django.contrib import admin, messages
from django.contrib.admin.options import IncorrectLookupParameters
from django.contrib.admin.utils import quote
from django.core.exceptions import PermissionDenied
from django.db.models import QuerySet
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseRedirect
from django.http.response import HttpResponseBase
from django.template.response import TemplateResponse
from django.urls import URLPattern, path, reverse
from django.utils import formats
from django.utils.html import format_html
from django.utils.safestring import SafeString
from django.utils.translation import gettext
from django.utils.translation import gettext_lazy as _
from django.views.decorators.http import require_GET

from kms_hasher import encoding, signals
from kms_hasher.admin.base import ON_PAGE, ReadOnlyAdmin, named, number, short, time
from kms_hasher.exceptions import MalformedHash
from kms_hasher.models import AuditEvent, Key

if TYPE_CHECKING:
    from django.contrib.admin.views.main import ChangeList

    Events = QuerySet[AuditEvent]

EXPORT = "kms_hasher.export_auditevent"

#: How many events are searched for a request id, the newest first, if no day is chosen.
MAX_SEARCHED = 100_000

_SUB = re.compile(r"[0-9a-f]{6,32}\Z")
_REQUEST_ID = re.compile(r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}\Z")


def events_url(**filters: str) -> str:
    """Return the address of the list of events with these filters."""
    return f"{reverse('admin:kms_hasher_auditevent_changelist')}?{urlencode(filters)}"


class _Choice(admin.SimpleListFilter):
    """Filters by equality; the choices are known, so that no DISTINCT has to find them."""

    parameter_name: str

    def queryset(self, request: HttpRequest, queryset: Events) -> Events:
        value = self.value()
        return queryset.filter(**{self.parameter_name: value}) if value else queryset


class OutcomeFilter(_Choice):
    title, parameter_name = _("outcome"), "outcome"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [(name, gettext(name)) for name in signals.OUTCOMES]


class OperationFilter(_Choice):
    title, parameter_name = _("operation"), "operation"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        from kms_hasher.providers.base import OPERATIONS

        return [
            (name, name)
            for name in (*OPERATIONS.values(), signals.PARSE, signals.CIRCUIT_BREAKER)
        ]


class PurposeFilter(_Choice):
    title, parameter_name = _("purpose"), "purpose"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [(name, gettext(name)) for name in signals.PURPOSES]


class KeyFilter(_Choice):
    title, parameter_name = _("key"), "key_ref"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [(key.ref, str(key)) for key in Key.objects.all()[:ON_PAGE]]


@admin.register(AuditEvent)
class AuditEventAdmin(ReadOnlyAdmin):
    list_display = (
        "when",
        "operation",
        "purpose_shown",
        "outcome_and_error",
        "key",
        "stored_password",
        "latency",
    )
    list_filter = (OutcomeFilter, OperationFilter, PurposeFilter, KeyFilter)
    list_max_show_all = 0
    show_facets = admin.ShowFacets.NEVER  # a count over all events for every choice
    show_full_result_count = False
    sortable_by = ()
    date_hierarchy = "time"
    search_fields = ("sub",)
    search_help_text = _(
        "A stored password (the encryption context's sub, or how it begins), or a request id."
    )
    fields = (
        "when",
        "operation",
        "purpose_shown",
        "outcome_shown",
        "error_code",
        "whole_key",
        "requested_key",
        "latency",
        "request_ids",
        "whole_stored_password",
    )
    readonly_fields = fields

    def get_changelist(self, request: HttpRequest, **kwargs: Any) -> type[ChangeList]:
        from kms_hasher.admin.event_list import EventList  # Django imports its own as late

        return EventList

    def get_urls(self) -> list[URLPattern]:
        views: dict[str, tuple[Callable[..., HttpResponseBase], str]] = {
            "dashboard/": (self.dashboard_view, "dashboard"),
            "export/<slug:name>/": (self.export_view, "export"),
            "of-user/<path:object_id>/": (self.of_user_view, "of_user"),
        }
        own = [
            path(
                route,
                self.admin_site.admin_view(require_GET(view)),
                name=f"kms_hasher_auditevent_{name}",
            )
            for route, (view, name) in views.items()
        ]
        return [*own, *super().get_urls()]

    def dashboard_view(self, request: HttpRequest) -> HttpResponse:
        from kms_hasher.admin import dashboard  # which imports much, and this module

        if not self.has_view_permission(request):
            raise PermissionDenied
        context = {
            **self.admin_site.each_context(request),
            "opts": self.opts,
            "media": self.media,
            **dashboard.context(request),
        }
        return TemplateResponse(request, "admin/kms_hasher/auditevent/dashboard.html", context)

    def export_view(self, request: HttpRequest, name: str) -> HttpResponseBase:
        """Send the events that the list shows with the same address, on all of its pages."""
        from kms_hasher.admin import export

        if not (self.has_view_permission(request) and request.user.has_perm(EXPORT)):
            raise PermissionDenied
        if name not in export.FORMATS:
            raise Http404
        try:
            found = self.get_changelist_instance(request).queryset
        except IncorrectLookupParameters:
            return HttpResponseRedirect(events_url(e="1"))  # as Django's list does
        return export.response(request, found, name)

    def of_user_view(self, request: HttpRequest, object_id: str) -> HttpResponse:
        """Lead from a user to the events of the user's present password."""
        from kms_hasher.admin import user_events
        from kms_hasher.admin.event_list import OF

        if not self.has_view_permission(request):
            raise PermissionDenied
        user = user_events.find(self.admin_site, request, object_id)
        if user is None:
            raise Http404
        try:
            sub = user_events.sub_of(user)
        except user_events.NoEvents as why:
            self.message_user(request, str(why), messages.WARNING)
            return HttpResponseRedirect(user_events.page(user))
        return HttpResponseRedirect(events_url(q=sub, **{OF: quote(user.pk)}))

    def changelist_view(
        self, request: HttpRequest, extra_context: dict[str, Any] | None = None
    ) -> HttpResponse:
        exports = ("csv", "jsonl") if request.user.has_perm(EXPORT) else ()
        context = {**(extra_context or {}), "kms_exports": exports}
        return super().changelist_view(request, context)

    def get_search_results(
        self, request: HttpRequest, queryset: Events, search_term: str
    ) -> tuple[Events, bool]:
        term = search_term.strip().lower()
        if not term:
            return queryset, False
        if _SUB.match(term):
            # A range, because LIKE uses an index in few collations.
            return queryset.filter(sub__gte=term, sub__lte=term.ljust(32, "f")), False
        if not _REQUEST_ID.match(term):
            return queryset.none(), False
        if "time__year" not in request.GET:
            pks = AuditEvent.objects.order_by("-pk").values_list("pk", flat=True)
            newest = pks.first() or 0
            queryset = queryset.filter(pk__gt=newest - MAX_SEARCHED)
            if newest > MAX_SEARCHED:
                text = gettext(
                    "Only the newest %(number)s events were searched. Choose a date."
                )
                values = {"number": number(MAX_SEARCHED)}
                self.message_user(request, text % values, messages.WARNING)
        return queryset.filter(request_ids__contains=term), False

    @admin.display(description=_("time"))
    def when(self, event: AuditEvent) -> str:
        return time(event.time)

    @admin.display(description=_("purpose"))
    def purpose_shown(self, event: AuditEvent) -> str:
        return named(event.purpose)

    @admin.display(description=_("outcome"))
    def outcome_shown(self, event: AuditEvent) -> SafeString:
        return outcome(event.outcome)

    @admin.display(description=_("outcome"))
    def outcome_and_error(self, event: AuditEvent) -> SafeString:
        if not event.error_code:
            return outcome(event.outcome)
        name = event.error_code.removesuffix("Exception")
        code = format_html('<small title="{}">{}</small>', event.error_code, name)
        return format_html("{} {}", outcome(event.outcome), code)

    @admin.display(description=_("key"))
    def key(self, event: AuditEvent) -> SafeString | str:
        if not event.key_ref:
            return ""
        return _link(short(_key_id(event)), key_ref=event.key_ref)

    @admin.display(description=_("key"))
    def whole_key(self, event: AuditEvent) -> SafeString | str:
        if not event.key_ref:
            return ""
        return _link(_key_id(event), key_ref=event.key_ref)

    @admin.display(description=_("stored password"))
    def stored_password(self, event: AuditEvent) -> SafeString | str:
        return _link(short(event.sub), q=event.sub) if event.sub else ""

    @admin.display(description=_("stored password"))
    def whole_stored_password(self, event: AuditEvent) -> SafeString | str:
        return _link(event.sub, q=event.sub) if event.sub else ""

    @admin.display(description=_("latency"))
    def latency(self, event: AuditEvent) -> str:
        return latency(event)


def outcome(name: str) -> SafeString:
    """Return the outcome's name and its colour in the charts."""
    return format_html(
        '<span class="kms-outcome kms-{}"><svg viewBox="0 0 10 10" aria-hidden="true">'
        '<rect width="10" height="10"/></svg>{}</span>',
        name,
        named(name),
    )


def latency(event: AuditEvent) -> str:
    """Return the latency in milliseconds."""
    return gettext("%(number)s ms") % {
        "number": formats.number_format(
            round(event.latency_us / 1000, 1), 1, force_grouping=True
        )
    }


def _key_id(event: AuditEvent) -> str:
    try:
        return encoding.key_id(event.key_ref)
    except MalformedHash:
        return event.key_ref


def _link(text: str, **filters: str) -> SafeString:
    return format_html('<a href="{}">{}</a>', events_url(**filters), text)
