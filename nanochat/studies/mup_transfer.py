"""The study of scripts.mup_transfer: which runs it is made of, training them, and what they show."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nanochat import cli
from nanochat.errors import UserError
from nanochat.files import atomic_write_text, read_jsonl
from nanochat.hardware import device_name
from nanochat.paths import run_dir
from nanochat.runtime import compute_init, print0
from nanochat.studies import sweep, transfer
from nanochat.studies.flags import SweepSettings
from nanochat.studies.flags import TransferSettings as Settings
from nanochat.studies.sweep import Run, finished_runs

RUN_NOISE = 0.004  # nats; two standard deviations of the final loss between seeds of the 124M-class speedrun (n = 1261)


class Plan(NamedTuple):
    """The sweep that settings describe."""

    widths: list[int]
    log2_rates: list[float]
    runs: list[Run]


def plan_sweep(settings: Settings) -> Plan:
    """All runs, seed by seed, so that a session that is cut short leaves whole grids. UserError for impossible ones."""
    widths = _numbers(settings.widths, "--widths", int)
    multipliers = _numbers(settings.multipliers, "--multipliers", float)
    if settings.base_width not in widths:
        raise UserError(f"--base-width={settings.base_width} is not among --widths={settings.widths}: add it")
    for width in widths:
        if width % settings.head_dim:
            raise UserError(f"--widths={settings.widths}: {width} is no multiple of --head-dim={settings.head_dim}")
    if len(multipliers) < 3:
        raise UserError(f"--multipliers={settings.multipliers}: a minimum is placed between three rates or more")
    log2_rates = [math.log2(multiplier) for multiplier in multipliers]
    runs = [
        Run(mup, width, rate, seed)
        for seed in range(settings.seeds)
        for mup in ((True, False) if settings.control else (True,))
        for width in widths
        if mup or width != settings.base_width  # there the two are the same
        for rate in log2_rates
    ]
    return Plan(widths, log2_rates, runs)


def _numbers(text: str, flag: str, kind: Callable[[str], Any]) -> list[Any]:
    """'128,256' -> sorted numbers above 0, each once."""
    try:
        values = [kind(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"{flag}={text}: expected numbers with commas between them") from None
    if len(set(values)) < len(values) or not all(0 < value < math.inf for value in values):
        raise UserError(f"{flag}={text}: expected different numbers above 0")
    return sorted(values)


# ---- training


def train_sweep(settings: Settings, text: sweep.Text, plan: Plan, folder: Path, device: torch.device) -> None:
    """Every run of the plan that is neither finished nor claimed by another process, as far as time allows."""
    done = finished_runs(folder)
    todo = [run for run in plan.runs if run not in done]
    if not todo:
        return
    started = time.perf_counter()
    print0(f"{len(todo)} of {len(plan.runs)} runs to do on {device_name(device)}, in {folder}")
    bench = sweep.Bench(settings, text, device)
    seconds = {(run.mup, run.width): record["seconds"] for run, record in done.items()}

    def train_next() -> bool:
        """Train the next free run; False: none is free, or there is no time for it."""
        for run in sweep.in_turn(folder, plan.runs, bench.models):
            elapsed = time.perf_counter() - started
            expected = seconds.get((run.mup, run.width), max(seconds.values(), default=0.0))
            if settings.time_budget_minutes and elapsed + expected > 60 * settings.time_budget_minutes:
                print0("the time is up: the same command goes on from here")
                return False
            with sweep.claim(folder, run) as claimed:
                if not claimed:
                    continue
                record = sweep.train_run(bench, run)
                sweep.append_run(folder, record)
            seconds[run.mup, run.width] = record["seconds"]
            loss = "diverged" if record["loss"] is None else f"loss {record['loss']:.4f}"
            print0(f"{len(finished_runs(folder))}/{len(plan.runs)} {run}: {loss}, {record['seconds']:.1f} s")
            return True
        return False

    while train_next():
        pass
    if left := len(set(plan.runs) - set(finished_runs(folder))):
        print0(f"{left} of {len(plan.runs)} runs are not done, or not yet by another process")


# ---- the report


def complete_grids(
    plan: Plan, records: dict[Run, dict[str, Any]], mup: bool, base_width: int
) -> dict[int, transfer.Grid]:
    """Losses of each width, of those seeds that are finished at all rates: means over different seeds are over
    different text. The control takes the base width from the muP runs."""
    grids: dict[int, transfer.Grid] = {}
    for width in plan.widths:
        losses = {rate: {run.seed: _loss(record["loss"]) for run, record in records.items()
                         if run[:3] == (mup or width == base_width, width, rate)}
                  for rate in plan.log2_rates}  # fmt: skip
        if seeds := transfer.shared_seeds({width: losses}):
            grids[width] = {rate: {seed: by_seed[seed] for seed in seeds} for rate, by_seed in losses.items()}
    return grids


def _loss(value: float | None) -> float:
    return math.inf if value is None else value


def report(settings: Settings, plan: Plan, folder: Path) -> list[transfer.Judgement]:
    """Print and write what the finished runs show: transfer.json, transfer.svg, curves.svg. Returns what was judged,
    nothing where the base width is not through yet."""
    results: dict[str, list[transfer.TransferResult]] = {}
    curves: dict[str, dict[int, list[transfer.Curve]]] = {}
    records = finished_runs(folder)
    for name in ("muP", "SP") if settings.control else ("muP",):
        grids = complete_grids(plan, records, name == "muP", settings.base_width)
        if settings.base_width not in grids:
            print0(f"nothing to report yet: no seed of the base width {settings.base_width} has been through all rates")
            return []
        for width in sorted(set(plan.widths) - set(grids)):
            print0(f"{name} width {width}: left out, no seed has been through all rates yet")
        shared = transfer.shared_seeds(grids)
        if not shared:
            print0(f"{name}: left out, no seed has been through all rates at all of its widths yet")
            continue
        results[name] = transfer.transfer_results(grids, settings.base_width)
        rate = results[name][0].transferred
        curves[name] = {}
        for width in grids:
            runs = [Run(name == "muP" or width == settings.base_width, width, rate, seed) for seed in shared]
            curves[name][width] = [[(step, _loss(loss)) for step, loss in records[run]["curve"]] for run in runs]
        print0(f"\n{name}, {settings.optimizer}, factors on {settings.sweep} rates; loss in nats, * = best of the grid")
        print0(transfer.table(results[name], settings.base_width))
    if "muP" not in results:
        return []
    # a single seed has no spread of its own to be judged by
    crossings = transfer.wider_is_better(curves["muP"], noise=RUN_NOISE) if len(curves["muP"]) > 1 else None
    judged = transfer.judge(results["muP"], results.get("SP", []), crossings)
    print0()
    for one in judged:
        word = {True: "met", False: "MISSED", None: "open"}[one.passed]
        print0(f"{word:<6} {one.bar}: {one.detail}")
    verdicts = {"crossings": crossings or [], "verdicts": judged}
    written = {"settings": cli.as_dict(settings), "results": results, **verdicts}
    atomic_write_text(folder / "transfer.json", json.dumps(_plain(written), indent=2) + "\n")
    atomic_write_text(folder / "transfer.svg", transfer.rate_plot(results))
    atomic_write_text(folder / "curves.svg", transfer.curve_plot(curves))
    print0(f"\nin {folder}: transfer.json, transfer.svg, curves.svg")
    return judged


def _plain(value: Any) -> Any:
    """For JSON: named tuples become objects, numbers that are not finite null."""
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if isinstance(value, dict):
        return {f"{key:g}" if isinstance(key, float) else str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- runs of base_train


def compare_runs(settings: Settings) -> None:
    """Table of final losses of base_train's runs by width. Raises UserError when a wider one was not better."""
    widths, tags = _numbers(settings.widths, "--widths", int), settings.compare_runs.split(",")
    if [str(width) for width in widths] != settings.widths.split(",") or len(tags) != len(widths):
        raise UserError(
            f"--compare-runs={settings.compare_runs}: expected one tag for each of --widths={settings.widths}, "
            "which must rise"
        )
    losses = [logged_losses(tag) for tag in tags]
    curves = {width: [transfer.block_means(train)] for width, (train, _) in zip(widths, losses, strict=True)}
    # token files of a tokenizer that is not at hand have no bytes: they are validated in nats per token
    held_out = "val_bpb" if all("val_bpb" in last for _, last in losses) else "val_loss"
    print0(f"width | training loss, last fiftieth | {f'last {held_out}':>13}")
    for width, (_, last) in zip(widths, losses, strict=True):
        print0(f"{width:>5} | {curves[width][0][-1][1]:>28.4f} | {last.get(held_out, math.nan):>13.4f}")
    crossings = transfer.wider_is_better(curves, noise=RUN_NOISE)
    for crossing in crossings:
        print0(f"step {crossing.step}: width {crossing.wide} is {crossing.gap:.4f} above width {crossing.narrow}")
    if crossings:
        raise UserError(f"wider is not better at {len(crossings)} of the recorded steps, see above")
    print0(f"wider is better at all {len(curves[widths[0]][0])} recorded steps (up to {RUN_NOISE} nats)")


def logged_losses(tag: str) -> tuple[list[float], dict[str, float]]:
    """(training loss of each step, last val_bpb and val_loss where they were logged) from runs/<tag>/metrics.jsonl."""
    path = run_dir(tag) / "metrics.jsonl"
    if not path.exists():
        raise UserError(f"no metrics of a run {tag} in {path}: train it with NANOCHAT_RUN_ID={tag} in the environment")
    records = [record for record in read_jsonl(path) if record["stage"] == "base"]
    by_step = {record["step"]: record["Loss/train_loss"] for record in records if "Loss/train_loss" in record}
    if not by_step:
        raise UserError(f"{path} holds no training loss of base_train")
    last = {name: r[f"Loss/{name}"] for r in records for name in ("val_bpb", "val_loss") if f"Loss/{name}" in r}
    return [by_step[step] for step in sorted(by_step)], last


def main(settings: Settings) -> None:
    if settings.compare_runs:
        compare_runs(settings)
        return
    folder = Path(settings.out) if settings.out else run_dir() / "transfer"
    if settings.report_only:
        if not (folder / "runs.jsonl").exists():
            raise UserError(f"no runs in {folder}: leave --report-only out")
        stored = json.loads((folder / "settings.json").read_text())
        names = [field.name for field in fields(SweepSettings) if field.name in stored]
        settings = replace(settings, **{name: stored[name] for name in names})
        report(settings, plan_sweep(settings), folder)
        return
    plan = plan_sweep(settings)
    *_, world_size, device = compute_init(settings.device_type)
    if world_size > 1:
        raise UserError("a sweep runs as one process: start it without torchrun")
    text = sweep.open_text(settings)
    sweep.open_folder(folder, sweep.recipe(settings, text.identity))
    train_sweep(settings, text, plan, folder, device)
    report(settings, plan, folder)
