"""A checkpoint as a folder that transformers loads.

config.json                       what transformers is to build: its own `nanochat` where the architecture is the
                                  classic, else the file below (`trust_remote_code=True`)
modeling_nanochat_gpt.py          our own model in one file; not for the classic
model.safetensors                 the weights
generation_config.json            greedy; ends where our engine does
tokenizer.json, tokenizer_config.json, chat_template.jinja
README.md                         the model card, filled from the report
nanochat.json                     what importing needs to make the same checkpoint again
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nanochat.chat_format import CHAT_TEMPLATE, tokenizer_config
from nanochat.config import GPTConfig
from nanochat.errors import UserError
from nanochat.files import atomic_write, fields, parse_json, save_tensors
from nanochat.gpt import GPT
from nanochat.hf.card import model_card
from nanochat.hf.names import classic_settings, is_classic, sizes, weight_name
from nanochat.hf.one_file import one_file
from nanochat.paths import report_dir
from nanochat.tokenizer import RustBPETokenizer, huggingface_json

OWN_TYPE, OWN_FILE = "nanochat_gpt", "modeling_nanochat_gpt"
ABOUT = "nanochat.json"
KEPT = ("stage", "tag", "step", "tokenizer_hash", "model_config", "settings", "recipe")  # of a checkpoint's meta.json
# Training on GPUs has kernels of its own, which the model's file does without.
KERNELS = ("EIGHT_BITS", "head_loss", "block_mask", "Norm", "ReluSquared", "FusedMLP", "rotated_norm", "TRITON")
REPLACED = {
    **{name: f"{name}: Any = None  # a kernel for training on GPUs" for name in KERNELS},
    "_learns_on_gpu": "def _learns_on_gpu(x: Tensor) -> bool:\n    return False  # no kernels for that here",
}


def export(
    model: GPT,
    tokenizer: RustBPETokenizer,
    meta: Mapping[str, Any],
    out: Path,
    *,
    dtype: torch.dtype = torch.float32,
    report: Mapping[str, Any] | None = None,
) -> None:
    """Write the folder `out`, which must not hold anything yet. report: report.json of the run, for the card. Raises
    UserError where `out` is taken."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already: remove it, or choose another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    about = {"format": 1, **{name: meta[name] for name in KEPT}}
    config = model_settings(model.config, tokenizer, dtype)
    ranks, specials = dict(tokenizer.get_mergeable_ranks()), tokenizer.get_special_tokens()
    texts = {
        "config.json": _json(config),
        "generation_config.json": _json(generation_settings(tokenizer)),
        "tokenizer.json": huggingface_json(ranks, tokenizer.get_pattern(), specials),
        "tokenizer_config.json": _json(tokenizer_settings(model.config, tokenizer)),
        "chat_template.jinja": CHAT_TEMPLATE,
        ABOUT: _json({**about, **{name: without_folders(about[name]) for name in ("settings", "recipe")}}),
        "README.md": model_card(model, about, report or {}),
    }
    if config["model_type"] == OWN_TYPE:
        texts[f"{OWN_FILE}.py"] = one_file(f"nanochat.hf.{OWN_FILE}", REPLACED)
    with atomic_write(out) as folder:
        folder.mkdir()
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        weights = {name: tensor.detach().to(dtype).contiguous() for name, tensor in exported(model).items()}
        save_tensors(weights, folder / "model.safetensors")


def without_folders(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with the names alone of text folders (`source`) and of files of conversations (`tasks`): where they lie
    on a disk is nobody's business once an export is public."""
    shown = dict(settings)
    if (source := str(settings.get("source"))).startswith("local:"):
        shown["source"] = f"local:{Path(source).name}"
    if "tasks" in settings:
        shown["tasks"] = re.sub(r"[^,|]*/(?=[^/,|]*\.jsonl)", "", settings["tasks"])
    return shown


def exported(model: GPT) -> dict[str, torch.Tensor]:
    """The weights under the names that they have in transformers."""
    own = not is_classic(model.config)
    return {f"model.{name}" if own else weight_name(name): tensor for name, tensor in model.state_dict().items()}


def model_settings(config: GPTConfig, tokenizer: RustBPETokenizer, dtype: torch.dtype) -> dict[str, Any]:
    """What config.json says."""
    ends = end_tokens(tokenizer)
    common = {
        "bos_token_id": tokenizer.get_bos_token_id(),
        "eos_token_id": ends[0],
        "pad_token_id": None,  # transformers would never train the embedding of the token that pads
        "dtype": str(dtype).removeprefix("torch."),
    }
    if is_classic(config):
        own = {"architectures": ["NanoChatForCausalLM"], "model_type": "nanochat", **classic_settings(config)}
        return {**own, **common}
    classes = {"AutoConfig": "NanochatGPTConfig", "AutoModelForCausalLM": "NanochatGPTForCausalLM"}
    return {
        "architectures": ["AutoModelForCausalLM"],  # `transformers serve` looks this name up in transformers itself
        "model_type": OWN_TYPE,
        "auto_map": {name: f"{OWN_FILE}.{found}" for name, found in classes.items()},
        "gpt": vars(config),
        **sizes(config),
        "tie_word_embeddings": False,
        **common,
    }


def end_tokens(tokenizer: RustBPETokenizer) -> list[int]:
    """What ends an answer, as in nanochat.engine."""
    return [tokenizer.encode_special("<|assistant_end|>"), tokenizer.get_bos_token_id()]


def generation_settings(tokenizer: RustBPETokenizer) -> dict[str, Any]:
    bos = tokenizer.get_bos_token_id()
    return {"bos_token_id": bos, "eos_token_id": end_tokens(tokenizer), "pad_token_id": bos, "do_sample": False}


def tokenizer_settings(config: GPTConfig, tokenizer: RustBPETokenizer) -> dict[str, Any]:
    """As in a tokenizer folder, and what batches need. The token that pads is <|bos|>: were it <|assistant_end|>, whose
    loss transformers' collators would leave out then, a model tuned with them would never learn to stop."""
    settings: dict[str, Any] = json.loads(tokenizer_config(tokenizer.get_special_tokens()))
    del settings["chat_template"]  # has a file of its own
    return {**settings, "pad_token": "<|bos|>", "padding_side": "left", "model_max_length": config.sequence_len}


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def read_report() -> dict[str, Any]:
    """report.json of the report that was made last; empty without one. Raises UserError where it is damaged."""
    path = report_dir() / "report.json"
    if not path.exists():
        return {}
    try:
        report: dict[str, Any] = parse_json(path.read_bytes())
        fields(report, run=str, sections=list, summary=dict, hardware=dict)
        return report
    except (ValueError, UserError) as error:
        raise UserError(
            f"{path} is damaged ({error}): remove it, or run `python -m nanochat.report generate`"
        ) from None
