"""Parameters that are updated together, where every rank holds all weights or AdamW steps the rows that a rank has."""

import functools
import math
from collections.abc import Generator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from nanochat.dtensor import dtensor_like, dtensor_of_rows, is_sharded, local, replicas_of
from nanochat.optim.update_rules import adamw_update, muon_update, nesterov
from nanochat.runtime import kernel


class Bucket:
    """Base of all buckets. `grads` holds the reduced gradients between reduction and update."""

    copies = 1  # ranks that hold the same part of the gradient, for the norm

    def __init__(self, group: dict[str, Any], params: list[nn.Parameter], names: list[str]) -> None:
        self.group, self.params, self.names = group, params, names
        self.device = local(params[0]).device
        self.zeros = functools.partial(torch.zeros, dtype=torch.float32, device=self.device)
        self.state: dict[str, Tensor] = {}
        self.grads: Tensor | None = None
        self.factor: Tensor | None = None  # 0-D, of the gradients: clipping
        self.work: dist.Work | None = None  # the reduction in flight

    def kernel(self, function: Any) -> Any:
        return kernel(function, self.device.type == "cuda")

    def scalars(self, *names: str) -> list[Tensor]:
        """Numbers of the group as 0-D tensors on the CPU, which kernels take as arguments."""
        return [torch.tensor(float(self.group[name])) for name in names]

    def local_grads(self) -> list[Tensor]:
        """This rank's gradients; a parameter without one counts as zero."""
        return [torch.zeros_like(local(p)) if p.grad is None else local(p.grad) for p in self.params]

    def start_reduce(self) -> None:
        """Begin averaging the gradients over the ranks."""
        raise NotImplementedError

    def finish_reduce(self) -> None:
        """Wait for what start_reduce began, and turn the sum into a mean."""
        if self.work is not None:
            self.work.wait()
            self.work = None
            assert self.grads is not None
            self.grads /= dist.get_world_size()

    def square_norm(self) -> Tensor:
        """This rank's part of the squared gradient norm; what several ranks hold counts once over all of them."""
        assert self.grads is not None
        if self.grads.is_cuda:  # in one reading, where the other form writes the squares first
            return torch.linalg.vector_norm(self.grads.float()).square() / self.copies
        return self.grads.float().square().sum() / self.copies

    def update(self, step: int, ok: Tensor) -> Generator[None]:
        """Make the update, or none where `ok` (0-D bool) is false; yields where a collective is in flight."""
        raise NotImplementedError

    def named_state(self) -> dict[str, Tensor]:
        """State under `<parameter>.<kind>`, no copies; this rank's share of it."""
        raise NotImplementedError


class AdamWBucket(Bucket):
    """One AdamW parameter: sharded by FSDP2, or each rank updates its rows of it (all of it on every rank where the
    rows do not divide by the ranks)."""

    def __init__(self, group: dict[str, Any], param: nn.Parameter, name: str, mesh: DeviceMesh | None) -> None:
        super().__init__(group, [param], [name])
        self.sharded, self.mesh = is_sharded(param), mesh
        self.world = 1 if self.sharded or mesh is None else mesh.size()
        self.by_rows = self.world > 1 and param.size(0) % self.world == 0
        if self.sharded:
            self.copies = replicas_of(param)
        elif not self.by_rows:
            self.copies = self.world
        self.rows = local(param).size(0) // (self.world if self.by_rows else 1)
        shape = (self.rows, *param.shape[1:])
        self.state = {"exp_avg": self.zeros(shape), "exp_avg_sq": self.zeros(shape)}

    def start_reduce(self) -> None:
        (grad,) = self.local_grads()
        self.grads = grad
        if self.by_rows:
            self.grads = grad.new_empty((self.rows, *grad.shape[1:]))
            self.work = dist.reduce_scatter_tensor(self.grads, grad.contiguous(), async_op=True)
        elif self.world > 1:
            self.work = dist.all_reduce(grad, async_op=True)

    def update(self, step: int, ok: Tensor) -> Generator[None]:
        weights = local(self.params[0].data)
        own = weights
        if self.by_rows:
            own = weights[self.rows * dist.get_rank() :][: self.rows]
        beta1, beta2 = (torch.tensor(beta) for beta in self.group["betas"])
        lr, eps, weight_decay = self.scalars("lr", "eps", "weight_decay")
        state = self.state["exp_avg"], self.state["exp_avg_sq"]
        if own.numel():
            update = self.kernel(adamw_update)
            number = torch.tensor(float(step))
            update(own, self.grads, self.factor, *state, number, lr, beta1, beta2, eps, weight_decay, ok)
        self.grads = None
        if self.by_rows:
            work = all_gather(weights, own.clone())
            yield
            work.wait()

    def named_state(self) -> dict[str, Tensor]:
        named = {f"{self.names[0]}.{kind}": tensor for kind, tensor in self.state.items()}
        if self.sharded:
            return {name: dtensor_like(self.params[0], tensor) for name, tensor in named.items()}
        if self.by_rows:
            return {name: dtensor_of_rows(tensor, self.mesh) for name, tensor in named.items()}
        return named


class MuonBucket(Bucket):
    """Muon's K matrices (m, n) of one shape, replicated: each rank updates E = ceil(K / ranks) of them."""

    def __init__(
        self, group: dict[str, Any], params: list[nn.Parameter], names: list[str], world: int, rank: int
    ) -> None:
        super().__init__(group, params, names)
        self.world = world
        self.each = -(-len(params) // world)  # a last rank that has fewer gets zero matrices, whose update is zero
        self.first = self.each * rank
        m, n = params[0].shape
        self.state = {
            "momentum": self.zeros((self.each, m, n)),
            "second_moment": self.zeros(second_moment_shape(self.each, m, n)),
        }
        self.all_grads: Tensor | None = None
        self.weights: Tensor | None = None

    def start_reduce(self) -> None:
        grads = self.local_grads()
        padding = [torch.zeros_like(grads[0])] * (self.each * self.world - len(grads))
        self.grads = torch.stack(grads + padding)  # (E * ranks, m, n)
        if self.world > 1:
            self.all_grads = self.grads  # must live until the reduction has ended
            self.grads = self.all_grads.new_empty((self.each, *self.all_grads.shape[1:]))
            self.work = dist.reduce_scatter_tensor(self.grads, self.all_grads, async_op=True)

    def finish_reduce(self) -> None:
        super().finish_reduce()
        self.all_grads = None

    def update(self, step: int, ok: Tensor) -> Generator[None]:
        lr, weight_decay, momentum, beta2 = self.scalars("lr", "weight_decay", "momentum", "beta2")
        all_weights = self.stacked_weights()
        weights = all_weights[self.first : self.first + self.each]
        direction = self.kernel(nesterov)(self.state["momentum"], self.grads, self.factor, momentum, 0, self.each, ok)
        self.grads = None
        second_moment, ns_steps = self.state["second_moment"], self.group["ns_steps"]
        scale = lr_aspect_scale(self.params[0])
        self.kernel(muon_update)(weights, direction, second_moment, beta2, ns_steps, lr, weight_decay, scale, ok)
        if self.world > 1:
            work = all_gather(all_weights, weights.clone())
            yield
            work.wait()

    def stacked_weights(self) -> Tensor:
        """(E * ranks, m, n): the parameters, moved there once (again where something has given them other memory), so
        that no step has to bring them together and apart."""
        rows = self.weights.unbind(0) if self.weights is not None else ()
        if not rows or any(p.data_ptr() != row.data_ptr() for p, row in zip(self.params, rows, strict=False)):
            padding = [torch.zeros_like(self.params[0].data)] * (self.each * self.world - len(self.params))
            self.weights = torch.stack([p.data for p in self.params] + padding)
            for param, row in zip(self.params, self.weights, strict=False):
                param.data = row
        assert self.weights is not None
        return self.weights

    def named_state(self) -> dict[str, Tensor]:
        own = list(enumerate(self.names[self.first :][: self.each]))
        return {f"{name}.{kind}": tensor[row] for kind, tensor in self.state.items() for row, name in own}


def all_gather(out: Tensor, part: Tensor, group: dist.ProcessGroup | None = None) -> dist.Work:
    """Start gathering every rank's `part` (K, ...) into `out` (ranks * K, ...)."""
    work = dist.all_gather_into_tensor(out, part, group=group, async_op=True)
    assert work is not None
    return work


def second_moment_shape(count: int, m: int, n: int) -> tuple[int, int, int]:
    """Of NorMuon's second moment of `count` matrices (m, n)."""
    return (count, m, 1) if m >= n else (count, 1, n)


def lr_aspect_scale(param: Tensor) -> float:
    """Muon's factor √max(1, m/n) on the learning rate of a matrix (m, n)."""
    return math.sqrt(max(1.0, param.size(-2) / param.size(-1)))
