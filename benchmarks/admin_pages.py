"""
How long the admin's pages take at a million events and a hundred big runs, and how many
queries.

    DATABASE_URL=postgres://... python -m benchmarks.admin_pages [--events 1000000]

Makes a test database of its own (SQLite in a temporary file without DATABASE_URL), fills it
by SQL and removes it. Prints for each page the best of three requests in milliseconds, the
part of it that the queries took, and the number of queries. The roll-ups are in all slots,
as where `prune_kms_audit` has never merged them.
"""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import os
import tempfile
import time
from datetime import timedelta

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.settings")

import django

django.setup()

from django.contrib.auth import get_user_model
from django.db import connection
from django.test import Client, override_settings
from django.test.runner import DiscoverRunner
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from kms_hasher import encoding, history
from kms_hasher.admin import event_list
from kms_hasher.audit import retention, rollups, store
from kms_hasher.models import AuditEvent, AuditHour, RotationRun, RotationShard

DAYS = 30
RUNS, SHARDS = 100, 2000
ARN = "arn:aws:kms:eu-central-1:111122223333:key/00000000-0000-4000-8000-00000000000"
TIME = {
    "postgresql": "now() - ({n} - i) * interval '{step} second'",
    "mysql": "utc_timestamp(6) - interval ({n} - i) * {step} second",
    "sqlite": "strftime('%Y-%m-%d %H:%M:%f000', 'now', (({n} - i) * -{step}) || ' seconds')",
}


def fill(n: int) -> list[str]:
    """Make three keys and `n` events of `DAYS` days; one in a million is a denied CreateKey."""
    keys = [history.record_key(f"{ARN}{last}", timezone.now()) for last in range(3)]
    refs = [encoding.key_ref(key.arn) for key in keys]
    at = TIME[connection.vendor].format(n=n, step=DAYS * 86400 / n)
    text = "char" if connection.vendor == "mysql" else "varchar"
    md5 = f"md5(cast(i as {text}))"
    parts = [(1, 8), (9, 4), (13, 4), (17, 4), (21, 12)]
    pieces = [f"substr({md5}, {start}, {size})" for start, size in parts]
    uuid = (
        f"concat_ws('-', {', '.join(pieces)})"
        if connection.vendor != "sqlite"
        else " || '-' || ".join(pieces)
    )
    sql = f"""
        insert into {AuditEvent._meta.db_table}
        (time, operation, purpose, outcome, error_code, key_ref, requested_key, latency_us,
         request_ids, sub)
        with recursive numbers (i) as
            (select 1 union all select i + 1 from numbers where i < {n})
        select {at},
            case when i = 1000 then 'CreateKey' when i % 10 = 0 then 'Encrypt'
                else 'Decrypt' end,
            case when i = 1000 then 'status' when i % 10 = 0 then 'set' else 'login' end,
            case when i = 1000 then 'denied' when i % 200 = 0 then 'unavailable'
                when i % 100 = 7 then 'invalid' else 'success' end,
            '', case when i % 50 = 0 then '{refs[1]}' else '{refs[2]}' end, 'alias/tests',
            9000 + i % 7000, {uuid}, {md5}
        from numbers
    """
    indexes = AuditEvent._meta.indexes
    with connection.schema_editor() as editor:  # made at the end, as that takes less time
        for index in indexes:
            editor.remove_index(AuditEvent, index)
    with connection.cursor() as cursor:
        if connection.vendor == "mysql":
            cursor.execute(f"set max_recursive_iterations = {n + 1}")
        cursor.execute(sql)
    with connection.schema_editor() as editor:
        for index in indexes:
            editor.add_index(AuditEvent, index)
    with connection.cursor() as cursor:
        cursor.execute("analyze table kms_hasher_auditevent" if text == "char" else "analyze")
    return refs


def roll_up(n: int) -> None:
    """Count the events by hour, in one slot, and then again in each of the others."""
    started = time.perf_counter()
    for _ in retention.rebuild(timezone.now() + timedelta(hours=2)):
        pass
    taken = time.perf_counter() - started
    hours = AuditHour.objects.count()
    names = "hour, key_ref, operation, purpose, outcome, bucket, count"
    with connection.cursor() as cursor:
        table = AuditHour._meta.db_table
        for slot in range(1, store.SLOTS):
            cursor.execute(
                f"insert into {table} ({names}, slot) select {names}, {slot} from {table} "
                "where slot = 0"
            )
        mysql = connection.vendor == "mysql"
        cursor.execute(f"analyze table {table}" if mysql else "analyze")
    print(f"{n / taken:,.0f} events rolled up a second, into {hours:,} rows of each slot")


def make_runs() -> RotationRun:
    """Make a hundred runs of 100,000,000 rows, each in its second sweep; return the last."""
    now = timezone.now()
    shards, each = SHARDS, 50_000
    for _ in range(RUNS):
        run = RotationRun.objects.create(
            kind=RotationRun.Kind.REWRAP,
            started_at=now,
            updated_at=now,
            sweep=2,
            total=shards * each,
            failed=shards,
        )
        RotationShard.objects.bulk_create(
            [
                RotationShard(
                    run=run,
                    sweep=sweep,
                    number=number,
                    database="default",
                    column="auth.User.password",
                    after=str(number * each),
                    upto=str((number + 1) * each),
                    state="done" if sweep == 1 or number < shards / 2 else "waiting",
                    looked=each,
                    failed=1,
                    bad=[[str(number), "the blob was altered or moved"]],
                )
                for sweep in (1, 2)
                for number in range(shards)
            ],
            batch_size=200,
        )
    return run


def main(n: int) -> None:
    started = time.perf_counter()
    refs = fill(n)
    print(f"filled in {time.perf_counter() - started:.0f} s", flush=True)
    roll_up(n)
    run, runs = make_runs(), "/admin/kms_hasher/rotationrun/"
    user = get_user_model().objects.create(
        username="admin", is_staff=True, is_superuser=True, password="!"
    )
    client = Client()
    client.force_login(user)
    events, now = "/admin/kms_hasher/auditevent/", timezone.localtime()
    some = AuditEvent.objects.order_by("pk").last()
    middle = AuditEvent.objects.get(pk=some.pk - n // 2)
    position = event_list.Position(middle.time, middle.pk)
    day = f"time__year={now.year}&time__month={now.month}&time__day={now.day}"
    unknown = "00000000-0000-4000-8000-000000000000"
    busiest = history.Key.objects.get(ref=refs[2]).pk
    pages = {
        "events": events,
        "events, in the middle": f"{events}?before={position}",
        "events, failed, in the middle": f"{events}?outcome=unavailable&before={position}",
        "events, outcome success": f"{events}?outcome=success",
        "events, outcome denied (1)": f"{events}?outcome=denied",
        "events, operation Decrypt": f"{events}?operation=Decrypt",
        "events, operation CreateKey (1)": f"{events}?operation=CreateKey",
        "events, operation CancelKeyDeletion (0)": f"{events}?operation=CancelKeyDeletion",
        "events, purpose status (1)": f"{events}?purpose=status",
        "events, key busiest": f"{events}?key_ref={refs[2]}",
        "events, key without any": f"{events}?key_ref={refs[0]}",
        "events, key and outcome": f"{events}?key_ref={refs[2]}&outcome=unavailable",
        "events, success of CreateKey (0)": f"{events}?outcome=success&operation=CreateKey",
        "events, month": f"{events}?time__year={now.year}&time__month={now.month}",
        "events, day": f"{events}?{day}",
        "events, search sub": f"{events}?q={some.sub}",
        "events, search start of sub": f"{events}?q={some.sub[:8]}",
        "events, search request id": f"{events}?q={some.request_ids}",
        "events, search unknown request id": f"{events}?q={unknown}",
        "events, unknown request id, day": f"{events}?{day}&q={unknown}",
        "event": f"{events}{some.pk}/change/",
        "events of a key, month": (
            f"{events}?key_ref={refs[2]}&time__year={now.year}&time__month={now.month}"
        ),
        "keys": "/admin/kms_hasher/key/",
        "key": f"/admin/kms_hasher/key/{busiest}/change/",
        "runs": runs,
        "run": f"{runs}{run.pk}/change/",
        "run, figures for its script": f"{runs}{run.pk}/progress/",
    }
    print(f"{n:,} events on {connection.vendor}")
    since = timezone.now() - timedelta(days=DAYS)
    figures = {
        "roll-ups, totals of all": lambda: rollups.totals(since),
        "roll-ups, by day and outcome": lambda: rollups.series_by(
            "outcome", since, step=rollups.DAY, latency=False
        ),
        "roll-ups, by hour, two days, latencies": lambda: rollups.series(
            timezone.now() - timedelta(days=2)
        ),
        "roll-ups, by key": lambda: rollups.grouped("key_ref", since),
    }
    for name, call in figures.items():
        with CaptureQueriesContext(connection) as captured:
            start = time.perf_counter()
            call()
            taken = (time.perf_counter() - start) * 1000
        spent = float(captured.captured_queries[0]["time"]) * 1000
        print(f"{name:42} {taken:7.0f} ms  queries {spent:6.0f} ms    1")
    for name, url in pages.items():
        best, queries = 1e9, []
        for _ in range(3):
            with CaptureQueriesContext(
                connection,
            ) as captured:
                start = time.perf_counter()
                response = client.get(url)
                taken = (time.perf_counter() - start) * 1000
            assert response.status_code == 200, (url, response.status_code)
            if taken < best:
                best, queries = taken, captured.captured_queries
        spent = sum(float(query["time"]) for query in queries) * 1000
        print(f"{name:42} {best:7.0f} ms  queries {spent:6.0f} ms  {len(queries):3}")
        if os.environ.get("SLOW") and spent > float(os.environ["SLOW"]):
            for query in queries:
                if float(query["time"]) > 0.02:
                    print("   ", query["time"], query["sql"][:600])


if __name__ == "__main__":
    parser = argparse.ArgumentParser("python -m benchmarks.admin_pages")
    parser.add_argument("--events", type=int, default=1_000_000)
    options = parser.parse_args()
    runner = DiscoverRunner(verbosity=0, interactive=False)
    with tempfile.TemporaryDirectory() as directory:
        if connection.vendor == "sqlite":  # its test databases are in memory otherwise
            connection.settings_dict["TEST"]["NAME"] = f"{directory}/events.sqlite3"
        databases = runner.setup_databases()
        try:
            with override_settings(ALLOWED_HOSTS=["testserver"]):
                main(options.events)
        finally:
            runner.teardown_databases(databases)
