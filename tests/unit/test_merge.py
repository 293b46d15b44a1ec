"""Merging: whatever the parts and their order, the column is the one a single engine would have written."""

from __future__ import annotations

import itertools
import random
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from motet.protocol.columns import ERROR, RETURNED, CellError, Column, Kind, cut, values
from scheduler.merge import AnswersPart, BadColumn, check, errors_column, mark_returned, merge, returned_rows

LABELS = ("a", "b", "c")


def column(kind: Kind, n: int, seed: int, *, every: bool = False) -> Column:
    """A column of n ok rows with pseudo-random answers."""
    dice = random.Random(seed)
    if kind == "label":
        arrays = {
            "codes": struct.pack(f"<{n}h", *(dice.randrange(3) for _ in range(n))),
            "scores": struct.pack(f"<{n}f", *(dice.random() for _ in range(n))),
        }
        if every:
            arrays["all"] = struct.pack(f"<{3 * n}f", *(dice.random() for _ in range(3 * n)))
        return Column(kind=kind, status=bytes(n), arrays=arrays)
    if kind == "number":
        return Column(kind=kind, status=bytes(n), arrays={"numbers": struct.pack(f"<{n}d", *range(n))})
    if kind == "vector":
        raw = bytes(dice.randrange(60) for _ in range(n * 4 * 2))
        return Column(kind=kind, status=bytes(n), arrays={"vectors": raw}, dim=4, dtype="fp16")
    counts = [dice.randrange(4) for _ in range(n)]
    offsets = [0]
    for c in counts:
        offsets.append(offsets[-1] + c)
    m = offsets[-1]
    arrays = {"offsets": struct.pack(f"<{n + 1}i", *offsets)}
    if kind == "json":
        arrays["offsets"] = struct.pack(f"<{n + 1}i", *range(n + 1))
        arrays["bytes"] = bytes(48 + dice.randrange(10) for _ in range(n))
        return Column(kind=kind, status=bytes(n), arrays=arrays)
    arrays["codes"] = struct.pack(f"<{m}h", *(dice.randrange(3) for _ in range(m)))
    arrays["scores"] = struct.pack(f"<{m}f", *(dice.random() for _ in range(m)))
    if kind == "spans":
        arrays["starts"] = struct.pack(f"<{m}i", *range(m))
        arrays["ends"] = struct.pack(f"<{m}i", *range(1, m + 1))
    return Column(kind=kind, status=bytes(n), arrays=arrays)


KINDS: list[Kind] = ["label", "labels", "number", "vector", "spans", "json"]


@settings(deadline=None)
@given(
    st.sampled_from(KINDS), st.integers(1, 40), st.lists(st.integers(0, 40), max_size=5), st.integers(0, 99)
)
def test_parts_in_any_order_merge_into_the_whole(kind: Kind, n: int, cuts: list[int], seed: int) -> None:
    whole = column(kind, n, seed)
    order = list(range(n))
    random.Random(seed).shuffle(order)
    rows = np.array(order, dtype=np.int64)
    shuffled = Column(
        kind=kind,
        status=whole.status,
        arrays=whole.arrays,
        errors=whole.errors,
        dim=whole.dim,
        dtype=whole.dtype,
    )
    edges = sorted({0, n, *(c for c in cuts if c < n)})
    parts = [AnswersPart(rows[a:b], cut(shuffled, a, b)) for a, b in itertools.pairwise(edges)]
    random.Random(seed + 1).shuffle(parts)
    merged = merge(kind, n, parts, absent={})
    merged.check()
    expected = list(values(whole, LABELS))
    assert [list(values(merged, LABELS))[row] for row in order] == expected


def test_every_score_survives_the_merge() -> None:
    whole = column("label", 5, 1, every=True)
    parts = [
        AnswersPart(np.array([3, 4]), cut(whole, 3, 5)),
        AnswersPart(np.array([0, 1, 2]), cut(whole, 0, 3)),
    ]
    assert list(values(merge("label", 5, parts, absent={}), LABELS)) == list(values(whole, LABELS))


@pytest.mark.parametrize("kind", KINDS)
def test_returned_rows_are_left_to_the_attempt_that_answers_them(kind: Kind) -> None:
    first, second = column(kind, 4, 1), column(kind, 1, 2)
    marked = mark_returned(first, np.array([2]))
    merged = merge(
        kind, 4, [AnswersPart(np.arange(4), marked), AnswersPart(np.array([2]), second)], absent={}
    )
    merged.check()
    got = list(values(merged, LABELS))
    assert got[2] == next(values(second, LABELS))
    assert got[0] == next(values(first, LABELS))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_arrived_broken_and_rows_given_up_are_errors_beside_good_ones(kind: Kind) -> None:
    good, dead = column(kind, 2, 3), errors_column(kind, [CellError("poison", "it died")])
    merged = merge(
        kind,
        4,
        [AnswersPart(np.array([0, 3]), good), AnswersPart(np.array([2]), dead)],
        absent={1: CellError("bad_row", "NUL")},
    )
    merged.check()
    assert merged.status == bytes([0, ERROR, ERROR, 0])
    assert {i: e.error for i, e in merged.errors.items()} == {1: "bad_row", 2: "poison"}


def test_a_hole_or_an_overlap_breaks_the_invariant_loudly() -> None:
    with pytest.raises(AssertionError, match="not answered"):
        merge("label", 3, [AnswersPart(np.array([0, 1]), column("label", 2, 1))], absent={})
    twice = AnswersPart(np.array([0]), column("label", 1, 1))
    with pytest.raises(AssertionError, match="twice"):
        merge("label", 1, [twice, twice], absent={})


def test_a_row_returns_if_any_of_its_cells_may_still_succeed() -> None:
    sound = column("label", 3, 1)
    flaky = Column(
        kind="label",
        status=bytes([0, ERROR, RETURNED]),
        arrays=sound.arrays,
        errors={1: CellError("engine", "lost", retriable=True)},
    )
    assert returned_rows({0: sound, 1: flaky}, {}).tolist() == [1, 2]
    assert returned_rows({0: sound, 1: flaky}, {1: {2}}).tolist() == [1]


@pytest.mark.parametrize(
    ("kind", "n_rows", "n_labels", "why"),
    [("number", 3, 3, "kind"), ("label", 4, 3, "rows"), ("label", 3, 1, "label beyond")],
)
def test_a_forged_column_is_not_believed(kind: str, n_rows: int, n_labels: int, why: str) -> None:
    with pytest.raises(BadColumn, match=why):
        check(column("label", 3, 8), kind=kind, n_rows=n_rows, n_labels=n_labels)


def test_scores_must_be_finite() -> None:
    bad = Column(
        kind="label",
        status=b"\0",
        arrays={"codes": struct.pack("<h", 0), "scores": struct.pack("<f", float("nan"))},
    )
    with pytest.raises(BadColumn, match="finite"):
        check(bad, kind="label", n_rows=1, n_labels=2)
