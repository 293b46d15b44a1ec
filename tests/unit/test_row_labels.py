"""Labels that a row brings, and many of them: scored as each would be alone, and refused in words where they are none."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from motet import InvalidJob
from motet.cli.jobs import parse_tasks
from motet.export import _batch, json_row
from motet.labels import MOST_LABELS
from motet.protocol.columns import STATE_MASK, Column
from motet.results import Answers, Block
from motet.tasks import Choose, Generate, fields_of, parse
from scheduler.answers import as_texts, as_values, told
from tests.tiny_language import a_llama
from tests.unit.test_causal_engine import House
from workers.engine import Prepared
from workers.engines.causal import steps
from workers.engines.causal.runs import Varlen, one_by_one

LISTED = "{candidates}"
#: Words whose tokens begin alike.
MANY = tuple(f"the {word} {i}" for i in range(12) for word in ("cat", "dog", "cat sat"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def house(llama: Path) -> House:
    return House(llama)


def cells(column: Column) -> list[Any]:
    """What stands in a column of JSON; of an error its class and words."""
    answers = Answers.to({"kind": "choose", "labels": LISTED, "scores": True}, column)
    return [
        (column.errors[i].error, column.errors[i].message) if status & STATE_MASK else answers.decoded(i)
        for i, status in enumerate(column.status)
    ]


def plainly(house: House, row: Prepared, task: int = 0) -> list[float]:
    """Each label's share, one label and one prompt at a time, by the plain model."""
    asked = row.inputs.tasks[task]

    def sums(prompt: Sequence[int]) -> torch.Tensor:
        longest = max(map(len, asked.labels))
        # What stands behind a label changes nothing before it.
        rows = [[*prompt, *ids, *[0] * (longest - len(ids))] for ids in asked.labels]
        with torch.inference_mode():
            logits = house.plain(torch.tensor(rows)).logits.log_softmax(-1)
        at = len(prompt) - 1
        return torch.tensor(
            [
                sum(float(logits[n, at + i, t]) for i, t in enumerate(ids))
                for n, ids in enumerate(asked.labels)
            ]
        )

    scores = sums(asked.prompt.ids) - (sums(asked.empty.ids) if asked.empty else 0)
    shares: list[float] = scores.softmax(0).tolist()
    return shares


@pytest.mark.parametrize(
    ("logits", "varlen", "gathered"),
    [
        (1, None, 32),
        (1 << 25, None, 32),
        # As a kernel of a GPU is given them: all pieces at once, or through masks where these are many.
        (1 << 25, one_by_one, 1 << 30),
        (1 << 25, one_by_one, 32),
    ],
)
def test_many_labels_are_scored_as_each_of_them_alone_and_what_they_share_is_computed_once(
    house: House, logits: int, varlen: Varlen | None, gathered: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(steps.LOGITS, "cpu", logits)
    monkeypatch.setattr(steps, "GATHERED", gathered)
    monkeypatch.setattr(house.handle, "varlen", varlen)
    house.handle.prefix_cache.clear()
    task = Choose("tiny", labels=MANY, question="Which one?", calibrate=False, scores=True)
    pass_ = house.pass_({"one": task})
    [row] = house.rows(pass_, ["the dog sat"])
    before = house.computed
    ended = house.ended(pass_, [row])[0]
    column = ended.columns["one"]
    shares = list(torch.frombuffer(bytearray(column.arrays["all"]), dtype=torch.float32).tolist())
    assert shares == pytest.approx(plainly(house, row), rel=1e-3)
    asked = row.inputs.tasks[0]
    separate = {tuple(label[:n]) for label in asked.labels for n in range(1, len(label))}
    assert house.computed - before == len(asked.prompt.ids) + len(separate)
    assert len(separate) < sum(len(label) - 1 for label in asked.labels)


def test_a_thousand_labels_are_one_row(house: House) -> None:
    labels = tuple(f"the mat {i}" for i in range(MOST_LABELS))
    task = Choose("tiny", labels=labels, question="Which?", calibrate=False)
    [(label, score)] = house.run({"a": task}, ["Hm."])["a"]
    assert label in labels
    assert 0 < score < 1


def test_each_row_chooses_among_its_own_labels(house: House) -> None:
    lists = [["cat", "the dog", "a film"], ["the bank", "the bank of it"], ["the mat"]]
    texts = ["the cat sat on the mat", "prices rose", "a film"]
    listed = {LISTED: [json.dumps(one) for one in lists]}
    for question in ("", "Which?"):
        task = Choose("tiny", labels=LISTED, question=question, scores=True)
        pass_ = house.pass_({"a": task}, fields=listed)
        rows = house.rows(pass_, texts)
        for (label, score, every), row, labels in zip(
            (cells(house.ended(pass_, [row])[0].columns["a"])[0] for row in rows), rows, lists, strict=True
        ):
            assert list(every) == labels
            assert list(every.values()) == pytest.approx(plainly(house, row), rel=1e-3)
            assert (label, score) == max(every.items(), key=lambda one: one[1])
    # As for fixed labels, in the words that are asked too.
    fixed = house.pass_({"a": Choose("tiny", labels=tuple(lists[0]), scores=True)})
    [row] = house.rows(fixed, texts[:1])
    same = house.rows(house.pass_({"a": Choose("tiny", labels=LISTED, scores=True)}, fields=listed), texts)[0]
    assert row.inputs.tasks[0].prompt.ids == same.inputs.tasks[0].prompt.ids


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([], "an empty list"),
        ("cat, dog", "a text"),
        (None, "null"),
        ({"a": 1}, "an object"),
        (["cat", "dog", "cat"], "a list whose labels 1 and 3 are the same"),
        (["cat", 5], "a list whose label 2 is no text"),
        (["cat", " "], "a list whose label 2 is empty"),
        (["x" * 201], "a list whose label 1 has 201 characters"),
        ([str(i) for i in range(1001)], "a list of 1,001 labels"),
    ],
)
def test_labels_that_are_none_are_the_error_of_their_task_in_their_row(
    house: House, value: Any, words: str
) -> None:
    listed = {LISTED: [json.dumps(["cat", "dog"]), json.dumps(value)]}
    tasks = {"a": Choose("tiny", labels=LISTED), "b": Generate("tiny", prompt="Go on.", max_tokens=2)}
    pass_ = house.pass_(tasks, fields=listed)
    ended = house.ended(pass_, house.rows(pass_, ["the cat", "the dog"]))
    assert cells(ended[0].columns["a"])[0][0] in ("cat", "dog")
    expected = f"{{candidates}} is {words}; expected a list of 1 to 1,000 different texts"
    error, message = cells(ended[1].columns["a"])[0]
    assert (error, message[: len(expected)]) == ("bad_labels", expected)
    assert not ended[1].columns["b"].errors, "the other task of the row is answered"
    # Alone in its pass the row never reaches the device.
    alone = house.engine.prepare(house.pass_({"a": tasks["a"]}, fields=listed), ["the cat", "the dog"])
    assert getattr(alone[1], "error", "") == "bad_labels"


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([], "got an empty list"),
        (["a"], "got a list of one label"),
        (["a", "b", "a"], "got a list whose labels 1 and 3 are the same"),
        (["a", 1], "got a list whose label 2 is no text"),
        (["a"] * 1001, "got a list of 1,001 labels"),
        (
            "candidates",
            "got candidates; expected 2 to 1,000 different texts of up to 200 characters, or the field",
        ),
        ("{a} {b}", "got {a} {b}"),
    ],
)
def test_fixed_labels_that_are_none_are_refused_by_name_at_submission(labels: Any, words: str) -> None:
    with pytest.raises(InvalidJob, match=f"tasks.pick.labels: {words}".replace("{", r"\{")):
        parse({"pick": {"kind": "choose", "model": "m", "labels": labels}})


def test_a_field_of_labels_is_a_field_that_the_task_reads_and_a_part_of_an_answer_one_that_it_needs() -> None:
    told_tasks = parse_tasks(["pick=choose:m,labels={candidates}", "who=choose:m,labels={event.who}"])
    assert told_tasks["pick"]["labels"] == LISTED
    tasks = parse({**told_tasks, "event": {"kind": "extract", "model": "m", "schema": {"type": "object"}}})
    assert fields_of(tasks) == ("text", "candidates")
    assert tasks["who"].reads("who", tasks) == ("text", "event")


def test_a_chosen_label_is_read_like_any_other() -> None:
    plain = [{"label": "fox", "score": 0.75, "scores": {"fox": 0.75, "hen": 0.25}}, None]
    body = json.dumps(plain[0]).encode()
    column = Column.from_wire(
        {
            "kind": "json",
            "status": b"\0\1",
            "arrays": {"offsets": b"".join(n.to_bytes(4, "little") for n in (0, len(body), len(body))), "bytes": body},
            "errors": {1: ["bad_labels", "…", False]},
            "dim": 0,
            "dtype": "",
        }
    )  # fmt: skip
    spec = {"kind": "choose", "labels": LISTED, "scores": True}
    assert as_texts(column, spec, ()) == ["fox", ""]
    assert [told(value, "json", spec) for value in as_values(column, ())] == ["fox", None]
    block = Block(number=0, first_row=0, rows=2, done=None, answers={"pick": Answers.to(spec, column)})
    first, second = (row["pick"] for row in block)
    assert (str(first), first.value, first.label, first.score, first.kind) == (
        "fox",
        "fox",
        "fox",
        0.75,
        "label",
    )
    assert first.scores == {"fox": 0.75, "hen": 0.25}
    assert (second.ok, second.scores, second.error.error if second.error else "") == (
        False,
        None,
        "bad_labels",
    )
    # In exports too: a text, a score, and a map, for rows differ in their labels.
    assert json_row(next(iter(block)))["pick"] == "fox"
    table = _batch(block)
    assert table.column("pick").to_pylist() == ["fox", None]
    assert table.column("pick_score").to_pylist() == [0.75, None]
    assert table.column("pick_scores").to_pylist() == [[("fox", 0.75), ("hen", 0.25)], None]
