"""What comes out of a step's logits: the next token of every answer, and how likely labels' tokens are.

All of it is computed on the device and comes back at once: a way back for each answer would have a GPU wait for the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from workers.engines.trunk import onto
from workers.engines.writers import Grammar, TokenOdds, Writer

#: Logits of answers with a schema or a temperature that are looked at together. Each needs some numbers more: those of
#: so many stay in a CPU core's cache.
AT_ONCE = {"cpu": 1 << 16, "cuda": 1 << 23}


def sample(
    logits: torch.Tensor,
    writing: Sequence[tuple[int, Writer]],
    scored: Sequence[tuple[int, int]],
    grammar: Grammar | None,
) -> tuple[list[int], list[float], dict[int, TokenOdds]]:
    """The next token of each answer, the log-likelihood of each scored token, and by its number among the answers how
    likely the token of each is that tells it.

    ``logits``: (places, vocabulary) in fp32. ``writing``: answers with the place that each goes on behind; ``scored``:
    places with a token.
    """
    device = str(logits.device)
    parts = []
    telling = [i for i, (_, writer) in enumerate(writing) if writer.logprobs is not None]
    if writing:
        # Every whole number of a vocabulary is one in fp64.
        parts.append(_next(logits, writing, grammar, device).double())
    if scored:
        parts.append(_likelihoods(logits, np.array(scored, np.int64), device).double())
    if telling:
        most = max(writing[i][1].logprobs or 0 for i in telling)
        at = np.array([[writing[i][0], i] for i in telling], np.int64)
        parts.append(_odds(logits, at, parts[0], most, device).flatten())
    told: list[float] = torch.cat(parts).tolist() if parts else []
    end = len(writing) + len(scored)
    odds, width = told[end:], (len(told) - end) // max(1, len(telling))
    found = {
        i: _read_odds(odds[number * width : (number + 1) * width], writing[i][1].logprobs or 0)
        for number, i in enumerate(telling)
    }
    return list(map(int, told[: len(writing)])), told[len(writing) : end], found


def _odds(
    logits: torch.Tensor, at: NDArray[np.int64], tokens: torch.Tensor, most: int, device: str
) -> torch.Tensor:
    """(answers, 1 + 2 x most) in fp64: the logarithm of each answer's next token, the likeliest tokens, and theirs.

    ``at``: of each answer its place, and its number among ``tokens``.
    """
    places = onto(np.ascontiguousarray(at.T), device)
    some = logits[places[0]]
    whole = some.logsumexp(-1, keepdim=True)
    mine = some.gather(1, tokens[places[1]].long()[:, None])
    likeliest = some.topk(min(most, some.shape[1]), -1)
    logps = torch.cat([mine, likeliest.values], 1) - whole
    return torch.cat([logps[:, :1].double(), likeliest.indices.double(), logps[:, 1:].double()], 1)


def _read_odds(told: Sequence[float], most: int) -> TokenOdds:
    found = (len(told) - 1) // 2
    pairs = zip(map(int, told[1 : 1 + found]), told[1 + found :], strict=True)
    return TokenOdds(told[0], tuple(pairs)[:most])


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
    """The next token of answers that are not plain. Changes (answers, vocabulary) logits."""
    held = [i for i, writer in enumerate(writers) if writer.held]
    if held and grammar is not None:
        _forbid(logits, held, _allowed(grammar, [writers[i] for i in held]), device)
    if any(writer.weighing is not None for writer in writers):
        _weigh(logits, writers, device)
    drawn = [i for i, writer in enumerate(writers) if writer.temperature > 0]
    if not drawn:
        return logits.argmax(-1)
    how = onto(np.array([(writers[i].temperature, writers[i].chance) for i in drawn]), device)
    if any(writers[i].narrowed for i in drawn):
        return _narrowed(logits, writers, drawn, how, device)
    if len(drawn) == len(writers):
        return _drawn(logits, how[:, :1], how[:, 1:])
    chosen = logits.argmax(-1)
    at = onto(np.array(drawn), device)
    chosen[at] = _drawn(logits[at], how[:, :1], how[:, 1:])
    return chosen


def _narrowed(
    logits: torch.Tensor, writers: Sequence[Writer], drawn: Sequence[int], how: torch.Tensor, device: str
) -> torch.Tensor:
    """The next token where some answers are drawn from a part of the tokens. Others are drawn as ever."""
    chosen = logits.argmax(-1)
    for narrowed in (False, True):
        these = [(n, i) for n, i in enumerate(drawn) if writers[i].narrowed == narrowed]
        if not these:
            continue
        places = onto(np.ascontiguousarray(np.array(these).T), device)
        mine, at = how[places[0]], places[1]
        if narrowed:
            bounds = onto(np.array([(writers[i].top_k, writers[i].top_p) for _, i in these]), device)
            chosen[at] = _drawn_from(logits[at], mine[:, :1], mine[:, 1:], bounds[:, :1], bounds[:, 1:])
        else:
            chosen[at] = _drawn(logits[at], mine[:, :1], mine[:, 1:])
    return chosen


def _weigh(logits: torch.Tensor, writers: Sequence[Writer], device: str) -> None:
    """Make tokens less likely, or likelier, that stand in the prompt or were written."""
    #: (answer, token, factor) and (answer, token, what is taken).
    factors: list[NDArray[np.float64]] = []
    taken: list[NDArray[np.float64]] = []
    for row, writer in enumerate(writers):
        if (how := writer.weighing) is None:
            continue
        tokens, counts = np.unique(np.array(writer.ids, np.int64), return_counts=True)
        if how.repetition != 1:
            seen = np.union1d(tokens, np.array(how.prompt, np.int64)).astype(np.float64)
            factors.append(np.stack([np.full_like(seen, row), seen, np.full_like(seen, how.repetition)]))
        if how.frequency or how.presence:
            less = how.frequency * counts + how.presence
            taken.append(np.stack([np.full_like(less, row), tokens.astype(np.float64), less]))
    for parts, is_factor in ((factors, True), (taken, False)):
        if not parts or not (found := np.concatenate(parts, 1)).shape[1]:
            continue
        at = onto(found[:2].astype(np.int64), device)
        how_much = onto(found[2], device).to(logits.dtype)
        now = logits[at[0], at[1]]
        logits[at[0], at[1]] = (
            torch.where(now > 0, now / how_much, now * how_much) if is_factor else now - how_much
        )


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


def _drawn_from(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    chance: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
) -> torch.Tensor:
    """The same, of the ``top_k`` likeliest tokens (0: all), and of these of the fewest that have a share of ``top_p`` of
    them: nucleus sampling (Holtzman et al., The Curious Case of Neural Text Degeneration, ICLR 2020). All (rows, 1)."""
    ordered, tokens = logits.sort(dim=-1, descending=True, stable=True)
    shares = ((ordered - ordered[:, :1]).double() / temperature).exp()
    number = torch.arange(shares.shape[1], device=shares.device)
    shares = shares.masked_fill((number >= top_k) & (top_k > 0), 0)
    before = shares.cumsum(-1) - shares
    # The likeliest token stays in any case: nothing is before it.
    shares = shares.masked_fill(before >= top_p * shares.sum(-1, keepdim=True), 0)
    steps = shares.cumsum(-1)
    found = torch.searchsorted(steps, chance * steps[:, -1:], right=True)
    last = (shares > 0).sum(-1, keepdim=True) - 1
    chosen: torch.Tensor = tokens.gather(1, torch.minimum(found, last))[:, 0]
    return chosen


def _likelihoods(logits: torch.Tensor, scored: NDArray[np.int64], device: str) -> torch.Tensor:
    places, of = np.unique(scored[:, 0], return_inverse=True)
    some = _of(logits, places, device)
    at = onto(np.stack([of, scored[:, 1]]), device)
    return some[at[0], at[1]] - some.logsumexp(-1)[at[0]]
