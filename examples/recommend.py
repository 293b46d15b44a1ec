"""Recommendations by a Python function that reads what was learned from data: an artefact, refitted when there is more.

On every worker, install this file as a package with the entry point `recommend = recommend:recommend` of the group
`motet.engines`; then once, with an administrator's token:

    motet models add --function recommend
    python examples/recommend.py
"""

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from motet import Client, Function

HISTORIES = [
    ["Alien", "Aliens"],
    ["Alien", "Blade Runner"],
    ["Alien", "Aliens", "Brazil"],
    ["Clue", "Brazil"],
]


def recommend(
    rows: list[dict[str, Any]], *, k: int = 3, artefact: dict[str, dict[str, int]]
) -> list[list[str]]:
    """What was seen together most often with the films of each row. Runs at the workers."""
    picks = []
    for row in rows:
        together = Counter[str]()
        for title in row["seen"]:
            together.update(artefact.get(title, {}))
        ranked = sorted(together, key=lambda title: (-together[title], title))
        picks.append([title for title in ranked if title not in row["seen"]][:k])
    return picks


def fit(histories: list[list[str]], path: Path) -> Path:
    """Count which films were seen together."""
    together: dict[str, Counter[str]] = {}
    for history in histories:
        for title in history:
            together.setdefault(title, Counter()).update(other for other in history if other != title)
    path.write_text(json.dumps(together))
    return path


def main() -> None:
    tasks = {"picks": Function("recommend", inputs=("seen",), params={"k": 2}, artefact="seen-together")}
    rows = [{"seen": ["Alien"]}, {"seen": ["Clue"]}]
    with Client() as client, tempfile.TemporaryDirectory() as folder:
        for histories in (HISTORIES, [*HISTORIES, *[["Clue", "Dune"]] * 2]):
            # Content that is registered already stays the version that it is.
            model = client.add_artefact(fit(histories, Path(folder, "together.json")), "seen-together")
            job = client.submit(rows, tasks)
            for row in job.results():
                print(f"{model.ref}: seen {rows[row.index]['seen']}, next {row['picks'].value}")


if __name__ == "__main__":
    main()
