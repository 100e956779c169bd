"""
The task that Celery's workers run for `rotate_kms_key --distribute celery`.

It needs the extra `django-kms-hasher[celery]`.
"""

from __future__ import annotations

from collections.abc import Callable

from celery import current_app, shared_task

from kms_hasher.exceptions import ConfigurationError, WorkerFailed
from kms_hasher.rotation import distribute

#: Seconds. A shard is given back long before; the limits that a site has made for tasks of
#: its own are not for this one.
LIMIT = 24 * 3600

NO_APP = (
    "--distribute celery needs the project's Celery app in this process too: import it in "
    "the package of the settings, as Celery's documentation for Django says."
)


@shared_task(
    name="kms_hasher.work_on",
    # A shard whose worker dies is delivered again; done twice it does no harm.
    acks_late=True,
    reject_on_worker_lost=True,
    ignore_result=True,
    time_limit=LIMIT,
    soft_time_limit=LIMIT - 60,
    # Logged by Celery as one line.
    throws=(WorkerFailed,),
)
def work_on(shard_id: int) -> None:
    """Work on one shard of a run. What goes wrong stands in its row."""
    distribute.work_on(shard_id)


def sender() -> Callable[[int], object]:
    """
    Return what puts a shard on Celery's queue.

    Raises `ConfigurationError` where no app was made: Celery's own would try another broker.
    """
    if current_app.main in (None, "default"):
        raise ConfigurationError(NO_APP)
    return lambda shard_id: work_on.delay(shard_id)
