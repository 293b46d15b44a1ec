"""For language models: tasks that wait for answers of others, what was consumed of tokens, speed by the shape of a pass.

Going down fails unfinished jobs that only this version can run: others would wait for ever for what nobody releases.
"""

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

UP = """
ALTER TABLE pass ADD COLUMN needs smallint[] NOT NULL DEFAULT '{}',
  ADD COLUMN rate_key text NOT NULL DEFAULT '';
COMMENT ON COLUMN pass.needs IS
  'Numbers of the tasks whose cells it reads: a block of it waits until they are sealed there.';
COMMENT ON COLUMN pass.rate_key IS
  'Name under which its speed is learned, where a row costs differently than in other passes of its model; else empty: the trunk''s.';

ALTER TABLE block_pass ADD COLUMN row_order bytea;
ALTER TABLE block_pass ALTER row_order SET STORAGE EXTERNAL;
COMMENT ON COLUMN block_pass.row_order IS
  'As block.row_order, without the rows that a failed upstream cell has taken out; NULL: none was.';
COMMENT ON COLUMN block_pass.state IS
  'waiting: for cells that it reads; ready: it may be carved; sealed: its columns are merged.';
CREATE INDEX block_pass_waiting ON block_pass (job_id, block_number) WHERE state = 'waiting';

CREATE TABLE spent (
  job_id        uuid NOT NULL,
  block_number  int NOT NULL,
  task_number   smallint NOT NULL,
  tokens_in     bigint NOT NULL CHECK (tokens_in >= 0),
  tokens_cached bigint NOT NULL CHECK (tokens_cached >= 0),
  tokens_out    bigint NOT NULL CHECK (tokens_out >= 0),
  device_s      double precision NOT NULL CHECK (device_s >= 0),
  PRIMARY KEY (job_id, block_number, task_number),
  FOREIGN KEY (job_id, block_number) REFERENCES block ON DELETE CASCADE
);
COMMENT ON TABLE spent IS
  'What a task of a language model consumed in a block, over all accepted outcomes, those of rows that came back included.';
COMMENT ON COLUMN spent.tokens_in IS 'Tokens of its prompts.';
COMMENT ON COLUMN spent.tokens_cached IS 'Of them those that were computed for another task or row already.';
COMMENT ON COLUMN spent.tokens_out IS 'Tokens written.';
COMMENT ON COLUMN spent.device_s IS 'Seconds of devices: its share of each step.';

ALTER TABLE job ADD COLUMN tokens_cached bigint NOT NULL DEFAULT 0,
  ADD COLUMN tokens_out bigint NOT NULL DEFAULT 0;
COMMENT ON COLUMN job.tokens_cached IS 'Sum over its blocks and tasks, as in spent.';
COMMENT ON COLUMN job.tokens_out IS 'Sum over its blocks and tasks, as in spent.';
"""

DOWN = """
CREATE TEMPORARY TABLE gone ON COMMIT DROP AS
  SELECT DISTINCT j.id FROM job j JOIN pass p ON p.job_id = j.id JOIN model m ON m.id = p.model_id
   WHERE j.state IN ('loading', 'running') AND (p.needs <> '{}' OR m.manifest ->> 'answers' = 'text');
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
ALTER TABLE job DROP COLUMN tokens_out, DROP COLUMN tokens_cached;
DROP TABLE spent;
DROP INDEX block_pass_waiting;
COMMENT ON COLUMN block_pass.state IS NULL;
ALTER TABLE block_pass DROP COLUMN row_order;
ALTER TABLE pass DROP COLUMN rate_key, DROP COLUMN needs;
"""


def upgrade() -> None:
    op.execute(UP)


def downgrade() -> None:
    op.execute(DOWN)
