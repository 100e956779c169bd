"""A provider that fails when a test asks for it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from django.views.decorators.debug import sensitive_variables

from kms_hasher import breaker, calls, providers
from kms_hasher.conf import Conf
from kms_hasher.exceptions import ConfigurationError, KMSError
from kms_hasher.providers import _rules
from kms_hasher.providers.base import OPERATIONS, Result

#: How an answer may be damaged. No provider answers with None for what is missing.
DAMAGES: Mapping[str, Callable[[bytes], bytes]] = {
    "missing": lambda value: b"",
    "short": lambda value: value[:-1],
    "long": lambda value: value + b"\x00",
}

_BYTES = ("plaintext", "ciphertext", "mac", "der")
_WITH_BYTES = (
    "Encrypt",
    "Decrypt",
    "ReEncrypt",
    "GenerateMac",
    "GenerateDataKey",
    "GetPublicKey",
)

NOT_FAULTY = (
    'faults() needs KMS_HASHER["PROVIDER"] = "kms_hasher.testing.FaultyProvider", and the '
    "provider is a {name}."
)


@dataclasses.dataclass(eq=False)
class Fault:
    """What a block of `faults` lets happen. `count` says how often it has happened."""

    what: str | Exception | type[Exception]
    operations: frozenset[str]
    times: int | None
    after: bool
    count: int = 0


class FaultyProvider:
    """
    The provider that `provider` names, as `KMS_HASHER["PROVIDER"]` would, with `options` as
    its keyword arguments; and the faults that tests ask for, by `faults`.

    Whatever else the provider has (`clock`, `close`, coroutine functions) is there too.
    Raises `ConfigurationError` if it cannot be made.
    """

    def __init__(
        self,
        provider: str = "kms_hasher.testing.InMemoryProvider",
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.provider = providers.create(Conf(provider=provider, options=options or {}))
        self._faults: list[Fault] = []
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def faults(
        self,
        what: str | Exception | type[Exception],
        /,
        *operations: str,
        times: int | None = None,
        after: bool = False,
    ) -> Iterator[Fault]:
        """Let calls of the block fail, in all threads. See the function of this name."""
        fault = Fault(what, _struck(what, operations, times), times, after)
        with self._lock:
            self._faults.append(fault)
        try:
            yield fault
        finally:
            with self._lock:
                self._faults.remove(fault)

    def __getattr__(self, name: str) -> Any:
        if name == "provider":  # it could not be made
            raise AttributeError(name)
        method = getattr(self.provider, name)
        do: Callable[..., Any]
        if name in OPERATIONS:
            do, operation = self._do, OPERATIONS[name]
        elif name[:1] == "a" and name[1:] in OPERATIONS:
            do, operation = self._ado, OPERATIONS[name[1:]]
        else:
            return method
        return functools.update_wrapper(functools.partial(do, operation, method), method)

    @sensitive_variables()
    def _do(
        self, operation: str, method: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Any:
        fault, key = self._next(operation), _named(args, kwargs)
        _raise_before(fault, operation, key)
        return _answer(fault, method(*args, **kwargs), operation, key)

    @sensitive_variables()
    async def _ado(
        self, operation: str, method: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Any:
        fault, key = self._next(operation), _named(args, kwargs)
        _raise_before(fault, operation, key)
        return _answer(fault, await method(*args, **kwargs), operation, key)

    def _next(self, operation: str) -> Fault | None:
        """Return the fault that this call meets: of those that fit, the innermost block's."""
        with self._lock:
            for fault in reversed(self._faults):
                if operation in fault.operations and fault.count != fault.times:
                    fault.count += 1
                    return fault
        return None


@contextlib.contextmanager
def faults(
    what: str | Exception | type[Exception],
    /,
    *operations: str,
    times: int | None = None,
    after: bool = False,
) -> Iterator[Fault]:
    """
    Let calls to KMS fail while the block lasts, in all threads of this process.

        with faults(KMSTimeout): ...                            # every call
        with faults(KMSThrottled, "Decrypt", times=2): ...      # the next two Decrypts
        with faults(KMSTimeout, "ReEncrypt", after=True): ...   # done, but nobody learns it
        with faults("short", "Decrypt"): ...                    # a byte is missing

    `what` is an error or its class, or how each plaintext, ciphertext, MAC and public key
    in the answers is damaged: "missing" (empty), "short" or "long" (by a byte).
    `operations` are KMS's names, all by default; `times` is how many calls fail, by default
    all of them. With `after`, the provider has done the call before it fails. Blocks may be
    nested: the inner one counts. When the block ends, the circuit breakers are reset, so
    that the next test's calls are made.

    Raises `ConfigurationError` unless a `FaultyProvider` is in use, `ValueError` for what
    is no operation of KMS and for a damage that no answer can have.
    """
    provider = calls.provider()
    if not isinstance(provider, FaultyProvider):
        kind = type(provider)
        raise ConfigurationError(NOT_FAULTY.format(name=f"{kind.__module__}.{kind.__name__}"))
    try:
        with provider.faults(what, *operations, times=times, after=after) as fault:
            yield fault
    finally:
        breaker.reset()


def _struck(
    what: str | Exception | type[Exception], operations: tuple[str, ...], times: int | None
) -> frozenset[str]:
    """Return the operations that a fault strikes. Raises `ValueError` or `TypeError`."""
    if isinstance(what, str):
        possible: tuple[str, ...] = _WITH_BYTES
        if what not in DAMAGES:
            raise ValueError(f"{what!r} is no damage: use one of {', '.join(DAMAGES)}.")
    elif isinstance(what, Exception) or (
        isinstance(what, type) and issubclass(what, Exception)
    ):
        possible = tuple(OPERATIONS.values())
    else:
        raise TypeError(f"{what!r} is neither an error nor a damage.")
    if unknown := sorted(set(operations) - set(possible)):
        raise ValueError(f"No operation for it: {unknown}. There are {', '.join(possible)}.")
    if times is not None and times < 1:
        raise ValueError("'times' is a number above 0, or None for all calls.")
    return frozenset(operations or possible)


def _named(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    # What is named first is a key or an alias, in all methods but create_key.
    return str(args[0] if args else kwargs.get("key", ""))


def _raise_before(fault: Fault | None, operation: str, key: str) -> None:
    if fault and not fault.after and not isinstance(fault.what, str):
        raise _error(fault.what, operation, key)


def _answer(fault: Fault | None, result: Result, operation: str, key: str) -> Result:
    """Return the result as the fault leaves it. Raises the error of a fault `after`."""
    if fault is None:
        return result
    if not isinstance(fault.what, str):
        raise _error(fault.what, operation, key)
    damage = DAMAGES[fault.what]
    changes: dict[str, Any] = {
        name: damage(getattr(result, name)) for name in _BYTES if hasattr(result, name)
    }
    return dataclasses.replace(result, **changes)


def _error(what: Exception | type[Exception], operation: str, key: str) -> Exception:
    """Return the error to raise: one for each call, told as a provider tells it."""
    error = copy.copy(what) if isinstance(what, Exception) else what()
    if isinstance(error, KMSError):
        error.operation, error.key = error.operation or operation, error.key or key
        if error.code == type(error).__name__:
            error.code = _rules.CODES.get(type(error), error.code)
    return error
