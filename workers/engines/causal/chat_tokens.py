"""A model's tokenizer with its chat template: messages become token ids, in runs that can be shared.

Contents are tokenised apart from the template around them, each part by itself: so equal parts give equal ids
whatever stands beside them, and a text that spells a control token stays text.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from workers.engine import CannotLoad
from workers.engines.prompts import GAP, Message, TextRun, plain
from workers.engines.thoughts import BEGIN, END, NO_SWITCHES, begins_thought
from workers.engines.trunk import check_ids

#: Stand for the contents while the template is filled in. Private characters: no template has them.
_MARK = re.compile("\ue000(\\d+)\ue001")
#: Fixed parts whose ids are kept, and frames: more are tokenised again. A task brings a few of each.
_KEPT = 4096
#: Tokens whose text is kept: those that likelihoods are told of, most of which come again.
_WORDS_KEPT = 1 << 16


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt in tokens."""

    ids: list[int]
    #: So many leading ones are the same for every row of the task.
    fixed: int
    #: Where the first part that is not fixed stands: the text, for most tasks. Empty where there is none.
    text: tuple[int, int] = (0, 0)
    #: The template has begun a thought behind it.
    thinks: bool = False


@dataclass(frozen=True, slots=True)
class _Frame:
    """What the chat template puts around the parts of a dialogue."""

    #: Its own tokens, and between them the numbers of the parts.
    pieces: list[list[int] | int]
    thinks: bool = False


class ChatTokens:
    """Any number of threads may call it."""

    def __init__(self, files: Mapping[str, Path], rows: int) -> None:
        """``rows``: token ids that the model has embeddings for. Raises CannotLoad."""
        try:
            from tokenizers import Tokenizer
            from transformers import AutoTokenizer

            self._chat: Any = AutoTokenizer.from_pretrained(
                files["config.json"].parent, local_files_only=True, trust_remote_code=False
            )
            self.json = files["tokenizer.json"].read_text("utf-8")
            self._control, self._data = Tokenizer.from_str(self.json), Tokenizer.from_str(self.json)
            for reader in (self._control, self._data):
                reader.no_padding()
                reader.no_truncation()
            # What looks like a control token in a text is text.
            self._data.encode_special_tokens = True
            self.ends = _ends(files, self._chat.eos_token_id)
            self.has_template = bool(self._chat.chat_template)
            # A text spells no control token here, so what it may hold is known.
            check_ids(self._data, rows)
            #: The tokens that begin and end a thought; None where a tag is no single token here.
            begin, end = self._control.token_to_id(BEGIN), self._control.token_to_id(END)
            self.thought = (begin, end) if begin is not None and end is not None else None
        except CannotLoad:
            raise
        except Exception as error:
            raise CannotLoad(f"the tokenizer cannot be read: {type(error).__name__}") from error
        #: The ids of what is the same for every row of a task, and what the template puts around parts.
        self._fixed = lru_cache(_KEPT)(self._ids)
        #: The text of one token behind others.
        self.word = lru_cache(_WORDS_KEPT)(self._word)
        self._before = self._ids("a")
        self._frame = lru_cache(_KEPT)(self._filled)

    def texts(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of many texts, as contents."""
        return [read.ids for read in self._data.encode_batch_fast(list(texts), add_special_tokens=False)]

    def label(self, label: str) -> list[int]:
        """The ids of a label as the beginning of an answer. Raises ValueError where it has none."""
        ids = self._fixed(label if self.has_template else f" {label}")
        if not ids:
            raise ValueError("a label without tokens")
        return ids

    def prompt(
        self,
        messages: Sequence[Message],
        known: Mapping[str, list[int]],
        switches: Mapping[str, bool] = NO_SWITCHES,
    ) -> Prompt:
        """The prompt of these messages. ``known``: ids of texts that are tokenised already. ``switches``: what else the
        template is told, where it knows them.

        Raises ValueError where the chat template takes no such dialogue.
        """
        parts = [part for message in messages for part in message.parts]
        ids: list[int] = []
        fixed: int | None = None
        text = (0, 0)
        roles = tuple((message.role, len(message.parts)) for message in messages)
        frame = self._frame(roles, tuple(sorted(switches.items())))
        for piece in frame.pieces:
            if not isinstance(piece, int):
                ids += piece
                continue
            part = parts[piece]
            start = len(ids)
            if part.fixed:
                ids += self._fixed(part.text)
                continue
            found = known.get(part.text)
            ids += self._ids(part.text) if found is None else found
            if fixed is None:
                fixed, text = start, (start, len(ids))
        return Prompt(ids, len(ids) if fixed is None else fixed, text, frame.thinks)

    def raw(self, ids: list[int]) -> Prompt:
        """The prompt that is these tokens, with nothing around but what every text of the model begins with."""
        begin = self._control.encode("", add_special_tokens=True).ids
        return Prompt([*begin, *ids], len(begin), (len(begin), len(begin) + len(ids)))

    def words(self, ids: Sequence[int]) -> str:
        """Written tokens as text, without control tokens."""
        return str(self._control.decode(list(ids), skip_special_tokens=True))

    def in_bytes(self, token: int) -> bool:
        """A token that is a single byte, as "<0xE4>": what it says depends on those that come behind it."""
        return str(self._control.id_to_token(token)).startswith("<0x")

    def _word(self, token: int) -> str:
        # Some tokenizers leave out the space before a token that is the first one.
        said = self.words([*self._before, token])[len(self.words(self._before)) :]
        return (said or str(self._control.id_to_token(token))).replace("\0", "")

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._data.encode(text, add_special_tokens=False).ids
        return ids

    def _filled(self, roles: Sequence[tuple[str, int]], switches: Sequence[tuple[str, bool]]) -> _Frame:
        """Around messages of these roles and numbers of parts."""
        number = itertools.count()
        marked = [
            Message(role, tuple(TextRun(f"\ue000{next(number)}\ue001", True) for _ in range(parts)))
            for role, parts in roles
        ]
        if not self.has_template:
            # A model that was never taught to chat goes on writing after the text.
            begin: list[list[int] | int] = [self._control.encode("", add_special_tokens=True).ids]
            return _Frame(begin + self._cut(GAP.join(message.text for message in marked) + "\n"))
        filled = self._templated(marked, dict(switches))
        return _Frame(self._cut(filled), begins_thought(_MARK.split(filled)[-1]))

    def _templated(self, marked: Sequence[Message], switches: Mapping[str, bool]) -> str:
        def fill(told: list[dict[str, str]]) -> str:
            # A template passes over the switches that it does not know.
            return str(
                self._chat.apply_chat_template(told, tokenize=False, add_generation_prompt=True, **switches)
            )

        told = plain(marked)
        try:
            return fill(told)
        except Exception as error:
            if told[0]["role"] != "system" or len(told) < 2:
                raise ValueError("the chat template takes no such dialogue") from error
        # Some know no system message: it then begins the first one.
        told[1]["content"] = told[0]["content"] + GAP + told[1]["content"]
        try:
            return fill(told[1:])
        except Exception as error:
            raise ValueError("the chat template takes no such dialogue") from error

    def _cut(self, filled: str) -> list[list[int] | int]:
        frame: list[list[int] | int] = []
        for i, piece in enumerate(_MARK.split(filled)):
            if i % 2:
                frame.append(int(piece))
            elif piece:
                frame.append(self._control.encode(piece, add_special_tokens=False).ids)
        return frame


def _ends(files: Mapping[str, Path], of_tokenizer: int | None) -> frozenset[int]:
    """The tokens that end an answer, as all of the model's files say."""
    said: list[Any] = [of_tokenizer]
    for name in ("config.json", "generation_config.json"):
        if name in files:
            found = json.loads(files[name].read_text("utf-8")).get("eos_token_id")
            said += found if isinstance(found, list) else [found]
    return frozenset(int(one) for one in said if isinstance(one, int))
