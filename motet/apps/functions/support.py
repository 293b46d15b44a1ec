"""How urgent a customer is: a rule that says what spoke for it, and who must be read by a person."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

#: What is said -> what it speaks for, and how much.
_SAID: tuple[tuple[re.Pattern[str], str, int], ...] = (
    (
        re.compile(r"\b(?:urgent|asap|as soon as possible|immediately|right away|emergency|hurry)\b", re.I),
        "says that it is urgent",
        3,
    ),
    (re.compile(r"\b(?:lost|stolen|fraud|hacked|charged twice|locked out)\b", re.I), "says what was lost", 3),
    (
        re.compile(r"\b(?:human|real person|manager|supervisor|complain\w*|unacceptable)\b", re.I),
        "asks for a person",
        2,
    ),
    (re.compile(r"\b(?:today|tonight|this (?:morning|afternoon|evening))\b", re.I), "is about today", 1),
)
#: Intents that move money or bind somebody.
_BINDING = re.compile(r"^(?:Buy|Book|Reserve|Rent|Transfer|Make|Request|Schedule|Order|Pay)")
#: Points from which on a customer comes first, and before the rest.
_HIGH, _NORMAL = 4, 2
#: Characters of the last words that are told.
_TOLD = 120
#: Score below which an intent, or a mood, is not believed.
_SURE = 0.5


def urgency(row: Mapping[str, Any]) -> dict[str, Any]:
    """``level`` (high, normal or low), ``points``, what spoke for it (``because``), whether a ``person`` must look, and the
    beginning of what was ``said``.

    ``row``: ``intent`` and ``mood`` with label and score, and the customer's last words under ``messages[-1].content``.
    """
    intent, mood = row["intent"] or {}, row["mood"] or {}
    last = str(row["messages[-1].content"] or "")
    spoke = [(why, points) for pattern, why, points in _SAID if pattern.search(last)]
    if mood.get("label") == "negative" and mood["score"] >= _SURE:
        spoke.append(("sounds unhappy", 2))
    if _BINDING.match(str(intent.get("label", ""))):
        spoke.append(("something is to be booked or paid", 1))
    points = sum(one for _, one in spoke)
    unsure = intent.get("score", 0.0) < _SURE
    return {
        "level": "high" if points >= _HIGH else "normal" if points >= _NORMAL else "low",
        "points": points,
        "because": [why for why, _ in spoke] + (["the intent is not clear"] if unsure else []),
        "person": unsure or any(why == "asks for a person" for why, _ in spoke),
        "said": last[:_TOLD],
    }


# Read by the worker (workers/engines/function.py): one row in, one value out.
urgency.per_row = True  # type: ignore[attr-defined]
