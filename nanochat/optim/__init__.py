"""Muon for matrices and AdamW for the rest, as one optimizer over replicated or sharded parameters.

Where every rank holds all weights (DDP), the optimizer reduces the gradients itself, so there is no DDP wrapper: each
rank receives only what it will update, and the new weights are gathered (ZeRO-2: gradients and state cost 1/N of the
memory each, and the traffic equals an all-reduce). Where FSDP2 has sharded the weights, gradients arrive reduced, cut
by rows; a matrix cannot be orthogonalised from some of its rows, so each is sent whole to one owner and comes back as
the direction of its step: one all-to-all there and one back, in bf16, for all matrices of a shape together. On DTensors
instead, every product of the iteration would redistribute.

Parameters are grouped into buckets; each knows how to reduce, update and save its own. One step has three phases:

  1. start the reduction of all gradients, so that they overlap
  2. the global gradient norm, from the reduced gradients (clipping before the reduction, each rank by a norm of its
     own, would weigh the ranks differently)
  3. update: buckets are generators that yield where they wait for a collective; two are in flight, so that one's
     communication hides behind the other's arithmetic
"""

import functools
import math
from collections.abc import Generator, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from nanochat.dtensor import is_sharded, local, replicas_of
from nanochat.optim.update_rules import POLAR_EXPRESS, adamw_update, muon_apply, muon_direction, nesterov
from nanochat.runtime import kernel

IN_FLIGHT = 2  # buckets between the start of their update and its end
BUCKET_ELEMENTS = 2**27  # of sharded matrices exchanged at a time: bounds the buffers, and leaves something to overlap


# ---- buckets


class _Bucket:
    """Parameters that are updated together. `grads` holds their reduced gradients between reduction and update."""

    copies = 1  # ranks that hold the same part of the gradient, for the norm

    def __init__(self, group: dict[str, Any], params: list[nn.Parameter], names: list[str]) -> None:
        self.group, self.params, self.names = group, params, names
        self.device = local(params[0]).device
        self.zeros = functools.partial(torch.zeros, dtype=torch.float32, device=self.device)
        self.state: dict[str, Tensor] = {}
        self.grads: Tensor | None = None

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
        """Wait for what start_reduce began."""

    def square_norm(self) -> Tensor:
        """This rank's part of the squared gradient norm; what several ranks hold counts once over all of them."""
        assert self.grads is not None
        return self.grads.float().square().sum() / self.copies

    def scale(self, factor: Tensor) -> None:
        """Clip. A gradient that was not reduced still is the parameter's own .grad: scale a copy."""
        assert self.grads is not None
        self.grads = self.grads * factor

    def update(self, step: int) -> Generator[None]:
        """Make the update; yields where a collective is in flight."""
        raise NotImplementedError

    def named_state(self) -> dict[str, Tensor]:
        """State under `<parameter>.<kind>`, no copies; this rank's share of it."""
        raise NotImplementedError


class _Rows(_Bucket):
    """One AdamW parameter: sharded by FSDP2, or dealt to the ranks by rows (replicated where those do not divide)."""

    def __init__(self, group: dict[str, Any], param: nn.Parameter, name: str, mesh: DeviceMesh | None) -> None:
        super().__init__(group, [param], [name])
        self.sharded = is_sharded(param)
        self.mesh = param.device_mesh if self.sharded else mesh  # type: ignore[attr-defined]
        world = 1 if self.sharded or mesh is None else mesh.size()
        self.dealt = world > 1 and param.size(0) % world == 0
        self.world = world
        if self.sharded:
            self.copies = replicas_of(param)
        elif not self.dealt:
            self.copies = world
        self.rows = local(param).size(0) // (world if self.dealt else 1)
        shape = (self.rows, *param.shape[1:])
        self.state = {"exp_avg": self.zeros(shape), "exp_avg_sq": self.zeros(shape)}
        self.work: dist.Work | None = None

    def start_reduce(self) -> None:
        (grad,) = self.local_grads()
        self.grads = grad
        if self.world == 1:
            return
        if self.dealt:
            self.grads = grad.new_empty((self.rows, *grad.shape[1:]))
            self.work = dist.reduce_scatter_tensor(self.grads, grad.contiguous(), async_op=True)
        else:
            self.work = dist.all_reduce(grad, async_op=True)

    def finish_reduce(self) -> None:
        if self.work is not None:
            self.work.wait()
            self.work = None
            assert self.grads is not None
            self.grads /= self.world

    def update(self, step: int) -> Generator[None]:
        weights = local(self.params[0].data)
        mine = weights
        if self.dealt:
            assert self.mesh is not None
            mine = weights[self.rows * self.mesh.get_rank() :][: self.rows]
        beta1, beta2 = (torch.tensor(beta) for beta in self.group["betas"])
        lr, eps, weight_decay = self.scalars("lr", "eps", "weight_decay")
        state = self.state["exp_avg"], self.state["exp_avg_sq"]
        if mine.numel():
            update = self.kernel(adamw_update)
            update(mine, self.grads, *state, torch.tensor(float(step)), lr, beta1, beta2, eps, weight_decay)
        self.grads = None
        if self.dealt:
            work = _gather(weights, mine.clone())
            yield
            work.wait()

    def named_state(self) -> dict[str, Tensor]:
        if self.sharded:
            return {f"{self.names[0]}.{kind}": _like(self.params[0], part) for kind, part in self.state.items()}
        if not self.dealt:
            return {f"{self.names[0]}.{kind}": tensor for kind, tensor in self.state.items()}
        from torch.distributed.tensor import DTensor, Shard  # takes 2.5 s: only where it is needed

        assert self.mesh is not None
        return {
            f"{self.names[0]}.{kind}": DTensor.from_local(tensor, self.mesh, [Shard(0)], run_check=False)
            for kind, tensor in self.state.items()
        }


class _Matrices(_Bucket):
    """Muon's matrices of one shape, replicated: dealt whole to the ranks, equally many each."""

    def __init__(
        self, group: dict[str, Any], params: list[nn.Parameter], names: list[str], world: int, rank: int
    ) -> None:
        super().__init__(group, params, names)
        self.world = world
        self.each = -(-len(params) // world)  # a last rank that has fewer gets zero matrices, whose update is zero
        self.first = self.each * rank
        m, n = params[0].shape
        self.state = {"momentum": self.zeros((self.each, m, n)), "second_moment": self.zeros(_moment(self.each, m, n))}
        self.full: Tensor | None = None
        self.work: dist.Work | None = None

    def owned(self) -> list[tuple[int, int]]:
        """(row of the state, index of the parameter) of the matrices that this rank updates."""
        return [(i, self.first + i) for i in range(self.each) if self.first + i < len(self.params)]

    def start_reduce(self) -> None:
        grads = self.local_grads()
        padding = [torch.zeros_like(grads[0])] * (self.each * self.world - len(grads))
        self.grads = torch.stack(grads + padding)
        if self.world > 1:
            self.full = self.grads  # must live until the reduction has ended
            self.grads = self.full.new_empty((self.each, *self.full.shape[1:]))
            self.work = dist.reduce_scatter_tensor(self.grads, self.full, async_op=True)

    def finish_reduce(self) -> None:
        if self.work is not None:
            self.work.wait()
            self.work = self.full = None
            assert self.grads is not None
            self.grads /= self.world

    def update(self, step: int) -> Generator[None]:
        lr, weight_decay, momentum, beta2 = self.scalars("lr", "weight_decay", "momentum", "beta2")
        mine = [self.params[i].data for _, i in self.owned()]
        shard = torch.stack(mine + [torch.zeros_like(self.params[0].data)] * (self.each - len(mine)))
        direction = self.kernel(nesterov)(self.state["momentum"], self.grads, momentum, 0, self.each)
        self.grads = None
        direction = self.kernel(muon_direction)(direction, self.state["second_moment"], beta2, self.group["ns_steps"])
        self.kernel(muon_apply)(shard, direction, lr, weight_decay, _stretch(self.params[0]))
        if self.world > 1:
            full = shard.new_empty((self.each * self.world, *shard.shape[1:]))
            work = _gather(full, shard)
            yield
            work.wait()
            shard = full
        torch._foreach_copy_([p.data for p in self.params], list(shard[: len(self.params)].unbind(0)))

    def named_state(self) -> dict[str, Tensor]:
        return {
            f"{self.names[index]}.{kind}": tensor[row]
            for kind, tensor in self.state.items()
            for row, index in self.owned()
        }


class _ShardedMatrices(_Bucket):
    """Muon's matrices of one shape, cut by rows over S ranks, and these again over R replicas (HSDP).

    Momentum lies with the rows. Each matrix has one owner among all R·S ranks, `owners[k] = replica·S + shard`; the
    owner's second moment is whole. A replica exchanges only what its own ranks orthogonalise, and the replicas then
    share the directions, so nothing is computed twice. Shards may be uneven or empty, owners may have nothing.
    """

    def __init__(self, group: dict[str, Any], params: list[nn.Parameter], names: list[str], owners: list[int]) -> None:
        order = sorted(range(len(params)), key=lambda k: owners[k])  # what goes to one owner lies together
        super().__init__(group, [params[k] for k in order], [names[k] for k in order])
        mesh, placements = params[0].device_mesh, params[0].placements  # type: ignore[attr-defined]
        cut = next(dim for dim, placement in enumerate(placements) if placement.is_shard())
        self.shards, self.copies = mesh.size(cut), replicas_of(params[0])
        self.group_of_shards = mesh.get_group(cut)
        shard = mesh.get_local_rank(cut)
        replica, self.group_of_replicas = 0, None
        if mesh.ndim == 2:
            replica, self.group_of_replicas = mesh.get_local_rank(1 - cut), mesh.get_group(1 - cut)
        m, n = params[0].shape
        self.per_rank = -(-m // self.shards)  # rows in a buffer; ranks with fewer fill up
        counts = [owners.count(owner) for owner in range(self.shards * self.copies)]
        self.by_replica = [sum(counts[r * self.shards : (r + 1) * self.shards]) for r in range(self.copies)]
        self.first = sum(self.by_replica[:replica])
        self.counts = counts[replica * self.shards : (replica + 1) * self.shards]  # by owner within this replica
        self.replica, self.mine = replica, self.counts[shard]
        self.first_mine = self.first + sum(self.counts[:shard])
        rows = local(params[0]).size(0)
        self.state = {
            "momentum": self.zeros((len(params), rows, n)),
            "second_moment": self.zeros(_moment(self.mine, m, n)),
        }

    def start_reduce(self) -> None:
        self.grads = torch.stack(self.local_grads())  # FSDP2 has reduced them

    def update(self, step: int) -> Generator[None]:
        lr, weight_decay, momentum, beta2 = self.scalars("lr", "weight_decay", "momentum", "beta2")
        m, n = self.params[0].shape
        here = self.by_replica[self.replica]
        part = self.kernel(nesterov)(self.state["momentum"], self.grads, momentum, self.first, self.first + here)
        self.grads = None
        rows = part.size(1)
        sent = _pad_rows(part, self.per_rank)
        gathered = part.new_empty((self.shards * self.mine, self.per_rank, n))
        work = self._exchange(gathered, sent, [self.mine] * self.shards, self.counts)
        yield
        work.wait()
        if self.mine:
            parts = gathered.view(self.shards, self.mine, self.per_rank, n)
            whole = parts.transpose(0, 1).reshape(self.mine, self.shards * self.per_rank, n)[:, :m]
            moment = self.state["second_moment"]
            whole = self.kernel(muon_direction)(whole, moment, beta2, self.group["ns_steps"]).to(part.dtype)
            parts = _pad_rows(whole, self.shards * self.per_rank).view(self.mine, self.shards, self.per_rank, n)
            gathered = parts.transpose(0, 1).reshape(-1, self.per_rank, n)
        work = self._exchange(sent, gathered, self.counts, [self.mine] * self.shards)
        yield
        work.wait()
        direction = sent
        if self.group_of_replicas is not None:
            most = max(self.by_replica)
            everyone = sent.new_empty((self.copies, most, self.per_rank, n))
            given = torch.cat([sent, sent.new_zeros((most - here, self.per_rank, n))])
            work = _gather(everyone.flatten(0, 1), given, self.group_of_replicas)
            yield
            work.wait()
            direction = torch.cat([everyone[r, :count] for r, count in enumerate(self.by_replica)])
        if rows:
            weights = [local(p.data) for p in self.params]
            stacked = torch.stack(weights)
            self.kernel(muon_apply)(stacked, direction[:, :rows], lr, weight_decay, _stretch(self.params[0]))
            torch._foreach_copy_(weights, list(stacked.unbind(0)))

    def _exchange(self, out: Tensor, given: Tensor, out_counts: list[int], counts: list[int]) -> dist.Work:
        work = dist.all_to_all_single(
            out, given.contiguous(), out_counts, counts, group=self.group_of_shards, async_op=True
        )
        assert work is not None
        return work

    def named_state(self) -> dict[str, Tensor]:
        named = {f"{self.names[k]}.momentum": _like(p, self.state["momentum"][k]) for k, p in enumerate(self.params)}
        for row in range(self.mine):
            named[f"{self.names[self.first_mine + row]}.second_moment"] = self.state["second_moment"][row]
        return named


def _gather(out: Tensor, given: Tensor, group: dist.ProcessGroup | None = None) -> dist.Work:
    work = dist.all_gather_into_tensor(out, given, group=group, async_op=True)
    assert work is not None
    return work


def _moment(count: int, m: int, n: int) -> tuple[int, int, int]:
    """Shape of NorMuon's second moment of `count` matrices (m, n)."""
    return (count, m, 1) if m >= n else (count, 1, n)


def _stretch(param: Tensor) -> float:
    return math.sqrt(max(1.0, param.size(-2) / param.size(-1)))


def _pad_rows(stacked: Tensor, rows: int) -> Tensor:
    """(K, rows, n) from (K, fewer, n), zeros at the end."""
    return nn.functional.pad(stacked, (0, 0, 0, rows - stacked.size(1))) if stacked.size(1) < rows else stacked


def _like(param: Any, part: Tensor) -> Tensor:
    """This rank's `part` as a DTensor laid out like `param`."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
    )


def deal(costs: list[float], owners: int) -> list[int]:
    """An owner for each job, longest first to whoever has least to do: nobody ends much later than the others.

    Deterministic, so that all ranks agree without a word.
    """
    load = [0.0] * owners
    owner = [0] * len(costs)
    for job in sorted(range(len(costs)), key=lambda job: -costs[job]):
        owner[job] = min(range(owners), key=lambda rank: (load[rank], rank))
        load[owner[job]] += costs[job]
    return owner


# ---- the optimizer


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
        self._squares: Tensor | None = None  # of the last step's gradients, by bucket
        distributed = dist.is_initialized() and dist.get_world_size() > 1
        self.world = dist.get_world_size() if distributed else 1
        device = local(groups[0]["params"][0]).device
        self.mesh = init_device_mesh(device.type, (self.world,)) if distributed else None
        self.buckets: list[_Bucket] = []
        for group in self.param_groups:
            self.buckets += _muon_buckets(group) if group["kind"] == "muon" else _adamw_buckets(group, self.mesh)

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
        squares = torch.stack([bucket.square_norm() for bucket in self.buckets])
        # The total is not taken from the reduced parts: clipping must not change by a bit for what is only watched.
        squares = torch.cat([squares.sum()[None], squares])
        if self.world > 1:
            dist.all_reduce(squares)
        norm, self._squares = squares[0].sqrt(), squares[1:]
        if max_norm is not None:
            scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
            for bucket in self.buckets:
                bucket.scale(scale)
        _overlap([bucket.update(self.num_steps) for bucket in self.buckets])
        return norm

    def bucket_norms(self) -> dict[str, Tensor]:
        """Gradient norm of the last step over all ranks, before clipping, by label of the groups; 0-D, unread."""
        if self._squares is None:
            return {}
        parts: dict[str, list[Tensor]] = {}
        for bucket, square in zip(self.buckets, self._squares.unbind(0), strict=True):
            parts.setdefault(bucket.group["label"], []).append(square)
        return {label: torch.stack(squares).sum().sqrt() for label, squares in parts.items()}

    def named_state(self) -> dict[str, Tensor]:
        """State tensors (no copies) under `<parameter>.<kind of state>`; each rank gives what it holds: DTensors where
        it is cut, whole tensors from their owner, so that any number of ranks can take it up."""
        named: dict[str, Tensor] = {}
        for bucket in self.buckets:
            named.update(bucket.named_state())
        return named


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


def _adamw_buckets(group: dict[str, Any], mesh: DeviceMesh | None) -> list[_Bucket]:
    return [_Rows(group, param, name, mesh) for param, name in zip(group["params"], group["names"], strict=True)]


def _muon_buckets(group: dict[str, Any]) -> list[_Bucket]:
    """Matrices by shape; sharded ones also by size of the bucket, with owners balanced over all of them."""
    shapes: dict[torch.Size, list[tuple[nn.Parameter, str]]] = {}
    for param, name in zip(group["params"], group["names"], strict=True):
        if param.ndim != 2:
            raise ValueError(f"{name} of shape {tuple(param.shape)}: Muon takes matrices only; give it to AdamW")
        shapes.setdefault(param.shape, []).append((param, name))
    same = [([p for p, _ in pairs], [n for _, n in pairs]) for pairs in shapes.values()]
    distributed = dist.is_initialized() and dist.get_world_size() > 1
    world, rank = (dist.get_world_size(), dist.get_rank()) if distributed else (1, 0)
    if not is_sharded(group["params"][0]):
        return [_Matrices(group, params, names, world, rank) for params, names in same]
    pieces = []
    for params, names in same:
        size = max(world, BUCKET_ELEMENTS // params[0].numel())
        pieces += [(params[i : i + size], names[i : i + size]) for i in range(0, len(params), size)]
    # The first jobs go to different replicas: what one of them orthogonalises all others receive, padded to the most.
    replicas = replicas_of(group["params"][0])
    shards = world // replicas
    dealt = deal([_cost(p) for params, _ in pieces for p in params], world)
    owners = iter([(owner % replicas) * shards + owner // replicas for owner in dealt])
    return [_ShardedMatrices(group, params, names, [next(owners) for _ in params]) for params, names in pieces]


def _cost(param: Tensor) -> float:
    """Of orthogonalising it, up to a factor: products on the short side s of a matrix of length l, s²·(2l + s)."""
    short, long = sorted(param.shape)
    return float(short * short * (2 * long + short))
