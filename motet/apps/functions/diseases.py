"""Diseases that show what a note tells, best first, by enrichment over the ontology; and what to ask next.

A disease shows its terms and every one above them. How likely a draw of as many terms from all of the ontology has as many
of the disease's is the upper tail of the hypergeometric distribution; the less likely, the better the disease fits. numpy
alone. Assists, never diagnoses.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from motet.apps.data.hpo import Ontology
from motet.apps.functions.findings import ASSISTS

#: Questions that are asked at most.
_QUESTIONS = 3


def rank(
    rows: Sequence[Mapping[str, Any]], *, k: int = 10, artefact: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Candidates and questions for the ``findings`` of each row. Runs at the workers.

    ``candidates`` are ``k`` of ``{"id", "name", "p", "shared"}``, best first: ``p`` is the tail for this one disease, not
    corrected for how many there are, and no probability of having it. ``ask`` holds terms that would tell the candidates
    apart best: each is shown by about half of them, and neither said nor denied.
    """
    return [_ranked(row["findings"] or {}, k, artefact) for row in rows]


def _ranked(findings: Mapping[str, Any], k: int, artefact: Mapping[str, Any]) -> dict[str, Any]:
    import numpy as np

    known, numbers = artefact["diseases.json"], artefact["diseases.safetensors"]
    place = known["places"]
    said = [place[one["id"]] for one in findings.get("present", ()) if one["id"] in place]
    denied = [place[one["id"]] for one in findings.get("absent", ()) if one["id"] in place]
    starts, shown_by = numbers["starts"], numbers["shown_by"]
    hits = np.zeros(len(known["diseases"]), np.int64)
    for term in said:
        hits[shown_by[starts[term] : starts[term + 1]]] += 1
    found = np.flatnonzero(hits)
    tails = log_tails(hits[found], numbers["sizes"][found], len(said), len(known["terms"]))
    best = found[np.argsort(tails, kind="stable")[:k]]
    logs = dict(zip(found.tolist(), tails.tolist(), strict=True))
    return {
        "candidates": [
            {
                "id": known["diseases"][at][0],
                "name": known["diseases"][at][1],
                "p": float(f"{np.exp(logs[at]):.3g}"),
                "shared": [
                    known["terms"][term][1]
                    for term in said
                    if at in shown_by[starts[term] : starts[term + 1]]
                ],
            }
            for at in best.tolist()
        ],
        "ask": [
            {"id": known["terms"][term][0], "name": known["terms"][term][1]}
            for term in _questions(best.tolist(), numbers, {*said, *denied})
        ],
        "note": f"{ASSISTS}; HPO {known['version']}",
    }


def log_tails(hits: Any, sizes: Any, drawn: int, terms: int) -> Any:
    """Natural logarithms of P(X ≥ hits), X hypergeometric: ``drawn`` of ``terms``, of which ``sizes`` are a disease's."""
    import numpy as np

    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, terms + 1)))])

    def choose(n: Any, m: Any) -> Any:
        inside = (m >= 0) & (m <= n)
        m = np.where(inside, m, 0)
        return np.where(inside, logs[n] - logs[m] - logs[np.maximum(n - m, 0)], -np.inf)

    tails = np.full(len(hits), -np.inf)
    for count in range(1, drawn + 1):
        term = choose(sizes, count) + choose(terms - sizes, drawn - count) - choose(terms, drawn)
        tails = np.where(count >= hits, np.logaddexp(tails, term), tails)
    return tails


def _questions(candidates: Sequence[int], numbers: Mapping[str, Any], known: set[int]) -> list[int]:
    """Terms that about half of the candidates are annotated with, and that were not spoken of."""
    starts, terms = numbers["term_starts"], numbers["term_list"]
    counts: dict[int, int] = {}
    for at in candidates:
        for term in terms[starts[at] : starts[at + 1]].tolist():
            counts[term] = counts.get(term, 0) + 1
    open_ones = [term for term in counts if term not in known]
    return sorted(open_ones, key=lambda term: (abs(2 * counts[term] - len(candidates)), term))[:_QUESTIONS]


def fit(ontology: Ontology, folder: Path) -> Path:
    """Write what ``rank`` reads into a folder: data alone, no code. Returns the folder."""
    import numpy as np
    from safetensors.numpy import save_file

    terms, diseases = sorted(ontology.terms), list(ontology.diseases.values())
    place = {term: at for at, term in enumerate(terms)}
    own = [sorted(place[term] for term in one.terms) for one in diseases]
    shown = [{place[above] for term in one.terms for above in ontology.closed[term]} for one in diseases]
    by_term: list[list[int]] = [[] for _ in terms]
    for at, theirs in enumerate(shown):
        for term in theirs:
            by_term[term].append(at)
    starts, shown_by = _ragged(by_term)
    term_starts, term_list = _ragged(own)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        "starts": starts,
        "shown_by": shown_by,
        "term_starts": term_starts,
        "term_list": term_list,
        "sizes": np.array([len(theirs) for theirs in shown], np.int64),
    }
    save_file(tensors, str(folder / "diseases.safetensors"))
    told = {
        "version": ontology.version,
        "terms": [[term, ontology.terms[term].name] for term in terms],
        "places": place,
        "diseases": [[one.id, one.name] for one in diseases],
    }
    (folder / "diseases.json").write_text(json.dumps(told), "utf-8")
    return folder


def read(folder: Path) -> dict[str, Any]:
    """The artefact in a folder, as a worker gives it to ``rank``."""
    from safetensors.numpy import load_file

    return {
        "diseases.json": json.loads((folder / "diseases.json").read_bytes()),
        "diseases.safetensors": load_file(str(folder / "diseases.safetensors")),
    }


def _ragged(lists: Sequence[Sequence[int]]) -> tuple[Any, Any]:
    """Lists one behind the other, and where each begins and ends."""
    import numpy as np

    lengths = [len(one) for one in lists]
    flat = [value for one in lists for value in one]
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), np.array(flat, np.int32)
