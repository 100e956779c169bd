"""Seals of the audit, to be read: whether they hold is for `verify_kms_audit` to say."""

from __future__ import annotations

import json
from typing import cast

from django.contrib import admin
from django.db.models import QuerySet
from django.http import HttpRequest
from django.utils.html import format_html
from django.utils.safestring import SafeString
from django.utils.translation import gettext
from django.utils.translation import gettext_lazy as _

from kms_hasher.admin.base import NONE, ReadOnlyAdmin, number, short, time
from kms_hasher.audit import canonical
from kms_hasher.models import AuditSeal

#: What people call the anchors, by what stands in `AuditSeal.anchors`.
ANCHORS = {"mac": _("MAC"), "ciphertext": _("CloudTrail")}


@admin.register(AuditSeal)
class AuditSealAdmin(ReadOnlyAdmin):
    list_display = ("sequence", "sealed", "events", "ids", "short_root", "anchored", "gone")
    sortable_by = ()
    show_full_result_count = False
    fields = (
        ("sequence", "version"),
        "sealed",
        ("events", "ids"),
        "late",
        ("earliest", "latest"),
        "root",
        "previous",
        "anchors_shown",
        "pruned",
        ("gone", "pruning_anchors_shown"),
    )
    readonly_fields = (
        "sealed",
        "events",
        "ids",
        "earliest",
        "latest",
        "anchors_shown",
        "gone",
        "pruning_anchors_shown",
    )

    def get_queryset(self, request: HttpRequest) -> QuerySet[AuditSeal]:
        rows = super().get_queryset(request).defer("leaves")  # half a megabyte each
        return cast("QuerySet[AuditSeal]", rows)

    @admin.display(description=_("sealed at"))
    def sealed(self, seal: AuditSeal) -> str:
        return time(seal.sealed_at)

    @admin.display(description=_("events"))
    def events(self, seal: AuditSeal) -> str:
        return number(seal.count)

    @admin.display(description=_("ids"))
    def ids(self, seal: AuditSeal) -> str:
        last = number(seal.last_id)
        if seal.after_id == canonical.FLOOR:
            return gettext("up to %(last)s") % {"last": last}
        return f"{number(seal.after_id + 1)}\N{EN DASH}{last}"

    @admin.display(description=_("Merkle root"))
    def short_root(self, seal: AuditSeal) -> SafeString:
        return short(seal.root)

    @admin.display(description=_("anchors"))
    def anchored(self, seal: AuditSeal) -> str:
        found = seal.anchors if isinstance(seal.anchors, dict) else {}
        return ", ".join(str(text) for name, text in ANCHORS.items() if name in found) or NONE

    @admin.display(description=_("pruned at"))
    def gone(self, seal: AuditSeal) -> str:
        return time(seal.pruned_at) or NONE

    @admin.display(description=_("earliest time"))
    def earliest(self, seal: AuditSeal) -> str:
        return time(seal.first_time) or NONE

    @admin.display(description=_("latest time"))
    def latest(self, seal: AuditSeal) -> str:
        return time(seal.last_time) or NONE

    @admin.display(description=_("anchors"))
    def anchors_shown(self, seal: AuditSeal) -> SafeString | str:
        return _json(seal.anchors)

    @admin.display(description=_("anchors of the pruning"))
    def pruning_anchors_shown(self, seal: AuditSeal) -> SafeString | str:
        return _json(seal.pruning_anchors)


def _json(value: object) -> SafeString | str:
    return format_html("<pre>{}</pre>", json.dumps(value, indent=2)) if value else NONE
