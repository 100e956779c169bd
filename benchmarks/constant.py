"""
A KMS of constant latency that has every operation: the local provider, which answers no
sooner than so many milliseconds after it was asked. It is what the benchmarks of modes use.

What it computes itself, RSA above all, is within that time and so costs CPU, but no latency.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kms_hasher.providers.local import LocalProvider

SPECS = {
    "symmetric": ("SYMMETRIC_DEFAULT", "ENCRYPT_DECRYPT"),
    "rsa": ("RSA_2048", "ENCRYPT_DECRYPT"),
    "hmac": ("HMAC_256", "GENERATE_VERIFY_MAC"),
}

#: What a mode is used with, as in `KMS_HASHER`.
MODES: dict[str, dict[str, Any]] = {
    "direct": {"KEY": "alias/symmetric"},
    "public_key": {"KEY": "alias/rsa"},
    "envelope": {"KEY": "alias/symmetric"},
    "mac": {"KEY": "alias/hmac"},
    "mac_in_direct": {"KEY": "alias/symmetric", "MAC_KEY": "alias/hmac"},
}

PATH = Path(tempfile.gettempdir()) / f"kms-hasher-constant-{os.getpid()}" / "keys.json"


_hurry = False


class Constant(LocalProvider):
    """`milliseconds` is how long a call takes at the least."""

    def __init__(self, path: str, *, milliseconds: float) -> None:
        super().__init__(path, allow_without_debug=True)
        self._seconds = milliseconds / 1000
        for name in ("encrypt", "decrypt", "re_encrypt", "generate_mac", "generate_data_key"):
            setattr(self, name, self._delayed(getattr(self, name)))

    def _delayed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def delayed(*args: Any, **kwargs: Any) -> Any:
            until = time.perf_counter() + self._seconds
            try:
                return call(*args, **kwargs)
            finally:
                if not _hurry:
                    time.sleep(max(until - time.perf_counter(), 0))

        return delayed


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Let calls take no longer than they must, to prepare what is measured."""
    global _hurry
    _hurry = True
    try:
        yield
    finally:
        _hurry = False


def settings(mode: str, milliseconds: float, **more: Any) -> dict[str, Any]:
    """Return `KMS_HASHER` for a mode."""
    return {
        "PROVIDER": "benchmarks.constant.Constant",
        "OPTIONS": {"path": str(PATH), "milliseconds": milliseconds},
        "AUDIT": "off",
        "MODE": mode,
        **MODES[mode],
        **more,
    }


@contextlib.contextmanager
def keys() -> Iterator[None]:
    """Make a key of each spec and an alias to it; delete the file in the end."""
    service = Constant(str(PATH), milliseconds=0)
    for name, (spec, usage) in SPECS.items():
        key = service.create_key(spec=spec, usage=usage)
        service.create_alias(f"alias/{name}", key.key_arn)
    try:
        yield
    finally:
        for path in (PATH, Path(f"{PATH}.lock")):
            path.unlink(missing_ok=True)
        PATH.parent.rmdir()
