"""Keys, and what aliases pointed to."""

from __future__ import annotations

from typing import Any, cast

from django.contrib import admin, messages
from django.db import DatabaseError
from django.db.models import Prefetch, Q, QuerySet
from django.http import HttpRequest, HttpResponse
from django.utils.safestring import SafeString
from django.utils.translation import gettext, ngettext
from django.utils.translation import gettext_lazy as _

from kms_hasher import history
from kms_hasher.admin.base import (
    NONE,
    ON_PAGE,
    ReadOnlyAdmin,
    may_view,
    named,
    number,
    short,
    time,
)
from kms_hasher.admin.events import events_url, latency, outcome
from kms_hasher.admin.figures import state_of
from kms_hasher.exceptions import ConfigurationError
from kms_hasher.models import AliasPeriod, AuditEvent, Key, RotationRun


@admin.register(Key)
class KeyAdmin(ReadOnlyAdmin):
    list_display = (
        "short_id",
        "alias_now",
        "stored_passwords",
        "state",
        "spec",
        "region",
        "first_seen",
        "last_seen",
    )
    search_fields = ("arn", "ref")
    fields = (
        "arn",
        ("ref", "alias_now"),
        ("region", "account"),
        ("spec", "state"),
        "fingerprint",
        ("first_seen", "last_seen"),
        "stored_passwords",
    )
    readonly_fields = ("alias_now", "stored_passwords")
    actions = ("count_stored_passwords",)

    def get_queryset(self, request: HttpRequest) -> QuerySet[Key]:
        now = AliasPeriod.objects.filter(open_alias__isnull=False).order_by("alias")
        periods = Prefetch("alias_periods", now, to_attr="open_periods")
        return cast("QuerySet[Key]", super().get_queryset(request).prefetch_related(periods))

    @admin.display(description=_("key"))
    def short_id(self, key: Key) -> SafeString:
        return short(str(key))

    @admin.display(description=_("alias now"))
    def alias_now(self, key: Key) -> str:
        return ", ".join(period.alias for period in key.open_periods)  # type: ignore[attr-defined]

    @admin.display(description=_("stored passwords"), ordering="rows")
    def stored_passwords(self, key: Key) -> str:
        if key.rows is None:
            return gettext("not counted yet")
        values = {"number": number(key.rows), "time": time(key.rows_counted_at)}
        return gettext("%(number)s as of %(time)s") % values

    @admin.action(description=_("Count stored passwords now"), permissions=["view"])
    def count_stored_passwords(self, request: HttpRequest, queryset: QuerySet[Key]) -> None:
        """Count them for all keys: one pass over the columns tells of every key."""
        try:
            counted = history.record_counts()
        except (ConfigurationError, DatabaseError) as error:
            self.message_user(request, str(error), messages.ERROR)
            return
        sealed = sum(number for group, number in counted.items() if group.key_ref)
        text = ngettext(
            "%(number)s stored password is sealed by a key.",
            "%(number)s stored passwords are sealed by a key.",
            sealed,
        )
        self.message_user(request, text % {"number": number(sealed)}, messages.SUCCESS)

    def render_change_form(
        self, request: HttpRequest, context: dict[str, Any], *args: Any, **kwargs: Any
    ) -> HttpResponse:
        key: Key = context["original"]
        if may_view(request, AliasPeriod):
            context["periods"] = key.alias_periods.all()[:ON_PAGE]
        if may_view(request, RotationRun):
            rotations = RotationRun.objects.filter(Q(key=key) | Q(previous_key=key))
            latest = rotations.select_related("key", "previous_key")[:ON_PAGE]
            context["rotations"] = [
                {
                    "pk": rotation.pk,
                    "started": time(rotation.started_at),
                    "kind": rotation.get_kind_display(),
                    "state": state_of(rotation),
                    "from": rotation.previous_key or NONE,
                    "to": rotation.key or NONE,
                    "rewritten": number(rotation.rewritten),
                }
                for rotation in latest
            ]
        if may_view(request, AuditEvent):
            from kms_hasher.audit import charts  # only one page needs what it imports

            context["chart"] = charts.render(key.ref)
            context["events"] = [
                {
                    "pk": event.pk,
                    "time": time(event.time),
                    "operation": event.operation,
                    "purpose": named(event.purpose),
                    "outcome": outcome(event.outcome),
                    "error_code": event.error_code,
                    "latency": latency(event),
                }
                for event in AuditEvent.objects.filter(key_ref=key.ref)[:ON_PAGE]
            ]
            context["events_url"] = events_url(key_ref=key.ref)
        return super().render_change_form(request, context, *args, **kwargs)


@admin.register(AliasPeriod)
class AliasPeriodAdmin(ReadOnlyAdmin):
    list_display = ("alias", "key", "since", "until")
    list_select_related = ("key",)
    search_fields = ("alias", "key__arn")
    fields = ("alias", "key", "since", "until")
