"""Planning: which tasks share a pass, which submissions are refused, and what a sample says of the whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from motet.errors import InvalidJob, Problem
from motet.protocol.manifest import Manifest
from motet.tasks import (
    Chat,
    Choose,
    Classify,
    Embed,
    Entities,
    Extract,
    Function,
    Generate,
    Number,
    Rank,
    Task,
    parse,
)
from scheduler.blocks import Reads
from scheduler.policy.cost import learned_as
from scheduler.policy.plan import (
    PassPlan,
    Sample,
    estimate,
    in_order,
    loaded_model,
    padded_tokens,
    plan,
    reads_of,
    task_digest,
    tokens_read,
)
from scheduler.policy.prompt_order import ANSWER_BYTES

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


def passes(
    mean_bytes: Mapping[str, float] | None = None, **tasks: tuple[Task, Manifest]
) -> tuple[PassPlan, ...]:
    models = {n: m for n, (_, m) in tasks.items()}
    return plan({n: t for n, (t, _) in tasks.items()}, models, TRUNKS, mean_bytes=mean_bytes)


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


def test_a_misspelled_alias_is_answered_with_its_likely_meaning_among_many_versions() -> None:
    registered = [f"topics@{n}" for n in range(1, 12)] + ["topics@prod"]
    (problem,) = refused({"topic": Classify("topics@prdo")}, {}, registered=registered)
    assert "topics@prod" in problem.remedy
    assert problem.remedy.count("@") == 5


@pytest.mark.parametrize(
    ("task", "model"),
    [
        (Embed("topics"), TOPICS),
        (Number("topics"), TOPICS),
        (Entities("minilm"), MINILM),
        (Classify("minilm"), MINILM),
        (Function("topics"), TOPICS),
        (Rank("topics"), TOPICS),
    ],
)
def test_a_task_needs_a_model_that_answers_its_kind(task: Task, model: Manifest) -> None:
    (problem,) = refused({"t": task}, {"t": model})
    assert model.ref in problem.got
    assert model.answers in problem.got
    assert task.kind in problem.remedy


def test_rankings_share_a_pass_where_they_ask_the_same_of_the_same_lists() -> None:
    ranker = alone("ranker", answers="ranking", labels=())
    same = Rank("ranker", query="{q}", documents="{docs}")
    planned = passes(
        a=(same, ranker),
        b=(replace(same, too_long="error"), ranker),
        c=(replace(same, query="About {q}"), ranker),
        d=(replace(same, max_tokens=64), ranker),
    )
    assert [one.tasks for one in planned] == [(0, 1), (2,), (3,)]
    # What is read of a row are all of its documents, however long one of them may be.
    assert {(one.input, one.max_tokens) for one in planned} == {("{q}{docs}", 0)}
    assert reads_of(planned[0], {"a": same, "b": same}).times == (1, 1)
    found = (Entities("names"), alone("names", answers="spans"))
    (_, then) = passes(who=found, best=(Rank("ranker", query="{text}", documents="{who}"), ranker))
    assert then.needs == (0,), "an answer that is a list may be ranked"


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


@pytest.mark.parametrize(
    ("task", "digest"),
    [
        (Generate("m", prompt="Go on."), "775e95e5a0c570f0a5674a2d9fc7b82f14eff05d390ce834f38721a0e2f3fe9f"),
        (Chat("m"), "2a5c9362f299c71e3013a428eff6203ec702ec2c7822e204c63f964647b56f8f"),
        (
            Choose("m", labels=("a", "b"), thinking=None),
            "d06cee1016b8d785d65e7acd0c14f158bc1342e68d07e122e628a3accbc2a011",
        ),
        (
            Extract("m", schema={"type": "object"}, thinking=None),
            "9d676b8f12f2efb047452dbf64e5c2a9043a850451cfd5bcc28b686525e39222",
        ),
    ],
)
def test_a_task_that_says_nothing_of_thoughts_has_the_digest_of_those_before_it_could(
    task: Generate | Chat | Choose | Extract, digest: str
) -> None:
    model = Manifest(name="m", version="1", engine="causal", answers="text", files={"a": "b"}, max_tokens=512)
    assert task_digest(task, model, model).hex() == digest
    assert len({task_digest(replace(task, thinking=t), model, model) for t in (None, True, False)}) == 3


def test_tokens_mean_nothing_to_a_model_that_names_no_limit() -> None:
    function = alone("f", max_tokens=0, answers="json")
    assert tokens_read(Function("f"), function, loaded_model(function, {})) == 0


# -- estimates


def planned(max_tokens: int = 256, tasks: tuple[int, ...] = (0, 1)) -> PassPlan:
    return PassPlan(
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


# -- language models, and tasks that read another's answer


LLM = Manifest(
    name="llm",
    version="1",
    engine="causal",
    answers="text",
    files={"weights": "e"},
    max_tokens=8192,
    parameters=135_000_000,
)


def problems_of(**tasks: tuple[Task, Manifest]) -> list[Problem]:
    return refused({n: t for n, (t, _) in tasks.items()}, {n: m for n, (_, m) in tasks.items()})


def ask(prompt: str = "Summarise.", **kw: Any) -> Generate:
    return Generate("llm", prompt=prompt, **kw)


def test_whatever_a_language_model_is_asked_about_one_text_is_one_pass() -> None:
    (one,) = passes(
        summary=(ask(), LLM),
        french=(ask("Translate into French.", max_tokens=512, temperature=0.7), LLM),
        mood=(Choose("llm", labels=("good", "bad")), LLM),
        facts=(Extract("llm", schema={"type": "object"}), LLM),
    )
    assert one.tasks == (0, 1, 2, 3)
    assert (one.kind, one.max_tokens, one.input, one.needs) == ("causal llm", 8192, "{text}", ())
    assert one.first == "text"


def test_another_text_numeric_class_or_kind_of_prompt_is_another_pass() -> None:
    found = passes(
        summary=(ask(), LLM),
        of_title=(ask(about="{title}"), LLM),
        exact=(ask(numerics="exact"), LLM),
        talk=(Chat("llm", messages="{text}"), LLM),
        # What comes first is one for a pass: this one insists.
        insists=(ask(first="instruction"), LLM),
        agrees=(ask(first="text"), LLM),
    )
    assert [p.tasks for p in found] == [(0, 5), (1,), (2,), (3,), (4,)]
    assert [p.first for p in found] == ["text", "text", "text", "", "instruction"]


def test_a_task_that_reads_an_answer_comes_in_a_later_pass_wherever_it_was_named() -> None:
    found = passes(
        reply=(ask("Reply to a {mood} customer about {topic}."), LLM),
        mood=(Classify("mood"), MOOD),
        topic=(ask("Topic?"), LLM),
        summary=(ask(), LLM),
        french=(ask("Translate.", about="{reply}"), LLM),
    )
    assert [(p.tasks, p.needs) for p in found] == [((1,), ()), ((2, 3), ()), ((0,), (1, 2)), ((4,), (0,))]
    assert [p.number for p in found] == [0, 1, 2, 3]


def test_only_tasks_that_need_the_same_share_a_pass() -> None:
    found = passes(
        a=(ask("A?"), LLM),
        b=(ask("B?"), LLM),
        of_a=(ask("{a}?"), LLM),
        of_a_too=(ask("Again {a}?"), LLM),
        of_b=(ask("{b}?"), LLM),
    )
    assert [p.tasks for p in found] == [(0, 1), (2, 3), (4,)]


def test_any_kind_of_task_may_read_an_answer() -> None:
    first, second = passes(summary=(ask(), LLM), mood=(Classify("mood", input="{summary}"), MOOD))
    assert (first.tasks, second.tasks, second.needs) == ((0,), (1,), (0,))


def test_a_pass_reads_what_its_templates_name_and_no_other_field() -> None:
    tasks: dict[str, tuple[Task, Manifest]] = {
        "topic": (Classify("topics", input="{title}"), TOPICS),
        "mood": (Classify("mood", input="Text: {body} {body}"), MOOD),
        "sum": (ask("Sum up for {reader}.", about="{body}", system="{reader} {title}"), LLM),
        "list": (ask("List for {reader}.", about="{body}"), LLM),
        "reply": (ask("Reply, {topic}.", about="{title} ({sum})"), LLM),
    }
    asked = {name: task for name, (task, _) in tasks.items()}
    by_tasks = {p.tasks: reads_of(p, asked) for p in passes(**tasks)}
    # Fields in order of first use: title, body, reader.
    assert by_tasks[0,] == Reads((1, 0, 0), 0, 256)
    assert by_tasks[1,] == Reads((0, 2, 0), len("Text:  "), 256)
    assert by_tasks[2, 3] == Reads((1, 1, 2), 0, LLM.max_tokens)
    assert by_tasks[4,] == Reads((1, 0, 0), len(" ()") + 2 * ANSWER_BYTES, LLM.max_tokens)


def test_a_circle_is_refused_and_named() -> None:
    (problem,) = problems_of(a=(ask("{b}"), LLM), b=(ask("{a}"), LLM))
    assert "a reads b reads a" in problem.got


def test_an_answer_that_is_no_text_is_refused_with_what_to_do() -> None:
    (problem,) = problems_of(vector=(Embed("minilm"), MINILM), use=(ask("Explain {vector}."), LLM))
    assert problem.field == "tasks.use"
    assert problem.got == "{vector}, which is a vector"
    assert "rename the task vector" in problem.remedy


def test_abstaining_that_could_never_happen_is_refused() -> None:
    several = replace(TOPICS, answers="labels")
    (problem,) = problems_of(t=(Classify("topic", min_score=0.5), several))
    assert problem.field == "tasks.t.min_score"
    assert "reaches its own threshold" in problem.got
    (problem,) = problems_of(t=(Classify("topic", otherwise="unsure"), TOPICS))
    assert (problem.field, problem.got) == ("tasks.t.otherwise", "unsure without min_score")
    with pytest.raises(InvalidJob) as refused:
        parse({"t": {"kind": "classify", "model": "m", "min_score": 50, "otherwise": ""}})
    assert [p.field for p in refused.value.problems] == ["tasks.t.min_score", "tasks.t.otherwise"]


def test_the_instruction_comes_first_where_that_saves_more() -> None:
    long = "Follow these rules. " * 200
    (alone_,) = passes(short=(ask(long), LLM), mean_bytes={"text": 80.0})
    (many,) = passes(a=(ask(long), LLM), b=(ask("B?"), LLM), mean_bytes={"text": 50_000.0})
    (little,) = passes(a=(ask("Summarise."), LLM), mean_bytes={"text": 4_000.0})
    assert [alone_.first, many.first, little.first] == ["instruction", "text", "text"]


def test_an_instruction_that_differs_from_row_to_row_is_shared_up_to_where_it_does() -> None:
    (one,) = passes(a=(ask("{note} " + "Follow these rules. " * 200), LLM), mean_bytes={"text": 80.0})
    assert one.first == "text"


def test_tasks_with_other_system_messages_share_no_text() -> None:
    rules = "Follow these rules. " * 20
    apart = {name: (ask(rules, system=f"You are {name}."), LLM) for name in ("a", "b")}
    together = {name: (ask(rules), LLM) for name in ("a", "b")}
    assert [p.first for p in passes(**apart, mean_bytes={"text": 600.0})] == ["instruction"]
    assert [p.first for p in passes(**together, mean_bytes={"text": 1600.0})] == ["text"]


def test_speed_is_learned_by_what_is_asked_and_not_by_how_it_is_worded() -> None:
    def key(**tasks: tuple[Task, Manifest]) -> str:
        (one,) = passes(**tasks)
        return learned_as(one.rate_key, one.model)

    same = key(a=(ask("Summarise it."), LLM))
    assert key(b=(ask("Rephrase this."), LLM)) == same
    assert key(a=(ask("Summarise it.", max_tokens=16), LLM)) != same
    assert key(a=(ask("Summarise it.", thinking=False), LLM)) == same
    assert key(a=(ask("Summarise it.", thinking=True), LLM)) != same
    assert key(a=(ask("Summarise it."), LLM), b=(ask("Rephrase this."), LLM)) != same
    assert same.startswith(f"{LLM.digest}:")
    assert key(vector=(Embed("minilm"), MINILM)) == MINILM.trunk


def test_the_digest_of_a_prompt_holds_what_it_may_write_and_in_what_order_it_is_written() -> None:
    (one,) = passes(a=(ask(), LLM))
    digests = {
        task_digest(in_order(task, one), LLM, LLM)
        for task in (ask(), ask(max_tokens=16), ask("Other."), ask(stop=("\n",)), ask(seed=1))
    }
    assert len(digests) == 5
    assert task_digest(in_order(ask(), one), LLM, LLM) == task_digest(ask(first="text"), LLM, LLM)
