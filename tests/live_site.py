"""
A site on a database of its own, whose processes a test starts and kills.

They run tests/projects/live.py on a new database of the kind that DATABASE_URL names; on
SQLite that is a file.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from django.db import connection

ROOT = Path(__file__).resolve().parent.parent

#: Seconds that no process takes where all is well.
LONG = 900

Process = subprocess.Popen[str]


class Site:
    """Starts processes: `site("setup", "10")`. `env` is their environment."""

    def __init__(self, env: dict[str, str]) -> None:
        self.env = env
        self._started: list[Process] = []

    def __call__(self, *arguments: str) -> Process:
        """Start a process of tests/projects/live.py."""
        return self.start("-m", "tests.projects.live", *arguments)

    def start(self, *arguments: str, **more: Any) -> Process:
        """Start Python, in a process group of its own."""
        more = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | more
        process: Process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=self.env,
            start_new_session=True,
            **more,
        )
        self._started.append(process)
        return process

    def end(self) -> None:
        """Kill all that was started, with all that these have started."""
        for process in self._started:
            kill_group(process)
            process.communicate()


def kill_group(process: Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def open_site(directory: Path, blocker: Any, **env: str) -> Iterator[Site]:
    """Give a site with a new, empty database, and end all its processes afterwards."""
    named = ("ENGINE", "USER", "PASSWORD", "HOST", "PORT", "OPTIONS")
    database = {name: connection.settings_dict[name] for name in named}
    if connection.vendor == "sqlite":
        database["NAME"] = str(directory / "site.sqlite3")
    else:
        database["NAME"] = f"kms_hasher_{uuid.uuid4().hex}"
        with blocker.unblock():
            execute(f"CREATE DATABASE {database['NAME']}")
    site = Site(
        {
            **os.environ,
            "DJANGO_SETTINGS_MODULE": "tests.projects.kill_settings",
            "KMS_HASHER_LIVE_DATABASE": json.dumps(database),
            "KMS_HASHER_LIVE_KEYS": str(directory / "keys.json"),
            **env,
        }
    )
    try:
        yield site
    finally:
        site.end()
        if connection.vendor != "sqlite":
            with blocker.unblock():
                execute(f"DROP DATABASE {database['NAME']}")


def execute(statement: str) -> None:
    with connection._nodb_cursor() as cursor:
        cursor.execute(statement)


def finish(process: Process) -> str:
    """Wait for the process; return the last line it wrote."""
    out, err = process.communicate(timeout=LONG)
    assert process.returncode == 0, err
    return out.rstrip().rpartition("\n")[2]


def result_of(process: Process) -> dict[str, Any]:
    """Wait for a process that writes one JSON object at last; return it."""
    found: dict[str, Any] = json.loads(finish(process))
    return found


def workers_at(line: str) -> Sequence[int]:
    """Return the ids of the processes that have a shard."""
    return [int(owner.split(":")[1]) for owner in json.loads(line)]
