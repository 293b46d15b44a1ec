"""What comes out of a step's logits: the next token of every answer, and how likely labels' tokens are.

All of it is computed on the device and comes back at once: a way back for each answer would have a GPU wait for the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from workers.engines.trunk import onto
from workers.engines.writers import Grammar, Writer

#: Logits of answers with a schema or a temperature that are looked at together. Each needs some numbers more: those of
#: so many stay in a CPU core's cache.
AT_ONCE = {"cpu": 1 << 16, "cuda": 1 << 23}


def outcome(
    logits: torch.Tensor,
    writing: Sequence[tuple[int, Writer]],
    scored: Sequence[tuple[int, int]],
    grammar: Grammar | None,
) -> tuple[list[int], list[float]]:
    """The next token of each answer, and the log-likelihood of each scored token.

    ``logits``: (places, vocabulary) in fp32. ``writing``: answers with the place that each goes on behind; ``scored``:
    places with a token.
    """
    device = str(logits.device)
    parts = []
    if writing:
        # Every whole number of a vocabulary is one in fp64.
        parts.append(_next(logits, writing, grammar, device).double())
    if scored:
        parts.append(_likelihoods(logits, np.array(scored, np.int64), device).double())
    told: list[float] = torch.cat(parts).tolist() if parts else []
    return list(map(int, told[: len(writing)])), told[len(writing) :]


def _next(
    logits: torch.Tensor, writing: Sequence[tuple[int, Writer]], grammar: Grammar | None, device: str
) -> torch.Tensor:
    places = np.array([place for place, _ in writing], np.int64)
    tokens = _of(logits, places, device).argmax(-1)
    special = [i for i, (_, writer) in enumerate(writing) if not writer.plain]
    at_once = max(1, AT_ONCE[logits.device.type] // logits.shape[1])
    for lo in range(0, len(special), at_once):
        these = special[lo : lo + at_once]
        some = logits[onto(places[these], device)]
        chosen = _by_its_rules(some, [writing[i][1] for i in these], grammar, device)
        tokens[onto(np.array(these), device)] = chosen
    return tokens


def _by_its_rules(
    logits: torch.Tensor, writers: Sequence[Writer], grammar: Grammar | None, device: str
) -> torch.Tensor:
    """The next token of answers with a schema or a temperature. Changes (answers, vocabulary) logits."""
    held = [i for i, writer in enumerate(writers) if writer.held]
    if held and grammar is not None:
        _forbid(logits, held, _allowed(grammar, [writers[i] for i in held]), device)
    drawn = [i for i, writer in enumerate(writers) if writer.temperature > 0]
    if not drawn:
        return logits.argmax(-1)
    how = onto(np.array([(writers[i].temperature, writers[i].chance) for i in drawn]), device)
    if len(drawn) == len(writers):
        return _drawn(logits, how[:, :1], how[:, 1:])
    chosen = logits.argmax(-1)
    at = onto(np.array(drawn), device)
    chosen[at] = _drawn(logits[at], how[:, :1], how[:, 1:])
    return chosen


def _of(logits: torch.Tensor, places: NDArray[np.int64], device: str) -> torch.Tensor:
    """The logits of these places; the same tensor where that is all of them in their order."""
    if len(places) == len(logits) and (places == np.arange(len(places))).all():
        return logits
    return logits[onto(places, device)]


def _allowed(grammar: Grammar, writers: Sequence[Writer]) -> NDArray[np.uint32]:
    bits = grammar.allowed([writer.matcher for writer in writers])
    for number, writer in enumerate(writers):
        if (also := writer.also) is not None:
            bits[number, also >> 5] |= np.uint32(1 << (also & 31))
    return bits


def _forbid(logits: torch.Tensor, rows: Sequence[int], bits: NDArray[np.uint32], device: str) -> None:
    """Make tokens impossible whose bit is not set."""
    if device == "cpu":
        forbid_here(logits.numpy(), rows, bits)
        return
    # Bits travel, and are spread out there.
    forbidden = unset(onto(np.ascontiguousarray(bits.view(np.int32)), device), logits.shape[1])
    at, width = onto(np.array(rows), device), forbidden.shape[1]
    logits[at, :width] = logits[at, :width].masked_fill_(forbidden, float("-inf"))


def unset(words: torch.Tensor, width: int) -> torch.Tensor:
    """(rows, width or fewer) truth values: of each bit of (rows, words), the lowest first, whether it is not set."""
    places = torch.arange(32, dtype=torch.int32, device=words.device)
    return ((words[:, :, None] >> places) & 1).flatten(1)[:, :width] == 0


def forbid_here(logits: NDArray[np.float32], rows: Sequence[int], bits: NDArray[np.uint32]) -> None:
    """The same in the host's memory."""
    for row, words in zip(rows, bits, strict=True):
        allowed = np.unpackbits(words.view(np.uint8), bitorder="little")[: logits.shape[1]]
        logits[row, : len(allowed)][allowed == 0] = -np.inf


def _drawn(logits: torch.Tensor, temperature: torch.Tensor, chance: torch.Tensor) -> torch.Tensor:
    """The token at which so much of all likelihood is reached, (rows,). Temperature and chance are (rows, 1) in fp64."""
    shares = ((logits - logits.amax(-1, keepdim=True)).double() / temperature).exp()
    steps = shares.cumsum(-1)
    found = torch.searchsorted(steps, chance * steps[:, -1:], right=True)[:, 0]
    return found.clamp(max=logits.shape[1] - 1)


def _likelihoods(logits: torch.Tensor, scored: NDArray[np.int64], device: str) -> torch.Tensor:
    places, of = np.unique(scored[:, 0], return_inverse=True)
    some = _of(logits, places, device)
    at = onto(np.stack([of, scored[:, 1]]), device)
    return some[at[0], at[1]] - some.logsumexp(-1)[at[0]]
