"""motet: several AI tasks at once over one shared model pass, merged into one row per input.

    from motet import Client, Classify, Embed

    job = Client().submit("tickets.jsonl", {"topic": Classify("news-topics"), "vector": Embed("all-MiniLM-L6-v2")})
    for row in job.results():
        print(row.index, row["topic"])

Importing this loads nothing heavy: httpx, pyarrow and pandas come with their first use.
"""

from motet.client import Client
from motet.errors import (
    Conflict,
    InvalidJob,
    JobFailed,
    MotetError,
    NotFound,
    Overloaded,
    Problem,
    SetupError,
    Unauthorized,
    Unreachable,
)
from motet.job import Job
from motet.messages.cluster import Worker
from motet.messages.jobs import FailedCell, Plan, PlannedPass
from motet.messages.registry import Alias
from motet.messages.tokens import Token
from motet.progress import Progress
from motet.results import Cell, Row, Span
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
    Task,
)
from motet.training.epochs import Epoch
from motet.training.lesson import Labels
from motet.training.run import TrainRun

__all__ = [
    "Alias",
    "Cell",
    "Chat",
    "Choose",
    "Classify",
    "Client",
    "Conflict",
    "Embed",
    "Entities",
    "Epoch",
    "Extract",
    "FailedCell",
    "Fit",
    "Function",
    "Generate",
    "InvalidJob",
    "Job",
    "JobFailed",
    "Labels",
    "MotetError",
    "NotFound",
    "Number",
    "Overloaded",
    "Plan",
    "PlannedPass",
    "Problem",
    "Progress",
    "Row",
    "SetupError",
    "Span",
    "Task",
    "Token",
    "TrainRun",
    "Unauthorized",
    "Unreachable",
    "Worker",
]
