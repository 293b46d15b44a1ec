"""Traces: what a line may say, what is refused and how, and what is recorded of jobs that ran."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from motet.errors import SetupError
from scheduler.policy.cost import Workload
from scheduler.simulation.cluster import UncarvedRows
from scheduler.simulation.events import DeviceSpan, RunOutcome, Simulation
from scheduler.simulation.kinds import KINDS, devices_of, kind_named
from scheduler.simulation.policy import Motet
from scheduler.simulation.timeline import page
from scheduler.simulation.trace import EXAMPLE, Trace, lengths_of, read_models, read_trace, record
from scheduler.simulation.trial import scenario, summary

ENCODER = {"name": "encoder", "tokens_s": 5000, "on": "L4", "load_s": 2, "memory_gb": 1}


def a_line(**more: Any) -> dict[str, Any]:
    return {"name": "topics", "model": ENCODER, "rows": 5000, **more}


def a_trace(*lines: Mapping[str, Any]) -> Trace:
    return read_trace(map(json.dumps, lines), "jobs.jsonl", {})


def test_a_line_needs_no_more_than_a_model_and_rows() -> None:
    trace = a_trace({"model": {"name": "encoder", "parameters": 110_000_000}, "rows": 3})
    (job,) = trace.jobs
    assert (job.name, job.rows, job.tenant, job.at_s, job.deadline_s) == ("job-1", 3, "all", 0.0, None)
    assert trace.guessed == ("encoder",)
    # Two operations a parameter and token, on a device that does 10^12 a second.
    assert trace.models["encoder"].token_s == pytest.approx(2.2e-4)


def test_a_measured_model_takes_on_its_kind_what_was_measured_there() -> None:
    trace = a_trace(a_line(model={**ENCODER, "row_s": 0.001}))
    work = Workload(10, 5000, 0)
    assert trace.models["encoder"].seconds(work) / KINDS["L4"].speed == pytest.approx(1.01)
    assert trace.guessed == ()


def test_pictures_are_told_in_pixels_and_are_all_of_one_size() -> None:
    eyes = {"name": "eyes", "pixels_s": 256 * 5000, "on": "L4", "load_s": 2, "memory_gb": 1}
    trace = a_trace(a_line(model=eyes, pixels=224 * 224))
    assert trace.jobs[0].tokens == 196
    assert len({round(length) for length in trace.jobs[0].recorded}) == 1
    assert trace.guessed == ()
    assert trace.models["eyes"].token_s == a_trace(a_line()).models["encoder"].token_s


def test_a_deadline_counts_from_when_the_job_comes() -> None:
    trace = a_trace(a_line(at_s=20, deadline_s=60))
    assert trace.jobs[0].deadline_s == 80


@given(rows=st.integers(1, 20_000), tokens=st.floats(4, 4000), spread=st.floats(0, 1.5))
def test_the_lengths_of_a_job_have_the_mean_that_was_told(rows: int, tokens: float, spread: float) -> None:
    (job,) = a_trace(a_line(rows=rows, tokens=tokens, spread=spread)).jobs
    total_rows, size = UncarvedRows(job).total()
    assert total_rows == rows
    # The last block may lack a few of the shortest; lengths are whole bytes.
    assert size / 4 / rows == pytest.approx(tokens, rel=0.01, abs=0.5)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "jobs.jsonl, line 1: not JSON"),
        ("[]", "jobs.jsonl, line 1: got []; expected an object"),
        ({"rows": 0}, "jobs.jsonl, line 1, rows: got 0; expected a number above 0"),
        ({"rows": 1.5}, "jobs.jsonl, line 1, rows: got 1.5; expected a whole number"),
        ({"rows": None}, "jobs.jsonl, line 1, rows: got nothing; expected a number"),
        ({"priority": "soon"}, 'priority: got "soon"; expected one of interactive, normal, bulk'),
        ({"tokens": "64"}, 'tokens: got "64"; expected a number above 0'),
        ({"pixels": 50176, "tokens": 64}, "pixels: got 50176"),
        ({"weight": -1}, "weight: got -1; expected a number above 0"),
        ({"lengths": []}, "lengths: got []; expected tokens of rows"),
        ({"lengths": [1, float("inf")]}, "lengths: got [1, Infinity]; expected tokens of rows"),
        ({"deadlin_s": 3}, "deadlin_s: no such field; expected at_s, deadline_s"),
        ({"model": "other"}, 'model: got "other"; expected the name of a model told before'),
        (
            {"model": {"name": "x"}},
            "line 1, model: expected parameters (a number), or tokens_s (of pictures pixels_s) and on",
        ),
        ({"model": {"name": "x", "tokens_s": 5}}, "model, on: got nothing; expected text"),
        ({"model": {**ENCODER, "on": "Z80"}}, 'model, on: got "Z80"; expected one of H200'),
        ({"model": {**ENCODER, "size": 1}}, "model, size: no such field"),
    ],
)
def test_what_is_wrong_with_a_line_is_told_with_its_place(line: str | dict[str, Any], words: str) -> None:
    text = line if isinstance(line, str) else json.dumps(a_line(**line))
    with pytest.raises(SetupError) as refused:
        read_trace([text], "jobs.jsonl", {})
    assert words in str(refused.value)


def test_a_name_stands_for_one_job_and_one_model() -> None:
    with pytest.raises(SetupError, match="line 2, name: got 'topics' a second time"):
        a_trace(a_line(), a_line())
    with pytest.raises(SetupError, match="line 2, model: 'encoder' costs something else above"):
        a_trace(a_line(), a_line(name="again", model={**ENCODER, "load_s": 9}))


def test_models_may_come_from_a_file_of_their_own() -> None:
    models = read_models('[encoder]\ntokens_s = 5000\non = "L4"\n', "models.toml")
    trace = read_trace([json.dumps(a_line(model="encoder"))], "jobs.jsonl", models)
    assert trace.models.keys() == {"encoder"}
    with pytest.raises(SetupError, match=r"models\.toml: not TOML"):
        read_models("[", "models.toml")


def test_a_cluster_is_told_in_kinds_and_counts() -> None:
    devices = devices_of("2xH200, L4,3xNext=900:288")
    assert [d.kind for d in devices] == ["H200", "H200", "L4", *["Next"] * 3]
    assert devices[-1].speed == 900
    assert len({d.name for d in devices}) == 6


@pytest.mark.parametrize("text", ["", "0xH200", "8xZ80", "8x", "8xNext=0:8", "2xL4=1:1,L4", "H200;L4"])
def test_a_cluster_that_makes_no_sense_is_refused_with_what_was_expected(text: str) -> None:
    with pytest.raises(SetupError, match="expected"):
        devices_of(text)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA L40S", "L40S"),
        ("Intel(R) Xeon(R) Processor", "cpu"),
        ("Voodoo 2", None),
    ],
)
def test_devices_are_known_by_their_makers_names(name: str, kind: str | None) -> None:
    found = kind_named(name)
    assert (found.name if found else None) == kind


# -- recording


def a_subtask(number: int, **more: Any) -> dict[str, Any]:
    rows, tokens = 32, 32 * (200 - 10 * number)
    busy_s = 0.1 + tokens / 5000
    return {
        "subtask": number,
        "worker": f"host-gpu{number % 2}",
        "pass": 0,
        "state": "done",
        "carved_s": 1.0 + number,
        "start_s": 1.2 + number,
        "end_s": 1.2 + number + busy_s,
        "rows": rows,
        "tokens": tokens,
        "busy_s": busy_s,
        **more,
    }


def an_activity(*subtasks: Mapping[str, Any], **job: Any) -> dict[str, Any]:
    return {
        "job": {
            "id": "0198f2c4",
            "name": "tickets",
            "priority": "bulk",
            "created": "2026-11-23T18:33:00.000000Z",
            "started": "2026-11-23T18:33:01.000000Z",
            "passes": [{"model": "encoder@1"}],
            **job,
        },
        "passes": [{"number": 0}],
        "devices": [{"worker": f"host-gpu{i}", "device_name": "NVIDIA L4"} for i in range(2)],
        "timeline": list(subtasks),
    }


def test_what_was_recorded_costs_the_same_again() -> None:
    subtasks = [a_subtask(i) for i in range(16)]
    (line,) = record([an_activity(*subtasks)], {"encoder@1": 110_000_000})
    trace = read_trace([json.dumps(line)], "recorded", {})
    model, (job,) = trace.models["encoder@1"], trace.jobs
    for s in subtasks:
        work = Workload(s["rows"], s["tokens"], s["tokens"] ** 2 / s["rows"])
        assert model.seconds(work) / KINDS["L4"].speed == pytest.approx(s["busy_s"], rel=0.1)
    assert (job.name, job.rows, job.priority) == ("tickets", 16 * 32, 2)
    assert sum(job.lengths()) / 4 == pytest.approx(sum(s["tokens"] for s in subtasks), rel=0.02)
    assert trace.took_s["tickets"] == pytest.approx(max(s["end_s"] for s in subtasks) - 1.0)


def test_what_was_recorded_of_pictures_is_told_in_pixels() -> None:
    seen = [a_subtask(i, tokens=32 * 196, busy_s=1.0) for i in range(16)]
    (line,) = record([an_activity(*seen, passes=[{"model": "eyes@1", "kind": "image eyes"}])], {})
    assert (line["pixels"], "tokens" in line, "lengths" in line) == (224 * 224, False, False)
    assert line["model"]["pixels_s"] == pytest.approx(32 * 224 * 224, rel=0.3)
    assert read_trace([json.dumps(line)], "recorded", {}).jobs[0].tokens == 196


def test_jobs_of_one_name_and_model_stay_apart_and_share_it() -> None:
    later = an_activity(*[a_subtask(i) for i in range(8)], started="2026-11-23T18:33:31.000000Z")
    first, second = record([an_activity(*[a_subtask(i) for i in range(8)]), later], {})
    assert (first["name"], second["name"]) == ("tickets", "tickets (2)")
    assert (first["at_s"], second["at_s"]) == (0.0, 30.0)
    assert second["model"] == "encoder@1"


def test_lost_and_empty_subtasks_tell_nothing() -> None:
    useless = [a_subtask(1, state="lost"), a_subtask(2, busy_s=0.0)]
    with pytest.raises(SetupError, match="no sub-task of these jobs is done"):
        record([an_activity(*useless)], {})


def test_few_subtasks_do_not_tell_how_lengths_are_spread() -> None:
    assert lengths_of([a_subtask(0)]) == {}
    assert len(lengths_of([a_subtask(i) for i in range(8)])["lengths"]) == 64


def test_a_device_that_nobody_knows_is_refused() -> None:
    activity = an_activity(a_subtask(0))
    activity["devices"][0]["device_name"] = "Voodoo 2"
    with pytest.raises(SetupError, match="ran on Voodoo 2; expected one of H200"):
        record([activity], {})


# -- what comes of it


def ran(text: str, trace: Trace, seed: int = 0) -> RunOutcome:
    return Simulation(scenario(devices_of(text), trace), Motet(), seed).run()


def test_twice_the_devices_are_done_in_about_half_the_time() -> None:
    trace = a_trace(a_line(rows=50_000, tokens=100))
    few, many = (
        summary(devices_of(text), trace, [ran(text, trace)], {})["makespan_s"]["p50"]
        for text in ("4xL4", "8xL4")
    )
    assert 1.6 < few / many < 2.1


def test_busy_loading_and_idle_are_all_there_is() -> None:
    trace = read_trace(EXAMPLE.splitlines(), "the example", {})
    outcome = ran("4xH200,8xL4", trace)
    found = summary(devices_of("4xH200,8xL4"), trace, [outcome], {"H200": 4.0})
    for kind in found["kinds"]:
        assert kind["busy"] + kind["loading"] + kind["idle"] == pytest.approx(1.0, abs=1e-6)
    assert 0 < found["cost_of_idle"] < found["cost"]


def test_a_picture_escapes_names_and_says_that_it_is_simulated() -> None:
    trace = a_trace(a_line(name="<script>"))
    drawn = page([("4xL4", devices_of("4xL4"), ran("4xL4", trace))], trace)
    assert "<script>" not in drawn
    assert "Simulated, not measured" in drawn
    assert drawn.count('class="lane"') == 4 + 1


def test_a_picture_of_ten_thousand_devices_stays_small() -> None:
    trace = a_trace(a_line())
    devices = devices_of("10000xL4")
    spans = [
        DeviceSpan(d.name, second, second + 0.9, "topics", "encoder", loads=second == 0)
        for d in devices
        for second in range(3)
    ]
    drawn = page([("10000xL4", devices, RunOutcome(ended_s={"topics": 3.0}, spans=spans))], trace)
    assert len(drawn) < 1_000_000


def test_a_long_run_of_one_device_is_drawn_by_columns() -> None:
    trace = a_trace(a_line(), a_line(name="other", model="encoder"))
    spans = [
        DeviceSpan("L4-0", 2 * i, 2 * i + 1, "topics" if i % 2 else "other", "encoder", loads=False)
        for i in range(50_000)
    ]
    drawn = page([("L4", devices_of("L4"), RunOutcome(ended_s={"topics": 1e5}, spans=spans))], trace)
    assert len(drawn) < 50_000
