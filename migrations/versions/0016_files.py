"""For OpenAI's doors: files that users upload, batches over them, and the open job behind each door."""

from alembic import op

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None

UP = """
CREATE TABLE file (
  id        text NOT NULL PRIMARY KEY,
  tenant_id uuid NOT NULL REFERENCES tenant ON DELETE CASCADE,
  purpose   text NOT NULL,
  filename  text NOT NULL,
  bytes     bigint NOT NULL CHECK (bytes >= 0),
  sha256    text NOT NULL,
  created   timestamptz NOT NULL DEFAULT clock_timestamp(),
  expires   timestamptz
);
CREATE INDEX file_newest ON file (tenant_id, created DESC, id DESC);
CREATE INDEX file_by_blob ON file (sha256);
CREATE INDEX file_expiring ON file (expires) WHERE expires IS NOT NULL;
COMMENT ON TABLE file IS 'A file that a user uploaded, or that a batch wrote. Its bytes are a blob.';
COMMENT ON COLUMN file.purpose IS 'What for, in OpenAI''s words: batch, batch_output ….';
COMMENT ON COLUMN file.expires IS 'When it is deleted; NULL: never.';
CREATE TABLE batch (
  id               text NOT NULL PRIMARY KEY,
  tenant_id        uuid NOT NULL REFERENCES tenant ON DELETE CASCADE,
  endpoint         text NOT NULL,
  input_file       text NOT NULL,
  input_sha256     text NOT NULL,
  "window"         text NOT NULL,
  notes            jsonb,
  priority         text NOT NULL DEFAULT 'normal',
  output_expires_s double precision,
  state            text NOT NULL DEFAULT 'validating' CHECK (state IN ('validating', 'in_progress', 'finalizing', 'completed', 'failed', 'expired', 'cancelling', 'cancelled')),
  job_id           uuid REFERENCES job ON DELETE SET NULL,
  models           jsonb,
  lines            integer NOT NULL DEFAULT 0,
  completed        integer NOT NULL DEFAULT 0,
  failed           integer NOT NULL DEFAULT 0,
  usage            jsonb,
  errors           jsonb,
  output_file      text,
  error_file       text,
  idempotency_key  text,
  request_digest   bytea NOT NULL,
  created          timestamptz NOT NULL DEFAULT clock_timestamp(),
  expires          timestamptz NOT NULL,
  in_progress      timestamptz,
  finalizing       timestamptz,
  cancelling       timestamptz,
  ended            timestamptz,
  owner            text NOT NULL DEFAULT '',
  owned_until      timestamptz NOT NULL DEFAULT '-infinity',
  tries            smallint NOT NULL DEFAULT 0,
  CHECK (completed + failed <= lines),
  UNIQUE (tenant_id, idempotency_key)
);
CREATE INDEX batch_newest ON batch (tenant_id, created DESC, id DESC);
CREATE INDEX batch_by_job ON batch (job_id) WHERE job_id IS NOT NULL;
CREATE INDEX batch_by_input ON batch (input_sha256);
CREATE INDEX batch_unfinished ON batch (created) WHERE ended IS NULL;
COMMENT ON TABLE batch IS 'A file of requests in OpenAI''s form, run as one job.';
COMMENT ON COLUMN batch.input_file IS 'Id of the file, which may have been deleted since.';
COMMENT ON COLUMN batch.input_sha256 IS 'Its blob, which is kept until the batch has ended.';
COMMENT ON COLUMN batch."window" IS 'Time in which it must be done, as the user wrote it.';
COMMENT ON COLUMN batch.notes IS 'The user''s metadata.';
COMMENT ON COLUMN batch.output_expires_s IS 'Seconds for which its files are kept; NULL: as long as all others.';
COMMENT ON COLUMN batch.job_id IS 'The job that runs it; NULL before its lines were checked.';
COMMENT ON COLUMN batch.models IS 'Names of models in its lines -> name@version: fixed once the lines were checked.';
COMMENT ON COLUMN batch.lines IS 'Requests in the file, once they were counted.';
COMMENT ON COLUMN batch.completed IS 'Lines with an answer; final once it has ended.';
COMMENT ON COLUMN batch.failed IS 'Lines without; final once it has ended.';
COMMENT ON COLUMN batch.usage IS 'Tokens, as OpenAI tells them.';
COMMENT ON COLUMN batch.errors IS 'Why its file was refused: [{code, message, param, line}].';
COMMENT ON COLUMN batch.request_digest IS 'Keyed digest of the request: the same one sent again makes no second batch.';
COMMENT ON COLUMN batch.ended IS 'When it came to a state that it never leaves.';
COMMENT ON COLUMN batch.owner IS 'The process that works on it.';
COMMENT ON COLUMN batch.owned_until IS 'Another process takes over what is not done by then.';
COMMENT ON COLUMN batch.tries IS 'Times that a process took it without bringing it further.';
CREATE TABLE door (
  tenant_id uuid NOT NULL REFERENCES tenant ON DELETE CASCADE,
  endpoint  text NOT NULL,
  model_id  bigint NOT NULL REFERENCES model,
  job_id    uuid NOT NULL REFERENCES job ON DELETE CASCADE,
  used      timestamptz NOT NULL DEFAULT clock_timestamp(),
  PRIMARY KEY (tenant_id, endpoint, model_id)
);
CREATE INDEX door_idle ON door (used);
CREATE INDEX door_by_job ON door (job_id);
CREATE INDEX door_by_model ON door (model_id);
COMMENT ON TABLE door IS 'The open job that answers a tenant''s requests to one endpoint and model, while it is used.';
COMMENT ON COLUMN door.used IS 'When somebody asked last, about.';
"""

DOWN = "DROP TABLE door; DROP TABLE batch; DROP TABLE file"


def upgrade() -> None:
    op.execute(UP)


def downgrade() -> None:
    op.execute(DOWN)
