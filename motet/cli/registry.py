"""Commands on what is registered: models and tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import click

from motet.cli.cluster import execute_workers
from motet.cli.show import as_json, connect, console, cut, put_json, put_table


@click.group(
    invoke_without_command=True,
    epilog="""\b
Examples:
  motet models
  motet models show news-topics
  motet models add ./my-model --name my-model""",
)
@as_json
@click.pass_context
def models(context: click.Context, as_json: bool) -> None:
    """List the registered models, or change the registry."""
    if context.invoked_subcommand is not None:
        return
    with connect() as client:
        found = client.models()
    if as_json:
        put_json([model.to_json() for model in found])
        return
    put_table(
        ("!model", "answers", "#labels", "on trunk", "#max tokens", "#dim", "formats", "#MB", "licence"),
        (
            (
                m.ref,
                m.answers,
                str(len(m.labels) or "–"),
                m.trunk_model or "–",
                f"{m.max_tokens:,}" if m.max_tokens else "–",
                str(m.dim or "–"),
                ", ".join(("fp32", *m.formats)),
                f"{m.bytes / 1e6:,.1f}",
                cut(m.licence, 24),
            )
            for m in found
        ),
        empty="no models; register one with: motet models add SOURCE",
        drop=("formats", "#dim", "#MB", "#max tokens", "licence"),
    )


@models.command(
    "show",
    epilog="""\b
Example:
  motet models show news-topics""",
)
@click.argument("name")
@as_json
def show_model(name: str, as_json: bool) -> None:
    """Show what is known of a model: NAME, or NAME@VERSION."""
    with connect() as client:
        model = client.model(name)
    record = model.to_json()
    if as_json:
        put_json(record)
        return
    out = console()
    for key, value in record.items():
        if value:
            words = ", ".join(map(str, value)) if isinstance(value, list) else value
            out.print(f"{key:>12}  {words}", soft_wrap=True)


@models.command(
    "add",
    context_settings={"ignore_unknown_options": True, "help_option_names": []},
    epilog="""\b
Examples:
  motet models add ./my-model --name my-model
  motet models add --help      (what `python -m workers register` takes)""",
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="SOURCE [OPTION…]")
def add_model(arguments: Sequence[str]) -> NoReturn:
    """Register a model: compute its digests, run one batch, check its fast formats, upload its files.

    Runs `python -m workers register` with the same arguments.
    """
    execute_workers(["register", *arguments], admin=True)


@models.command(
    "rm",
    epilog="""\b
Example:
  motet models rm my-model@1""",
)
@click.argument("ref", metavar="NAME@VERSION")
@as_json
def remove_model(ref: str, as_json: bool) -> None:
    """Take a model from the registry. Refused while a running job uses it."""
    with connect(admin=True) as client:
        client.remove_model(ref)
    if as_json:
        put_json({"removed": ref})


@click.group(
    epilog="""\b
Examples:
  motet token create laptop --scope user
  motet token list
  motet token revoke 3f9c2a"""
)
def token() -> None:
    """Make, list and revoke tokens. Needs an administrator's token."""


@token.command(
    "create",
    epilog="""\b
Example:
  motet token create laptop --scope user --expires-days 90""",
)
@click.argument("name")
@click.option(
    "--scope",
    type=click.Choice(["user", "read", "worker", "admin"]),
    default="user",
    show_default=True,
    help="user: submit and read; read: read; worker: what a worker needs; admin: everything.",
)
@click.option("--tenant", help="Whose jobs it sees.")
@click.option("--expires-days", type=click.FloatRange(0, min_open=True), help="Default: never.")
@as_json
def create_token(
    name: str, scope: Any, tenant: str | None, expires_days: float | None, as_json: bool
) -> None:
    """Make a token called NAME and print it. This is the only time it is shown."""
    with connect(admin=True) as client:
        made = client.create_token(name, scope, tenant=tenant, expires_days=expires_days)
    if as_json:
        put_json(made)
    else:
        click.echo(made.token)
        click.echo("keep it: it is shown this once; use it as MOTET_TOKEN", err=True)


@token.command(
    "list",
    epilog="""\b
Example:
  motet token list --json""",
)
@as_json
def list_tokens(as_json: bool) -> None:
    """List the tokens, without their secrets."""
    with connect(admin=True) as client:
        found = client.tokens()
    if as_json:
        put_json(found)
        return
    put_table(
        ("id", "name", "scope", "tenant", "created", "expires"),
        (
            (t.id, t.name, t.scope, t.tenant, (t.created or "")[:10], (t.expires or "never")[:10])
            for t in found
        ),
        empty="no tokens",
    )


@token.command(
    "revoke",
    epilog="""\b
Example:
  motet token revoke 3f9c2a""",
)
@click.argument("token_id", metavar="ID")
@as_json
def revoke_token(token_id: str, as_json: bool) -> None:
    """End a token at once."""
    with connect(admin=True) as client:
        client.revoke_token(token_id)
    if as_json:
        put_json({"revoked": token_id})


def _day(moment: str | None) -> str:
    return (moment or "")[:10]
