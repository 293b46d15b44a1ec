"""What a one-row job costs the API in round trips to Postgres: each is a wait in the way of one row."""

from __future__ import annotations

import json
from uuid import UUID

import pytest

from scheduler.api.opening import _open
from scheduler.api.resources import Resources
from scheduler.api.results import ResultsQuery, look_for, read_on
from tests.integration.api_house import TWO, House, house
from tests.integration.test_leader_statements import round_trips

__all__ = ["house"]


def test_a_submission_of_one_row_takes_eight_round_trips_and_its_answer_three(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One for its models, seven to open, land and close it; a look, its columns, and its last record."""
    use = Resources.of(house.settings)
    tenant = house.tenants["default"]

    def submit(text: str) -> str:
        body = {"tasks": TWO, "rows": [{"text": text}], "priority": "interactive", "reuse": False}
        return str(json.loads(bytes(_open(use, tenant, json.dumps(body).encode(), f"key {text}").body))["id"])

    try:
        # The door has looked a moment ago, and connections are there.
        submit("before")
        with round_trips(monkeypatch) as sent:
            job = submit("one row")
        assert len(sent) == 8, "\n".join(sent)
        asked = ResultsQuery(use, tenant, UUID(job), None, "row")
        look_for(asked, 0)
        house.answer(job, 0)
        with round_trips(monkeypatch) as sent:
            assert len(list(read_on(asked, look_for(asked, 0), 0, 1e9))) == 2
        assert len(sent) == 3, "\n".join(sent)
    finally:
        use.close()
