"""For aliases: names such as ``support@prod`` that mean one version of a model now, and every step they made.

Going down forgets them; jobs name the version that an alias meant when they came, so none of them changes.
"""

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

UP = """
CREATE TABLE alias_step (
  id       bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  name     text NOT NULL,
  alias    text NOT NULL,
  what     text NOT NULL CHECK (what IN ('promoted', 'rolled back', 'removed')),
  version  text NOT NULL,
  model_id bigint REFERENCES model ON DELETE SET NULL,
  before   bigint REFERENCES alias_step,
  by       text NOT NULL DEFAULT '',
  at       timestamptz NOT NULL DEFAULT clock_timestamp()
);
COMMENT ON TABLE alias_step IS 'Every step of every alias, for good: who let it mean which version, and when.';
COMMENT ON COLUMN alias_step.name IS 'Of the model.';
COMMENT ON COLUMN alias_step.version IS 'What the alias means from this step on; of one that was removed: what it meant.';
COMMENT ON COLUMN alias_step.model_id IS 'That version; NULL: it is deleted, and what bears its name now may be another model.';
COMMENT ON COLUMN alias_step.before IS 'The step that a rollback from here goes back to; NULL: nothing stood before.';
COMMENT ON COLUMN alias_step.by IS 'Id of the token that asked for it.';
CREATE INDEX alias_step_by_model ON alias_step (model_id);

CREATE TABLE alias (
  name     text NOT NULL,
  alias    text NOT NULL,
  model_id bigint NOT NULL REFERENCES model,
  step     bigint NOT NULL REFERENCES alias_step,
  PRIMARY KEY (name, alias)
);
COMMENT ON TABLE alias IS 'name@alias -> the version that it means now. No version of that model has such a name.';
COMMENT ON COLUMN alias.step IS 'The step that it stands at: who, when, and what stood before.';
CREATE INDEX alias_by_model ON alias (model_id);
"""

DOWN = """
DROP TABLE alias, alias_step;
"""


def upgrade() -> None:
    op.execute(UP)


def downgrade() -> None:
    op.execute(DOWN)
