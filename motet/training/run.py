"""Training as a user meets it: labelled rows and what to learn of them in, a run to follow, models out.

run = client.train(
    name="support", trunk="all-MiniLM-L6-v2", train="train.jsonl", test="test.jsonl",
    tasks={"topic": Labels("topic"), "tags": Labels("tags", multi=True), "urgency": Number("urgency")},
)
run.watch()
client.submit("tickets.jsonl", run.tasks())
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from motet.errors import JobFailed, SetupError, Unauthorized
from motet.head_inputs import as_trained
from motet.http import Address, Http
from motet.job import Job
from motet.messages.training import FitList
from motet.protocol.manifest import Manifest
from motet.states import ENDED
from motet.tasks import Classify, Number, Task, short
from motet.training.epochs import Epoch, score_words

#: How often a run that is watched is asked how far it is, in seconds.
_GLANCE_S = 1.0


class TrainRun:
    """A training run on the cluster. It goes on without this handle: ``client.job(id)`` finds its job again."""

    def __init__(self, job: Job, name: str, tasks: Sequence[str] = ()) -> None:
        """``tasks``: their names in the order in which they are told."""
        self.job, self.name = job, name
        self._tasks = tasks
        self._http = job._http
        self._answer: dict[str, Any] | None = None

    def __repr__(self) -> str:
        return f"<TrainRun {self.name} {self.job!r}>"

    def epochs(self) -> list[Epoch]:
        """Those that have ended so far."""
        told = FitList.of(self._http.get(f"/v1/jobs/{self.job.id}/fits")).fits
        return [self._epoch(epoch) for epoch in (told[0].epochs if told else ())]

    def _epoch(self, told: Mapping[str, Any]) -> Epoch:
        """An epoch as it was told; a newer worker may tell more of it."""
        return Epoch(
            stage=told["stage"],
            epoch=told["epoch"],
            of=told["of"],
            loss=told.get("loss"),
            validation=self._ordered(told["validation"]),
            test=self._ordered(told["test"]),
        )

    def _ordered(self, by_task: Mapping[str, Any]) -> dict[str, Any]:
        order = [
            *(task for task in self._tasks if task in by_task),
            *sorted(by_task.keys() - set(self._tasks)),
        ]
        return {task: by_task[task] for task in order}

    def follow(self) -> Iterator[Epoch]:
        """Yield each epoch as it ends, until the run has ended."""
        seen: set[tuple[str, int]] = set()
        while True:
            ended = self.job.refresh().state in ENDED
            for epoch in self.epochs():
                if (epoch.stage, epoch.epoch) not in seen:
                    seen.add((epoch.stage, epoch.epoch))
                    yield epoch
            if ended:
                return
            time.sleep(_GLANCE_S)

    def watch(self) -> TrainRun:
        """Print each epoch as it ends, and in the end what was gained. Raises JobFailed where it came to nothing."""
        for epoch in self.follow():
            print(epoch, flush=True)
        print(self.summary())
        return self

    def summary(self) -> str:
        """What the models are worth on the test rows, beside heads on the frozen trunk."""
        answer = self.answer()
        lines = [f"{self.name}: trained in {answer['seconds']:.0f} s"]
        for task, scores in answer["scores"].items():
            frozen = answer["frozen"].get(task)
            beside = f", on the frozen trunk {score_words(frozen)}" if frozen and frozen != scores else ""
            lines.append(f"  {task}: {score_words(scores)}{beside}")
        return "\n".join(lines)

    def answer(self) -> dict[str, Any]:
        """What came out, once it has ended: ``models``, ``scores``, ``frozen``, ``seconds``. Waits. Raises JobFailed."""
        if self._answer is None:
            self.job.wait()
            [row] = list(self.job.results())
            cell = row["fit"]
            if not cell.ok:
                why = f"{cell.error.error}: {cell.error.message}" if cell.error else "it was skipped"
                raise JobFailed(self.job.id, why)
            self._answer = dict(cell.value)
        return self._answer

    @property
    def models(self) -> list[Manifest]:
        """What came out: a trunk of its own where it learned, then a head for each task."""
        return [Manifest.from_json(model) for model in self.answer()["models"]]

    def register(self) -> list[str]:
        """Register the models, and return their references. Again is harmless. Needs an administrator's token.

        Raises Unauthorized, Conflict where other models have these names.
        """
        models = self.models
        try:
            return self._registered(self._http, models)
        except Unauthorized:
            url = self._http.address.url
            try:
                address = Address.find(admin=True)
            except (SetupError, Unauthorized):
                address = None
            if address is None or address.url != url:
                raise Unauthorized(
                    "registering models needs an administrator's token; "
                    f"give it as MOTET_TOKEN and run: motet models adopt {self.job.id}"
                ) from None
            with_admin = Http(address)
            try:
                return self._registered(with_admin, models)
            finally:
                with_admin.close()

    @staticmethod
    def _registered(http: Http, models: Iterable[Manifest]) -> list[str]:
        return [http.post("/v1/models", model.to_json())["ref"] for model in models]

    def tasks(self) -> dict[str, Task]:
        """The tasks that ask the trained models, by the names they were trained under; registers them first."""
        self.register()
        found: dict[str, Task] = {}
        for model in self.models:
            task = model.name.removeprefix(f"{self.name}.")
            if model.trunk_model:
                asked = Number(model.ref) if model.answers == "number" else Classify(model.ref)
                found[task] = as_trained(asked, model)
        return found

    def plot(self) -> str:
        """Loss and scores by epoch, as SVG."""
        from motet.training.curves import draw

        return draw(self.epochs(), title=self.name)


def command_line() -> str:
    """What was typed, for the record of a model."""
    return " ".join(short(word, 200) for word in (os.path.basename(sys.argv[0]), *sys.argv[1:40]))[:1000]
