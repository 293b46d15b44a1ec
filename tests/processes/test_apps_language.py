"""The applications support, translate and digest as whole jobs, on small twins of their data that are made here."""

from __future__ import annotations

import json
import random
import sys
from io import StringIO

import pytest

from motet.apps import digest, queue, support, translate
from motet.apps.application import RunOptions
from motet.apps.data.customers import CustomerSets, Dialogue, Felt, Question
from motet.apps.data.translations import SentencePair
from motet.datasets import LabelledText
from motet.demo.stage import StagedCluster
from motet.tasks import Classify
from tests.acceptance.test_apps import asked, functions, scores, stage
from workers.engine import SelfDescribing
from workers.engines import InstalledEngines

__all__ = ["asked", "stage"]

WANTS = {
    "FindEvents": ("Which concerts are there?", "I look for a play.", "Any match to see?"),
    "TransferMoney": ("Send money to my brother.", "I want to pay a friend.", "Transfer it from savings."),
}


@pytest.fixture(scope="module")
def prepared(stage: StagedCluster) -> StagedCluster:
    """With the functions of these three; translation is its own test's."""
    for name in functions(support.APPLICATION):
        engine = InstalledEngines().find(name)
        if isinstance(engine, SelfDescribing) and name != "spacy-ner":
            stage.admin._http.post("/v1/models", engine.describe(name, "1").to_json())
    return stage


def dialogues(count: int, seed: int) -> list[Dialogue]:
    """Customers who say first what they want, and last only yes: history tells what the last turn does not."""
    dice = random.Random(seed)
    made = []
    for at in range(count):
        intent = list(WANTS)[at % 2]
        last = dice.choice(("Yes please.", "That is right.", "It is urgent, my card was stolen!"))
        turns = [dice.choice(WANTS[intent]), f"Certainly. Number {at}?", last]
        roles = ("user", "assistant", "user")
        messages = [{"role": r, "content": t} for r, t in zip(roles, turns, strict=True)]
        made.append(Dialogue(messages=messages, intent=intent))
    return made


@pytest.fixture
def said() -> CustomerSets:
    texts = [Question(text=f"{text} {at}", intent=intent) for at in range(8) for intent, every in WANTS.items() for text in every]  # fmt: skip
    moods = (("I love it, wonderful", "positive"), ("dreadful, I hate this", "negative"))
    felt = [Felt(text=f"{text} {at}", mood=mood, listed=mood) for at in range(6) for text, mood in moods]
    return CustomerSets(
        dialogues=(dialogues(60, 1), dialogues(12, 2)), questions=(texts[:40], texts[40:]), felt=felt
    )


def test_support_sorts_customers_by_urgency_and_measures_what_history_tells(
    prepared: StagedCluster, asked: RunOptions, said: CustomerSets, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(support, "HAS_SPACY", False)
    outcome = support.answer(prepared, asked, said)
    history, above, banking, mood = outcome.scores
    assert (history.estimate.value or 0) > 0.9
    assert (history.baselines["of the last turn alone"].value or 0) < (history.estimate.value or 0)
    words = history.baselines["words of all three"].value or 0
    assert above.estimate.value == pytest.approx((history.estimate.value or 0) - words, abs=1e-6)
    assert (banking.estimate.value or 0) > 0.8
    assert (mood.estimate.value or 0) > 0.6
    queued = [json.loads(line) for line in (asked.folder / "queue.jsonl").read_text().splitlines()]
    points = [line["urgency"]["points"] for line in queued]
    assert len(points) == 12
    assert points == sorted(points, reverse=True)
    assert points[0] >= 6 > points[-1]
    assert outcome.measured["drafts"] == sum(one >= 2 for one in points), "for the urgent ones alone"
    assert (asked.folder / "support.svg").exists()
    train, test = said.dialogues
    again = support._learned(prepared, "support", train, test, support.READ)
    assert again.model == "support.intent@1", "learned from the same rows, so not learned again"


def test_support_answers_typed_turns_live_and_serves_their_queue(
    prepared: StagedCluster,
    asked: RunOptions,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tasks = {**support.TASKS, "intent": Classify("news-topics", input=support.HISTORY)}
    monkeypatch.setattr(sys, "stdin", StringIO("My card was stolen, it is urgent!\nAnd now?\n\nHello.\n"))
    monkeypatch.setattr(prepared, "name", "live twin")
    # As an earlier conversation left it: its name was taken, and the next one came to nothing.
    prepared.client.open({"topic": Classify("news-topics")}, name="live twin").close()
    prepared.story.quiet = False
    try:
        queue.converse(prepared, tasks)
    finally:
        prepared.story.quiet = True
    told = capsys.readouterr().out
    assert "urgency high (says that it is urgent, says what was lost" in told
    assert told.count("draft:") == 3
    assert "another customer" in told
    job = prepared.client.job(prepared.job).wait(timeout=60)
    assert (job.state, job.rows) == ("succeeded", 3)
    page = prepared.client._http.request("GET", f"/jobs/{job.id}/queue", params={"by": "urgency.points"}).text
    assert page.index("level high") < page.index("level low")
    assert "My card was stolen, it is urgent!" in page
    assert all(f">{task}</th>" in page for task in ("intent", "mood", "urgency", "reply"))


def test_digest_reads_each_article_once_for_all_prompts(stage: StagedCluster, asked: RunOptions) -> None:
    articles = [
        LabelledText(text=f"The {topic} of day {at} went on for hours. " * 6, label=topic, document=str(at))
        for at, topic in enumerate(("sport", "tech", "business"))
    ]
    outcome = digest.digest(stage, asked, articles)
    assert outcome.measured["tokens_cached"] > 0
    assert outcome.measured["ok"] == outcome.measured["cells"] == 3 * 5
    assert scores(outcome).keys() == {"topic, by the language model"}


def test_translate_sets_a_model_beside_people_and_an_asked_one(
    stage: StagedCluster, asked: RunOptions
) -> None:
    # The package of the real models is no part of this project's: a function in its place says everything in capitals.
    capitals = InstalledEngines().find("capitals")
    assert isinstance(capitals, SelfDescribing)
    for name in ("translate-en-pt", "translate-pt-en"):
        stage.admin._http.post("/v1/models", capitals.describe(name, "1").to_json())
    pairs = [SentencePair(english=f"row {at} of all", portuguese=f"ROW {at} DE TUDO") for at in range(5)]
    outcome = translate.translate(stage, asked, pairs)
    everywhere, some, _ = outcome.scores
    english = everywhere.baselines["the English text itself"].value or 0
    assert (everywhere.estimate.value or 0) > 0.15 > english
    assert len(some.baselines) == 2
    assert outcome.measured["ok"] == 15
