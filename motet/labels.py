"""Labels to choose from: how many, of what form, and what is wrong with others. Asked at submission and by workers. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from motet.protocol.values import text_flaw
from motet.templates import is_placeholder, sole_placeholder

#: Labels that a language model may choose from. More would make a row's prompts, and the memory that they take on a
#: device, longer than most texts are.
MOST_LABELS = 1000
#: Characters of one label.
LABEL_CHARACTERS = 200


def is_listed(value: object) -> bool:
    """One field or answer in braces, or a part of one, that lists labels."""
    return isinstance(value, str) and (named := sole_placeholder(value)) is not None and is_placeholder(named)


def labels_flaw(labels: object, *, least: int = 1) -> str:
    """What keeps a value from being labels to choose from, in words without any text of it; "" where nothing does."""
    if not isinstance(labels, list | tuple):
        return _SORTS.get(type(labels), "a value of another kind")
    if len(labels) < least:
        return "a list of one label" if labels else "an empty list"
    if len(labels) > MOST_LABELS:
        return f"a list of {len(labels):,} labels"
    places: dict[str, int] = {}
    for place, label in enumerate(labels, 1):
        if not isinstance(label, str):
            return f"a list whose label {place} is no text"
        if not label.strip():
            return f"a list whose label {place} is empty"
        if len(label) > LABEL_CHARACTERS:
            return f"a list whose label {place} has {len(label):,} characters"
        if flaw := text_flaw(label):
            return f"a list whose label {place} holds {flaw}"
        if places.setdefault(label, place) != place:
            return f"a list whose labels {places[label]} and {place} are the same"
    return ""


#: What a value is that is no list.
_SORTS: Mapping[type, str] = {
    type(None): "null",
    str: "a text",
    bool: "true or false",
    int: "a number",
    float: "a number",
    dict: "an object",
}
