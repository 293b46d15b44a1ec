"""Values keep their types from any source to a function, have one text everywhere, and are told apart in digests."""

from __future__ import annotations

import base64
import gzip
import json
import math
from collections.abc import Mapping
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from zoneinfo import ZoneInfo

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from motet.errors import InvalidJob
from motet.protocol.envelope import FORMAT, BadMessage, pack, unfolded_bytes, unpack, unwrap, wrap
from motet.protocol.manifest import Manifest
from motet.protocol.values import MAX_DEPTH, NoValue, Value, clean, column_type, plain_text
from motet.protocol.wire import Assignment, TaskOrder
from motet.rows import Part, cut, survey
from motet.sources import Source
from motet.tasks import Function
from motet.templates import render, sole_placeholder
from motet.upload import rows_of
from scheduler import payloads
from scheduler.api.rows import Incoming, read_columns, read_lines, read_rows
from scheduler.blocks import EncodedBlock, IncomingPart, Reader, blocks_of, decode_block, uint32s
from scheduler.store.leases import Leased
from workers.engine import Pass
from workers.engines.function import FunctionEngine

SECRET = b"k" * 32
ROW_BYTES = 256 * 1024
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
JSON_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS
)
ZONES = st.integers(-14 * 60, 14 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes)))
SCALARS = (
    JSON_SCALARS
    | st.decimals(allow_nan=False, allow_infinity=False)
    | st.dates()
    | st.datetimes()
    | st.datetimes(min_value=datetime(2, 1, 1), max_value=datetime(9998, 1, 1), timezones=ZONES)
    | st.times()
)


def nested(scalars: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.recursive(
        scalars,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
        max_leaves=6,
    )


VALUES = nested(SCALARS)
COLUMN = st.lists(VALUES, min_size=1, max_size=8)


def same(one: object, other: object) -> bool:
    """Equal, and of equal types all the way down: 1, 1.0 and True differ, and 0.0 and -0.0 do."""
    if type(one) is not type(other):
        return False
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    return repr(one) == repr(other) if isinstance(one, float | Decimal) else one == other


def arrive(part: Part) -> IncomingPart:
    """A part as the server reads what the client sends."""
    read = read_columns(msgpack.packb(unpack(part.encode()), default=_known), part.columns, ROW_BYTES)
    assert read.bad == {}
    return read.part()


def _known(value: Any) -> Any:
    from motet.protocol.envelope import packed_plain

    return msgpack.unpackb(packed_plain(value))


def block_of(part: IncomingPart, *readers: Reader) -> EncodedBlock:
    [block] = blocks_of(part, readers or (reader(),), secret=SECRET, block_rows=1024, block_bytes=1 << 20)
    return block


def reader(field: str = "age") -> Reader:
    return Reader(reads=(field,), digest=b"task", reusable=True)


def assignment_of(block: EncodedBlock, field: str = "age") -> Assignment:
    """What a worker reads of a block whose rows a function of one field answers, in the block's own order."""
    manifest = Manifest(name="f", version="1", engine="f", answers="json")
    order = TaskOrder(name="f", spec=Function("f", input=f"{{{field}}}").to_json(), manifest=manifest)
    stored = decode_block(block.payload)
    pass_ = payloads._Pass(
        payloads.payload_rows.StoredPass(
            kind="function f", numerics="fast", max_tokens=0, input=f"{{{field}}}", own_order=False, tenant="t",
            priority=1, model=manifest, tasks=(),
        ),
        ((0, order),),
    )  # fmt: skip
    typed = {name: stored.values[name] for name in stored.types}
    here = payloads._Block(stored.texts(), typed, range(block.n_rows), 0, False, "", 1)
    carved = SimpleNamespace(
        todo=1, ranges=[SimpleNamespace(block=0, lo=0, hi=block.n_rows)], exclusive=False
    )
    leased = SimpleNamespace(
        job="j",
        pass_number=0,
        carved=carved,
        subtask=1,
        attempt=1,
        nonce="n",
        predicted_s=0.0,
        measured=False,
    )
    made = payloads._assignment(cast(Leased, leased), pass_, {("j", 0): here}, {})
    assert made is not None
    return Assignment.decode(made.encode())


def called_with(order: Assignment) -> list[Any]:
    """What the function of a worker is given."""
    seen: list[Any] = []
    engine = FunctionEngine(lambda inputs: seen.extend(inputs) or [None] * len(inputs))
    pass_ = Pass(None, order.tasks, 0, values=order.values)
    rows = engine.prepare(pass_, order.texts)
    engine.run(pass_, cast(Any, rows))
    return seen


@settings(deadline=None)
@given(COLUMN)
def test_a_value_keeps_its_type_from_the_client_to_a_function_and_its_text_everywhere(
    column: list[Value],
) -> None:
    [part] = cut([{"age": value} for value in column], ["age"])
    assert all(map(same, part.columns["age"], column))
    arrived = arrive(part)
    assert all(map(same, arrived.columns["age"], column))
    block = block_of(arrived)
    assert all(map(same, decode_block(block.payload).values["age"], column))
    order = assignment_of(block)
    assert all(map(same, called_with(order), column))
    texts = [plain_text(value) for value in column]
    assert list(order.texts) == texts
    sampled = [row["age"] for row in json.loads(json.dumps(part.in_json()))]
    # A plan counts what a job will read, but for decimals inside objects, which JSON would round.
    assert all(
        plain_text(a) == b for a, b in zip(sampled, texts, strict=True) if not isinstance(a, list | dict)
    )
    assert list(uint32s(block.lengths)) == [len(text.encode()) for text in texts]
    assert part.text_bytes == block.text_bytes == sum(uint32s(block.lengths))
    assert [render("<{age}>", {"age": value}) for value in column] == [f"<{text}>" for text in texts]


@settings(deadline=None)
@given(st.lists(nested(JSON_SCALARS), min_size=1, max_size=8))
def test_json_says_the_same_as_python(column: list[Value]) -> None:
    rows = [{"age": value} for value in column]
    [part] = cut(rows, ["age"])
    assert part.is_json
    lines = "\n".join(map(json.dumps, rows)).encode()
    inline = json.loads(json.dumps(part.rows()))
    for read in (read_lines(lines, ("age",), ROW_BYTES), read_rows(inline, ("age",), ROW_BYTES)):
        assert (read.bad, read.bad_fields) == ({}, {})
        assert all(map(same, read.columns["age"], column))
        assert block_of(read.part()).keys == block_of(arrive(part)).keys


FILES = settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FILES
@given(column=st.lists(nested(JSON_SCALARS), min_size=1, max_size=8))
def test_json_lines_keep_types(tmp_path: Path, column: list[Value]) -> None:
    lines = "".join(json.dumps({"age": value}) + "\n" for value in column).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    for name in ("a.jsonl", "a.jsonl.gz"):
        [part] = cut(tmp_path / name, ["age"])
        assert all(map(same, part.columns["age"], column))


TABLES = st.one_of(
    *[
        st.lists(st.none() | one, min_size=1, max_size=8)
        for one in (
            st.booleans(),
            st.integers(-(2**63), 2**63 - 1),
            st.floats(allow_nan=False, allow_infinity=False),
            st.decimals(allow_nan=False, allow_infinity=False, places=2, min_value=-(10**9), max_value=10**9),
            st.dates(),
            st.datetimes(min_value=datetime(1700, 1, 1), max_value=datetime(2200, 1, 1)),
            st.times(),
            TEXTS,
            st.lists(st.integers(0, 9), max_size=3),
        )
    ]
)


@FILES
@given(column=TABLES)
def test_tables_keep_types(tmp_path: Path, column: list[Value]) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = arrow.table({"age": arrow.array(column)})
    parquet.write_table(table, tmp_path / "a.parquet")
    pandas = pytest.importorskip("pandas")
    sources: list[Source] = [table, tmp_path / "a.parquet", pandas.DataFrame({"age": column}, dtype=object)]
    for source in sources:
        [part] = cut(source, ["age"])
        assert all(map(same, part.columns["age"], column)), source
        assert all(map(same, called_with(assignment_of(block_of(arrive(part)))), column))


def test_pandas_and_numpy_values_become_plain_ones() -> None:
    pandas, numpy = pytest.importorskip("pandas"), pytest.importorskip("numpy")
    frame = pandas.DataFrame(
        {
            "were_ints": [1, None, 3],
            "floats": [1.0, 2.0, 3.0],
            "gaps": [1.5, None, 3.0],
            "nullable": pandas.array([1, None, 3], dtype="Int64"),
            "at": pandas.to_datetime(["2026-11-30 21:45:00.5", None, "2026-12-01 00:00:00.0"]),
            "zoned": pandas.to_datetime(["2026-11-30 21:45", None, None], utc=True),
            "kind": pandas.Categorical(["a", None, "b"]),
            "text": pandas.array(["x", None, "y"], dtype="string"),
            "flag": pandas.array([True, None, False], dtype="boolean"),
        }
    )
    [part] = cut(frame, list(frame.columns))
    at = datetime(2026, 11, 30, 21, 45)
    assert part.columns == {
        "were_ints": [1, None, 3],
        "floats": [1.0, 2.0, 3.0],
        "gaps": [1.5, None, 3.0],
        "nullable": [1, None, 3],
        "at": [at.replace(microsecond=500_000), None, datetime(2026, 12, 1)],
        "zoned": [at.replace(tzinfo=UTC), None, None],
        "kind": ["a", None, "b"],
        "text": ["x", None, "y"],
        "flag": [True, None, False],
    }
    told = part.in_json()
    assert [repr(row["were_ints"]) for row in told] == ["1", "None", "3"]
    assert [repr(row["floats"]) for row in told] == ["1.0", "2.0", "3.0"]
    assert told[0]["at"] == str(plain_text(part.columns["at"][0]))
    assert {type(value) for value in part.columns["at"]} == {datetime, type(None)}
    assert [type(value) for value in part.columns["were_ints"]] == [int, type(None), int]

    scalars: list[tuple[Any, Value]] = [
        (numpy.int8(-3), -3),
        (numpy.uint64(2**63 - 1), 2**63 - 1),
        (numpy.float64(0.5), 0.5),
        (numpy.float16(0.5), 0.5),
        (numpy.bool_(True), True),
        (numpy.str_("x"), "x"),
        (numpy.array([1, 2]), [1, 2]),
        (numpy.array([[1.5], [2.0]]), [[1.5], [2.0]]),
        (numpy.datetime64("2026-11-30"), date(2026, 11, 30)),
        (numpy.datetime64("2026-11-30T21:45:00", "ns"), at),
        (numpy.array(["2026-11-30T21:45", "NaT"], "M8[ns]"), [at, None]),
        (numpy.datetime64("NaT"), None),
        (pandas.NA, None),
        (pandas.NaT, None),
        ((1, "a"), [1, "a"]),
        (SubclassedDict(a=1), {"a": 1}),
    ]
    for value, plain in scalars:
        assert same(clean(value), plain), value


class SubclassedDict(dict[str, Any]):
    """An object of another class, as data sets and databases bring."""


def test_a_frame_whose_ints_became_floats_is_looked_at_as_a_whole() -> None:
    pandas = pytest.importorskip("pandas")
    [*parts] = cut(pandas.DataFrame({"age": [1.0] * 3000 + [1.5, None]}), ["age"])
    assert {type(value) for part in parts for value in part.columns["age"]} == {float, type(None)}


def test_csv_stays_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("age,on\n1,2026-11-30\n,\n")
    [part] = cut(tmp_path / "a.csv", ["age", "on"])
    assert part.columns == {"age": ["1", ""], "on": ["2026-11-30", ""]}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        (True, "true"),
        (1, "1"),
        (-(2**63), "-9223372036854775808"),
        (1.0, "1.0"),
        (0.1 + 0.2, "0.30000000000000004"),
        (1e300, "1e+300"),
        (Decimal("1.50"), "1.50"),
        (date(2026, 11, 30), "2026-11-30"),
        (datetime(2026, 11, 30, 21, 45, tzinfo=UTC), "2026-11-30T21:45:00+00:00"),
        (time(21, 45), "21:45:00"),
        ([], ""),
        (["a", 1, None, True, 2.5, date(2026, 1, 2)], "a, 1, null, true, 2.5, 2026-01-02"),
        ([["a"], {"b": 1}], '["a"], {"b":1}'),
        (
            {"b": Decimal("1.50"), "a": ["é", None, date(2026, 1, 2)], 'q"': 1.0},
            '{"b":1.50,"a":["é",null,"2026-01-02"],"q\\"":1.0}',
        ),
    ],
)
def test_the_text_of_a_value(value: Value, text: str) -> None:
    assert plain_text(value) == text
    assert render("{x}", {"x": value}) == render("{text}", {"text": value}) == text


@given(VALUES)
def test_an_objects_text_is_json(value: Value) -> None:
    told = json.loads(plain_text({"x": value}), parse_float=Decimal)
    assert list(told) == ["x"]


@given(VALUES, VALUES)
def test_digests_differ_where_type_or_value_differ(one: Value, other: Value) -> None:
    first, second = (block_of(IncomingPart(columns={"age": [value]})).keys for value in (one, other))
    assert (first == second) is (same(one, other) or same(unwrapped(one), unwrapped(other)))


def unwrapped(value: Value) -> Any:
    """A value as it comes back from its envelope: a time zone becomes its offset."""
    return unwrap(wrap(value))


def test_equal_texts_of_other_types_have_other_keys() -> None:
    alike: list[Value] = [
        1,
        "1",
        Decimal(1),
        1.0,
        "1.0",
        True,
        "true",
        None,
        "",
        [],
        [1],
        date(1, 1, 1),
        "0001-01-01",
    ]
    keys = {block_of(IncomingPart(columns={"age": [value]})).keys for value in alike}
    assert len(keys) == len(alike)


def test_one_tenants_keys_tell_nothing_about_anothers() -> None:
    part = IncomingPart(columns={"age": ["yes"]})
    [one] = blocks_of(part, (reader(),), secret=b"a" * 32, block_rows=9, block_bytes=99)
    [other] = blocks_of(part, (reader(),), secret=b"b" * 32, block_rows=9, block_bytes=99)
    assert one.keys != other.keys
    assert one.payload == other.payload


@given(st.lists(st.none() | TEXTS | st.integers(0, 9), min_size=2, max_size=8))
def test_a_block_of_texts_alone_has_the_key_that_it_has_in_any_part(column: list[Value]) -> None:
    whole = blocks_of(
        IncomingPart(columns={"age": column}), (reader(),), secret=SECRET, block_rows=1, block_bytes=999
    )
    alone = [block_of(IncomingPart(columns={"age": [value]})) for value in column]
    assert [b.keys for b in whole] == [b.keys for b in alone]
    assert [b.payload for b in whole] == [b.payload for b in alone]


BAD: list[tuple[Any, str]] = [
    (math.nan, "NaN"),
    (-math.inf, "infinite"),
    (Decimal("NaN"), "NaN"),
    (2**63, "64 bits"),
    (-(2**63) - 1, "64 bits"),
    (b"bytes", "bytes"),
    (bytearray(b"x"), "bytearray"),
    (1j, "complex"),
    (timedelta(1), "timedelta"),
    (object(), "object"),
    ({1: "a"}, "key is no text"),
    ({"a": "\0"}, "NUL"),
    (["\ud800"], "surrogate"),
    ({"\0": 1}, "NUL"),
    ([[math.nan]], "NaN"),
]


@pytest.mark.parametrize(("value", "words"), BAD, ids=[words for _, words in BAD])
def test_what_is_no_value_is_told_by_row_and_field_and_never_repeated(value: Any, words: str) -> None:
    rows = [{"age": 1, "text": "a"}, {"age": value, "text": "b"}]
    with pytest.raises(InvalidJob) as caught:
        list(cut(rows, ["text", "age"]))
    [problem] = caught.value.problems
    assert (problem.row, problem.field) == (1, "rows.age")
    assert words in problem.got
    [part] = cut(rows, ["text", "age"], bad_rows="error")
    assert {name: list(bad) for name, bad in part.bad_fields.items()} == {"age": [1]}
    assert part.columns == {"text": ["a", "b"], "age": [1, ""]}
    assert survey(rows, ["age"], bad_rows="error").sample == ({"age": 1},)
    piece = rows_of(part, 1, 2)
    assert (list(piece.bad_fields["age"]), piece.text_bytes) == ([0], 1)


def test_a_value_may_be_as_deep_as_json_may_be() -> None:
    deep: Any = "x"
    for _ in range(MAX_DEPTH):
        deep = [deep]
    assert same(clean(deep), deep)
    assert read_lines(json.dumps({"age": deep}).encode(), ("age",), ROW_BYTES).bad_fields == {}
    with pytest.raises(NoValue, match="deeper than 32"):
        clean([deep])
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(NoValue, match="deeper"):
        clean(endless)


def test_numpy_and_pandas_values_that_are_none_are_told() -> None:
    pandas, numpy = pytest.importorskip("pandas"), pytest.importorskip("numpy")
    for value, words in (
        (numpy.float32("nan"), "NaN"),
        (numpy.uint64(2**63), "64 bits"),
        (numpy.longdouble(1), "longdouble"),
        (numpy.timedelta64(1, "s"), "timedelta"),
        (numpy.datetime64("2026-11-30T00:00:00.000000001"), "nanoseconds"),
        (pandas.Timestamp("2026-11-30T00:00:00.000000001"), "nanoseconds"),
        (pandas.Timedelta(1), "Timedelta"),
        (numpy.bytes_(b"x"), "bytes"),
    ):
        with pytest.raises(NoValue, match=words):
            clean(value)


def test_a_long_list_is_as_long_as_its_text() -> None:
    with pytest.raises(InvalidJob, match="bytes a row"):
        list(cut([{"age": list(range(100_000))}], ["age"]))
    read = read_rows([{"age": list(range(100_000))}, {"age": [1]}], ("age",), ROW_BYTES)
    assert {name: list(bad) for name, bad in read.bad_fields.items()} == {"age": [0]}


def test_a_time_zone_travels_as_its_offset() -> None:
    at = datetime(2026, 7, 1, 12, tzinfo=ZoneInfo("Europe/Berlin"))
    [part] = cut([{"age": at}], ["age"])
    [told] = arrive(part).columns["age"]
    assert (told, plain_text(told)) == (at, "2026-07-01T12:00:00+02:00")


def test_a_part_of_texts_is_what_older_servers_read() -> None:
    [part] = cut([{"age": "1"}, {"age": "é"}], ["age"])
    assert msgpack.unpackb(part.encode(squeeze=False)) == {"columns": {"age": ["1", "é"]}, "first_row": 0}
    assert not cut_one({"age": Decimal(1)}).is_json
    assert not cut_one({"age": [date(2026, 1, 1)]}).is_json
    assert cut_one({"age": [1, None, {"a": 1.5}]}).is_json


def cut_one(row: Mapping[str, Any]) -> Part:
    [part] = cut([row], ["age"])
    return part


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["a"], "text"),
        (["a", None], "text"),
        ([None], "null"),
        ([1, None], "int"),
        ([True], "bool"),
        ([1, True], "mixed"),
        ([date(2026, 1, 1)], "date"),
        ([datetime(2026, 1, 1)], "datetime"),
        ([{}], "object"),
    ],
)
def test_a_block_says_the_type_of_a_column_that_is_not_text_alone(values: list[Value], kind: str) -> None:
    stored = decode_block(block_of(IncomingPart(columns={"age": values})).payload)
    assert stored.types == ({} if values == ["a"] else {"age": kind})
    assert column_type(values) == kind


#: Made by motet before values had types and envelopes were there (commit f9bfeec).
OLD_BLOCK = base64.b64decode("KLUv/SQpSQEAgadjb2x1bW5zgqV0aXRsZZKidDCiw6mkdGV4dJKjb25lp3R3byB0d2+dqb/v")
OLD_KEY = bytes.fromhex("34eaa9ce730bd5fa4ef31ce90e4bc6cf0ec890b12dab0b463fadb47b37f5a1ee")
OLD_CELLS = base64.b64decode(
    "KLUv/SRWsQIAgQCGpGtpbmSkanNvbqZzdGF0dXPEAgAApmFycmF5c4Knb2Zmc2V0c8QMAAAAAAMAAAAEAAAApWJ5dGVzxAQiYSIxpmVycm9yc4Cj"
    "ZGltAKVkdHlwZaAFM4f3"
)


def test_blocks_and_cells_of_before_are_read_and_name_the_columns_that_they_named() -> None:
    stored = decode_block(OLD_BLOCK)
    assert (stored.values, stored.types) == ({"title": ["t0", "é"], "text": ["one", "two two"]}, {})
    assert stored.texts() == stored.values
    assert unwrap(OLD_CELLS)[0]["arrays"]["bytes"] == b'"a"1'
    both = Reader(reads=("title", "text"), digest=b"task", reusable=True)
    [block] = blocks_of(
        IncomingPart(columns=stored.values), (both,), secret=SECRET, block_rows=9, block_bytes=999
    )
    import hmac

    assert block.keys == (hmac.digest(SECRET, OLD_KEY, "sha256"),), "as the migration keyed the stored one"
    assert len(block.payload) == len(OLD_BLOCK) + 2, "an envelope costs two bytes"


def test_an_envelope_of_another_format_or_with_a_key_is_refused() -> None:
    good = wrap({"a": ["x" * 100, date(2026, 1, 1)]})
    assert unwrap(good) == {"a": ["x" * 100, date(2026, 1, 1)]}
    assert unfolded_bytes(good) == unfolded_bytes(good[2:])
    for bad in (
        b"",
        b"\x01",
        good[:-1],
        bytes([FORMAT + 1, 0]) + good[2:],
        bytes([FORMAT, 4]) + good[2:],
        b"{}",
        wrap(msgpack.ExtType(9, b"")),
        pack(msgpack.ExtType(1, b"one")),
    ):
        with pytest.raises(BadMessage):
            unwrap(bad)
    with pytest.raises(BadMessage, match="newer format"):
        decode_block(wrap({"columns": {}, "v": 3, "types": {}}))
    with pytest.raises(BadMessage, match="newer format"):
        decode_block(wrap({"columns": {"a": [1]}, "v": 2, "types": {"a": "colour"}}))


def test_a_function_of_several_fields_or_of_texts_alone_reads_texts() -> None:
    assert sole_placeholder("{age}") == "age"
    assert [sole_placeholder(t) for t in ("{age} ", "{a}{b}", "{{age}}", "age")] == [None] * 4
    order = assignment_of(block_of(IncomingPart(columns={"age": ["a", "b"]})))
    assert (order.texts, order.values) == (("a", "b"), ())
    assert called_with(order) == ["a", "b"]


def test_incoming_rows_say_their_place_in_a_refusal() -> None:
    read: Incoming = read_rows([{"age": 1}, {"age": [math.inf]}, {"age": object()}], ("age",), ROW_BYTES)
    with pytest.raises(InvalidJob) as caught:
        read.refuse_bad_rows(7)
    assert [(p.row, p.field, p.got) for p in caught.value.problems] == [
        (8, "rows.age", "an infinite number"),
        (9, "rows.age", "a value of type object"),
    ]
