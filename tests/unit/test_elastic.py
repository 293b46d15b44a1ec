"""Models that are faster with more memory: they have what others leave, and give it back before others come."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from tests.unit.test_worker_executor import OTHER, FakeEngine, an_order, answers
from tests.unit.test_worker_flow import FakeLanguageEngine, LanguageHouse, asks
from workers.engine import DeviceBroken, Pass, Prepared

#: Of another engine, which answers whole batches.
PLAIN = replace(OTHER, engine="plain")


@dataclass
class Elastic(FakeLanguageEngine):
    """Each row inside takes 10 MB, of which the first two are reckoned with in the model's own memory."""

    places: int = 100
    more_mb: int = 0
    granted: list[int] = field(default_factory=list)
    broken: bool = False

    def stretch(self, handle: Any, more_mb: int) -> bool:
        if self.broken:
            raise DeviceBroken
        if more_mb != self.more_mb or not self.granted:
            self.granted.append(more_mb)
        self.more_mb = more_mb
        return self._taken(0) <= more_mb

    def admit(self, pass_: Pass, row: Prepared, ticket: Hashable, *, urgent: bool) -> bool:
        return self._taken(1) <= self.more_mb and super().admit(pass_, row, ticket, urgent=urgent)

    def _taken(self, more: int) -> int:
        return 10 * (len(self.inside_) + more - 2)


@pytest.fixture
def house() -> LanguageHouse:
    house = LanguageHouse(budget_mb=100)
    house.engine = Elastic(house.clock, size_mb=30)
    house.plain = FakeEngine(house.clock, size_mb=30)
    return house


def elastic(house: LanguageHouse) -> Elastic:
    assert isinstance(house.engine, Elastic)
    return house.engine


def test_a_model_alone_has_all_the_memory_that_models_may_hold(house: LanguageHouse) -> None:
    house.submit(asks(*["abc"] * 20))
    house.steps()
    assert elastic(house).granted == [70]
    assert max(map(len, house.engine.seen)) == 9


def test_another_model_comes_once_enough_rows_have_ended_and_they_share_from_then_on(
    house: LanguageHouse,
) -> None:
    # Nine rows are inside, of very different lengths, and more wait.
    long = asks(*["a" * (10 + 10 * i) for i in range(9)], *["b" * 30] * 9)
    house.submit(long)
    for _ in range(12):
        house.executor.step()
    assert len(house.engine.inside_) >= 8
    other = an_order("hello", model=PLAIN, interactive=True)
    house.submit(other)
    house.steps()
    # 30 MB and 30 MB are reckoned with; of the other 40 MB rows had four times 10 once the second model came.
    assert house.plain.loads == ["other"]
    assert elastic(house).granted == [70, 40]
    outcomes = house.outcomes()
    assert answers(outcomes[other.key]) == [5.0]
    assert len(answers(outcomes[long.key], "said")) == 18
    assert not any(outcomes[long.key].columns["said"].errors)
    # It came before the long rows had ended, and nothing was tried in vain.
    assert list(outcomes) == [other.key, long.key]


def test_what_an_evicted_model_held_is_the_others(house: LanguageHouse) -> None:
    house.submit(an_order("hello", model=PLAIN))
    house.steps()
    house.submit(asks("abc"))
    house.steps()
    assert elastic(house).granted == [40]
    house.plain.size_mb = 60
    house.submit(an_order("hello", model=replace(PLAIN, name="third", trunk="third")))
    house.steps()
    assert house.plain.unloads == ["other"]
    assert elastic(house).granted[-1] == 10
    assert house.engine.unloads == []


def test_a_device_that_is_lost_while_memory_is_shared_out_is_replaced(house: LanguageHouse) -> None:
    house.submit(asks("a" * 50))
    for _ in range(5):
        house.executor.step()
    elastic(house).broken = True
    house.submit(an_order("hello", model=PLAIN))
    house.steps()
    assert house.broken == 1
