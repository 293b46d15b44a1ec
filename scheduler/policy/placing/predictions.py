"""Predictions: seconds that waiting work and loads take, from learned rates. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import islice
from math import inf

from scheduler.policy.cost import Price, Rate, Rates
from scheduler.policy.placing.entries import ModelQueue, QueuedPass, WorkerEntry
from scheduler.policy.placing.records import DeviceKind

#: Seconds for which the count of a queue's devices is kept. Larger: sub-tasks are sized by workers that have left.
#: Smaller: the count, O(kinds of devices), is made for almost every sub-task.
_DEVICES_KEPT_S = 0.1
#: Outcomes of one queue and kind that `measured_s` needs. Fewer: workers move because of chance, and load for nothing.
#: More: a short job ends before rebalancing can help it.
_ENOUGH = 50
#: Hosts of a queue, at most, that stand for all of them where none serves it. More: more CPU; fewer: a worse guess.
_HOSTS = 16
_NEVER_COUNTED = (-inf, 0.0)
_NO_OUTCOMES = (0, 0.0, 0.0)


class Predictions:
    """What work and loads will take."""

    def __init__(self, rates: Rates) -> None:
        self.rates = rates

    def price(self, worker: WorkerEntry, entry: QueuedPass) -> Price:
        """Of a pass on a worker."""
        rate = self.rate(entry.queue, worker.kind, entry.demand.rate_key)
        return rate.price(self.rates.pace(worker.name), entry.demand.bytes_per_token)

    def measured(self, worker: WorkerEntry, entry: QueuedPass) -> bool:
        """Whether that rests on outcomes."""
        return self.rate(entry.queue, worker.kind, entry.demand.rate_key).measured

    def rate(self, queue: ModelQueue, kind: DeviceKind, name: str) -> Rate:
        """``name``: under which a pass' speed is learned; "": that of its model's trunk."""
        key = queue.rate_key(kind, name)
        known = self.rates.learned.get(key)
        if known is None:
            known = self.rates.of(key, device_kind=kind[0], parameters=queue.model.parameters)
        return known

    def load_s(self, queue: ModelQueue, kind: DeviceKind) -> float:
        """Seconds that loading a queue's model takes on a kind of device."""
        return self.rates.load_s(queue.digest, kind[1], weights_bytes=queue.model.weights_bytes())

    def waiting_s(self, queue: ModelQueue, kind: DeviceKind) -> float:
        """Seconds of all that waits in a queue on one usual device of a kind."""
        return sum(
            self.rate(queue, kind, name).price().of(rows, size)
            for name, (rows, size) in queue.by_rate.items()
        )

    def measured_s(self, queue: ModelQueue, kind: DeviceKind) -> float:
        """The same by what its own outcomes took, once there are enough of them."""
        n, size, seconds = queue.took.get(kind, _NO_OUTCOMES)
        return seconds / size * queue.bytes if n >= _ENOUGH and size > 0 else self.waiting_s(queue, kind)

    def ends_s(self, queue: ModelQueue) -> float:
        """Seconds until the workers that serve a queue have done all that waits in it."""
        power: Mapping[DeviceKind, float] = queue.power
        if not power:
            # Workers that serve other queues now, and will come to it.
            power = Counter({f.at.number: f.at.kind for f in queue.flights.values()}.values()) or Counter(
                worker.kind for worker in islice(queue.hosts.values(), _HOSTS)
            )
        speed = sum(n / max(1e-9, self.waiting_s(queue, kind)) for kind, n in power.items())
        return 1 / speed if speed > 0 else inf

    def devices(self, queue: ModelQueue, worker: WorkerEntry, now: float) -> float:
        """How many devices as fast as this worker serve a queue, at least one."""
        kind = worker.kind
        counted_at, usual = queue.devices.get(kind, _NEVER_COUNTED)
        if now > counted_at + _DEVICES_KEPT_S:
            mine_s = self.waiting_s(queue, kind)
            usual = sum(
                n * mine_s / max(1e-9, self.waiting_s(queue, other)) for other, n in queue.power.items()
            )
            queue.devices[kind] = (now, usual)
        return max(1.0, usual * self.rates.pace(worker.name))
