"""Planning of tasks on pictures: one pass for all that one trunk sees, and refusals in words."""

from __future__ import annotations

from dataclasses import replace

import pytest

from motet.errors import InvalidJob
from motet.protocol.manifest import Manifest
from motet.tasks import Choose, Classify, Embed, Generate, Task
from scheduler.policy.plan import PassPlan, plan, task_digest, tokens_read

TEXTS = Manifest(
    name="minilm", version="1", engine="encoder", answers="vector", trunk="a" * 64, max_tokens=256, dim=384,
    pooling="mean",
)  # fmt: skip
LITE = Manifest(
    name="lite0", version="1", engine="image", answers="vector", reads="image", trunk="b" * 64, max_tokens=196,
    dim=1280, stage_dim=3072, pooling="mean",
)  # fmt: skip
CLIP = replace(LITE, name="clip", answers="match", trunk="c" * 64, stage_dim=0, pooling="")
LANGUAGE = Manifest(name="llm", version="1", engine="causal", answers="text", max_tokens=512, trunk="d" * 64)
TRUNKS = {m.ref: m for m in (TEXTS, LITE, CLIP)}


def head(name: str, on: Manifest, **more: object) -> Manifest:
    made = Manifest(
        name=name, version="1", engine=on.engine, answers="label", reads=on.reads, trunk=on.trunk, trunk_model=on.ref,
        max_tokens=on.max_tokens, labels=("no", "yes"), pooling=on.pooling,
    )  # fmt: skip
    return replace(made, **more)  # type: ignore[arg-type]


IMAGENET, DAMAGE, TOPICS = (
    head("imagenet", LITE),
    head("damage", LITE, pooling="stages"),
    head("topics", TEXTS),
)


def passes(**tasks: tuple[Task, Manifest]) -> tuple[PassPlan, ...]:
    return plan({n: t for n, (t, _) in tasks.items()}, {n: m for n, (_, m) in tasks.items()}, TRUNKS)


def refused(**tasks: tuple[Task, Manifest]) -> str:
    with pytest.raises(InvalidJob) as error:
        passes(**tasks)
    return str(error.value)


def test_heads_and_vectors_of_one_trunk_on_one_picture_are_one_pass_and_a_text_has_its_own() -> None:
    found = passes(
        object=(Classify("imagenet", input="{photo}"), IMAGENET),
        damage=(Classify("damage", input="{photo}"), DAMAGE),
        look=(Embed("lite0", input="{photo}"), LITE),
        strokes=(Embed("lite0", input="{photo}", features="stages"), LITE),
        topic=(Classify("topics", input="{note}"), TOPICS),
    )
    assert [(one.input, one.tasks, one.max_tokens) for one in found] == [
        ("{photo}", (0, 1, 2, 3), 196),
        ("{note}", (4,), 256),
    ]


def test_another_picture_of_the_row_is_another_pass() -> None:
    found = passes(a=(Embed("lite0", input="{front}"), LITE), b=(Embed("lite0", input="{back}"), LITE))
    assert [one.tasks for one in found] == [(0,), (1,)]


def test_two_towers_choose_and_embed_in_one_pass_that_is_no_prompt() -> None:
    [one] = passes(
        what=(Choose("clip", about="{photo}", labels=("cat", "dog")), CLIP),
        look=(Embed("clip", input="{photo}"), CLIP),
    )
    assert (one.tasks, one.prompts, one.first, one.rate_key) == ((0, 1), False, "", "")


@pytest.mark.parametrize("template", ["a photo: {photo}", "{photo} {note}", "{photo[0]}x"])
def test_a_model_of_pictures_reads_one_field_and_nothing_beside_it(template: str) -> None:
    words = refused(object=(Classify("imagenet", input=template), IMAGENET))
    assert "tasks.object.input" in words
    assert 'input="{photo}"' in words


def test_the_answer_of_another_task_is_no_picture() -> None:
    words = refused(
        topic=(Classify("topics", input="{note}"), TOPICS),
        object=(Classify("imagenet", input="{topic}"), IMAGENET),
    )
    assert "tasks.object.input" in words


def test_a_model_of_texts_does_not_read_what_another_task_sees() -> None:
    words = refused(
        object=(Classify("imagenet", input="{photo}"), IMAGENET),
        topic=(Classify("topics", input="{note} {photo}"), TOPICS),
        say=(Generate("llm", about="{photo}", prompt="What is this?"), LANGUAGE),
    )
    assert "tasks.topic.input" in words
    assert "tasks.say.about" in words
    assert "sees no pictures" in words


def test_a_picture_is_no_text_or_number_of_a_head_and_no_list_of_labels() -> None:
    both = head("both", TEXTS, inputs=("{note}", "{more}"), numbers=("age",))
    words = refused(
        look=(Embed("lite0", input="{photo}"), LITE),
        text=(Classify("both", input=("{note}", "{photo}"), numbers=("age",)), both),
        number=(Classify("both", input=("{note}", "{more}"), numbers=("photo",)), both),
        pick=(Choose("llm", labels="{photo}"), LANGUAGE),
        seen=(Classify("imagenet", input="{photo}", numbers=("age",)), IMAGENET),
    )
    for where in ("text.input", "number.numbers", "pick.labels", "seen.numbers"):
        assert f"tasks.{where}" in words


def test_options_that_mean_nothing_for_pictures_are_refused() -> None:
    words = refused(
        a=(Embed("lite0", input="{photo}", max_tokens=64), LITE),
        b=(Embed("clip", input="{photo}", features="stages"), CLIP),
        c=(Embed("minilm", input="{note}", features="stages"), TEXTS),
        d=(Choose("clip", about="{photo}", labels=("a", "b"), system="Be brief.", question="{note}"), CLIP),
        e=(Choose("clip", about="{photo}", labels="{words}"), CLIP),
    )
    for where in ("a.max_tokens", "b.features", "c.features", "d.system", "d.question", "e.labels"):
        assert f"tasks.{where}" in words


def test_features_count_for_reuse_and_for_the_length_of_vectors() -> None:
    last, stages = Embed("lite0", input="{photo}"), Embed("lite0", input="{photo}", features="stages")
    assert task_digest(last, LITE, LITE) != task_digest(stages, LITE, LITE)
    assert (LITE.vector_dim(last.to_json()), LITE.vector_dim(stages.to_json())) == (1280, 3072)
    assert tokens_read(last, LITE, LITE) == 196


def test_an_embedding_of_texts_has_the_digest_that_it_had_before_there_were_pictures() -> None:
    assert "features" not in Embed("minilm").to_json()
