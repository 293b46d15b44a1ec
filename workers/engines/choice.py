"""The cell of a choice among labels, from a score for each of them: engines of language models share it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from motet.protocol.columns import OK, Column, values
from workers.engines.answers import Floats, label_column
from workers.engines.function import json_column
from workers.engines.prompts import OWN_LABELS, labels_of


def choice_column(scores: Sequence[float] | Floats, spec: Mapping[str, Any]) -> Column:
    """A column of one row. ``scores``: a logarithm for each label of ``spec``; only their differences mean something.

    Labels that the row brought have no codes: such a cell is ``{"label": …, "score": …}``, with ``scores`` where the
    task asks for them.
    """
    column = label_column(np.asarray(scores, np.float32)[None], every_score=bool(spec.get("scores")))
    if not spec.get(OWN_LABELS):
        return column
    if column.status[0] != OK:
        return json_column([column.errors[0]])
    [(label, score, *every)] = values(column, labels_of(spec))
    return json_column([{"label": label, "score": score} | ({"scores": every[0]} if every else {})])
