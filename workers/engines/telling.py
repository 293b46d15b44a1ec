"""An answer told while it is written: only what is certain to be a part of it. Pure.

The end of what is written may turn out to be a stop text, white space that is cut off, or half a character. It is held
until more is written. So what was told is a beginning of the answer at any time, and nothing is taken back.
"""

from __future__ import annotations

from collections.abc import Sequence

#: Stands for bytes that are no whole character.
NO_CHARACTER = "\ufffd"


class Teller:
    """One answer: what is written, and how many characters of it are told."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._text, self._told = tuple(stops), "", 0

    def more(self, text: str) -> str:
        """What may be told, now that ``text`` is written as well."""
        self._text += text.replace("\0", "")
        lead = len(self._text) - len(self._text.lstrip())
        # Nothing that was told can be part of a stop text.
        certain = self._text[: self._stop(lead + self._told if self._told else 0)].rstrip()
        while certain.endswith(NO_CHARACTER):
            certain = certain.rstrip(NO_CHARACTER).rstrip()
        return self.rest(certain[lead:])

    def rest(self, answer: str) -> str:
        """What is not told yet of this beginning of the answer, or of all of it."""
        fresh, self._told = answer[self._told :], max(self._told, len(answer))
        return fresh

    def _stop(self, lo: int) -> int:
        """Where, from ``lo`` on, a stop text begins, or something that may become one; the end where none does."""
        text, end = self._text, len(self._text)
        starts = (
            at for at in range(lo, end) if any(s.startswith(text[at : at + len(s)]) for s in self._stops)
        )
        return next(starts, end)
