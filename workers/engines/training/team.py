"""The other devices of a group: a process for each, which takes the same steps with its share of every batch.

    python -m workers.engines.training.team

is such a process. Whoever leads a run starts it, tells it by its stdin what to learn and then each step, and ends it by
closing that line. Members end with their leader, however that ends.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from motet.embedded.children import MARK, follow
from motet.recipe import Recipe
from workers import scratch
from workers.engine import DeviceBroken, Prepared
from workers.engines.training.heads import Heads
from workers.engines.training.learner import Hopeless, Learner

#: How long a device waits for the gradients of another before it gives up.
PATIENCE = timedelta(minutes=2)
#: How long a member has to end before it is killed.
GRACE_S = 5.0
READY = b"ready\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What a member needs to know once. Pickled, by a process for its own child."""

    recipe: Recipe
    trunk: nn.Module
    heads: Heads
    adam: dict[str, Any]
    rows: Sequence[Prepared]
    pooling: str
    pad: int
    device: str
    fast: bool
    threads: int
    store: str
    rank: int
    devices: int


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
                _tell(self._members[-1], self._order(number, device))
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
                _tell(member, (rows, epoch, step, steps))
        try:
            return self._learner.learn(rows, epoch, step, steps)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or all(map(_lives, self._members)):
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

    def _order(self, rank: int, device: str) -> Order:
        mine = self._learner
        return Order(
            recipe=mine.recipe,
            trunk=mine.both.trunk,
            heads=mine.both.heads,
            adam=mine.adam.state_dict(),
            rows=mine.rows,
            pooling=mine.both.pooling,
            pad=mine.pad,
            device=device,
            fast=mine.fast,
            threads=torch.get_num_threads(),
            store=self._store,
            rank=rank,
            devices=1 + len(self._others),
        )


def _started() -> subprocess.Popen[bytes]:
    # It needs no secret of the worker's.
    env = {name: value for name, value in os.environ.items() if name == MARK or not name.startswith("MOTET_")}
    return subprocess.Popen(
        [sys.executable, "-m", "workers.engines.training.team"],
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        preexec_fn=partial(follow, os.getpid(), signal.SIGKILL) if sys.platform == "linux" else None,
    )


def _tell(member: subprocess.Popen[bytes], what: object) -> None:
    assert member.stdin is not None
    pickle.dump(what, member.stdin, pickle.HIGHEST_PROTOCOL)
    member.stdin.flush()


@contextlib.contextmanager
def _lost_is_broken() -> Any:
    try:
        yield
    except (OSError, ValueError):
        raise DeviceBroken("a process of the device group has ended") from None


def _lives(member: subprocess.Popen[bytes]) -> bool:
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


def main(told: BinaryIO, ready: BinaryIO) -> None:
    """Be a member until the line ends."""
    order: Order = pickle.load(told)
    torch.set_num_threads(order.threads)
    if order.device != "cpu":
        torch.cuda.set_device(order.device)
    learner = Learner(
        order.recipe,
        order.trunk.to(order.device).train(),
        order.heads.to(order.device).train(),
        pooling=order.pooling,
        pad=order.pad,
        device=order.device,
        fast=order.fast,
    )
    learner.rows += order.rows
    learner.adam.load_state_dict(order.adam)
    ready.write(READY)
    ready.flush()
    _join(learner, order.store, order.rank, order.devices)
    with contextlib.suppress(EOFError):
        while True:
            rows, epoch, step, steps = pickle.load(told)
            # The leader finds by its own loss, a step later, that nothing comes of this.
            with contextlib.suppress(Hopeless):
                learner.learn(rows, epoch, step, steps)


if __name__ == "__main__":
    # Whatever a library prints is not what the leader waits for.
    line = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    main(sys.stdin.buffer, line)
