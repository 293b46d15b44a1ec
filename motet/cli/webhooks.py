"""Commands on webhooks: where motet tells of events (docs/webhooks.md)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from motet.cli.jobs import duration
from motet.cli.show import as_json, connect, find_job, put_json, put_table
from motet.words import count


@click.group(
    epilog="""\b
Examples:
  motet webhooks add https://example.com/motet --events job.ended
  motet webhooks list
  motet webhooks test wh_3f9c2a8e51d0
  motet webhooks replay wh_3f9c2a8e51d0 --since 2h"""
)
def webhooks() -> None:
    """Be told when jobs end, or when an answer is what you wait for."""


@webhooks.command(
    "add",
    epilog="""\b
Example:
  motet webhooks add https://example.com/motet --events job.ended,row.matched""",
)
@click.argument("url")
@click.option(
    "--events",
    metavar="NAME[,NAME…]",
    help="job.ended, batch.ended, row.matched. Default: all of them.",
)
@click.option("--job", help="Of this job alone.")
@as_json
def add_webhook(url: str, events: str | None, job: str | None, as_json: bool) -> None:
    """Post events to URL from now on; print the secret that proves them. This is the only time it is shown."""
    names: Sequence[Any] | None = None if events is None else [one.strip() for one in events.split(",")]
    with connect() as client:
        made = client.add_webhook(url, events=names, job=None if job is None else find_job(client, job).id)
    if as_json:
        put_json(made)
        return
    click.echo(f"{made.id}\n{made.secret}")
    click.echo(
        "keep the secret: it is shown this once; docs/webhooks.md says how to verify with it", err=True
    )


@webhooks.command(
    "list",
    epilog="""\b
Example:
  motet webhooks list --json""",
)
@as_json
def list_webhooks(as_json: bool) -> None:
    """List the webhooks, and how their deliveries stand."""
    with connect() as client:
        found = client.webhooks()
    if as_json:
        put_json(found)
        return
    put_table(
        ("id", "!url", "events", "job", "#delivered", "#waiting", "#given up", "last error"),
        (
            (
                one.id,
                one.url,
                ", ".join(one.events),
                (one.job or "all")[:8],
                f"{one.delivered:,}",
                f"{one.waiting:,}",
                f"{one.given_up:,}",
                one.last_error or "–",
            )
            for one in found
        ),
        empty="no webhooks; make one with: motet webhooks add URL",
        drop=("job", "events"),
    )


@webhooks.command(
    "test",
    epilog="""\b
Example:
  motet webhooks test wh_3f9c2a8e51d0""",
)
@click.argument("webhook", metavar="ID")
@as_json
def test_webhook(webhook: str, as_json: bool) -> None:
    """Send a message of type "test" at once; fail if it is not taken."""
    with connect() as client:
        found = client.test_webhook(webhook)
    if as_json:
        put_json(found)
    elif found.taken:
        click.echo(f"taken: status {found.status} after {found.seconds:.2f} s")
    if not found.taken:
        raise click.ClickException(f"not taken: {found.error}")


@webhooks.command(
    "replay",
    epilog="""\b
Examples:
  motet webhooks replay wh_3f9c2a8e51d0
  motet webhooks replay wh_3f9c2a8e51d0 --since 2h""",
)
@click.argument("webhook", metavar="ID")
@click.option(
    "--since", callback=duration, metavar="2h", help="And all that happened since then, taken or not."
)
@click.option("--event", metavar="WEBHOOK-ID", help="This one alone, such as msg_17_64f.")
@as_json
def replay(webhook: str, since: float | None, event: str | None, as_json: bool) -> None:
    """Deliver again what was given up. A receiver tells by its webhook-id that it has an event already."""
    with connect() as client:
        again = client.replay_webhook(webhook, event=event, since_s=since)
    if as_json:
        put_json({"events": again})
    else:
        click.echo(f"{count(again, 'event')} delivered again")


@webhooks.command(
    "remove",
    epilog="""\b
Example:
  motet webhooks remove wh_3f9c2a8e51d0""",
)
@click.argument("webhook", metavar="ID")
@as_json
def remove_webhook(webhook: str, as_json: bool) -> None:
    """Tell it nothing more."""
    with connect() as client:
        client.remove_webhook(webhook)
    if as_json:
        put_json({"removed": webhook})
