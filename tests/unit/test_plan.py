"""Planning: which tasks share a pass, which submissions are refused, and what a sample says of the whole."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from motet.errors import InvalidJob, Problem
from motet.manifest import Manifest
from motet.tasks import Classify, Embed, Entities, Function, Number, Task
from scheduler.plan import (
    PlannedPass,
    Sample,
    estimate,
    loaded_model,
    padded_tokens,
    plan,
    task_digest,
    tokens_read,
)

MINILM = Manifest(
    name="minilm",
    version="1",
    engine="encoder",
    answers="vector",
    files={"model.safetensors": "1" * 64},
    trunk="a" * 64,
    max_tokens=256,
    dim=384,
    pooling="mean",
    parameters=22_700_000,
    formats=("bf16",),
)
OTHER = replace(MINILM, name="other", trunk="b" * 64, files={"model.safetensors": "2" * 64})


def head(name: str, on: Manifest = MINILM, **changes: object) -> Manifest:
    made = Manifest(
        name=name,
        version="1",
        engine="encoder",
        answers="label",
        files={"head.safetensors": name.encode().hex().ljust(64, "0")},
        trunk=on.trunk,
        trunk_model=on.ref,
        max_tokens=256,
        labels=("no", "yes"),
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def alone(name: str, **changes: object) -> Manifest:
    """A model that shares nothing with any other."""
    return head(name, engine="classifier", trunk="", trunk_model="", **changes)


TOPICS, MOOD = head("topics"), head("mood")
TRUNKS = {MINILM.ref: MINILM, OTHER.ref: OTHER}


def passes(**tasks: tuple[Task, Manifest]) -> tuple[PlannedPass, ...]:
    return plan({n: t for n, (t, _) in tasks.items()}, {n: m for n, (_, m) in tasks.items()}, TRUNKS)


def refused(tasks: dict[str, Task], models: dict[str, Manifest], **known: object) -> list[Problem]:
    with pytest.raises(InvalidJob) as caught:
        plan(tasks, models, TRUNKS, **known)  # type: ignore[arg-type]
    return list(caught.value.problems)


def test_heads_and_the_embedding_of_one_trunk_share_one_pass() -> None:
    (one,) = passes(
        topic=(Classify("topics"), TOPICS), mood=(Classify("mood"), MOOD), vector=(Embed("minilm"), MINILM)
    )
    assert one.tasks == (0, 1, 2)
    assert one.kind == "encoder minilm"
    assert one.model is MINILM
    assert (one.max_tokens, one.input, one.numerics) == (256, "{text}", "fast")


def test_what_becomes_of_a_long_row_does_not_part_tasks_that_read_the_same() -> None:
    (one,) = passes(
        topic=(Classify("topics", too_long="error"), TOPICS),
        mood=(Classify("mood", too_long="truncate"), MOOD),
    )
    assert one.tasks == (0, 1)


def test_another_input_length_or_numeric_class_is_another_pass() -> None:
    apart = passes(
        first=(Classify("topics"), TOPICS),
        other_input=(Classify("mood", input="{title}: {text}"), MOOD),
        shorter=(Classify("mood", max_tokens=64), MOOD),
        exact=(Classify("mood", numerics="exact"), MOOD),
        same_as_first=(Classify("mood"), MOOD),
    )
    assert [p.tasks for p in apart] == [(0, 4), (1,), (2,), (3,)]
    assert [p.number for p in apart] == [0, 1, 2, 3]


def test_asking_for_more_tokens_than_the_model_reads_is_asking_for_all_it_reads() -> None:
    (one,) = passes(topic=(Classify("topics", max_tokens=100_000), TOPICS), mood=(Classify("mood"), MOOD))
    assert one.max_tokens == 256


def test_a_head_that_reads_less_than_its_trunk_runs_apart() -> None:
    short = head("short", max_tokens=128)
    first, second = passes(topic=(Classify("topics"), TOPICS), short=(Classify("short"), short))
    assert (first.max_tokens, second.max_tokens) == (256, 128)


def test_models_without_a_trunk_never_fuse_unless_they_are_the_same_model() -> None:
    a, b = alone("a"), alone("b")
    apart = passes(one=(Classify("a"), a), two=(Classify("b"), b), three=(Classify("a", scores=True), a))
    assert [p.tasks for p in apart] == [(0, 2), (1,)]
    assert [p.kind for p in apart] == ["classifier a", "classifier b"]


def test_trunks_of_one_digest_fuse_only_where_it_does_not_matter_which_is_loaded() -> None:
    as_cls = replace(MINILM, name="as-cls", pooling="cls")
    renamed = replace(MINILM, name="renamed")
    assert len(passes(a=(Embed("minilm"), MINILM), b=(Embed("as-cls"), as_cls))) == 2
    assert len(passes(a=(Embed("minilm"), MINILM), b=(Embed("renamed"), renamed))) == 1


def test_a_misspelled_model_is_refused_with_its_likely_meaning() -> None:
    (problem,) = refused({"topic": Classify("topcis")}, {}, registered=["topics@1", "mood@1", "minilm@1"])
    assert problem.field == "tasks.topic.model"
    assert problem.got == "topcis"
    assert "did you mean topics?" in problem.remedy
    assert "motet models" in problem.remedy


def test_a_missing_version_is_answered_with_those_that_there_are() -> None:
    (problem,) = refused({"topic": Classify("topics@9")}, {}, registered=["topics@1", "topics@2"])
    assert "topics@1 or topics@2" in problem.remedy


@pytest.mark.parametrize(
    ("task", "model"),
    [
        (Embed("topics"), TOPICS),
        (Number("topics"), TOPICS),
        (Entities("minilm"), MINILM),
        (Classify("minilm"), MINILM),
        (Function("topics"), TOPICS),
    ],
)
def test_a_task_needs_a_model_that_answers_its_kind(task: Task, model: Manifest) -> None:
    (problem,) = refused({"t": task}, {"t": model})
    assert model.ref in problem.got
    assert model.answers in problem.got
    assert task.kind in problem.remedy


def test_a_multi_label_head_is_classification_too() -> None:
    tone = head("tone", answers="labels")
    (one,) = passes(tone=(Classify("tone"), tone), topic=(Classify("topics"), TOPICS))
    assert one.tasks == (0, 1)


def test_a_head_without_its_trunk_or_of_other_weights_is_refused() -> None:
    lost = head("lost", trunk_model="gone@1")
    stale = head("stale", trunk="f" * 64)
    both = refused({"a": Classify("lost"), "b": Classify("stale")}, {"a": lost, "b": stale})
    assert "gone@1 is not registered" in both[0].got
    assert "other weights" in both[1].got


def test_every_problem_is_told_at_once() -> None:
    found = refused(
        {"a": Classify("x"), "b": Embed("topics"), "c": Classify("topics")}, {"b": TOPICS, "c": TOPICS}
    )
    assert [p.field for p in found] == ["tasks.a.model", "tasks.b.model"]


def test_a_task_digest_changes_with_all_that_decides_its_answers_and_with_nothing_else() -> None:
    def digest(task: Task, model: Manifest = TOPICS, loaded: Manifest = MINILM) -> bytes:
        return task_digest(task, model, loaded)

    same = digest(Classify("topics"))
    assert digest(Classify("topics@1")) == same, "the name is not the model"
    assert digest(Classify("topics", max_tokens=9999)) == same, "no more than the model reads"
    assert digest(Classify("topics"), replace(TOPICS, licence="MIT", scores={"f1": 1})) == same
    others = [
        digest(Classify("topics", scores=True)),
        digest(Classify("topics", too_long="error")),
        digest(Classify("topics", max_tokens=64)),
        digest(Classify("topics", input="{title}")),
        digest(Classify("topics", numerics="exact")),
        digest(Classify("topics"), replace(TOPICS, labels=("yes", "no"))),
        digest(Classify("topics"), TOPICS, replace(MINILM, pooling="cls")),
        digest(Classify("topics"), TOPICS, replace(MINILM, formats=())),
    ]
    assert same not in others
    # Without another format, fast is exact: these two are one answer.
    assert others.pop() == others[4]
    assert len(set(others)) == len(others)


def test_tokens_mean_nothing_to_a_model_that_names_no_limit() -> None:
    function = alone("f", max_tokens=0, answers="json")
    assert tokens_read(Function("f"), function, loaded_model(function, {})) == 0


# -- estimates


def planned(max_tokens: int = 256, tasks: tuple[int, ...] = (0, 1)) -> PlannedPass:
    return PlannedPass(
        number=0,
        kind="encoder minilm",
        model=MINILM,
        numerics="fast",
        max_tokens=max_tokens,
        input="{text}",
        tasks=tasks,
    )


def test_an_estimate_extrapolates_tokens_by_bytes_and_rows_by_rows() -> None:
    sample = Sample(rows=4, total_rows=400, text_bytes=1000, total_bytes=200_000)
    found = estimate(
        planned(), [100, 200, 300, 400], sample, seconds_per_token=[1e-4, 1e-4], prior_s=1.0, subtask_s=2.0
    )
    assert found.tokens == (100 + 200 + 256 + 256) * 200
    assert found.unfused_tokens == 2 * found.tokens
    assert found.truncated_rows == 200
    assert found.seconds == pytest.approx(found.tokens * 1e-4 / 2)
    assert found.subtasks == 9  # 16.24 device-seconds in pieces of two


def test_devices_of_different_speed_add_their_speeds() -> None:
    sample = Sample(rows=1, total_rows=1, text_bytes=4, total_bytes=4)
    found = estimate(planned(), [100], sample, seconds_per_token=[0.01, 0.03], prior_s=1.0, subtask_s=2.0)
    assert found.seconds == pytest.approx(0.75)


def test_without_a_device_nothing_is_promised_but_the_number_of_subtasks() -> None:
    sample = Sample(rows=1, total_rows=1000, text_bytes=4, total_bytes=None)
    found = estimate(planned(), [100], sample, seconds_per_token=[], prior_s=1e-4, subtask_s=2.0)
    assert found.seconds is None
    assert found.tokens == 100_000
    assert found.subtasks == 5


def test_an_empty_sample_estimates_nothing() -> None:
    sample = Sample(rows=0, total_rows=0, text_bytes=0, total_bytes=None)
    found = estimate(planned(), [], sample, seconds_per_token=[1e-4], prior_s=1.0, subtask_s=2.0)
    assert (found.tokens, found.computed_tokens, found.subtasks, found.seconds) == (0, 0, 0, 0.0)


@given(st.lists(st.integers(1, 512), max_size=200))
def test_padding_never_saves_and_stays_within_the_budget(lengths: list[int]) -> None:
    padded = padded_tokens(lengths, budget=1024)
    assert sum(lengths) <= padded <= len(lengths) * max(lengths, default=0)


def test_rows_of_one_length_are_not_padded_at_all() -> None:
    assert padded_tokens([100] * 77, budget=1024) == 7700
