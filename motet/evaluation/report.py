"""A page of its own about evaluations: figures, confusion matrices, reliability diagrams, two tasks side by side. Pure.

It holds labels and numbers, and no text of a row. Nothing in it is loaded from anywhere; pictures are inline SVG.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from motet.evaluation.calibration import Bin, Calibration
from motet.evaluation.figures import Comparison, TaskEvaluation
from motet.evaluation.measures import Confusion, LabelFigures
from motet.evaluation.words import NAMES, difference_words, figure_words, interval_words
from motet.markup import PALETTE, Html, tag
from motet.tasks import short

#: Labels that a matrix draws; the others, the rarest, are drawn as one.
MOST_LABELS = 24
#: Characters of a label in a picture.
_LABEL = 18
#: Side of a diagram, and the height of the bars below it that say how many rows it stands on.
_PLOT, _ROWS = 260, 44

_STYLE = (
    PALETTE
    + """
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,sans-serif;
font-variant-numeric:tabular-nums;-webkit-text-size-adjust:100%}
main{max-width:1080px;margin:0 auto;padding:18px 20px 40px}
nav,.soft,small,th,dt{color:var(--soft)}nav,small,.small,th,dt{font-size:13px}
h1{font-size:26px;line-height:1.25;font-weight:650;margin:10px 0 2px;overflow-wrap:anywhere}
h2{font-size:19px;font-weight:650;margin:42px 0 2px;overflow-wrap:anywhere}h3{font-size:15px;margin:0 0 10px}
p{margin:4px 0;max-width:80ch}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:14px 20px;margin:16px 0 22px}
.figures div{border-top:1px solid var(--line);padding-top:6px}dd{margin:0;font-size:20px;font-weight:600;line-height:1.3}
dd small{display:block;font-weight:400}
.warning{border-left:3px solid var(--skipped);padding:5px 12px;background:var(--wash);margin:12px 0;max-width:none}
.pair{display:flex;flex-wrap:wrap;gap:28px 56px;align-items:flex-start;margin:18px 0}.scroll{overflow-x:auto;max-width:100%}
svg{display:block}text{fill:var(--soft);font:12px system-ui,sans-serif;font-variant-numeric:tabular-nums}
.n{text-anchor:middle;fill:var(--ink)}.n.on{fill:var(--paper)}.e{text-anchor:end}.m{text-anchor:middle}
.cell{fill:var(--wash)}.right{fill:var(--ok)}.wrong{fill:var(--error)}.none{fill:var(--skipped)}
.bar{fill:var(--p0)}.gap{fill:var(--error);fill-opacity:.3}.spare{fill:var(--ok);fill-opacity:.6}.rows{fill:var(--curve);fill-opacity:.55}
.grid{stroke:var(--line)}.even{stroke:var(--soft);stroke-dasharray:4 3}.hit{fill:transparent}
.hit:hover{fill:var(--soft);fill-opacity:.15}.range{stroke:var(--p0);stroke-width:3;stroke-linecap:round}.point{fill:var(--p0)}
.zero{stroke:var(--soft)}
table{border-collapse:collapse}th{text-align:left;font-weight:500;white-space:nowrap}
th,td{padding:6px 22px 6px 0;border-bottom:1px solid var(--line);vertical-align:middle}
th:last-child,td:last-child{padding-right:0}
tbody th{font-size:15px;font-weight:600;color:inherit;white-space:normal;min-width:7em;
overflow-wrap:break-word}
.num{text-align:right;white-space:nowrap}
@media print{.scroll{overflow:visible}}
"""
)


def page(
    evaluations: Sequence[tuple[str, Iterable[TaskEvaluation]]], comparisons: Sequence[Comparison] = ()
) -> str:
    """The whole page: comparisons first, then every task of every evaluation, which is given with its title."""
    several = len(evaluations) > 1
    names = " and ".join(title for title, _ in evaluations)
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{names} evaluated · motet"),
        tag("style", Html(_STYLE)),
    )
    main = tag(
        "main",
        tag("nav", "motet › evaluate", aria_label="Where you are"),
        tag("h1", names),
        tag(
            "p",
            "Answers beside labels. In brackets: 95 % intervals, from resampling the rows.",
            class_="soft",
        ),
        [_comparison(each) for each in comparisons],
        [_task(task, title if several else "") for title, tasks in evaluations for task in tasks],
    )
    return "<!doctype html>\n" + tag("html", head, tag("body", main), lang="en") + "\n"


def _task(task: TaskEvaluation, job: str) -> Html:
    words = [
        task.model,
        f"labels {task.label_field}" if task.label_field != task.task else "",
        task.counted,
    ]
    figures = [
        (NAMES[name], figure_words(name, e.value), interval_words(name, e))
        for name, e in task.figures.items()
    ]
    if task.calibration is not None:
        figures.append(
            ("calibration error", f"{task.calibration.ece:.3f}", f"of {task.calibration.rows:,} scores")
        )
    figures += [
        (f"field {short(key)} right", f"{100 * share:.1f} %", "") for key, share in task.fields.items()
    ]
    pictures = [
        picture
        for picture in (
            task.confusion and _framed("Confusion", _matrix(task.confusion)),
            task.calibration and _framed("Reliability", _reliability(task.calibration)),
        )
        if picture
    ]
    return tag(
        "section",
        tag("h2", f"{task.task} · {job}" if job else task.task),
        tag("p", " · ".join(filter(None, words)), class_="soft small"),
        [tag("p", words, class_="warning") for words in task.warnings],
        tag(
            "dl",
            [
                tag("div", tag("dt", name), tag("dd", value, tag("small", more)))
                for name, value, more in figures
            ],
            class_="figures",
        ),
        tag("div", pictures, class_="pair") if pictures else None,
        _labels(task.labels) if task.labels else None,
    )


def _framed(title: str, picture: Html) -> Html:
    return tag("div", tag("h3", title), tag("div", picture, class_="scroll"))


def _labels(labels: Sequence[LabelFigures]) -> Html:
    def row(f: LabelFigures) -> Html:
        cells = [_share(f.precision), _share(f.recall), "–" if f.f1 is None else f"{f.f1:.3f}"]
        counts = (f"{f.support:,}", f"{f.answered:,}")
        return tag(
            "tr", tag("th", f.label, scope="row"), [tag("td", c, class_="num") for c in (*counts, *cells)]
        )

    names = ("rows", "given", "precision", "recall", "F1")
    head = tag(
        "tr", tag("th", "label", scope="col"), [tag("th", n, scope="col", class_="num") for n in names]
    )
    return tag(
        "div", tag("table", tag("thead", head), tag("tbody", [row(f) for f in labels])), class_="scroll"
    )


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


# -- who was taken for whom


def _matrix(found: Confusion) -> Html:
    """A cell for each pair of labels, the darker the larger its share of its row; the truth downward."""
    labels, counts = _drawn(found)
    columns = [*labels, "no answer"] if any(row[-1] for row in counts) else labels
    side = 46 if len(labels) <= 8 else 36 if len(labels) <= 14 else 28
    longest = max(len(short(label, _LABEL)) for label in columns)
    left, top = 7 * longest + 14, 5 * longest + 26
    width, height = left + side * len(columns) + 5 * longest, top + side * len(labels) + 24
    parts = [
        tag(
            "text",
            short(name, _LABEL),
            transform=f"translate({left + (j + 0.5) * side + 4} {top - 8}) rotate(-40)",
        )
        for j, name in enumerate(columns)
    ]
    for i, label in enumerate(labels):
        y = top + i * side
        total = sum(counts[i])
        parts.append(
            tag("text", tag("title", label), short(label, _LABEL), x=left - 8, y=y + side / 2 + 4, class_="e")
        )
        for j, answer in enumerate(columns):
            n = counts[i][j]
            share = n / total if total else 0.0
            css = "none" if j == len(labels) else "right" if i == j else "wrong"
            words = f"{n:,} of {total:,} rows of {label}: {answer}"
            box = {"x": left + j * side + 1, "y": y + 1, "width": side - 2, "height": side - 2, "rx": 3}
            parts.append(tag("rect", class_="cell", **box))
            if n:
                # A few of many would not be seen otherwise.
                strength = 0.12 + 0.88 * share
                parts.append(
                    tag("rect", tag("title", words), class_=css, fill_opacity=f"{strength:.2f}", **box)
                )
                parts.append(
                    tag(
                        "text",
                        _brief(n),
                        x=left + (j + 0.5) * side,
                        y=y + side / 2 + 4,
                        class_="n on" if strength > 0.55 else "n",
                        pointer_events="none",
                    )
                )
    parts.append(tag("text", "true label downward, answer across", x=left, y=height - 4))
    told = f"Confusion matrix of {len(found.labels)} labels"
    return tag("svg", parts, width=round(width), height=round(height), role="img", aria_label=told)


def _drawn(found: Confusion) -> tuple[list[str], list[list[int]]]:
    """The labels that occur, or the most frequent of them with the others as one; counts of them."""
    n = len(found.labels)
    often = [sum(row) + sum(other[i] for other in found.counts) for i, row in enumerate(found.counts)]
    there = [i for i in range(n) if often[i]]
    kept = there
    if len(there) > MOST_LABELS:
        kept = sorted(sorted(there, key=lambda i: -often[i])[: MOST_LABELS - 1])
    place = {i: k for k, i in enumerate(kept)}
    rest = len(kept)
    size = rest + (len(there) > rest)
    counts = [[0] * (size + 1) for _ in range(size)]
    for i in there:
        for j, count in enumerate(found.counts[i]):
            if count:
                counts[place.get(i, rest)][size if j == n else place.get(j, rest)] += count
    labels = [found.labels[i] for i in kept]
    return labels + ([f"{len(there) - rest} others"] if size > rest else []), counts


def _brief(n: int) -> str:
    return f"{n}" if n < 10_000 else f"{n / 1000:.0f}k" if n < 1_000_000 else f"{n / 1e6:.1f}M"


# -- whether scores are what they seem


def _reliability(found: Calibration) -> Html:
    """Bars of how many are right at each score, with the gap to the score; below, how many rows there are."""
    left, top, foot = 42, 8, _ROWS + 44
    parts = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        x, y = left + share * _PLOT, top + (1 - share) * _PLOT
        parts += [
            tag("line", x1=left, x2=left + _PLOT, y1=y, y2=y, class_="grid"),
            tag("text", f"{share:g}", x=left - 8, y=y + 4, class_="e"),
            tag("text", f"{share:g}", x=x, y=top + _PLOT + _ROWS + 24, class_="m"),
        ]
    most = max(b.rows for b in found.bins)
    parts += [_bin(b, left, top, most) for b in found.bins if b.rows]
    parts += [
        tag("text", "red: scores too high · green: too low", x=left, y=top + _PLOT + foot + 22),
        tag("line", x1=left, y1=top + _PLOT, x2=left + _PLOT, y2=top, class_="even"),
        tag("text", "score", x=left + _PLOT / 2, y=top + _PLOT + foot, class_="m"),
        tag("text", "share right", transform=f"translate(11 {top + _PLOT / 2}) rotate(-90)", class_="m"),
        tag("text", "rows", x=left - 8, y=top + _PLOT + _ROWS, class_="e"),
    ]
    told = f"Reliability diagram: expected calibration error {found.ece:.3f}, largest gap {found.largest_gap:.3f}"
    return tag(
        "svg", parts, width=left + _PLOT + 12, height=top + _PLOT + foot + 28, role="img", aria_label=told
    )


def _bin(b: Bin, left: float, top: float, most: int) -> Html:
    x, width = left + b.low * _PLOT + 1, (b.high - b.low) * _PLOT - 2
    floor = top + _PLOT

    def box(low: float, high: float, css: str) -> Html:
        return tag("rect", x=f"{x:.1f}", y=f"{top + (1 - high) * _PLOT:.1f}", width=f"{width:.1f}",
                   height=f"{(high - low) * _PLOT:.1f}", class_=css)  # fmt: skip

    rows = max(1.0, b.rows / most * (_ROWS - 8))
    words = (
        f"{b.rows:,} rows with scores from {b.low:.2f} to {b.high:.2f}: {100 * b.accuracy:.1f} % right,"
        f" mean score {b.score:.3f}"
    )
    return tag(
        "g",
        box(0, min(b.accuracy, b.score), "bar"),
        box(b.accuracy, b.score, "gap") if b.accuracy < b.score else box(b.score, b.accuracy, "spare"),
        tag(
            "rect",
            x=f"{x:.1f}",
            y=f"{floor + _ROWS - rows:.1f}",
            width=f"{width:.1f}",
            height=f"{rows:.1f}",
            class_="rows",
        ),
        tag(
            "rect",
            tag("title", words),
            x=f"{x:.1f}",
            y=top,
            width=f"{width:.1f}",
            height=_PLOT + _ROWS,
            class_="hit",
        ),
    )


# -- two tasks side by side


def _comparison(found: Comparison) -> Html:
    def row(name: str) -> Html:
        d = found.figures[name]
        return tag(
            "tr",
            tag("th", NAMES[name], scope="row"),
            [tag("td", figure_words(name, value), class_="num") for value in (d.first, d.second)],
            tag("td", difference_words(name, d.difference), class_="num"),
            tag("td", _range(d.difference.value, d.difference.low, d.difference.high)),
        )

    names = (("first", "num"), ("second", "num"), ("first − second", "num"), ("", ""))
    head = tag(
        "tr", tag("th", "", scope="col"), [tag("th", n, scope="col", class_=css or None) for n, css in names]
    )
    return tag(
        "section",
        tag("h2", f"{found.first} beside {found.second}"),
        tag("p", f"first: {found.first} · second: {found.second} · {found.rows:,} rows", class_="soft small"),
        tag(
            "div",
            tag("table", tag("thead", head), tag("tbody", [row(n) for n in found.figures])),
            class_="scroll",
        ),
        tag("p", found.verdict),
    )


def _range(value: float | None, low: float | None, high: float | None) -> Html | None:
    """The interval of a difference on a scale of its own, with 0 in the middle."""
    if value is None or low is None or high is None:
        return None
    width, middle = 220, 110
    far = max(abs(low), abs(high), 1e-9) / (middle - 8)
    return tag(
        "svg",
        tag("line", x1=middle, x2=middle, y1=2, y2=22, class_="zero"),
        tag(
            "line",
            x1=f"{middle + low / far:.1f}",
            x2=f"{middle + high / far:.1f}",
            y1=12,
            y2=12,
            class_="range",
        ),
        tag("circle", cx=f"{middle + value / far:.1f}", cy=12, r=5, class_="point"),
        width=width,
        height=24,
        role="img",
        aria_label=f"from {low:.3f} to {high:.3f}",
    )
