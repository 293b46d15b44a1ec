"""Notes about patients who do not exist: findings drawn from what a disease shows, in sentences made of fixed frames.

They are synthetic through and through. What is measured on them says how a pipeline copes with parents of terms, noise,
negation and typing errors, and nothing about real notes.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from motet.apps.data.hpo import Ontology

SAID = (
    "The patient has {}.",
    "There is {}.",
    "{} was noted at the visit.",
    "Mother reports {}.",
    "On examination: {}.",
    "History of {} since early childhood.",
    "She presented with {}.",
    "{} is present.",
)
DENIED = (
    "No {}.",
    "There is no sign of {}.",
    "The patient denies {}.",
    "{} was ruled out.",
    "Examination was negative for {}.",
    "No evidence of {} was found.",
    "{} is absent.",
)
#: Terms that a disease shows at least, so that its patients differ.
_TERMS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Difficulty:
    """How far a note is from what the books say."""

    #: Findings drawn from the disease, the more frequent ones more often.
    shown: int
    #: So many of these are told less exactly, by a term above.
    vague: int
    #: Findings that have nothing to do with the disease.
    noise: int
    #: Findings that are said to be absent.
    denied: int
    #: The share of findings with two letters swapped.
    typos: float


STANDARD = Difficulty(shown=5, vague=2, noise=1, denied=2, typos=0.0)
HARD = Difficulty(shown=4, vague=2, noise=2, denied=3, typos=0.1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Patient:
    """A note, and the truth about it."""

    text: str
    #: Id of the disease that it was made from.
    disease: str
    #: Ids of terms.
    present: frozenset[str]
    absent: frozenset[str]


def patients(
    ontology: Ontology, count: int, *, difficulty: Difficulty = STANDARD, seed: int = 0
) -> list[Patient]:
    """So many patients, the same ones for a seed."""
    dice = random.Random(seed)
    diseases = [one for one in ontology.diseases.values() if len(one.terms) >= _TERMS]
    used = sorted({term for one in ontology.diseases.values() for term in one.terms})
    return [_patient(ontology, dice, dice.choice(diseases).id, used, difficulty) for _ in range(count)]


def _patient(
    ontology: Ontology, dice: random.Random, disease: str, used: Sequence[str], difficulty: Difficulty
) -> Patient:
    shares = dict(ontology.diseases[disease].terms)
    drawn: list[str] = []
    while shares and len(drawn) < difficulty.shown:
        drawn += dice.choices(list(shares), list(shares.values()))
        del shares[drawn[-1]]
    present = [
        _above(ontology, dice, term) if at < difficulty.vague else term for at, term in enumerate(drawn)
    ]
    shown = frozenset(ontology.diseases[disease].terms)
    present += dice.sample([term for term in used if term not in shown], difficulty.noise)
    known = frozenset().union(*(ontology.closed[term] for term in (*shown, *present)))
    absent = dice.sample([term for term in used if term not in known], difficulty.denied)
    said = [
        dice.choice(frames).format(_words(ontology, dice, term, difficulty.typos))
        for terms, frames in ((dict.fromkeys(present), SAID), (absent, DENIED))
        for term in terms
    ]
    dice.shuffle(said)
    return Patient(
        text=" ".join(one[0].upper() + one[1:] for one in said),
        disease=disease,
        present=frozenset(present),
        absent=frozenset(absent),
    )


def _above(ontology: Ontology, dice: random.Random, term: str) -> str:
    """A term right above, unless that is a whole organ system or more."""
    above = [p for p in ontology.terms[term].parents if p in ontology.terms and p not in ontology.systems]
    return dice.choice(above) if above else term


def _words(ontology: Ontology, dice: random.Random, term: str, typos: float) -> str:
    """The name of a term or one of its synonyms, with two letters swapped at times."""
    words = dice.choice([ontology.terms[term].name, *ontology.terms[term].synonyms])
    if len(words) > 1 and dice.random() < typos:
        at = dice.randrange(len(words) - 1)
        words = words[:at] + words[at + 1] + words[at] + words[at + 2 :]
    return words
