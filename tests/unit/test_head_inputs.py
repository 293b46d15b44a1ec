"""Heads on several texts, and on numbers beside them: trained, planned, sent, and answered from both."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from motet import Classify, Embed, InvalidJob, Labels, Number
from motet.cli.jobs import parse_tasks
from motet.head_inputs import as_trained, number_in
from motet.protocol.columns import STATE_MASK, TRUNCATED, Column, values
from motet.protocol.manifest import Manifest
from motet.protocol.wire import Assignment, TaskOrder
from motet.tasks import Task, fields_of, parse
from motet.training.lesson import read_lesson
from motet.training.recipe import Numbers, Recipe, Target
from scheduler.api.manifests import read_manifest
from scheduler.policy.plan import Sample, estimate, plan, reads_of
from tests.unit.test_plan import MINILM, TRUNKS, head, passes, refused
from tests.unit.test_trainer import Memory, Stage, sentences
from workers.engine import Pass, Prepared
from workers.engines.encoder.encoder import EncoderEngine
from workers.engines.heads import standardised
from workers.run.work import Work

BOTH = head("both", inputs=("{history}", "{last}"), numbers=("age",))
ONE = head("one")


# -- planned


def test_tasks_that_read_a_text_in_common_share_a_pass_in_which_each_text_is_read_once() -> None:
    both = as_trained(Classify("both"), BOTH)
    first, second = passes(
        vector=(Embed("minilm", input="{last}"), MINILM),
        both=(both, BOTH),
        other=(Classify("one", input="{other}"), ONE),
        one=(Classify("one", input="{history}"), ONE),
    )
    assert (first.tasks, first.texts) == ((0, 1, 3), ("{last}", "{history}"))
    assert first.reads == ((0,), (1, 0), (1,))
    assert (second.tasks, second.texts, second.reads) == ((2,), ("{other}",), ())
    # Its rows cost what both of its texts do, and not that of each task.
    tasks = {
        "vector": Embed("minilm", input="{last}"),
        "both": both,
        "one": Classify("one", input="{history}"),
    }
    assert fields_of(tasks) == ("last", "history", "age")
    assert reads_of(first, {**tasks, "other": Classify("one", input="{other}")} | tasks).times[:2] == (1, 1)
    sample = Sample(rows=2, total_rows=2, text_bytes=0, total_bytes=None)
    timing: dict[str, Any] = {"seconds_per_token": [], "prior_s": 1e-3, "subtask_s": 1.0}
    guess = estimate(first, [10, 300], sample, **timing, others=[[20, 30]])
    assert (guess.tokens, guess.unfused_tokens, guess.truncated_rows) == (316, 266 + 316 + 50, 1)


def test_without_a_text_in_common_nothing_is_joined() -> None:
    found = passes(
        one=(Classify("one", input="{a}"), ONE),
        other=(Classify("one", input="{b}"), ONE),
        both=(Classify("both", input=("{c}", "{d}"), numbers=("age",)), BOTH),
    )
    assert [p.texts for p in found] == [("{a}",), ("{b}",), ("{c}", "{d}")]


def test_a_task_reads_what_its_head_was_trained_on_unless_it_names_others() -> None:
    assert as_trained(Classify("both"), BOTH) == Classify("both", input=BOTH.inputs, numbers=("age",))
    other = Classify("both", input=("{a}", "{b}"))
    assert as_trained(other, BOTH) == replace(other, numbers=("age",))
    years = Classify("both", numbers=("years",))
    assert as_trained(years, BOTH).placeholders == ("history", "last", "years")
    assert as_trained(Classify("one"), ONE) == Classify("one")
    assert as_trained(Embed("minilm"), MINILM) == Embed("minilm")


@pytest.mark.parametrize(
    ("task", "model", "words"),
    [
        (Classify("both", input="{a} {b}", numbers=("age",)), BOTH, "tasks.t.input: got 1 text for both@1, which reads 2 texts; expected 2 templates; leave it out to read {history} and {last} and age"),
        (Classify("both", input=("{a}", "{b}", "{c}"), numbers=("age",)), BOTH, "tasks.t.input: got 3 texts for both@1, which reads 2 texts"),
        (Classify("both", input=("{a}", "{b}"), numbers=("x", "y")), BOTH, "tasks.t.numbers: got 2 numbers for both@1, which reads 1 number; expected 1 name"),
        (Classify("one", input=("{a}", "{b}")), ONE, "tasks.t.input: got 2 texts for one@1, which reads 1 text; expected 1 template; give one template"),
        (Classify("one", numbers=("age",)), ONE, "tasks.t.numbers: got 1 number for one@1, which reads none; expected nothing; leave it out, or train a head on numbers"),
    ],
)  # fmt: skip
def test_what_a_head_does_not_read_is_refused_by_name(task: Task, model: Manifest, words: str) -> None:
    [problem] = refused({"t": task}, {"t": model})
    assert str(InvalidJob(problem)).startswith(words)


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("input", [], "tasks.t.input: got []; expected text that names at least one field, such as {text}; of a head on several texts a list"),
        ("input", ["{a}", "b"], "tasks.t.input"),
        ("input", ["{a}"] * 9, "tasks.t.input"),
        ("numbers", ["{age}"], "tasks.t.numbers: got ['{age}']; expected 1 to 64 different names of fields or tasks that are numbers"),
        ("numbers", ["age", "age"], "tasks.t.numbers"),
    ],
)  # fmt: skip
def test_what_names_no_text_and_no_number_is_refused(option: str, value: Any, words: str) -> None:
    with pytest.raises(InvalidJob) as caught:
        parse({"t": {"kind": "classify", "model": "m", option: value}})
    assert str(caught.value).startswith(words)
    with pytest.raises(InvalidJob, match=r"tasks\.e\."):
        parse({"e": {"kind": "embed", "model": "m", option: ["{a}", "{b}"]}})


def test_the_command_line_names_texts_by_saying_input_again() -> None:
    told = parse_tasks(
        ["intent=classify:s.intent,input={history}|x,input={last},numbers=age|customer[income]"]
    )
    assert told["intent"]["input"] == ["{history}|x", "{last}"]
    assert parse(told)["intent"].placeholders == ("history", "last", "age", "customer[income]")
    assert parse_tasks(["a=classify:m,input={b}"])["a"]["input"] == "{b}"


def test_a_manifest_that_names_no_templates_is_refused() -> None:
    told = {**BOTH.to_json(), "inputs": ["history"]}
    with pytest.raises(InvalidJob, match="inputs: got history; expected templates"):
        read_manifest(told)
    with pytest.raises(InvalidJob, match="only a head reads several"):
        read_manifest({**MINILM.to_json(), "inputs": ["{a}", "{b}"]})
    with pytest.raises(InvalidJob, match="reads one picture"):
        read_manifest({**BOTH.to_json(), "reads": "image"})
    assert read_manifest(BOTH.to_json()) == BOTH
    assert Manifest.from_json(BOTH.to_json()) == BOTH
    assert BOTH.digest != replace(BOTH, inputs=()).digest
    seen = replace(BOTH, reads="image")
    assert len({BOTH.digest, seen.digest, replace(seen, inputs=(), numbers=()).digest}) == 3


def test_the_plan_of_an_unknown_head_names_it() -> None:
    with pytest.raises(InvalidJob, match="a registered model"):
        plan({"t": Classify("s.x")}, {}, TRUNKS)


# -- numbers


@pytest.mark.parametrize(
    ("text", "number"), [("4", 4.0), (" -1.5e3 ", -1500.0), ("", None), (" ", None), ("true", 1.0), ("false", 0.0)]
)  # fmt: skip
def test_the_plain_text_of_a_number_is_that_number(text: str, number: float | None) -> None:
    assert number_in(text) == number


@pytest.mark.parametrize("text", ["four", "nan", "inf", "1,5", "[1]"])
def test_what_is_no_number_is_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"not finite|could not convert"):
        number_in(text)


# -- read


def row(i: int, **changed: Any) -> dict[str, Any]:
    plain = {"history": f"before {i}", "last": f"now {i}", "age": i, "intent": "ab"[i % 2]}
    return plain | changed


def rows(**changed: Any) -> list[dict[str, Any]]:
    return [row(i, **(changed if i == 7 else {})) for i in range(30)]


def test_rows_become_texts_side_by_side_and_numbers() -> None:
    lesson = read_lesson(
        rows(age=None),
        rows()[:5],
        {"intent": Labels("intent")},
        text=("history", "{last}!"),
        numbers=("age",),
    )
    assert (lesson.train_rows, lesson.rows, lesson.templates) == (30, 35, ("{history}", "{last}!"))
    assert lesson.inputs[:4] == ["before 0", "now 0!", "before 1", "now 1!"]
    [age] = lesson.numbers
    found = np.frombuffer(age.values, "<f8")
    assert (age.name, found[6], math.isnan(found[7]), found[30]) == ("age", 6.0, True, 0.0)
    other = read_lesson(
        rows(age=1), rows()[:5], {"intent": Labels("intent")}, text=("history", "{last}!"), numbers=("age",)
    )
    assert other.digest != lesson.digest
    alone = read_lesson(rows(), None, {"intent": Labels("intent")}, text="{history}")
    assert (alone.templates, alone.numbers) == ((), ())
    beside = read_lesson(rows(), None, {"intent": Labels("intent")}, text="last", numbers=["age"])
    assert beside.templates == ("{last}",)
    # What a turn began with may be empty, all of it not.
    read_lesson(rows(history=""), None, {"intent": Labels("intent")}, text=("history", "last"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"history": "", "last": " "},
            "row 7, train: got no text at all; expected a text in {history} or {last}",
        ),
        ({"history": math.nan}, "row 7, train.history: got NaN"),
        ({"age": "old"}, "row 7, train.age: got no number; expected a number, or null where it is not known"),
        ({"age": {"a": 1}}, "row 7, train.age: got no number"),
    ],
)
def test_a_bad_text_and_a_bad_number_are_named_by_row_and_field(change: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidJob) as caught:
        read_lesson(
            rows(**change), None, {"intent": Labels("intent")}, text=("history", "last"), numbers=("age",)
        )
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"text": ()}, "text: got 0 texts; expected 1 to 8"),
        ({"text": ("{a",)}, "text: got {a; expected a field, or a template"),
        ({"numbers": ("{age}",)}, "numbers: got {age}; expected the name of a field"),
        ({"numbers": ("age", "age")}, "numbers: got 2 names; expected up to 64 different ones"),
        ({"text": ("history", "gone")}, "train.gone: got no such field"),
        ({"numbers": ("nothing",)}, "train.nothing: got null in all of them"),
    ],
)
def test_options_that_name_nothing_are_refused(options: dict[str, Any], words: str) -> None:
    some = [one | {"nothing": None} for one in rows()]
    with pytest.raises(InvalidJob) as caught:
        read_lesson(some, None, {"intent": Labels("intent")}, **{"text": ("history", "last"), **options})
    assert words in str(caught.value)


# -- trained and asked


ROWS = sentences(240)
FIRST = [text for text, *_ in ROWS]
SECOND = [FIRST[(i * 11 + 3) % 240] for i in range(240)]
AGES = [None if i % 9 == 0 else 1000.0 + i % 7 for i in range(240)]
#: Glad only where both texts are, and the number is large: no one of the three tells it.
TRUTH = [
    "yes"
    if ROWS[i][1] == "glad" and ROWS[(i * 11 + 3) % 240][1] == "glad" and (AGES[i] or 0) > 1001
    else "no"
    for i in range(240)
]


def recipe(**changed: Any) -> Recipe:
    facts: dict[str, Any] = {
        "name": "mine", "version": "1", "trunk": "tiny@1", "job": "j", "train_rows": 200, "test_rows": 40,
        "hidden": 16, "head_epochs": 60, "epochs": 2, "patience": 0, "rate": 1e-3, "batch_rows": 16,
        "targets": (Target.single("all", ["no", "yes"], TRUTH), Target.number("age", [a or 0.0 for a in AGES])),
        "inputs": ("{first}", "{second}"), "numbers": (Numbers.of("age", AGES),),
    }  # fmt: skip
    return Recipe(**{**facts, **changed})


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    from tests.unit.test_worker_engines import tiny_bert
    from workers.registrar.describe import describe_folder

    folder = tiny_bert(tmp_path_factory.mktemp("trunk"))
    trunk = describe_folder(folder, name="tiny", version="1", licence="", source={})
    engine = EncoderEngine()
    handle = engine.load(trunk.manifest, trunk.files, device="cpu", in_format="fp32")
    texts = [text for pair in zip(FIRST, SECOND, strict=True) for text in pair]
    read = [r for r in engine.prepare(Pass(handle, (), 0), texts) if isinstance(r, Prepared)]
    return Stage(trunk, Memory(texts, engine._pooled(handle, read).numpy()))


def ask(
    stage: Stage,
    made: Mapping[str, Any],
    tmp_path: Path,
    tasks: Mapping[str, Task],
    fields: Mapping[str, Sequence[str]],
    max_tokens: int = 0,
) -> dict[str, Column]:
    """What a worker says to these tasks, by the name of the task."""
    manifests = {m.name: m for m in map(Manifest.from_json, made["models"])}
    trunks = [m for m in manifests.values() if not m.trunk_model]
    base = trunks[0] if trunks else stage.trunk.manifest
    files = _files(stage, trunks[0], tmp_path) if trunks else stage.trunk.files
    engine = EncoderEngine()
    handle = engine.load(base, files, device="cpu", in_format="fp32")
    orders = []
    for name, task in tasks.items():
        manifest = manifests.get(task.model, base)
        orders.append(TaskOrder(name=name, spec=as_trained(task, manifest).to_json(), manifest=manifest))
        if manifest.trunk_model:
            engine.attach(handle, orders[-1], _files(stage, manifest, tmp_path))
    n = len(next(iter(fields.values())))
    work = Work.of(
        Assignment(
            subtask=1, attempt=1, nonce="n", job="j", tenant="t", pass_kind="encoder", model=base, numerics="exact",
            max_tokens=max_tokens, tasks=tuple(orders), texts=("",) * n, fields={k: tuple(v) for k, v in fields.items()},
        ), "fp32", 1,
    )  # fmt: skip
    pass_ = Pass(handle, work.tasks, max_tokens, work.order.fields)
    prepared = engine.prepare(pass_, work.order.texts)
    work.prepared(prepared)
    ready = sorted(work.rows, key=lambda one: one.row)
    work.take(ready, engine.run(pass_, ready))
    outcome = work.outcome("w", "b")
    assert outcome.verdict == "done", outcome.error
    return dict(outcome.columns)


def _files(stage: Stage, manifest: Manifest, folder: Path) -> dict[str, Path]:
    home = folder / manifest.ref
    home.mkdir(exist_ok=True)
    for name, sha256 in manifest.files.items():
        raw = stage.journal.files[sha256]
        assert hashlib.sha256(raw).hexdigest() == sha256
        (home / name).write_bytes(raw)
    return {name: home / name for name in manifest.files}


@pytest.mark.parametrize("tune", ["heads", "lora"])
def test_a_head_learns_from_both_texts_and_the_number_and_answers_from_them(
    stage: Stage, tmp_path: Path, tune: str
) -> None:
    made = stage.fit(recipe(tune=tune, head_epochs=30 if tune == "heads" else 1, epochs=1))
    *_, classifier, _ = map(Manifest.from_json, made["models"])
    assert (classifier.inputs, classifier.numbers) == (("{first}", "{second}"), ("age",))
    fields = {
        "first": FIRST[200:],
        "second": SECOND[200:],
        "age": ["" if age is None else str(age) for age in AGES[200:]],
    }
    tasks = {
        "all": Classify("mine.all"),
        "age": Number("mine.age"),
        "vector": Embed("tiny", input="{second}"),
    }
    found = ask(stage, made, tmp_path, tasks, fields)
    said = [label for label, _ in values(found["all"], classifier.labels)]
    right = np.mean([a == b for a, b in zip(said, TRUTH[200:], strict=True)])
    assert right == pytest.approx(made["scores"]["all"]["accuracy"], abs=1e-6)
    if tune == "lora":
        return
    # What is true where the number is missing, and where it is not, no text tells.
    numbers = np.array(list(values(found["age"])))
    missing = np.array([age is None for age in AGES[200:]])
    assert numbers[missing].max() < numbers[~missing].mean()
    # Fused with a task that reads one of the texts: that one is the trunk's own vector.
    alone = ask(
        stage,
        made,
        tmp_path,
        {"v": Embed("tiny", input="{second}"), "w": Embed("tiny", input="{first}")},
        fields,
    )
    assert list(values(found["vector"])) == pytest.approx(np.array(list(values(alone["v"]))), abs=1e-5)
    # Under other names, and with the texts changed over.
    renamed = {"a": fields["first"], "b": fields["second"], "years": fields["age"]}
    task = Classify("mine.all", input=("{a}", "{b}"), numbers=("years",))
    again = ask(stage, made, tmp_path, {"all": task}, renamed)
    assert [label for label, _ in values(again["all"], classifier.labels)] == said
    over = ask(stage, made, tmp_path, {"all": replace(task, input=("{b}", "{a}"))}, renamed)
    assert over["all"].arrays["scores"] != again["all"].arrays["scores"]


def test_a_head_on_one_text_and_numbers_reads_the_text_of_its_pass(stage: Stage, tmp_path: Path) -> None:
    journal, texts = stage.journal, stage.journal.texts[::2]
    one = Stage(stage.trunk, Memory(texts, journal.vectors[::2]))
    made = one.fit(recipe(inputs=("{first}",), head_epochs=10))
    order = Manifest.from_json(made["models"][0])
    assert order.inputs == ("{first}",)
    # The only text comes as it always does.
    engine = EncoderEngine()
    handle = engine.load(one.trunk.manifest, one.trunk.files, device="cpu", in_format="fp32")
    task = TaskOrder(name="age", spec=as_trained(Number("x"), order).to_json(), manifest=Manifest.from_json(made["models"][1]))  # fmt: skip
    engine.attach(handle, task, _files(one, task.manifest, tmp_path))
    pass_ = Pass(handle, (task,), 0, {"age": ("1002", "", "1006.0")})
    ready = [r for r in engine.prepare(pass_, FIRST[:3]) if isinstance(r, Prepared)]
    low, missing, high = values(engine.run(pass_, ready)["age"])
    assert missing < min(low, high)
    # As the whole of a row's text and its numbers, whoever is asked beside it.
    alone = [r for r in engine.prepare(pass_, FIRST[:1]) if isinstance(r, Prepared)]
    assert list(values(engine.run(pass_, alone)["age"])) == [pytest.approx(low, rel=1e-5)]


def test_what_cannot_be_read_of_a_row_is_the_error_of_the_tasks_that_read_it(
    stage: Stage, tmp_path: Path
) -> None:
    made = stage.fit(recipe(head_epochs=1))
    fields = {"first": ["fine " * 40, "fine", "fine"], "second": ["bad"] * 3, "age": ["1", "old", ""]}
    tasks: dict[str, Task] = {
        "all": Classify("mine.all"),
        "strict": Classify("mine.all", too_long="error"),
        "second": Embed("tiny", input="{second}", too_long="error"),
        "first": Embed("tiny", input="{first}"),
    }
    found = ask(stage, made, tmp_path, tasks, fields, max_tokens=8)
    states = {name: [status & STATE_MASK for status in column.status] for name, column in found.items()}
    assert states == {"all": [0, 1, 0], "strict": [1, 1, 0], "second": [0, 0, 0], "first": [0, 0, 0]}
    assert found["all"].errors[1].error == "bad_number"
    assert found["all"].errors[1].message.startswith("age is no number")
    assert found["strict"].errors[0].error == "too_long"
    cut = {name for name, column in found.items() if column.status[0] & TRUNCATED}
    assert cut == {"all", "first"}, "the second text was not cut"


def test_a_missing_number_is_its_mean_and_told_apart() -> None:
    center, scale = (
        torch.tensor([10.0, 5.0], dtype=torch.float64),
        torch.tensor([0.5, 0.0], dtype=torch.float64),
    )
    said = torch.tensor([[12.0, 7.0], [math.nan, math.nan]], dtype=torch.float64)
    assert standardised(said, center, scale).tolist() == [[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]]


def test_a_recipe_with_numbers_crosses_the_wire_whole_and_a_torn_one_is_refused() -> None:
    asked = recipe()
    assert Recipe.loads(asked.dumps()) == asked
    with pytest.raises(ValueError, match="numbers beside no text"):
        Recipe.loads(replace(asked, inputs=()).dumps())
    with pytest.raises(ValueError, match="numbers"):
        Recipe.loads(replace(asked, numbers=(Numbers.of("age", AGES[:3]),)).dumps())
