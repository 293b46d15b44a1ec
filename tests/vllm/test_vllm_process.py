"""vLLM as a process of ours: it starts, is shut, and never outlives who started it. See `make vllm-test`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from motet.protocol.wire import TaskOrder
from motet.tasks import Choose, Generate
from tests.tiny_language import a_llama
from workers.engine import CannotLoad, DeviceBroken, Pass, Prepared
from workers.engines.served.vllm import Vllm, VllmEngine
from workers.registrar.describe import Described, describe_folder
from workers.run.batch_adapter import run_to_the_end

pytestmark = pytest.mark.skipif(
    not os.environ.get("MOTET_VLLM"), reason="needs vLLM in an environment of its own: make vllm-test"
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Described:
    folder = a_llama(tmp_path_factory.mktemp("tiny"))
    return describe_folder(folder, name="tiny", version="1", licence="", source={})


@pytest.fixture
def handle(tiny: Described) -> Iterator[Vllm]:
    engine = VllmEngine()
    loaded = engine.load(tiny.manifest, tiny.files, device="cpu", in_format="fp32")
    yield loaded
    engine.unload(loaded)


def test_it_answers_to_us_alone_and_dies_loudly(tiny: Described, handle: Vllm) -> None:
    engine = VllmEngine()
    refused = httpx.get(f"{handle.server.url}/models", trust_env=False)
    assert refused.status_code == 401
    assert handle.server.url.startswith("http://127.0.0.1:")
    tasks = {
        "a": Generate("tiny", prompt="Go on.", max_tokens=4),
        "b": Choose("tiny", labels=("good", "bad")),
    }
    orders = tuple(TaskOrder(name=n, spec=t.to_json(), manifest=tiny.manifest) for n, t in tasks.items())
    pass_ = Pass(handle, orders, 0)
    rows = [row for row in engine.prepare(pass_, ["The weather was fine. " * 8]) if isinstance(row, Prepared)]
    assert run_to_the_end(engine, pass_, rows)["b"].counts()[0] == 1
    assert handle.server.scores is True, "every label's likelihood is told"
    assert handle.child is not None
    assert handle.child.pid is not None
    os.kill(handle.child.pid, signal.SIGKILL)
    handle.child.wait(10)
    with pytest.raises(DeviceBroken):
        engine.step(handle, 64)


def test_a_model_that_it_cannot_load_is_refused_with_its_last_word(tiny: Described, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["NoSuchForCausalLM"], "model_type": "nothing"}')
    with pytest.raises(CannotLoad, match="vllm ended with"):
        VllmEngine().load(
            tiny.manifest, {"config.json": tmp_path / "config.json"}, device="cpu", in_format="fp32"
        )


def test_it_ends_with_a_worker_that_is_killed(tiny: Described) -> None:
    folder = tiny.files["config.json"].parent
    code = (
        "from pathlib import Path\n"
        "from workers.registrar.describe import describe_folder\n"
        "from workers.engines.served.vllm import VllmEngine\n"
        f"d = describe_folder(Path({str(folder)!r}), name='t', version='1', licence='', source={{}})\n"
        "h = VllmEngine().load(d.manifest, d.files, device='cpu', in_format='fp32')\n"
        "print(h.child.pid, flush=True)\n"
        "input()\n"
    )
    worker = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert worker.stdout is not None
    pid = int(worker.stdout.readline())
    group = [pid, *_of_session(pid)]
    worker.kill()
    worker.wait()
    end = time.monotonic() + 60
    while any(map(_alive, group)) and time.monotonic() < end:
        time.sleep(0.1)
    assert [one for one in group if _alive(one)] == []


def _of_session(leader: int) -> list[int]:
    """Processes that the server has started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == leader:
            found.append(int(stat.parent.name))
    return found


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False
