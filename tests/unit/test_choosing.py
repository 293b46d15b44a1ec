"""What comes out of a step's logits, against the same computed plainly, one answer after the other."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.tiny_language import a_tokenizer
from workers.engines.causal import choosing
from workers.engines.causal.choosing import forbid_here, outcome, unset
from workers.engines.writers import Grammar, Writer

SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}


def a_writer(grammar: Grammar | None = None, temperature: float = 0.0, index: int = 0) -> Writer:
    matcher = grammar.matcher(SCHEMA) if grammar else None
    return Writer.of(
        "a", {"temperature": temperature, "schema": SCHEMA if grammar else None}, 8, index, matcher
    )


def plainly(logits: Any, writer: Writer, grammar: Grammar) -> int:
    logits = logits.copy()
    if writer.matcher is not None:
        forbid_here(logits[None], [0], grammar.allowed([writer.matcher]))
    if writer.temperature == 0:
        return int(logits.argmax())
    shares = np.exp((logits - logits.max()).astype(np.float64) / writer.temperature)
    steps = np.cumsum(shares)
    return int(np.searchsorted(steps, writer.chance * steps[-1], side="right"))


@pytest.fixture(scope="module")
def grammar(tmp_path_factory: pytest.TempPathFactory) -> Grammar:
    folder = tmp_path_factory.mktemp("tokenizer")
    vocabulary = a_tokenizer(folder)
    return Grammar((Path(folder) / "tokenizer.json").read_text("utf-8"), vocabulary, [2])


@pytest.mark.parametrize("at_once", [1, 3, 32])
def test_every_answer_gets_the_token_that_it_would_get_alone(
    grammar: Grammar, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setitem(choosing.AT_ONCE, "cpu", 403 * at_once)
    torch.manual_seed(0)
    logits = torch.randn(9, 403) * 3
    kinds = [(None, 0.0), (grammar, 0.0), (None, 0.7), (grammar, 1.3)]
    writing = [
        (place, a_writer(*kinds[(place + i) % 4], index=7 * place + i))
        for place in range(9)
        for i in (0, 1, 2)
    ]
    before = logits.clone()
    tokens, _ = outcome(logits, writing, [], grammar)
    assert torch.equal(logits, before)
    assert tokens == [plainly(logits[place].numpy(), writer, grammar) for place, writer in writing]
    drawn = [t for (_, w), t in zip(writing, tokens, strict=True) if w.temperature and w.matcher is None]
    assert len(set(drawn)) > 3


def test_labels_tokens_are_as_likely_as_their_logits_say() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 50)
    scored = [(4, 3), (4, 7), (1, 0), (5, 49)]
    tokens, found = outcome(logits, [(0, a_writer())], scored, None)
    assert tokens == [int(logits[0].argmax())]
    assert found == pytest.approx([float(logits.log_softmax(-1)[at]) for at in scored], abs=1e-5)
    assert outcome(logits, [], [], None) == ([], [])


def test_a_thought_may_begin_where_a_schema_would_not_let_it(grammar: Grammar) -> None:
    writer = Writer.of("a", {"schema": SCHEMA, "thinking": True}, 8, 0, grammar.matcher(SCHEMA), (5, 6))
    assert writer.also == 5
    logits = torch.zeros(1, 400)
    logits[0, 5] = 9.0
    assert outcome(logits, [(0, writer)], [], grammar)[0] == [5]
    writer.take(5, frozenset({2}), lambda ids: "")
    # Within the thought nothing is forbidden, and behind it the schema holds.
    assert outcome(logits, [(0, writer)], [], grammar)[0] == [5]
    writer.take(6, frozenset({2}), lambda ids: "")
    assert outcome(logits, [(0, writer)], [], grammar)[0] != [5]


@pytest.mark.parametrize("width", [1, 31, 32, 33, 64, 80])
def test_bits_are_spread_out_on_a_gpu_as_in_the_hosts_memory(width: int) -> None:
    bits = np.random.default_rng(0).integers(0, 1 << 32, (5, 2), dtype=np.uint64).astype(np.uint32)
    here = np.zeros((5, width), np.float32)
    forbid_here(here, range(5), bits)
    there = torch.zeros(5, width)
    forbidden = unset(torch.from_numpy(bits.view(np.int32)), width)
    there[:, : forbidden.shape[1]].masked_fill_(forbidden, -math.inf)
    assert np.array_equal(here, there.numpy())
