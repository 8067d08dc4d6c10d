"""What single changes of architecture or recipe do to the loss: short trainings that see the same rows, on one device.

    python -m benchmarks.ablate --source=local:DIR --runs=runs.txt --out=ablation.jsonl

Each line of runs.txt is a run: the flags that differ from those of scripts.base_train, such as

    --arch=ngram --depth=12 --seed=43
    --arch=ngram --depth=12 --no-key-offset

--seed draws other weights; rows and their order are the same for all, and lie on the device. A model is compiled once
for all runs of its shape that follow each other. A run that stands in --out is not made again, so several processes,
each with a GPU of its own (CUDA_VISIBLE_DEVICES), may share a list: each takes the next run that nobody has.
"""

import fcntl
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch

from nanochat import cli
from nanochat.config import LEARNING_RATES, TUNED_AT, GPTConfig, build_config, init_spec, resolve
from nanochat.dataloader import RowLoader, open_data, row_batches
from nanochat.errors import UserError
from nanochat.eval.bpb import evaluate_bpb
from nanochat.files import append_jsonl, read_jsonl
from nanochat.flags import DeviceType
from nanochat.gpt import GPT
from nanochat.hardware import device_name
from nanochat.optim.schedule import batch_lr_scale, make_schedule, window_length
from nanochat.runtime import compute_init, synchronize
from nanochat.studies.short_run import ResidentLoader, build_model, short_run
from nanochat.tokenizer import get_token_bytes
from nanochat.train.loop import train_step
from nanochat.train.run import TrainingRun
from scripts.base_train import Settings as Recipe

WARM_STEPS = 20  # left out of the speed


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Train what a list of runs names, and score it."""

    runs: Path
    """File with a line of flags for each run."""
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
        batches = [loader.next_batch() for _ in range(settings.steps)]
        loader.close()
        rows = torch.cat([torch.cat([inputs, targets[:, -1:]], dim=1).int() for inputs, targets in batches])
        self.rows = rows.to(self.device)
        self.val: np.ndarray = self.data.fixed_rows("val", settings.max_seq_len, settings.eval_tokens)
        self.built: tuple[GPTConfig, GPT, Callable[..., torch.Tensor]] | None = None

    def recipe(self, line: str) -> Recipe:
        """The flags of a run, and where they stand."""
        shared = {"total_batch_size": self.settings.total_batch_size, "max_seq_len": self.settings.max_seq_len}
        return resolve(cli.replace(cli.parse(Recipe, line.split()), num_iterations=self.settings.steps, **shared))

    def model(self, config: GPTConfig) -> tuple[GPT, Callable[..., torch.Tensor]]:
        """(the model, what to train with)."""
        if self.built is None or self.built[0] != config:
            self.built = None
            torch._dynamo.reset()
            self.built = config, *build_model(config, self.device)[:2]
        return self.built[1:]

    def run(self, line: str) -> dict[str, Any]:
        """Train one model from its first weights; what is known of it then."""
        flags, settings = self.recipe(line), self.settings
        config = build_config(flags, self.data.vocab_size, self.data.document_token)
        model, forward = self.model(config)
        model.init_weights(init_spec(flags))  # windows at their full length, too
        horizon = settings.steps * settings.total_batch_size
        scale = batch_lr_scale(settings.total_batch_size, horizon, *TUNED_AT[flags.arch])
        rates: dict[str, Any] = {name: getattr(flags, name) * scale for name in LEARNING_RATES}
        ratios: Any = flags.warmup_ratio, flags.warmdown_ratio, flags.final_lr_frac

        def grow_windows(step: int) -> None:
            if flags.window_warmup:
                model.set_window(window_length(step, settings.steps, config.long_window))

        run = short_run(
            model,
            forward,
            model.setup_optimizer(**rates, weight_decay=flags.weight_decay, use_muon=flags.use_muon),
            ResidentLoader(self.rows, self.rows_per_step, flags.device_batch_size),
            settings.steps,
            settings.total_batch_size,
            make_schedule(settings.steps, *ratios),
            grad_clip=flags.grad_clip or 0.0,
            prepare=grow_windows,
        )
        record: dict[str, Any] = {"run": line, "device": device_name(self.device), "parameters": model.num_params()}
        half, warm = settings.steps // 2, min(WARM_STEPS, settings.steps // 2)
        self.take(run, warm)
        seconds = self.take(run, half - warm)
        record["bpb at half"] = self.score(run, flags)
        seconds += self.take(run, settings.steps - half)
        record["tokens/s"] = round((settings.steps - warm) * settings.total_batch_size / seconds)
        record["bpb"] = self.score(run, flags)
        return record

    def take(self, run: TrainingRun, steps: int) -> float:
        """Take so many steps; seconds that they took."""
        synchronize(self.device)
        started = time.perf_counter()
        for _ in range(steps):
            train_step(run)
        synchronize(self.device)
        return time.perf_counter() - started

    def score(self, run: TrainingRun, flags: Recipe) -> float:
        """Bits per byte of the validation rows."""
        run.model.eval()
        batches = row_batches(self.val, flags.device_batch_size, self.device)
        bpb = evaluate_bpb(run.forward, batches, self.token_bytes)
        run.model.train()
        return bpb if math.isfinite(bpb) else math.inf


def main(settings: Settings) -> None:
    bench = Bench(settings)
    lines = [line.strip() for line in settings.runs.read_text().splitlines() if line.strip()]
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
