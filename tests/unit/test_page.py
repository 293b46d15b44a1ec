"""The pages as functions of facts: everything is escaped, every cell is told, and nothing is loaded from elsewhere."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

import pytest
from jinja2 import UndefinedError

from motet.pages import environment, read
from scheduler.api import markup
from scheduler.api.charts import Stretch, curve, drawn_bars, minutes, nice, round_step
from scheduler.api.page import job_page, jobs_page, queue_page, refused_page
from scheduler.api.queue import QueuedRow, _first, _plain
from scheduler.api.words import compact, duration, percent
from tests.messages import ACTIVITY, JOB

EVIL = "<script>alert('&\")</script>"


def facts(**job: Any) -> dict[str, Any]:
    """A running job of one pass with two tasks; what is named of the job differs."""
    found: dict[str, Any] = copy.deepcopy(ACTIVITY)
    found["job"].update(job)
    found["job"]["tasks"]["vector"] = {"kind": "embed", "model_ref": "all-MiniLM-L6-v2@1"}
    found["passes"][0].update(tasks=["topic", "vector"], unfused_tokens=2 * 41234)
    return found


def bar(
    subtask: int, start_s: float, end_s: float | None, state: str = "done", **more: Any
) -> dict[str, Any]:
    return {
        **ACTIVITY["timeline"][0],  # type: ignore[index]
        "subtask": subtask,
        "carved_s": start_s,
        "start_s": start_s,
        "end_s": end_s,
        "state": state,
        **more,
    }


class Reader(HTMLParser):
    """Reads a page strictly: every element is closed by its own end."""

    VOID = ("meta", "br", "link")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        assert len(dict(attributes)) == len(attributes), "an attribute twice"
        self.seen.append((name, dict(attributes)))
        if name not in self.VOID:
            self.open.append(name)

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, words: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(words)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def count(self, name: str) -> int:
        return sum(seen == name for seen, _ in self.seen)


def drawn(chart: str, *facts: Any) -> str:
    return str(getattr(environment("scheduler.api").get_template("charts.html").module, chart)(*facts))


def every_text_is_evil(value: Any, keep: frozenset[str] = frozenset()) -> Any:
    """The same facts with markup in every text that is not one of a few fixed words."""
    match value:
        case str():
            return value if value in keep else value + EVIL
        case dict():
            return {
                (k + EVIL if "topic" in k else k): v
                if k in ("created", "started", "closed", "finished", "state", "id")
                else every_text_is_evil(v, keep)
                for k, v in value.items()
            }
        case list():
            return [every_text_is_evil(v, keep) for v in value]
        case _:
            return value


def test_nothing_that_a_user_or_a_worker_wrote_becomes_markup() -> None:
    plain, evil = facts(reason="why", name="n"), every_text_is_evil(facts(reason="why", name="n"))
    page = job_page(evil)
    assert EVIL not in page
    read, meant = Reader(page), Reader(job_page(plain))
    assert [name for name, _ in read.seen] == [name for name, _ in meant.seen], "the same elements as without"
    for text in (
        "n",
        "why",
        "topic",
        "host-cpu0",
        "CPU",
        "encoder all-MiniLM-L6-v2",
        "too_long",
        "301 tokens",
    ):
        assert text + EVIL in read.text, "and it can still be read"
    assert {k for _, a in read.seen for k in a} == {k for _, a in meant.seen for k in a}


def test_the_list_and_a_refusal_escape_too() -> None:
    job = every_text_is_evil(copy.deepcopy(JOB))
    listed = jobs_page([job], state=EVIL, following=EVIL, first=False)
    refused = refused_page(404, EVIL)
    for page in (listed, refused):
        assert EVIL not in page
        assert Reader(page).count("script") == 0
    assert "tickets" + EVIL in Reader(listed).text
    assert EVIL in Reader(refused).text


def test_a_text_is_markup_only_where_a_template_says_so() -> None:
    own = environment("scheduler.api").from_string("<b title='{{ text }}'>{{ text }}</b>")
    assert own.render(text="<i>'\"&") == "<b title='&lt;i&gt;&#39;&#34;&amp;'>&lt;i&gt;&#39;&#34;&amp;</b>"
    with pytest.raises(UndefinedError):
        own.render()


def luminance(colour: str) -> float:
    """Of ``#rgb`` or ``#rrggbb``, as WCAG 2.2 defines it."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * d for d in colour[1:])
    shares = (int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4))
    red, green, blue = (s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_words_and_shapes_stand_out_from_the_paper_by_day_and_by_night() -> None:
    day, night = read("colours.css").split("@media")
    for theme in (day, night):
        colours = {name: luminance(code) for name, code in re.findall(r"--(\w+): (#\w+)", theme)}
        least = dict.fromkeys(("ink", "soft", "link", "ok", "error", "skipped"), 4.5)
        least |= dict.fromkeys((*(f"p{i}" for i in range(8)), "curve"), 3.0)
        for name, contrast in least.items():
            for ground in ("paper", "wash") if contrast == 4.5 else ("paper",):
                low, high = sorted((colours[name], colours[ground]))
                assert (high + 0.05) / (low + 0.05) >= contrast, (name, ground)


@pytest.mark.parametrize(
    "page", [job_page(facts()), jobs_page([JOB]), jobs_page([]), refused_page(401, "who?")]
)
def test_a_page_loads_nothing_and_runs_only_what_its_policy_names(page: str) -> None:
    seen = Reader(page)
    attributes = [(name, key, value or "") for name, found in seen.seen for key, value in found.items()]
    assert not [
        a for a in attributes if a[1] in ("src", "srcset", "style", "xlink:href") or a[1].startswith("on")
    ]
    assert all(value.startswith("/jobs") for _, key, value in attributes if key == "href")
    assert not {"img", "iframe", "object", "form", "link", "base"} & {name for name, _ in seen.seen}
    assert "@import" not in page
    assert set(re.findall(r"url\(([^)]*)\)", page)) <= {"#hatched"}
    assert markup.POLICY.startswith("default-src 'none';")
    for content in re.findall(r"<style>(.*?)</style>", page, re.S):
        assert markup._digest(content) in markup.POLICY
    for content in re.findall(r"<script>(.*?)</script>", page, re.S):
        assert markup._digest(content) in markup.POLICY
    assert "unsafe" not in markup.POLICY


def test_a_running_job_renews_itself_and_an_ended_one_does_not() -> None:
    running = Reader(job_page(facts()))
    assert ("meta", {"http-equiv": "refresh", "content": "4"}) in running.seen
    assert running.count("script") == 1
    for state in ("succeeded", "failed", "cancelled"):
        ended = Reader(job_page(facts(state=state, finished=JOB["started"], eta_s=None)))
        assert not [a for _, a in ended.seen if "http-equiv" in a]
        assert ended.count("script") == 0
    assert Reader(jobs_page([JOB])).count("script") == 1
    assert Reader(jobs_page([JOB], first=False)).count("script") == 0, "what is old does not change"


def test_every_cell_is_accounted_for() -> None:
    cells = {"total": 3000, "ok": 1024, "error": 12, "skipped": 30, "reused": 24}
    words = Reader(job_page(facts(cells=cells))).text
    assert "1,000 ok 24 ok, reused 12 error 30 skipped 1,934 to come = 3,000 cells" in words
    assert 1000 + 24 + 12 + 30 + 1934 == 3000
    assert "39 more cells: of blocks under way." in words, "3 of the 42 are told by class"


def test_a_cancelled_job_says_why_and_what_was_never_run() -> None:
    found = facts(
        state="cancelled",
        reason="cancelled on request",
        finished=JOB["started"],
        cells={"total": 3000, "ok": 1024, "error": 3, "skipped": 1973, "reused": 0},
    )
    found["passes"][0]["rows"] = {"total": 3000, "waiting": 0, "open": 0, "done": 1024}
    words = Reader(job_page(found)).text
    assert "cancelled on request" in words
    assert "1,024 of 3,000 rows done, 1,976 never run" in words
    assert "1,973 more cells: their rows were not answered when the job ended." in words
    assert "to come" not in words


def test_what_fusion_saved_stands_beside_what_was_read() -> None:
    words = Reader(job_page(facts())).text
    assert "read here" in words
    assert "41.2 k tokens" in words
    assert "82.5 k tokens" in words
    assert "2.0 × fewer" in words
    alone = facts()
    alone["passes"][0].update(tasks=["topic"], unfused_tokens=41234)
    words = Reader(job_page(alone)).text
    assert "41,234 tokens read for its one task" in words
    assert "fewer" not in words


def test_a_job_in_which_nothing_has_happened_has_a_page() -> None:
    empty = facts(state="loading", rows=0, started=None, eta_s=None, cells=dict.fromkeys(JOB["cells"], 0))
    empty.update(devices=[], timeline=[], throughput=[], errors=[], now_s=0.01)
    empty["passes"][0].update(
        rows=dict.fromkeys(("total", "waiting", "open", "done"), 0),
        subtasks=dict.fromkeys(("open", "done", "lost", "failed"), 0),
        tokens=0,
        unfused_tokens=0,
    )
    words = Reader(job_page(empty)).text
    assert "No device has had a part of it yet." in words
    assert "2 tasks share each token that is read" in words
    assert "0 ok" in words


def test_the_timeline_draws_each_state_in_its_own_way_and_says_it_in_words() -> None:
    found = facts()
    found["timeline"] = [
        bar(1, 0.2, 1.0),
        bar(2, 1.0, 2.0, "lost", worker=""),
        bar(3, 1.0, 2.0, "failed", exclusive=True),
        bar(4, 2.0, None, "open", tokens=0, busy_s=0.0),
    ]
    found["passes"][0]["subtasks"] = {"open": 1, "done": 1, "lost": 1, "failed": 1}
    page = job_page(found)
    read = Reader(page)
    labels = [a["aria-label"] for name, a in read.seen if name == "svg" and a.get("aria-label")]
    assert "host-cpu0: 3 sub-tasks: 1 done, 1 open, 1 failed" in labels
    assert "no device known: 1 sub-task: 1 lost" in labels
    classes = [a["class"] for name, a in read.seen if name == "rect" and a.get("height") == "13"]
    assert sorted(filter(None, classes)) == ["error", "lost", "p0", "p0 edge"]
    assert "sub-task 3: failed · pass 1 · 256 rows · 10,310 tokens · 1.7 s busy" in read.text
    assert "alone on its device" in read.text
    assert "lost: its rows were run again" in read.text


def test_only_the_newest_sub_tasks_are_drawn_and_that_is_said() -> None:
    found = facts()
    found["passes"][0]["subtasks"]["done"] = 10_000
    found["timeline"] = [bar(9_999, 3.0, 3.5), bar(10_000, 3.5, 4.0)]
    page = job_page(found)
    assert "the newest 2 of 10,001 sub-tasks" in page
    assert re.search(r'<rect x="0\.00%"[^>]*><title>sub-task 9999', page), (
        "time begins with the first that is drawn"
    )


def test_no_bar_covers_another_of_its_device() -> None:
    bars = [
        bar(1, 0.0, 2.0),
        bar(2, 1.0, 3.0),
        bar(3, 2.0, 4.0),
        bar(4, 0.5, None, "open"),
        bar(5, 0.6, None, "open"),
    ]
    placed = drawn_bars(bars, 6.0)
    for row in {r for _, _, r, _ in placed}:
        ends = sorted((start, end) for start, end, r, _ in placed if r == row)
        assert all(a[1] <= b[0] for a, b in pairwise(ends)), ends
    starts = {b["subtask"]: start for start, _, _, b in placed}
    assert starts[4] == starts[5] == 4.0, "before that the device was at another"
    assert {end for _, end, _, b in placed if b["state"] == "open"} == {6.0}


def test_an_outcome_that_was_recorded_a_little_late_makes_no_second_row() -> None:
    placed = drawn_bars([bar(1, 0.0, 2.1), bar(2, 2.0, 3.0)], 3.0)
    assert [(start, end, row) for start, end, row, _ in placed] == [(0.0, 2.1, 0), (2.1, 3.0, 0)]


def test_shares_stay_within_the_whole_and_the_smallest_can_be_seen() -> None:
    chart = drawn("shares", [("ok", 999_999, "a"), ("error", 1, "b"), ("skipped", 0, "c")], 1_000_000, "all")
    widths = [float(w) for w in re.findall(r' width="([\d.]+)%" height="12" rx="2', chart)]
    places = [float(x) for x in re.findall(r' x="([\d.]+)%"', chart)]
    assert len(widths) == len(places) == 2
    assert all(x + w <= 100.001 for x, w in zip(places, widths, strict=True))
    assert min(widths) >= 0.4
    assert "%" in drawn("shares", [], 0, "nothing")


def test_the_curve_reaches_the_height_of_its_highest_bucket() -> None:
    points = [{"at_s": float(i), "tokens_s": v, "rows_s": 1.0} for i, v in ((1, 0.0), (2, 50.0), (3, 100.0))]
    chart = drawn("curve", curve(points))
    assert "V100.00 H1 V50.00 H2 V0.00 H3" in chart
    assert "Tokens per second over 3.0 s: 50 on average, 100 at most" in chart


def test_axes_have_round_numbers() -> None:
    for to_s in (0.02, 0.9, 7, 61, 600, 5000, 100_000, 3_000_000):
        ticks = Stretch(0, to_s).ticks()
        assert 2 <= len(ticks) <= 8
        assert ticks[0] == 0
        assert ticks[-1] <= to_s
    assert [nice(v) for v in (0, 1, 1.1, 9, 4321)] == [1, 1, 2, 10, 5000]
    assert [round_step(v) for v in (0.3, 7, 61)] == [pytest.approx(0.3), 10, 120]


def test_words_for_numbers() -> None:
    assert [compact(v) for v in (0, 950, 9999, 12_345, 4_560_000, 7e9)] == [
        "0",
        "950",
        "9,999",
        "12.3 k",
        "4.56 M",
        "7.00 G",
    ]
    assert [duration(s) for s in (0, 0.44, 9.96, 42, 200, 7500, 273_600)] == [
        "0.0 s",
        "0.4 s",
        "10 s",
        "42 s",
        "3 min 20 s",
        "2 h 05 min",
        "3 d 4 h",
    ]
    assert [percent(s) for s in (0, 0.384, 0.9999, 1)] == ["0 %", "38 %", "99 %", "100 %"]


def test_the_list_leads_to_each_job_and_to_the_next_page() -> None:
    page = jobs_page([JOB], following="abc", state="running", limit=20)
    links = [a["href"] for name, a in Reader(page).seen if name == "a"]
    assert f"/jobs/{JOB['id']}" in links
    assert "/jobs?state=running&limit=20&after=abc" in links
    assert "7.4 s left" in Reader(page).text
    ended = {**JOB, "state": "succeeded", "finished": "2026-11-23T18:36:20Z"}
    assert "3 min 20 s" in Reader(jobs_page([ended])).text
    assert f"job {JOB['id'][:8]}" in Reader(jobs_page([{**JOB, "name": None}])).text
    assert "No job is failed." in Reader(jobs_page([], state="failed")).text


def test_of_an_open_job_neither_share_nor_time_left_is_told() -> None:
    cells = {"total": 120, "ok": 110, "error": 2, "skipped": 0, "reused": 0}
    told = facts(state="open", rows=60, cells=cells, eta_s=None, finished=None)
    page = job_page(told)
    assert "all of them kept" in page
    assert "cells without an answer yet" in page
    for words in ("Time left", "<dt>Done</dt>", 'class="whole"', " % "):
        assert words not in page.partition("<table")[0].replace("100 % ", ""), words
    listed = jobs_page([told["job"]])
    assert "112 cells" in listed


# -- an open job


def spans(*asks_s: float, **more: Any) -> list[dict[str, Any]]:
    """Spans of five seconds, the last of which ends now."""
    idle = {"rows_s": 0.0, "late": 0, "refused": 0, "failed": 0, "waiting": 0, "p50_s": None, "p99_s": None}
    return [
        {**idle, "at_s": 600.0 - 5 * (len(asks_s) - 1 - i), "asks_s": n, **(more if n else {})}
        for i, n in enumerate(asks_s)
    ]


def open_facts(*asks_s: float, first_row: int = 0) -> dict[str, Any]:
    found = facts(state="open", first_row=first_row, keep_s=604_800.0, finished=None, eta_s=None)
    told = spans(*asks_s, p50_s=0.027, p99_s=1.234, late=2, waiting=3)
    found["asks"] = {"spans": told, "minute": {**told[-1], "asks_s": 12.34}}
    return found


def test_the_page_of_an_open_job_shows_its_last_minutes() -> None:
    read = Reader(job_page(open_facts(*[0.0] * 60, *[12.0] * 60, first_row=1234)))
    for words in (
        "Asks 12 a second",
        "Half answered in 27 ms 99 % in 1.23 s",
        "kept from row 1,234 on",
        "Time to the answer 27 ms, 99 % in 1.23 s",
        "2 late, 0 refused, 0 failed",
        "Rows kept for 7 d 0 h",
        "10 min ago",
    ):
        assert words in read.text, words
    titles = [
        element["aria-label"] for name, element in read.seen if name == "svg" and element.get("role") == "img"
    ]
    assert "Asks answered over the last 10 min 00 s: 12 a second in the last minute" in titles


def test_a_line_is_broken_where_nothing_was_answered() -> None:
    chart = minutes(open_facts(*[4.0] * 6, *[0.0] * 6, *[8.0] * 3)["asks"])
    asked, took = chart[0]["lines"][0][1], chart[1]["lines"][0][1]
    assert asked.count("M") == 1
    assert took.count("M") == 2
    assert len(chart[0]["hits"]) == 15
    assert drawn("small", chart[1]).count("<path") == 2


def test_a_job_that_nobody_has_asked_yet_has_a_page() -> None:
    page = open_facts(*[0.0] * 120)
    page["asks"]["minute"] = page["asks"]["spans"][-1]
    read = Reader(job_page(page))
    assert "Half answered in – none in the last minute" in read.text


# -- the queue


def test_the_queue_tells_each_row_and_nothing_of_it_is_markup() -> None:
    rows = [
        QueuedRow(7, 4.0, {"urgency": f"level high {EVIL}", "reply": "Certainly."}),
        QueuedRow(2, None, {"urgency": "", "reply": "skipped"}),
    ]
    queued = {
        "job": facts(name=f"support {EVIL}")["job"],
        "by": "urgency.points",
        "tasks": ["urgency", "reply"],
    }
    page = queue_page({**queued, "rows": rows, "looked": 1000})
    read_ = Reader(page)
    assert read_.count("script") == 1, "its own, which renews it"
    for words in (
        f"support {EVIL}",
        "sorted by urgency.points, of the newest 1,000 answered rows",
        "level high",
        "–",
    ):
        assert " ".join(words.split()) in read_.text
    assert read_.text.index("Certainly.") < read_.text.index("skipped")
    assert "<img" not in page
    shown = queue_page({**queued, "rows": [replace(rows[0], thumbs=["QUJD"]), rows[1]], "looked": 1000})
    assert shown.count('<img class="thumb" alt="" src="data:image/jpeg;base64,QUJD">') == 1
    empty = Reader(queue_page({**queued, "by": "", "rows": [], "looked": 0}))
    assert "No row is answered yet." in empty.text


def test_a_queue_is_sorted_by_numbers_then_texts_then_rows_without_either() -> None:
    places = ["b", None, 1, True, "a", -2.5, 10]
    assert sorted(places, key=_first) == [10, 1, True, -2.5, "a", "b", None]
    assert sorted([2.5, 10**400, -(10**400)], key=_first) == [10**400, 2.5, -(10**400)]


def test_an_answer_is_told_in_plain_words() -> None:
    value = {
        "level": "high",
        "points": 4,
        "because": ["is lost", "today"],
        "person": False,
        "more": [],
        "x": None,
    }
    assert _plain(value) == "level high · points 4 · because is lost, today · person no"
    assert (_plain(0.12345), _plain(None), _plain(["a", {"b": 1}])) == ("0.123", "", "a, b 1")
