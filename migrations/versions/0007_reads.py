"""A pass is priced by what it reads: how often each field, and how many tokens its bytes have turned out to be.

Passes that were planned before read each field once, as they were priced until now. Going down guesses what waits: let jobs end first.
"""

from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

UP = """
ALTER TABLE pass ADD COLUMN reads int[] NOT NULL DEFAULT '{}',
  ADD COLUMN bytes_beside int NOT NULL DEFAULT 0,
  ADD COLUMN bytes_done bigint NOT NULL DEFAULT 0,
  ADD COLUMN tokens bigint NOT NULL DEFAULT 0;
COMMENT ON COLUMN pass.reads IS 'How often it reads each of the job''s fields, in their order; empty: each once.';
COMMENT ON COLUMN pass.bytes_beside IS 'UTF-8 bytes that it reads of a row beside the fields: its templates'' own, and other tasks'' answers, about.';
COMMENT ON COLUMN pass.bytes_done IS 'Sum of the bytes of its sub-tasks that are done, by which they were priced.';
COMMENT ON COLUMN pass.tokens IS 'Sum of the tokens that these sub-tasks had.';
ALTER TABLE job DROP COLUMN text_bytes;
ALTER TABLE block_pass ADD COLUMN bytes bigint NOT NULL DEFAULT 0;
COMMENT ON COLUMN block_pass.bytes IS 'UTF-8 bytes that the pass reads of the rows that work is done on.';
UPDATE block_pass w SET bytes = CAST(w.n AS bigint) * b.bytes / greatest(1, b.n_rows)
  FROM block b WHERE w.state = 'waiting' AND b.job_id = w.job_id AND b.number = w.block_number;
"""

DOWN = """
UPDATE pass SET bytes_waiting = rows_waiting * k.row_bytes
  FROM (SELECT job_id, CAST(sum(bytes) / sum(n_rows) AS bigint) AS row_bytes FROM block GROUP BY job_id) k
 WHERE pass.job_id = k.job_id AND rows_waiting > 0;
ALTER TABLE block_pass DROP COLUMN bytes;
ALTER TABLE job ADD COLUMN text_bytes bigint NOT NULL DEFAULT 0;
ALTER TABLE pass DROP COLUMN tokens, DROP COLUMN bytes_done, DROP COLUMN bytes_beside, DROP COLUMN reads;
"""


def upgrade() -> None:
    op.execute(UP)


def downgrade() -> None:
    op.execute(DOWN)
