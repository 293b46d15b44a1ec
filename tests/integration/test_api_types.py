"""Types of exports follow from the tasks: all blocks of all jobs of some tasks have one schema, whatever became of their rows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from motet import Client
from motet.job import Job
from motet.protocol.columns import CellError
from scheduler.store import registry
from tests.integration.api_house import NAMES, SPEAKER, STARS, House, house

__all__ = ["house"]

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

SCHEMA = {"type": "object"}
#: Every kind of task, with every option that changes what its column holds.
TASKS: dict[str, dict[str, Any]] = {
    "topic": {"kind": "classify", "model": "topics"},
    "topics": {"kind": "classify", "model": "topics", "scores": True},
    "tone": {"kind": "classify", "model": "tones"},
    "tones": {"kind": "classify", "model": "tones", "scores": True},
    "stars": {"kind": "number", "model": "stars"},
    "vector": {"kind": "embed", "model": "tiny"},
    "short": {"kind": "embed", "model": "tiny", "dtype": "fp16"},
    "names": {"kind": "entities", "model": "names"},
    "roll": {"kind": "function", "model": "dice"},
    "gist": {"kind": "generate", "model": "speaker", "prompt": "Sum it up.", "max_tokens": 8},
    "form": {
        "kind": "generate",
        "model": "speaker",
        "prompt": "Sum it up.",
        "max_tokens": 8,
        "schema": SCHEMA,
    },
    "facts": {"kind": "extract", "model": "speaker", "schema": SCHEMA},
    "mood": {"kind": "choose", "model": "speaker", "labels": ["glad", "sad"]},
    "moods": {"kind": "choose", "model": "speaker", "labels": ["glad", "sad"], "scores": True},
    "answer": {"kind": "chat", "model": "speaker", "messages": "{text}", "max_tokens": 8},
}
GONE = CellError("engine", "it broke")
BLOCK = 1024


@pytest.fixture
def client(house: House) -> Iterator[Client]:
    with house.database.transaction() as connection:
        for model in (STARS, NAMES, SPEAKER):
            registry.add_model(connection, model)
    with Client(house.url, house.tokens["user"]) as client:
        yield client


def submit(client: Client, name: str, rows: list[Any]) -> Job:
    return client.submit(rows, TASKS, bad_rows="error", reuse=False, name=name)


def texts(name: str, n: int) -> list[Any]:
    return [json.dumps([{"role": "user", "content": f"{name} {i}"}]) for i in range(n)]


def jobs(house: House, client: Client) -> dict[str, Job]:
    """One in which all is well, and one for each way in which all rows of a block can be without an answer."""
    fine = submit(client, "fine", texts("fine", 3))
    house.answer(fine.id, 0)
    bad = submit(client, "bad on arrival", [None] * 3)
    failed = submit(client, "failed at work", texts("failed", 3))
    house.answer(failed.id, 0, failing=dict.fromkeys(range(3), GONE))
    first = submit(client, "bad, then fine", [None] * BLOCK + texts("first", 5))
    house.answer(first.id, 1)
    last = submit(client, "fine, then failed", texts("last", BLOCK + 5))
    house.answer(last.id, 0)
    house.answer(last.id, 1, failing=dict.fromkeys(range(5), GONE))
    nothing = submit(client, "no block at all", texts("nothing", 3)).cancel()
    return {job.name: job for job in (fine, bad, failed, first, last, nothing)}


def test_every_export_has_the_schema_of_a_job_in_which_all_is_well(
    house: House, client: Client, tmp_path: Path
) -> None:
    made = jobs(house, client)
    tables = {name: table(job, tmp_path) for name, job in made.items()}
    wanted = tables["fine"][0].schema
    assert {
        "vector": wanted.field("vector").type,
        "short": wanted.field("short").type,
        "stars": wanted.field("stars").type,
    } == {
        "vector": pa.list_(pa.float32(), 2),
        "short": pa.list_(pa.float16(), 2),
        "stars": pa.float64(),
    }
    assert not [field.name for field in wanted if pa.types.is_null(field.type)]
    for name, (arrow, read) in tables.items():
        arrow.validate(full=True)
        assert arrow.schema.equals(wanted), name
        assert read.schema.equals(tables["fine"][1].schema), name
        assert arrow.num_rows == read.num_rows
    frames = {name: arrow.to_pandas().dtypes.to_dict() for name, (arrow, _) in tables.items() if len(arrow)}
    assert all(types == frames["fine"] for types in frames.values())
    mixed = tables["bad, then fine"][0]
    assert mixed["vector"].to_pylist() == [None] * BLOCK + [[float(i), 0.5] for i in range(5)]
    assert mixed["gist"].to_pylist()[-1] == "row 4"


def table(job: Job, folder: Path) -> tuple[Any, Any]:
    """The job as a table in memory, and as one that was written and read; without what it raises as cancelled."""
    job.check = lambda: None  # type: ignore[method-assign]
    job.to_parquet(folder / f"{job.id}.parquet")
    return job.to_arrow(), parquet.read_table(folder / f"{job.id}.parquet")


def test_every_block_of_the_api_says_what_its_vectors_are(house: House, client: Client) -> None:
    for job in jobs(house, client).values():
        for block in job.blocks(["short", "vector"], check=False):
            found = {name: (a.column.dim, a.column.dtype) for name, a in block.answers.items()}
            assert found == {"vector": (2, "fp32"), "short": (2, "fp16")}, job.name
