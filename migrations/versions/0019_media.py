"""Media: pictures that rows refer to, stored once for each tenant, and gone with the last block that refers to them."""

from alembic import op

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None

UP = """
CREATE TABLE medium (
  id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  tenant_id  uuid NOT NULL REFERENCES tenant ON DELETE CASCADE,
  key        bytea NOT NULL,
  media_type text NOT NULL,
  bytes      int NOT NULL CHECK (bytes > 0),
  width      int,
  height     int,
  payload    bytea NOT NULL,
  refs       int NOT NULL DEFAULT 0,
  claimed    timestamptz DEFAULT clock_timestamp(),
  claimed_by bytea,
  UNIQUE (tenant_id, key)
);
ALTER TABLE medium ALTER payload SET STORAGE EXTERNAL;
CREATE INDEX medium_unused ON medium (claimed) WHERE refs <= 0;
COMMENT ON TABLE medium IS 'Pictures that rows of a tenant refer to, each stored once by content.';
COMMENT ON COLUMN medium.key IS 'Keyed digest of its bytes: nobody can try which picture it is.';
COMMENT ON COLUMN medium.media_type IS 'By its first bytes, such as image/jpeg.';
COMMENT ON COLUMN medium.width IS 'Pixels, as its head tells; NULL: not known.';
COMMENT ON COLUMN medium.payload IS 'Envelope (motet/protocol/envelope.py): its bytes as they came.';
COMMENT ON COLUMN medium.refs IS 'Blocks that refer to it; removed at 0, unless an upload counts on it.';
COMMENT ON COLUMN medium.claimed IS
  'When an upload last sent it or asked for it whose rows may still come; NULL: no such upload is known.';
COMMENT ON COLUMN medium.claimed_by IS
  'Keyed digest of the Idempotency-Key of that upload; NULL: several, or it told none.';

ALTER TABLE block ADD COLUMN media bigint[] NOT NULL DEFAULT '{}';
COMMENT ON COLUMN block.media IS 'Ids of the media that its rows refer to, each once.';
ALTER TABLE tenant ADD COLUMN media_bytes bigint NOT NULL DEFAULT 0;
COMMENT ON COLUMN tenant.media_bytes IS 'Sum of the bytes of its media.';
"""

DOWN = """
ALTER TABLE tenant DROP COLUMN media_bytes;
ALTER TABLE block DROP COLUMN media;
DROP TABLE medium;
"""


def upgrade() -> None:
    op.execute(UP)


def downgrade() -> None:
    op.execute(DOWN)
