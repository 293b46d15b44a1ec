"""What tasks of language models consumed, per block and per job. In the transaction that takes in the answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import Connection, text

from motet.protocol.columns import typed
from motet.protocol.wire import Spent
from scheduler.merge import BadColumn
from scheduler.policy.carve import Range


@dataclass(slots=True)
class Amount:
    """Sums over rows. Tokens are exact."""

    tokens_in: int = 0
    tokens_cached: int = 0
    tokens_out: int = 0
    device_s: float = 0.0

    def add(self, more: Amount) -> None:
        self.tokens_in += more.tokens_in
        self.tokens_cached += more.tokens_cached
        self.tokens_out += more.tokens_out
        self.device_s += more.device_s


def by_block(
    spent: Mapping[str, Spent], ranges: Sequence[Range], tasks: Mapping[str, int]
) -> dict[tuple[int, int], Amount]:
    """(block, task number) -> what an outcome says was consumed there. ``tasks``: number of each task that was asked.

    Raises BadColumn where it speaks of other tasks or another number of rows.
    """
    n_rows = sum(map(len, ranges))
    found: dict[tuple[int, int], Amount] = {}
    for name, arrays in spent.items():
        if name not in tasks:
            raise BadColumn("tokens of a task that was not asked")
        if len(arrays) != n_rows:
            raise BadColumn(f"tokens of {len(arrays)} rows, not {n_rows}")
        counts = [typed("I", raw) for raw in (arrays.tokens_in, arrays.tokens_cached, arrays.tokens_out)]
        seconds = typed("f", arrays.seconds)
        start = 0
        for r in ranges:
            end = start + len(r)
            tokens_in, cached, out = (sum(c[start:end]) for c in counts)
            amount = Amount(tokens_in, cached, out, sum(seconds[start:end]))
            found.setdefault((r.block, tasks[name]), Amount()).add(amount)
            start = end
    return found


_SPEND = text("""
    INSERT INTO spent (job_id, block_number, task_number, tokens_in, tokens_cached, tokens_out, device_s)
    SELECT :job, * FROM unnest(CAST(:blocks AS int[]), CAST(:tasks AS smallint[]), CAST(:tokens_in AS bigint[]),
                               CAST(:tokens_cached AS bigint[]), CAST(:tokens_out AS bigint[]),
                               CAST(:device_s AS double precision[]))
    ON CONFLICT (job_id, block_number, task_number) DO UPDATE
       SET tokens_in = spent.tokens_in + excluded.tokens_in, tokens_cached = spent.tokens_cached + excluded.tokens_cached,
           tokens_out = spent.tokens_out + excluded.tokens_out, device_s = spent.device_s + excluded.device_s""")


def spend(connection: Connection, job: UUID, amounts: Mapping[tuple[int, int], Amount]) -> Amount:
    """Add to what the job consumed in these (block, task). The sum of what was added."""
    total = Amount()
    if not amounts:
        return total
    for amount in amounts.values():
        total.add(amount)
    connection.execute(
        _SPEND,
        {
            "job": job,
            "blocks": [block for block, _ in amounts],
            "tasks": [task for _, task in amounts],
            **{
                name: [getattr(amount, name) for amount in amounts.values()]
                for name in ("tokens_in", "tokens_cached", "tokens_out", "device_s")
            },
        },
    )
    return total
