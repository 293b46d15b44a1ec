"""A registered function in a real worker: typed values, a vector, spans, parameters, and an artefact that is refitted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from motet import Classify, Client, Embed, Entities, Function
from motet.errors import Conflict, InvalidJob
from motet.local.cluster import Cluster
from workers.engine import SelfDescribing
from workers.engines import InstalledEngines

ROWS: list[dict[str, Any]] = [
    {"text": 'Ada wrote "quotes" for Charles', "age": 36, "paid": 1.5, "tags": ["a", "b"], "last": None},
    {"text": "nobody here", "age": None, "paid": 2.0, "tags": [], "last": "x"},
]
INPUTS = ("text", "age", "paid", "tags", "last", "vector", "who", "topic", "topic.score", "who[0].text")


@pytest.fixture(scope="module")
def admin(cluster: Cluster) -> Iterator[Client]:
    """With the functions registered, as `motet models add --function` does."""
    with Client(cluster.url, cluster.tokens["admin"]) as connected:
        for name in ("told", "names", "recommend"):
            engine = InstalledEngines().find(name)
            assert isinstance(engine, SelfDescribing)
            connected._http.post("/v1/models", engine.describe(name, "1").to_json())
        yield connected


def tasks(artefact: str | None = "ranked", **params: Any) -> dict[str, Any]:
    return {
        "vector": Embed("all-MiniLM-L6-v2"),
        "who": Entities("names"),
        "topic": Classify("news-topics"),
        "told": Function("told", inputs=INPUTS, params={"k": 2, **params}, artefact=artefact),
    }


def fitted(folder: Path, *titles: str) -> Path:
    path = folder / "films.json"
    path.write_text(json.dumps({"titles": titles}))
    return path


def test_a_function_is_given_values_parameters_and_an_artefact_that_may_be_refitted(
    client: Client, admin: Client, tmp_path: Path
) -> None:
    first = admin.add_artefact(fitted(tmp_path, "Alien", "Brazil", "Clue"), "ranked")
    assert (first.ref, first.answers) == ("ranked@1", "artefact")
    assert admin.add_artefact(tmp_path, "ranked").ref == "ranked@1", "the same content is the same version"
    admin.promote("ranked@1", "prod")

    job = client.submit(ROWS, tasks(note='it\'s "so"'), progress=False)
    ada, nobody = [row["told"].value for row in job.results()]
    assert ada["row"]["vector"] == [384, pytest.approx(1, abs=1e-3)]
    assert ada["row"]["text"] == ROWS[0]["text"]
    assert [s["text"] for s in ada["row"]["who"]] == ["Ada", "Charles"]
    assert ada["row"]["who"][0] == {"text": "Ada", "label": "name", "score": 1.0, "start": 0, "end": 3}
    assert (ada["row"]["who[0].text"], nobody["row"]["who[0].text"]) == ("Ada", None)
    assert ada["types"] == {
        "text": "str", "age": "int", "paid": "float", "tags": "list", "last": "NoneType", "vector": "list",
        "who": "list", "topic": "dict", "topic.score": "float", "who[0].text": "str",
    }  # fmt: skip
    assert (nobody["types"]["age"], nobody["row"]["who"]) == ("NoneType", [])
    assert ada["arguments"] == [2, 'it\'s "so"']
    assert ada["titles"] == ["Alien", "Brazil"]
    spec = job.tasks["told"]
    assert (spec["model_ref"], spec["artefact_ref"], spec["column"]["kind"]) == ("told@1", "ranked@1", "json")

    # Reused under any name of the same content; never after it was refitted.
    again = client.submit(ROWS, tasks("ranked@prod", note='it\'s "so"'), progress=False).wait()
    assert again.progress.reused == 8
    assert admin.add_artefact(fitted(tmp_path, "Dune", "Eraserhead"), "ranked").ref == "ranked@2"
    refitted = client.submit(ROWS, tasks(note='it\'s "so"'), progress=False)
    assert [row["told"].value["titles"] for row in refitted.results()] == [["Dune", "Eraserhead"]] * 2
    assert refitted.progress.reused == 6
    assert client.plan(ROWS, tasks()).models["told"] == "told@1"


def test_an_artefact_is_read_once_in_a_worker_and_stays_while_a_job_uses_it(
    cluster: Cluster, client: Client, admin: Client, tmp_path: Path
) -> None:
    admin.add_artefact(fitted(tmp_path, "Fargo", "Gilda"), "kept")
    many = [{**ROWS[0], "text": f"Row {i}"} for i in range(200)]
    job = client.submit(many, tasks("kept"), progress=False)
    assert len({row["told"].value["id"] for row in job.results()}) <= len(client.workers())
    with client.open({"told": tasks("kept")["told"]}, name="holds") as feed:
        with pytest.raises(Conflict, match=f"job {feed.job.id} uses kept@1"):
            admin.remove_model("kept@1")
        with pytest.raises(Conflict, match=f"job {feed.job.id} uses told@1"):
            admin.remove_model("told@1")
    feed.close().wait(timeout=60)
    admin.remove_model("kept@1")
    with pytest.raises(InvalidJob, match="a registered artefact"):
        client.submit(ROWS, tasks("kept"), progress=False)


def test_a_model_that_callers_ask_is_soon_held_by_a_worker_that_answers_none_of_them(
    client: Client, admin: Client
) -> None:
    """One worker answers a lone caller. The other one is ready before they are many."""
    engine = InstalledEngines().find("capitals")
    assert isinstance(engine, SelfDescribing)
    admin._http.post("/v1/models", engine.describe("reserved", "1").to_json())
    with client.open({"text": Function("reserved", input="{text}")}, name="reserved") as feed:
        asked = 0
        while not all(any("reserved" in model for model in w.resident) for w in client.workers()):
            assert feed.ask({"text": f"row {asked}"})["text"].value == f"ROW {asked}"
            asked += 1
            assert asked < 2000, "only one worker has loaded it"
    feed.close().wait(timeout=60)


def test_what_a_function_does_not_take_is_refused_with_what_it_takes(client: Client, admin: Client) -> None:
    with pytest.raises(InvalidJob) as refused:
        client.submit(ROWS, tasks(None, q=1), progress=False)
    (problem,) = refused.value.problems
    assert (problem.field, problem.expected) == ("tasks.told.params.q", "one of k, note")
    with pytest.raises(InvalidJob, match=r"tasks\.told\.params\.k"):
        client.submit(ROWS, {**tasks(), "told": Function("told", inputs=INPUTS)}, progress=False)


def test_the_example_fits_asks_and_refits(
    cluster: Cluster, admin: Client, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MOTET_URL", cluster.url)
    monkeypatch.setenv("MOTET_TOKEN", cluster.tokens["admin"])
    import_module("recommend").main()
    assert capsys.readouterr().out.splitlines() == [
        "seen-together@1: seen ['Alien'], next ['Aliens', 'Blade Runner']",
        "seen-together@1: seen ['Clue'], next ['Brazil']",
        "seen-together@2: seen ['Alien'], next ['Aliens', 'Blade Runner']",
        "seen-together@2: seen ['Clue'], next ['Dune', 'Brazil']",
    ]
