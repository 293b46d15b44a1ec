"""motet: several AI tasks at once over one shared model pass, merged into one row per input.

    from motet import Client, Classify, Embed

    job = Client().submit("tickets.jsonl", {"topic": Classify("news-topics"), "vector": Embed("all-MiniLM-L6-v2")})
    for row in job.results():
        print(row.index, row["topic"])

Importing this loads nothing heavy: httpx, pyarrow and pandas come with their first use, and so does asyncio with
``AsyncClient``.
"""

import typing

from motet.client import Client
from motet.errors import (
    Conflict,
    Gone,
    InvalidJob,
    JobFailed,
    Late,
    MotetError,
    NotFound,
    Overloaded,
    Problem,
    SetupError,
    Unauthorized,
    Unreachable,
)
from motet.feed import Feed
from motet.folds import Count, Ewm, Last, Max, Mean, Sum
from motet.job import Job
from motet.messages.cluster import Worker
from motet.messages.jobs import FailedCell, Plan, PlannedPass
from motet.messages.registry import Alias
from motet.messages.tokens import Token
from motet.progress import Progress
from motet.results import Cell, Row, Span
from motet.row_stream import RowStream
from motet.tasks import (
    Chat,
    Choose,
    Classify,
    Embed,
    Entities,
    Extract,
    Fit,
    Function,
    Generate,
    Number,
    Rank,
    Task,
)
from motet.text_deltas import TextDelta
from motet.training.epochs import Epoch
from motet.training.lesson import Labels
from motet.training.run import TrainRun

if typing.TYPE_CHECKING:
    from motet.aio import AsyncClient

__all__ = [
    "Alias",
    "AsyncClient",
    "Cell",
    "Chat",
    "Choose",
    "Classify",
    "Client",
    "Conflict",
    "Count",
    "Embed",
    "Entities",
    "Epoch",
    "Ewm",
    "Extract",
    "FailedCell",
    "Feed",
    "Fit",
    "Function",
    "Generate",
    "Gone",
    "InvalidJob",
    "Job",
    "JobFailed",
    "Labels",
    "Last",
    "Late",
    "Max",
    "Mean",
    "MotetError",
    "NotFound",
    "Number",
    "Overloaded",
    "Plan",
    "PlannedPass",
    "Problem",
    "Progress",
    "Rank",
    "Row",
    "RowStream",
    "SetupError",
    "Span",
    "Sum",
    "Task",
    "TextDelta",
    "Token",
    "TrainRun",
    "Unauthorized",
    "Unreachable",
    "Worker",
]


def __getattr__(name: str) -> typing.Any:
    if name == "AsyncClient":
        from motet.aio import AsyncClient

        return AsyncClient
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
