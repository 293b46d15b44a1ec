"""What sharing saves, told from a sample."""

from __future__ import annotations

from dataclasses import replace

import pytest

from motet.protocol.manifest import Manifest
from scheduler.policy.plan import PassEstimate, PassPlan, Sample
from scheduler.policy.prompt_cost import TaskTokens, estimate_prompts

LLM = Manifest(name="llm", version="1", engine="causal", answers="text", max_tokens=200)
TEXT_FIRST = PassPlan(
    number=0,
    kind="causal llm",
    model=LLM,
    numerics="fast",
    max_tokens=200,
    input="{text}",
    tasks=(0, 1),
    first="text",
)
TEXTS = (100, 50)


def task(instruction: int = 10, system: int = 5, written: int = 20, **changes: object) -> TaskTokens:
    made = TaskTokens(
        system="be brief" if system else "",
        system_tokens=[system] * len(TEXTS),
        instruction_tokens=[instruction] * len(TEXTS),
        system_fixed=True,
        instruction_fixed=True,
        written=written,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def estimated(*asked: TaskTokens, planned: PassPlan = TEXT_FIRST, rows: int = 2) -> PassEstimate:
    sample = Sample(rows=2, total_rows=rows, text_bytes=600, total_bytes=None)
    return estimate_prompts(
        planned, TEXTS, asked, sample, seconds_per_token=[0.01], prior_s=0.01, subtask_s=1.0
    )


def test_the_text_counts_once_for_all_tasks_and_the_system_message_once_for_all_rows() -> None:
    found = estimated(task(10), task(30))
    assert found.unfused_tokens == 2 * (5 + 150 / 2) * 2 + 2 * (10 + 30) == 400
    assert found.tokens == 150 + 2 * 40 + 5
    assert found.seconds == pytest.approx(found.tokens * 0.01)


def test_an_instruction_in_front_counts_once_for_all_rows() -> None:
    found = estimated(task(10), task(30), planned=replace(TEXT_FIRST, first="instruction"))
    assert found.tokens == 2 * 150 + (10 + 30) + 2 * 5


def test_nothing_is_shared_behind_what_differs() -> None:
    own = estimated(task(system_fixed=False), replace(task(system_fixed=False), system="other"))
    assert own.tokens == own.unfused_tokens
    by_row = estimated(task(instruction_fixed=False), planned=replace(TEXT_FIRST, first="instruction"))
    assert by_row.tokens == by_row.unfused_tokens - 5


def test_one_task_about_a_text_saves_no_text() -> None:
    found = estimated(task(system=0))
    assert found.tokens == found.unfused_tokens == 150 + 20


def test_a_sample_stands_for_the_whole() -> None:
    two, many = estimated(task(10), task(30)), estimated(task(10), task(30), rows=2000)
    assert many.unfused_tokens == 1000 * two.unfused_tokens
    assert many.tokens == 1000 * (two.tokens - 5) + 5
    assert (two.tokens_out, many.tokens_out) == (80, 80_000)


def test_rows_whose_prompt_and_answer_exceed_the_context_are_told() -> None:
    assert estimated(task(10, written=80), rows=20).truncated_rows == 0
    assert estimated(task(10, written=90), rows=20).truncated_rows == 10
