"""Numbers as words."""

from __future__ import annotations


def count(number: int, noun: str, nouns: str = "") -> str:
    """A number with its noun: ``1 pass``, ``4 tasks``."""
    return f"{number:,} {noun if number == 1 else nouns or noun + 's'}"
