"""
A file of CloudTrail, `{"Records": [...]}`, read record by record, compressed or not.

A file of any size takes the memory of one record. Whatever is wrong with it, be it by accident
or on purpose, is one `TrailError` that names the file.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NoReturn

from kms_hasher.exceptions import TrailError

#: Characters read at a time.
CHUNK = 2**16

#: The most characters that one record may have. CloudTrail cuts what it records to 256 KB.
MAX_RECORD = 2**20

NOT_READABLE = "it cannot be read ({error})"
NOT_JSON = "it is no JSON, or a record in it has more than {limit:,} characters"
CUT_SHORT = "it ends in the middle"
NO_RECORDS = 'it holds no {"Records": [...]}'
TOO_DEEP = "a record is nested too deeply"
NO_FILE = "it is no regular file"


def records(path: Path) -> Iterator[object]:
    """Yield what the array `Records` of a file holds. Raises `TrailError`."""
    if not path.is_file():  # a pipe would be waited for
        raise TrailError(f"{path}: {NO_FILE}.")
    try:
        with path.open("rb") as raw, io.TextIOWrapper(_unpacked(raw), "utf-8") as stream:
            yield from _records(_Text(stream))
    except TrailError as error:
        raise TrailError(f"{path}: {error}.") from None
    except RecursionError:
        raise TrailError(f"{path}: {TOO_DEEP}.") from None
    except EOFError:
        raise TrailError(f"{path}: {CUT_SHORT}.") from None
    except (OSError, ValueError, zlib.error) as error:
        text = NOT_READABLE.format(error=type(error).__name__)
        raise TrailError(f"{path}: {text}.") from None


def _unpacked(raw: io.BufferedReader) -> io.BufferedReader | gzip.GzipFile:
    compressed = raw.peek(2)[:2] == b"\x1f\x8b"
    return gzip.GzipFile(fileobj=raw) if compressed else raw


_END_OF_SPACE = re.compile(r"[^ \t\r\n]|\Z")


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse)


class _Text:
    """JSON text, of which no more is in memory than one value and a chunk."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._text, self._at = "", 0

    def next(self) -> str:
        """Return the next character that is no space, without taking it; "" at the end."""
        spaces = 0
        while True:
            start = self._at
            self._at = _END_OF_SPACE.search(self._text, start).start()  # type: ignore[union-attr]
            if self._at < len(self._text):
                return self._text[self._at]
            spaces += self._at - start
            if spaces > MAX_RECORD:
                raise TrailError(NOT_JSON.format(limit=MAX_RECORD))
            if not self._more():
                return ""

    def take(self, char: str) -> None:
        found = self.next()
        if found != char:
            raise TrailError(NOT_JSON.format(limit=MAX_RECORD) if found else CUT_SHORT)
        self._at += 1

    def value(self) -> Any:
        """Take and return the next value."""
        self.next()
        while True:
            start = self._at
            try:
                found, end = _DECODER.raw_decode(self._text, start)
            except json.JSONDecodeError:
                if not self._more():
                    raise TrailError(CUT_SHORT) from None
                continue
            # A number that ends with the chunk may go on in the next.
            if end < len(self._text) or self._text[end - 1] in '}]"' or not self._more():
                self._at += end - start
                return found

    def _more(self) -> bool:
        kept = self._text[self._at :]
        if len(kept) > MAX_RECORD:
            raise TrailError(NOT_JSON.format(limit=MAX_RECORD))
        read = self._stream.read(max(CHUNK, len(kept)))
        self._text, self._at = kept + read, 0
        return bool(read)


def _records(text: _Text) -> Iterator[object]:
    text.take("{")
    found = False
    while text.next() != "}":
        name = text.value()
        text.take(":")
        if name == "Records" and text.next() == "[":
            found = True
            yield from _items(text)
        else:
            text.value()
        if text.next() == ",":
            text.take(",")
    text.take("}")
    if not found:
        raise TrailError(NO_RECORDS)
    if text.next():
        raise TrailError(NOT_JSON.format(limit=MAX_RECORD))


def _items(text: _Text) -> Iterator[object]:
    text.take("[")
    while text.next() != "]":
        yield text.value()
        if text.next() != "]":
            text.take(",")
    text.take("]")
