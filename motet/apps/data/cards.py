"""A stream of card payments that never were: what people usually pay, and three kinds of fraud among it.

After the simulator of Le Borgne, Siblini, Lebichot and Bontempi (Reproducible Machine Learning for Credit Card Fraud
Detection, 2022). It shows the mechanics of an open job. How good a rule is on it says nothing about real cards.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

#: Seconds of a day.
DAY = 86_400
#: What no honest card pays here: the first kind of fraud.
LARGE = 220.0

Fraud = Literal["", "large", "shop", "stolen"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Payment:
    """One payment."""

    #: Seconds since 1970.
    time: float
    card: int
    shop: int
    amount: float
    #: "" for an honest one. A stolen card pays five times as much as its owner, a hacked shop's payments are all bad.
    fraud: Fraud = ""

    def row(self) -> dict[str, float | int]:
        """What the rule may know."""
        return {"time": self.time, "card": self.card, "shop": self.shop, "amount": self.amount}


def payments(
    *, cards: int = 60, shops: int = 120, days: int = 30, seed: int = 0, since: float = 1.7e9
) -> list[Payment]:
    """All payments, oldest first."""
    dice = random.Random(seed)
    usual = [dice.uniform(5, 100) for _ in range(cards)]
    each_day = [dice.uniform(0.5, 4) for _ in range(cards)]
    near = [dice.sample(range(shops), 12) for _ in range(cards)]
    hacked = [(shop, day) for day in range(0, days, 4) for shop in dice.sample(range(shops), 1)]
    stolen = [(card, day) for day in range(0, days, 3) for card in dice.sample(range(cards), 2)]
    made = []
    for day in range(days):
        for card in range(cards):
            bad_shops = {shop for shop, from_day in hacked if from_day <= day < from_day + 7}
            is_stolen = any(one == card and from_day <= day < from_day + 4 for one, from_day in stolen)
            for _ in range(_poisson(dice, each_day[card])):
                amount, shop = abs(dice.gauss(usual[card], usual[card] / 2)), dice.choice(near[card])
                fraud: Fraud = "shop" if shop in bad_shops else "large" if amount > LARGE else ""
                if is_stolen and dice.random() < 1 / 3:
                    amount, fraud = 5 * amount, "stolen"
                second = min(DAY - 1.0, max(0.0, dice.gauss(DAY / 2, 20_000)))
                made.append(
                    Payment(
                        time=since + day * DAY + second,
                        card=card,
                        shop=shop,
                        amount=round(amount, 2),
                        fraud=fraud,
                    )
                )
    return sorted(made, key=lambda one: one.time)


def _poisson(dice: random.Random, mean: float) -> int:
    """How many events come, of so many on average: waits between them are exponential."""
    count, waited = 0, dice.expovariate(1)
    while waited < mean:
        count, waited = count + 1, waited + dice.expovariate(1)
    return count
