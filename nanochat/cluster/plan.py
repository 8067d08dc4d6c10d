"""What a model on a cluster would need: memory, traffic, time. A prediction from few measured constants.

    python -m nanochat.launch plan --depth=48 --nodes=16
    python -m nanochat.launch plan --depth=26 --gpus-per-node=8 --parallel=fsdp --device-batch-size=8

To sharpen it, measure (benchmarks/scale.sh) and add rows to MEASURED. The model is the classic one of that depth: width
= 64 x depth rounded up to whole heads of 128, 12 x width² parameters a layer, embedding and head apart.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch

from nanochat import cli
from nanochat.cli import float_flag, int_flag
from nanochat.errors import UserError
from nanochat.parallel import Parallel, Policy, make_policy
from nanochat.sections import duration

GB = 1e9
HEAD_DIM = 128
PEAK_FLOPS = 989e12  # dense bf16, H100 and H200
MATMUL_FLOPS = 790e12  # bf16 8192³ on random data; measured on one H200


@dataclass(frozen=True)
class Measurement:
    """One measured training step, per GPU."""

    depth: int
    vocab_size: int
    device_batch_size: int  # rows of 2048 tokens
    tokens_per_step: int  # of the run, over all its GPUs
    tokens_per_second: float
    mfu: float  # of forward and backward alone, the optimizer left out
    peak_bytes: float
    where: str


# By depth. Add rows as they are measured: between two the MFU is interpolated, beyond them the nearest counts. The last
# three are benchmarks/results/parallel_h200.jsonl.
TWO = "two H200 of one host, torch 2.11, 2026-11-22"
MEASURED = (
    Measurement(12, 32768, 32, 524_288, 538_348, 0.483, 23.7 * 2**30, "one H200, torch 2.11, 2026-11-22"),
    Measurement(20, 65536, 16, 524_288, 151_912, 0.548, 36.8 * 2**30, f"ddp, {TWO}"),
    Measurement(26, 65536, 8, 524_288, 77_534, 0.554, 38.3 * 2**30, f"ddp, {TWO}"),
    Measurement(32, 65536, 8, 524_288, 47_439, 0.592, 56.4 * 2**30, f"fsdp, {TWO}"),
)

# Measured on two H200 of one host, d12: 1.97 times the tokens/s of one
TWO_GPU_EFFICIENCY = 0.98
# There: bus bandwidth of an fp32 all-reduce (python -m nanochat.cluster.preflight)
NVLINK_BYTES_PER_SECOND = 258e9
# There, under fsdp: the whole optimizer step (both all-to-alls, AdamW, clipping) against its Newton-Schulz products at
# MATMUL_FLOPS: 0.34 at d20 (24 ms), 0.41 at d26 (55 ms), 0.46 at d32 (114 ms)
OPTIMIZER_EFFICIENCY = 0.41

# Bytes kept for the backward pass for each token, layer and unit of width. From d12 above: its peak less weights,
# gradients, optimizer state and bf16 copies, over 65,536 tokens x 12 layers x 768.
ACTIVATION_BYTES = 38.7

# Assumptions, none of them measured here
NETWORK_GBPS = 200.0  # of each GPU's share of its node's network cards
NETWORK_EFFICIENCY = 0.8  # of that, what collectives reach
OVERLAP = 0.9  # of the computing time, what traffic of FSDP and HSDP can hide behind


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Predict memory, traffic and time of a training step on a cluster that need not exist."""

    depth: Annotated[int, int_flag(gte=1, lte=128)] = 20
    """Transformer layers."""
    nodes: Annotated[int, int_flag(gte=1)] = 1
    """Nodes."""
    gpus_per_node: Annotated[int, int_flag(gte=1)] = 8
    """GPUs of each node."""
    parallel: Parallel = "auto"
    """auto, ddp, fsdp (shards over all GPUs) or hsdp (shards inside each node)."""
    use_muon: bool = True
    """Muon on the matrices; otherwise AdamW on everything."""
    device_batch_size: Annotated[int | None, int_flag(gte=1)] = None
    """Rows per forward pass on each GPU; default: the largest power of two that fits, 32 at most."""
    total_batch_size: Annotated[int, int_flag(gte=1)] = 524_288
    """Tokens per optimizer step over all GPUs."""
    max_seq_len: Annotated[int, int_flag(gte=1)] = 2048
    """Tokens in a row."""
    vocab_size: Annotated[int, int_flag(gte=1)] = 65_536
    """Entries of the vocabulary."""
    gpu_memory_gb: Annotated[float, float_flag(gte=1)] = 80.0
    """Memory of a GPU, 1e9 bytes."""
    network_gbps: Annotated[float, float_flag(gte=0.001)] = NETWORK_GBPS
    """Network of each GPU, 1e9 bits per second: that of a node's cards together over its GPUs. Assumed."""


# ----------------------------------------------------------------------------------------------------------------------
# The model


@dataclass(frozen=True)
class Shapes:
    """What counts of a model."""

    depth: int
    width: int
    matrices: int  # parameters of the blocks, all of them Muon's
    head: int  # parameters of the head; the embedding has as many

    @property
    def params(self) -> int:
        return self.matrices + 2 * self.head

    def flops_per_token(self, length: int) -> float:
        """Forward and backward, as GPT.estimate_flops counts it."""
        return 6.0 * (self.matrices + self.head) + 12.0 * self.depth * self.width * length


def shapes(depth: int, vocab_size: int) -> Shapes:
    """The classic model of that depth."""
    width = -(-depth * 64 // HEAD_DIM) * HEAD_DIM
    return Shapes(depth, width, 12 * width * width * depth, vocab_size * width)


# ----------------------------------------------------------------------------------------------------------------------
# Memory


def memory(model: Shapes, policy: Policy, asked: Settings, rows: int) -> dict[str, float]:
    """Bytes on each GPU by purpose, with `rows` in a forward pass."""
    world = asked.nodes * asked.gpus_per_node
    parts = {"ddp": 1, "fsdp": world, "hsdp": asked.gpus_per_node}[policy.strategy]
    state = (4 if asked.use_muon else 8) * model.matrices + 8 * 2 * model.head
    block = model.matrices / model.depth
    if policy.strategy == "ddp":
        copies = 2.0 * (model.matrices + model.head)  # one of each weight, kept until the backward pass
    elif policy.reshard_after_forward:
        copies = 2.0 * (2 * block + 2 * model.head) + 4.0 * block  # two blocks, both ends; gradients of one block
    else:
        copies = 2.0 * model.params
    whole = policy.strategy != "ddp" and policy.accumulate_whole and passes_per_step(asked, rows) > 1
    return {
        "weights, fp32": 4.0 * model.params / parts,
        "gradients, fp32": 4.0 * model.params / parts + (4.0 * model.params if whole else 0.0),
        "optimizer state, fp32": state / (world if policy.strategy == "ddp" else parts),
        "weights to compute, bf16": copies,
        "activations (estimated)": ACTIVATION_BYTES * rows * asked.max_seq_len * model.depth * model.width,
    }


def largest_batch(model: Shapes, policy: Policy, asked: Settings) -> int:
    """Rows a forward pass: the largest power of two up to 32 that fits in memory and divides the batch; 1 at least."""
    for rows in (32, 16, 8, 4, 2):
        tokens = rows * asked.max_seq_len * asked.nodes * asked.gpus_per_node
        if asked.total_batch_size % tokens == 0 and fits(memory(model, policy, asked, rows), asked):
            return rows
    return 1


def fits(used: dict[str, float], asked: Settings) -> bool:
    """Whether it fits with a margin of 10 %, for what is not counted and for fragmentation."""
    return sum(used.values()) <= 0.9 * asked.gpu_memory_gb * GB


def passes_per_step(asked: Settings, rows: int) -> int:
    """Forward and backward passes in a step. Raises UserError when the batch is not a whole number of them."""
    world = asked.nodes * asked.gpus_per_node
    tokens = rows * asked.max_seq_len * world
    if asked.total_batch_size % tokens:
        raise UserError(
            f"--total-batch-size={asked.total_batch_size} is no multiple of {rows} rows x {asked.max_seq_len} tokens x "
            f"{world} GPUs = {tokens}: change it or --device-batch-size"
        )
    return asked.total_batch_size // tokens


# ----------------------------------------------------------------------------------------------------------------------
# Traffic


def traffic(model: Shapes, policy: Policy, asked: Settings, passes: int) -> tuple[float, float]:
    """Bytes (inside the node, between nodes) that each GPU sends in a step of `passes` forward and backward passes.

    A collective of n bytes over k GPUs sends n (k-1)/k of each (ring). Rings run through all GPUs of a node before they
    leave it, and each GPU has a network card's worth of them, so between nodes each GPU sends 1/gpus_per_node of that.
    """
    nodes, local, params = asked.nodes, asked.gpus_per_node, model.params
    world = nodes * local
    if policy.strategy == "ddp":
        volume = 4.0 * params + 4.0 * params  # gradients to their owners, weights back, fp32, once a step
        return volume * _others(world), volume * _others(nodes) / local
    # bf16 weights, once a step or for each forward and each backward pass; fp32 gradients
    gather = 2.0 * params * (2 * passes if policy.reshard_after_forward else 1)
    scatter = 4.0 * params * (1 if policy.accumulate_whole else passes)
    muon = 4.0 * model.matrices if asked.use_muon else 0.0  # bf16 shards to the owners, updates back
    if policy.strategy == "fsdp":
        inside = (gather + scatter) * _others(world) + muon / world * _others(local)
        return inside, (gather + scatter) * _others(nodes) / local + muon / world * _others(nodes)
    replicas = 2 * 4.0 * params / local  # fp32 all-reduce of gradient shards, once a step
    updates = muon / 2 / local  # bf16: each replica orthogonalises its part of the matrices and hands on the result
    return (gather + scatter) * _others(local) + muon / local, (replicas + updates) * _others(nodes)


def _others(parts: int) -> float:
    return (parts - 1) / parts


# ----------------------------------------------------------------------------------------------------------------------
# Time


def one_gpu_mfu(depth: int, measured: Sequence[Measurement] = MEASURED) -> tuple[float, str]:
    """(MFU of a GPU in forward and backward at that depth, where it comes from)."""
    rows = sorted(measured, key=lambda row: row.depth)
    place = bisect.bisect_left([row.depth for row in rows], depth)
    if place < len(rows) and rows[place].depth == depth:
        return rows[place].mfu, f"measured at d{depth}: {rows[place].where}"
    if place in (0, len(rows)):
        row = rows[0] if place == 0 else rows[-1]
        return row.mfu, f"taken over from d{row.depth} ({row.where}): an assumption"
    below, above = rows[place - 1], rows[place]
    share = (depth - below.depth) / (above.depth - below.depth)
    return below.mfu + share * (above.mfu - below.mfu), f"between d{below.depth} and d{above.depth}, both measured"


def muon_seconds(model: Shapes, ranks: int) -> float:
    """The optimizer step: orthogonalisation of 4 square matrices and 2 of width x 4 width a layer, spread over `ranks`
    without repetition (five iterations take 300 width³ FLOP a layer), and what goes with it."""
    return 300.0 * model.width**3 * model.depth / ranks / (OPTIMIZER_EFFICIENCY * MATMUL_FLOPS)


@dataclass(frozen=True)
class Step:
    """Predicted seconds of one step, by purpose."""

    computing: float
    muon: float
    waiting: float  # for traffic that nothing hides

    @property
    def seconds(self) -> float:
        return self.computing + self.muon + self.waiting


def predict(model: Shapes, policy: Policy, asked: Settings, passes: int) -> Step:
    """One step of `passes` forward and backward passes."""
    world = asked.nodes * asked.gpus_per_node
    flops = model.flops_per_token(asked.max_seq_len) * asked.total_batch_size / world
    computing = flops / (one_gpu_mfu(asked.depth)[0] * PEAK_FLOPS)
    muon = muon_seconds(model, world) if asked.use_muon else 0.0
    inside, between = traffic(model, policy, asked, passes)
    moving = max(inside / NVLINK_BYTES_PER_SECOND, between / network_bytes_per_second(asked))
    # DDP's gradients are reduced by the optimizer after the backward pass, so nothing hides them. FSDP and HSDP gather
    # and reduce block by block beside the computation.
    hidden = 0.0 if policy.strategy == "ddp" else OVERLAP * computing
    return Step(computing, muon, max(0.0, moving - hidden))


def network_bytes_per_second(asked: Settings) -> float:
    """What each GPU gets of the network."""
    return asked.network_gbps * 1e9 / 8 * NETWORK_EFFICIENCY


# ----------------------------------------------------------------------------------------------------------------------


def main(asked: Settings) -> None:
    """Print the prediction. Raises UserError for a batch that cannot be divided."""
    model = shapes(asked.depth, asked.vocab_size)
    world = asked.nodes * asked.gpus_per_node
    policy, why = make_policy(asked.parallel, model.params, torch.bfloat16, world, asked.gpus_per_node)
    rows = asked.device_batch_size or largest_batch(model, policy, asked)
    passes = passes_per_step(asked, rows)
    print("A PREDICTION from the constants below; nothing of it was run.\n")
    print(f"d{asked.depth}: {model.params:,} parameters, width {model.width:,}, vocabulary {asked.vocab_size:,}")
    print(f"{asked.nodes} x {asked.gpus_per_node} GPUs, {policy.strategy} ({why})")
    print(f"step: {asked.total_batch_size:,} tokens = {passes} x {rows} rows of {asked.max_seq_len} on each GPU\n")
    print_memory(memory(model, policy, asked, rows), asked)
    inside, between = traffic(model, policy, asked, passes)
    print("\nTraffic a step, sent by each GPU")
    print(f"  inside the node          {inside / GB:8.2f} GB\n  between nodes            {between / GB:8.2f} GB")
    print_time(predict(model, policy, asked, passes), model, asked)
    print_constants(asked)


def print_memory(used: dict[str, float], asked: Settings) -> None:
    """The table of memory, and a warning where it does not fit."""
    print("Memory of each GPU")
    for name, size in used.items():
        print(f"  {name:<24} {size / GB:8.2f} GB")
    total = sum(used.values()) / GB
    print(f"  {'together':<24} {total:8.2f} GB of {asked.gpu_memory_gb:g} GB")
    if not fits(used, asked):
        print("  DOES NOT FIT with a margin of 10 %: lower --device-batch-size, or shard (--parallel=fsdp or hsdp)")


def print_time(step: Step, model: Shapes, asked: Settings) -> None:
    """Step time and what follows from it."""
    world = asked.nodes * asked.gpus_per_node
    rate = asked.total_batch_size / step.seconds
    mfu = model.flops_per_token(asked.max_seq_len) * rate / (world * PEAK_FLOPS)
    print("\nTime of a step")
    print(f"  forward and backward     {1000 * step.computing:8.1f} ms")
    print(f"  Muon                     {1000 * step.muon:8.1f} ms, {100 * step.muon / step.seconds:.2f} % of the step")
    print(f"  waiting for traffic      {1000 * step.waiting:8.1f} ms")
    print(f"  together                 {1000 * step.seconds:8.1f} ms = {rate:,.0f} tokens/s, MFU {100 * mfu:.1f} %")
    horizon = 20 * model.params
    print(f"  20 tokens a parameter    {horizon / 1e9:8.1f}e9 tokens in {duration(horizon / rate)}")


def print_constants(asked: Settings) -> None:
    """What the prediction rests on."""
    print("\nMeasured")
    mfu, origin = one_gpu_mfu(asked.depth)
    print(
        f"  MFU of a GPU             {100 * mfu:.1f} % of {PEAK_FLOPS / 1e12:g} TFLOP/s without the optimizer, {origin}"
    )
    print(f"  matmul, bf16             {MATMUL_FLOPS / 1e12:g} TFLOP/s, one H200, 8192³")
    print(f"  activations              {ACTIVATION_BYTES:g} bytes a token, layer and unit of width, d12 on one H200")
    print(f"  inside a node            {NVLINK_BYTES_PER_SECOND / GB:g} GB/s a GPU, two H200 of one host")
    print(f"  optimizer                its products at {100 * OPTIMIZER_EFFICIENCY:g} % of the matmul rate, two H200")
    print(f"  (two H200 of one host reached {100 * TWO_GPU_EFFICIENCY:g} % of twice one at d12)")
    print("Assumed")
    used = f"used at {100 * NETWORK_EFFICIENCY:g} %"
    print(f"  network                  {asked.network_gbps:g} Gb/s a GPU (--network-gbps), {used}")
    print("  more GPUs                as fast as two, the optimizer's work spread over all of them")
    print(
        f"  traffic of FSDP, HSDP    hides behind {100 * OVERLAP:g} % of forward and backward; of DDP, behind nothing"
    )
    print(
        "  not counted              smaller matmuls of small device batches, slow hosts, data, checkpoints, evaluation"
    )


if __name__ == "__main__":
    cli.run(main, Settings)
