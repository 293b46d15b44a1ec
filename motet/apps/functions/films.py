"""Which films next: four ways to rank them, as a function that workers run, and the artefact that it reads.

Neighbours by who liked what (item-based collaborative filtering; Sarwar et al., WWW 2001), vectors by what a film's line
says, the two together, and popularity to hold them against. numpy alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from motet.apps.data.movielens import Film

#: Neighbours kept of each film. More: rarer films are reached, by weaker ties.
NEIGHBOURS = 50
#: Added to the norm of a similarity, so that two films that one viewer likes are no perfect match.
SHRINK = 10.0
#: The newest liked films that count.
LAST = 20
#: Weight of the vectors beside the neighbours, both as standard scores.
CONTENT = 0.3
#: Films whose neighbours are computed at once: a block takes BLOCK × films × 4 bytes.
_BLOCK = 512


def pick(
    rows: Sequence[Mapping[str, Any]], *, by: str = "hybrid", k: int = 10, artefact: Mapping[str, Any]
) -> list[list[dict[str, Any]]]:
    """The ``k`` best films of each row, best first: ``{"id", "title", "score", "because"}``. Runs at the workers.

    A row has ``liked`` and ``seen`` (ids), and may have ``among``: the films to rank, else all that are not seen. ``by``
    is popularity, neighbours, content, hybrid, or fresh: content among films that nobody is known to like.
    """
    import numpy as np

    films, numbers = artefact["films.json"], artefact["films.safetensors"]
    ids, place = numbers["ids"], {int(film): at for at, film in enumerate(numbers["ids"])}
    answers = []
    for row in rows:
        liked = np.array([place[film] for film in row["liked"] if film in place][-LAST:], np.int64)
        scores = _SCORES[by](numbers, liked)
        open_to = np.zeros(len(ids), bool)
        if row.get("among"):
            open_to[[place[film] for film in row["among"] if film in place]] = True
        else:
            open_to[:] = True
            open_to[[place[film] for film in row["seen"] if film in place]] = False
            open_to[liked] = False
        if by == "fresh":
            open_to &= numbers["likes"] == 0
        found = np.flatnonzero(open_to)
        # Equal scores are ranked by id: the order that the films have here.
        best = found[np.argsort(-scores[found], kind="stable")[:k]]
        answers.append(
            [
                {
                    "id": int(ids[film]),
                    "title": films["titles"][film],
                    "score": round(float(scores[film]), 4),
                    "because": _because(films["titles"], numbers, int(film), liked),
                }
                for film in best
            ]
        )
    return answers


def _because(titles: Sequence[str], numbers: Mapping[str, Any], film: int, liked: Any) -> str:
    """The liked film that speaks for this one most: by its neighbours, or else by its vector."""
    import numpy as np

    if not len(liked):
        return ""
    near, weights = numbers["neighbours"][film], numbers["weights"][film]
    ties = np.where(near[:, None] == liked, weights[:, None], 0.0).max(axis=0)
    if not ties.any():
        ties = numbers["vectors"][liked] @ numbers["vectors"][film]
    return str(titles[liked[int(ties.argmax())]])


def _popularity(numbers: Mapping[str, Any], liked: Any) -> Any:
    return numbers["likes"].astype("float32")


def _neighbours(numbers: Mapping[str, Any], liked: Any) -> Any:
    import numpy as np

    is_liked = np.zeros(len(numbers["ids"]), np.float32)
    is_liked[liked] = 1
    # Of each film the liked ones among its own neighbours: so rare films are reached as well.
    return (is_liked[numbers["neighbours"]] * numbers["weights"]).sum(axis=1)


def _content(numbers: Mapping[str, Any], liked: Any) -> Any:
    import numpy as np

    vectors = numbers["vectors"]
    if not len(liked):
        return np.zeros(len(vectors), np.float32)
    taste = vectors[liked].mean(axis=0)
    return vectors @ taste


def _hybrid(numbers: Mapping[str, Any], liked: Any) -> Any:
    return _standard(_neighbours(numbers, liked)) + CONTENT * _standard(_content(numbers, liked))


def _standard(scores: Any) -> Any:
    spread = scores.std()
    return (scores - scores.mean()) / (spread if spread > 0 else 1.0)


_SCORES: Mapping[str, Callable[[Mapping[str, Any], Any], Any]] = {
    "popularity": _popularity,
    "neighbours": _neighbours,
    "content": _content,
    "hybrid": _hybrid,
    "fresh": _content,
}
#: What a row may be ranked by.
WAYS = tuple(_SCORES)


def fit(films: Sequence[Film], vectors: Sequence[Any], liked: Sequence[Sequence[int]], folder: Path) -> Path:
    """Write what ``pick`` reads into a folder: data alone, no code. Returns the folder.

    ``vectors``: of unit length, a list or an array for each film; ``liked`` holds the ids that each viewer liked.
    """
    import numpy as np
    from safetensors.numpy import save_file

    place = {film.id: at for at, film in enumerate(films)}
    likes = np.zeros((len(liked), len(films)), np.float32)
    for viewer, theirs in enumerate(liked):
        likes[viewer, [place[film] for film in theirs]] = 1
    count = likes.sum(axis=0)
    kept = min(NEIGHBOURS, len(films))
    neighbours = np.zeros((len(films), kept), np.int32)
    weights = np.zeros((len(films), kept), np.float32)
    for start in range(0, len(films), _BLOCK):
        block = slice(start, start + _BLOCK)
        together = likes[:, block].T @ likes
        alike = together / (np.sqrt(np.outer(count[block], count)) + SHRINK)
        alike[np.arange(len(alike)), np.arange(start, start + len(alike))] = 0
        best = np.argpartition(-alike, kept - 1, axis=1)[:, :kept]
        neighbours[block], weights[block] = best, np.take_along_axis(alike, best, axis=1)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        "ids": np.array([film.id for film in films], np.int64),
        "likes": count.astype(np.int32),
        "neighbours": neighbours,
        "weights": weights,
        "vectors": np.asarray(vectors, np.float32),
    }
    save_file(tensors, str(folder / "films.safetensors"))
    (folder / "films.json").write_text(json.dumps({"titles": [film.title for film in films]}), "utf-8")
    return folder


def read(folder: Path) -> dict[str, Any]:
    """The artefact in a folder, as a worker gives it to ``pick``."""
    from safetensors.numpy import load_file

    return {
        "films.json": json.loads((folder / "films.json").read_bytes()),
        "films.safetensors": load_file(str(folder / "films.safetensors")),
    }
