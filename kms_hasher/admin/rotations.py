"""Rotations: what the commands that rewrite stored passwords do and did."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from django.contrib import admin
from django.contrib.admin.utils import unquote
from django.core.exceptions import PermissionDenied
from django.db.models import QuerySet
from django.http import Http404, HttpRequest, HttpResponse, JsonResponse
from django.urls import URLPattern, path, reverse
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString
from django.utils.translation import gettext
from django.utils.translation import gettext_lazy as _
from django.views.decorators.http import require_GET

from kms_hasher.admin import figures
from kms_hasher.admin.base import NONE, ON_PAGE, ReadOnlyAdmin, number, short
from kms_hasher.admin.figures import Sums
from kms_hasher.models import RotationRun

if TYPE_CHECKING:
    from django.contrib.admin.views.main import ChangeList


@admin.register(RotationRun)
class RotationAdmin(ReadOnlyAdmin):
    list_display = (
        "started_at",
        "kind",
        "state_now",
        "progress",
        "rewritten_shown",
        "failed_shown",
        "duration",
        "from_to",
        "overtaken_shown",
        "calls_shown",
        "started_by",
    )
    list_select_related = ("key", "previous_key")
    list_filter = ("kind", "state")
    show_facets = admin.ShowFacets.NEVER
    fields = (
        ("kind", "alias"),
        ("previous_key", "key"),
        ("started_at", "started_by"),
        "planned",
    )
    readonly_fields = ("planned",)

    class Media:
        js = ["kms_hasher/rotation.js"]

    def get_changelist(self, request: HttpRequest, **kwargs: Any) -> type[ChangeList]:
        from kms_hasher.admin.rotation_list import (
            RotationList,  # Django imports its own as late
        )

        return RotationList

    def get_queryset(self, request: HttpRequest) -> QuerySet[RotationRun]:
        rows = super().get_queryset(request).select_related("key", "previous_key")
        return cast("QuerySet[RotationRun]", rows)

    def get_urls(self) -> list[URLPattern]:
        progress = path(
            "<path:object_id>/progress/",
            self.admin_site.admin_view(require_GET(self.progress_view)),
            name="kms_hasher_rotationrun_progress",
        )
        return [progress, *super().get_urls()]

    # --- the list -------------------------------------------------------------------

    @admin.display(description=_("state"), ordering="state")
    def state_now(self, run: RotationRun) -> str:
        return figures.state_of(run)

    @admin.display(description=_("from and to key"))
    def from_to(self, run: RotationRun) -> SafeString:
        keys = (run.previous_key, run.key)
        return format_html("{} → {}", *(short(str(key)) if key else NONE for key in keys))

    @admin.display(description=_("progress"))
    def progress(self, run: RotationRun) -> SafeString:
        sums: Sums = run.sums  # type: ignore[attr-defined]
        part = figures.share(run, sums)
        return format_html(
            '<progress max="1" value="{}" title="{}" aria-label="{}"></progress> {}',
            f"{part:.4f}",
            figures.progress(run, sums),
            gettext("Progress"),
            figures.percent(part),
        )

    @admin.display(description=_("rewritten"), ordering="rewritten")
    def rewritten_shown(self, run: RotationRun) -> str:
        return number(run.rewritten)

    @admin.display(description=_("overtaken"), ordering="overtaken")
    def overtaken_shown(self, run: RotationRun) -> str:
        return number(run.overtaken)

    @admin.display(description=_("bad rows"), ordering="failed")
    def failed_shown(self, run: RotationRun) -> str:
        return number(run.failed)

    @admin.display(description=_("calls"), ordering="calls")
    def calls_shown(self, run: RotationRun) -> str:
        return number(run.calls)

    @admin.display(description=_("duration"))
    def duration(self, run: RotationRun) -> str:
        return figures.duration(run)

    # --- the page of a run ----------------------------------------------------------

    @admin.display(description=_("plan"))
    def planned(self, run: RotationRun) -> SafeString | str:
        lines = ((line,) for line in figures.plan(run))
        return format_html_join("", "<div>{}</div>", lines) or NONE

    def render_change_form(
        self, request: HttpRequest, context: dict[str, Any], *args: Any, **kwargs: Any
    ) -> HttpResponse:
        run: RotationRun = context["original"]
        context["live"] = figures.live(run, request.GET.get("since", ""))
        context["progress_url"] = _url("progress", run)
        context["most"] = ON_PAGE
        return super().render_change_form(request, context, *args, **kwargs)

    def progress_view(self, request: HttpRequest, object_id: str) -> JsonResponse:
        """Return what changes on the page of a run."""
        run = self._get(request, object_id)
        return JsonResponse(figures.live(run, request.GET.get("since", "")))

    def _get(self, request: HttpRequest, object_id: str) -> RotationRun:
        run: RotationRun | None = self.get_object(request, unquote(object_id))
        if not self.has_view_permission(request, run):
            raise PermissionDenied
        if run is None:
            raise Http404
        return run


def _url(name: str, run: RotationRun) -> str:
    return reverse(f"admin:kms_hasher_rotationrun_{name}", args=[run.pk])
