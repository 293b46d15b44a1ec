"""OpenAI's own client, with motet behind it: only the address and the key are others.

Set them with  eval "$(motet token create notebook --openai)"  and name a language model of yours in MODEL.
"""

import os

from openai import OpenAI

MODEL = os.environ.get("MODEL", "smollm2-135m")

with OpenAI() as client:
    said = client.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "system", "content": "You answer in one sentence."},
            {"role": "user", "content": "Why is the sky blue?"},
        ],
        temperature=0.7,
        seed=7,
        n=2,
        max_completion_tokens=48,
    )
    for choice in said.choices:
        print(f"{choice.index}: {choice.message.content!r} ({choice.finish_reason})")
    assert said.usage is not None
    print(f"{said.usage.prompt_tokens} tokens read once, {said.usage.completion_tokens} written for both")
