"""
CloudTrail's LookupEvents: the calls of the last 90 days, fifty at a time.

The client is made by `kms_hasher.providers.aws`. AWS allows two requests a second for each
account and Region, which all who look share.
See https://docs.aws.amazon.com/awscloudtrail/latest/APIReference/API_LookupEvents.html.
"""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Iterator
from typing import Any

from kms_hasher.exceptions import KMSBadResponse
from kms_hasher.providers.aws_errors import translate

OPERATION = "LookupEvents"

SOURCE = "kms.amazonaws.com"

#: Seconds from one request to the next: a little under what AWS allows.
PAUSE = 0.55

#: Characters of a record that is believed: CloudTrail cuts what it records to 256 KB.
MAX_RECORD = 2**20


def lookup(client: Any, start: datetime.datetime, end: datetime.datetime) -> Iterator[object]:
    """
    Yield the records of KMS from `start` to `end`, both aware, the last ones first.

    One that cannot be read is yielded as None. Raises `KMSError` if CloudTrail cannot answer
    or denies it.
    """
    asked: dict[str, Any] = {
        "LookupAttributes": [{"AttributeKey": "EventSource", "AttributeValue": SOURCE}],
        "StartTime": start,
        "EndTime": end,
        "MaxResults": 50,
    }
    while True:
        began = time.monotonic()
        answer = _ask(client, asked)
        events = answer.get("Events")
        for event in events if isinstance(events, list) else []:
            yield _record(event)
        token = answer.get("NextToken")
        if not token:
            return
        if token == asked.get("NextToken"):
            raise KMSBadResponse("the pages do not end", operation=OPERATION)
        asked["NextToken"] = token
        time.sleep(max(0.0, PAUSE - (time.monotonic() - began)))


def _ask(client: Any, asked: dict[str, Any]) -> dict[str, Any]:
    try:
        answer: dict[str, Any] = client.lookup_events(**asked)
    except Exception as error:  # noqa: BLE001  # whatever botocore comes upon
        failure = translate(error, operation=OPERATION, key="")
    else:
        return answer
    raise failure


def _record(event: object) -> object:
    text = event.get("CloudTrailEvent") if isinstance(event, dict) else None
    if not isinstance(text, str) or len(text) > MAX_RECORD:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
