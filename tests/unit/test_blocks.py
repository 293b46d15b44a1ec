"""Blocks: what goes in comes out, cut and ordered as promised, and named by what it holds."""

from __future__ import annotations

import json
import math
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from motet.errors import InvalidJob
from motet.protocol.envelope import BadMessage
from motet.protocol.wire import by_offset, by_reason
from motet.templates import placeholders
from scheduler.api.rows import Incoming, read_columns, read_lines, read_rows
from scheduler.blocks import (
    EncodedBlock,
    IncomingPart,
    Reader,
    Reads,
    absent,
    askable,
    blocks_of,
    cut,
    decode_block,
    fields_digest,
    keyed,
    read_in_order,
    reuse_key,
    row_order,
    task_bits,
    uint32s,
)

TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40)
ROW_BYTES = 256 * 1024

#: Of a tenant.
SECRET = b"s" * 32


def reader(template: str = "{text}", digest: bytes = b"task", reusable: bool = True) -> Reader:
    return Reader(reads=placeholders(template), digest=digest, reusable=reusable)


def blocks(
    part: IncomingPart, *readers: Reader, rows: int = 1024, size: int = 1 << 20
) -> tuple[EncodedBlock, ...]:
    return blocks_of(part, readers or (reader(),), secret=SECRET, block_rows=rows, block_bytes=size)


@st.composite
def parts(draw: st.DrawFn) -> IncomingPart:
    n = draw(st.integers(1, 30))
    bad = draw(st.sets(st.integers(0, n - 1)))
    columns = {}
    for name in ("title", "text"):
        texts = draw(st.lists(TEXTS, min_size=n, max_size=n))
        columns[name] = ["" if i in bad else t for i, t in enumerate(texts)]
    return IncomingPart(columns=columns, bad={i: ("bad_row", f"why {i}") for i in bad})


@given(parts(), st.integers(1, 8), st.integers(1, 200))
def test_blocks_hold_every_row_once_and_in_order(part: IncomingPart, rows: int, size: int) -> None:
    made = blocks(part, rows=rows, size=size)
    texts = [decode_block(b.payload).values for b in made]
    for name, column in part.columns.items():
        assert [t for block in texts for t in block[name]] == list(column)
    start = 0
    for block in made:
        assert {start + i: why for i, why in block.bad.items()} == {
            i: why for i, why in part.bad.items() if start <= i < start + block.n_rows
        }
        start += block.n_rows
    assert start == len(part)


@given(parts(), st.integers(1, 8), st.integers(1, 200))
def test_work_is_ordered_longest_first_with_ties_by_row_and_without_bad_rows(
    part: IncomingPart, rows: int, size: int
) -> None:
    for block in blocks(part, rows=rows, size=size):
        lengths = uint32s(block.lengths)
        assert len(lengths) == 2 * block.n_rows
        texts = decode_block(block.payload).values
        assert list(lengths) == [len(t.encode()) for name in texts for t in texts[name]]
        total = [lengths[i] + lengths[i + block.n_rows] for i in range(block.n_rows)]
        order = list(row_order(block.row_order))
        assert order == sorted(set(range(block.n_rows)) - set(block.bad), key=lambda i: (-total[i], i))
        assert block.n_work == len(order)
        assert block.text_bytes == sum(total)


def test_a_pass_reads_of_a_row_the_fields_that_it_names_as_often_as_it_names_them() -> None:
    (block,) = blocks(
        IncomingPart(columns={"title": ["a", "bb"], "text": ["x" * 100, "ö" * 30], "note": ["", "n"]})
    )

    def read(*times: int, beside: int = 0, max_tokens: int = 0) -> list[int]:
        reads = Reads(times, beside, max_tokens)
        return read_in_order(block.row_order, block.lengths, block.n_rows, reads)

    assert list(row_order(block.row_order)) == [0, 1], "the order is that of all fields"
    assert read(1, 0, 0) == [1, 2]
    assert read(0, 1, 0) == [100, 60]
    assert read(2, 0, 1, beside=7) == [9, 12]
    assert read(0, 0, 0, beside=7) == [7, 7], "of answers alone"
    assert read(1, 1, 0, max_tokens=12) == [60, 60]
    assert read() == [101, 63], "as passes of before were priced"


@given(st.lists(st.integers(0, 50), max_size=60), st.integers(1, 10), st.integers(1, 100))
def test_a_cut_is_greedy_and_a_row_is_never_stuck(sizes: list[int], rows: int, size: int) -> None:
    cuts = list(cut(sizes, rows, size))
    assert [i for lo, hi in cuts for i in range(lo, hi)] == list(range(len(sizes)))
    for lo, hi in cuts:
        assert hi - lo <= rows
        assert sum(sizes[lo:hi]) <= size or hi - lo == 1
        # One row more would not have fitted.
        assert hi == len(sizes) or hi - lo == rows or sum(sizes[lo : hi + 1]) > size


def test_the_clients_part_is_one_block() -> None:
    (one,) = blocks(IncomingPart(columns={"text": ["x" * 1024] * 1024}))
    assert (one.n_rows, one.text_bytes) == (1024, 1 << 20)


@given(parts())
def test_the_same_rows_have_the_same_keys_wherever_they_stand(part: IncomingPart) -> None:
    once, again = blocks(part), blocks(part)
    assert once[0].keys == again[0].keys
    doubled = IncomingPart(
        columns={name: [*texts, *texts] for name, texts in part.columns.items()},
        bad={**part.bad, **{i + len(part): why for i, why in part.bad.items()}},
    )
    first, second = blocks(doubled, rows=len(part))
    assert first.keys == second.keys == once[0].keys


def test_a_key_depends_on_the_fields_that_are_read_and_on_no_other() -> None:
    titled = reader("{title}")
    both = reader("{title} {text}")
    one = blocks(IncomingPart(columns={"title": ["a"], "text": ["x"]}), titled, both)[0]
    other = blocks(IncomingPart(columns={"title": ["a"], "text": ["y"]}), titled, both)[0]
    assert one.keys[0] == other.keys[0]
    assert one.keys[1] != other.keys[1]


def test_a_key_depends_on_the_task_and_is_none_where_nothing_may_be_reused() -> None:
    part = IncomingPart(columns={"text": ["a"]})
    (block,) = blocks(part, reader(digest=b"a"), reader(digest=b"b"), reader(reusable=False))
    first, second, third = block.keys
    assert first != second
    assert third is None
    assert first == keyed(SECRET, reuse_key(fields_digest(part.columns, {}, ("text",)), b"a"))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (IncomingPart(columns={"text": ["ab", "c"]}), IncomingPart(columns={"text": ["a", "bc"]})),
        (IncomingPart(columns={"text": ["", "a"]}), IncomingPart(columns={"text": ["a", ""]})),
        (
            IncomingPart(columns={"text": [""]}),
            IncomingPart(columns={"text": [""]}, bad={0: ("bad_row", "gone")}),
        ),
        (
            IncomingPart(columns={"text": [""]}, bad={0: ("bad_row", "a")}),
            IncomingPart(columns={"text": [""]}, bad={0: ("bad_row", "b")}),
        ),
    ],
)
def test_blocks_that_differ_have_different_keys(one: IncomingPart, other: IncomingPart) -> None:
    assert blocks(one)[0].keys != blocks(other)[0].keys


def test_a_block_of_bad_rows_alone_has_no_work() -> None:
    (block,) = blocks(
        IncomingPart(columns={"text": ["", ""]}, bad={0: ("bad_row", "a"), 1: ("bad_row", "b")})
    )
    assert (block.n_rows, block.n_work, block.row_order) == (2, 0, b"")


def test_a_torn_payload_is_told_and_not_guessed_at() -> None:
    (block,) = blocks(IncomingPart(columns={"text": ["hello"]}))
    with pytest.raises(BadMessage):
        decode_block(block.payload[:-3])


@given(st.sets(st.integers(0, 63)))
def test_task_bits_fit_a_signed_column_and_are_read_alike(numbers: set[int]) -> None:
    mask = task_bits(sorted(numbers))
    assert -(2**63) <= mask < 2**63
    assert {n for n in range(64) if mask >> n & 1} == numbers


# -- rows on their way in


def as_columns(rows: list[str], **more: Any) -> Incoming:
    raw = msgpack.packb({"columns": {"text": rows}, **more}, unicode_errors="surrogatepass")
    return read_columns(raw, ("text",), ROW_BYTES)


@given(st.lists(TEXTS, min_size=1, max_size=20))
def test_columns_lines_and_inline_rows_are_three_ways_to_say_the_same(texts: list[str]) -> None:
    lines = "\n".join(json.dumps({"text": t, "id": i}) for i, t in enumerate(texts)).encode()
    strings = "\n".join(json.dumps(t, ensure_ascii=False) for t in texts).encode()
    inline = read_rows([{"text": t} for t in texts], ("text",), ROW_BYTES)
    for other in (
        as_columns(texts),
        read_lines(lines, ("text",), ROW_BYTES),
        read_lines(strings, ("text",), ROW_BYTES),
    ):
        assert other.bad == inline.bad == {}
        assert dict(other.columns) == dict(inline.columns) == {"text": texts}


BROKEN_LINES = [
    (b'{"text": ["x", NaN]}', "text", "NaN"),
    (b'{"text": {"a": {"b": 1, "b": 2}}}', "text", "stands twice"),
    (b'{"text": ' + b"[" * 33 + b"]" * 33 + b"}", "text", "deeper than 32"),
    (b'{"text": NaN}', "text", "NaN"),
    (b'{"text": 9223372036854775808}', "text", "64 bits"),
    (b'{"title": "x"}', "text", "no such field"),
    (b'{"text": "a\\u0000b"}', "text", "NUL"),
    (b'{"text": "\\ud800"}', "text", "surrogate"),
    (b'{"text": "x", "n": ' + b"[" * 100_000, "", "line 2"),
    (b'{"text": "a", "text": "b"}', "text", "twice"),
    (b'{"text": "x"', "", "broken JSON"),
    (b"12", "", "a number"),
    (b"[]", "", "a list"),
    (b'{"text": "\xff"}', "", "not UTF-8"),
    (b'{"text": "' + b"x" * (ROW_BYTES + 1) + b'"}', "text", "262,145 bytes"),
    (b'{"text": "x", "more": "' + b"x" * (8 * ROW_BYTES) + b'"}', "", "bytes in line 2"),
]


@pytest.mark.parametrize(("line", "field", "words"), BROKEN_LINES, ids=[w for _, _, w in BROKEN_LINES])
def test_a_broken_line_is_one_bad_row_among_good_ones(line: bytes, field: str, words: str) -> None:
    found = read_lines(b'{"text": "before"}\n' + line + b'\n\n"after"\n', ("text",), ROW_BYTES)
    bad = found.bad_fields["text"] if field else found.bad
    assert set(bad) == {1}
    assert found.bad_fields.keys() == ({field} if field else set())
    assert bad[1].field == field
    assert words in bad[1].got
    assert found.columns["text"] == ["before", "", "after"]
    with pytest.raises(InvalidJob) as caught:
        found.refuse_bad_rows(1000)
    assert [p.row for p in caught.value.problems] == [1001]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (2**63, "64 bits"),
        (float("-inf"), "infinite"),
        ({"a": [float("nan")]}, "NaN"),
        (msgpack.ExtType(1, b"1,5"), "no decimal"),
        (msgpack.ExtType(9, b""), "extension"),
        (float("nan"), "NaN"),
        (b"raw", "bytes"),
        ("a\0b", "NUL"),
        ("\udfff", "surrogate"),
        ("é" * (ROW_BYTES // 2 + 1), "262,146 bytes"),
    ],
)
def test_columns_and_lines_find_the_same_values_bad(value: Any, words: str) -> None:
    found = as_columns(["before", value, "after"])
    assert set(found.bad_fields["text"]) == {1}
    assert found.bad == {}
    assert words in found.bad_fields["text"][1].got
    assert found.columns["text"] == ["before", "", "after"]


def test_a_bad_row_never_repeats_the_text() -> None:
    found = as_columns(["secret \0 text", "secret \ud800 text", "secret" * 100_000])
    marks = found.bad_fields["text"].values()
    assert len(marks) == 3
    assert all("secret" not in f"{why} {why.message} {why.at(0)}" for why in marks)


def test_a_field_name_that_cannot_be_stored_is_not_stored_with_its_row() -> None:
    lines = b'{"a\\u0000b": "x"}\n{"\\ud800": NaN, "text": "x"}\n{"\\u0000": 1, "\\u0000": 2}'
    found = read_lines(lines, ("text",), ROW_BYTES)
    marks = found.bad_fields["text"]
    assert (list(marks), found.columns["text"]) == ([0, 2], ["", "x", ""])
    for why in marks.values():
        assert "\0" not in why.message
        why.message.encode()


def test_rows_that_the_sender_found_bad_keep_its_words() -> None:
    found = as_columns(["a", "", "c"], bad={1: ["bad_row", "broken JSON"]})
    assert (found.part().bad, found.part().bad_fields) == ({1: ("bad_row", "broken JSON")}, {})
    marks = {"text": [["bad_row", "text: got null; expected text", [1, 3]], ["bad_row", "mine", [2]]]}
    found = as_columns(["a", None, "", None, "b"], bad_fields=marks)
    why = ("bad_row", "text: got null; expected text")
    assert found.part().bad_fields == {"text": {1: why, 3: why, 2: ("bad_row", "mine")}}
    assert (found.bad, found.columns) == ({}, {"text": ["a", "", "", "", "b"]})
    assert as_columns(["a"], bad_fields={"body": [["bad_row", "x", [0]]]}).bad_fields == {}, "nobody reads it"


@pytest.mark.parametrize(
    "bad",
    [
        {7: ["bad_row", "x"]},
        {-1: ["bad_row", "x"]},
        {0: ["BAD ROW", "x"]},
        {0: ["bad_row", "\0"]},
        {0: "x"},
        [0],
        {"0": ["bad_row", "x"]},
    ],
)
def test_marks_of_bad_rows_that_are_none_are_refused(bad: Any) -> None:
    with pytest.raises(InvalidJob):
        as_columns(["a", "b"], bad=bad)


@pytest.mark.parametrize(
    "marks",
    [
        [],
        {"text": {0: ["bad_row", "x"]}},
        {"text": ["bad_row", "x", [0]]},
        {"text": [["bad_row", "x"]]},
        {"text": [["bad_row", "x", 0]]},
        {"text": [["bad_row", "x", [2]]]},
        {"text": [["bad_row", "x", [-1]]]},
        {"text": [["bad_row", "x", [True]]]},
        {"text": [["BAD ROW", "x", [0]]]},
        {"text": [["bad_row", "\0", [0]]]},
        {"text": [["bad_row", "x" * 501, [0]]]},
        {"text": [[7, "x", [0]]]},
    ],
)
def test_marks_of_bad_fields_that_are_none_are_refused(marks: Any) -> None:
    with pytest.raises(InvalidJob):
        as_columns(["a", "b"], bad_fields=marks)


def read_two(rows: list[Any]) -> Incoming:
    return read_rows(rows, ("title", "body"), ROW_BYTES)


def test_a_bad_field_leaves_the_others_of_its_row() -> None:
    rows = [
        {"title": math.inf, "body": "b0", "n": math.nan},
        {"title": "t1"},
        {"title": "t2", "body": "b2\0"},
        {"title": 2**64, "body": ["\0"]},
        {"title": "t4", "body": "b4"},
        7,
    ]
    found = read_two(rows)
    assert found.columns == {"title": ["", "t1", "t2", "", "t4", ""], "body": ["b0", "", "", "", "b4", ""]}
    assert {name: sorted(bad) for name, bad in found.bad_fields.items()} == {
        "title": [0, 3],
        "body": [1, 2, 3],
    }
    assert sorted(found.bad) == [5]
    with pytest.raises(InvalidJob) as caught:
        found.refuse_bad_rows(100)
    assert [(p.row, p.field) for p in caught.value.problems] == [
        (100, "rows.title"),
        (101, "rows.body"),
        (102, "rows.body"),
        (103, "rows.title"),
        (103, "rows.body"),
        (105, "rows"),
    ]
    columns = msgpack.packb({"columns": {"title": ["t0", b""]}})
    missing = read_columns(columns, ("title", "body"), ROW_BYTES)
    assert {name: sorted(bad) for name, bad in missing.bad_fields.items()} == {"title": [1], "body": [0, 1]}
    assert (missing.bad, missing.columns["title"]) == ({}, ["t0", ""])


def test_of_a_row_that_is_too_long_only_as_much_is_bad_as_makes_it_so() -> None:
    found = read_two(
        [
            {"title": "t", "body": "x" * (ROW_BYTES + 1)},
            {"title": "x" * (ROW_BYTES // 2), "body": "x" * (ROW_BYTES // 2 + 1)},
            {"title": "x" * (ROW_BYTES + 1), "body": "x" * (ROW_BYTES + 2)},
        ]
    )
    assert {name: sorted(bad) for name, bad in found.bad_fields.items()} == {"title": [2], "body": [0, 1, 2]}
    assert found.bad_fields["body"][1].got == "131,073 bytes of 262,145 in the row"
    assert found.columns["title"][:2] == ["t", "x" * (ROW_BYTES // 2)]


FIELDS = {"title": ("title",), "body": ("body",), "both": ("title", "body"), "none": ()}


@st.composite
def partly_bad(draw: st.DrawFn) -> IncomingPart:
    """Parts of two fields, some of their values and some of their rows bad."""
    whole = draw(parts())
    columns, marks = {}, {}
    for name, texts in whole.columns.items():
        gone = draw(st.sets(st.integers(0, len(whole) - 1))) - whole.bad.keys()
        columns[{"text": "body"}.get(name, name)] = ["" if i in gone else t for i, t in enumerate(texts)]
        marks[{"text": "body"}.get(name, name)] = {i: ("bad_row", f"{name} {i % 3}") for i in gone}
    return IncomingPart(
        columns=columns, bad=whole.bad, bad_fields={name: bad for name, bad in marks.items() if bad}
    )


@given(partly_bad(), st.integers(1, 8))
def test_work_is_done_on_rows_that_some_task_can_be_asked(part: IncomingPart, rows: int) -> None:
    readers = [Reader(reads=FIELDS[name], digest=b"", reusable=True) for name in ("title", "body")]
    start = 0
    for block in blocks(part, *readers, rows=rows):
        able = {
            i
            for i in range(block.n_rows)
            if start + i not in part.bad
            and not all(start + i in part.bad_fields.get(name, {}) for name in ("title", "body"))
        }
        assert set(row_order(block.row_order)) == able
        for reader in readers:
            gone = absent(block.bad, block.bad_fields, reader.reads)
            assert askable(range(block.n_rows), [gone]) == [i for i in range(block.n_rows) if i not in gone]
        assert block.n_bad == sum(
            1
            for i in range(start, start + block.n_rows)
            if i in part.bad or any(i in b for b in part.bad_fields.values())
        )
        start += block.n_rows
    assert start == len(part)


def test_a_row_that_is_none_says_so_itself_and_else_the_first_field_that_is_bad() -> None:
    bad = {0: ("bad_row", "row")}
    fields = {
        "a": {1: ("bad_row", "a")},
        "b": {0: ("bad_row", "b"), 1: ("bad_row", "b"), 2: ("bad_row", "b")},
    }
    assert absent(bad, fields, ("a", "b")) == {
        0: ("bad_row", "row"),
        1: ("bad_row", "a"),
        2: ("bad_row", "b"),
    }
    assert absent(bad, fields, ("b", "a"))[1] == ("bad_row", "b")
    assert absent(bad, fields, ()) == bad


def test_a_bad_field_is_in_the_keys_of_the_tasks_that_read_it_and_in_no_other() -> None:
    def keys(**more: Any) -> dict[str, bytes | None]:
        columns = {"title": ["t", "", "u"], "body": ["b", "c", "d"]}
        readers = [Reader(reads=reads, digest=b"task", reusable=True) for reads in FIELDS.values()]
        (block,) = blocks(IncomingPart(columns=columns, **more), *readers)
        return dict(zip(FIELDS, block.keys, strict=True))

    empty = keys()
    null = keys(bad_fields={"title": {1: ("bad_row", "null")}})
    other = keys(bad_fields={"title": {1: ("bad_row", "NaN")}})
    for name in ("title", "both"):
        assert len({empty[name], null[name], other[name]}) == 3, "null is no empty text"
    for name in ("body", "none"):
        assert empty[name] == null[name] == other[name]
    # What a job whose rows were bad as a whole has computed stays of use.
    whole = keys(bad={1: ("bad_row", "null")})
    assert whole["title"] == null["title"]
    assert whole["body"] != empty["body"]


@given(
    st.dictionaries(st.integers(0, 2000), st.tuples(st.sampled_from("ab"), st.text(max_size=2)), max_size=50)
)
def test_reasons_travel_once_and_come_back(marks: dict[int, tuple[str, str]]) -> None:
    packed = by_reason(marks)
    assert len(packed) == len(set(marks.values()))
    assert by_offset(msgpack.unpackb(msgpack.packb(packed))) == marks


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        b"not msgpack at all",
        msgpack.packb([]),
        msgpack.packb({}),
        msgpack.packb({"columns": {}}),
        msgpack.packb({"columns": {"text": []}}),
        msgpack.packb({"columns": {"text": "abc"}}),
        msgpack.packb({"columns": {"text": ["a"], "title": ["a", "b"]}}),
        msgpack.packb({"columns": {"text": ["a"]}, "first_row": -1}),
        msgpack.packb({"columns": {"text": ["a"]}, "first_row": "0"}),
        msgpack.packb({"columns": {"text": [[] for _ in range(1_000_001)]}}),
    ],
)
def test_a_body_of_no_known_form_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidJob):
        read_columns(body, ("text",), ROW_BYTES)


@given(st.binary(max_size=300))
def test_no_bytes_provoke_anything_but_a_refusal(raw: bytes) -> None:
    for read in (read_columns, read_lines):
        try:
            found = read(raw, ("text",), ROW_BYTES)
        except InvalidJob:
            continue
        blocks(found.part())
