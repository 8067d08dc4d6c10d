"""What a model on a cluster would need: memory, traffic, time. A prediction from few measured constants.

    python -m nanochat.launch plan --depth=48 --nodes=16
    python -m nanochat.launch plan --depth=26 --gpus-per-node=8 --parallel=fsdp --device-batch-size=8

To sharpen it, measure (benchmarks/scale.sh) and add rows to MEASURED. The model is the classic one of that depth.
"""

from typing import Annotated

from nanochat import cli
from nanochat.cli import float_flag, int_flag
from nanochat.flags import Parallel

NETWORK_GBPS = 200.0  # of each GPU's share of its node's network cards


@cli.program
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


import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from nanochat.config import ArchFlags, build_config, resolve
from nanochat.errors import UserError
from nanochat.gpt import GPT
from nanochat.hardware import GPUS
from nanochat.parallel import make_policy
from nanochat.sections import duration
from nanochat.train.memory import MARGIN, Sizes, training_bytes

GB = 1e9
PEAK_FLOPS = GPUS["H100"].peak or 0.0
MATMUL_FLOPS = 790e12  # bf16 8192³ on random data; measured on one H200


class Measurement(NamedTuple):
    """One measured training step, per GPU."""

    depth: int
    vocab_size: int
    device_batch_size: int  # rows of 2048 tokens
    tokens_per_step: int  # of the run, over all its GPUs
    tokens_per_second: float
    mfu: float  # of forward and backward alone, the optimizer left out
    where: str


# By depth. Add rows as they are measured: between two the MFU is interpolated, beyond them the nearest counts. All but
# the first are in benchmarks/results/parallel_h200.jsonl.
TWO = "two H200 of one host, torch 2.11"
MEASURED = (
    Measurement(12, 32768, 32, 65_536, 570_925, 0.531, "one H100, torch 2.11, 2026-11-28"),
    Measurement(20, 32768, 16, 524_288, 174_234, 0.577, f"ddp, {TWO}, 2026-11-28"),
    Measurement(24, 32768, 16, 131_072, 111_651, 0.613, "one H200, torch 2.11, 2026-11-28"),
    Measurement(32, 65536, 8, 524_288, 47_439, 0.592, f"fsdp, {TWO}, 2026-11-22"),
)

# Measured on two H200 of one host, d12: 1.97 times the tokens/s of one
TWO_GPU_EFFICIENCY = 0.98
# There: bus bandwidth of an fp32 all-reduce (python -m nanochat.cluster.preflight)
NVLINK_BYTES_PER_SECOND = 258e9
# There, under fsdp: the whole optimizer step (both all-to-alls, AdamW, clipping) against Newton-Schulz by full products
# at MATMUL_FLOPS: 12.9 ms at d20
OPTIMIZER_EFFICIENCY = 0.62

# Assumptions, none of them measured here
NETWORK_EFFICIENCY = 0.8  # of that, what collectives reach
OVERLAP = 0.9  # of the computing time, what traffic of FSDP and HSDP can hide behind


class Shapes(NamedTuple):
    """What counts of a model."""

    width: int
    params: int
    matrices: int  # of these, parameters of the blocks: Muon's
    sizes: Sizes
    flops_per_token: float  # forward and backward


@functools.cache
def shapes(depth: int, vocab_size: int, row_len: int = 2048) -> Shapes:
    """The classic model of that depth, in rows of row_len tokens."""
    with torch.device("meta"):
        model = GPT(build_config(resolve(ArchFlags(depth=depth, max_seq_len=row_len)), vocab_size), torch.bfloat16)
    sizes = Sizes.of(model)
    return Shapes(model.config.n_embd, sizes.params, sizes.matrices, sizes, model.estimate_flops())


class Step(NamedTuple):
    """Predicted seconds of one step, by purpose."""

    computing: float
    muon: float
    waiting: float  # for traffic that nothing hides


class Plan:
    """What one optimizer step of these settings needs."""

    def __init__(self, settings: Settings, rows: int | None = None) -> None:
        """rows: of each forward pass, in place of the settings'. Raises UserError when the batch is not a whole number
        of passes."""
        self.settings = settings
        self.world = settings.nodes * settings.gpus_per_node
        self.model = shapes(settings.depth, settings.vocab_size, settings.max_seq_len)
        self.policy, self.why = make_policy(
            settings.parallel, self.model.params, torch.bfloat16, self.world, settings.gpus_per_node
        )
        self.rows = rows or settings.device_batch_size or self._largest_batch()
        self.passes, rest = divmod(settings.total_batch_size, self._tokens(self.rows))
        if rest:
            raise UserError(
                f"--total-batch-size={settings.total_batch_size} is no multiple of {self.rows} rows x "
                f"{settings.max_seq_len} tokens x {self.world} GPUs = {self._tokens(self.rows)}: change it or "
                "--device-batch-size"
            )

    def _tokens(self, rows: int) -> int:
        """Of one forward pass over all GPUs."""
        return rows * self.settings.max_seq_len * self.world

    def _largest_batch(self) -> int:
        """Rows of a pass: the largest power of two up to 32 that fits in memory and divides the batch; 1 at least."""
        for rows in (32, 16, 8, 4, 2):
            if self.settings.total_batch_size % self._tokens(rows) == 0 and Plan(self.settings, rows).fits():
                return rows
        return 1

    def memory(self) -> dict[str, float]:
        """Bytes on each GPU by purpose."""
        settings, tokens = self.settings, self.rows * self.settings.max_seq_len
        shared = self.passes, self.world, settings.gpus_per_node, settings.use_muon
        return training_bytes(self.model.sizes, self.policy, tokens, *shared)

    def fits(self) -> bool:
        """Whether it fits with a margin of 10 %, for what is not counted and for fragmentation."""
        return sum(self.memory().values()) <= MARGIN * self.settings.gpu_memory_gb * GB

    def traffic(self) -> tuple[float, float]:
        """Bytes (inside the node, between nodes) that each GPU sends in a step.

        A collective of n bytes over k GPUs sends n (k-1)/k of each (ring). Rings run through all GPUs of a node before
        they leave it, and each GPU has a network card's worth of them, so between nodes each GPU sends 1/gpus_per_node
        of that.
        """
        nodes, local, world, params = self.settings.nodes, self.settings.gpus_per_node, self.world, self.model.params
        if self.policy.strategy == "ddp":
            volume = 4.0 * params + 4.0 * params  # gradients to their owners, weights back, fp32, once a step
            return volume * _others(world), volume * _others(nodes) / local
        # bf16 weights, once a step or for each forward and each backward pass; fp32 gradients
        gather = 2.0 * params * (2 * self.passes if self.policy.reshard_after_forward else 1)
        scatter = 4.0 * params * (1 if self.policy.accumulate_unsharded else self.passes)
        muon = 4.0 * self.model.matrices if self.settings.use_muon else 0.0  # bf16 shards to the owners, updates back
        if self.policy.strategy == "fsdp":
            inside = (gather + scatter) * _others(world) + muon / world * _others(local)
            return inside, (gather + scatter) * _others(nodes) / local + muon / world * _others(nodes)
        replicas = 2 * 4.0 * params / local  # fp32 all-reduce of gradient shards, once a step
        updates = muon / 2 / local  # bf16: each replica orthogonalises its part of the matrices and hands on the result
        return (gather + scatter) * _others(local) + muon / local, (replicas + updates) * _others(nodes)

    def step(self) -> Step:
        """How long it takes."""
        settings = self.settings
        flops = self.model.flops_per_token * settings.total_batch_size / self.world
        computing = flops / (one_gpu_mfu(settings.depth)[0] * PEAK_FLOPS)
        muon = muon_seconds(self.model, settings.depth, self.world) if settings.use_muon else 0.0
        inside, between = self.traffic()
        network = settings.network_gbps * 1e9 / 8 * NETWORK_EFFICIENCY  # bytes/s of each GPU
        moving = max(inside / NVLINK_BYTES_PER_SECOND, between / network)
        # DDP's gradients are reduced by the optimizer after the backward pass, so nothing hides them. FSDP and HSDP
        # gather and reduce block by block beside the computation.
        hidden = 0.0 if self.policy.strategy == "ddp" else OVERLAP * computing
        return Step(computing, muon, max(0.0, moving - hidden))


def _others(parts: int) -> float:
    return (parts - 1) / parts


def one_gpu_mfu(depth: int, measured: Sequence[Measurement] = MEASURED) -> tuple[float, str]:
    """(MFU of a GPU in forward and backward at that depth, where it comes from)."""
    below = max((row for row in measured if row.depth <= depth), key=lambda row: row.depth, default=None)
    above = min((row for row in measured if row.depth >= depth), key=lambda row: row.depth, default=None)
    if below is None or above is None:
        row = below or above
        assert row is not None
        return row.mfu, f"taken over from d{row.depth} ({row.where}): an assumption"
    if below is above:
        return below.mfu, f"measured at d{depth}: {below.where}"
    share = (depth - below.depth) / (above.depth - below.depth)
    return below.mfu + share * (above.mfu - below.mfu), f"between d{below.depth} and d{above.depth}, both measured"


def muon_seconds(model: Shapes, depth: int, ranks: int) -> float:
    """The optimizer step: orthogonalisation of 4 square matrices and 2 of width x 4 width a layer, spread over `ranks`
    without repetition (five iterations take 300 width³ FLOP a layer), and what goes with it."""
    return 300.0 * model.width**3 * depth / ranks / (OPTIMIZER_EFFICIENCY * MATMUL_FLOPS)


def main(settings: Settings) -> None:
    """Print the prediction. Raises UserError for a batch that cannot be divided."""
    plan = Plan(settings)
    model, batch = plan.model, settings.total_batch_size
    print("A PREDICTION from the constants below; nothing of it was run.\n")
    print(f"d{settings.depth}: {model.params:,} parameters, width {model.width:,}, vocabulary {settings.vocab_size:,}")
    print(f"{settings.nodes} x {settings.gpus_per_node} GPUs, {plan.policy.strategy} ({plan.why})")
    print(f"step: {batch:,} tokens = {plan.passes} x {plan.rows} rows of {settings.max_seq_len} on each GPU\n")

    print("Memory of each GPU")
    used = plan.memory()
    for name, size in used.items():
        print(f"  {name:<24} {size / GB:8.2f} GB")
    print(f"  {'together':<24} {sum(used.values()) / GB:8.2f} GB of {settings.gpu_memory_gb:g} GB")
    if not plan.fits():
        print("  DOES NOT FIT with a margin of 10 %: lower --device-batch-size, or shard (--parallel=fsdp or hsdp)")

    inside, between = plan.traffic()
    print("\nTraffic a step, sent by each GPU")
    print(f"  inside the node          {inside / GB:8.2f} GB\n  between nodes            {between / GB:8.2f} GB")

    step = plan.step()
    seconds = sum(step)
    rate = batch / seconds
    mfu = model.flops_per_token * rate / (plan.world * PEAK_FLOPS)
    horizon = 20 * model.params
    print("\nTime of a step")
    print(f"  forward and backward     {1000 * step.computing:8.1f} ms")
    print(f"  Muon                     {1000 * step.muon:8.1f} ms, {100 * step.muon / seconds:.2f} % of the step")
    print(f"  waiting for traffic      {1000 * step.waiting:8.1f} ms")
    print(f"  together                 {1000 * seconds:8.1f} ms = {rate:,.0f} tokens/s, MFU {100 * mfu:.1f} %")
    print(f"  20 tokens a parameter    {horizon / 1e9:8.1f}e9 tokens in {duration(horizon / rate)}")

    share, origin = one_gpu_mfu(settings.depth)
    peak = f"{PEAK_FLOPS / 1e12:g} TFLOP/s"
    print(f"""
Measured
  MFU of a GPU             {100 * share:.1f} % of {peak} without the optimizer, {origin}
  matmul, bf16             {MATMUL_FLOPS / 1e12:g} TFLOP/s, one H200, 8192³
  inside a node            {NVLINK_BYTES_PER_SECOND / GB:g} GB/s a GPU, two H200 of one host
  optimizer                its products at {100 * OPTIMIZER_EFFICIENCY:g} % of the matmul rate, two H200
  (two H200 of one host reached {100 * TWO_GPU_EFFICIENCY:g} % of twice one at d12)
Assumed
  network                  {settings.network_gbps:g} Gb/s a GPU (--network-gbps), used at {100 * NETWORK_EFFICIENCY:g} %
  more GPUs                as fast as two, the optimizer's work spread over all of them
  traffic of FSDP, HSDP    hides behind {100 * OVERLAP:g} % of forward and backward; of DDP, behind nothing
  not counted              smaller matmuls of small device batches, slow hosts, data, checkpoints, evaluation""")


if __name__ == "__main__":
    cli.run(main, Settings)
