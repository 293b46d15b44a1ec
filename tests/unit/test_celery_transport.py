"""What of a queue's entries a worker lets Celery see: the dispatcher's messages, and nothing else."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from motet.protocol.manifest import Manifest
from motet.protocol.transport import celery_message
from motet.protocol.wire import Assignment, TaskOrder
from motet.tasks import Function
from workers.run.celery_transport import HEADERS, PROPERTIES, as_celery_may_see


def write() -> str:
    model = Manifest(name="f", version="1", engine="f", answers="json", source={"function": "f"})
    order = Assignment(
        subtask=7,
        attempt=2,
        nonce="n",
        job="job-1",
        tenant="t",
        pass_kind="function f",
        model=model,
        numerics="fast",
        max_tokens=0,
        tasks=(TaskOrder(name="answer", spec=Function("f").to_json(), manifest=model),),
        texts=("a",),
    )
    return celery_message("w", order)


MESSAGE = write()


def sent() -> dict[str, Any]:
    """A message as the dispatcher writes it."""
    message: dict[str, Any] = json.loads(MESSAGE)
    return message


def body(value: object) -> str:
    return base64.b64encode(json.dumps(value).encode()).decode()


def seen() -> dict[str, Any]:
    """The same as Celery gets it: limits of time are the executor's, not Celery's."""
    message = sent()
    assert message["headers"].pop("timelimit") == [None, None]
    return message


def test_the_dispatchers_messages_reach_celery() -> None:
    assert as_celery_may_see(sent()) == seen()


def test_what_a_newer_dispatcher_adds_is_passed_over() -> None:
    message = sent()
    message["headers"]["weather"] = "fine"
    message["properties"]["expiration"] = "1"
    assert as_celery_may_see(message) == seen()


FORGED: dict[str, dict[str, Any]] = {
    "another task": {"headers": {"task": "os.system"}},
    "a task that is no name": {"headers": {"task": ["motet.run"]}},
    "no id": {"headers": {"id": None}},
    "a time": {"headers": {"eta": "2999-01-01T00:00:00"}},
    "an end": {"headers": {"expires": "2000-01-01T00:00:00"}},
    "a group": {"headers": {"group": "g"}},
    "another attempt": {"headers": {"motet": [7, 3]}},
    "half an attempt": {"headers": {"motet": [7]}},
    "a pickle": {"content-type": "application/x-python-serialize"},
    "bytes": {"content-encoding": "binary"},
    "no tag": {"properties": {"delivery_tag": None}},
    "a tag that is no name": {"properties": {"delivery_tag": {}}},
    "no route": {"properties": {"delivery_info": None}},
    "a plain body": {"properties": {"body_encoding": None}},
    "a body that is no base64": {"body": "\u0000%%%"},
    "no body": {"body": None},
    "text for a number": {"body": body([["7", 2, "j", 1], {}, {}])},
    "a truth for a number": {"headers": {"motet": [True, 2]}, "body": body([[True, 2, "j", 1], {}, {}])},
    "too few": {"body": body([[7, 2], {}, {}])},
    "a keyword": {"body": body([[7, 2, "j", 1], {"rows": 1}, {}])},
    "a chain": {"body": body([[7, 2, "j", 1], {}, {"chain": [{"task": "x"}]}])},
    "a callback": {"body": body([[7, 2, "j", 1], {}, {"callbacks": [{"task": "x"}]}])},
    "a flood": {"body": body([[7, 2, "j" * 10_000, 1], {}, {}])},
}


@pytest.mark.parametrize("what", FORGED)
def test_a_message_with(what: str) -> None:
    message = sent()
    for name, value in FORGED[what].items():
        message[name] = {**message[name], **value} if isinstance(value, dict) else value
    assert as_celery_may_see(message) is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
PLACES = [
    ("headers",),
    ("properties",),
    ("body",),
    ("content-type",),
    *(("headers", name) for name in HEADERS),
    *(("properties", name) for name in PROPERTIES),
]


@given(st.sampled_from(PLACES), JSON)
def test_no_json_in_any_place_raises_or_gives_celery_a_type_that_it_does_not_expect(
    place: tuple[str, ...], value: Any
) -> None:
    message = sent()
    at: Any = message
    for name in place[:-1]:
        at = at[name]
    at[place[-1]] = value
    shown = as_celery_may_see(message)
    if shown is not None:
        assert all(
            isinstance(shown["headers"][name], kind)
            for name, kind in HEADERS.items()
            if name in shown["headers"]
        )
        assert shown["body"] == sent()["body"]


@given(JSON)
def test_any_other_json_is_no_message(value: Any) -> None:
    assert as_celery_may_see(value) is None
