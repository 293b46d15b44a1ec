"""Numbers and strangers' words, as people may read them."""

from __future__ import annotations


def count(number: int, noun: str, nouns: str = "") -> str:
    """A number with its noun: ``1 pass``, ``4 tasks``."""
    return f"{number:,} {noun if number == 1 else nouns or noun + 's'}"


def visible(words: str) -> str:
    """Somebody's words with their control characters made visible: a terminal would obey them."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in words)
