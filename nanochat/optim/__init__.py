"""Muon (kellerjordan.github.io/posts/muon) for matrices and AdamW for the rest, as one optimizer over replicated or
sharded parameters.

Parameters are grouped into buckets, and each knows how to reduce, update and save its own. Where every rank holds all
weights (DDP), the optimizer reduces the gradients itself, so there is no DDP wrapper: each rank receives only what it
will update, and the new weights are gathered (ZeRO-2, arXiv 1910.02054: gradients and state cost 1/N of the memory
each, and the traffic equals an all-reduce). Where FSDP2 has sharded the weights, gradients arrive reduced and sharded
by rows (optim.sharded).

One step has four phases, and reads nothing back from the device:

  1. reduce   start averaging all gradients, so that the reductions overlap
  2. norm     the global gradient norm, from the reduced gradients (clipping before the reduction, each rank by a norm
              of its own, would weigh the ranks differently)
  3. guard    where norm or loss is not finite, the update changes neither weights nor state
  4. update   buckets are generators that yield where they wait for a collective; two are in flight, so that one's
              communication hides behind the other's arithmetic
"""

from collections.abc import Generator, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from nanochat.dtensor import is_sharded, local
from nanochat.optim.buckets import AdamWBucket, Bucket, MuonBucket
from nanochat.optim.sharded import sharded_buckets
from nanochat.optim.update_rules import POLAR_EXPRESS

IN_FLIGHT = 2  # buckets between the start of their update and its end


class MuonAdamW(torch.optim.Optimizer):
    """param_groups: dicts with `kind` and `params`, plus for kind="muon" lr, momentum, ns_steps, beta2, weight_decay
    and for kind="adamw" lr, betas, eps, weight_decay. `names` (one per param, in order) label the saved state, `label`
    the group in metrics. Learning rates may be changed between steps through `param_groups`; each group keeps its first
    one as `initial_lr`.

    Make it after the parameters have been sharded, if they are to be: state is created here, on all ranks."""

    def __init__(self, param_groups: Iterable[dict[str, Any]]) -> None:
        groups = [dict(group) for group in param_groups]
        for index, group in enumerate(groups):
            if group["kind"] not in ("muon", "adamw"):
                raise ValueError(f"kind={group['kind']!r} of parameter group {index}: expected 'muon' or 'adamw'")
            group["params"] = list(group["params"])
            group.setdefault("names", [f"group{index}.{i}" for i in range(len(group["params"]))])
            group["initial_lr"] = group["lr"]
            group.setdefault("label", f"{group['kind']}_{index}")
            if group["kind"] == "muon" and not 1 <= group["ns_steps"] <= len(POLAR_EXPRESS):
                raise ValueError(f"ns_steps={group['ns_steps']}: must be 1 to {len(POLAR_EXPRESS)}")
        super().__init__(groups, defaults={})
        self.num_steps = 0
        distributed = dist.is_initialized() and dist.get_world_size() > 1
        self.world = dist.get_world_size() if distributed else 1
        device = local(groups[0]["params"][0]).device
        self.mesh = init_device_mesh(device.type, (self.world,)) if distributed else None
        self.buckets = [bucket for group in self.param_groups for bucket in _make_buckets(group, self.mesh)]
        self._squares: Tensor | None = None  # of the last step's gradients, by bucket

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: None = None, max_norm: float | None = None, loss: Tensor | None = None
    ) -> Tensor:
        """Average the gradients over ranks, clip them to the global norm `max_norm`, update. Returns that norm, 0-D.

        loss: 0-D, the same on all ranks. Where it or the norm is not finite, weights and state stay as they are on all
        ranks, bit for bit.
        """
        self.num_steps += 1
        for bucket in self.buckets:
            bucket.start_reduce()
        for bucket in self.buckets:
            bucket.finish_reduce()
        squares = torch.stack([bucket.square_norm() for bucket in self.buckets])
        # The total is not taken from the reduced parts: clipping must not change by a bit for what is only watched.
        squares = torch.cat([squares.sum()[None], squares])
        if self.world > 1:
            dist.all_reduce(squares)
        norm, self._squares = squares[0].sqrt(), squares[1:]
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0) if max_norm is not None else None
        for bucket in self.buckets:
            bucket.factor = factor
        ok = norm.isfinite() if loss is None else norm.isfinite() & loss.isfinite()
        _overlap([bucket.update(self.num_steps, ok) for bucket in self.buckets])
        # written by way of .data, which autograd does not see: who keeps a copy of weights would never renew it
        torch.autograd.graph.increment_version([param for bucket in self.buckets for param in bucket.params])
        return norm

    def bucket_norms(self) -> dict[str, Tensor]:
        """Gradient norm of the last step over all ranks, before clipping, by label of the groups; 0-D tensors."""
        if self._squares is None:
            return {}
        parts: dict[str, list[Tensor]] = {}
        for bucket, square in zip(self.buckets, self._squares.unbind(0), strict=True):
            parts.setdefault(bucket.group["label"], []).append(square)
        return {label: torch.stack(squares).sum().sqrt() for label, squares in parts.items()}

    def named_state(self) -> dict[str, Tensor]:
        """State tensors (no copies) under `<parameter>.<kind of state>`; each rank gives what it holds: DTensors where
        it is sharded, full tensors from their owner, so that any number of ranks can take it up."""
        return {name: tensor for bucket in self.buckets for name, tensor in bucket.named_state().items()}


def _overlap(updates: list[Generator[None]]) -> None:
    """Run all updates, IN_FLIGHT at a time, in turns: each starts a collective, and the others compute meanwhile."""
    waiting = iter(updates)
    running: list[Generator[None]] = []
    while True:
        while len(running) < IN_FLIGHT and (update := next(waiting, None)) is not None:
            if next(update, "done") is None:
                running.append(update)
        if not running:
            return
        running = [update for update in running if next(update, "done") is None]


def _make_buckets(group: dict[str, Any], mesh: DeviceMesh | None) -> list[Bucket]:
    """One bucket for each AdamW parameter, and one for all Muon matrices of a shape (more where they are sharded)."""
    if group["kind"] == "adamw":
        pairs = zip(group["params"], group["names"], strict=True)
        return [AdamWBucket(group, param, name, mesh) for param, name in pairs]
    by_shape: dict[torch.Size, tuple[list[nn.Parameter], list[str]]] = {}
    for param, name in zip(group["params"], group["names"], strict=True):
        if param.ndim != 2:
            raise ValueError(f"{name} of shape {tuple(param.shape)}: Muon takes matrices only; give it to AdamW")
        params, names = by_shape.setdefault(param.shape, ([], []))
        params.append(param)
        names.append(name)
    if is_sharded(group["params"][0]):
        return sharded_buckets(group, list(by_shape.values()))
    world, rank = (mesh.size(), mesh.get_rank()) if mesh is not None else (1, 0)
    return [MuonBucket(group, params, names, world, rank) for params, names in by_shape.values()]
