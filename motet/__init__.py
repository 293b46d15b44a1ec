"""motet: several AI tasks at once over one shared model pass, merged into one row per input.

    from motet import Client, Classify, Embed

    job = Client().submit("tickets.jsonl", {"topic": Classify("news-topics"), "vector": Embed("all-MiniLM-L6-v2")})
    for row in job.results():
        print(row.index, row["topic"])

Importing this loads nothing heavy: httpx, pyarrow and pandas come with their first use.
"""

from motet.client import Client, Token, Worker
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
from motet.job import FailedCell, Job, Plan, PlannedPass
from motet.progress import Progress
from motet.results import Cell, Row, Span
from motet.tasks import Classify, Embed, Entities, Function, Number, Task

__all__ = [
    "Cell",
    "Classify",
    "Client",
    "Conflict",
    "Embed",
    "Entities",
    "FailedCell",
    "Function",
    "InvalidJob",
    "Job",
    "JobFailed",
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
    "Unauthorized",
    "Unreachable",
    "Worker",
]
