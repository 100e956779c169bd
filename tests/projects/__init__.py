"""Small sites with other user models; tests run them in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def run(settings: str, script: str, database: str | None = None) -> Any:
    """
    Run `script` in a new process, after `django.setup()`; return what it leaves in `result`.

    `settings` names a module of this package, `database` is an URL, SQLite in memory
    by default. The result goes through JSON.
    """
    code = "import django, json\ndjango.setup()\n{}\nprint('\\n' + json.dumps(result))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code.format(textwrap.dedent(script))],
        env={
            **os.environ,
            "DJANGO_SETTINGS_MODULE": f"tests.projects.settings_{settings}",
            "DATABASE_URL": database or "sqlite://:memory:",
        },
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])
