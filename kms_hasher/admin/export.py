"""
Events as files: CSV for spreadsheets, and JSON lines, named as in the log, for a SIEM.

An export holds one page of events in memory, however many there are, and no transaction and
no cursor of the database meanwhile. It begins with the newest event there is and ends with the
oldest: what comes in while it is sent is not in it.
"""

from __future__ import annotations

import csv
import datetime
import io
import json
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from asgiref.sync import sync_to_async
from django.core.handlers.asgi import ASGIRequest
from django.db.models import QuerySet
from django.http import HttpRequest, StreamingHttpResponse
from django.utils import timezone

from kms_hasher.admin.event_list import Position
from kms_hasher.models import AuditEvent, Key

#: Events read at a time.
PAGE = 2_000

#: ARNs of keys that are looked up, the newest keys' first; JSON names others by their ref.
MOST_KEYS = 1_000

FIELDS = (
    "id",
    "time",
    "operation",
    "purpose",
    "outcome",
    "error_code",
    "key_ref",
    "requested_key",
    "latency_us",
    "request_ids",
    "sub",
)

#: How a cell begins that a spreadsheet may take for a formula, after OWASP's "CSV Injection".
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")

_Row = Sequence[Any]


def pages(events: QuerySet[AuditEvent]) -> Iterator[list[_Row]]:
    """Yield the values of `FIELDS` of all the events, the newest first, page by page."""
    rows = events.order_by("-time", "-pk").values_list(*FIELDS)
    page: list[_Row] = list(rows[:PAGE])
    while page:
        yield page
        if len(page) < PAGE:
            return
        last = Position(page[-1][1], page[-1][0])
        page = list(rows.filter(last.beyond("lt"))[:PAGE])


def as_csv(events: QuerySet[AuditEvent]) -> Iterator[str]:
    """Yield CSV with a line of names; no cell of it is a formula to any spreadsheet."""
    yield _lines([FIELDS])
    for page in pages(events):
        yield _lines(map(_cells, page))


def _cells(row: _Row) -> list[str]:
    pk, time, *rest = row
    return [str(pk), _iso(time), *(harmless(str(value)) for value in rest)]


def harmless(text: str) -> str:
    """Return what a spreadsheet shows as this text, instead of computing it."""
    return f"'{text}" if text.startswith(FORMULA) else text


def _lines(rows: Iterable[Iterable[str]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, quoting=csv.QUOTE_ALL).writerows(rows)
    return buffer.getvalue()


def as_json(events: QuerySet[AuditEvent]) -> Iterator[str]:
    """Yield one JSON object a line, without what is empty; `key` is an ARN, as in the log."""
    keys = Key.objects.order_by("-last_seen").values_list("ref", "arn")
    arns = dict(keys[:MOST_KEYS])
    for page in pages(events):
        yield "".join(_json(row, arns) for row in page)


def _json(row: _Row, arns: dict[str, str]) -> str:
    values = dict(zip(FIELDS, row, strict=True))
    values["time"] = _iso(values["time"])
    values["key"] = arns.get(values["key_ref"], "")
    values["request_ids"] = values["request_ids"].split()
    told = {name: value for name, value in values.items() if value not in ("", [])}
    return json.dumps(told, separators=(",", ":")) + "\n"


def _iso(time: datetime.datetime) -> str:
    if timezone.is_aware(time):
        time = time.astimezone(datetime.timezone.utc)
    return time.isoformat(timespec="microseconds")


class Format(NamedTuple):
    write: Callable[[QuerySet[AuditEvent]], Iterator[str]]
    content_type: str


FORMATS = {
    "csv": Format(as_csv, "text/csv; charset=utf-8"),
    "jsonl": Format(as_json, "application/x-ndjson"),
}


def response(
    request: HttpRequest, events: QuerySet[AuditEvent], name: str
) -> StreamingHttpResponse:
    """Return the events as a file in one of `FORMATS`, page by page under ASGI too."""
    parts = FORMATS[name].write(events)
    # Django would gather all parts of a plain iterator before it sends any under ASGI.
    content: Any = _apart(parts) if isinstance(request, ASGIRequest) else parts
    answer = StreamingHttpResponse(content, content_type=FORMATS[name].content_type)
    at = timezone.now().strftime("%Y%m%d-%H%M%S")
    answer["Content-Disposition"] = f'attachment; filename="kms-events-{at}.{name}"'
    return answer


async def _apart(parts: Iterator[str]) -> AsyncIterator[str]:
    def following() -> str:
        return next(parts, "")

    while part := await sync_to_async(following)():
        yield part
