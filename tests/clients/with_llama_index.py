"""LlamaIndex's OpenAILike: complete and chat, once as a chat model and once as one that continues a prompt."""

from __future__ import annotations

import asyncio
import os

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike
from with_openai import MODEL

AT = {"api_base": os.environ["OPENAI_BASE_URL"], "api_key": os.environ["OPENAI_API_KEY"]}


def main() -> None:
    chats = OpenAILike(model=MODEL, is_chat_model=True, max_tokens=8, context_window=512, **AT)
    asked = [ChatMessage(role="system", content="Be brief."), ChatMessage(role="user", content="hello")]
    assert chats.chat(asked).message.content is not None
    assert chats.complete("hello").text is not None
    assert asyncio.run(chats.achat(asked)).raw.usage.completion_tokens <= 8
    # As it comes, with nothing said about the model.
    assert OpenAILike(model=MODEL, is_chat_model=True, **AT).chat(asked).message.content is not None
    assert OpenAILike(model=MODEL, **AT).complete("Once").text is not None
    continues = OpenAILike(model=MODEL, max_tokens=8, context_window=512, **AT)
    assert continues.complete("Once").raw.usage.completion_tokens <= 8
    assert continues.chat(asked).message.content is not None


if __name__ == "__main__":
    main()
