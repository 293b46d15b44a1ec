"""What prompts cost, with and without sharing what they have in common, from a sample of rows. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from scheduler.policy.plan import PassEstimate, PassPlan, Sample, passing_time


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskTokens:
    """One task about the text, in tokens of each sampled row."""

    #: The system message, by which tasks that have the same one know each other, and its tokens.
    system: str
    system_tokens: Sequence[int]
    instruction_tokens: Sequence[int]
    #: The same for every row, so that rows can share it.
    system_fixed: bool
    instruction_fixed: bool
    #: Tokens written at most.
    written: int = 0


def estimate_prompts(
    planned: PassPlan,
    texts: Sequence[int],
    asked: Sequence[TaskTokens],
    sample: Sample,
    *,
    seconds_per_token: Sequence[float],
    prior_s: float,
    subtask_s: float,
) -> PassEstimate:
    """What a pass of prompts will cost. ``texts``: tokens of the shared text of each sampled row.

    ``tokens`` are those that sharing leaves to be computed, ``unfused_tokens`` those of a prompt for each row and task,
    ``tokens_out`` what is written where every answer is as long as it may be. What rows share counts once for the job.
    """
    rows = range(len(texts))
    whole = [[t.system_tokens[i] + texts[i] + t.instruction_tokens[i] for t in asked] for i in rows]
    saved = once = 0
    if planned.first == "instruction":
        for t in asked:
            # Behind an instruction that differs by row nothing is shared, before it the system message still is.
            fixed = [t.system_tokens, t.instruction_tokens] if t.instruction_fixed else [t.system_tokens]
            if t.system_fixed:
                saved += sum(sum(part) for part in fixed)
                once += sum(part[0] for part in fixed if part)
    else:
        alike = Counter(t.system for t in asked)
        saved += sum(n - 1 for n in alike.values()) * sum(texts)
        for t in {t.system: t for t in asked}.values():
            n = alike[t.system]
            saved += (n if t.system_fixed else n - 1) * sum(t.system_tokens)
            once += t.system_tokens[0] if t.system_fixed and rows else 0
    each = sum(map(sum, whole))
    factor = sample.bytes_factor
    unfused = round(each * factor)
    tokens = min(unfused, round((each - saved) * factor) + once)
    written = sum(t.written for t in asked)
    longest = max((t.written for t in asked), default=0)
    too_long = sum(
        1 for row in whole if planned.max_tokens and max(row, default=0) + longest > planned.max_tokens
    )
    seconds, subtasks = passing_time(tokens, sample, seconds_per_token, prior_s, subtask_s)
    return PassEstimate(
        tokens=tokens,
        computed_tokens=tokens,
        unfused_tokens=unfused,
        truncated_rows=round(too_long * sample.rows_factor),
        seconds=seconds,
        subtasks=subtasks,
        # A condition may leave rows out.
        tokens_out=round(written * len(rows) * sample.rows_factor),
    )
