"""Exports of small models with weights that are all at work."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat.config import Arch
from nanochat.gpt import GPT
from nanochat.tokenizer import RustBPETokenizer
from scripts.tok_eval import TEXTS
from tests.models import make_config

# name -> architecture and flags; `everything` has what the presets have not
ARCHS: dict[str, tuple[Arch, dict[str, Any]]] = {
    "nanochat": ("nanochat", {}),
    "speedrun": ("speedrun", {"long_window": 48, "short_window": 24}),
    "ngram": ("ngram", {"long_window": 48, "short_window": 24, "ngram_heads": 2, "attn_gate": True}),
    "everything": (
        "nanochat",
        {"window_pattern": "SL", "short_window": 16, "value_embeds": "gated", "ngram_embeds": 2, "key_offset": True}
        | {"smear": True, "backout": True, "mup_base_width": 32, "base_depth": 2, "scaled_logits": True},
    ),
}


def meta_of(model: GPT, tokenizer: RustBPETokenizer, **changes: Any) -> dict[str, Any]:
    """What a checkpoint's meta.json says."""
    settings, recipe = {"source": "pydocs", "depth": model.config.n_layer}, {"source": "pydocs", "max_seq_len": 64}
    about = {"stage": "sft", "tag": "m", "step": 7, "settings": settings, "recipe": recipe, "loop": {"epoch": 1}}
    return {**about, "tokenizer_hash": tokenizer.hash, "model_config": vars(model.config), **changes}


@pytest.fixture(scope="package")
def tokenizer() -> RustBPETokenizer:
    return RustBPETokenizer.train_from_iterator(iter(TEXTS.values()), 500)


@pytest.fixture(scope="package")
def make_model(tokenizer) -> Callable[..., GPT]:
    def make(name: str, *, n_layer: int = 4, n_embd: int = 64, head_dim: int = 16, sequence_len: int = 64) -> GPT:
        arch, flags = ARCHS[name]
        config = make_config(
            arch,
            n_layer=n_layer,
            n_embd=n_embd,
            head_dim=head_dim,
            vocab_size=tokenizer.get_vocab_size(),
            sequence_len=sequence_len,
            document_token=tokenizer.get_bos_token_id() if arch != "nanochat" else -1,
            **flags,
        )
        model = GPT(config).eval()
        model.init_weights(zero_proj=False, head_std=0.3)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(1)
            for parameter in model.parameters():  # what begins with zero or one is to be at work, too
                if parameter.ndim == 1 or not parameter.any():
                    parameter.add_(torch.empty_like(parameter).normal_(0, 0.3, generator=generator))
            model.lm_head.weight[tokenizer.get_bos_token_id() :] = 0.0  # answers go on and on
        return model

    return make


@pytest.fixture(scope="package")
def transformers(tmp_path_factory):
    """transformers, that keeps the code of exports in a folder of the tests."""
    module = pytest.importorskip("transformers", reason="transformers is not installed: `uv sync` brings it")
    import transformers.dynamic_module_utils as dynamic

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield module


@pytest.fixture(scope="package")
def exports(tokenizer, make_model, tmp_path_factory) -> Callable[[str], tuple[GPT, Path]]:
    """(model, folder of its export) of an architecture."""
    from nanochat.hf.export import export

    made: dict[str, tuple[GPT, Path]] = {}

    def find(name: str) -> tuple[GPT, Path]:
        if name not in made:
            model, folder = make_model(name), tmp_path_factory.mktemp("exports") / name
            export(model, tokenizer, meta_of(model, tokenizer, tag=name), folder)
            made[name] = model, folder
        return made[name]

    return find
