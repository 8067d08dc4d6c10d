"""Names, signatures and fields that notebooks and outside test suites rely on: no move inside the tree may lose one."""

import dataclasses
import inspect
from types import SimpleNamespace

import pytest
import torch

from nanochat import common, engine, execution, gpt, optim, tokenizer
from nanochat.tasks.common import Task, TaskMixture, render_mc
from tests.models import make_config

SIGNATURES = {
    gpt.GPT.setup_optimizer: "matrix_lr embedding_lr unembedding_lr weight_decay use_mup base_width",
    engine.Engine: "model tokenizer",
    engine.Engine.generate: "tokens num_samples max_tokens temperature top_k seed",
    engine.KVCache: "batch_size num_heads seq_len head_dim num_layers device dtype",
    tokenizer.RustBPETokenizer.train_from_iterator: "iterator vocab_size",
    tokenizer.RustBPETokenizer.encode: "text prepend append num_threads",
    tokenizer.RustBPETokenizer.render_conversation: "conversation max_tokens",
    execution.execute_code: "code timeout maximum_memory_bytes",
    optim.MuonAdamW: "param_groups",
    render_mc: "question letters choices",
}
MEMBERS = {
    common: "get_base_dir print0 compute_init compute_cleanup get_dist_info",
    engine.Engine: "generate_batch",
    engine.KVCache: "advance get_pos reset get_layer_cache prefill",
    tokenizer: "SPECIAL_TOKENS get_tokenizer get_token_bytes",
    tokenizer.RustBPETokenizer: "decode encode_special render_for_completion",
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__qualname__)
def test_parameters_keep_their_names(function):
    assert [*SIGNATURES[function].split()] == [
        name for name in inspect.signature(function).parameters if name in SIGNATURES[function].split()
    ]


@pytest.mark.parametrize("owner", MEMBERS, ids=lambda owner: owner.__name__)
def test_members_are_there(owner):
    assert [name for name in MEMBERS[owner].split() if not hasattr(owner, name)] == []


def test_config_and_results_keep_their_fields():
    fields = {field.name for field in dataclasses.fields(gpt.GPTConfig)}
    expected = "sequence_len vocab_size n_layer n_head n_kv_head n_embd window_pattern mup_base_width"
    assert set(expected.split()) <= fields
    fields = {field.name for field in dataclasses.fields(execution.ExecutionResult)}
    assert {"success", "stdout", "stderr", "error", "timeout", "memory_exceeded"} <= fields


def test_modules_of_the_model_keep_their_places():
    model = gpt.GPT(make_config(n_layer=2, n_embd=32, head_dim=16, vocab_size=64, sequence_len=8))
    model.init_weights()
    block = model.transformer.h[0]
    for module in (model.transformer.wte, model.lm_head, block.attn.c_proj, block.mlp.c_proj):
        assert isinstance(module, torch.nn.Module)
    tokens = torch.zeros(1, 8, dtype=torch.long)
    assert model(tokens, tokens).dim() == 0
    assert model(tokens).shape[:2] == (1, 8)


def test_a_categorical_question_is_rendered_alone():
    assert render_mc("2 + 2?", ("A", "B"), ("4", "5")) == (
        "Multiple Choice question: 2 + 2?\n- 4=A\n- 5=B\n\nRespond only with the letter of the correct answer."
    )
    assert issubclass(TaskMixture, Task)


def test_a_cache_keeps_its_tensors():
    cache = engine.KVCache(3, 2, 8, 16, 4, torch.device("cpu"), torch.float32)
    assert cache.k_cache.shape == cache.v_cache.shape == (4, 3, 8, 2, 16)
    assert cache.cache_seqlens.shape == (3,)


class Uniform:
    """As little of a model as outside tests bring along: its shape, its device, and logits that say nothing."""

    config = SimpleNamespace(n_layer=1, n_head=1, n_kv_head=1, n_embd=8, sequence_len=32)

    def get_device(self):
        return torch.device("cpu")

    def forward(self, ids, kv_cache):
        kv_cache.advance(ids.size(1))
        return torch.zeros(*ids.shape, 300)


class Bytes:
    specials = (
        "<|python_start|>",
        "<|python_end|>",
        "<|output_start|>",
        "<|output_end|>",
        "<|assistant_end|>",
        "<|bos|>",
    )

    def encode_special(self, name):
        return 256 + self.specials.index(name)


def test_the_engine_takes_a_stand_in_of_a_model():
    columns = list(engine.Engine(Uniform(), Bytes()).generate([261, 65], num_samples=4, max_tokens=5, seed=3))
    assert len(columns) <= 5
    assert all(len(tokens) == len(mask) == 4 for tokens, mask in columns)
    assert len(set(columns[0][0])) > 1  # the first token is not shared
