"""Hosts on which torch is not installed, as far as their processes can see: workers that run functions alone need none."""

from __future__ import annotations

from pathlib import Path


def hide_torch(folder: Path, *, then: str = "") -> Path:
    """Hide torch and transformers from every process with this folder on its PYTHONPATH: importing them costs each two
    seconds or more. Returns the file that does it. ``then``: what else such a process does first."""
    file = folder / "sitecustomize.py"
    file.write_text(f"import sys\nsys.modules |= dict.fromkeys(('torch', 'transformers'))\n{then}")
    return file
