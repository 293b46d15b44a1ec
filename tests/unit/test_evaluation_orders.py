"""Evaluation of scores, lists of ids and costs, and of rows in groups: known values, naive recomputation, the command."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from motet import Choose, Classify, Client, Extract, InvalidJob, Job, NotFound, Number
from motet.evaluation import (
    Answered,
    Evaluation,
    TaskEvaluation,
    average_precision,
    evaluate,
    hit_at,
    kolmogorov_smirnov,
    measure,
    ndcg_at,
    precision_recall_at_top,
    roc_auc,
)
from motet.evaluation.further import FurtherFigures
from motet.evaluation.orders import OrderFigures
from motet.evaluation.parts import task_and_path
from motet.evaluation.views import plain_kind, told
from tests.unit.fake_api import TOKEN, FakeApi
from tests.unit.test_cli_commands import Shell, api, motet
from tests.unit.test_page import Reader

__all__ = ["api", "motet"]

FEW = settings(max_examples=40, deadline=None)
SCORES = st.one_of(st.none(), st.sampled_from([0.1, 0.4, 0.5, 0.9]))
RANKED = st.lists(st.tuples(st.booleans(), SCORES), min_size=1, max_size=25)


def of_scores(truth: Sequence[bool], scores: Sequence[float | None], **more: Any) -> TaskEvaluation:
    about = {name: more.pop(name) for name in ("groups", "top") if name in more}
    named: dict[str, Any] = {"task": "risk", "label_field": "bad", "resamples": 200} | more
    answered = Answered(kind="binary", rows=range(len(truth)), truth=truth, answers=scores, **about)
    return measure(answered, **named)


# -- known values


def test_scores_have_the_figures_of_scikit_learns_documentation() -> None:
    truth, scores = [False, False, True, True], [0.1, 0.4, 0.35, 0.8]
    assert roc_auc(truth, scores) == 0.75
    assert average_precision(truth, scores) == pytest.approx(0.8333333)
    assert kolmogorov_smirnov(truth, scores) == 0.5


def test_rows_of_one_score_are_taken_together() -> None:
    truth, scores = [True, False, True, False], [0.9, 0.8, 0.8, 0.1]
    assert roc_auc(truth, scores) == 3.5 / 4
    assert average_precision(truth, scores) == pytest.approx(1 / 2 + 1 / 2 * 2 / 3)
    # Half of the rows are the first, and one of the two with 0.8: as a mean, half a hit.
    assert precision_recall_at_top(truth, scores, 50) == (1.5 / 2, 1.5 / 2)


def test_a_row_without_a_score_is_behind_every_other() -> None:
    assert roc_auc([True, False], [None, -1e9]) == 0.0
    assert roc_auc([True, False], [None, None]) == 0.5
    assert precision_recall_at_top([True, False, False], [None, 0.2, 0.1], 34) == (0.0, 0.0)
    with pytest.raises(ValueError, match="NaN"):
        roc_auc([True, False], [math.nan, 0.1])


def test_the_top_share_is_rounded_up_to_whole_rows() -> None:
    truth, scores = [True, False, True, *[False] * 7], [1 - i / 10 for i in range(10)]
    assert precision_recall_at_top(truth, scores, 1) == (1.0, 0.5)
    assert precision_recall_at_top(truth, scores, 20) == (0.5, 0.5)
    assert precision_recall_at_top(truth, scores, 21) == pytest.approx((2 / 3, 1.0))
    assert precision_recall_at_top(truth, scores, 100) == (0.2, 1.0)


def test_figures_that_need_both_classes_are_not_defined_without() -> None:
    found = of_scores([False, False], [0.1, 0.2], top=(50.0,))
    assert {name: e.value for name, e in found.figures.items()} == {
        "roc_auc": None,
        "average_precision": None,
        "ks": None,
        "precision_top_50": 0.0,
        "recall_top_50": None,
    }
    json.dumps(found.to_dict(), allow_nan=False)


def test_lists_have_the_gains_that_the_formula_says() -> None:
    best = 1 + 1 / math.log2(3)
    assert ndcg_at({"a", "b"}, ["x", "a", "b"], 3) == pytest.approx((1 / math.log2(3) + 1 / 2) / best)
    assert ndcg_at({"a", "b"}, ["x", "a", "b"], 1) == 0.0
    assert ndcg_at({"a", "b", "c"}, ["a"], 1) == 1.0, "the best list of one holds one"
    assert ndcg_at({"b"}, ["a", "a", "b"], 2) == pytest.approx(1 / math.log2(3)), "an id counts once"
    assert (hit_at({"a"}, ["x", "a"], 2), hit_at({"a"}, ["x", "a"], 1), hit_at({"a"}, None, 9)) == (1, 0, 0)
    assert ndcg_at({"a"}, None, 10) == 0.0


# -- beside naive recomputation


@FEW
@given(RANKED)
def test_figures_of_scores_are_those_of_their_definitions(rows: list[tuple[bool, float | None]]) -> None:
    truth, scores = [t for t, _ in rows], [s for _, s in rows]
    said = [-1.0 if s is None else s for s in scores]
    good = [s for t, s in zip(truth, said, strict=True) if t]
    poor = [s for t, s in zip(truth, said, strict=True) if not t]
    if good and poor:
        won = sum((g > p) + (g == p) / 2 for g in good for p in poor)
        assert roc_auc(truth, scores) == pytest.approx(won / len(good) / len(poor))
        gaps = [sum(g >= x for g in good) / len(good) - sum(p >= x for p in poor) / len(poor) for x in said]
        assert kolmogorov_smirnov(truth, scores) == pytest.approx(max(map(abs, gaps)))
    if good:
        area, before = 0.0, 0.0
        for x in sorted(set(said), reverse=True):
            recall = sum(g >= x for g in good) / len(good)
            area += (recall - before) * sum(g >= x for g in good) / sum(s >= x for s in said)
            before = recall
        assert average_precision(truth, scores) == pytest.approx(area)


@FEW
@given(st.lists(st.tuples(st.booleans(), SCORES), min_size=1, max_size=6), st.integers(1, 100))
def test_of_rows_with_one_score_the_top_share_takes_the_mean_of_all_choices(
    rows: list[tuple[bool, float | None]], share: int
) -> None:
    taken = math.ceil(share * len(rows) / 100)
    found = [
        sum(truth for truth, _ in sorted(order, key=lambda row: -(row[1] or 0.0))[:taken])
        for order in permutations(rows)
    ]
    precision, _ = precision_recall_at_top([t for t, _ in rows], [s for _, s in rows], share)
    assert precision == pytest.approx(sum(found) / len(found) / taken)


@FEW
@given(st.data(), RANKED)
def test_a_row_that_counts_twice_is_two_rows(data: Any, rows: list[tuple[bool, float | None]]) -> None:
    times = data.draw(st.lists(st.integers(0, 3), min_size=len(rows), max_size=len(rows)).filter(any))
    truth, scores = [t for t, _ in rows], [s for _, s in rows]
    often = [row for row, n in zip(rows, times, strict=True) for _ in range(n)]
    apart = OrderFigures([t for t, _ in often], [s for _, s in often], (10, 50))
    assert OrderFigures(truth, scores, (10, 50)).of(np.array(times, float)) == pytest.approx(
        apart.of(np.ones(len(often))), nan_ok=True
    )


@FEW
@given(RANKED.filter(lambda rows: len(rows) > 3), st.randoms(use_true_random=False))
def test_groups_are_drawn_whole_as_if_their_rows_were_put_together(
    rows: list[tuple[bool, float | None]], dice: Any
) -> None:
    groups = [f"g{i % 4}" for i in range(len(rows))]
    found = of_scores([t for t, _ in rows], [s for _, s in rows], groups=groups, resamples=30)
    draws, generator = [], np.random.default_rng(0)
    for _ in range(30):
        drawn = [row for g in generator.integers(0, 4, 4) for row in rows[g::4]]
        draws.append(roc_auc([t for t, _ in drawn], [s for _, s in drawn]))
    defined = [value for value in draws if not math.isnan(value)]
    auc = found.figures["roc_auc"]
    if 2 * len(defined) >= len(draws):
        assert (auc.low, auc.high) == pytest.approx(tuple(np.quantile(defined, [0.025, 0.975])))
    else:
        assert (auc.low, auc.high) == (None, None)
    together = list(zip(rows, groups, strict=True))
    dice.shuffle(together)
    again = of_scores(
        [row[0] for row, _ in together],
        [row[1] for row, _ in together],
        groups=[group for _, group in together],
        resamples=30,
    )
    assert again == found


def test_rows_of_one_group_that_are_alike_say_no_more_than_one_row() -> None:
    """Ten copies of each of 60 rows: by groups as wide as 60 rows, by rows a third as wide."""
    truth = ["a" if i % 3 else "b" for i in range(60)]
    answers = ["a"] * 60

    def width(copies: int, **more: Any) -> float:
        all_rows = [t for t in truth for _ in range(copies)]
        answered = Answered(
            kind="label", rows=range(len(all_rows)), truth=all_rows, answers=answers * copies, **more
        )
        found = measure(answered, resamples=500).figures["accuracy"]
        assert found.value == pytest.approx(2 / 3)
        assert found.low is not None
        assert found.high is not None
        return found.high - found.low

    by_group = width(10, groups=[f"g{i}" for i in range(60) for _ in range(10)])
    assert by_group == pytest.approx(width(1), rel=0.2)
    assert by_group > 2.5 * width(10)


def test_all_right_rows_in_groups_are_as_sure_as_so_many_groups() -> None:
    alike = Answered(kind="label", rows=range(50), truth=["a"] * 50, answers=["a"] * 50)
    apart = measure(alike, resamples=20).figures["accuracy"].low
    grouped = Answered(
        kind="label", rows=range(50), truth=["a"] * 50, answers=["a"] * 50, groups=["x", "y"] * 25
    )
    together = measure(grouped, resamples=20).figures["accuracy"].low
    assert apart is not None
    assert together is not None
    assert together < 0.5 < apart


def test_two_scores_are_compared_on_the_same_groups_and_without_mcnemar() -> None:
    truth = [i % 4 == 0 for i in range(200)]
    groups = [f"g{i // 5}" for i in range(200)]
    good = of_scores(truth, [0.9 if t else i / 400 for i, t in enumerate(truth)], groups=groups)
    poor = of_scores(truth, [(i * 7 % 11) / 11 for i in range(200)], groups=groups, task="poor")
    found = good.compare(poor, resamples=200)
    assert (found.p, found.only_first, found.rows, found.groups) == (None, None, 200, 40)
    difference = found.figures["roc_auc"].difference
    assert difference.low is not None
    assert difference.low > 0
    with pytest.raises(InvalidJob, match="other groups; expected the same groups"):
        good.compare(of_scores(truth, [0.5] * 200, task="apart"))


def test_a_thousand_resamples_of_many_rows_take_no_time() -> None:
    """A bound that only a loop in Python would break: 20,000 rows in 2,000 groups."""
    dice = np.random.default_rng(1)
    truth = (dice.random(20_000) < 0.1).tolist()
    found = of_scores(
        truth, dice.random(20_000).tolist(), groups=[f"g{i % 2000}" for i in range(20_000)], resamples=100
    )
    low, high = found.figures["roc_auc"].low, found.figures["roc_auc"].high
    assert low is not None
    assert high is not None
    assert low < 0.5 < high


# -- costs


def labelled(asked: FurtherFigures, answers: Sequence[str | None]) -> dict[str, float | None]:
    truth = ["sick", "sick", "well", "well"]
    found = told(Answered(kind="label", rows=range(4), truth=truth, answers=answers), asked)
    return {name: e.value for name, e in measure(found, resamples=20).figures.items()}


def test_costs_are_means_over_rows_and_no_answer_costs_as_much_as_the_worst() -> None:
    matrix = FurtherFigures.of(costs={"sick": {"well": 10}, "Well": {"sick": 2, "well": 1}})
    assert labelled(matrix, ["well", "sick", "sick", "well"])["cost"] == (10 + 0 + 2 + 1) / 4
    assert labelled(matrix, [None, "sick", None, "well"])["cost"] == (10 + 0 + 2 + 1) / 4
    silent = FurtherFigures.of(costs={"sick": {"well": 10, "no answer": 3}, "well": {"sick": 2}})
    assert labelled(silent, [None, "sick", "well", "well"])["cost"] == 3 / 4
    mistakes = FurtherFigures.of(positive="sick", costs={"FN": 5, "FP": 1, "TP": 0.5})
    assert labelled(mistakes, ["well", "sick", "sick", None])["cost"] == (5 + 0.5 + 1 + 1) / 4


def test_costs_of_scores_have_a_threshold() -> None:
    rows = Answered(
        kind="binary", rows=range(4), truth=[True, True, False, False], answers=[0.4, None, 0.3, 0.2]
    )

    def cost(threshold: float) -> float | None:
        found = told(rows, FurtherFigures.of(costs={"FN": 5, "FP": 1}, threshold=threshold))
        return measure(found, resamples=20).figures["cost"].value

    assert (cost(0.5), cost(0.4), cost(0.3)) == (10 / 4, 5 / 4, 6 / 4)


def test_an_answer_that_no_float_can_hold_is_no_answer() -> None:
    rows = Answered(
        kind="json", rows=range(4), truth=[True, False, False, True], answers=[10**400, 1, math.nan, 2.5]
    )
    found = told(plain_kind(rows, FurtherFigures(), is_part=True), FurtherFigures())
    assert (found.kind, found.answers) == ("binary", [None, 1.0, None, 2.5])


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"top": 0}, "top: got 0; expected per cent, above 0"),
        ({"top": (5, 101)}, "top: got 101"),
        ({"at": 0}, "at: got 0; expected a whole number of 1 or more"),
        ({"at": (True,)}, "at: got True"),
        ({"at": "10"}, "at: got 10"),
        ({"threshold": math.nan}, "threshold: got nan; expected a finite number"),
        ({"costs": {}}, "costs: got nothing"),
        ({"costs": [1]}, "costs: got a value of type list"),
        ({"costs": {"XY": 1}}, "costs.XY: got an unknown outcome; expected TP, FP, FN, TN"),
        ({"costs": {"FN": "much"}}, "costs.FN: got much; expected a finite number"),
        ({"costs": {"a": {"b": None}}}, r"costs.a.b: got None"),
        ({"costs": {"a": {"b": 1}, "FN": 1}}, "costs: got both numbers and objects"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(more: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidJob, match=words):
        FurtherFigures.of(**more)


# -- parts of answers


def test_a_part_is_found_by_its_path_and_a_task_by_the_longest_name_that_fits() -> None:
    tasks = ("risk", "risk.deep", "risky")
    assert task_and_path("risk.score", tasks) == ("risk", ("score",))
    assert task_and_path("risk.deep.score[-1]", tasks) == ("risk.deep", ("score", -1))
    assert task_and_path("risky", tasks) == ("risky", ())
    assert task_and_path("riskless", tasks) is None
    for bad in ("risk.", "risk[x y]", "risk.a[0", "risk..a"):
        with pytest.raises(InvalidJob, match="expected keys and places"):
            task_and_path(bad, tasks)


# -- beside a job


@pytest.fixture
def client(api: FakeApi) -> Iterator[Client]:
    with Client(api.url, TOKEN) as client:
        yield client


def job_of(client: Client, api: FakeApi, bad: int = 0) -> Job:
    """A job of 12 rows, the last ``bad`` of which are errors."""
    sent = [{"text": f"ticket {i}"} for i in range(12 - bad)] + [{"text": math.nan}] * bad
    tasks = {
        "topic": Classify("news-topics"),
        "mood": Choose("m", labels=("glad", "sad", "so so")),
        "films": Extract("m", schema={"type": "object"}),
        "urgency": Number("n"),
        "tone": Classify("tone"),
    }
    job = client.submit(sent, tasks, bad_rows="error", reuse=False)
    api.jobs[job.id].tasks["topic"]["labels"] = ["sport", "tech"]
    api.jobs[job.id].tasks["tone"]["labels"] = ["glad", "sad", "loud"]
    return client.job(job.id)


def truth_of() -> list[dict[str, Any]]:
    """Rows 8 to 11 are bad, of which the fake says a higher urgency and risk; tech is every second row."""
    return [
        {
            "topic": ("sport", "tech")[i % 2],
            "mood": ("glad", "sad", "so so")[i % 3],
            "bad": i >= 8,
            "word": "bad" if i >= 8 else "good",
            "flag": int(i >= 8),
            "film": i,
            "tone": ["glad", "sad", "loud"][: i % 3],
            "who": f"c{i // 2}",
        }
        for i in range(12)
    ]


def evaluated(job: Job, *asked: Any, **more: Any) -> Evaluation:
    """As Job.evaluate, with few resamples."""
    return evaluate(job, *asked, resamples=20, **more)


def value_of(found: TaskEvaluation, name: str) -> float | None:
    return found.figures[name].value


def test_numbers_and_parts_of_answers_are_ranked_beside_a_binary_truth(client: Client, api: FakeApi) -> None:
    job = job_of(client, api)
    for tasks, positive in (
        ({"urgency": "bad", "films.risk": "bad"}, None),
        ({"urgency": "word", "films.risk": "word"}, "Bad"),
        ({"urgency": "flag", "films.risk": "flag"}, None),
    ):
        found = evaluated(job, truth_of(), tasks, positive=positive, top=(25, 50))
        for name in tasks:
            assert value_of(found[name], "roc_auc") == value_of(found[name], "average_precision") == 1.0
            assert value_of(found[name], "precision_top_50") == pytest.approx(4 / 6)
            assert value_of(found[name], "recall_top_25") == pytest.approx(3 / 4)
            assert (found[name].positive, found[name].rows) == (4, 12)
        assert ("mae" in found["urgency"].figures) == (tasks["urgency"] == "flag")
        compared = found["urgency"].compare(found["films.risk"], resamples=20)
        assert compared.figures["roc_auc"].difference.value == 0.0
    part_alone = evaluated(job, [{"risk": i / 10} for i in range(12)], {"films.risk": "risk"})["films.risk"]
    assert (part_alone.kind, value_of(part_alone, "mae")) == ("number", 0.0)


def test_errors_have_the_worst_rank(client: Client, api: FakeApi) -> None:
    found = evaluated(job_of(client, api, bad=2), truth_of(), {"urgency": "bad"}, top=20)["urgency"]
    # Of the four bad rows two are first and two behind all eight others.
    assert (value_of(found, "roc_auc"), found.errors) == (0.5, 2)
    assert value_of(found, "precision_top_20") == pytest.approx(2 / 3)


def test_the_score_of_a_label_is_ranked_beside_its_other_figures(client: Client, api: FakeApi) -> None:
    job = job_of(client, api)
    found = evaluated(job, truth_of(), ["topic"], positive="TECH", costs={"FN": 5, "FP": 1})["topic"]
    assert (found.accuracy, value_of(found, "roc_auc"), value_of(found, "cost")) == (1.0, 1.0, 0.0)
    tone = evaluated(job, truth_of(), ["tone"], positive="sad")["tone"]
    assert (value_of(tone, "roc_auc"), tone.positive) == (1.0, 4)
    with pytest.raises(InvalidJob, match="tells the surest of 3 labels alone; expected every label's score"):
        evaluated(job, truth_of(), ["mood"], positive="sad")


def test_lists_of_ids_are_looked_through_for_the_true_ones(client: Client, api: FakeApi) -> None:
    job = job_of(client, api)
    truth = truth_of()
    truth[4]["film"] = [9, "101", 103]
    truth[5]["film"] = None
    found = evaluated(job, truth, {"films.best": "film"}, at=(1, 4))["films.best"]
    assert (found.kind, found.rows, found.unlabelled) == ("ranking", 11, 1)
    assert value_of(found, "hit_rate_at_1") == 1 / 11
    # Rows 0 to 3 have theirs at places 1 to 4, and row 4 the second and the fourth of three.
    single = sum(1 / math.log2(place + 1) for place in range(1, 5))
    several = (1 / math.log2(3) + 1 / math.log2(5)) / sum(1 / math.log2(p + 1) for p in range(1, 4))
    assert value_of(found, "hit_rate_at_4") == 5 / 11
    assert value_of(found, "ndcg_at_4") == pytest.approx((single + several) / 11)
    truth[5]["film"] = []
    with pytest.raises(InvalidJob, match="row 5, labels: got an empty list; expected an id or a list of ids"):
        evaluated(job, truth, {"films.best": "film"}, at=4)


def test_a_part_that_is_not_there_counts_as_no_answer(client: Client, api: FakeApi) -> None:
    found = evaluated(job_of(client, api), truth_of(), {"films.best[1].idd": "bad"})
    assert found.warnings == ("films.best[1].idd: 12 answers have no such part; they count as no answer",)


@pytest.mark.parametrize(
    ("tasks", "more", "words"),
    [
        (
            {"urgency": "bad"},
            {"positive": "worse"},
            r"positive: got worse; expected a label of the truth \(fa",
        ),
        ({"films.risk": "word"}, {}, "labels: got neither numbers nor two values beside a part"),
        (
            {"urgency": "film"},
            {"top": 5},
            "top: got no such answers in urgency; expected a number or a label",
        ),
        ({"topic": "topic"}, {"at": 5}, "at: got no such answers in topic"),
        ({"topic": "topic"}, {"costs": {"FN": 1}}, "costs: got no such answers in topic; expected a binary"),
        ({"topic": "topic"}, {"costs": {"tech": {}}}, "no costs of rows whose label is 'sport'"),
        ({"topic": "mood"}, {"costs": {m: {} for m in ("glad", "sad", "so so")}}, "no cost of the answer"),
        (
            {"topic.score": "bad"},
            {},
            "a part of an answer that is no JSON; expected a task that answers JSON",
        ),
        ({"topic": "topic"}, {"group": "whom"}, "row 0, labels.whom: got no such field; expected the group"),
        ({"topic": "topic"}, {"group": "tone"}, "row 0, labels.tone: got a value of type list"),
    ],
)
def test_what_does_not_fit_the_labels_says_why(
    client: Client, api: FakeApi, tasks: dict[str, str], more: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidJob, match=words):
        evaluated(job_of(client, api), truth_of(), tasks, **more)


def test_groups_come_from_a_field_of_the_labels(client: Client, api: FakeApi) -> None:
    job, truth = job_of(client, api), truth_of()
    truth[3]["topic"] = "sport"
    found = evaluated(job, truth, {"topic": "topic", "mood": "topic"}, group="who")
    assert (found["topic"].groups, found["topic"].accuracy) == (6, 11 / 12)
    assert "12 rows in 6 groups" in str(found["topic"])
    compared = found["topic"].compare(found["mood"], resamples=20)
    assert (compared.p, compared.only_first, compared.groups) == (None, 11, 6)
    assert "there is no McNemar's test" in compared.verdict
    del truth[3]["who"]
    with pytest.raises(InvalidJob, match=r"row 3, labels\.who: got no such field"):
        evaluated(job, truth, ["topic"], group="who")
    with pytest.raises(InvalidJob, match=r"labels\.who: got one group; expected two at least"):
        evaluated(job, [t | {"who": 1} for t in truth], ["topic"], group="who")
    with pytest.raises(NotFound, match=r"has no task 'topical\.x'"):
        evaluated(job, truth, ["topical.x"])


# -- the command


@pytest.fixture
def labels(tmp_path: Path) -> str:
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in truth_of()))
    return str(path)


def test_evaluate_prints_ranks_costs_and_groups(
    api: FakeApi, motet: Shell, client: Client, labels: str, tmp_path: Path
) -> None:
    job, page = job_of(client, api, bad=1), tmp_path / "report.html"
    asked = ("evaluate", job.id, "--labels", labels, "--task", "films.risk=bad", "--task", "urgency=bad")
    more = ("--top", "5,50", "--cost", "fn=5,FP=1", "--threshold", "0.85", "--group", "who")
    ran = motet(*asked, *more, "--html", str(page), "--compare", "films.risk", "urgency")
    assert ran.code == 0, ran.err
    for words in ("ROC AUC", "average precision", "recall of the top 50 %", "mean cost of a row"):
        assert words in ran.out
        assert words in page.read_text()
    assert "12 rows in 6 groups, 4 of them positive · 1 error" in " ".join(ran.out.split())
    assert "second: urgency · 12 rows in 6 groups" in page.read_text()
    assert "resampling the groups of rows" in page.read_text()
    Reader(page.read_text())
    record = json.loads(motet(*asked, *more, "--json").out)["evaluations"][0]["tasks"]["films.risk"]
    # Rows 8 and 11, of which the last is an error, are missed.
    assert record["figures"]["cost"]["value"] == pytest.approx(2 * 5 / 12)
    ranked = motet("evaluate", job.id, "--labels", labels, "--task", "films.best=film", "--at", "2,4")
    assert "HR@2" in ranked.out
    assert "NDCG@4" in ranked.out


def test_evaluate_reads_costs_of_labels_from_a_file(
    api: FakeApi, motet: Shell, client: Client, labels: str, tmp_path: Path
) -> None:
    costs = tmp_path / "costs.json"
    costs.write_text('{"sport": {"tech": 3}, "tech": {"tech": 1}}')
    asked = ("evaluate", job_of(client, api).id, "--labels", labels, "--task", "topic", "--json", "--costs")
    record = json.loads(motet(*asked, str(costs)).out)["evaluations"][0]["tasks"]["topic"]
    assert record["figures"]["cost"]["value"] == 0.5
    costs.write_text("{")
    assert "expected JSON, such as" in motet(*asked, str(costs)).err
    assert "No such file" in motet(*asked, str(tmp_path / "none.json")).err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--top", "five"), "--top 'five': expected numbers"),
        (("--at", "1.5"), "--at '1.5': expected numbers"),
        (("--cost", "FN"), "--cost 'FN': expected such as FN=5,FP=1"),
        (("--cost", "FN=1", "--costs", "x"), "not both"),
        (("--threshold", "0.3"), "give both"),
    ],
)
def test_evaluate_refuses_options_that_were_written_wrongly(
    api: FakeApi, motet: Shell, labels: str, more: tuple[str, ...], words: str
) -> None:
    ran = motet("evaluate", "a", "--labels", labels, *more)
    assert ran.code == 2
    assert words in ran.err
