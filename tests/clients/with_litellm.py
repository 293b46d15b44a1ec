"""LiteLLM's own functions: completion, embedding, and a file and a batch, with motet as an OpenAI-compatible server."""

from __future__ import annotations

import asyncio
import os
import time

import litellm
from with_openai import CHAT, MODEL, VECTORS, lines

AT = {"api_base": os.environ["OPENAI_BASE_URL"], "api_key": os.environ["OPENAI_API_KEY"]}


async def main() -> None:
    asked = [{"role": "user", "content": "hello"}]
    said = litellm.completion(model=f"openai/{MODEL}", messages=asked, max_tokens=6, seed=3, user="me", **AT)
    assert said.choices[0].message.content is not None
    assert said.usage.completion_tokens <= 6
    same = await litellm.acompletion(
        model=f"openai/{MODEL}", messages=asked, max_tokens=6, seed=3, metadata={"trace_id": "1"}, **AT
    )
    assert same.choices[0].message.content == said.choices[0].message.content
    continued = litellm.text_completion(
        model=f"text-completion-openai/{MODEL}", prompt="Once", max_tokens=4, **AT
    )
    assert continued.choices[0].text is not None
    vectors = litellm.embedding(model=f"openai/{VECTORS}", input=["one", "two"], **AT)
    assert len(vectors.data) == 2
    several = litellm.batch_completion(
        model=f"openai/{MODEL}", messages=[asked, asked, asked], max_tokens=3, **AT
    )
    assert [one.choices[0].index for one in several] == [0, 0, 0]
    file = await litellm.acreate_file(
        file=("lines.jsonl", lines(5)), purpose="batch", custom_llm_provider="openai", **AT
    )
    made = await litellm.acreate_batch(
        completion_window="24h",
        endpoint=CHAT,
        input_file_id=file.id,
        custom_llm_provider="openai",
        metadata={"night": "7"},
        **AT,
    )
    end = time.monotonic() + 120
    while made.status in ("validating", "in_progress", "finalizing"):
        assert time.monotonic() < end, made
        await asyncio.sleep(0.2)
        made = await litellm.aretrieve_batch(batch_id=made.id, custom_llm_provider="openai", **AT)
    assert made.status == "completed", made
    content = await litellm.afile_content(file_id=made.output_file_id, custom_llm_provider="openai", **AT)
    assert len(content.content.splitlines()) == 5
    try:
        litellm.completion(model="openai/nobody", messages=asked, **AT)
    except litellm.NotFoundError:
        pass
    else:
        raise AssertionError("a model that is not there answered")


if __name__ == "__main__":
    asyncio.run(main())
