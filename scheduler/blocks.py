"""Blocks: a part of rows is cut, ordered by length, encoded, and given its reuse keys. Pure.

A block is the unit of storage, sealing and reuse. What is stored of one: the values (``payload``), the order in
which work is done on its rows, and the UTF-8 length of every field's text, so that nothing needs the values to carve.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
import sys
from array import array
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from motet.media.medium import Medium
from motet.protocol.envelope import BadMessage, packed_plain, unwrap, wrap
from motet.protocol.values import (
    COLUMN_TYPES,
    Value,
    byte_lengths,
    column_type,
    is_text,
    plain_text,
)
from motet.protocol.wire import bytes_read, marks_between
from scheduler.policy.beginnings import side_by_side

#: Offset of a row -> (error class, message) of cells. A message never holds a user's text.
Bad = Mapping[int, tuple[str, str]]
#: Field -> the rows whose value there is none: error cells of the tasks that read it, and of no other.
BadFields = Mapping[str, Bad]


@dataclass(frozen=True, slots=True, kw_only=True)
class IncomingPart:
    """Rows as they came in, already checked: the same number of values in every column."""

    #: Field -> a value per row, "" where the row or its value is bad. Only fields that some task reads.
    columns: Mapping[str, Sequence[Value]]
    #: Rows that are none: error cells of every task.
    bad: Bad = field(default_factory=dict)
    bad_fields: BadFields = field(default_factory=dict)
    #: Of rows in the order of their texts: characters that each has in common with the one before it (policy/beginnings.py).
    #: (): rows are in no such order.
    alike: Sequence[int] = ()

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """What a block needs to know of a task to name its column's reuse key."""

    #: Names of the fields that its templates read.
    reads: tuple[str, ...]
    #: ``scheduler.policy.plan.task_digest``.
    digest: bytes
    #: The answers may be kept for another job.
    reusable: bool
    #: Tasks of the job whose answers it reads, each by name and number.
    needs: tuple[tuple[str, int], ...] = ()
    #: ``motet.tasks.condition_of`` where the task is conditional, else "".
    condition: str = ""

    @property
    def asks(self) -> tuple[str, ...]:
        """The fields that decide whether the task is asked a row. A row that is none of its own is not bad for it."""
        return (self.condition, *self.reads) if self.condition else self.reads


class Reads(NamedTuple):
    """What a pass reads of a row, as far as it decides what the pass costs."""

    #: How often it reads each field of its job, in their order; (): each once.
    times: tuple[int, ...] = ()
    #: UTF-8 bytes beside the fields: its templates' own, and other tasks' answers, about.
    beside: int = 0
    #: Tokens after which it cuts; 0: never.
    max_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedBlock:
    """One block, encoded, without its place in the job."""

    n_rows: int
    #: Rows that work is done on: all but those that no task can be asked.
    n_work: int
    #: UTF-8 bytes of all fields of all rows.
    text_bytes: int
    #: uint32 little-endian: offsets of the rows that work is done on, longest first, ties by row; rows that begin alike
    #: side by side.
    row_order: bytes
    #: uint32 little-endian: offsets of the rows at which groups begin that are never parted; None: nothing is known of any.
    groups: bytes | None
    #: uint32 little-endian: UTF-8 bytes, all rows of the first field, then the next.
    lengths: bytes
    payload: bytes
    bad: Bad
    bad_fields: BadFields
    #: Reuse key per task of the job; None where its column is not for reuse.
    keys: tuple[bytes | None, ...]
    #: Keyed digests of the media that its rows refer to, each once, sorted.
    media: tuple[bytes, ...] = ()

    @property
    def n_bad(self) -> int:
        """Rows of which something is bad."""
        marks = (bad for name, bad in self.bad_fields.items() if not is_condition(name))
        return len(set(self.bad).union(*marks))


def is_condition(field_name: str) -> bool:
    """A mark there says that a row is none of a task's, not that something is wrong with it (``motet.tasks``)."""
    return field_name.startswith("?")


def absent(bad: Bad, bad_fields: BadFields, reads: Sequence[str]) -> dict[int, tuple[str, str]]:
    """Offset -> why, of the rows that a task which reads these fields cannot be asked.

    A row that is none says so itself; else the first field in ``reads`` whose value is bad does.
    """
    found: dict[int, tuple[str, str]] = {}
    for name in reversed(reads):
        found.update(bad_fields.get(name, {}))
    found.update(bad)
    return found


def askable(order: Sequence[int], absents: Sequence[Collection[int]]) -> list[int]:
    """Of the rows in this order those that are not absent for every one of these tasks."""
    if not absents:
        return list(order)
    nobody = set(absents[0]).intersection(*absents[1:])
    return [i for i in order if i not in nobody]


def blocks_of(
    part: IncomingPart, readers: Sequence[Reader], *, secret: bytes, block_rows: int, block_bytes: int
) -> tuple[EncodedBlock, ...]:
    """Cut a part into blocks and encode them. The same part gives the same blocks, wherever it stands in a job.

    ``secret``: of the tenant, for its reuse keys.
    """
    lengths = {name: byte_lengths(values) for name, values in part.columns.items()}
    typed = frozenset(name for name, values in part.columns.items() if not is_text(values))
    totals = list(map(sum, zip(*lengths.values(), strict=True)))
    return tuple(
        _encode(part, typed, lengths, totals, lo, hi, readers, secret)
        for lo, hi in cut(totals, block_rows, block_bytes)
    )


def cut(sizes: Sequence[int], block_rows: int, block_bytes: int) -> Iterator[tuple[int, int]]:
    """[lo, hi) of consecutive blocks: as many rows as fit by rows and by bytes, at least one."""
    lo = held = 0
    for i, size in enumerate(sizes):
        if i > lo and (i - lo == block_rows or held + size > block_bytes):
            yield lo, i
            lo, held = i, 0
        held += size
    if sizes:
        yield lo, len(sizes)


def _encode(
    part: IncomingPart,
    typed: Collection[str],
    lengths: Mapping[str, Sequence[int]],
    totals: Sequence[int],
    lo: int,
    hi: int,
    readers: Sequence[Reader],
    secret: bytes,
) -> EncodedBlock:
    columns = {name: list(values[lo:hi]) for name, values in part.columns.items()}
    packed = {name: uint32_bytes(lengths[name][lo:hi]) for name in columns}
    bad = marks_between(part.bad, lo, hi)
    bad_fields = {name: here for name, of in part.bad_fields.items() if (here := marks_between(of, lo, hi))}
    absents = {asks: absent(bad, bad_fields, asks) for asks in {reader.asks for reader in readers}}
    sizes = totals[lo:hi]
    order, groups = _arranged(part.alike[lo:hi], sizes)
    order = askable(order, list(absents.values()) or [bad])
    digests: dict[tuple[str, ...], bytes] = {}
    for reader in readers:
        if reader.reusable and reader.asks not in digests:
            digests[reader.asks] = _fields_digest(columns, packed, absents[reader.asks], reader.reads)
    return EncodedBlock(
        n_rows=hi - lo,
        n_work=len(order),
        text_bytes=sum(sizes),
        row_order=uint32_bytes(order),
        groups=groups,
        lengths=b"".join(packed.values()),
        payload=_encode_columns(columns, typed),
        bad=bad,
        bad_fields=bad_fields,
        keys=tuple(k if k is None else keyed(secret, k) for k in _keys(readers, digests)),
        media=tuple(
            sorted({medium_key(secret, one.sha256) for name in typed for one in media_in(columns[name])})
        ),
    )


def _arranged(alike: Sequence[int], sizes: Sequence[int]) -> tuple[list[int], bytes | None]:
    """All rows of a block in the order of work, and ``EncodedBlock.groups``."""
    if any(alike):
        order, begins = side_by_side(alike, sizes)
        return order, uint32_bytes(begins) if len(begins) < len(order) else None
    # Stable even in reverse: rows of one length stay in row order.
    return sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True), None


def media_in(values: Sequence[Value]) -> Iterator[Medium]:
    """The media among the values of a column."""
    return (value for value in values if type(value) is Medium)


def upload_digest(secret: bytes, key: str) -> bytes:
    """Under which name an upload claims media: its Idempotency-Key may be a word of the user's own."""
    return keyed(secret, hashlib.sha256(key.encode()).digest())


def medium_key(secret: bytes, sha256: str) -> bytes:
    """The name under which a tenant's medium of this digest is stored."""
    return keyed(secret, bytes.fromhex(sha256))


def _keys(readers: Sequence[Reader], digests: Mapping[tuple[str, ...], bytes]) -> tuple[bytes | None, ...]:
    """The reuse key of each task. What reads an answer that is not for reuse is not for reuse either."""
    keys: dict[int, bytes | None] = {}

    def key(number: int) -> bytes | None:
        if number not in keys:
            reader = readers[number]
            upstream = {name: key(needed) for name, needed in reader.needs}
            known = {name: k for name, k in upstream.items() if k is not None}
            reusable = reader.reusable and len(known) == len(upstream)
            keys[number] = reuse_key(digests[reader.asks], reader.digest, known) if reusable else None
        return keys[number]

    return tuple(key(number) for number in range(len(readers)))


def keyed(secret: bytes, digest: bytes) -> bytes:
    """A digest of content as it is stored: without the tenant's secret nobody can try which text it belongs to."""
    return hmac.digest(secret, digest, "sha256")


def is_digest(secret: bytes, digest: bytes, stored: bytes) -> bool:
    """``stored`` is of this content. One without the key was stored by an API that was not upgraded yet."""
    return hmac.compare_digest(stored, keyed(secret, digest)) or hmac.compare_digest(stored, digest)


@dataclass(frozen=True, slots=True)
class StoredColumns:
    """The columns of a block, by offset in it."""

    values: Mapping[str, Sequence[Value]]
    #: Type of each column that is not text alone: one of motet.protocol.values.COLUMN_TYPES.
    types: Mapping[str, str]

    def texts(self) -> dict[str, Sequence[Any]]:
        """Each value as its text."""
        return {n: list(map(plain_text, v)) if n in self.types else v for n, v in self.values.items()}


#: Format of a block's payload, told where it is not 1: in that one, every column is text.
_FORMAT = 2


def _encode_columns(columns: Mapping[str, Sequence[Value]], typed: Collection[str]) -> bytes:
    """``typed``: the columns that may hold more than text."""
    types = {n: column_type(v) for n, v in columns.items() if n in typed and not is_text(v)}
    return wrap({"columns": columns, "v": _FORMAT, "types": types} if types else {"columns": columns})


def decode_block(payload: bytes) -> StoredColumns:
    """Raises motet.protocol.envelope.BadMessage where the bytes are no payload."""
    told = unwrap(payload)
    types = told.get("types", {})
    if told.get("v", 1) > _FORMAT or not COLUMN_TYPES.issuperset(types.values()):
        raise BadMessage("a block of a newer format")
    return StoredColumns(told["columns"], types)


def row_order(raw: bytes) -> array[int]:
    """Offsets of the rows that work is done on, in the order in which it is carved."""
    return uint32s(raw)


def read_in_order(order: bytes, lengths: bytes, n_rows: int, reads: Reads) -> list[int]:
    """Bytes that a pass reads of each row that work is done on, in the order in which it is carved."""
    per_field = uint32s(lengths)
    times = reads.times or (1,) * (len(per_field) // n_rows)
    columns = [
        (n, per_field[at * n_rows : (at + 1) * n_rows]) for at, n in enumerate(times) if n
    ]  # of the fields that it reads
    beside, most = reads.beside, reads.max_tokens
    if len(columns) == 1 and columns[0][0] == 1:
        ((_, only),) = columns
        return [bytes_read(beside + only[i], most) for i in row_order(order)]
    return [bytes_read(beside + sum(n * column[i] for n, column in columns), most) for i in row_order(order)]


def uint32s(raw: bytes) -> array[int]:
    """Little-endian bytes as numbers, whatever this machine's byte order."""
    numbers = array("I", raw)
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


def fields_digest(columns: Mapping[str, Sequence[Value]], bad: Bad, reads: Sequence[str]) -> bytes:
    """Sha256 of what a task that reads these fields can see of a block, and of why it sees nothing (``absent``).

    Every text is preceded by its length, so that no two blocks spell the same bytes. A column that is not text alone
    is marked, and digested as types and values: 1, 1.0, "1" and true differ.
    """
    packed = {name: uint32_bytes(byte_lengths(columns[name])) for name in reads}
    return _fields_digest(columns, packed, bad, reads)


#: Marks the length of a field's name in a digest where typed values follow, not texts.
_TYPED = 1 << 31


def _fields_digest(
    columns: Mapping[str, Sequence[Any]], packed: Mapping[str, bytes], bad: Bad, reads: Sequence[str]
) -> bytes:
    """As ``fields_digest``, where the byte lengths are known and packed already."""
    seen = hashlib.sha256(b"motet block 1\0")
    for name in sorted(reads):
        values = columns[name]
        raw = name.encode()
        try:
            whole = "".join(values)
        except TypeError:
            typed = packed_plain(values)
            seen.update(struct.pack("<II", len(raw) | _TYPED, len(typed)))
            seen.update(raw)
            seen.update(typed)
        else:
            seen.update(struct.pack("<II", len(raw), len(values)))
            seen.update(raw)
            seen.update(packed[name])
            seen.update(whole.encode())
    for offset in sorted(bad):
        for word in bad[offset]:
            raw = word.encode()
            seen.update(struct.pack("<II", offset, len(raw)))
            seen.update(raw)
    return seen.digest()


def reuse_key(fields: bytes, task: bytes, upstream: Mapping[str, bytes] | None = None) -> bytes:
    """The name of a column: of what was read, and of all that decides the answers.

    ``upstream``: name of a task whose answers are read -> their column's key.
    """
    seen = hashlib.sha256(fields + task)
    for name, key in sorted((upstream or {}).items()):
        raw = name.encode()
        seen.update(struct.pack("<I", len(raw)) + raw + key)
    return seen.digest()


def task_bits(numbers: Sequence[int]) -> int:
    """Task numbers (0 to 63) as the bit mask of ``block_pass.todo``: a signed 64-bit number.

    ``mask >> number & 1`` reads it in Python and in SQL, for number 63 too.
    """
    mask = sum(1 << n for n in set(numbers))
    return mask - (1 << 64) if mask >> 63 else mask


def uint32_bytes(numbers: Sequence[int]) -> bytes:
    """The opposite of ``uint32s``."""
    packed = array("I", numbers)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()
