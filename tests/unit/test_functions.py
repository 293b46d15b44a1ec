"""Functions with parameters and artefacts: what is refused by name, what is in the digest, what the function is given."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy

from motet.artefacts import artefact_files, describe_artefact
from motet.cli.jobs import parse_tasks
from motet.errors import InvalidJob, Problem, SetupError
from motet.protocol.columns import values
from motet.protocol.manifest import Manifest
from motet.protocol.wire import TaskOrder
from motet.tasks import Function, Task, parse
from scheduler.api.manifests import read_manifest
from scheduler.api.submissions import plan_submission
from scheduler.policy.plan import loaded_model, plan, task_digest
from scheduler.store.registry import Registered
from tests.unit.test_worker_executor import House, an_order, answers
from workers.engine import CannotLoad, Pass
from workers.engines.artefacts import read_artefact
from workers.engines.function import FunctionEngine
from workers.run.shelf import ARTEFACTS_KEPT


def rank(rows: list[Any], *, k: int, artefact: Any, best: bool = True) -> list[Any]:
    return [[row, k, best, artefact["title"]] for row in rows]


def shout(texts: list[str]) -> list[str]:
    return [text.upper() for text in texts]


RANK = FunctionEngine(rank, engine="rank", origin="rank 1").describe("rank", "1")
SHOUT = FunctionEngine(shout, engine="shout", origin="shout 1").describe("shout", "1")


def films(version: str = "1", sha256: str = "1" * 64) -> Manifest:
    return Manifest(
        name="films", version=version, engine="artefact", answers="artefact", files={"films.json": sha256}
    )


def refused(task: Task, model: Manifest = RANK, artefact: Manifest | None = None) -> list[Problem]:
    with pytest.raises(InvalidJob) as error:
        plan(
            {"best": task}, {"best": model}, {}, artefacts={"best": artefact} if artefact else {},
            registered=["films@1", "films@prod"],
        )  # fmt: skip
    return list(error.value.problems)


def test_the_signature_says_what_a_function_takes_and_is_in_its_digest() -> None:
    assert RANK.keywords == {"k": True, "artefact": True, "best": False}
    assert SHOUT.keywords == {}
    assert FunctionEngine(len).describe("len", "1").keywords == {}
    # What takes none keeps the digest that it had before there were any.
    assert SHOUT.digest == "0b0067f48df0b1046b05a5dc081ffc0dbc5b90b376b921ae64e2aa93810625ca"
    assert replace(RANK, keywords={}).digest != RANK.digest
    assert Manifest.from_json(json.loads(json.dumps(RANK.to_json()))) == RANK


@pytest.mark.parametrize(
    ("task", "artefact", "field", "says"),
    [
        (Function("rank", params={"k": 1, "q": 2}, artefact="films"), films(), "params.q", "one of k, best"),
        (Function("rank", artefact="films"), films(), "params.k", "a value, which rank@1 must be given"),
        (Function("rank", params={"k": 1}), None, "artefact", "the artefact that rank@1 reads"),
        (Function("rank", params={"k": 1}, artefact="film"), None, "artefact", "a registered artefact"),
        (Function("rank", params={"k": 1}, artefact="shout"), SHOUT, "artefact", "an artefact"),
    ],
)
def test_what_a_function_does_not_take_is_refused_by_name(
    task: Task, artefact: Manifest | None, field: str, says: str
) -> None:
    (problem,) = refused(task, artefact=artefact)
    assert (problem.field, problem.expected) == (f"tasks.best.{field}", says)
    if says == "a registered artefact":
        assert problem.remedy == "did you mean films? see `motet models`"


def test_a_function_without_keywords_takes_neither_parameters_nor_an_artefact() -> None:
    (param, artefact) = refused(Function("shout", params={"k": 1}, artefact="films"), SHOUT, films())
    assert param.expected == "none, for shout@1 takes no parameter"
    assert artefact.expected == "nothing, for shout@1 takes no artefact"
    (model,) = refused(Function("films"), films())
    assert model.got == "films@1, which answers artefact"


@pytest.mark.parametrize(
    "params", [[1], {"a b": 1}, {"class": 1}, {"artefact": 1}, {"k": float("nan")}, {"k": "x" * 20_000}]
)
def test_parameters_that_are_no_keyword_arguments_are_refused(params: object) -> None:
    with pytest.raises(InvalidJob) as error:
        parse({"t": {"kind": "function", "model": "f", "params": params}})
    (problem,) = error.value.problems
    assert problem.field == "tasks.t.params"
    told = Function("f").to_json()
    assert not {"params", "artefact"} & told.keys(), "digests from before stay what they are"


def planned(artefact: Manifest, task: Function) -> tuple[bytes, Any]:
    found = {"rank": Registered(1, RANK), task.artefact or "": Registered(2, artefact)}
    made = plan_submission({"best": task}, found, {}, [])
    model = made.models["best"].manifest
    trunks = {ref: one.manifest for ref, one in made.trunks.items()}
    return task_digest(task, model, loaded_model(model, trunks)), made


def test_an_artefact_stands_beside_its_function_and_a_refitted_one_has_another_digest() -> None:
    task = Function("rank", params={"k": 1}, artefact="films@prod")
    digest, made = planned(films(), task)
    (one,) = made.passes
    assert (one.model, made.loaded_id(one)) == (RANK, 1)
    assert made.models["best"].id == 2
    assert made.demand(one).model_ids == {1, 2}
    assert planned(films("2"), replace(task, artefact="films@2"))[0] == digest, "equal content, other names"
    assert planned(films("2", "2" * 64), task)[0] != digest
    assert planned(films(), replace(task, params={"k": 2}))[0] != digest


def test_calls_with_equal_arguments_share_a_pass_and_others_do_not() -> None:
    two = dict.fromkeys(("a", "b"), Function("rank", params={"k": 1}, artefact="films"))
    other = {**two, "b": Function("rank", params={"k": 2}, artefact="films")}
    beside = dict.fromkeys(two, films())
    assert len(plan(two, dict.fromkeys(two, RANK), {}, artefacts=beside)) == 1
    assert len(plan(other, dict.fromkeys(two, RANK), {}, artefacts=beside)) == 2
    assert len(plan(two, dict.fromkeys(two, RANK), {}, artefacts={**beside, "b": films("2", "2" * 64)})) == 2
    functions = {"a": RANK, "b": replace(RANK, name="rank2", source={"function": "rank 2"})}
    assert len(plan(two, functions, {}, artefacts=beside)) == 2


def test_each_task_of_a_function_has_its_own_arguments() -> None:
    tasks: Mapping[str, Function] = {
        "a": Function("rank", params={"k": 1}, artefact="films@1"),
        "b": Function("rank", params={"k": 2, "best": False}, artefact="films@2"),
    }
    beside = {"a": films(), "b": films("2", "2" * 64)}
    engine = FunctionEngine(rank)
    orders = tuple(
        TaskOrder(name=name, spec=task.to_json(), manifest=beside[name]) for name, task in tasks.items()
    )
    handle = engine.load(RANK, {}, device="cpu", in_format="fp32")
    handle |= {one.digest: {"title": one.version} for one in beside.values()}
    pass_ = Pass(handle, orders, 0)
    rows = [row for row in engine.prepare(pass_, ["x", "y"]) if not isinstance(row, Exception)]
    found = engine.run(pass_, rows)  # type: ignore[arg-type]
    assert list(values(found["a"])) == [["x", 1, True, "1"], ["y", 1, True, "1"]]
    assert list(values(found["b"])) == [["x", 2, False, "2"], ["y", 2, False, "2"]]


def test_data_is_read_as_what_it_is_and_several_files_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"x": [1, null]}')
    safetensors.numpy.save_file(
        {"w": np.arange(6, dtype=np.float32).reshape(2, 3)}, tmp_path / "b.safetensors"
    )
    pq.write_table(pa.table({"id": [1, 2], "title": ["é", None]}), tmp_path / "c.parquet")
    files = artefact_files(tmp_path)
    found = read_artefact(files)
    assert list(found) == ["a.json", "b.safetensors", "c.parquet"]
    assert read_artefact({"a.json": files["a.json"]}) == found["a.json"] == {"x": [1, None]}
    assert found["b.safetensors"]["w"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert found["c.parquet"].to_pydict() == {"id": [1, 2], "title": ["é", None]}
    for path in files.values():
        path.write_bytes(b"torn")
        with pytest.raises(CannotLoad, match=path.name):
            read_artefact({path.name: path})


@pytest.mark.parametrize("name", ["model.pkl", "model.pt", "model.npy", "README", "model.joblib"])
def test_what_is_no_data_is_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(SetupError, match=f"{name}: got .*a pickle would run code"):
        artefact_files(tmp_path)
    spec = {**films().to_json(), "files": {"model.txt": "1" * 64}}
    with pytest.raises(InvalidJob) as error:
        read_manifest(spec)
    assert "ends in .json, .safetensors, .parquet" in error.value.problems[0].expected
    with pytest.raises(InvalidJob):
        read_manifest({**films().to_json(), "files": {}})
    with pytest.raises(InvalidJob):
        read_manifest({**SHOUT.to_json(), "files": {"x.parquet": "1" * 64}})


def test_the_digest_of_an_artefact_is_that_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("1")
    first = describe_artefact(artefact_files(tmp_path), name="a", version="1")
    assert read_manifest(first.to_json()) == first
    (tmp_path / "a.json").write_text("2")
    assert describe_artefact(artefact_files(tmp_path), name="a", version="2").digest != first.digest


class Counting(FunctionEngine):
    """Its artefacts are their versions; counts how often one was read."""

    def __init__(self) -> None:
        super().__init__(lambda texts, *, artefact: [artefact] * len(texts))
        self.read: list[str] = []
        self.handle: dict[str, Any] = {}

    def attach(self, handle: Any, task: TaskOrder, files: Mapping[str, Path]) -> None:
        self.handle = handle
        self.read.append(task.manifest.version)
        handle[task.manifest.digest] = task.manifest.version


def test_a_worker_reads_an_artefact_once_and_keeps_a_few_that_nobody_uses() -> None:
    engine = Counting()
    house = House(engines=SimpleNamespace(find=lambda name: engine))

    def order(version: int) -> Any:
        artefact = films(str(version), f"{version:064}")
        asked = {"size": Function("rank", artefact=artefact.ref)}
        return an_order("a", "b", model=RANK, tasks=asked, heads={"size": artefact})

    orders = [order(version) for version in range(20) for _ in range(3)]
    for one in orders:
        house.submit(one)
        house.steps()
    assert engine.read == [str(version) for version in range(20)]
    assert len(engine.handle) == ARTEFACTS_KEPT + 1
    # All at once: none goes that an attempt still needs, and one that went is read again.
    late = [order(version) for version in range(12)]
    for one in late:
        house.submit(one)
    house.steps()
    outcomes = house.outcomes()
    for one in (*orders, *late):
        assert answers(outcomes[one.key]) == [one.tasks[0].manifest.version] * 2
    assert len(engine.handle) <= ARTEFACTS_KEPT + 1


def test_the_memory_of_artefacts_counts_on_a_worker_and_others_make_room_for_it() -> None:
    engine = Counting()
    house = House(engines=SimpleNamespace(find=lambda name: engine))
    room = house.executor._shelf._budget_mb

    def order(version: int, mb: int) -> Any:
        artefact = replace(films(str(version), f"{version:064}"), sizes={"films.safetensors": mb << 20})
        asked = {"size": Function("rank", artefact=artefact.ref)}
        return an_order("a", model=RANK, tasks=asked, heads={"size": artefact})

    for version in range(ARTEFACTS_KEPT + 3):
        house.submit(order(version, 10))
        house.steps()
    [loaded] = house.executor._shelf.loaded.values()
    assert loaded.memory_mb == (ARTEFACTS_KEPT + 1) * 10
    large = order(99, room + 1)
    house.submit(large)
    house.steps()
    outcome = house.outcomes()[large.key]
    assert outcome.error is not None
    assert outcome.error[1].startswith(f"films@99: needs {room + 1} MB, models may hold {room} MB here")
    assert outcome.refused == large.tasks[0].manifest.digest


def test_the_command_line_says_the_same() -> None:
    written = (
        'picks=function:rank,inputs=history|messages[-1],params={"k": 20, "q": [1, 2]},artefact=films@prod'
    )
    (task,) = parse(parse_tasks([written])).values()
    assert task == Function(
        "rank", inputs=("history", "messages[-1]"), params={"k": 20, "q": [1, 2]}, artefact="films@prod"
    )
