"""
Whether passwords can be checked now, for a readiness probe.

    def ready(request):
        health = check()
        return JsonResponse(health.as_dict(), status=200 if health.ok else 503)
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import asdict, dataclass
from typing import Any

from kms_hasher import breaker, conf, keyring
from kms_hasher.exceptions import KMSHasherError, KMSUnavailable


@dataclass(frozen=True)
class Health:
    """`problem` says what is wrong, or is ""; `age` is in seconds."""

    ok: bool
    problem: str = ""
    age: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


_lock = threading.Lock()
_last: tuple[float, conf.Conf, str] | None = None


def check(*, max_age: float = 30.0) -> Health:
    """
    Return whether KMS answers and the key is enabled, by DescribeKey.

    KMS is asked at most once in `max_age` seconds in each process, then its replicas if it
    cannot answer, and not at all while all their circuit breakers are open. Needs
    kms:DescribeKey. Raises nothing of ours.
    """
    global _last
    with _lock:
        try:
            settings = conf.get()
        except KMSHasherError as error:
            return Health(ok=False, problem=str(error))
        now = time.monotonic()
        known = _last is not None and now - _last[0] < max_age and _last[1] == settings
        if not known and not _is_cut_off(settings):
            _last = now, settings, _problem(settings)
        asked, problem = (_last[0], _last[2]) if _last and _last[1] == settings else (now, "")
    if not problem and _is_cut_off(settings):
        problem = "KMS could not answer lately"
    return Health(ok=not problem, problem=problem, age=round(time.monotonic() - asked, 3))


def _is_cut_off(settings: conf.Conf) -> bool:
    """Return whether logins fail without asking: the breakers of all Regions are open."""
    home = settings.home.region if settings.home else ""
    regions = settings.fallback_regions if settings.replicas(settings.key) else ()
    return all(breaker.of(region).retry_after for region in (home, *regions))


def _problem(settings: conf.Conf) -> str:
    problem = ""
    for key in (settings.key, *settings.replicas(settings.key)):
        try:
            state = keyring.kms("status").describe_key(key).state
        except KMSUnavailable as error:
            problem = problem or str(error)
        except KMSHasherError as error:
            return str(error)
        else:
            return "" if state == "Enabled" else f"The key is {state}"
    return problem


def _after_fork() -> None:  # pragma: no cover: it runs in a child
    global _lock, _last
    _lock, _last = threading.Lock(), None


os.register_at_fork(after_in_child=_after_fork)
