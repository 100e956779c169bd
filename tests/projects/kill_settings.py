"""
Settings of the processes that are killed, or are busy, while the key is rotated.

The test that starts them says where the database and the key file are. The audit is
durable, as on a site.
"""

import json
import os

from tests.settings import *  # noqa: F403
from tests.settings import INSTALLED_APPS as _INSTALLED_APPS
from tests.settings import KMS_HASHER as _KMS_HASHER

DATABASES = {"default": json.loads(os.environ["KMS_HASHER_LIVE_DATABASE"])}
if DATABASES["default"]["ENGINE"].endswith("sqlite3"):
    DATABASES["default"]["OPTIONS"] = {
        "timeout": 60,
        "transaction_mode": "IMMEDIATE",
        "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;",
    }

KMS_HASHER = {
    **_KMS_HASHER,
    "PROVIDER": "tests.projects.live_kms.Provider",
    "OPTIONS": {"path": os.environ["KMS_HASHER_LIVE_KEYS"], "allow_without_debug": True},
    "AUDIT": "durable",
    "MODE": os.environ.get("KMS_HASHER_LIVE_MODE", "direct"),
    "DATA_KEY_USERS": 100,
}
if _backend := os.environ.get("KMS_HASHER_LIVE_TASKS"):
    TASKS = {"default": {"BACKEND": _backend}}
    if _backend.startswith("django_tasks_db"):
        INSTALLED_APPS = [*_INSTALLED_APPS, "django_tasks_db"]
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "loggers": {"kms_hasher": {"level": "CRITICAL"}},
}
