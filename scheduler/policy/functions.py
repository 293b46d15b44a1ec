"""Functions: which keyword arguments they take, and the artefacts that stand beside them. Pure.

A function that reads an artefact is to it what a trunk is to a head: the pass loads the function, and the task is
answered by the artefact beside it. So workers fetch its files as a head's, and both digests are in the task's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from motet.errors import Problem
from motet.protocol.manifest import Manifest
from motet.tasks import Function, Task, short

#: The keyword by which a function is given its artefact.
KEYWORD = "artefact"


def beside_functions(
    models: Mapping[str, Manifest], artefacts: Mapping[str, Manifest]
) -> tuple[dict[str, Manifest], dict[str, Manifest]]:
    """Task name -> what answers it, the artefact where it reads one; and ``name@version`` -> the functions of those."""
    functions = {models[name].ref: models[name] for name in artefacts if name in models}
    answering = {
        name: replace(artefacts[name], trunk_model=model.ref) if name in artefacts else model
        for name, model in models.items()
    }
    return answering, functions


def artefacts_mb(beside: Iterable[Manifest]) -> int:
    """Memory of those of these that are artefacts, each once, in MB."""
    found = {one.digest: one.memory_mb() for one in beside if one.answers == "artefact"}
    return sum(found.values())


def function_problems(
    name: str, task: Task, function: Manifest, artefact: Manifest | None, remedy: str
) -> list[Problem]:
    """What a function does not take of a task, or misses. ``remedy``: what to do about an unknown artefact."""
    if not isinstance(task, Function) or function.answers != "json":
        return []
    where = f"tasks.{name}"
    takes = {one: must for one, must in function.keywords.items() if one != KEYWORD}
    params = task.params or {}
    known = f"one of {', '.join(takes)}" if takes else f"none, for {function.ref} takes no parameter"
    problems = [
        Problem(f"{where}.params.{one}", "an unknown parameter", known, "remove it, or mend its name")
        for one in params
        if one not in takes
    ]
    problems += [
        Problem(
            f"{where}.params.{one}",
            "nothing",
            f"a value, which {function.ref} must be given",
            f'add it: params={{"{one}": …}}',
        )
        for one, must in takes.items()
        if must and one not in params
    ]
    return problems + _artefact_problems(f"{where}.artefact", task, function, artefact, remedy)


def _artefact_problems(
    where: str, task: Function, function: Manifest, artefact: Manifest | None, remedy: str
) -> list[Problem]:
    if task.artefact is None:
        if not function.keywords.get(KEYWORD):
            return []
        return [
            Problem(
                where, "nothing", f"the artefact that {function.ref} reads", 'add artefact="name@version"'
            )
        ]
    if KEYWORD not in function.keywords:
        return [
            Problem(
                where,
                short(task.artefact),
                f"nothing, for {function.ref} takes no artefact",
                "leave it out, or give the function a keyword argument called artefact and register it anew",
            )
        ]
    if artefact is None:
        return [Problem(where, short(task.artefact), "a registered artefact", remedy)]
    if artefact.answers != "artefact":
        got = f"{artefact.ref}, which answers {artefact.answers}"
        return [
            Problem(
                where, got, "an artefact", "register its files: motet models add FILE --artefact --name NAME"
            )
        ]
    return []
