"""State of open jobs over HTTP: opened by a client, given to tasks, shown with the rows, and refused by name."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from click.testing import CliRunner

from motet import Classify, Client, Conflict, Count, Feed, Function, InvalidJob, Last, Sum
from motet.cli.feeds import open_
from scheduler.payloads import Payloads
from scheduler.policy.carve import Carved, Range
from scheduler.store.leases import Leased
from scheduler.store.manifests import Manifests
from tests.integration.api_house import House, problems
from tests.integration.api_house import client as client
from tests.integration.api_house import house as house
from tests.integration.test_api_asks import answering, ask

TASKS = {"topic": Classify("topics", input="{text} {n_week}")}
STATE = {
    "n_week": Count(key="{who}", window="7d", at="{time}"),
    "spent": Sum("{amount}", key="{who}", window="1d", at="{time}"),
    "last": Last("{city}", key="{who}"),
}


@pytest.fixture
def feed(client: Client) -> Feed:
    return client.open(TASKS, name="risk", state=STATE)


def payment(who: Any, amount: Any, day: int, city: Any = "Wien") -> dict[str, Any]:
    at = datetime(2026, 11, day, 12, tzinfo=UTC)
    return {"text": "paid", "who": who, "amount": amount, "time": at, "city": city}


def test_a_row_that_is_read_along_says_what_it_was_given(house: House, feed: Feed) -> None:
    with answering(house, feed.job.id):
        feed.ask(payment("anna", 2, 1))
        with feed.stream(payment("anna", 3, 1)) as deltas:
            list(deltas)
        told = house.call(
            "POST",
            f"/v1/jobs/{feed.job.id}/ask",
            headers={"Accept": "text/event-stream"},
            json={"rows": [{"text": "paid", "who": "bert", "amount": 1, "time": 0, "city": "Wien"}]},
        )
    assert deltas.row is not None
    assert deltas.row.state == {"n_week": 1, "spent": 2, "last": "Wien"}
    assert '"state": {"last": null, "n_week": 0, "spent": 0}' in told.text


def test_each_row_says_what_it_was_given_and_so_does_whoever_follows(
    house: House, client: Client, feed: Feed
) -> None:
    with answering(house, feed.job.id):
        rows = [
            feed.ask(payment("anna", Decimal("7.50"), 1), key="one"),
            feed.ask(payment("anna", Decimal("0.25"), 1, "Graz")),
            feed.ask(payment("bert", 5, 1)),
            feed.ask(payment("anna", 1, 20, None)),
        ]
        again = feed.ask(payment("anna", Decimal("7.50"), 1), key="one")
    told = [
        {"n_week": 0, "spent": 0, "last": None},
        {"n_week": 1, "spent": Decimal("7.50"), "last": "Wien"},
        {"n_week": 0, "spent": 0, "last": None},
        {"n_week": 0, "spent": 0, "last": "Graz"},
    ]
    assert [row.state for row in rows] == told
    assert again.state == told[0]
    # Another program, that knows the name alone, sends the same fields.
    with answering(house, feed.job.id, after=4):
        assert client.feed("risk").ask(payment("bert", 2, 2)).state["n_week"] == 1
    feed.close()
    followed = list(client.feed(feed.job.id).rows())
    assert [row.state for row in followed[:4]] == told
    assert dict(house.job(feed.job.id)["folds"]["last"]) == STATE["last"].to_json()
    lines = house.call(
        "GET", f"/v1/jobs/{feed.job.id}/results", headers={"Accept": "application/x-ndjson"}
    ).text
    assert '"state": {"last": "Wien", "n_week": 1, "spent": "7.50"}' in lines


def test_the_same_name_with_other_state_is_a_conflict(client: Client, feed: Feed) -> None:
    assert client.open(TASKS, name="risk", state=STATE).job.id == feed.job.id
    for other in (None, STATE | {"n_week": Count(key="{who}", window="8d", at="{time}")}):
        with pytest.raises(Conflict):
            client.open(TASKS, name="risk", state=other)


def test_a_row_that_cannot_be_folded_is_refused_alone_by_its_field(house: House, feed: Feed) -> None:
    with answering(house, feed.job.id):
        with pytest.raises(InvalidJob, match=r"rows\.amount.*got text; expected a number"):
            feed.ask(payment("anna", "7.50", 1))
        with pytest.raises(InvalidJob, match=r"rows\.time.*got text; expected a time"):
            feed.ask(payment("anna", 1, 1) | {"time": "soon"})
        with pytest.raises(InvalidJob, match=r"rows\.who.*no such field"):
            feed.ask({"text": "paid", "amount": 1, "time": 0, "city": ""})
        answer = ask(
            house,
            feed.job.id,
            [
                {"text": "a", "who": 1, "amount": amount, "time": "2026-11-01T12:00:00Z", "city": "x"}
                for amount in (1, [1], 2)
            ],
            keys=["1", "2", "3"],
        )
    first, bad, last = answer.json()["rows"]
    assert (bad["error"]["problems"][0]["field"], bad["error"]["problems"][0]["row"]) == ("rows.amount", 0)
    assert (first["state"]["n_week"], last["state"]["n_week"], last["state"]["spent"]) == (0, 1, 1)


def test_with_bad_rows_as_errors_only_who_reads_the_fold_has_one(house: House, client: Client) -> None:
    tasks = {"topic": Classify("topics", input="{spent}"), "plain": Classify("topics", input="{text}")}
    feed = client.open(tasks, name="lenient", state=STATE, bad_rows="error")
    feed.put(payment("anna", "much", 1), within_s=5)
    while not house.job(feed.job.id)["rows"]:
        time.sleep(0.01)
    (block,) = house.sql("SELECT bad_fields, n_work FROM block WHERE job_id = :job", job=feed.job.id)
    assert block.n_work == 1
    assert block.bad_fields == {
        "spent": [["bad_row", "amount: got text; expected a number that a float can hold, or null", [0]]]
    }
    assert house.job(feed.job.id)["cells"]["error"] == 1
    feed.job.cancel()  # whoever waits for the other answer is told at once


def test_bad_state_is_refused_by_name_on_either_side(house: House, client: Client) -> None:
    with pytest.raises(InvalidJob, match=r"state\.n_week\.window"):
        client.open(TASKS, name="x", state={"n_week": Count(key="{who}", window="week")})
    body = {"tasks": {"topic": TASKS["topic"].to_json()}, "open": True}
    fold = {"kind": "count", "key": "{who}"}
    for state, more, field in (
        ({"n_week": fold | {"kind": "median"}}, {}, "state.n_week.kind"),
        ({"topic": fold}, {}, "state.topic"),
        ([], {}, "state"),
        ({"n_week": fold}, {"open": False}, "state"),
    ):
        answer = house.call("POST", "/v1/jobs", json=body | {"state": state} | more)
        assert field in [p["field"] for p in problems(answer)]


def test_the_command_line_opens_a_job_with_state(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOTET_URL", house.url)
    monkeypatch.setenv("MOTET_TOKEN", house.tokens["user"])
    said = ["--name", "risk", "--task", "topic=classify:topics,input='{text} {n_week}'"]
    good = CliRunner().invoke(
        open_,
        [*said, "--state", "n_week=count(key={who}, window=7d)", "--state", "spent=sum({x}, key={who}/{y})"],
    )
    assert good.exit_code == 0, good.output
    assert house.job(good.stdout.strip())["folds"] == {
        "n_week": Count(key="{who}", window="7d").to_json(),
        "spent": Sum("{x}", key="{who}/{y}").to_json(),
    }
    for words, field in (("n_week", "--state"), ("n_week=median(key={who})", "state.n_week.kind")):
        bad = CliRunner().invoke(open_, [*said, "--state", words])
        assert bad.exit_code
        assert field in f"{bad.output} {bad.exception}"


def test_workers_get_state_typed_where_it_is_the_whole_input_and_as_text_elsewhere(
    house: House, client: Client
) -> None:
    tasks = {
        "roll": Function("dice", input="{n_week}"),
        "topic": Classify("topics", input="{n_week}: {text}"),
    }
    feed = client.open(tasks, name="typed", state=STATE)
    waiting = [feed.put(payment("anna", amount, 1), within_s=2) for amount in (1, 2)]
    while house.job(feed.job.id)["rows"] < len(waiting):
        time.sleep(0.01)
    blocks = house.sql(
        "SELECT number, n_rows FROM block WHERE job_id = :job ORDER BY number", job=feed.job.id
    )
    # As a dispatcher would have leased them; what it sends is made of what is stored.
    sent = [
        Payloads(house.database, Manifests()).assignments(
            [
                Leased(
                    subtask=1,
                    attempt=1,
                    nonce="n",
                    worker="w",
                    job=feed.job.id,
                    pass_number=number,
                    carved=Carved((*(Range(b.number, 0, b.n_rows, 1) for b in blocks),), todo=3),
                    predicted_s=1.0,
                )
            ]
        )["w"][0]
        for number in (0, 1)
    ]
    typed, texts = ([a for a in sent if a.values], [a for a in sent if not a.values])
    assert [(sorted(a.values), {type(v) for v in a.values}) for a in typed] == [([0, 1], {int})]
    assert [sorted(a.texts) for a in texts] == [["0: paid", "1: paid"]]
    feed.job.cancel()  # whoever waits for the answers is told at once
