"""
A prefork server in small, for tests/test_resilience.py: `python -m tests.projects.forks`.

Reads lines of a stored hash and its digest in hexadecimal. The parent opens some of them in
many threads, and while these are at it forks workers, each of which opens a share of its own
in threads of its own. Writes what each worker has found.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import django

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.settings")
django.setup()

from django.conf import settings  # noqa: E402

from kms_hasher import encoding, keyring, signals  # noqa: E402
from kms_hasher.audit import writer  # noqa: E402

WORKERS = 8
THREADS = 4

#: What was written by this process's audit thread, and by which process.
written: list[tuple[int, str]] = []


def write(events: Any) -> None:
    written.extend((os.getpid(), event.sub) for event in events)


def record(sender: Any, event: signals.Event, **kwargs: Any) -> None:
    writer.submit_and_wait(write, [event])


def found(line: str) -> str:
    text, digest = line.split()
    try:
        opened, computed = keyring.open_beside(encoding.parse(text), lambda: digest)
    except Exception as error:  # noqa: BLE001  # counted
        return type(error).__name__
    return "right" if opened.hex() == computed else "foreign"


def work(lines: list[str]) -> dict[str, Any]:
    signal.alarm(120)  # a worker that hangs is killed, and says nothing
    written.clear()
    with ThreadPoolExecutor(THREADS) as pool:
        counted = Counter(pool.map(found, lines))
    own = sum(pid == os.getpid() for pid, _ in written)
    return {**counted, "recorded": own}


def main() -> None:
    settings.KMS_HASHER = {
        "PROVIDER": "aws",
        "KEY": sys.argv[1],
        "OPTIONS": {"region": sys.argv[1].split(":")[3]},
        "AUDIT": "off",
    }
    signals.kms_event.connect(record)
    lines = sys.stdin.read().splitlines()
    done = threading.Event()

    def keep_busy() -> None:
        while not done.is_set():
            assert found(lines[0]) == "right"

    busy = [threading.Thread(target=keep_busy) for _ in range(THREADS)]
    for thread in busy:
        thread.start()
    while len(written) < 2 * THREADS:
        time.sleep(0.01)
    children = []
    for number in range(WORKERS):
        reader, writing = os.pipe()
        pid = os.fork()
        if not pid:
            try:
                os.write(writing, json.dumps(work(lines[number::WORKERS])).encode())
            finally:
                os._exit(0)
        os.close(writing)
        children.append((pid, reader))
    results = []
    for pid, reader in children:
        with os.fdopen(reader, "rb") as pipe:
            results.append(json.loads(pipe.read() or b'{"hung": 1}'))
        os.waitpid(pid, 0)
    done.set()
    for thread in busy:
        thread.join()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
