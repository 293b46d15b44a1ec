"""Rows of a block that begin alike: they stay side by side, and no sub-task parts them."""

from alembic import op

revision = "0020"
down_revision = "0019"
branch_labels = None
depends_on = None

UP = """
ALTER TABLE block ADD COLUMN groups bytea;
COMMENT ON COLUMN block.groups IS
  'uint32 little-endian: offsets of the rows at which groups begin that no sub-task parts; NULL: there are none.';
COMMENT ON COLUMN block.row_order IS
  'uint32 little-endian: offsets of the rows that some task can be asked, longest first, those that begin alike side by side.';
"""

DOWN = """
COMMENT ON COLUMN block.row_order IS
  'uint32 little-endian: offsets of the rows that some task can be asked, longest first.';
ALTER TABLE block DROP COLUMN groups;
"""


def upgrade() -> None:
    op.execute(UP)


def downgrade() -> None:
    op.execute(DOWN)
