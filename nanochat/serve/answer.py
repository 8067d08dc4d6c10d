"""One request that is being answered."""

import asyncio
import contextlib
import json
import secrets
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from nanochat.engine import Sampling
from nanochat.serve.models import Served
from nanochat.serve.protocol import ApiError, ChatRequest, CompletionRequest
from nanochat.serve.scheduler import Busy, Event, Scheduler, Ticket
from nanochat.serve.text import AnswerText, Part

TEMPERATURE, TOP_K = 0.6, 50  # where a request says nothing, as in scripts.chat_cli
ANSWER_TOKENS = 512  # likewise


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """What the operator decides."""

    deadline: float = 300.0  # seconds that a request may take
    api_key: str | None = None  # what `Authorization: Bearer` must say; None: nothing
    retry_after: int = 1  # seconds, said with 429


class Metrics:
    """What /metrics shows."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "nanochat_requests", "Requests by path and status", ["path", "status"], registry=self.registry
        )
        self.tokens = Counter("nanochat_tokens", "Tokens read and written", ["kind"], registry=self.registry)
        self.seconds = Histogram(
            "nanochat_first_token_seconds", "Time from request to first token", registry=self.registry
        )
        self.rows = Gauge("nanochat_rows", "Samples that are decoded or wait", registry=self.registry)


class Answer:
    """One request that is being answered: its prompts, each with n samples, and the choices that come of them."""

    def __init__(
        self,
        served: Served,
        settings: ServerSettings,
        metrics: Metrics,
        body: ChatRequest | CompletionRequest,
        prompts: list[list[int]],
        room: int,
        is_chat: bool,
    ) -> None:
        self.served, self.settings, self.metrics, self.body = served, settings, metrics, body
        self.prompts, self.is_chat, self.count = prompts, is_chat, body.n or 1
        temperature = TEMPERATURE if body.temperature is None else body.temperature
        self.sampling = Sampling(
            num_samples=self.count,
            max_new_tokens=min(body.most_tokens or ANSWER_TOKENS, room),
            temperature=temperature,
            top_k=(TOP_K if body.top_k is None and body.top_p is None else body.top_k) or None,
            top_p=body.top_p,
            top_logprobs=body.most_logprobs,
        )
        self.id = f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created, self.started = int(time.time()), time.monotonic()
        self.written = 0

    async def respond(self, request: Request) -> Response:
        """Take it in, and answer: whole, or as it comes."""
        scheduler = self.served.scheduler()
        seed = secrets.randbits(62) if self.body.seed is None else self.body.seed
        tickets: list[Ticket] = []
        try:
            for i, prompt in enumerate(self.prompts):
                tickets.append(scheduler.submit(prompt, self.sampling, seed + i * self.count))
        except Busy:
            self._cancel(scheduler, tickets)
            raise ApiError(
                429, "too many requests wait; try again", Retry_After=str(self.settings.retry_after)
            ) from None
        if self.body.stream:
            return _Stream(self._lines(scheduler, tickets), self.settings.deadline)
        return await self._whole(request, scheduler, tickets)

    def _cancel(self, scheduler: Scheduler, tickets: list[Ticket]) -> None:
        for ticket in tickets:
            if not all(row.ended for row in ticket.rows):
                scheduler.cancel(ticket)

    async def _events(
        self, scheduler: Scheduler, tickets: list[Ticket]
    ) -> AsyncIterator[tuple[int, list[Part], Event, str | None]]:
        """(index of the choice, what its text gains, token, why it ended or None), of all choices as they come."""
        queue: asyncio.Queue[tuple[int, Event | None]] = asyncio.Queue()

        async def forward(number: int, ticket: Ticket) -> None:
            while True:
                await queue.put((number, await ticket.events.get()))

        tasks = [asyncio.create_task(forward(number, ticket)) for number, ticket in enumerate(tickets)]
        stops = self.served.tokenizer, self.body.stops
        texts = [AnswerText(*stops) for _ in range(len(tickets) * self.count)]
        going = set(range(len(texts)))
        stop_tokens = scheduler.engine.tools.stops
        try:
            while going:
                number, event = await queue.get()
                if event is None:
                    raise ApiError(503, "the model failed on this; try again", Retry_After="1")
                if self.written == 0:
                    self.metrics.seconds.observe(time.monotonic() - self.started)
                self.written += 1
                index = number * self.count + event.sample
                if index not in going:
                    continue
                is_stop = event.token in stop_tokens
                parts = [] if is_stop else texts[index].push(event.token)
                reason = "stop" if is_stop or texts[index].is_stopped else "length" if event.is_last else None
                if reason:
                    parts += texts[index].end()
                    going.remove(index)
                yield index, parts, event, reason
        finally:
            for task in tasks:
                task.cancel()
            self._cancel(scheduler, tickets)
            self.metrics.tokens.labels("prompt").inc(sum(map(len, self.prompts)))
            self.metrics.tokens.labels("completion").inc(self.written)

    async def _whole(self, request: Request, scheduler: Scheduler, tickets: list[Ticket]) -> Response:
        gather = asyncio.create_task(self._gather(scheduler, tickets))
        watch = asyncio.create_task(_until_gone(request))
        try:
            done, _ = await asyncio.wait(
                [gather, watch], timeout=self.settings.deadline, return_when=asyncio.FIRST_COMPLETED
            )
            if gather in done:
                return JSONResponse(gather.result())
            if watch in done:
                return Response(status_code=499)  # nobody reads it
            raise ApiError(
                503, f"no answer within {self.settings.deadline:g} s; ask for less", code="deadline_exceeded"
            )
        finally:
            gather.cancel()
            watch.cancel()
            await asyncio.gather(gather, watch, return_exceptions=True)

    async def _gather(self, scheduler: Scheduler, tickets: list[Ticket]) -> dict[str, Any]:
        count = len(tickets) * self.count
        parts: list[list[Part]] = [[] for _ in range(count)]
        scores: list[list[Any]] = [[] for _ in range(count)]
        reasons = [""] * count
        async for index, new, event, reason in self._events(scheduler, tickets):
            parts[index] += new
            if event.score is not None:
                scores[index].append(self._score(event))
            reasons[index] = reason or ""
        choices = []
        for index in range(count):
            text = "".join(part.text for part in parts[index] if part.kind == "text")
            choice: dict[str, Any] = {"index": index, "finish_reason": reasons[index]}
            choice["logprobs"] = self._logprobs(scores[index])
            if self.is_chat:
                choice["message"] = {"role": "assistant", "content": text, "refusal": None, **_calls(parts[index])}
            else:
                choice["text"] = text
            choices.append(choice)
        kind = "chat.completion" if self.is_chat else "text_completion"
        return self._envelope(kind, choices) | {"usage": self._usage()}

    async def _lines(self, scheduler: Scheduler, tickets: list[Ticket]) -> AsyncIterator[str]:
        """Server-sent events."""
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        include = bool(self.body.stream_options and self.body.stream_options.include_usage)
        begun = set()
        try:
            async for index, parts, event, reason in self._events(scheduler, tickets):
                text = "".join(part.text for part in parts if part.kind == "text")
                delta: dict[str, Any] = {"role": "assistant"} if index not in begun else {}
                begun.add(index)
                delta |= {"content": text} if text or delta else {}
                delta |= _calls(parts)
                choice: dict[str, Any] = {"index": index, "finish_reason": reason}
                choice["logprobs"] = self._logprobs([self._score(event)] if event.score is not None else [])
                choice |= {"delta": delta} if self.is_chat else {"text": text}
                if delta or reason or event.score is not None:
                    yield _line(self._envelope(kind, [choice]) | ({"usage": None} if include else {}))
            if include:
                yield _line(self._envelope(kind, []) | {"usage": self._usage()})
        except ApiError as error:
            yield _line(error.body)
        yield "data: [DONE]\n\n"

    def _envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.served.name}
        return {**head, "system_fingerprint": None, "choices": choices}

    def _usage(self) -> dict[str, int]:
        read = sum(map(len, self.prompts))
        return {"prompt_tokens": read, "completion_tokens": self.written, "total_tokens": read + self.written}

    def _score(self, event: Event) -> dict[str, Any]:
        def entry(token: int, logprob: float) -> dict[str, Any]:
            data = self.served.tokenizer.decode_bytes([token])
            return {"token": data.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(data)}

        assert event.score is not None
        likeliest = [entry(*pair) for pair in event.score.likeliest.items()]
        return {**entry(event.token, event.score.chosen), "top_logprobs": likeliest}

    def _logprobs(self, scores: list[dict[str, Any]]) -> dict[str, Any] | None:
        if self.body.most_logprobs is None:
            return None
        if self.is_chat:
            return {"content": scores, "refusal": None}
        return {
            "tokens": [score["token"] for score in scores],
            "token_logprobs": [score["logprob"] for score in scores],
            "top_logprobs": [{top["token"]: top["logprob"] for top in score["top_logprobs"]} for score in scores],
            "text_offset": [],
        }


class _Stream(StreamingResponse):
    """Server-sent events that end at the deadline, also where a client does not read them."""

    def __init__(self, lines: AsyncIterator[str], deadline: float) -> None:
        super().__init__(lines, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self.deadline = deadline

    async def __call__(self, *arguments: Any) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.deadline):
                await super().__call__(*arguments)


def _calls(parts: list[Part]) -> dict[str, Any]:
    """An extension of the protocol: calls of the calculator and their results, which are no text of the answer."""
    calls = [{"type": part.kind, "text": part.text} for part in parts if part.kind != "text"]
    return {"calculator": calls} if calls else {}


def _line(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


async def _until_gone(request: Request) -> None:
    """Returns when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
