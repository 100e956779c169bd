"""The demo is the README's first promise: it runs from nothing, and twice."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.system

ROOT = Path(__file__).resolve().parent.parent
CLAIMS = [
    "demo-01 signs in",
    "a wrong password is refused",
    "no guess can be compared with it",
    "a KMS of his own cannot open it",
    "every row is sealed by the new key",
    "the session is signed in",
    "the reset link still works",
    "the passwords are the same",
]


def run(folder: Path, *arguments: str) -> str:
    environment = {name: text for name, text in os.environ.items() if name != "DATABASE_URL"}
    environment |= {"DEMO_DIR": str(folder), "DJANGO_SETTINGS_MODULE": "demo_project.settings"}
    done = subprocess.run(
        [sys.executable, "manage.py", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_twice_from_nothing(tmp_path: Path) -> None:
    for _ in range(2):
        printed = run(tmp_path, "demo")
        kept = [line for line in printed.splitlines() if line.strip().startswith("✓")]
        assert [claim for claim in CLAIMS if not any(claim in line for line in kept)] == []
        assert "user admin, password " in printed
    assert "Problem" not in run(tmp_path, "kms_status")
    assert "Would make 13 calls of ReEncrypt" in run(
        tmp_path, "rotate_kms_key", "--new-key", "--dry-run"
    )
