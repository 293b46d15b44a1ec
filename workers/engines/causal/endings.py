"""The end of a row of a language model: its answers as columns, and the tokens and seconds spent on each task."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from motet.protocol.columns import Column
from workers.engine import Ended
from workers.engines.causal.row_prompts import TaskPrompt
from workers.engines.causal.rows import ActiveRow, Causal
from workers.engines.choice import choice_column
from workers.engines.function import json_column, written_column
from workers.engines.prompts import counted
from workers.engines.writers import Writer


def end(handle: Causal, row: ActiveRow) -> Ended:
    """Take the row out. Its label priors are known from now on."""
    del handle.rows[row.ticket]
    written = {writer.name: writer for writer in row.ended}
    for a in row.asking.tasks:
        if found := tuple(s.logp for s in row.scores if s.task == a.name and s.empty):
            row.priors[a.name] = found
            handle.priors.put((row.tenant, a.prior), found)
    weights = {a.name: row.computed[a.name] + _written(written.get(a.name)) for a in row.asking.tasks}
    total = sum(weights.values()) or 1
    columns = {}
    spent = {}
    for a in row.asking.tasks:
        out = _written(written.get(a.name))
        cached = row.read[a.name] - row.computed[a.name]
        columns[a.name] = _column(handle, row, a, written, (row.read[a.name], cached, out))
        spent[a.name] = (row.read[a.name], cached, out, row.seconds * weights[a.name] / total)
    return Ended(row.ticket, columns, spent)


def _column(
    handle: Causal,
    row: ActiveRow,
    a: TaskPrompt,
    written: Mapping[str, Writer],
    spent: tuple[int, int, int],
) -> Column:
    if a.labels:
        found = [s.logp for s in row.scores if s.task == a.name and not s.empty]
        prior = row.priors.get(a.name)
        scores = np.array(found, np.float32) - (np.array(prior, np.float32) if prior else 0)
        return choice_column(scores, a.spec)
    if a.spec.get("options") and a.name not in row.failed:
        writer = written[a.name]
        told = writer.likelihoods(handle.tokens.words, handle.tokens.word)
        return json_column([counted(writer.text(handle.tokens.words), writer.finish, spent, told)])
    return written_column([row.failed.get(a.name) or written[a.name].answer(handle.tokens.words)])


def _written(writer: Writer | None) -> int:
    return len(writer.ids) if writer is not None else 0
