"""What an attempt counts of itself: exact, whatever micro-batches its rows ran in."""

from __future__ import annotations

from motet.protocol.manifest import Manifest
from motet.protocol.wire import Assignment, TaskOrder, Usage
from motet.tasks import Generate, Number
from workers.engine import Prepared
from workers.run.work import Work, ask_of

MODEL = Manifest(name="m", version="1", engine="fake", answers="number")


def test_squares_are_those_of_the_true_lengths_however_rows_were_batched() -> None:
    order = Assignment(
        subtask=1,
        attempt=1,
        nonce="n",
        job="j",
        tenant="t",
        pass_kind="fake",
        model=MODEL,
        numerics="fast",
        max_tokens=0,
        tasks=(TaskOrder(name="size", spec=Number(MODEL.ref).to_json(), manifest=MODEL),),
        texts=("aaaaa", "aaa", "é"),
    )
    work = Work.of(order, "fp32", 1)
    rows = [
        Prepared(row=i, length=length, truncated=False, inputs=None) for i, length in enumerate((5, 3, 1))
    ]
    work.charge(rows[:2], computed_tokens=10, busy_s=0.5)
    work.charge(rows[2:], computed_tokens=1, busy_s=0.25)
    assert work.usage == Usage(
        tokens=9, computed_tokens=11, text_bytes=10, micro_batches=2, busy_s=0.75, squares=35
    )


def test_rows_with_prompts_of_their_own_keep_the_order_in_which_they_were_carved() -> None:
    """There those that begin alike are side by side; a step of whole batches wants the longest first, as all others do."""
    model = Manifest(name="lm", version="1", engine="fake", answers="text")
    rows = [
        Prepared(row=i, length=length, truncated=False, inputs=None) for i, length in enumerate((5, 9, 1))
    ]

    def waiting(task: Generate, *, streamed: bool) -> list[int]:
        order = Assignment(
            subtask=1,
            attempt=1,
            nonce="n",
            job="j",
            tenant="t",
            pass_kind="fake",
            model=model,
            numerics="fast",
            max_tokens=0,
            tasks=(TaskOrder(name="it", spec=task.to_json(), manifest=model),),
            texts=("a", "b", "c"),
        )
        work = Work.of(order, "fp32", 1)
        work.prepared(rows, streamed=streamed)
        gone = work.rows[:2]
        del work.rows[:2]
        work.wait_again(gone)
        return [row.row for row in work.rows]

    own = Generate("lm", prompt="", about="{asked}", options="{options}")
    assert waiting(own, streamed=True) == [0, 1, 2]
    assert waiting(own, streamed=False) == [1, 0, 2]
    assert waiting(Generate("lm", prompt="Go on."), streamed=True) == [1, 0, 2]


def test_tasks_that_differ_in_thinking_ask_different_things() -> None:
    model = Manifest(name="lm", version="1", engine="fake", answers="text")
    asks = {
        ask_of(
            TaskOrder(
                name="it", spec=Generate("lm", prompt="Go on.", thinking=thinking).to_json(), manifest=model
            )
        )
        for thinking in (None, True, False)
    }
    assert len(asks) == 3
