"""For uploads that are run while they come: when a job was closed, apart from when its first rows could run.

Going down: an older version runs nothing of an upload before it is closed. Leases of one run out there, as those of
lost workers do, and its rows are carved again once it is closed.
"""

from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

UP = """
ALTER TABLE job ADD COLUMN closed timestamptz;
COMMENT ON COLUMN job.closed IS 'When no more rows could come; NULL: they can, or it ended before.';
COMMENT ON COLUMN job.started IS
  'When its first rows landed, or an open job was opened: from then on they are carved.';
UPDATE job SET closed = touched
 WHERE state IN ('running', 'succeeded') OR state IN ('failed', 'cancelled') AND started IS NOT NULL AND n_parts > 0;
UPDATE job SET started = touched WHERE state = 'loading' AND n_parts > 0;
ALTER TABLE job ADD CONSTRAINT only_a_closed_job_runs_to_its_end
  CHECK (state NOT IN ('running', 'succeeded') OR closed IS NOT NULL);
"""

DOWN = """
UPDATE job SET started = closed WHERE n_parts > 0;
ALTER TABLE job DROP CONSTRAINT only_a_closed_job_runs_to_its_end, DROP COLUMN closed;
COMMENT ON COLUMN job.started IS NULL;
"""


def upgrade() -> None:
    op.execute(UP)


def downgrade() -> None:
    op.execute(DOWN)
