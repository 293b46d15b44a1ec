"""For rows of which one field is bad: an error in the tasks that read it, and a row like any other to all the rest.

Going down fails the unfinished jobs that have such rows: an older version would take them for empty texts.
"""

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

UP = """
ALTER TABLE block ADD COLUMN bad_fields jsonb NOT NULL DEFAULT '{}';
COMMENT ON COLUMN block.bad_fields IS
  'Field -> [[error, message, [offset, ...]], ...] of values that came in broken: error cells of the tasks that read it.';
COMMENT ON COLUMN block.n_work IS 'Rows that some task can be asked.';
COMMENT ON COLUMN block.row_order IS 'uint32 little-endian: offsets of the rows that some task can be asked, longest first.';
COMMENT ON COLUMN block_pass.n IS
  'Rows to do: those in row_order that a task of the pass can be asked and no failed upstream cell has taken out.';
COMMENT ON COLUMN block_pass.row_order IS
  'As block.row_order, without the rows that no task of the pass can be asked, or a failed upstream cell has taken out; NULL: none was.';
"""

DOWN = """
CREATE TEMPORARY TABLE gone ON COMMIT DROP AS
  SELECT id FROM job WHERE state IN ('loading', 'running')
     AND EXISTS (SELECT FROM block b WHERE b.job_id = job.id AND b.bad_fields <> '{}');
UPDATE job SET state = 'failed', reason = 'motet was taken back to a version that cannot run it',
       finished = clock_timestamp(), version = version + 1,
       cells_ok = k.ok, cells_error = k.error, cells_skipped = n_rows * n_tasks - k.ok - k.error
  FROM (SELECT g.id, CAST(coalesce(sum(s.n_ok), 0) AS bigint) AS ok, CAST(coalesce(sum(s.n_error), 0) AS bigint) AS error
          FROM gone g LEFT JOIN block_column b ON b.job_id = g.id LEFT JOIN sealed_column s ON s.id = b.column_id
         GROUP BY g.id) k
 WHERE job.id = k.id;
DELETE FROM lease USING subtask s, gone WHERE lease.subtask_id = s.id AND s.job_id = gone.id;
UPDATE subtask SET state = 'lost', closed = clock_timestamp() FROM gone WHERE job_id = gone.id AND state = 'open';
DELETE FROM piece USING gone WHERE job_id = gone.id;
DELETE FROM cells USING gone WHERE job_id = gone.id;
UPDATE pass SET rows_waiting = 0, bytes_waiting = 0 FROM gone WHERE job_id = gone.id;
DROP TABLE gone;
ALTER TABLE block DROP COLUMN bad_fields;
COMMENT ON COLUMN block.n_work IS NULL;
COMMENT ON COLUMN block.row_order IS 'uint32 little-endian: offsets of the rows that work is done on, longest first.';
COMMENT ON COLUMN block_pass.n IS 'Rows to do: those in row_order that no failed upstream cell has taken out.';
COMMENT ON COLUMN block_pass.row_order IS
  'As block.row_order, without the rows that a failed upstream cell has taken out; NULL: none was.';
"""


def upgrade() -> None:
    op.execute(UP)


def downgrade() -> None:
    op.execute(DOWN)
