"""For training runs: how far each of them is, and where it goes on after its worker was lost.

Going down forgets that, and fails unfinished training jobs: only this version can run them.
"""

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

UP = """
CREATE TABLE fit (
  job_id     uuid NOT NULL REFERENCES job ON DELETE CASCADE,
  row_index  bigint NOT NULL CHECK (row_index >= 0),
  reports    jsonb NOT NULL DEFAULT '{}',
  checkpoint text,
  files      text[] NOT NULL DEFAULT '{}',
  told       timestamptz NOT NULL DEFAULT clock_timestamp(),
  PRIMARY KEY (job_id, row_index)
);
COMMENT ON TABLE fit IS 'One training run: a row of a training job, as the worker that runs it tells.';
COMMENT ON COLUMN fit.reports IS 'Key of an epoch -> loss and scores. An attempt that does it again replaces it.';
COMMENT ON COLUMN fit.checkpoint IS 'Sha256 of the blob with which another attempt goes on; NULL: there is none, or no need.';
COMMENT ON COLUMN fit.files IS 'Sha256 of the blobs that came out: kept as long as the job, named by a model or not.';
"""

DOWN = """
CREATE TEMPORARY TABLE gone ON COMMIT DROP AS
  SELECT id FROM job WHERE kind = 'train' AND state IN ('loading', 'running');
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
DROP TABLE fit;
"""


def upgrade() -> None:
    op.execute(UP)


def downgrade() -> None:
    op.execute(DOWN)
