"""Training on a real cluster: from labelled rows to registered models, also where a worker is killed meanwhile."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from motet import Classify, Client, Embed, InvalidJob, JobFailed, Labels, Number
from motet.local.cluster import Cluster
from motet.training.lesson import Learned
from motet.training.run import TrainRun
from tests.acceptance.test_a_real_job import until, workers_of

THINGS = {
    "food": ["The soup", "Her bread", "A ripe plum", "The stew with beans", "His pancake"],
    "weather": ["The rain", "A dry wind", "This fog", "Last night's frost", "The morning sun"],
    "travel": ["The night train", "Our ferry", "A delayed flight", "The old tram", "Their bus tour"],
}
HOW = {"was wonderful": 2.0, "pleased everybody": 1.0, "disappointed us": -1.0, "was dreadful": -2.0}
WHEN = ["", " again", " in the end", " for once", " all week"]

#: Rows to learn from.
TRAIN = 200
TASKS: dict[str, Learned] = {"topic": Labels("topic"), "glad": Labels("glad"), "much": Number("much")}


def rows() -> list[dict[str, Any]]:
    found = [
        {"text": f"{thing} {how}{when}.", "topic": topic, "glad": "yes" if much > 0 else "no", "much": much}
        for when in WHEN
        for how, much in HOW.items()
        for topic, things in THINGS.items()
        for thing in things
    ]
    return found[::2] + found[1::2]


@pytest.fixture
def admin(cluster: Cluster) -> Iterator[Client]:
    with Client(cluster.url, cluster.tokens["admin"]) as connected:
        yield connected


def train(client: Client, name: str, **more: Any) -> TrainRun:
    every = rows()
    return client.train(
        name=name, trunk="all-MiniLM-L6-v2", tasks=TASKS, train=every[:TRAIN], test=every[TRAIN:], **more
    )


def test_heads_are_trained_registered_and_asked_in_one_pass(
    admin: Client, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(admin, "first", epochs=12).watch()
    told = capsys.readouterr().out
    assert "heads   1 of 12  loss " in told
    assert "topic: " in told
    assert run.job.refresh()._record["kind"] == "train"
    scores = run.answer()["scores"]
    assert scores["topic"]["accuracy"] > 0.9
    tasks = run.tasks()
    assert list(tasks) == ["topic", "glad", "much"]
    assert run.register() == ["first.topic@1", "first.glad@1", "first.much@1"], "again is harmless"
    every = rows()[TRAIN:]
    plan = admin.plan(every, tasks)
    assert len(plan.passes) == 1, "they fuse with each other"
    job = admin.submit(every, tasks).wait()
    found = job.evaluate(every)
    assert found.tasks["topic"].accuracy == pytest.approx(scores["topic"]["accuracy"], abs=0.02)
    assert "loss" in run.plot()
    # The same rows again: their vectors are there, and what comes out has the next version.
    again = train(admin, "first", epochs=2)
    assert again.models[0].ref == "first.topic@2"
    assert admin.model("first.topic@1").source["began_with"] == "all-MiniLM-L6-v2@1"


def test_a_worker_that_is_killed_while_a_trunk_learns_changes_no_bit_of_what_comes_out(
    cluster: Cluster, admin: Client
) -> None:
    options: dict[str, Any] = {"tune": "lora", "epochs": 3, "patience": 0, "seed": 5, "batch_rows": 16}
    whole = train(admin, "whole", **options)
    whole.job.wait()
    run = train(admin, "whole", version="1", **options)
    until(lambda: any(epoch.stage == "lora" for epoch in run.epochs()), 180, "the first epoch of the trunk")
    for process in workers_of(cluster):
        process.send_signal(signal.SIGKILL)
    assert [m.files for m in run.models] == [m.files for m in whole.models]
    assert run.answer()["scores"] == whole.answer()["scores"]
    # Both workers were killed at once: the second may have been given it before its death was heard.
    assert run.job.refresh()._record["usage"]["attempts_lost"] in (1, 2)
    assert [(e.stage, e.epoch) for e in run.epochs() if e.stage == "lora"] == [("lora", n) for n in (1, 2, 3)]
    assert run.tasks()["topic"].model == "whole.topic@1"
    every = rows()[TRAIN:]
    job = admin.submit(every, run.tasks()).wait()
    assert job.evaluate(every).tasks["topic"].accuracy > 0.95


def test_a_run_that_is_cancelled_ends_and_leaves_the_device(admin: Client) -> None:
    run = train(admin, "cancelled", tune="all", epochs=200, patience=0)
    until(lambda: any(epoch.stage == "all" for epoch in run.epochs()), 180, "the first epoch of the trunk")
    run.job.cancel()
    with pytest.raises(JobFailed):
        run.answer()
    # Both devices work on something else at once.
    train(admin, "after", epochs=1).job.wait(timeout=120)


def test_rows_that_cannot_be_learned_from_are_named_and_nothing_is_left_behind(client: Client) -> None:
    before = [job.id for job in client.jobs(limit=50)]
    bad = [*rows(), {"text": "", "topic": "food", "glad": "yes", "much": float("nan")}]
    with pytest.raises(InvalidJob) as refused:
        client.train(name="bad", trunk="all-MiniLM-L6-v2", tasks=TASKS, train=bad)
    assert "row 300, train.text: got an empty text" in str(refused.value)
    assert "row 300, train.much: got NaN" in str(refused.value)
    with pytest.raises(InvalidJob, match=r"row 0, test\.topic: got the label .love."):
        client.train(
            name="bad",
            trunk="all-MiniLM-L6-v2",
            tasks=TASKS,
            train=rows(),
            test=[{**rows()[0], "topic": "love"}],
        )
    assert [job.id for job in client.jobs(limit=50)] == before


def test_the_command_line_trains_and_tells(cluster: Cluster, tmp_path: Path) -> None:
    for name, some in (("train", rows()[:TRAIN]), ("test", rows()[TRAIN:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, some)))
    motet = str(Path(sys.executable).parent / "motet")
    command = [motet, "train", "train.jsonl", "--test", "test.jsonl", "--name", "typed"]
    ran = subprocess.run(
        [*command, "--labels", "topic", "--labels", "mood=glad", "--epochs", "5", "--plot", "curves.svg"],
        cwd=tmp_path,
        env={**os.environ, "MOTET_URL": cluster.url, "MOTET_TOKEN": cluster.tokens["admin"]},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert "heads   5 of 5  loss" in ran.stdout
    assert "registered typed.topic@1, typed.mood@1" in ran.stdout
    assert (tmp_path / "curves.svg").read_text().startswith("<svg")


def test_heads_on_two_texts_and_a_number_are_asked_as_they_were_trained(admin: Client) -> None:
    every = [
        {"thing": thing, "how": f"{how}{when}", "years": i % 7 or None, "topic": topic, "glad": str(much > 0)}
        for i, (when, (how, much), (topic, things)) in enumerate(
            itertools.product(WHEN, HOW.items(), THINGS.items())
        )
        for thing in things
    ]
    held = every[1::5]
    run = admin.train(
        name="pair", trunk="all-MiniLM-L6-v2", tasks={"topic": Labels("topic"), "glad": Labels("glad")},
        train=[row for i, row in enumerate(every) if i % 5 != 1], test=held,
        text=("{thing}", "it {how}."), numbers=("years",), epochs=12,
    )  # fmt: skip
    scores = run.answer()["scores"]
    assert min(scores[task]["accuracy"] for task in ("topic", "glad")) > 0.9
    assert run.tasks()["topic"] == Classify(
        "pair.topic@1", input=("{thing}", "it {how}."), numbers=("years",)
    )
    # The client asks what such a head reads, and both heads share one pass with what reads one of the texts.
    tasks = {
        "topic": Classify("pair.topic"),
        "glad": Classify("pair.glad"),
        "vector": Embed("all-MiniLM-L6-v2", input="{thing}"),
    }
    [planned] = admin.plan(held, tasks).passes
    assert planned.tasks == ("topic", "glad", "vector")
    job = admin.submit(held, tasks).wait()
    found = job.evaluate(held, ["topic", "glad"])
    for task in ("topic", "glad"):
        assert found.tasks[task].accuracy == pytest.approx(scores[task]["accuracy"], abs=0.02)
    again = admin.submit(held, {"glad": tasks["glad"]}).wait()
    assert again.progress.reused == len(held), "the same texts and numbers are not computed again"
    old = admin.submit([{**row, "years": "old"} for row in held[:3]], {"glad": tasks["glad"]}).wait()
    assert {error.error for error in old.errors()} == {"bad_number"}
    with pytest.raises(InvalidJob, match=r"tasks\.glad\.input: got 1 text for pair\.glad@1, which reads 2"):
        admin.submit(held, {"glad": Classify("pair.glad", input="{thing} {how}")})
