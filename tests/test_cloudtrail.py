"""CloudTrail's files: read whatever their size, and refused with one line if damaged."""

from __future__ import annotations

import datetime
import gzip
import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3
import pytest

from kms_hasher.audit import cloudtrail, trail_file
from kms_hasher.exceptions import KMSBadResponse, KMSCredentialsError, KMSThrottled, TrailError
from kms_hasher.providers import aws_trail
from kms_hasher.providers.aws import AWSProvider
from tests.trail import ACCOUNT, ARN, ARN_2, REGION, SITE, re_encryption, record, write

START = datetime.datetime(2026, 11, 21, 12, tzinfo=datetime.timezone.utc)
SUB = "ab" * 16


def call_of(record: object) -> cloudtrail.Call:
    call = cloudtrail.read_record(record).call
    assert call
    return call


# --- records ------------------------------------------------------------------------


def test_a_record_of_a_decrypt() -> None:
    found = record(START, sub=SUB, request_id="r-1")
    call = call_of(found)
    assert call == cloudtrail.Call(
        time=START,
        operation="Decrypt",
        event_id=found["eventID"],
        request_id="r-1",
        keys=(ARN,),
        contexts=(cloudtrail.Context("kms_hasher", "", "password", SUB),),
        caller=SITE,
        account=ACCOUNT,
        source_ip="192.0.2.10",
        user_agent="kms_hasher/0.1.0",
        region=REGION,
    )
    assert call.sub == SUB
    assert call.role == f"arn:aws:sts::{ACCOUNT}:assumed-role/site"


def test_a_re_encryption_is_one_call_with_both_keys_and_contexts() -> None:
    call = call_of(re_encryption(START, SUB))
    assert call.keys == (ARN, ARN_2)
    assert (len(call.contexts), call.sub) == (2, SUB)


def test_both_accounts_records_of_one_call_are_one() -> None:
    ids = {call_of(record(START, sharedEventID="shared")).event_id for _ in range(2)}
    assert ids == {"shared"}


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({"resources": None}, (ARN,)),
        ({"resources": [], "requestParameters": {"keyId": ARN.rpartition("/")[2]}}, (ARN,)),
        (
            {"resources": None, "requestParameters": {"keyId": "alias/tests"}},
            (f"arn:aws:kms:{REGION}:{ACCOUNT}:alias/tests",),
        ),
        ({"resources": None, "requestParameters": None}, ()),
        ({"resources": [None, 1, {"ARN": 5}], "requestParameters": "x"}, ()),
        ({"resources": [{"ARN": "nonsense"}], "requestParameters": []}, ()),
    ],
)
def test_keys_as_records_name_them(changes: Any, keys: tuple[str, ...]) -> None:
    assert call_of(record(START, **changes)).keys == keys


ALIAS = f"arn:aws:kms:{REGION}:{ACCOUNT}:alias/tests"


@pytest.mark.parametrize("operation", ["CreateAlias", "UpdateAlias", "DeleteAlias"])
@pytest.mark.parametrize("of_key", [True, False])
def test_a_change_of_an_alias_is_about_both(operation: str, of_key: bool) -> None:
    resources = [{"ARN": ALIAS}, {"ARN": ARN_2}]
    changes = {
        "resources": resources if of_key else resources[1:],
        "requestParameters": {"aliasName": "alias/tests", "targetKeyId": ARN_2},
    }
    assert call_of(record(START, operation, **changes)).keys == (ARN_2, ALIAS)


def test_an_aws_service_has_no_arn() -> None:
    call = call_of(record(START, userIdentity={"type": "AWSService", "invokedBy": "x.aws"}))
    assert (call.caller, call.role) == ("x.aws", "x.aws")


def test_records_of_other_services_tell_the_time_only() -> None:
    read = cloudtrail.read_record({**record(START), "eventSource": "s3.amazonaws.com"})
    assert read == cloudtrail.Read(START, REGION, None)


@pytest.mark.parametrize(
    "changes",
    [
        {"eventTime": None},
        {"eventTime": 1},
        {"eventTime": "yesterdayZ"},
        {"eventTime": "2026-11-21T12:00:00"},
        {"eventID": None},
        {"eventID": {"a": 1}},
        {"eventName": ["Decrypt"]},
    ],
)
def test_a_record_that_cloudtrail_would_not_write(changes: Any) -> None:
    with pytest.raises(ValueError):
        cloudtrail.read_record(record(START, **changes))


@pytest.mark.parametrize("junk", [None, 1, "Decrypt", [], [[]], True])
def test_a_record_that_is_no_object(junk: object) -> None:
    with pytest.raises(ValueError):
        cloudtrail.read_record(junk)


def test_no_text_can_break_a_terminal_or_a_database() -> None:
    call = call_of(record(START, userAgent="a\x1b[31m\x00\ud800\n" + "b" * 9999))
    assert call.user_agent == "a?[31m???" + "b" * (cloudtrail.MAX_TEXT - 9)


# --- files --------------------------------------------------------------------------


def test_a_folder_as_s3_lays_it_out(tmp_path: Path) -> None:
    first = write(tmp_path, START, [record(START)])
    second = write(tmp_path, START + datetime.timedelta(days=1), [], packed=False)
    for name in cloudtrail.OTHERS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.json.gz").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("not a log")
    assert list(cloudtrail.files([tmp_path])) == [first, second]
    assert list(cloudtrail.files([second, first])) == [second, first]
    assert [len(list(cloudtrail.read(path))) for path in (first, second)] == [1, 0]


def test_a_path_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(TrailError, match="no such file"):
        list(cloudtrail.files([tmp_path / "nowhere"]))


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.json")
    assert list(cloudtrail.files([tmp_path])) == []
    with pytest.raises(TrailError, match="regular"):
        list(cloudtrail.read(tmp_path / "a.json"))


@pytest.mark.parametrize("chunk", [1, 2, 7, 64])
def test_records_that_are_cut_by_a_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(trail_file, "CHUNK", chunk)
    there = [{"a": 'ü\\"}{][', "n": 12345}, {}, [], 12, "text", None, -1.5e3]
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"x": 12, "Records": there, "y": {"z": []}}, indent=3))
    assert list(trail_file.records(path)) == there


GOOD = json.dumps(record(START)).encode()
DAMAGED: dict[str, bytes] = {
    "empty": b"",
    "spaces": b" " * 100,
    "no JSON": b"<html>not found</html>",
    "a list": b"[]",
    "no records": b'{"awsAccountId": "1"}',
    "records that are no list": b'{"Records": {}}',
    "cut after a record": b'{"Records": [' + GOOD + b",",
    "cut in a record": b'{"Records": [' + GOOD + b", " + GOOD[:100],
    "cut in the brackets": b'{"Records": [' + GOOD + b"]",
    "no comma": b'{"Records": [' + GOOD + GOOD + b"]}",
    "two values": b'{"Records": []}{"Records": []}',
    "nested": b'{"Records": [' + b"[" * 200_000,
    "nested and closed": b'{"Records": [' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"]}",
    "not UTF-8": b'{"Records": ["\xff"]}',
    "UTF-16": '{"Records": []}'.encode("utf-16"),
    "NaN": b'{"Records": [NaN]}',
    "a number too long": b'{"Records": [' + b"1" * 10_000 + b"]}",
    "packed, cut": gzip.compress(b'{"Records": [' + GOOD * 99)[:-20],
    "packed, spoilt": gzip.compress(os.urandom(5000))[:30] + b"\0" * 3000,
    "only the mark of gzip": b"\x1f\x8b",
    "packed twice": gzip.compress(gzip.compress(b'{"Records": []}')),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_file_is_one_error_that_names_it(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.json.gz"
    path.write_bytes(content)
    with pytest.raises(TrailError) as error:
        list(cloudtrail.read(path))
    assert str(error.value).startswith(f"{path}: ")
    assert len(str(error.value).splitlines()) == 1


def test_what_comes_before_the_damage_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(DAMAGED["cut in a record"])
    read = []
    with pytest.raises(TrailError):
        for each in cloudtrail.read(path):
            read.append(each)
    assert len(read) == 1


def test_records_that_are_none_are_counted_and_the_others_read(tmp_path: Path) -> None:
    path = write(tmp_path, START, [1, record(START), {"eventTime": []}, record(START)])
    read = []
    with pytest.raises(TrailError, match="2 records"):
        for each in cloudtrail.read(path):
            read.append(each)
    assert len(read) == 2


def bombs() -> dict[str, Callable[[], bytes]]:
    size = 64 * 2**20
    return {
        "spaces": lambda: gzip.compress(b" " * size, 1),
        "one text": lambda: gzip.compress(b'{"Records": ["' + b"a" * size, 1),
        "one name": lambda: gzip.compress(b'{"' + b"a" * size, 1),
        "zeros": lambda: gzip.compress(b"\0" * size, 1),
        "one list": lambda: gzip.compress(b'{"Records": [[' + b"1," * (size // 2), 1),
    }


@pytest.mark.parametrize("make", bombs().values(), ids=bombs().keys())
def test_a_bomb_does_not_fill_the_memory(tmp_path: Path, make: Callable[[], bytes]) -> None:
    path = tmp_path / "bomb.json.gz"
    path.write_bytes(make())
    tracemalloc.start()
    try:
        with pytest.raises(TrailError):
            list(cloudtrail.read(path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 32 * 2**20


def test_a_large_file_takes_no_more_memory_than_a_small_one(tmp_path: Path) -> None:
    peaks = []
    for number in (300, 6000):
        path = write(tmp_path, START, (record(START, sub=SUB) for _ in range(number)))
        tracemalloc.start()
        assert sum(1 for _ in cloudtrail.read(path)) == number
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] + 2**18


# --- LookupEvents -------------------------------------------------------------------


class Client:
    def __init__(self, *answers: Any) -> None:
        self.answers, self.asked = list(answers), []

    def lookup_events(self, **asked: Any) -> Any:
        self.asked.append(dict(asked))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def page(*records: object, token: str = "") -> dict[str, Any]:
    events = [{"CloudTrailEvent": json.dumps(each)} for each in records]
    return {"Events": events, **({"NextToken": token} if token else {})}


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    slept: list[float] = []
    monkeypatch.setattr(aws_trail.time, "sleep", slept.append)
    return slept


def test_all_pages_are_asked_for_slowly(pauses: list[float]) -> None:
    client = Client(page(1, 2, token="t"), page(token="u"), page(3))
    end = START + datetime.timedelta(hours=1)
    assert list(aws_trail.lookup(client, START, end)) == [1, 2, 3]
    assert [asked.get("NextToken") for asked in client.asked] == [None, "t", "u"]
    assert client.asked[0]["StartTime"] == START and client.asked[0]["MaxResults"] == 50
    assert len(pauses) == 2 and all(0.4 < each <= aws_trail.PAUSE for each in pauses)


def test_a_look_up_that_repeats_itself_ends(pauses: list[float]) -> None:
    client = Client(page(token="t"), page(token="t"))
    with pytest.raises(KMSBadResponse):
        list(aws_trail.lookup(client, START, START))


@pytest.mark.parametrize("text", ["{", "[" * 100_000, None, 5, "a" * 2**21])
def test_a_record_that_cannot_be_read_is_none(text: object) -> None:
    client = Client({"Events": [{"CloudTrailEvent": text}, None]})
    assert list(aws_trail.lookup(client, START, START)) == [None, None]


def test_errors_of_the_look_up_are_ours(pauses: list[float]) -> None:
    from botocore.exceptions import ClientError

    for code, kind in (
        ("ThrottlingException", KMSThrottled),
        ("AccessDeniedException", KMSCredentialsError),
    ):
        error = ClientError({"Error": {"Code": code, "Message": "no"}}, "LookupEvents")
        with pytest.raises(kind, match="LookupEvents"):
            list(aws_trail.lookup(Client(error), START, START))


def test_the_aws_provider_asks_cloudtrail_with_its_own_credentials(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_ACCESS_KEY_ID": "AKIAEXAMPLE",
        "AWS_SECRET_ACCESS_KEY": "secret",
    }.items():
        monkeypatch.setenv(name, value)
    made = []
    real = boto3.Session.client

    def client(self: Any, service: str, **options: Any) -> Any:
        if service != "cloudtrail":
            return real(self, service, **options)
        made.append((self.get_credentials().access_key, options["region_name"]))
        return Client(page(record(START)))

    monkeypatch.setattr(boto3.Session, "client", client)
    provider = AWSProvider()
    try:
        (found,) = provider.lookup_events("eu-central-1", START, START)
    finally:
        provider.close()
    assert call_of(found).operation == "Decrypt"
    assert made == [("AKIAEXAMPLE", "eu-central-1")]


def test_a_look_up_without_credentials_is_our_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(KMSCredentialsError):
        AWSProvider().lookup_events("eu-central-1", START, START)
