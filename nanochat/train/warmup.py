"""Everything that is slow the first time (compiling, tuning kernels, filling the allocator, joining collectives), done
before the first step that is timed, by taking real steps on random tokens and undoing them to the last bit.

What is put back: weights and buffers, the optimizer's state, step count and rates, and every random generator. Nothing
else may remember the steps taken; the loop gives them counters and a loader of their own.
"""

import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from nanochat import parallel
from nanochat.checkpoint import rng_state, set_rng_state
from nanochat.dataloader import Batch
from nanochat.dtensor import local
from nanochat.gpt import GPT
from nanochat.optim import MuonAdamW
from nanochat.runtime import print0, synchronize
from nanochat.train.loop import train_step
from nanochat.train.monitor import Monitor
from nanochat.train.observer import Observer
from nanochat.train.run import Loader, LoopState, TrainingRun

REPEATS = 2  # the first compiles; in the second, gradients and state lie where they will always lie


def warm_kernels(run: TrainingRun) -> None:
    """Steps and an evaluation on random tokens, undone; neither run.loader nor run.state is touched."""
    rehearsal = replace(run, loader=SyntheticLoader(run.loader, run.model), state=LoopState(), observer=Observer())

    def steps() -> None:
        train_step(rehearsal)
        rehearsal.state.step = 0
        if run.evaluations:
            run.model.eval()
            with torch.no_grad(), parallel.unsharded_params(run.model, run.policy):
                run.forward(*rehearsal.loader.next_batch(), loss_reduction="none")
            run.model.train()

    seconds = warm_up(run.model, run.optimizer, steps)
    if isinstance(run.monitor, Monitor):
        run.monitor.restart()
    print0(f"kernels warmed up in {seconds:.1f} s")


def warm_up(model: GPT, optimizer: MuonAdamW, run_steps: Callable[[], None], repeats: int = REPEATS) -> float:
    """Call `run_steps` `repeats` times, then put model, optimizer and generators back. Returns the seconds it took.

    run_steps: steps of every kind that will occur, on batches of the shapes, dtypes and memory layouts that will occur:
    compiled code is made again for others. All ranks call this together. The copies lie in the host's memory (as many
    bytes as weights and state take on the device), so that the device holds no more than it does in training.
    """
    started = time.perf_counter()
    saved = {name: tensor.to("cpu", copy=True) for name, tensor in _tensors(model, optimizer).items()}
    groups = [{key: value for key, value in group.items() if key not in ("params", "names")}
              for group in optimizer.param_groups]  # fmt: skip
    num_steps, generators = optimizer.num_steps, rng_state()
    for _ in range(repeats):
        run_steps()
    for name, tensor in _tensors(model, optimizer).items():
        tensor.copy_(saved[name])
    for group, rates in zip(optimizer.param_groups, groups, strict=True):
        group.update(rates)
    optimizer.num_steps = num_steps
    optimizer.zero_grad(set_to_none=True)
    set_rng_state(generators)
    synchronize(model.get_device())
    return time.perf_counter() - started


def _tensors(model: GPT, optimizer: MuonAdamW) -> dict[str, Tensor]:
    """All that a step may change and this rank holds, by name; no copies, without autograd."""
    named = {f"model.{name}": tensor for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    named |= {f"optimizer.{name}": tensor for name, tensor in optimizer.named_state().items()}
    return {name: local(tensor.detach()) for name, tensor in named.items()}


class SyntheticLoader(Loader):
    """Random tokens in the shape and layout of the batches that a loader gives for a model: (device_batch_size,
    sequence_len) int64, contiguous, inputs and targets apart; as many a step. Draws from a generator of its own."""

    def __init__(self, loader: Loader, model: GPT) -> None:
        self.device_batch_size, self.batches_per_step = loader.device_batch_size, loader.batches_per_step
        self.vocab_size, self.device = model.config.vocab_size, model.get_device()
        self.shape = (loader.device_batch_size, model.config.sequence_len)
        self.generator = torch.Generator().manual_seed(0)

    def next_batch(self) -> Batch:
        inputs, targets = (torch.randint(self.vocab_size, self.shape, generator=self.generator) for _ in range(2))
        return Batch(inputs.to(self.device), targets.to(self.device))
