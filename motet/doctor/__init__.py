"""The doctor: what is wrong with this set-up, and what to do about it.

``checks`` judges the facts of a machine and ``cluster`` those of a cluster; they touch nothing. ``look`` gathers the
facts of this machine. The API gathers those of the server's side by itself (`GET /v1/doctor`), for the same checks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from motet.messages.cluster import CheckState, Finding

__all__ = ["STATES", "Area", "CheckState", "Finding"]

STATES: tuple[CheckState, ...] = get_args(CheckState)


@dataclass(frozen=True, slots=True)
class Area:
    """Makes the findings of one area."""

    name: str

    def ok(self, name: str, what: str) -> Finding:
        return self.finding(name, "ok", what)

    def warn(self, name: str, what: str, remedy: str) -> Finding:
        return self.finding(name, "warn", what, remedy)

    def fail(self, name: str, what: str, remedy: str) -> Finding:
        return self.finding(name, "fail", what, remedy)

    def skipped(self, name: str, what: str) -> Finding:
        return self.finding(name, "skipped", what)

    def finding(self, name: str, state: CheckState, what: str, remedy: str = "") -> Finding:
        """The remedy is left out where nothing is wrong."""
        remedy = remedy if state in ("warn", "fail") else ""
        return Finding(area=self.name, name=name, state=state, what=what, remedy=remedy)
