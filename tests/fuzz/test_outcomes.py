"""Outcomes twisted field by field under their true nonce: each is recorded whole, or refused whole, or buried.

The aggregator and the store are the real ones, stepped by the test. A worker that was taken over knows the nonces of
its own leases: it may lie about its rows, but only in values that such a task can have, and only about its rows.
"""

from __future__ import annotations

import math
import os
import random
import struct
from dataclasses import replace
from typing import Any

from motet.protocol.columns import ERROR, RETURNED, SKIPPED, Column
from motet.protocol.envelope import BadMessage, pack, unwrap
from motet.protocol.wire import Assignment, Outcome
from tests.fuzz.test_bus import ODD
from tests.integration.landing import land
from tests.integration.test_protocol import (
    HEAD,
    TASKS,
    House,
    assert_accounted_for,
    expected,
    house,
    texts,
)

__all__ = ["house"]

#: Twisted outcomes; a tenth of what the bus is given, since each gets an attempt of its own.
TWISTED = max(1000, int(os.environ.get("FUZZ_ENTRIES", "5000")) // 10)
SEED = int(os.environ.get("FUZZ_SEED", "5"))
ROWS = 40


def test_a_twisted_outcome_is_recorded_whole_or_not_at_all(house: House) -> None:
    dice = random.Random(SEED)
    thrown = 0
    while thrown < TWISTED:
        rows = texts(ROWS)
        job = land(house.database, [f"{row} {thrown}" for row in rows], TASKS, block_rows=8)
        for _ in range(100):
            if house.job(job).state != "running":
                break
            house.due()
            house.tick()
            for hand in house.hands:
                for a in hand.take_all():
                    true = hand.outcome(a)
                    # The twisted one first: it is the one that is believed, if it is.
                    for raw in (twisted(true, dice), true.encode()):
                        hand.transport.worker(hand.name).report(a.subtask, a.attempt, raw)
                        thrown += 1
                    hand.holding.pop(a.key)
            house.aggregate()
        j = house.job(job)
        assert j.state == "succeeded", (j.state, thrown)
        assert_accounted_for(house, job, ROWS)
        for task in TASKS:
            # Where it was believed it said what this task can say; where not, the rows came back.
            assert set(house.labels(job, task)) <= {*HEAD.labels, "bad_outcome", "engine", *said}, thrown
        stored = house.sql("SELECT value FROM results WHERE job_id = :job AND status = 'ok'", job=job)
        assert all(math.isfinite(float(row.value.get("score", 0.0))) for row in stored), thrown
    print(f"\n{thrown} twisted outcomes, {len(house.transport.buried)} buried")


def test_whatever_waits_beside_them_is_recorded_all_the_same(house: House) -> None:
    """Twisted outcomes of strangers in the same batch: every row is answered by its own worker, at once."""
    dice = random.Random(SEED)
    rows = texts(200)
    job = land(house.database, rows, TASKS, block_rows=16)
    rounds = 0
    while house.job(job).state == "running":
        house.tick()
        for hand in house.hands:
            for a in hand.take_all():
                for _ in range(20):
                    raw = twisted(replace(hand.outcome(a), nonce="not this one"), dice, spare=("nonce",))
                    hand.transport.worker(hand.name).report(a.subtask, a.attempt, raw)
                hand.report(hand.outcome(a))
        house.aggregate()
        rounds += 1
        assert rounds < 60
    assert house.labels(job) == expected(rows)
    assert house.job(job).attempts_lost == 0
    assert_accounted_for(house, job, 200)


def test_a_bit_that_turned_on_the_way_is_never_read_as_another_message(house: House) -> None:
    """Every bit of a payload and of its outcome: what is read is what was sent, or nothing."""
    land(house.database, texts(8), TASKS)
    house.tick()
    hand = house.hands[0]
    a = hand.take_all()[0]
    for whole, read in ((a, Assignment.decode), (hand.outcome(a), Outcome.decode)):
        raw = whole.encode()
        told = 0
        for bit in range(8 * len(raw)):
            turned = bytearray(raw)
            turned[bit // 8] ^= 1 << bit % 8
            try:
                assert read(bytes(turned)) == whole, f"bit {bit} of {len(raw)} bytes"
                told += 1
            except BadMessage:
                pass
        assert told < 64, "what holds no bit of the message may turn; all else is refused"


#: Classes of errors that twisted outcomes gave to rows: their own words, which are theirs to say.
said: set[str] = set()


def twisted(
    outcome: Outcome, dice: random.Random, spare: tuple[str, ...] = ("nonce", "subtask", "attempt")
) -> bytes:
    """The same outcome with one to three values anywhere in it replaced by odd ones. Those in ``spare`` stay."""
    wire = unwrap(outcome.encode())
    if wire["columns"] and dice.random() < 0.3:
        task = dice.choice(list(wire["columns"]))
        wire["columns"][task] = misfit(len(wire["columns"][task]["status"]), dice)
        return pack(wire)
    for _ in range(dice.randrange(1, 4)):
        holder: Any = wire
        key: Any = dice.choice([name for name in wire if name not in spare])
        while isinstance(holder[key], dict | list) and holder[key] and dice.random() < 0.8:
            holder = holder[key]
            key = dice.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        holder[key] = near(holder[key], dice) if dice.random() < 0.4 else dice.choice(ODD)
    return pack(wire)


def misfit(rows: int, dice: random.Random) -> Any:
    """A column that is well formed, and is not the answer to this sub-task."""
    n = max(1, rows + dice.choice([-1, 0, 0, 1, 5]))
    arrays = {
        "codes": struct.pack("<h", dice.choice([0, -1, 3, 32767])) * n,
        "scores": struct.pack("<f", 0.5) * n,
    }
    match dice.randrange(5):
        case 0:
            arrays["scores"] = struct.pack("<f", dice.choice([float("nan"), float("inf")])) * n
        case 1:
            ends = struct.pack(f"<{n + 1}i", *range(0, 4 * n + 1, 4))
            return Column(
                kind="json", status=bytes(n), arrays={"offsets": ends, "bytes": b"NaN " * n}
            ).to_wire()
        case 2:
            return Column(kind="number", status=bytes(n), arrays={"numbers": bytes(8 * n)}).to_wire()
        case 3:
            status = bytes([dice.choice([ERROR, SKIPPED, RETURNED])]) * n
            return Column(kind="label", status=status, arrays=arrays).to_wire()
    return Column(kind="label", status=bytes(n), arrays=arrays).to_wire()


def near(value: Any, dice: random.Random) -> Any:
    """Something of the same type that is a little off."""
    match value:
        case bytes() if value:
            torn = bytearray(value)
            torn[dice.randrange(len(torn))] ^= 1 << dice.randrange(8)
            return (
                bytes(torn)
                if dice.random() < 0.7
                else bytes(torn[: dice.randrange(len(torn))]) * dice.choice([1, 3])
            )
        case int():
            return max(-(2**63), min(2**64 - 1, value + dice.choice([-1, 1, 1000])))
        case str():
            return value + dice.choice(["x", "\0", "é" * 600])
        case _:
            return dice.choice(ODD)
