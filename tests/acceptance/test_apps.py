"""The applications films, clinic and risk as whole jobs, on small twins of their data that are made here."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from motet import Client
from motet.apps import clinic, films, risk
from motet.apps.application import Application, AppOutcome, RunOptions
from motet.apps.data.cards import payments
from motet.apps.data.hpo import parsed
from motet.apps.data.movielens import Film, trial
from motet.datasets import LabelledText
from motet.demo.stage import StagedCluster, Story
from motet.local.cluster import Cluster
from tests.small_data import loans, news
from tests.small_ontology import ANNOTATIONS, OBO
from tests.tiny_language import a_llama
from workers.engine import SelfDescribing
from workers.engines import InstalledEngines

WRITER = "smollm2-135m"


@pytest.fixture(scope="module")
def stage(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StagedCluster]:
    """With the functions that the three register, and a tiny model in place of the one that writes."""
    with (
        Client(cluster.url, cluster.tokens["user"]) as client,
        Client(cluster.url, cluster.tokens["admin"]) as admin,
    ):
        for name in {name for one in (films, clinic, risk) for name in functions(one.APPLICATION)}:
            engine = InstalledEngines().find(name)
            assert isinstance(engine, SelfDescribing)
            admin._http.post("/v1/models", engine.describe(name, "1").to_json())
        made = a_llama(tmp_path_factory.mktemp("writer"))
        subprocess.run(
            [sys.executable, "-m", "workers", "register", str(made), "--name", WRITER, "--try", "none"],
            check=True,
            capture_output=True,
            timeout=120,
            env={**os.environ, "MOTET_URL": cluster.url, "MOTET_TOKEN": cluster.tokens["admin"]},
        )
        yield StagedCluster(client, admin, cluster.data, Story(quiet=True), "apps")


def functions(application: Application) -> list[str]:
    lines = [line.split() for line in application.registers]
    return [words[1] for words in lines if words[0] == "--function"]


@pytest.fixture
def asked(tmp_path: Path) -> RunOptions:
    return RunOptions(folder=tmp_path, quick=True)


def scores(outcome: AppOutcome) -> dict[str, float]:
    for path in outcome.files:
        ElementTree.parse(path)
    return {one.name: one.estimate.value for one in outcome.scores if one.estimate.value is not None}


def test_films_are_found_by_who_liked_what_and_cold_ones_by_their_line(
    stage: StagedCluster, asked: RunOptions
) -> None:
    genres = ("Comedy", "Horror", "Western")
    listed = {
        at: Film(id=at, title=f"{genres[at % 3]} {at}", year=1990, genres=genres[at % 3]) for at in range(150)
    }
    # Viewers of one genre each, of whom every tenth ends with a film that nobody else likes.
    rated = [
        [(film, 5.0) for film in range(viewer % 3, 60, 3)][viewer % 7 : viewer % 7 + 9]
        + [(120 + viewer % 3 + viewer // 3 * 3 % 30, 5.0)] * (viewer % 10 == 0)
        for viewer in range(40)
    ]
    outcome = films.recommend(stage, asked, trial(listed, rated))
    found = scores(outcome)
    assert found["hidden film, of 100"] > 0.5
    assert found["cold hidden film, of 100, by its line"] > 0.2
    assert outcome.measured["viewers"]["ok"] > 0


def test_a_clinic_finds_what_notes_say_and_never_diagnoses(
    stage: StagedCluster, asked: RunOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    stage.story.quiet = False
    try:
        outcome = clinic.assist(stage, asked, parsed(OBO, ANNOTATIONS), count=20)
    finally:
        stage.story.quiet = True
    found = scores(outcome)
    assert found["findings, standard"] > 0.7
    assert found["disease among ten, hard"] == 1.0, "there are three"
    told = capsys.readouterr().out
    assert told.count("assists, never diagnoses") >= 5
    assert "synthetic" in told
    assert "HPO 2025-01-16" in told


def test_risk_warns_at_three_desks_and_the_webhook_hears_of_each_alert(
    stage: StagedCluster, asked: RunOptions
) -> None:
    learned, fresh = (
        [LabelledText(text=t, label=n, document=t) for n, t in news(40, seed=s)] for s in (1, 2)
    )
    outcome = risk.warn(stage, asked, loans(300), learned, fresh, payments(cards=8, days=4)[-40:])
    found = scores(outcome)
    assert found["bad loans"] > 0.6
    assert found["news to watch, at recall 0.97"] > 0.6
    cards = outcome.measured["cards"]
    assert cards["payments"] == 20
