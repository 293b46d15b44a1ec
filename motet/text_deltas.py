"""Text as it is told while it is written: put together, task by task, whatever attempt wrote it. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Text that was written of a task's answer. ``str(delta)`` is the text."""

    task: str
    text: str
    #: The answer begins anew, and says something else than before: what was told of it until now is void.
    reset: bool = False

    def __str__(self) -> str:
        return self.text


class ToldText:
    """One task's answer. All deltas since the last reset are a beginning of it, and at the end all of it.

    A worker that takes over from a lost one writes the same again, mostly; what was told before is not told twice.
    """

    def __init__(self, task: str) -> None:
        self._task, self._told, self._now = task, "", ""

    def more(self, text: str) -> TextDelta | None:
        """The attempt that writes now has written this behind what it wrote before."""
        return self.whole(self._now + text)

    def anew(self) -> None:
        """Another attempt begins."""
        self._now = ""

    def whole(self, text: str) -> TextDelta | None:
        """All that the attempt has written."""
        self._now = text
        return None if self._told.startswith(text) else self._differs(text)

    def end(self, text: str) -> TextDelta | None:
        """This is the answer."""
        return None if self._told == text else self._differs(text)

    def _differs(self, text: str) -> TextDelta:
        if text.startswith(self._told):
            fresh, self._told = text[len(self._told) :], text
            return TextDelta(self._task, fresh)
        self._told = text
        return TextDelta(self._task, text, reset=True)
