"""Passes with a condition: tasks that run on some rows only, by what other tasks answered."""

from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("ALTER TABLE pass ADD COLUMN condition text")
    op.execute(
        "COMMENT ON COLUMN pass.condition IS 'It runs on the rows for which this holds; null: on all.'"
    )


def downgrade() -> None:
    op.execute("ALTER TABLE pass DROP COLUMN condition")
