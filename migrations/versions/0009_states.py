"""For the states of a job, the moves between them, and the events of its end; and only indexes that serve.

A trigger holds the moves, whatever statement makes them; motet/states.py declares them. Of the six indexes that go
four served no statement, and four kept updates of running jobs from staying within their page (HOT). Blocks come by
COPY: their pages are left a tenth empty for it. Going down fails the jobs whose state an older version does not know.
"""

from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

UP = """
ALTER TABLE job DROP CONSTRAINT job_state_check,
  ADD CONSTRAINT job_state_check CHECK (
    state IN ('open', 'loading', 'running', 'paused', 'succeeded', 'failed', 'cancelled'));
COMMENT ON COLUMN job.state IS
  'open: rows keep coming; loading: an upload; running; paused: its rows wait; and three that no job leaves.';
DROP INDEX job_unfinished;
CREATE INDEX job_unfinished ON job (state, id) WHERE state IN ('open', 'loading', 'running', 'paused');

CREATE TABLE outbox (
  id        bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  tenant_id uuid NOT NULL REFERENCES tenant ON DELETE CASCADE,
  kind      text NOT NULL CHECK (kind IN ('job_ended')),
  job_id    uuid NOT NULL,
  body      jsonb NOT NULL,
  created   timestamptz NOT NULL DEFAULT clock_timestamp(),
  attempts  smallint NOT NULL DEFAULT 0,
  next_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
  delivered timestamptz
);
CREATE UNIQUE INDEX outbox_one_end ON outbox (job_id) WHERE kind = 'job_ended';
COMMENT ON TABLE outbox IS 'Events, written in the transaction of what they tell, and delivered at least once.';
COMMENT ON COLUMN outbox.job_id IS 'The job, which may have been removed since.';
COMMENT ON COLUMN outbox.body IS 'States, ids and counts; never a text of a user.';
COMMENT ON COLUMN outbox.attempts IS 'Deliveries tried so far.';
COMMENT ON COLUMN outbox.next_at IS 'When the next delivery is tried.';
COMMENT ON COLUMN outbox.delivered IS 'When it was delivered; NULL: not yet.';

DROP INDEX piece_due, lease_by_worker, lease_by_until, block_pass_unsealed, block_pass_uncarved, pass_waiting;
CREATE INDEX block_pass_ready ON block_pass (job_id, pass_number, block_number) WHERE state = 'ready';
ALTER TABLE block_pass SET (fillfactor = 90);
"""

MOVES = """
CREATE FUNCTION job_moves() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF NOT EXISTS (SELECT FROM (VALUES
      ('open', '{running,paused,failed,cancelled}'::text[]),
      ('loading', '{running,failed,cancelled}'),
      ('running', '{paused,succeeded,failed,cancelled}'),
      ('paused', '{open,running,failed,cancelled}')) moves (state, next)
      WHERE moves.state = OLD.state AND NEW.state = ANY(moves.next)) THEN
    RAISE check_violation USING MESSAGE = 'a job that is ' || OLD.state || ' never becomes ' || NEW.state;
  END IF;
  RETURN NEW;
END $$;
CREATE TRIGGER job_moves BEFORE UPDATE OF state ON job FOR EACH ROW
  WHEN (OLD.state IS DISTINCT FROM NEW.state) EXECUTE FUNCTION job_moves();
"""

DOWN = """
ALTER TABLE block_pass RESET (fillfactor);
CREATE TEMPORARY TABLE gone ON COMMIT DROP AS SELECT id FROM job WHERE state IN ('open', 'paused');
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
DROP TRIGGER job_moves ON job;
DROP FUNCTION job_moves;
DROP TABLE outbox;
DROP INDEX block_pass_ready, job_unfinished;
CREATE INDEX pass_waiting ON pass (job_id, number) WHERE rows_waiting > 0;
CREATE INDEX block_pass_uncarved ON block_pass (job_id, pass_number, block_number)
  WHERE state = 'ready' AND cursor < n;
CREATE INDEX block_pass_unsealed ON block_pass (job_id, pass_number, block_number)
  WHERE state = 'ready' AND done = n;
CREATE INDEX lease_by_until ON lease (until);
CREATE INDEX lease_by_worker ON lease (worker);
CREATE INDEX piece_due ON piece (not_before);
CREATE INDEX job_unfinished ON job (state, id) WHERE state IN ('loading', 'running');
COMMENT ON COLUMN job.state IS NULL;
ALTER TABLE job DROP CONSTRAINT job_state_check,
  ADD CONSTRAINT job_state_check CHECK (state IN ('loading', 'running', 'succeeded', 'failed', 'cancelled'));
"""


def upgrade() -> None:
    op.execute(UP)
    op.execute(MOVES)


def downgrade() -> None:
    op.execute(DOWN)
