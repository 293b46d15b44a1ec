"""The three desks of `motet app risk`: weights, rules, the payments that are made, the hook, and what warns how well."""

from __future__ import annotations

import json
import math
import random
import time
import urllib.error
import urllib.request
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from motet.apps.data import credit
from motet.apps.data.cards import LARGE, payments
from motet.apps.data.reuters import few_of_each, read_r8
from motet.apps.functions import cards
from motet.apps.functions.credit import assess, fit
from motet.apps.functions.news import watch
from motet.apps.hooks import HookReceiver, is_proved, receiving
from motet.apps.risk_cards import CardsWatched, Judged, alerts_a_day, quantile_ms, stalls
from motet.apps.risk_scores import (
    against_threshold,
    auc,
    costs,
    has_keywords,
    precision,
    precision_at_recall,
    recall,
)
from motet.errors import SetupError
from tests.small_data import loans, news_wheel, signed

# -- the credit desk


def test_a_risk_rises_with_what_went_bad_and_says_so() -> None:
    book = loans(400)
    model = fit(
        [one.fields for one in book], [one.bad for one in book], numbers=credit.NUMBERS, words=credit.WORDS
    )
    assert json.loads(json.dumps(model)) == model, "plain JSON"
    rich = {**book[0].fields, "Income": 300, "Records": "no"}
    poor = {**rich, "Income": 40, "Records": "yes"}
    safe, risky = assess([rich, poor], artefact=model)
    assert 0 < safe["score"] < 0.5 < risky["score"] < 1
    assert set(risky["reasons"][:2]) == {"Records yes", "Income 40"}
    mean = sum(one["score"] for one in assess([loan.fields for loan in book], artefact=model)) / len(book)
    assert mean == pytest.approx(sum(one.bad for one in book) / len(book), abs=1e-3), (
        "at the maximum of the likelihood"
    )


def test_what_nobody_knows_of_a_loan_is_no_error() -> None:
    book = loans(200)
    model = fit(
        [one.fields for one in book], [one.bad for one in book], numbers=credit.NUMBERS, words=credit.WORDS
    )
    (answer,) = assess([dict.fromkeys((*credit.NUMBERS, *credit.WORDS))], artefact=model)
    assert 0 < answer["score"] < 1
    assert assess([{**book[0].fields, "Job": "astronaut"}], artefact=model)[0]["score"] > 0


def test_loans_are_split_without_overlap() -> None:
    book = loans(100)
    train, test = credit.split(book)
    assert (len(train), len(test)) == (70, 30)
    assert {id(one) for one in train} | {id(one) for one in test} == {id(one) for one in book}
    assert credit.split(book)[1] == test


# -- the card desk

QUIET = {"amount": 20.0, "usual": 20.0, "n_month": 10, "n_day": 0, "spent_day": 0}


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"amount": 250.0, "usual": 90.0}, "250.00 at once"),
        ({"amount": 90.0}, "4.5 times the usual 20.00"),
        ({"n_day": 8}, "payment 9 in a day"),
        ({"amount": 60.0, "spent_day": 780.0}, "840.00 in a day"),
    ],
)
def test_an_unusual_payment_alerts_with_its_reason(changed: dict[str, Any], reason: str) -> None:
    quiet, loud = cards.judge([QUIET, QUIET | changed])
    assert (quiet["score"] < 0.5, quiet["reason"]) == (True, "")
    assert loud["score"] > 0.5
    assert loud["reason"] == reason


def test_a_card_that_is_new_has_nothing_usual() -> None:
    assert cards.judge([{**QUIET, "amount": 150.0, "usual": None, "n_month": 0}])[0]["score"] < 0.5
    assert cards.judge([{**QUIET, "amount": 150.0, "n_month": 2}])[0]["score"] < 0.5
    assert cards.judge([{**QUIET, "amount": 150.0}], times=10.0)[0]["score"] < 0.5


def test_payments_are_the_same_for_a_seed_and_in_order() -> None:
    made = payments(cards=20, days=10)
    assert made == payments(cards=20, days=10)
    assert made != payments(cards=20, days=10, seed=1)
    assert [one.time for one in made] == sorted(one.time for one in made)
    kinds = {one.fraud for one in made}
    assert {"", "shop", "stolen"} <= kinds
    assert all(one.amount <= LARGE for one in made if one.fraud == "")
    assert not {"fraud"} & made[0].row().keys(), "the rule does not see the truth"


def judged(count: int, *, hook_s: float | None = 0.1) -> list[Judged]:
    payment = payments(cards=2, days=2)[0]
    return [
        Judged(
            payment=payment,
            score=0.9 if hook_s else 0.1,
            reason="",
            answer_s=0.01 * at,
            hook_s=hook_s,
            delivery_s=0.03,
        )
        for at in range(count)
    ]


def test_the_desk_tells_quantiles_and_alerts_by_day() -> None:
    assert quantile_ms([], 0.95) is None
    assert quantile_ms([at / 1000 for at in range(100)], 0.95) == 95
    told = CardsWatched(before=(), live=[*judged(3), *judged(1, hook_s=None)], bulk_rows=7).to_json()
    assert (told["payments"], told["alerts"], told["payment_to_hook_p95_ms"], told["bulk_rows_beside"]) == (
        4,
        3,
        100,
        7,
    )
    assert (told["payment_to_event_p95_ms"], told["event_to_hook_p95_ms"]) == (70, 30)
    assert told["stalls"] == []
    late = [replace(one, answer_s=answer_s) for one in judged(1) for answer_s in (2.0, 1.9, 0.1, 1.0)]
    assert stalls(late) == [
        {"from_s": 0.0, "payments": 2, "longest_ms": 2000.0},
        {"from_s": 0.3, "payments": 1, "longest_ms": 1000.0},
    ]
    watched = CardsWatched(before=judged(1, hook_s=None), live=judged(3), bulk_rows=7)
    assert alerts_a_day(watched)["alerts"] == [(0, 75.0)]


# -- the hook


def post(url: str, headers: dict[str, str], body: bytes) -> int:
    request = urllib.request.Request(url, body, headers)
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as refused:
        return refused.code


def test_the_receiver_takes_what_motet_signed_and_nothing_else() -> None:
    event = {"type": "row.matched", "timestamp": "2026-12-01T02:40:11.512094Z", "data": {"row": 7}}
    body = json.dumps(event).encode()
    with receiving() as hook:
        hook.secret = "whsec_c2VjcmV0"
        headers = signed(hook.secret, body)
        assert post(hook.url, headers, body + b" ") == 401
        assert post(hook.url, {}, body) == 401
        assert hook.wait_for({7}, 0) == {7}
        assert post(hook.url, headers, body) == 204
        assert hook.wait_for({7}, 5) == set()
        first = hook.rows[7]
        assert first.written_s == 1796092811.512094
        assert post(hook.url, headers, body) == 204, "told again"
        assert hook.rows == {7: first}


def test_an_old_message_proves_nothing() -> None:
    body = b"{}"
    headers = signed("whsec_c2VjcmV0", body)
    assert is_proved("whsec_c2VjcmV0", headers, body, now=time.time())
    assert not is_proved("whsec_c2VjcmV0", headers, body, now=time.time() + 400)
    assert HookReceiver().take(headers, body) == 401


# -- the news desk


def test_news_are_read_from_both_tables(tmp_path: Path) -> None:
    train, test = read_r8(news_wheel(tmp_path))
    assert (len(train), len(test)) == (160, 80)
    assert train[0].label in ("crude", "earn")
    assert "\t" not in train[0].text
    few = few_of_each(train, 5)
    assert len(few) == 10
    assert few == few_of_each(train, 5)


def test_another_wheel_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.whl"
    with zipfile.ZipFile(path, "w") as files:
        files.writestr("readme.txt", "")
    with pytest.raises(SetupError, match="delete it"):
        read_r8(path)


def test_a_watch_list_adds_up_what_its_classes_have() -> None:
    assert watch(
        [{"topic.scores[crude]": 0.25, "topic.scores[ship]": 0.5}, {"topic.scores[crude]": None}]
    ) == [0.75, 0]
    assert has_keywords("OPEC cut its crude output")
    assert not has_keywords("The company reported net profit")


# -- how well it warns


def test_precision_is_told_where_enough_is_found() -> None:
    truth = [True, True, False, True, False, False, True, False]
    scores = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]
    assert precision_at_recall(truth, scores, 0.5).value == 1.0
    assert precision_at_recall(truth, scores, 0.75).value == pytest.approx(3 / 4)
    assert precision_at_recall(truth, scores, 1.0).value == pytest.approx(4 / 7)
    tied = precision_at_recall([True, False, False, False], [0.5, 0.5, 0.5, 0.1], 1.0)
    assert tied.value == pytest.approx(1 / 3), "rows of one score alert together"
    assert precision(truth, [score > 0.55 for score in scores]).value == 0.75
    assert recall(truth, [score > 0.55 for score in scores]) == 0.75


def test_intervals_hold_the_figure() -> None:
    dice = random.Random(0)
    truth = [dice.random() < 0.3 for _ in range(200)]
    scores = [dice.random() + 0.5 * one for one in truth]
    for found in (auc(truth, scores), precision_at_recall(truth, scores, 0.9), precision(truth, truth)):
        assert found.low is not None
        assert found.value is not None
        assert found.high is not None
        assert found.low <= found.value <= found.high


def test_curves_follow_the_threshold() -> None:
    truth, scores = [True, True, False, False], [0.9, 0.6, 0.4, 0.1]
    curves = against_threshold(truth, scores)
    assert dict(curves["precision"])[0.5] == 1.0
    assert curves["recall"][0][1] == 1.0
    assert curves["recall"][-1][1] == 0.0
    cost = costs(truth, scores, missed=5, alarm=1)
    assert cost[0] == (0.0, 0.5), "an alert on all: two false ones"
    assert math.isclose(cost[-1][1], 2.5)
    assert min(value for _, value in cost) == 0.0
