"""
The provider of a process, and every call to it: reported as one event, and not made while
the circuit breaker of its Region is open.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from django.utils import timezone
from django.views.decorators.debug import sensitive_variables

from kms_hasher import breaker, conf, providers, signals
from kms_hasher.exceptions import (
    AuditError,
    KMSBadResponse,
    KMSCircuitOpen,
    KMSError,
    KMSHasherError,
    KMSThrottled,
    KMSUnavailable,
)
from kms_hasher.providers.base import (
    OPERATIONS,
    DataKey,
    Decrypted,
    Encrypted,
    Provider,
    ReEncrypted,
    Result,
)

T = TypeVar("T")

logger = logging.getLogger("kms_hasher")

#: What somebody waits for: these calls fail at once while KMS is out, see `breaker`.
GUARDED = ("login", "set")

# --- the provider, shared by all threads of a process -------------------------------

_lock = threading.Lock()
_shared: tuple[tuple[str, Mapping[str, Any]], Provider] | None = None


def provider() -> Provider:
    """
    Return the process's provider, made when it is first needed and after each fork.

    Raises `ConfigurationError` if the settings cannot make one.
    """
    global _shared
    settings = conf.get()
    wanted = (settings.provider, dict(settings.options))
    with _lock:
        if _shared is None or _shared[0] != wanted:
            _shared = wanted, providers.create(settings)
            breaker.reset()
        return _shared[1]


def _after_fork() -> None:  # pragma: no cover: it runs in a child
    # A client shared with the parent has answered with the parent's plaintext.
    global _lock, _shared
    _lock, _shared = threading.Lock(), None


os.register_at_fork(after_in_child=_after_fork)


# --- one event for each call --------------------------------------------------------


def kms(
    purpose: str,
    sub: str = "",
    *,
    size: int | None = None,
    report: Callable[[signals.Event], None] = signals.emit,
) -> Provider:
    """
    Return the provider, with each call reported as one `kms_event` and the breaker asked.

    `purpose` says what the calls are for: see `signals.PURPOSES`. A plaintext that has not
    `size` bytes, if that is given, is a damaged answer like any other.
    """
    return cast(Provider, _Reported(provider(), purpose, sub, size, report))


def akms(purpose: str, sub: str = "") -> Any:
    """
    Return the same with methods to be awaited, for an event loop that has nothing else to do.

    Where the provider has a coroutine function `a<method>`, it is called, else the method
    in a thread.
    """
    return _AsyncReported(provider(), purpose, sub, None, signals.emit)


@dataclass(frozen=True)
class _Reported:
    """A provider whose methods report an event, whatever comes of the call."""

    provider: Provider
    purpose: str
    sub: str
    size: int | None
    report: Callable[[signals.Event], None]

    def __getattr__(self, name: str) -> Callable[..., Any]:
        operation = OPERATIONS[name]
        return functools.partial(self._do, operation, getattr(self.provider, name))

    @sensitive_variables()
    def _do(
        self, operation: str, method: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Result:
        with self._reported(operation, *args[:1]) as call:
            call.result = method(*args, **kwargs)
        result: Result = call.result
        return result

    @contextlib.contextmanager
    def _reported(self, operation: str, requested: object = "") -> Iterator[_Call]:
        # What is named first is a key or an alias, in all methods but create_key.
        call = _Call(str(requested))
        circuit = self._circuit(call.requested)
        started = time.perf_counter()
        try:
            circuit.enter()
            yield call
            self._check(call.result, operation, call.requested)
        except Exception as raised:  # noqa: BLE001  # a provider of the site's own
            error = _as_ours(raised, operation, call.requested)
            # An AuditError would hide what the call's own error says.
            with contextlib.suppress(AuditError):
                self._tell(operation, call.requested, started, error)
            with contextlib.suppress(AuditError):
                self._leave(circuit, error)
            raise error from None
        except BaseException as cut:  # a task cancelled, a time limit: KMS may have answered
            error = KMSError("cut short", code=type(cut).__name__)
            with contextlib.suppress(AuditError):
                self._tell(operation, call.requested, started, error)
            raise
        result = call.result
        ids = result.request_ids
        try:
            self._tell(operation, result.key_arn, started, None, call.requested, ids)
        finally:  # a strict audit that fails keeps no breaker open
            self._leave(circuit)

    def _check(self, result: Result, operation: str, requested: str) -> None:
        if isinstance(result, Encrypted | ReEncrypted) and not result.ciphertext:
            # Stored, it would be a password that nothing opens.
            raise KMSBadResponse(
                "the answer holds no ciphertext", operation=operation, key=requested
            )
        if self.size is None or not isinstance(result, Decrypted | DataKey):
            return
        if len(result.plaintext) != self.size:
            raise KMSBadResponse(
                "the plaintext has the wrong size",
                operation=operation,
                key=requested,
                request_ids=result.request_ids,
            )

    def _circuit(self, requested: str) -> breaker.Breaker:
        region = region_of(requested)
        # A rotation has patience of its own; what it meets says little about logins.
        return breaker.of(region) if self.purpose in GUARDED else breaker.Breaker(region)

    def _leave(self, circuit: breaker.Breaker, error: KMSHasherError | None = None) -> None:
        """Count the call, and tell if that has opened or closed the breaker."""
        if isinstance(error, KMSCircuitOpen):
            return
        answered = not isinstance(error, KMSUnavailable) or isinstance(error, KMSThrottled)
        if circuit.leave(answered=answered):
            opened = not answered
            logger.error(
                "The circuit breaker of Region %r is %s",
                circuit.region,
                "open: KMS cannot answer" if opened else "closed: KMS answers again",
            )
            self._tell(signals.CIRCUIT_BREAKER, circuit.region, None, error if opened else None)

    def _tell(
        self,
        operation: str,
        key: str,
        started: float | None,
        error: KMSHasherError | None,
        requested: str | None = None,
        request_ids: tuple[str, ...] = (),
    ) -> None:
        self.report(
            signals.Event(
                time=timezone.now(),
                operation=operation,
                purpose=self.purpose,
                outcome=signals.outcome_of(error) if error else signals.SUCCESS,
                error_code=getattr(error, "code", type(error).__name__) if error else "",
                requested_key=key if requested is None else requested,
                key=key,
                latency=0.0 if started is None else time.perf_counter() - started,
                request_ids=getattr(error, "request_ids", request_ids),
                sub=self.sub,
            )
        )


class _AsyncReported(_Reported):
    def __getattr__(self, name: str) -> Callable[..., Any]:
        operation = OPERATIONS[name]
        method = getattr(self.provider, f"a{name}", None)
        if method is None:
            method = in_thread(getattr(self.provider, name))
        return functools.partial(self._ado, operation, method)

    # A decorator costs much where it is applied, so none is in `__getattr__`.
    @sensitive_variables()
    async def _ado(
        self, operation: str, method: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Result:
        with self._reported(operation, *args[:1]) as call:
            call.result = await method(*args, **kwargs)
        result: Result = call.result
        return result


def in_thread(method: Callable[..., T]) -> Callable[..., Awaitable[T]]:
    """Return the method as one to be awaited, which a thread of the event loop's does."""

    def call(*args: Any, **kwargs: Any) -> Awaitable[T]:
        return asyncio.to_thread(method, *args, **kwargs)

    return call


@dataclass
class _Call:
    """A call under way: the key or alias it names, and at last what it came to."""

    requested: str
    result: Any = field(default=None, repr=False)


def _as_ours(raised: Exception, operation: str, requested: str) -> KMSHasherError:
    if isinstance(raised, KMSCircuitOpen):
        return KMSCircuitOpen(operation=operation, key=requested)
    if isinstance(raised, KMSHasherError):  # a `ConfigurationError` comes at the first call
        return raised
    # Not passed on: the frames of a provider of the site's own may hold the plaintext.
    return KMSError(
        f"the provider raised {type(raised).__name__}", operation=operation, key=requested
    )


def region_of(key: str) -> str:
    """Return the Region of a key's ARN, "" for other names: one of the settings' own."""
    parts = key.split(":")
    return parts[3] if parts[0] == "arn" and len(parts) > 3 else ""
