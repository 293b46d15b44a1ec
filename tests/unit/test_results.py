"""Rows and cells as a user reads them, and the same rows as Arrow, pandas, Parquet, JSON lines and CSV."""

from __future__ import annotations

import csv
import io
import json
import struct
from array import array
from collections.abc import Iterator
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest

from motet import export
from motet.protocol.columns import ERROR, OK, SKIPPED, TRUNCATED, CellError, Column
from motet.protocol.envelope import BadMessage, pack
from motet.results import Block, Row, Span, read_frames
from motet.rows import whole_rows

LABELS = ("sport", "tech")
ERRORS = {2: CellError("too_long", "600 tokens; the model reads 256")}
STATUS = bytes([OK, OK | TRUNCATED, ERROR])

TASKS: dict[str, dict[str, Any]] = {
    "topic": {"labels": LABELS},
    "sure": {"labels": LABELS, "scores": True},
    "tone": {"labels": ("glad", "sad", "loud")},
    "stars": {},
    "vector": {},
    "short": {},
    "names": {"labels": ("PER", "ORG")},
    "made": {},
    "summary": {"kind": "generate", "schema": None},
    "form": {"kind": "generate", "schema": {"type": "object"}},
}


def ints(*values: int) -> bytes:
    return array("i", values).tobytes()


def codes(*values: int) -> bytes:
    return array("h", values).tobytes()


def floats(*values: float) -> bytes:
    return array("f", values).tobytes()


#: What a language model wrote, as it is stored: a text that ended, and one that "length" has cut.
STOPPED = '{"text": "Zwölf Zeilen,\\nkurz", "finish": "stop"}'.encode()
CUT = b'{"text": "=1+1 and", "finish": "length"}'

COLUMNS = {
    "topic": Column(
        kind="label",
        status=STATUS,
        errors=ERRORS,
        arrays={"codes": codes(0, 1, 0), "scores": floats(0.75, 0.5, 0)},
    ),
    "sure": Column(
        kind="label",
        status=STATUS,
        errors=ERRORS,
        arrays={
            "codes": codes(1, 0, 0),
            "scores": floats(0.75, 0.5, 0),
            "all": floats(0.25, 0.75, 0.5, 0.25, 0, 0),
        },
    ),
    "tone": Column(
        kind="labels",
        status=STATUS,
        errors=ERRORS,
        arrays={"offsets": ints(0, 2, 2, 2), "codes": codes(0, 2), "scores": floats(0.5, 0.75)},
    ),
    "stars": Column(
        kind="number", status=STATUS, errors=ERRORS, arrays={"numbers": struct.pack("<3d", 4.5, -1, 0)}
    ),
    "vector": Column(
        kind="vector",
        status=STATUS,
        errors=ERRORS,
        dim=2,
        dtype="fp32",
        arrays={"vectors": floats(0.1, 2, 3, 4, 0, 0)},
    ),
    "short": Column(
        kind="vector",
        status=STATUS,
        errors=ERRORS,
        dim=2,
        dtype="fp16",
        arrays={"vectors": struct.pack("<6e", 0.1, 2, 3, 4, 0, 0)},
    ),
    "names": Column(
        kind="spans",
        status=STATUS,
        errors=ERRORS,
        arrays={
            "offsets": ints(0, 1, 1, 1),
            "starts": ints(3),
            "ends": ints(7),
            "codes": codes(1),
            "scores": floats(0.5),
        },
    ),
    "made": Column(
        kind="json",
        status=STATUS,
        errors=ERRORS,
        arrays={"offsets": ints(0, 8, 14, 14), "bytes": b'{"a": 1}"=1+1"'},
    ),
    "summary": Column(
        kind="json",
        status=STATUS,
        errors=ERRORS,
        arrays={
            "offsets": ints(0, len(STOPPED), len(STOPPED + CUT), len(STOPPED + CUT)),
            "bytes": STOPPED + CUT,
        },
    ),
    "form": Column(
        kind="json",
        status=STATUS,
        errors=ERRORS,
        arrays={"offsets": ints(0, 15, 17, 17), "bytes": b'{"text": "not"}[]'},
    ),
}


COLUMN_TYPES = {name: {"kind": c.kind, "dim": c.dim, "dtype": c.dtype} for name, c in COLUMNS.items()}


def block(
    columns: dict[str, Column] | None = None, *, first_row: int = 10, tasks: dict[str, Any] | None = None
) -> Block:
    columns = COLUMNS if columns is None else columns
    rows = len(next(iter(columns.values())))
    wire = {name: column.to_wire() for name, column in columns.items()}
    frame = {"block": 0, "first_row": first_row, "rows": rows, "done": 1, "columns": wire}
    return Block.from_wire(frame, TASKS if tasks is None else tasks)


def specs(*blocks: Block) -> dict[str, dict[str, Any]]:
    names = next((block.answers for block in blocks), TASKS)
    return {name: {**TASKS[name], "column": COLUMN_TYPES[name]} for name in names}


@pytest.fixture
def rows() -> list[Row]:
    return list(block())


# -- cells


def test_a_cell_is_its_label(rows: list[Row]) -> None:
    topic = rows[0]["topic"]
    assert (str(topic), topic.value, topic.label, topic.score, topic.labels) == (
        "sport",
        "sport",
        "sport",
        0.75,
        ("sport",),
    )
    assert topic == "sport"
    assert topic != "tech"
    assert topic in {"sport"}
    assert {"sport": 1}[topic] == 1  # type: ignore[index]
    assert f"{topic:>8}|" == "   sport|"
    assert topic.scores is None


def test_every_kind_of_answer_has_its_plain_value(rows: list[Row]) -> None:
    row = rows[0]
    assert row["sure"].scores == {"sport": 0.25, "tech": 0.75}
    assert (row["sure"].value, row["sure"].score) == ("tech", 0.75)
    assert row["tone"].value == [("glad", 0.5), ("loud", 0.75)]
    assert (row["tone"].labels, row["tone"].label, row["tone"].score) == (("glad", "loud"), "loud", 0.75)
    assert str(row["tone"]) == "glad, loud"
    assert float(row["stars"]) == row["stars"].value == 4.5
    assert row["stars"] == 4.5
    assert f"{row['stars']:.2f}" == "4.50"
    assert row["vector"].value == row["vector"].vector == pytest.approx([0.1, 2.0])
    assert row["short"].vector == pytest.approx([0.1, 2.0], rel=1e-3)
    assert str(row["short"]) == "<2 × fp16>"
    assert row["names"].value == [Span(3, 7, "ORG", 0.5)]
    assert row["names"].value == [(3, 7, "ORG", 0.5)]
    assert str(row["names"]) == "ORG[3:7]"
    assert row["made"].value == {"a": 1}


def test_a_written_text_is_its_value_and_says_how_it_ended(rows: list[Row]) -> None:
    first, second, third = (row["summary"] for row in rows)
    assert (str(first), first.value, first.finish, first.kind) == (
        "Zwölf Zeilen,\nkurz",
        "Zwölf Zeilen,\nkurz",
        "stop",
        "json",
    )
    assert first == "Zwölf Zeilen,\nkurz"
    assert f"{second:<10}|" == "=1+1 and  |"
    assert (second.finish, second.truncated) == ("length", True)
    assert (third.value, third.finish, str(third)) == (None, None, "<error: too_long>")
    assert rows[0]["topic"].finish is None


def test_an_answer_under_a_schema_is_its_json_even_where_it_looks_like_a_text(rows: list[Row]) -> None:
    form = rows[0]["form"]
    assert (form.value, str(form), form.finish) == ({"text": "not"}, '{"text": "not"}', None)


def test_labels_that_the_task_brings_are_those_of_its_cells() -> None:
    chosen = block(
        {"mood": COLUMNS["sure"]},
        tasks={"mood": {"kind": "choose", "labels": ["glad", "sad"], "scores": True}},
    )
    first, second, _ = (row["mood"] for row in chosen)
    assert (str(first), first.score, second.label) == ("sad", 0.75, "glad")
    assert first.scores == {"glad": 0.25, "sad": 0.75}


def test_a_multi_label_answer_may_be_empty(rows: list[Row]) -> None:
    tone = rows[1]["tone"]
    assert (tone.ok, tone.value, tone.labels, tone.label, tone.score, str(tone)) == (
        True,
        [],
        (),
        None,
        None,
        "",
    )


def test_a_cut_input_is_marked_and_still_answered(rows: list[Row]) -> None:
    assert [row["topic"].truncated for row in rows] == [False, True, False]
    assert rows[1]["topic"].ok


@pytest.mark.parametrize("task", list(TASKS))
def test_a_cell_without_an_answer_says_why_and_never_raises(rows: list[Row], task: str) -> None:
    cell = rows[2][task]
    assert (cell.status, cell.ok, cell.value, cell.label, cell.labels) == ("error", False, None, None, ())
    assert (cell.score, cell.scores, cell.vector) == (None, None, None)
    assert cell.error == ERRORS[2]
    assert str(cell) == "<error: too_long>"
    assert cell != "sport"
    assert cell is not None
    assert cell == rows[2][task]
    assert hash(cell) == hash(None)
    with pytest.raises(TypeError):
        float(cell)
    with pytest.raises(TypeError):
        cell.numpy()


def test_a_skipped_cell_tells_its_reason() -> None:
    column = Column(
        kind="number",
        status=bytes([SKIPPED, SKIPPED]),
        arrays={"numbers": bytes(16)},
        errors={0: CellError("upstream", "topic is an error")},
    )
    first, second = block({"stars": column})
    assert (first["stars"].status, str(first["stars"])) == ("skipped", "<skipped: upstream>")
    assert first.errors["stars"].message == "topic is an error"
    assert (second.errors["stars"].error, str(second["stars"])) == ("skipped", "<skipped>")


def test_a_vector_as_an_array_shares_the_memory_of_its_block(rows: list[Row]) -> None:
    numpy = pytest.importorskip("numpy")
    vector = rows[1]["short"].numpy()
    assert (vector.dtype, vector.tolist()) == (numpy.float16, [3.0, 4.0])
    assert not vector.flags.writeable
    assert rows[0]["vector"].numpy().dtype == numpy.float32


# -- rows


def test_a_row_is_a_mapping_of_tasks_in_the_jobs_order(rows: list[Row]) -> None:
    row = rows[0]
    assert (row.index, list(row), len(row)) == (10, list(TASKS), 10)
    assert "topic" in row
    assert "mood" not in row
    assert dict(row)["topic"] == "sport"
    assert row.ok
    assert row.errors == {}
    assert set(rows[2].errors) == set(TASKS)
    with pytest.raises(KeyError, match="there are topic, sure"):
        row["mood"]


def test_columns_are_decoded_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []
    real = Column.__len__

    def spy(column: Column, labels: Any = ()) -> Iterator[Any]:
        decoded.append(column.kind)
        return iter([("sport", 0.5)] * real(column))

    monkeypatch.setattr("motet.results.values", spy)
    first, second, _ = block()
    assert decoded == []
    assert (str(first["topic"]), str(second["topic"])) == ("sport", "sport")
    assert first["vector"].vector
    assert decoded == ["label"]


# -- frames


def framed(*frames: Any) -> bytes:
    return b"".join(struct.pack(">I", len(p)) + p for p in map(pack, frames))


def test_frames_are_read_until_their_end() -> None:
    assert list(read_frames(framed({"a": 1}, {"end": True}))) == [{"a": 1}, {"end": True}]


@pytest.mark.parametrize("cut", [1, 3, 5, -1])
def test_a_torn_stream_is_never_taken_for_a_whole_one(cut: int) -> None:
    whole = framed({"a": 1})
    with pytest.raises(BadMessage):
        list(read_frames(whole[:cut]))


def test_a_column_of_another_length_than_its_block_is_refused() -> None:
    frame = {
        "block": 0,
        "first_row": 0,
        "rows": 2,
        "done": 1,
        "columns": {"topic": COLUMNS["topic"].to_wire()},
    }
    with pytest.raises(ValueError, match="length"):
        Block.from_wire(frame, TASKS)


# -- exports


def test_an_arrow_table_holds_every_kind_of_answer() -> None:
    arrow = pytest.importorskip("pyarrow")
    table = export.to_arrow([block(), block(first_row=13)], specs())
    assert table.num_rows == 6
    assert table.column_names == [
        "row",
        "topic",
        "topic_score",
        "sure",
        "sure_score",
        "sure_scores",
        "tone",
        "tone_score",
        "stars",
        "vector",
        "short",
        "names",
        "made",
        "summary",
        "summary_finish",
        "form",
        "errors",
        "truncated",
    ]
    assert table.schema.field("vector").type == arrow.list_(arrow.float32(), 2)
    assert table.schema.field("short").type == arrow.list_(arrow.float16(), 2)
    table.validate(full=True)
    first, second, third = table.slice(3).to_pylist()
    assert first["row"] == 13
    assert (first["topic"], first["topic_score"]) == ("sport", 0.75)
    assert first["sure_scores"] == {"sport": 0.25, "tech": 0.75}
    assert (first["tone"], first["tone_score"]) == (["glad", "loud"], [0.5, 0.75])
    assert (second["tone"], second["stars"], second["vector"]) == ([], -1.0, [3.0, 4.0])
    assert first["names"] == [{"start": 3, "end": 7, "label": "ORG", "score": 0.5}]
    assert (first["made"], first["form"]) == ('{"a": 1}', '{"text": "not"}')
    assert (first["summary"], first["summary_finish"]) == ("Zwölf Zeilen,\nkurz", "stop")
    assert (second["summary"], second["summary_finish"]) == ("=1+1 and", "length")
    assert (third["summary"], third["summary_finish"]) == (None, None)
    assert (first["errors"], first["truncated"], second["truncated"][0]) == (None, None, "topic")
    assert all(third[name] is None for name in table.column_names if name not in ("row", "errors"))
    assert third["errors"][0] == {"task": "topic", "error": "too_long", "message": ERRORS[2].message}


def test_a_data_frame_is_indexed_by_row() -> None:
    pytest.importorskip("pandas")
    frame = export.to_pandas([block()], specs())
    assert list(frame.index) == [10, 11, 12]
    assert frame.topic.tolist()[:2] == ["sport", "tech"]
    assert frame.loc[11, "vector"].tolist() == [3.0, 4.0]


def test_a_parquet_file_holds_the_same_as_the_table(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    given = [block(first_row=3 * i) for i in range(70)]
    assert export.to_parquet(given, specs(), tmp_path / "a.parquet") == 210
    assert parquet.read_table(tmp_path / "a.parquet").equals(
        export.to_arrow(given, specs()).unify_dictionaries()
    )
    assert [p.name for p in tmp_path.iterdir()] == ["a.parquet"]


def test_a_block_of_nothing_but_errors_takes_its_type_from_the_task(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    lost = Column(kind="vector", status=bytes([ERROR]), arrays={"vectors": b""}, dim=2, dtype="fp32")
    found = Column(kind="vector", status=bytes([OK]), arrays={"vectors": floats(1, 2)}, dim=2, dtype="fp32")
    for given in ([lost, found], [found, lost], [lost] * 70 + [found], [found] * 70 + [lost], [lost]):
        blocks = [block({"vector": c}, first_row=i) for i, c in enumerate(given)]
        assert export.to_parquet(blocks, specs(*blocks), tmp_path / "a.parquet") == len(given)
        assert str(export.to_arrow(blocks, specs(*blocks)).schema.field("vector").type).startswith(
            "fixed_size_list"
        )
        read = parquet.read_table(tmp_path / "a.parquet")["vector"].to_pylist()
        assert read == [None if c is lost else [1.0, 2.0] for c in given]


def test_a_job_without_rows_is_an_empty_table(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    assert export.to_arrow([], specs()).num_rows == 0
    assert export.to_parquet([], specs(), tmp_path / "a.parquet") == 0
    assert export.to_jsonl([], tmp_path / "a.jsonl") == 0
    assert export.to_csv([], tmp_path / "a.csv") == 0


def test_json_lines_hold_the_same_names(tmp_path: Path) -> None:
    assert export.to_jsonl([block()], tmp_path / "a.jsonl") == 3
    first, second, third = map(json.loads, (tmp_path / "a.jsonl").read_text("utf-8").splitlines())
    assert (first["row"], first["topic"], first["topic_score"]) == (10, "sport", 0.75)
    assert first["sure_scores"] == {"sport": 0.25, "tech": 0.75}
    assert (first["tone"], first["tone_score"]) == (["glad", "loud"], [0.5, 0.75])
    assert (first["vector"], first["short"]) == ([0.100000001, 2.0], [0.099976, 2.0])
    assert first["names"] == [{"start": 3, "end": 7, "label": "ORG", "score": 0.5}]
    assert (first["made"], first["form"]) == ({"a": 1}, {"text": "not"})
    assert (first["summary"], first["summary_finish"]) == ("Zwölf Zeilen,\nkurz", "stop")
    assert "form_finish" not in first
    assert (third["summary"], third["summary_finish"]) == (None, None)
    assert "errors" not in first
    assert second["truncated"] == list(TASKS)
    assert third["topic"] is None
    assert third["errors"]["topic"] == {"error": "too_long", "message": ERRORS[2].message}


@pytest.mark.parametrize(("code", "digits"), [("f", 9), ("e", 5)])
def test_vectors_in_json_come_back_as_the_same_numbers(code: str, digits: int) -> None:
    raw = b"".join(struct.pack(f"<{code}", x / 7919) for x in range(1, 200))
    size = len(raw) // 199
    column = Column(
        kind="vector",
        status=bytes(199),
        arrays={"vectors": raw},
        dim=1,
        dtype="fp32" if code == "f" else "fp16",
    )
    written = [json.loads(line)["vector"][0] for line in export.json_lines(block({"vector": column}))]
    assert b"".join(struct.pack(f"<{code}", x) for x in written) == raw
    assert size in (2, 4)


def test_csv_is_a_table_in_which_no_text_is_a_formula(tmp_path: Path) -> None:
    assert export.to_csv([block()], tmp_path / "a.csv") == 3
    first, second, third = csv.DictReader(io.StringIO((tmp_path / "a.csv").read_text("utf-8")))
    assert (first["row"], first["topic"], first["topic_score"]) == ("10", "sport", "0.75")
    assert second["stars"] == "-1.0"
    assert second["made"] == "'=1+1"
    assert (second["summary"], second["summary_finish"]) == ("'=1+1 and", "length")
    assert first["summary"] == "Zwölf Zeilen,\nkurz"
    assert json.loads(first["tone"]) == ["glad", "loud"]
    assert third["topic"] == ""
    assert third["errors"].startswith("topic: too_long")


@pytest.mark.parametrize("text", ["two\nlines", "carriage\rreturn", "both\r\n", "\n"])
def test_an_answer_of_several_lines_is_one_field_of_a_csv(tmp_path: Path, text: str) -> None:
    said = [json.dumps(one).encode() for one in ("first", text, "last")]
    ends = [0, *accumulate(map(len, said))]
    column = Column(kind="json", status=bytes(3), arrays={"offsets": ints(*ends), "bytes": b"".join(said)})
    export.to_csv([block({"made": column})], tmp_path / "a.csv")
    assert [row["made"] for row, _ in whole_rows(tmp_path / "a.csv")] == ["first", text, "last"]


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@a", "\t=1", "\r=1"])
def test_any_text_that_could_be_a_formula_is_quoted(text: str) -> None:
    assert export._field(text) == "'" + text


def test_names_that_would_meet_are_kept_apart() -> None:
    columns = {"row": COLUMNS["stars"], "topic": COLUMNS["topic"], "topic_score": COLUMNS["stars"]}
    tasks = {"row": {}, "topic": {"labels": LABELS}, "topic_score": {}}
    names = export.column_names(block(columns, tasks=tasks).answers)
    assert names == {"row": ("row_",), "topic": ("topic", "topic_score_"), "topic_score": ("topic_score",)}
    [first, *_] = export.json_lines(block(columns, tasks=tasks))
    assert json.loads(first) == {
        "row": 10,
        "row_": 4.5,
        "topic": "sport",
        "topic_score_": 0.75,
        "topic_score": 4.5,
    }


def test_a_file_appears_when_it_is_whole_or_not_at_all(tmp_path: Path) -> None:
    def breaks() -> Iterator[Block]:
        yield block()
        raise RuntimeError("gone")

    (tmp_path / "a.jsonl").write_text("before")
    for write in (export.to_jsonl, export.to_csv, partial(export.to_parquet, specs=specs())):
        with pytest.raises(RuntimeError):
            write(breaks(), path=tmp_path / "a.jsonl")
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]
    assert (tmp_path / "a.jsonl").read_text() == "before"


def test_a_device_is_written_not_replaced() -> None:
    assert export.to_jsonl([block()], "/dev/null") == 3
    assert Path("/dev/null").is_char_device()
