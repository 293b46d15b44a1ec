"""Pages and pictures from Jinja2 templates: one frame, one style sheet and one set of colours for all of them.

A template escapes every value that is put into it, so a user's text is never markup. Jinja2 comes with the extras
``evaluate`` and ``scheduler``; it is imported by the first page, not by ``import motet``.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

from motet.errors import SetupError

if TYPE_CHECKING:
    from jinja2 import Environment

#: Colours that tell things apart (``--p0`` … ``--p7`` in colours.css): a ninth thing looks like the first.
COLOURS = 8


@cache
def environment(*packages: str) -> Environment:
    """The templates of this folder, and those in the folder ``templates`` of each package, which may extend these.

    Raises SetupError where Jinja2 is not installed.
    """
    try:
        from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
        from markupsafe import Markup
    except ImportError:
        raise SetupError("pages are drawn with Jinja2: pip install 'motet[evaluate]'") from None

    loaders = [*(PackageLoader(package) for package in packages), PackageLoader(__name__, ".")]
    found = Environment(
        loader=ChoiceLoader(loaders),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    found.filters.update(px=px, per_cent=per_cent)
    found.globals.update(colours=Markup(read("colours.css")), style=Markup(style()), COLOURS=COLOURS)
    return found


def px(value: float) -> str:
    """A length: ``12``, ``12.5``."""
    return f"{value:.1f}".removesuffix(".0")


def per_cent(value: float) -> str:
    """A length of a picture that is as wide as its place: text beside it keeps its size on every screen."""
    return f"{value:.2f}%"


def style() -> str:
    """The whole style sheet, as it stands in each page."""
    return read("colours.css") + read("style.css")


def read(name: str, package: str = __name__) -> str:
    """A file that lies beside the templates of a package."""
    return (files(package) / name).read_text("utf-8")
