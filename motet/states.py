"""The states of a job, declared once: for the client, the pages and the store."""

from __future__ import annotations

from typing import Literal, get_args

State = Literal["loading", "running", "succeeded", "failed", "cancelled"]
#: In the order in which a job goes through them.
STATES: tuple[State, ...] = get_args(State)
#: No job leaves these.
ENDED = frozenset[str]({"succeeded", "failed", "cancelled"})
