"""Readable: all that a task can read in one block, by placeholder: fields, answers of other tasks, parts of both. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from motet.protocol.columns import Column
from motet.protocol.values import Value
from motet.templates import Reference, filled, part_of, placeholders, resolved, text_of
from scheduler.answers import as_texts, as_values, part_text, told


@dataclass(frozen=True)
class UpstreamAnswer:
    """What another task answered in a block."""

    name: str
    #: Of the task: ``Task.to_json``.
    spec: Mapping[str, Any]
    labels: tuple[str, ...]
    column: Column

    @cached_property
    def texts(self) -> list[str]:
        """The answer of each row as it stands in a template."""
        return as_texts(self.column, self.spec, self.labels)


@dataclass(frozen=True, slots=True)
class Readable:
    """One block's columns by name, by offset in it. The answer of a task hides a field of its name."""

    #: Field -> its values, or their texts.
    fields: Mapping[str, Sequence[Value]]
    #: The fields that are not text alone -> their values.
    typed: Mapping[str, Sequence[Value]]
    answers: Mapping[str, UpstreamAnswer]

    def name_of(self, written: str) -> str:
        """The field or the task that is meant."""
        return self._meant(written).name

    def is_answer(self, written: str) -> bool:
        return self._meant(written).name in self.answers

    def is_typed(self, written: str) -> bool:
        """Whether its values may be more than text."""
        meant = self._meant(written)
        return bool(meant.steps) or meant.name in self.answers or meant.name in self.typed

    def texts(self, written: str, rows: Sequence[int]) -> list[str]:
        """What stands in a template for these rows. ``fields`` must hold texts."""
        meant = self._meant(written)
        answer = self.answers.get(meant.name)
        if meant.steps and answer is not None:
            every = self._values_of(answer)
            return [part_text(answer.column.kind, every[i], meant.steps) for i in rows]
        if meant.steps:
            return [text_of(part_of(value, meant.steps)) for value in self._of_field(meant.name, rows)]
        whole: Sequence[Any] = self.fields[meant.name] if answer is None else answer.texts
        return [whole[i] for i in rows]

    def values(self, written: str, rows: Sequence[int]) -> list[Value]:
        """The same as values with their types."""
        meant = self._meant(written)
        answer = self.answers.get(meant.name)
        if answer is None:
            return [part_of(value, meant.steps) for value in self._of_field(meant.name, rows)]
        every = self._values_of(answer)
        return [part_of(every[i], meant.steps) for i in rows]

    def compared(self, written: str, rows: Sequence[int]) -> list[Value]:
        """The same as conditions compare it: of a whole label its name, of what was generated its text."""
        meant = self._meant(written)
        answer = self.answers.get(meant.name)
        if meant.steps or answer is None:
            return self.values(written, rows)
        return [told(value, answer.column.kind, answer.spec) for value in self.values(written, rows)]

    def _meant(self, written: str) -> Reference:
        return resolved(written, self.answers)

    def _of_field(self, name: str, rows: Sequence[int]) -> list[Value]:
        column = self.typed.get(name, self.fields[name])
        return [column[i] for i in rows]

    def _values_of(self, answer: UpstreamAnswer) -> list[Any]:
        """Spans are told with their text where the task read nothing but fields: others' answers are not at hand here."""
        if answer.column.kind != "spans":
            return as_values(answer.column, answer.labels)
        template = str(answer.spec.get("input", ""))
        columns = {**self.fields, **self.typed}
        if not all(resolved(one, ()).name in columns for one in placeholders(template)):
            return as_values(answer.column, answer.labels)
        rows = ({name: column[i] for name, column in columns.items()} for i in range(len(answer.column)))
        return as_values(answer.column, answer.labels, [filled(template, row) for row in rows])
