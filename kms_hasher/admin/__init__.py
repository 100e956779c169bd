"""
The admin: keys, what aliases pointed to, rotations, events, seals and findings, to be read,
and a dashboard. Nothing in it is edited; a run can be paused, resumed and cancelled, a finding
acknowledged.
"""

from kms_hasher.admin import (  # noqa: F401  # they register themselves
    events,
    findings,
    keys,
    rotations,
    seals,
)
