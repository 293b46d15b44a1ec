"""Pictures in small, made by the client, for people who look through a job's rows."""

from alembic import op

revision = "0022"
down_revision = "0021"
branch_labels = None
depends_on = None

UP = """
ALTER TABLE medium ADD COLUMN thumb bytea;
ALTER TABLE medium ALTER COLUMN thumb SET STORAGE EXTERNAL;
COMMENT ON COLUMN medium.thumb IS 'A JPEG of it in small, for pages, as its sender made it; NULL: nobody sent one.';
"""

DOWN = """
ALTER TABLE medium DROP COLUMN thumb;
"""


def upgrade() -> None:
    op.execute(UP)


def downgrade() -> None:
    op.execute(DOWN)
