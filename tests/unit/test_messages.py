"""Messages of the HTTP API: each declared once, used by a route, read across versions, checked in words."""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import fields
from enum import StrEnum
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from fastapi.routing import APIRoute
from pydantic import TypeAdapter

from motet import messages
from motet.messages.activity import SubtaskUnderWay
from motet.messages.cluster import Finding, Worker
from motet.messages.explanation import Explanation
from motet.messages.jobs import JobRecord, Submission
from motet.messages.message import ApiMessage, field_docs
from motet.messages.refusals import ErrorBody
from motet.messages.tokens import TokenRequest
from motet.protocol.manifest import Manifest
from motet.protocol.settings import Settings
from motet.states import State
from scheduler.api import create_app
from scheduler.api.bodies import misfits_of, taken
from scheduler.api.manifests import read_manifest
from tests.messages import JOB


def declared() -> set[type[ApiMessage]]:
    """Every message of motet.messages."""
    found = set()
    for module in pkgutil.iter_modules(messages.__path__):
        names = vars(importlib.import_module(f"{messages.__name__}.{module.name}"))
        found |= {one for one in names.values() if isinstance(one, type) and issubclass(one, ApiMessage)}
    return found - {ApiMessage}


def routes() -> Iterator[APIRoute]:
    app = create_app(
        Settings(database_url="postgresql+psycopg://nobody@127.0.0.1:1/none", blob_dir="/nonexistent")
    )
    yield from (route for route in app.routes if isinstance(route, APIRoute))


def described() -> dict[str, Any]:
    return create_app(
        Settings(database_url="postgresql+psycopg://nobody@127.0.0.1:1/none", blob_dir="/nonexistent")
    ).openapi()


def test_a_route_answers_with_a_declared_message_or_with_no_json() -> None:
    known = declared()
    for path, route in ((route.path, route) for route in routes()):
        answers = [route.response_model, *(told.get("model") for told in route.responses.values())]
        for model in answers:
            assert model is None or model in known, path
        if route.response_model is None and route.status_code != 204:
            own = route.responses.get(200, {}).get("content", {})
            plain = "text/html" in own or "text/plain" in own
            binary = any(form.get("schema", {}).get("format") == "binary" for form in own.values())
            assert plain or binary or path == "/healthz" or route.methods == {"HEAD"}, path


def test_each_message_is_used_by_a_route() -> None:
    used: set[Any] = set()
    waiting: list[Any] = [ErrorBody]
    for route in routes():
        waiting.append(route.response_model)
        content = (route.openapi_extra or {}).get("requestBody", {}).get("content", {})
        titles = {form["schema"].get("title") for form in content.values()}
        waiting += [one for one in declared() if one.__name__ in titles]
    while waiting:
        one = waiting.pop()
        if one in used:
            continue
        used.add(one)
        waiting += get_args(one)
        if isinstance(one, type) and issubclass(one, ApiMessage):
            waiting += [*get_type_hints(one).values(), *one.__mro__[1:]]
    assert declared() - used == set()


def test_each_field_is_described_by_its_own_line() -> None:
    missing = {
        f"{message.__name__}.{f.name}"
        for message in declared()
        for f in fields(message)  # type: ignore[arg-type]
        if f.name not in field_docs(message)
    }
    assert missing == set()
    schemas = described()["components"]["schemas"]
    assert schemas["JobRecord"]["properties"]["version"]["description"].startswith("Differs whenever")
    assert "pass" in schemas["SubtaskUnderWay"]["required"], "by its name in JSON, and always there"
    assert schemas["ErrorRecord"]["required"] == ["type", "message"], (
        "the rest is left out where it is nothing"
    )


def test_an_answer_of_a_newer_server_is_read_without_what_is_new() -> None:
    newer = {**JOB, "mood": "good", "cells": {**JOB["cells"], "pondered": 3}}
    assert JobRecord.of(newer) == JobRecord.of(JOB)


def test_a_state_that_only_a_newer_server_knows_stays_a_word() -> None:
    assert JobRecord.of(JOB).state is State.RUNNING
    assert JobRecord.of({**JOB, "state": "pondering"}).to_json()["state"] == "pondering"


def test_an_answer_of_an_older_server_is_read_with_defaults() -> None:
    least = {name: JOB[name] for name in ("id", "state", "rows", "tasks", "cells")}
    read = JobRecord.of(least)
    assert (read.usage.tokens_out, read.passes, read.deadline) == (0, (), None)
    assert Worker.of({"worker": "a", "version": None}).version == "", "null where null means nothing"
    with pytest.raises(KeyError, match="state"):
        JobRecord.of({"id": "a"})


@pytest.mark.parametrize("message", sorted(declared(), key=lambda one: one.__name__))
def test_the_server_writes_what_the_client_reads(message: type[ApiMessage]) -> None:
    made = made_up(message)
    written = json.loads(TypeAdapter(message).dump_json(made, by_alias=True))
    assert written == json.loads(json.dumps(made.to_json())), "one form, whoever writes it"
    assert message.of(written) == made


def made_up(kind: Any) -> Any:
    """A message with something in each field, deep down."""
    of = get_args(kind)
    match get_origin(kind) or kind:
        case origin if origin in (Union, UnionType):
            return made_up(next(one for one in of if one is not NoneType))
        case origin if origin is Literal:
            return of[0]
        case origin if origin is tuple:
            return (made_up(of[0]),)
        case origin if origin is Mapping:
            return {made_up(of[0]): made_up(of[1])}
        case origin if issubclass(origin, StrEnum):
            return next(iter(origin))
        case origin if issubclass(origin, ApiMessage):
            hints = get_type_hints(origin)
            return origin(**{f.name: made_up(hints[f.name]) for f in fields(origin)})  # type: ignore[arg-type]
        case origin:
            return {str: "a", int: 3, float: 2.5, bool: True}.get(origin, "anything")


def test_a_keyword_of_python_is_a_field_without_its_line() -> None:
    subtask = made_up(SubtaskUnderWay)
    assert subtask.to_json()["pass"] == subtask["pass"] == subtask.pass_ == 3


def test_a_request_that_does_not_fit_is_told_each_field_what_was_expected_and_what_to_do() -> None:
    wrong = misfits_of(TokenRequest, {"name": "", "scope": "god", "expires_days": True, "colour": "red"})
    assert [(p.field, p.got, p.expected) for p in wrong] == [
        ("colour", "an unknown option", "one of name, scope, tenant, expires_days"),
        ("name", "", "text of 1 to 200 characters"),
        ("scope", "god", "one of user, read, admin, worker"),
        ("expires_days", "True", "a number of days up to 36,500, or nothing"),
    ]
    assert all(p.remedy for p in wrong)
    missing = misfits_of(TokenRequest, {})
    assert [(p.field, p.got) for p in missing] == [("name", "nothing"), ("scope", "nothing")]
    assert misfits_of(TokenRequest, {"name": "a", "scope": "user", "colour": 1}, newer=True) == []
    made = taken(TokenRequest, {"name": "a", "scope": "user", "tenant": None, "expires_days": 2})
    assert made == TokenRequest(name="a", scope="user", expires_days=2.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("deadline_s", 0),
        ("deadline_s", float("inf")),
        ("retention_days", 36_501),
        ("mean_bytes", {"a": -1}),
        ("mean_bytes", {"a": "b"}),
        ("mean_bytes", {str(i): 1 for i in range(1001)}),
        ("rows", []),
        ("rows", ["a"] * 1025),
        ("rows", {"a": 1}),
        ("priority", ["normal"]),
        ("reuse", 1),
    ],
)
def test_limits_of_a_submission_are_kept(field: str, value: Any) -> None:
    assert [p.field for p in misfits_of(Submission, {"tasks": {}, field: value})] == [field]


@pytest.mark.parametrize(
    ("path", "fits"),
    [
        ("model.safetensors", True),
        ("a/b/c/d/tokenizer.json", True),
        ("a/b/c/d/e/tokenizer.json", False),
        ("..json", True),
        (".json", False),
        ("a.bin", False),
        ("../a.json", False),
        ("./a.json", False),
        ("/a.json", False),
        ("a//b.json", False),
        ("a.json\n", False),
        ("a" * 96 + ".json", False),
        ("chat_template.jinja", True),
    ],
)
def test_a_manifest_names_plain_paths_of_files_that_hold_no_code(path: str, fits: bool) -> None:
    spec = {"name": "a", "version": "1", "engine": "b", "answers": "number", "files": {path: "0" * 64}}
    assert [p.field for p in misfits_of(Manifest, spec)] == ([] if fits else ["files"])


def test_a_manifest_that_was_fetched_may_be_sent_back() -> None:
    spec = {"name": "a", "version": "1", "engine": "b", "answers": "number"}
    fetched = {**spec, "ref": "a@1", "digest": "c", "aliases": []}
    assert read_manifest(fetched) == Manifest(name="a", version="1", engine="b", answers="number")


def test_what_may_be_anything_is_checked_before_it_is_read() -> None:
    good = {"area": "disk", "name": "blobs", "state": "ok", "what": "fine", "remedy": ""}
    assert Finding.checked(good).what == "fine"
    for bad in ({**good, "state": "odd"}, {**good, "what": 3}, {"area": "disk"}, [], None):
        with pytest.raises(ValueError, match="expected"):
            Finding.checked(bad)


def test_an_explanation_reads_as_its_words() -> None:
    told = Explanation.of(
        {"job": "a", "name": "", "state": "running", "says": "It runs.", "notes": ["Well."]}
    )
    assert str(told) == "It runs.\nWell."
