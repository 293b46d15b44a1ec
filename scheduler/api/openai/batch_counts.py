"""The lines of a batch that runs, counted: from its job's counts where each line is one row, else from blocks that are done.

What was counted of a block is kept, so that each is read once by a process that is asked.
"""

from __future__ import annotations

from scheduler.api.openai.batch_load import LINE
from scheduler.api.openai.counted_lines import CountedLines
from scheduler.api.resources import Resources
from scheduler.blocks import decode_block
from scheduler.store import batches as store
from scheduler.store.batches import OVER, StoredBatch
from scheduler.store.results import read_columns

#: Blocks read at once.
_BLOCKS = 8


def counted(use: Resources, batch: StoredBatch) -> tuple[int, int]:
    """Lines that are answered so far, and lines that failed: never more than there are, and exact once all are done.

    Exact at any time where each line is one row; else of the blocks that are done.
    """
    if batch.state in OVER:
        return batch.completed, batch.failed
    if batch.job_id is None or (not batch.rows_ok and not batch.rows_error):
        return 0, 0
    if batch.rows == batch.lines and not batch.beside:
        completed = min(batch.rows_ok or 0, batch.lines)
        return completed, min(batch.rows_error or 0, batch.lines - completed)
    known = use.counted_lines.get(batch.id)
    if known is None:
        known = CountedLines()
        use.counted_lines.put(batch.id, known)
    with known.lock:
        while True:
            with use.database.transaction() as connection:
                found = store.done_blocks(connection, batch.job_id, known.blocks, _BLOCKS)
                every = [column for _, _, _, of_block in found for column in of_block.values()]
                columns = read_columns(connection, every)
            if not found:
                return known.completed, known.failed
            for number, first_row, payload, of_block in found:
                notes = [str(told) for told in decode_block(payload).values[LINE]]
                known.add(number, first_row, notes, {n: columns[id_] for n, id_ in of_block.items()})
