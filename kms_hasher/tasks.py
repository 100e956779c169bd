"""
Where Celery looks for the tasks of an app; kms_hasher's is in `rotation.celery`.

Other task queues import this module of every app too, on sites that have no Celery.
"""

from __future__ import annotations

from importlib.util import find_spec

if find_spec("celery"):
    import kms_hasher.rotation.celery  # noqa: F401
