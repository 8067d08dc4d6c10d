"""What requests may say, and the shape of errors: the part of the OpenAI API that one model can answer."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MOST_SAMPLES = 16
MOST_CHARACTERS = 1_000_000  # of a request's texts together
Text = Annotated[str, Field(max_length=MOST_CHARACTERS)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]

# What clients send though it asks for nothing: settings that would change the answer, at values that change none.
NEUTRAL: dict[str, list[Any]] = {
    "tool_choice": ["auto", "none"],
    "function_call": ["auto", "none"],
    "parallel_tool_calls": [True],
    "response_format": [{"type": "text"}],
    "modalities": [["text"]],
    "repetition_penalty": [1],
}


class ApiError(Exception):
    """An answer of another kind than 200, in the protocol's shape."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None, **headers: str):
        super().__init__(message)
        self.status, self.headers = status, {name.replace("_", "-"): value for name, value in headers.items()}
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Options(BaseModel):
    """What both kinds of requests have. Settings that would change the answer and are not known here are refused; what
    only names or routes a request is let through."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: Annotated[str, Field(max_length=256)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_SAMPLES)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: "StreamOptions | None" = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None

    @model_validator(mode="after")
    def _known(self) -> "Options":
        harmless = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "best_of"}
        extra = {name: value for name, value in (self.model_extra or {}).items() if value and name not in harmless}
        unknown = sorted(name for name, value in extra.items() if value not in NEUTRAL.get(name, []))
        if unknown:
            raise ValueError(f"{', '.join(unknown)[:200]}: not supported by this server")
        return self

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class StreamOptions(BaseModel):
    include_usage: bool | None = None


class TextPart(BaseModel):
    type: Literal["text"]
    text: Text


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(max_length=1000)]

    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(Options):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Message], Field(min_length=1, max_length=2000)]
    max_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def most_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def most_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Options):
    """POST /v1/completions"""

    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=MOST_SAMPLES)] = ""
    max_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Literal[False] | None = None

    @property
    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens

    @property
    def most_logprobs(self) -> int | None:
        return self.logprobs


def validation_message(errors: list[Any]) -> tuple[str, str | None]:
    """(one line, name of the field) of the first of pydantic's complaints."""
    first = errors[0]
    path = ".".join(str(part) for part in first["loc"] if part != "body")
    return (f"{path}: {first['msg']}" if path else first["msg"])[:500], path or None
