"""Rotations: what the commands that rewrite stored passwords do and did; pause and cancel."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from django.contrib import admin, messages
from django.contrib.admin.utils import unquote
from django.core.exceptions import PermissionDenied
from django.db.models import QuerySet
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseRedirect, JsonResponse
from django.template.response import TemplateResponse
from django.urls import URLPattern, path, reverse
from django.utils.functional import Promise
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString
from django.utils.translation import gettext
from django.utils.translation import gettext_lazy as _
from django.views.decorators.http import require_GET, require_POST

from kms_hasher.admin import figures
from kms_hasher.admin.base import NONE, ON_PAGE, ReadOnlyAdmin, number, short
from kms_hasher.admin.figures import State, Sums
from kms_hasher.models import RotationRun
from kms_hasher.rotation import runs

if TYPE_CHECKING:
    from django.contrib.admin.views.main import ChangeList

CONTROL = "kms_hasher.control_rotationrun"


class Wish(NamedTuple):
    """What can be asked of a run: by whom it is done, in which states, what is said then."""

    do: Callable[[RotationRun], bool]
    states: tuple[State, ...]
    label: str | Promise
    done: str | Promise
    refused: str | Promise
    logged: str | Promise


WISHES = {
    "pause": Wish(
        runs.pause,
        (State.RUNNING,),
        _("Pause"),
        _("The run is paused: work on it stops once the rows already read are done."),
        _("Not paused, for the run is not running. Its state is: %(state)s."),
        _("Paused the run."),
    ),
    "resume": Wish(
        runs.resume,
        (State.PAUSED,),
        _("Resume"),
        _("The run may go on."),
        _("Not resumed, for the run is not paused. Its state is: %(state)s."),
        _("Resumed the run."),
    ),
    "cancel": Wish(
        runs.cancel,
        tuple(state for state in State if state not in runs.ENDED),
        _("Cancel…"),
        _("The run is cancelled. Rows stay as they are."),
        _("Not cancelled, for the run has ended. Its state is: %(state)s."),
        _("Cancelled the run."),
    ),
}

#: What becomes of the rows of a run that is cancelled, and what brings the rest home.
CANCELLED_ROWS = {
    RotationRun.Kind.NEW_MATERIAL: _(
        "Each is sealed by the new key material or by the former, and both work."
    ),
    RotationRun.Kind.WRAP: _("Each is sealed or still a stock hash, and both work."),
    RotationRun.Kind.UNWRAP: _("Each is a stock hash or still sealed, and both work."),
    RotationRun.Kind.TO_MODE: _(
        "Each is in the one or the other mode, and both work: keep the keys of both."
    ),
    RotationRun.Kind.NEW_DATA_KEYS: _(
        "Each is under the one or the other data key, and both work: none of them is deleted."
    ),
}
UNDER_EITHER_KEY = _(
    "Each is under the one or the other key, and both keys work: keep both. An alias that was "
    "moved stays where it is."
)
#: A cancelled run is not gone on with: these are commands for a new one, and no new key.
AFTER_CANCEL = {
    RotationRun.Kind.NEW_MATERIAL: "manage.py rotate_kms_key --new-material",
    RotationRun.Kind.WRAP: "manage.py wrap_passwords",
    RotationRun.Kind.UNWRAP: "manage.py unwrap_passwords",
}


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
        views = {name: self._wish_view(name) for name in WISHES}
        views["progress"] = require_GET(self.progress_view)
        own = [
            path(
                f"<path:object_id>/{name}/",
                self.admin_site.admin_view(view),
                name=f"kms_hasher_rotationrun_{name}",
            )
            for name, view in views.items()
        ]
        return [*own, *super().get_urls()]

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
            str(run.get_state_display()) if part == 1 else figures.progress(run, sums),
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
        if request.user.has_perm(CONTROL):
            context["wishes"] = [
                {
                    "name": name,
                    "label": wish.label,
                    "url": _url(name, run),
                    "allowed": run.state in wish.states,
                }
                for name, wish in WISHES.items()
            ]
        context["progress_url"] = _url("progress", run)
        context["most"] = ON_PAGE
        return super().render_change_form(request, context, *args, **kwargs)

    def progress_view(self, request: HttpRequest, object_id: str) -> JsonResponse:
        """Return what changes on the page of a run."""
        run = self._get(request, object_id)
        live = figures.live(run, request.GET.get("since", ""))
        live["allowed"] = [name for name, wish in WISHES.items() if run.state in wish.states]
        return JsonResponse(live)

    def _wish_view(self, name: str) -> Callable[..., HttpResponse]:
        wish = WISHES[name]

        def view(request: HttpRequest, object_id: str) -> HttpResponse:
            if not request.user.has_perm(CONTROL):
                raise PermissionDenied
            run = self._get(request, object_id)
            if name == "cancel" and run.state in wish.states and "sure" not in request.POST:
                return self._ask(request, run)
            self._fulfil(request, run, wish)
            return HttpResponseRedirect(_url("change", run))

        return require_POST(view)

    def _get(self, request: HttpRequest, object_id: str) -> RotationRun:
        run: RotationRun | None = self.get_object(request, unquote(object_id))
        if not self.has_view_permission(request, run):
            raise PermissionDenied
        if run is None:
            raise Http404
        return run

    def _fulfil(self, request: HttpRequest, run: RotationRun, wish: Wish) -> None:
        done = wish.do(run)
        run.refresh_from_db(fields=["state"])
        if not done:
            text = str(wish.refused) % {"state": figures.state_of(run)}
            self.message_user(request, text, messages.ERROR)
            return
        self.log_change(request, run, str(wish.logged))
        text, command = figures.note(run)
        if wish is WISHES["resume"] and text:  # it may go on, and nobody is there to
            self.message_user(request, f"{wish.done} {text} {command}", messages.WARNING)
        else:
            self.message_user(request, str(wish.done), messages.SUCCESS)

    def _ask(self, request: HttpRequest, run: RotationRun) -> HttpResponse:
        kind = RotationRun.Kind(run.kind)
        context = {
            **self.admin_site.each_context(request),
            "title": gettext("Cancel the run?"),
            "subtitle": str(run),
            "opts": self.opts,
            "run": run,
            "progress": figures.progress(run, figures.sums_of([run]).get(run.pk, Sums())),
            "rows": CANCELLED_ROWS.get(kind, UNDER_EITHER_KEY),
            "command": _after_cancel(run),
            "costs_material": kind == RotationRun.Kind.NEW_MATERIAL,
            "back": _url("change", run),
        }
        return TemplateResponse(
            request, "admin/kms_hasher/rotationrun/cancel_confirmation.html", context
        )


def _after_cancel(run: RotationRun) -> str:
    kind = RotationRun.Kind(run.kind)
    if kind in (RotationRun.Kind.TO_MODE, RotationRun.Kind.NEW_DATA_KEYS):
        return runs.command_of(run)
    return AFTER_CANCEL.get(kind, "manage.py rotate_kms_key")


def _url(name: str, run: RotationRun) -> str:
    return reverse(f"admin:kms_hasher_rotationrun_{name}", args=[run.pk])
