"""An evaluation: how well the tasks of one job answered, as the user holds it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from motet.errors import NotFound
from motet.evaluation.figures import Comparison, TaskEvaluation, measure
from motet.evaluation.further import THRESHOLD, Costs, FurtherFigures
from motet.evaluation.intervals import RESAMPLES, SEED
from motet.evaluation.parts import task_and_path
from motet.evaluation.reading import AnsweredJob, Fields, read
from motet.evaluation.report import page
from motet.sources import Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The tasks of a job beside labels. ``evaluation.tasks["topic"].accuracy``; ``str`` of it is a summary."""

    #: The job's id and name.
    job: str
    name: str
    tasks: Mapping[str, TaskEvaluation]

    def __getitem__(self, task: str) -> TaskEvaluation:
        """The evaluation of one task. Raises NotFound."""
        if task not in self.tasks:
            raise NotFound(f"task {task!r} was not evaluated; {', '.join(self.tasks)} were")
        return self.tasks[task]

    def compare(self, first: str, second: str) -> Comparison:
        """Two tasks of this job, beside the same labels. Raises InvalidJob, NotFound.

        For a task of another job: ``self["topic"].compare(other["topic"])``.
        """
        return self[first].compare(self[second])

    @property
    def title(self) -> str:
        """The job's name, or its id where it has none."""
        return self.name or self.job

    @property
    def warnings(self) -> tuple[str, ...]:
        """Oddities of labels or scores, each with its task."""
        return tuple(f"{name}: {words}" for name, task in self.tasks.items() for words in task.warnings)

    def to_dict(self) -> dict[str, Any]:
        """As plain data that JSON can hold."""
        return {
            "job": self.job,
            "name": self.name,
            "tasks": {name: task.to_dict() for name, task in self.tasks.items()},
        }

    def to_html(self, *comparisons: Comparison) -> str:
        """A page of its own, with confusion matrices and reliability diagrams."""
        return page([(self.title, self.tasks.values())], comparisons)

    def __str__(self) -> str:
        return "\n".join(map(str, self.tasks.values()))


def evaluate(
    job: AnsweredJob,
    labels: Source,
    tasks: Fields = None,
    *,
    index: str | None = None,
    as_labels: Collection[str] = (),
    as_text: Collection[str] = (),
    positive: str | None = None,
    top: float | Sequence[float] = (),
    at: int | Sequence[int] = (),
    costs: Costs | None = None,
    threshold: float = THRESHOLD,
    group: str | None = None,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Evaluation:
    """What ``Job.evaluate`` promises."""
    asked = FurtherFigures.of(positive=positive, top=top, at=at, costs=costs, threshold=threshold)
    answered, fields = read(
        job, labels, tasks, index=index, as_labels=as_labels, as_text=as_text, asked=asked, group=group
    )
    specs = job.tasks
    return Evaluation(
        job=job.id,
        name=job.name,
        tasks={
            task: measure(
                rows,
                job=job.id,
                task=task,
                label_field=fields[task],
                model=_model(specs, task),
                resamples=resamples,
                seed=seed,
            )
            for task, rows in answered.items()
        },
    )


def _model(specs: Mapping[str, Mapping[str, Any]], name: str) -> str:
    found = task_and_path(name, specs)
    spec = specs[found[0]] if found else {}
    return str(spec.get("model_ref") or spec.get("model") or "")
