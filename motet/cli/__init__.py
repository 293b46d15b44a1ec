"""The command line ``motet``. Commands are thin: they parse, call the client, and print.

Modules load what is heavy inside their commands, so that help comes at once. ``main`` is the one place where
errors become a line and an exit code: 1, or 2 where the command itself was written wrongly.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

from motet.cli.apps import app
from motet.cli.cluster import demo, drain, resume, up, worker, workers
from motet.cli.doctor import doctor
from motet.cli.evaluate import evaluate
from motet.cli.explain import explain
from motet.cli.feeds import ask, close, open_, tail
from motet.cli.jobs import cancel, jobs, plan, results, rm, submit
from motet.cli.models import compress
from motet.cli.registry import models, token
from motet.cli.simulate import simulate
from motet.cli.top import top
from motet.cli.train import train
from motet.cli.watch import watch
from motet.cli.webhooks import webhooks
from motet.errors import InvalidJob, MotetError


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="""\b
Start here:
  motet up                                    a whole cluster on this machine
  motet submit tickets.jsonl --task topic=classify:news-topics --wait --out topics.parquet

MOTET_URL and MOTET_TOKEN name the server; without them it is the one that `motet up` started here.""",
)
@click.version_option(package_name="motet", message="motet %(version)s")
def command() -> None:
    """Several AI tasks at once over one shared model pass, merged into one row per input."""


for part in (
    *(up, demo, app, submit, plan, jobs, watch, explain, top, results, evaluate, cancel, rm),
    *(open_, ask, tail, close),
    *(train, models, compress, workers, worker, drain, resume, simulate, token, webhooks, doctor),
):
    command.add_command(part)


def main(args: Sequence[str] | None = None) -> None:
    """Run a command and exit. Prints a stack trace only with ``MOTET_DEBUG=1``."""
    sys.exit(_run(args))


def _run(args: Sequence[str] | None) -> int:
    try:
        code = command.main(args=args, prog_name="motet", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return 2
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "motet"
        return _fail(f"{error.format_message().rstrip('.')}; see `{path} --help`", 2)
    except click.ClickException as error:
        return _fail(error.format_message())
    except (click.Abort, KeyboardInterrupt):
        return 130
    except BrokenPipeError:
        # The reader has seen enough. Python would complain when it closes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if os.environ.get("MOTET_DEBUG") == "1":
            raise
        return _fail(_words(error))


def _words(error: Exception) -> str:
    if isinstance(error, MotetError | TimeoutError):
        lines = str(error).splitlines() or [type(error).__name__]
        if isinstance(error, InvalidJob):
            in_rows = any(problem.row is not None for problem in error.problems)
            if len(lines) > 1:
                lines.insert(0, f"{len(lines)} problems{' (rows count from 0)' if in_rows else ''}:")
            elif in_rows:
                lines[0] += " (rows count from 0)"
        return "\n  ".join(lines)
    if isinstance(error, OSError) and error.strerror:
        name = f"{error.filename!r}: " if error.filename else ""
        return f"{name}{error.strerror.lower()}; check the path"
    return f"unexpected {type(error).__name__}; set MOTET_DEBUG=1 to see where, and report it"


def _fail(words: str, code: int = 1) -> int:
    click.echo(f"error: {words}", err=True)
    return code
