"""Runs side by side: how their settings differ, what they scored on the same items and documents, and how much less
compute one needed than another.

Differences are paired: two models that answer the same items err on many of the same, so that the difference is known
better than either score. Only items that are known to be the same are paired: the ledgers of both runs have the same
hashes of the files they come from, or the documents the same hash of their text.
"""

import itertools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nanochat import ledger, report
from nanochat.errors import UserError
from nanochat.files import read_jsonl
from nanochat.report.plots import ON_A_PAGE_OF_ITS_OWN, Panel, Plot, Series, Track, draw, inline, line_series, smooth
from nanochat.sections import STDERR_SUFFIXES, number, plain

PLOT = "compare_loss.svg"
Z95 = 1.959964
# Settings that say where and how a run was made, and not what it is.
APART = frozenset({"run", "model_tag", "out_tag", "resume", "device_type", "step", "model_step"})
SCORED = {  # stage -> (folder of its results, what their names begin with)
    "base_loss": ("base_loss", ""), "base_eval": ("base_eval", ""),
    **{f"chat_eval_{stage}": ("chat_eval", f"{stage}_") for stage in ("mid", "sft", "rl")},
}  # fmt: skip
ITEMS = ("eval_bundle/", "task_data/")  # files that questions come from


class Run(NamedTuple):
    """What a run has left."""

    name: str
    folder: Path
    sections: dict[str, dict[str, Any]]
    records: list[dict[str, Any]]

    def origin(self) -> tuple[Any, Any, Any]:
        """Hash of the tokenizer, hash and name of the text; None: not known, as of runs made by hand."""
        of = {stage: section["metrics"] for stage, section in self.sections.items()}
        source = self.sections.get("base_train", {}).get("settings", {}).get("source")
        return of.get("tok_train", {}).get("hash"), of.get("dataset", {}).get("fingerprint"), source

    def flops_per_token(self) -> float | None:
        value = self.sections.get("base_train", {}).get("metrics", {}).get("FLOPs per token")
        return float(value) if isinstance(value, int | float) else None

    def results(self, stage: str) -> list[dict[str, Any]]:
        """A record an item or document that this stage scored last; none: nothing was kept."""
        folder, prefix = SCORED[stage]
        section = self.sections.get(stage, {})
        tag = section.get("settings", {}).get("model_tag") or self.folder.name
        step = section.get("metrics", {}).get("step")
        if not isinstance(step, int):
            return []
        record = ledger.last_run(ledger.read(self.folder), stage) or {}
        store, name = self.folder.parents[1], f"{prefix}{tag}_{step:06d}"
        pattern = re.compile(rf"{re.escape(name)}(_[0-9a-f]{{8}})?\.jsonl")
        written = dict(record["outputs"]) if isinstance(record.get("outputs"), dict) else {}
        # those that the pipeline knows go before others of the same checkpoint, made by hand with other settings
        there = [path for path in (store / folder).glob("*.jsonl") if pattern.fullmatch(path.name)]
        there.sort(key=lambda path: (f"{folder}/{path.name}" in written, path.stat().st_mtime))
        return read_jsonl(there[-1]) if there else []

    def items(self, stage: str) -> dict[str, str]:
        """Hashes of the files that the items of this stage come from, as the ledger has them; empty: not known."""
        record = ledger.last_run(ledger.read(self.folder), stage) or {}
        inputs = record.get("basis", {}).get("inputs", {}) if isinstance(record.get("basis"), dict) else {}
        short = {name.removeprefix(f"runs/{self.folder.name}/"): value for name, value in inputs.items()}
        return {name: value for name, value in short.items() if name.startswith(ITEMS)}


class Paired(NamedTuple):
    """Second minus first."""

    difference: float
    stderr: float
    n: int
    better: int
    """Items that only the second has right, or documents that it codes in fewer bits."""
    worse: int


def compare(folders: Sequence[Path], copy_to: Path) -> Path:
    """Write compare.html, .md and .json to the store and to `copy_to`. Raises UserError for fewer than two runs."""
    if len(set(folders)) < 2:
        raise UserError(f"compare {' '.join(path.name for path in folders)}: expected two runs or more, each once")
    runs = [read_run(folder, _name(folder, folders)) for folder in folders]
    plot = curves(runs)
    values: dict[str, Any] = {
        "title": f"nanochat runs: {' and '.join(run.name for run in runs)}",
        "runs": [run.name for run in runs],
        "about": {"columns": list(about(runs[0])), "rows": [list(about(run).values()) for run in runs]},
        "settings": settings(runs),
        "results": [results(runs[0], run) for run in runs[1:]],
        "multipliers": [multiplier(*pair) for pair in itertools.combinations(runs, 2)],
        "plots": [plot] if plot else [],
        "apart": not comparable(runs),
    }
    shown = {**values, "plots": [{"file": plot.file, "about": plot.about}] if plot else []}
    files = {
        "compare.md": report.templates(report.escape).get_template("compare.md.j2").render(shown),
        "compare.html": report.page("compare.html.j2", values),
        "compare.json": json.dumps(plain(shown), indent=1) + "\n",
        **({plot.file: plot.svg} if plot else {}),
    }
    return report.write_files(files, copy_to) / "compare.html"


def _name(folder: Path, folders: Sequence[Path]) -> str:
    """Of a run: with its store where another has the same."""
    alone = sum(other.name == folder.name for other in folders) == 1
    return folder.name if alone else f"{folder.parents[1].name}/{folder.name}"


def read_run(folder: Path, name: str) -> Run:
    sections = {section["stage"]: section for section in report.read_sections(folder)}
    return Run(name, folder, sections, read_jsonl(folder / "metrics.jsonl"))


def about(run: Run) -> dict[str, Any]:
    """A few facts of a run for the first table."""
    metrics = run.sections.get("base_train", {}).get("metrics", {})
    records = ledger.read(run.folder)
    newest = ledger.last_run(records, "base_train") or {}
    seconds = [row["seconds"] for row in ledger.summarize(records) if row.get("seconds")] if records else []
    return {
        "run": run.name,
        "commit": newest.get("commit"),
        "device": metrics.get("device"),
        "parameters": metrics.get("parameters"),
        "training FLOPs": metrics.get("training FLOPs"),
        "training minutes": metrics.get("training minutes"),
        "minutes in all stages": sum(seconds) / 60 if seconds else None,
    }


def settings(runs: Sequence[Run]) -> list[list[Any]]:
    """Rows (stage, setting, its value in each run) of those that are not the same in all; "-": it has none."""
    stages = dict.fromkeys(stage for run in runs for stage in run.sections)
    rows = []
    for stage in stages:
        of_runs = [run.sections.get(stage, {}).get("settings", {}) for run in runs]
        if sum(bool(found) for found in of_runs) < 2:
            continue  # a stage that one run alone went through
        for name in dict.fromkeys(name for found in of_runs for name in found):
            values = [number(found.get(name)) for found in of_runs]
            if name not in APART and len(set(values)) > 1:
                rows.append([stage, name, *values])
    return rows


# ---- results


def results(first: Run, second: Run) -> dict[str, Any]:
    """Rows of all scores that both have, and notes on what is not paired."""
    rows: list[list[Any]] = []
    notes: list[str] = []
    for stage in SCORED:
        if stage not in first.sections or stage not in second.sections:
            continue
        found = _documents(first, second) if stage == "base_loss" else _tasks(stage, first, second, notes)
        rows += found or _unpaired(stage, first, second)
        if not found:
            notes.append(f"{stage}: not paired, since not all of its results are there or come from the same files")
    return {"first": first.name, "second": second.name, "rows": rows, "notes": notes}


def _documents(first: Run, second: Run) -> list[list[Any]]:
    """Bits per byte of documents that both scored, byte for byte."""
    rows = []
    for kind, name in (("", "bits per byte"), ("_in_full", "bits per byte, documents in full")):
        if found := _paired_documents(first, second, kind):
            *scores, paired = found
            rows.append(["base_loss", f"{name} ({paired.n:,} documents)", *scores, *_cells(paired)])
    return rows


def _paired_documents(first: Run, second: Run, kind: str = "") -> tuple[float, float, Paired] | None:
    """(bits per byte of the first, of the second, their difference) of two documents or more; kind: "", "_in_full"."""
    size, nats = f"bytes{kind}", f"nats{kind}"
    a, b = ({record["document"]: record for record in run.results("base_loss")} for run in (first, second))
    same = [key for key, record in a.items() if key in b and b[key][size] == record[size] > 0]
    if len(same) < 2:
        return None
    weights = [a[key][size] for key in same]
    bits = [[found[key][nats] / math.log(2) for key in same] for found in (a, b)]
    paired = paired_ratio(bits[0], bits[1], weights)
    return sum(bits[0]) / sum(weights), sum(bits[1]) / sum(weights), paired


def paired_ratio(first: Sequence[float], second: Sequence[float], weights: Sequence[float]) -> Paired:
    """Difference of sum(second) / sum(weights) and sum(first) / sum(weights); its standard error is that of a ratio of
    sums over the items."""
    total, n = sum(weights), len(weights)
    differences = [b - a for a, b in zip(first, second, strict=True)]
    ratio = sum(differences) / total
    spread = sum((value - ratio * weight) ** 2 for value, weight in zip(differences, weights, strict=True))
    stderr = math.sqrt(n / (n - 1) * spread) / total if n > 1 else math.nan
    fewer, more = sum(value < 0 for value in differences), sum(value > 0 for value in differences)
    return Paired(ratio, stderr, n, fewer, more)


def paired_mean(first: Sequence[float], second: Sequence[float]) -> Paired:
    """Difference of the means of scores of the same items, of which the higher is the better."""
    found = paired_ratio(first, second, [1.0] * len(first))
    return found._replace(better=found.worse, worse=found.better)


def _tasks(stage: str, first: Run, second: Run, notes: list[str]) -> list[list[Any]]:
    """Each task that both answered, and the mean of the tasks; empty where the items are not known to be the same."""
    if not first.items(stage) or first.items(stage) != second.items(stage):
        return []
    scores = [_by_task(run.results(stage)) for run in (first, second)]
    rows, means = [], []
    for task in (task for task in scores[0] if task in scores[1]):
        a, b = scores[0][task], scores[1][task]
        same = [key for key in a if key in b]
        if not same:
            continue
        if len(same) < max(len(a), len(b)):
            notes.append(f"{stage}, {task}: {len(same):,} items that both answered, of {len(a):,} and {len(b):,}")
        values = [[found[key] for key in same] for found in (a, b)]
        paired = paired_mean(values[0], values[1])
        means.append(paired)
        averages = [sum(value) / len(value) for value in values]
        rows.append([stage, f"{task} ({paired.n:,} items)", *averages, *_cells(paired)])
    if len(means) > 1:
        mean = sum(each.difference for each in means) / len(means)
        stderr = math.sqrt(sum(each.stderr**2 for each in means)) / len(means)
        counts = (sum(each.n for each in means), sum(each.better for each in means), sum(each.worse for each in means))
        averages = [sum(row[place] for row in rows) / len(rows) for place in (2, 3)]
        rows.append([stage, f"mean of {len(means)} tasks", *averages, *_cells(Paired(mean, stderr, *counts))])
    return rows


def _by_task(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    """task -> number of an item -> its score; of several samples of one answer the share that is right."""
    found: dict[str, dict[int, float]] = {}
    for record in records:
        key = record.get("index", record.get("line"))
        right = record.get("samples_passed") or [record.get("passed", record.get("correct"))]
        if isinstance(key, int) and all(isinstance(value, bool) for value in right):
            found.setdefault(str(record.get("task")), {})[key] = sum(right) / len(right)
    return found


def _cells(paired: Paired) -> list[Any]:
    difference = f"{paired.difference:+.4f} ± {paired.stderr:.4f}"
    clear = abs(paired.difference) > Z95 * paired.stderr
    return [difference, "yes" if clear else "no", f"{paired.better:,} / {paired.worse:,}"]


def _unpaired(stage: str, first: Run, second: Run) -> list[list[Any]]:
    """What the sections say, each with its own standard error."""
    rows = []
    both = [run.sections[stage]["metrics"] for run in (first, second)]
    for name in (name for name in report.shown_metrics(both[0]) if name in both[1] and name != "step"):
        errors = [next((m[name + end] for end in STDERR_SUFFIXES if name + end in m), math.nan) for m in both]
        values = [found[name] for found in both]
        if all(isinstance(value, int | float) for value in (*values, *errors)) and math.isfinite(sum(errors)):
            stderr = math.hypot(*errors)
            apart = values[1] - values[0]
            clear = "yes" if abs(apart) > Z95 * stderr else "no"
            rows.append([stage, f"{name} (not paired)", *values, f"{apart:+.4f} ± {stderr:.4f}", clear, "-"])
    return rows


# ---- curves


def _axes(run: Run, track: Track) -> dict[str, Callable[[Mapping[str, Any]], float | None]]:
    flops = run.flops_per_token()
    of_flops = {} if flops is None else {"training FLOPs": lambda record: flops * record["tokens"]}
    return {"tokens": track.tokens, **of_flops, "minutes of training": track.minutes}


def comparable(runs: Sequence[Run]) -> dict[str, str]:
    """Losses that say the same of all runs: bits per byte of the same text, and nats of the same text's same tokens."""
    tokenizers, texts, sources = zip(*(run.origin() for run in runs), strict=True)
    if len(set(texts if None not in texts else sources)) > 1:
        return {}
    validation = {"Loss/val_bpb": "Validation bits per byte"}
    return validation if len(set(tokenizers)) > 1 else {"Loss/train_loss": "Training loss", **validation}


def curves(runs: Sequence[Run]) -> Plot | None:
    """Losses of the base models over tokens, FLOPs and minutes."""
    names = comparable(runs)
    panels = []
    for metric, title in names.items():
        for axis in ("tokens", "training FLOPs", "minutes of training"):
            series: list[Series] = []
            for run in runs:
                track = Track(run.records, "base")
                if axis in (axes := _axes(run, track)):
                    series += line_series(run.name, track.points(metric, axes[axis]))
            if series:
                panels.append(Panel(title, axis, tuple(series)))
    if not panels:
        return None
    svg = draw(tuple(panels), 3).replace("<defs>", f"<defs>{ON_A_PAGE_OF_ITS_OWN}", 1)
    alone = [{"title": f"{panel.title} over {panel.x}", "svg": inline(draw((panel,)))} for panel in panels]
    return Plot(PLOT, "Losses of the base models over tokens, compute and time", svg, alone)


def multiplier(first: Run, second: Run) -> dict[str, Any]:
    """How many times less tokens, FLOPs and minutes the better of two base models needed for the final loss of the
    other: {better, other, of, loss, stderr, rows of (what, of the other, of the better, multiplier, from, to)}.

    The better run's curve is read where its learning rate has not come down yet, so that the multiplier is a lower
    bound. The interval takes the loss to be reached 1.96 standard errors higher and lower.
    """
    tracks = [Track(run.records, "base") for run in (first, second)]
    none = {"first": first.name, "second": second.name, "rows": []}
    names = comparable((first, second))
    if not names:
        return {**none, "why": "they were trained and measured on different text"}
    for metric in reversed(names):
        found = [_curve(track, metric, track.tokens) for track in tracks]
        if min(map(len, found)) >= 3:
            break
    else:
        return {**none, "why": "fewer than 3 losses of one of them"}
    better = 0 if found[0][-1][1] <= found[1][-1][1] else 1
    loss = found[1 - better][-1][1]
    stderr = _loss_stderr(metric, first, second, tracks)
    rows = []
    runs = (first, second)
    axes = [_axes(run, track) for run, track in zip(runs, tracks, strict=True)]
    for axis in (axis for axis in axes[0] if axis in axes[1]):
        points = [_curve(track, metric, axes[place][axis]) for place, track in enumerate(tracks)]
        if not all(points):
            continue
        spent = points[1 - better][-1][0]
        needed, low, high = (reached(points[better], loss + shift) for shift in (0, Z95 * stderr, -Z95 * stderr))
        if needed:
            spent, needed = (round(spent), round(needed)) if axis == "tokens" else (spent, needed)
            ends = [spent / end if end else None for end in (high, low)]
            rows.append([axis, spent, needed, spent / needed, *ends])
    name = "validation bits per byte" if metric == "Loss/val_bpb" else "training loss in nats per token"
    return {"first": first.name, "second": second.name, "better": runs[better].name, "other": runs[1 - better].name,
            "of": name, "loss": loss, "stderr": stderr, "rows": rows, "why": ""}  # fmt: skip


def _curve(track: Track, metric: str, x: Any) -> list[tuple[float, float]]:
    """Validation losses as they are; training losses smoothed, but for the ends, which are single losses."""
    points = track.points(metric, x)
    if metric == "Loss/val_bpb":
        return points
    side = len(points) // 40
    return smooth(points)[side : len(points) - side]


def reached(points: Sequence[tuple[float, float]], loss: float) -> float | None:
    """Where a curve first comes down to `loss`, between two points by the logarithm of x; None: it never does, or was
    below from its first point on."""
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if y1 <= loss < y0:
            return float(math.exp(math.log(x0) + (y0 - loss) / (y0 - y1) * math.log(x1 / x0))) if x0 > 0 else None
    return points[0][0] if points and points[0][1] == loss else None


def _loss_stderr(metric: str, first: Run, second: Run, tracks: Sequence[Track]) -> float:
    """Of the difference of two losses: paired over documents where both kept them, else of both together; of training
    losses by the spread of their last twentieth about its line."""
    if metric == "Loss/val_bpb":
        if found := _paired_documents(first, second):
            return found[2].stderr
        errors = [run.sections.get("base_loss", {}).get("metrics", {}).get("val_bpb_stderr") for run in (first, second)]
        return math.hypot(*errors) if all(isinstance(error, int | float) for error in errors) else math.nan
    spreads = []
    for track in tracks:
        last = [y for _, y in track.points(metric, track.tokens)]
        last = last[-max(3, len(last) // 20) :]
        steps = [b - a for a, b in itertools.pairwise(last)]  # twice the variance of one loss, whatever the trend
        spreads.append(math.sqrt(sum(step**2 for step in steps) / (2 * len(steps)) / len(last)))
    return math.hypot(*spreads)
