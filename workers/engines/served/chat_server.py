"""One OpenAI-compatible server, asked politely: never more than it was agreed on, and slower when it says so.

Nothing that the server writes into an error is passed on: it may repeat a user's text.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import json
import logging
import random
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from motet.http import is_near
from motet.protocol.columns import CellError
from motet.protocol.logs import event
from workers.engines.served.refusals import ANSWER_LENGTH, CONTEXT_LENGTH, why

log = logging.getLogger(__name__)

#: Tries of one request where the server is busy or away; then the row is another worker's, or another hour's.
TRIES = 4
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
#: Seconds for an answer: a long one on a slow server takes minutes.
ANSWER_S = 600.0

UNAVAILABLE = CellError("unavailable", "the model's server is busy or away", retriable=True)
#: Parameters that hardly any server but some refuses without a name, in the order in which they are done without.
_RARE = ("chat_template_kwargs", "logprobs")
#: Parameters that mean nothing without each other.
_TOGETHER = {
    "logprobs": {"logprobs", "top_logprobs"},
    "top_logprobs": {"logprobs", "top_logprobs"},
    "stream": {"stream", "stream_options"},
}
#: A parameter that has a second name at some servers.
_OTHER_NAME = {"max_tokens": "max_completion_tokens"}
#: What to do about a task that needs a parameter which its server does not take.
_REMEDIES = {
    "temperature": "it takes no temperature but its own; set temperature=1 in the task",
    "seed": "it draws anew each time; leave seed out of the task",
}


class RequestRefused(Exception):
    """A request without an answer: ``cell`` says why, as the row's error.

    ``parameter``: the one that the server does not take; "" where it names none.
    """

    def __init__(self, cell: CellError, status: int = 0, parameter: str = "") -> None:
        super().__init__(cell.error)
        self.cell, self.status, self.parameter = cell, status, parameter


@dataclass(slots=True)
class Spending:
    """What the requests of one task consumed."""

    tokens_in: int = 0
    cached: int = 0
    tokens_out: int = 0
    seconds: float = 0.0

    def add(self, usage: object, seconds: float) -> None:
        told = usage if isinstance(usage, dict) else {}
        details = told.get("prompt_tokens_details")
        read = _count(told.get("prompt_tokens"))
        self.tokens_in += read
        self.cached += min(read, _count(details.get("cached_tokens") if isinstance(details, dict) else 0))
        self.tokens_out += _count(told.get("completion_tokens"))
        self.seconds += seconds


class ChatPieces:
    """A chat completion that comes in pieces, as server-sent events."""

    def __init__(self, told: Callable[[str], None]) -> None:
        self._told, self._finish, self._usage = told, "", None
        self._likelihoods: list[Any] | None = None
        self.came, self.text = False, ""

    def hear(self, line: str) -> None:
        """Take a line of the answer. One that cannot be read is passed over: then the answer has no end."""
        self.came = True
        try:
            piece = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
            self._usage = piece.get("usage") or self._usage
            for choice in piece.get("choices") or ():
                self._finish = choice.get("finish_reason") or self._finish
                if text := (choice.get("delta") or {}).get("content") or "":
                    self.text += text
                    self._told(text)
                if (likelihoods := (choice.get("logprobs") or {}).get("content")) is not None:
                    self._likelihoods = [*(self._likelihoods or ()), *likelihoods]
        except (ValueError, AttributeError, TypeError):
            return

    def whole(self) -> dict[str, Any] | None:
        """The answer as one that comes at once; None where it has no end."""
        if not self._finish:
            return None
        choice: dict[str, Any] = {"message": {"content": self.text}, "finish_reason": self._finish}
        if self._likelihoods is not None:
            choice["logprobs"] = {"content": self._likelihoods}
        return {"choices": [choice], "usage": self._usage}


class Gate:
    """Places for requests; urgent ones go first, others in the order of their coming."""

    def __init__(self, places: int) -> None:
        self.places, self._free = places, places
        self._waiting: list[tuple[bool, int, asyncio.Future[None]]] = []
        self._count = itertools.count()

    @property
    def taken(self) -> int:
        return self.places - self._free

    @asynccontextmanager
    async def place(self, *, urgent: bool) -> AsyncIterator[None]:
        if self._free:
            self._free -= 1
        else:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            heapq.heappush(self._waiting, (not urgent, next(self._count), turn))
            try:
                await turn
            except asyncio.CancelledError:
                # Its turn came and nobody is there to take it.
                if turn.done() and not turn.cancelled():
                    self._leave()
                raise
        try:
            yield
        finally:
            self._leave()

    def _leave(self) -> None:
        while self._waiting:
            turn = heapq.heappop(self._waiting)[2]
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1


@dataclass(slots=True)
class ChatServer:
    """Lives on one event loop. ``url`` ends where the routes of the API begin, mostly with /v1."""

    url: str
    model: str
    key: str = field(default="", repr=False)
    in_flight: int = 16
    #: The server tokenises chats and tells the likelihood of given tokens, as vLLM does; None: not known yet.
    scores: bool | None = None
    #: It takes ``response_format`` with a schema.
    constrains: bool = True
    #: Parameters of a chat that the server does not take, learned from its refusals, and those that it took.
    lacks: set[str] = field(default_factory=set)
    takes: set[str] = field(default_factory=set)
    #: Tokens for what its model thinks before it names a label, whatever it is told; 0 where it does not.
    thoughts: int = 0
    gate: Gate = field(init=False)
    _client: httpx.AsyncClient = field(init=False)
    #: Nothing is sent before, on the loop's clock: the server asked for a pause.
    _quiet_until: float = 0.0

    def __post_init__(self) -> None:
        self.gate = Gate(self.in_flight)
        self._client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {self.key}"} if self.key else {},
            timeout=httpx.Timeout(ANSWER_S, connect=10.0),
            limits=httpx.Limits(max_connections=self.in_flight, max_keepalive_connections=self.in_flight),
            trust_env=not is_near(self.url),
        )

    async def close(self) -> None:
        await self._client.aclose()

    async def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        spending: Spending,
        *,
        urgent: bool,
        spare: Collection[str] = (),
        told: Callable[[str], None] | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """The first choice of a chat completion. Raises RequestRefused. ``told``: takes its text while it is written.

        ``spare``: options without which the task's promise still holds. They are left out where the server does not
        take them. That is remembered once a request without them was answered: until then it is a guess.
        """
        lacks: set[str] = set()
        if told is not None:
            options |= {"stream": True, "stream_options": {"include_usage": True}}
            spare = {*spare, "stream", "stream_options"}
        while True:
            lacks |= self.lacks
            for name in lacks & options.keys() - _OTHER_NAME.keys() - set(spare):
                raise RequestRefused(_needed(name), 400, name)
            sent = {
                _OTHER_NAME.get(name, name) if name in lacks else name: value
                for name, value in options.items()
                if name not in lacks or name in _OTHER_NAME
            }
            body = {"model": self.model, "messages": list(messages), **sent}
            try:
                found = await self.post("/chat/completions", body, spending, urgent=urgent, told=told)
            except RequestRefused as refused:
                more = self._to_do_without(refused, sent, spare) & options.keys() - lacks
                if not more:
                    if refused.cell in (CONTEXT_LENGTH, ANSWER_LENGTH):
                        # It has read the parameters, and counted tokens.
                        self._remember(lacks, sent)
                    raise
                lacks |= more
                continue
            self._remember(lacks, sent)
            return _first(found)

    def _remember(self, lacks: set[str], sent: Mapping[str, Any]) -> None:
        for name in sorted(lacks - self.lacks):
            event(log, "the server takes no such parameter", parameter=name)
        self.lacks |= lacks
        self.takes |= sent.keys()

    def _to_do_without(
        self, refused: RequestRefused, sent: Mapping[str, Any], spare: Collection[str]
    ) -> set[str]:
        """The parameters without which a refused request may be answered; none where there is no such hope."""
        name = refused.parameter
        if not name and refused.status in (400, 422) and refused.cell not in (CONTEXT_LENGTH, ANSWER_LENGTH):
            name = next((n for n in _RARE if n in spare and n in sent and n not in self.takes), "")
        # Whether a schema can be told in words instead is for the caller to say.
        return set() if name in ("", "response_format") else _TOGETHER.get(name, {name})

    async def complete(
        self, prompt: Sequence[int] | str, spending: Spending, *, urgent: bool, **options: Any
    ) -> dict[str, Any]:
        """The first choice of a completion of these tokens, or of this text. Raises RequestRefused."""
        asked = prompt if isinstance(prompt, str) else list(prompt)
        body = {"model": self.model, "prompt": asked, **options}
        return _first(await self.post("/completions", body, spending, urgent=urgent))

    async def tokens(self, *, urgent: bool, **what: Any) -> list[int]:
        """Ids of a chat or a text, as vLLM tells them. Raises RequestRefused: with status 404 where it cannot tell."""
        body = {"model": self.model, **what}
        found = await self.post("/tokenize", body, Spending(), urgent=urgent, root=True)
        ids = found.get("tokens")
        if not isinstance(ids, list) or not all(type(one) is int for one in ids):
            raise RequestRefused(CellError("refused", "the server does not tokenise chats"), 404)
        return ids

    async def post(
        self,
        path: str,
        body: Mapping[str, Any],
        spending: Spending,
        *,
        urgent: bool,
        root: bool = False,
        told: Callable[[str], None] | None = None,
    ) -> dict[str, Any]:
        """The answer's JSON. Raises RequestRefused: with the row's error, or, after some tries, with a retriable one.

        ``told``: takes the text of an answer that comes in pieces. Once it has some of it, nothing is tried again.
        """
        url = (self.url.removesuffix("/v1") if root else self.url) + path
        heard = ChatPieces(told) if told is not None else None
        async with self.gate.place(urgent=urgent):
            for attempt in range(TRIES):
                await self._silence()
                beside = self.gate.taken
                began = asyncio.get_running_loop().time()
                try:
                    answer = await self._asked(url, body, heard)
                except httpx.HTTPError:
                    if heard is not None and heard.text:
                        break
                    await self._pause(attempt, None)
                    continue
                if answer.status_code in (408, 429) or answer.status_code >= 500:
                    await self._pause(attempt, answer.headers.get("Retry-After"))
                    continue
                if not answer.is_success:
                    cell, parameter = why(answer.status_code, answer.text, body)
                    raise RequestRefused(cell, answer.status_code, parameter)
                found = heard.whole() if heard is not None and heard.came else _object(answer)
                if found is None and heard is not None and heard.text:
                    break
                if found is None:
                    await self._pause(attempt, None)
                    continue
                # Its share of the server, which ran the others beside it.
                took = asyncio.get_running_loop().time() - began
                spending.add(found.get("usage"), took / max(1, beside))
                return found
        raise RequestRefused(UNAVAILABLE)

    async def _asked(self, url: str, body: Mapping[str, Any], heard: ChatPieces | None) -> httpx.Response:
        if heard is None:
            return await self._client.post(url, json=body)
        async with self._client.stream("POST", url, json=body) as answer:
            if answer.is_success and "text/event-stream" in answer.headers.get("Content-Type", ""):
                async for line in answer.aiter_lines():
                    heard.hear(line)
            else:
                await answer.aread()
            return answer

    async def _silence(self) -> None:
        while (wait := self._quiet_until - asyncio.get_running_loop().time()) > 0:
            await asyncio.sleep(wait)

    async def _pause(self, attempt: int, retry_after: str | None) -> None:
        """Wait longer each time, not all at once, and everybody where the server names a time."""
        if attempt + 1 >= TRIES:
            return
        if retry_after is not None and (asked := _seconds(retry_after)) is not None:
            until = asyncio.get_running_loop().time() + min(asked, LONGEST_PAUSE_S)
            self._quiet_until = max(self._quiet_until, until)
            return
        longest = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**attempt)
        await asyncio.sleep(longest * random.uniform(0.5, 1.0))


def _needed(parameter: str) -> CellError:
    """The row's error where its task needs a parameter that the server does not take."""
    remedy = _REMEDIES.get(parameter, "choose another model")
    return CellError(
        "refused", f"the model's server does not take {parameter} as the task needs it: {remedy}"
    )


def _object(answer: httpx.Response) -> dict[str, Any] | None:
    try:
        found = answer.json()
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _first(found: Mapping[str, Any]) -> dict[str, Any]:
    choices = found.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise RequestRefused(CellError("engine", "the server's answer holds no choice", retriable=True))
    return choices[0]


def _count(value: object) -> int:
    return value if isinstance(value, int) and 0 <= value < 1 << 31 else 0


def _seconds(text: str) -> float | None:
    """Retry-After in seconds. A date is passed over: the clocks of two machines differ."""
    try:
        return max(0.0, float(text))
    except ValueError:
        return None
