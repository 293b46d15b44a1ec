"""OpenAI's own client, sync and async: chats, a continued prompt, vectors, lists that are paged, and a batch."""

from __future__ import annotations

import asyncio
import json
import os
import time

import openai
from openai import AsyncOpenAI, OpenAI

MODEL, VECTORS = os.environ["MODEL"], os.environ["VECTORS"]
CHAT = "/v1/chat/completions"


def lines(count: int) -> bytes:
    asked = [
        {"model": MODEL, "messages": [{"role": "user", "content": f"question {n}"}], "max_tokens": 4}
        for n in range(count)
    ]
    return "\n".join(
        json.dumps({"custom_id": f"id-{n}", "method": "POST", "url": CHAT, "body": body})
        for n, body in enumerate(asked)
    ).encode()


def run_batch(client: OpenAI, count: int, **more: object) -> None:
    """Upload, create, wait, and hold the two files against the lines. ``more``: what a proxy asks for beside."""
    file = client.files.create(file=("lines.jsonl", lines(count)), purpose="batch", **more)  # type: ignore[arg-type]
    made = client.batches.create(
        input_file_id=file.id,
        endpoint=CHAT,
        completion_window="24h",
        **more,  # type: ignore[arg-type]
    )
    end = time.monotonic() + 120
    while made.status in ("validating", "in_progress", "finalizing"):
        assert time.monotonic() < end, made
        time.sleep(0.2)
        made = client.batches.retrieve(made.id, **more)  # type: ignore[arg-type]
    assert made.status == "completed", made
    assert made.request_counts is not None
    assert made.request_counts.completed == count, made
    assert made.output_file_id is not None
    text = client.files.content(made.output_file_id, **more).text  # type: ignore[arg-type]
    found = [json.loads(line) for line in text.splitlines()]
    assert sorted(one["custom_id"] for one in found) == sorted(f"id-{n}" for n in range(count))
    assert all(one["response"]["body"]["usage"]["completion_tokens"] <= 4 for one in found)


async def at_once(count: int) -> None:
    async with AsyncOpenAI() as client:
        asked = [
            client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": f"hello {n}"}], max_tokens=4
            )
            for n in range(count)
        ]
        said = await asyncio.gather(*asked)
        assert len({one.id for one in said}) == count
        ids = [model.id async for model in client.models.list()]
        assert {MODEL, VECTORS} <= set(ids)


def main() -> None:
    with OpenAI() as client:
        said = client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "hello"}], max_tokens=8, temperature=0
        )
        assert said.choices[0].finish_reason in ("stop", "length")
        assert said.usage is not None
        assert said.usage.total_tokens == said.usage.prompt_tokens + said.usage.completion_tokens
        raw = client.chat.completions.with_raw_response.create(
            model=MODEL, messages=[{"role": "user", "content": "hello"}], max_tokens=8, temperature=0
        )
        assert raw.parse().choices[0].message.content == said.choices[0].message.content
        assert raw.headers["x-request-id"]
        assert client.completions.create(model=MODEL, prompt="Once", max_tokens=4).choices
        assert len(client.embeddings.create(model=VECTORS, input=["one", "two"]).data) == 2
        run_batch(client, 20)
        assert len(list(client.batches.list(limit=1))) == 1
        assert len(list(client.files.list(limit=1))) == 2
        try:
            client.batches.retrieve("batch_nobody")
        except openai.NotFoundError:
            pass
        else:
            raise AssertionError("a batch that is not there was found")
    asyncio.run(at_once(16))


if __name__ == "__main__":
    main()
