"""How well each label answers a question: by its likelihood, by first tokens, or by what is written."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from motet.protocol.columns import CellError
from workers.engines.prompts import OWN_LABELS, labels_of
from workers.engines.served.chat_server import RequestRefused
from workers.engines.served.question import ServedQuestion
from workers.engines.served.refusals import ANSWER_LENGTH, CONTEXT_LENGTH
from workers.engines.served.writing import text_of
from workers.engines.thoughts import without_thoughts

#: Tokens for the thoughts of a model that thinks before it names a label, whatever it is told: as many as fit.
THOUGHT_TOKENS = (4096, 1024, 256)
#: Log-likelihood of a label that is not even among the likeliest tokens, below the last of those.
UNSEEN = -2.0


async def label_scores(q: ServedQuestion, share: float) -> list[float]:
    """A logarithm for each label; only their differences mean something."""
    if q.server.scores is not False:
        try:
            return await _likelihoods(q, share)
        except RequestRefused as refused:
            if q.server.scores or refused.status not in (400, 404, 405, 415, 422, 501):
                raise
            if refused.cell == CONTEXT_LENGTH:
                raise
            q.server.scores = False
    return await _first_tokens(q, share)


async def _likelihoods(q: ServedQuestion, share: float) -> list[float]:
    """Of every label as the whole answer, against its likelihood without any text."""
    texts = labels_of(q.task.spec)
    labels = [
        await q.server.tokens(urgent=q.urgent, prompt=label, add_special_tokens=False) for label in texts
    ]
    found = await _sums(q, q.messages(share), labels)
    if q.task.spec.get("calibrate", True):
        known, key = q.handle.priors, (q.tenant, q.task.name, *(q.task.spec.get(OWN_LABELS) or ()))
        if (prior := known.get(key)) is None:
            prior = tuple(await _sums(q, q.empty(), labels))
            known.put(key, prior)
        found = [a - b for a, b in zip(found, prior, strict=True)]
    q.server.scores = True
    return found


async def _sums(
    q: ServedQuestion, messages: Sequence[Mapping[str, str]], labels: Sequence[Sequence[int]]
) -> list[float]:
    prompt = await q.server.tokens(
        urgent=q.urgent, messages=list(messages), add_generation_prompt=True, **q.template
    )

    async def one(label: Sequence[int]) -> float:
        choice = await q.server.complete(
            [*prompt, *label],
            q.spending,
            urgent=q.urgent,
            max_tokens=1,
            temperature=0.0,
            echo=True,
            logprobs=1,
            **q.own,
        )
        told = (choice.get("logprobs") or {}).get("token_logprobs") or []
        mine = told[len(prompt) : len(prompt) + len(label)]
        if len(mine) < len(label) or not all(isinstance(p, int | float) for p in mine):
            raise RequestRefused(
                CellError("refused", "the server does not tell the likelihood of given tokens"), 404
            )
        return float(sum(mine))

    return list(await asyncio.gather(*map(one, labels)))


async def _first_tokens(q: ServedQuestion, share: float) -> list[float]:
    """By what the answer begins with."""
    labels = labels_of(q.task.spec)
    longest = max(len(label.encode("utf-8", "replace")) for label in labels)
    choice = await _named_label(q, share, 4 + longest // 2)
    text = text_of(choice)
    answer = without_thoughts(text)
    written = label_in(answer, labels)
    # Likelihoods are of the first token, and so of a thought where there is one.
    thought = answer != text or q.server.thoughts
    shares = label_shares([] if thought else _likeliest(choice), labels, written)
    if not any(shares):
        if written is None:
            raise RequestRefused(CellError("no_label", "what was written is none of the labels"))
        shares = [float(i == written) for i in range(len(labels))]
        return [math.log(share) if share else -100.0 for share in shares]
    least = math.log(min(share for share in shares if share))
    return [math.log(share) if share else least + UNSEEN for share in shares]


async def _named_label(q: ServedQuestion, share: float, most: int) -> dict[str, Any]:
    """What the model writes where it shall name a label: with room for thoughts before, where it needs that."""
    known = q.server.thoughts
    choice = await _labelled(q, share, most) if not known else None
    if choice is not None and not _all_thoughts(choice):
        return choice
    for more in THOUGHT_TOKENS:
        if known and more > known:
            continue
        try:
            choice = await _labelled(q, share, most + more)
        except RequestRefused as refused:
            if refused.cell not in (CONTEXT_LENGTH, ANSWER_LENGTH):
                raise
            continue
        if not _all_thoughts(choice):
            q.server.thoughts = max(known, more)
        break
    return choice or await _labelled(q, share, most)


async def _labelled(q: ServedQuestion, share: float, most: int) -> dict[str, Any]:
    return await q.chat(
        q.messages(share),
        # The first token's likelihoods are those without a temperature, and a server may have one of its own.
        spare=("temperature", "logprobs", "top_logprobs"),
        temperature=0.0,
        max_tokens=most,
        logprobs=True,
        top_logprobs=20,
    )


def _all_thoughts(choice: Mapping[str, Any]) -> bool:
    """There was no room for an answer behind the thoughts, which some servers do not even tell."""
    return choice.get("finish_reason") == "length" and not without_thoughts(text_of(choice)).strip()


def _likeliest(choice: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The likeliest first tokens with their probabilities."""
    content = (choice.get("logprobs") or {}).get("content") or [{}]
    found = content[0].get("top_logprobs") or []
    return [(str(one["token"]), math.exp(min(0.0, float(one["logprob"])))) for one in found]


# -- which label an answer means


def label_in(text: str, labels: Sequence[str]) -> int | None:
    """Which label an answer names: the one it is, or begins with, or the only one in it; None where that is unclear."""
    plain_text = text.strip().strip("\"'`*.").casefold()
    folded = [label.casefold() for label in labels]
    if plain_text in folded:
        return folded.index(plain_text)
    for found in (
        [i for i, label in enumerate(folded) if re.match(rf"{re.escape(label)}(?!\w)", plain_text)],
        [i for i, label in enumerate(folded) if re.search(rf"(?<!\w){re.escape(label)}(?!\w)", plain_text)],
    ):
        if found:
            longest = max(found, key=lambda i: len(folded[i]))
            # One that begins or holds the others is meant; two that stand apart are not clear.
            return longest if all(folded[i] in folded[longest] for i in found) else None
    return None


def label_shares(
    tokens: Sequence[tuple[str, float]], labels: Sequence[str], written: int | None
) -> list[float]:
    """Each label's share of the first token: what begins several is the written one's, or all of theirs alike."""
    shares = [0.0] * len(labels)
    for token, share in tokens:
        begin = token.replace("\u0120", " ").replace("\u2581", " ").strip().casefold()
        mine = [i for i, label in enumerate(labels) if begin and label.strip().casefold().startswith(begin)]
        if written in mine:
            mine = [written] if written is not None else mine
        for i in mine:
            shares[i] += share / len(mine)
    return shares
