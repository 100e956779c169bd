"""The admin: keys, what aliases pointed to, rotations and events, to be read and no more."""

from kms_hasher.admin import events, keys, rotations  # noqa: F401  # they register themselves
