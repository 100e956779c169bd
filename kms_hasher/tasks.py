"""
The task that Celery's workers run for `rotate_kms_key --distribute celery`.

Celery finds it where the app is in `INSTALLED_APPS` and the project's Celery app calls
`autodiscover_tasks()`. It needs the extra `django-kms-hasher[celery]`.
"""

from __future__ import annotations

from celery import shared_task

from kms_hasher.exceptions import KMSHasherError
from kms_hasher.rotation import sweeps


@shared_task(
    name="kms_hasher.work_on",
    # A shard whose worker dies is delivered again; done twice it does no harm.
    acks_late=True,
    reject_on_worker_lost=True,
    ignore_result=True,
    throws=(KMSHasherError,),
)
def work_on(shard_id: int) -> None:
    """Work on one shard of a run. What goes wrong stands in its row."""
    sweeps.work_on(shard_id)


def send(shard_id: int) -> None:
    """Put a shard on Celery's queue."""
    work_on.delay(shard_id)
