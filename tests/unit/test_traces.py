"""Traces cost nothing while they are off, fit together without a word in any message, and break no work."""

from __future__ import annotations

import subprocess
import sys
import timeit
import uuid
from dataclasses import dataclass, field

import pytest

from motet.errors import SetupError
from motet.protocol import traces
from motet.protocol.spans import TraceSpan

JOB = uuid.UUID("0b9f3c1e-6f0c-4f0e-9b0a-2f6f0a3c8d11")


@dataclass
class Kept:
    """A sender that keeps what it is given."""

    spans: list[TraceSpan] = field(default_factory=list)
    broken: bool = False

    def send(self, span: TraceSpan) -> None:
        if self.broken:
            raise RuntimeError("no luck today")
        self.spans.append(span)

    def close(self) -> None: ...

    @property
    def names(self) -> list[str]:
        return [span.name for span in self.spans]


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Kept:
    sender = Kept()
    monkeypatch.setattr(traces, "_sender", sender)
    return sender


def test_while_they_are_off_nothing_is_imported() -> None:
    code = """
import sys
from motet.protocol import traces
traces.configure("test", "")
with traces.together(), traces.span("no job", "x", rows=1):
    traces.add("no job", "x", 0.0)
print([name for name in sys.modules if name.startswith(("opentelemetry", "motet.protocol.otlp"))])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


def test_while_they_are_off_a_call_takes_less_than_a_microsecond() -> None:
    """The best of many short runs, since other programs run here too; about a third of a microsecond."""

    def spans() -> None:
        with traces.span(JOB, "x", subtask=1, attempt=1):
            pass

    def added() -> None:
        traces.add(JOB, "x", 0.0, subtask=1, attempt=1)

    for call in (spans, added):
        assert min(timeit.repeat(call, number=100, repeat=500)) / 100 < 1e-6, call.__name__


def test_what_one_process_sends_hangs_from_what_another_has_sent(kept: Kept) -> None:
    traces.add(JOB, "send", 1.0, 2.0, subtask=7, attempt=2, rows=3)
    traces.add(str(JOB), "execute", 2.0, 3.0, subtask=7, attempt=2, worker="w")
    traces.add(JOB, "execute", 2.0, 3.0, subtask=7, attempt=3)
    traces.add(JOB, "submit", 0.0, 1.0)
    traces.add(JOB, "land", 0.0, 1.0, part=0)
    traces.add(JOB, "job", 0.0, 9.0)
    send, execute, clone, submit, land, job = kept.spans
    assert execute.parent == send.id
    assert clone.parent != send.id
    assert land.parent == submit.id
    assert send.parent == submit.parent == job.id
    assert job.parent is None
    assert len({send.id, submit.id, job.id}) == 3
    assert execute.id is None, "nothing hangs from it"
    assert all(0 < one.id < 1 << 64 for one in (send, submit, job) if one.id)


def seal_and_fail() -> None:
    traces.add(JOB, "seal", 0.0)
    raise KeyError


def test_what_is_rolled_back_is_not_told(kept: Kept) -> None:
    with pytest.raises(KeyError), traces.together():
        seal_and_fail()
    assert kept.names == []
    with traces.together():
        traces.add(JOB, "seal", 0.0)
        with traces.together():
            traces.add(JOB, "job", 0.0)
        assert kept.names == [], "not before the outer one has ended"
    assert kept.names == ["seal", "job"]


def test_an_error_is_told_by_its_class_alone(kept: Kept) -> None:
    with pytest.raises(ValueError, match="text"), traces.span(JOB, "land", part=0):
        raise ValueError("the text of a user")
    (span,) = kept.spans
    assert span.error == "ValueError"
    assert "text" not in str(span)


def test_no_trouble_with_a_span_reaches_the_work(kept: Kept) -> None:
    traces.add("no UUID", "seal", 0.0)
    kept.broken = True
    with traces.together(), traces.span(JOB, "seal"):
        done = True
    traces.add(JOB, "seal", 0.0)
    assert done
    assert kept.spans == []


@pytest.mark.parametrize("endpoint", ["localhost:4318", "ftp://host/x", "http://", "http://[::1", "yes"])
def test_an_endpoint_that_is_none_is_refused_with_an_example(endpoint: str) -> None:
    with pytest.raises(SetupError, match=r"MOTET_TRACES: got .* http://127"):
        traces.configure("test", endpoint)


def test_a_host_alone_means_the_usual_path() -> None:
    assert traces.full_url("http://collector:4318") == "http://collector:4318/v1/traces"
    assert traces.full_url("http://collector:4318/") == "http://collector:4318/v1/traces"
    assert traces.full_url("https://host/otlp/v1/traces") == "https://host/otlp/v1/traces"


def test_without_the_extra_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "motet.protocol.otlp", None)
    with pytest.raises(SetupError, match=r"motet\[traces\]"):
        traces.configure("test", "http://127.0.0.1:1")
