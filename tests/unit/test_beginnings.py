"""Lines and rows that begin alike: they become neighbours over a whole file, stay so in a block, and no sub-task parts them."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from motet.protocol.beginnings import common_prefix
from scheduler.api.openai.lines import FileSurvey, line_at, read_again, survey
from scheduler.api.openai.sorting import Sorting
from scheduler.blocks import IncomingPart, Reader, blocks_of, decode_block, row_order, uint32s
from scheduler.policy.beginnings import LEAST_ALIKE, MOST_TOGETHER, bounds, side_by_side
from scheduler.store.registry import Registered
from tests.integration.api_house import SPEAKER

#: How often letters stand in a text: families of families, some by a hair's breadth.
TEXTS = st.lists(
    st.lists(st.sampled_from("abc"), max_size=4).flatmap(
        lambda letters: st.just("".join(letter * (LEAST_ALIKE - 1 + ord(letter) % 3) for letter in letters))
    ),
    min_size=1,
    max_size=50,
)


def alike_of(texts: Sequence[str]) -> list[int]:
    return [0, *itertools.starmap(common_prefix, itertools.pairwise(texts))]


# -- rows


@given(st.text("ab", max_size=60), st.text("ab", max_size=60), st.text("ab", max_size=200))
def test_what_two_texts_have_in_common_is_counted_to_the_character(a: str, b: str, beginning: str) -> None:
    a, b = beginning + a, beginning + b
    counted = common_prefix(a, b)
    assert a[:counted] == b[:counted]
    assert counted == min(len(a), len(b)) or a[counted] != b[counted]


@given(TEXTS, st.data())
def test_every_row_is_in_the_order_once_and_families_are_neighbours(
    texts: list[str], data: st.DataObject
) -> None:
    """A family: rows that have so many characters in common, which no other row has."""
    texts.sort()
    sizes = data.draw(st.lists(st.integers(1, 99), min_size=len(texts), max_size=len(texts)))
    order, begins = side_by_side(alike_of(texts), sizes)
    assert sorted(order) == list(range(len(texts)))
    groups = [range(lo, hi) for lo, hi in itertools.pairwise([*begins, len(texts)])]
    assert begins[0] == 0
    assert all(0 < len(group) <= MOST_TOGETHER for group in groups)
    for family in [*groups, *families(texts)]:
        places = [at for at, row in enumerate(order) if row in family]
        assert places == list(range(places[0], places[0] + len(family)))


def families(texts: Sequence[str]) -> list[range]:
    """Those of the outermost kind, found the plain way."""
    found = []
    for first, last in itertools.combinations(range(len(texts)), 2):
        alike = common_prefix(texts[first], texts[last])
        around = [common_prefix(texts[first], text) for text in (*texts[:first], *texts[last + 1 :])]
        if alike >= LEAST_ALIKE and all(one == 0 for one in around):
            found.append(range(first, last + 1))
    return found


@given(st.lists(st.integers(1, 9), max_size=40))
def test_where_nothing_is_shared_the_longest_go_first(sizes: list[int]) -> None:
    order, begins = side_by_side([LEAST_ALIKE - 1] * len(sizes), sizes)
    assert order == sorted(range(len(sizes)), key=lambda row: -sizes[row])
    assert bounds(order, begins) == []


def test_families_go_longest_first_and_so_do_the_rows_of_each() -> None:
    system, texts = "s" * LEAST_ALIKE, ["a" * 200, "b" * 300, "c" * 400]
    rows = sorted(system + text + "?" * n for text in texts for n in (1, 3, 2))
    order, begins = side_by_side(alike_of(rows), list(map(len, rows)))
    assert [rows[row][LEAST_ALIKE:][0] + str(rows[row].count("?")) for row in order] == [
        *("c3", "c2", "c1"),
        *("b3", "b2", "b1"),
        *("a3", "a2", "a1"),
    ]
    assert begins == [0], "so few rows are no more than one group"


def test_of_many_rows_under_one_beginning_each_text_is_a_group_of_its_own() -> None:
    rows = sorted(
        "s" * 500 + f"{text:03}" * LEAST_ALIKE + prompt for text in range(20) for prompt in ("a", "b", "c")
    )
    order, begins = side_by_side(alike_of(rows), [len(row) for row in rows])
    assert begins == list(range(0, 60, 3))
    assert bounds(order, begins) == begins
    some = [row for row in order if row % 3 != 1]
    assert bounds(some, begins) == list(range(0, 40, 2)), "of some of the rows as well"


@given(TEXTS, st.integers(1, 12))
def test_a_block_keeps_each_row_and_its_groups(texts: list[str], rows: int) -> None:
    texts.sort()
    part = IncomingPart(columns={"asked": texts}, alike=alike_of(texts))
    readers = (Reader(reads=("asked",), digest=b"task", reusable=True),)
    found: list[str] = []
    for block in blocks_of(part, readers, secret=b"s" * 32, block_rows=rows, block_bytes=1 << 20):
        told = decode_block(block.payload).values["asked"]
        found += map(str, told)
        order = list(row_order(block.row_order))
        assert sorted(order) == list(range(block.n_rows))
        groups = [] if block.groups is None else list(uint32s(block.groups))
        for lo, hi in itertools.pairwise([*bounds(order, groups), len(order)]):
            assert all(
                common_prefix(str(told[order[lo]]), str(told[row])) >= LEAST_ALIKE
                for row in order[lo + 1 : hi]
            )
    assert found == texts


# -- files


@given(st.lists(st.tuples(st.binary(max_size=300), st.integers(0, 99)), max_size=60))
def test_more_than_memory_may_hold_is_sorted_all_the_same(
    tmp_path_factory: pytest.TempPathFactory, texts: list[tuple[bytes, int]]
) -> None:
    folder = tmp_path_factory.getbasetemp()
    before = {*folder.iterdir()}
    with Sorting(folder, run_bytes=2048) as sorting:
        for text, place in texts:
            sorting.add(text, place)
            assert sorting.held_bytes < 2048
        assert list(sorting.places()) == [place for _, place in sorted(texts)]
    assert {*folder.iterdir()} == before


def asked(file: Path, raw: bytes) -> tuple[FileSurvey, list[str]]:
    """What a file's survey found, and what its lines ask in the order in which they land."""
    file.write_bytes(raw)
    found = survey(
        file,
        lambda name: Registered(1, SPEAKER),
        lambda _: lambda ids: "",
        max_row_bytes=1 << 18,
        max_tasks=1,
        goes_on=lambda: None,
    )
    assert not found.errors
    with file.open("rb") as lines:
        said = [
            read_again(line_at(lines, place), lambda name: Registered(1, SPEAKER), lambda _: lambda ids: "")
            for place in found.order
        ]
    return found, [one.asked.texts[0] for one in said]


def test_lines_about_one_text_are_neighbours_wherever_they_stand_in_the_file(tmp_path: Path) -> None:
    """With a system message in common that is longer than any text, and beginnings that end at no round number."""
    dice = random.Random(1)
    texts = ["".join(dice.choices("abcdef ", k=dice.randrange(150, 400))) for _ in range(40)]
    lines = [
        json.dumps(
            {
                "custom_id": f"{text}-{prompt}",
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": {
                    "model": "speaker",
                    "temperature": 0,
                    "messages": [
                        {"role": "system", "content": "Be careful. " * 100},
                        {"role": "user", "content": f"{texts[text]} {prompt}"},
                    ],
                },
            }
        ).encode()
        for text in range(40)
        for prompt in range(4)
    ]
    orders = []
    for _ in range(2):
        dice.shuffle(lines)
        found, order = asked(tmp_path / "lines.jsonl", b"\n".join(lines))
        assert len(set(found.order)) == len(lines)
        orders.append(order)
        whose = [next(n for n, text in enumerate(texts) if text in one) for one in order]
        assert len(list(itertools.groupby(whose))) == len(texts)
    assert orders[0] == orders[1], "so a file that is sent again in another order is found answered"
