"""
What happens while Django starts: the stock user's password field is widened, the system
checks are registered, sessions are made to survive re-wrapping, the receivers are connected.

Nothing here asks the database or KMS, and settings that cannot work stop nothing: the
system checks report them.
"""

from __future__ import annotations

from django.apps import AppConfig, apps
from django.db import models
from django.db.models.signals import class_prepared
from django.utils.translation import gettext_lazy as _


def widen_stock_user(sender: type[models.Model], **kwargs: object) -> None:
    """
    Widen the password field of `auth.User` the moment the class is made.

    `ready()` would be too late for packages that copy the fields of the user model. The
    historical models of migrations are left alone, or else widening would be no change.
    """
    options = sender._meta
    if options.label == "auth.User" and options.apps is apps:
        from kms_hasher import users

        if users.is_stock():
            users.widen(sender)


class_prepared.connect(widen_stock_user)


class KMSHasherConfig(AppConfig):
    name = "kms_hasher"
    verbose_name = _("KMS password keys")
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        from kms_hasher import checks, receivers, users
        from kms_hasher.audit import alarms, recorder

        checks.register()
        users.adapt()
        recorder.connect()
        alarms.connect()
        receivers.connect()
