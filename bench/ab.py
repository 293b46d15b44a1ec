"""What a change costs: one command in two worktrees in turn, compared by CPU seconds.

    python bench/ab.py OLD NEW COMMAND…
    python bench/ab.py ../main . python bench/llm.py --quick --only prefix
    python bench/ab.py --rounds 5 ../main . python -m pytest -q tests/unit/test_plan.py

OLD and NEW are two checkouts (`git worktree add ../main main` makes one). COMMAND runs in each, from its root, with
that root as PYTHONPATH; `python` is the interpreter that runs this, so that the packages are the same on both sides. A
round is one run of each, every second round in reverse; an uncounted first run of each fills caches. CPU seconds are
user + system of the command and of all processes below it, as the kernel counts those that have ended: neighbours on
the machine disturb them far less than a clock, but not nothing. Compare two equal trees to see how much.

ratio          NEW's CPU seconds / OLD's, median of the rounds; above 1, NEW costs more
least, most    the smallest and the largest ratio of a round: where 1 lies between them, it may be chance

Last line, JSON: ratio, least, most, rounds, old_cpu_s and new_cpu_s (medians), command.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from family import evict, own_children, reaped_s
from harness import ROOT, Size, finish, in_turn, options, say, table

#: What a smoke run compares: this tree with itself.
NOTHING = ("python", "-c", "pass")
#: Lines of a failed command that are shown.
TAIL = 20


def main() -> int:
    parser = options(__doc__)
    parser.usage = "ab.py [--rounds N] [--save FILE] OLD NEW COMMAND… | ab.py --smoke"
    parser.add_argument("--rounds", type=int, help="[default: 5; 2 with --quick, 1 with --smoke]")
    parser.add_argument("old", nargs="?", type=Path, help="the checkout as it was")
    parser.add_argument("new", nargs="?", type=Path, help="the checkout as it is to be")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what to run in each, with its arguments")
    arguments = parser.parse_args()
    if arguments.size is Size.SMOKE:
        arguments.old, arguments.new, arguments.command = ROOT, ROOT, list(NOTHING)
    if not arguments.command:
        parser.error(
            "got no command; expected OLD NEW COMMAND…, such as: ab.py ../main . python bench/llm.py --quick"
        )
    for side in ("old", "new"):
        if not getattr(arguments, side).is_dir():
            parser.error(f"{side.upper()}: got {getattr(arguments, side)}; expected a checkout's folder")
    rounds = arguments.rounds or arguments.size.of(full=5, quick=2, smoke=1)
    if rounds < 1:
        parser.error(f"--rounds: got {rounds}; expected a whole number from 1")
    command = arguments.command
    sides = {side: _side(getattr(arguments, side), command) for side in ("old", "new")}
    try:
        with own_children():
            for name, run in sides.items():
                say(f"  {name} first, not counted: {run():.2f} s")
            found = in_turn(sides, rounds, lambda side, cpu_s: say(f"  {side:<24}{cpu_s:10.2f} s"))
    except Failed as error:
        say(str(error))
        return 1
    figures = compared(found["old"], found["new"])
    table(
        f"CPU seconds of {' '.join(command)}",
        ("", "median", "least", "most"),
        [(side, *(f"{f(s):.2f}" for f in (statistics.median, min, max))) for side, s in found.items()],
    )
    say(f"new ÷ old: {figures['ratio']:.4f} ({figures['least']:.4f} to {figures['most']:.4f})")
    told = {**figures, "rounds": rounds, "command": command}
    finish("ab", told, arguments, whole=False, details={"seconds": found})
    return 0


def compared(old: Sequence[float], new: Sequence[float]) -> dict[str, float]:
    """Ratios within the rounds, and the medians of both sides."""
    ratios = [b / a for a, b in zip(old, new, strict=True)]
    return {
        "ratio": round(statistics.median(ratios), 4),
        "least": round(min(ratios), 4),
        "most": round(max(ratios), 4),
        "old_cpu_s": round(statistics.median(old), 3),
        "new_cpu_s": round(statistics.median(new), 3),
    }


class Failed(Exception):
    """The command failed in one of the trees; the message says where and how."""


def _side(root: Path, command: Sequence[str]) -> Callable[[], float]:
    """Run the command in a tree, and return the CPU seconds of it and of all that it started."""
    root = root.resolve()
    own = [sys.executable if command[0] == "python" else command[0], *command[1:]]

    def run() -> float:
        before = reaped_s()
        with tempfile.TemporaryFile() as said:
            try:
                code = subprocess.run(
                    own,
                    cwd=root,
                    env=os.environ | {"PYTHONPATH": str(root)},
                    stdout=said,
                    stderr=said,
                    check=False,
                ).returncode
            except OSError as error:
                raise Failed(f"{root}: {command[0]} cannot be run: {error.strerror}") from None
            # Processes that outlive the command are ours now: they count, and do not disturb the other side.
            evict(patience_s=10.0)
            if code != 0:
                raise Failed(f"{root}: ended with exit code {code}; the end of what it said:\n{_tail(said)}")
        return reaped_s() - before

    return run


def _tail(said: IO[bytes]) -> str:
    said.seek(0)
    return "\n".join(said.read().decode(errors="replace").splitlines()[-TAIL:])


if __name__ == "__main__":
    sys.exit(main())
