"""For open jobs: rows that keep coming, from any number of callers, until the job is closed.

Going down fails the open jobs: an older version would wait for ever for their next part.
"""

from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

UP = """
ALTER TABLE job DROP CONSTRAINT job_state_check;
ALTER TABLE job ADD CONSTRAINT job_state_check
  CHECK (state IN ('open', 'loading', 'running', 'paused', 'succeeded', 'failed', 'cancelled'));
ALTER TABLE job
  ADD COLUMN keep_s double precision CHECK (keep_s > 0),
  ADD COLUMN first_block int NOT NULL DEFAULT 0,
  ADD COLUMN past_ok bigint NOT NULL DEFAULT 0,
  ADD COLUMN past_error bigint NOT NULL DEFAULT 0,
  ADD COLUMN past_skipped bigint NOT NULL DEFAULT 0,
  ADD CONSTRAINT a_training_run_is_never_open CHECK (state <> 'open' OR kind = 'infer'),
  ADD CONSTRAINT past_cells_are_counted
    CHECK (past_ok <= cells_ok AND past_error <= cells_error AND past_skipped <= cells_skipped);
COMMENT ON COLUMN job.keep_s IS 'Of an open job: seconds for which its rows are kept once they are answered; NULL: no open job.';
COMMENT ON COLUMN job.first_block IS 'The first block that is still there: those before it were kept long enough.';
COMMENT ON COLUMN job.past_ok IS 'Cells that are ok in blocks that are gone; past_error and past_skipped likewise.';
ALTER TABLE block ADD COLUMN landed timestamptz, ADD COLUMN due timestamptz;
COMMENT ON COLUMN block.landed IS 'When its rows landed in an open job; NULL: in no open job.';
COMMENT ON COLUMN block.due IS 'Where nothing of it was carved by then, its rows are skipped as late; NULL: never.';
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
COMMENT ON COLUMN ask.key IS 'Digest of the caller''s key.';
COMMENT ON COLUMN ask.digest IS 'Digest of its rows: the same key with other rows is a conflict.';
"""

DOWN = """
CREATE TEMPORARY TABLE gone ON COMMIT DROP AS SELECT id FROM job WHERE keep_s IS NOT NULL AND state IN ('open', 'running');
UPDATE job SET state = 'failed', reason = 'motet was taken back to a version that cannot run it',
       finished = clock_timestamp(), version = version + 1,
       cells_ok = past_ok + k.ok, cells_error = past_error + k.error,
       cells_skipped = n_rows * n_tasks - past_ok - k.ok - past_error - k.error
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
ALTER TABLE block DROP COLUMN landed, DROP COLUMN due;
ALTER TABLE job DROP COLUMN keep_s, DROP COLUMN first_block,
  DROP COLUMN past_ok, DROP COLUMN past_error, DROP COLUMN past_skipped;
ALTER TABLE job DROP CONSTRAINT a_training_run_is_never_open;
ALTER TABLE job DROP CONSTRAINT job_state_check;
ALTER TABLE job ADD CONSTRAINT job_state_check
  CHECK (state IN ('loading', 'running', 'succeeded', 'failed', 'cancelled'));
"""


def upgrade() -> None:
    op.execute(UP)


def downgrade() -> None:
    op.execute(DOWN)
