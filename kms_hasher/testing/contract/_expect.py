"""What the tests of the contract are made with."""

from __future__ import annotations

import base64
import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import pytest

from kms_hasher.exceptions import KMSError
from kms_hasher.providers.base import RSAES_OAEP_SHA_256, Context, Provider

T = TypeVar("T")

SECRET = b"hunter2!hunter2!hunter2!hunter2!"  # 32 bytes, as a digest
CONTEXT = {"app": "tests", "sub": "0123456789abcdef"}
UNKNOWN = "11111111-2222-4333-8444-555555555555"
RSA: Mapping[str, Any] = {"algorithm": RSAES_OAEP_SHA_256}
CONTEXTS: Mapping[str, Context] = {
    "empty": {},
    "one": {"a": "b"},
    "empty value": {"a": ""},
    "separators": {'a":"b","c': "d=e&f\n$|\x00"},
    "not ASCII": {"Straße": "日本語 \N{GRINNING FACE}"},
    "composed": {"n": "\N{LATIN SMALL LETTER E WITH ACUTE}"},
    "decomposed": {"n": "e\N{COMBINING ACUTE ACCENT}"},
    "upper case": {"A": "b"},
    "two": {"a": "b", "c": "d"},
    "swapped": {"a": "d", "c": "b"},
}
# Without these pairs' borders they would be "one", "two" and "swapped".
AMBIGUOUS: Mapping[str, Context] = {
    "moved border": {"ab": ""},
    "two in one": {"a": "bcd"},
    "two in one name": {"abc": "d"},
}


def silent(thing: T) -> T:
    """Check that neither the text nor the representation of `thing` tells the secret."""
    for text in (str(thing), repr(thing)):
        assert SECRET.decode() not in text
        assert SECRET.hex() not in text
        assert base64.b64encode(SECRET).decode()[:40] not in text
    return thing


@contextlib.contextmanager
def refused(
    kind: type[KMSError],
    operation: str,
    *,
    code: str = "",
    key: str | None = None,
    answered: bool = True,
) -> Iterator[None]:
    """Check that the block raises just this error, with all that belongs to it."""
    with pytest.raises(KMSError) as caught:
        yield
    error = silent(caught.value)
    assert type(error) is kind
    assert error.operation == operation
    assert not code or error.code == code
    assert key is None or error.key == key
    # None of the frames a report would show may lead to a text with the secret.
    for link in (
        error.__cause__,
        error.__context__ if not error.__suppress_context__ else None,
    ):
        silent(link)
    if answered:
        assert len(set(error.request_ids)) == len(error.request_ids) >= 1


def check_signature(provider: Provider, method: str) -> None:
    """Check that a method takes what the protocol says, with the same defaults."""

    def shape(function: Callable[..., Any]) -> list[tuple[str, object, object]]:
        parameters = inspect.signature(function).parameters.values()
        return [(p.name, p.kind, p.default) for p in parameters if p.name != "self"]

    assert shape(getattr(provider, method)) == shape(getattr(Provider, method))
