"""Words that transactions tell the leader: what is said is heard, and what is not understood means everything."""

from __future__ import annotations

from uuid import UUID

import pytest

from scheduler.store.words import DRAINS, EVERYTHING, SILENCE, Words, done, end, heard, land

A, B, C = (UUID(int=i) for i in (1, 2, 3))


def test_what_is_told_is_heard() -> None:
    assert heard([land(A), f"{done(B, (7, 8))}\n{end(C)}", done(B, (9,)), DRAINS]) == Words(
        landed=frozenset({A}),
        ended=frozenset({C}),
        done=frozenset({7, 8, 9}),
        done_of=frozenset({B}),
        drains=True,
    )
    assert heard([]) == SILENCE


@pytest.mark.parametrize(
    "word", ["", "land", "land x", f"forget {A}", f"done {A} x", f"{land(A)}\n", f"{land(A)}\nnews {B}"]
)
def test_a_word_that_is_not_understood_means_everything(word: str) -> None:
    assert heard([land(A), word]) == EVERYTHING


def test_what_was_heard_twice_is_heard_together() -> None:
    both = heard([land(A)]) | heard([done(B, (7,))])
    assert (both.landed, both.done, both.everything) == ({A}, {7}, False)
    assert (both | EVERYTHING).everything
    assert (SILENCE | both) == both
