"""
The Celery app of tests/projects/live.py: `celery -A tests.projects.queue worker`.

KMS_HASHER_LIVE_BROKER is the broker's URL, KMS_HASHER_LIVE_QUEUE a queue of the test's own,
on Redis a prefix of all keys too. With KMS_HASHER_LIVE_TWICE each message is sent twice.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from celery import Celery
from celery.signals import worker_init
from kombu import Queue

QUEUE = os.environ["KMS_HASHER_LIVE_QUEUE"]

app = Celery("live", broker=os.environ["KMS_HASHER_LIVE_BROKER"], set_as_current=True)
app.conf.update(
    task_default_queue=QUEUE,
    task_queues=[Queue(QUEUE, routing_key=QUEUE)],
    task_default_routing_key=QUEUE,
    worker_prefetch_multiplier=1,
    worker_enable_remote_control=False,
    worker_send_task_events=False,
    broker_connection_retry_on_startup=True,
    # As a site may have it for its own tasks; none of this run's is to be cut short.
    task_time_limit=2,
    task_soft_time_limit=1,
)
if app.conf.broker_url.startswith("redis"):
    app.conf.broker_transport_options = {"global_keyprefix": QUEUE}
app.autodiscover_tasks()


@worker_init.connect
def use_all_early(**kwargs: Any) -> None:
    """Use KMS, audit thread and database before the pool is forked, as a busy parent does."""
    from django.contrib.auth.models import User
    from django.db import connections

    def sign_in(number: int) -> bool:
        try:
            user = User.objects.order_by("pk")[number]
            return user.check_password(f"pw{user.username[4:]}")
        finally:
            connections.close_all()

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(sign_in, range(2)))
    assert User.objects.exists()  # leaves a connection open


import django  # noqa: E402

django.setup()
import tests.projects.live  # noqa: E402,F401
from kms_hasher.rotation import celery  # noqa: E402

if os.environ.get("KMS_HASHER_LIVE_TWICE"):
    sender = celery.sender

    def send_twice() -> Callable[[int], object]:
        send = sender()
        return lambda shard_id: (send(shard_id), send(shard_id))

    celery.sender = send_twice
