"""
The test command: `python -m tests [pytest's arguments]`.

Runs the suite on SQLite, and on PostgreSQL and MariaDB where a server and a driver are
found, in a browser where Chromium and Playwright are, and of the translations where GNU
gettext is; then checks the coverage.
KMS_HASHER_POSTGRESQL_URL and KMS_HASHER_MARIADB_URL say where the servers are; with
KMS_HASHER_ALL_DATABASES=1 a missing one, or a missing browser or gettext, is a failure.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from tests import browser, translating

ROOT = Path(__file__).resolve().parent.parent

# Their code is all in the path of a login or a rotation: every line and branch is tested.
FULLY_COVERED = (
    "kms_hasher/encoding.py,kms_hasher/inner.py,kms_hasher/modes/*,kms_hasher/keyring.py,"
    "kms_hasher/calls.py,kms_hasher/data_keys.py,kms_hasher/hashers.py,kms_hasher/rotation/*"
)
#: Needs Django 6.0, which the oldest Python here has not; a few lines, tested where it is.
NOT_EVERYWHERE = "kms_hasher/rotation/tasks.py"


def postgresql(url: str) -> None:
    connect = importlib.import_module("psycopg").connect
    connect(url, dbname="postgres", connect_timeout=3).close()


def mariadb(url: str) -> None:
    parts = urlsplit(url)
    importlib.import_module("MySQLdb").connect(
        host=parts.hostname or "127.0.0.1",
        port=parts.port or 3306,
        user=parts.username or "root",
        password=parts.password or "",
        connect_timeout=3,
    ).close()


SERVERS: dict[str, tuple[str, Callable[[str], None]]] = {
    "PostgreSQL": (
        os.environ.get(
            "KMS_HASHER_POSTGRESQL_URL", "postgres://postgres@127.0.0.1:5432/kms_hasher"
        ),
        postgresql,
    ),
    "MariaDB": (
        os.environ.get("KMS_HASHER_MARIADB_URL", "mysql://root@127.0.0.1:3306/kms_hasher"),
        mariadb,
    ),
}


def run(*command: str, **env: str) -> int:
    return subprocess.run(command, cwd=ROOT, env=os.environ | env, check=False).returncode


def main(arguments: list[str]) -> int:
    databases = {"SQLite": "sqlite://:memory:"}
    missing: list[str] = []
    for name, (url, connect) in SERVERS.items():
        try:
            connect(url)
        except Exception as error:  # noqa: BLE001  # each driver has errors of its own
            missing.append(f"{name}: {str(error).strip() or type(error).__name__}")
        else:
            databases[name] = url

    if not browser.find():
        missing.append("a browser: there is no Chromium, or no Playwright")
    if not translating.find():
        missing.append("all of the translations: there is no GNU gettext")

    coverage = (sys.executable, "-m", "coverage")
    run(*coverage, "erase")
    failed = []
    for name, url in databases.items():
        print(f"\n=== {name} ===", flush=True)
        if run(*coverage, "run", "-p", "-m", "pytest", *arguments, DATABASE_URL=url):
            failed.append(name)

    run(*coverage, "combine", "-q")
    if not arguments:
        print("\n=== coverage ===", flush=True)
        run(*coverage, "report", "--skip-covered")
        gate = [f"--include={FULLY_COVERED}", f"--omit={NOT_EVERYWHERE}", "-m"]
        # Some of it is for one kind of database, so that all of it takes all of them.
        if set(databases) == {"SQLite", *SERVERS}:
            gate.append("--fail-under=100")
        if run(*coverage, "report", *gate):
            failed.append("coverage")

    for reason in missing:
        print(f"Not tested on {reason}")
    if missing and os.environ.get("KMS_HASHER_ALL_DATABASES"):
        failed += missing
    print(f"Failed: {', '.join(failed)}" if failed else f"Passed on {', '.join(databases)}.")
    return 1 if failed else 0


sys.exit(main(sys.argv[1:]))
