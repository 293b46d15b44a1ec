"""Streams at OpenAI's doors, read by the real SDK, of a worker that says what the test lets it say."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from motet.local.valkey import ValkeyUrls
from motet.protocol.transport import RedisWorkerTransport
from motet.protocol.wire import Said, encode_said
from scheduler.api.openai.app import PREFIX
from tests.integration.api_house import SPEAKER, House, a_house
from tests.integration.landing import register

ASKED: dict[str, Any] = {"model": "speaker", "messages": [{"role": "user", "content": "Hello"}]}
#: What the house answers to the first row of a block.
ANSWER = "row 0"


@pytest.fixture
def house(database_url: str, redis_url: str, tmp_path: Path) -> Iterator[House]:
    with a_house(database_url, tmp_path, redis_url=redis_url) as house:
        register(house.database, SPEAKER)
        yield house


@pytest.fixture
def client(house: House) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{house.url}{PREFIX}", api_key=house.tokens["user"], max_retries=0) as client:
        yield client


@pytest.fixture
def says(house: House, redis_urls: ValkeyUrls) -> Iterator[Callable[..., None]]:
    """Says a part of a row's answer, as its worker does."""
    transport = RedisWorkerTransport(redis_urls.worker, "w")

    def say(text: str, begins: int = 0, *, row: int = 0, attempt: tuple[int, int] = (7, 1)) -> None:
        [(job, api)] = landed(house, row)
        said = Said(job=str(job), row=row, task="answer", attempt=attempt, begins=begins, text=text)
        transport.say([(api, encode_said([said]))])

    yield say
    transport.close()


def landed(house: House, row: int) -> list[Any]:
    end = time.monotonic() + 5
    while not (found := house.sql("SELECT job_id, say FROM block WHERE first_row = :row", row=row)):
        assert time.monotonic() < end, "never landed"
        time.sleep(0.01)
    return found


def answer(house: House, row: int = 0) -> None:
    """The whole answer of a row that is a block of its own."""
    [(job, number)] = house.sql("SELECT job_id, number FROM block WHERE first_row = :row", row=row)
    house.answer(str(job), number)


def test_a_chat_is_told_as_it_is_written(house: House, client: OpenAI, says: Callable[..., None]) -> None:
    with client.chat.completions.create(
        **ASKED, stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = iter(stream)
        first = next(chunks)
        assert (first.object, first.usage) == ("chat.completion.chunk", None)
        assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
        says("ro")
        assert next(chunks).choices[0].delta.content == "ro"
        # Another attempt says the same, and more: only what is new is sent.
        says("r", attempt=(8, 1))
        says("ow", 1, attempt=(8, 1))
        assert next(chunks).choices[0].delta.content == "w"
        answer(house)
        *rest, finish, usage = list(chunks)
    assert "".join(one.choices[0].delta.content or "" for one in rest) == " 0"
    assert finish.choices[0].finish_reason == "stop"
    assert usage.choices == []
    assert usage.usage is not None
    assert (usage.usage.prompt_tokens, usage.usage.completion_tokens) == (7, 3)


def test_an_attempt_that_answers_otherwise_ends_the_stream_with_an_error(
    client: OpenAI, says: Callable[..., None]
) -> None:
    with client.chat.completions.create(**ASKED, stream=True) as stream:
        chunks = iter(stream)
        next(chunks)
        says("Dear")
        assert next(chunks).choices[0].delta.content == "Dear"
        says("Hi", attempt=(8, 1))
        with pytest.raises(openai.APIError, match="send the request again") as ended:
            next(chunks)
    assert ended.value.code == "answer_changed"


def test_choices_of_a_completion_come_in_one_stream(
    house: House, client: OpenAI, says: Callable[..., None]
) -> None:
    with client.completions.create(model="speaker", prompt="Once", n=2, stream=True) as stream:
        landed(house, 1)
        for row in range(2):
            answer(house, row)
        chunks = list(stream)
    written: dict[int, str] = {0: "", 1: ""}
    for chunk in chunks:
        written[chunk.choices[0].index] += chunk.choices[0].text
    assert written == {0: ANSWER, 1: ANSWER}
    assert sorted(c.choices[0].index for c in chunks if c.choices[0].finish_reason) == [0, 1]


def test_a_response_is_told_in_its_events(house: House, client: OpenAI, says: Callable[..., None]) -> None:
    with client.responses.stream(model="speaker", input="Hello", temperature=0) as stream:
        says("ro")
        events = iter(stream)
        kinds = []
        for event in events:
            kinds.append(event.type)
            if event.type == "response.output_text.delta":
                break
        answer(house)
        kinds += [event.type for event in events]
        whole = stream.get_final_response()
    assert kinds[0] == "response.created"
    assert kinds[-1] == "response.completed"
    assert whole.output_text == ANSWER


def test_a_caller_that_goes_away_frees_the_device(house: House) -> None:
    async def leaves(stream: bool) -> None:
        async with AsyncOpenAI(
            base_url=f"{house.url}{PREFIX}", api_key=house.tokens["user"], max_retries=0
        ) as client:
            if stream:
                told = await client.chat.completions.create(**ASKED, stream=True)
                await anext(aiter(told))
                await told.close()
            else:
                asking = asyncio.ensure_future(client.chat.completions.create(**ASKED))
                await asyncio.to_thread(landed, house, 1)
                asking.cancel()
                await asyncio.wait({asking})

    for gone, stream in enumerate((True, False), 1):
        asyncio.run(leaves(stream))
        began = time.monotonic()
        while house.sql("SELECT cells_skipped FROM job")[0].cells_skipped < gone:
            assert time.monotonic() < began + 1, "nobody waits for it, and it goes on"
            time.sleep(0.01)


def test_what_is_wrong_before_a_stream_is_refused_as_without_it(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**{**ASKED, "model": "nobody"}, stream=True)
