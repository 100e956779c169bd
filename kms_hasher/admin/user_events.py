"""
From a user to the events of the user's stored password, and back to a name.

Events know no users, only the `sub` of a stored password: it is computed from the password
that the user has now, when somebody asks. Who may not see users is told no names.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from django.contrib.admin import AdminSite
from django.contrib.admin.utils import quote, unquote
from django.contrib.auth import get_user_model
from django.core.exceptions import PermissionDenied
from django.http import HttpRequest
from django.urls import reverse
from django.utils.translation import gettext_lazy as _

from kms_hasher import encoding, modes
from kms_hasher.exceptions import MalformedHash

ENVELOPE = modes.MODES["envelope"].code

NOT_SEALED = _("KMS was never called for this user's password: it is not sealed.")
DATA_KEY = _(
    "This user's password is sealed by a data key. KMS is called for data keys then, and not "
    "for users."
)


class NoEvents(Exception):
    """Raised where a stored password can have no events; says why."""


class Owner(NamedTuple):
    """Whose stored password it is, and the address of that user's page."""

    name: str
    url: str


def find(site: AdminSite, request: HttpRequest, object_id: str) -> Any:
    """
    Return the user whose page in the admin has this id, or None.

    Raises `PermissionDenied` unless the reader may see that page.
    """
    model = get_user_model()
    if not site.is_registered(model):
        raise PermissionDenied
    pages = site.get_model_admin(model)
    user = pages.get_object(request, unquote(object_id))
    if not pages.has_view_permission(request, user):
        raise PermissionDenied
    return user


def sub_of(user: Any) -> str:
    """Return the `sub` of the user's stored password. Raises `NoEvents`."""
    try:
        stored = encoding.parse(user.password)
    except MalformedHash:
        raise NoEvents(NOT_SEALED) from None
    if stored.mode == ENVELOPE:
        raise NoEvents(DATA_KEY)
    return stored.header.sub


def owner(site: AdminSite, request: HttpRequest, object_id: str, sub: str) -> Owner | None:
    """Return whose stored password has this `sub`, if it is this user's; None if not."""
    try:
        user = find(site, request, object_id)
        if user is None or sub_of(user) != sub:
            return None
    except (NoEvents, PermissionDenied):
        return None
    return Owner(str(user), page(user))


def page(user: Any) -> str:
    """Return the address of the user's page."""
    name = f"{user._meta.app_label}_{user._meta.model_name}"
    return reverse(f"admin:{name}_change", args=[quote(user.pk)])
