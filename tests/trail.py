"""CloudTrail as S3 lays it out: records of calls to KMS, and files of them."""

from __future__ import annotations

import datetime
import gzip
import json
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

REGION, ACCOUNT = "eu-central-1", "111122223333"
ARN = f"arn:aws:kms:{REGION}:{ACCOUNT}:key/1234abcd-12ab-34cd-56ef-1234567890ab"
ARN_2 = f"arn:aws:kms:{REGION}:{ACCOUNT}:key/2234abcd-12ab-34cd-56ef-1234567890ab"
SITE = f"arn:aws:sts::{ACCOUNT}:assumed-role/site/i-0123456789abcdef0"
THIEF = f"arn:aws:sts::{ACCOUNT}:assumed-role/thief/laptop"
UTC = datetime.timezone.utc


def record(
    time: datetime.datetime,
    operation: str = "Decrypt",
    *,
    sub: str = "",
    request_id: str = "",
    key: str = ARN,
    caller: str = SITE,
    context: dict[str, str] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Return the record of a call, as AWS documents it."""
    asked: dict[str, Any] = {"encryptionAlgorithm": "SYMMETRIC_DEFAULT", "keyId": key}
    if context is None and sub:
        context = {"application": "kms_hasher", "use": "password", "sub": sub}
    if context:
        asked["encryptionContext"] = context
    return {
        "eventVersion": "1.11",
        "userIdentity": {
            "type": "AssumedRole",
            "principalId": "AROAEXAMPLE:i-0123456789abcdef0",
            "arn": caller,
            "accountId": ACCOUNT,
            "accessKeyId": "ASIAEXAMPLE",
        },
        "eventTime": time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "eventSource": "kms.amazonaws.com",
        "eventName": operation,
        "awsRegion": REGION,
        "sourceIPAddress": "192.0.2.10" if caller == SITE else "203.0.113.66",
        "userAgent": "kms_hasher/0.1.0" if caller == SITE else "aws-cli/2.0",
        "requestParameters": asked,
        "responseElements": None,
        "additionalEventData": {"keyMaterialId": "0" * 64},
        "requestID": request_id or str(uuid.uuid4()),
        "eventID": str(uuid.uuid4()),
        "readOnly": True,
        "resources": [{"accountId": ACCOUNT, "type": "AWS::KMS::Key", "ARN": key}],
        "eventType": "AwsApiCall",
        "managementEvent": True,
        "recipientAccountId": ACCOUNT,
        "eventCategory": "Management",
        "tlsDetails": {"tlsVersion": "TLSv1.3"},
        **changes,
    }


def re_encryption(time: datetime.datetime, sub: str, **changes: Any) -> dict[str, Any]:
    """Return the record of a ReEncrypt from `ARN` to `ARN_2`."""
    context = {"application": "kms_hasher", "use": "password", "sub": sub}
    return record(
        time,
        "ReEncrypt",
        **{
            "requestParameters": {
                "sourceEncryptionAlgorithm": "SYMMETRIC_DEFAULT",
                "sourceEncryptionContext": context,
                "destinationKeyId": "alias/tests",
                "destinationEncryptionContext": context,
            },
            "resources": [
                {"accountId": ACCOUNT, "type": "AWS::KMS::Key", "ARN": key}
                for key in (ARN, ARN_2)
            ],
            **changes,
        },
    )


def write(
    folder: Path, time: datetime.datetime, records: Iterable[Any], *, packed: bool = True
) -> Path:
    """Write a file of records where S3 would have it for that time."""
    day = folder / f"AWSLogs/{ACCOUNT}/CloudTrail/{REGION}/{time:%Y/%m/%d}"
    day.mkdir(parents=True, exist_ok=True)
    name = f"{ACCOUNT}_CloudTrail_{REGION}_{time:%Y%m%dT%H%MZ}_{uuid.uuid4().hex[:16]}.json"
    text = json.dumps({"Records": list(records)}, separators=(",", ":")).encode()
    path = day / (f"{name}.gz" if packed else name)
    path.write_bytes(gzip.compress(text, 1) if packed else text)
    return path
