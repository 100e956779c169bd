"""A site whose own user model has not taken KMSUserMixin."""

from tests.settings import *  # noqa: F403
from tests.settings import INSTALLED_APPS

INSTALLED_APPS = ["tests.projects.plain", *INSTALLED_APPS]
AUTH_USER_MODEL = "plain.User"
