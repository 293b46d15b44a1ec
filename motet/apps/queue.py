"""The queue of `motet app support`: sorted by urgency, as a table, as a file, and live in the terminal."""

from __future__ import annotations

import json
import secrets
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from motet.cli.show import cut, table
from motet.demo.stage import StagedCluster
from motet.errors import MotetError
from motet.results import Row
from motet.tasks import Task

if TYPE_CHECKING:
    from rich.table import Table

#: Rows of the table.
_SHOWN = 12
#: Seconds that a typed turn may take: of a CPU that other programs use.
_WITHIN_S = 120.0


def by_urgency(rows: Iterable[Row]) -> list[Row]:
    """The most urgent first; of those that are as urgent, in the order in which they came. Rows without one come last."""
    return sorted(rows, key=lambda row: (-_urgency(row).get("points", -1), row.index))


def needs_person(row: Row) -> bool:
    """Whether a person must look: no clear intent, one asked for a person, or a draft that does not fit."""
    return bool(_urgency(row).get("person", True)) or (row["fits"].ok and str(row["fits"]) == "no")


def as_table(rows: Sequence[Row]) -> Table:
    """The beginning of the queue."""
    return table(
        ("!urgency", "wants", "mood", "says", "who and what", "because", "draft", "person?"),
        (
            (
                _urgency(row).get("level", "–"),
                cut(str(row["intent"]), 24),
                str(row["mood"]),
                cut(_urgency(row).get("said", ""), 44),
                cut(", ".join(_named(row)), 24),
                cut(", ".join(_urgency(row).get("because", ())), 44),
                cut(str(row["reply"]), 60) if row["reply"].ok else "",
                "yes" if needs_person(row) else "",
            )
            for row in rows[:_SHOWN]
        ),
    )


def counted(rows: Sequence[Row]) -> dict[str, Any]:
    """How many there are of each level, how many have a draft, and the share that needs a person."""
    return {
        "levels": dict(Counter(_urgency(row).get("level", "unknown") for row in rows)),
        "drafts": sum(row["reply"].ok for row in rows),
        "person_needed": round(sum(map(needs_person, rows)) / len(rows), 4) if rows else None,
    }


def written(path: Path, rows: Sequence[Row]) -> Path:
    """The queue as JSON Lines, the most urgent first."""
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            told = {
                "dialogue": row.index,
                "intent": row["intent"].value,
                "mood": row["mood"].value,
                "urgency": row["urgency"].value,
                "named": _named(row),
                "reply": row["reply"].value,
                "fits": row["fits"].value,
                "person": needs_person(row),
            }
            file.write(json.dumps(told, ensure_ascii=False) + "\n")
    return path


def converse(stage: StagedCluster, tasks: Mapping[str, Task]) -> None:
    """Answer each typed turn as a row of an open job, and tell where its queue is; an empty line begins with another customer."""
    story, messages = stage.story, list[dict[str, str]]()
    # A name of its own: that of a conversation which was closed is taken.
    with stage.client.open(tasks, name=f"{stage.name} {secrets.token_hex(4)}") as feed:
        stage.job = feed.job.id
        story.say(f"\nthe queue, live: {stage.client.url}/jobs/{feed.job.id}/queue?by=urgency.points")
        story.say(
            "type what a customer says; an empty line: another customer; end of input (Ctrl-D) ends it\n"
        )
        for line in _typed():
            if not line:
                messages.clear()
                story.say("— another customer —")
                continue
            messages.append({"role": "user", "content": line})
            try:
                asked = {"messages": messages, "draft_from": 0}
                with feed.stream(asked, task="reply", within_s=_WITHIN_S) as said:
                    story.write("draft: ")
                    for delta in said:
                        story.write(delta.text)
                    story.write("\n")
                row = said.row
                assert row is not None, "it is there behind the last of its text"
            except MotetError as error:
                story.say(f"no answer: {error}")
                messages.pop()
                continue
            urgency = _urgency(row)
            why = f" ({', '.join(urgency['because'])})" if urgency.get("because") else ""
            person = "  → a person must look" if needs_person(row) else ""
            story.say(
                f"wants {row['intent']}, sounds {row['mood']}, urgency {urgency.get('level', '?')}{why}{person}\n"
            )
            if row["reply"].ok:
                messages.append({"role": "assistant", "content": str(row["reply"])})
        feed.close()


def _typed() -> Iterator[str]:
    """The lines that are typed, until the end of input."""
    prompt = "customer> " if sys.stdin.isatty() else ""
    with suppress(EOFError):
        while True:
            yield input(prompt).strip()


def _named(row: Row) -> list[str]:
    """Names, places, amounts in what was said, as far as its beginning is told."""
    said = _urgency(row).get("said", "")
    spans = row["who"].value or () if "who" in row else ()
    return [said[span.start : span.end] for span in spans if span.end <= len(said)]


def _urgency(row: Row) -> Mapping[str, Any]:
    value = row["urgency"].value
    return value if isinstance(value, Mapping) else {}
