"""Aliases over HTTP: promoting, rolling back, and what a job that named one has on record."""

from __future__ import annotations

import threading
from itertools import pairwise
from typing import Any

import httpx
import pytest

from motet import Classify, Client
from motet.errors import Conflict, InvalidJob, NotFound
from motet.protocol.manifest import Manifest
from scheduler.store import aliases
from scheduler.store.registry import add_model
from tests.integration.api_house import TINY, TRUNK, House, house, problems

__all__ = ["house"]

MOOD = {"mood": {"kind": "classify", "model": "mood@prod"}}


def mood(version: str) -> Manifest:
    """A head whose versions answer differently."""
    return Manifest(
        name="mood",
        version=version,
        engine="encoder",
        answers="label",
        files={"head.safetensors": version.encode().hex().rjust(64, "0")},
        trunk=TRUNK,
        trunk_model="tiny@1",
        max_tokens=16,
        labels=("glad", "sad"),
    )


@pytest.fixture
def moods(house: House) -> House:
    """A house with three versions of a model."""
    with house.database.transaction() as connection:
        for version in ("1", "2", "3"):
            add_model(connection, mood(version))
    return house


def promote(house: House, version: Any, alias: str = "prod", *, name: str = "mood") -> httpx.Response:
    path = f"/v1/models/{name}/aliases/{alias}"
    return house.call("PUT", path, token="admin", json={"version": version})


def roll_back(house: House, alias: str = "prod") -> httpx.Response:
    return house.call("POST", f"/v1/models/mood/aliases/{alias}/rollback", token="admin")


def remove(house: House, alias: str = "prod") -> int:
    return house.call("DELETE", f"/v1/models/mood/aliases/{alias}", token="admin").status_code


def why_not(answer: httpx.Response, status: int = 409) -> str:
    assert answer.status_code == status, answer.text
    return str(answer.json()["error"]["message"])


# -- what a job uses


def test_a_job_keeps_the_version_that_its_alias_meant_when_it_came(moods: House) -> None:
    assert promote(moods, "1").status_code == 200
    first = moods.submit(["a"], MOOD)["id"]
    assert promote(moods, "2").status_code == 200
    second = moods.submit(["a"], MOOD)["id"]
    assert roll_back(moods).status_code == 200
    third = moods.submit(["a"], MOOD)["id"]
    tasks = [moods.job(job)["tasks"]["mood"] for job in (first, second, third)]
    assert [task["model_ref"] for task in tasks] == ["mood@1", "mood@2", "mood@1"]
    assert {task["model"] for task in tasks} == {"mood@prod"}, "what was asked for stays on record too"


def test_the_same_key_gives_the_same_job_after_a_promotion(moods: House) -> None:
    promote(moods, "1")
    first = moods.open(MOOD, key="nightly")
    promote(moods, "2")
    assert moods.open(MOOD, key="nightly") == first


def test_columns_are_reused_by_what_the_alias_means_and_not_by_its_name(moods: House) -> None:
    promote(moods, "1")
    job = moods.submit(["a"], MOOD)["id"]
    moods.answer(job, 0)
    exact = {"mood": {"kind": "classify", "model": "mood@1"}}
    assert moods.submit(["a"], exact)["cells"]["reused"] == 1, "the alias and its version are one model"
    assert moods.submit(["a"], MOOD)["cells"]["reused"] == 1
    promote(moods, "2")
    assert moods.submit(["a"], MOOD)["cells"]["reused"] == 0, "another version answers anew"
    roll_back(moods)
    assert moods.submit(["a"], MOOD)["cells"]["reused"] == 1


def test_a_plan_tells_which_version_it_would_use(moods: House) -> None:
    promote(moods, "2")
    plan = moods.call("POST", "/v1/plan", json={"tasks": MOOD, "rows": ["a"]}).json()
    assert plan["models"] == {"mood": "mood@2"}
    assert plan["passes"][0]["model"] == "tiny@1"
    misspelled = {"mood": {"kind": "classify", "model": "mood@prdo"}}
    (problem,) = problems(moods.call("POST", "/v1/plan", json={"tasks": misspelled}))
    assert "mood@prod" in problem["remedy"]


# -- promoting and rolling back


def test_aliases_stand_beside_their_versions_with_who_when_and_what_stood_before(moods: House) -> None:
    made = promote(moods, "1").json()
    since = made.pop("since")
    assert made == {"alias": "mood@prod", "ref": "mood@1", "before": None, "by": "admin"}
    assert since.endswith("Z")
    assert promote(moods, "2").json()["before"] == "mood@1"
    assert promote(moods, "2", "canary").json()["before"] is None
    listed = {m["ref"]: m["aliases"] for m in moods.call("GET", "/v1/models").json()["models"]}
    assert [a["alias"] for a in listed["mood@2"]] == ["mood@canary", "mood@prod"]
    assert listed["mood@1"] == listed["tiny@1"] == []
    shown = moods.call("GET", "/v1/models/mood@prod", token="worker").json()
    assert shown == moods.call("GET", "/v1/models/mood@2").json()
    assert (shown["ref"], shown["aliases"]) == ("mood@2", listed["mood@2"])
    assert moods.call("GET", "/v1/models/mood").json()["ref"] == "mood@3", "a bare name is still the newest"
    assert moods.call("GET", "/v1/models/mood@staging").status_code == 404


def test_an_alias_belongs_to_one_model(moods: House) -> None:
    promote(moods, "2")
    promote(moods, "1", name="topics")
    assert moods.call("GET", "/v1/models/topics@prod").json()["ref"] == "topics@1"
    assert moods.call("GET", "/v1/models/mood@prod").json()["ref"] == "mood@2"
    assert moods.call("GET", "/v1/models/tiny@prod").status_code == 404


def test_rolling_back_goes_back_as_often_as_there_were_promotions_that_still_stand(moods: House) -> None:
    assert "mood@prod" in why_not(roll_back(moods), 404)
    for version in ("1", "2", "2", "3"):
        promote(moods, version)
    assert roll_back(moods).json()["ref"] == "mood@2"
    promote(moods, "1")
    found = [roll_back(moods).json() for _ in range(2)]
    assert [(a["ref"], a["before"]) for a in found] == [("mood@2", "mood@1"), ("mood@1", None)]
    assert "nothing stood before" in why_not(roll_back(moods))
    assert moods.call("GET", "/v1/models/mood@prod").json()["ref"] == "mood@1"
    steps = moods.sql("SELECT what, version FROM alias_step ORDER BY id")
    assert [tuple(step) for step in steps] == [
        ("promoted", "1"),
        ("promoted", "2"),
        ("promoted", "3"),
        ("rolled back", "2"),
        ("promoted", "1"),
        ("rolled back", "2"),
        ("rolled back", "1"),
    ]


def test_an_alias_that_was_removed_begins_anew(moods: House) -> None:
    promote(moods, "1")
    promote(moods, "2")
    assert [remove(moods), remove(moods), remove(moods, "7")] == [204, 404, 404]
    assert problems(moods.call("POST", "/v1/jobs", json={"tasks": MOOD}))[0]["got"] == "mood@prod"
    assert moods.call("GET", "/v1/models/mood@2").status_code == 200
    assert promote(moods, "3").json()["before"] is None
    assert why_not(roll_back(moods))


def test_promotions_at_once_take_turns_and_none_is_lost(moods: House) -> None:
    at_once, rounds = 4, 6
    start = threading.Barrier(at_once)
    told: list[aliases.AliasRow] = []

    def work(number: int) -> None:
        start.wait()
        for turn in range(rounds):
            version = str((number + turn) % 3 + 1)
            with moods.database.transaction() as connection:
                told.append(aliases.promote(connection, "mood", "prod", version, f"t{number}"))

    hands = [threading.Thread(target=work, args=(n,)) for n in range(at_once)]
    for hand in hands:
        hand.start()
    for hand in hands:
        hand.join()
    assert len(told) == at_once * rounds
    steps = moods.sql("SELECT id, before, version FROM alias_step ORDER BY id")
    assert [step.before for step in steps] == [None, *(step.id for step in steps[:-1])], "one chain"
    assert all(a.version != b.version for a, b in pairwise(steps))
    assert [roll_back(moods).json()["ref"] for _ in steps[1:]] == [
        f"mood@{step.version}" for step in reversed(steps[:-1])
    ]


def test_a_version_and_an_alias_of_one_name_at_once_leave_one_of_them(moods: House) -> None:
    refused: list[str] = []

    def attempt(name: str, act: Any) -> None:
        start.wait()
        try:
            with moods.database.transaction() as connection:
                act(connection, name)
        except Conflict as conflict:
            refused.append(str(conflict))

    for turn in range(8):
        start = threading.Barrier(2)
        acts = (
            lambda connection, name: aliases.promote(connection, "mood", name, "1", "me"),
            lambda connection, name: add_model(connection, mood(name)),
        )
        hands = [threading.Thread(target=attempt, args=(f"v{turn}", act)) for act in acts]
        for hand in hands:
            hand.start()
        for hand in hands:
            hand.join()
    assert len(refused) == 8
    both = "SELECT count(*) FROM alias a JOIN model m ON m.name = a.name AND m.version = a.alias"
    assert moods.sql(both) == [(0,)]


# -- what is refused


@pytest.mark.parametrize("alias", ["1", "2x", "-a", "_a", "a b", "é", "a" * 41, "prod@2"])
def test_an_alias_that_is_none_is_refused(moods: House, alias: str) -> None:
    (problem,) = problems(promote(moods, "1", alias))
    assert problem["field"] == "alias"
    assert "a letter" in problem["expected"]
    assert remove(moods, alias) == 404
    assert roll_back(moods, alias).status_code == 404


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "version"),
        ({"version": 2}, "version"),
        ({"version": None}, "version"),
        ({"version": "2 "}, "version"),
        ({"version": "mood@2"}, "version"),
        ({"version": "9"}, "version"),
        ({"version": "canary"}, "version"),
        ({"version": "2", "force": True}, "force"),
        ([], "body"),
    ],
)
def test_what_no_version_is_cannot_be_promoted(moods: House, body: Any, field: str) -> None:
    promote(moods, "1", "canary")
    answer = moods.call("PUT", "/v1/models/mood/aliases/prod", token="admin", json=body)
    (problem,) = problems(answer)
    assert problem["field"] == field
    assert moods.call("GET", "/v1/models/mood@prod").status_code == 404


def test_an_unknown_version_is_answered_with_those_that_there_are(moods: House) -> None:
    (problem,) = problems(promote(moods, "9"))
    assert (problem["got"], problem["expected"]) == ("9", "a registered version of mood")
    assert "1, 2, 3" in problem["remedy"]
    for name in ("moods", "mood@1", "m%20d"):
        assert promote(moods, "1", name=name).status_code == 404, name


def test_no_version_bears_the_name_of_an_alias_and_no_alias_that_of_a_version(moods: House) -> None:
    with moods.database.transaction() as connection:
        add_model(connection, mood("v4"))
    assert "mood@v4 is a version" in why_not(promote(moods, "1", "v4"))
    promote(moods, "1", "v5")
    spec = {**mood("v5").to_json(), "files": {}}
    taken = moods.call("POST", "/v1/models", token="admin", json=spec)
    assert "mood@v5 is an alias, of mood@1" in why_not(taken)
    remove(moods, "v5")
    assert moods.call("POST", "/v1/models", token="admin", json=spec).status_code == 201


def test_a_model_that_was_fetched_may_be_sent_back_with_its_aliases(moods: House) -> None:
    spec = {**mood("4").to_json(), "files": {}}
    assert moods.call("POST", "/v1/models", token="admin", json=spec).json()["aliases"] == []
    promote(moods, "4")
    fetched = moods.call("GET", "/v1/models/mood@prod").json()
    assert fetched["aliases"]
    assert moods.call("POST", "/v1/models", token="admin", json=fetched).json() == fetched


def test_a_head_sits_on_a_version_and_never_on_an_alias(moods: House) -> None:
    promote(moods, "1", name=TINY.name)
    spec = {**mood("4").to_json(), "files": {}, "trunk_model": "tiny@prod"}
    (problem,) = problems(moods.call("POST", "/v1/models", token="admin", json=spec))
    assert problem["field"] == "trunk_model"
    assert "tiny@1" in problem["remedy"]


# -- versions that go


def test_a_version_stays_while_an_alias_means_it(moods: House) -> None:
    promote(moods, "1")
    gone = moods.call("DELETE", "/v1/models/mood@1", token="admin")
    assert "mood@prod means mood@1" in why_not(gone)
    assert "not by an alias" in why_not(moods.call("DELETE", "/v1/models/mood@prod", token="admin"), 404)
    promote(moods, "2")
    assert moods.call("DELETE", "/v1/models/mood@1", token="admin").status_code == 204


def test_a_hidden_version_is_neither_promoted_nor_gone_back_to_until_it_is_back(moods: House) -> None:
    promote(moods, "1")
    job = moods.submit(["a"], MOOD)["id"]
    moods.answer(job, 0)
    promote(moods, "2")
    assert moods.call("DELETE", "/v1/models/mood@1", token="admin").status_code == 204
    assert moods.sql("SELECT count(*) FROM model WHERE name = 'mood' AND version = '1'") == [(1,)], "hidden"
    (problem,) = problems(promote(moods, "1", "canary"))
    assert problem["got"] == "1, which was removed"
    assert "choose one of 2, 3" in problem["remedy"]
    said = why_not(roll_back(moods))
    assert "mood@1, which stood before at mood@prod, was removed" in said
    assert moods.call("GET", "/v1/models/mood@prod").json()["ref"] == "mood@2", "as it was"
    assert moods.job(job)["tasks"]["mood"]["model_ref"] == "mood@1"
    with moods.database.transaction() as connection:
        add_model(connection, mood("1"))
    assert roll_back(moods).json()["ref"] == "mood@1"


def test_no_rollback_goes_to_another_model_under_the_name_of_a_deleted_one(moods: House) -> None:
    promote(moods, "1")
    promote(moods, "2")
    assert moods.call("DELETE", "/v1/models/mood@1", token="admin").status_code == 204
    spec = {**mood("1").to_json(), "files": {}, "labels": ["high", "low"]}
    assert moods.call("POST", "/v1/models", token="admin", json=spec).status_code == 201
    assert "was removed" in why_not(roll_back(moods))
    assert promote(moods, "1").json() | {"since": ""} == {
        "alias": "mood@prod",
        "ref": "mood@1",
        "before": "mood@2",
        "since": "",
        "by": "admin",
    }


def test_the_name_of_a_hidden_version_is_no_alias_either(moods: House) -> None:
    with moods.database.transaction() as connection:
        add_model(connection, mood("v4"))
    job = moods.submit(["a"], {"mood": {"kind": "classify", "model": "mood@v4"}})["id"]
    moods.answer(job, 0)
    assert moods.call("DELETE", "/v1/models/mood@v4", token="admin").status_code == 204
    assert "mood@v4 is a version" in why_not(promote(moods, "1", "v4"))


# -- the client


def test_the_client_promotes_and_rolls_back(moods: House) -> None:
    with (
        Client(moods.url, moods.tokens["admin"]) as admin,
        Client(moods.url, moods.tokens["user"]) as user,
    ):
        assert admin.promote("mood@1", "prod").ref == "mood@1"
        job = user.submit(["a"], {"mood": Classify("mood@prod")})
        made = admin.promote("mood@2", "prod")
        assert (made.alias, made.ref, made.before, made.by) == ("mood@prod", "mood@2", "mood@1", "admin")
        assert user.model("mood@prod").ref == "mood@2"
        assert user.plan(["a"], {"mood": Classify("mood@prod")}).models == {"mood": "mood@2"}
        assert user.aliases() == [made]
        assert admin.rollback("mood@prod").ref == "mood@1"
        with pytest.raises(Conflict, match="nothing stood before"):
            admin.rollback("mood@prod")
        assert user.job(job.id).tasks["mood"]["model_ref"] == "mood@1"
        admin.remove_alias("mood@prod")
        assert user.aliases() == []
        with pytest.raises(NotFound):
            admin.remove_alias("mood@prod")
        for ref in ("mood", "mood@", "@1"):
            with pytest.raises(InvalidJob, match="name@version"):
                admin.promote(ref, "prod")
