"""``motet explain`` and ``job.explain()``, against a small API over a real socket."""

from __future__ import annotations

import json

from motet import Classify, Client
from motet.http import Address, Http
from tests.unit.fake_api import EXPLANATION, TOKEN, FakeApi
from tests.unit.test_cli_commands import Shell, api, motet

__all__ = ["api", "motet"]


def submit(api: FakeApi) -> Client:
    client = Client.over(Http(Address(url=api.url, token=TOKEN)))
    client.submit(["a", "b"], {"topic": Classify("news-topics")})
    return client


def test_the_first_line_answers_and_the_tables_tell_the_rest(api: FakeApi, motet: Shell) -> None:
    with submit(api):
        ran = motet("explain", "job-1")
    assert (ran.code, ran.err) == (0, "")
    answer, note, *tables = ran.out.splitlines()
    assert answer == EXPLANATION["says"]
    assert note == EXPLANATION["notes"][0]
    shown = "\n".join(tables)
    for words in (
        "w3 (loads, 1.0 s)",
        "1 × GPU, 1.4 s",
        "1: needs 900 MB, has 300",
        "nightly",
        "41.0 s",
        "7.0 s",
    ):
        assert words in shown


def test_a_program_gets_it_as_json(api: FakeApi, motet: Shell) -> None:
    with submit(api):
        ran = motet("explain", "job-1", "--json")
    told = json.loads(ran.out)
    assert told["eta"]["p90_s"] == 33.9
    assert told["job"] == "job-1"


def test_a_job_that_is_not_there_is_an_error(api: FakeApi, motet: Shell) -> None:
    ran = motet("explain", "nothing")
    assert ran.code == 1
    assert "no job of this id" in ran.err


def test_the_client_reads_it_as_data_and_as_words(api: FakeApi) -> None:
    with submit(api) as client:
        told = client.job("job-1").explain()
    assert told.eta is not None
    assert (told.eta.p50_s, told.passes[0].cannot[0].need_mb, told.beside[0].own[0].name) == (
        28.1,
        900,
        "nightly",
    )
    assert str(told) == "\n".join((EXPLANATION["says"], *EXPLANATION["notes"]))
