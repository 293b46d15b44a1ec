"""The command ``motet evaluate``: the cells of a job beside labels, and two models beside each other."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from motet.cli.show import as_json, connect, console, find_job, put_json, table

if TYPE_CHECKING:
    from rich.console import Console

    from motet.evaluation import Comparison, Evaluation, TaskEvaluation
    from motet.evaluation.worst import WrongAnswer
    from motet.job import Job

#: Labels of one task that a terminal shows; --json and --html have all.
_LABELS = 30


@click.command(
    epilog="""\b
Examples:
  motet evaluate 0198f2c4 --labels test.jsonl
  motet evaluate 0198f2c4 --labels test.csv --task topic=true_topic --html report.html
  motet evaluate 0198f2c4 --labels test.jsonl --compare topic topic_llm
  motet evaluate 0198f2c4 --labels test.csv --task risk.score=bad --top 1,5 --cost FN=5,FP=1 --group customer
  motet evaluate 0198f2c4 0198f3aa --labels test.jsonl --json | jq '.comparisons[].p'"""
)
@click.argument("jobs", nargs=-1, required=True, metavar="JOB [JOB]")
@click.option(
    "--labels", required=True, metavar="FILE", help="A row of labels for each row of the job, in order."
)
@click.option(
    "--task",
    "tasks",
    multiple=True,
    metavar="NAME[=FIELD]",
    help="Only this task, or a part of its JSON answers such as risk.score, and where its labels stand; give it "
    "several times. Default: every task that has a field of its name.",
)
@click.option(
    "--compare",
    nargs=2,
    metavar="A B",
    help="Two tasks side by side; of two jobs, A of the first and B of the second.",
)
@click.option(
    "--index", metavar="FIELD", help="The field that holds the index of each row, for labels of some rows."
)
@click.option(
    "--as-labels", multiple=True, metavar="TASK", help="Read a label out of what this task has written."
)
@click.option("--as-text", multiple=True, metavar="TASK", help="Compare what this task has written as text.")
@click.option("--positive", metavar="LABEL", help="ROC AUC and average precision of this label's score.")
@click.option("--top", metavar="Q,…", help="Precision and recall of the top Q % of the rows, such as 1,5,10.")
@click.option("--at", metavar="K,…", help="HR@K and NDCG@K of answers that are lists of ids, such as 10.")
@click.option("--costs", metavar="FILE.json", help='What answers cost: {"true label": {"answer": cost}}.')
@click.option("--cost", metavar="FN=…,FP=…", help="What mistakes of a binary answer cost, such as FN=5,FP=1.")
@click.option(
    "--threshold", type=float, metavar="T", help="For --cost: the score of a positive answer. [0.5]"
)
@click.option(
    "--group", metavar="FIELD", help="The field of the labels that holds what rows belong to: drawn together."
)
@click.option("--html", metavar="FILE", help="Write a page with confusion matrices and reliability diagrams.")
@click.option("--worst", metavar="FILE.png", help="Draw the pictures of which labels are surest and wrong.")
@click.option(
    "--picture", metavar="FIELD", help="For --worst: the field of the labels that holds a picture's path."
)
@click.option(
    "--media-root",
    metavar="DIR",
    type=click.Path(exists=True, file_okay=False),
    help="For --worst: the folder of the pictures.",
)
@as_json
def evaluate(
    jobs: Sequence[str],
    labels: str,
    tasks: Sequence[str],
    compare: tuple[str, str] | None,
    index: str | None,
    as_labels: Sequence[str],
    as_text: Sequence[str],
    positive: str | None,
    top: str | None,
    at: str | None,
    costs: str | None,
    cost: str | None,
    threshold: float | None,
    group: str | None,
    html: str | None,
    worst: str | None,
    picture: str | None,
    media_root: str | None,
    as_json: bool,
) -> None:
    """Compare JOB with labels: accuracy, F1, confusion, calibration.

    FILE is read as rows are: .jsonl, .ndjson, .csv, .tsv, .txt (each also with .gz) or .parquet. Rows whose label is
    null are left out. Cells that are errors or skipped count as wrong, or have the worst rank. Figures have 95 %
    intervals.

    Of two jobs that answered the same rows, tasks of one name are put side by side: the difference with its interval,
    and McNemar's test of which is right more often. It waits for jobs that still run.
    """
    if len(jobs) > 2:
        raise click.UsageError("name one job, or two to put side by side")
    for option, path in (("--html", html), ("--worst", worst)):
        if path is not None and not os.path.isdir(os.path.dirname(path) or "."):
            raise click.UsageError(f"{option} {path!r}: no such folder {os.path.dirname(path)!r}")
    if costs is not None and cost is not None:
        raise click.UsageError("give --costs FILE.json or --cost FN=…,FP=…, not both")
    if threshold is not None and cost is None:
        raise click.UsageError(
            "--threshold says where --cost FN=…,FP=… takes a score for positive; give both"
        )
    if worst is not None and (picture is None or media_root is None or len(jobs) > 1):
        raise click.UsageError("--worst needs one job, --picture FIELD and --media-root DIR")
    further: dict[str, Any] = {
        "positive": positive,
        "top": [] if top is None else _numbers("--top", top, float),
        "at": [] if at is None else _numbers("--at", at, int),
        "costs": _costs_of(cost) if cost is not None else _costs_in(costs) if costs is not None else None,
        "group": group,
    }
    if threshold is not None:
        further["threshold"] = threshold
    fields = _fields(tasks, compare)
    with connect() as client:
        found = [find_job(client, job) for job in jobs]
        wanted = _wanted(found, fields, compare)
        evaluations = [
            job.evaluate(
                labels,
                own,
                index=index,
                as_labels=_of(job, found, as_labels),
                as_text=_of(job, found, as_text),
                **further,
            )
            for job, own in zip(found, wanted, strict=True)
        ]
        wrong = (
            _wrong_answers(found[0], labels, evaluations[0], picture, index) if worst and picture else None
        )
    comparisons = _comparisons(evaluations, compare)
    for evaluation in evaluations:
        for words in evaluation.warnings:
            where = f"job {evaluation.job}, " if len(evaluations) > 1 else ""
            click.echo(f"warning: {where}{words}", err=True)
    if html is not None:
        from motet.evaluation.report import page

        with open(html, "w", encoding="utf-8") as file:
            file.write(page([(e.title, e.tasks.values()) for e in evaluations], comparisons))
        click.echo(f"a page is in {html}", err=True)
    if as_json:
        put_json(
            {
                "evaluations": [evaluation.to_dict() for evaluation in evaluations],
                "comparisons": [comparison.to_dict() for comparison in comparisons],
            }
        )
    else:
        out = console()
        for evaluation in evaluations:
            _put_evaluation(out, evaluation, several=len(evaluations) > 1)
        for comparison in comparisons:
            _put_comparison(out, comparison)
    # Behind the figures, which are told whatever becomes of the pictures.
    if wrong is not None and worst and media_root:
        _draw_worst(wrong, Path(worst), media_root)


def _wrong_answers(
    job: Job, labels: str, evaluation: Evaluation, picture: str, index: str | None
) -> list[WrongAnswer]:
    from motet.evaluation.worst import wrong_answers

    fields = {task: one.label_field for task, one in evaluation.tasks.items() if task in job.tasks}
    return wrong_answers(job, labels, fields, picture=picture, index=index)


def _draw_worst(wrong: list[WrongAnswer], out: Path, root: str) -> None:
    from motet.evaluation.worst import draw_worst

    count = draw_worst(wrong, out, root=root)
    click.echo(
        f"the {count} worst pictures are in {out}" if count else "no picture got a wrong label", err=True
    )


def _numbers(option: str, text: str, number: type[int] | type[float]) -> list[float]:
    """Numbers with commas between them."""
    try:
        return [number(each) for each in text.split(",")]
    except ValueError:
        raise click.UsageError(f"{option} {text!r}: expected numbers, such as 1,5,10") from None


def _costs_of(text: str) -> dict[str, float]:
    """``FN=5,FP=1``."""
    found = {}
    for each in text.split(","):
        outcome, _, number = each.partition("=")
        try:
            found[outcome.strip().upper()] = float(number)
        except ValueError:
            raise click.UsageError(f"--cost {text!r}: expected such as FN=5,FP=1") from None
    return found


def _costs_in(path: str) -> Any:
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except OSError as error:
        raise click.UsageError(f"--costs {path!r}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise click.UsageError(
            f'--costs {path!r}: expected JSON, such as {{"sport": {{"tech": 2}}}}'
        ) from None


def _fields(tasks: Sequence[str], compare: tuple[str, str] | None) -> dict[str, str]:
    """Task -> field of those that are named. Two that are compared have the same labels unless told otherwise."""
    fields: dict[str, str] = {}
    for spec in tasks:
        name, equals, field = spec.partition("=")
        if not name or (equals and not field):
            raise click.UsageError(f"--task {spec!r}: expected NAME or NAME=FIELD, such as topic=true_topic")
        if name in fields:
            raise click.UsageError(f"--task {name!r} is given twice")
        fields[name] = field or name
    if compare is not None:
        first, second = compare
        shared = fields.get(first) or fields.get(second) or first
        fields = {first: shared, second: shared} | fields
    return fields


def _wanted(
    jobs: Sequence[Job], fields: dict[str, str], compare: tuple[str, str] | None
) -> list[dict[str, str] | None]:
    """For each job its tasks with their fields; None for all that have labels."""
    if len(jobs) == 1 or not fields:
        return [fields or None for _ in jobs]
    if compare is not None:
        # Either may be a task of one job alone.
        return [{task: fields[task]} for task in compare]
    return [fields for _ in jobs]


def _of(job: Job, jobs: Sequence[Job], tasks: Sequence[str]) -> list[str]:
    """Those tasks that this job has, and those that none has: they are refused."""
    return [name for name in tasks if name in job.tasks or not any(name in other.tasks for other in jobs)]


def _comparisons(evaluations: Sequence[Evaluation], compare: tuple[str, str] | None) -> list[Comparison]:
    if len(evaluations) == 1:
        return [evaluations[0].compare(*compare)] if compare else []
    first, second = evaluations
    if compare is not None:
        return [first[compare[0]].compare(second[compare[1]])]
    alike = [name for name in first.tasks if name in second.tasks]
    if not alike:
        raise click.UsageError("no task of one name in both jobs; name a task of each with --compare A B")
    return [first[name].compare(second[name]) for name in alike]


def _put_evaluation(out: Console, evaluation: Evaluation, *, several: bool) -> None:
    if several:
        out.print(f"job {evaluation.job} {evaluation.name}".rstrip(), style="bold")
    out.print(
        table(
            ("!task", "figure", "#", "95 % interval", "of"),
            (line for task in evaluation.tasks.values() for line in _figures(task, task.counted)),
        )
    )
    for task in evaluation.tasks.values():
        if task.labels:
            out.print(_labels(task))
            if len(task.labels) > _LABELS:
                click.echo(
                    f"the {_LABELS} most frequent of {len(task.labels):,} labels; --json has all", err=True
                )


def _figures(task: TaskEvaluation, rows: str) -> list[tuple[str, ...]]:
    from motet.evaluation.words import figure_name, figure_words, interval_words

    lines = [
        (figure_name(name), figure_words(name, estimate.value), interval_words(name, estimate), rows)
        for name, estimate in task.figures.items()
    ]
    if task.calibration is not None:
        lines.append(
            ("calibration error", f"{task.calibration.ece:.3f}", "", f"{task.calibration.rows:,} scores")
        )
    lines += [(f"field {name} right", f"{100 * share:.1f} %", "", "") for name, share in task.fields.items()]
    # What was said in the line above is not said again.
    return [
        (task.task if i == 0 else "", *line[:3], "" if i and line[3] == rows else line[3])
        for i, line in enumerate(lines)
    ]


def _labels(task: TaskEvaluation) -> object:
    mistaken = {}
    if task.confusion is not None:
        names = (*task.confusion.labels, "no answer")
        for i, (label, counts) in enumerate(zip(task.confusion.labels, task.confusion.counts, strict=True)):
            n, name = max((n, name) for j, (n, name) in enumerate(zip(counts, names, strict=True)) if j != i)
            mistaken[label] = f"{name} ({n:,})" if n else ""
    shown = task.labels
    if len(shown) > _LABELS:
        shown = tuple(sorted(shown, key=lambda figures: -figures.support)[:_LABELS])
    return table(
        (
            task.task,
            "#rows",
            "#given",
            "#precision",
            "#recall",
            "#F1",
            *(["mostly taken for"] if mistaken else []),
        ),
        (
            (
                f.label,
                f"{f.support:,}",
                f"{f.answered:,}",
                "–" if f.precision is None else f"{100 * f.precision:.1f} %",
                "–" if f.recall is None else f"{100 * f.recall:.1f} %",
                "–" if f.f1 is None else f"{f.f1:.3f}",
                *([mistaken[f.label]] if mistaken else []),
            )
            for f in shown
        ),
    )


def _rows(comparison: Comparison) -> str:
    groups = f" in {comparison.groups:,} groups" if comparison.groups else ""
    return f"{comparison.rows:,} rows{groups}"


def _put_comparison(out: Console, comparison: Comparison) -> None:
    from motet.evaluation.words import difference_words, figure_name, figure_words

    out.print(f"first: {comparison.first}\nsecond: {comparison.second}")
    out.print(
        table(
            (_rows(comparison), "#first", "#second", "#first − second"),
            (
                (
                    figure_name(name),
                    figure_words(name, d.first),
                    figure_words(name, d.second),
                    difference_words(name, d.difference),
                )
                for name, d in comparison.figures.items()
            ),
        )
    )
    out.print(comparison.verdict)
