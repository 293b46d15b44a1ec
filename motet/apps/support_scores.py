"""What `motet app support` measures, each beside honest rivals: intents, questions to a bank, and mood."""

from __future__ import annotations

from collections.abc import Sequence

from motet.apps import scores
from motet.apps.application import Score
from motet.apps.data.customers import CustomerSets, Dialogue, Felt
from motet.demo.stage import StagedCluster
from motet.evaluation import TaskEvaluation
from motet.results import Row
from motet.tasks import Classify
from motet.training.lesson import Labels


def intent_scores(
    train: Sequence[Dialogue],
    test: Sequence[Dialogue],
    templates: Sequence[str],
    answers: Sequence[Row],
    of_all: TaskEvaluation,
    of_last: TaskEvaluation,
) -> tuple[Score, Score]:
    """What the customer wants now, by a head that reads what each of the templates renders; and how far it is above words."""
    learned, truth = [one.intent for one in train], [one.intent for one in test]
    texts, asked = ([[one.history(t) for t in templates] for one in part] for part in (train, test))
    by_words = scores.words_alone(texts, learned, asked)
    gains = [
        (str(row["intent"]) == right) - (word == right)
        for row, right, word in zip(answers, truth, by_words, strict=True)
    ]
    score = Score(
        name="intent, of the last 7, 3 and 1 turns",
        figure="accuracy",
        rows=len(test),
        estimate=of_all.figures["accuracy"],
        baselines={
            "of the last turn alone": of_last.figures["accuracy"],
            "words of all three": scores.accuracy(truth, by_words),
            "always the commonest": scores.accuracy(truth, [scores.commonest(learned)] * len(truth)),
        },
        floor=0.70,
    )
    above = Score(
        name="  … above words of all three",
        figure="accuracy points",
        rows=len(test),
        estimate=scores.mean(gains),
    )
    return score, above


def question_score(stage: StagedCluster, trunk: str, said: CustomerSets) -> Score:
    """Which question a bank is asked."""
    train, test = said.questions
    texts, learned = [one.text for one in train], [one.intent for one in train]
    asked, truth = [one.text for one in test], [{"intent": one.intent} for one in test]
    tasks = stage.train(
        "banking",
        trunk=trunk,
        tasks={"intent": Labels("intent")},
        train=[{"text": one.text, "intent": one.intent} for one in train],
        test=[{"text": one.text, "intent": one.intent} for one in test],
        licence="CC BY 4.0",
    )
    job, _ = stage.run(asked, tasks, "the questions to a bank")
    right = [one["intent"] for one in truth]
    return Score(
        name=f"question to a bank, of {len({one.intent for one in test})}",
        figure="accuracy",
        rows=len(test),
        estimate=job.evaluate(truth)["intent"].figures["accuracy"],
        baselines={
            "words alone": scores.accuracy(right, scores.words_alone(texts, learned, asked)),
            "always the commonest": scores.accuracy(right, [scores.commonest(learned)] * len(right)),
        },
        floor=0.86,
    )


def mood_score(stage: StagedCluster, felt: Sequence[Felt]) -> Score:
    """Mood on texts that people have rated, and that the shipped head did not learn from."""
    texts, truth = [one.text for one in felt], [one.mood for one in felt]
    job, _ = stage.run(texts, {"mood": Classify("review-sentiment")}, "the rated texts")
    return Score(
        name="mood of rated tweets and reviews",
        figure="macro-F1",
        rows=len(felt),
        estimate=job.evaluate([{"mood": one} for one in truth])["mood"].figures["macro_f1"],
        baselines={
            "a list of rated words": scores.label_f1(truth, [one.listed for one in felt]),
            "always the commonest": scores.label_f1(truth, [scores.commonest(truth)] * len(truth)),
        },
        floor=0.60,
    )
