"""Instruments that look inside a model while it trains: norms, spectral norms, statistics of activations.

Everything stays on the device; one copy to the host starts after the update, and is read when the console reads the
losses. Steps that are not due cost a comparison.
"""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat.dtensor import is_sharded, local, replicas_of
from nanochat.errors import UserError
from nanochat.gpt import GPT, STATISTICS
from nanochat.optim import MuonAdamW
from nanochat.runtime import rank_and_world, to_host
from nanochat.train.console import GRAD_NORM
from nanochat.train.observer import Observer
from nanochat.train.spectral import TINY, Stack, spectral_norms, stacked_norms, stacks

PRESETS = {"production": 100, "research": 10, "validation": 1}
HIDDEN = ("attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")  # a block's that Muon trains
BRANCHES = ("attn", "mlp")  # rows of Block.stats

PARAM_NORM = "Model/param_norm"  # norm of all parameters of a group (/group)
SPECTRAL_NORM = "Model/spectral_norm"  # largest singular value of a hidden matrix (/layer.matrix)
UPDATE_RATIO = "Model/update_ratio"  # largest singular value of the step of a matrix over that of the matrix
ACTIVATIONS = [f"Activations/{name}" for name in STATISTICS]  # of what a branch adds (/layer.branch)


def parse_interval(text: str) -> int:
    """Steps between events: a preset's name or a number; 0 = off. Raises UserError."""
    if text in PRESETS or text.isdecimal():
        return PRESETS.get(text) or int(text)
    names = ", ".join(f"{name} ({steps})" for name, steps in PRESETS.items())
    raise UserError(f"--monitor-interval={text}: expected a number of steps, 0 for none, or one of {names}")


class MonitorSettings(NamedTuple):
    """What is looked at, and how often."""

    interval: int  # steps between events
    spectral_every: int = 1  # events between spectral norms; 0: none
    activations: bool = True  # whether events take statistics of activations


def monitor_settings(interval: str) -> MonitorSettings | None:
    """--monitor-interval with MONITOR_SPECTRAL_EVERY and MONITOR_ACTIVATIONS; None: off. Raises UserError."""
    steps = parse_interval(interval)
    every, activations = (os.environ.get(name, "1") for name in ("MONITOR_SPECTRAL_EVERY", "MONITOR_ACTIVATIONS"))
    if not every.isdecimal():
        raise UserError(f"MONITOR_SPECTRAL_EVERY={every}: expected a number of events, 0 for none")
    if activations not in ("0", "1"):
        raise UserError(f"MONITOR_ACTIVATIONS={activations}: expected 0 or 1")
    return MonitorSettings(steps, int(every), activations == "1") if steps else None


class _Matrix(NamedTuple):
    """One hidden matrix."""

    name: str  # layer.matrix, such as 3.attn.c_q
    param: Any
    local: bool  # whether this rank computes its norms


class Monitor(Observer):
    """Due at every `interval`-th step, and at the first of this process: both variants of the graph, with statistics
    and without, are then compiled before anybody looks at the time.

    Metrics are of all ranks, but statistics of activations of the last micro-batch of this rank alone. Where the
    weights are sharded, each hidden matrix is gathered twice. The ranks share the spectral norms among them. Needs
    twice the memory of the matrices whose norms this rank takes, between the backward pass and the next step.
    """

    def __init__(self, model: GPT, optimizer: MuonAdamW, settings: MonitorSettings) -> None:
        """Make it after the parameters have been sharded, if they are to be."""
        self.optimizer, self.settings = optimizer, settings
        self.blocks: list[Any] = list(model.transformer.h)  # type: ignore[arg-type]
        self.device = model.get_device()
        rank, self.world = rank_and_world()
        named = dict(model.named_parameters())
        names = (f"{layer}.{name}" for layer in range(len(self.blocks)) for name in HIDDEN)
        found = [(name, named[key]) for name in names if (key := f"transformer.h.{name}.weight") in named]
        # By shape, so that each rank gets as many of each.
        found.sort(key=lambda pair: tuple(pair[1].shape))
        self.matrices = [_Matrix(name, param, k % self.world == rank) for k, (name, param) in enumerate(found)]
        self.sharded = any(is_sharded(matrix.param) for matrix in self.matrices)
        # A tensor for each block: mutated views of one would make the compiler treat them as one input.
        self.stats = [torch.zeros((2, len(STATISTICS)), device=self.device) for _ in self.blocks]
        self.events = 0
        self.due = self.spectral = False
        self.before: list[Any] = []  # Stacks of weights before the step; the sharded weights themselves, where they are

    def restart(self) -> None:
        """What has been seen so far was a rehearsal: the first event is due again."""
        self.events = 0

    def before_forward(self, step: int) -> None:
        self.due = self.events == 0 or step % self.settings.interval == 0
        if not self.due:
            return
        every = self.settings.spectral_every
        self.spectral = every > 0 and self.events % every == 0
        self.events += 1
        if self.settings.activations:
            self.attach()

    def attach(self) -> None:
        """From now on forward passes write statistics."""
        for block, stats in zip(self.blocks, self.stats, strict=True):
            block.stats = stats

    def detach(self) -> None:
        """No more: blocks are as they were before, so that the graph compiled for that fits again."""
        for block in self.blocks:
            block.__dict__.pop("stats", None)

    @torch.no_grad()
    def before_update(self) -> None:
        if not self.due:
            return
        self.detach()
        if self.spectral and self.sharded:
            self.before = [matrix.param.detach().clone() for matrix in self.matrices]
        elif self.spectral:
            self.before = list(stacks(self._local()))

    @torch.no_grad()
    def after_update(self) -> Callable[[], dict[str, float]] | None:
        if not self.due:
            return None
        self.due = False
        norms = self.optimizer.bucket_norms()
        parts = [([f"{GRAD_NORM}/{label}" for label in norms], torch.stack(list(norms.values()))), self._param_norms()]
        if self.spectral and self.matrices:
            parts.append(self._spectral())
        if self.settings.activations:
            parts.append(self._activations())
        names, values = [name for names, _ in parts for name in names], to_host(torch.cat([part for _, part in parts]))
        return lambda: dict(zip(names, values().tolist(), strict=True))

    def _param_norms(self) -> tuple[list[str], Tensor]:
        """Norms by label of the groups, as they are after the step."""
        labels: dict[str, list[Any]] = {}
        for group in self.optimizer.param_groups:
            labels.setdefault(group["label"], []).extend(group["params"])
        params = [param for members in labels.values() for param in members]
        parts = [local(param.detach()) for param in params]
        present = [part for part in parts if part.numel()]
        norms = iter(torch._foreach_norm(present) if present else ())
        nothing = torch.zeros((), device=self.device)
        squares = torch.stack([next(norms) if part.numel() else nothing for part in parts]).square()
        if any(is_sharded(param) for param in params):
            copies = [replicas_of(param) if is_sharded(param) else self.world for param in params]
            squares = torch.stack([square / count for square, count in zip(squares.unbind(0), copies, strict=True)])
            dist.all_reduce(squares)
        by_label = squares.split([len(members) for members in labels.values()])
        return [f"{PARAM_NORM}/{label}" for label in labels], torch.stack([part.sum() for part in by_label]).sqrt()

    def _spectral(self) -> tuple[list[str], Tensor]:
        """Norms of the hidden matrices after the step, and of the step relative to them."""
        before, self.before = self.before, []
        norms = torch.zeros((2, len(self.matrices)), device=self.device)
        found = self._gathered_norms(before) if self.sharded else self._own_norms(before)
        own = [k for k, matrix in enumerate(self.matrices) if matrix.local]
        if own:  # every world-th from the first; a rank may have none
            norms[:, own[0] :: self.world] = found
        if self.world > 1:
            dist.all_reduce(norms)
        names = [f"{kind}/{matrix.name}" for kind in (SPECTRAL_NORM, UPDATE_RATIO) for matrix in self.matrices]
        return names, torch.cat([norms[0], norms[1] / norms[0].clamp(min=TINY)])

    def _local(self) -> list[Tensor]:
        return [matrix.param.detach() for matrix in self.matrices if matrix.local]

    def _own_norms(self, before: list[Stack]) -> Tensor:
        """(2, this rank's matrices): norms of the weights and of their steps. Overwrites `before`."""
        after = list(stacks(self._local()))
        for old, new in zip(before, after, strict=True):
            old.values.sub_(new.values)
        return torch.stack([stacked_norms(stacked)[0] for stacked in (after, before)])

    def _gathered_norms(self, before: list[Tensor]) -> Tensor:
        """The same from sharded weights. Collective."""
        weights, steps = [], []
        for matrix, old in zip(self.matrices, before, strict=True):
            new = matrix.param.detach()
            both = new.full_tensor(), (new - old).full_tensor()
            if matrix.local:
                weights.append(both[0])
                steps.append(both[1])
        return torch.stack([spectral_norms(matrices)[0] for matrices in (weights, steps)])

    def _activations(self) -> tuple[list[str], Tensor]:
        rows = [(layer, row) for layer, block in enumerate(self.blocks)
                for row, branch in enumerate(BRANCHES) if hasattr(block, branch)]  # fmt: skip
        names = [f"{name}/{layer}.{BRANCHES[row]}" for layer, row in rows for name in ACTIVATIONS]
        return names, torch.stack([self.stats[layer][row] for layer, row in rows]).flatten()
