"""Ray Data as it is usually written: a stage per task, batches of 32 as they come."""

from __future__ import annotations

import statistics

import numpy as np
import ray
import trunk
from work import Work, do


class Stage:
    """One task; each of its actors has a model of its own."""

    def __init__(self, task: str) -> None:
        self.task, self.trunk = task, trunk.Trunk()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {**batch, **self.trunk.one_task(self.task, batch["text"].tolist())}


def run(texts: list[str], processes: int) -> trunk.Answers:
    rows = ray.data.from_items([{"row": row, "text": text} for row, text in enumerate(texts)])
    for task in trunk.TASKS:
        # Two actors for each of four stages on two cores: with a core each, they would wait for each other for ever.
        rows = rows.map_batches(
            Stage, fn_constructor_args=(task,), batch_size=32, concurrency=processes, num_cpus=0.2
        )
    found = list(rows.iter_batches(batch_size=None, batch_format="numpy"))
    return trunk.merge(
        len(texts), [(b.pop("row"), {k: v for k, v in b.items() if k != "text"}) for b in found]
    )


def main(work: Work) -> None:
    ray.init(num_cpus=work.processes, include_dashboard=False, logging_level="ERROR", _temp_dir=str(work.out))
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        found = run(work.texts, work.processes)
        # The actors load their models when the rows come: the work begins when, on average, an actor was there.
        work.ready(at=statistics.mean(work.loaded()))
        work.done(found)
    finally:
        ray.shutdown()


if __name__ == "__main__":
    do(main)
