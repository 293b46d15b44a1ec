"""Sixty faults of all kinds in four minutes: nothing lost, doubled, stuck or miscounted, nothing left behind."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.__main__ import DEFAULT_SEED
from tests.chaos.asking import Answered, Asking
from tests.chaos.campaign import SLACK, Plan, Report, run, table
from tests.chaos.faults import KINDS as KINDS_OF_FAULTS
from tests.chaos.faults import LENGTHY, schedule
from tests.chaos.oracle import Came, Order, Verdict, expected, judge, order
from tests.chaos.recovery import covered

SEED = int(os.environ.get("CHAOS_SEED", DEFAULT_SEED))
FAULTS, KINDS, JOBS = 48, 9, 12
#: What the attack may take on two quiet cores.
ATTACK_S = 240.0


@pytest.mark.timeout(900)
def test_under_many_faults_each_cell_is_recorded_exactly_once(tmp_path: Path) -> None:
    plan = Plan(seed=SEED, faults=FAULTS, jobs=JOBS, rows=0, patience_s=2.8, attack_s=200.0)
    report = run(tmp_path / "data", plan)
    print(table(report))
    assert not report.failures, _words(report)
    assert len(report.wounds) >= FAULTS
    assert report.kinds >= KINDS
    assert report.jobs >= JOBS
    assert report.attack_s <= ATTACK_S * SLACK


def _words(report: Report) -> str:
    again = (
        f"CHAOS_SEED={report.plan.seed} .venv/bin/python -m tests.chaos --faults {FAULTS} --data /tmp/chaos"
    )
    return "\n".join([*report.failures[:30], "run it again, and keep the logs:", f"  {again}"])


def test_a_seed_says_which_faults_come_and_none_is_left_out() -> None:
    faults = schedule(SEED, FAULTS)
    assert faults == schedule(SEED, FAULTS) != schedule(SEED + 1, FAULTS)
    assert set(faults) == set(KINDS_OF_FAULTS)
    assert not set(faults[FAULTS * 3 // 5 :]) & set(LENGTHY), "what takes long comes early enough to end"


# -- the oracle itself: it must see each breach


def _answers(asked: Order) -> dict[int, dict[str, Came]]:
    return {
        i: {task: Came(*expected(task, text)) for task in asked.tasks} for i, text in enumerate(asked.texts)
    }


@pytest.fixture
def asked() -> Order:
    return order(1, 4, 3, rows=20, tasks=("digest", "weigh"), poison=("#raise-digest",))


def _judged(asked: Order, rows: list[tuple[int, dict[str, Came]]], ended: str = "succeeded") -> Verdict:
    verdict = Verdict()
    judge(verdict, asked, rows, ended)
    return verdict


def test_the_oracle_finds_nothing_wrong_with_the_right_answers(asked: Order) -> None:
    verdict = _judged(asked, list(_answers(asked).items()))
    assert verdict.clean
    assert verdict.cells == 40


def test_the_oracle_sees_a_lost_row_and_a_lost_cell(asked: Order) -> None:
    answers = _answers(asked)
    del answers[7]
    del answers[3]["weigh"]
    assert _judged(asked, list(answers.items())).lost == 2


def test_the_oracle_sees_a_row_that_comes_twice(asked: Order) -> None:
    answers = list(_answers(asked).items())
    assert _judged(asked, [*answers, answers[5]]).doubled == 1


def test_the_oracle_sees_another_rows_value_and_an_error_of_an_innocent_row(asked: Order) -> None:
    answers = _answers(asked)
    answers[1]["weigh"], answers[2]["weigh"] = answers[2]["weigh"], answers[1]["weigh"]
    assert _judged(asked, list(answers.items())).wrong == 2
    answers = _answers(asked)
    answers[1]["weigh"] = Came("error", "poison")
    assert _judged(asked, list(answers.items())).lost == 1


def test_the_oracle_sees_a_poisoned_row_that_was_answered_or_blamed_for_something_else(asked: Order) -> None:
    [guilty] = [i for i, text in enumerate(asked.texts) if "#raise-digest" in text]
    for came in (Came("ok", "0123"), Came("error", "poison")):
        answers = _answers(asked)
        answers[guilty]["digest"] = came
        assert _judged(asked, list(answers.items())).wrong == 1


def test_what_a_cancelled_job_has_must_be_right_and_need_not_be_whole(asked: Order) -> None:
    answers = _answers(asked)
    del answers[0]
    answers[1]["weigh"] = Came("skipped", "cancelled")
    assert _judged(asked, list(answers.items()), "cancelled").clean
    answers[2]["weigh"] = Came("ok", -1)
    assert _judged(asked, list(answers.items()), "cancelled").wrong == 1


def test_the_oracle_sees_a_key_that_is_answered_otherwise_the_second_time() -> None:
    nobody: Any = None
    asking = Asking(nobody, nobody, 1)
    for row, answer in ((3, "a"), (3, "a"), (4, "a"), (3, "b")):
        asking._note("key", Answered("text", row, {"digest": answer}), 0.0)
    assert asking.verdict.wrong == 2
    assert asking.answered["key"].row == 3


def test_work_is_recorded_again_only_where_the_union_of_what_is_done_holds_it() -> None:
    assert covered(2, 10, [(0, 4), (7, 12), (4, 7)])
    assert not covered(2, 10, [(0, 4), (5, 12)])
    assert not covered(2, 10, [])
