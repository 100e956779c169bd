"""
What was read of CloudTrail, in this comparison and before, and from when to when.
"""

from __future__ import annotations

import datetime
import hashlib
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from django.utils import timezone

from kms_hasher import calls
from kms_hasher.audit import cloudtrail
from kms_hasher.audit.cloudtrail import Call, Read
from kms_hasher.audit.site import Keys, of_seconds, seconds_of, utc
from kms_hasher.audit.workspace import PAGE, File, Workspace, pages, seconds
from kms_hasher.exceptions import ConfigurationError, KMSError, TrailError
from kms_hasher.models import TrailFile, TrailMark

#: Seconds. A clock that is further off is refused by KMS.
SKEW = 15 * 60

#: Seconds that CloudTrail's files may be late: about 5 minutes as a rule, 15 at times.
LATE = 30 * 60

#: Seconds in which an event comes into the database, with a buffered delivery too.
SETTLE = 5 * 60

#: Seconds that are looked up the first time.
FIRST_LOOK_UP = 24 * 3600

_STATE = ("digest", "size", "modified")

NO_LOOKUP = 'The provider cannot look up CloudTrail: only "aws" can. Name files instead.'
NO_REGION = "Nobody knows in which Region to look: give KMS_HASHER['KEY'] as an ARN."
DAMAGED = "LookupEvents in {region}: {number} records are not as CloudTrail writes them."
NOT_LOOKED_UP = "LookupEvents in {region} failed: {error}"
AHEAD = (
    "CloudTrail in {region} is marked as compared up to {until:%Y-%m-%d %H:%M} UTC, which is "
    "yet to come. Somebody moved the mark, or a clock was wrong: it counts for nothing, and "
    "all files were read again. Look up again what may have been left out, with --since."
)
GAP = (
    "Nothing was read of CloudTrail in {region} from {since:%Y-%m-%d %H:%M} to "
    "{until:%Y-%m-%d %H:%M} UTC: events of that time were not looked for. Name the whole "
    "folder each time; what was read before is passed over."
)


@dataclass
class Range:
    """
    The times that are judged, in seconds; None where nothing was said.

    With one of them given, what was compared before counts for nothing.
    """

    now: int
    since: int | None = None
    until: int | None = None

    @property
    def is_given(self) -> bool:
        return self.since is not None or self.until is not None


@dataclass
class Coverage:
    """The first and the last time, in seconds, that was read of a Region."""

    first: int
    last: int


@dataclass
class Trail:
    """Reads CloudTrail into a workspace, and knows how far it came."""

    space: Workspace
    range: Range
    keys: Keys = field(default_factory=Keys)
    covered: dict[str, Coverage] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    files: int = 0
    passed_over: int = 0
    records: int = 0
    duplicates: int = 0

    def __post_init__(self) -> None:
        self._marks: dict[str, int] = {}
        for mark in TrailMark.objects.order_by("region"):
            if mark.region not in self.keys.regions:
                continue
            until = seconds_of(mark.until)
            if until <= self.range.now:
                self._marks[mark.region] = until
            else:
                self.errors.append(AHEAD.format(region=mark.region, until=utc(until)))
        # Then nobody knows what was compared.
        self._is_misled = bool(self.errors)

    # --- reading ---------------------------------------------------------------------

    def read_files(self, paths: Sequence[str | os.PathLike[str]]) -> None:
        """Read files and folders. Raises `TrailError` for a path that does not exist."""
        for page in pages(cloudtrail.files(paths)):
            known = {} if self.range.is_given or self._is_misled else _known_files(page)
            for path in page:
                self._read_file(path, known)

    def _read_file(self, path: Path, known: Mapping[str, tuple[int, int]]) -> None:
        try:
            state = path.stat()
            if known.get(_digest(path)) == (state.st_size, state.st_mtime_ns):
                self.passed_over += 1
                return
            self.files += 1
            last, regions = self._take(cloudtrail.read(path), self._cover)
        except TrailError as error:
            self.errors.append(_printable(str(error)))
        except OSError as error:
            self.errors.append(_printable(f"{path}: {type(error).__name__}."))
        else:
            name, size = str(path.absolute()), state.st_size
            # A name that is not UTF-8 fits into no database: such a file is read each time.
            if name == _printable(name):
                self.space.add_file(
                    File(name, size, state.st_mtime_ns, last, tuple(sorted(regions)))
                )

    def look_up(self) -> None:
        """
        Read what LookupEvents gives, since the last time or for a day.

        Where it fails, that is one of the errors. Raises `ConfigurationError` if the provider
        has no such thing.
        """
        events = getattr(calls.provider(), "lookup_events", None)
        if events is None:
            raise ConfigurationError(NO_LOOKUP)
        if not self.keys.regions:
            raise ConfigurationError(NO_REGION)
        for region in sorted(self.keys.regions):
            start = self._marks.get(region, self.range.now - FIRST_LOOK_UP + LATE) - LATE
            start = start if self.range.since is None else self.range.since
            end = self.range.now if self.range.until is None else self.range.until
            bad: list[object] = []
            try:
                self._take(_readable(events(region, utc(start), utc(end)), bad))
            except KMSError as error:
                # The last events come first: it was not read up to any time.
                self.errors.append(NOT_LOOKED_UP.format(region=region, error=error))
                continue
            if bad:
                self.errors.append(DAMAGED.format(region=region, number=len(bad)))
            # Where nobody called, it is known that nobody did.
            self._cover(region, start)
            self._cover(region, end - SETTLE)

    def _take(
        self, found: Iterable[Read], cover: Callable[[str, int], None] | None = None
    ) -> tuple[int, set[str]]:
        """
        Put the calls on our keys into the workspace; return last time and Regions.

        `cover` is told the Region, if it is one of our keys', and time of each record.
        """
        batch: list[Call] = []
        last, regions = 0, set()
        try:
            for time, region, call in found:
                self.records += 1
                at = seconds(time)
                last = max(last, at)
                if cover and region in self.keys.regions:
                    regions.add(region)
                    cover(region, at)
                if call and self.keys.include(call):
                    batch.append(call)
                    if len(batch) == PAGE:
                        self.duplicates += self.space.add(batch)
                        batch = []
        finally:  # what came before something that cannot be read counts
            self.duplicates += self.space.add(batch)
        return last, regions

    def _cover(self, region: str, at: int) -> None:
        # A record of the future would have all events judged before their time.
        at = min(at, self.range.now)
        cover = self.covered.setdefault(region, Coverage(at, at))
        cover.first, cover.last = min(cover.first, at), max(cover.last, at)

    # --- how far it came -------------------------------------------------------------

    def span(self, region: str) -> tuple[int, int] | None:
        """Return the times whose events CloudTrail must have by now, or None for none."""
        cover = self.covered[region]
        start, end = cover.first + SKEW, cover.last - LATE
        if self.range.is_given:
            start = start if self.range.since is None else max(start, self.range.since)
            end = end if self.range.until is None else min(end, self.range.until)
        elif region in self._marks and not self._gap(region):
            start = self._marks[region]
        return (start, end) if start < end else None

    def unread_since(self, region: str) -> int | None:
        """Return up to when a Region was read before, None for never."""
        mark = self._marks.get(region)
        # The mark is what is `LATE` before the last record that was read.
        return None if mark is None else mark + 2 * LATE

    def gaps(self) -> list[str]:
        """Return a line for each time that was never read."""
        return [
            GAP.format(
                region=region,
                since=utc(self._marks[region]),
                until=utc(self.covered[region].first),
            )
            for region in self.covered
            if not self.range.is_given and self._gap(region)
        ]

    def _gap(self, region: str) -> bool:
        mark = self._marks.get(region)
        # On a quiet trail the last record that was read before is the first of this time.
        return mark is not None and self.covered[region].first > mark + LATE

    def remember(self, silent: Collection[str] = ()) -> dict[str, datetime.datetime]:
        """
        Note how far it came, and which files need not be read again; return the former.

        Where nobody called it came no further, and that it was looked at is noted all the same;
        not for Regions that are `silent` though there are events, nor if anything was not read.
        """
        spans = {region: self.span(region) for region in self.covered}
        until = {region: utc(span[1]) for region, span in spans.items() if span}
        if self.range.is_given:
            return until
        for region, span in spans.items():
            if span:
                self._marks[region] = span[1]
                TrailMark.objects.update_or_create(
                    region=region, defaults={"until": of_seconds(span[1])}
                )
        if not self.errors:
            looked_at = self.keys.regions.difference(silent)
            TrailMark.objects.filter(region__in=looked_at).update(updated_at=timezone.now())
        for page in self.space.files():
            done = [_known(file) for file in page if self._is_done(file)]
            TrailFile.objects.filter(digest__in=[row.digest for row in done]).delete()
            TrailFile.objects.bulk_create(done, ignore_conflicts=True)
        _forget_files()
        return until

    def _is_done(self, file: File) -> bool:
        # The last ones are read again, until all events they may have were looked for.
        marks = [self._marks.get(region, 0) for region in file.regions]
        return file.last < min([*marks, self.range.now]) - SKEW - SETTLE


def _readable(records: Iterable[object], bad: list[object]) -> Iterable[Read]:
    for record in records:
        try:
            yield cloudtrail.read_record(record)
        except ValueError as error:
            bad.append(error)


def _printable(text: str) -> str:
    """Return a text that can be written as UTF-8, whatever bytes a file's name had."""
    return text.encode("utf-8", "backslashreplace").decode()


def _known_files(paths: Iterable[Path]) -> dict[str, tuple[int, int]]:
    """Return size and time of change of those that need not be read again, by digest."""
    rows = TrailFile.objects.filter(digest__in=list(map(_digest, paths)))
    return {digest: (size, at) for digest, size, at in rows.values_list(*_STATE)}


def _forget_files() -> None:
    """Delete the rows of files that are there no more."""
    last = 0
    while page := list(TrailFile.objects.filter(pk__gt=last).order_by("pk")[:PAGE]):
        last = page[-1].pk
        gone = [row.pk for row in page if _is_gone(Path(row.path))]
        TrailFile.objects.filter(pk__in=gone).delete()


def _is_gone(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:  # it may be there
        return False
    return False


def _known(file: File) -> TrailFile:
    return TrailFile(
        digest=_digest(file.path), path=file.path, size=file.size, modified=file.modified
    )


def _digest(path: str | Path) -> str:
    return hashlib.sha256(os.fsencode(Path(path).absolute())).hexdigest()
