"""Dialogues: the value of a field that a chat task reads, checked and written as the text that is stored. Pure."""

from __future__ import annotations

import json

from motet.protocol.values import Doubled, text_flaw
from scheduler.api.strict_json import BrokenJson, loads

EXPECTED = 'a list of messages, each {"role": "system", "user" or "assistant", "content": text}'
_ROLES = frozenset({"system", "user", "assistant"})


class NoDialogue(Exception):
    """What stands there instead, in words that never repeat it."""


def dialogue_text(value: object) -> str:
    """A list of messages, or the JSON of one, as compact JSON. Raises NoDialogue."""
    if isinstance(value, str):
        value = _parsed(value)
    if not isinstance(value, list):
        raise NoDialogue("an object" if isinstance(value, dict) else "no list")
    if not value:
        raise NoDialogue("an empty list")
    messages = [_message(i, m) for i, m in enumerate(value)]
    return json.dumps(messages, ensure_ascii=False, separators=(",", ":"))


def _parsed(text: str) -> object:
    try:
        return loads(text.encode())
    except (BrokenJson, UnicodeEncodeError):
        raise NoDialogue("text that is no JSON") from None


def _message(i: int, message: object) -> dict[str, str]:
    if not isinstance(message, dict) or isinstance(message, Doubled):
        raise NoDialogue(f"message {i} that is no object")
    if message.keys() != {"role", "content"}:
        raise NoDialogue(f"message {i} with other keys than role and content")
    role, content = message["role"], message["content"]
    if not isinstance(role, str) or role not in _ROLES:
        raise NoDialogue(f"message {i} of another role")
    if not isinstance(content, str):
        raise NoDialogue(f"message {i} whose content is no text")
    if flaw := text_flaw(content):
        raise NoDialogue(f"{flaw} in message {i}")
    return {"role": role, "content": content}
