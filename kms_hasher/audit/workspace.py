"""
The calls of one comparison, on disk: a temporary SQLite database.

A join needs both sides at hand, and CloudTrail's is as large as the folder of its files. A
temporary file of our own keeps memory flat on every database, asks nothing of the site's own
(no rights to make tables, no load, no rows left by a run that was killed), and is gone with the
process. What is in it stands in CloudTrail: nothing in it is secret.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from kms_hasher.audit.cloudtrail import Call, Context

T = TypeVar("T")

#: Rows handed over at a time. SQLite takes at least 999 parameters a statement.
PAGE = 500

_SCHEMA = """
CREATE TABLE call (
    id INTEGER PRIMARY KEY, event_id TEXT UNIQUE, request_id TEXT, time INTEGER, client TEXT,
    data TEXT, matched INTEGER DEFAULT 0
);
CREATE INDEX call_request ON call (request_id);
CREATE INDEX call_time ON call (time);
CREATE INDEX call_open ON call (time, id) WHERE matched = 0;
CREATE TABLE file (path TEXT, size INTEGER, modified INTEGER, last INTEGER, regions TEXT);
CREATE TABLE taken (event INTEGER PRIMARY KEY, number INTEGER);
"""

#: How a call was matched.
BY_ID, BY_THE_REST = 1, 2


class File(NamedTuple):
    """A file that was read to its end: the time of its last record, and the Regions in it."""

    path: str
    size: int
    modified: int
    last: int
    regions: tuple[str, ...]


class Workspace:
    """Calls read from CloudTrail, each once, which of them were matched, and the files."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._db = connection

    def add(self, calls: Sequence[Call]) -> int:
        """Add calls; return how many of them were there already, by `event_id`."""
        before = self._db.total_changes
        self._db.executemany(
            "INSERT OR IGNORE INTO call (event_id, request_id, time, client, data) "
            "VALUES (?, ?, ?, ?, ?)",
            [
                (call.event_id, call.request_id, seconds(call.time), call.client, _dump(call))
                for call in calls
            ],
        )
        return len(calls) - (self._db.total_changes - before)

    def add_file(self, file: File) -> None:
        row = (*file[:4], " ".join(file.regions))
        self._db.execute("INSERT INTO file VALUES (?, ?, ?, ?, ?)", row)

    def files(self) -> Iterator[list[File]]:
        """Yield the files that were added, in pages."""
        rows = self._db.execute("SELECT * FROM file")
        while page := rows.fetchmany(PAGE):
            yield [
                File(path, size, modified, last, tuple(regions.split()))
                for path, size, modified, last, regions in page
            ]

    def __len__(self) -> int:
        return int(self._one("SELECT count(*) FROM call"))

    def matched(self, how: int) -> int:
        """Return how many calls were matched in that way."""
        return int(self._one("SELECT count(*) FROM call WHERE matched = ?", how))

    def match(self, request_ids: Sequence[str]) -> set[str]:
        """Mark the calls with these request ids as matched; return the ids that there are."""
        found: set[str] = set()
        for page in pages(request_ids):
            marks = ",".join("?" * len(page))
            where = f"FROM call WHERE request_id IN ({marks})"
            present = [id_ for (id_,) in self._db.execute(f"SELECT request_id {where}", page)]
            if present:
                marks = ",".join("?" * len(present))
                self._db.execute(
                    f"UPDATE call SET matched = {BY_ID} WHERE request_id IN ({marks})",  # noqa: S608
                    present,
                )
                found.update(present)
        return found

    def match_one(self, event_id: str) -> None:
        """Mark a call as matched by the rest."""
        self._db.execute(
            "UPDATE call SET matched = ? WHERE event_id = ?", (BY_THE_REST, event_id)
        )

    def take(self, event: int, capacity: int) -> bool:
        """Let an event answer for one call more; return whether it may, of so many in all."""
        if capacity <= int(self._one("SELECT number FROM taken WHERE event = ?", event) or 0):
            return False
        self._db.execute(
            "INSERT INTO taken VALUES (?, 1) "
            "ON CONFLICT (event) DO UPDATE SET number = number + 1",
            (event,),
        )
        return True

    def clients(self) -> set[str]:
        """Return the clients whose calls were matched by their ids, `PAGE` of them at most."""
        query = "SELECT DISTINCT client FROM call WHERE matched = ? LIMIT ?"
        return {client for (client,) in self._db.execute(query, (BY_ID, PAGE))}

    def spans(self, margin: int) -> Iterator[tuple[int, int]]:
        """Yield the spans of time, in seconds, that calls fall into, with a margin around."""
        hours = self._db.execute("SELECT DISTINCT time / 3600 FROM call ORDER BY 1").fetchall()
        yield from merged(
            (hour * 3600 - margin, (hour + 1) * 3600 + margin) for (hour,) in hours
        )

    def unmatched(self) -> Iterator[list[Call]]:
        """Yield the calls that were not matched, by time, in pages."""
        last = (-(2**62), 0)
        while True:
            rows = self._db.execute(
                "SELECT time, id, data FROM call WHERE matched = 0 AND (time, id) > (?, ?) "
                "ORDER BY time, id LIMIT ?",
                (*last, PAGE),
            ).fetchall()
            if not rows:
                return
            last = rows[-1][:2]
            yield [_load(data) for _, _, data in rows]

    def matched_events(self) -> Iterator[list[str]]:
        """Yield the `event_id`s of calls that were matched, in pages."""
        last = 0
        while True:
            rows = self._db.execute(
                "SELECT id, event_id FROM call WHERE matched > 0 AND id > ? "
                "ORDER BY id LIMIT ?",
                (last, PAGE),
            ).fetchall()
            if not rows:
                return
            last = rows[-1][0]
            yield [event_id for _, event_id in rows]

    def _one(self, query: str, *parameters: object) -> Any:
        row = self._db.execute(query, parameters).fetchone()
        return row[0] if row else None


@contextlib.contextmanager
def opened() -> Iterator[Workspace]:
    """Give an empty workspace, and remove it afterwards."""
    with tempfile.TemporaryDirectory(prefix="kms-hasher-") as folder:
        connection = sqlite3.connect(Path(folder, "calls.sqlite3"), isolation_level=None)
        try:
            # Nobody reads it after a crash.
            connection.execute("PRAGMA journal_mode = OFF")
            connection.execute("PRAGMA synchronous = OFF")
            connection.executescript(_SCHEMA)
            connection.execute("BEGIN")
            yield Workspace(connection)
        finally:
            connection.close()


def pages(items: Iterable[T], size: int = PAGE) -> Iterator[list[T]]:
    """Yield the items in lists of so many."""
    page: list[T] = []
    for item in items:
        page.append(item)
        if len(page) == size:
            yield page
            page = []
    if page:
        yield page


def merged(spans: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield spans that do not overlap, for sorted ones that may."""
    present: tuple[int, int] | None = None
    for start, end in spans:
        if present and start <= present[1]:
            present = (present[0], max(present[1], end))
        else:
            if present:
                yield present
            present = (start, end)
    if present:
        yield present


def seconds(time: datetime.datetime) -> int:
    return int(time.timestamp())


def _dump(call: Call) -> str:
    return json.dumps([*call._replace(time=seconds(call.time))], separators=(",", ":"))  # type: ignore[arg-type]


def _load(data: str) -> Call:
    time, operation, event_id, request_id, keys, contexts, *rest = json.loads(data)
    return Call(
        datetime.datetime.fromtimestamp(time, datetime.timezone.utc),
        operation,
        event_id,
        request_id,
        tuple(keys),
        tuple(Context(*each) for each in contexts),
        *rest,
    )
