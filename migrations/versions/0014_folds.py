"""For folded state: what an open job remembers of the rows of a key."""

from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None

UP = """
ALTER TABLE job ADD COLUMN folds jsonb;
COMMENT ON COLUMN job.folds IS 'Name -> spec of what is folded of its rows (motet/folds.py); NULL: nothing.';
CREATE INDEX job_folding ON job (id) WHERE folds IS NOT NULL;
CREATE TABLE fold (
  job_id uuid NOT NULL REFERENCES job ON DELETE CASCADE,
  key    bytea NOT NULL,
  state  bytea NOT NULL,
  until  timestamptz,
  PRIMARY KEY (job_id, key)
) WITH (fillfactor = 70);
CREATE INDEX fold_until ON fold (until) WHERE until IS NOT NULL;
COMMENT ON TABLE fold IS 'What an open job remembers of the rows of a key, as of the newest landing.';
COMMENT ON COLUMN fold.key IS 'Keyed digest of the template of the key and its typed value.';
COMMENT ON COLUMN fold.state IS 'Envelope: an entry for each fold of the template, in order of their names (scheduler/policy/folds.py).';
COMMENT ON COLUMN fold.until IS 'Nothing of it counts from then on; NULL: as long as its job is open.';
"""

DOWN = """
DROP TABLE fold;
ALTER TABLE job DROP COLUMN folds;
"""


def upgrade() -> None:
    op.execute(UP)


def downgrade() -> None:
    op.execute(DOWN)
