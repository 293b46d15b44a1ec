"""Blocks: a part of rows is cut, ordered by length, encoded, and given its reuse keys. Pure.

A block is the unit of storage, sealing and reuse. What is stored of one: the texts (``payload``), the order in
which work is done on its rows, and the UTF-8 length of every field, so that nothing needs the texts to carve.
"""

from __future__ import annotations

import hashlib
import struct
import sys
from array import array
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from motet.protocol.wire import bytes_read, pack, unpack

#: Offset of a row -> (error class, message) of cells. A message never holds a user's text.
Bad = Mapping[int, tuple[str, str]]
#: Field -> the rows whose value there is none: error cells of the tasks that read it, and of no other.
BadFields = Mapping[str, Bad]


@dataclass(frozen=True, slots=True, kw_only=True)
class IncomingPart:
    """Rows as they came in, already checked: the same number of texts in every column."""

    #: Field -> a text per row, "" where the row or its value is bad. Only fields that some task reads.
    columns: Mapping[str, Sequence[str]]
    #: Rows that are none: error cells of every task.
    bad: Bad = field(default_factory=dict)
    bad_fields: BadFields = field(default_factory=dict)

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
    #: uint32 little-endian: offsets of the rows that work is done on, longest first, ties by row.
    row_order: bytes
    #: uint32 little-endian: UTF-8 bytes, all rows of the first field, then the next.
    lengths: bytes
    payload: bytes
    bad: Bad
    bad_fields: BadFields
    #: Reuse key per task of the job; None where its column is not for reuse.
    keys: tuple[bytes | None, ...]

    @property
    def n_bad(self) -> int:
        """Rows of which something is bad."""
        return len(set(self.bad).union(*self.bad_fields.values()))


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
    part: IncomingPart, readers: Sequence[Reader], *, block_rows: int, block_bytes: int
) -> tuple[EncodedBlock, ...]:
    """Cut a part into blocks and encode them. The same part gives the same blocks, wherever it stands in a job."""
    lengths = {name: _byte_lengths(texts) for name, texts in part.columns.items()}
    totals = list(map(sum, zip(*lengths.values(), strict=True)))
    return tuple(
        _encode(part, lengths, totals, lo, hi, readers) for lo, hi in cut(totals, block_rows, block_bytes)
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
    lengths: Mapping[str, Sequence[int]],
    totals: Sequence[int],
    lo: int,
    hi: int,
    readers: Sequence[Reader],
) -> EncodedBlock:
    columns = {name: list(texts[lo:hi]) for name, texts in part.columns.items()}
    packed = {name: uint32_bytes(lengths[name][lo:hi]) for name in columns}
    bad = _between(part.bad, lo, hi)
    bad_fields = {name: here for name, of in part.bad_fields.items() if (here := _between(of, lo, hi))}
    absents = {reads: absent(bad, bad_fields, reads) for reads in {reader.reads for reader in readers}}
    sizes = totals[lo:hi]
    # Stable even in reverse: rows of one length stay in row order.
    order = sorted(
        askable(range(hi - lo), list(absents.values()) or [bad]), key=sizes.__getitem__, reverse=True
    )
    digests: dict[tuple[str, ...], bytes] = {}
    for reader in readers:
        if reader.reusable and reader.reads not in digests:
            digests[reader.reads] = _fields_digest(columns, packed, absents[reader.reads], reader.reads)
    return EncodedBlock(
        n_rows=hi - lo,
        n_work=len(order),
        text_bytes=sum(sizes),
        row_order=uint32_bytes(order),
        lengths=b"".join(packed.values()),
        payload=pack({"columns": columns}),
        bad=bad,
        bad_fields=bad_fields,
        keys=_keys(readers, digests),
    )


def _between(bad: Bad, lo: int, hi: int) -> dict[int, tuple[str, str]]:
    return {i - lo: why for i, why in bad.items() if lo <= i < hi}


def _keys(readers: Sequence[Reader], digests: Mapping[tuple[str, ...], bytes]) -> tuple[bytes | None, ...]:
    """The reuse key of each task. What reads an answer that is not for reuse is not for reuse either."""
    keys: dict[int, bytes | None] = {}

    def key(number: int) -> bytes | None:
        if number not in keys:
            reader = readers[number]
            upstream = {name: key(needed) for name, needed in reader.needs}
            known = {name: k for name, k in upstream.items() if k is not None}
            reusable = reader.reusable and len(known) == len(upstream)
            keys[number] = reuse_key(digests[reader.reads], reader.digest, known) if reusable else None
        return keys[number]

    return tuple(key(number) for number in range(len(readers)))


def decode_block(payload: bytes) -> dict[str, list[str]]:
    """Field -> texts by offset in the block. Raises motet.protocol.wire.BadMessage where the bytes are no payload."""
    columns: dict[str, list[str]] = unpack(payload)["columns"]
    return columns


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


def fields_digest(columns: Mapping[str, Sequence[str]], bad: Bad, reads: Sequence[str]) -> bytes:
    """Sha256 of what a template that reads these fields can see of a block, and of why it sees nothing (``absent``).

    Every text is preceded by its length, so that no two blocks spell the same bytes.
    """
    packed = {name: uint32_bytes(_byte_lengths(columns[name])) for name in reads}
    return _fields_digest(columns, packed, bad, reads)


def _fields_digest(
    columns: Mapping[str, Sequence[str]], packed: Mapping[str, bytes], bad: Bad, reads: Sequence[str]
) -> bytes:
    """As ``fields_digest``, where the byte lengths are known and packed already."""
    seen = hashlib.sha256(b"motet block 1\0")
    for name in sorted(reads):
        texts = columns[name]
        raw = name.encode()
        seen.update(struct.pack("<II", len(raw), len(texts)))
        seen.update(raw)
        seen.update(packed[name])
        seen.update("".join(texts).encode())
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


def _byte_lengths(texts: Sequence[str]) -> list[int]:
    # Most texts are ASCII, which each knows of itself: nothing is encoded to count its bytes.
    return [len(text) if text.isascii() else len(text.encode()) for text in texts]


def uint32_bytes(numbers: Sequence[int]) -> bytes:
    """The opposite of ``uint32s``."""
    packed = array("I", numbers)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()
