"""Tasks on pictures: what of a task and of its job does not go with a model that reads pictures, or with one of texts. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from motet.errors import Problem
from motet.media.fields import media_fields
from motet.protocol.manifest import Manifest
from motet.tasks import Choose, Embed, Function, Reading, Task, short
from motet.templates import placeholders, sole_placeholder


def picture_problems(tasks: Mapping[str, Task], models: Mapping[str, Manifest]) -> list[Problem]:
    """``models``: by the name of the task."""
    media = media_fields(tasks, models)
    return [
        problem
        for name, task in tasks.items()
        if (model := models.get(name)) is not None
        for problem in (
            _on_a_picture(name, task, model, tasks)
            if model.reads != "text"
            else _on_a_text(name, task, model, media)
        )
    ]


def _on_a_picture(name: str, task: Task, model: Manifest, tasks: Mapping[str, Task]) -> Iterator[Problem]:
    template, where = task.templates[0], f"tasks.{name}"
    if (field := sole_placeholder(task.shared_input)) is None or (field in tasks and field != name):
        yield Problem(
            f"{where}.{template}",
            short(task.shared_input),
            f"one field of the row that holds a picture, such as {{photo}}, since {model.ref} reads pictures",
            f'name the field alone: {template}="{{photo}}"',
        )
    if isinstance(task, Reading) and task.max_tokens is not None:
        yield Problem(
            f"{where}.max_tokens",
            f"{task.max_tokens} for {model.ref}, which reads pictures, all of one size",
            "null",
            "leave it out",
        )
    if isinstance(task, Embed) and task.features == "stages" and not model.stage_dim:
        yield Problem(
            f"{where}.features",
            f"stages of {model.ref}, which has none",
            "last, or a trunk with stages, such as efficientnet-lite0",
            "leave it out",
        )
    if isinstance(task, Choose):
        yield from _choosing(where, task, model)


def _choosing(where: str, task: Choose, model: Manifest) -> Iterator[Problem]:
    if task.system:
        yield Problem(
            f"{where}.system",
            short(task.system),
            f"nothing: {model.ref} is told nothing beside labels",
            "leave it out",
        )
    if isinstance(task.labels, str):
        yield Problem(
            f"{where}.labels",
            short(task.labels),
            f"a list of labels, the same ones for every row: {model.ref} reads the words of labels once, and not each row's",
            "list them, or choose with a language model, which takes a row's own",
        )
    if placeholders(task.question):
        yield Problem(
            f"{where}.question",
            short(task.question),
            "words that stand before each label, the same ones for every row, such as a photo of a",
            "take the field out",
        )


def _on_a_text(name: str, task: Task, model: Manifest, media: frozenset[str]) -> Iterator[Problem]:
    if isinstance(task, Function):
        return
    if isinstance(task, Embed) and task.features == "stages":
        yield Problem(
            f"tasks.{name}.features",
            f"stages of {model.ref}, which reads texts",
            "last",
            "leave it out",
        )
    for read in (one for one in task.placeholders if one in media):
        yield Problem(
            f"tasks.{name}.{_option_of(task, read)}",
            f"{{{read}}}, which holds pictures for another task",
            f"a field that holds text, since {model.ref} sees no pictures",
            f"take {{{read}}} out, or choose a model that reads pictures",
        )


def _option_of(task: Task, read: str) -> str:
    """The option in which a task names this."""
    if isinstance(task, Choose) and task.labels == f"{{{read}}}":
        return "labels"
    if any(read in placeholders(text) for text in task.texts):
        return task.templates[0]
    beside = (option for option in task.templates[1:] if read in placeholders(getattr(task, option)))
    return next(beside, "numbers")
