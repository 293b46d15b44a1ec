"""Traces end to end: real processes send spans to a real OTLP receiver, and those of a job form one tree."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import UUID

import httpx
import pytest

from motet import Client, Function
from motet.local.cluster import Cluster, registered
from motet.protocol import traces
from motet.protocol.manifest import Manifest
from tests.integration.api_house import House, a_house, house
from tests.torchless import hide_torch
from tests.trace_receiver import Receiver, receiving
from tests.unit.test_traces import Kept, kept

__all__ = ["house", "kept"]

PATIENCE_S = 60.0
#: Stands in every text, in the job's name and in the task's: none of it may leave.
CANARY = "canary-7f3a"
ENGINE = """
def shout(texts):
    return [text.upper() for text in texts]
"""


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as received:
        yield received


@pytest.fixture
def cluster(tmp_path: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A whole cluster of real processes that sends its traces, with a function for a model."""
    modules = tmp_path / "modules"
    package = modules / "shouting-1.0.dist-info"
    package.mkdir(parents=True)
    (modules / "shouting.py").write_text(ENGINE)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: shouting\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[motet.engines]\nshout = shouting:shout\n")
    hide_torch(modules)
    monkeypatch.setenv("PYTHONPATH", str(modules))
    monkeypatch.setenv("MOTET_TRACES", receiver.url)
    data = tmp_path / "data"
    data.mkdir()
    # No model of ours is needed.
    registered(data).touch()
    with Cluster(data, cpus=1, port=0) as running:
        shout = Manifest(
            name="shout",
            version="1",
            engine="shout",
            answers="json",
            source={"function": "shouting:shout shouting 1.0"},
        )
        answer = httpx.post(
            f"{running.url}/v1/models",
            json=shout.to_json(),
            headers={"Authorization": f"Bearer {running.tokens['admin']}"},
        )
        assert answer.is_success, answer.text
        yield running


def test_the_spans_of_a_job_form_one_tree_from_submit_to_seal(cluster: Cluster, receiver: Receiver) -> None:
    rows = [f"{CANARY} {i}" for i in range(3000)]
    with Client(cluster.url, cluster.tokens["user"]) as client:
        job = client.submit(rows, tasks={CANARY: Function("shout")}, name=CANARY)
        assert [row[CANARY] for row in job.results()] == [row.upper() for row in rows]

    def whole() -> Counter[str]:
        """Every kind of span is there; the last ones are sent a second after they ended."""
        names = Counter(span.name for _, span in receiver.spans())
        done = names["seal"] == 3 and names["execute"] == names["send"] > 0
        return names if done and names["job"] and names["record"] and names["submit"] else Counter()

    names = eventually(whole)
    assert (names["job"], names["submit"], names["plan"]) == (1, 1, 1)
    assert names["land"] >= 1
    spans = [span for _, span in receiver.spans()]
    assert {span.trace_id for span in spans} == {UUID(job.id).bytes}, "the trace's id is the job's"
    by_id = {span.span_id: span for span in spans}
    assert len(by_id) == len(spans)
    parents = {(span.name, by_id[span.parent_span_id].name) for span in spans if span.parent_span_id}
    assert parents == {
        ("submit", "job"),
        ("plan", "submit"),
        ("land", "submit"),
        ("send", "job"),
        ("execute", "send"),
        ("record", "job"),
        ("seal", "job"),
    }
    (root,) = [span for span in spans if not span.parent_span_id]
    assert root.name == "job"
    services = {(span.name, service) for service, span in receiver.spans()}
    assert {service for name, service in services if name == "execute"} == {"motet-worker"}
    assert {service for name, service in services if name == "send"} == {"motet-dispatch"}
    # By sub-task: one that lags on a busy machine is run twice.
    executed = {of(span, "subtask"): of(span, "rows") for span in spans if span.name == "execute"}
    assert sum(executed.values()) == len(rows)
    assert sum(of(span, "subtasks") for span in spans if span.name == "record") == names["send"]
    assert of(root, "cells_ok") == len(rows)
    assert all(span.end_time_unix_nano >= span.start_time_unix_nano > 0 for span in spans)
    assert not any(CANARY.encode() in body or CANARY.upper().encode() in body for body in receiver.bodies)


def of(span: object, name: str) -> int:
    """A number among the attributes of a span."""
    (found,) = [a.value.int_value for a in span.attributes if a.key == f"motet.{name}"]
    return int(found)


def eventually(what: Callable[[], Counter[str]]) -> Counter[str]:
    until = time.monotonic() + PATIENCE_S
    while not (found := what()):
        assert time.monotonic() < until, "it did not come about"
        time.sleep(0.05)
    return found


def test_a_job_that_ends_in_any_way_has_its_root(house: House, kept: Kept) -> None:
    first = house.submit(["a"])["id"]
    house.answer(first, 0)
    kept.spans.clear()
    reused = house.submit(["a"])
    assert reused["state"] == "succeeded"
    assert ends(kept) == [(reused["id"], "succeeded")], "by its closing, where everything was answered"
    cancelled = house.submit(["b"])["id"]
    house.call("POST", f"/v1/jobs/{cancelled}/cancel")
    house.call("POST", f"/v1/jobs/{cancelled}/cancel")
    removed = house.submit(["c"])["id"]
    house.call("DELETE", f"/v1/jobs/{removed}")
    assert ends(kept) == [
        (reused["id"], "succeeded"),
        (cancelled, "cancelled"),
        (removed, "cancelled"),
    ], "each once"


def test_a_refused_part_is_told_and_a_refused_close_is_not(house: House, kept: Kept) -> None:
    job = house.open()["id"]
    house.put(job, 0, ["a"])
    assert house.put(job, 5, ["a"]).status_code == 409
    assert house.close(job, 1, 2).status_code == 409
    house.close(job, 1, 1)
    house.close(job, 1, 1)
    lands = [span for span in kept.spans if span.name == "land"]
    assert [span.error for span in lands] == ["", "Conflict"]
    assert kept.names.count("submit") == 1, "only what closed it"


def ends(kept: Kept) -> list[tuple[str, object]]:
    return [(str(span.job), span.attributes["state"]) for span in kept.spans if span.name == "job"]


def test_nobody_waits_for_a_receiver_that_is_away(
    database_url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from motet.protocol.otlp import WAITING

    traces.configure("test", "http://127.0.0.1:1")
    try:
        with a_house(database_url, tmp_path) as house:
            job = house.submit(["a"], {"a": {"kind": "function", "model": "dice"}})["id"]
            house.answer(job, 0)
            assert house.job(job)["state"] == "succeeded"
        for _ in range(3 * WAITING):
            traces.add(job, "seal", time.time())
    finally:
        traces.stop()
    assert "Traceback" not in caplog.text
