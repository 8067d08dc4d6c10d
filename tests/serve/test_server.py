"""A server with tiny weights, asked by the official client."""

import asyncio
import contextlib
import json
import socket
import statistics
import threading
import time

import httpx
import openai
import pytest
import torch
import uvicorn

from nanochat.engine import Batch, Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.serve.answer import ServerSettings
from nanochat.serve.models import Models, Served
from nanochat.serve.protocol import ChatRequest
from nanochat.serve.scheduler import Scheduler
from nanochat.serve.server import create_app
from nanochat.serve.text import AnswerText
from nanochat.tokenizer import RustBPETokenizer

TOKENIZER = RustBPETokenizer.train_from_iterator(["the cat sat on the mat, 2 + 3 = 5 and café"] * 20, 300)
CONTEXT = 256


def tiny_engine():
    torch.set_num_threads(1)
    model = GPT(
        GPTConfig(
            sequence_len=CONTEXT, vocab_size=TOKENIZER.get_vocab_size(), n_layer=2, n_head=2, n_kv_head=1, n_embd=32
        )
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in model.parameters():
            param.normal_(0, 0.3, generator=generator)
    return Engine(model.eval(), TOKENIZER)


@contextlib.contextmanager
def serving(rows=16, waiting=300, stage="sft", **settings):
    """(address, models) of a server in a thread."""
    models = Models([torch.device("cpu")], rows, waiting)
    models.default = f"{stage}/tiny"
    models._loaded[models.default] = Served(models.default, stage, TOKENIZER, [Scheduler(tiny_engine(), rows, waiting)])
    models.names = lambda: [models.default]
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(create_app(models, ServerSettings(**settings)), log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}", models, server
    server.should_exit = True
    thread.join(timeout=30)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def address():
    with serving() as (address, _, _):
        yield address


@pytest.fixture(scope="module")
def base_address():
    with serving(stage="base") as (address, _, _):
        yield address


def client(address, key="none"):
    return openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0)


QUESTION = [{"role": "user", "content": "the cat?"}]


def test_the_official_client_gets_the_engines_answer(address):
    options = {"model": "tiny", "messages": QUESTION, "max_tokens": 20, "seed": 7}
    answer = client(address).chat.completions.create(**options, temperature=0, n=2)
    prompt = TOKENIZER.render_for_completion({"messages": QUESTION})
    (tokens, _), _ = tiny_engine().generate_batch(prompt, num_samples=2, max_tokens=20, temperature=0)
    text = AnswerText(TOKENIZER)
    parts = [*(part for token in tokens[len(prompt) :] for part in text.push(token)), *text.end()]
    wanted = "".join(part.text for part in parts if part.kind == "text")
    assert [choice.message.content for choice in answer.choices] == [wanted, wanted] and len(wanted) > 5
    assert answer.usage.prompt_tokens == len(prompt) and answer.usage.completion_tokens == 40
    assert {choice.finish_reason for choice in answer.choices} == {"length"}

    whole = client(address).chat.completions.create(**options, temperature=1.0)
    parts = list(client(address).chat.completions.create(**options, temperature=1.0, stream=True))
    text = "".join(part.choices[0].delta.content or "" for part in parts)
    assert text == whole.choices[0].message.content and parts[-1].choices[0].finish_reason == "length"
    last = list(client(address).chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert last[-1].usage.total_tokens == len(prompt) + 20


def test_logprobs_are_those_of_the_model(address):
    answer = client(address).chat.completions.create(
        model="tiny", messages=QUESTION, max_tokens=5, temperature=0, logprobs=True, top_logprobs=3
    )
    tokens = TOKENIZER.render_for_completion({"messages": QUESTION})
    model = tiny_engine().model
    for entry in answer.choices[0].logprobs.content:
        with torch.no_grad():
            logprobs = model(torch.tensor([tokens]))[0, -1].log_softmax(-1)
        top = logprobs.topk(3)
        assert entry.logprob == pytest.approx(top.values[0].item(), abs=1e-3)
        assert [one.logprob for one in entry.top_logprobs] == pytest.approx(top.values.tolist(), abs=1e-3)
        tokens.append(int(top.indices[0]))


def test_completions_models_health_and_metrics(base_address):
    api = client(base_address)
    answer = api.completions.create(model="x", prompt=["the", "the cat"], max_tokens=6, n=2, seed=1, logprobs=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3] and len(answer.choices[0].logprobs.tokens) <= 6
    streamed = list(api.completions.create(model="x", prompt="the", max_tokens=6, seed=1, stream=True))
    assert "".join(part.choices[0].text for part in streamed) == answer.choices[0].text
    assert [model.id for model in api.models.list()] == ["base/tiny"]
    assert httpx.get(f"{base_address}/health").json() == {"status": "ok", "model": "base/tiny"}
    lines = httpx.get(f"{base_address}/metrics").text
    assert 'nanochat_requests_total{path="/v1/completions",status="200"} 2.0' in lines
    with pytest.raises(openai.BadRequestError, match="knows no chat"):
        api.chat.completions.create(model="x", messages=QUESTION)


def test_stop_strings_end_the_text(address):
    options = {"model": "tiny", "messages": QUESTION, "max_tokens": 40, "temperature": 0}
    text = client(address).chat.completions.create(**options).choices[0].message.content
    stop = text[10:12]
    cut = client(address).chat.completions.create(**options, stop=[stop, "never this"]).choices[0]
    assert cut.message.content == text[: text.index(stop)] and cut.finish_reason == "stop"


def test_a_long_conversation_holds_nobody_up(address):
    """Leaving out one turn after another, 1,801 messages took the event loop 7.7 s, 0.04 s now."""
    texts = [("user", "the cat sat on the mat " * 20), ("assistant", "the mat " * 60)] * 900
    turns = [{"role": role, "content": text} for role, text in texts]
    system = {"role": "system", "content": "be good"}
    prompts = []
    for kept in ([*turns, *QUESTION], QUESTION):
        body = {"messages": [system, *kept], "max_tokens": 20, "temperature": 0}
        started = time.process_time()
        answer = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=60).json()
        assert time.process_time() - started < 4
        prompts.append((answer["usage"]["prompt_tokens"], answer["choices"][0]["message"]["content"]))
    assert prompts[0] == prompts[1]  # each of the turns is longer than the context: the system message stays
    turns[4]["role"] = "assistant"
    answer = httpx.post(f"{address}/v1/chat/completions", json={"messages": [*turns, *QUESTION]})
    assert answer.status_code == 400 and "message 4" in answer.json()["error"]["message"]


WRONG = [
    ({"messages": []}, "messages"),
    ({"messages": QUESTION, "temperature": 9}, "temperature"),
    ({"messages": QUESTION, "n": 0}, "n"),
    ({"messages": QUESTION, "top_p": 0}, "top_p"),
    ({"messages": QUESTION, "max_tokens": 0}, "max_tokens"),
    ({"messages": QUESTION, "stop": ["a"] * 5}, "stop"),
    ({"messages": QUESTION, "tools": [{"type": "function"}]}, "tools"),
    ({"messages": QUESTION, "frequency_penalty": 1}, "frequency_penalty"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "role"),
    ({"messages": [*QUESTION, *QUESTION]}, "take turns"),
    ({"messages": [{"role": "user", "content": "the cat " * 500}]}, "leave no room"),
    ({"messages": QUESTION, "max_tokens": CONTEXT * 4, "model": "sft/other"}, "sft/other"),
    ({}, "messages"),
    ([], ""),
]


@pytest.mark.parametrize(("body", "said"), WRONG)
def test_mistakes_are_one_line_in_the_protocols_shape(address, body, said):
    answer = httpx.post(f"{address}/v1/chat/completions", json=body)
    error = answer.json()["error"]
    assert answer.status_code in (400, 404) and said in error["message"] and "\n" not in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("options", "accepted"),
    [
        ({"tool_choice": "auto", "tools": [], "parallel_tool_calls": True, "functions": None}, True),
        ({"response_format": {"type": "text"}, "modalities": ["text"], "logit_bias": {}}, True),
        ({"tool_choice": "required"}, False),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, False),
        ({"response_format": {"type": "json_object"}}, False),
        ({"modalities": ["text", "audio"]}, False),
        ({"repetition_penalty": 1.1}, False),
    ],
)
def test_settings_are_refused_only_where_they_would_change_the_answer(options, accepted):
    request = {"messages": [{"role": "user", "content": "Hi"}], **options}
    with contextlib.nullcontext() if accepted else pytest.raises(ValueError, match="not supported by this server"):
        ChatRequest.model_validate(request)


def test_what_is_no_json_or_too_large(address):
    url = f"{address}/v1/chat/completions"
    for content in (b"{", b"\xff\xfe", b"[" * 100_000, b'{"messages": NaN}'):
        assert httpx.post(url, content=content, headers={"content-type": "application/json"}).status_code == 400
    assert httpx.post(url, content=b" " * 5_000_000).status_code == 413
    assert httpx.post(url, content=iter([b"{}"])).status_code == 411
    assert httpx.get(f"{address}/nothing").json()["error"]["type"] == "not_found_error"


def test_special_tokens_in_a_question_stay_text(address):
    tokens = client(address).chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "<|assistant_end|>"}], max_tokens=1
    )
    assert tokens.usage.prompt_tokens > 10  # spelt out, and not one token


def test_old_turns_are_left_out_whole(address):
    turns = [
        {"role": role, "content": "the cat sat on the mat " * 3} for _ in range(12) for role in ("user", "assistant")
    ]
    answer = client(address).chat.completions.create(model="tiny", messages=[*turns, *QUESTION], max_tokens=20)
    assert answer.usage.prompt_tokens <= CONTEXT - 20


def test_a_key_is_asked_for():
    with serving(api_key="secret") as (address, _, _):
        assert client(address, "secret").models.list().data
        with pytest.raises(openai.AuthenticationError, match="API key"):
            client(address, "wrong").models.list()
        assert httpx.get(f"{address}/health").status_code == 200


def test_too_many_are_told_to_come_back():
    with serving(rows=1, waiting=1) as (address, models, _):
        slow = {"model": "tiny", "messages": QUESTION, "max_tokens": 200, "temperature": 0}
        streams = [client(address).chat.completions.create(**slow, stream=True) for _ in range(2)]
        answer = httpx.post(f"{address}/v1/chat/completions", json=slow)
        assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
        for stream in streams:
            stream.close()  # clients that leave make room
        scheduler = models.loaded()[0].schedulers[0]
        deadline = time.monotonic() + 20
        while scheduler.load and time.monotonic() < deadline:
            time.sleep(0.02)
        assert scheduler.load == 0
        assert httpx.post(f"{address}/v1/chat/completions", json=slow, timeout=60).status_code == 200


def test_deadlines():
    with serving(deadline=0.05) as (address, _, _):
        body = {"messages": QUESTION, "max_tokens": 240, "temperature": 0}
        answer = httpx.post(f"{address}/v1/chat/completions", json=body)
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "deadline_exceeded"


def test_an_answer_is_written_before_the_first_request(monkeypatch):
    """On a GPU that compiles."""
    steps = []
    monkeypatch.setattr(Batch, "step", lambda batch, step=Batch.step: steps.append(step(batch)) or steps[-1])
    scheduler = Scheduler(tiny_engine(), 4, 4)
    assert steps and scheduler.load == 0 and not scheduler.batch.past
    scheduler.close()


def test_many_clients_at_once_are_not_mixed_up(address):
    async def run():
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0, timeout=120) as api:

            async def ask(seed):
                stream = await api.chat.completions.create(
                    model="tiny", messages=[{"role": "user", "content": f"the cat {seed % 5}"}], max_tokens=12,
                    seed=seed % 10, stream=True, temperature=1.0,
                )  # fmt: skip
                return "".join([part.choices[0].delta.content or "" async for part in stream])

            return await asyncio.gather(*(ask(seed) for seed in range(60)))

    texts = asyncio.run(run())
    for kind in range(10):
        assert len({texts[i] for i in range(kind, 60, 10)}) == 1
    assert len(set(texts)) > 5


@pytest.mark.slow
def test_two_hundred_streaming_clients_are_served_fairly():
    """None is lost, none mixed up. Places in the batch are given in the order in which requests came, so that the last
    of 200 equal answers takes about twice as long as the one in the middle, and none longer."""
    count, kinds, length = 200, 8, 16
    bodies = [
        {"messages": [{"role": "user", "content": f"the cat {i % kinds}"}], "seed": i % kinds, "temperature": 1.0,
         "max_tokens": length, "stream": True, "stream_options": {"include_usage": True}}
        for i in range(count)
    ]  # fmt: skip

    async def run(address):
        limits = httpx.Limits(max_connections=count)
        async with httpx.AsyncClient(base_url=address, timeout=300, limits=limits) as api:

            async def ask(body):
                started, times, events = time.monotonic(), [], []
                async with api.stream("POST", "/v1/chat/completions", json=body) as answer:
                    assert answer.status_code == 200
                    async for line in answer.aiter_lines():
                        if line.startswith("data: "):
                            times.append(time.monotonic() - started)
                            events.append(line.removeprefix("data: "))
                assert events.pop() == "[DONE]"
                return times[0], times[-1], [json.loads(event) for event in events]

            return await asyncio.gather(*map(ask, bodies))

    with serving(rows=32) as (address, models, _):
        answers = asyncio.run(run(address))
        alone = [httpx.post(f"{address}/v1/chat/completions", json=body | {"stream": False, "stream_options": None},
                            timeout=60).json() for body in bodies[:kinds]]  # fmt: skip
        assert models.loaded()[0].schedulers[0].load == 0
    for i, (_, _, events) in enumerate(answers):
        wanted = alone[i % kinds]
        text = "".join(choice["delta"].get("content", "") for event in events for choice in event["choices"])
        assert text == wanted["choices"][0]["message"]["content"]
        assert events[-1]["usage"] == wanted["usage"]
    assert len({one["choices"][0]["message"]["content"] for one in alone}) == kinds
    for waits in ([first for first, _, _ in answers], [last for _, last, _ in answers]):
        assert max(waits) < 3 * statistics.median(waits)


def test_a_stop_lets_streams_end_and_a_client_that_does_not_read_holds_nobody_up():
    with serving() as (address, _, server):
        host, port = address.removeprefix("http://").split(":")
        body = json.dumps({"messages": QUESTION, "max_tokens": 200, "temperature": 0, "stream": True})
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        with socket.create_connection((host, int(port))) as mute:
            mute.sendall((head + body).encode())
            stream = client(address).chat.completions.create(
                model="tiny", messages=QUESTION, max_tokens=100, temperature=0, stream=True
            )
            first = next(iter(stream))
            server.should_exit = True
            parts = [first, *stream]
            assert parts[-1].choices[0].finish_reason in ("length", "stop")


def test_the_page_may_load_nothing_else(address):
    answer = httpx.get(address)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert "sha256-" in policy
