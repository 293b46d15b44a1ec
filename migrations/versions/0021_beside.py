"""Batches say whether tasks are asked beside their lines, which was worked out of the tasks' specs for every read."""

from alembic import op

revision = "0021"
down_revision = "0020"
branch_labels = None
depends_on = None

UP = """
ALTER TABLE batch ADD COLUMN beside boolean NOT NULL DEFAULT false;
COMMENT ON COLUMN batch.beside IS
  'Tasks are asked beside its lines, so that a row may have several cells; known once the lines were checked.';
UPDATE batch SET beside = true WHERE ended IS NULL AND EXISTS (
  SELECT 1 FROM task t WHERE t.job_id = batch.job_id
     AND t.spec->>'messages' IS DISTINCT FROM '{asked}' AND t.spec->>'about' IS DISTINCT FROM '{asked}'
     AND t.spec->>'input' IS DISTINCT FROM '{asked}' AND t.spec->>'query' IS DISTINCT FROM '{asked}');
"""

DOWN = "ALTER TABLE batch DROP COLUMN beside"


def upgrade() -> None:
    op.execute(UP)


def downgrade() -> None:
    op.execute(DOWN)
