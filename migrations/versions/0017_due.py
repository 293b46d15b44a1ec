"""For callers of open jobs who read along, or who give their rows up.

Going down forgets who read along, and lets rows that were to be dropped be computed.
"""

from alembic import op

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None

UP = """
ALTER TABLE block ADD COLUMN due timestamptz, ADD COLUMN say text NOT NULL DEFAULT '';
CREATE INDEX block_due ON block (due) WHERE due IS NOT NULL AND done_number IS NULL;
COMMENT ON COLUMN block.due IS 'What no worker has begun by then is skipped: its callers are gone. NULL: they wait for ever.';
COMMENT ON COLUMN block.say IS 'The API process whose callers read along as text is written; empty: nobody does.';
"""

DOWN = """
DROP INDEX block_due;
ALTER TABLE block DROP COLUMN due, DROP COLUMN say;
"""


def upgrade() -> None:
    op.execute(UP)


def downgrade() -> None:
    op.execute(DOWN)
