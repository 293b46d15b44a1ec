"""Commands on what is registered: models and tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from motet.cli.models import add_model
from motet.cli.show import PositiveNumber, as_json, connect, console, cut, find_job, put_json, put_table

if TYPE_CHECKING:
    from motet.client import Client
    from motet.messages.registry import Alias


@click.group(
    invoke_without_command=True,
    epilog="""\b
Examples:
  motet models
  motet models show news-topics
  motet models add ./my-model --name my-model
  motet models promote my-model@2 prod        (tasks may ask for my-model@prod)
  motet models rollback my-model@prod""",
)
@as_json
@click.pass_context
def models(context: click.Context, as_json: bool) -> None:
    """List the registered models, or change the registry."""
    if context.invoked_subcommand is not None:
        return
    with connect() as client:
        found, named = client.models(), _named(client)
    if as_json:
        put_json([{**model.to_json(), "aliases": named[model.ref]} for model in found])
        return
    put_table(
        (
            "!model",
            "aliases",
            "answers",
            "#labels",
            "on trunk",
            "#max tokens",
            "#dim",
            "formats",
            "#MB",
            "licence",
        ),
        (
            (
                m.ref,
                ", ".join(one.alias.partition("@")[2] for one in named[m.ref]) or "–",
                m.answers,
                str(len(m.labels) or "–"),
                m.trunk_model or "–",
                f"{m.max_tokens:,}" if m.max_tokens else "–",
                str(m.dim or "–"),
                "–" if m.answers == "artefact" else ", ".join(("fp32", *m.formats)),
                f"{m.bytes / 1e6:,.1f}",
                cut(m.licence, 24),
            )
            for m in found
            # The trainer of each encoder is a model too, which `motet train` alone asks.
            if m.answers != "models"
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
    """Show what is known of a model: NAME, NAME@VERSION or NAME@ALIAS."""
    with connect() as client:
        model, named = client.model(name), _named(client)
    record = model.to_json()
    if as_json:
        put_json({**record, "aliases": named[model.ref]})
        return
    record["aliases"] = [_in_words(one) for one in named[model.ref]]
    out = console()
    for key, value in record.items():
        if value:
            words = ", ".join(map(str, value)) if isinstance(value, list) else value
            out.print(f"{key:>12}  {words}", soft_wrap=True)


models.add_command(add_model)


@models.command(
    "adopt",
    epilog="""\b
Example:
  motet models adopt 0198f2c4""",
)
@click.argument("job")
@as_json
def adopt(job: str, as_json: bool) -> None:
    """Register the models that a training JOB made. Needs an administrator's token."""
    from motet.training.run import TrainRun

    with connect() as client:
        found = find_job(client, job)
        refs = TrainRun(found, found.name).register()
    if as_json:
        put_json({"models": refs})
    else:
        console().print(f"registered {', '.join(refs)}", soft_wrap=True, highlight=False)


@models.command(
    "rm",
    epilog="""\b
Example:
  motet models rm my-model@1""",
)
@click.argument("ref", metavar="NAME@VERSION")
@as_json
def remove_model(ref: str, as_json: bool) -> None:
    """Take a model from the registry. Refused while a running job uses it or an alias means it."""
    with connect(admin=True) as client:
        client.remove_model(ref)
    if as_json:
        put_json({"removed": ref})


@models.command(
    "promote",
    epilog="""\b
Example:
  motet models promote support@2 prod
  motet submit tickets.jsonl --task topic=classify:support@prod --wait""",
)
@click.argument("ref", metavar="NAME@VERSION")
@click.argument("alias")
@as_json
def promote_model(ref: str, alias: str, as_json: bool) -> None:
    """Let NAME@ALIAS mean this version from now on.

    A job uses the version that the alias meant when it was submitted, and records it: later promotions change nothing
    for it.
    """
    with connect(admin=True) as client:
        made = client.promote(ref, alias)
    _put_alias(made, as_json)


@models.command(
    "rollback",
    epilog="""\b
Example:
  motet models rollback support@prod""",
)
@click.argument("alias", metavar="NAME@ALIAS")
@as_json
def roll_back_alias(alias: str, as_json: bool) -> None:
    """Let an alias mean again what it meant before its last promotion. Twice goes back twice."""
    with connect(admin=True) as client:
        made = client.rollback(alias)
    _put_alias(made, as_json)


@models.command(
    "unalias",
    epilog="""\b
Example:
  motet models unalias support@prod""",
)
@click.argument("alias", metavar="NAME@ALIAS")
@as_json
def remove_alias(alias: str, as_json: bool) -> None:
    """Take an alias away. The version that it meant stays; jobs that named it keep their record."""
    with connect(admin=True) as client:
        client.remove_alias(alias)
    if as_json:
        put_json({"removed": alias})


def _put_alias(made: Alias, as_json: bool) -> None:
    if as_json:
        put_json(made)
    else:
        click.echo(_in_words(made))


def _in_words(alias: Alias) -> str:
    before = f"before: {alias.before}" if alias.before else "nothing before"
    return f"{alias.alias} → {alias.ref} ({before})"


def _named(client: Client) -> Mapping[str, list[Alias]]:
    """``name@version`` -> the aliases that mean it."""
    found = defaultdict[str, list["Alias"]](list)
    for alias in client.aliases():
        found[alias.ref].append(alias)
    return found


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
  motet token create laptop --scope user --expires-days 90
  motet token create notebook --openai > openai.env""",
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
@click.option("--expires-days", type=PositiveNumber(), help="Default: never.")
@click.option("--openai", is_flag=True, help="Print the two variables that OpenAI's clients read.")
@as_json
def create_token(
    name: str, scope: Any, tenant: str | None, expires_days: float | None, openai: bool, as_json: bool
) -> None:
    """Make a token called NAME and print it. This is the only time it is shown."""
    with connect(admin=True) as client:
        made = client.create_token(name, scope, tenant=tenant, expires_days=expires_days)
        url = client.url
    if openai and not as_json:
        click.echo(f"export OPENAI_BASE_URL={url}/openai/v1")
        click.echo(f"export OPENAI_API_KEY={made.token}")
        click.echo("keep them: the key is shown this once", err=True)
    elif as_json:
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
