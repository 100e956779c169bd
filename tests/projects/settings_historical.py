"""A site with Django's user model, whose fields another package has copied."""

from tests.settings import *  # noqa: F403
from tests.settings import INSTALLED_APPS

# Before kms_hasher and before auth: the copy is made as early as can be.
INSTALLED_APPS = ["tests.projects.historical", "simple_history", *INSTALLED_APPS]
