"""For placement by load: what was learned of speed in full, paces of single workers, load times, second leases.

Rates learned so far are dropped: they say too little, and are learned again within seconds.
"""

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

UP = """
DROP TABLE rate;
CREATE TABLE rate (
  trunk           text NOT NULL,
  device          text NOT NULL,
  numerics        text NOT NULL,
  coefficients    double precision[] NOT NULL CHECK (cardinality(coefficients) = 4),
  covariance      double precision[] NOT NULL CHECK (cardinality(covariance) = 16),
  bytes_per_token double precision NOT NULL,
  tokens_per_row  double precision NOT NULL,
  observations    bigint NOT NULL,
  updated         timestamptz NOT NULL DEFAULT clock_timestamp(),
  PRIMARY KEY (trunk, device, numerics)
);
COMMENT ON TABLE rate IS 'What was learned of a trunk''s speed on a kind of device, so that a restart forgets nothing.';
COMMENT ON COLUMN rate.trunk IS 'Digest of the trunk, or of a model that shares none.';
COMMENT ON COLUMN rate.device IS 'Name of the kind of device, such as NVIDIA H200.';
COMMENT ON COLUMN rate.numerics IS 'Numeric class: fast or exact.';
COMMENT ON COLUMN rate.coefficients IS 'Seconds of a sub-task, a row, a token, a squared length in tokens.';
COMMENT ON COLUMN rate.covariance IS 'Of the coefficients, row by row: how much each may still change.';
COMMENT ON COLUMN rate.bytes_per_token IS 'UTF-8 bytes that a token stands for in texts seen lately.';
COMMENT ON COLUMN rate.tokens_per_row IS 'Length of the rows seen lately.';
COMMENT ON COLUMN rate.observations IS 'Outcomes that it was learned from; 0: a guess.';
COMMENT ON COLUMN rate.updated IS 'When the last of them came.';

CREATE TABLE pace (
  worker       text PRIMARY KEY,
  pace         double precision NOT NULL,
  observations bigint NOT NULL,
  updated      timestamptz NOT NULL DEFAULT clock_timestamp()
);
COMMENT ON TABLE pace IS 'Workers beside their kind: finds the device that is silently slow.';
COMMENT ON COLUMN pace.worker IS 'Its name, which outlives its restarts.';
COMMENT ON COLUMN pace.pace IS 'Its seconds for what takes its kind one second.';
COMMENT ON COLUMN pace.observations IS 'Outcomes that it was learned from.';
COMMENT ON COLUMN pace.updated IS 'When the last outcome of this worker came.';

CREATE TABLE load_time (
  model   text NOT NULL,
  device  text NOT NULL,
  seconds double precision NOT NULL,
  updated timestamptz NOT NULL DEFAULT clock_timestamp(),
  PRIMARY KEY (model, device)
);
COMMENT ON TABLE load_time IS 'How long loading takes: what a placement pays where the model is not resident.';
COMMENT ON COLUMN load_time.model IS 'Digest of the model that is loaded.';
COMMENT ON COLUMN load_time.device IS 'Name of the kind of device.';
COMMENT ON COLUMN load_time.seconds IS 'A mean in which late loads weigh most; heads that were loaded with it included.';
COMMENT ON COLUMN load_time.updated IS 'When it was loaded last.';

ALTER TABLE lease ADD COLUMN clone boolean NOT NULL DEFAULT false,
  ADD COLUMN device_kind text NOT NULL DEFAULT '';
COMMENT ON COLUMN lease.clone IS 'A second lease of an open sub-task, beside a straggler.';
COMMENT ON COLUMN lease.device_kind IS 'cuda or cpu, as the worker says: what is guessed of a device that nothing was learned of.';
"""

DOWN = """
ALTER TABLE lease DROP COLUMN device_kind, DROP COLUMN clone;
DROP TABLE load_time, pace, rate;
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


def upgrade() -> None:
    op.execute(UP)


def downgrade() -> None:
    op.execute(DOWN)
