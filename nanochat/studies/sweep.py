"""Runs of a learning-rate sweep: short trainings on text that is new at every step, the same for all that are compared.

Each finished run is a line of DIR/runs.jsonl. Several processes may work on one folder: a run belongs to the one that
holds the lock on its file in DIR/claims. nanochat.studies.transfer analyses the results.
"""

import fcntl
import json
import math
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from nanochat.config import LEARNING_RATES, TUNED_AT, ArchFlags, GPTConfig, build_config, init_spec, resolve
from nanochat.data.rows import plan_batch
from nanochat.data.sources import text_hash
from nanochat.dataloader import RowLoader, open_data, row_batches
from nanochat.errors import UserError
from nanochat.files import append_jsonl, atomic_write_text, read_jsonl
from nanochat.gpt import GPT
from nanochat.hardware import device_name
from nanochat.optim import MuonAdamW
from nanochat.optim.schedule import batch_lr_scale, lr_multiplier, muon_momentum
from nanochat.studies import transfer
from nanochat.studies.flags import Sweep, SweepSettings
from nanochat.studies.short_run import ResidentLoader, build_model, short_run
from nanochat.train.loop import train_step

SWEPT: dict[Sweep, tuple[str, ...]] = {
    "all": tuple(LEARNING_RATES),
    "matrix": ("matrix_lr",),
    "embedding": ("embedding_lr", "value_embedding_lr"),
    "head": ("unembedding_lr",),
}


class Run(NamedTuple):
    """What tells one run of a sweep from the others."""

    mup: bool
    width: int
    log2_rate: float
    seed: int

    def __str__(self) -> str:
        return f"{'muP' if self.mup else 'SP'} width {self.width} x{2**self.log2_rate:g} seed {self.seed}"


# ---- finished and claimed runs


def recipe(settings: SweepSettings, identity: Mapping[str, str]) -> dict[str, Any]:
    """What must be the same for runs to be comparable. identity: of their text."""
    names = [field.name for field in fields(SweepSettings) if field.name != "device_batch_size"]
    return {**{name: getattr(settings, name) for name in names}, **identity}


def open_folder(folder: Path, wanted: dict[str, Any]) -> None:
    """Create the folder of a sweep, or check that an existing one has the same recipe. Raises UserError."""
    path = folder / "settings.json"
    if path.exists():
        there = json.loads(path.read_text())
        for name, value in wanted.items():
            if there.get(name) != value:
                raise UserError(
                    f"{folder} holds runs with {name}={there.get(name)}, and now it is {value}: give another --out"
                )
        return
    atomic_write_text(path, json.dumps(wanted, indent=2) + "\n")


def finished_runs(folder: Path) -> dict[Run, dict[str, Any]]:
    """Records of runs.jsonl, by run."""
    records = read_jsonl(folder / "runs.jsonl")
    return {Run(r["mup"], r["width"], r["log2_rate"], r["seed"]): r for r in records}


def append_run(folder: Path, record: dict[str, Any]) -> None:
    """Add a line to runs.jsonl, on the disk when this returns."""
    append_jsonl(folder / "runs.jsonl", record, sync=True)


@contextmanager
def claim(folder: Path, run: Run) -> Iterator[bool]:
    """Whether this process may train the run: no other can inside the `with`, any can once the process has ended,
    however it ended. False where another process is training it, or it is finished."""
    path = folder / "claims" / str(run)
    path.parent.mkdir(exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield run not in finished_runs(folder)
        path.unlink(missing_ok=True)


def in_turn(folder: Path, runs: Sequence[Run], built: Container[tuple[bool, int]]) -> Iterator[Run]:
    """Unfinished runs, in the order in which this process should try to claim them: the given order, seed by seed, but
    last those of models that others are training, since it would have to compile those first. built: (mup, width) of
    the models that this process has."""
    done = finished_runs(folder)
    others = {path.name.rpartition(" x")[0] for path in (folder / "claims").glob("*")}
    left = [run for run in runs if run not in done]
    yield from sorted(left, key=lambda run: run[:2] not in built and str(run).rpartition(" x")[0] in others)


# ---- text


class Text(NamedTuple):
    """Where rows of tokens come from."""

    vocab_size: int
    document_token: int
    identity: dict[str, str]  # source (a folder's full path), tokens (a hash), text (a hash of the shards)
    train: Callable[[int], Iterator[np.ndarray]]  # seed -> a batch (rows, max_seq_len + 1) a step, none of them twice
    val: Callable[[], np.ndarray]  # validation rows (N, max_seq_len + 1)


def open_text(settings: SweepSettings) -> Text:
    """The text of --source. Raises UserError where there is none."""
    data, length = open_data(settings.source), settings.max_seq_len
    plan = plan_batch(settings.total_batch_size, max(1, settings.total_batch_size // length), length, 1)
    identity = {"source": data.source, "tokens": data.fingerprint or data.tokenizer_hash}
    if data.fingerprint is None:
        identity["text"] = text_hash(data.source)

    def train(seed: int) -> Iterator[np.ndarray]:
        # token files keep their order, whatever the seed: seeds are given one stretch after the other
        skipped = 0 if data.fingerprint is None else seed * settings.steps
        loader = RowLoader(data.rows(length, seed), plan.rows_per_step, plan.device_batch_size)
        try:
            for step in range(skipped + settings.steps):
                batch = loader.next_batch()
                if _repeats(loader):
                    raise UserError(
                        f"--source={settings.source} is new text for {max(step - skipped, 0)} of --steps="
                        f"{settings.steps} steps of seed {seed}; repeated text measures memory: get more of it, or "
                        "lower --steps or --total-batch-size"
                    )
                if step >= skipped:
                    yield torch.cat([batch.inputs, batch.targets[:, -1:]], dim=1).to(torch.int32).numpy()
        finally:
            loader.close()

    val = partial(data.fixed_rows, "val", length, max(settings.eval_tokens, length))
    return Text(data.vocab_size, data.document_token, identity, train, val)


def _repeats(loader: RowLoader) -> bool:
    """Whether the last batch holds text of an earlier one."""
    state = loader.state_dict()
    if "positions" not in state:  # token files, read in their order
        return loader.epoch() > 1
    units = [number + (begun - 1) * state["streams"] for number, (begun, _, _) in enumerate(state["positions"])]
    return max(units) >= state["units_per_epoch"]


# ---- training


class Bench:
    """Models and text that runs share: a model is built and compiled once for all runs of its width."""

    def __init__(self, settings: SweepSettings, text: Text, device: torch.device) -> None:
        self.settings, self.text, self.device = settings, text, device
        named = {name: getattr(settings, name) for name in ("arch", "depth", "head_dim", "max_seq_len")}
        self.flags = resolve(ArchFlags(**named, document_mask=False if text.document_token < 0 else None))
        self.plan = plan_batch(settings.total_batch_size, settings.device_batch_size, settings.max_seq_len, 1)
        self.lr_scale = batch_lr_scale(
            settings.total_batch_size, settings.steps * settings.total_batch_size, *TUNED_AT[settings.arch]
        )
        self.models: dict[tuple[bool, int], tuple[GPT, Callable[..., torch.Tensor]]] = {}
        self.tokens: tuple[int, torch.Tensor] | None = None  # seed, (rows of all steps, T + 1) int32 on the device
        self.val = text.val()

    def config(self, width: int, mup: bool) -> GPTConfig:
        base_width = self.settings.base_width if mup else None
        flags = replace(self.flags, width=width, mup=mup, base_width=base_width)
        return build_config(flags, self.text.vocab_size, self.text.document_token)

    def model(self, width: int, mup: bool) -> tuple[GPT, Callable[..., torch.Tensor]]:
        """(the model, what to train with: compiled on CUDA)."""
        key = (mup, width)
        if key not in self.models:
            self.models[key] = build_model(self.config(width, mup), self.device)[:2]
        return self.models[key]

    def optimizer(self, model: GPT, run: Run) -> MuonAdamW:
        """At the rates of this run."""
        settings = self.settings
        factor = {name: 2**run.log2_rate if name in SWEPT[settings.sweep] else 1.0 for name in LEARNING_RATES}
        rates = {name: getattr(self.flags, name) * self.lr_scale * factor[name] for name in LEARNING_RATES}
        options: dict[str, Any] = {"weight_decay": 0.0, "use_muon": settings.optimizer == "muon", **rates}
        optimizer = model.setup_optimizer(**options)
        if not run.mup:
            with torch.device("meta"):
                base = GPT(self.config(settings.base_width, mup=False))
            use_rates_of(base.setup_optimizer(**options), optimizer)
        return optimizer

    def batches(self, seed: int) -> torch.Tensor:
        """All rows of a seed's runs, in the order of the steps."""
        if self.tokens is None or self.tokens[0] != seed:
            self.tokens = None
            rows = torch.from_numpy(np.concatenate(list(self.text.train(seed))))
            self.tokens = seed, rows.to(self.device)
        return self.tokens[1]


def use_rates_of(base: MuonAdamW, optimizer: MuonAdamW) -> None:
    """Give every parameter of `optimizer` the learning rate that the parameter of the same name has in `base`."""
    rates = {name: group["lr"] for group in base.param_groups for name in group["names"]}
    for group in optimizer.param_groups:
        (rate,) = {rates[name] for name in group["names"]}
        group["lr"] = group["initial_lr"] = rate


def train_run(bench: Bench, run: Run) -> dict[str, Any]:
    """Train one model from the start; its record for runs.jsonl. Losses that are not finite become None.

    A step of nanochat.train.loop without a finite loss and gradient changes nothing, so the model may recover: such
    a run has diverged here.
    """
    settings, flags, started = bench.settings, bench.flags, time.perf_counter()
    model, forward = bench.model(run.width, run.mup)
    model.init_weights(init_spec(flags), seed=run.seed)
    model.train()
    ratios: Any = flags.warmup_ratio, flags.warmdown_ratio, flags.final_lr_frac
    training = short_run(
        model,
        forward,
        bench.optimizer(model, run),
        ResidentLoader(bench.batches(run.seed), bench.plan.rows_per_step, bench.plan.device_batch_size),
        settings.steps,
        settings.total_batch_size,
        lambda step: (lr_multiplier(step, settings.steps, *ratios), muon_momentum(step)),
    )
    results = [train_step(training) for _ in range(settings.steps)]
    losses, norms = torch.stack([r.loss for r in results]), torch.stack([r.norm for r in results])
    bad = ~(losses.isfinite() & norms.isfinite())
    losses[bad.cumsum(0) > bad] = math.nan  # after the first bad step
    curve = [(step, _finite(mean)) for step, mean in transfer.block_means(losses.tolist())]
    val_loss = evaluate(model, forward, bench.val, bench.plan.device_batch_size, bench.device)
    return {
        **run._asdict(),
        "loss": None if bad.any() else _finite(val_loss),
        "curve": curve,
        "seconds": round(time.perf_counter() - started, 2),
        "device": device_name(bench.device),
    }


@torch.no_grad()
def evaluate(
    model: GPT, forward: Callable[..., torch.Tensor], rows: np.ndarray, size: int, device: torch.device
) -> float:
    """Mean loss in nats per token over rows (N, T + 1)."""
    model.eval()
    total = torch.zeros((), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    for inputs, targets in row_batches(rows, size, device):
        total += forward(inputs, targets, loss_reduction="sum")
    return total.item() / (len(rows) * (rows.shape[1] - 1))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
