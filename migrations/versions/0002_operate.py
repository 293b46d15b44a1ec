"""For whoever operates motet: drained workers, and how long jobs are kept.

A job that is too large to be deleted at once is given to nobody (the tenant without a name), so that no one sees
it any more while its storage is freed slice by slice.
"""

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

UP = """
CREATE TABLE drained (
  worker text PRIMARY KEY,
  host   text NOT NULL DEFAULT '',
  since  timestamptz NOT NULL DEFAULT clock_timestamp(),
  by     text NOT NULL DEFAULT '',
  seen   timestamptz NOT NULL DEFAULT clock_timestamp()
);
COMMENT ON TABLE drained IS 'Workers that get no more work until somebody resumes them; a restart changes nothing.';
COMMENT ON COLUMN drained.by IS 'Id of the token that drained it.';
COMMENT ON COLUMN drained.seen IS 'When it was last heard of, to the hour: one that is long gone is forgotten.';

ALTER TABLE job ADD COLUMN retention_days double precision CHECK (retention_days > 0);
COMMENT ON COLUMN job.retention_days IS
  'Days after its end at which the job is deleted; NULL: as the cluster keeps all others. The sooner one counts.';
COMMENT ON COLUMN job.deadline IS 'A job that has not ended by then fails; what is done stays.';
CREATE INDEX job_ended ON job (finished) WHERE finished IS NOT NULL;
CREATE INDEX sealed_column_unshown ON sealed_column (id) WHERE refs <= 0;

INSERT INTO tenant (name) VALUES ('') ON CONFLICT (name) DO NOTHING;
COMMENT ON TABLE tenant IS
  'Whose jobs, tokens and columns these are; nothing is shared across tenants. The one without a name is nobody: it has jobs that are being removed.';
"""

DOWN = """
DELETE FROM tenant WHERE name = '';
COMMENT ON TABLE tenant IS 'Whose jobs, tokens and columns these are; nothing is shared across tenants.';
DROP INDEX sealed_column_unshown;
DROP INDEX job_ended;
COMMENT ON COLUMN job.deadline IS NULL;
ALTER TABLE job DROP COLUMN retention_days;
DROP TABLE drained;
"""


def upgrade() -> None:
    op.execute(UP)


def downgrade() -> None:
    op.execute(DOWN)
