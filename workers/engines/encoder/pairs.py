"""Pairs of a query and a document: what a cross-encoder reads of a row, and the ranking that its scores make."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from motet.protocol.columns import CellError, Column
from motet.protocol.values import Value, plain_text
from motet.templates import placeholders, render, sole_placeholder, text_of
from workers.engine import Pass, Prepared
from workers.engines.answers import NOT_FINITE, Floats
from workers.engines.function import written_column
from workers.engines.trunk import Tokens

#: Documents of one row. More: a row holds a device for longer, and nothing else runs there meanwhile.
MOST_DOCUMENTS = 1000
#: Tokens of pairs that run together, padding included: more gain nothing on a CPU, and take memory on a GPU.
TOGETHER = {"cpu": 2048, "cuda": 1 << 16}
_TRIED = 3
_NO_LIST = CellError(
    "bad_row", f"documents: expected a list of 1 to {MOST_DOCUMENTS:,} texts, or of objects with a text"
)


@dataclass(frozen=True, slots=True)
class Pair:
    """A document of a row, as tokens behind the row's query."""

    row: Prepared
    #: Of each token, which of the two texts it is of.
    kinds: NDArray[np.int32]


def prepared(tokens: Tokens, pass_: Pass, texts: Sequence[str]) -> list[Prepared | CellError]:
    """Each row with its pairs; its length is that of all of them."""
    spec = pass_.tasks[0].spec
    values = pass_.values or _tried(texts)
    return [_prepared(tokens, spec, number, value) for number, value in enumerate(values)]


def _tried(texts: Sequence[str]) -> list[Value]:
    """What is asked where a model is tried with sentences alone: each is a query, and some of them its documents."""
    count = len(texts)
    return [
        {"query": text, "documents": [texts[(at + step) % count] for step in range(_TRIED)]}
        for at, text in enumerate(texts)
    ]


def _prepared(tokens: Tokens, spec: Mapping[str, Any], number: int, value: object) -> Prepared | CellError:
    assert isinstance(value, dict)
    query = render(spec["query"], {one: text_of(value[one]) for one in placeholders(spec["query"])})
    documents = _documents(value[sole_placeholder(spec["documents"]) or ""])
    if documents is None:
        return _NO_LIST
    found = tokens.pairs(query, documents, int(spec.get("max_tokens") or 0))
    pairs = [Pair(*one) for one in found if not isinstance(one, CellError)]
    if len(pairs) < len(found):
        return next(one for one in found if isinstance(one, CellError))
    length, cut = sum(pair.row.length for pair in pairs), any(pair.row.truncated for pair in pairs)
    return Prepared(number, length, cut, pairs)


def _documents(value: Value) -> list[str] | None:
    """The texts of a list; None where it is none."""
    if not isinstance(value, list) or not 0 < len(value) <= MOST_DOCUMENTS:
        return None
    texts = [one.get("text") if isinstance(one, dict) else one for one in value]
    return None if any(isinstance(one, dict | list) for one in texts) else [plain_text(one) for one in texts]


def ranking_column(
    rows: Sequence[Prepared], score: Callable[[Sequence[Pair]], Floats], device: str
) -> Column:
    """The ranking of each row. ``score``: one number for each pair, any at all; it grows with what is told."""
    every = [pair for row in rows for pair in row.inputs]
    scores = np.zeros(len(every))
    order = sorted(range(len(every)), key=lambda i: every[i].row.length, reverse=True)
    most, at = TOGETHER[device.partition(":")[0]], 0
    while at < len(order):
        some = order[at : at + max(1, most // every[order[at]].row.length)]
        scores[some] = score([every[i] for i in some])
        at += len(some)
    bodies, lo = list[bytes | CellError](), 0
    for row in rows:
        bodies.append(_ranking(scores[lo : lo + len(row.inputs)]))
        lo += len(row.inputs)
    return written_column(bodies)


def _ranking(logits: NDArray[np.float64]) -> bytes | CellError:
    if not np.isfinite(logits).all():
        return NOT_FINITE
    with np.errstate(over="ignore"):
        shares = 1 / (1 + np.exp(-logits))
    # By what the model said: of two shares that round to 1, one is still the better.
    order = np.argsort(-logits, kind="stable")
    told = [{"index": int(i), "score": float(shares[i])} for i in order]
    return json.dumps(told, separators=(",", ":")).encode()
