"""What a model thinks before it answers: how its template is told to, and how thoughts are cut off. Pure.

Models mark their thoughts with tags, as Qwen3 and DeepSeek R1 do. A chat template may begin a thought itself; then the
model writes its end alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

BEGIN, END = "<think>", "</think>"
#: Names under which chat templates know whether to think: of Qwen3 and most others, of DeepSeek V3.1 and Granite.
SWITCHES = ("enable_thinking", "thinking")
NO_SWITCHES: Mapping[str, bool] = MappingProxyType({})


def switches(spec: Mapping[str, Any]) -> dict[str, bool]:
    """What a task (``Task.to_json``) tells the chat template; nothing where it leaves that to the template."""
    thinking = spec.get("thinking")
    return {} if thinking is None else dict.fromkeys(SWITCHES, bool(thinking))


def begins_thought(generation_prompt: str) -> bool:
    """Whether a prompt that ends so has begun a thought and not ended it."""
    _, begin, behind = generation_prompt.rpartition(BEGIN)
    return bool(begin) and END not in behind


def without_thoughts(text: str, *, begun: bool = False) -> str:
    """The answer in what was written; "" where the thought has no end. ``begun``: the prompt has begun a thought."""
    before, end, behind = text.partition(END)
    if begun or before.lstrip().startswith(BEGIN):
        return behind
    return behind if end and BEGIN not in before else text
