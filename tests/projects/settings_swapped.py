"""A site whose own user model has taken KMSUserMixin."""

import os

from tests.settings import *  # noqa: F403
from tests.settings import DATABASES, INSTALLED_APPS

# Beside the database of the tests that run this site.
DATABASES["default"].setdefault("TEST", {})["NAME"] = (
    None
    if DATABASES["default"]["ENGINE"].endswith("sqlite3")
    else f"test_swapped_{os.getpid()}"
)
INSTALLED_APPS = ["tests.projects.accounts", *INSTALLED_APPS]
AUTH_USER_MODEL = "accounts.User"
