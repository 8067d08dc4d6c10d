"""Muon on matrices that FSDP2 has sharded by rows.

A matrix cannot be orthogonalised from some of its rows, so each is sent to one owner and comes back as the direction of
its step: one all-to-all there and one back, in bf16, for all matrices of a shape together. On DTensors instead, every
product of the iteration would redistribute.
"""

from collections.abc import Generator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanochat.dtensor import dtensor_like, local, replicas_of
from nanochat.optim.buckets import Bucket, all_gather, lr_aspect_scale, second_moment_shape
from nanochat.optim.update_rules import muon_apply, muon_direction, nesterov

BUCKET_ELEMENTS = 2**27  # of matrices exchanged at a time: bounds the buffers, and leaves something to overlap


class ShardedMuonBucket(Bucket):
    """Muon's K matrices (m, n) of one shape, sharded by rows over S ranks, and these again over R replicas (HSDP).

    Momentum lies with the rows. Each matrix has one owner among all R·S ranks, `owners[k] = replica·S + shard`; only
    the owner holds its second moment. A replica exchanges only the matrices that its own ranks orthogonalise, and the
    replicas then share the directions, so nothing is computed twice. Shards may be uneven or empty, owners may own
    nothing.
    """

    def __init__(self, group: dict[str, Any], params: list[nn.Parameter], names: list[str], owners: list[int]) -> None:
        order = sorted(range(len(params)), key=lambda k: owners[k])  # what goes to one owner lies together
        super().__init__(group, [params[k] for k in order], [names[k] for k in order])
        mesh, placements = params[0].device_mesh, params[0].placements  # type: ignore[attr-defined]
        shard_dim = next(dim for dim, placement in enumerate(placements) if placement.is_shard())
        self.shards, self.copies = mesh.size(shard_dim), replicas_of(params[0])
        self.shard_group = mesh.get_group(shard_dim)
        shard = mesh.get_local_rank(shard_dim)
        self.replica, self.replica_group = 0, None
        if mesh.ndim == 2:
            self.replica, self.replica_group = mesh.get_local_rank(1 - shard_dim), mesh.get_group(1 - shard_dim)
        m, n = params[0].shape
        self.padded_rows = -(-m // self.shards)  # P; ranks with fewer rows fill up
        counts = [owners.count(owner) for owner in range(self.shards * self.copies)]
        self.counts_by_replica = [sum(counts[r * self.shards : (r + 1) * self.shards]) for r in range(self.copies)]
        self.first = sum(self.counts_by_replica[: self.replica])
        self.counts = counts[self.replica * self.shards : (self.replica + 1) * self.shards]  # by owner in this replica
        self.owned = self.counts[shard]
        self.first_owned = self.first + sum(self.counts[:shard])
        self.rows = local(params[0]).size(0)
        self.state = {
            "momentum": self.zeros((len(params), self.rows, n)),
            "second_moment": self.zeros(second_moment_shape(self.owned, m, n)),
        }

    def start_reduce(self) -> None:
        self.grads = torch.stack(self.local_grads())  # (K, rows, n); FSDP2 has reduced them

    def update(self, step: int, ok: Tensor) -> Generator[None]:
        """S shards, P padded rows of each, O owned matrices, K' those of this replica's owners."""
        lr, weight_decay, momentum, beta2 = self.scalars("lr", "weight_decay", "momentum", "beta2")
        m, n = self.params[0].shape
        count, P = self.counts_by_replica[self.replica], self.padded_rows
        until = self.first + count
        momenta, grads, factor = self.state["momentum"], self.grads, self.factor
        own_rows = self.kernel(nesterov)(momenta, grads, factor, momentum, self.first, until, ok)
        self.grads = None

        # to the owners: rows of all matrices -> all rows of the owned matrices
        by_matrix = _pad_rows(own_rows, P)  # (K', P, n)
        by_shard = by_matrix.new_empty((self.shards * self.owned, P, n))  # (S * O, P, n)
        work = self._exchange(by_shard, by_matrix, [self.owned] * self.shards, self.counts)
        yield
        work.wait()
        if self.owned:
            parts = by_shard.view(self.shards, self.owned, P, n).transpose(0, 1)  # (O, S, P, n)
            full = parts.reshape(self.owned, self.shards * P, n)[:, :m]  # (O, m, n)
            second_moment, ns_steps = self.state["second_moment"], self.group["ns_steps"]
            full = self.kernel(muon_direction)(full, second_moment, beta2, ns_steps, ok).to(own_rows.dtype)
            parts = _pad_rows(full, self.shards * P).view(self.owned, self.shards, P, n)  # (O, S, P, n)
            by_shard = parts.transpose(0, 1).reshape(-1, P, n)  # (S * O, P, n)

        # and back: this rank's rows of all directions
        work = self._exchange(by_matrix, by_shard, self.counts, [self.owned] * self.shards)
        yield
        work.wait()
        direction = by_matrix  # (K', P, n)
        if self.replica_group is not None:
            most = max(self.counts_by_replica)
            padded = torch.cat([direction, direction.new_zeros((most - count, P, n))])  # (most, P, n)
            gathered = direction.new_empty((self.copies, most, P, n))  # (R, most, P, n)
            work = all_gather(gathered.flatten(0, 1), padded, self.replica_group)
            yield
            work.wait()
            direction = torch.cat([gathered[r, :k] for r, k in enumerate(self.counts_by_replica)])  # (K, P, n)
        if self.rows:
            weights = [local(p.data) for p in self.params]
            stacked = torch.stack(weights)  # (K, rows, n)
            scale = lr_aspect_scale(self.params[0])
            self.kernel(muon_apply)(stacked, direction[:, : self.rows], lr, weight_decay, scale, ok)
            torch._foreach_copy_(weights, list(stacked.unbind(0)))

    def _exchange(self, out: Tensor, sent: Tensor, out_counts: list[int], counts: list[int]) -> dist.Work:
        work = dist.all_to_all_single(out, sent.contiguous(), out_counts, counts, group=self.shard_group, async_op=True)
        assert work is not None
        return work

    def named_state(self) -> dict[str, Tensor]:
        momentum, second_moment = self.state["momentum"], self.state["second_moment"]
        named = {f"{self.names[k]}.momentum": dtensor_like(p, momentum[k]) for k, p in enumerate(self.params)}
        for row in range(self.owned):
            named[f"{self.names[self.first_owned + row]}.second_moment"] = second_moment[row]
        return named


def sharded_buckets(group: dict[str, Any], same_shape: list[tuple[list[nn.Parameter], list[str]]]) -> list[Bucket]:
    """Buckets of at most BUCKET_ELEMENTS, with owners balanced over all of them."""
    world = dist.get_world_size()
    pieces = []
    for params, names in same_shape:
        size = max(world, BUCKET_ELEMENTS // params[0].numel())
        pieces += [(params[i : i + size], names[i : i + size]) for i in range(0, len(params), size)]
    # The first jobs go to different replicas: what one of them orthogonalises all others receive, padded to the most.
    replicas = replicas_of(group["params"][0])
    shards = world // replicas
    ranks = assign_owners([_cost(p) for params, _ in pieces for p in params], world)
    owners = iter([(rank % replicas) * shards + rank // replicas for rank in ranks])
    return [ShardedMuonBucket(group, params, names, [next(owners) for _ in params]) for params, names in pieces]


def assign_owners(costs: list[float], owners: int) -> list[int]:
    """An owner for each job: greedy load balancing, longest job first. Deterministic, so that ranks agree without
    communication."""
    load = [0.0] * owners
    owner = [0] * len(costs)
    for job in sorted(range(len(costs)), key=lambda job: -costs[job]):
        owner[job] = min(range(owners), key=lambda rank: (load[rank], rank))
        load[owner[job]] += costs[job]
    return owner


def _cost(param: Tensor) -> float:
    """Of orthogonalising it, up to a factor: products on the short side s of a matrix of length l, s²·(2l + s)."""
    short, long = sorted(param.shape)
    return float(short * short * (2 * long + short))


def _pad_rows(stacked: Tensor, rows: int) -> Tensor:
    """(K, rows, n) from (K, fewer, n), zeros at the end."""
    return nn.functional.pad(stacked, (0, 0, 0, rows - stacked.size(1))) if stacked.size(1) < rows else stacked
