"""Prompts as a tree: what several of them begin with stands there once, and is computed once. Pure, numpy.

A tree of token runs is flattened depth first, so that whatever a token attends to stands before it: itself, the
tokens before it in its run, and those of the runs above. One row of a mask says which (Miao et al., SpecInfer, 2023,
call it tree attention).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from motet.protocol.beginnings import common_prefix

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(slots=True)
class _Run:
    """A run of tokens that all sequences below it have in common."""

    tokens: Sequence[int]
    #: By their first token.
    children: dict[int, _Run]


@dataclass(frozen=True, slots=True)
class Tree:
    """Sequences with their common beginnings, flattened."""

    #: Of each place: its token, its position in every sequence through it, and its run.
    tokens: Ints
    positions: Ints
    runs: Ints
    #: ``above[a, b]``: run b is a or stands above it.
    above: Bools
    #: Of each sequence: the places of its tokens, in order.
    paths: tuple[Ints, ...]

    def __len__(self) -> int:
        return len(self.tokens)

    def seen(self, places: Ints) -> Bools:
        """(len(places), len(self)): what each of these places attends to."""
        order = np.arange(len(self))
        seen: Bools = self.above[np.ix_(self.runs[places], self.runs)] & (order <= places[:, None])
        return seen


def tree(sequences: Sequence[Sequence[int]], kinds: Sequence[object] = ()) -> Tree:
    """The tree of these sequences, each of one token or more. A place where one of them ends is the end of a run.

    ``kinds``: what computes each of them; sequences of different kinds have nothing in common.
    """
    roots: dict[object, _Run] = {}
    of = [roots.setdefault(kind, _Run((), {})) for kind in kinds or [None] * len(sequences)]
    for root, sequence in zip(of, sequences, strict=True):
        _insert(root, sequence)
    tokens: list[int] = []
    positions: list[int] = []
    runs: list[int] = []
    parents: list[int] = []
    first: dict[int, int] = {}

    def flatten(run: _Run, parent: int, depth: int) -> None:
        number = len(parents)
        parents.append(parent)
        first[id(run)] = len(tokens)
        tokens.extend(run.tokens)
        positions.extend(range(depth, depth + len(run.tokens)))
        runs.extend([number] * len(run.tokens))
        for child in run.children.values():
            flatten(child, number, depth + len(run.tokens))

    for root in roots.values():
        for child in root.children.values():
            flatten(child, -1, 0)
    above = np.eye(len(parents), dtype=bool)
    for number, parent in enumerate(parents):
        if parent >= 0:
            above[number] |= above[parent]
    return Tree(
        tokens=np.array(tokens, np.int64),
        positions=np.array(positions, np.int64),
        runs=np.array(runs, np.int64),
        above=above,
        paths=tuple(_path(root, sequence, first) for root, sequence in zip(of, sequences, strict=True)),
    )


def _insert(run: _Run, sequence: Sequence[int]) -> None:
    at = 0
    while at < len(sequence):
        child = run.children.get(sequence[at])
        if child is None:
            run.children[sequence[at]] = _Run(sequence[at:], {})
            return
        common = common_prefix(child.tokens, sequence[at:])
        if common < len(child.tokens):
            rest = _Run(child.tokens[common:], child.children)
            child.tokens, child.children = child.tokens[:common], {rest.tokens[0]: rest}
        run, at = child, at + common


def _path(run: _Run, sequence: Sequence[int], first: dict[int, int]) -> Ints:
    places: list[int] = []
    while len(places) < len(sequence):
        run = run.children[sequence[len(places)]]
        start = first[id(run)]
        places.extend(range(start, start + len(run.tokens)))
    return np.array(places, np.int64)
