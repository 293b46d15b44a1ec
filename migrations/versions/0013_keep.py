"""For open jobs that run for months: rows are kept for a time and deleted from the front, and asks are counted.

Open jobs from before keep their rows until they are removed, as they were told. Going down keeps what is left: an
older version ends a job whose front is gone with the cells of that front as skipped.
"""

from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

UP = """
ALTER TABLE job
  ADD COLUMN keep_s      double precision CHECK (keep_s > 0),
  ADD COLUMN first_block int NOT NULL DEFAULT 0,
  ADD COLUMN first_row   bigint NOT NULL DEFAULT 0,
  ADD COLUMN past_done   int NOT NULL DEFAULT 0,
  ADD COLUMN past_ok      bigint NOT NULL DEFAULT 0,
  ADD COLUMN past_error   bigint NOT NULL DEFAULT 0,
  ADD COLUMN past_skipped bigint NOT NULL DEFAULT 0,
  ADD CONSTRAINT past_cells_are_counted
    CHECK (past_ok <= cells_ok AND past_error <= cells_error AND past_skipped <= cells_skipped);
ALTER TABLE block ADD COLUMN done_at timestamptz;
UPDATE block SET done_at = clock_timestamp() FROM job
 WHERE job.id = block.job_id AND job.state = 'open' AND block.done_number IS NOT NULL;
COMMENT ON COLUMN job.keep_s IS 'Seconds for which an open job keeps a row after it was answered; NULL: until it is removed.';
COMMENT ON COLUMN job.first_block IS 'From this block on all are kept; before it only those that were answered late.';
COMMENT ON COLUMN job.first_row IS 'Index of the first row of that block.';
COMMENT ON COLUMN job.past_done IS 'Blocks whose done_number is no larger are deleted.';
COMMENT ON COLUMN job.past_ok IS 'Cells of deleted blocks; they are in cells_ok as well.';
COMMENT ON COLUMN job.past_error IS 'As past_ok.';
COMMENT ON COLUMN job.past_skipped IS 'As past_ok.';
COMMENT ON COLUMN block.done_at IS 'When all of it was answered by work, or landed answered in an open job: its age counts from there.';

CREATE TABLE ask_span (
  job_id    uuid NOT NULL REFERENCES job ON DELETE CASCADE,
  at        timestamptz NOT NULL,
  process   text NOT NULL,
  n_rows    int NOT NULL,
  answered  int NOT NULL,
  late      int NOT NULL,
  refused   int NOT NULL,
  failed    int NOT NULL,
  waiting   int NOT NULL,
  times     int[] NOT NULL,
  PRIMARY KEY (job_id, at, process)
);
COMMENT ON TABLE ask_span IS 'Asks of an open job that one API process ended in one span of seconds. Kept for minutes.';
COMMENT ON COLUMN ask_span.at IS 'Start of the span, on the clock of that process.';
COMMENT ON COLUMN ask_span.process IS 'Name of the API process: each gathers and counts by itself.';
COMMENT ON COLUMN ask_span.n_rows IS 'Rows of the asks that were answered.';
COMMENT ON COLUMN ask_span.answered IS 'Asks that were answered in time.';
COMMENT ON COLUMN ask_span.late IS 'Asks whose callers gave up.';
COMMENT ON COLUMN ask_span.refused IS 'Asks that were told to come back.';
COMMENT ON COLUMN ask_span.failed IS 'Asks that ended in another error.';
COMMENT ON COLUMN ask_span.waiting IS 'Rows that waited to land at the end of the span.';
COMMENT ON COLUMN ask_span.times IS 'Asks answered, by how long they took: scheduler/ask_times.py has the bounds.';
"""

DOWN = """
DROP TABLE ask_span;
ALTER TABLE block DROP COLUMN done_at;
ALTER TABLE job
  DROP CONSTRAINT past_cells_are_counted,
  DROP COLUMN keep_s, DROP COLUMN first_block, DROP COLUMN first_row, DROP COLUMN past_done,
  DROP COLUMN past_ok, DROP COLUMN past_error, DROP COLUMN past_skipped;
"""


def upgrade() -> None:
    op.execute(UP)


def downgrade() -> None:
    op.execute(DOWN)
