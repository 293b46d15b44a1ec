"""Commands that the workers' own program carries out: declared once, here and beside, for `motet` and `python -m workers`.

`motet` reads the options, so that help and mistakes are the same as everywhere, and then becomes `python -m workers`
with the same arguments, in an environment that says where the server is. That program reads them by the same
declaration, and has the work under the command's name.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import click

from motet.distributions import need

#: What each command does with its options, by name: the context's object in `python -m workers`.
Works = Mapping[str, Callable[..., int]]


class WorkerCommand(click.Command):
    """A command whose callback checks the options, and whose work is done by `python -m workers`."""

    def __init__(self, *args: Any, work: str = "", admin: bool = False, **attributes: Any) -> None:
        """``work``: the command of `python -m workers`; "" is that program itself, the launcher. ``admin``: whether it
        needs an administrator's token."""
        super().__init__(*args, **attributes)
        self.work, self.admin = work, admin

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[__name__] = [self.work, *args] if self.work else list(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> int:
        super().invoke(ctx)
        if ctx.obj is None:
            _execute_workers(ctx.meta[__name__], admin=self.admin)
        works: Works = ctx.obj
        return works[self.work](**ctx.params)


def _execute_workers(arguments: Sequence[str], *, admin: bool) -> NoReturn:
    """Become `python -m workers …`, told where the server is and with which token."""
    from motet.errors import MotetError
    from motet.http import Address

    need("worker")
    env = dict(os.environ)
    try:
        address = Address.find(admin=admin, env=env)
        env |= {"MOTET_URL": address.url}
        if not env.get("MOTET_TOKEN_FILE"):
            env |= {"MOTET_TOKEN": address.token}
    except MotetError:
        # The worker's own settings say what is missing, and may come from elsewhere.
        pass
    # Not from the current folder, which may hold another package of that name.
    os.execve(sys.executable, [sys.executable, "-P", "-m", "workers", *arguments], env)
