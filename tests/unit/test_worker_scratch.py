"""Folders for a while: gone on leaving, and gone after a process that could not tidy up."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from workers import scratch


def test_a_folder_goes_with_its_use_and_what_a_killed_process_left_goes_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = (
        "import os, signal, tempfile, sys; tempfile.tempdir = sys.argv[1]\n"
        "from workers import scratch\n"
        "kept = scratch.folder('fit'); open(kept.name + '/weights', 'w').close()\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, capture_output=True)
    (tmp_path / "motet-scratch-of-somebody").mkdir()
    [left] = tmp_path.glob("motet-scratch-[0-9]*")
    with scratch.folder("fit") as mine, scratch.folder("team") as other:
        assert Path(mine).is_dir()
        assert Path(other).is_dir(), "a living process keeps its own"
        assert not left.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["motet-scratch-of-somebody"]
