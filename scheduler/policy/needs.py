"""Needs: which tasks read another task's answer, and the order that this puts them in. Pure.

A template's ``{name}`` is the answer of the task of that name, where the job has one, and a field of the row otherwise;
a task's own name is a field for it. So the answer hides a field of the same name from all other tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from motet.errors import Problem
from motet.tasks import Task

#: Of each task of a job, by number: the numbers of the tasks whose answers it reads, ascending.
Needs = Sequence[tuple[int, ...]]


def needs_of(tasks: Mapping[str, Task]) -> tuple[tuple[int, ...], ...]:
    """Who reads whose answer."""
    number = {name: i for i, name in enumerate(tasks)}
    return tuple(
        tuple(sorted(number[read] for read in set(task.reads(name, number)) & number.keys() - {name}))
        for name, task in tasks.items()
    )


def levels_of(needs: Needs) -> list[int]:
    """Of each task how many tasks must have answered before it, one after the other. ``needs`` has no cycle."""
    levels: dict[int, int] = {}

    def level(task: int) -> int:
        if task not in levels:
            levels[task] = 1 + max(map(level, needs[task]), default=-1)
        return levels[task]

    return [level(task) for task in range(len(needs))]


def cycle_of(needs: Needs) -> tuple[int, ...]:
    """Tasks of which each waits for the next, and the last for the first; () where there are none."""
    done: set[int] = set()
    for start in range(len(needs)):
        path: list[int] = []
        # A walk along the tasks that are waited for; ``left`` holds where each step may still go.
        left = [iter((start,))]
        while left:
            task = next(left[-1], None)
            if task is None:
                left.pop()
                if path:
                    done.add(path.pop())
            elif task in path:
                return tuple(path[path.index(task) :])
            elif task not in done:
                path.append(task)
                left.append(iter(needs[task]))
    return ()


def cycle_problem(names: Sequence[str], needs: Needs) -> list[Problem]:
    """What is wrong where tasks wait for each other."""
    cycle = [names[task] for task in cycle_of(needs)]
    if not cycle:
        return []
    return [
        Problem(
            f"tasks.{cycle[0]}",
            f"tasks that wait for each other: {' reads '.join([*cycle, cycle[0]])}",
            "tasks of which one can begin",
            f"take {{{cycle[1 % len(cycle)]}}} out of the templates of {cycle[0]}, or rename the task if a field is meant",
        )
    ]
