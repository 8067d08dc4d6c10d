"""What single changes of architecture or recipe do to the loss: short trainings that see the same rows, on one device.

    python -m benchmarks.ablate --source=local:DIR --runs=benchmarks/ablations.txt --base="--arch=ngram --depth=8"

Each line of --runs is a run: flags of scripts.base_train, behind those of --base, and words for what has no flag there:

    --no-key-offset --seed=43
    x0_lambdas=.2:.05        learned scalars (nanochat.config.CONSTANTS) begin so, from the first layer to the last
    c_fc.init=.4             first weights of all that has this in its name, times a factor
    embedding.beta2=.995     of a group of parameters: beta2, lr (a factor), warmdown (a share of the steps of its own)
    momentum=.85:.97:400     Muon's: from, to, in how many steps
    decay=cosine             weight decay falls to 0
    equilibrate=1            rows of what Muon makes orthogonal have one norm (MuonEq)
    average=.1               scored with the mean of the weights over the last tenth of the steps
    batch=131072             tokens a step; as many in all
    passes=5                 a fifth of the rows, read five times

--seed draws other weights; rows and their order are the same for all, and lie on the device. A model is compiled once
for all runs of its shape that follow each other. A run that stands in --out is not made again, so several processes,
each with a GPU of its own (CUDA_VISIBLE_DEVICES), may share a list: each takes the next run that nobody has.
"""

import fcntl
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch

from nanochat import cli
from nanochat.config import CONSTANTS, LEARNING_RATES, TUNED_AT, GPTConfig, build_config, init_spec, resolve
from nanochat.dataloader import RowLoader, open_data, row_batches
from nanochat.errors import UserError
from nanochat.eval.bpb import evaluate_bpb
from nanochat.files import append_jsonl, read_jsonl
from nanochat.flags import DeviceType
from nanochat.gpt import GPT
from nanochat.hardware import device_name
from nanochat.optim import MuonAdamW, update_rules
from nanochat.optim.param_groups import FAMILIES
from nanochat.optim.schedule import batch_lr_scale, lr_multiplier, make_schedule, muon_momentum, window_length
from nanochat.optim.update_rules import muon_direction
from nanochat.runtime import compute_init, synchronize
from nanochat.studies.short_run import ResidentLoader, build_model, short_run
from nanochat.tokenizer import get_token_bytes
from nanochat.train.loop import train_step
from nanochat.train.run import TrainingRun, evaluated_with
from scripts.base_train import Settings as Recipe
from scripts.base_train import fade_tables

WARM_STEPS = 20  # left out of the speed


@cli.program
class Settings:
    """Train what a list of runs names, and score it."""

    runs: Path
    """File with a line of flags for each run."""
    base: str = ""
    """Flags of every run."""
    source: str
    """Text, as for base_train; its tokenizer must be in the store."""
    out: Path = Path("ablation.jsonl")
    """Where a line for each run goes."""
    steps: Annotated[int, cli.int_flag(gte=2)] = 600
    """Optimizer steps of each run."""
    total_batch_size: Annotated[int, cli.int_flag(gte=1)] = 65_536
    """Tokens a step."""
    max_seq_len: Annotated[int, cli.int_flag(gte=2)] = 2048
    """Tokens in a row."""
    eval_tokens: Annotated[int, cli.int_flag(gte=1)] = 2_097_152
    """Validation tokens, at most."""
    device_type: DeviceType = "auto"
    """auto, cuda, cpu or mps."""


class Changes(dict[str, str]):
    """What a run does that base_train has no flag for, by name (see above). UserError where there is no such thing."""

    GROUPS = tuple(family.replace(" ", "_") for family in FAMILIES)

    def __init__(self, words: list[str]) -> None:
        super().__init__(word.split("=", 1) if "=" in word else (word, "") for word in words)
        for name, value in self.items():
            group, _, key = name.rpartition(".")
            known = name in ("momentum", "decay", "average", "equilibrate", "batch", "passes") or name in CONSTANTS
            known = known or key == "init" or (group in self.GROUPS and key in ("lr", "beta2", "warmdown"))
            if not (known and value):
                raise UserError(f"{name}={value}: no flag, and nothing that `python -m benchmarks.ablate` changes")

    def number(self, name: str, default: float) -> float:
        try:
            return float(self.get(name, default))
        except ValueError:
            raise UserError(f"{name}={self[name]}: expected a number") from None

    @torch.no_grad()
    def begin(self, model: GPT) -> None:
        """Change first weights."""
        for name, param in model.named_parameters():
            parts = name.split(".")
            if ends := self.get(parts[-1]):
                first, *last = (float(value) for value in ends.split(":"))
                param.copy_(torch.linspace(first, (last or [first])[0], param.numel()))
            for key in self:
                if key.endswith(".init") and key.removesuffix(".init") in parts:
                    param.mul_(self.number(key, 1.0))

    def follow(self, optimizer: MuonAdamW, steps: int, ratios: tuple[float, float, float]) -> None:
        """Change what groups are trained with, before each of the optimizer's steps."""
        warmup, warmdown, final = ratios
        decays = [group["weight_decay"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            beta2 = self.number(f"{group['label']}.beta2", group["beta2"] if "beta2" in group else group["betas"][1])
            group.update({"beta2": beta2} if "beta2" in group else {"betas": (group["betas"][0], beta2)})
            group["initial_lr"] *= self.number(f"{group['label']}.lr", 1.0)

        def before_step(optimizer: Any, *_: Any) -> None:
            step = optimizer.num_steps
            for group, decay in zip(optimizer.param_groups, decays, strict=True):
                own = self.number(f"{group['label']}.warmdown", warmdown)
                group["lr"] = group["initial_lr"] * lr_multiplier(step, steps, warmup, own, final)
                if "momentum" in self and "momentum" in group:
                    start, end, length = (float(value) for value in self["momentum"].split(":"))
                    group["momentum"] = muon_momentum(step, start, end, int(length))
                if "decay" in self:
                    group["weight_decay"] = decay * (1 + math.cos(math.pi * step / steps)) / 2

        optimizer.register_step_pre_hook(before_step)
        update_rules.muon_direction = equilibrated_direction if "equilibrate" in self else muon_direction


def equilibrated_direction(direction: torch.Tensor, *others: Any) -> torch.Tensor:
    """muon_direction of matrices whose rows have their mean norm."""
    norms = direction.float().norm(dim=-1, keepdim=True)
    return muon_direction((direction * (norms.mean(-2, keepdim=True) / norms.clamp(min=1e-10))).to(direction), *others)


class Bench:
    """What all runs share: rows, and the model of the last run."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.device = settings, compute_init(settings.device_type)[-1]
        self.data = open_data(settings.source)
        if self.data.tokenizer is None:
            raise UserError(f"--source={settings.source}: bits per byte need text, not tokens")
        self.token_bytes = get_token_bytes(self.device, self.data.tokenizer)
        self.rows_per_step = settings.total_batch_size // settings.max_seq_len
        loader = RowLoader(self.data.rows(settings.max_seq_len, 42), self.rows_per_step, self.rows_per_step)
        tokens = settings.steps * settings.total_batch_size
        self.epochs = self.data.horizon_in_epochs(settings.max_seq_len, tokens, self.rows_per_step)[0]
        batches = [loader.next_batch() for _ in range(settings.steps)]
        loader.close()
        rows = torch.cat([torch.cat([inputs, targets[:, -1:]], dim=1).int() for inputs, targets in batches])
        self.rows = rows.to(self.device)
        self.val: np.ndarray = self.data.fixed_rows("val", settings.max_seq_len, settings.eval_tokens)
        self.built: tuple[GPTConfig, GPT, Callable[..., torch.Tensor]] | None = None

    def recipe(self, line: str) -> tuple[Recipe, Changes]:
        """The flags of a run, and what else it changes."""
        words, settings = line.split(), self.settings
        changes = Changes([word for word in words if not word.startswith("--")])
        batch = int(changes.number("batch", settings.total_batch_size))
        if batch % settings.max_seq_len or batch > settings.steps * settings.total_batch_size:
            raise UserError(f"batch={batch}: expected a multiple of --max-seq-len={settings.max_seq_len}")
        steps = settings.steps * settings.total_batch_size // batch
        shared = {"total_batch_size": batch, "max_seq_len": settings.max_seq_len, "num_iterations": steps}
        flags = cli.parse(Recipe, [word for word in words if word.startswith("--")])
        return resolve(replace(flags, **shared)), changes

    def model(self, config: GPTConfig) -> tuple[GPT, Callable[..., torch.Tensor]]:
        """(the model, what to train with)."""
        if self.built is None or self.built[0] != config:
            self.built = None
            torch._dynamo.reset()
            self.built = config, *build_model(config, self.device)[:2]
        return self.built[1:]

    def run(self, line: str) -> dict[str, Any]:
        """Train one model from its first weights; what is known of it then."""
        flags, changes = self.recipe(line)
        steps, batch, passes = flags.num_iterations, flags.total_batch_size, max(1.0, changes.number("passes", 1))
        config = build_config(flags, self.data.vocab_size, self.data.document_token)
        model, forward = self.model(config)
        model.init_weights(init_spec(flags))  # windows at their full length, too
        changes.begin(model)
        scale = batch_lr_scale(batch, steps * batch, *TUNED_AT[flags.arch])
        rates: dict[str, Any] = {name: getattr(flags, name) * scale for name in LEARNING_RATES}
        ratios: Any = flags.warmup_ratio, flags.warmdown_ratio, flags.final_lr_frac
        optimizer = model.setup_optimizer(**rates, weight_decay=flags.weight_decay, use_muon=flags.use_muon)
        fade_tables(optimizer, flags.table_decay, max(1.0, self.epochs) * passes, steps)
        changes.follow(optimizer, steps, ratios)
        rows = self.rows[: round(len(self.rows) / passes)]

        def grow_windows(step: int) -> None:
            if flags.window_warmup:
                model.set_window(window_length(step, steps, config.long_window))

        run = short_run(
            model,
            forward,
            optimizer,
            ResidentLoader(rows, batch // self.settings.max_seq_len, flags.device_batch_size),
            steps,
            batch,
            make_schedule(steps, *ratios),
            grad_clip=flags.grad_clip or 0.0,
            prepare=grow_windows,
        )
        record: dict[str, Any] = {"run": line, "device": device_name(self.device), "parameters": model.num_params()}
        half, warm, averaged = steps // 2, min(WARM_STEPS, steps // 2), round(changes.number("average", 0) * steps)
        self.take(run, warm)
        seconds = self.take(run, half - warm)
        record["bpb at half"] = self.score(run, flags)
        seconds += self.take(run, steps - half, averaged)
        record["tokens/s"] = round((steps - warm) * batch / seconds)
        record |= {"tokens": steps * batch, "FLOPs": steps * batch * model.estimate_flops()}
        record["bpb"] = self.score(run, flags)
        return record

    def take(self, run: TrainingRun, steps: int, averaged: int = 0) -> float:
        """Take so many steps; seconds that they took. The weights are then the mean of those after the last
        `averaged`."""
        params, sums = list(run.model.parameters()), None
        synchronize(self.device)
        started = time.perf_counter()
        for left in reversed(range(steps)):
            train_step(run)
            if left < averaged:
                sums = sums or [torch.zeros_like(param) for param in params]
                torch._foreach_add_(sums, [param.data for param in params], alpha=1 / averaged)
        synchronize(self.device)
        seconds = time.perf_counter() - started
        if sums:
            torch._foreach_copy_([param.data for param in params], sums)
        return seconds

    def score(self, run: TrainingRun, flags: Recipe) -> float:
        """Bits per byte of the validation rows."""
        run.model.eval()
        batches = row_batches(self.val, flags.device_batch_size, self.device)
        forward = evaluated_with(run.model, run.forward, self.val.shape, 0, 0)
        bpb = evaluate_bpb(forward, batches, self.token_bytes)
        run.model.train()
        return bpb if math.isfinite(bpb) else math.inf


def main(settings: Settings) -> None:
    bench = Bench(settings)
    lines = settings.runs.read_text(encoding="utf-8").splitlines()
    lines = [f"{settings.base} {line.split('#')[0]}".strip() for line in lines if line.split("#")[0].strip()]
    for line in lines:
        bench.recipe(line)  # before anything is spent
    for number, line in enumerate(lines):
        with open(f"{settings.out}.{number}.lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # another process has it
                continue
            if any(record["run"] == line for record in read_jsonl(settings.out)):
                continue
            record = bench.run(line)
            append_jsonl(settings.out, record, sync=True)
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    cli.run(main, Settings)
