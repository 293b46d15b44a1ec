"""The templates of the API's pages, with what they may call, and the policy that every page is sent with.

Style and script stand in the page itself, and the policy names both by digest: nothing else is applied or run, and
nothing is loaded from anywhere.
"""

from __future__ import annotations

import base64
import hashlib
from typing import Any

from markupsafe import Markup

from motet.pages import environment, read, style
from motet.states import ENDED
from motet.words import count
from scheduler.api import charts, words

#: Renews the page of a running job.
SCRIPT = read("templates/live.js", "scheduler.api")

_TEMPLATES = environment("scheduler.api")
_TEMPLATES.filters.update(
    compact=words.compact,
    duration=words.duration,
    moment=words.moment,
    number=words.number,
    percent=words.percent,
    thousands="{:,}".format,
)
_TEMPLATES.globals.update(
    ENDED=ENDED,
    script=Markup(SCRIPT),
    count=count,
    boxes=charts.boxes,
    colour=charts.colour,
)


def render(template: str, **facts: Any) -> str:
    """A whole page. A value that the template names and ``facts`` lacks is an error, not a gap."""
    return _TEMPLATES.get_template(template).render(facts)


def _digest(content: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() + "'"


#: Content-Security-Policy of every page.
POLICY = "; ".join(
    (
        "default-src 'none'",
        f"style-src {_digest(style())}",
        f"script-src {_digest(SCRIPT)}",
        "connect-src 'self'",
        # Pictures in small stand in the page itself, like all else.
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
