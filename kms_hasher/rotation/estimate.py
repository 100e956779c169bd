"""
What a re-wrap of many rows takes: calls, money, time, quota, disk and locks.

`estimate` only calculates; `disk` asks the database for the size of a table, and
`measured_latency` asks KMS a few times. Nothing here changes anything.

Calls in a second, of all processes together:

    processes * min(concurrency / (latency + 1 / per_process), per_process)

and no more than `rate` and the quota. A process with `concurrency` calls in flight begins one
whenever one ends, which takes the latency and the processor's time for the call; and its
processor makes no more than `per_process` calls in a second, however many are in flight.
These are the two bounds of a closed queueing network (Denning and Buzen, "The Operational
Analysis of Queueing Network Models", 1978). Where they are near each other, the real rate is
below both: `benchmarks.simulation` shows by how much.

Sources, as they stood in 2026: quotas from
https://docs.aws.amazon.com/kms/latest/developerguide/requests-per-second.html
and prices from https://aws.amazon.com/kms/pricing/.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from django.db import Error, connections, transaction

from kms_hasher import conf, keyring
from kms_hasher.columns import Column

#: "Cryptographic operations (symmetric) request rate": requests a second for the account and
#: Region, shared by all that use KMS there, AWS's own services included. ReEncrypt is one of
#: these operations. An account may have been granted more: see its Service Quotas console.
QUOTA = 10_000
QUOTAS: Mapping[str, int] = {
    "us-east-1": 100_000,
    "us-west-2": 100_000,
    "eu-west-1": 100_000,
    "us-east-2": 20_000,
    "ap-southeast-1": 20_000,
    "ap-southeast-2": 20_000,
    "ap-northeast-1": 20_000,
    "eu-central-1": 20_000,
    "eu-west-2": 20_000,
}

#: US dollars for 10,000 requests with symmetric keys. The free tier, 20,000 requests a month
#: for the account, is left out: logins use it up, and it is worth 0.06 dollars.
PRICE = 0.03
#: US dollars a month for a key, until its deletion is scheduled. The first and the second new
#: material of a key add as much; later ones nothing.
KEY_PRICE = 1.0

#: As how many requests KMS counts and bills one ReEncrypt. Its quota table lists ReEncrypt
#: like Encrypt and Decrypt and says of other operations, but not of this one, that they count
#: as two. Nowhere is it said in so many words, so a cautious plan takes 2.
REQUESTS_PER_CALL = 1

#: Rows that a process re-wraps in a second when it waits for nothing: `benchmarks.rotation`,
#: 1,977 with `AUDIT` "durable" and 2,399 with "off" on a bad day, 3,233 and 4,068 on a good
#: one. It depends on the processor.
PER_PROCESS = 2_000.0

#: Rows changed, and so locked, by one statement at the most.
ROWS_PER_STATEMENT = 100

#: What the rate is bounded by: `rate` (the cap asked for), the quota, the latency of KMS with
#: so many calls in flight, or the processors.
Bound = Literal["rate", "quota", "latency", "cpu"]

# Bytes, and the rows in them as the database believes: of what a row's update makes anew.
_SIZES: Mapping[str, str] = {
    # The whole row; and where its page is full, an entry in every index.
    "postgresql": (
        "SELECT pg_relation_size(oid) + pg_indexes_size(oid), reltuples "
        "FROM pg_class WHERE oid = %s::regclass"
    ),
    "mysql": (
        "SELECT data_length, table_rows FROM information_schema.tables "
        "WHERE table_schema = DATABASE() AND table_name = %s"
    ),
}


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """
    What a re-wrap of `rows` rows takes.

    `calls` of ReEncrypt, one a row, if none is tried again; `requests` is what KMS counts
    and bills them as. `rate` is in calls a second, of all processes, and `bound` what keeps
    it from being higher. `share` is the part of `quota` (requests a second) that the run
    takes, 0 to 1: what is left is for logins and all else. `money` is in US dollars, for the
    requests alone; a new key adds `KEY_PRICE` a month. `seconds` is the time of the first
    sweep, which makes the calls; later ones only read.

    `statements` change `rows_locked` rows at a time, at most, and hold their locks until the
    statement is committed: no lock is held while KMS is asked.
    """

    rows: int
    calls: int
    requests: int
    rate: float
    bound: Bound
    quota: int
    share: float
    money: float
    seconds: float
    statements: int
    rows_locked: int


def quota_of(region: str) -> int:
    """
    Return a Region's default request quota for symmetric keys, in requests a second.

    `region` is like "eu-central-1"; what AWS's table does not name has 10,000.
    """
    return QUOTAS.get(region, QUOTA)


def estimate(
    rows: int,
    *,
    latency: float,
    concurrency: int,
    processes: int = 1,
    rate: float | None = None,
    quota: int = QUOTA,
    per_process: float = PER_PROCESS,
    requests_per_call: int = REQUESTS_PER_CALL,
) -> Estimate:
    """
    Return what a re-wrap of so many rows takes, by the formula in this module's docstring.

    `latency` is that of one call in seconds, as the caller sees it. `concurrency` is the
    calls in flight in each of `processes`. `rate` is the cap on the calls of all of them
    together, in calls a second, None for none; what the database can write in a second may
    be such a cap. `quota` is in requests a second. `per_process` is how many calls a process
    makes in a second with no latency at all. Raises `ValueError` for what cannot be.
    """
    if rows < 0 or latency < 0 or (rate is not None and rate <= 0):
        raise ValueError("rows and latency are at least 0, a rate is more")
    if min(concurrency, processes, quota, requests_per_call) < 1 or per_process <= 0:
        raise ValueError("concurrency, processes, quota, calls and requests are more than 0")
    bounds: dict[Bound, float] = {
        "rate": math.inf if rate is None else rate,
        "quota": quota / requests_per_call,
        "cpu": processes * per_process,
        "latency": processes * concurrency / (latency + 1 / per_process),
    }
    bound = min(bounds, key=bounds.__getitem__)
    reached = bounds[bound]
    requests = rows * requests_per_call
    return Estimate(
        rows=rows,
        calls=rows,
        requests=requests,
        rate=reached,
        bound=bound,
        quota=quota,
        share=reached * requests_per_call / quota,
        money=requests * PRICE / 10_000,
        seconds=rows / reached,
        statements=math.ceil(rows / ROWS_PER_STATEMENT),
        rows_locked=min(rows, ROWS_PER_STATEMENT),
    )


def disk(column: Column, rows: int) -> int | None:
    """
    Return the bytes that the old versions of so many re-wrapped rows take at most, or None.

    On PostgreSQL they stay in the table, and in its indexes, until they are vacuumed: a
    re-wrap of all rows can double both. On MySQL and MariaDB the row is changed in place,
    and the old version is in the undo log until it is purged: all of them only if something
    reads for as long as the run takes, as a backup does. What the database believes to be
    in the table decides; if it believes nothing, the whole table is taken.

    Left out: the write-ahead log or binary log, the tables of the audit, and row growth.
    None where it cannot be told: SQLite (which writes in place), other databases, and a
    question that the database does not answer. It raises nothing for that, and leaves a
    transaction under way as it was.
    """
    connection = connections[column.database]
    found = None
    # A missing right or table must not keep a rotation from being planned.
    with contextlib.suppress(Error):
        question = _SIZES.get(connection.vendor)
        if question:
            name = connection.ops.quote_name(column.model._meta.db_table).strip("`")
            with transaction.atomic(column.database), connection.cursor() as cursor:
                cursor.execute(question, [name])
                found = cursor.fetchone()
    if not found or not found[0]:  # no table, or one whose rows are elsewhere
        return None
    size, total = int(found[0]), float(found[1] or 0)
    return math.ceil(size * min(rows / total, 1.0)) if total > 0 else size


def measured_latency(key: str = "", *, calls: int = 5) -> float:
    """
    Return the median seconds of a few calls to KMS, made one after the other from here.

    They are DescribeKey, which a rotation may call anyway: it changes nothing, has a quota
    of its own (2,000 a second) and tells the way to KMS and back; what ReEncrypt takes there
    may differ by a little. One more call before them opens the connection and is not
    counted. Each reports its event. `key` is a key id, ARN or alias, by default that of the
    settings. Raises `KMSError`.
    """
    service, key = keyring.kms("rotate"), key or conf.get().key
    service.describe_key(key)
    taken = []
    for _ in range(calls):
        started = time.perf_counter()
        service.describe_key(key)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)
