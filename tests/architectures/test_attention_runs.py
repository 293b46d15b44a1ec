"""Prompts as runs for a kernel of a GPU: what it would be given is proved on the CPU, with the kernel's work done plainly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from motet.tasks import Choose, Task
from tests.tiny_language import a_language_model, a_llama
from tests.unit.test_causal_engine import TEXTS, House, several, told
from workers.engines.causal import causal
from workers.engines.causal.runs import Sequences, agrees, flash, one_by_one, pieces
from workers.engines.causal.trees import tree
from workers.engines.proved import within
from workers.registrar.accuracy import SENTENCES

TASKS: dict[str, Task] = {
    **several(8, system="You are a careful reader of newspapers, films and cats."),
    "mood": Choose("tiny", labels=("good", "not good at all", "bad"), scores=True),
}

FEW = {name: TASKS[name] for name in (*list(TASKS)[:2], "mood")}


def answers(house: House, tokens: int) -> list[Any]:
    """Of several rows together, twice: the second time their common prefixes are cached."""
    # In steps of a few tokens, all tasks of all rows take a minute.
    tasks, texts = (TASKS, TEXTS * 2) if tokens > 100 else (FEW, TEXTS)
    found = []
    for _ in range(2):
        pass_ = house.pass_(tasks)
        ended = house.ended(pass_, house.rows(pass_, texts), tokens)
        found.append([told({n: c}, tasks)[n][0] for i in sorted(ended) for n, c in ended[i].columns.items()])
    return found


@pytest.mark.parametrize("tokens", [1024, 150, 7])
@pytest.mark.parametrize(("kind", "window"), [("llama", None), ("qwen3", None), ("mistral", 16)])
def test_runs_answer_what_masks_answer(tmp_path: Path, kind: str, window: int | None, tokens: int) -> None:
    house = House(a_llama(tmp_path, kind=kind, window=window))
    expected = answers(house, tokens)
    house.handle.varlen = one_by_one
    house.handle.prefix_cache.clear()
    house.handle.priors.clear()
    for found, known in zip(answers(house, tokens), expected, strict=True):
        for one, other in zip(found, known, strict=True):
            if isinstance(one, dict):
                assert one == other
            else:
                # Within the window all texts end alike, and then all labels are as likely as without any.
                assert one[2] == pytest.approx(other[2], abs=1e-4)


def test_the_proof_that_rows_stay_apart_takes_the_same_way(tmp_path: Path) -> None:
    house = House(a_llama(tmp_path, kind="mistral", window=32))
    calls = 0

    def counted(*given: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return one_by_one(*given)

    house.handle.varlen = counted
    assert within(house.engine.among_others(house.handle, SENTENCES[:20]), "fp32")
    assert calls


def test_each_token_of_a_run_sees_what_its_row_of_a_mask_says() -> None:
    dice = np.random.default_rng(0)
    for _ in range(50):
        sequences = [dice.integers(0, 3, dice.integers(1, 30)).tolist() for _ in range(5)]
        grown = tree(sequences, dice.integers(0, 2, 5).tolist())
        # What is left of a prompt whose prefix is cached, and a chunk of that.
        places = np.sort(dice.choice(len(grown), dice.integers(1, len(grown) + 1), replace=False))
        mask = grown.seen(places)
        covered = []
        for piece in pieces(grown, places, 100, 0):
            for number in range(piece.count):
                sees = piece.path[: len(piece.path) - piece.count + number + 1]
                assert sees.tolist() == np.flatnonzero(mask[piece.at - 100 + number]).tolist()
                # In the order of their positions, as a window counts them.
                assert grown.positions[sees].tolist() == list(range(len(sees)))
            covered += range(piece.at, piece.at + piece.count)
        assert covered == list(range(100, 100 + len(places)))


def test_a_kernel_is_asked_before_it_is_relied_upon() -> None:
    assert agrees(one_by_one, "cpu", torch.bfloat16, 8, 2, 32)

    def from_the_left(*given: Any) -> torch.Tensor:
        """The asking tokens are the first ones of their sequence: how some kernels understand a causal mask."""
        query, keys, values, where, scaling, window = given
        starts, longest = where.starts, where.longest
        some = torch.cat([
            torch.arange(int(first), int(first) + int(hi) - int(lo))
            for lo, hi, first in zip(starts, starts[1:], where.seen_starts, strict=False)
        ])  # fmt: skip
        shorter = Sequences(starts, starts.clone(), longest, longest)
        return one_by_one(query, keys[some], values[some], shorter, scaling, window)

    def wide(*given: Any) -> torch.Tensor:
        """A window that counts the token itself for nothing."""
        return one_by_one(*given[:-1], given[-1] and given[-1] + 1)

    def missing(*given: Any) -> torch.Tensor:
        raise RuntimeError("no kernel image is available")

    for wrong in (from_the_left, wide, missing):
        assert not agrees(wrong, "cpu", torch.bfloat16, 8, 2, 32)


def test_a_cpu_has_no_such_kernel() -> None:
    assert flash("cpu", torch.bfloat16, 8, 2, 32, 32) is None


def test_a_model_whose_attention_does_more_than_the_kernel_goes_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(causal, "flash", lambda *_: one_by_one)
    capped = a_language_model(tmp_path, "gemma2", num_key_value_heads=2, head_dim=8)
    assert House(capped).handle.varlen is None
    plain = tmp_path / "plain"
    plain.mkdir()
    assert House(a_llama(plain)).handle.varlen is one_by_one
