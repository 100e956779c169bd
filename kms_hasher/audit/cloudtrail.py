"""
CloudTrail's records of KMS, read one by one and with suspicion, as `Call`s.

What is in a file was written by CloudTrail if all is well, and by anybody if not.
See https://docs.aws.amazon.com/awscloudtrail/latest/userguide/cloudtrail-event-reference.html.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kms_hasher import encoding
from kms_hasher.audit.trail_file import records
from kms_hasher.exceptions import MalformedHash, TrailError
from kms_hasher.fields import YEARS, printable

#: What is kept of any one text.
MAX_TEXT = 320

#: What lies beside the records in the bucket: hashes of files, and insights.
OTHERS = ("CloudTrail-Digest", "CloudTrail-Insight")

SOURCE = "kms.amazonaws.com"

BAD_RECORD = "{number} records are not as CloudTrail writes them"


#: Parameters of a request that name a key or an alias.
_KEYS = ("sourceKeyId", "keyId", "destinationKeyId", "targetKeyId", "aliasName")


class Context(NamedTuple):
    """What an encryption context says of whose it is, "" where it does not."""

    application: str = ""
    deployment: str = ""
    use: str = ""
    sub: str = ""


class Call(NamedTuple):
    """
    One call to KMS, as CloudTrail has it.

    `event_id` is the same for the records of one call in two accounts. `keys` are the key
    ARNs, a ReEncrypt's source first; an alias's ARN where the record names none, and after them
    where the alias is made, moved or deleted: the key may be a stranger's. `contexts`
    are the encryption contexts, a ReEncrypt's source first. `by_aws` marks what AWS did of
    itself.
    """

    time: datetime.datetime
    operation: str
    event_id: str
    request_id: str = ""
    keys: tuple[str, ...] = ()
    contexts: tuple[Context, ...] = ()
    error_code: str = ""
    caller: str = ""
    account: str = ""
    source_ip: str = ""
    user_agent: str = ""
    region: str = ""
    by_aws: bool = False

    @property
    def sub(self) -> str:
        return next((context.sub for context in self.contexts if context.sub), "")

    @property
    def role(self) -> str:
        """The caller without the name of its session: one role, whatever machine has it."""
        if ":assumed-role/" in self.caller:
            return self.caller.rpartition("/")[0]
        return self.caller

    @property
    def client(self) -> str:
        """The role and the program it calls with."""
        return f"{self.role} {self.user_agent}"


class Read(NamedTuple):
    """One record: when and where, and the call if it is one to KMS."""

    time: datetime.datetime
    region: str
    call: Call | None


# --- files --------------------------------------------------------------------------


def files(paths: Sequence[str | os.PathLike[str]]) -> Iterator[Path]:
    """
    Yield the files that may hold records, folders walked in the order of their names.

    A file that is named is yielded whatever its name. Raises `TrailError` for a path that
    does not exist.
    """
    for named in paths:
        path = Path(named)
        if not path.exists():
            raise TrailError(f"{path}: there is no such file or folder.")
        if path.is_dir():
            yield from _walk(path)
        else:
            yield path


def _walk(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in OTHERS)
        for name in sorted(names):
            path = Path(parent, name)
            if name.endswith((".json", ".json.gz")) and path.is_file():
                yield path


def read(path: Path) -> Iterator[Read]:
    """
    Yield the records of one file, compressed or not.

    Raises `TrailError` where the file is at an end before its time, and at its end if records
    in it could not be understood; those before and after them have been yielded.
    """
    bad = 0
    for record in records(path):
        try:
            yield read_record(record)
        except ValueError:
            bad += 1
    if bad:
        raise TrailError(f"{path}: {BAD_RECORD.format(number=bad)}.")


# --- records ------------------------------------------------------------------------


def read_record(record: object) -> Read:
    """Return what a record says. Raises `ValueError` if it is not as CloudTrail writes it."""
    if not isinstance(record, dict):
        raise ValueError("a record is an object")  # noqa: TRY004
    time, region = _time(record.get("eventTime")), _text(record.get("awsRegion"))
    if record.get("eventSource") != SOURCE:
        return Read(time, region, None)
    event_id, operation = _text(record.get("eventID")), _text(record.get("eventName"))
    if not event_id or not operation:
        raise ValueError("a record has an eventID and an eventName")
    identity = _inner(record, "userIdentity")
    asked = _inner(record, "requestParameters")
    call = Call(
        time=time,
        operation=operation,
        event_id=_text(record.get("sharedEventID")) or event_id,
        request_id=_text(record.get("requestID")),
        keys=_keys(record, asked, region, operation.endswith("Alias")),
        contexts=_contexts(asked),
        error_code=_text(record.get("errorCode")),
        caller=_text(identity.get("arn"))
        or _text(identity.get("invokedBy"))
        or _text(identity.get("principalId")),
        account=_text(identity.get("accountId")),
        source_ip=_text(record.get("sourceIPAddress")),
        user_agent=_text(record.get("userAgent")),
        region=region,
        by_aws=record.get("eventType") == "AwsServiceEvent",
    )
    return Read(time, region, call)


def _keys(
    record: Mapping[str, Any], asked: Mapping[str, Any], region: str, of_alias: bool
) -> tuple[str, ...]:
    resources = record.get("resources")
    listed = [
        _text(each.get("ARN"))
        for each in (resources if isinstance(resources, list) else [])
        if isinstance(each, dict)
    ]
    needed = (":key/", ":alias/") if of_alias else (":key/",)
    if not all(any(part in name for name in listed) for part in needed):
        account = _text(record.get("recipientAccountId"))
        listed += [_arn(_text(asked.get(name)), region, account) for name in _KEYS]
    # In their order, each once; aliases only where no key is told, or they are changed.
    known = dict.fromkeys(name for name in listed if _is_arn(name))
    keys = tuple(name for name in known if ":key/" in name)
    if of_alias:
        return keys + tuple(name for name in known if ":key/" not in name)
    return keys or tuple(known)


def _arn(name: str, region: str, account: str) -> str:
    """Return the ARN of a key or alias as the call named it."""
    if not name or name.startswith("arn:"):
        return name
    resource = name if name.startswith("alias/") else f"key/{name}"
    return f"arn:{_partition(region)}:kms:{region}:{account}:{resource}"


def _partition(region: str) -> str:
    starts = {"cn-": "aws-cn", "us-gov-": "aws-us-gov"}
    return next((name for start, name in starts.items() if region.startswith(start)), "aws")


def _is_arn(name: str) -> bool:
    try:
        encoding.ARN.parse(name)
    except MalformedHash:
        return False
    return True


def _contexts(asked: Mapping[str, Any]) -> tuple[Context, ...]:
    names = ("sourceEncryptionContext", "encryptionContext", "destinationEncryptionContext")
    return tuple(
        Context(*(_text(found.get(name)) for name in Context._fields))
        for found in map(asked.get, names)
        if isinstance(found, dict) and found
    )


def _inner(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = record.get(name)
    return found if isinstance(found, dict) else {}


def _time(value: object) -> datetime.datetime:
    if not isinstance(value, str) or not value.endswith("Z"):
        raise ValueError("eventTime is no time in UTC")
    time = datetime.datetime.fromisoformat(f"{value[:-1]}+00:00")
    if time.year not in YEARS:
        raise ValueError("eventTime is no time of CloudTrail's")
    return time


def _text(value: object) -> str:
    """Return a text that may be stored and shown: no control character, no half of a pair."""
    if not isinstance(value, str):
        return ""
    return printable(value[:MAX_TEXT])
