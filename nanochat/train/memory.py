"""What training takes of a GPU's memory, before anything is spent; and the device batch that fits into it."""

from typing import Any, NamedTuple, cast

import torch

from nanochat.gpt import GPT
from nanochat.parallel import Policy
from nanochat.runtime import gather, get_dist_info, print0, ranks_per_node

MOST_ROWS = 32  # of a device batch that nobody asked for; products of 65,536 tokens fill a GPU
MARGIN = 0.9  # of the card, for fragmentation, what is not counted, and what other programs hold
LOSS_BYTES = 1.5 * 2**30  # a chunk of logits and what is computed of it (loss.CHUNK_LOGITS)


class Sizes(NamedTuple):
    """What counts of a model; shapes decide, so one on the meta device will do."""

    params: int
    matrices: int  # of these, in the blocks: Muon's, where it is used
    head: int  # of the output matrix
    layers: int
    activations: float  # bytes that are kept for the backward pass, by token

    @classmethod
    def of(cls, model: GPT) -> "Sizes":
        matrices = sum(p.numel() for name, p in model.named_parameters() if name.startswith("transformer.h."))
        head, layers = model.lm_head.weight.numel(), model.config.n_layer
        return cls(model.num_params(), matrices, head, layers, activation_bytes(model))


def activation_bytes(model: GPT) -> float:
    """By token, on a GPU. In units of its width a block keeps both of its normed inputs, queries, keys, values, what
    attention gives and four of the MLP; a feature of the architecture what its own gradient needs beside it. In 8 bits
    half of two more for attention and of five for the MLP, whose four are from before the squares."""
    config, blocks = model.config, cast(Any, model.transformer.h)
    kv, units = config.n_kv_head / config.n_head, 4.0  # embedding, last norm and the gradient of the hidden states
    for layer in range(config.n_layer):
        units += 5 + config.x0_shortcut + 2.5 * blocks[layer].mlp.c_fc.fp8
        if layer != config.attention_free_layer:
            units += 3 + 2 * kv + kv * config.key_offset + config.attn_gate + blocks[layer].attn.c_q.fp8
            units += kv * (config.value_table(layer) is not None)
    return units * config.n_embd * model.compute_dtype.itemsize


def training_bytes(
    sizes: Sizes, policy: Policy, tokens: int, passes: int, world: int, node: int, use_muon: bool
) -> dict[str, float]:
    """By purpose, on each GPU, where most is held: at the end of a forward pass. tokens: of a device batch; passes: a
    step; world, node: GPUs in all and of a node."""
    parts = {"ddp": 1, "fsdp": world, "hsdp": node}[policy.strategy]
    state = (4 if use_muon else 8) * sizes.matrices + 8 * (sizes.params - sizes.matrices)
    block = sizes.matrices / sizes.layers
    if policy.strategy == "ddp":
        copies = 2.0 * (sizes.matrices + sizes.head)  # one of each weight, kept until the backward pass
    elif policy.reshard_after_forward:
        copies = 2.0 * (2 * block + 2 * sizes.head) + 4.0 * block  # two blocks, both ends; gradients of one block
    else:
        copies = 2.0 * sizes.params
    unsharded = policy.strategy != "ddp" and policy.accumulate_unsharded and passes > 1
    return {
        "weights, fp32": 4.0 * sizes.params / parts,
        "gradients, fp32": 4.0 * sizes.params / parts + (4.0 * sizes.params if unsharded else 0.0),
        "optimizer state, fp32": state / (world if policy.strategy == "ddp" else parts),
        "weights to compute, bf16": copies,
        "loss (estimated)": LOSS_BYTES + 4.0 * sizes.head,
        "activations (estimated)": sizes.activations * tokens,
    }


class Batch(NamedTuple):
    """What a step is made of on each rank."""

    rows: int
    length: int  # of a row, in tokens
    use_muon: bool
    budget: float = 1.0  # share of the activations that is kept, see --activation-memory-budget


def needed_bytes(model: GPT, policy: Policy, batch: Batch, device_batch_size: int) -> float:
    """On each GPU of this run, at the end of a forward pass."""
    sizes, world, passes = Sizes.of(model), get_dist_info().world_size, -(-batch.rows // device_batch_size)
    sizes = sizes._replace(activations=batch.budget * sizes.activations)
    tokens = device_batch_size * batch.length
    parts = training_bytes(sizes, policy, tokens, passes, world, ranks_per_node(), batch.use_muon)
    coming = parts["gradients, fp32"] if passes == 1 else 0.0  # as the activations go
    return sum(parts.values()) - min(coming, parts["activations (estimated)"])


def fitting_rows(model: GPT, policy: Policy, memory: int, batch: Batch, most: int) -> tuple[int, str]:
    """(device batch, why): `most`, halved until it fits into `memory` bytes, 1 at least. The model may be on meta."""
    size = most
    while size > 1 and needed_bytes(model, policy, batch, size) > MARGIN * memory:
        size //= 2
    needed = needed_bytes(model, policy, batch, size)
    return size, f"about {needed / 2**30:.1f} of {memory / 2**30:.1f} GiB"


def choose_rows(model: GPT, policy: Policy, device: torch.device, batch: Batch) -> int:
    """The device batch that fits on every rank, MOST_ROWS at most; a collective call. On a CPU that many."""
    if device.type != "cuda":
        return MOST_ROWS
    memory = min(gather(torch.cuda.get_device_properties(device).total_memory))
    size, why = fitting_rows(model, policy, memory, batch, MOST_ROWS)
    print0(f"--device-batch-size={size}: {why}, estimated")
    return size


def keep_activations(budget: float) -> None:
    """Have the compiler keep this share of the activations at most, and compute the rest again."""
    if budget < 1:
        from torch._functorch import config

        config.activation_memory_budget = budget


def memory_advice(model: GPT, policy: Policy, batch: Batch, device_batch_size: int) -> str:
    """What to do where a device batch turned out to be too large."""
    if device_batch_size == 1:
        return "train a smaller model, or shorter rows (--max-seq-len), or on more GPUs with --parallel=fsdp"
    device = model.get_device()
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 2**60
    size, why = fitting_rows(model, policy, memory, batch, device_batch_size // 2)
    return f"--device-batch-size={size} should fit ({why}; the total batch, and so the result, stays the same)"
