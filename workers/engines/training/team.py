"""The other devices of a group: a process for each, which takes the same steps with its share of every batch.

    python -m workers.engines.training.team

is such a process. Whoever leads a run starts it, tells it by its stdin what to learn and then each step, and ends it by
closing that line. Members end with their leader, however that ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from motet.local.children import MARK, follow
from motet.training.recipe import Recipe
from workers import scratch
from workers.engine import DeviceBroken, Prepared
from workers.engines.training.heads import Heads
from workers.engines.training.learner import Hopeless, Learner, adam_state, adam_tensors, let_learn
from workers.engines.training.state import RunState
from workers.engines.training.truth import Parts, Truth

#: How long a device waits for the gradients of another before it gives up.
PATIENCE = timedelta(minutes=2)
#: How long a member has to end before it is killed.
GRACE_S = 5.0
READY = b"ready\n"


#: What a member runs.
PROGRAM = ("-m", "workers.engines.training.team")


class Team:
    """A learner, and its like on other devices."""

    def __init__(self, learner: Learner, others: Sequence[str]) -> None:
        """``others``: devices beside the learner's own."""
        self._learner, self._others = learner, others
        self._members: list[subprocess.Popen[bytes]] = []
        self._folder = scratch.folder("team")
        self._lock, self._closed, self._joined = Lock(), False, False

    def gather(self) -> None:
        """Start the members and wait until all of them are ready: seconds. Any thread that lasts as long as they do."""
        for number, device in enumerate(self._others, 1):
            with self._lock:
                if self._closed:
                    return
                self._members.append(_started())
            with _lost_is_broken():
                _send(self._members[-1], self._order(number, device))
        for member in self._members:
            assert member.stdout is not None
            if member.stdout.readline() != READY:
                raise DeviceBroken("a process of the device group ended before it was ready")

    def join(self) -> None:
        """Step together from now on."""
        _join(self._learner, self._store, 0, 1 + len(self._others))
        self._joined = True

    def learn(self, rows: Tensor, epoch: int, step: int, steps: int) -> float:
        """``Learner.learn`` on all devices. Raises DeviceBroken where one of them is lost."""
        with _lost_is_broken():
            for member in self._members:
                _say(member, [rows.tolist(), epoch, step, steps])
        try:
            return self._learner.learn(rows, epoch, step, steps)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or all(map(_still_runs, self._members)):
                raise
            raise DeviceBroken("a device of the group was lost") from None

    def close(self) -> None:
        """End the members, and learn alone again. Safe at any time, and twice."""
        with self._lock:
            self._closed = True
        for member in self._members:
            assert member.stdin is not None
            with contextlib.suppress(OSError):
                member.stdin.close()
        self._learner.leave()
        if self._joined:
            torch.distributed.destroy_process_group()
            self._joined = False
        for member in self._members:
            try:
                member.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                member.kill()
                member.wait()
            assert member.stdout is not None
            member.stdout.close()
        self._members = []
        self._folder.cleanup()

    @property
    def _store(self) -> str:
        return str(Path(self._folder.name) / "store")

    def _order(self, rank: int, device: str) -> RunState:
        """What a member needs to know to be at the same step."""
        mine = self._learner
        config: Any = mine.both.trunk.config
        tensors = {f"both.{name}": tensor for name, tensor in mine.both.state_dict().items()}
        tensors |= adam_tensors(mine.adam)
        tensors["ids"] = torch.tensor(
            [token for text in mine.texts for token in text.inputs], dtype=torch.int64
        )
        tensors["lengths"] = torch.tensor([text.length for text in mine.texts])
        facts = {
            "recipe": mine.recipe.dumps(),
            "config": config.to_json_string(use_diff=False),
            "attention": config._attn_implementation,
            "groups": [{**group, "params": None} for group in mine.adam.param_groups],
            "pooling": mine.both.pooling,
            "pad": mine.pad,
            "device": device,
            "fast": mine.fast,
            "threads": torch.get_num_threads(),
            "join": [self._store, rank, 1 + len(self._others)],
        }
        return RunState({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, facts)


def _started() -> subprocess.Popen[bytes]:
    # It needs no secret of the worker's.
    env = {name: value for name, value in os.environ.items() if name == MARK or not name.startswith("MOTET_")}
    return subprocess.Popen(
        [sys.executable, *PROGRAM],
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        preexec_fn=partial(follow, os.getpid(), signal.SIGKILL) if sys.platform == "linux" else None,
    )


def _send(member: subprocess.Popen[bytes], state: RunState) -> None:
    assert member.stdin is not None
    slices = list(state.slices())
    member.stdin.write(sum(map(len, slices)).to_bytes(8, "little"))
    for some in slices:
        member.stdin.write(some)
    member.stdin.flush()


def _say(member: subprocess.Popen[bytes], what: object) -> None:
    assert member.stdin is not None
    member.stdin.write(json.dumps(what).encode() + b"\n")
    member.stdin.flush()


@contextlib.contextmanager
def _lost_is_broken() -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError):
        raise DeviceBroken("a process of the device group has ended") from None


def _still_runs(member: subprocess.Popen[bytes]) -> bool:
    """Whether it still runs a little later: its end shows on the line to it before it does here."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        member.wait(1.0)
    return member.poll() is None


def _join(learner: Learner, store: str, rank: int, devices: int) -> None:
    kind = learner.device.partition(":")[0]
    # They are all on this host, and nobody else's business.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group(
        "gloo" if kind == "cpu" else "nccl",
        init_method=f"file://{store}",
        rank=rank,
        world_size=devices,
        timeout=PATIENCE,
        device_id=None if kind == "cpu" else torch.device(learner.device),
    )
    learner.join(rank, devices)


def main() -> None:
    """Be a member until the line ends."""
    # Whatever a library prints is not what the leader waits for.
    ready = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    told = sys.stdin.buffer
    state = RunState.read(told.read(int.from_bytes(told.read(8), "little")))
    facts = state.facts
    torch.set_num_threads(facts["threads"])
    if facts["device"] != "cpu":
        torch.cuda.set_device(facts["device"])
    learner = _like(state)
    ready.write(READY)
    ready.flush()
    _join(learner, *facts["join"])
    for line in told:
        rows, epoch, step, steps = json.loads(line)
        # The leader finds by its own loss, a step later, that nothing comes of this.
        with contextlib.suppress(Hopeless):
            learner.learn(torch.tensor(rows), epoch, step, steps)


def _like(state: RunState) -> Learner:
    """A learner on the member's device that is where the leader is."""
    import transformers

    facts, tensors = state.facts, state.tensors
    recipe, device = Recipe.loads(facts["recipe"]), facts["device"]
    shape = json.loads(facts["config"])
    of_config: Any = transformers.AutoModel.from_config
    trunk = of_config(
        transformers.AutoConfig.for_model(**shape),
        attn_implementation=facts["attention"],
        dtype=torch.float32,
    )
    let_learn(trunk, recipe)
    blank = torch.zeros(recipe.train_rows + recipe.test_rows, recipe.texts * trunk.config.hidden_size)
    heads = Heads(recipe, [Truth.of(target) for target in recipe.targets], blank, Parts.of(recipe).train)
    learner = Learner(
        recipe,
        trunk.to(device).train(),
        heads.to(device).train(),
        pooling=facts["pooling"],
        pad=facts["pad"],
        device=device,
        fast=facts["fast"],
    )
    learner.both.load_state_dict(
        {n.removeprefix("both."): t for n, t in tensors.items() if n.startswith("both.")}
    )
    learner.adam.load_state_dict(
        {
            "state": adam_state(tensors),
            "param_groups": [
                {**told, "params": mine["params"]}
                for told, mine in zip(facts["groups"], learner.adam.state_dict()["param_groups"], strict=True)
            ],
        }
    )
    texts = torch.split(tensors["ids"], tensors["lengths"].tolist())
    learner.texts += [Prepared(i, len(ids), False, ids.numpy()) for i, ids in enumerate(texts)]
    return learner


if __name__ == "__main__":
    main()
