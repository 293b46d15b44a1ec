"""A tiny random language model made without a download, and a real OpenAI-compatible server that runs it.

The server computes each prompt anew, one token after the other, so it is also what engines are compared with.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response

from tests.serving import in_a_thread

CONTEXT = 512
#: Ends of templates as some models have them: a switch turns thoughts off, or a thought is always begun.
SWITCHED = (
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
)
BEGUN = "<think>\n"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def a_llama(
    folder: Path,
    seed: int = 0,
    *,
    kind: str = "llama",
    template: str | None = TEMPLATE,
    window: int | None = None,
    thinks: str = "",
) -> Path:
    """A Llama of two layers with random weights, and a byte-level tokenizer with a chat template.

    ``kind``: or a qwen3, whose queries are normed, or a mistral, which slides a ``window`` where there is one.
    ``thinks``: SWITCHED or BEGUN, for a model that marks its thoughts.
    """
    import torch
    import transformers

    vocabulary = a_tokenizer(folder, template, thinks=thinks)
    torch.manual_seed(seed)
    config, model, more = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {"head_dim": 32}),
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM, {"sliding_window": window}),
    }[kind]
    shape = config(
        vocab_size=vocabulary,
        # Heads of 32: the least that vLLM computes on a CPU.
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        # Larger than usual: the likeliest token is then clear, and depends on what stands before.
        initializer_range=0.2,
        **more,
    )
    model(shape).save_pretrained(folder)
    return folder


def a_language_model(folder: Path, kind: str, *, positions: int = CONTEXT, **more: Any) -> Path:
    """Two layers of any architecture of transformers (``model_type``), and the same tokenizer.

    Every weight is random, also those that are zero or one at first: sinks, biases, gates and scales count.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    vocabulary = a_tokenizer(folder)
    shape = AutoConfig.for_model(
        kind,
        **{
            "vocab_size": vocabulary,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": positions,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            **more,
        },
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shape)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn_like(weight) * 0.2
            weight.copy_(weight + noise if weight.ndim == 1 else noise)
    model.save_pretrained(folder)
    return folder


def a_tokenizer(folder: Path, template: str | None = TEMPLATE, *, thinks: str = "") -> int:
    """A byte-level tokenizer in the folder; how many tokens it has. ``thinks``: as of ``a_llama``."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    reader = Tokenizer(models.BPE())
    reader.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    reader.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = "Answer with one of them. Which of these fits best: good or bad? The weather was fine on Monday. "
    reader.train_from_iterator([words * 20], trainer)
    if thinks and template:
        reader.add_tokens(["<think>", "</think>"])
        template = template.removesuffix("{% endif %}") + thinks + "{% endif %}"
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=reader,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=template,
        model_max_length=CONTEXT,
    ).save_pretrained(folder)
    return int(reader.get_vocab_size())


@dataclass
class TinyServer:
    """What a test may tell the server to do, and what it has seen."""

    folder: Path
    url: str = ""
    model: str = "tiny"
    key: str = ""
    #: It tokenises chats, as vLLM does; takes schemas; tells likelihoods.
    tokenises: bool = True
    constrains: bool = True
    logprobs: bool = True
    #: (status, headers, body) to answer with instead, one for each request to come; the last one again and again
    #: where ``stuck``.
    faults: list[tuple[int, Mapping[str, str], str]] = field(default_factory=list)
    stuck: bool = False
    #: How a request to chat is refused for a parameter in it, (status, body); None where it is not.
    refusing: Callable[[Mapping[str, Any]], tuple[int, str] | None] = lambda body: None
    #: What the model says instead of what it would say, one for each chat to come; "" where all its tokens were thoughts.
    scripted: list[str] = field(default_factory=list)
    #: Events after which an answer in pieces has no end; None: it has one.
    breaks_at: int | None = None
    seen: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    #: Requests at once, at most; answers whose client went away; seconds that a token takes.
    most_at_once: int = 0
    abandoned: int = 0
    token_s: float = 0.0
    _now: int = 0
    _prompts: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        self.lm = AutoModelForCausalLM.from_pretrained(self.folder, local_files_only=True).eval()

    def chats(self) -> list[dict[str, Any]]:
        return [body for path, body in self.seen if path.endswith("chat/completions")]

    def logp(self, ids: Sequence[int]) -> Any:
        """Log-probabilities behind each token, (tokens, vocabulary)."""
        import torch

        with torch.inference_mode():
            return self.lm(input_ids=torch.tensor([list(ids)])).logits[0].float().log_softmax(-1)

    def prompt(self, messages: Sequence[Mapping[str, str]], **switches: Any) -> list[int]:
        filled = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **switches
        )
        return list(self.tokenizer(filled, add_special_tokens=False)["input_ids"])

    def app(self) -> Any:
        app = FastAPI()

        @app.get("/v1/models")
        async def models() -> Any:
            return {"object": "list", "data": [{"id": self.model, "max_model_len": CONTEXT}]}

        async def told(request: Request) -> dict[str, Any]:
            body = json.loads(await request.body())
            if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
                raise HTTPException(401, "wrong key")
            self.seen.append((request.url.path, body))
            return dict(body)

        def fault() -> Response | None:
            if not self.faults:
                return None
            status, headers, text = self.faults[0] if self.stuck else self.faults.pop(0)
            return Response(text, status, dict(headers), media_type="application/json")

        @app.post("/tokenize")
        async def tokenize(request: Request) -> Any:
            body = await told(request)
            if not self.tokenises:
                return JSONResponse({"detail": "Not Found"}, 404)
            if "messages" in body:
                ids = self.prompt(body["messages"], **body.get("chat_template_kwargs", {}))
            else:
                ids = self.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]
            return {"tokens": list(ids), "count": len(ids), "max_model_len": CONTEXT}

        @app.post("/v1/chat/completions")
        async def chat(request: Request) -> Any:
            body = await told(request)
            if (refused := fault()) is not None:
                return refused
            if (said := self.refusing(body)) is not None:
                return Response(said[1], said[0], media_type="application/json")
            if "response_format" in body and not self.constrains:
                return JSONResponse({"error": {"message": "response_format is not supported"}}, 400)
            if "top_logprobs" in body and not self.logprobs:
                return JSONResponse({"error": {"message": "unknown field top_logprobs"}}, 400)
            prompt = self.prompt(body["messages"], **body.get("chat_template_kwargs", {}))
            found = await self._write(request, body, prompt)
            return streamed(found) if body.get("stream") and isinstance(found, dict) else found

        def streamed(found: Mapping[str, Any]) -> Response:
            """The same in pieces of three characters; the connection breaks behind ``breaks_at`` of them."""
            (choice,) = found["choices"]
            text = choice["message"]["content"]
            pieces = [{"content": text[lo : lo + 3]} for lo in range(0, len(text), 3)]
            events: list[Any] = [{"choices": [{"index": 0, "delta": one}]} for one in pieces]
            if events and "logprobs" in choice:
                events[0]["choices"][0]["logprobs"] = choice["logprobs"]
            events.append({"choices": [{"index": 0, "delta": {}, "finish_reason": choice["finish_reason"]}]})
            events = events[: self.breaks_at]
            events.append({"choices": [], "usage": found["usage"]})
            lines = [f"data: {json.dumps(event)}\n\n" for event in events]
            return Response("".join([*lines, "data: [DONE]\n\n"]), media_type="text/event-stream")

        @app.post("/v1/completions")
        async def complete(request: Request) -> Any:
            body = await told(request)
            if (refused := fault()) is not None:
                return refused
            prompt = body["prompt"]
            if isinstance(prompt, str):
                prompt = self.tokenizer(prompt)["input_ids"]
            return await self._write(request, body, list(prompt))

        async def counted(scope: Any, receive: Any, send: Any) -> None:
            self._now += scope["type"] == "http"
            self.most_at_once = max(self.most_at_once, self._now)
            try:
                await app(scope, receive, send)
            finally:
                self._now -= scope["type"] == "http"

        return counted

    async def _write(self, request: Any, body: Mapping[str, Any], prompt: list[int]) -> Any:
        most = int(body.get("max_completion_tokens") or body.get("max_tokens") or 16)
        if len(prompt) + most > CONTEXT:
            words = (
                f"This model's maximum context length is {CONTEXT} tokens. However, you requested "
                f"{len(prompt) + most} tokens in {json.dumps(body.get('messages', ''))}"
            )
            return JSONResponse({"error": {"message": words, "type": "BadRequestError", "code": 400}}, 400)
        cached = max((_common(prompt, before) for before in self._prompts), default=0)
        self._prompts.append(prompt)
        ids, told, finish = await self._ids(request, body, prompt, most)
        text = str(self.tokenizer.decode(ids, skip_special_tokens=True))
        if "messages" in body and self.scripted:
            text = self.scripted.pop(0)
            finish = "stop" if text else "length"
        for stop in body.get("stop") or ():
            if stop in text:
                text, finish = text.partition(stop)[0], "stop"
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish}
        if "messages" in body:
            choice["message"] = {"role": "assistant", "content": text}
            if body.get("logprobs"):
                choice["logprobs"] = {"content": told}
        else:
            choice["text"] = text
            if body.get("echo") and "logprobs" in body:
                logp = self.logp(prompt)
                given = [None] + [float(logp[i, prompt[i + 1]]) for i in range(len(prompt) - 1)]
                choice["logprobs"] = {"token_logprobs": [*given, *(one["logprob"] for one in told)]}
            elif "logprobs" in body:
                # As OpenAI's first wire has it, with the token that ends the answer among them.
                choice["logprobs"] = {
                    "tokens": [one["token"] for one in told],
                    "token_logprobs": [one["logprob"] for one in told],
                    "top_logprobs": [
                        {top["token"]: top["logprob"] for top in one["top_logprobs"]} for one in told
                    ],
                }
        usage = {
            "prompt_tokens": len(prompt),
            "completion_tokens": len(ids),
            "prompt_tokens_details": {"cached_tokens": cached},
        }
        return {"object": "completion", "model": self.model, "choices": [choice], "usage": usage}

    async def _ids(
        self, request: Any, body: Mapping[str, Any], prompt: list[int], most: int
    ) -> tuple[list[int], list[dict[str, Any]], str]:
        import torch

        from workers.engines.causal.sampling import forbid_here

        dice = torch.Generator().manual_seed(int(body.get("seed") or 0))
        grammar, matcher = self._constraint(body)
        ids: list[int] = []
        told = []
        likeliest = int(
            body["top_logprobs"] if "messages" in body and body.get("logprobs") else body.get("logprobs") or 0
        )
        while len(ids) < most:
            await asyncio.sleep(self.token_s)
            if await request.is_disconnected():
                self.abandoned += 1
                return ids, told, "stop"
            logp = plain = self.logp(prompt + ids)[-1]
            counts = torch.bincount(torch.tensor(ids, dtype=torch.long), minlength=len(logp))
            logp = logp - float(body.get("frequency_penalty") or 0) * counts
            logp = logp - float(body.get("presence_penalty") or 0) * (counts > 0)
            if top_k := int(body.get("top_k") or 0):
                logp = logp.masked_fill(logp < logp.topk(top_k).values[-1], -torch.inf)
            if "top_p" in body:
                ordered = logp.softmax(-1).sort(descending=True)
                before = ordered.values.cumsum(-1) - ordered.values
                logp = logp.index_fill(0, ordered.indices[before >= body["top_p"]], -torch.inf)
            if matcher is not None:
                allowed = logp.numpy().copy()
                forbid_here(allowed[None], [0], grammar.allowed([matcher]))
                logp = torch.from_numpy(allowed)
            if temperature := float(body.get("temperature") or 0):
                token = int(torch.multinomial((logp / temperature).softmax(-1), 1, generator=dice))
            else:
                token = int(logp.argmax())
            best = plain.topk(likeliest)
            told.append(
                {
                    "token": self.tokenizer.decode([token]),
                    "logprob": float(plain[token]),
                    "top_logprobs": [
                        {"token": self.tokenizer.decode([int(t)]), "logprob": float(p)}
                        for p, t in zip(best.values, best.indices, strict=True)
                    ],
                }
            )
            if matcher is not None:
                matcher.consume_token(token)
            if token == 2:
                return ids, told, "stop"
            ids.append(token)
            if matcher is not None and matcher.is_stopped():
                return ids, told, "stop"
            text = self.tokenizer.decode(ids)
            if any(stop in text for stop in body.get("stop") or ()):
                return ids, told, "stop"
        return ids, told, "length"

    def _constraint(self, body: Mapping[str, Any]) -> tuple[Any, Any]:
        if "response_format" not in body:
            return None, None
        from workers.engines.writers import Grammar

        grammar = Grammar((self.folder / "tokenizer.json").read_text("utf-8"), self.lm.config.vocab_size, [2])
        return grammar, grammar.matcher(body["response_format"]["json_schema"]["schema"])


@contextmanager
def serving(folder: Path, **options: Any) -> Iterator[TinyServer]:
    """A server on a free port of this machine, in a thread of its own, until the end of the block."""
    import uvicorn

    tiny = TinyServer(folder, **options)
    config = uvicorn.Config(tiny.app(), host="127.0.0.1", port=0, log_level="error")
    with in_a_thread(uvicorn.Server(config)) as url:
        tiny.url = f"{url}/v1"
        yield tiny


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
