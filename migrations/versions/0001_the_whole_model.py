"""The whole data model: leader, tenants, registry, jobs, blocks, passes, sub-tasks, leases, cells, columns.

Every table carries its meaning as a COMMENT, so that psql's ``\\d+`` is the documentation.
"""

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

TABLES = r"""
CREATE TABLE leader (
  id        int PRIMARY KEY CHECK (id = 1),
  epoch     bigint NOT NULL,
  holder    text NOT NULL,
  until     timestamptz NOT NULL,
  transport text NOT NULL DEFAULT ''
);
COMMENT ON TABLE leader IS 'The one dispatcher that leads. Every transaction of the scheduler checks its epoch first.';
COMMENT ON COLUMN leader.transport IS 'Identity of Redis as last seen: another one means that what it held is gone.';
INSERT INTO leader VALUES (1, 0, '', '-infinity');

CREATE TABLE tenant (
  id        uuid PRIMARY KEY DEFAULT gen_random_uuid(),
  name      text NOT NULL UNIQUE,
  weight    real NOT NULL DEFAULT 1 CHECK (weight > 0),
  row_quota bigint,
  created   timestamptz NOT NULL DEFAULT clock_timestamp()
);
COMMENT ON TABLE tenant IS 'Whose jobs, tokens and columns these are; nothing is shared across tenants.';
COMMENT ON COLUMN tenant.weight IS 'Share of device-seconds relative to other tenants.';
COMMENT ON COLUMN tenant.row_quota IS 'Rows in unfinished jobs at most; NULL: no limit.';

CREATE TABLE token (
  id            text PRIMARY KEY,
  tenant_id     uuid NOT NULL REFERENCES tenant ON DELETE CASCADE,
  name          text NOT NULL,
  scope         text NOT NULL CHECK (scope IN ('user', 'read', 'admin', 'worker')),
  secret_sha256 bytea NOT NULL,
  created       timestamptz NOT NULL DEFAULT clock_timestamp(),
  expires       timestamptz,
  revoked       timestamptz
);
COMMENT ON TABLE token IS 'Who may ask: an id in clear, and the hash of its secret.';
COMMENT ON COLUMN token.secret_sha256 IS 'The secret has 256 random bits, so a plain hash is enough.';

CREATE TABLE blob (
  sha256  text PRIMARY KEY CHECK (sha256 ~ '^[0-9a-f]{64}$'),
  bytes   bigint NOT NULL,
  created timestamptz NOT NULL DEFAULT clock_timestamp()
);
COMMENT ON TABLE blob IS 'Content-addressed files that lie in the blob folder behind the API.';

CREATE TABLE model (
  id       bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  name     text NOT NULL,
  version  text NOT NULL,
  digest   text NOT NULL,
  trunk    text NOT NULL,
  manifest jsonb NOT NULL,
  created  timestamptz NOT NULL DEFAULT clock_timestamp(),
  UNIQUE (name, version)
);
COMMENT ON TABLE model IS 'The registry: what may be loaded. A version never changes its meaning.';
COMMENT ON COLUMN model.digest IS 'Sha256 of all that decides its answers: part of every reuse key.';
COMMENT ON COLUMN model.trunk IS 'Tasks whose models have one trunk fuse into one pass.';

CREATE TABLE job (
  id              uuid PRIMARY KEY,
  tenant_id       uuid NOT NULL REFERENCES tenant ON DELETE CASCADE,
  name            text NOT NULL DEFAULT '',
  kind            text NOT NULL DEFAULT 'infer' CHECK (kind IN ('infer', 'train')),
  state           text NOT NULL DEFAULT 'loading'
                  CHECK (state IN ('loading', 'running', 'succeeded', 'failed', 'cancelled')),
  reason          text NOT NULL DEFAULT '',
  priority        smallint NOT NULL DEFAULT 1 CHECK (priority IN (0, 1, 2)),
  reuse           boolean NOT NULL DEFAULT true,
  bad_rows        text NOT NULL DEFAULT 'refuse' CHECK (bad_rows IN ('refuse', 'error')),
  deadline        timestamptz,
  fields          text[] NOT NULL,
  n_tasks         int NOT NULL CHECK (n_tasks > 0),
  n_rows          bigint NOT NULL DEFAULT 0,
  n_blocks        int NOT NULL DEFAULT 0,
  n_parts         int NOT NULL DEFAULT 0,
  blocks_done     int NOT NULL DEFAULT 0,
  cells_ok        bigint NOT NULL DEFAULT 0,
  cells_error     bigint NOT NULL DEFAULT 0,
  cells_skipped   bigint NOT NULL DEFAULT 0,
  cells_reused    bigint NOT NULL DEFAULT 0,
  tokens          bigint NOT NULL DEFAULT 0,
  computed_tokens bigint NOT NULL DEFAULT 0,
  text_bytes      bigint NOT NULL DEFAULT 0,
  busy_s          double precision NOT NULL DEFAULT 0,
  subtasks        bigint NOT NULL DEFAULT 0,
  attempts_lost   bigint NOT NULL DEFAULT 0,
  version         bigint NOT NULL DEFAULT 1,
  idempotency_key text,
  request_digest  bytea NOT NULL,
  created         timestamptz NOT NULL DEFAULT clock_timestamp(),
  touched         timestamptz NOT NULL DEFAULT clock_timestamp(),
  started         timestamptz,
  finished        timestamptz,
  UNIQUE (tenant_id, idempotency_key),
  CONSTRAINT every_cell_at_most_once CHECK (cells_ok + cells_error + cells_skipped <= n_rows * n_tasks),
  CONSTRAINT every_cell_accounted_for CHECK (
    state NOT IN ('succeeded', 'failed', 'cancelled') OR cells_ok + cells_error + cells_skipped = n_rows * n_tasks)
);
CREATE INDEX job_newest ON job (tenant_id, created DESC, id DESC);
CREATE INDEX job_unfinished ON job (state, id) WHERE state IN ('loading', 'running');
COMMENT ON TABLE job IS 'N rows x K tasks, submitted together, or a training run.';
COMMENT ON COLUMN job.version IS 'Grows with every change that a watcher should see.';
COMMENT ON COLUMN job.touched IS 'Last part received: an upload that stays silent is abandoned.';

CREATE TABLE part (
  job_id uuid NOT NULL REFERENCES job ON DELETE CASCADE,
  number int NOT NULL,
  digest bytea NOT NULL,
  n_rows int NOT NULL,
  n_bad  int NOT NULL,
  PRIMARY KEY (job_id, number)
);
COMMENT ON TABLE part IS 'Parts of the upload received so far: a part sent twice is answered, not stored twice.';

CREATE TABLE pass (
  job_id        uuid NOT NULL REFERENCES job ON DELETE CASCADE,
  number        smallint NOT NULL,
  kind          text NOT NULL,
  model_id      bigint NOT NULL REFERENCES model,
  numerics      text NOT NULL CHECK (numerics IN ('fast', 'exact')),
  max_tokens    int NOT NULL,
  input         text NOT NULL,
  rows_waiting  bigint NOT NULL DEFAULT 0,
  bytes_waiting bigint NOT NULL DEFAULT 0,
  PRIMARY KEY (job_id, number)
);
COMMENT ON TABLE pass IS 'One model pass that answers several tasks at once: what fusion makes of tasks.';
COMMENT ON COLUMN pass.kind IS 'The name that Flower shows; few in number, never an id.';
COMMENT ON COLUMN pass.rows_waiting IS 'Rows beyond the cursors of ready blocks, pieces included.';

CREATE INDEX pass_waiting ON pass (job_id, number) WHERE rows_waiting > 0;

CREATE TABLE task (
  job_id      uuid NOT NULL REFERENCES job ON DELETE CASCADE,
  number      smallint NOT NULL,
  name        text NOT NULL,
  pass_number smallint NOT NULL,
  model_id    bigint NOT NULL REFERENCES model,
  kind        text NOT NULL,
  spec        jsonb NOT NULL,
  labels      text[] NOT NULL DEFAULT '{}',
  digest      bytea NOT NULL,
  PRIMARY KEY (job_id, number),
  UNIQUE (job_id, name)
);
COMMENT ON TABLE task IS 'One named AI operation asked of every row of a job, and the model that answers it.';
COMMENT ON COLUMN task.digest IS 'Of the spec and its model: with the digest of a block''s fields, the reuse key.';
CREATE INDEX task_by_model ON task (model_id);
CREATE INDEX pass_by_model ON pass (model_id);

CREATE TABLE block (
  job_id    uuid NOT NULL REFERENCES job ON DELETE CASCADE,
  number    int NOT NULL,
  first_row bigint NOT NULL,
  n_rows    int NOT NULL CHECK (n_rows > 0),
  n_work    int NOT NULL,
  bytes     bigint NOT NULL,
  row_order bytea NOT NULL,
  lengths   bytea NOT NULL,
  payload   bytea NOT NULL,
  bad       jsonb NOT NULL DEFAULT '{}',
  keys      bytea[] NOT NULL DEFAULT '{}',
  passes_open smallint NOT NULL,
  done_number int,
  PRIMARY KEY (job_id, number)
);
ALTER TABLE block ALTER payload SET STORAGE EXTERNAL, ALTER row_order SET STORAGE EXTERNAL,
  ALTER lengths SET STORAGE EXTERNAL;
CREATE UNIQUE INDEX block_done ON block (job_id, done_number) WHERE done_number IS NOT NULL;
COMMENT ON TABLE block IS 'Contiguous rows, stored together: the unit of storage, sealing and reuse.';
COMMENT ON COLUMN block.row_order IS 'uint32 little-endian: offsets of the rows that work is done on, longest first.';
COMMENT ON COLUMN block.lengths IS 'uint32 little-endian: UTF-8 bytes of each field, all rows of the first field, then the next.';
COMMENT ON COLUMN block.payload IS 'msgpack under zstd: field -> texts in row order.';
COMMENT ON COLUMN block.bad IS 'Offset -> [error, message] of rows that came in broken: error cells of every task.';
COMMENT ON COLUMN block.keys IS 'Reuse key of each task number (element 1 is task 0); NULL: this column is not for reuse.';
COMMENT ON COLUMN block.done_number IS 'The how-manieth block of its job to be finished, from 1.';

CREATE TABLE block_pass (
  job_id       uuid NOT NULL,
  pass_number  smallint NOT NULL,
  block_number int NOT NULL,
  state        text NOT NULL CHECK (state IN ('waiting', 'ready', 'sealed')),
  todo         bigint NOT NULL,
  n            int NOT NULL,
  cursor       int NOT NULL DEFAULT 0 CHECK (cursor BETWEEN 0 AND n),
  done         int NOT NULL DEFAULT 0 CHECK (done BETWEEN 0 AND n),
  PRIMARY KEY (job_id, pass_number, block_number),
  FOREIGN KEY (job_id, block_number) REFERENCES block ON DELETE CASCADE,
  FOREIGN KEY (job_id, pass_number) REFERENCES pass ON DELETE CASCADE
);
CREATE INDEX block_pass_uncarved ON block_pass (job_id, pass_number, block_number)
  WHERE state = 'ready' AND cursor < n;
COMMENT ON TABLE block_pass IS 'How far a pass has come in a block: carved up to the cursor, done rows, sealed.';
COMMENT ON COLUMN block_pass.todo IS 'Bit i: the job''s task number i is to be computed here (the others were reused).';
COMMENT ON COLUMN block_pass.n IS 'Rows to do: those in row_order that no failed upstream cell has taken out.';

CREATE TABLE piece (
  id           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  job_id       uuid NOT NULL,
  pass_number  smallint NOT NULL,
  block_number int NOT NULL,
  lo           int NOT NULL,
  hi           int NOT NULL CHECK (hi > lo),
  bytes        bigint NOT NULL,
  tries        smallint NOT NULL DEFAULT 0,
  deaths       smallint NOT NULL DEFAULT 0,
  exclusive    boolean NOT NULL DEFAULT false,
  not_before   timestamptz NOT NULL DEFAULT '-infinity',
  FOREIGN KEY (job_id, pass_number, block_number) REFERENCES block_pass ON DELETE CASCADE
);
CREATE INDEX piece_by_pass ON piece (job_id, pass_number, block_number);
CREATE INDEX piece_due ON piece (not_before);
COMMENT ON TABLE piece IS 'Rows of a block, [lo, hi) in its order, that came back and wait to be carved again.';
COMMENT ON COLUMN piece.tries IS 'Times that these rows came back with a retriable error.';
COMMENT ON COLUMN piece.deaths IS 'Times that a worker died while these rows were in its running micro-batch.';
COMMENT ON COLUMN piece.exclusive IS 'Suspected of killing its worker: runs with nothing beside it.';

CREATE TABLE subtask (
  id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  job_id      uuid NOT NULL,
  pass_number smallint NOT NULL,
  state       text NOT NULL DEFAULT 'open' CHECK (state IN ('open', 'done', 'lost', 'failed')),
  blocks      int[] NOT NULL,
  los         int[] NOT NULL,
  his         int[] NOT NULL,
  sizes       bigint[] NOT NULL,
  todo        bigint NOT NULL,
  n_rows      int NOT NULL,
  bytes       bigint NOT NULL,
  tries       smallint NOT NULL DEFAULT 0,
  deaths      smallint NOT NULL DEFAULT 0,
  exclusive   boolean NOT NULL DEFAULT false,
  attempts    smallint NOT NULL DEFAULT 0,
  worker      text NOT NULL DEFAULT '',
  busy_s      real NOT NULL DEFAULT 0,
  tokens      bigint NOT NULL DEFAULT 0,
  created     timestamptz NOT NULL DEFAULT clock_timestamp(),
  closed      timestamptz,
  FOREIGN KEY (job_id, pass_number) REFERENCES pass ON DELETE CASCADE
);
CREATE INDEX subtask_open ON subtask (job_id, pass_number) WHERE state = 'open';
CREATE INDEX subtask_by_job ON subtask (job_id, id);
COMMENT ON TABLE subtask IS 'A slice of rows x one pass: the unit of queueing, lease and retry. It closes once.';
COMMENT ON COLUMN subtask.sizes IS 'UTF-8 bytes of each range.';
COMMENT ON COLUMN subtask.blocks IS 'With los and his: the ranges [lo, hi) of each block''s order, in sub-task order.';

CREATE TABLE lease (
  subtask_id  bigint NOT NULL REFERENCES subtask ON DELETE CASCADE,
  attempt     smallint NOT NULL,
  worker      text NOT NULL,
  boot        text NOT NULL,
  nonce       text NOT NULL,
  device      text NOT NULL DEFAULT '',
  predicted_s real NOT NULL,
  leased      timestamptz NOT NULL DEFAULT clock_timestamp(),
  until       timestamptz NOT NULL,
  PRIMARY KEY (subtask_id, attempt)
);
CREATE INDEX lease_by_worker ON lease (worker);
CREATE INDEX lease_by_until ON lease (until);
COMMENT ON TABLE lease IS 'Live leases only: the right of one attempt to run one open sub-task. A clone is a second one.';

CREATE TABLE cells (
  job_id       uuid NOT NULL,
  pass_number  smallint NOT NULL,
  block_number int NOT NULL,
  subtask_id   bigint NOT NULL,
  lo           int NOT NULL,
  hi           int NOT NULL CHECK (hi > lo),
  columns      bytea NOT NULL,
  PRIMARY KEY (job_id, pass_number, block_number, subtask_id, lo),
  FOREIGN KEY (job_id, pass_number, block_number) REFERENCES block_pass ON DELETE CASCADE
);
ALTER TABLE cells ALTER columns SET STORAGE EXTERNAL;
COMMENT ON TABLE cells IS 'Answers of done sub-tasks for [lo, hi) of a block''s order, until the (block, pass) is sealed.';

CREATE TABLE sealed_column (
  id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  tenant_id  uuid NOT NULL REFERENCES tenant ON DELETE CASCADE,
  key        bytea,
  refs       int NOT NULL DEFAULT 1,
  kind       text NOT NULL,
  n_rows     int NOT NULL,
  n_ok       int NOT NULL,
  n_error    int NOT NULL,
  n_skipped  int NOT NULL,
  status     bytea,
  errors     jsonb,
  offsets    int4[],
  codes      int2[],
  scores     real[],
  all_scores real[],
  numbers    double precision[],
  starts     int4[],
  ends       int4[],
  texts      bytea,
  vectors    bytea,
  dim        int NOT NULL DEFAULT 0,
  dtype      text NOT NULL DEFAULT ''
);
ALTER TABLE sealed_column ALTER vectors SET STORAGE EXTERNAL;
CREATE UNIQUE INDEX sealed_column_by_key ON sealed_column (tenant_id, key) WHERE key IS NOT NULL;
COMMENT ON TABLE sealed_column IS 'All answers of one task in one block, in row order, as flat typed arrays.';
COMMENT ON COLUMN sealed_column.key IS 'Reuse key: digest of fields, task and model. NULL: not to be reused.';
COMMENT ON COLUMN sealed_column.refs IS 'Blocks of jobs that show this column; removed at 0.';
COMMENT ON COLUMN sealed_column.status IS 'A byte per row: 0 ok, 1 error, 2 skipped, +16 truncated. NULL: all ok.';
COMMENT ON COLUMN sealed_column.texts IS 'UTF-8 JSON values end to end, cut by offsets.';

CREATE TABLE block_column (
  job_id       uuid NOT NULL,
  block_number int NOT NULL,
  task_number  smallint NOT NULL,
  column_id    bigint NOT NULL REFERENCES sealed_column,
  PRIMARY KEY (job_id, block_number, task_number),
  FOREIGN KEY (job_id, block_number) REFERENCES block ON DELETE CASCADE
);
COMMENT ON TABLE block_column IS 'Which sealed column a block of a job shows for a task.';
CREATE INDEX block_column_by_column ON block_column (column_id);

CREATE INDEX block_pass_unsealed ON block_pass (job_id, pass_number, block_number)
  WHERE state = 'ready' AND done = n;

CREATE TABLE refusal (
  model_id bigint NOT NULL REFERENCES model ON DELETE CASCADE,
  worker   text NOT NULL,
  boot     text NOT NULL,
  why      text NOT NULL,
  at       timestamptz NOT NULL DEFAULT clock_timestamp(),
  PRIMARY KEY (model_id, worker)
);
COMMENT ON TABLE refusal IS 'Workers that cannot load a model, as of that boot: it is not placed there again.';

CREATE TABLE rate (
  trunk             text NOT NULL,
  device            text NOT NULL,
  numerics          text NOT NULL,
  seconds_per_token double precision NOT NULL,
  bytes_per_token   double precision NOT NULL,
  observations      bigint NOT NULL,
  updated           timestamptz NOT NULL DEFAULT clock_timestamp(),
  PRIMARY KEY (trunk, device, numerics)
);
COMMENT ON TABLE rate IS 'What was learned of speed, so that a restart forgets nothing.';
"""

FUNCTIONS = r"""
-- IEEE half precision, little-endian, to real.
CREATE FUNCTION half_to_real(raw bytea, at int) RETURNS real IMMUTABLE STRICT PARALLEL SAFE LANGUAGE sql AS $$
  SELECT CASE
    WHEN e = 0  THEN (s * f * power(2::float8, -24))::real
    WHEN e = 31 THEN (CASE WHEN f <> 0 THEN 'NaN' WHEN s < 0 THEN '-Infinity' ELSE 'Infinity' END)::real
    ELSE (s * (1024 + f) * power(2::float8, e - 25))::real END
  FROM (SELECT CASE WHEN hi >= 128 THEN -1 ELSE 1 END AS s, (hi & 124) >> 2 AS e, ((hi & 3) << 8) | lo AS f
        FROM (SELECT get_byte(raw, at) AS lo, get_byte(raw, at + 1) AS hi) b) p
$$;

-- IEEE single precision, little-endian, to real.
CREATE FUNCTION single_to_real(raw bytea, at int) RETURNS real IMMUTABLE STRICT PARALLEL SAFE LANGUAGE sql AS $$
  SELECT CASE
    WHEN e = 0   THEN (s * f * power(2::float8, -149))::real
    WHEN e = 255 THEN (CASE WHEN f <> 0 THEN 'NaN' WHEN s < 0 THEN '-Infinity' ELSE 'Infinity' END)::real
    ELSE (s * (8388608 + f) * power(2::float8, e - 150))::real END
  FROM (SELECT CASE WHEN b3 >= 128 THEN -1 ELSE 1 END AS s, ((b3 & 127) << 1) | (b2 >> 7) AS e,
               ((b2 & 127) << 16) | (b1 << 8) | b0 AS f
        FROM (SELECT get_byte(raw, at) AS b0, get_byte(raw, at + 1) AS b1,
                     get_byte(raw, at + 2) AS b2, get_byte(raw, at + 3) AS b3) b) p
$$;

CREATE FUNCTION vector_at(c sealed_column, i int) RETURNS real[] STABLE PARALLEL SAFE LANGUAGE sql AS $$
  SELECT CASE c.dtype
    WHEN 'fp16' THEN (SELECT array_agg(half_to_real(c.vectors, (i * c.dim + d) * 2) ORDER BY d)
                      FROM generate_series(0, c.dim - 1) d)
    ELSE (SELECT array_agg(single_to_real(c.vectors, (i * c.dim + d) * 4) ORDER BY d)
          FROM generate_series(0, c.dim - 1) d) END
$$;
COMMENT ON FUNCTION vector_at IS 'The vector of row i (from 0) of a sealed column.';

-- One pass over the arrays: plpgsql keeps them expanded, so element i costs the same for every i.
CREATE FUNCTION column_cells(c sealed_column, labels text[])
RETURNS TABLE (i int, status text, value jsonb) STABLE LANGUAGE plpgsql AS $$
DECLARE
  s int; lo int; hi int;
  offsets int4[] := c.offsets; codes int2[] := c.codes; scores real[] := c.scores;
  numbers float8[] := c.numbers; starts int4[] := c.starts; ends int4[] := c.ends;
BEGIN
  -- A loop's variable hides an output column of the same name: hence k beside i.
  FOR k IN 0 .. c.n_rows - 1 LOOP
    i := k;
    s := CASE WHEN c.status IS NULL THEN 0 ELSE get_byte(c.status, i) & 15 END;
    status := CASE s WHEN 0 THEN 'ok' WHEN 1 THEN 'error' ELSE 'skipped' END;
    value := NULL;
    IF s <> 0 THEN
      value := c.errors -> i::text;
    ELSIF c.kind = 'label' THEN
      value := jsonb_build_object('label', labels[codes[i + 1] + 1], 'score', scores[i + 1]);
    ELSIF c.kind = 'number' THEN
      value := to_jsonb(numbers[i + 1]);
    ELSIF c.kind = 'vector' THEN
      value := to_jsonb(vector_at(c, i));
    ELSE
      lo := offsets[i + 1]; hi := offsets[i + 2];
      IF c.kind = 'labels' THEN
        SELECT coalesce(jsonb_agg(jsonb_build_object('label', labels[codes[j] + 1], 'score', scores[j]) ORDER BY j), '[]')
          INTO value FROM generate_series(lo + 1, hi) j;
      ELSIF c.kind = 'spans' THEN
        SELECT coalesce(jsonb_agg(jsonb_build_object('start', starts[j], 'end', ends[j],
                 'label', labels[codes[j] + 1], 'score', scores[j]) ORDER BY j), '[]')
          INTO value FROM generate_series(lo + 1, hi) j;
      ELSE
        value := convert_from(substring(c.texts FROM lo + 1 FOR hi - lo), 'UTF8')::jsonb;
      END IF;
    END IF;
    RETURN NEXT;
  END LOOP;
END $$;

CREATE VIEW results AS
  SELECT b.job_id, b.first_row + v.i AS row, t.name AS task, v.status, v.value
    FROM block b
    JOIN block_column bc ON bc.job_id = b.job_id AND bc.block_number = b.number
    JOIN task t ON t.job_id = bc.job_id AND t.number = bc.task_number
    JOIN sealed_column c ON c.id = bc.column_id,
    LATERAL column_cells(c, t.labels) v;
COMMENT ON VIEW results IS 'One line per sealed cell: job_id, row, task, status, value. Ask for one job_id.';

CREATE VIEW merged AS
  SELECT job_id, row, jsonb_object_agg(task, jsonb_build_object('status', status, 'value', value)) AS cells
    FROM results GROUP BY job_id, row;
COMMENT ON VIEW merged IS 'One line per row, with all its cells. Ask for one job_id: others would be merged as well.';
"""

DOWN = """
DROP VIEW merged, results;
DROP FUNCTION column_cells, vector_at, single_to_real, half_to_real;
DROP TABLE refusal, rate, block_column, sealed_column, cells, lease, subtask, piece, block_pass, block, task, pass, part,
  job, model, blob, token, tenant, leader;
"""


def upgrade() -> None:
    op.execute(TABLES)
    # Not through the text parser of SQLAlchemy, which would take ":name" in a function's body for a parameter.
    op.get_bind().exec_driver_sql(FUNCTIONS.replace("%", "%%"))


def downgrade() -> None:
    op.execute(DOWN)
