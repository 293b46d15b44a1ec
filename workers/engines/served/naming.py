"""Which label an answer means: one that was written, or the likeliest tokens that one may begin with. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence


def named(text: str, labels: Sequence[str]) -> int | None:
    """Which label an answer names: the one it is, or begins with, or the only one in it; None where that is unclear."""
    plain_text = text.strip().strip("\"'`*.").casefold()
    folded = [label.casefold() for label in labels]
    if plain_text in folded:
        return folded.index(plain_text)
    for found in (
        [i for i, label in enumerate(folded) if re.match(rf"{re.escape(label)}(?!\w)", plain_text)],
        [i for i, label in enumerate(folded) if re.search(rf"(?<!\w){re.escape(label)}(?!\w)", plain_text)],
    ):
        if found:
            longest = max(found, key=lambda i: len(folded[i]))
            # One that begins or holds the others is meant; two that stand apart are not clear.
            return longest if all(folded[i] in folded[longest] for i in found) else None
    return None


def beginnings(
    tokens: Sequence[tuple[str, float]], labels: Sequence[str], written: int | None
) -> list[float]:
    """Each label's share of the first token: what begins several is the written one's, or all of theirs alike."""
    shares = [0.0] * len(labels)
    for token, share in tokens:
        begin = token.replace("\u0120", " ").replace("\u2581", " ").strip().casefold()
        mine = [i for i, label in enumerate(labels) if begin and label.strip().casefold().startswith(begin)]
        if written in mine:
            mine = [written] if written is not None else mine
        for i in mine:
            shares[i] += share / len(mine)
    return shares
