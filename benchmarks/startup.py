"""
What the app adds to the start of a process, and to its first login.

    python -m benchmarks.startup [--quick | --instructions]

Each start is a new Python process, with and without the app in turn; the two projects have
the same settings but for the app, its hasher and its backend. "p50" and "best" are of the
time that passes, "CPU" is the median of the CPU time; each ratio is the median of the ratios
of neighbours, or that of the two best. KMS is the stub of benchmarks.stub at 25 ms. What was
imported is looked up in `sys.modules` at the end of each start. `--instructions` counts what
each start executes instead, once and under valgrind: a busy machine changes nothing in that.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from benchmarks import stub

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = "from benchmarks.stub import project\nglobals().update(project(app={app}))\n"

SETUP = "import django; django.setup()"
MANAGE = "import runpy; runpy.run_path('manage.py', run_name='__main__')"
SERVE = "from django.core.wsgi import get_wsgi_application; get_wsgi_application();"
REQUEST = "from django.test import Client; Client().get('/admin/login/')"

#: What is run without and with the app.
STARTS = {
    "python -c pass / import kms_hasher": ("pass", "import kms_hasher"),
    "django.setup()": (SETUP, SETUP),
    "manage.py check": (MANAGE, MANAGE),
    "manage.py migrate": (MANAGE, MANAGE),
    "a WSGI worker": (SERVE, SERVE),
    "a WSGI worker, first page": (SERVE + REQUEST, SERVE + REQUEST),
}

#: Printed by each start: what it must not have imported.
REPORT = (
    "import atexit, sys;"
    "atexit.register(lambda: print(*{'boto3', 'botocore'} & set(sys.modules), end=''));"
)

LOGIN = """
import sys, time
import django
django.setup()
from django.contrib.auth import authenticate
from django.contrib.auth.models import User
from django.test.runner import DiscoverRunner

DiscoverRunner(verbosity=0, interactive=False).setup_databases()
User(username="ann", password={password!r}).save()

def ms(call):
    started, cpu = time.perf_counter(), time.process_time()
    call()
    wall = (time.perf_counter() - started) * 1000
    return wall, (time.process_time() - cpu) * 1000

def login():
    assert authenticate(None, username="ann", password="correct horse")

def resident():
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith("VmRSS")).split()[1]) / 1024

before = resident()
warm = 0.0
if {prewarm}:
    from kms_hasher.backends import prewarm
    warm = ms(prewarm)[0]
first = ms(login)[0]
second = sorted(ms(login)[0] for _ in range(5))[2]
print(warm, first, second, before, resident())
"""

MAKE = """
import django
django.setup()
from django.contrib.auth.hashers import make_password
print(make_password("correct horse"))
"""


def environment(settings: str) -> dict[str, str]:
    return {
        "DJANGO_SETTINGS_MODULE": settings.rpartition("/")[2],
        "PYTHONPATH": os.pathsep.join([settings.rpartition("/")[0], str(ROOT)]),
        "PYTHONHASHSEED": "0",
    }


def instructions(without: str, with_: str) -> None:
    print("\nInstructions that a start executes, in millions; this takes ten minutes")
    print(f"{'':36}{'':>9}{'with':>7}{'ratio':>7}")
    valgrind = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null"]
    for name, codes in STARTS.items():
        arguments = name.split()[1:] if name.startswith("manage.py") else []
        counts = []
        for code, settings in zip(codes, (without, with_), strict=True):
            python(code, settings, *arguments)  # writes the byte code
            done = subprocess.run(
                [*valgrind, sys.executable, "-c", code, *arguments],
                env=os.environ | environment(settings),
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=True,
            )
            counts.append(int(done.stderr.rpartition("Collected : ")[2].split()[0]) / 1e6)
        print(
            f"{name:36}{counts[0]:9.0f}{counts[1]:7.0f}{counts[1] / counts[0]:7.3f}", flush=True
        )


def python(code: str, settings: str, *arguments: str) -> tuple[float, float, str]:
    """Run a new process; return its wall and CPU milliseconds and what it printed last."""
    env = environment(settings)
    command = [sys.executable, "-c", code, *arguments]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        command, env=os.environ | env, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall * 1000, cpu * 1000, (done.stdout.splitlines() or [""])[-1]


def starts(without: str, with_: str, n: int) -> None:
    print(f"\nStarts of a process, in ms; {n} of each")
    print(f"{'':36}{'p50':>7}{'with':>6}{'ratio':>7}", end="")
    print(f"{'best':>7}{'with':>6}{'ratio':>7}{'CPU':>7}{'with':>6}{'ratio':>7}  boto3")
    for name, codes in STARTS.items():
        arguments = name.split()[1:] if name.startswith("manage.py") else []
        pairs, imported = [], False
        for _ in range(n + 1):
            one = python(REPORT + codes[0], without, *arguments)
            other = python(REPORT + codes[1], with_, *arguments)
            pairs.append((one, other))
            imported |= "boto" in other[2]
        del pairs[0]  # it wrote the byte code
        print(f"{name:36}", end="")
        for field, best in ((0, median), (0, min), (1, median)):
            a, b = (best(pair[side][field] for pair in pairs) for side in (0, 1))
            ratio = b / a if best is min else median(y[field] / x[field] for x, y in pairs)
            print(f"{a:7.0f}{b:6.0f}{ratio:7.3f}", end="")
        print("  IMPORTED" if imported else "  not imported", flush=True)


def first_login(without: str, with_: str, n: int) -> None:
    print(f"\nThe first login of a process, in ms, and its memory, in MiB; median of {n}")
    print(f"{'':18}{'prewarm':>9}{'first':>8}{'later':>8}{'RSS before':>13}{'after':>8}")
    rows: dict[str, list[list[float]]] = {}
    password = {side: python(MAKE, side)[2] for side in (without, with_)}
    for _ in range(n):
        for name, side, prewarm in (
            ("stock", without, False),
            ("ours, cold", with_, False),
            ("ours, prewarmed", with_, True),
        ):
            code = LOGIN.format(password=password[side], prewarm=prewarm)
            rows.setdefault(name, []).append([float(x) for x in python(code, side)[2].split()])
    for name, runs in rows.items():
        warm, first, later, before, after = (
            median(column) for column in zip(*runs, strict=True)
        )
        print(f"{name:18}{warm:9.0f}{first:8.0f}{later:8.0f}{before:13.1f}{after:8.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.startup",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="a few starts: to see it work")
    parser.add_argument("--instructions", action="store_true", help="count, with valgrind")
    options = parser.parse_args()
    n = 3 if options.quick else 21
    os.environ.pop("DATABASE_URL", None)
    print(stub.environment())
    with tempfile.TemporaryDirectory() as directory, stub.running(25):
        for name, app in (("without_app", False), ("with_app", True)):
            Path(directory, f"{name}.py").write_text(SETTINGS.format(app=app))
        sides = f"{directory}/without_app", f"{directory}/with_app"
        if options.instructions:
            instructions(*sides)
        else:
            starts(*sides, n)
            first_login(*sides, min(n, 9))
    print(stub.environment())


if __name__ == "__main__":
    main()
