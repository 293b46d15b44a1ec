"""What comes out of a step's logits, against the same computed plainly, one answer after the other."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.tiny_language import a_tokenizer
from workers.engines.causal import sampling
from workers.engines.causal.sampling import forbid_here, sample, unset
from workers.engines.writers import Grammar, TokenOdds, Writer

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
    monkeypatch.setitem(sampling.AT_ONCE, "cpu", 403 * at_once)
    torch.manual_seed(0)
    logits = torch.randn(9, 403) * 3
    kinds = [(None, 0.0), (grammar, 0.0), (None, 0.7), (grammar, 1.3)]
    writing = [
        (place, a_writer(*kinds[(place + i) % 4], index=7 * place + i))
        for place in range(9)
        for i in (0, 1, 2)
    ]
    before = logits.clone()
    tokens, _, _ = sample(logits, writing, [], grammar)
    assert torch.equal(logits, before)
    assert tokens == [plainly(logits[place].numpy(), writer, grammar) for place, writer in writing]
    drawn = [t for (_, w), t in zip(writing, tokens, strict=True) if w.temperature and w.matcher is None]
    assert len(set(drawn)) > 3


def test_labels_tokens_are_as_likely_as_their_logits_say() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 50)
    scored = [(4, 3), (4, 7), (1, 0), (5, 49)]
    tokens, found, _ = sample(logits, [(0, a_writer())], scored, None)
    assert tokens == [int(logits[0].argmax())]
    assert found == pytest.approx([float(logits.log_softmax(-1)[at]) for at in scored], abs=1e-5)
    assert sample(logits, [], [], None) == ([], [], {})


def a_sampler(
    number: int = 0, prompt: tuple[int, ...] = (), written: tuple[int, ...] = (), **spec: Any
) -> Writer:
    writer = Writer.of("a", spec, 99, number, None, prompt=prompt)
    writer.ids += written
    return writer


def chosen(logits: torch.Tensor, *writers: Writer) -> list[int]:
    return sample(logits, [(0, writer) for writer in writers], [], None)[0]


def test_tokens_are_drawn_from_the_likeliest_alone_and_as_often_as_they_are_likely() -> None:
    shares = torch.tensor([[0.05, 0.4, 0.3, 0.1, 0.15]])
    draws = range(600)
    for spec, among in (
        ({"top_k": 2}, {1: 4 / 7, 2: 3 / 7}),
        ({"top_p": 0.65}, {1: 4 / 7, 2: 3 / 7}),
        ({"top_p": 0.71}, {1: 8 / 17, 2: 6 / 17, 4: 3 / 17}),
        # What has a share of 0.5 is asked of those two, not of all.
        ({"top_k": 2, "top_p": 0.5}, {1: 1.0}),
        ({"top_p": 1e-6}, {1: 1.0}),
        ({"top_k": 99}, {0: 0.05, 1: 0.4, 2: 0.3, 3: 0.1, 4: 0.15}),
    ):
        found = chosen(shares.log(), *(a_sampler(n, temperature=1.0, **spec) for n in draws))
        told = {token: found.count(token) / len(draws) for token in set(found)}
        assert told == pytest.approx(among, abs=0.07), spec


def test_a_draw_from_a_part_of_the_tokens_changes_no_neighbour() -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 50)
    plain = [a_sampler(n, temperature=t) for n, t in enumerate((0.0, 1.0, 0.7, 0.0))]
    alone = [chosen(logits, writer)[0] for writer in plain]
    others = [a_sampler(9, temperature=1.0, top_p=0.5), a_sampler(8, repetition_penalty=2.0, prompt=(3,))]
    beside = chosen(logits, others[0], *plain, others[1])
    assert beside[1:5] == alone


def test_penalties_are_those_of_transformers_and_of_openai() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    torch.manual_seed(0)
    logits = torch.randn(1, 30) * 2
    prompt, written = (1, 2, 2, 9), (4, 4, 4, 7, 2)
    seen = torch.tensor([[*prompt, *written]])
    weighed = RepetitionPenaltyLogitsProcessor(1.7)(seen, logits.clone())
    counts = torch.bincount(torch.tensor(written), minlength=30)
    lessened = logits - 0.9 * counts - 0.8 * (counts > 0)
    both = weighed - 0.9 * counts - 0.8 * (counts > 0)
    specs: list[dict[str, float]] = [
        {"repetition_penalty": 1.7},
        {"frequency_penalty": 0.9, "presence_penalty": 0.8},
        {"repetition_penalty": 1.7, "frequency_penalty": 0.9, "presence_penalty": 0.8},
    ]
    for spec, expected in zip(specs, (weighed, lessened, both), strict=True):
        writer = a_sampler(prompt=prompt, written=written, **spec)
        found = logits.clone()
        sampling._weigh(found, [writer], "cpu")
        assert torch.allclose(found, expected, atol=1e-6)
        assert chosen(logits, writer) == [int(expected.argmax())]
    # In the first token of an answer there is nothing yet that was written.
    assert chosen(logits, a_sampler(frequency_penalty=2.0, presence_penalty=2.0)) == [int(logits.argmax())]


def test_likelihoods_are_the_models_own_and_change_no_token(grammar: Grammar) -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 403) * 3
    expected = logits.log_softmax(-1)
    plain = [a_writer(), a_writer(grammar), a_writer(temperature=0.7), a_sampler(top_p=0.3, temperature=2.0)]
    before, _, nothing = sample(logits, list(enumerate(plain)), [], grammar)
    assert nothing == {}
    for number, most in ((0, 3), (1, 0), (3, 5)):
        plain[number].logprobs = most
    tokens, scored, odds = sample(logits, list(enumerate(plain)), [(2, 7)], grammar)
    assert tokens == before
    assert scored == pytest.approx([float(expected[2, 7])], abs=1e-4)
    assert sorted(odds) == [0, 1, 3]
    for number, told in odds.items():
        best = expected[number].topk(plain[number].logprobs or 0)
        assert told.logp == pytest.approx(float(expected[number, tokens[number]]), abs=1e-4)
        assert [token for token, _ in told.likeliest] == best.indices.tolist()
        assert [logp for _, logp in told.likeliest] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_likelihoods_are_told_of_the_text_alone() -> None:
    """Up to a stop text, and without the token that ends the answer."""
    words = dict(enumerate(["the", " cat", " s", "at", " on", "<end>"]))

    def said(ids: Any) -> str:
        return "".join(words[one] for one in ids)

    def told(stop: tuple[str, ...], *tokens: int) -> Any:
        writer = Writer.of("a", {"stop": stop, "logprobs": 0}, 9, 0, None)
        for token in tokens:
            writer.take(token, frozenset({5}), said, TokenOdds(-1.0 - token, ()))
        assert writer.finish == "stop"
        return writer.likelihoods(said, words.__getitem__)

    assert told((), 0, 1, 5) == [["the", -1.0, []], [" cat", -2.0, []]]
    # A token that begins before the stop text is one of the text.
    assert [one[0] for one in told(("sat",), 0, 1, 2, 3)] == ["the", " cat", " s"]
    assert [one[0] for one in told((" s",), 0, 1, 2)] == ["the", " cat"]
    assert told(("the",), 0) == []
    assert Writer.of("a", {}, 9, 0, None).likelihoods(said, words.__getitem__) is None


def test_a_thought_may_begin_where_a_schema_would_not_let_it(grammar: Grammar) -> None:
    writer = Writer.of("a", {"schema": SCHEMA, "thinking": True}, 8, 0, grammar.matcher(SCHEMA), (5, 6))
    assert writer.also == 5
    logits = torch.zeros(1, 400)
    logits[0, 5] = 9.0
    assert sample(logits, [(0, writer)], [], grammar)[0] == [5]
    writer.take(5, frozenset({2}), lambda ids: "")
    # Within the thought nothing is forbidden, and behind it the schema holds.
    assert sample(logits, [(0, writer)], [], grammar)[0] == [5]
    writer.take(6, frozenset({2}), lambda ids: "")
    assert sample(logits, [(0, writer)], [], grammar)[0] != [5]


@pytest.mark.parametrize("width", [1, 31, 32, 33, 64, 80])
def test_bits_are_spread_out_on_a_gpu_as_in_the_hosts_memory(width: int) -> None:
    bits = np.random.default_rng(0).integers(0, 1 << 32, (5, 2), dtype=np.uint64).astype(np.uint32)
    here = np.zeros((5, width), np.float32)
    forbid_here(here, range(5), bits)
    there = torch.zeros(5, width)
    forbidden = unset(torch.from_numpy(bits.view(np.int32)), width)
    there[:, : forbidden.shape[1]].masked_fill_(forbidden, -math.inf)
    assert np.array_equal(here, there.numpy())
