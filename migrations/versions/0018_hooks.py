"""Webhooks: who is told of events, and each event on its way to each of them; and jobs that tell of single rows.

Events that are stored already are handed to nobody: there was no webhook when they were written.
"""

from alembic import op

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None

UP = """
ALTER TABLE job ADD COLUMN notify_when text,
  ADD COLUMN notify_needs smallint[] NOT NULL DEFAULT '{}',
  ADD COLUMN rows_matched bigint NOT NULL DEFAULT 0;
COMMENT ON COLUMN job.notify_when IS 'Each row for which this holds is an event; NULL: none is.';
COMMENT ON COLUMN job.notify_needs IS 'Numbers of the tasks whose answers it reads.';
COMMENT ON COLUMN job.rows_matched IS 'Rows for which it held so far.';

ALTER TABLE outbox DROP CONSTRAINT outbox_kind_check,
  ADD CONSTRAINT outbox_kind_check CHECK (kind IN ('job_ended', 'batch_ended', 'row_matched')),
  DROP COLUMN attempts, DROP COLUMN next_at,
  ALTER COLUMN job_id DROP NOT NULL;
COMMENT ON COLUMN outbox.job_id IS
  'The job, which may have been removed since; NULL: a batch ended before it had one.';
ALTER TABLE outbox RENAME COLUMN delivered TO handed;
UPDATE outbox SET handed = clock_timestamp();
CREATE INDEX outbox_new ON outbox (id) WHERE handed IS NULL;
COMMENT ON COLUMN outbox.body IS 'States, ids, counts, labels and numbers; never a text of a user.';
COMMENT ON COLUMN outbox.handed IS 'When the webhooks were found that it goes to; NULL: not yet.';

CREATE TABLE webhook (
  id         text PRIMARY KEY,
  tenant_id  uuid NOT NULL REFERENCES tenant ON DELETE CASCADE,
  url        text NOT NULL,
  kinds      text[] NOT NULL,
  job_id     uuid,
  secret     bytea NOT NULL,
  created    timestamptz NOT NULL DEFAULT clock_timestamp(),
  by         text NOT NULL DEFAULT '',
  failures   int NOT NULL DEFAULT 0,
  rest_until timestamptz NOT NULL DEFAULT '-infinity'
);
COMMENT ON TABLE webhook IS 'Addresses of a tenant that are told of events.';
COMMENT ON COLUMN webhook.kinds IS 'Kinds of events that it is told of.';
COMMENT ON COLUMN webhook.job_id IS 'It is told of this job alone, which may have been removed since; NULL: of all.';
COMMENT ON COLUMN webhook.secret IS 'Secret: keys the signature of each delivery, as Standard Webhooks has it.';
COMMENT ON COLUMN webhook.by IS 'Id of the token that asked for it.';
COMMENT ON COLUMN webhook.failures IS 'Tries in a row that failed.';
COMMENT ON COLUMN webhook.rest_until IS 'It is left alone until then.';

CREATE TABLE delivery (
  webhook_id text NOT NULL REFERENCES webhook ON DELETE CASCADE,
  event_id   bigint NOT NULL REFERENCES outbox ON DELETE CASCADE,
  state      text NOT NULL DEFAULT 'waiting' CHECK (state IN ('waiting', 'delivered', 'given_up')),
  happened   timestamptz NOT NULL,
  attempts   int NOT NULL DEFAULT 0,
  next_at    timestamptz NOT NULL DEFAULT clock_timestamp(),
  until      timestamptz NOT NULL,
  ended      timestamptz,
  said       text NOT NULL DEFAULT '',
  PRIMARY KEY (webhook_id, event_id)
);
CREATE INDEX delivery_by_event ON delivery (event_id);
CREATE INDEX delivery_due ON delivery (webhook_id, next_at) WHERE state = 'waiting';
COMMENT ON TABLE delivery IS 'An event on its way to a webhook.';
COMMENT ON COLUMN delivery.happened IS 'When the event was written.';
COMMENT ON COLUMN delivery.attempts IS 'Tries so far.';
COMMENT ON COLUMN delivery.next_at IS 'When it is tried next.';
COMMENT ON COLUMN delivery.until IS 'It is given up where it was not delivered by then.';
COMMENT ON COLUMN delivery.ended IS 'When it was delivered or given up.';
COMMENT ON COLUMN delivery.said IS 'Why the last try failed.';

CREATE TABLE deliverer (
  id     int PRIMARY KEY CHECK (id = 1),
  holder text NOT NULL DEFAULT '',
  until  timestamptz NOT NULL DEFAULT '-infinity'
);
INSERT INTO deliverer (id) VALUES (1);
COMMENT ON TABLE deliverer IS 'The one process that delivers events.';
COMMENT ON COLUMN deliverer.until IS 'Another process may deliver from then on.';
"""

DOWN = """
DROP TABLE deliverer;
DROP TABLE delivery;
DROP TABLE webhook;
DELETE FROM outbox WHERE kind <> 'job_ended';
ALTER TABLE outbox ALTER COLUMN job_id SET NOT NULL;
COMMENT ON COLUMN outbox.job_id IS 'The job, which may have been removed since.';
DROP INDEX outbox_new;
ALTER TABLE outbox RENAME COLUMN handed TO delivered;
UPDATE outbox SET delivered = NULL;
ALTER TABLE outbox DROP CONSTRAINT outbox_kind_check,
  ADD CONSTRAINT outbox_kind_check CHECK (kind IN ('job_ended')),
  ADD COLUMN attempts smallint NOT NULL DEFAULT 0,
  ADD COLUMN next_at timestamptz NOT NULL DEFAULT clock_timestamp();
COMMENT ON COLUMN outbox.body IS 'States, ids and counts; never a text of a user.';
COMMENT ON COLUMN outbox.attempts IS 'Deliveries tried so far.';
COMMENT ON COLUMN outbox.next_at IS 'When the next delivery is tried.';
COMMENT ON COLUMN outbox.delivered IS 'When it was delivered; NULL: not yet.';
ALTER TABLE job DROP COLUMN notify_when, DROP COLUMN notify_needs, DROP COLUMN rows_matched;
"""


def upgrade() -> None:
    op.execute(UP)


def downgrade() -> None:
    op.execute(DOWN)
