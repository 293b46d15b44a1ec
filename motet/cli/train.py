"""The command ``motet train``: models from labelled rows."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import click

from motet.cli.show import as_json, connect, console, put_json
from motet.training.lesson import Labels, Learned
from motet.training.run import TrainRun, command_line


@click.command(
    epilog="""\b
Examples:
  motet train train.jsonl --name support --labels topic --labels mood=sentiment --test test.jsonl
  motet train mails.csv --name mails --text body --multi tags --number urgency --tune all --epochs 3
  motet train train.jsonl --name support --labels topic --plot curves.svg
  motet train calls.jsonl --name calls --labels intent --text history --text last --numbers age
  motet train claims.jsonl --name claims --trunk efficientnet-lite0 --image photo --media-root pictures/ \
      --labels damage --features stages

Rows may lack labels of some tasks: null, or no such field. In CSV, labels of --multi stand as a|b."""
)
@click.argument("file")
@click.option(
    "--name", required=True, help="Of what comes out: heads NAME.TASK, and a trunk NAME where it learns."
)
@click.option(
    "--trunk", default="all-MiniLM-L6-v2", show_default=True, help="The registered encoder to begin with."
)
@click.option(
    "--labels", "single", multiple=True, metavar="TASK[=FIELD]", help="Learn one label of each row."
)
@click.option(
    "--multi", multiple=True, metavar="TASK[=FIELD]", help="Learn any number of labels of each row."
)
@click.option("--number", multiple=True, metavar="TASK[=FIELD]", help="Learn a number.")
@click.option(
    "--test", metavar="FILE", help="Rows to measure by (default: some rows of FILE are kept for that)."
)
@click.option(
    "--text",
    "texts",
    multiple=True,
    metavar="FIELD",
    help="The field that is read (default: text), or a template such as '{messages[-1]}'; again for each further text.",
)
@click.option(
    "--numbers",
    multiple=True,
    metavar="FIELD",
    help="A number that is read beside the texts; again for each.",
)
@click.option(
    "--image", metavar="FIELD", help="The field that holds a picture, for a trunk that reads those."
)
@click.option(
    "--features",
    type=click.Choice(["last", "stages"]),
    default="last",
    show_default=True,
    help="Of pictures: the trunk's last features, or those of its earlier stages too, which know strokes and edges.",
)
@click.option(
    "--media-root",
    metavar="DIR",
    type=click.Path(exists=True, file_okay=False),
    help="The folder of the pictures: a path in a row is opened below it only.",
)
@click.option(
    "--tune",
    type=click.Choice(["heads", "lora", "all"]),
    default="heads",
    show_default=True,
    help="What learns: heads, in seconds; the trunk by low-rank changes as well; or all of it.",
)
@click.option(
    "--epochs",
    type=click.IntRange(1, 1000),
    help="Times through the rows (default: 30 of heads, 3 of a trunk).",
)
@click.option(
    "--patience",
    type=click.IntRange(0),
    default=5,
    show_default=True,
    help="Epochs without a better score before it ends; 0: never.",
)
@click.option("--balance", is_flag=True, help="Rare labels count for more.")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True)
@click.option("--version", help="Of what comes out (default: counts up).")
@click.option("--licence", default="", help="Of what comes out, for the registry.")
@click.option(
    "--register/--no-register", default=True, show_default=True, help="Register the models in the end."
)
@click.option("--plot", metavar="FILE.svg", help="Draw loss and scores by epoch.")
@as_json
def train(
    file: str,
    name: str,
    trunk: str,
    single: Sequence[str],
    multi: Sequence[str],
    number: Sequence[str],
    test: str | None,
    texts: Sequence[str],
    numbers: Sequence[str],
    image: str | None,
    features: Any,
    media_root: str | None,
    tune: Any,
    epochs: int | None,
    patience: int,
    balance: bool,
    seed: int,
    version: str | None,
    licence: str,
    register: bool,
    plot: str | None,
    as_json: bool,
) -> None:
    """Train models on the labelled rows of FILE, and register them.

    The trunk embeds every row once, on all devices; then a head for each task learns on one of them. Each epoch tells
    its loss and what the heads are worth on rows that they did not learn from. Ctrl-C leaves it running.
    """
    tasks = _tasks(single, multi, number, balance)
    if plot is not None and not os.path.isdir(os.path.dirname(plot) or "."):
        raise click.UsageError(f"--plot {plot!r}: no such folder {os.path.dirname(plot)!r}")
    with connect() as client:
        run = client.train(
            name=name, trunk=trunk, tasks=tasks, train=file, test=test,
            text=texts if len(texts) > 1 else next(iter(texts), "text"), numbers=numbers, tune=tune, epochs=epochs,
            image=image, features=features, media_root=media_root,
            patience=patience, seed=seed, version=version, licence=licence, command=command_line(),
        )  # fmt: skip
        out = console()
        try:
            for epoch in run.follow():
                if not as_json:
                    out.print(str(epoch), soft_wrap=True, highlight=False)
        except KeyboardInterrupt:
            click.echo(f"it goes on; see how far: motet watch {run.job.id}", err=True)
            click.echo(f"register what comes out: motet models adopt {run.job.id}", err=True)
            raise
        _finish(run, register=register, plot=plot, as_json=as_json)


def _finish(run: TrainRun, *, register: bool, plot: str | None, as_json: bool) -> None:
    answer = run.answer()
    refs = run.register() if register else [model.ref for model in run.models]
    if plot is not None:
        with open(plot, "w", encoding="utf-8") as file:
            file.write(run.plot())
    if as_json:
        put_json({"job": run.job.id, "models": refs, **{k: v for k, v in answer.items() if k != "models"}})
        return
    out = console()
    out.print(run.summary(), soft_wrap=True, highlight=False)
    if register:
        out.print(f"registered {', '.join(refs)}", soft_wrap=True, highlight=False)
    else:
        out.print(
            f"not registered; to do that: motet models adopt {run.job.id}", soft_wrap=True, highlight=False
        )


def _tasks(
    single: Sequence[str], multi: Sequence[str], number: Sequence[str], balance: bool
) -> dict[str, Learned]:
    from motet.tasks import Number

    tasks: dict[str, Learned] = {}
    for words, kind in ((single, "single"), (multi, "multi"), (number, "number")):
        for word in words:
            task, _, field = word.partition("=")
            if not task or task in tasks:
                raise click.UsageError(f"got {word!r}; expected TASK or TASK=FIELD, each task once")
            field = field or task
            tasks[task] = (
                Number(field) if kind == "number" else Labels(field, multi=kind == "multi", balance=balance)
            )
    if not tasks:
        raise click.UsageError("say what to learn, such as --labels topic")
    return tasks
