"""LangChain's ChatOpenAI: one call, several at once, one that is awaited, and JSON that keeps a schema; and its vectors."""

from __future__ import annotations

import asyncio

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from with_openai import MODEL, VECTORS


def main() -> None:
    chat = ChatOpenAI(model=MODEL, max_tokens=8, temperature=0)
    said = chat.invoke([SystemMessage("Be brief."), HumanMessage("hello")])
    assert isinstance(said, AIMessage)
    assert said.usage_metadata is not None
    assert 0 < said.usage_metadata["output_tokens"] <= 8
    assert said.response_metadata["finish_reason"] in ("stop", "length")
    # An answer goes on as part of the dialogue, with all that LangChain keeps of it.
    assert chat.invoke([HumanMessage("hello"), said, HumanMessage("and then?")]).content is not None
    assert len(chat.batch(["one", "two", "three"])) == 3
    assert asyncio.run(chat.ainvoke("hello")).content == chat.invoke("hello").content
    shaped = ChatOpenAI(model=MODEL, max_tokens=64, temperature=0).with_structured_output(
        {
            "title": "mood",
            "type": "object",
            "properties": {"glad": {"type": "boolean"}},
            "required": ["glad"],
        },
        method="json_schema",
    )
    assert set(shaped.invoke("How do you feel?")) == {"glad"}
    # As it comes, with nothing said.
    assert ChatOpenAI(model=MODEL).invoke("hello").content is not None
    # Without this it sends token ids of OpenAI's own tokenizer.
    vectors = OpenAIEmbeddings(model=VECTORS, check_embedding_ctx_length=False)
    assert len(vectors.embed_documents(["one", "two"])) == 2


if __name__ == "__main__":
    main()
