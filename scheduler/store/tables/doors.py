"""Tables of OpenAI's doors: files, batches over them, and the open job behind each door."""

from __future__ import annotations

from typing import Literal, get_args

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Double,
    ForeignKey,
    Integer,
    LargeBinary,
    SmallInteger,
    Text,
    TypedColumns,
    UniqueConstraint,
    Uuid,
)
from sqlalchemy.dialects.postgresql import JSONB

from scheduler.store.schema import NOW, TIME, index, key, may, must, table

#: Where a batch is in its life, in OpenAI's words.
BatchState = Literal[
    "validating", "in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled"
]
_BATCH_STATES = f"state IN {get_args(BatchState)}"


class _FileColumns(TypedColumns):
    """A file that a user uploaded, or that a batch wrote. Its bytes are a blob.

    purpose: What for, in OpenAI's words: batch, batch_output ….
    expires: When it is deleted; NULL: never.
    """

    id = key(Text)
    tenant_id = must(Uuid, ForeignKey("tenant.id", ondelete="CASCADE"))
    purpose = must(Text)
    filename = must(Text)
    bytes = must(BigInteger, check="bytes >= 0")
    sha256 = must(Text)
    created = must(TIME, default=NOW)
    expires = may(TIME)


file = table(
    "file",
    _FileColumns,
    index("file_newest", "tenant_id", "created DESC", "id DESC"),
    index("file_by_blob", "sha256"),
    index("file_expiring", "expires", where="expires IS NOT NULL"),
)


class _BatchColumns(TypedColumns):
    """A file of requests in OpenAI's form, run as one job.

    input_file: Id of the file, which may have been deleted since.
    input_sha256: Its blob, which is kept until the batch has ended.
    window: Time in which it must be done, as the user wrote it.
    notes: The user's metadata.
    output_expires_s: Seconds for which its files are kept; NULL: as long as all others.
    job_id: The job that runs it; NULL before its lines were checked.
    models: Names of models in its lines -> name@version: fixed once the lines were checked.
    beside: Tasks are asked beside its lines, so that a row may have several cells; known once the lines were checked.
    lines: Requests in the file, once they were counted.
    completed: Lines with an answer; final once it has ended.
    failed: Lines without; final once it has ended.
    usage: Tokens, as OpenAI tells them.
    errors: Why its file was refused: [{code, message, param, line}].
    request_digest: Keyed digest of the request: the same one sent again makes no second batch.
    ended: When it came to a state that it never leaves.
    owner: The process that works on it.
    owned_until: Another process takes over what is not done by then.
    tries: Times that a process took it without bringing it further.
    """

    id = key(Text)
    tenant_id = must(Uuid, ForeignKey("tenant.id", ondelete="CASCADE"))
    endpoint = must(Text)
    input_file = must(Text)
    input_sha256 = must(Text)
    window = must(Text)
    notes = may(JSONB)
    priority = must(Text, default="'normal'")
    output_expires_s = may(Double)
    state = must(Text, default="'validating'", check=_BATCH_STATES)
    job_id = may(Uuid, ForeignKey("job.id", ondelete="SET NULL"))
    models = may(JSONB)
    beside = must(Boolean, default="false")
    lines = must(Integer, default="0")
    completed = must(Integer, default="0")
    failed = must(Integer, default="0")
    usage = may(JSONB)
    errors = may(JSONB)
    output_file = may(Text)
    error_file = may(Text)
    idempotency_key = may(Text)
    request_digest = must(LargeBinary)
    created = must(TIME, default=NOW)
    expires = must(TIME)
    in_progress = may(TIME)
    finalizing = may(TIME)
    cancelling = may(TIME)
    ended = may(TIME)
    owner = must(Text, default="''")
    owned_until = must(TIME, default="'-infinity'")
    tries = must(SmallInteger, default="0")


batch = table(
    "batch",
    _BatchColumns,
    CheckConstraint("completed + failed <= lines"),
    UniqueConstraint("tenant_id", "idempotency_key"),
    index("batch_newest", "tenant_id", "created DESC", "id DESC"),
    index("batch_by_job", "job_id", where="job_id IS NOT NULL"),
    index("batch_by_input", "input_sha256"),
    index("batch_unfinished", "created", where="ended IS NULL"),
)


class _DoorColumns(TypedColumns):
    """The open job that answers a tenant's requests to one endpoint and model, while it is used.

    used: When somebody asked last, about.
    """

    tenant_id = key(Uuid, ForeignKey("tenant.id", ondelete="CASCADE"))
    endpoint = key(Text)
    model_id = key(BigInteger, ForeignKey("model.id"))
    job_id = must(Uuid, ForeignKey("job.id", ondelete="CASCADE"))
    used = must(TIME, default=NOW)


door = table(
    "door",
    _DoorColumns,
    index("door_idle", "used"),
    index("door_by_job", "job_id"),
    index("door_by_model", "model_id"),
)
