"""
A site under the servers that Django sites run under: users sign in at once, and it ends.

Each test starts the server as its own documentation says, on a database in a file and the
double of KMS. What these share is made once: tables, users, and the double.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.kms_double import REGION, KMSDouble

pytestmark = pytest.mark.everywhere

ROOT = Path(__file__).resolve().parent.parent
USERS = 4

#: Seconds that nothing here takes where all is well.
LONG = 30.0


class Server:
    """A server that runs, and what it has written so far."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process, self.port, self.log = process, port, log

    def get(self) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/", timeout=LONG) as answer:
            return str(answer.read().decode())

    def sign_in(self, username: str, password: str, path: str = "login/") -> tuple[int, str]:
        """Return the status and the process that has answered."""
        form = urllib.parse.urlencode({"username": username, "password": password})
        url = f"http://127.0.0.1:{self.port}/{path}"
        try:
            with urllib.request.urlopen(url, form.encode(), timeout=LONG) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, ""

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + LONG
        while True:
            assert self.process.poll() is None, self.log.read_text()
            try:
                self.get()
            except OSError:
                assert time.monotonic() < deadline, self.log.read_text()
                time.sleep(0.05)
            else:
                return


Start = Callable[..., Server]


@pytest.fixture(scope="module")
def double() -> Iterator[KMSDouble]:
    with KMSDouble() as double:
        yield double


@pytest.fixture(scope="module")
def environment(double: KMSDouble, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The variables of a site with a key, tables and users."""
    key = double.engine.create_key().key_arn
    double.engine.create_alias("alias/site", key)
    database = tmp_path_factory.mktemp("site") / "site.sqlite3"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    environment = {
        **kept,
        "DJANGO_SETTINGS_MODULE": "tests.projects.served_settings",
        "KMS_HASHER_SERVED_DATABASE": str(database),
        "KMS_HASHER_SERVED_KEY": key.rpartition(":")[0] + ":alias/site",
        "AWS_ENDPOINT_URL_KMS": double.url,
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_DEFAULT_REGION": REGION,
        "AWS_ACCESS_KEY_ID": "AKIATESTS",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "PYTHONUNBUFFERED": "1",
    }
    subprocess.run(
        [sys.executable, "-m", "tests.projects.served", str(USERS)],
        cwd=ROOT,
        env=environment,
        timeout=120,
        check=True,
    )
    return environment


def free_port() -> int:
    """Return a port that no client is given meanwhile: Linux gives them those from 32768 on."""
    while True:
        port = random.randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


@pytest.fixture
def start(environment: dict[str, str], tmp_path: Path) -> Iterator[Start]:
    """Start a server: `start("gunicorn", "--bind={address}", ...)`."""
    started: list[Server] = []

    def run(*command: str, **more: str) -> Server:
        port = free_port()
        log = tmp_path / "log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", *(part.format(port=port) for part in command)],
                cwd=ROOT,
                env={**environment, **more},
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # What is started in the background of a shell inherits that it is ignored.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
        server = Server(process, port, log)
        started.append(server)
        server.wait_until_ready()
        return server

    yield run
    for server in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.process.pid, signal.SIGKILL)
        server.process.wait(LONG)


def check(server: Server, paths: tuple[str, ...] = ("login/",)) -> set[str]:
    """Users sign in at once, some by mistake; return the processes that let them in."""
    jobs = []
    with ThreadPoolExecutor(8) as pool:
        for number in range(4 * USERS):
            name, path = f"user{number % USERS}", paths[number % len(paths)]
            for username, password, status in [
                (name, f"pw{number % USERS}", 200),
                (name, "wrong", 401),
                (f"nobody{number}", "wrong", 401),
            ]:
                jobs.append((status, pool.submit(server.sign_in, username, password, path)))
    answers = [(status, *job.result()) for status, job in jobs]
    assert all(wanted == status for wanted, status, _ in answers), server.log.read_text()
    return {process for _, status, process in answers if status == 200}


def check_end(
    server: Server,
    double: KMSDouble,
    *,
    by: int = signal.SIGTERM,
    code: int,
    waits: bool = True,
) -> None:
    """A login that is on its way ends well, if the server waits; and then it ends itself."""
    before = len(double.requests)
    double.latency = 0.5
    try:
        with ThreadPoolExecutor(1) as pool:
            login = pool.submit(server.sign_in, "user0", "pw0")
            deadline = time.monotonic() + LONG
            while len(double.requests) == before:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            if by == signal.SIGINT:  # Ctrl-C is for all processes at the terminal
                os.killpg(server.process.pid, by)
            else:
                server.process.send_signal(by)
            if waits:
                assert login.result(LONG)[0] == 200, server.log.read_text()
            else:
                # It is cut off, or it is answered before its thread is.
                error = login.exception(LONG)
                assert isinstance(error, OSError) if error else login.result()[0] == 200
    finally:
        double.latency = 0.0
    assert server.process.wait(LONG) == code, server.log.read_text()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", server.port)), "a process is left behind"
    text = server.log.read_text()
    for word in ("Traceback", "SIGKILL", "RecursionError", "TIMEOUT"):
        assert word not in text, text


GUNICORN = (
    "gunicorn",
    "--bind=127.0.0.1:{port}",
    "--graceful-timeout=10",
    "tests.projects.served:wsgi",
)


@pytest.mark.parametrize("preload", [False, True], ids=["", "preload"])
@pytest.mark.parametrize(
    "kind", [["--worker-class=sync"], ["--worker-class=gthread", "--threads=4"]]
)
def test_gunicorn(start: Start, double: KMSDouble, kind: list[str], preload: bool) -> None:
    """With `--preload`, users have signed in before the workers are forked."""
    early = {"KMS_HASHER_SERVED_EARLY": "1"} if preload else {}
    server = start(*GUNICORN, "--workers=2", *kind, *["--preload"] * preload, **early)
    workers = check(server)
    assert str(server.process.pid) not in workers
    check_end(server, double, code=0)


def test_gunicorn_replaces_its_workers(start: Start, double: KMSDouble) -> None:
    """As at a reload of the code, or with `--max-requests`."""
    server = start(*GUNICORN, "--workers=2", "--worker-class=gthread", "--threads=4")
    former = check(server)
    server.process.send_signal(signal.SIGHUP)
    deadline = time.monotonic() + LONG
    while server.get() in former:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert check(server)
    check_end(server, double, code=0)


def test_gunicorn_gevent(start: Start, double: KMSDouble) -> None:
    server = start(*GUNICORN, "--workers=1", "--worker-class=gevent")
    check(server)
    check_end(server, double, code=0)


def test_uvicorn(start: Start, double: KMSDouble) -> None:
    server = start("uvicorn", "--port={port}", "--lifespan=off", "tests.projects.served:asgi")
    check(server, ("login/", "alogin/"))
    # uvicorn ends by the signal itself, when all that was on its way has been answered.
    check_end(server, double, code=-signal.SIGTERM)


@pytest.mark.parametrize("reload", [False, True], ids=["noreload", "reload"])
def test_runserver(start: Start, double: KMSDouble, reload: bool) -> None:
    command = ("django", "runserver", "127.0.0.1:{port}")
    server = start(*command, *["--noreload"] * (not reload))
    check(server)
    check_end(server, double, by=signal.SIGINT, code=0, waits=False)
