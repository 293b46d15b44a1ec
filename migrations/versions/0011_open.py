"""For open jobs: rows that keep coming, from any number of callers, until the job is closed.

Going down fails the open jobs: an older version would wait for ever for their next part.
"""

from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

UP = """
ALTER TABLE job ADD CONSTRAINT a_training_run_is_never_open CHECK (state <> 'open' OR kind = 'infer');
CREATE TABLE ask (
  job_id       uuid NOT NULL,
  key          bytea NOT NULL,
  digest       bytea NOT NULL,
  block_number int NOT NULL,
  lo           int NOT NULL CHECK (lo >= 0),
  n_rows       int NOT NULL CHECK (n_rows > 0),
  PRIMARY KEY (job_id, key),
  FOREIGN KEY (job_id, block_number) REFERENCES block ON DELETE CASCADE
);
CREATE INDEX ask_by_block ON ask (job_id, block_number);
COMMENT ON TABLE ask IS 'One caller''s rows in an open job: [lo, lo + n_rows) of a block. A key names one run of rows.';
COMMENT ON COLUMN ask.key IS 'Keyed digest of the caller''s key.';
COMMENT ON COLUMN ask.digest IS 'Keyed digest of its rows: the same key with other rows is a conflict.';
"""

DOWN = """
CREATE TEMPORARY TABLE gone ON COMMIT DROP AS SELECT id FROM job WHERE state = 'open';
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
DROP TABLE ask;
ALTER TABLE job DROP CONSTRAINT a_training_run_is_never_open;
"""


def upgrade() -> None:
    op.execute(UP)


def downgrade() -> None:
    op.execute(DOWN)
