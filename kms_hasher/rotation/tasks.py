"""
The task of Django's own tasks framework for `rotate_kms_key --distribute tasks`.

It needs Django 6.0 or later, and a backend in `TASKS` whose workers run it.
"""

from __future__ import annotations

from collections.abc import Callable

from django.tasks import task

from kms_hasher.rotation import distribute


@task
def work_on(shard_id: int) -> None:
    """Work on one shard of a run. What goes wrong stands in its row."""
    distribute.work_on(shard_id)


def sender() -> Callable[[int], object]:
    """Return what puts a shard on the queue."""
    return lambda shard_id: work_on.enqueue(shard_id)
