"""Answers told while they are written: in the end all of the answer, and nothing that was taken back."""

from __future__ import annotations

import json
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from motet.tasks import Generate
from workers.engines.telling import Teller
from workers.engines.writers import Writer

#: Few characters, so that stop texts occur, begin and overlap.
CHARACTERS = st.text(alphabet="ab \n\ufffd\0é", max_size=30)


def answer(text: str, stops: Sequence[str]) -> str:
    """The answer that all of this text is."""
    text = text.replace("\0", "")
    for stop in stops:
        text = text.partition(stop)[0]
    return text.rstrip("\ufffd").strip()


@given(
    st.lists(CHARACTERS, max_size=12), st.lists(st.text(alphabet="ab \n", min_size=1, max_size=4), max_size=3)
)
def test_what_is_told_is_a_beginning_of_the_answer_at_any_time_and_all_of_it_in_the_end(
    pieces: list[str], stops: list[str]
) -> None:
    whole = answer("".join(pieces), stops)
    teller, told = Teller(stops), ""
    for piece in pieces:
        told += teller.more(piece)
        assert whole.startswith(told)
    assert told + teller.rest(whole) == whole


def test_a_word_is_told_as_soon_as_it_cannot_be_a_stop_text() -> None:
    teller = Teller(["END"])
    assert [teller.more(piece) for piece in ("one E", "N", "tity ", "two END", " three")] == [
        "one",
        "",
        " ENtity",
        " two",
        "",
    ]


def in_bytes() -> Tokenizer:
    """A tokenizer with words, and a token for each byte of what is none of them."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581a", "\u2581", "b"]
    reader = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True))
    reader.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return reader


TOKENS = in_bytes()
#: Two characters of three bytes, one of four, a line's end, words, and bytes alone.
BYTES = [1 + byte for byte in "你好🎼\n".encode()]


@settings(deadline=None, max_examples=200)
@given(st.lists(st.sampled_from([*BYTES, 257, 258, 259]), min_size=1, max_size=20), st.booleans())
def test_characters_of_several_tokens_are_told_whole_whatever_bytes_come(
    drawn: list[int], whole: bool
) -> None:
    ids = [*BYTES, *drawn] if whole else drawn
    spec = Generate("m", prompt="x", max_tokens=len(ids)).to_json()
    writer = Writer.of("it", spec, len(ids), 0, None)
    writer.teller = Teller(writer.stop)

    def words(some: Sequence[int]) -> str:
        return str(TOKENS.decode(list(some)))

    told = []
    for token in ids:
        writer.take(token, frozenset({0}), words)
        told.append(writer.news(words, lambda one: str(TOKENS.id_to_token(one)).startswith("<0x")))
    found = writer.answer(words)
    assert isinstance(found, bytes)
    text = json.loads(found)["text"]
    assert "".join(told) == text
    for n in range(len(told)):
        assert text.startswith("".join(told[:n]))
