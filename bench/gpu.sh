#!/usr/bin/env bash
# What only a GPU can show, within eight minutes on one: its tests, what share of its peak the engines reach, and motet with
# vLLM beside vLLM alone where that is installed. Needs this checkout, python3, make and a package registry:
#
#     bash bench/gpu.sh                            tests, then all of bench/gpu.py
#     bash bench/gpu.sh --only encoder,decode      its options go to bench/gpu.py
#     GPU_PYTHON=/path/to/python3 bash bench/gpu.sh
#
# A CUDA build of torch: on Linux pip installs one from PyPI by itself, and `make install` takes that into .venv. Where pip is
# set up for PyTorch's builds for CPUs (torch's version then ends in +cpu), or where there is no registry, GPU_PYTHON names a
# Python that has motet's dependencies and such a build; it runs this checkout, and nothing is installed. vLLM is found beside
# that Python or where MOTET_VLLM names its program.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${GPU_PYTHON:-}
if [ -z "$python" ]; then
  make install
  python=.venv/bin/python
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

"$python" - <<'PROGRAM'
import sys
import torch

if not torch.cuda.is_available():
    sys.exit(
        f"torch {torch.__version__} of {sys.executable} sees no GPU; expected a CUDA build of torch and NVIDIA's driver. "
        + ("This is a build for CPUs: let pip take torch from PyPI, or name another Python in GPU_PYTHON."
           if torch.version.cuda is None else
           "The build has CUDA " + torch.version.cuda + ": look at nvidia-smi, and at CUDA_VISIBLE_DEVICES.")
    )
print(f"torch {torch.__version__}, {torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}", flush=True)
PROGRAM

SECONDS=0
# Of eight minutes: four for the tests, the rest for the figures. A part that takes longer is ended, and the script says so.
failed=0
timeout --signal=INT 240 "$python" -m pytest -q --no-header tests/gpu || failed=$?
echo "tests/gpu: $([ "$failed" = 0 ] && echo passed || echo "ended with $failed") after $SECONDS s"
timeout --signal=INT $((475 - SECONDS)) "$python" bench/gpu.py "$@" || failed=$?
echo "in all: $SECONDS s"
exit "$failed"
