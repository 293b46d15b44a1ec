"""The card desk of `motet app risk`: an open job that knows a card's last days, and tells a webhook of each alert.

Payments come one by one while a bulk job fills the workers. What is measured is the time from a payment to the receipt of its
alert. The payments are simulated: how many alerts are right says nothing about real cards.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

from motet.apps.data.cards import DAY, Payment
from motet.apps.hooks import HookReceiver, receiving
from motet.cli.show import table
from motet.client import Client
from motet.demo.stage import StagedCluster, Story
from motet.feed import Feed
from motet.folds import Count, Fold, Mean, Sum
from motet.job import Job
from motet.results import Row
from motet.tasks import Classify, Function, Task

NAME = "risk-cards"
TASKS: Mapping[str, Task] = {
    "judged": Function(
        "card-rule", inputs=("amount", "usual", "n_month", "n_day", "spent_day"), params={"spent": 500.0}
    )
}
#: What the job keeps of a card, folded before each of its payments.
STATE: Mapping[str, Fold] = {
    "usual": Mean("{amount}", key="{card}", window="30d", at="{time}"),
    "n_month": Count(key="{card}", window="30d", at="{time}"),
    "n_day": Count(key="{card}", window="1d", at="{time}"),
    "spent_day": Sum("{amount}", key="{card}", window="1d", at="{time}"),
}
ALERT = "judged.score > 0.5"
#: Payments a second while the clock runs, and seconds that a payment, and a message behind it, may take at most.
RATE, WITHIN_S = 10.0, 30.0
#: Seconds in which all of the history must be answered.
HISTORY_S = 300.0
#: Payments that took so many seconds were stalled.
STALLED_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """One payment and what became of it."""

    payment: Payment
    score: float
    reason: str
    #: Seconds from the payment to its answer, and to the receipt of its message; None where there is none.
    answer_s: float
    hook_s: float | None = None
    #: Those of them that the message took: from its event, which is written where the answer is kept, to the receipt.
    delivery_s: float = 0.0

    @property
    def alert(self) -> bool:
        return self.score > 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class CardsWatched:
    """The desk's day."""

    #: What came before the clock ran, as history, and then at RATE beside a bulk job.
    before: Sequence[Judged]
    live: Sequence[Judged]
    #: Rows that the bulk job had done by then.
    bulk_rows: int
    #: The machine's load average just before, of one minute: another's work makes all times longer.
    load_1m: float = 0.0

    def to_json(self) -> dict[str, Any]:
        told = [(one.hook_s, one.delivery_s) for one in self.live if one.hook_s is not None]
        hooks, deliveries = [hook_s for hook_s, _ in told], [delivery_s for _, delivery_s in told]
        events = [hook_s - delivery_s for hook_s, delivery_s in told]
        return {
            "payments": len(self.live),
            "rate_s": RATE,
            "alerts": len(hooks),
            "payment_to_hook_p50_ms": quantile_ms(hooks, 0.5),
            "payment_to_hook_p95_ms": quantile_ms(hooks, 0.95),
            "payment_to_event_p95_ms": quantile_ms(events, 0.95),
            "event_to_hook_p95_ms": quantile_ms(deliveries, 0.95),
            "payment_to_answer_p95_ms": quantile_ms([one.answer_s for one in self.live], 0.95),
            "stalls": stalls(self.live),
            "bulk_rows_beside": self.bulk_rows,
            "load_1m": round(self.load_1m, 2),
            "simulated": "how many alerts are right says nothing about real cards",
        }


def watch(stage: StagedCluster, payments: Sequence[Payment], live: int, bulk: Sequence[str]) -> CardsWatched:
    """Ask the last ``live`` payments at RATE beside a bulk job over ``bulk``; those before them are the history."""
    with receiving() as hook, _desk(stage.client, hook) as feed:
        before, live_ones = payments[:-live], payments[-live:]
        with stage.story.phase(f"folding {len(before):,} payments as the cards' history", slow=True):
            history = _asked(feed, hook, before, rate=None)
        beside = stage.client.submit(
            bulk, {"topic": Classify("news-topics")}, name=stage.name, reuse=False, progress=False
        )
        try:
            _await_begun(beside)
            words = f"{live:,} payments at {RATE:g} a second, beside {len(bulk):,} texts of a bulk job"
            load_1m = os.getloadavg()[0]
            with stage.story.phase(words, slow=True):
                judged = _asked(feed, hook, live_ones, rate=RATE)
            bulk_rows = beside.progress.ok
        finally:
            beside.cancel()
    return CardsWatched(before=history, live=judged, bulk_rows=bulk_rows, load_1m=load_1m)


@contextmanager
def _desk(client: Client, hook: HookReceiver) -> Iterator[Feed]:
    """The open job with its webhook; both are gone at the end."""
    with client.open(TASKS, name=f"{NAME}-{secrets.token_hex(4)}", state=STATE, notify_when=ALERT) as feed:
        webhook = client.add_webhook(hook.url, events=["row.matched"], job=feed.job.id)
        hook.secret = webhook.secret or ""
        try:
            yield feed
        finally:
            client.remove_webhook(webhook.id)
            feed.close().wait(timeout=WITHIN_S).delete()


def _asked(
    feed: Feed, hook: HookReceiver, payments: Sequence[Payment], *, rate: float | None
) -> list[Judged]:
    """Ask all of them, so many a second or as fast as they are taken, and wait for answers and messages."""
    sent: list[float] = []
    answered: dict[int, float] = {}
    asked: list[Future[Row]] = []
    began = time.time()
    for at, payment in enumerate(payments):
        if rate is not None:
            time.sleep(max(0.0, began + at / rate - time.time()))
        sent.append(time.time())
        future = feed.put(payment.row(), within_s=WITHIN_S if rate else HISTORY_S)
        future.add_done_callback(partial(_note, answered, at))
        asked.append(future)
    wait(asked)
    rows = [future.result() for future in asked]
    judged = [row["judged"].value for row in rows]
    alerts = {row.index for row, one in zip(rows, judged, strict=True) if one["score"] > 0.5}
    hook.wait_for(alerts, WITHIN_S)
    receipts = [hook.rows.get(row.index) for row in rows]
    return [
        Judged(
            payment=payment,
            score=one["score"],
            reason=one["reason"],
            # Whoever waits for an answer may be told a moment before it was noted.
            answer_s=answered.get(at, time.time()) - sent[at],
            hook_s=receipt.came_s - sent[at] if receipt else None,
            delivery_s=receipt.came_s - receipt.written_s if receipt else 0.0,
        )
        for at, (payment, receipt, one) in enumerate(zip(payments, receipts, judged, strict=True))
    ]


def _note(answered: dict[int, float], at: int, _: Future[Row]) -> None:
    answered[at] = time.time()


def _await_begun(job: Job) -> None:
    """Until its first rows are answered: then it is at the workers."""
    for progress in job.watch(timeout=HISTORY_S):
        if progress.ok:
            return


def show(story: Story, watched: CardsWatched) -> None:
    """The newest alerts with their reasons, the rate of alerts, and how soon they were told."""
    told = watched.to_json()
    newest = [one for one in reversed(watched.live) if one.alert][:5]
    lines = [(f"{one.score:.2f}", one.payment.card, one.reason, one.payment.fraud or "–") for one in newest]
    story.show(table(("#score", "#card", "why, newest first", "simulated as"), lines))
    story.say(
        f"alerts: {_share(watched.live):.1%} of the last {len(watched.live):,} payments, "
        f"{_share(watched.before):.1%} of the {len(watched.before):,} before them (simulated)\n"
        f"payment to webhook: p95 {told['payment_to_hook_p95_ms']} ms, p50 {told['payment_to_hook_p50_ms']} ms of "
        f"{told['alerts']} alerts (to its event p95 {told['payment_to_event_p95_ms']} ms, from there "
        f"{told['event_to_hook_p95_ms']} ms); payment to answer: p95 {told['payment_to_answer_p95_ms']} ms; at {RATE:g} "
        f"payments a second beside a bulk job that did {watched.bulk_rows:,} rows meanwhile (load {watched.load_1m:.1f})"
    )
    for one in told["stalls"]:
        story.say(
            f"stalled: {one['payments']} payments from second {one['from_s']:g} on, "
            f"answered after up to {one['longest_ms']:,.0f} ms"
        )


def alerts_a_day(watched: CardsWatched) -> dict[str, list[tuple[float, float]]]:
    """Alerts and frauds of 100 payments, by simulated day."""
    every = [*watched.before, *watched.live]
    first = min(one.payment.time for one in every)
    days: dict[int, list[Judged]] = {}
    for one in every:
        days.setdefault(int((one.payment.time - first) // DAY), []).append(one)
    return {
        "alerts": [(day, 100 * _share(days[day])) for day in sorted(days)],
        "frauds": [
            (day, 100 * sum(one.payment.fraud != "" for one in days[day]) / len(days[day]))
            for day in sorted(days)
        ],
    }


def _share(judged: Sequence[Judged]) -> float:
    return sum(one.alert for one in judged) / len(judged) if judged else 0.0


def stalls(live: Sequence[Judged]) -> list[dict[str, float]]:
    """Payments in a row that each took STALLED_S or more: the second of the clock at which the first of them came, how many
    they are, and the most that one of them took."""
    found: list[dict[str, float]] = []
    for stalled, run in groupby(enumerate(live), key=lambda one: one[1].answer_s >= STALLED_S):
        (first, _), *_ = some = list(run)
        if stalled:
            longest_ms = round(1000 * max(one.answer_s for _, one in some), 1)
            found.append({"from_s": first / RATE, "payments": len(some), "longest_ms": longest_ms})
    return found


def quantile_ms(seconds: Sequence[float], share: float) -> float | None:
    """The value in milliseconds that ``share`` of these do not exceed; None of none."""
    if not seconds:
        return None
    ordered = sorted(seconds)
    return round(1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))], 1)
