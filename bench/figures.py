"""Run every benchmark in full on this machine, and write the tables of README.md and docs/ out of what they measured.

    python bench/figures.py                        all of them, some hours; then the tables [make figures]
    python bench/figures.py --only storage,scale   these again, then the tables
    python bench/figures.py --tables               the tables alone, out of bench/results

Keep the machine free meanwhile. Where a benchmark fails, the others go on, its older figures stay, and the last line
names it; the next call runs those alone that have not succeeded yet on this machine, unless --anew. The rivals need an
environment of their own first (bench/requirements-rivals.txt). Tables are made by bench/pages.py, and by no hand: a test
compares README with bench/results.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from harness import RESULTS, ROOT, Options, Size, hardware, machine, options, say
from pages import written

BENCH = Path(__file__).resolve().parent
#: In this order: those that want the quietest machine first, the longest last.
BENCHES = (
    *(
        "storage",
        "dispatch",
        "memory",
        "scale",
        "latency",
        "interactive",
        "live",
        "tax",
        "fusion",
        "media",
        "llm",
        "doors",
        "compress",
    ),
    *("slow", "truth", "rivals", "growth", "simulate", "train", "apps", "soak"),
)
#: What `--smoke` runs: the one that takes least.
SMOKE = ("growth",)
PAGES = ("README.md", "docs/live.md", "docs/scale.md")
#: Which benchmarks have succeeded so far, of a call that has not run all of them yet.
DONE = BENCH / ".figures.json"


def main() -> int:
    parser = options(__doc__)
    parser.add_argument("--only", metavar="NAMES", help=f"some of {','.join(BENCHES)}")
    parser.add_argument("--tables", action="store_true", help="run nothing, write the tables")
    parser.add_argument("--anew", action="store_true", help="also run those that an earlier call has done")
    arguments = parser.parse_args()
    if arguments.save:
        parser.error(
            f"--save: got {arguments.save}; expected none: every benchmark keeps its own in bench/results"
        )
    full = arguments.size is Size.FULL
    names = _asked(parser, arguments)
    resuming = full and not (arguments.only or arguments.tables or arguments.anew)
    done = _done() if resuming else []
    if done:
        say(f"goes on where it stopped, behind {', '.join(done)}; --anew begins from the start")
    failed = []
    for name in (name for name in names if name not in done):
        if _succeeds(name, arguments.size):
            done.append(name)
            if full and not arguments.only:
                _note(done)
        else:
            failed.append(name)
    if full and not failed and not arguments.only and not arguments.tables:
        DONE.unlink(missing_ok=True)
    changed = write(ROOT, changing=full)
    say(
        f"figures {'written into' if full else 'would change in'} {', '.join(changed) or 'no page: all are as measured'}"
    )
    if failed:
        say(f"failed, see above: {', '.join(failed)}; mend it and call again, which runs those alone")
    print(json.dumps({"done": done, "failed": failed, "pages": changed}))
    return 1 if failed else 0


def _asked(parser: Options, arguments: Any) -> Collection[str]:
    if arguments.tables:
        return ()
    names = (
        arguments.only.split(",")
        if arguments.only
        else arguments.size.of(full=BENCHES, quick=BENCHES, smoke=SMOKE)
    )
    for name in names:
        if name not in BENCHES:
            parser.error(f"--only: got {name!r}; expected some of {', '.join(BENCHES)}")
    return tuple(names)


def _succeeds(name: str, size: Size) -> bool:
    """Run a benchmark to its end, its story on our stdout."""
    say(f"\n== bench/{name}.py")
    began = time.monotonic()
    given = () if size is Size.FULL else (f"--{size.value}",)
    code = subprocess.run(
        [sys.executable, str(BENCH / f"{name}.py"), *given], cwd=ROOT, check=False
    ).returncode
    say(f"== bench/{name}.py ended with exit code {code} after {time.monotonic() - began:.0f} s")
    return code == 0


def _done() -> list[str]:
    """What earlier calls have done on this machine; figures of two machines do not stand in one table."""
    try:
        kept = json.loads(DONE.read_text("utf-8"))
    except OSError:
        return []
    return kept["done"] if kept["machine"] == machine(hardware()) else []


def _note(done: Collection[str]) -> None:
    DONE.write_text(json.dumps({"machine": machine(hardware()), "done": list(done)}) + "\n", "utf-8")


def write(root: Path, *, changing: bool = True) -> list[str]:
    """Make the figures of all pages anew. The pages that changed by it, or would have."""
    changed = []
    for name in PAGES:
        page = (root / name).read_text("utf-8")
        made = written(page, results(), heads())
        if made != page:
            changed.append(name)
            if changing:
                (root / name).write_text(made, "utf-8")
    return changed


def results() -> Mapping[str, Mapping[str, Any]]:
    """What bench/results holds, by benchmark."""
    return {file.stem: json.loads(file.read_text("utf-8")) for file in sorted(RESULTS.glob("*.json"))}


def heads() -> Mapping[str, Mapping[str, Any]]:
    """What the shipped heads say of themselves, by name."""
    files = sorted((ROOT / "motet" / "heads").glob("*/head.json"))
    return {file.parent.name: json.loads(file.read_text("utf-8")) for file in files}


if __name__ == "__main__":
    sys.exit(main())
