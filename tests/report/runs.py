"""Runs as stages leave them, small."""

import json

from nanochat import ledger, paths, sections

TASKS = [{"task": "copy", "line": line, "correct": line % 3 == 0} for line in range(30)]


def write_run(name, monkeypatch, *, slower=1.0, right=TASKS, nats=2.0, bundle="10 aa", steps=60, text="t", **settings):
    """A base model whose loss falls as 8 / step^0.3, `slower` times later; its scores and the ledger."""
    monkeypatch.setenv("NANOCHAT_RUN_ID", name)
    folder = paths.run_dir()
    about = {"settings": {"depth": 4, "model_tag": name, **settings}}
    training = {"FLOPs per token": 100.0, "parameters": 7_300_000}
    sections.write_section("base_train", "Training", {**about, "metrics": training})
    sections.write_section("dataset", "Text", {"metrics": {"fingerprint": text}})
    scored = {"val_bpb": 1.5, "val_bpb_stderr": 0.1, "step": steps}
    sections.write_section("base_loss", "Loss", {"settings": {"model_tag": name}, "metrics": scored})
    core = {"CORE": 0.2, "CORE standard error": 0.05, "step": steps}
    table = {
        "title": "CORE",
        "columns": ["Task", "Guessing %", "Accuracy", "Standard error"],
        "rows": [["copy", 25, 0.4, 0.1]],
    }
    sections.write_section("base_eval", "CORE", {"settings": {"model_tag": name}, "metrics": core, "tables": [table]})
    records = []
    for step in range(1, steps + 1):
        loss = 8 * (step / slower) ** -0.3
        steady = {"Time/step_seconds": 2.0, "Time/tokens_per_second": 50.0, "Optimization/grad_norm": 1.0}
        records.append({"stage": "base", "step": step, "tokens": 100 * step, "Loss/train_loss": loss, **steady})
        if step % 5 == 0:
            records.append({"stage": "base", "step": step, "tokens": 100 * step, "Loss/val_bpb": loss / 3})
    write(folder / "metrics.jsonl", records)
    base = paths.get_base_dir()
    write(base / "base_eval" / f"{name}_{steps:06d}.jsonl", right)
    documents = [
        {
            "document": f"d{i}",
            "nats": nats * (i + 1) + 0.01 * (i % 2),
            "bytes": i + 1,
            "nats_in_full": 0,
            "bytes_in_full": 0,
        }
        for i in range(20)
    ]
    write(base / "base_loss" / f"{name}_{steps:06d}.jsonl", documents)
    inputs = {f"runs/{name}/eval_bundle/core.yaml": bundle, "checkpoints/base/COMMITTED": name}
    for stage in ("base_train", "base_eval"):
        start = {"stage": stage, "status": "started", "key": "k", "basis": {"inputs": inputs}}
        ledger.append(folder, start)
        ledger.append(folder, {**start, "status": "finished", "seconds": 90.0})
    return folder


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
