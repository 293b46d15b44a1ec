"""A job's rows as Arrow, pandas, Parquet, JSON lines or CSV; column by column where the format allows it.

All formats name their columns alike. For a task ``t``:

    t          label | list of labels | number | vector | list of spans | text | JSON text
    t_score    Classify, Choose: the score of the label, or a list of them beside the labels
    t_scores   Classify, Choose with scores=True: every label's score
    t_finish   Generate, Chat: how the text ended, ``stop`` or ``length``; always there, so that a file's columns
               do not hang on its rows

and beside them ``row``, ``errors`` (task, error, message of cells without an answer) and ``truncated`` (tasks
whose input was cut). A name that is taken already gets a ``_`` behind it. A cell without an answer is null.
In JSON lines a JSON answer stands as a value, elsewhere as its text.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from motet.errors import SetupError
from motet.protocol.columns import OK, STATE_MASK, TRUNCATED, typed
from motet.protocol.values import json_value
from motet.results import Answers, Block, Cell, Row

if TYPE_CHECKING:
    import pandas
    import pyarrow

#: Characters with which a spreadsheet begins a formula, or that it drops before one.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
#: How a text ends.
_FINISHES = ("stop", "length")
#: Blocks of a Parquet row group, and so of what is in memory: small groups make a large file slow to read.
_GROUP_BLOCKS = 64


#: Task -> its spec, as the job has it.
Specs = Mapping[str, Mapping[str, Any]]


def to_arrow(blocks: Iterable[Block], specs: Specs) -> pyarrow.Table:
    """The rows of ``blocks`` as one table, in memory; ``specs`` are the job's tasks. Raises SetupError without pyarrow."""
    schema = _schema(specs)
    return _arrow().Table.from_batches(map(_batch, blocks), schema)


def to_pandas(blocks: Iterable[Block], specs: Specs) -> pandas.DataFrame:
    """The rows as a DataFrame indexed by ``row``. Raises SetupError without pandas or pyarrow."""
    if importlib.util.find_spec("pandas") is None:
        raise SetupError("a DataFrame needs pandas; pip install 'motet[arrow]'")
    return to_arrow(blocks, specs).to_pandas().set_index("row")


def to_parquet(blocks: Iterable[Block], specs: Specs, path: str | os.PathLike[str]) -> int:
    """Write the rows as Parquet, a few blocks at a time; return how many. Raises SetupError without pyarrow."""
    pa = _arrow()
    import pyarrow.parquet

    rows, batches, schema = 0, map(_batch, blocks), _schema(specs)
    with _whole(path) as file:
        with pyarrow.parquet.ParquetWriter(file, schema, compression="zstd") as writer:
            while group := list(islice(batches, _GROUP_BLOCKS)):
                table = pa.Table.from_batches(group, schema)
                writer.write_table(table, row_group_size=_GROUP_BLOCKS * 1024)
                rows += int(table.num_rows)
        return rows


def to_jsonl(blocks: Iterable[Block], path: str | os.PathLike[str]) -> int:
    """Write a JSON object per row; return how many."""
    with _whole(path) as file:
        return _put(file, json_lines(chain.from_iterable(blocks)))


def to_csv(blocks: Iterable[Block], path: str | os.PathLike[str]) -> int:
    """Write a table for spreadsheets; return how many rows."""
    with _whole(path) as file:
        return max(0, _put(file, csv_lines(chain.from_iterable(blocks))) - 1)


def json_lines(rows: Iterable[Row]) -> Iterator[str]:
    """A line of JSON for each row, with the names of this module; cells without an answer stand in ``errors``."""
    for row in rows:
        yield json.dumps(json_row(row), ensure_ascii=False)


def json_row(row: Row) -> dict[str, Any]:
    """One row as plain data that JSON can hold."""
    record: dict[str, Any] = {"row": row.index}
    names = column_names(row)
    for task, cell in row.items():
        record.update(zip(names[task], _json_values(cell), strict=False))
    if state := row.state:
        record["state"] = {name: json_value(value) for name, value in state.items()}
    if errors := row.errors:
        record["errors"] = {task: {"error": e.error, "message": e.message} for task, e in errors.items()}
    if truncated := [task for task, cell in row.items() if cell.truncated]:
        record["truncated"] = truncated
    return record


def csv_lines(rows: Iterable[Row]) -> Iterator[str]:
    """The lines of a CSV table, its header first; lists and spans are JSON inside a field.

    Text that a spreadsheet would take for a formula gets a ``'`` before it.
    """
    line = _Line()
    # Until Python 3.13 only the characters of the line end, and not every newline, bring a field into quotes.
    writer = csv.writer(line, lineterminator="\r\n")
    header: list[str] | None = None
    for row in rows:
        if header is None:
            header = ["row", *chain.from_iterable(column_names(row).values()), "errors", "truncated"]
            writer.writerow(header)
            yield line.text.removesuffix("\r\n")
        record = json_row(row)
        record["errors"] = "; ".join(f"{task}: {e['error']}" for task, e in record.get("errors", {}).items())
        record["truncated"] = "; ".join(record.get("truncated", ()))
        writer.writerow([_field(record.get(name)) for name in header])
        yield line.text.removesuffix("\r\n")


def column_names(columns: Mapping[str, Cell] | Mapping[str, Answers]) -> dict[str, tuple[str, ...]]:
    """Task -> the names of its columns, as the head of this module says."""
    taken = {"row", "errors", "truncated"}
    names: dict[str, tuple[str, ...]] = {}
    # Tasks' own names first, so that a task "topic_score" keeps its name beside a task "topic".
    plain = {task: _free(task, taken) for task in columns}
    for task, column in columns.items():
        answers = column if isinstance(column, Answers) else column.answers
        extra = []
        if answers.kind in ("label", "labels"):
            extra = ["_score", "_scores"] if answers.every else ["_score"]
        elif answers.written:
            extra = ["_finish"]
        names[task] = (plain[task], *(_free(task + suffix, taken) for suffix in extra))
    return names


def _free(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    taken.add(name)
    return name


# -- rows as plain data


def _json_values(cell: Cell) -> tuple[Any, ...]:
    """The values of a cell's columns, in the order of their names."""
    value = cell.value
    match cell.kind:
        case "label":
            return value, _rounded(cell.score), _rounded_all(cell.scores)
        case "labels":
            pairs = value or []
            scores = [_rounded(score) for _, score in pairs]
            return (list(cell.labels), scores, _rounded_all(cell.scores)) if cell.ok else (None, None, None)
        case "vector" if value is not None:
            # As many digits as bring the same number back.
            digits = 5 if cell.answers.column.dtype == "fp16" else 9
            return ([float(f"{x:.{digits}g}") for x in value],)
        case "spans" if value is not None:
            return ([{**span._asdict(), "score": _rounded(span.score)} for span in value],)
        case _:
            return (value, cell.finish)


def _rounded(score: float | None) -> float | None:
    return None if score is None else round(score, 6)


def _rounded_all(scores: Mapping[str, float] | None) -> dict[str, float] | None:
    return None if scores is None else {label: round(score, 6) for label, score in scores.items()}


def _field(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float):
        return value
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return "'" + text if text.startswith(_FORMULA) else text


class _Line:
    """A file of one line, for the csv module to write to."""

    text = ""

    def write(self, text: str) -> None:
        self.text = text


# -- columns as Arrow arrays, from the bytes they came in


def _schema(specs: Specs) -> Any:
    """The columns of the job's tables, which follow from its tasks: what became of the rows is no matter."""
    return _batch(Block.empty(specs)).schema


def _batch(block: Block) -> pyarrow.RecordBatch:
    pa = _arrow()
    arrays: dict[str, Any] = {
        "row": pa.array(range(block.first_row, block.first_row + block.rows), pa.int64())
    }
    names = column_names(block.answers)
    for task, answers in block.answers.items():
        arrays.update(zip(names[task], _arrow_arrays(answers), strict=True))
    why = pa.struct([("task", pa.string()), ("error", pa.string()), ("message", pa.string())])
    arrays["errors"] = pa.array(_sparse(block, _errors(block)), pa.list_(why))
    arrays["truncated"] = pa.array(_sparse(block, _truncated(block)), pa.list_(pa.string()))
    return pa.record_batch(arrays)


def _arrow_arrays(answers: Answers) -> list[Any]:
    """The arrays of a task's columns. Little-endian bytes are Arrow's own layout, so most are not copied."""
    pa = _arrow()
    column, n = answers.column, len(answers.column)
    ok = pa.array([status & STATE_MASK == OK for status in column.status], pa.bool_())
    validity = None if ok.true_count == n else ok.buffers()[1]

    def flat(kind: Any, name: str, length: int, valid: Any = None) -> Any:
        return pa.Array.from_buffers(kind, length, [valid, pa.py_buffer(column.arrays[name])])

    def lists(items: Any) -> Any:
        offsets = pa.py_buffer(column.arrays["offsets"])
        kind = pa.list_(items.type)
        return pa.Array.from_buffers(kind, n, [validity, offsets], children=[items])

    def labels_of(length: int, valid: Any = None) -> Any:
        codes = flat(pa.int16(), "codes", length, valid)
        return pa.DictionaryArray.from_arrays(codes, pa.array(list(answers.labels), pa.string()))

    if answers.chosen:
        return _chosen_arrays(answers)
    match column.kind:
        case "label":
            arrays = [labels_of(n, validity), flat(pa.float32(), "scores", n, validity)]
        case "labels":
            length = typed("i", column.arrays["offsets"])[-1]
            texts = labels_of(length).dictionary_decode()
            arrays = [lists(texts), lists(flat(pa.float32(), "scores", length))]
        case "number":
            return [flat(pa.float64(), "numbers", n, validity)]
        case "vector":
            element = pa.float16() if column.dtype == "fp16" else pa.float32()
            kind = pa.list_(element, column.dim)
            if not column.arrays["vectors"]:
                return [pa.nulls(n, kind)]
            items = flat(element, "vectors", n * column.dim)
            return [pa.Array.from_buffers(kind, n, [validity], children=[items])]
        case "spans":
            length = typed("i", column.arrays["offsets"])[-1]
            parts = {
                "start": flat(pa.int32(), "starts", length),
                "end": flat(pa.int32(), "ends", length),
                "label": labels_of(length).dictionary_decode(),
                "score": flat(pa.float32(), "scores", length),
            }
            return [lists(pa.StructArray.from_arrays(list(parts.values()), list(parts)))]
        case _ if answers.written:
            texts = [answers.decoded(offset) or {} for offset in range(n)]
            ends = [text.get("finish") for text in texts]
            # The usual ways first, so that blocks have the same categories whether or not each is met in them.
            ways = list(dict.fromkeys((*_FINISHES, *filter(None, ends))))
            codes = pa.array([None if end is None else ways.index(end) for end in ends], pa.int32())
            return [
                pa.array([text.get("text") for text in texts], pa.string()),
                pa.DictionaryArray.from_arrays(codes, pa.array(ways, pa.string())),
            ]
        case _:
            buffers = [validity, pa.py_buffer(column.arrays["offsets"]), pa.py_buffer(column.arrays["bytes"])]
            return [pa.Array.from_buffers(pa.string(), n, buffers)]
    if answers.every:
        width = len(answers.labels)
        every = typed("f", column.arrays.get("all") or bytes(4 * n * width))
        scores = [pa.array(every[k::width], pa.float32()) for k in range(width)]
        arrays.append(pa.StructArray.from_arrays(scores, list(answers.labels), mask=pa.compute.invert(ok)))
    return arrays


def _chosen_arrays(answers: Answers) -> list[Any]:
    """Labels that each row brought: texts, their scores, and where asked for a map of label to score."""
    pa = _arrow()
    found = [answers.decoded(offset) for offset in range(len(answers.column))]
    arrays = [
        pa.array([None if one is None else one[0] for one in found], pa.string()),
        pa.array([None if one is None else one[1] for one in found], pa.float32()),
    ]
    if answers.every:
        every = [None if one is None else list(one[2].items()) for one in found]
        arrays.append(pa.array(every, pa.map_(pa.string(), pa.float32())))
    return arrays


def _errors(block: Block) -> Iterator[tuple[int, dict[str, str]]]:
    for task, answers in block.answers.items():
        for offset, error in answers.column.errors.items():
            yield offset, {"task": task, "error": error.error, "message": error.message}


def _truncated(block: Block) -> Iterator[tuple[int, str]]:
    for task, answers in block.answers.items():
        for offset, status in enumerate(answers.column.status):
            if status & TRUNCATED:
                yield offset, task


def _sparse(block: Block, entries: Iterable[tuple[int, Any]]) -> list[list[Any] | None]:
    """A list per row of what is said of it, None where that is nothing."""
    rows: list[list[Any] | None] = [None] * block.rows
    for offset, entry in entries:
        rows[offset] = [*(rows[offset] or ()), entry]
    return rows


def _arrow() -> Any:
    try:
        import pyarrow
        import pyarrow.compute
    except ImportError:
        raise SetupError(
            "Arrow and Parquet need pyarrow; pip install 'motet[arrow]', or use to_jsonl"
        ) from None
    return pyarrow


# -- files


@contextmanager
def _whole(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A file that appears under its name when it is whole; a device or pipe is written as it is."""
    target = Path(path).resolve()
    if target.exists() and not target.is_file():
        with target.open("wb") as file:
            yield file
        return
    draft = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with draft.open("wb") as file:
            yield file
        os.replace(draft, target)
    finally:
        draft.unlink(missing_ok=True)


def _put(file: IO[bytes], lines: Iterable[str]) -> int:
    written = 0
    for line in lines:
        file.write(line.encode() + b"\n")
        written += 1
    return written
