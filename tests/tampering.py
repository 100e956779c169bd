"""
What whoever owns the database can do to a sealed audit, at random.
"""

from __future__ import annotations

import contextlib
import datetime
import random
from collections.abc import Callable, Iterator
from typing import Any

from django.db import connection, transaction

from kms_hasher.audit import canonical, seals, segments, verification
from kms_hasher.exceptions import SealRefused
from kms_hasher.models import AuditEvent, AuditSeal

START = datetime.datetime(2026, 11, 21, 12, tzinfo=datetime.timezone.utc)
EVENTS, SEALS = AuditEvent._meta.db_table, AuditSeal._meta.db_table
MICROSECOND = datetime.timedelta(microseconds=1)

Random = random.Random


def fill(
    number: int,
    *,
    first: int | None = None,
    gaps: bool = False,
    clock: Callable[[int], datetime.datetime] | None = None,
) -> None:
    """Store events, from the id `first` on if it is given; with `gaps`, one is at the third."""
    last = AuditEvent.objects.order_by("-pk").values_list("pk", flat=True).first() or 0
    id_ = last + 1 if gaps and first is None else first
    rows = []
    for at in range(number):
        if gaps and id_ is not None:
            id_ += 1 if at == 2 else random.choice((0, 0, 0, 1, 2, 40))
        row = AuditEvent(
            pk=id_,
            time=clock(at) if clock else START + datetime.timedelta(milliseconds=at),
            operation=random.choice(("Decrypt", "Encrypt", "ReEncrypt")),
            purpose=random.choice(("login", "set", "rotate")),
            outcome="success",
            key_ref="aerukz4jvpg66ajdivtytk6n54xrmj" if at % 2 else "",
            requested_key="alias/passwords",
            latency_us=random.randrange(10**6),
            request_ids=f"{random.getrandbits(64):016x}",
            sub=f"{random.getrandbits(128):032x}",
        )
        rows.append(row)
        id_ = id_ if id_ is None else id_ + 1
    AuditEvent.objects.bulk_create(rows)
    if id_ is not None and connection.vendor == "postgresql":
        with connection.cursor() as cursor:  # ids given by hand are not its sequence's
            sequence = f"pg_get_serial_sequence('{EVENTS}', 'id')"
            cursor.execute(
                f"SELECT setval({sequence}, MAX(id)) FROM {EVENTS} HAVING MAX(id) > 0"
            )


def verify(**options: Any) -> verification.Report:
    steps = verification.verify(**options)
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            report: verification.Report = stop.value
            return report


@contextlib.contextmanager
def undone() -> Iterator[None]:
    """Roll back at the end whatever the block has done to the database."""
    with transaction.atomic():
        yield
        transaction.set_rollback(True)


# --- what the owner of the database can do ------------------------------------------


def sql(statement: str, *values: Any) -> None:
    with connection.cursor() as cursor:
        cursor.execute(statement, values)


def can_loosen() -> bool:
    """Return whether a table can be altered so that it is `undone`."""
    return connection.features.can_rollback_ddl


def loosen(table: type[AuditEvent] | type[AuditSeal]) -> None:
    """Take all constraints off a table, and its indexes."""
    name = table._meta.db_table
    sql(f"CREATE TABLE loose AS SELECT * FROM {name}")
    sql(f"DROP TABLE {name}")
    sql(f"ALTER TABLE loose RENAME TO {name}")


def duplicate(table: type[AuditEvent] | type[AuditSeal], row: int, **values: Any) -> None:
    """Insert a copy of the row with this id, with other values."""
    name = table._meta.db_table
    columns = [field.column for field in table._meta.concrete_fields]
    copied = ", ".join("%s" if each in values else each for each in columns)
    sql(
        f"INSERT INTO {name} ({', '.join(columns)}) SELECT {copied} FROM {name} WHERE id = %s",
        *(values[each] for each in columns if each in values),
        row,
    )


def any_seal(rng: Random, number: int = 1) -> list[AuditSeal]:
    return rng.sample(list(AuditSeal.objects.order_by("sequence")), number)


def any_event(rng: Random, number: int = 1) -> list[AuditEvent]:
    last = segments.newest()
    assert last is not None
    ids = list(
        AuditEvent.objects.filter(pk__lte=last.last_id)
        .order_by("pk")
        .values_list("pk", flat=True)
    )
    chosen = rng.sample(ids, number)
    found = AuditEvent.objects.in_bulk(chosen)
    return [found[id_] for id_ in chosen]


def other_value(rng: Random, value: Any, length: int = 99) -> Any:
    """Return another value than the one stored, often one that looks much the same."""
    if isinstance(value, datetime.datetime):
        return value + rng.choice((-1, 1)) * MICROSECOND * 10 ** rng.randrange(12)
    if isinstance(value, int):
        return rng.choice([n for n in (value + 1, max(value - 1, 0), 0, 7) if n != value])
    if isinstance(value, dict):
        changed = dict(value)
        name = rng.choice([*changed, "more"])
        changed[name] = other_value(rng, changed.get(name, ""), 9999)
        less = {key: each for key, each in value.items() if key != name}
        return rng.choice([each for each in (changed, less, {}) if each != value])
    if isinstance(value, (bytes, memoryview)):
        data = bytearray(bytes(value) or b"\0")
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return rng.choice((bytes(data), bytes(value) + b"\1", bytes(value)[:-1] or b"\1"))
    if value is None:
        return START
    text = str(value)
    at = rng.randrange(len(text) + 1)
    options = [text[:at] + rng.choice("xX0 \u00e9") + text[at:], text[:at] + text[at + 1 :]]
    options += [text.swapcase(), text + " ", text[::-1], ""]
    return rng.choice([each for each in options if each != text and len(each) <= length])


def change_an_event(rng: Random) -> str:
    (event,) = any_event(rng)
    field = rng.choice([each for each in AuditEvent._meta.concrete_fields if each.name != "id"])
    former = getattr(event, field.attname)
    value = other_value(rng, former, field.max_length or 99)
    sql(
        f"UPDATE {EVENTS} SET {field.column} = %s WHERE id = %s",
        field.get_db_prep_save(value, connection),
        event.pk,
    )
    return f"{field.name} of event {event.pk} from {former!r} to {value!r}"


def free_id(rng: Random) -> int:
    last = segments.newest()
    assert last is not None
    taken = set(AuditEvent.objects.values_list("pk", flat=True))
    lowest = min(taken)
    free = [n for n in range(lowest - 9, last.last_id) if n not in taken]
    return rng.choice((rng.choice(free), canonical.FLOOR))


def move_an_event(rng: Random) -> str:
    (event,) = any_event(rng)
    target = rng.choice((free_id(rng), 10**9 + rng.randrange(10**9)))
    sql(f"UPDATE {EVENTS} SET id = %s WHERE id = %s", target, event.pk)
    return f"event {event.pk} moved to the id {target}"


def delete_events(rng: Random) -> str:
    chosen = [event.pk for event in any_event(rng, rng.choice((1, 1, 2, 9)))]
    AuditEvent.objects.filter(pk__in=chosen)._raw_delete("default")
    return f"events {chosen} deleted"


def delete_a_stretch(rng: Random) -> str:
    low, high = sorted(event.pk for event in any_event(rng, 2))
    sql(f"DELETE FROM {EVENTS} WHERE id BETWEEN %s AND %s", low, high)
    return f"events {low} to {high} deleted"


def insert_an_event(rng: Random, target: int | None = None) -> str:
    (event,), spare = any_event(rng), 2 * 10**9
    target = free_id(rng) if target is None else target
    event.pk, event._state.adding = spare, True
    event.save(force_insert=True)
    # Put where it belongs afterwards: MariaDB inserts no 0, but may be told to by an update.
    sql(f"UPDATE {EVENTS} SET id = %s WHERE id = %s", target, spare)
    return f"an event inserted with the id {target}"


def swap_events(rng: Random) -> str:
    one, other = any_event(rng, 2)
    spare = 2 * 10**9
    for former, now in ((one.pk, spare), (other.pk, one.pk), (spare, other.pk)):
        sql(f"UPDATE {EVENTS} SET id = %s WHERE id = %s", now, former)
    return f"events {one.pk} and {other.pk} swapped"


def truncate_events(rng: Random) -> str:
    (event,) = any_event(rng)
    sql(f"DELETE FROM {EVENTS} WHERE id >= %s", event.pk)
    return f"all events from {event.pk} on deleted"


def truncate_events_and_seals(rng: Random) -> str:
    (seal,) = any_seal(rng)
    sql(f"DELETE FROM {EVENTS} WHERE id > %s", seal.after_id)
    sql(f"DELETE FROM {SEALS} WHERE sequence >= %s", seal.sequence)
    return f"segments and seals from {seal.sequence} on deleted"


def change_a_seal(rng: Random) -> str:
    (seal,) = any_seal(rng)
    field = rng.choice([each for each in AuditSeal._meta.concrete_fields if each.name != "id"])
    former = getattr(seal, field.attname)
    value = other_value(rng, former, field.max_length or 99)
    if field.name == "sequence":
        value = rng.choice((0, 10**6 + rng.randrange(9)))
    AuditSeal.objects.filter(pk=seal.pk).update(**{field.name: value})
    return f"{field.name} of seal {seal.sequence} from {former!r} to {value!r}"


def delete_seals(rng: Random) -> str:
    chosen = [seal.sequence for seal in any_seal(rng, rng.choice((1, 1, 2)))]
    AuditSeal.objects.filter(sequence__in=chosen).delete()
    return f"seals {chosen} deleted"


def insert_a_seal(rng: Random) -> str:
    (seal,), last = any_seal(rng), segments.newest()
    assert last is not None
    seal.pk, seal.sequence = None, rng.choice((0, last.sequence + 1, last.sequence + 5))
    seal.save(force_insert=True)
    return f"a copy of a seal inserted as {seal.sequence}"


def swap_seals(rng: Random) -> str:
    one, other = any_seal(rng, 2)
    spare = 10**9
    for former, now in (
        (one.sequence, spare),
        (other.sequence, one.sequence),
        (spare, other.sequence),
    ):
        AuditSeal.objects.filter(sequence=former).update(sequence=now)
    return f"seals {one.sequence} and {other.sequence} swapped"


def take_anchors_of_another_seal(rng: Random) -> str:
    one, other = any_seal(rng, 2)
    AuditSeal.objects.filter(pk=one.pk).update(anchors=other.anchors)
    return f"seal {one.sequence} given the anchors of {other.sequence}"


def rewrite_the_past(rng: Random) -> str:
    """Change an event, and all seals from its own on to fit, as well as can be done."""
    told = rng.choice((change_an_event, delete_events, insert_an_event, swap_events))(rng)
    before: AuditSeal | None = None
    for seal in AuditSeal.objects.order_by("sequence"):
        segment = canonical.Segment(seal.version)
        for values in segments.events(seal.version, seal.after_id, seal.last_id):
            segment.add(values)
        seal.count, seal.root = segment.count, segment.root
        seal.first_time, seal.last_time = segment.first_time, segment.last_time
        seal.leaves = bytes(segment.leaves)
        seal.leaves_hash = canonical.sha256(segment.leaves).hexdigest()
        seal.previous = canonical.seal_hash(before) if before else ""
        seal.save()
        before = seal
    return f"{told}, and the seals rewritten"


def call_it_pruning(rng: Random) -> str:
    (seal,) = any_seal(rng)
    sql(f"DELETE FROM {EVENTS} WHERE id <= %s", seal.last_id)
    proof = rng.choice(({}, seal.anchors, AuditSeal.objects.get(sequence=1).anchors))
    AuditSeal.objects.filter(pk=seal.pk).update(pruned_at=START, pruning_anchors=proof)
    return f"segments up to {seal.sequence} deleted and called pruned"


def change_the_newest_anchors_and_seal(rng: Random) -> str:
    """Alter what the next seal carries on, and let it be made."""
    last = segments.newest()
    assert last is not None
    name = rng.choice([*last.anchors])
    other = AuditSeal.objects.exclude(pk=last.pk).order_by("sequence")[0].anchors[name]
    if other == last.anchors[name]:
        other = other_value(rng, other, 9999)
    AuditSeal.objects.filter(pk=last.pk).update(anchors={**last.anchors, name: other})
    fill(1)
    with contextlib.suppress(SealRefused):
        list(seals.seal(settle=0))
    return f"{name} of the anchors of seal {last.sequence} to {other!r}"


def insert_a_seal_between(rng: Random) -> str:
    """Insert a copy of the newest seal behind it, by a number that is no whole one."""
    last = segments.newest()
    assert last is not None
    if connection.vendor == "postgresql":
        kind = rng.choice(("double precision", "numeric"))
        sql(f"ALTER TABLE {SEALS} ALTER COLUMN sequence TYPE {kind}")
    if rng.randrange(2):
        rewrite_the_past(rng)
    sequence = last.sequence + rng.choice((0.25, 0.5))
    duplicate(AuditSeal, last.pk, id=last.pk + 10**6, sequence=sequence)
    return f"seal {last.sequence} copied as {sequence}"


def insert_a_second_event(rng: Random) -> str:
    (event,) = any_event(rng)
    loosen(AuditEvent)
    duplicate(AuditEvent, event.pk, sub="x", request_ids="a b c")
    return f"a second event inserted with the id {event.pk}"


def insert_a_second_seal(rng: Random) -> str:
    """Insert an event, and say of it that it came in late, by a seal beside another."""
    target = free_id(rng)
    told = insert_an_event(rng, target)
    (seal,) = any_seal(rng)
    loosen(AuditSeal)
    duplicate(AuditSeal, seal.pk, id=seal.pk + 10**6, late=str(target))
    return f"{told}, and a second seal {seal.sequence}"


def store_what_cannot_be_read(rng: Random) -> str:
    (row,) = rng.choice((any_event, any_seal))(rng)
    table = type(row)
    if connection.vendor == "postgresql":
        column = "time" if table is AuditEvent else rng.choice(("sealed_at", "pruned_at"))
        value = rng.choice(("infinity", "-infinity", "20000-01-01"))
        sql(f"UPDATE {table._meta.db_table} SET {column} = %s WHERE id = %s", value, row.pk)
    else:
        column = "sub" if table is AuditEvent else rng.choice(("root", "late", "anchors"))
        value = "CAST(x'7bff' AS TEXT)"
        sql("PRAGMA ignore_check_constraints = ON")  # of JSON
        sql(f"UPDATE {table._meta.db_table} SET {column} = {value} WHERE id = %s", row.pk)
        sql("PRAGMA ignore_check_constraints = OFF")
    return f"{column} of {table.__name__} {row.pk} to {value}"


#: What takes other columns than there are, so that not every database can undo it.
LOOSE: tuple[Callable[[Random], str], ...] = (
    insert_a_seal_between,
    insert_a_second_event,
    insert_a_second_seal,
    store_what_cannot_be_read,
)

MUTATIONS: tuple[Callable[[Random], str], ...] = (
    change_an_event,
    move_an_event,
    delete_events,
    delete_a_stretch,
    insert_an_event,
    swap_events,
    truncate_events,
    truncate_events_and_seals,
    change_a_seal,
    delete_seals,
    insert_a_seal,
    swap_seals,
    take_anchors_of_another_seal,
    rewrite_the_past,
    call_it_pruning,
    change_the_newest_anchors_and_seal,
    *(LOOSE if can_loosen() else ()),
)


def kept_elsewhere() -> list[tuple[int, str]]:
    """Return what `seal_kms_audit` printed of the last seal."""
    last = segments.newest()
    assert last is not None
    return [(last.sequence, canonical.seal_digest(last).hex())]
