"""The state machine: hypothesis draws moves of a ``World``, and a play that breaks an invariant is cut to the moves that matter."""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, get_state_machine_test, initialize, precondition, rule

from tests.machine.oracle import check, check_end
from tests.machine.stage import Stage
from tests.machine.world import AGGREGATOR_FAULTS, DISPATCHER_FAULTS, MOST_JOBS, PAUSES_S, Play, World

#: Plays, and steps in each; a nightly run sets MACHINE_EXAMPLES=20000 and MACHINE_SECONDS=36000.
EXAMPLES = int(os.environ.get("MACHINE_EXAMPLES", "300"))
STEPS = int(os.environ.get("MACHINE_STEPS", "12"))
#: Moves of a burst, which is one step.
_BURST = 8
#: No more plays are begun after so many seconds, on a machine of any speed; `make mutants` plays for an hour.
SECONDS = float(os.environ.get("MACHINE_SECONDS", "30"))
#: Another one gives other plays. Any must pass.
SEED = int(os.environ.get("MACHINE_SEED", "0"))


#: Of a dispatcher's step in which everything happens. A fault at a later one than there are befalls nobody.
MOST_TRANSACTIONS = 15
#: Rule -> how often it comes in a burst, and the largest of each number that it is called with.
RULES: dict[str, tuple[int, tuple[int, ...]]] = {
    "submit": (4, (11, 4, 8, 20, 6)),
    "upload": (3, (5, 4, 8, 12)),
    "part": (8, (1, 3, 5, 12, 3, 7)),
    "part_again": (2, (1, 3, 5)),
    "close_late": (3, (1, 3, 7)),
    "open": (2, (8,)),
    "ask": (10, (1, 3, 5, 20)),
    "ask_again": (5, (1, 20, 2)),
    "ask_drop": (5, (1, 3, 5)),
    "expire": (2, (1,)),
    "abandon": (3, (1, 5, 7)),
    "land_crash": (3, (1, 3, 2, 3)),
    "race": (3, (1, 3, 3)),
    "close": (2, (1, 11, 7)),
    "forget_front": (3, (1,)),
    "cancel": (1, (11,)),
    "delete": (1, (11,)),
    "round": (6, (7,)),
    "tick": (10, (1,)),
    "tick_fault": (5, (1, MOST_TRANSACTIONS - 1, len(DISPATCHER_FAULTS) - 1)),
    "breathe": (4, (1,)),
    "storm": (1, (1,)),
    "deafen": (2, (1,)),
    "audit": (1, (1,)),
    "spoil": (1, (1, 5)),
    "recall": (2, (3,)),
    "clone": (3, (3, 2)),
    "advance": (2, (len(PAUSES_S) - 1,)),
    "aggregate": (5, (1,)),
    "aggregate_fault": (3, (1, len(AGGREGATOR_FAULTS) - 1)),
    "take": (6, (2,)),
    "work": (3, (2,)),
    "begin": (6, (2, 3, 3, 3, 1)),
    "finish": (8, (2, 3, 8)),
    "late": (3, (5, 8)),
    "forge": (2, (5, 4)),
    "die": (3, (2, 2, 3)),
    "start": (3, (2,)),
    "freeze": (1, (2,)),
    "thaw": (2, (2,)),
    "drain": (1, (2, 1)),
    "drop_message": (1, (2, 3)),
    "drop_payload": (1, (2,)),
    "double_message": (2, (2, 3)),
    "reorder": (1, (2,)),
    "double_entry": (2, (3,)),
    "wipe": (1, (3,)),
}
#: Rule -> when it does anything at all.
_WHEN: dict[str, Callable[[World], object]] = {
    "submit": lambda w: len(w.jobs) < MOST_JOBS,
    "upload": lambda w: len(w.jobs) < MOST_JOBS,
    "part": lambda w: w.uploads.jobs,
    "part_again": lambda w: w.uploads.jobs,
    "close_late": lambda w: w.uploads.jobs,
    "open": lambda w: len(w.jobs) < MOST_JOBS,
    "ask": lambda w: w.callers.jobs,
    "ask_again": lambda w: w.callers.asks,
    "ask_drop": lambda w: w.callers.jobs,
    "expire": lambda w: any(a.drop for a in w.callers.asks),
    "abandon": lambda w: any(a.drop for a in w.callers.asks),
    "land_crash": lambda w: w.callers.jobs,
    "race": lambda w: w.callers.jobs,
    "close": lambda w: w.callers.jobs,
    "forget_front": lambda w: w.callers.jobs,
    "take": lambda w: any(w.transport.queues.values()),
    "work": lambda w: any(w.transport.queues.values()) or any(h.holding for h in w.hands),
    "begin": lambda w: any(h.holding for h in w.hands),
    "finish": lambda w: any(h.holding for h in w.hands),
    "aggregate": lambda w: w.transport.entries,
    "aggregate_fault": lambda w: w.transport.entries,
    "double_entry": lambda w: w.transport.entries,
    "late": lambda w: w.taken,
    "forge": lambda w: w.taken,
    "start": lambda w: any(h.life == "gone" for h in w.hands),
    "thaw": lambda w: any(h.life == "frozen" for h in w.hands),
    "drop_message": lambda w: any(w.transport.queues.values()),
    "double_message": lambda w: any(w.transport.queues.values()),
    "reorder": lambda w: any(len(queue) > 1 for queue in w.transport.queues.values()),
    "drop_payload": lambda w: w.transport.payloads,
    "recall": lambda w: w.transport.payloads,
    "clone": lambda w: w.transport.payloads,
}


class Machine(RuleBasedStateMachine):
    """One play. Its class attributes are set by ``search``."""

    stage: Stage
    #: Called with the moves of each play that broke something, and what.
    broken: Callable[[Play, str], None]
    moves: Counter[str]

    def __init__(self) -> None:
        super().__init__()
        self.world = World(self.stage, check)
        self.failed = False

    def move(self, name: str, *numbers: int) -> None:
        self.moves[name] += 1
        self.run(lambda: self.world.do(name, *numbers))

    def run(self, act: Callable[[], None]) -> None:
        try:
            act()
        except BaseException as error:
            self.failed = True
            self.broken(tuple(self.world.log), f"{type(error).__name__}: {error}")
            raise

    @initialize(
        numbers=st.tuples(*(st.integers(0, most) for most in RULES["submit"][1])), tasks=st.integers(0, 17)
    )
    def first(self, numbers: tuple[int, ...], tasks: int) -> None:
        """Something to do: of every two plays one has an open job too."""
        self.move("submit", *numbers)
        if tasks <= RULES["open"][1][0]:
            self.move("open", tasks)

    @rule(luck=st.integers(0, 1 << 30))
    def burst(self, luck: int) -> None:
        """Some moves at random: hypothesis likes to say the same again and again, and work to go on needs variety."""
        dice = random.Random(luck)
        for _ in range(_BURST):
            able = [name for name in RULES if name not in _WHEN or _WHEN[name](self.world)]
            [name] = dice.choices(able, [RULES[name][0] for name in able])
            self.move(name, *(dice.randint(0, most) for most in RULES[name][1]))

    def teardown(self) -> None:
        if not self.failed:
            self.run(self._end)

    def _end(self) -> None:
        self.world.heal()
        check_end(self.world)


def _rule(name: str) -> Any:
    def act(self: Machine, **drawn: int) -> None:
        self.move(name, *(drawn[f"n{i}"] for i in range(len(drawn))))

    act.__name__ = name
    made = rule(**{f"n{i}": st.integers(0, most) for i, most in enumerate(RULES[name][1])})(act)
    when = _WHEN.get(name)
    return precondition(lambda self: when(self.world))(made) if when else made


for _name in RULES:
    setattr(Machine, _name, _rule(_name))
# As often as all others together: then three moves in four are of a burst, and the rest is hypothesis' own.
for _again in range(len(RULES) // 2):
    setattr(Machine, f"burst{_again}", Machine.burst)


@dataclass(frozen=True)
class Found:
    """A play that breaks an invariant, and which."""

    play: Play
    why: str


def search(
    stage: Stage, *, plays: int, steps: int = STEPS, seed: int = SEED
) -> tuple[Found | None, Counter[str]]:
    """Play so often, until something breaks: then the shortest play that still breaks it. And how often each rule was called."""
    first: list[Found] = []

    class Here(Machine):
        pass

    Here.stage, Here.moves = stage, Counter()
    Here.broken = staticmethod(lambda play, why: first.append(Found(play, why)))
    chosen = settings(
        max_examples=plays,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        # Shrinking is done below: a play is a list of moves, which can be left out one by one.
        phases=(Phase.generate,),
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    try:
        hypothesis.seed(seed)(get_state_machine_test(Here, settings=chosen))()
    except BaseException:
        if not first:
            raise
    return (shorten(stage, first[0]) if first else None), Here.moves


def perform(stage: Stage, play: Play) -> str | None:
    """Why a play breaks an invariant; None where it ends well."""
    try:
        world = World(stage, check)
        world.play(play)
        check_end(world)
    except Exception as error:  # noqa: BLE001 - whatever sound code would not have raised
        return f"{type(error).__name__}: {error}"
    return None


def shorten(stage: Stage, found: Found, patience_s: float = 20.0) -> Found:
    """The same with all moves left out that it can do without. Whatever it then breaks is as good."""
    until = time.monotonic() + patience_s
    size = max(1, len(found.play) // 2)
    while size:
        for at in range(len(found.play) - size, -1, -size):
            play = (*found.play[:at], *found.play[at + size :])
            if time.monotonic() < until and (why := perform(stage, play)) is not None:
                found = Found(play, why)
        size //= 2
    return found
