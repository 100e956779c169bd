from django.contrib.auth.models import AbstractUser

from kms_hasher.users import KMSUserMixin


class User(KMSUserMixin, AbstractUser):
    pass
