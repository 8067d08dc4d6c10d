"""Small models for tests."""

from typing import Any

from nanochat.config import Arch, ArchFlags, GPTConfig, build_config, resolve


def make_config(
    arch: Arch = "nanochat",
    *,
    n_layer: int,
    n_embd: int,
    head_dim: int,
    vocab_size: int,
    sequence_len: int,
    document_token: int = -1,
    mup_base_width: int = 0,
    **flags: Any,
) -> GPTConfig:
    """GPTConfig of an architecture in any size; flags: fields of ArchFlags. Without a document_token, no masks."""
    if document_token < 0:
        flags["document_mask"] = False
    chosen = ArchFlags(
        arch=arch,
        depth=n_layer,
        width=n_embd,
        head_dim=head_dim,
        max_seq_len=sequence_len,
        mup=mup_base_width > 0,
        base_width=mup_base_width or None,
        **flags,
    )
    return build_config(resolve(chosen), vocab_size, document_token)
