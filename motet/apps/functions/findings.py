"""Findings in a note by a lexicon: the longest name that matches, and whether the sentence denies it.

The rule for negation is in the manner of NegEx (Chapman et al., J. Biomed. Inform. 34, 2001): a few words before a finding,
or behind it, deny it. Assists, never diagnoses.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from motet.apps.data.hpo import Ontology

#: What stands in every answer.
ASSISTS = "assists, never diagnoses"
_SENTENCE = re.compile(r"(?<=[.!?])\s+")
_WORD = re.compile(r"[a-z0-9]+")
#: Denials before a finding, at most _BEFORE words ahead of it, and behind it, within _BEHIND words.
_BEFORE, _BEHIND = 6, 4
_DENY = tuple(
    tuple(words.split())
    for words in ("no", "not", "denies", "without", "negative for", "absence of", "free of")
)
_DENIED = tuple(tuple(words.split()) for words in ("ruled out", "is absent", "not seen", "absent"))
#: A name of one word is this long, or it is found in other words' place.
_SHORTEST = 4


def lexicon(ontology: Ontology, *, share: float = 1.0, seed: int = 7) -> dict[str, Any]:
    """What ``find`` reads: words -> id, and id -> name. ``share`` of the synonyms are known, drawn by ``seed``.

    Texts whose synonyms all stand in the lexicon would measure the lexicon by itself.
    """
    dice = random.Random(seed)
    phrases: dict[str, str] = {}
    terms = [ontology.terms[term] for term in sorted(ontology.terms)]
    for term in terms:
        phrases.setdefault(_key(term.name), term.id)
    for term in terms:
        for synonym in term.synonyms:
            if dice.random() < share:
                phrases.setdefault(_key(synonym), term.id)
    return {
        "version": ontology.version,
        "names": {term.id: term.name for term in terms},
        "phrases": {
            words: term for words, term in phrases.items() if " " in words or len(words) >= _SHORTEST
        },
    }


def find(texts: Sequence[str], *, artefact: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What each note says is there, and what it denies: lists of ``{"id", "name", "said"}``. Runs at the workers."""
    longest = max((words.count(" ") + 1 for words in artefact["phrases"]), default=0)
    return [_found(text, artefact, longest) for text in texts]


def link(names: Iterable[str], known: Mapping[str, Any]) -> set[str]:
    """Ids of the terms that are called so, whatever case and punctuation; a name that is none is left out."""
    return {term for name in names if (term := known["phrases"].get(_key(name)))}


def _found(text: str, known: Mapping[str, Any], longest: int) -> dict[str, Any]:
    present: dict[str, str] = {}
    absent: dict[str, str] = {}
    for sentence in _SENTENCE.split(text):
        words = _WORD.findall(sentence.lower())
        at = 0
        while at < len(words):
            for end in range(min(at + longest, len(words)), at, -1):
                term = known["phrases"].get(said := " ".join(words[at:end]))
                if term:
                    (absent if _is_denied(words, at, end) else present).setdefault(term, said)
                    at = end
                    break
            else:
                at += 1
    return {
        "present": _told(present.items(), known),
        # What is said to be there somewhere else is there.
        "absent": _told(((term, said) for term, said in absent.items() if term not in present), known),
        "note": f"{ASSISTS}; HPO {known['version']}",
    }


def _told(found: Iterable[tuple[str, str]], known: Mapping[str, Any]) -> list[dict[str, str]]:
    return [{"id": term, "name": known["names"][term], "said": said} for term, said in found]


def _is_denied(words: Sequence[str], start: int, end: int) -> bool:
    before, behind = words[max(0, start - _BEFORE) : start], words[end : end + _BEHIND]
    return _holds(before, _DENY) or _holds(behind, _DENIED)


def _holds(words: Sequence[str], phrases: Sequence[tuple[str, ...]]) -> bool:
    return any(
        tuple(words[at : at + len(phrase)]) == phrase for phrase in phrases for at in range(len(words))
    )


def _key(name: str) -> str:
    return " ".join(_WORD.findall(name.lower()))
