"""Evaluation: figures with known values, what holds of all of them, labels that do not fit, and the command."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from motet import Choose, Classify, Client, Embed, Extract, Generate, InvalidJob, Job, NotFound, Number
from motet.errors import SetupError
from motet.evaluation import (
    Answered,
    LabelReader,
    TaskEvaluation,
    accuracy,
    bootstrap,
    calibration,
    confusion,
    exact_match,
    label_figures,
    macro_f1,
    mcnemar,
    mean_absolute_error,
    measure,
    near_share,
    normalised,
    number_figures,
    root_mean_squared_error,
    same_json,
    set_accuracy,
    set_figures,
    set_macro_f1,
    token_f1,
    wilson,
)
from motet.evaluation.report import MOST_LABELS
from motet.evaluation.truth import TAKE
from motet.pages import environment
from tests.unit.fake_api import TOKEN, FakeApi
from tests.unit.test_cli_commands import Shell, api, motet
from tests.unit.test_page import Reader

__all__ = ["api", "motet"]

#: Six cats, ten fish and nine hens: the example by which macro-F1 is often explained.
TRUTH = ["cat"] * 6 + ["fish"] * 10 + ["hen"] * 9
ANSWERS: list[str | None] = (
    ["cat"] * 4 + ["fish", "hen"] + ["cat"] * 6 + ["fish"] * 2 + ["hen"] * 2 + ["cat"] * 3 + ["hen"] * 6
)


def of_labels(truth: list[str], answers: list[str | None], **more: Any) -> TaskEvaluation:
    more = {"task": "topic", "label_field": "topic", "resamples": 200, "scores": (), "labels": ()} | more
    about = {name: more.pop(name) for name in ("scores", "labels")}
    return measure(
        Answered(kind="label", rows=range(len(truth)), truth=truth, answers=answers, **about), **more
    )


# -- known values


def test_labels_have_the_figures_that_are_known_of_this_example() -> None:
    assert accuracy(TRUTH, ANSWERS) == 12 / 25
    found = {f.label: f for f in label_figures(TRUTH, ANSWERS)}
    assert (found["cat"].precision, found["cat"].recall) == (4 / 13, 4 / 6)
    assert (found["fish"].precision, found["fish"].recall) == (2 / 3, 2 / 10)
    assert (found["hen"].precision, found["hen"].recall) == (6 / 9, 6 / 9)
    assert [f.f1 for f in found.values()] == pytest.approx([8 / 19, 4 / 13, 2 / 3])
    assert macro_f1(TRUTH, ANSWERS) == pytest.approx((8 / 19 + 4 / 13 + 2 / 3) / 3)
    assert (found["fish"].support, found["fish"].answered) == (10, 3)


def test_an_answer_that_is_missing_is_wrong_and_belongs_to_no_label() -> None:
    assert accuracy(["a", "b"], ["a", None]) == 0.5
    assert macro_f1(["a", "b"], ["a", None]) == 0.5
    assert confusion(["a", "b"], ["a", None], labels=("b", "a", "z")).counts == (
        (0, 0, 0, 1),
        (0, 1, 0, 0),
        (0, 0, 0, 0),
    )
    never = label_figures(["a"], ["a"], labels=("z",))[0]
    assert (never.label, never.precision, never.recall, never.f1) == ("z", None, None, None)


def test_several_labels_a_row_are_each_a_question_of_its_own() -> None:
    truth, answers = [{"a", "b"}, {"b"}, set[str](), {"c"}], [{"a"}, {"b", "c"}, set[str](), None]
    assert exact_match(truth, answers) == 0.25
    figures = {f.label: (f.precision, f.recall, f.f1) for f in set_figures(truth, answers)}
    assert figures == {"a": (1, 1, 1), "b": (1, 0.5, pytest.approx(2 / 3)), "c": (0, 0, 0)}
    assert set_macro_f1(truth, answers) == pytest.approx(5 / 9)
    assert set_macro_f1([set()], [set()]) == 1.0


def test_pairs_of_row_and_label_count_as_wrong_where_a_row_has_no_answer() -> None:
    truth, answers = [{"a", "b"}, {"b"}, set[str]()], [{"a"}, {"b"}, None]
    assert set_accuracy(truth, answers, ("a", "b")) == pytest.approx(3 / 6)
    assert set_accuracy(truth, answers, ("a", "b", "c")) == pytest.approx(5 / 9)


def test_numbers_that_are_near_are_counted_by_the_spread_of_the_truth() -> None:
    assert near_share([0.0, 10.0], [0.04, 10.06]) == 0.5
    assert near_share([0.0, 10.0], [0.0, float("nan")]) == 0.5
    assert near_share([7.0, 7.0], [7.005, 7.02]) == 0.5


def test_training_and_evaluation_say_the_same_of_the_same_answers() -> None:
    torch = pytest.importorskip("torch")
    from motet.training.recipe import Target
    from workers.engines.training.heads import _score
    from workers.engines.training.truth import Truth

    labels = ("a", "b", "c")
    one = Truth.of(Target.single("one", labels, [labels["abc".index(t)] for t in "abbab"]))
    answers = "bbaab"
    logits = torch.nn.functional.one_hot(torch.tensor(["abc".index(a) for a in answers]), 3).float()
    found = _score(one, logits, one.values)
    assert found["accuracy"] == accuracy("abbab", answers)
    assert found["macro_f1"] == pytest.approx(macro_f1("abbab", answers))

    truth, said = [{"a", "b"}, {"b"}, set[str]()], [{"a"}, {"b", "a"}, set[str]()]
    several = Truth.of(Target.multi("several", labels, [sorted(t) for t in truth]))
    logits = torch.tensor([[1.0 if m in row else -1.0 for m in labels] for row in said])
    found = _score(several, logits, several.values)
    assert found["accuracy"] == pytest.approx(set_accuracy(truth, said, labels))
    assert found["macro_f1"] == pytest.approx(set_macro_f1(truth, said))
    assert _score(several, -torch.ones(1, 3), several.values[2:])["macro_f1"] == 1.0, "nothing is wrong"

    number = Truth.of(Target.number("number", [1.0, 2.0, 4.0]))
    found = _score(number, torch.tensor([[1.0], [2.5], [4.0]]), number.values)
    mae, _, r2, _ = number_figures([1.0, 2.0, 4.0], [1.0, 2.5, 4.0])
    assert (found["mae"], found["r2"]) == (pytest.approx(mae), pytest.approx(r2))


def test_numbers_have_the_figures_of_scikit_learns_documentation() -> None:
    truth, answers = [3, -0.5, 2, 7], [2.5, 0.0, 2, 8]
    assert mean_absolute_error(truth, answers) == 0.5
    assert root_mean_squared_error(truth, answers) == pytest.approx(math.sqrt(0.375))
    assert number_figures(truth, answers)[2] == pytest.approx(0.9486081370449679)
    assert number_figures(truth, answers)[3] == pytest.approx(np.corrcoef(truth, answers)[0, 1])
    r2, r = number_figures([2.1, 2.1, 2.1], [1, 2, 3])[2:]
    assert math.isnan(r2)
    assert math.isnan(r)


def test_calibration_error_is_the_mean_gap_weighed_by_rows() -> None:
    # Four answers at 0.9 of which half are right, one at 0.25 that is: 0.8 · 0.4 + 0.2 · 0.75.
    found = calibration([0.9, 0.9, 0.9, 0.9, 0.25], [1, 1, 0, 0, 1], bins=10)
    assert found.ece == pytest.approx(0.8 * 0.4 + 0.2 * 0.75)
    assert found.largest_gap == pytest.approx(0.75)
    assert [(round(b.low, 1), b.rows, b.accuracy) for b in found.bins if b.rows] == [
        (0.2, 1, 1.0),
        (0.8, 4, 0.5),
    ]
    assert calibration([0.0, 1.0], [0, 1]).ece == 0
    with pytest.raises(ValueError, match="outside 0 to 1"):
        calibration([1.5], [1])
    with pytest.raises(ValueError, match="outside 0 to 1"):
        calibration([math.nan], [1])


def test_mcnemar_is_the_binomial_test_of_rows_on_which_two_differ() -> None:
    assert mcnemar(0, 5) == pytest.approx(2 / 2**5)
    assert mcnemar(3, 10) == pytest.approx(2 * (1 + 13 + 78 + 286) / 2**13)
    assert mcnemar(7, 7) == mcnemar(0, 0) == 1.0
    assert mcnemar(100_000, 101_000) == pytest.approx(0.0258623925, rel=1e-6)


def test_wilsons_interval_is_the_known_one_and_never_empty() -> None:
    assert wilson(7, 20) == pytest.approx((0.1812, 0.5671), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


def test_the_bootstrap_draws_what_is_known_of_a_mean() -> None:
    """The share of 300 right rows in 1,000 spreads by sqrt(0.3 · 0.7 / 1000), in both ways of drawing."""
    for values, counts in (([1.0, 0.0], [300, 700]), ([1.0] * 300 + [0.0] * 700, [1] * 1000)):
        column = np.array(values)

        def share(weights: Any, column: Any = column) -> Any:
            return np.array([weights @ column / weights.sum()])

        draws = bootstrap(share, np.array(counts), resamples=3000)
        assert draws.mean() == pytest.approx(0.3, abs=0.001)
        assert draws.std() == pytest.approx(math.sqrt(0.3 * 0.7 / 1000), rel=0.05)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("  The Cat,  sat! ", "the cat sat"),
        ("ＦＵＬＬ width", "full width"),
        ("3.5 of 1,000 at -2", "3.5 of 1,000 at -2"),
        ("Straße – naïve", "strasse naïve"),
        ("!?", ""),
    ],
)
def test_texts_are_compared_without_case_and_punctuation(text: str, plain: str) -> None:
    assert normalised(text) == plain


def test_words_that_two_texts_share_make_their_f1() -> None:
    assert token_f1("the cat sat", "The cat.") == pytest.approx(2 * 2 / 5)
    assert (token_f1("", "!"), token_f1("a", ""), token_f1("a a b", "a b b")) == (
        1.0,
        0.0,
        pytest.approx(2 / 3),
    )


def test_json_is_the_same_by_value() -> None:
    assert same_json({"a": 1, "b": ["X."]}, {"b": ["x"], "a": 1.0})
    assert not same_json({"a": 1}, {"a": True})
    assert not same_json({"a": 1}, {"a": 1, "b": None})
    assert not same_json([1, 2], [2, 1])


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("Sport.", "sport"),
        ("The topic is: SPORT", "sport"),
        ("I am very glad", "very glad"),
        ("sport or tech", None),
        ("transport", None),
        ("", None),
        ("c++", "C++"),
        ("C", "C"),
        ("it is C++", None),
    ],
)
def test_a_label_is_read_where_it_is_the_only_one_and_never_guessed(text: str, label: str | None) -> None:
    assert LabelReader(["sport", "tech", "glad", "very glad", "C", "C++"]).read(text) == label


# -- what always holds

LABELS = st.sampled_from(["a", "b", "c"])
ROWS = st.lists(st.tuples(LABELS, st.one_of(st.none(), LABELS)), min_size=1, max_size=30)
FEW = settings(max_examples=40, deadline=None)


@FEW
@given(ROWS, st.randoms(use_true_random=False))
def test_figures_lie_within_their_bounds_and_rows_may_stand_in_any_order(
    rows: list[tuple[str, str | None]], dice: Any
) -> None:
    truth, answers = [t for t, _ in rows], [a for _, a in rows]
    found = of_labels(truth, answers)
    for estimate in found.figures.values():
        assert estimate.value is not None
        assert estimate.low is not None
        assert estimate.high is not None
        assert 0 <= estimate.low <= estimate.high <= 1
        assert 0 <= estimate.value <= 1
    assert found.macro_f1 == pytest.approx(macro_f1(truth, answers))
    assert found.accuracy == pytest.approx(accuracy(truth, answers))
    dice.shuffle(rows)
    again = of_labels([t for t, _ in rows], [a for _, a in rows])
    assert again == found


@FEW
@given(st.lists(LABELS, min_size=1, max_size=30))
def test_perfect_answers_are_one_everywhere_and_their_interval_is_not_empty(truth: list[str]) -> None:
    found = of_labels(truth, list(truth))
    assert found.accuracy == found.macro_f1 == 1.0
    low = found.figures["accuracy"].low
    assert low is not None
    assert 0 < low < 1
    as_sets = [frozenset([t]) for t in truth]
    for kind, right in (("labels", as_sets), ("text", truth), ("json", truth)):
        same = measure(
            Answered(kind=kind, rows=range(len(truth)), truth=right, answers=right),  # type: ignore[arg-type]
            resamples=20,
        )
        assert {e.value for e in same.figures.values()} == {1.0}


@FEW
@given(ROWS, st.lists(st.one_of(st.none(), LABELS), min_size=30, max_size=30))
def test_a_comparison_turned_round_is_the_same_with_the_other_sign(
    rows: list[tuple[str, str | None]], others: list[str | None]
) -> None:
    truth = [t for t, _ in rows]
    a = of_labels(truth, [a for _, a in rows])
    b = of_labels(truth, others[: len(rows)], task="other")
    there, back = a.compare(b, resamples=50), b.compare(a, resamples=50)
    assert (there.only_first, there.only_second, there.p) == (back.only_second, back.only_first, back.p)
    for name, figure in there.figures.items():
        assert figure.difference.value == pytest.approx(-(back.figures[name].difference.value or 0.0))
    same = a.compare(a, resamples=50)
    assert same.p == 1.0
    assert {(d.difference.value, d.difference.low, d.difference.high) for d in same.figures.values()} == {
        (0, 0, 0)
    }


def test_two_models_are_told_apart_by_rows_on_which_they_differ() -> None:
    truth = ["a", "b"] * 100
    good: list[str | None] = [*truth[:190], *["a"] * 10]
    poor: list[str | None] = [*truth[:150], *["a"] * 50]
    found = of_labels(truth, good).compare(of_labels(truth, poor, task="poor"))
    assert (found.only_first, found.only_second) == (20, 0)
    accuracy_ = found.figures["accuracy"]
    assert (accuracy_.first, accuracy_.second) == (0.975, 0.875)
    assert accuracy_.difference.low is not None
    assert accuracy_.difference.low > 0
    assert found.p == pytest.approx(2 / 2**20)
    assert "+10.0 points [+" in str(found)


def test_numbers_are_compared_on_the_rows_that_both_have_answered() -> None:
    def numbers(answers: list[float | None], task: str) -> TaskEvaluation:
        of = Answered(kind="number", rows=range(4), truth=[1.0, 2.0, 3.0, 4.0], answers=answers, errors=1)
        return measure(of, task=task, label_field="n", resamples=50)

    a, b = numbers([1.0, 2.0, 3.0, None], "a"), numbers([None, 3.0, 4.0, 5.0], "b")
    assert (a.figures["mae"].value, b.figures["mae"].value, a.rows, a.errors) == (0.0, 1.0, 4, 1)
    found = a.compare(b)
    assert (found.rows, found.p, found.only_first) == (2, None, None)
    assert (found.figures["mae"].first, found.figures["mae"].second) == (0.0, 1.0)
    nothing = numbers([None, None, None, None], "c")
    assert {e.value for e in nothing.figures.values()} == {None}
    json.dumps(nothing.to_dict(), allow_nan=False)


def test_entities_are_right_where_place_and_label_are() -> None:
    truth = [frozenset({(0, 4, "who"), (9, 14, "where")}), frozenset({(3, 5, "who")}), frozenset[Any]()]
    answers = [frozenset({(0, 4, "who"), (9, 14, "who")}), None, frozenset[Any]()]
    found = measure(Answered(kind="spans", rows=range(3), truth=truth, answers=answers), resamples=50)
    assert found.accuracy == pytest.approx(1 / 3)
    assert [(f.label, f.support, f.answered, f.f1) for f in found.labels] == [
        ("where", 1, 0, 0.0),
        ("who", 2, 2, 0.5),
    ]
    assert found.figures["micro_f1"].value == pytest.approx(2 * 1 / (3 + 2))
    assert found.figures["macro_f1"].value == pytest.approx(0.25)


@pytest.mark.parametrize(
    "spans", ['[[0, 4, "who"]]', [[0, 4, "who", 0.9]], [{"start": 0, "end": 4, "label": "who"}]]
)
def test_entities_are_read_as_lists_objects_or_their_json(spans: Any) -> None:
    assert TAKE["spans"](spans) == {(0, 4, "who")}


def test_measuring_needs_no_torch_and_no_server() -> None:
    code = "import motet.evaluation, sys; print({'torch', 'httpx', 'pandas', 'sklearn'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# -- labels beside a job


@pytest.fixture
def client(api: FakeApi) -> Iterator[Client]:
    with Client(api.url, TOKEN) as client:
        yield client


TASKS = {
    "topic": Classify("news-topics"),
    "mood": Choose("m", labels=("glad", "sad", "so so")),
    "gist": Generate("m", prompt="Sum up."),
    "form": Extract("m", schema={"type": "object"}),
    "urgency": Number("n"),
    "vector": Embed("e", dtype="fp16"),
    "tone": Classify("tone"),
}
MOODS = ("glad", "sad", "so so")


def job_of(client: Client, api: FakeApi, rows: int = 12, bad: int = 0) -> Job:
    """A job of so many rows, the last ``bad`` of which are errors."""
    sent = [{"text": f"ticket {i}"} for i in range(rows - bad)] + [{"text": math.nan}] * bad
    job = client.submit(sent, TASKS, bad_rows="error", reuse=False)
    api.jobs[job.id].tasks["topic"]["labels"] = ["sport", "tech"]
    api.jobs[job.id].tasks["tone"]["labels"] = ["glad", "sad", "loud"]
    return client.job(job.id)


def truth_of(rows: int = 12) -> list[dict[str, Any]]:
    """Labels that agree with everything that the fake answers."""
    return [
        {
            "topic": ("sport", "tech")[i % 2],
            "mood": MOODS[i % 3],
            "gist": f"Gist of row {i}!",
            "form": {"row": i, "parity": ("even", "odd")[i % 2]},
            "urgency": i / 2,
            "tone": ["glad", "sad", "loud"][: i % 3],
            "note": "read by nobody",
        }
        for i in range(rows)
    ]


def test_every_kind_of_task_is_compared_with_the_field_of_its_name(client: Client, api: FakeApi) -> None:
    found = job_of(client, api).evaluate(truth_of())
    assert list(found.tasks) == ["topic", "mood", "gist", "form", "urgency", "tone"]
    assert {name: task.accuracy for name, task in found.tasks.items()} == {
        "topic": 1.0,
        "mood": 1.0,
        "gist": 1.0,
        "form": 1.0,
        "urgency": None,
        "tone": 1.0,
    }
    assert found["urgency"].figures["mae"].value == 0.0
    assert found["form"].fields == {"row": 1.0, "parity": 1.0}
    assert found["mood"].calibration is not None
    assert found["mood"].calibration.ece == pytest.approx(0.25)
    assert found.warnings == ()
    assert "topic: 12 rows · accuracy 100.0 % [75.8, 100.0] · macro-F1 1.000" in str(found)


def test_errors_count_as_wrong_and_are_told_apart(client: Client, api: FakeApi) -> None:
    truth = truth_of()
    truth[0]["topic"] = "tech"
    found = job_of(client, api, bad=3).evaluate(truth)
    assert (found["topic"].accuracy, found["topic"].errors, found["topic"].rows) == (8 / 12, 3, 12)
    assert found["topic"].confusion is not None
    assert sum(row[-1] for row in found["topic"].confusion.counts) == 3
    assert found["urgency"].figures["mae"].value == 0.0
    assert (found["gist"].accuracy, found["tone"].accuracy) == (9 / 12, 9 / 12)
    assert "3 errors" in str(found["topic"])


def test_labels_come_from_wherever_rows_come_from(client: Client, api: FakeApi, tmp_path: Path) -> None:
    job = job_of(client, api)
    truth = truth_of()
    lines = "".join(json.dumps(row) + "\n" for row in truth)
    (tmp_path / "l.jsonl").write_text(lines)
    table = "topic,tone,urgency,form\n" + "".join(
        f"{t['topic']},{'|'.join(t['tone'])},{t['urgency']},\n" for t in truth
    )
    (tmp_path / "l.csv").write_text(table)
    for source in (tmp_path / "l.jsonl", str(tmp_path / "l.csv"), iter(truth)):
        found = job.evaluate(source, ["topic", "urgency"])
        assert (found["topic"].accuracy, found["urgency"].figures["rmse"].value) == (1.0, 0.0)
    # An empty cell of a table is no label.
    tone = job.evaluate(tmp_path / "l.csv", ["tone"])["tone"]
    assert (tone.accuracy, tone.rows, tone.unlabelled) == (1.0, 8, 4)
    assert job.evaluate([t["topic"] for t in truth], ["topic"])["topic"].accuracy == 1.0
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(truth)
    assert job.evaluate(frame, {"topic": "topic", "mood": "mood"})["mood"].accuracy == 1.0
    assert job.evaluate(frame["urgency"], ["urgency"])["urgency"].figures["mae"].value == 0.0


def test_rows_without_a_label_are_left_out(client: Client, api: FakeApi) -> None:
    truth = truth_of()
    truth[0]["topic"] = None
    del truth[1]["topic"]
    truth[2]["topic"] = ""
    found = job_of(client, api).evaluate(truth)["topic"]
    assert (found.rows, found.unlabelled, found.accuracy) == (9, 3, 1.0)


def test_labels_of_some_rows_name_theirs(client: Client, api: FakeApi) -> None:
    some = [{"row": i, **t} for i, t in enumerate(truth_of()) if i in (3, 7)]
    some.reverse()
    found = job_of(client, api).evaluate(some, ["topic"], index="row")["topic"]
    assert (found.rows, found.unlabelled, found.accuracy) == (2, 10, 1.0)
    job = job_of(client, api)
    for rows, words in (
        ([{"row": 12, "topic": "x"}], r"row 0, labels.row: got index 12; expected less than 12"),
        ([{"row": 1, "topic": "x"}, {"row": 1, "topic": "x"}], r"row 1, labels.row: got 1 again"),
        ([{"topic": "x"}], r"row 0, labels.row: got no such field"),
    ):
        with pytest.raises(InvalidJob, match=words):
            job.evaluate(rows, ["topic"], index="row")


def test_a_label_that_the_model_never_gives_is_counted_and_told(client: Client, api: FakeApi) -> None:
    truth = truth_of()
    truth[0]["topic"] = truth[2]["topic"] = "weather"
    truth[1]["topic"] = " Tech"
    found = job_of(client, api).evaluate(truth)
    assert found["topic"].accuracy == 10 / 12
    assert found.warnings == (
        "topic: 2 labels that the model never gives: weather (2)",
        "topic: 1 label was spelt otherwise than by the model, in case or spaces; taken for the same",
    )


def test_what_was_written_is_read_as_a_label_where_labels_are_few_or_when_asked(
    client: Client, api: FakeApi
) -> None:
    job = job_of(client, api)
    few = [{"gist": ("Row", "line")[i % 2]} for i in range(12)]
    found = job.evaluate(few)["gist"]
    assert (found.kind, found.accuracy, found.unread) == ("label", 0.5, 0)
    assert job.evaluate(few, as_text=["gist"])["gist"].kind == "text"
    many = [{"gist": f"row {i}"} for i in range(12)]
    assert job.evaluate(many)["gist"].kind == "text"
    assert job.evaluate(many, as_labels=["gist"])["gist"].accuracy == 1.0
    many[3]["gist"] = "something else"
    unread = job.evaluate(many, as_labels=["gist"])["gist"]
    assert (unread.unread, unread.accuracy) == (1, 11 / 12)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("topic", math.nan, r"row 3, labels.topic: got NaN; expected a label"),
        ("topic", ["sport"], r"row 3, labels.topic: got a value of type list"),
        ("urgency", math.nan, r"row 3, labels.urgency: got NaN; expected a finite number; write null"),
        ("urgency", "soon", r"row 3, labels.urgency: got text that is no number"),
        ("urgency", math.inf, r"row 3, labels.urgency: got infinity"),
        ("urgency", 10**400, r"row 3, labels.urgency: got infinity"),
        ("tone", 3, r"row 3, labels.tone: got a value of type int; expected a list"),
        ("form", "{", r"row 3, labels.form: got broken JSON"),
    ],
)
def test_a_label_of_the_wrong_kind_is_named_by_row_and_field(
    client: Client, api: FakeApi, field: str, value: Any, words: str
) -> None:
    truth = truth_of()
    truth[3][field] = value
    with pytest.raises(InvalidJob, match=words):
        job_of(client, api).evaluate(truth, [field])


def test_labels_that_do_not_fit_the_job_are_refused_before_anything_is_fetched(
    client: Client, api: FakeApi
) -> None:
    job = job_of(client, api)
    for labels, tasks, words in (
        (truth_of(11), None, r"labels: got 11 rows; expected 12, one for each row of job"),
        (
            truth_of(),
            {"topic": "topik"},
            r"labels.topik: got no such field in any row; expected .*the first row has topic, mood",
        ),
        ([{"other": 1}] * 12, None, r"labels.topic: got no such field"),
        (["sport"] * 12, None, r"row 0, labels: got a value of type str; expected a mapping"),
        ([], None, r"labels: got no rows"),
    ):
        with pytest.raises(InvalidJob, match=words):
            job.evaluate(labels, tasks)
    assert not any("results" in path for _, path in api.requests)
    with pytest.raises(TypeError, match="expected a list of task names"):
        job.evaluate(truth_of(), "topic")
    with pytest.raises(NotFound, match="has no task 'topik'"):
        job.evaluate(truth_of(), ["topik"])
    with pytest.raises(InvalidJob, match=r"tasks.vector: got vectors"):
        job.evaluate([{"vector": [1]}] * 12, ["vector"])
    assert list(job.evaluate([{"vector": [1], "topic": "tech"}] * 12).tasks) == ["topic"]
    with pytest.raises(InvalidJob, match=r"labels.topic: got null in every row"):
        job.evaluate([{"topic": None}] * 12)


def test_what_cannot_be_compared_says_why(client: Client, api: FakeApi) -> None:
    found = job_of(client, api).evaluate(truth_of())
    with pytest.raises(InvalidJob, match="labels 'topic' and 'mood'; expected the same labels"):
        found.compare("topic", "mood")
    with pytest.raises(InvalidJob, match="label and number; expected answers of one kind"):
        found.compare("topic", "urgency")
    with pytest.raises(NotFound, match="'vector' was not evaluated"):
        found.compare("topic", "vector")
    with pytest.raises(InvalidJob, match="other rows or labels; expected the same"):
        found["topic"].compare(job_of(client, api, rows=6).evaluate(truth_of(6))["topic"])
    others = [row | {"topic": "tech"} for row in truth_of()]
    with pytest.raises(InvalidJob, match="other rows or labels; expected the same"):
        found["topic"].compare(job_of(client, api).evaluate(others)["topic"])


# -- the command


@pytest.fixture
def labels(tmp_path: Path) -> str:
    truth = truth_of()
    truth[0]["topic"] = "tech"
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in truth))
    return str(path)


def test_evaluate_prints_figures_and_labels(api: FakeApi, motet: Shell, client: Client, labels: str) -> None:
    job = job_of(client, api, bad=1)
    ran = motet("evaluate", job.id, "--labels", labels, "--task", "topic", "--task", "urgency")
    assert (ran.code, ran.err) == (0, "")
    assert "83.3 %" in ran.out
    assert "12 rows · 1 error" in ran.out
    assert "calibration error" in ran.out
    assert "sport (1)" in ran.out
    assert "mean absolute error" in ran.out
    record = json.loads(motet("evaluate", job.id, "--labels", labels, "--json").out)
    [evaluation] = record["evaluations"]
    assert evaluation["tasks"]["topic"]["figures"]["accuracy"]["value"] == pytest.approx(10 / 12)
    assert evaluation["tasks"]["topic"]["confusion"]["labels"] == ["sport", "tech"]
    assert record["comparisons"] == []


def test_evaluate_puts_two_tasks_or_two_jobs_side_by_side(
    api: FakeApi, motet: Shell, client: Client, labels: str
) -> None:
    job, other = job_of(client, api), job_of(client, api, bad=2)
    ran = motet("evaluate", job.id, "--labels", labels, "--compare", "topic", "mood")
    assert ran.code == 0
    assert "first: topic\nsecond: mood\n" in ran.out
    assert "McNemar" in ran.out
    assert "warning: mood: 12 labels that the model never gives" in ran.err
    both = motet("evaluate", job.id, other.id, "--labels", labels, "--json")
    found = {c["first"]: c for c in json.loads(both.out)["comparisons"]}
    assert found[f"topic of {job.id}"]["second"] == f"topic of {other.id}"
    assert (found[f"topic of {job.id}"]["only_first"], found[f"topic of {job.id}"]["only_second"]) == (2, 0)
    assert found[f"urgency of {job.id}"]["p"] is None
    across = motet(
        "evaluate", job.id, other.id, "--labels", labels, "--compare", "mood", "topic", "--task", "mood=topic"
    )
    assert f"first: mood of {job.id}\nsecond: topic of {other.id}" in across.out


def test_evaluate_writes_a_page_that_loads_nothing_and_holds_no_text(
    api: FakeApi, motet: Shell, client: Client, labels: str, tmp_path: Path
) -> None:
    job, out = job_of(client, api, bad=1), tmp_path / "report.html"
    ran = motet("evaluate", job.id, "--labels", labels, "--html", str(out), "--compare", "topic", "mood")
    assert f"a page is in {out}" in ran.err
    page = out.read_text()
    seen = Reader(page).seen
    assert {name for name, _ in seen} & {"script", "img", "link"} == set()
    assert "http" not in page
    assert page.count("<svg") == 2 * 2 + 2
    assert "Reliability diagram: expected calibration error" in page
    assert "Gist of row" not in page


def test_a_page_without_jinja2_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(SetupError, match=r"pip install 'motet\[evaluate\]'"):
        environment("a package that no page was drawn of")


def test_a_page_of_many_labels_draws_the_rarest_as_one(tmp_path: Path) -> None:
    from motet.evaluation import Evaluation

    names = [f"<b>{i}</b>" for i in range(40)]
    truth = [name for i, name in enumerate(names) for _ in range(i + 1)]
    task = of_labels(truth, list(truth), labels=tuple(names), resamples=20)
    page = Evaluation(job="j", name="", tasks={"topic": task}).to_html()
    Reader(page)
    assert "17 others" in page
    assert page.count('class="right"') == MOST_LABELS
    assert "<b>" not in page


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("a", "b", "c"), "name one job, or two"),
        (("a", "--task", "topic="), "expected NAME or NAME=FIELD"),
        (("a", "--task", "t", "--task", "t=x"), "given twice"),
        (("a", "--html", "/nowhere/at/all.html"), "no such folder"),
        (("a", "--worst", "/nowhere/at/all.png"), "no such folder"),
    ],
)
def test_evaluate_refuses_what_was_written_wrongly(
    api: FakeApi, motet: Shell, labels: str, arguments: tuple[str, ...], words: str
) -> None:
    ran = motet("evaluate", *arguments, "--labels", labels)
    assert ran.code == 2
    assert words in ran.err


def test_figures_are_told_also_where_a_picture_is_missing(
    api: FakeApi, motet: Shell, client: Client, tmp_path: Path
) -> None:
    path = tmp_path / "labels.jsonl"
    path.write_text('{"topic": "tech", "photo": "gone.jpg"}\n' * 12)
    worst = ("--worst", str(tmp_path / "worst.png"), "--picture", "photo", "--media-root", str(tmp_path))
    ran = motet("evaluate", job_of(client, api).id, "--labels", str(path), *worst)
    assert ran.code == 1
    assert "there is no file" in ran.err
    assert "accuracy" in ran.out


def test_evaluate_names_the_row_that_is_wrong(
    api: FakeApi, motet: Shell, client: Client, tmp_path: Path
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"topic": "sport"}\n' * 5 + '{"topic": NaN}\n' + '{"topic": "tech"}\n' * 6)
    ran = motet("evaluate", job_of(client, api).id, "--labels", str(path))
    assert ran.code == 1
    assert "row 5, labels.topic: got NaN (line 6)" in ran.err
