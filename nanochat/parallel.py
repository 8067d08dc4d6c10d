"""How a model is distributed over ranks; only the optimizer knows of it too.

    ddp    every rank holds all weights; gradients and optimizer state are split over the ranks (nanochat.optim)
    fsdp   weights, gradients and state are sharded by rows over all ranks (FSDP2), and gathered unit by unit in bf16
    hsdp   the same inside each node, replicated across nodes, so that only gradients cross the network

Order: build on meta, `parallelize_model`, `to_empty`, `init_weights`, then the optimizer.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from nanochat.attention import load_flex_attention
from nanochat.errors import UserError
from nanochat.flags import Parallel
from nanochat.gpt import GPT, GPTConfig, Parts
from nanochat.kernels.mlp import has_fused_mlp
from nanochat.runtime import allow_variants, get_dist_info, print0, ranks_per_node

Strategy = Literal["ddp", "fsdp", "hsdp"]

# Up to this many parameters the weights of a full model and their gradients are small beside a GPU of 80 GB (24 GB in
# fp32): there is nothing to gain by sharding them, and nothing is gathered twice.
SMALL = 3e9


@dataclass(frozen=True)
class Policy:
    """How a model is distributed."""

    strategy: Strategy
    param_dtype: torch.dtype  # what gathered weights are cast to, and computed with; the shards stay fp32
    reduce_dtype: torch.dtype = torch.float32  # what gradients are summed over ranks in
    # Free gathered weights after the forward pass and gather them again for the backward pass: half as much traffic
    # again, and only one block's weights in memory at a time.
    reshard_after_forward: bool = False
    # Keep the gradients of all but the last micro-batch unsharded on each rank (4 bytes a parameter), and reduce once
    # a step.
    accumulate_unsharded: bool = True


def requested_strategy(parallel: Parallel, use_fsdp: bool) -> Parallel:
    """What --parallel and --use-fsdp say together. Raises UserError where they contradict each other."""
    if use_fsdp and parallel not in ("auto", "fsdp"):
        raise UserError(f"--use-fsdp and --parallel={parallel} contradict each other: give one of them")
    return "fsdp" if use_fsdp else parallel


def make_policy(
    parallel: Parallel, num_params: float, param_dtype: torch.dtype, world_size: int, ranks_per_node: int
) -> tuple[Policy, str]:
    """(policy, why). Raises UserError for hsdp where the ranks are no multiple of those of a node."""
    large, size = num_params > SMALL, f"{num_params / 1e9:.2g} billion parameters"
    strategy: Strategy
    if world_size == 1:
        strategy, why = "ddp", "one rank"
        if parallel not in ("auto", "ddp"):
            why = f"--parallel={parallel}, but there is one rank only"
    elif parallel != "auto":
        strategy, why = parallel, f"--parallel={parallel}"
    elif world_size > ranks_per_node:
        nodes = world_size // ranks_per_node
        strategy, why = "hsdp", f"{nodes} nodes: weights are gathered inside each, gradients cross"
    elif large:
        strategy, why = "fsdp", f"one node, and {size} are too many for every rank"
    else:
        strategy, why = "ddp", f"one node, and {size} fit on every rank"
    if strategy == "hsdp" and world_size % ranks_per_node:
        raise UserError(
            f"--parallel=hsdp: {world_size} ranks are no whole number of nodes of {ranks_per_node}; start as many on "
            "every node, or use --parallel=fsdp"
        )
    return Policy(strategy, param_dtype, reshard_after_forward=large, accumulate_unsharded=not large), why


def make_mesh(policy: Policy, device_type: str, ranks_per_node: int) -> DeviceMesh | None:
    """(shard,) for fsdp, (replicate, shard) for hsdp, None for ddp."""
    if policy.strategy == "ddp":
        return None
    world = dist.get_world_size() if dist.is_initialized() else 1
    if policy.strategy == "fsdp":
        return init_device_mesh(device_type, (world,), mesh_dim_names=("shard",))
    shape = (world // ranks_per_node, ranks_per_node)
    return init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))


def shard_model(model: GPT, mesh: DeviceMesh | None, policy: Policy) -> None:
    """Shard the parameters of `model` in place, as `policy` says; ddp leaves it as it is.

    Units that are gathered together: each embedding, each block, the head. In units of their own, embedding and head
    travel while the first and last blocks compute, which one root unit could not.
    """
    if policy.strategy == "ddp":
        return
    assert mesh is not None
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    precision = MixedPrecisionPolicy(
        param_dtype=policy.param_dtype,
        reduce_dtype=policy.reduce_dtype,
        cast_forward_inputs=False,  # the rotary tables stay fp32; the model casts what it wants cast
    )
    shard: dict[str, Any] = {"mesh": mesh, "mp_policy": precision}
    parts: Any = model.transformer
    units = [parts["wte"], *parts["h"]]
    units += [table for kind in ("value_embeds", "ngram_embeds") if kind in parts for table in parts[kind]]
    for unit in units:
        fully_shard(unit, **shard, reshard_after_forward=policy.reshard_after_forward)
    fully_shard(model.lm_head, **shard, reshard_after_forward=False)  # its backward pass comes at once
    fully_shard(model, **shard, reshard_after_forward=False)
    # The loss is taken by a method of the head that is not forward(), which alone would gather its weight.
    register_fsdp_forward_method(model.lm_head, "summed_loss")
    if mesh.device_type == "cpu":
        for unit in _units(model):
            unit.set_force_sum_reduction_for_comms(True)  # gloo has no average


def parallelize_model(model: GPT, parallel: Parallel, device: torch.device) -> Policy:
    """Choose a policy for a model on the meta device, say why, and apply it. To be followed by to_empty(device)."""
    world, per_node = get_dist_info().world_size, ranks_per_node()
    policy, why = make_policy(parallel, model.num_params(), model.compute_dtype, world, per_node)
    shard_model(model, make_mesh(policy, device.type, per_node), policy)
    if world > 1:
        print0(f"parallel: {policy.strategy} ({why})")
    return policy


def _units(model: nn.Module) -> list[Any]:
    """The parts of the model that are gathered together, outermost first; none where it is not sharded."""
    return [module for module in model.modules() if hasattr(module, "set_requires_gradient_sync")]


def compile_model(model: GPT, policy: Policy) -> Callable[..., Tensor]:
    """What to train with, compiled: the full model (ddp), or each block between its hooks. What cannot be compiled in
    one piece is an error: torch 2.11 once split the speedrun model into hundreds of graphs without a warning."""
    model.block_masks = model.get_device().type == "cuda"  # compiled, FlexAttention skips what is masked
    if model.block_masks and model.config.masked:
        load_flex_attention()
    for block in model.transformer.h:  # type: ignore[union-attr]
        block.mlp.fused = has_fused_mlp(model.get_device(), model.compute_dtype)
    allow_variants()
    compiled = functools.partial(torch.compile, dynamic=False, fullgraph=True)
    if policy.strategy == "ddp" and has_mixing(model.config):
        whole: Callable[..., Tensor] = compiled(model)
        return whole
    blocks: Any = model.transformer.h
    if policy.strategy == "ddp":
        # All blocks are one piece of code to compile, so the first step does not take longer for deeper models.
        parts = Parts(compiled(model.embed), [compiled(block.forward) for block in blocks], compiled(model.loss))
        return functools.partial(model, parts=parts)
    for block in blocks:
        block.forward = compiled(block.forward)
    return model


def has_mixing(config: GPTConfig) -> bool:
    """Whether the stream is mixed with others between blocks: compiled with these, that costs no pass of its own."""
    mixed = config.x0_shortcut, config.unet, config.backout, config.ngram_embeds, config.value_embeds != "none"
    return any(mixed)


@contextmanager
def disable_compile(model: GPT) -> Iterator[None]:
    """Forward passes without the compiler: for inputs of so many shapes that compiling them would not pay. Masks are
    dense then, because FlexAttention without a compiler makes all scores."""
    blocks, model.block_masks = model.block_masks, False
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        model.block_masks = blocks


def before_micro_batch(model: GPT, policy: Policy, last: bool) -> None:
    """Say whether this is the last micro-batch of a step: only then must gradients be summed over all ranks."""
    if policy.strategy == "ddp":
        return  # the optimizer reduces
    root: Any = model
    root.set_is_last_backward(last)
    root.set_requires_gradient_sync(last or not policy.accumulate_unsharded)
    root.set_requires_all_reduce(last)
    root.set_reshard_after_backward(last or policy.reshard_after_forward)


@contextmanager
def unsharded_params(model: GPT, policy: Policy) -> Iterator[None]:
    """Every rank holds all weights (in param_dtype, 2 bytes a parameter in bf16), for evaluating and sampling: forward
    passes do not communicate, so each rank may make as many as it likes. All ranks enter and leave together."""
    units = _units(model)
    try:
        if units:
            model.set_reshard_after_forward(False)  # type: ignore[operator]
            with torch.no_grad(), disable_compile(model):
                model(torch.zeros(1, 1, dtype=torch.long, device=model.get_device()))  # gathers, and nothing is freed
        yield
    finally:
        for unit in units:
            unit.reshard()
        if policy.reshard_after_forward:
            for unit in units:
                unit.set_reshard_after_forward(unit not in (model, model.lm_head), recurse=False)
