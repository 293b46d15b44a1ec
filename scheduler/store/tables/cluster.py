"""Tables of the cluster: who leads, who may ask, which models there are, and how fast devices run them."""

from __future__ import annotations

from sqlalchemy import (
    ARRAY,
    REAL,
    BigInteger,
    Double,
    ForeignKey,
    Integer,
    LargeBinary,
    Text,
    TypedColumns,
    UniqueConstraint,
    Uuid,
)
from sqlalchemy.dialects.postgresql import JSONB

from scheduler.store.schema import NOW, TIME, identity, index, key, may, must, table

#: 32 bytes that nobody can guess.
_SECRET = (
    "decode(replace(CAST(gen_random_uuid() AS text) || CAST(gen_random_uuid() AS text), '-', ''), 'hex')"
)


class _LeaderColumns(TypedColumns):
    """The one dispatcher that leads. Every transaction of the scheduler checks its epoch first.

    transport: Identity of Redis as last seen: another one means that what it held is gone.
    """

    id = key(Integer, check="id = 1")
    epoch = must(BigInteger)
    holder = must(Text)
    until = must(TIME)
    transport = must(Text, default="''")


leader = table("leader", _LeaderColumns)


class _TenantColumns(TypedColumns):
    """Whose jobs, tokens and columns these are; nothing is shared across tenants. The one without a name is
    nobody: it has jobs that are being removed.

    weight: Share of device-seconds relative to other tenants.
    row_quota: Rows in unfinished jobs at most; NULL: no limit.
    digest_key: Secret: keys every digest of what the tenant sent (parts, requests, reuse), so that a short
      text cannot be guessed from one.
    media_bytes: Sum of the bytes of its media.
    """

    id = key(Uuid, default="gen_random_uuid()")
    name = must(Text, unique=True)
    weight = must(REAL, default="1", check="weight > 0")
    row_quota = may(BigInteger)
    created = must(TIME, default=NOW)
    digest_key = must(LargeBinary, default=_SECRET, check="octet_length(digest_key) = 32")
    media_bytes = must(BigInteger, default="0")


tenant = table("tenant", _TenantColumns)


class _TokenColumns(TypedColumns):
    """Who may ask: an id in clear, and the hash of its secret.

    secret_sha256: The secret has 256 random bits, so a plain hash is enough.
    """

    id = key(Text)
    tenant_id = must(Uuid, ForeignKey("tenant.id", ondelete="CASCADE"))
    name = must(Text)
    scope = must(Text, check="scope IN ('user', 'read', 'admin', 'worker')")
    secret_sha256 = must(LargeBinary)
    created = must(TIME, default=NOW)
    expires = may(TIME)
    revoked = may(TIME)


token = table("token", _TokenColumns)


class _DrainedColumns(TypedColumns):
    """Workers that get no more work until somebody resumes them; a restart changes nothing.

    by: Id of the token that drained it.
    seen: When it was last heard of, to the hour: one that is long gone is forgotten.
    """

    worker = key(Text)
    host = must(Text, default="''")
    since = must(TIME, default=NOW)
    by = must(Text, default="''")
    seen = must(TIME, default=NOW)


drained = table("drained", _DrainedColumns)


class _BlobColumns(TypedColumns):
    """Content-addressed files that lie in the blob folder behind the API."""

    sha256 = key(Text, check="sha256 ~ '^[0-9a-f]{64}$'")
    bytes = must(BigInteger)
    created = must(TIME, default=NOW)


blob = table("blob", _BlobColumns)


class _ModelColumns(TypedColumns):
    """The registry: what may be loaded. A version never changes its meaning.

    digest: Sha256 of all that decides its answers: part of every reuse key.
    trunk: Tasks whose models have one trunk fuse into one pass.
    """

    id = identity()
    name = must(Text)
    version = must(Text)
    digest = must(Text)
    trunk = must(Text)
    manifest = must(JSONB)
    created = must(TIME, default=NOW)


model = table("model", _ModelColumns, UniqueConstraint("name", "version"))


class _AliasStepColumns(TypedColumns):
    """Every step of every alias, for good: who let it mean which version, and when.

    name: Of the model.
    version: What the alias means from this step on; of one that was removed: what it meant.
    model_id: That version; NULL: it is deleted, and what bears its name now may be another model.
    before: The step that a rollback from here goes back to; NULL: nothing stood before.
    by: Id of the token that asked for it.
    """

    id = identity()
    name = must(Text)
    alias = must(Text)
    what = must(Text, check="what IN ('promoted', 'rolled back', 'removed')")
    version = must(Text)
    model_id = may(BigInteger, ForeignKey("model.id", ondelete="SET NULL"))
    before = may(BigInteger, ForeignKey("alias_step.id"))
    by = must(Text, default="''")
    at = must(TIME, default=NOW)


alias_step = table("alias_step", _AliasStepColumns, index("alias_step_by_model", "model_id"))


class _AliasColumns(TypedColumns):
    """name@alias -> the version that it means now. No version of that model has such a name.

    step: The step that it stands at: who, when, and what stood before.
    """

    name = key(Text)
    alias = key(Text)
    model_id = must(BigInteger, ForeignKey("model.id"))
    step = must(BigInteger, ForeignKey("alias_step.id"))


alias = table("alias", _AliasColumns, index("alias_by_model", "model_id"))


class _RefusalColumns(TypedColumns):
    """Workers that cannot load a model, as of that boot: it is not placed there again."""

    model_id = key(BigInteger, ForeignKey("model.id", ondelete="CASCADE"))
    worker = key(Text)
    boot = must(Text)
    why = must(Text)
    at = must(TIME, default=NOW)


refusal = table("refusal", _RefusalColumns)


class _RateColumns(TypedColumns):
    """What was learned of a trunk's speed on a kind of device, so that a restart forgets nothing.

    trunk: Digest of the trunk, or of a model that shares none.
    device: Name of the kind of device, such as NVIDIA H200.
    numerics: Numeric class: fast or exact.
    coefficients: Seconds of a sub-task, a row, a token, a squared length in tokens.
    covariance: Of the coefficients, row by row: how much each may still change.
    bytes_per_token: UTF-8 bytes that a token stands for in texts seen lately.
    tokens_per_row: Length of the rows seen lately.
    observations: Outcomes that it was learned from; 0: a guess.
    updated: When the last of them came.
    """

    trunk = key(Text)
    device = key(Text)
    numerics = key(Text)
    coefficients = must(ARRAY(Double), check="cardinality(coefficients) = 4")
    covariance = must(ARRAY(Double), check="cardinality(covariance) = 16")
    bytes_per_token = must(Double)
    tokens_per_row = must(Double)
    observations = must(BigInteger)
    updated = must(TIME, default=NOW)


rate = table("rate", _RateColumns)


class _PaceColumns(TypedColumns):
    """Workers beside their kind: finds the device that is silently slow.

    worker: Its name, which outlives its restarts.
    pace: Its seconds for what takes its kind one second.
    observations: Outcomes that it was learned from.
    updated: When the last outcome of this worker came.
    """

    worker = key(Text)
    pace = must(Double)
    observations = must(BigInteger)
    updated = must(TIME, default=NOW)


pace = table("pace", _PaceColumns)


class _LoadTimeColumns(TypedColumns):
    """How long loading takes: what a placement pays where the model is not resident.

    model: Digest of the model that is loaded.
    device: Name of the kind of device.
    seconds: A mean in which late loads weigh most; heads that were loaded with it included.
    updated: When it was loaded last.
    """

    model = key(Text)
    device = key(Text)
    seconds = must(Double)
    updated = must(TIME, default=NOW)


load_time = table("load_time", _LoadTimeColumns)
