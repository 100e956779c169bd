"""The hashers at the lowest costs Argon2 allows, so that tests wait for nothing."""

from django.contrib.auth.hashers import Argon2PasswordHasher

from kms_hasher.hashers import KMSArgon2PasswordHasher


class CheapArgon2PasswordHasher(Argon2PasswordHasher):
    time_cost, memory_cost, parallelism = 1, 8, 1


class CheapKMSArgon2PasswordHasher(KMSArgon2PasswordHasher):
    time_cost, memory_cost, parallelism = 1, 8, 1
