"""Rotations: what the commands that rewrite stored passwords did."""

from __future__ import annotations

import datetime

from django.contrib import admin
from django.utils import timezone
from django.utils.html import format_html
from django.utils.safestring import SafeString
from django.utils.translation import gettext
from django.utils.translation import gettext_lazy as _

from kms_hasher.admin.base import NONE, ReadOnlyAdmin, short
from kms_hasher.models import RotationRun
from kms_hasher.rotation.runs import SILENCE


@admin.register(RotationRun)
class RotationAdmin(ReadOnlyAdmin):
    list_display = (
        "started_at",
        "kind",
        "state_now",
        "from_to",
        "rewritten",
        "overtaken",
        "failed",
        "duration",
        "started_by",
    )
    list_select_related = ("key", "previous_key")
    list_filter = ("kind", "state")
    show_facets = admin.ShowFacets.NEVER
    fields = (
        "kind",
        "state_now",
        "alias",
        "previous_key",
        "key",
        "started_at",
        "updated_at",
        "finished_at",
        "duration",
        "started_by",
        "rewritten",
        "overtaken",
        "failed",
        "error",
    )
    readonly_fields = fields

    @admin.display(description=_("state"), ordering="state")
    def state_now(self, rotation: RotationRun) -> str:
        return state_of(rotation)

    @admin.display(description=_("from and to key"))
    def from_to(self, rotation: RotationRun) -> SafeString:
        keys = (rotation.previous_key, rotation.key)
        return format_html("{} → {}", *(short(str(key)) if key else NONE for key in keys))

    @admin.display(description=_("duration"))
    def duration(self, rotation: RotationRun) -> str:
        taken = (rotation.finished_at or rotation.updated_at) - rotation.started_at
        return str(datetime.timedelta(seconds=round(taken.total_seconds())))


def state_of(rotation: RotationRun) -> str:
    """Return the state for people: a killed command leaves "running" behind."""
    running = rotation.state == str(RotationRun.State.RUNNING)
    if running and timezone.now() - rotation.updated_at > SILENCE:
        return gettext("interrupted?")
    return str(rotation.get_state_display())
