"""What the pages of all models have in common."""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING, Any

from django.contrib import admin
from django.db.models import Model
from django.http import HttpRequest
from django.utils import formats, timezone
from django.utils.html import format_html
from django.utils.safestring import SafeString
from django.utils.translation import gettext

if TYPE_CHECKING:
    ModelAdmin = admin.ModelAdmin[Any]
else:
    ModelAdmin = admin.ModelAdmin

#: The most periods, rotations, events or keys that a page lists beside its own matter.
ON_PAGE = 50


class ReadOnlyAdmin(ModelAdmin):
    """Shows what is there to those with the view permission, and lets no one change it."""

    class Media:
        css = {"all": ["kms_hasher/admin.css"]}

    def has_add_permission(self, *args: Any, **kwargs: Any) -> bool:
        return False

    def has_change_permission(self, *args: Any, **kwargs: Any) -> bool:
        return False

    def has_delete_permission(self, *args: Any, **kwargs: Any) -> bool:
        return False


#: What stands in the place of a key that there is none of.
NONE = "\N{EN DASH}"


def number(value: int) -> str:
    """Return a number as people read it here."""
    return str(formats.number_format(value, force_grouping=True))


def per_cent(value: str) -> str:
    """Return a number that is written already, as per cent."""
    # No space that a line may break at, which the tools for translations cannot read.
    text = gettext("%(number)s %%").replace(" ", "\N{NO-BREAK SPACE}")
    return text % {"number": value}


def named(name: str) -> str:
    """Return a purpose or an outcome in the reader's language."""
    return gettext(name) if name else ""  # the translation of "" is about the catalogue


def time(value: datetime.datetime | None) -> str:
    """Return a time to the second, which the events of a burst need."""
    if value is None:
        return ""
    local = timezone.localtime(value) if timezone.is_aware(value) else value
    return formats.date_format(local, "Y-m-d H:i:s")


def short(name: str) -> SafeString:
    """Return how a long id begins; all of it shows when pointed at."""
    return format_html('<span title="{}">{}…</span>', name, name[:8])


def may_view(request: HttpRequest, model: type[Model]) -> bool:
    """Return whether the user may see rows of the model."""
    name = f"{model._meta.app_label}.view_{model._meta.model_name}"
    return bool(request.user.has_perm(name))
