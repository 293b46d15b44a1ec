"""Answers while they are written: which token comes next, when an answer ends, and what it then is.

A schema is kept by llguidance, which knows after each token which ones may follow; nothing is tried twice.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from motet.protocol.columns import CellError, is_storable_json
from workers.engine import CannotLoad
from workers.engines.newest import Newest
from workers.engines.prompts import told_logp
from workers.engines.schemas import violation
from workers.engines.telling import NO_CHARACTER, Teller
from workers.engines.thoughts import without_thoughts

#: Tokens behind the newest one that are looked at for a stop text.
_TAIL = 24
#: Schemas that are kept ready for a tokenizer: any tenant may bring more.
SCHEMAS = 256


class Grammar:
    """Schemas for one tokenizer. Made when the first one is asked for: that takes a second."""

    def __init__(self, tokenizer_json: str, vocabulary: int, ends: Sequence[int]) -> None:
        """Raises CannotLoad where llguidance is missing, or cannot read this tokenizer."""
        try:
            import llguidance

            self._tokenizer = llguidance.LLTokenizer(tokenizer_json, n_vocab=vocabulary, eos_token=list(ends))
        except Exception as error:
            raise CannotLoad(f"a schema needs llguidance, which failed: {type(error).__name__}") from error
        self._words = (vocabulary + 31) // 32
        self._fresh: Newest[str, Any] = Newest(SCHEMAS)

    def matcher(self, schema: Mapping[str, Any]) -> Any:
        """What follows a schema, token by token. Raises ValueError where it cannot be kept."""
        import llguidance

        text = json.dumps(schema)
        if (fresh := self._fresh.get(text)) is None:
            # Compact: a small model may write spaces for ever where they are allowed.
            grammar = llguidance.LLMatcher.grammar_from_json_schema(
                text, overrides={"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}
            )
            fresh = llguidance.LLMatcher(self._tokenizer, grammar)
            self._fresh.put(text, fresh)
        if fresh.is_error():
            raise ValueError("a schema that cannot be kept")
        return fresh.deep_copy()

    def allowed(self, matchers: Sequence[Any]) -> NDArray[np.uint32]:
        """Which tokens may come next for each of them: (matchers, words), a bit a token, the lowest first."""
        from llguidance.numpy import fill_next_token_bitmask

        bits = np.zeros((len(matchers), self._words), np.int32)
        for number, matcher in enumerate(matchers):
            fill_next_token_bitmask(matcher, bits[number : number + 1])
        return bits.view(np.uint32)


@dataclass(frozen=True, slots=True)
class TokenOdds:
    """How likely a token was that was written: logarithms of the model's own shares, whatever was done to them to choose."""

    logp: float
    #: The likeliest tokens there, the likeliest first, each with its own.
    likeliest: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Weighing:
    """What is done to logits before a token is chosen, as vLLM does it: repetition, then frequency and presence."""

    #: Logits of tokens of prompt and answer are divided by it where they are positive, else multiplied; 1: they are not.
    repetition: float
    #: Taken from the logit of a token for each time it was written, and once where it was written at all.
    frequency: float
    presence: float
    #: Different tokens of the prompt; () where repetition is 1.
    prompt: tuple[int, ...] = ()

    @classmethod
    def of(cls, spec: Mapping[str, Any], prompt: Sequence[int]) -> Weighing | None:
        """None where nothing is done."""
        repetition, frequency, presence = (
            float(spec.get(f"{name}_penalty", neutral))
            for name, neutral in (("repetition", 1), ("frequency", 0), ("presence", 0))
        )
        if (repetition, frequency, presence) == (1, 0, 0):
            return None
        return cls(repetition, frequency, presence, tuple(sorted(set(prompt))) if repetition != 1 else ())


@dataclass(slots=True)
class Writer:
    """One answer that is being written."""

    #: The task.
    name: str
    most: int
    stop: tuple[str, ...]
    temperature: float
    dice: random.Random
    schema: Mapping[str, Any] | None
    matcher: Any = None
    ids: list[int] = field(default_factory=list)
    finish: str = ""
    #: The answer is wanted without the model's thoughts.
    bare: bool = False
    #: The tokens that begin and end a thought, where one may come before the answer.
    thought: tuple[int, int] | None = None
    #: A thought is being written; the prompt had begun it.
    thinks: bool = False
    begun: bool = False
    #: Where the answer begins among the tokens.
    answer_at: int = 0
    #: Tells the answer while it is written; None where nobody asks.
    teller: Teller | None = None
    weighing: Weighing | None = None
    #: Tokens are drawn from so many of the likeliest ones (0: all), and of these from the fewest that have this share.
    top_k: int = 0
    top_p: float = 1.0
    #: Likely tokens that are told beside each that was written; None: no likelihoods are told.
    logprobs: int | None = None
    #: Of each token of ``ids``, where likelihoods are told.
    odds: list[TokenOdds] = field(default_factory=list)
    _chance: float | None = None
    #: Places of tokens: those before the second were given to the teller, those from the first on with the newest of them.
    _window: tuple[int, int] = (0, 0)

    @classmethod
    def of(
        cls,
        name: str,
        spec: Mapping[str, Any],
        most: int,
        index: int,
        matcher: Any,
        thought: tuple[int, int] | None = None,
        begun: bool = False,
        prompt: Sequence[int] = (),
    ) -> Writer:
        """``index``: of the row in its job. Equal seed, row and task draw equal tokens, wherever they run.

        ``thought``: the tokens that begin and end a thought. ``begun``: the prompt has begun one. ``prompt``: its tokens.
        """
        # A row that brings a seed of its own draws the same wherever it stands.
        place = spec.get("draw", index)
        seed = hashlib.sha256(f"{spec.get('seed', 0)}/{place}/{name}".encode()).digest()
        asked = spec.get("thinking")
        # A schema lets nothing stand before the value, unless the task asks for thoughts.
        may_think = thought is not None and (asked is True or (asked is False and matcher is None))
        return cls(
            name=name,
            most=most,
            stop=tuple(spec.get("stop", ())),
            temperature=float(spec.get("temperature", 0.0)),
            dice=random.Random(seed),
            schema=spec.get("schema"),
            matcher=matcher,
            bare=asked is not None,
            thought=thought if may_think else None,
            thinks=may_think and begun,
            begun=begun,
            weighing=Weighing.of(spec, prompt),
            top_k=int(spec.get("top_k", 0)),
            top_p=float(spec.get("top_p", 1.0)),
            logprobs=spec.get("logprobs"),
        )

    @property
    def plain(self) -> bool:
        """It takes the likeliest token, whatever that is."""
        return self.temperature == 0 and self.weighing is None and (self.matcher is None or self.thinks)

    @property
    def held(self) -> bool:
        """Its schema says which token may come next."""
        return self.matcher is not None and not self.thinks

    @property
    def narrowed(self) -> bool:
        """Its tokens are drawn from some of them alone."""
        return self.top_k > 0 or self.top_p < 1

    @property
    def also(self) -> int | None:
        """The token that begins a thought, where one may come before a value."""
        return self.thought[0] if self.thought is not None and not self.ids else None

    @property
    def chance(self) -> float:
        """What draws the next token, in [0, 1): the same until one was taken, however often a step is tried."""
        if self._chance is None:
            self._chance = self.dice.random()
        return self._chance

    def take(
        self,
        token: int,
        ends: frozenset[int],
        words: Callable[[Sequence[int]], str],
        odds: TokenOdds | None = None,
    ) -> None:
        """Write a token; ``finish`` says whether it was the last one."""
        self._write(token, ends, words)
        # One that ends the answer is none of it.
        if odds is not None and len(self.odds) < len(self.ids):
            self.odds.append(odds)

    def _write(self, token: int, ends: frozenset[int], words: Callable[[Sequence[int]], str]) -> None:
        self._chance = None
        if self.thought is not None and self._think(token, *self.thought, ends):
            pass
        elif self.matcher is not None:
            self.matcher.consume_token(token)
            if token not in ends:
                self.ids.append(token)
            if token in ends or self.matcher.is_stopped():
                self.finish = "stop"
        elif token in ends:
            self.finish = "stop"
        else:
            self.ids.append(token)
            if self.stop:
                newest = words(self.ids[self.answer_at :][-_TAIL - max(map(len, self.stop)) :])
                if any(one in newest for one in self.stop):
                    self.finish = "stop"
        if not self.finish and len(self.ids) >= self.most:
            self.finish = "length"

    def _think(self, token: int, begin: int, end: int, ends: frozenset[int]) -> bool:
        """Write a token of a thought. False: it is one of the answer."""
        if not self.thinks:
            if self.ids or token != begin:
                return False
            self.thinks = True
        elif token in ends:
            self.finish = "stop"
            return True
        self.ids.append(token)
        if token == end:
            self.thinks, self.answer_at = False, len(self.ids)
        return True

    def news(self, words: Callable[[Sequence[int]], str], in_bytes: Callable[[int], bool]) -> str:
        """What may be told since the last time. ``in_bytes``: a token may be a part of a character."""
        assert self.teller is not None
        if self.finish:
            answer = self.answer(words)
            return "" if isinstance(answer, CellError) else self.teller.rest(json.loads(answer)["text"])
        # Without a token that ends thoughts, all that is written may turn out to be one.
        if self.thinks or (self.bare and not self.answer_at) or not self.ids or in_bytes(self.ids[-1]):
            return ""
        # Some tokens that were read before go along: what a token says depends on whether one is before it.
        begin, read = (max(place, self.answer_at) for place in self._window)
        before, now = words(self.ids[begin:read]), words(self.ids[begin:])
        if now.endswith(NO_CHARACTER):
            return ""
        self._window = (read, len(self.ids))
        return self.teller.more(now[len(before) :])

    def answer(self, words: Callable[[Sequence[int]], str]) -> bytes | CellError:
        """The JSON of the ended answer, or why there is none."""
        if self.schema is not None:
            return _kept(self._written(words), self.schema, self.finish)
        return _json({"text": self.text(words), "finish": self.finish})

    def _written(self, words: Callable[[Sequence[int]], str]) -> str:
        return "" if self.thinks else words(self.ids[self.answer_at :]).replace("\0", "")

    def text(self, words: Callable[[Sequence[int]], str]) -> str:
        """What was written, without thoughts that nobody wants and up to the first stop text."""
        text = self._written(words)
        if self.bare and not self.answer_at:
            # Where the tags are no single tokens, they are known by their text.
            text = without_thoughts(text, begun=self.begun)
        for one in self.stop:
            text = text.partition(one)[0]
        # A character that was cut in the middle.
        text = text.rstrip(NO_CHARACTER) if self.finish == "length" else text
        return text.strip()

    def likelihoods(
        self, words: Callable[[Sequence[int]], str], word: Callable[[int], str]
    ) -> list[list[Any]] | None:
        """Of each token of the text as it was written, up to a stop text: its text, logarithm and likeliest ones there.

        ``word``: the text of one token. None where they are not told.
        """
        if self.logprobs is None:
            return None
        count, text = len(self.ids), words(self.ids)
        end = min((at for one in self.stop if (at := text.find(one)) >= 0), default=len(text))
        while end < len(text) and count and len(words(self.ids[: count - 1])) >= end:
            count -= 1
        return [
            [
                word(token),
                told_logp(odds.logp),
                [[word(one), told_logp(logp)] for one, logp in odds.likeliest],
            ]
            for token, odds in zip(self.ids[:count], self.odds, strict=False)
        ]


def _kept(text: str, schema: Mapping[str, Any], finish: str) -> bytes | CellError:
    """The value as compact JSON if it keeps its schema."""
    if finish == "length":
        return CellError("schema", "max_tokens were written before the value was whole; allow more")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return CellError("schema", "what was written is no JSON")
    if (broken := violation(value, schema)) is not None:
        return CellError("schema", broken)
    raw = _json(value)
    return raw if is_storable_json(raw) else CellError("schema", "a value that cannot be stored")


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
