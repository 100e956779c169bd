from __future__ import annotations

from django.apps import AppConfig
from django.utils.translation import gettext_lazy as _


class KMSHasherConfig(AppConfig):
    name = "kms_hasher"
    verbose_name = _("KMS password keys")
    default_auto_field = "django.db.models.BigAutoField"
