"""The crew tells of whom something is new, and of whom more than what they hold."""

from __future__ import annotations

from dataclasses import replace

import pytest

from motet.protocol.transport import Heard
from motet.protocol.wire import FOR_PEOPLE, Beat
from scheduler.crew import Crew

BEATS = {name: Beat(worker=name, boot="b", seq=1, resident=("m",)) for name in ("u", "v", "w")}


def crew() -> Crew:
    found = Crew(dead_s=4.0)
    came = found.hear(Heard(dict(BEATS), frozenset(BEATS)), 0.0)
    assert came == ({"u", "v", "w"}, {"u", "v", "w"})
    return found


def hear(crew: Crew, **change: object) -> tuple[set[str], set[str]]:
    beats = BEATS | {"v": replace(BEATS["v"], **change)}  # type: ignore[arg-type]
    return crew.hear(Heard(beats, frozenset({"u", "v"})), 1.0)


@pytest.mark.parametrize("change", [{"held": ((1, 1),)}, {"left": ((1, 1),)}])
def test_what_a_worker_holds_is_no_news_of_the_worker_itself(change: dict[str, object]) -> None:
    assert hear(crew(), **change) == ({"v"}, set())


@pytest.mark.parametrize(
    "change",
    [
        *({"boot": "c"}, {"state": "draining"}, {"protocol": 4}, {"resident": ()}, {"engines": ("encoder",)}),
        *(
            {"device_kind": "cuda"},
            {"device_name": "d"},
            {"memory_mb": 1},
            {"gpus": 2},
            {"formats": ("bf16",)},
        ),
        {"spreads": ("encoder",)},
    ],
)
def test_all_else_is(change: dict[str, object]) -> None:
    assert hear(crew(), **change) == ({"v"}, {"v"})


def test_what_is_for_people_is_no_news() -> None:
    more = dict.fromkeys(FOR_PEOPLE, 5)
    assert hear(crew(), **more) == (set(), set())


def test_who_goes_and_who_comes_is_news() -> None:
    found = crew()
    assert found.hear(Heard({"u": BEATS["u"]}, frozenset()), 1.0) == ({"v", "w"}, {"v", "w"})
    assert found.hear(Heard(dict(BEATS), frozenset({"v", "w"})), 2.0) == ({"v", "w"}, {"v", "w"})
