"""How well a score warns: precision where enough is found, curves against the threshold, what mistakes cost. numpy alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from motet.apps.application import Score
from motet.apps.data.credit import Loan
from motet.apps.data.reuters import WATCHED
from motet.apps.scores import mean, resampled
from motet.datasets import LabelledText
from motet.evaluation import Estimate
from motet.evaluation.orders import roc_auc
from motet.job import Job

#: What a bad loan that was granted costs, in units of a good one that was not: so a risk above 1 of 6 alerts.
MISSED, ALARM = 5.0, 1.0
#: How much of what the news desk watches it must find.
FOUND = 0.97

#: Words of a desk that has no model: it watches for them.
KEYWORDS = re.compile(
    r"\b(?:oil|crude|barrels?|opec|gasoline|ships?|shipping|vessels?|ports?|tankers?|cargo|tariffs?|trade|imports?|exports?"
    r"|interest|rates?|discount|prime|dollar|yen|currency|currencies|central bank|money market)\b"
)
#: Such words in a text that alert.
_KEYWORDS_NEEDED = 2


@dataclass(frozen=True, slots=True)
class Warned:
    """How well a desk warned, and its curves against the threshold."""

    scores: Sequence[Score]
    curves: Mapping[str, Sequence[tuple[float, float]]]


def of_loans(job: Job, test: Sequence[Loan], risks: Sequence[float]) -> Warned:
    """ROC AUC, the riskiest tenth and what mistakes cost, beside a rule that needs no model."""
    found = job.evaluate(
        [{"outcome": "bad" if one.bad else "good"} for one in test],
        {"risk.score": "outcome"},
        positive="bad",
        top=10,
        costs={"FN": MISSED, "FP": ALARM},
        threshold=ALARM / (MISSED + ALARM),
    )["risk.score"]
    truth, rows = [one.bad for one in test], len(test)
    rule = [one.fields["Records"] == "yes" or one.fields["Job"] == "partime" for one in test]
    words = "rule: records, or part-time work"
    cost = {
        words: _cost(truth, rule),
        "an alert on all": _cost(truth, [True] * rows),
        "an alert on none": _cost(truth, [False] * rows),
    }
    scores = (
        Score(
            name="bad loans",
            figure="ROC AUC",
            rows=rows,
            estimate=found.figures["roc_auc"],
            baselines={words: auc(truth, [float(one) for one in rule])},
            floor=0.81,
        ),
        Score(
            name="riskiest 10 % of loans",
            figure="precision",
            rows=rows,
            estimate=found.figures["precision_top_10"],
            baselines={words: precision(truth, rule), "any loan": precision(truth, [True] * rows)},
        ),
        Score(
            name=f"alerts on loans, {MISSED:g} : {ALARM:g}",
            figure="cost of a row",
            rows=rows,
            estimate=found.figures["cost"],
            baselines=cost,
        ),
    )
    return Warned(scores, {"mean cost of a loan": costs(truth, risks, missed=MISSED, alarm=ALARM)})


def of_news(news: Sequence[LabelledText], scores: Sequence[float]) -> Warned:
    """Precision where enough is found, beside words that a desk without a model would watch for."""
    truth = [one.label in WATCHED for one in news]
    rule = [has_keywords(one.text) for one in news]
    score = Score(
        name=f"news to watch, at recall {FOUND:g}",
        figure="precision",
        rows=len(news),
        estimate=precision_at_recall(truth, scores, FOUND),
        baselines={
            f"two keywords, at recall {recall(truth, rule):.2f}": precision(truth, rule),
            "any text": precision(truth, [True] * len(news)),
        },
        floor=0.90,
    )
    return Warned((score,), against_threshold(truth, scores))


def _cost(truth: Sequence[bool], alerts: Sequence[bool]) -> Estimate:
    each = [
        MISSED if one and not said else ALARM if said and not one else 0.0
        for one, said in zip(truth, alerts, strict=True)
    ]
    return mean(each)


def precision_at_recall(truth: Sequence[bool], scores: Sequence[float], recall: float) -> Estimate:
    """Precision at the highest threshold that finds ``recall`` of the positive rows, with a bootstrap over rows."""
    said, there = np.asarray(scores), np.asarray(truth, bool)

    def of(rows: Sequence[int]) -> float:
        at = np.asarray(rows)
        order = at[np.argsort(-said[at], kind="stable")]
        hits = np.cumsum(there[order])
        if not hits[-1]:
            return float("nan")
        # Rows of one score are alerted together.
        taken = int(np.searchsorted(hits, np.ceil(recall * hits[-1])))
        last = int(np.searchsorted(-said[order], -said[order[taken]], side="right"))
        return float(hits[last - 1] / last)

    return resampled(of, len(truth))


def precision(truth: Sequence[bool], alerts: Sequence[bool]) -> Estimate:
    """The share of alerts that are right, with a bootstrap over rows."""
    there, said = np.asarray(truth, bool), np.asarray(alerts, bool)

    def of(rows: Sequence[int]) -> float:
        at = np.asarray(rows)
        return float(there[at][said[at]].mean()) if said[at].any() else float("nan")

    return resampled(of, len(truth))


def auc(truth: Sequence[bool], scores: Sequence[float]) -> Estimate:
    """ROC AUC, with a bootstrap over rows."""
    return resampled(
        lambda rows: roc_auc([truth[i] for i in rows], [scores[i] for i in rows]), len(truth), resamples=200
    )


def recall(truth: Sequence[bool], alerts: Sequence[bool]) -> float:
    return sum(a and b for a, b in zip(truth, alerts, strict=True)) / max(1, sum(truth))


def has_keywords(text: str) -> bool:
    """Whether a desk without a model would alert."""
    return len(KEYWORDS.findall(text.lower())) >= _KEYWORDS_NEEDED


def against_threshold(truth: Sequence[bool], scores: Sequence[float]) -> dict[str, list[tuple[float, float]]]:
    """Precision and recall of alerts from each threshold on."""
    there, said = np.asarray(truth, bool), np.asarray(scores)
    curves: dict[str, list[tuple[float, float]]] = {"precision": [], "recall": []}
    for threshold in np.linspace(0.02, 0.98, 49):
        alerts = said >= threshold
        if alerts.any():
            curves["precision"].append((float(threshold), float(there[alerts].mean())))
        curves["recall"].append((float(threshold), float(there[alerts].sum() / max(1, there.sum()))))
    return curves


def costs(
    truth: Sequence[bool], scores: Sequence[float], *, missed: float, alarm: float
) -> list[tuple[float, float]]:
    """Mean cost of a row by threshold: ``missed`` for a positive row without alert, ``alarm`` for a false one."""
    there, said = np.asarray(truth, bool), np.asarray(scores)
    return [
        (float(t), float((missed * (there & (said < t)) + alarm * (~there & (said >= t))).mean()))
        for t in np.linspace(0.0, 1.0, 51)
    ]
