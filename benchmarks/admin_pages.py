"""
How long the admin's pages take at a million events and a hundred big runs, and how many
queries.

    DATABASE_URL=postgres://... python -m benchmarks.admin_pages [--events 1000000] [--merged]

Makes a test database of its own (SQLite in a temporary file without DATABASE_URL), fills it
by SQL and removes it. Prints for each page the best of three requests in milliseconds, the
part of it that the queries took, and the number of queries; of exports, until the first page
was read. The roll-ups are in all slots, as where `prune_kms_audit` has never merged them, or
with `--merged` as where it runs daily.
"""

# ruff: noqa: E402

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
import time
from datetime import timedelta
from urllib.parse import urlencode

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
from kms_hasher.audit import rollups, seals, store
from kms_hasher.models import (
    AuditEvent,
    AuditEvidence,
    AuditFinding,
    AuditHour,
    AuditSeal,
    RotationRun,
    RotationShard,
)

DAYS = 30
RUNS, UNDER_WAY, SHARDS = 100, 3, 2000
FINDINGS = 10_000
COSTS = "m=102400,t=2,p=8"
ARN = "arn:aws:kms:eu-central-1:111122223333:key/00000000-0000-4000-8000-00000000000"
TIME = {
    "postgresql": "now() - ({n} - i) * interval '{step} second'",
    "mysql": "utc_timestamp(6) - interval ({n} - i) * {step} second",
    "sqlite": "strftime('%Y-%m-%d %H:%M:%f000', 'now', (({n} - i) * -{step}) || ' seconds')",
}

BY_HOUR = {
    "postgresql": ("date_trunc('hour', time, 'UTC')", "(ln(latency_us) / ln(2))"),
    "mysql": ("date_format(time, '%Y-%m-%d %H:00:00')", "log2(latency_us)"),
    "sqlite": ("strftime('%Y-%m-%d %H:00:00', time)", "log2(latency_us)"),
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
            6000 + i % 42000, {uuid}, {md5}
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


def roll_up(n: int, merged: bool) -> None:
    """
    Count the events by hour, in one slot, and then again in each of the others.

    With `merged` the others have the last two days alone.
    """
    hour, log2 = BY_HOUR[connection.vendor]
    names = "hour, key_ref, operation, purpose, outcome, bucket, count"
    since = timezone.now() - timedelta(days=2 if merged else 999)
    table = AuditHour._meta.db_table
    with connection.cursor() as cursor:
        cursor.execute(
            f"insert into {table} ({names}, slot) select {hour}, key_ref, operation, purpose, "
            f"outcome, floor({rollups.RESOLUTION} * {log2}), count(*), 0 "
            f"from {AuditEvent._meta.db_table} group by 1, 2, 3, 4, 5, 6"
        )
        for slot in range(1, store.SLOTS):
            cursor.execute(
                f"insert into {table} ({names}, slot) select {names}, {slot} from {table} "
                "where slot = 0 and hour >= %s",
                [since],
            )
        mysql = connection.vendor == "mysql"
        cursor.execute(f"analyze table {table}" if mysql else "analyze")
    print(f"{AuditHour.objects.count():,} rows of figures by hour")


def make_runs() -> RotationRun:
    """
    Make a hundred runs of 100,000,000 rows, each in its second sweep, a few of which are not
    finished; return the last.
    """
    now = timezone.now()
    shards, each = SHARDS, 50_000
    for number in reversed(range(RUNS)):
        run = RotationRun.objects.create(
            kind=RotationRun.Kind.REWRAP,
            started_at=now,
            updated_at=now,
            sweep=2,
            state="running" if number < UNDER_WAY else "finished",
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


def make_audit() -> tuple[AuditSeal, AuditFinding]:
    """Make seals of nearly all events, as big as they get, and 10,000 open findings."""
    last = AuditEvent.objects.order_by("-pk").values_list("pk", flat=True)[0]
    now = timezone.now()
    leaves = bytes(9 * seals.SEGMENT)
    for sequence, end in enumerate(range(seals.SEGMENT, last + 1, seals.SEGMENT), 1):
        seal = AuditSeal.objects.create(
            sequence=sequence,
            version=1,
            sealed_at=now,
            after_id=end - seals.SEGMENT,
            last_id=end,
            count=seals.SEGMENT,
            root="0" * 64,
            previous="0" * 64,
            anchors={"mac": "0", "ciphertext": "0"},
            leaves=leaves,
        )
    made = AuditFinding.objects.bulk_create(
        AuditFinding(
            kind=AuditFinding.Kind.UNKNOWN_CALL,
            severity="critical" if at % 9 == 0 else "warning",
            dedup_key=f"{at:064}",
            subject="Decrypt by nobody here",
            first_seen=now,
            last_seen=now - timedelta(seconds=at),
        )
        for at in range(FINDINGS)
    )
    AuditEvidence.objects.bulk_create(
        AuditEvidence(finding=made[0], reference=f"{at}", time=now, operation="Decrypt")
        for at in range(FINDINGS)
    )
    with connection.cursor() as cursor:
        for model in (AuditSeal, AuditFinding, AuditEvidence):
            table = "table " if connection.vendor == "mysql" else ""
            cursor.execute(f"analyze {table}{model._meta.db_table}")
    return seal, made[0]


def main(n: int, merged: bool) -> None:
    started = time.perf_counter()
    refs = fill(n)
    print(f"filled in {time.perf_counter() - started:.0f} s", flush=True)
    roll_up(n, merged)
    run, runs = make_runs(), "/admin/kms_hasher/rotationrun/"
    seal, finding = make_audit()
    header = encoding.Header("kms_argon2", encoding.Argon2Parameters.parse(COSTS), bytes(16))
    user = get_user_model().objects.create(
        username="admin",
        is_staff=True,
        is_superuser=True,
        password=str(encoding.SealedHash(header, "d1", refs[2], b"sealed")),
    )
    client = Client()
    client.force_login(user)
    events, now = "/admin/kms_hasher/auditevent/", timezone.localtime()
    some = AuditEvent.objects.order_by("pk").last()
    middle = AuditEvent.objects.get(pk=some.pk - n // 2)
    position = event_list.Position(middle.time, middle.pk)
    hour = rollups.hour_of(timezone.now() - timedelta(hours=5))
    span = urlencode({"time__gte": hour, "time__lt": hour + timedelta(hours=1)})
    board = f"{events}dashboard/"
    day = f"time__year={now.year}&time__month={now.month}&time__day={now.day}"
    unknown = "00000000-0000-4000-8000-000000000000"
    since = timezone.now() - timedelta(days=DAYS)
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
        "events, hour": f"{events}?{span}",
        "events, since 30 days, key, purpose": (
            f"{events}?{urlencode({'time__gte': since})}&key_ref={refs[2]}&purpose=login"
        ),
        "events of a user": f"{events}of-user/{user.pk}/",
        "export as CSV, first page": f"{events}export/csv/",
        "export as JSON lines, first page": f"{events}export/jsonl/",
        "export, outcome unavailable": f"{events}export/csv/?outcome=unavailable",
        "export, key and day": f"{events}export/csv/?key_ref={refs[2]}&{day}",
        "dashboard": board,
        "dashboard, 7 days": f"{board}?period=7d",
        "dashboard, 30 days": f"{board}?period=30d",
        "dashboard, 90 days": f"{board}?period=90d",
        "dashboard, 30 days, key": f"{board}?period=30d&key_ref={refs[2]}",
        "dashboard, 30 days, purpose": f"{board}?period=30d&purpose=login",
        "dashboard, 30 days, key, purpose": (
            f"{board}?period=30d&key_ref={refs[2]}&purpose=login"
        ),
        "seals": "/admin/kms_hasher/auditseal/",
        "seal": f"/admin/kms_hasher/auditseal/{seal.pk}/change/",
        "findings": "/admin/kms_hasher/auditfinding/",
        "findings, open": "/admin/kms_hasher/auditfinding/?state=open",
        "finding": f"/admin/kms_hasher/auditfinding/{finding.pk}/change/",
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
            with CaptureQueriesContext(connection) as captured:
                start = time.perf_counter()
                response = client.get(url, follow=True)
                if response.streaming:  # the line of names is a part by itself
                    list(itertools.islice(response, 2))
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
    parser.add_argument("--merged", action="store_true")
    options = parser.parse_args()
    runner = DiscoverRunner(verbosity=0, interactive=False)
    with tempfile.TemporaryDirectory() as directory:
        if connection.vendor == "sqlite":  # its test databases are in memory otherwise
            connection.settings_dict["TEST"]["NAME"] = f"{directory}/events.sqlite3"
        databases = runner.setup_databases()
        try:
            with override_settings(ALLOWED_HOSTS=["testserver"]):
                main(options.events, options.merged)
        finally:
            runner.teardown_databases(databases)
