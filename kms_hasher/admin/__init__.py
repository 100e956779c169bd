"""
The admin: keys, what aliases pointed to, rotations, events and findings, to be read. Nothing
in it is edited; a run can be paused, resumed and cancelled, a finding acknowledged.
"""

from kms_hasher.admin import (  # noqa: F401  # they register themselves
    events,
    findings,
    keys,
    rotations,
)
