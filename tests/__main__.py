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


#: pytest's exit status where its arguments leave no test.
NOTHING_CHOSEN = 5


class Stage(NamedTuple):
    """One run of pytest: tests by their markers, and about how long on two cores."""

    database: str
    markers: str
    minutes: float
    measured: bool = False
    arguments: tuple[str, ...] = ()

    @property
    def place(self) -> str:
        return self.database.partition(":")[0]


OWN = os.environ.get("DATABASE_URL") or servers.SQLITE
FAST = [Stage(OWN, "fast", 0.5)]
DEFAULT = [Stage(OWN, "not system", 3)]

# Measuring doubles the time. So SQLite is measured whole, and on the servers only the tests of
# `rotation.database`, the one module of `FULLY_COVERED` that has code for each of them.
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
    Stage(servers.MARIADB, "database or everywhere", 5),
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


def work(stage: Stage, arguments: list[str]) -> int:
    """Run a stage, print what it is and what it took; return pytest's exit status."""
    name = f"{stage.place}: {' '.join((stage.markers, *stage.arguments))}"
    name += ", coverage measured" if stage.measured else ""
    print(f"\n=== {name} (about {stage.minutes:g} min on two cores) ===", flush=True)
    measure = ("coverage", "run", "-m") if stage.measured else ()
    # Some tests take long: a worker that is done takes over what waits for another.
    workers = (f"-n{min(len(os.sched_getaffinity(0)), 8)}", "--dist=worksteal")
    chosen = ("-m", stage.markers, *stage.arguments, *arguments)
    started = time.monotonic()
    code = run(
        *(sys.executable, "-m", *measure, "pytest", "-q", *workers, *chosen),
        DATABASE_URL=stage.database,
    )
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    print(f"=== {name}: {minutes} min {seconds} s ===", flush=True)
    return code


def covered() -> bool:
    """Report the coverage, and return whether it is whole where it must be."""
    coverage = (sys.executable, "-m", "coverage")
    run(*coverage, "combine", "-q")
    run(*coverage, "report", "--skip-covered")
    gate = (f"--include={FULLY_COVERED}", f"--omit={NOT_EVERYWHERE}", "-m", "--fail-under=100")
    return not run(*coverage, "report", "--skip-covered", *gate)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests",
        usage="%(prog)s [--fast | --all | --nightly] [pytest's arguments]",
        description="Run the tests. CONTRIBUTING.md says what is in which tier.",
        allow_abbrev=False,
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--fast", action="store_true", help="no database: half a minute")
    how.add_argument("--all", action="store_true", help="every tier, on three databases")
    how.add_argument("--nightly", action="store_true", help="all on each, in full size: hours")
    options, arguments = parser.parse_known_args()

    stages = DEFAULT
    if options.fast:
        stages = FAST
    elif options.all or options.nightly:
        stages = NIGHTLY if options.nightly else ALL
        if lacking := missing():
            print(f"Not found: {'; '.join(lacking)}.\nCONTRIBUTING.md says what is needed.")
            return 1
    if options.nightly:
        sizes = {"KMS_HASHER_FULL": "1", "KMS_HASHER_KILLS": "30"}
        os.environ |= sizes | {"PYTEST_ADDOPTS": "--timeout=3600"}
    if arguments:  # what some of the tests cover is no matter
        stages = [stage._replace(measured=False) for stage in stages if not stage.arguments]
    measured = any(stage.measured for stage in stages)
    if measured:
        run(sys.executable, "-m", "coverage", "erase")

    codes = {stage: work(stage, arguments) for stage in stages}
    if set(codes.values()) == {NOTHING_CHOSEN}:
        print("No test was chosen. Those of the system tier need --all, or -m system.")
        return 1
    failed = [
        f"{stage.place}, {stage.markers}"
        for stage, code in codes.items()
        if code != 0 and not (arguments and code == NOTHING_CHOSEN)
    ]
    if measured and not covered():
        failed.append("the coverage")
    for name in failed:
        print(f"Failed: {name}.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
