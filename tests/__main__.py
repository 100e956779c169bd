"""
The test command: `python -m tests [--fast | --all | --nightly] [pytest's arguments]`.

With no option it runs the fast and the database tier on the database that DATABASE_URL
names, by default SQLite in memory. --all runs every tier, on SQLite, PostgreSQL and MariaDB,
and demands full coverage of what is in the path of a login or a rotation. --nightly runs
every tier on every database, at full size. pytest's arguments choose among the tests:
`python -m tests -k rotation`. CONTRIBUTING.md says what is in which tier.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from tests import browser, servers, translating

ROOT = Path(__file__).resolve().parent.parent

# Their code is all in the path of a login or a rotation: every line and branch is tested.
FULLY_COVERED = (
    "kms_hasher/encoding.py,kms_hasher/inner.py,kms_hasher/modes/*,kms_hasher/keyring.py,"
    "kms_hasher/calls.py,kms_hasher/data_keys.py,kms_hasher/hashers.py,kms_hasher/rotation/*"
)
#: Needs Django 6.0, which the oldest Python here has not; a few lines, tested where it is.
NOT_EVERYWHERE = "kms_hasher/rotation/tasks.py"


class Stage(NamedTuple):
    """One run of pytest: tests by their markers, and about how long on two cores."""

    database: str
    markers: str
    minutes: float
    measured: bool = False
    arguments: tuple[str, ...] = ()


OWN = os.environ.get("DATABASE_URL", servers.SQLITE)
FAST = [Stage(OWN, "fast", 0.5)]
DEFAULT = [Stage(OWN, "not system", 3)]

# What is measured takes twice as long, so that only one run is: without the tests of
# `FULLY_COVERED`'s only module with code for one kind of database.
MEASURED = [
    Stage(servers.SQLITE, "not system", 5, measured=True),
    *(
        Stage(url, "database", 0.5, measured=True, arguments=("tests/test_database.py",))
        for url in (servers.POSTGRESQL, servers.MARIADB)
    ),
]
ALL = [
    *MEASURED,
    Stage(servers.POSTGRESQL, "not fast", 7),
    Stage(servers.MARIADB, "database or everywhere", 4),
]
NIGHTLY = [
    *MEASURED,
    Stage(servers.SQLITE, "system", 20),
    Stage(servers.POSTGRESQL, "not fast", 25),
    Stage(servers.MARIADB, "not fast", 25),
]


def run(*command: str, **env: str) -> int:
    return subprocess.run(command, cwd=ROOT, env=os.environ | env, check=False).returncode


def missing() -> list[str]:
    """Return what `--all` needs and does not find."""
    found = list(servers.missing())
    if not browser.find():
        found.append("a browser (Chromium, and Playwright of the group `test`)")
    if not translating.find():
        found.append("GNU gettext")
    return found


def work(stage: Stage, arguments: list[str]) -> bool:
    """Run a stage, print what it is and what it took, and return whether it passed."""
    name = f"{stage.database.partition(':')[0]}: {' '.join((stage.markers, *stage.arguments))}"
    name += ", coverage measured" if stage.measured else ""
    print(f"\n=== {name} (about {stage.minutes:g} min on two cores) ===", flush=True)
    python = [sys.executable, "-m"]
    if stage.measured:
        python += ["coverage", "run", "-m"]
    # Some tests of the system tier take long: who has none left takes over what waits.
    workers = [f"-n{os.cpu_count() or 2}", "--dist=worksteal"]
    started = time.monotonic()
    code = run(
        *python,
        "pytest",
        "-q",
        *workers,
        *("-m", stage.markers),
        *stage.arguments,
        *arguments,
        DATABASE_URL=stage.database,
    )
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    print(f"=== {name}: {minutes} min {seconds} s ===", flush=True)
    # 5: no test was chosen, as `-k` may leave none in one of the stages.
    return code == 0 or (code == 5 and bool(arguments))


def covered() -> bool:
    """Report the coverage, and return whether it is whole where it must be."""
    coverage = (sys.executable, "-m", "coverage")
    run(*coverage, "combine", "-q")
    run(*coverage, "report", "--skip-covered")
    gate = [f"--include={FULLY_COVERED}", f"--omit={NOT_EVERYWHERE}", "-m", "--fail-under=100"]
    return not run(*coverage, "report", "--skip-covered", *gate)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests", allow_abbrev=False)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--fast", action="store_true", help="no database: half a minute")
    how.add_argument("--all", action="store_true", help="every tier, and three databases")
    how.add_argument(
        "--nightly", action="store_true", help="all of it everywhere, in full size"
    )
    options, arguments = parser.parse_known_args()
    whole = options.all or options.nightly
    if whole and (lacking := missing()):
        print(f"Not found: {'; '.join(lacking)}.\nCONTRIBUTING.md says what is needed.")
        return 1
    stages = FAST if options.fast else ALL if options.all else DEFAULT
    if options.nightly:
        stages = NIGHTLY
        os.environ |= {"KMS_HASHER_FULL": "1", "KMS_HASHER_KILLS": "30"}
    if whole:
        run(sys.executable, "-m", "coverage", "erase")
    failed = [stage for stage in stages if not work(stage, arguments)]
    if whole and not arguments and not covered():
        print("Failed: the coverage.")
        return 1
    for stage in failed:
        print(f"Failed: {stage.database.partition(':')[0]}, {stage.markers}.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
