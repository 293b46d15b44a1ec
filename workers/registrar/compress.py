"""`python -m workers compress`: a smaller form of a registered encoder, measured before it is believed.

It writes the smaller trunk, carries its heads over (after cutting layers they are fitted anew), runs both on held-out
labelled rows, prints what was gained and lost, and registers them under names of their own. Refused where a task loses
more than the tolerance, unless forced. Its options are declared by `motet compress` (motet/cli/models.py).
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from motet.artefacts import digests, sizes
from motet.errors import SetupError
from motet.http import Address, Http
from motet.protocol.columns import Column
from motet.protocol.manifest import Manifest
from motet.protocol.settings import cache_folder
from motet.protocol.wire import TaskOrder
from motet.tasks import Embed
from workers.engine import BatchEngine, CannotLoad, Engine, OutOfMemory, Pass, Prepared
from workers.engines.proved import inherited
from workers.registrar.accuracy import Trial, compare
from workers.registrar.describe import Described, describe_folder
from workers.registrar.labelled import Label, Labelled, agreement, decisions, of_shipped, read_labelled, score
from workers.registrar.registry import TRIAL_TASKS, Registry
from workers.registrar.trial_plan import prepare_environment
from workers.run.batch_adapter import run_to_the_end
from workers.run.batching import pack

WEIGHTS = ("fp32", "bf16", "int8", "fp8")
#: Speed is measured on so many micro-batches of so many tokens, all forms in turn, so many times.
SPEED_BATCHES, SPEED_TOKENS, SPEED_ROUNDS = 4, 2048, 5
#: The form of what was made, beside "fp32" and "bf16" of what it was made from.
COMPRESSED = "compressed"
#: The name of the task that asks for the vector itself.
_VECTOR = "the vector"


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """What a model is to become."""

    #: Layers that are kept, from the first on; 0: all.
    layers: int = 0
    weights: str = "fp32"

    @classmethod
    def read(cls, text: str) -> Form:
        """``int8``, ``layers:4`` or both with a comma. Raises SetupError."""
        layers, weights = 0, "fp32"
        for part in text.split(","):
            kind, _, count = part.strip().partition(":")
            if kind == "layers" and count.isdecimal() and int(count):
                layers = int(count)
            elif kind in WEIGHTS[1:] and not count:
                weights = kind
            else:
                raise SetupError(
                    f"--to: got {part.strip()!r}; expected int8, bf16, fp8, layers:N, or layers:N,int8"
                )
        return cls(layers=layers, weights=weights)

    @property
    def name(self) -> str:
        parts = [f"layers{self.layers}"] if self.layers else []
        return "-".join(parts + ([self.weights] if self.weights != "fp32" else []))


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """A trunk with heads on it."""

    trunk: Described
    heads: tuple[Described, ...]

    def trial(self, engine: Engine | BatchEngine, texts: Sequence[str]) -> Trial:
        """All heads in one pass over the texts, and the vector."""
        asked = [(_asked(head.manifest), head.files) for head in self.heads]
        return Trial(
            engine,
            self.trunk.manifest,
            self.trunk.files,
            [*asked, (_vector(self.trunk.manifest), self.trunk.files)],
            texts=texts,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One form of a trunk in one numeric format: what it takes, and what its heads score."""

    form: str
    in_format: str
    file_mb: float
    #: Weights and buffers in memory.
    memory_mb: float
    #: Points by head.
    scores: Mapping[str, float]
    #: By head: share of decisions that are those of the original in fp32.
    kept: Mapping[str, float]
    #: How far vectors turn away from the original's; nothing where they mean something else.
    vectors: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The original in fp32 (and bf16, where this machine is fast in it), and the compressed form last."""

    forms: tuple[Measured, ...]
    #: Held-out rows by head.
    rows: Mapping[str, int]
    #: Speeds by round and form, in tokens per CPU second.
    speeds: Mapping[str, Sequence[float]] = field(repr=False)

    @property
    def compressed(self) -> Measured:
        return self.forms[-1]

    def tokens_per_cpu_s(self, form: str) -> float:
        return statistics.median(self.speeds[form])

    def loss(self, head: str) -> float:
        """Points that a head lost against the original in fp32."""
        return self.forms[0].scores[head] - self.compressed.scores[head]

    def speed_over(self, form: str) -> float:
        """Median of the ratios within each round: noise that lasts longer cancels out."""
        mine, other = self.speeds[self.compressed.form], self.speeds[form]
        return statistics.median(a / b for a, b in zip(mine, other, strict=True))

    def to_json(self) -> dict[str, Any]:
        def rounded(numbers: Mapping[str, float], digits: int) -> dict[str, float]:
            return {name: round(number, digits) for name, number in numbers.items()}

        return {
            "forms": [
                {
                    "form": one.form,
                    "computed_in": one.in_format,
                    "file_mb": round(one.file_mb, 2),
                    "memory_mb": round(one.memory_mb, 2),
                    "tokens_per_cpu_s": round(self.tokens_per_cpu_s(one.form)),
                    "speed_of_compressed_over_it": round(self.speed_over(one.form), 3),
                    "scores": rounded(one.scores, 2),
                    "kept": rounded(one.kept, 4),
                    "vectors": dict(one.vectors),
                }
                for one in self.forms
            ],
            "rows": dict(self.rows),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressOptions:
    """The options of `motet compress`, whose help says what each means."""

    model: str
    to: str
    name: str | None
    version: str
    rows: Path | None
    fit: Path | None
    tasks: tuple[str, ...]
    text: str
    tolerance: float
    force: bool
    threads: int
    as_json: bool


def compress_registered(options: CompressOptions) -> int:
    """Returns 0; prints what was measured. Raises MotetError, whose words are for people."""
    form = Form.read(options.to)
    prepare_environment()
    from workers.run.device import use_threads

    use_threads(options.threads)
    with closing(Http(Address.find(admin=True), timeout_s=60.0)) as http, ExitStack() as stack:
        cache = cache_folder()
        registry = Registry(http, cache)
        trunk, heads = _found(registry, options.model)
        learn, held, heads = _labelled(options, form, trunk, heads)
        bundle = Bundle(
            trunk=registry.files_of(trunk.ref), heads=tuple(registry.files_of(head.ref) for head in heads)
        )
        cache.mkdir(parents=True, exist_ok=True)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=cache)))
        try:
            small = compress(
                bundle,
                form,
                folder,
                learn=learn,
                name=options.name or f"{trunk.name}-{form.name}",
                version=options.version,
            )
            report = measure(bundle, small, form, held, threads=options.threads)
        except CannotLoad as error:
            raise SetupError(f"{trunk.ref}: {error}") from None
        except OutOfMemory:
            raise SetupError(
                f"{trunk.ref}: no memory for it and its smaller form at once; free some"
            ) from None
        if not options.as_json:
            show(report, trunk, form)
        # A loss that is no number is more than is tolerated.
        refused = {head: loss for head in report.rows if not (loss := report.loss(head)) <= options.tolerance}
        models = []
        if options.force or not refused:
            models = registry.register(_with_scores(small, report, form))
    if options.as_json:
        print(json.dumps({**report.to_json(), "models": models}, ensure_ascii=False))
    for one in models if not options.as_json else ():
        print(f"{one['state']:<12}{one['ref']}  ({one['answers']}; {', '.join(('fp32', *one['formats']))})")
    if not models:
        raise SetupError(
            "refused, nothing was registered: "
            + "; ".join(f"{head} loses {loss:.2f} points" for head, loss in refused.items())
            + f"; tolerated are {options.tolerance:g}; choose another form, or add --force"
        )
    return 0


def compress(
    bundle: Bundle, form: Form, folder: Path, *, learn: Labelled | None, name: str, version: str
) -> Bundle:
    """The smaller trunk in a folder, under another name, and its heads; fitted anew where layers were cut.

    ``learn``: the rows that heads learn from then. Raises SetupError, CannotLoad.
    """
    from workers.engines.encoder.compression import write_trunk

    was = bundle.trunk.manifest
    write_trunk(bundle.trunk.files, folder / "trunk", layers=form.layers, weights=form.weights)
    described = describe_folder(
        folder / "trunk",
        name=name,
        version=version,
        licence=was.licence,
        source={"compressed": was.ref, "form": form.name, "digest": was.digest},
        max_tokens=was.max_tokens,
    )
    # Its rows are kept apart as the original's are; registration proves it anew.
    manifest = inherited(replace(described.manifest, pooling=was.pooling), was)
    trunk = replace(described, manifest=manifest)
    if not form.layers:
        return Bundle(trunk=trunk, heads=tuple(_head_on(head, trunk, form, version) for head in bundle.heads))
    if learn is None:
        raise SetupError("--fit is missing; expected labelled rows from which heads can learn anew")
    return Bundle(trunk=trunk, heads=_fitted(bundle.heads, trunk, form, version, learn, folder))


def measure(
    was: Bundle, small: Bundle, form: Form, held: Labelled, *, threads: int, rounds: int = SPEED_ROUNDS
) -> Report:
    """Both on the held-out rows: what they score, what they take. Raises CannotLoad."""
    from workers.engines import InstalledEngines
    from workers.run.device import fast_formats, use_threads

    engine = InstalledEngines().find(was.trunk.manifest.engine)
    fast = "bf16" if "bf16" in fast_formats("cpu") else "fp32"
    sides = {"fp32": (was, "fp32"), fast: (was, fast), COMPRESSED: (small, fast)}
    # Heads are in the order of the truth, and those of the smaller trunk have names of their own.
    heads = {name: head.manifest for name, head in zip(held.truth, was.heads, strict=True)}
    forms: dict[str, Measured] = {}
    first: dict[str, list[Label | None]] = {}
    exact: Column | None = None
    with ExitStack() as stack:
        passes = {}
        for side, (bundle, in_format) in sides.items():
            trial = bundle.trial(engine, held.texts)
            passes[side] = stack.enter_context(trial.loaded(in_format))
            columns = trial.run(passes[side])
            said = {
                name: decisions(columns[mine.manifest.name], mine.manifest)
                for name, mine in zip(heads, bundle.heads, strict=True)
            }
            first, exact = first or said, exact or columns[_VECTOR]
            other = side == COMPRESSED and form.layers
            forms[side] = Measured(
                form=side,
                in_format=in_format,
                file_mb=_weights_mb(bundle.trunk.manifest),
                memory_mb=passes[side].handle.bytes / 1e6,
                scores={name: score(said[name], held.truth[name], head) for name, head in heads.items()},
                kept={
                    name: agreement(
                        [said[name][row] for row in held.known(name)],
                        [first[name][row] for row in held.known(name)],
                        head,
                    )
                    for name, head in heads.items()
                },
                vectors={} if other else compare(exact, columns[_VECTOR], was.trunk.manifest)[1],
            )
        use_threads(1)
        speeds = _speeds(engine, passes, held.texts, rounds)
        use_threads(threads)
    return Report(
        forms=tuple(forms.values()), rows={head: len(held.known(head)) for head in held.truth}, speeds=speeds
    )


def _weights_mb(trunk: Manifest) -> float:
    return sum(size for name, size in trunk.sizes.items() if name.endswith(".safetensors")) / 1e6


def _speeds(
    engine: Engine | BatchEngine, passes: Mapping[str, Pass], texts: Sequence[str], rounds: int
) -> dict[str, list[float]]:
    """Tokens per CPU second of one thread, by form and round; micro-batches of all lengths, forms in turn."""
    any_pass = next(iter(passes.values()))
    rows = [row for row in engine.prepare(any_pass, texts) if isinstance(row, Prepared)]
    every = pack(rows, tokens=SPEED_TOKENS)
    batches = every[:: max(1, len(every) // SPEED_BATCHES)]
    tokens = sum(row.length for batch in batches for row in batch)
    found: dict[str, list[float]] = {side: [] for side in passes}
    for round_ in range(rounds + 1):
        for side in list(passes) if round_ % 2 else reversed(list(passes)):
            began = time.process_time()
            for batch in batches:
                run_to_the_end(engine, passes[side], batch)
            if round_:  # the first warms up
                found[side].append(tokens / max(time.process_time() - began, 1e-6))
    return found


def show(report: Report, trunk: Manifest, form: Form) -> None:
    """Print what was measured, as two tables."""
    takes = _table("form", "file MB", "memory MB", "tokens / CPU s", "compressed ÷ it")
    for one in report.forms:
        takes.add_row(
            one.form if one.form == one.in_format else f"{one.form}, computed in {one.in_format}",
            f"{one.file_mb:.1f}",
            f"{one.memory_mb:.1f}",
            f"{report.tokens_per_cpu_s(one.form):,.0f}",
            f"{report.speed_over(one.form):.2f} ×",
        )
    tasks = _table("task", "rows", *(one.form for one in report.forms), "change", "decisions kept")
    for head, rows in report.rows.items():
        tasks.add_row(
            head,
            f"{rows:,}",
            *(f"{one.scores[head]:.2f}" for one in report.forms),
            f"{-report.loss(head):+.2f}",
            f"{report.compressed.kept[head]:.1%}",
        )
    out = Console(width=max(100, Console().width))
    out.print(f"{trunk.ref} to {form.name}, one thread of this machine\n")
    out.print(takes)
    out.print("\npoints on held-out rows\n")
    out.print(tasks)
    vectors = report.compressed.vectors
    if vectors:
        words = f"cosine to the original's {vectors.get('cosine_mean', 0):.4f} on average, {vectors.get('cosine_min', 0):.4f} at least"
    else:
        words = "of another kind than the original's: do not compare them with stored ones"
    out.print(f"\nvectors (Embed): {words}\n")


def _table(first: str, *numbers: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(first, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _found(registry: Registry, model: str) -> tuple[Manifest, list[Manifest]]:
    """A registered encoder, and the newest version of each head on it. Raises SetupError."""
    trunk = registry.find(model)
    if trunk is None:
        raise SetupError(f"{model} is not registered; motet models lists what is")
    if trunk.trunk_model or trunk.answers != "vector" or not trunk.parameters:
        raise SetupError(
            f"{trunk.ref} answers {trunk.answers}; expected an encoder that heads sit on"
            + (f", such as {trunk.trunk_model}" if trunk.trunk_model else "")
        )
    if trunk.reads != "text":
        raise SetupError(
            f"{trunk.ref} reads pictures; expected an encoder of texts: pictures are not compressed yet"
        )
    heads = registry.heads_on(trunk)
    if several := [head.ref for head in heads if head.inputs]:
        print(f"left out, they read several texts or numbers: {', '.join(several)}", file=sys.stderr)
    return trunk, [head for head in heads if not head.inputs]


def _labelled(
    options: CompressOptions, form: Form, trunk: Manifest, heads: Sequence[Manifest]
) -> tuple[Labelled | None, Labelled, list[Manifest]]:
    """The rows to learn from and those to measure on, and the heads that they say something of. Raises SetupError."""
    if options.rows is None and (options.tasks or options.fit):
        raise SetupError("--rows is missing; --task and --fit say something of rows, which it names")
    if options.rows is None:
        learn, held = of_shipped(heads)
        mine = [head for head in heads if head.name in held.truth]
        if not mine:
            raise SetupError(
                f"--rows is missing; expected labelled rows to measure the heads of {trunk.ref} on, because motet has "
                "none for them; add --rows FILE.jsonl --task HEAD=FIELD"
            )
        if left := [head.ref for head in heads if head not in mine]:
            print(f"left out, no labelled rows: {', '.join(left)}", file=sys.stderr)
        return learn, held, mine
    fields = dict(_pair(task) for task in options.tasks)
    mine = [head for head in heads if head.name in fields]
    if not mine or (unknown := sorted(set(fields) - {head.name for head in mine})):
        raise SetupError(
            f"--task: got {', '.join(unknown if mine else sorted(fields)) or 'none'}; expected HEAD=FIELD with heads on "
            f"{trunk.ref}, which are {', '.join(head.name for head in heads) or 'none'}"
        )
    held = read_labelled(options.rows, fields, mine, options.text)
    if not form.layers:
        return None, held, mine
    if options.fit is None:
        raise SetupError(
            "--fit is missing; expected labelled rows from which heads learn anew, because a trunk with fewer "
            "layers says something else; not those of --rows"
        )
    return read_labelled(options.fit, fields, mine, options.text), held, mine


def _pair(task: str) -> tuple[str, str]:
    head, equals, name = task.partition("=")
    if not (head and equals and name):
        raise SetupError(f"--task: got {task!r}; expected HEAD=FIELD, such as topic=label")
    return head, name


def _head_on(head: Described, trunk: Described, form: Form, version: str, **more: Any) -> Described:
    """A head on the smaller trunk, as a model of its own."""
    was, on = head.manifest, trunk.manifest
    files = {"head.safetensors": more.pop("file", head.files["head.safetensors"])}
    manifest = replace(
        was,
        name=f"{was.name}-{form.name}",
        version=version,
        files=digests(files),
        sizes=sizes(files),
        trunk=on.trunk,
        trunk_model=on.ref,
        parameters=on.parameters,
        packed_width=on.packed_width,
        formats=(),
        source={**was.source, "compressed": was.ref, "form": form.name},
        **more,
    )
    return Described(manifest=manifest, files=files)


def _fitted(
    heads: Sequence[Described], trunk: Described, form: Form, version: str, learn: Labelled, folder: Path
) -> tuple[Described, ...]:
    """The heads, each learned anew from the smaller trunk's vectors."""
    from workers.engines import InstalledEngines
    from workers.engines.encoder.compression import fit_head
    from workers.run.device import fast_formats

    engine = InstalledEngines().find(trunk.manifest.engine)
    trial = Bundle(trunk=trunk, heads=()).trial(engine, learn.texts)
    vectors = trial.answers("bf16" if "bf16" in fast_formats("cpu") else "fp32")[_VECTOR]
    found = []
    for head in heads:
        was = head.manifest
        out = folder / f"{was.name}.safetensors"
        thresholds = fit_head(vectors, learn.truth[was.name], was.answers, was.labels, out)
        found.append(_head_on(head, trunk, form, version, file=out, thresholds=thresholds))
    return tuple(found)


def _with_scores(small: Bundle, report: Report, form: Form) -> list[Described]:
    """The models to register, with what was measured in their manifests."""
    told = {**report.to_json(), "form": form.name}
    models = [replace(small.trunk, manifest=replace(small.trunk.manifest, scores={"compressed": told}))]
    for head, name in zip(small.heads, report.rows, strict=True):
        mine = {
            "form": form.name,
            "rows": report.rows[name],
            "score_before": round(report.forms[0].scores[name], 2),
            "score": round(report.compressed.scores[name], 2),
            "decisions_kept": round(report.compressed.kept[name], 4),
        }
        # What its original scored is not its own.
        scores = {"data": head.manifest.scores.get("data", {}), "compressed": mine}
        models.append(replace(head, manifest=replace(head.manifest, scores=scores)))
    return models


def _asked(head: Manifest) -> TaskOrder:
    return TaskOrder(name=head.name, spec=TRIAL_TASKS[head.answers](head.ref).to_json(), manifest=head)


def _vector(trunk: Manifest) -> TaskOrder:
    return TaskOrder(name=_VECTOR, spec=Embed(trunk.ref, normalize=False).to_json(), manifest=trunk)
