"""Messages: they survive the wire, and a torn or forged one is only ever BadMessage."""

from __future__ import annotations

import struct
import tracemalloc
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from motet.protocol.columns import ERROR, TRUNCATED, CellError, Column, values
from motet.protocol.envelope import (
    MAX_DECODED_BYTES,
    BadMessage,
    pack,
    unfolded_bytes,
    unpack,
    unwrap,
    zstd,
)
from motet.protocol.manifest import Manifest
from motet.protocol.wire import (
    PROTOCOL,
    Assignment,
    Beat,
    Control,
    Outcome,
    Running,
    TaskOrder,
    Usage,
    bytes_read,
)
from motet.tasks import KINDS

MODEL = Manifest(name="m", version="1", engine="encoder", answers="label", labels=("a", "b"), trunk="t")
COLUMN = Column(
    kind="label",
    status=bytes([0, ERROR, TRUNCATED]),
    arrays={"codes": struct.pack("<3h", 1, 0, 0), "scores": struct.pack("<3f", 0.5, 0, 0.25)},
    errors={1: CellError("too_long", "600 tokens")},
)
#: What tasks can say to a worker, as of this protocol. An older worker passes over an option that it does not know, and
#: answers all the same: whoever adds one here raises PROTOCOL, unless no engine reads it.
PROTOCOL_OF_OPTIONS = 3
OPTIONS = {
    "about", "artefact", "calibrate", "conditional", "documents", "dtype", "features", "first", "input", "inputs",
    "labels", "max_tokens", "messages", "min_score", "model", "normalize", "numbers", "numerics", "options", "otherwise",
    "params", "prompt", "query", "question", "raw", "schema", "scores", "seed", "stop", "system", "temperature", "thinking", "too_long", "when",
}  # fmt: skip
MESSAGES = [
    Assignment(
        subtask=1,
        attempt=2,
        nonce="n",
        job="j",
        tenant="t",
        pass_kind="encoder m",
        model=MODEL,
        numerics="fast",
        max_tokens=256,
        tasks=(TaskOrder(name="topic", spec={"kind": "classify"}, manifest=MODEL),),
        texts=("one", "zwei 💡"),
        predicted_s=0.5,
        measured=True,
    ),
    Outcome(
        subtask=1,
        attempt=2,
        nonce="n",
        worker="w",
        boot="b",
        verdict="done",
        columns={"topic": COLUMN},
        usage=Usage(tokens=9, computed_tokens=12, busy_s=0.5, format="bf16", squares=45),
    ),
    Outcome(
        subtask=1,
        attempt=2,
        nonce="n",
        worker="w",
        boot="b",
        verdict="failed",
        error=("cannot_load", "x"),
        refused="digest",
    ),
    Beat(
        worker="w", boot="b", seq=3, held=((1, 2),), resident=("d",), engines=("encoder",), formats=("bf16",)
    ),
    Control(epoch=4, drop=((1, 2),), drain=True),
    Running(boot="b", rows={(1, 2): (3, 4)}),
]


@pytest.mark.parametrize(
    ("size", "max_tokens", "read"), [(100, 256, 100), (9000, 256, 1280), (9000, 0, 9000)]
)
def test_what_is_cut_off_is_no_work(size: int, max_tokens: int, read: int) -> None:
    assert bytes_read(size, max_tokens) == read


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_a_message_survives_the_wire(message: Assignment | Outcome | Beat | Control | Running) -> None:
    assert type(message).decode(message.encode()) == message


@pytest.mark.parametrize("kind", [Assignment, Outcome, Beat, Control, Running])
@given(raw=st.binary(max_size=200))
def test_garbage_is_a_bad_message_and_nothing_worse(kind: type[Assignment], raw: bytes) -> None:
    for body in (raw, pack({"v": 1}), pack({"v": 2}), pack(list(raw))):
        with pytest.raises(BadMessage):
            kind.decode(body)


@pytest.mark.parametrize("message", MESSAGES[:3], ids=lambda m: type(m).__name__)
def test_a_torn_message_is_a_bad_message(message: Assignment | Outcome) -> None:
    raw = message.encode()
    for length in range(0, len(raw) - 1, 7):
        with pytest.raises(BadMessage):
            type(message).decode(raw[:length])


def test_a_worker_that_counts_no_squares_is_read_and_one_that_counts_more_than_we_know_too() -> None:
    message = MESSAGES[1]
    wire = unwrap(message.encode())
    counted = wire["usage"]
    assert Outcome.decode(pack(wire | {"usage": counted[:7]})).usage.squares == 0
    assert Outcome.decode(pack(wire | {"usage": [*counted, "later"]})) == message


@pytest.mark.parametrize("squares", [-1, 1 << 60, float("nan"), "many"])
def test_squares_that_no_attempt_can_have_are_a_bad_message(squares: object) -> None:
    wire = unwrap(MESSAGES[1].encode())
    wire["usage"][7] = squares
    with pytest.raises(BadMessage):
        Outcome.decode(pack(wire))


def test_another_version_of_the_protocol_is_refused_by_name() -> None:
    with pytest.raises(BadMessage, match="protocol 99"):
        Outcome.decode(pack({"v": 99}))


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "labelz"},
        {"status": b"\x07\0\0"},
        {"arrays": {"codes": b"\0\0", "scores": bytes(12)}},
        {"arrays": {"codes": bytes(6), "scores": bytes(12), "extra": b""}},
        {"arrays": {"codes": bytes(6), "scores": bytes(12), "all": bytes(5)}},
        {"errors": {9: ["x", "y", False]}},
        {"kind": "labels"},
        {
            "kind": "labels",
            "arrays": {"offsets": struct.pack("<4i", 0, 2, 1, 2), "codes": bytes(4), "scores": bytes(8)},
        },
        {"kind": "vector", "arrays": {"vectors": bytes(5)}, "dim": 2, "dtype": "fp32"},
        # Nothing where a row is ok.
        {"kind": "vector", "arrays": {"vectors": b""}, "dim": 2, "dtype": "fp32"},
    ],
)
def test_a_column_whose_lengths_disagree_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="column"):
        Column.from_wire(COLUMN.to_wire() | change)


def test_values_are_in_row_order_and_none_where_a_row_has_no_answer() -> None:
    assert list(values(COLUMN, MODEL.labels)) == [("b", 0.5), None, ("a", 0.25)]


def test_what_would_fill_the_memory_is_refused_before_it_is_unfolded() -> None:
    bomb = pack(bytes(MAX_DECODED_BYTES + 1))
    assert len(bomb) < 100_000
    tracemalloc.start()
    with pytest.raises(BadMessage, match="claims"):
        unpack(bomb)
    with pytest.raises(BadMessage):
        unpack(zstd.compress(b"\xdd\x7f\xff\xff\xff" * 500, 1))
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()
    assert unfolded_bytes(bomb) == len(bomb), "it will not be"
    assert unfolded_bytes(pack(bytes(5_000_000))) > 5_000_000
    assert unfolded_bytes(b"garbage") == 7


def test_an_option_that_an_older_worker_would_pass_over_is_a_new_protocol() -> None:
    assert {f.name for kind in KINDS.values() for f in fields(kind)} == OPTIONS
    assert PROTOCOL == PROTOCOL_OF_OPTIONS
