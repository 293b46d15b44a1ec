"""`python -m workers`: the launcher of this host's workers, and what an administrator runs with their engines.

Options are declared by the same commands of `motet` (motet/cli/worker_commands.py); ``health`` is a container's own.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import click

from motet.cli.cluster import worker
from motet.cli.models import add_model, compress
from motet.errors import MotetError


@click.command(
    "health",
    epilog="""\b
Example:
  python -m workers health && echo well""",
)
def health() -> int:
    """Ask the cluster at MOTET_URL, with MOTET_TOKEN, whether every worker of this host beats."""
    from workers.launch.health import check_beats

    return check_beats()


def _launch(**options: Any) -> int:
    from workers.launch.launcher import launch

    return launch(**options)


def _register(**options: Any) -> int:
    from workers.registrar.register import NewModel, register

    return register(NewModel(**options))


def _compress(**options: Any) -> int:
    from workers.registrar.compress import CompressOptions, compress_registered

    return compress_registered(CompressOptions(**options))


@click.pass_context
def _launch_alone(context: click.Context, /, **options: Any) -> int | None:
    return None if context.invoked_subcommand else _launch(**options)


program = click.Group(
    "python -m workers",
    params=worker.params,
    callback=_launch_alone,
    invoke_without_command=True,
    commands={"register": add_model, "compress": compress, "health": health},
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help=worker.help,
    epilog=worker.epilog,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 after a clean end, 2 where the set-up must be mended first."""
    works = {"register": _register, "compress": _compress}
    try:
        code = program.main(arguments, "python -m workers", standalone_mode=False, obj=works)
        return code if isinstance(code, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:
        return 130
    except MotetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
