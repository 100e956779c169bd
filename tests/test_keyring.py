"""Which key, which context, one event for each call; and nothing secret in any error."""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth.hashers import check_password, make_password
from django.test import RequestFactory, override_settings
from django.views.debug import ExceptionReporter

from kms_hasher import encoding, exceptions, keyring
from kms_hasher.encoding import Argon2Parameters, Header
from kms_hasher.exceptions import KMSBadResponse
from kms_hasher.providers.base import DataKey, Encrypted, Provider
from kms_hasher.signals import Event, kms_event

HEADER = Header("kms_argon2", Argon2Parameters(8, 1, 1), b"saltsaltsaltsaltsalt00")
DIGEST = bytes(range(32))
KEY_ID = "1234abcd-12ab-34cd-56ef-1234567890ab"
HOME = "arn:aws:kms:eu-west-1:111122223333"


@pytest.fixture(autouse=True)
def no_audit(settings: Any) -> None:
    settings.KMS_HASHER = {**settings.KMS_HASHER, "AUDIT": "off"}


def test_a_replica_is_asked_while_home_is_out(settings: Any) -> None:
    key, asked = f"{HOME}:key/mrk-{KEY_ID.replace('-', '')}", list[str]()
    regions = ["eu-central-1", "us-east-1"]
    settings.KMS_HASHER = {"KEY": key, "FALLBACK_REGIONS": regions}
    access = keyring.access(HEADER, "login")

    def call(key: str) -> str:
        asked.append(key.split(":")[3])
        if asked[-1] in out:
            raise exceptions.KMSTimeout
        return asked[-1]

    for out, answer in (
        ([], "eu-west-1"),
        (["eu-west-1"], "eu-central-1"),
        (["eu-west-1", "eu-central-1"], "us-east-1"),
    ):
        asked.clear()
        assert access.anywhere(key, call) == answer
        assert asked == [*out, answer]
    out = ["eu-west-1", *regions]
    with pytest.raises(exceptions.KMSTimeout):
        access.anywhere(key, call)


def test_seal_open_rewrap(kms: Provider, events: list[Event], key_arn: str) -> None:
    stored = keyring.seal(HEADER, DIGEST)
    assert keyring.open(stored) == DIGEST
    other = kms.create_key().key_arn
    rewrapped, answer = keyring.rewrap(stored, other)
    assert rewrapped.header == stored.header
    assert rewrapped.key_id == other.rpartition("/")[2]
    assert (answer.source_key_arn, answer.key_arn) == (key_arn, other)
    assert keyring.open(rewrapped) == DIGEST


def test_context_names_the_header_and_nothing_else(settings: Any) -> None:
    assert keyring.context_of(HEADER) == {
        "application": "kms_hasher",
        "use": "password",
        "sub": HEADER.sub,
    }
    settings.KMS_HASHER = {**settings.KMS_HASHER, "DEPLOYMENT": "blue"}
    assert keyring.context_of(HEADER)["deployment"] == "blue"


def test_only_digests_are_sealed() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        keyring.seal(HEADER, b"short")


def test_unknown_mode_of_a_stored_hash() -> None:
    stored = encoding.SealedHash(HEADER, "x9", encoding.key_ref(KEY_ID), b"blob")
    for call in (keyring.open, lambda stored: keyring.rewrap(stored, KEY_ID)):
        with pytest.raises(exceptions.MalformedHash):
            call(stored)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("key", "arn"),
    [
        ("alias/x", "not an ARN"),
        ("alias/x", f"{HOME}:alias/x"),
        (f"{HOME}:alias/x", f"arn:aws:kms:us-east-1:111122223333:key/{KEY_ID}"),
        (f"{HOME}:alias/x", f"arn:aws:kms:eu-west-1:999999999999:key/{KEY_ID}"),
    ],
)
def test_an_answer_under_which_nothing_could_be_opened_is_not_stored(
    key: str, arn: str, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.KMS_HASHER = {**settings.KMS_HASHER, "KEY": key}
    answer = Encrypted(key_arn=arn, ciphertext=b"blob")
    monkeypatch.setattr(keyring.provider(), "encrypt", lambda *args, **kwargs: answer)
    with pytest.raises(KMSBadResponse):
        keyring.seal(HEADER, DIGEST)


class TestEvents:
    def test_one_for_each_call(self, events: list[Event], key_arn: str) -> None:
        keyring.open(keyring.seal(HEADER, DIGEST))
        encrypt, decrypt = events
        assert (encrypt.operation, encrypt.purpose, encrypt.outcome) == (
            "Encrypt",
            "set",
            "success",
        )
        assert (encrypt.requested_key, encrypt.key) == ("alias/tests", key_arn)
        assert (decrypt.operation, decrypt.purpose) == ("Decrypt", "login")
        assert encrypt.sub == decrypt.sub == HEADER.sub
        assert len(encrypt.request_ids) == len(decrypt.request_ids) == 1
        assert encrypt.request_ids != decrypt.request_ids
        assert 0 < encrypt.latency < 5

    def test_of_a_failure(self, events: list[Event], kms: Provider, key_arn: str) -> None:
        stored = keyring.seal(HEADER, DIGEST)
        kms.disable_key(key_arn)
        with pytest.raises(exceptions.KeyDisabled):
            keyring.open(stored)
        assert (events[-1].outcome, events[-1].error_code) == ("unusable", "DisabledException")
        assert events[-1].request_ids

    def test_a_call_that_names_no_key(self, events: list[Event]) -> None:
        arn = keyring.kms("test").create_key().key_arn
        assert (events[0].operation, events[0].requested_key, events[0].key) == (
            "CreateKey",
            "",
            arn,
        )

    def test_other_errors_of_a_provider_are_ours(
        self, events: list[Event], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*args: Any, **kwargs: Any) -> Any:
            raise KeyError(args[1])

        monkeypatch.setattr(keyring.provider(), "encrypt", fail)
        with pytest.raises(exceptions.KMSError, match="the provider raised KeyError") as caught:
            keyring.seal(HEADER, DIGEST)
        assert caught.value.__suppress_context__
        assert [event.outcome for event in events] == ["error"]


@pytest.mark.parametrize("key", ["arn:", "arn:aws:kms", "arn:aws:kms:eu-west-1", ":", ""])
def test_whatever_is_asked_for_is_a_call(key: str, events: list[Event]) -> None:
    with pytest.raises(exceptions.KMSError):
        keyring.kms("rotate").describe_key(key)
    assert [event.requested_key for event in events] == [key]


class TestReceivers:
    @pytest.fixture
    def receiver(self, request: pytest.FixtureRequest) -> Iterator[None]:
        def listen(**kwargs: Any) -> None:
            raise request.param

        kms_event.connect(listen)
        yield
        kms_event.disconnect(listen)

    @pytest.mark.parametrize("receiver", [RuntimeError("broken")], indirect=True)
    @pytest.mark.usefixtures("receiver")
    def test_a_broken_one_stops_no_login(self) -> None:
        assert keyring.open(keyring.seal(HEADER, DIGEST)) == DIGEST

    @pytest.mark.parametrize("receiver", [exceptions.AuditError("full")], indirect=True)
    @pytest.mark.usefixtures("receiver")
    def test_an_audit_that_must_be_kept_does(self, kms: Provider, key_arn: str) -> None:
        with pytest.raises(exceptions.AuditError):
            keyring.seal(HEADER, DIGEST)
        # Where the call itself has failed, its own error is the one to see.
        kms.disable_key(key_arn)
        with pytest.raises(exceptions.KeyDisabled):
            keyring.seal(HEADER, DIGEST)


def test_threads_share_one_provider(tmp_path: Path, settings: Any) -> None:
    options = {"path": tmp_path / "keys.json", "allow_without_debug": True}
    settings.KMS_HASHER = {"KEY": "alias/x", "PROVIDER": "local", "OPTIONS": options}
    start = threading.Barrier(8)

    def get() -> Provider:
        start.wait()
        return keyring.provider()

    with ThreadPoolExecutor(8) as pool:
        found = {id(future.result()) for future in [pool.submit(get) for _ in range(8)]}
    assert found == {id(keyring.provider())}


@pytest.mark.everywhere
def test_a_forked_process_makes_a_provider_of_its_own() -> None:
    parent = keyring.provider()
    child = os.fork()
    if child == 0:  # pragma: no cover
        ok = keyring.provider() is not parent and keyring.open(keyring.seal(HEADER, DIGEST))
        os._exit(0 if ok else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert keyring.provider() is parent


class TestNothingSecretInErrors:
    """Django's error report shows the locals of every frame of a traceback."""

    PASSWORD = "correct horse battery staple"

    @pytest.fixture
    def errors(self, monkeypatch: pytest.MonkeyPatch) -> list[Exception]:
        encoded = make_password(self.PASSWORD)

        def fail(*args: Any, **kwargs: Any) -> Any:
            raise exceptions.KMSTimeout

        hidden = [
            lambda: make_password(self.PASSWORD),
            lambda: check_password(self.PASSWORD, encoded),
        ]
        caught: list[Exception] = []
        monkeypatch.setattr(keyring.provider(), "encrypt", fail)
        monkeypatch.setattr(keyring.provider(), "decrypt", fail)
        for call in hidden:
            try:
                call()
            except exceptions.KMSError as error:
                caught.append(error)
        assert len(caught) == 2
        return caught

    @override_settings(DEBUG=False)
    def test_frames_of_ours_in_the_error_report(self, errors: list[Exception]) -> None:
        request = RequestFactory().get("/")
        for error in errors:
            reporter = ExceptionReporter(request, type(error), error, error.__traceback__)
            for frame in reporter.get_traceback_data()["frames"]:
                if "kms_hasher/" not in frame["filename"] or "tests/" in frame["filename"]:
                    continue
                assert self.PASSWORD not in str(frame["vars"]), frame["function"]

    def test_the_text_of_the_errors(self, errors: list[Exception]) -> None:
        for error in errors:
            text = "".join(traceback.format_exception(error)) + repr(error)
            assert "saltsalt" not in text


@pytest.mark.django_db
@pytest.mark.parametrize("size", [0, 32, 63, 65])
def test_a_data_key_of_another_size_seals_nothing(
    size: int, settings: Any, monkeypatch: pytest.MonkeyPatch, key_arn: str
) -> None:
    settings.KMS_HASHER = {**settings.KMS_HASHER, "MODE": "envelope"}
    answer = DataKey(key_arn=key_arn, plaintext=bytes(size), ciphertext=b"blob")
    monkeypatch.setattr(keyring.provider(), "generate_data_key", lambda *args, **kwargs: answer)
    with pytest.raises(KMSBadResponse, match="size"):
        keyring.seal(HEADER, DIGEST)


def test_an_answer_without_a_ciphertext_is_not_stored(
    monkeypatch: pytest.MonkeyPatch, key_arn: str, events: list[Event]
) -> None:
    answer = Encrypted(key_arn=key_arn, ciphertext=b"")
    monkeypatch.setattr(keyring.provider(), "encrypt", lambda *args, **kwargs: answer)
    with pytest.raises(KMSBadResponse, match="no ciphertext"):
        keyring.seal(HEADER, DIGEST)
    assert [event.outcome for event in events] == ["unavailable"]


def test_a_call_that_is_no_longer_waited_for_leaves_its_event(
    events: list[Event], monkeypatch: pytest.MonkeyPatch
) -> None:
    stored, asked, go_on = keyring.seal(HEADER, DIGEST), threading.Event(), threading.Event()
    decrypt = keyring.provider().decrypt

    def slow(*args: Any, **kwargs: Any) -> Any:
        asked.set()
        assert go_on.wait(10)
        return decrypt(*args, **kwargs)

    def interrupted(self: Any, timeout: float | None = None) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(keyring.provider(), "decrypt", slow)
    monkeypatch.setattr(Future, "exception", interrupted)
    with pytest.raises(KeyboardInterrupt):
        keyring.open_beside(stored, lambda: DIGEST)
    assert asked.wait(10)
    before = len(events)
    go_on.set()
    until = time.monotonic() + 10
    while len(events) == before and time.monotonic() < until:
        time.sleep(0.01)
    assert [event.operation for event in events[before:]] == ["Decrypt"]
