"""The HTTP side: requests in the protocol of the OpenAI API, answers whole or as they come."""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import itertools
import re
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from prometheus_client import generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanochat.errors import UserError
from nanochat.serve.answer import ANSWER_TOKENS, Answer, Metrics, ServerSettings
from nanochat.serve.models import Models, Served
from nanochat.serve.protocol import ApiError, ChatRequest, CompletionRequest, validation_message
from nanochat.serve.text import newest_turns
from nanochat.tokenizer import repaired

MOST_BYTES = 4_000_000  # of a request's body
PAGE = Path(__file__).with_name("ui.html")


def create_app(models: Models, settings: ServerSettings | None = None) -> FastAPI:
    """The application. It closes `models` when it ends."""
    settings = settings or ServerSettings()
    metrics = Metrics()

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(models.close)

    app = FastAPI(title="nanochat", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(Guard, settings=settings, metrics=metrics)
    statuses, error = (400, 401, 404, 411, 413, 429, 503), {"description": "An error, in the protocol's shape"}
    errors: dict[int | str, dict[str, Any]] = dict.fromkeys(statuses, error)
    answers = errors | {200: {"content": {"text/event-stream": {}}}}  # beside JSON, of what is streamed

    @app.exception_handler(ApiError)
    async def on_api_error(_: Request, error: ApiError) -> Response:
        return _error_response(error)

    @app.exception_handler(RequestValidationError)
    async def on_invalid(_: Request, error: RequestValidationError) -> Response:
        message, param = validation_message(list(error.errors()))
        return _error_response(ApiError(400, message, param=param))

    @app.exception_handler(404)
    async def on_unknown(request: Request, _: Exception) -> Response:
        return _error_response(ApiError(404, f"{request.url.path[:100]}: no such path"))

    @app.post("/v1/chat/completions", responses=answers)
    async def chat(body: ChatRequest, request: Request) -> Response:
        served = await _model(models, body.model)
        if served.stage == "base":
            raise ApiError(
                400, f"{served.name} is a base model, which knows no chat: use /v1/completions", param="model"
            )
        prompt, room = _chat_prompt(served, body)
        answer = Answer(served, settings, metrics, body, [prompt], room, is_chat=True)
        return await answer.respond(request)

    @app.post("/v1/completions", responses=answers)
    async def complete(body: CompletionRequest, request: Request) -> Response:
        served = await _model(models, body.model)
        bos = served.tokenizer.get_bos_token_id()
        prompts = [[bos, *served.tokenizer.encode_ordinary(repaired(text))] for text in body.prompts]
        room = served.context - max(map(len, prompts))
        if room < 1:
            raise _too_long(max(map(len, prompts)), served.context, "prompt")
        answer = Answer(served, settings, metrics, body, prompts, room, is_chat=False)
        return await answer.respond(request)

    @app.get("/v1/models", responses=errors)
    async def list_all() -> dict[str, Any]:
        names = await asyncio.to_thread(models.names)
        entries = [{"id": name, "object": "model", "created": 0, "owned_by": "nanochat"} for name in names]
        return {"object": "list", "data": entries}

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok", "model": models.default}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def show_metrics() -> Response:
        metrics.rows.set(sum(scheduler.load for served in models.loaded() for scheduler in served.schedulers))
        return PlainTextResponse(generate_latest(metrics.registry), media_type="text/plain; version=0.0.4")

    page = PAGE.read_text(encoding="utf-8")
    policy = content_security_policy(page)

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        headers = {
            "Content-Security-Policy": policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
        }
        return HTMLResponse(page, headers=headers)

    return app


def content_security_policy(page: str) -> str:
    """Lets the page run its own script and style, by their hashes, and talk to this server: nothing else."""

    def hashes(tag: str) -> str:
        blocks = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(block.encode()).digest()).decode() for block in blocks]
        return " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


class Guard:
    """Refuses what is too large or has no key, before anything is read, and counts requests."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, metrics: Metrics) -> None:
        self.app, self.settings, self.metrics = app, settings, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = scope.get("route")
                self.metrics.requests.labels(route.path if route else "other", message["status"]).inc()
            await send(message)

        try:
            self._check(Request(scope))
        except ApiError as error:
            await _error_response(error)(scope, receive, counted)
        else:
            await self.app(scope, receive, counted)

    def _check(self, request: Request) -> None:
        key = self.settings.api_key
        if key is not None and request.url.path.startswith("/v1/"):
            given = request.headers.get("authorization", "")
            if not hmac.compare_digest(given.encode(), f"Bearer {key}".encode()):
                message = "wrong or missing API key: send `Authorization: Bearer KEY`"
                raise ApiError(401, message, WWW_Authenticate="Bearer")
        if request.method == "POST":
            length = request.headers.get("content-length", "")
            if not length.isdecimal():
                raise ApiError(411, "a request needs a Content-Length")
            if int(length) > MOST_BYTES:
                raise ApiError(413, f"the request has {int(length):,} bytes; at most {MOST_BYTES:,} are read")


def _error_response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body, error.status, headers=error.headers)


def _too_long(length: int, context: int, param: str) -> ApiError:
    message = f"{length:,} tokens leave no room for an answer in the model's context of {context:,}: shorten them"
    return ApiError(400, message, code="context_length_exceeded", param=param)


async def _model(models: Models, name: str | None) -> Served:
    try:
        return await models.get(name)
    except UserError as error:
        raise ApiError(404, str(error), code="model_not_found", param="model") from None


def _chat_prompt(served: Served, body: ChatRequest) -> tuple[list[int], int]:
    """(tokens, room for an answer). The oldest turns are left out, whole, where they and an answer do not fit."""
    roles = {"developer": "system"}
    messages = [{"role": roles.get(m.role, m.role), "content": m.text()} for m in body.messages]
    system, messages = (messages[:1], messages[1:]) if messages[0]["role"] == "system" else ([], messages)
    if messages and messages[-1]["role"] == "assistant":
        raise ApiError(400, "messages: the last must be the user's", param="messages")
    wanted = min(body.most_tokens or ANSWER_TOKENS, served.context // 2)

    def rendered(turns: Sequence[Any]) -> list[int]:
        try:
            return served.tokenizer.render_for_completion({"messages": [*system, *itertools.chain(*turns)]})
        except UserError as error:
            raise ApiError(400, f"messages: {error}", param="messages") from None

    prompt = rendered([messages])  # all of them, so that a mistake in what is left out is said, too
    if len(prompt) + wanted > served.context:
        pairs = [messages[i : i + 2] for i in range(0, len(messages), 2)]  # the last has the question only
        kept = newest_turns(pairs[:-1], lambda turns: len(rendered([*turns, pairs[-1]])), served.context - wanted)
        prompt = rendered([*kept, pairs[-1]])
    room = served.context - len(prompt)
    if room < (1 if body.most_tokens is None else wanted):
        raise _too_long(len(prompt), served.context, "messages")
    return prompt, room
