"""Muon for matrices and AdamW for the rest, as one optimizer whose state is sharded over the ranks.

Every rank holds all weights and its own gradients; the optimizer reduces the gradients itself, so there is no DDP
wrapper. One step has three phases, so that communication and compute overlap:

  1. start the reduction of every bucket's gradients; each rank receives only the shard that it will update
  2. the global gradient norm, from the reduced shards (clipping before the reduction, each rank by a norm of its own,
     would weigh the ranks differently); then update each shard and start gathering the new weights
  3. wait for the gathered weights and put them in place

A bucket is either all Muon matrices of one shape, dealt whole to the ranks, or one AdamW parameter, dealt by rows
(replicated where the rows do not divide). With one rank the same code runs without communication. This is ZeRO-2:
gradients and state cost 1/N of the memory each, and the traffic equals an all-reduce.
"""

import functools
import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

# Polar Express, arXiv 2505.16932: polynomials that push all singular values in (0, 1] to 1, each the best for the
# interval that its predecessor left; computed for 5 iterations from l = 1e-3, with a safety factor of 1.02 for bf16.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def orthogonalize(G: Tensor, steps: int) -> Tensor:
    """Nearest semi-orthogonal matrices to G (K, m, n), roughly: singular values end near 1. bf16 on GPUs, else fp32."""
    X = G.to(torch.bfloat16 if G.is_cuda else torch.float32)
    wide = G.size(-2) <= G.size(-1)
    if not wide:
        X = X.mT  # the Gram matrix is taken on the short side
    X = X / (X.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)
    for a, b, c in POLAR_EXPRESS[:steps]:
        A = X @ X.mT
        X = a * X + (b * A + c * (A @ A)) @ X
    return X if wide else X.mT


def muon_update(
    params: Tensor,
    grads: Tensor,
    momentum_buffer: Tensor,
    second_moment: Tensor,
    lr: Tensor,
    momentum: Tensor,
    beta2: Tensor,
    weight_decay: Tensor,
    ns_steps: int,
) -> None:
    """One Muon step in place on stacked matrices (K, m, n), all fp32; scalars are 0-D so that nothing recompiles.

    Nesterov momentum; orthogonalised direction; NorMuon (arXiv 2510.05491): each row (column, if there are more of
    those) is divided by the running RMS of its entries and the whole rescaled to its old norm, so that no neuron's
    update dwarfs the others'; step lr · √max(1, m/n). Decay acts only where it agrees with the step ("cautious").
    """
    momentum_buffer.lerp_(grads, 1 - momentum)
    direction = orthogonalize(grads.lerp(momentum_buffer, momentum), ns_steps).float()
    reduce_dim = -1 if direction.size(-2) >= direction.size(-1) else -2
    mean_square = direction.square().mean(dim=reduce_dim, keepdim=True)
    second_moment.lerp_(mean_square, 1 - beta2)
    before = direction.norm(dim=(-2, -1), keepdim=True)
    direction = direction * second_moment.clamp(min=1e-10).rsqrt()
    direction = direction * (before / direction.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-10))
    step = lr * math.sqrt(max(1.0, params.size(-2) / params.size(-1)))
    decay = weight_decay * params * (direction * params >= 0)
    params.sub_(step * direction + lr * decay)


def adamw_update(
    params: Tensor,
    grads: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    lr: Tensor,
    beta1: Tensor,
    beta2: Tensor,
    eps: Tensor,
    weight_decay: Tensor,
) -> None:
    """One AdamW step in place (arXiv 1711.05101), bias-corrected, fp32; all scalars 0-D."""
    params.mul_(1 - lr * weight_decay)
    exp_avg.lerp_(grads, 1 - beta1)
    exp_avg_sq.lerp_(grads.square(), 1 - beta2)
    denominator = (exp_avg_sq / (1 - beta2**step)).sqrt() + eps
    params.sub_(lr / (1 - beta1**step) * exp_avg / denominator)


class _Bucket:
    """Parameters that are reduced, updated and gathered together: `full` (W·s, ...) is dealt to W ranks as (s, ...)."""

    def __init__(self, group: dict[str, Any], params: list[nn.Parameter], names: list[str], world: int, rank: int):
        self.group, self.params, self.names = group, params, names
        self.stacked = group["kind"] == "muon"
        rows = len(params) if self.stacked else params[0].size(0)
        self.sharded = world > 1 and (self.stacked or rows % world == 0)
        self.rows = math.ceil(rows / world) if self.sharded else rows  # of this rank's shard
        self.first = self.rows * rank if self.sharded else 0
        self.world = world
        item = params[0].shape if self.stacked else params[0].shape[1:]
        shape = (self.rows, *item)
        zeros = functools.partial(torch.zeros, dtype=torch.float32, device=params[0].device)
        if self.stacked:
            short = (self.rows, item[0], 1) if item[0] >= item[1] else (self.rows, 1, item[1])
            self.state = {"momentum": zeros(shape), "second_moment": zeros(short)}
        else:
            self.state = {"exp_avg": zeros(shape), "exp_avg_sq": zeros(shape)}
        self.grad_shard: Tensor | None = None
        self.work: dist.Work | None = None
        self.full: Tensor | None = None

    def owned(self) -> list[tuple[int, int]]:
        """(row of the shard, index of the parameter) of the stacked matrices that this rank updates."""
        return [(i, self.first + i) for i in range(self.rows) if self.first + i < len(self.params)]

    def start_reduce(self) -> None:
        """Begin summing the gradients over ranks; a parameter without a gradient counts as zero."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        if not self.stacked:
            full = grads[0]
        elif self.sharded:  # uneven counts are padded with zero matrices: their update is zero
            padding = [torch.zeros_like(grads[0])] * (self.rows * self.world - len(grads))
            full = torch.stack(grads + padding)
        else:
            full = torch.stack(grads)
        if not self.sharded:
            self.grad_shard = full
            if self.world > 1:
                self.work = dist.all_reduce(full, async_op=True)
            return
        self.grad_shard = torch.empty((self.rows, *full.shape[1:]), dtype=full.dtype, device=full.device)
        self.work = dist.reduce_scatter_tensor(self.grad_shard, full.contiguous(), async_op=True)
        self.full = full  # must live until the reduction has ended

    def finish_reduce(self) -> None:
        if self.work is not None:
            self.work.wait()
        self.work = self.full = None
        assert self.grad_shard is not None
        if self.world > 1:
            self.grad_shard /= self.world

    def square_norm(self) -> Tensor:
        """This rank's part of the squared gradient norm; a replicated gradient counts once over all ranks."""
        assert self.grad_shard is not None
        square = self.grad_shard.float().square().sum()
        return square if self.sharded else square / self.world

    def param_shard(self) -> Tensor:
        """The weights this rank updates, as the update functions want them."""
        if self.stacked:
            mine = [self.params[i].data for _, i in self.owned()]
            padding = [torch.zeros_like(self.params[0].data)] * (self.rows - len(mine))
            return torch.stack(mine + padding)
        return self.params[0].data[self.first : self.first + self.rows]

    def start_gather(self, shard: Tensor) -> None:
        """Send the updated shard to all ranks (or straight into place, where this rank has everything)."""
        self.grad_shard = None
        if self.sharded:
            self.full = torch.empty((self.rows * self.world, *shard.shape[1:]), dtype=shard.dtype, device=shard.device)
            self.work = dist.all_gather_into_tensor(self.full, shard.contiguous(), async_op=True)
        elif self.stacked:
            torch._foreach_copy_([p.data for p in self.params], list(shard.unbind(0)))

    def finish_gather(self) -> None:
        if self.work is not None:
            self.work.wait()
            assert self.full is not None
            if self.stacked:
                torch._foreach_copy_([p.data for p in self.params], list(self.full[: len(self.params)].unbind(0)))
            else:
                self.params[0].data.copy_(self.full)
        self.work = self.full = None

    def named_state(self, mesh: DeviceMesh | None) -> dict[str, Tensor]:
        """State under parameter names, so that any number of ranks can take it up: matrices whole with their owner,
        rows as DTensors."""
        named: dict[str, Tensor] = {}
        for key, tensor in self.state.items():
            if self.stacked:
                for row, index in self.owned():
                    named[f"{self.names[index]}.{key}"] = tensor[row]
            elif self.sharded:
                from torch.distributed.tensor import DTensor, Shard  # takes 2.5 s: only where it is needed

                assert mesh is not None
                named[f"{self.names[0]}.{key}"] = DTensor.from_local(tensor, mesh, [Shard(0)], run_check=False)
            else:
                named[f"{self.names[0]}.{key}"] = tensor
        return named


class MuonAdamW(torch.optim.Optimizer):
    """param_groups: dicts with `kind` and `params`, plus for kind="muon" lr, momentum, ns_steps, beta2, weight_decay
    and for kind="adamw" lr, betas, eps, weight_decay. `names` (one per param, in order) label the saved state. Learning
    rates may be changed between steps through `param_groups`; each group keeps its first one as `initial_lr`."""

    def __init__(self, param_groups: Iterable[dict[str, Any]]) -> None:
        groups = [dict(group) for group in param_groups]
        for index, group in enumerate(groups):
            if group["kind"] not in ("muon", "adamw"):
                raise ValueError(f"kind={group['kind']!r} of parameter group {index}: expected 'muon' or 'adamw'")
            group["params"] = list(group["params"])
            group.setdefault("names", [f"group{index}.{i}" for i in range(len(group["params"]))])
            group["initial_lr"] = group["lr"]
            if group["kind"] == "muon" and not 1 <= group["ns_steps"] <= len(POLAR_EXPRESS):
                raise ValueError(f"ns_steps={group['ns_steps']}: must be 1 to {len(POLAR_EXPRESS)}")
        super().__init__(groups, defaults={})
        self.num_steps = 0
        distributed = dist.is_initialized() and dist.get_world_size() > 1
        self.world = dist.get_world_size() if distributed else 1
        rank = dist.get_rank() if distributed else 0
        self.buckets = [
            _Bucket(group, params, names, self.world, rank)
            for group in self.param_groups
            for params, names in _split_group(group)
        ]
        device = self.buckets[0].params[0].device
        self.mesh = init_device_mesh(device.type, (self.world,)) if distributed else None
        # Fused kernels pay on the GPU only; on a CPU the compile would take longer than a small run.
        self._muon = torch.compile(muon_update, dynamic=False, fullgraph=True) if device.type == "cuda" else muon_update
        self._adamw = (
            torch.compile(adamw_update, dynamic=False, fullgraph=True) if device.type == "cuda" else adamw_update
        )

    @torch.no_grad()
    def step(self, closure: None = None, max_norm: float | None = None) -> Tensor:  # type: ignore[override]
        """Average the gradients over ranks, clip them to the global norm `max_norm`, update. Returns that norm, 0-D.

        Never reads a value back from the device.
        """
        self.num_steps += 1
        for bucket in self.buckets:
            bucket.start_reduce()
        for bucket in self.buckets:
            bucket.finish_reduce()
        square = torch.stack([bucket.square_norm() for bucket in self.buckets]).sum()
        if self.world > 1:
            dist.all_reduce(square)
        norm = square.sqrt()
        if max_norm is not None:
            scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            for bucket in self.buckets:
                assert bucket.grad_shard is not None
                # a gradient that was not reduced still is the parameter's own .grad: scale a copy
                bucket.grad_shard = bucket.grad_shard * scale
        for bucket in self.buckets:
            bucket.start_gather(self._update(bucket))
        for bucket in self.buckets:
            bucket.finish_gather()
        return norm

    def _update(self, bucket: _Bucket) -> Tensor:
        group, grads, params = bucket.group, bucket.grad_shard, bucket.param_shard()
        assert grads is not None
        scalar = torch.tensor  # 0-D on the CPU: kernels take them as arguments, and changing them recompiles nothing
        lr, weight_decay = scalar(group["lr"]), scalar(group["weight_decay"])
        if group["kind"] == "muon":
            momentum, beta2 = scalar(group["momentum"]), scalar(group["beta2"])
            state = (bucket.state["momentum"], bucket.state["second_moment"])
            self._muon(params, grads, *state, lr, momentum, beta2, weight_decay, group["ns_steps"])
        else:
            beta1, beta2 = scalar(group["betas"][0]), scalar(group["betas"][1])
            state = (bucket.state["exp_avg"], bucket.state["exp_avg_sq"])
            step, eps = scalar(float(self.num_steps)), scalar(group["eps"])
            self._adamw(params, grads, *state, step, lr, beta1, beta2, eps, weight_decay)
        return params

    def named_state(self) -> dict[str, Tensor]:
        """State tensors (no copies) under `<parameter>.<kind of state>`; each rank gives what it owns."""
        named: dict[str, Tensor] = {}
        for bucket in self.buckets:
            named.update(bucket.named_state(self.mesh))
        return named


def _split_group(group: dict[str, Any]) -> list[tuple[list[nn.Parameter], list[str]]]:
    """Muon: by shape, to be stacked. AdamW: each parameter by itself."""
    pairs = list(zip(group["params"], group["names"], strict=True))
    if group["kind"] == "adamw":
        return [([param], [name]) for param, name in pairs]
    shapes: dict[torch.Size, list[tuple[nn.Parameter, str]]] = {}
    for param, name in pairs:
        if param.ndim != 2:
            raise ValueError(f"{name} of shape {tuple(param.shape)}: Muon takes matrices only; give it to AdamW")
        shapes.setdefault(param.shape, []).append((param, name))
    return [([p for p, _ in same], [n for _, n in same]) for same in shapes.values()]


def gpt_optimizer(
    model: nn.Module, matrix_lr: float, embedding_lr: float, unembedding_lr: float, weight_decay: float
) -> MuonAdamW:
    """Muon for the matrices inside blocks, AdamW for wte and lm_head.

    AdamW's rates are tuned at width 768 and scaled by (width/768)^-0.5. Weight decay acts on the matrices alone:
    rows of the embedding are seen rarely, and would decay at the same rate as those seen always.
    """
    names = {name: param for name, param in model.named_parameters() if param.requires_grad}
    wte, head = names.pop("transformer.wte.weight"), names.pop("lm_head.weight")
    width_factor = (wte.size(1) / 768) ** -0.5
    adamw = {"kind": "adamw", "betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": 0.0}
    muon = {
        "kind": "muon",
        "lr": matrix_lr,
        "momentum": 0.95,
        "ns_steps": 5,
        "beta2": 0.95,
        "weight_decay": weight_decay,
    }
    return MuonAdamW(
        [
            {**adamw, "params": [head], "names": ["lm_head.weight"], "lr": unembedding_lr * width_factor},
            {**adamw, "params": [wte], "names": ["transformer.wte.weight"], "lr": embedding_lr * width_factor},
            {**muon, "params": list(names.values()), "names": list(names)},
        ]
    )


def lr_multiplier(step: int, num_iterations: int, warmup: float, warmdown: float, final: float) -> float:
    """Trapezoid: linear up over the first `warmup` share of the steps, 1, then linear to `final` over the last
    `warmdown` share. Never 0 on the first step; `final` is what a step after the last one would get."""
    warmup_steps, warmdown_steps = round(warmup * num_iterations), round(warmdown * num_iterations)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    left = num_iterations - step
    if left > warmdown_steps:
        return 1.0
    progress = left / warmdown_steps
    return progress + (1 - progress) * final


def muon_momentum(step: int, start: float = 0.85, end: float = 0.95, steps: int = 300) -> float:
    """Momentum ramp: the first gradients are poor guides, so the memory is short at first."""
    return start + (end - start) * min(step / steps, 1.0)


def set_schedule(optimizer: MuonAdamW, multiplier: float, momentum: float) -> None:
    """Put this step's learning-rate multiplier and Muon momentum into the parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * multiplier
        if group["kind"] == "muon":
            group["momentum"] = momentum


REFERENCE_BATCH, REFERENCE_HORIZON = 2**19, 11.2e9  # tokens: the classic d20 run, which the default rates are tuned on


def batch_lr_scale(batch_tokens: int, horizon_tokens: float) -> float:
    """Factor on all learning rates: √(batch / B*), where B* is the batch that the horizon calls for.

    In a batch of B tokens the gradient noise goes with 1/√B, and so does the step that it allows (arXiv 2205.10287).
    But noise only matters beside the gradient itself, which is larger early on: B* grows with the length of the run,
    as horizon^0.383 (arXiv 2505.13738). Scaling by the batch alone, √(B/2^19), left a d12 after 300 steps of 65,536
    tokens at 1.540 bits per byte; this rule gives the rates that reached 1.325 (docs/decisions.md).
    """
    best_batch = REFERENCE_BATCH * (horizon_tokens / REFERENCE_HORIZON) ** 0.383
    return math.sqrt(batch_tokens / best_batch)
