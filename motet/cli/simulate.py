"""`motet simulate`: jobs on a cluster before it is bought. The scheduler's own policy decides, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from motet.cli.show import as_json, connect, find_job, put_json, put_table
from motet.distributions import need
from motet.progress import clock

if TYPE_CHECKING:
    from motet.job import Job


@click.command(
    epilog="""\b
Examples:
  motet simulate --gpus 8xH200,16xL4                              an example of four jobs
  motet simulate --gpus 4xH100 --gpus 24xL4 --jobs jobs.jsonl --html out.html
  motet simulate --gpus 4xH100 --price H100=3.20 --jobs jobs.jsonl
  motet simulate --record 0198f2c4 | motet simulate --gpus 2xL40S --jobs -

\b
A trace has a job in each line; only model and rows must be there:
  {"name": "topics", "model": {"name": "encoder", "parameters": 110000000}, "rows": 500000,
   "tokens": 120, "spread": 0.7, "tenant": "search", "weight": 1, "priority": "normal",
   "at_s": 0, "deadline_s": 600}
  {"name": "again", "model": "encoder", "rows": 20000, "at_s": 60}

\b
A model costs what was measured of it, in the trace or as a table in the file of --models:
  [encoder]
  tokens_s = 5200    # tokens a second …
  on = "L4"          # … on this kind
  load_s = 6
  memory_gb = 1.2
or else two operations for each of its parameters and tokens: a guess, good to a factor of two.

Kinds are H200, H100, A100, L40S, L4, T4 and cpu (a slot of one core); 4xNAME=SPEED:MEMORY_GB defines another one,
SPEED in TFLOP/s that models reach there: about 0.4 of the data sheet's bf16.""",
)
@click.argument("recorded", nargs=-1, metavar="[JOB…]")
@click.option(
    "--gpus", multiple=True, metavar="8xH200,16xL4", help="A cluster; give it again to compare two."
)
@click.option("--jobs", metavar="FILE", help="A trace, one job a line; - is stdin.  [default: an example]")
@click.option("--models", metavar="FILE", help="What models cost, in TOML.")
@click.option("--price", multiple=True, metavar="KIND=PRICE", help="Of an hour of a device of this kind.")
@click.option(
    "--seeds",
    type=click.IntRange(1, 1000),
    default=5,
    show_default=True,
    help="Runs that differ by chance; for p50 and p90.",
)
@click.option("--html", type=click.Path(dir_okay=False), help="Write a picture of every GPU over time.")
@click.option("--record", is_flag=True, help="Print a trace of JOBs that ran, with what they cost there.")
@as_json
def simulate(
    recorded: Sequence[str],
    gpus: Sequence[str],
    jobs: str | None,
    models: str | None,
    price: Sequence[str],
    seeds: int,
    html: str | None,
    record: bool,
    as_json: bool,
) -> int:
    """Try jobs on a cluster that is not there yet.

    The policy that places work on real devices places it here, on a virtual clock: devices take as long as they
    would, and a tenth or a third more or less, by chance. It tells when each job would end, how busy each kind
    would be, how often models would load, and what idle time would cost.
    """
    need("scheduler")
    if record != bool(recorded):
        raise click.UsageError("name the jobs to record, with --record")
    if record:
        ran = _child(["--record"], told=_activities(recorded))
        click.echo(ran.stdout, nl=False)
        return ran.returncode
    if not gpus:
        raise click.UsageError("--gpus is missing; expected a cluster such as 8xH200,16xL4")
    options = [
        *(item for one in gpus for item in ("--gpus", one)),
        *(item for one in price for item in ("--price", one)),
        *("--seeds", str(seeds)),
        *(item for name, one in (("--jobs", jobs), ("--models", models)) if one for item in (name, one)),
        *(("--html", html) if html else ()),
    ]
    ran = _child(options)
    if ran.returncode == 0:
        found = json.loads(ran.stdout)
        if as_json:
            put_json(found)
        else:
            _put(found)
            if html:
                click.echo(f"a picture of every GPU: {html}", err=True)
    return ran.returncode


def _child(options: Sequence[str], *, told: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run `python -m scheduler simulate`, which reads our stdin unless it is told something, and repeat its complaints."""
    # Not from the current folder, which may hold another package of that name.
    ran = subprocess.run(
        [sys.executable, "-P", "-m", "scheduler", "simulate", *options],
        input=told,
        capture_output=True,
        env={**os.environ, "PYTHONUTF8": "1"},
        encoding="utf-8",
        check=False,
    )
    click.echo(ran.stderr, err=True, nl=False)
    return ran


def _activities(jobs: Sequence[str]) -> str:
    """What the scheduler makes a trace of."""
    with connect() as client:
        found = [_activity(find_job(client, job)) for job in jobs]
        parameters = {model.ref: model.parameters for model in client.models()}
    return json.dumps({"activities": found, "parameters": parameters})


def _activity(job: Job) -> Mapping[str, Any]:
    """Its activity, with all its sub-tasks."""
    told = job.activity(timeline=None)
    if devices := told["left_out"]["devices"]:
        click.echo(
            f"{job.id}: the hardware of {devices:,} workers is not known here, and their sub-tasks tell nothing of"
            " what models cost",
            err=True,
        )
    return told


# -- what is printed


def _put(found: Mapping[str, Any]) -> None:
    clusters = found["clusters"]
    if len(clusters) > 1:
        put_table(*_comparison(clusters), empty="")
    for cluster in clusters:
        click.echo(_headline(cluster))
        put_table(*_kinds(cluster), empty="")
        put_table(*_jobs(cluster), empty="", drop=("tenant", "model", "starts"))
    if found["guessed"]:
        names = ", ".join(found["guessed"])
        click.echo(
            f"the cost of {names} is a guess from its size; measured: motet simulate --record", err=True
        )


def _headline(cluster: Mapping[str, Any]) -> str:
    span = cluster["makespan_s"]
    words = (
        f"{cluster['gpus']}: simulated {cluster['seeds']:,} times, all done after {_s(span['p50'])}"
        f" (p90 {_s(span['p90'])}), {cluster['loads']['p50']:,.0f} loads"
    )
    if "cost" in cluster:
        words += f", costs {cluster['cost']:,.2f}, of which {cluster['cost_of_idle']:,.2f} idle"
    return words


def _comparison(clusters: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    priced = "cost" in clusters[0]
    return (
        (
            "!cluster",
            "#GPUs",
            "#done p50",
            "#p90",
            "#busy",
            "#loads",
            *(["#cost", "#idle"] if priced else []),
        ),
        [
            (
                c["gpus"],
                f"{c['devices']:,}",
                _s(c["makespan_s"]["p50"]),
                _s(c["makespan_s"]["p90"]),
                f"{c['busy']:.0%}",
                f"{c['loads']['p50']:,.0f}",
                *([f"{c['cost']:,.2f}", f"{c['cost_of_idle']:,.2f}"] if priced else []),
            )
            for c in clusters
        ],
    )


def _kinds(cluster: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    return (
        ("!kind", "#GPUs", "#busy", "#loading", "#idle", "#idle hours"),
        [
            (
                k["kind"],
                f"{k['devices']:,}",
                *(f"{k[share]:.1%}" for share in ("busy", "loading", "idle")),
                f"{k['idle_hours']:,.2f}",
            )
            for k in cluster["kinds"]
        ],
    )


def _jobs(cluster: Mapping[str, Any]) -> tuple[tuple[str, ...], Iterator[tuple[str, ...]]]:
    jobs = cluster["jobs"]
    timed = any(job["deadline_s"] is not None for job in jobs)
    ran = any(job["took_s"] is not None for job in jobs)
    return (
        (
            *("job", "model", "tenant", "#rows", "#comes", "#starts", "#ends p50", "#p90"),
            *(["#deadline", "#late"] if timed else []),
            *(["#took then"] if ran else []),
        ),
        (
            (
                *(job["name"], job["model"], job["tenant"], f"{job['rows']:,}"),
                *(
                    _s(job["at_s"]),
                    _s(job["start_s"]["p50"]),
                    _s(job["end_s"]["p50"]),
                    _s(job["end_s"]["p90"]),
                ),
                *(_deadline(job) if timed else ()),
                *(["–" if job["took_s"] is None else _s(job["took_s"])] if ran else []),
            )
            for job in jobs
        ),
    )


def _deadline(job: Mapping[str, Any]) -> tuple[str, str]:
    return ("–", "–") if job["deadline_s"] is None else (_s(job["deadline_s"]), f"{job['late']:.0%}")


def _s(seconds: float) -> str:
    return f"{seconds:,.1f} s" if seconds < 120 else clock(seconds)
