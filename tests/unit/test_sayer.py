"""Text told as it is written: how often, in which order, and that nothing of it holds anybody up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import pytest

from motet.protocol.transport import MemoryTransport, TransportLost
from motet.protocol.wire import Assignment, Said, decode_said
from motet.text_deltas import TextDelta, ToldText
from scheduler.api import streaming
from scheduler.api.streaming import AskDelta, AskReset, EventStream, ReadAlong, SentEvent
from tests.unit.test_worker_executor import Clock, an_order
from workers.run.sayer import SAY_MOST_S, SAY_S, Sayer
from workers.run.stream import WrittenText
from workers.run.work import Work


class House:
    def __init__(self) -> None:
        self.clock = Clock()
        self.redis = MemoryTransport()
        self.transport = self.redis.worker("w")
        self.sayer = Sayer(self.transport, self.clock)
        self.order: Assignment = replace(an_order(), say="api", indices=(40, 41))
        self.work = Work.of(self.order, "fp32", 0)

    def writes(self, text: str, row: int = 0, ticket: int = 0) -> None:
        ask = next(iter(self.work.asks.values()))
        self.sayer.write([WrittenText(self.work, row, ticket, ask, text)])

    def heard(self) -> list[tuple[int, int, str]]:
        """Row of the job, characters before it, text; of what was said since the last look."""
        said = [one for raw in self.redis.said.pop("api", []) for one in decode_said(raw)]
        assert all(s.attempt == self.order.key and s.job == self.order.job for s in said)
        return [(s.row, s.begins, s.text) for s in said]


def test_the_first_words_are_told_at_once_and_then_so_often() -> None:
    house = House()
    house.writes("a")
    due_s = house.sayer.step()
    assert (house.heard(), due_s) == ([(40, 0, "a")], None)
    house.writes("b")
    house.writes("c")
    assert house.sayer.step() == pytest.approx(SAY_S)
    assert house.heard() == []
    house.writes("x", row=1, ticket=1)
    house.sayer.step()
    assert house.heard() == [(41, 0, "x")]
    house.clock.now += SAY_S
    house.sayer.step()
    assert house.heard() == [(40, 1, "bc")]


def test_what_many_answers_have_to_tell_is_one_message_and_comes_more_seldom_the_more_they_are() -> None:
    house = House()
    house.order = replace(house.order, indices=tuple(range(16)))
    house.work = Work.of(house.order, "fp32", 0)
    for row in range(16):
        house.writes("a", row=row)
    assert house.sayer.step() is None
    assert [len(decode_said(raw)) for raw in house.redis.said["api"]] == [16]
    assert [row for row, _, _ in house.heard()] == list(range(16))
    house.clock.now += SAY_S
    for row in range(16):
        house.writes("b", row=row, ticket=0)
    assert house.sayer.step() == pytest.approx(SAY_MOST_S - SAY_S)
    assert house.heard() == []
    # The first words of another row come at once, and those of the others keep their time.
    house.writes("z", row=3, ticket=1)
    assert house.sayer.step() == pytest.approx(SAY_MOST_S - SAY_S)
    assert house.heard() == [(3, 0, "z")]
    house.clock.now += SAY_MOST_S - SAY_S
    assert house.sayer.step() is None
    assert len(house.redis.said["api"]) == 1
    assert house.heard() == [(row, 1, "b") for row in range(16) if row != 3]


def test_a_row_that_goes_in_again_is_told_from_its_beginning() -> None:
    house = House()
    house.writes("abc")
    house.sayer.step()
    house.clock.now += SAY_S
    house.writes("ab", ticket=1)
    house.sayer.step()
    assert house.heard() == [(40, 0, "abc"), (40, 0, "ab")]


def test_words_that_redis_does_not_take_are_gone_and_those_behind_them_say_so() -> None:
    house = House()

    def lost(words: object) -> None:
        raise TransportLost

    say, house.transport.say = house.transport.say, lost  # type: ignore[method-assign]
    house.writes("abc")
    house.sayer.step()
    house.transport.say = say  # type: ignore[method-assign]
    house.writes("d")
    house.clock.now += SAY_S
    house.sayer.step()
    assert house.heard() == [(40, 3, "d")]


def test_nothing_is_told_of_an_attempt_that_has_ended_or_that_nobody_listens_to() -> None:
    house = House()
    house.writes("a")
    house.sayer.forget(house.order)
    assert house.sayer.step() is None
    house.work = Work.of(replace(house.order, say=""), "fp32", 0)
    house.writes("a")
    house.sayer.step()
    assert house.redis.said == {}


def said(text: str, begins: int = 0, attempt: tuple[int, int] = (1, 1), task: str = "t") -> Said:
    return Said(job="j", row=0, task=task, attempt=attempt, begins=begins, text=text)


def test_what_is_told_of_an_answer_is_always_a_beginning_of_it() -> None:
    along = ReadAlong()
    assert along.hear(said("ab")) == [AskDelta("t", 0, "ab")]
    assert along.hear(said("bc", 1)) == [AskDelta("t", 2, "c")]
    assert along.hear(said("ab")) == []
    assert along.hear(said("e", 4)) == []
    assert along.hear(said("z", 0, task="u")) == [AskDelta("u", 0, "z")]
    assert along.hear(said("a", attempt=(1, 2))) == [AskReset("t"), AskDelta("t", 0, "a")]
    assert along.hear(said("bcd", 1)) == []
    # An attempt of which nothing was told began nothing.
    assert along.hear(said("y", 7, attempt=(2, 1), task="v")) == []
    assert along.hear(said("y", attempt=(3, 1), task="v")) == [AskDelta("v", 0, "y")]


def test_the_deltas_since_the_last_reset_are_the_text() -> None:
    told = ToldText("t")
    assert told.more("ab") == TextDelta("t", "ab")
    told.anew()
    assert told.more("a") is None
    assert told.more("bc") == TextDelta("t", "c")
    told.anew()
    assert told.more("ax") == TextDelta("t", "ax", reset=True)
    assert told.whole("axe") == TextDelta("t", "e")
    assert told.whole("axe") is None
    assert told.end("axe") is None
    assert told.end("ax") == TextDelta("t", "ax", reset=True)


def test_signs_of_life_are_given_where_nothing_else_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "_SIGN_OF_LIFE_S", 0.1)
    bodies: list[bytes] = []

    async def events() -> AsyncGenerator[SentEvent, None]:
        for number in range(10):
            yield "delta", {"n": number}
        await asyncio.sleep(0.35)
        yield "row", {}

    async def send(message: Any) -> None:
        bodies.append(message.get("body", b""))

    async def receive() -> Any:
        await asyncio.Event().wait()

    asyncio.run(EventStream(events())({"type": "http"}, receive, send))
    kinds = [body.split(b"\n")[0].partition(b": ")[2].decode() for body in bodies if body]
    signs = kinds.count("it goes on")
    assert signs >= 2
    assert kinds == ["delta"] * 10 + ["it goes on"] * signs + ["row"]
    assert bodies[-1] == b""
