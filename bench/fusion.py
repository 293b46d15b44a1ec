"""What fusion gains: four tasks on one text as one pass, against a pass per task, and what it costs where nothing is shared.

fusion_gain       seconds of four jobs of one task each / seconds of one job of the four tasks, both through a whole
                  cluster (two CPU workers, results stored), in turn; at the same numeric class
fusion_cost_k1    seconds of a pass with one head in motet's engine / the same micro-batches through the bare trunk
                  and that head in plain torch (bench/bare.py), in turn, in one process
real_token_share  tokens of the rows / tokens computed, padding included, of the fused job; the texts are tweets among
                  news articles, so that lengths have a long tail
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from bare import Bare, micro_batches
from engine import Alone
from harness import EXACT, cluster, finish, in_turn, options, ratio, say, table, texts, timed

from motet import Classify, Client

#: A micro-batch of the single-head comparison.
BUDGET_TOKENS = 1024
HEAD = "news-topics"


def main() -> None:
    arguments = options(__doc__).parse_args()
    size = arguments.size
    rows, rounds = size.of(full=(2000, 2), quick=(600, 1), smoke=(12, 1))
    alone_rows, alone_rounds = size.of(full=(200, 9), quick=(60, 5), smoke=(4, 1))
    sample = texts(rows)
    alone = one_head(sample[:alone_rows], alone_rounds)
    shares: list[float] = []
    computed: dict[str, int] = {}
    with (
        cluster(size.of(full=2, quick=2, smoke=1)) as running,
        Client(running.url, running.tokens["user"]) as client,
    ):

        def fused() -> None:
            job = client.submit(sample, EXACT, reuse=False, progress=False)
            job.wait()
            computed["fused"] = job.usage["computed_tokens"]
            shares.append(job.usage["tokens"] / computed["fused"])

        def unfused() -> None:
            jobs = [
                client.submit(sample, {name: task}, reuse=False, progress=False)
                for name, task in EXACT.items()
            ]
            for job in jobs:
                job.wait()
            computed["unfused"] = sum(job.usage["computed_tokens"] for job in jobs)

        for _ in range(size.of(full=3, quick=1, smoke=1)):
            client.submit(sample[:400], EXACT, reuse=False, progress=False).wait()
        say(f"{rows:,} texts x {len(EXACT)} tasks; seconds:")
        found = in_turn({"fused": lambda: timed(fused), "unfused": lambda: timed(unfused)}, rounds)
    table(
        "one pass for four tasks, and a pass for each",
        ("", "median s", "rows/s", "tokens computed"),
        [
            (side, f"{statistics.median(s):.1f}", f"{rows / statistics.median(s):.0f}", f"{computed[side]:,}")
            for side, s in found.items()
        ],
    )
    k1 = ratio(alone, "motet", "bare")
    say(f"one head alone: {k1:.4f} of the bare trunk and head")
    keys = {
        "fusion_gain": round(ratio(found, "unfused", "fused"), 3),
        "fusion_cost_k1": round(k1, 4),
        "real_token_share": round(statistics.median(shares), 4),
    }
    details = {"rows": rows, "seconds": found, "computed_tokens": computed, "one_head_seconds": alone}
    finish("fusion", keys, arguments, details=details)


def one_head(sample: Sequence[str], rounds: int) -> dict[str, list[float]]:
    """Seconds of the same micro-batches through motet's engine and through plain torch, a single head on the trunk."""
    engine = Alone({"topic": Classify(HEAD)})
    bare = Bare([HEAD])
    rows = engine.prepare(sample)
    batches = list(micro_batches([row.length for row in rows], BUDGET_TOKENS))
    prepared = [[rows[i] for i in batch] for batch in batches]
    ids = bare.read(sample)
    read = [[ids[i] for i in batch] for batch in batches]
    assert [list(map(len, b)) for b in read] == [[row.length for row in b] for b in prepared]

    def ours() -> float:
        return timed(lambda: [engine.run(batch) for batch in prepared])

    def theirs() -> float:
        return timed(lambda: [bare.answer(batch) for batch in read])

    ours(), theirs()
    return in_turn({"motet": ours, "bare": theirs}, rounds, told=lambda *_: None)


if __name__ == "__main__":
    main()
