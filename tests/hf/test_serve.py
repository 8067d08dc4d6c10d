"""`transformers serve` on an export says what our server says."""

import contextlib
import socket
import time

import httpx
import pytest
import torch
from starlette.testclient import TestClient

from nanochat.paths import checkpoint_dir, tokenizer_dir
from nanochat.serve.answer import ServerSettings
from nanochat.serve.models import Models
from nanochat.serve.server import create_app
from tests.checkpoints import save_checkpoint
from tests.hf.conftest import meta_of

QUESTIONS = ["What is it?", "it's  12345 the naïve\n\nend", " "]


@contextlib.contextmanager
def theirs(folder):
    """Address of transformers' own server."""
    from transformers.utils.import_utils import is_serve_available

    pytest.importorskip("accelerate", reason="accelerate is not installed: the extra `eval` brings it")
    if not is_serve_available():
        pytest.skip("the packages of transformers[serving] are not installed")
    from transformers.cli.serve import Serve

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    serve = Serve(str(folder), host="127.0.0.1", port=port, device="cpu", trust_remote_code=True, non_blocking=True)
    try:
        while not serve.server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.kill_server()


@pytest.mark.parametrize("name", ["nanochat", "everything"])
def test_the_same_answers(name, exports, tokenizer, store, transformers):
    model, folder = exports(name)
    tokenizer.save(tokenizer_dir())
    save_checkpoint(checkpoint_dir("sft", "m"), 7, model, None, meta_of(model, tokenizer))
    models = Models([torch.device("cpu")], 4, 16)
    models.add("sft", "m", None)

    def body(question: str) -> dict:
        messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": question}]
        return {"model": str(folder), "messages": messages, "temperature": 0, "max_tokens": 20}

    with theirs(folder) as address, TestClient(create_app(models, ServerSettings())) as ours:
        for question in QUESTIONS:
            wanted = ours.post("/v1/chat/completions", json={**body(question), "model": "m"})
            found = httpx.post(f"{address}/v1/chat/completions", json=body(question), timeout=120)
            assert wanted.status_code == found.status_code == 200, (wanted.text, found.text)
            texts = [answer.json()["choices"][0]["message"]["content"] for answer in (wanted, found)]
            assert texts[0] == texts[1] and len(texts[0]) > 5
            usages = [answer.json()["usage"] for answer in (wanted, found)]
            for count in ("prompt_tokens", "completion_tokens"):
                assert usages[0][count] == usages[1][count]
