"""Texts by how alike they are: ``/rerank`` and ``/classify``, in the form of Cohere and Jina. Pure.

Both compare vectors of one model: their rows are those of embeddings, what the others are compared with first. A ranking
by a cross-encoder has rows of a query and some of the documents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from operator import mul
from typing import Any

from scheduler.api.openai.checks import Decoded, flag, texts, whole_number, wrong

_MOST_TEXTS = 1000
_MOST_LABELS = 100


def ranked(body: Mapping[str, Any], decoded: Decoded) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The rows of a ranking: its query and its documents; and what is to be told. Raises DoorError."""
    query = body.get("query")
    if not isinstance(query, str) or not query:
        raise wrong("query", query, "a text that is not empty")
    documents = texts("documents", _plain(body.get("documents")), decoded, _MOST_TEXTS)
    about = {"top_n": whole_number(body, "top_n", 1, 1 << 31), "told": flag(body, "return_documents")}
    return (query, *documents), about


def labelled(body: Mapping[str, Any], decoded: Decoded) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The rows of a classification: its labels and its texts; and how many labels there are. Raises DoorError."""
    labels = body.get("labels")
    if (
        not isinstance(labels, list)
        or not 2 <= len(labels) <= _MOST_LABELS
        or not all(isinstance(label, str) and label for label in labels)
        or len(set(labels)) < len(labels)
    ):
        raise wrong("labels", labels, f"2 to {_MOST_LABELS} different texts")
    asked = texts("input", _plain(body.get("input")), decoded, _MOST_TEXTS)
    return (*labels, *asked), {"labels": len(labels)}


def cosines(vectors: Sequence[Sequence[float]]) -> list[float]:
    """How alike the first one is to each of the others."""
    query, *others = map(_unit, vectors)
    return [_dot(query, one) for one in others]


def pair_scores(slices: Sequence[Sequence[str]], cells: Sequence[Sequence[Mapping[str, Any]]]) -> list[float]:
    """The score of each document, from the rankings of its slices."""
    scores: list[float] = []
    for some, cell in zip(slices, cells, strict=True):
        of_slice = {one["index"]: one["score"] for one in cell}
        scores += [of_slice[number] for number in range(len(some))]
    return scores


def ranking(asked: Sequence[str], scores: Sequence[float], about: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The documents with their scores, the best first. ``asked``: the query and the documents."""
    found = sorted(((score, -i) for i, score in enumerate(scores)), reverse=True)
    results: list[dict[str, Any]] = []
    for score, at in found[: about["top_n"]]:
        said = {"document": {"text": asked[1 - at]}} if about["told"] else {}
        results.append({"index": -at, "relevance_score": score, **said})
    return results


def classification(
    asked: Sequence[str], vectors: Sequence[Sequence[float]], about: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Each text with the label that it is most alike to, and with all labels."""
    count = about["labels"]
    units = [_unit(vector) for vector in vectors]
    told: list[dict[str, Any]] = []
    for number, vector in enumerate(units[count:]):
        scores = [_dot(vector, label) for label in units[:count]]
        best = max(range(count), key=scores.__getitem__)
        told.append(
            {
                "object": "classification",
                "index": number,
                "prediction": asked[best],
                "score": scores[best],
                "predictions": [
                    {"label": label, "score": score}
                    for label, score in zip(asked[:count], scores, strict=True)
                ],
            }
        )
    return told


def _plain(value: Any) -> Any:
    """Objects with a text as that text."""
    many = value if isinstance(value, list) else [value]
    plain = [one["text"] if isinstance(one, Mapping) and one.keys() == {"text"} else one for one in many]
    return plain if isinstance(value, list) else plain[0]


def _unit(vector: Sequence[float]) -> list[float]:
    """The vector at length 1; one of length 0 stays, and is like nothing."""
    length = sqrt(sum(x * x for x in vector))
    return [float(x) / length for x in vector] if length else [float(x) for x in vector]


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return float(sum(map(mul, a, b)))
