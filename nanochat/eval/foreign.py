"""Models of Hugging Face folders, graded by the same evaluator as ours. Needs the package transformers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nanochat.errors import UserError
from nanochat.runtime import compute_dtype

LONGEST = 2048  # tokens of a prompt, as of our own models, where the model has no fewer positions


class ForeignTokenizer:
    """What the evaluator asks of a tokenizer."""

    def __init__(self, tokenizer: Any, bos: int) -> None:
        self.tokenizer, self.bos = tokenizer, bos

    def get_bos_token_id(self) -> int:
        return self.bos

    def encode(self, text: list[str], prepend: int) -> list[list[int]]:
        found = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # long ones are cut later
        return [[prepend, *ids] for ids in found]


def load(
    path: Path, device: torch.device, trust: bool
) -> tuple[Callable[[torch.Tensor], torch.Tensor], ForeignTokenizer, int]:
    """(model: idx -> logits, tokenizer, longest prompt in tokens). trust: run code that lies in the folder."""
    path = path.expanduser()
    if not (path / "config.json").is_file():
        raise UserError(
            f"--hf-path={path}: no config.json in it; name the folder of a model that Transformers can load"
        )
    try:
        import transformers
    except ImportError:
        raise UserError(
            f"--hf-path={path}: needs the package transformers; install it, as `pip install transformers`"
        ) from None
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **options)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(path, **options)
    except Exception as error:  # each part of a damaged folder has errors of its own, some derived from nothing else
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if "trust_remote_code" in reason:
            reason = "it brings code of its own; read that, then add --trust-remote-code"
        raise UserError(f"--hf-path={path} cannot be loaded: {reason}") from None
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if bos is None:
        raise UserError(f"--hf-path={path}: its tokenizer has neither a BOS nor an EOS token to begin prompts with")
    model.to(device=device, dtype=compute_dtype(device)).eval()
    positions = getattr(model.config, "max_position_embeddings", None) or LONGEST
    return (
        lambda idx: model(input_ids=idx, use_cache=False).logits,
        ForeignTokenizer(tokenizer, bos),
        min(positions, LONGEST),
    )
