"""What the API's threads share: one that looks in the middle of another's work finds all of it, or none."""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Iterator
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any
from uuid import UUID

from motet.protocol.manifest import Manifest
from motet.protocol.wire import Beat
from scheduler.api.workers_seen import WorkersSeen
from scheduler.store.manifests import Manifests

BEATS = {name: Beat(worker=name, boot="b", seq=1) for name in ("w1", "w2", "w3")}
MODELS = [
    (
        number,
        datetime(2026, 11, 23, tzinfo=UTC),
        Manifest(name=f"m{number}", version="1", engine="e", answers="label"),
    )
    for number in (1, 2)
]


class Interrupted(dict[str, Beat]):
    """Beats of which the second is reached only when another thread has looked at them all."""

    def __init__(self, beats: dict[str, Beat], other: Callable[[], object]) -> None:
        super().__init__(beats)
        self._other = other

    def items(self) -> ItemsView[str, Beat]:
        return _Items(self, super().items(), self._other)


class _Items(ItemsView[str, Beat]):
    def __init__(self, of: dict[str, Beat], items: ItemsView[str, Beat], other: Callable[[], object]) -> None:
        super().__init__(of)
        self._items, self._meanwhile = items, other

    def __iter__(self) -> Iterator[tuple[str, Beat]]:
        for number, item in enumerate(self._items):
            if number == 1:
                self._meanwhile()
            yield item


def test_a_thread_that_looks_while_another_does_takes_no_silent_worker_for_a_live_one() -> None:
    seen = WorkersSeen(dead_s=4.0)
    assert seen.silent(BEATS, 0.0) == set()
    meanwhile: list[set[str]] = []
    interrupted = Interrupted(BEATS, lambda: meanwhile.append(seen.silent(BEATS, 5.0)))
    assert seen.silent(interrupted, 5.0) == set(BEATS)
    assert meanwhile == [set(BEATS)]
    assert seen.silent(BEATS, 6.0) == set(BEATS)


def test_manifests_that_another_thread_forgets_meanwhile_are_found_all_the_same() -> None:
    manifests = Manifests()

    class Line:
        """A connection during whose answers another thread empties what is kept."""

        def execute(self, _: object, at: dict[str, list[int]]) -> Any:
            manifests._known.clear()
            return [
                SimpleNamespace(id=number, created=created, manifest=manifest.to_json())
                for number, created, manifest in MODELS
                if number in at["ids"]
            ]

    first, both = MODELS[:1], MODELS
    for wanted in (first, both):
        found = manifests.of(Line(), {(number, created) for number, created, _ in wanted})  # type: ignore[arg-type]
        assert found == {(number, created): manifest for number, created, manifest in wanted}


def test_the_manifests_of_a_pass_are_read_once_and_those_of_another_pass_apart() -> None:
    manifests, asked = Manifests(), list[list[int]]()

    class Line:
        def execute(self, _: object, at: dict[str, list[int]]) -> Any:
            asked.append(at["ids"])
            return [SimpleNamespace(manifest=m.to_json()) for number, _, m in MODELS if number in at["ids"]]

    (one, _, first), (other, _, second) = MODELS[:2]
    line: Any = Line()
    for _ in range(2):
        assert manifests.of_pass(line, UUID(int=1), 0, [one]) == [first]
        assert manifests.of_pass(line, UUID(int=1), 1, [one, other]) == [first, second]
        assert manifests.of_pass(line, UUID(int=2), 0, [other]) == [second]
    assert asked == [[one], [one, other], [other]]
