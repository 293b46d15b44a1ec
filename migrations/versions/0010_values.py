"""Digests of content are keyed per tenant, and what holds text stands in envelopes.

Stored digests get the key here, so that an upload which was under way goes on and stored columns are found for reuse as
before. Blocks and cells of before are bare zstd, which stays readable. Going down fails the unfinished jobs that have
newer blocks, for an older version cannot read them, and forgets the reuse keys: nobody can take the key out of them.
"""

from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

#: HMAC (RFC 2104) of a digest with a key of 32 bytes: Postgres has sha256() but no hmac() without an extension. The pads
#: are the key, filled up to the 64 bytes of a block, with each byte turned by 0x36 and 0x5c.
UP = """
ALTER TABLE tenant ADD COLUMN digest_key bytea NOT NULL
  DEFAULT decode(replace(CAST(gen_random_uuid() AS text) || CAST(gen_random_uuid() AS text), '-', ''), 'hex')
  CHECK (octet_length(digest_key) = 32);
COMMENT ON COLUMN tenant.digest_key IS
  'Secret: keys every digest of what the tenant sent (parts, requests, reuse), so that a short text cannot be guessed from one.';
COMMENT ON COLUMN block.payload IS 'Envelope (motet/protocol/envelope.py): field -> values in row order.';

CREATE FUNCTION pg_temp.pad(key bytea, turn int) RETURNS bytea IMMUTABLE LANGUAGE sql AS $$
  SELECT string_agg(set_byte('\\x00', 0, (CASE WHEN i < 32 THEN get_byte(key, i) ELSE 0 END) # turn), '' ORDER BY i)
    FROM generate_series(0, 63) i $$;
CREATE TEMPORARY TABLE pads ON COMMIT DROP AS
  SELECT id, pg_temp.pad(digest_key, 54) AS inner_pad, pg_temp.pad(digest_key, 92) AS outer_pad FROM tenant;
UPDATE job SET request_digest = sha256(outer_pad || sha256(inner_pad || request_digest)) FROM pads
 WHERE pads.id = job.tenant_id;
UPDATE part SET digest = sha256(outer_pad || sha256(inner_pad || digest)) FROM job, pads
 WHERE job.id = part.job_id AND pads.id = job.tenant_id;
UPDATE sealed_column SET key = sha256(outer_pad || sha256(inner_pad || key)) FROM pads
 WHERE pads.id = sealed_column.tenant_id AND key IS NOT NULL;
UPDATE block SET keys = ARRAY(SELECT sha256(outer_pad || sha256(inner_pad || k)) FROM unnest(keys)
                                WITH ORDINALITY u(k, i) ORDER BY i)
  FROM job, pads WHERE job.id = block.job_id AND pads.id = job.tenant_id AND keys <> '{}';
DROP TABLE pads;
"""

DOWN = """
CREATE TEMPORARY TABLE gone ON COMMIT DROP AS
  SELECT id FROM job WHERE state IN ('open', 'loading', 'running', 'paused')
     AND EXISTS (SELECT FROM block b WHERE b.job_id = job.id AND octet_length(b.payload) > 0 AND get_byte(b.payload, 0) = 1);
UPDATE job SET state = 'failed', reason = 'motet was taken back to a version that cannot run it',
       finished = clock_timestamp(), version = version + 1,
       cells_ok = k.ok, cells_error = k.error, cells_skipped = n_rows * n_tasks - k.ok - k.error
  FROM (SELECT g.id, CAST(coalesce(sum(s.n_ok), 0) AS bigint) AS ok, CAST(coalesce(sum(s.n_error), 0) AS bigint) AS error
          FROM gone g LEFT JOIN block_column b ON b.job_id = g.id LEFT JOIN sealed_column s ON s.id = b.column_id
         GROUP BY g.id) k
 WHERE job.id = k.id;
DELETE FROM lease USING subtask s, gone WHERE lease.subtask_id = s.id AND s.job_id = gone.id;
UPDATE subtask SET state = 'lost', closed = clock_timestamp() FROM gone WHERE job_id = gone.id AND state = 'open';
DELETE FROM piece USING gone WHERE job_id = gone.id;
DELETE FROM cells USING gone WHERE job_id = gone.id;
UPDATE pass SET rows_waiting = 0, bytes_waiting = 0 FROM gone WHERE job_id = gone.id;
DROP TABLE gone;
UPDATE sealed_column SET key = NULL WHERE key IS NOT NULL;
UPDATE block SET keys = '{}' WHERE keys <> '{}';
ALTER TABLE tenant DROP COLUMN digest_key;
COMMENT ON COLUMN block.payload IS 'msgpack under zstd: field -> texts in row order.';
"""


def upgrade() -> None:
    op.execute(UP)


def downgrade() -> None:
    op.execute(DOWN)
