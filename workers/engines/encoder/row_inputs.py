"""Rows of which heads read several texts, or numbers beside one: made ready once, and their numbers as features.

What cannot be read of a row is the error of the tasks that read it, and of no other. The trainer and the encoder make
features of numbers by the same function.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from motet.head_inputs import number_in
from motet.protocol.columns import ERROR, OK, TRUNCATED, CellError, Column
from motet.protocol.wire import TaskOrder
from motet.templates import placeholders, render
from workers.engine import PLACES, Pass, Prepared
from workers.engines.trunk import Tokens


@dataclass(frozen=True, slots=True)
class RowInputs:
    """What a row brings: ``Prepared.inputs``."""

    #: Each text, tokenised, or why it cannot be read.
    texts: tuple[Prepared | CellError, ...]
    #: Task name -> the numbers that its head reads, NaN where there is none; or what is wrong with them.
    numbers: Mapping[str, tuple[float, ...] | CellError]


def reads_more(pass_: Pass) -> bool:
    """Whether some task of a pass reads more of a row than one text."""
    return any(PLACES in task.spec or task.spec.get("numbers") for task in pass_.tasks)


def prepare_several(tokens: Tokens, pass_: Pass, texts: Sequence[str]) -> list[Prepared | CellError]:
    """Tokenise every text of every row once. ``texts``: what each row brings where it is one text."""
    templates: dict[int, str] = {}
    for task in pass_.tasks:
        if PLACES in task.spec:
            read = task.spec["input"]
            templates |= zip(task.spec[PLACES], [read] if isinstance(read, str) else read, strict=True)
    columns = [_rendered(templates[place], pass_, len(texts)) for place in sorted(templates)]
    read_texts = [tokens.prepare(column, pass_.max_tokens) for column in columns or [list(texts)]]
    names = {task.name: task.spec.get("numbers") or () for task in pass_.tasks}
    rows: list[Prepared | CellError] = []
    for row, mine in enumerate(zip(*read_texts, strict=True)):
        numbers = {task: _numbers(pass_, of, row) for task, of in names.items() if of}
        length = sum(text.length for text in mine if isinstance(text, Prepared))
        rows.append(Prepared(row, max(1, length), False, RowInputs(mine, numbers)))
    return rows


def _rendered(template: str, pass_: Pass, rows: int) -> list[str]:
    read = {name: pass_.fields[name] for name in placeholders(template)}
    return [render(template, {name: texts[row] for name, texts in read.items()}) for row in range(rows)]


def _numbers(pass_: Pass, names: Sequence[str], row: int) -> tuple[float, ...] | CellError:
    found = []
    for name in names:
        try:
            number = number_in(pass_.fields[name][row])
        except ValueError:
            return CellError("bad_number", f"{name} is no number; make it one, or null where it is not known")
        found.append(float("nan") if number is None else number)
    return tuple(found)


def numbers_of(rows: Sequence[RowInputs], task: str, width: int) -> torch.Tensor:
    """(n, width) fp64 of a task, NaN where there is none, or no number."""
    unread = (float("nan"),) * width
    said = [row.numbers[task] for row in rows]
    return torch.tensor([unread if isinstance(of, CellError) else of for of in said], dtype=torch.float64)


def flaw_of(row: RowInputs, task: TaskOrder) -> CellError | None:
    """What keeps a task from reading this row."""
    read = (*(row.texts[place] for place in task.spec.get(PLACES, (0,))), row.numbers.get(task.name))
    return next((one for one in read if isinstance(one, CellError)), None)


def with_marks(column: Column, rows: Sequence[RowInputs], task: TaskOrder) -> Column:
    """A task's column with its errors said in words, and marked where one of its texts was cut."""
    errors = dict(column.errors)
    status = bytearray(column.status)
    for i, row in enumerate(rows):
        texts = [row.texts[place] for place in task.spec.get(PLACES, (0,))]
        if (flaw := flaw_of(row, task)) is not None:
            status[i], errors[i] = ERROR, flaw
        elif status[i] == OK and any(isinstance(text, Prepared) and text.truncated for text in texts):
            status[i] |= TRUNCATED
    return replace(column, status=bytes(status), errors=errors)
