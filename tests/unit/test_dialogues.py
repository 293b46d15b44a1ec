"""What a chat may read, and the words for everything else."""

from __future__ import annotations

import json
from typing import Any

import pytest

from motet.errors import InvalidJob
from scheduler.api.dialogues import NoDialogue, dialogue_text
from scheduler.api.rows import Incoming, read_columns, read_lines, read_rows

TALK = [{"role": "user", "content": "Grüß Gott"}, {"role": "assistant", "content": "Hello"}]
TEXT = '[{"role":"user","content":"Grüß Gott"},{"role":"assistant","content":"Hello"}]'


@pytest.mark.parametrize("value", [TALK, json.dumps(TALK), json.dumps(TALK, indent=2)])
def test_a_list_of_messages_is_stored_in_one_form_however_it_came(value: Any) -> None:
    assert dialogue_text(value) == TEXT


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("hello secret", "text that is no JSON"),
        ("[" * 100_000, "text that is no JSON"),
        ('"secret"', "no list"),
        (7, "no list"),
        (None, "no list"),
        ({"role": "user"}, "an object"),
        ([], "an empty list"),
        (["secret"], "message 0 that is no object"),
        ([TALK[0], {"role": "user"}], "message 1 with other keys than role and content"),
        ([{**TALK[0], "secret": 1}], "message 0 with other keys than role and content"),
        ([{"role": "secret", "content": "x"}], "message 0 of another role"),
        ([{"role": ["user"], "content": "x"}], "message 0 of another role"),
        ([{"role": "user", "content": ["secret"]}], "message 0 whose content is no text"),
        ([{"role": "user", "content": "a\0"}], "a NUL character in message 0"),
        ([{"role": "user", "content": "\ud800"}], "a lone surrogate in message 0"),
        ('[{"role":"user","content":"a","content":"b"}]', "message 0 that is no object"),
    ],
)
def test_anything_else_is_told_without_repeating_it(value: Any, words: str) -> None:
    with pytest.raises(NoDialogue) as no:
        dialogue_text(value)
    assert str(no.value) == words


def test_only_fields_that_a_chat_reads_may_hold_one() -> None:
    row = {"talk": TALK, "text": "t"}
    found = read_rows([row, {**row, "talk": "hi"}, {**row, "text": TALK}], ("talk", "text"), 1000, {"talk"})
    assert found.columns == {"talk": [TEXT, "", TEXT], "text": ["t", "t", TALK]}
    assert {name: {i: b.got for i, b in bad.items()} for name, bad in found.bad_fields.items()} == {
        "talk": {1: "text that is no JSON"},
    }
    with pytest.raises(InvalidJob) as refused:
        found.refuse_bad_rows(0)
    assert "list of messages" in refused.value.problems[0].expected


def test_every_form_of_a_part_takes_dialogues() -> None:
    import msgpack

    line = json.dumps({"talk": TALK}).encode()
    forms: list[Incoming] = [
        read_lines(line, ("talk",), 1000, {"talk"}),
        read_columns(msgpack.packb({"columns": {"talk": [TALK]}}), ("talk",), 1000, {"talk"}),
        read_columns(msgpack.packb({"columns": {"talk": [TEXT]}}), ("talk",), 1000, {"talk"}),
    ]
    assert [f.columns["talk"] for f in forms] == [[TEXT]] * 3
