"""
The admin: keys, what aliases pointed to, rotations and events, to be read. Nothing in it is
edited; a run can be paused, resumed and cancelled.
"""

from kms_hasher.admin import events, keys, rotations  # noqa: F401  # they register themselves
