"""The provider on a key file: the contract, and what belongs to the file alone."""

import concurrent.futures
import datetime
import json
import multiprocessing
import os
import sys
import threading
from pathlib import Path

import pytest
from django.test import RequestFactory
from django.views.debug import ExceptionReporter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kms_hasher.exceptions import (
    ConfigurationError,
    InvalidCiphertext,
    InvalidRequest,
    KeyFileError,
    KeyNotFound,
    KMSError,
)
from kms_hasher.providers._keyfile import KeyFile
from kms_hasher.providers.local import LocalProvider
from kms_hasher.testing.contract import CONTEXT, SECRET, StrictProviderContract, silent


def local(path, **options):
    return LocalProvider(path, **{"allow_without_debug": True, **options})


@pytest.fixture
def path(tmp_path):
    return tmp_path / "keys.json"


@pytest.fixture
def provider(path):
    return local(path)


@pytest.fixture
def key(provider):
    return provider.create_key()


@pytest.fixture
def arn(key):
    return key.key_arn


@pytest.fixture
def blob(provider, arn):
    return provider.encrypt(arn, SECRET, CONTEXT).ciphertext


class TestContract(StrictProviderContract):
    @pytest.fixture
    def advance(self, provider):
        def advance(by):
            now = provider.clock() + by
            provider.clock = lambda: now

        return advance


# --- the constructor ----------------------------------------------------------------


def test_it_is_not_for_production(path, settings):
    settings.DEBUG = False
    with pytest.raises(ConfigurationError, match=r'set KMS_HASHER."PROVIDER". to "aws"'):
        LocalProvider(path)
    with pytest.raises(ConfigurationError):
        LocalProvider(path, allow_without_debug="yes")
    settings.DEBUG = True
    LocalProvider(path).create_key()


@pytest.mark.parametrize(
    "options", [{"account": "1"}, {"account": "x" * 12}, {"region": ""}, {"region": "a:b"}]
)
def test_arns_need_an_account_and_a_region(path, options):
    with pytest.raises(ConfigurationError, match="12 digits"):
        local(path, **options)


def test_arns_are_made_of_account_and_region(path):
    key = local(path, account="123456789012", region="eu-here-1").create_key()
    assert key.key_arn == f"arn:aws:kms:eu-here-1:123456789012:key/{key.key_id}"


def test_calls_by_id_tell_the_arn(provider, key):
    for call in (
        provider.enable_key_rotation,
        provider.get_key_rotation_status,
        provider.rotate_key_on_demand,
        provider.get_key_policy,
        provider.list_resource_tags,
        provider.disable_key,
        provider.enable_key,
        provider.schedule_key_deletion,
        provider.cancel_key_deletion,
    ):
        result = call(key.key_id)
        assert result.key_arn == key.key_arn
        assert len(result.request_ids) == 1
    assert provider.create_alias("alias/x", key.key_id).key_arn == key.key_arn
    assert provider.update_alias("alias/x", key.key_id).key_arn == key.key_arn


@pytest.mark.parametrize(
    "name", ["", "key/{id}", "key/key/{id}", "arn:aws:kms:local-1:000000000000:{id}", "arn:"]
)
def test_names_of_no_key(provider, key, name):
    with pytest.raises(KeyNotFound):
        provider.describe_key(name.format(id=key.key_id))


def test_re_encrypt_tells_which_key_is_at_fault(provider, arn, blob):
    other = provider.create_key().key_arn
    for source, target in ((arn, other), (other, arn)):
        source_blob = provider.encrypt(source, SECRET, CONTEXT).ciphertext
        provider.disable_key(arn)
        with pytest.raises(KMSError) as caught:
            provider.re_encrypt(source, source_blob, CONTEXT, key=target, context=CONTEXT)
        assert caught.value.key == arn
        provider.enable_key(arn)


@pytest.mark.parametrize("context", [{"a": 1}, {1: "a"}, {"a": None}, {"a": "\ud800"}])
def test_a_context_holds_strings_alone(provider, arn, context):
    with pytest.raises(InvalidRequest) as caught:
        provider.encrypt(arn, SECRET, context)
    assert (caught.value.code, caught.value.key) == ("ValidationException", arn)


# --- blobs --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A provider, a key and a blob for tests that take many examples."""
    provider = local(tmp_path_factory.mktemp("shared") / "keys.json")
    arn = provider.create_key().key_arn
    provider.create_key()
    return provider, arn, provider.encrypt(arn, SECRET, CONTEXT).ciphertext


many = settings(max_examples=300, deadline=None)


@many
@given(bit=st.integers(0, 184 * 8 - 1))
def test_no_bit_of_a_blob_can_be_changed(shared, bit):
    provider, arn, blob = shared
    spoilt = bytearray(blob)
    spoilt[bit // 8] ^= 1 << bit % 8
    with pytest.raises(InvalidCiphertext):
        provider.decrypt(arn, bytes(spoilt), CONTEXT)


@many
@given(data=st.data())
def test_no_piece_of_a_blob_opens(shared, data):
    provider, arn, blob = shared
    start = data.draw(st.integers(0, len(blob) - 1))
    end = data.draw(st.integers(start + 1, len(blob)))
    for spoilt in (blob[start:end], blob[:start] + blob[end:], blob + blob[start:end]):
        if spoilt not in (blob, b""):
            with pytest.raises(InvalidCiphertext):
                provider.decrypt(arn, spoilt, CONTEXT)


@many
@given(spoilt=st.binary(min_size=1, max_size=400))
def test_nothing_else_opens(shared, spoilt):
    provider, arn, _ = shared
    with pytest.raises(InvalidCiphertext):
        provider.decrypt(arn, spoilt, CONTEXT)


contexts = st.dictionaries(st.text(max_size=6), st.text(max_size=6), max_size=4)


@many
@given(plaintext=st.binary(min_size=1, max_size=64), one=contexts, other=contexts)
def test_a_blob_opens_with_its_context_alone(shared, plaintext, one, other):
    provider, arn, _ = shared
    sealed = provider.encrypt(arn, plaintext, one).ciphertext
    assert provider.decrypt(arn, sealed, one).plaintext == plaintext
    if one != other:
        with pytest.raises(InvalidCiphertext):
            provider.decrypt(arn, sealed, other)


def test_a_blob_does_not_pass_for_another_key_s(provider, arn, blob):
    other = provider.create_key()
    renamed = blob[:9] + bytes.fromhex(other.key_id.replace("-", "")) + blob[25:]
    with pytest.raises(InvalidCiphertext):
        provider.decrypt(other.key_arn, renamed, CONTEXT)


# --- secrets ------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["encrypt", "re_encrypt", "generate_mac", "rsa"])
def test_django_s_error_report_shows_no_plaintext(provider, arn, blob, call, monkeypatch):
    def fail(*args):
        inner = args  # as a local variable of the deepest frame
        raise RuntimeError(f"unexpected: {len(inner)}")

    mac_key = provider.create_key(spec="HMAC_256", usage="GENERATE_VERIFY_MAC").key_arn
    rsa = provider.create_key(spec="RSA_2048").key_arn
    for name in ("seal", "mac", "open_sealed"):
        if (name, call) != ("open_sealed", "re_encrypt"):
            monkeypatch.setattr(f"kms_hasher.providers._software.{name}", fail)
    call, arguments = {
        "encrypt": (provider.encrypt, (arn, SECRET, CONTEXT)),
        "re_encrypt": (provider.re_encrypt, (arn, blob, CONTEXT, arn, CONTEXT)),
        "generate_mac": (provider.generate_mac, (mac_key, SECRET)),
        "rsa": (provider.encrypt, (rsa, SECRET, CONTEXT)),
    }[call]
    try:
        call(*arguments)
    except Exception:  # noqa: BLE001
        report = ExceptionReporter(RequestFactory().get("/"), *sys.exc_info())
    frames = report.get_traceback_frames()[1:]  # the first is this test
    assert any(frame["filename"].endswith("_service.py") for frame in frames)
    silent([frame["vars"] for frame in frames])


def test_material_is_not_in_representations(path, provider, arn):
    (stored,) = KeyFile(path).read().keys.values()
    (material,) = stored.materials
    assert repr(material.secret)[2:12] not in repr(stored)
    for thing in (provider, provider._file):
        assert repr(material.secret)[2:12] not in repr(vars(thing))


# --- the file -----------------------------------------------------------------------


def test_no_file_is_no_keys(path, provider):
    with pytest.raises(KeyNotFound):
        provider.describe_key("alias/none")
    assert not path.exists()


def test_the_first_key_makes_file_and_directory(tmp_path):
    path = tmp_path / "var" / "keys" / "file.json"
    previous = os.umask(0)
    try:
        local(path).create_key()
    finally:
        os.umask(previous)
    modes = {file.name: file.stat().st_mode & 0o777 for file in path.parent.iterdir()}
    assert modes == {"file.json": 0o600, "file.json.lock": 0o600}
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_everything_is_kept(path, provider):
    key = provider.create_key(
        spec="RSA_2048", multi_region=True, description="é", tags={"a": "b"}
    )
    provider.create_alias("alias/kept", key.key_id)
    sealed = provider.encrypt(key.key_id, SECRET, {}, algorithm="RSAES_OAEP_SHA_256")
    provider.schedule_key_deletion(key.key_id, 9)
    again = local(path)
    described = [one.describe_key("alias/kept") for one in (provider, again)]
    assert vars(described[0]) | {"request_ids": ()} == vars(described[1]) | {"request_ids": ()}
    again.cancel_key_deletion(key.key_id)
    provider.enable_key(key.key_id)
    opened = again.decrypt(key.key_id, sealed.ciphertext, {}, algorithm="RSAES_OAEP_SHA_256")
    assert opened.plaintext == SECRET


def test_a_link_to_the_file_stays_a_link(tmp_path, path):
    link = tmp_path / "link.json"
    link.symlink_to(path)
    key = local(link).create_key()
    assert link.is_symlink()
    assert local(path).describe_key(key.key_id).key_arn == key.key_arn


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666])
def test_a_file_open_to_others_is_refused(path, provider, arn, blob, mode):
    provider.decrypt(arn, blob, CONTEXT)  # what has been read already does not matter
    path.chmod(mode)
    for one in (provider, local(path)):
        with pytest.raises(KeyFileError, match="chmod 600") as caught:
            one.decrypt(arn, blob, CONTEXT)
        assert (caught.value.operation, caught.value.code) == ("Decrypt", "KeyFileError")
        with pytest.raises(KeyFileError):
            one.create_key()
    path.chmod(0o600)
    assert provider.decrypt(arn, blob, CONTEXT).plaintext == SECRET


SPOIL = {
    "empty": lambda text: "",
    "cut": lambda text: text[: len(text) // 2],
    "not JSON": lambda text: text + "}",
    "not UTF-8": lambda text: text.encode() + b"\xff",
    "a list": lambda text: "[]",
    "nothing in it": lambda text: "{}",
    "deep": lambda text: "[" * 100_000,
    "edited": lambda text: text.replace('"enabled": true', '"enabled": false'),
    "later release": lambda text: text.replace('"version": 1', '"version": 2'),
    "other secret": lambda text: text.replace('"secret": "', '"secret": "AAAA'),
}


@pytest.mark.parametrize("spoil", SPOIL.values(), ids=SPOIL)
def test_a_damaged_file(path, provider, arn, spoil):
    text = path.read_text()
    secret = json.loads(text)["keys"][arn.rpartition("/")[2]]["materials"][0]["secret"]
    spoilt = spoil(text)
    path.write_bytes(spoilt if isinstance(spoilt, bytes) else spoilt.encode())
    for call in (lambda: provider.describe_key(arn), provider.create_key):
        with pytest.raises(KeyFileError, match="damaged") as caught:
            call()
        assert str(path) in str(caught.value)
        assert caught.value.__cause__ is caught.value.__context__ is None
        report = ExceptionReporter(None, *caught._excinfo)
        assert secret not in repr(
            [frame["vars"] for frame in report.get_traceback_frames()[1:]]
        )
    assert path.read_bytes() == (spoilt if isinstance(spoilt, bytes) else spoilt.encode())
    path.write_text(text)
    assert provider.describe_key(arn).state == "Enabled"


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_damage_is_noticed(shared, tmp_path, data):
    provider, arn, blob = shared
    content = bytearray(provider._file.path.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= data.draw(st.integers(1, 255))
    path = tmp_path / "spoilt.json"
    path.write_bytes(content)
    path.chmod(0o600)
    try:
        opened = local(path).decrypt(arn, blob, CONTEXT).plaintext
    except KeyFileError:
        return
    assert opened == SECRET  # white space, or another escape of the same character


def test_a_path_that_cannot_be_a_file(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "keys.json"):
        provider = local(path)
        for call in (provider.create_key, lambda one=provider: one.describe_key("alias/x")):
            with pytest.raises(KeyFileError, match=str(path)):
                call()


# --- several at once ----------------------------------------------------------------


def test_readers_see_what_others_wrote(path, provider, arn, blob):
    other = local(path)
    for _ in range(20):  # faster than the clock of the file system ticks
        other.disable_key(arn)
        assert provider.describe_key(arn).state == "Disabled"
        other.enable_key(arn)
        assert provider.describe_key(arn).state == "Enabled"
    path.unlink()
    with pytest.raises(KeyNotFound):
        provider.describe_key(arn)


def test_every_write_makes_the_file_newer(path, provider, arn):
    future = path.stat().st_mtime_ns + 3600 * 10**9  # as after a clock was set back
    os.utime(path, ns=(future, future))
    for later in range(1, 4):
        provider.enable_key(arn)
        assert path.stat().st_mtime_ns == future + later


def test_a_decrypt_takes_one_look_at_the_file(provider, arn, blob, monkeypatch):
    looks = []
    stat = Path.stat
    monkeypatch.setattr(Path, "stat", lambda self, **kw: looks.append(self) or stat(self, **kw))
    monkeypatch.setattr(Path, "open", None)
    provider.decrypt(arn, blob, CONTEXT)
    assert len(looks) == 1


# Other tests' threads hold nothing that the children below need.
forks = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")


def make_keys(path, name, count):
    provider = local(path)
    made = []
    for index in range(count):
        key = provider.create_key(description=f"{name} {index}")
        provider.create_alias(f"alias/{name}/{index}", key.key_id)
        made.append(key.key_id)
    return made


@pytest.mark.everywhere
@forks
def test_processes_lose_nothing_of_one_another(path):
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(4, mp_context=context) as pool:
        jobs = [pool.submit(make_keys, path, f"p{number}", 8) for number in range(4)]
        made = [id_ for job in jobs for id_ in job.result(60)]
    provider = local(path)
    assert len(set(made)) == 32
    assert {provider.describe_key(id_).key_id for id_ in made} == set(made)
    named = [f"alias/p{number}/{index}" for number in range(4) for index in range(8)]
    assert {provider.describe_key(name).key_id for name in named} == set(made)


def test_threads_lose_nothing_of_one_another(path, provider):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: provider.create_key().key_id, range(40)))
    assert {local(path).describe_key(id_).key_id for id_ in made} == set(made)


def test_readers_never_see_half_a_file(path, provider, arn, blob):
    done = threading.Event()

    def read():
        count = 0
        while not done.is_set():
            count += local(path).decrypt(arn, blob, CONTEXT).plaintext == SECRET
        return count

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(read) for _ in range(2)]
        try:
            for _ in range(50):
                provider.create_key()
        finally:
            done.set()
        assert all(reader.result(30) for reader in readers)


@pytest.mark.everywhere
@forks
def test_a_forked_child_reads_and_writes(path, provider, arn, blob):
    child = os.fork()
    if child == 0:  # pragma: no cover - not seen by the parent
        try:
            opened = provider.decrypt(arn, blob, CONTEXT).plaintext == SECRET
            provider.disable_key(arn)
        except BaseException:  # noqa: BLE001
            os._exit(2)
        os._exit(0 if opened else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert provider.describe_key(arn).state == "Disabled"


@pytest.mark.parametrize("step", ["fsync", "utime"])
def test_a_crash_before_the_new_file_is_in_place(path, provider, arn, blob, monkeypatch, step):
    def crash(*args, **kwargs):
        raise KeyboardInterrupt

    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, step, crash)
        with pytest.raises(KeyboardInterrupt):
            provider.disable_key(arn)
    assert path.read_bytes() == before
    temporary = path.with_name("keys.json.tmp")
    assert temporary.stat().st_mode & 0o777 == 0o600
    # Nobody is held up, and what was left behind is cleared away.
    temporary.chmod(0o666)
    other = local(path)
    assert other.decrypt(arn, blob, CONTEXT).plaintext == SECRET
    other.disable_key(arn)
    assert not temporary.exists()
    assert path.stat().st_mode & 0o777 == 0o600
    assert provider.describe_key(arn).state == "Disabled"


def test_a_crash_of_the_replacement_itself(path, provider, arn, monkeypatch):
    def crash(*args):
        raise KeyboardInterrupt

    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            provider.schedule_key_deletion(arn)
    assert path.read_bytes() == before
    assert local(path).describe_key(arn).state == "Enabled"


def test_a_full_disk(path, provider, arn, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(KeyFileError, match="No space left") as caught:
            provider.create_key()
    assert caught.value.operation == "CreateKey"
    assert path.read_bytes() == before


def test_a_refused_call_writes_nothing(path, provider, arn):
    before = path.stat().st_mtime_ns
    with pytest.raises(KMSError):
        provider.cancel_key_deletion(arn)
    assert path.stat().st_mtime_ns == before


def test_deleted_keys_leave_the_file_with_the_next_write(path, provider, arn):
    provider.create_alias("alias/gone", arn)
    provider.schedule_key_deletion(arn, 7)
    now = provider.clock() + datetime.timedelta(days=7, seconds=1)
    provider.clock = lambda: now
    kept = provider.create_key().key_id
    content = json.loads(path.read_text())
    assert list(content["keys"]) == [kept]
    assert content["aliases"] == {}
