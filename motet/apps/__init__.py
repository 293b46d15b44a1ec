"""Applications: what people come for, each a job on real data that ends in a score (`motet app NAME`).

How one is made. ``motet/apps/NAME.py`` tells the story from top to bottom and ends in one value::

    APPLICATION = Application(run=run, registers=("--function support-urgency --try none",), live=live)

    def run(stage: StagedCluster, asked: RunOptions) -> AppOutcome: ...

``run`` reads its data (``motet/apps/data/``, ``motet.datasets``), trains with ``stage.train(...)``, runs its job with
``stage.run(rows, tasks)``, prints with ``stage.story``, draws into ``asked.folder`` (``motet.apps.pictures``) and returns
the ``AppOutcome``: scores, each beside its baselines (``motet.apps.scores``). The frame starts and stops the cluster, prints the
scores and writes the JSON. A Function that it registers is a plain function in ``motet/apps/functions/``, named as an
entry point of the group ``motet.engines`` in pyproject.toml. A line for it stands in ``SENTENCES`` below.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING

from motet.errors import SetupError

if TYPE_CHECKING:
    from motet.apps.application import Application

#: Each application, and what it is for. They run in this order with `motet app all`.
SENTENCES: Mapping[str, str] = {
    "support": "a queue of customers sorted by urgency, each with intent, mood, and a drafted reply",
    "films": "ten films for each viewer, with a reason",
    "clinic": "findings and candidate diseases from a note, for a doctor to judge",
    "risk": "credit, card payments and news: a warning before the loss",
    "translate": "texts in another language, by a translation model from a package",
    "digest": "several questions about each long article, which is read once",
}


def find(name: str) -> Application:
    """The application of this name. Raises SetupError where there is none."""
    if name not in SENTENCES:
        raise SetupError(f"no application {name!r}; there are {', '.join(SENTENCES)}, and all")
    application: Application = import_module(f"{__name__}.{name}").APPLICATION
    return application
