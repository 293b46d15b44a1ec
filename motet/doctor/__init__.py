"""The doctor: what is wrong with this set-up, and what to do about it.

``checks`` judges the facts of a machine and ``cluster`` those of a cluster; they touch nothing. ``look`` gathers the
facts of this machine. The API gathers those of the server's side by itself (`GET /v1/doctor`), for the same checks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

CheckState = Literal["ok", "warn", "fail", "skipped"]
STATES: tuple[CheckState, ...] = get_args(CheckState)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    #: What it belongs to: ``python``, ``disk``, ``gpu``, ``server``, ``redis`` …; findings are shown by area.
    area: str
    name: str
    #: ``fail``: motet does not work so. ``warn``: it works, and will hurt. ``skipped``: not looked at, ``what`` says why.
    state: CheckState
    #: What was seen.
    what: str
    #: What to do; empty where there is nothing to do.
    remedy: str = ""

    def to_json(self) -> dict[str, str]:
        """As `GET /v1/doctor` and `motet doctor --json` give it."""
        return {name: getattr(self, name) for name in ("area", "name", "state", "what", "remedy")}

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> Finding:
        """Raises ValueError where a field is missing or no text, or the state is unknown."""
        fields = {name: said.get(name) for name in ("area", "name", "state", "what", "remedy")}
        if not all(isinstance(value, str) for value in fields.values()) or fields["state"] not in STATES:
            raise ValueError(f"got {fields}; expected a finding of five texts")
        return cls(**fields)  # type: ignore[arg-type]


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
