"""
Settings of the site that tests/test_servers.py runs under each kind of server.

The test says where the database is and which key; AWS_ENDPOINT_URL_KMS is the double's.
"""

import os

from tests.settings import *  # noqa: F403
from tests.settings import KMS_HASHER as _KMS_HASHER
from tests.settings import MIDDLEWARE as _MIDDLEWARE

DEBUG = False
ALLOWED_HOSTS = ["127.0.0.1"]
ROOT_URLCONF = "tests.projects.served"
WSGI_APPLICATION = "tests.projects.served.wsgi"
INSTALLED_APPS = [
    "kms_hasher",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.admin",
]
MIDDLEWARE = [
    *(name for name in _MIDDLEWARE if "Csrf" not in name),
    "kms_hasher.middleware.KMSUnavailableMiddleware",
]
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": os.environ["KMS_HASHER_SERVED_DATABASE"],
        "OPTIONS": {
            "timeout": 60,
            "transaction_mode": "IMMEDIATE",
            "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL;",
        },
    }
}
KMS_HASHER = {
    **_KMS_HASHER,
    "PROVIDER": "aws",
    "KEY": os.environ["KMS_HASHER_SERVED_KEY"],
    "OPTIONS": {"region": os.environ["KMS_HASHER_SERVED_KEY"].split(":")[3]},
    "AUDIT": "durable",
}
LOGGING = {"version": 1, "loggers": {"kms_hasher": {"level": "CRITICAL"}}}
