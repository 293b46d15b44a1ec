"""The API's registry of models, as an administrator fills it: what is new is tried here, sent and registered."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from motet.artefacts import send_file
from motet.errors import Conflict, NotFound, SetupError
from motet.http import Http
from motet.protocol.columns import Column
from motet.protocol.manifest import Manifest
from motet.protocol.wire import TaskOrder
from motet.tasks import Choose, Classify, Embed, Entities, Function, Generate, Number, Rank, Task
from workers.engine import CannotLoad
from workers.engines.proved import (
    ELSEWHERE,
    PROOF,
    Provable,
    check_encoder,
    check_language,
    inherited,
    is_listed,
    mixes,
    on_trial,
    within,
)
from workers.registrar.accuracy import (
    FEW,
    LABELS,
    SENTENCES,
    VERY_FEW,
    WRITTEN_TOKENS,
    Trial,
    compare,
    compare_seeing,
    compare_writing,
)
from workers.registrar.adapters import Adapter
from workers.registrar.describe import Described, HeadFolder, read_json, stored_format, trainer_of
from workers.registrar.trial_plan import (
    AUTO,
    HALVES,
    TrialDevice,
    TrialPlan,
    halves,
    look_around,
    plan_trial,
    shown,
)
from workers.run.blobs import BlobCache, CannotFetch, HttpBlobs

#: The task that is tried for each kind of answer.
TRIAL_TASKS: Mapping[str, Callable[[str], Task]] = {
    "label": Classify,
    "labels": Classify,
    "number": Number,
    "vector": Embed,
    "spans": Entities,
    "json": Function,
    "ranking": Rank,
    "match": Embed,
}
#: Pictures that a model which reads pictures is tried on: seconds in each format on a CPU.
TRIAL_PICTURES = 100


class Registry:
    """The API's registry of models and blobs, seen by an administrator."""

    def __init__(self, http: Http, cache: Path, *, try_on: str = AUTO) -> None:
        """``try_on``: the device to try new models on; see ``plan_trial``."""
        self._http, self._cache, self._try_on = http, cache, try_on
        #: Devices of this host, once they were looked for.
        self._found: list[TrialDevice] | None = None
        #: Models whose files are at hand on this machine, by reference.
        self._near: dict[str, Described] = {}

    def register(self, models: Iterable[Described]) -> list[dict[str, Any]]:
        """Try the new ones, upload their files, register them; nothing of that for those that are there already."""
        asked = []
        for model in models:
            self._near[model.manifest.ref] = model
            asked.append(model)
            if model.manifest.engine in ("encoder", "image") and not model.manifest.trunk_model:
                asked.append(trainer_of(model))
        known = {model.manifest.ref: self._known(model.manifest) for model in asked}
        new = [model for model in asked if known[model.manifest.ref] is None]
        trainers = [model.manifest for model in new if model.manifest.answers == "models"]
        # An artefact answers nothing by itself; it was read when it was described.
        tried = {model.manifest.ref: model.manifest for model in new if model.manifest.answers == "artefact"}
        tried |= {
            m.ref: m
            for m in self._tried(
                [m for m in new if m.manifest not in trainers and m.manifest.ref not in tried]
            )
        }
        for trainer in trainers:
            # It was tried as what it trains.
            ref = trainer.source["trains"]
            trunk = known[ref] or tried[ref]
            tried[trainer.ref] = inherited(replace(trainer, formats=trunk.formats), trunk)
        for model in new:
            self._send(tried[model.manifest.ref], model.files)
        return [
            _as_printed(known[ref] or tried[ref], "present" if known[ref] else "registered") for ref in known
        ]

    def find(self, name: str) -> Manifest | None:
        """The newest version of a model, or the one of ``name@version`` or ``name@alias``; None where there is none."""
        try:
            return Manifest.from_json(self._http.get(f"/v1/models/{quote(name, safe='@')}"))
        except NotFound:
            return None

    def heads_on(self, trunk: Manifest) -> list[Manifest]:
        """The heads that sit on a trunk, the newest version of each."""
        every = [Manifest.from_json(model) for model in self._http.get("/v1/models")["models"]]
        newest = [self.find(name) for name in sorted({m.name for m in every if m.trunk_model == trunk.ref})]
        return [head for head in newest if head is not None and head.trunk_model == trunk.ref]

    def trunk_of(self, head: HeadFolder | Adapter) -> Manifest:
        """The trunk that a head or an adapter names: one asked for in this run, or a registered one. Raises SetupError."""
        near = [m.manifest for m in self._near.values() if head.trunk in (m.manifest.name, m.manifest.ref)]
        found = near[0] if near else self.find(head.trunk)
        if found is None:
            raise SetupError(
                f"{head.folder.name}: its trunk {head.trunk} is not registered; register that first"
            )
        return found

    def _known(self, manifest: Manifest) -> Manifest | None:
        known = self.find(manifest.ref)
        if known is not None and known.ref != manifest.ref:
            raise SetupError(f"{manifest.ref} is an alias, of {known.ref}; choose another --version")
        if known is not None and known.digest != manifest.digest:
            raise SetupError(
                f"{manifest.ref} is registered with other content; choose another --version, or remove it first"
            )
        return known

    def _tried(self, models: Sequence[Described]) -> Iterator[Manifest]:
        """Their manifests, with the formats they may run in. What sits on one trunk is tried in one pass."""
        trunks: dict[str, list[Described]] = {}
        for model in models:
            trunks.setdefault(model.manifest.trunk_model or model.manifest.ref, []).append(model)
        for ref, group in trunks.items():
            try:
                yield from self._tried_together(ref, group)
            except (CannotFetch, CannotLoad) as error:
                raise SetupError(f"{ref}: {error}") from None

    def _tried_together(self, ref: str, models: Sequence[Described]) -> Iterator[Manifest]:
        """Run ordinary sentences through them in each format that fits here. Raises SetupError, CannotLoad."""
        from workers.engines import InstalledEngines

        trunk = self._near[ref].manifest if ref in self._near else self._registered(ref)
        engine = InstalledEngines().find(trunk.engine)
        new = next((model for model in models if model.manifest.ref == ref), None)
        # Formats that need no comparison: the one that its makers stored it in, or those of its trunk.
        granted = {stored_format(new.files)} if new else set(trunk.formats)
        wanted = granted.union(halves(self._try_on, self._devices()))
        formats = tuple(one for one in HALVES if one in wanted and trunk.parameters)
        plan = self._plan(trunk, ("fp32", *formats), engine.memory_mb)
        # A trunk that is registered already was proved then.
        proving = engine if new and isinstance(engine, Provable) else None
        if new and proving and "fp32" not in plan.formats:
            _check_unproved(new, plan)
        writes = trunk.answers == "text"
        texts: Sequence[str] = SENTENCES if not writes else FEW if trunk.parameters else VERY_FEW
        pictures: Sequence[bytes] = ()
        if trunk.reads != "text":
            from workers.engines.image.pictures import trial_pictures

            pictures = trial_pictures(TRIAL_PICTURES)
            texts = ("",) * len(pictures)
        asked = {model.manifest.ref: _try_out(model.manifest) for model in models}
        outcomes: dict[str, _Outcome] = {}
        if plan.device is not None:
            tasks = [(task, model.files) for model in models for task in asked[model.manifest.ref]]
            model_tried = on_trial(trunk) if proving else trunk
            device = plan.device.torch_name
            trial = Trial(
                engine,
                model_tried,
                self.files_of(ref).files,
                tasks,
                device=device,
                texts=texts,
                pictures=pictures,
            )
            outcomes = _outcomes(trial, plan, proving)
        for model in models:
            manifest = model.manifest
            mine = asked[manifest.ref]
            for task in mine if outcomes else ():
                _check_answered(manifest, outcomes[plan.formats[0]].answers[task.name])
            allowed, measured = [], dict[str, Any](trial=plan.to_json())
            for in_format in formats:
                passed = in_format in granted
                if in_format in outcomes and "fp32" in outcomes:
                    exact, answers = outcomes["fp32"].answers, outcomes[in_format].answers
                    if writes:
                        passed, numbers = compare_writing(_by_kind(mine, exact), _by_kind(mine, answers))
                    else:
                        agree = compare_seeing if pictures else compare
                        passed, numbers = agree(exact[manifest.ref], answers[manifest.ref], manifest)
                    measured[in_format] = {**numbers, "pictures" if pictures else "sentences": len(texts)}
                apart = outcomes[in_format].apart if in_format in outcomes else 0.0
                allowed += [in_format] if passed and within(apart, in_format) else []
            if proving and outcomes and manifest.ref == ref:
                measured[PROOF] = {name: float(f"{one.apart:.2g}") for name, one in outcomes.items()}
            yield replace(manifest, formats=tuple(allowed), scores={**manifest.scores, **measured})

    def _plan(
        self, trunk: Manifest, formats: Sequence[str], memory_mb: Callable[[Manifest, str], int]
    ) -> TrialPlan:
        """Where to try a model, in which of the formats. ``memory_mb``: its engine's estimate. Raises SetupError."""

        if needed := [name for name, must in trunk.keywords.items() if must]:
            # Ordinary sentences say nothing of arguments that a task must give.
            why = f"a task must give it {', '.join(needed)}"
            return TrialPlan(device=None, formats=(), left_out=dict.fromkeys(formats, why))

        def need_mb(device: TrialDevice, in_format: str) -> int:
            if not trunk.files:  # a function, or what another server holds
                return 0
            if in_format != "fp32" and not device.is_gpu:
                from workers.engines.trunk import cpu_computes

                # Imitated, it takes as much as fp32.
                in_format = in_format if cpu_computes(in_format) else "fp32"
            return memory_mb(trunk, in_format)

        wants_gpu = trunk.engine == "vllm"
        plan = plan_trial(self._try_on, self._devices(), formats, need_mb, wants_gpu=wants_gpu)
        if plan.device is not None and plan.device.is_gpu:
            # CUDA shows this process one choice only.
            self._found = [d for d in self._devices() if d == plan.device or not d.is_gpu]
        return plan

    def _devices(self) -> list[TrialDevice]:
        if self._found is None:
            self._found = look_around()
        return self._found

    def _registered(self, ref: str) -> Manifest:
        manifest = self.find(ref)
        if manifest is None:
            raise SetupError(f"{ref} is not registered")
        return manifest

    def _send(self, manifest: Manifest, files: Mapping[str, Path]) -> None:
        for name, path in files.items():
            send_file(self._http, manifest.files[name], path)
        try:
            self._http.post("/v1/models", manifest.to_json())
        except Conflict as error:
            raise SetupError(f"{manifest.ref}: {error}") from None

    def files_of(self, ref: str) -> Described:
        """A model with its files: from this machine, or else from the API's blobs."""
        if ref not in self._near:
            manifest = self._registered(ref)
            address = self._http.address
            cache = BlobCache(self._cache, HttpBlobs(address.url, address.token), limit_mb=20_000)
            files = {name: cache.ensure(sha256) for name, sha256 in manifest.files.items()}
            self._near[ref] = Described(manifest=manifest, files=_linked(self._cache, manifest, files))
        return self._near[ref]


@dataclass(frozen=True, slots=True)
class _Outcome:
    """A trial in one format: the answers by task, and how far rows among others are from rows alone (0: not proved)."""

    answers: Mapping[str, Column]
    apart: float


def _outcomes(trial: Trial, plan: TrialPlan, proving: Provable | None) -> dict[str, _Outcome]:
    """A trial in each format of a plan. Raises SetupError, CannotLoad."""
    assert plan.device is not None
    try:
        with shown(plan.device):
            if plan.device.is_gpu:
                from workers.run.device import compute_exactly

                compute_exactly()
            return {in_format: _outcome(trial, in_format, proving) for in_format in plan.formats}
    except CannotLoad as error:
        if trial.model.engine == "vllm":
            raise CannotLoad(f"{error}; or register it untried: --try none") from None
        raise
    except SetupError:
        raise
    except Exception as error:
        raise SetupError(
            f"{trial.model.ref}: running {_ordinary(trial.model)}s failed: {type(error).__name__}{_untried(trial.model)}"
        ) from error


def _outcome(trial: Trial, in_format: str, proving: Provable | None) -> _Outcome:
    """Raises SetupError where rows mix; that is decided in fp32."""
    with trial.loaded(in_format) as pass_:
        apart = proving.among_others(pass_.handle, SENTENCES) if proving else 0.0
        if in_format == "fp32" and not within(apart, in_format):
            raise SetupError(f"{trial.model.ref}: {mixes(trial.model, apart)}")
        return _Outcome(trial.run(pass_), apart)


def _check_answered(manifest: Manifest, answers: Column) -> None:
    if not answers.counts()[0]:
        why = next(iter(answers.errors.values()))
        raise SetupError(
            f"{manifest.ref}: every {_ordinary(manifest)} failed: {why.error}, {why.message}{_untried(manifest)}"
        )


def _ordinary(manifest: Manifest) -> str:
    return "ordinary sentence" if manifest.reads == "text" else "ordinary picture"


def _untried(manifest: Manifest) -> str:
    """What to do where a function cannot read sentences, in words."""
    return (
        "; a function that reads a dict is registered untried: --try none"
        if manifest.answers == "json"
        else ""
    )


def _check_unproved(model: Described, plan: TrialPlan) -> None:
    """Raise SetupError, CannotLoad where a model may not run unless its rows were seen to stay apart in fp32."""
    from workers.engines.trunk import read_config

    if model.manifest.reads != "text":
        # Pictures are of one size, so none is filled up beside a longer one.
        return
    manifest, kind = model.manifest, str(read_json(model.files["config.json"]).get("model_type"))
    if not is_listed(manifest, kind):
        remedy = f", or {ELSEWHERE}" if manifest.answers == "text" else ""
        raise SetupError(
            f"{manifest.ref}: its architecture {kind} is none of those proved to keep rows apart, and it is not tried "
            f"in fp32, where that is proved ({plan.left_out['fp32']}); register it on a host that holds it{remedy}"
        )
    check = check_language if manifest.answers == "text" else check_encoder
    check(manifest, read_config(model.files))


def _try_out(manifest: Manifest) -> list[TaskOrder]:
    """Tasks that ask the model for what it answers: one named by the model, or two of a language model."""
    if manifest.answers != "text":
        task = TRIAL_TASKS[manifest.answers](manifest.ref)
        if isinstance(task, Classify) and manifest.reads != "text":
            task = replace(task, scores=True)
        asked: Mapping[str, Task] = {manifest.ref: task}
    else:
        asked = {
            f"{manifest.ref} choose": Choose(manifest.ref, labels=LABELS, scores=True),
            f"{manifest.ref} generate": Generate(
                manifest.ref,
                prompt="What is this about?",
                max_tokens=WRITTEN_TOKENS,
                # Some servers take no other one, and nothing is compared with what they write.
                temperature=1.0 if "url" in manifest.source else 0.0,
            ),
        }
    return [TaskOrder(name=name, spec=task.to_json(), manifest=manifest) for name, task in asked.items()]


def _by_kind(tasks: Sequence[TaskOrder], answers: Mapping[str, Column]) -> dict[str, Column]:
    return {str(task.spec["kind"]): answers[task.name] for task in tasks}


def _linked(cache: Path, manifest: Manifest, files: Mapping[str, Path]) -> dict[str, Path]:
    """Blobs under the names of their model, in a folder of the cache."""
    folder = cache / "registered" / manifest.digest
    folder.mkdir(parents=True, exist_ok=True)
    linked = {name: folder / name for name in files}
    for name, path in linked.items():
        path.unlink(missing_ok=True)
        path.symlink_to(files[name].resolve())
    return linked


def _as_printed(manifest: Manifest, state: str) -> dict[str, Any]:
    return {
        "ref": manifest.ref,
        "state": state,
        "digest": manifest.digest,
        "answers": manifest.answers,
        "formats": list(manifest.formats),
        "not_tried": manifest.scores.get("trial", {}).get("not_tried", {}),
        "scores": dict(manifest.scores),
    }
