"""The pretraining script from the outside: its arithmetic, what it writes, and what it says to bad input."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from nanochat import checkpoint, cli, ledger
from nanochat.data.local import take_folder
from nanochat.errors import UserError
from nanochat.gpt import GPT
from nanochat.paths import checkpoint_dir, eval_bundle_dir, run_dir, tokenizer_dir
from nanochat.tokenizer import RustBPETokenizer
from scripts import base_train
from scripts.base_train import Settings, build_config, fade_tables, main, plan_horizon, resolve
from tests.data.test_text_rows import write_source
from tests.processes import run_processes

SMALL = {"depth": 1, "aspect_ratio": 32, "head_dim": 32, "max_seq_len": 32, "device_batch_size": 4,
         "total_batch_size": 256, "num_iterations": 6, "eval_tokens": 512, "core_metric_every": -1,
         "sample_every": -1, "eval_every": 3, "source": "pydocs", "device_type": "cpu"}  # fmt: skip


def words(seed, count=400):
    generator = torch.Generator().manual_seed(seed)
    vocabulary = [f"word{i}" for i in range(50)]
    return " ".join(vocabulary[i] for i in torch.randint(50, (count,), generator=generator).tolist())


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """A store with a small data set and tokenizer."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("NANOCHAT_RUN_ID", "test")
    documents = [words(seed) for seed in range(24)]
    write_source([documents[:10], documents[10:20], documents[20:]])
    RustBPETokenizer.train_from_iterator(documents, 300).save(tokenizer_dir())
    return tmp_path


@pytest.mark.parametrize(("depth", "steps"), [(20, 21_400), (32, 71_680)])
def test_the_classic_horizons(depth, steps):
    settings = Settings(depth=depth)
    with torch.device("meta"):
        model = GPT(build_config(resolve(settings), 65536))
    assert plan_horizon(settings, model.num_params(), model.estimate_flops())[0] == steps


def test_horizon_precedence_and_errors():
    flops = Settings(num_iterations=-1, target_flops=1e15, total_batch_size=1000)
    assert plan_horizon(flops, 10, 1e9)[0] == 1000
    assert plan_horizon(Settings(num_iterations=7, target_flops=1e15), 10, 1e9)[0] == 7
    with pytest.raises(UserError, match="no horizon"):
        plan_horizon(Settings(target_param_data_ratio=-1), 10, 1e9)
    with pytest.raises(UserError, match="less than one step"):
        plan_horizon(Settings(target_flops=1.0), 10, 1e9)


def test_trains_saves_and_reports(prepared):
    main(Settings(**{**SMALL, "sample_every": 6}))
    folder = checkpoint_dir("base", "d1")
    assert checkpoint.committed_steps(folder) == [6] and (folder / "COMPLETE").exists()
    section = json.loads((run_dir() / "report" / "base_train.json").read_text())
    assert section["metrics"]["steps"] == 6 and len(section["samples"]) == 9
    records = [json.loads(line) for line in (run_dir() / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "Loss/val_bpb" in r] == [3, 6]
    assert [r["step"] for r in records if "Loss/train_loss" in r] == [1, 2, 3, 4, 5, 6]
    meta = checkpoint.read_meta(folder, 6)
    assert meta["settings"]["depth"] == 1 and meta["val_bpb"] == section["metrics"]["final val_bpb"]
    assert ledger.missing([str(folder / "COMPLETE")]) == []


def test_what_only_this_run_has_is_made_again_and_nothing_trained(prepared, capsys):
    settings = Settings(**{**SMALL, "num_iterations": 3, "sample_every": 6, "resume": "auto"})
    main(settings)
    folder, report = checkpoint_dir("base", "d1"), run_dir() / "report" / "base_train.json"
    section, records = json.loads(report.read_text()), (run_dir() / "metrics.jsonl").read_text()
    weights = (folder / "step_000003" / "model.safetensors").read_bytes()
    kept = (folder / "tokenizer" / "tokenizer.json").read_bytes()
    report.write_text(report.read_text().replace('"steps": 3', '"steps": 4'))
    (folder / "tokenizer" / "tokenizer.json").write_bytes(kept + b" ")
    capsys.readouterr()
    main(settings)
    out = capsys.readouterr().out
    assert "resumed from step 3" in out and "tok/s" not in out
    again = json.loads(report.read_text())
    for one in (section, again):
        for name in ("training minutes", "peak memory GiB"):
            del one["metrics"][name]
    assert {**again, "time": 0} == {**section, "time": 0}
    assert (run_dir() / "metrics.jsonl").read_text() == records
    assert (folder / "tokenizer" / "tokenizer.json").read_bytes() == kept
    assert (folder / "step_000003" / "model.safetensors").read_bytes() == weights
    main(settings)
    assert "is complete: nothing to do" in capsys.readouterr().out


def test_a_folder_of_text_that_was_edited_is_trained_on_anew(prepared, capsys):
    source = f"local:{prepared}/text"
    settings = Settings(**{**SMALL, "source": source, "num_iterations": 1, "eval_every": -1, "resume": "auto"})
    (prepared / "text").mkdir()
    for name, said in (("a", "saved"), ("a", "is complete: nothing to do"), ("b", "differs in data: kept as d1.1")):
        (prepared / "text" / f"{name}.txt").write_text("\n\n".join(words(ord(name) + n) for n in range(30)))
        take_folder(source, -1)
        main(settings)
        assert said in capsys.readouterr().out
    meta = checkpoint_dir("base", "d1") / "step_000001" / "meta.json"
    assert json.loads(meta.read_text())["data"]


def write_bundle(folder):
    """One multiple-choice task in the published layout."""
    (folder / "eval_data").mkdir(parents=True)
    items = [{"query": words(seed, 5), "choices": ["word1", "word2"], "gold": seed % 2} for seed in range(6)]
    (folder / "eval_data" / "pick.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    task = {
        "label": "offline_pick",
        "dataset_uri": "pick.jsonl",
        "num_fewshot": [1],
        "icl_task_type": "multiple_choice",
    }
    (folder / "core.yaml").write_text(json.dumps({"icl_tasks": [task]}))  # JSON is YAML
    (folder / "eval_meta_data.csv").write_text("Eval Task,Random baseline\noffline_pick,50\n")


def test_core_and_samples_at_their_intervals(prepared, capsys):
    write_bundle(eval_bundle_dir())
    changes = {"core_metric_every": 4, "core_metric_max_per_task": 4, "sample_every": 2, "max_seq_len": 64}
    main(Settings(**{**SMALL, **changes}))
    records = [json.loads(line) for line in (run_dir() / "metrics.jsonl").read_text().splitlines()]
    scores = {r["step"]: v for r in records for name, v in r.items() if name.startswith("Eval/CORE-offline")}
    assert sorted(scores) == [4, 6] and all(-1 <= score <= 1 for score in scores.values())
    assert capsys.readouterr().out.count("--- The capital of Italy is") == 3


def test_two_runs_never_share_a_folder(prepared, capsys):
    settings = Settings(**{**SMALL, "num_iterations": 2})
    main(settings)
    with pytest.raises(UserError, match="holds a run already"):
        main(settings)
    main(Settings(**{**SMALL, "num_iterations": 3, "resume": "auto"}))
    assert "differs in num_iterations: kept as d1.1" in capsys.readouterr().out
    assert checkpoint.committed_steps(checkpoint_dir("base", "d1.1")) == [2]
    assert checkpoint.committed_steps(checkpoint_dir("base", "d1")) == [3]
    main(Settings(**{**SMALL, "num_iterations": 3, "resume": "auto", "eval_every": -1}))
    assert "d1 is complete: nothing to do" in capsys.readouterr().out
    assert sorted(path.name for path in checkpoint_dir("base", "d1").parent.iterdir()) == ["d1", "d1.1"]


def command(**changes):
    values = {**SMALL, **changes}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]
    return [sys.executable, "-m", "scripts.base_train", *flags]


@pytest.fixture
def one_thread():
    """Sums as a process with OMP_NUM_THREADS=1 makes them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_sigterm_saves_exits_0_and_the_rest_is_bit_for_bit(prepared, one_thread, capsys):
    many = {"num_iterations": 150, "eval_every": -1, "save_every": -1}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    parts = {**many, "model_tag": "parts", "resume": "auto"}
    process = subprocess.Popen(command(**parts), env=environment, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 00003"):
            process.send_signal(signal.SIGTERM)
            break
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and "stopped by SIGTERM" in rest
    folder = checkpoint_dir("base", "parts")
    (stopped_at,) = checkpoint.committed_steps(folder)
    assert 3 <= stopped_at < 150 and not (folder / "COMPLETE").exists()
    main(Settings(**{**SMALL, **parts}))
    assert f"resumed from step {stopped_at}" in capsys.readouterr().out
    main(Settings(**{**SMALL, **many, "model_tag": "whole"}))
    whole, again = (
        load_file(checkpoint_dir("base", tag) / "step_000150" / "model.safetensors") for tag in ("whole", "parts")
    )
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def on_each_rank(settings):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base_train, "compute_cleanup", lambda: None)  # the process group is the test's
        main(settings)


def test_two_ranks_set_a_run_of_other_settings_aside_once(prepared, capfd):
    main(Settings(**{**SMALL, "num_iterations": 2, "model_tag": "two"}))
    capfd.readouterr()
    longer = Settings(**{**SMALL, "num_iterations": 3, "model_tag": "two", "resume": "auto"})
    run_processes(2, on_each_rank, longer, heard=True)
    assert capfd.readouterr().out.count("differs in num_iterations: kept as two.1") == 1
    assert checkpoint.committed_steps(checkpoint_dir("base", "two")) == [3]


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--depht=3"], 2, "Unknown option: --depht. Did you mean --depth?"),
        (["--depth=0"], 2, 'Invalid value "0" for --depth. Must be >= 1.'),
        (["--total-batch-size=300"], 1, "--total-batch-size=300 is no multiple of --max-seq-len=32"),
        (["--device-type=cuda"], 1, "--device-type=cuda: no such device"),
        (["--source=nowhere"], 1, "--source=nowhere: expected"),
        (["--source=climbmix"], 1, "no train shards of climbmix"),
        (["--core-metric-every=1"], 1, "eval_bundle"),
        (["--window-pattern=XY"], 1, "window_pattern='XY'"),
        (["--head-dim=31"], 1, "even multiple"),
    ],
)
def test_bad_input_is_one_line(prepared, monkeypatch, capsys, flags, code, message):
    if flags == ["--device-type=cuda"] and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    changed = {flag.partition("=")[0] for flag in flags}
    usual = [word for word in command()[3:] if word.partition("=")[0] not in changed]
    monkeypatch.setattr(sys, "argv", ["base_train", *usual, *flags])
    with pytest.raises(SystemExit) as end:
        cli.run(main, Settings)
    assert end.value.code == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert not checkpoint_dir("base", "d1").exists()


def test_no_tokenizer(prepared):
    for path in tokenizer_dir().iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"scripts\.tok_train"):
        main(Settings(**SMALL))


@pytest.mark.parametrize("name", ["model.safetensors", "state/__0_0.distcp", "meta.json"])
def test_a_run_whose_last_checkpoint_is_damaged_goes_on_from_the_one_before(prepared, capsys, name):
    settings = Settings(**{**SMALL, "num_iterations": 4, "save_every": 2, "resume": "auto"})
    main(settings)
    folder = checkpoint_dir("base", "d1")
    # cloned: the file is mapped, and written to
    before = {key: value.clone() for key, value in load_file(folder / "step_000004" / "model.safetensors").items()}
    (folder / "step_000004" / name).write_bytes(b"x")
    capsys.readouterr()
    main(settings)  # which was complete
    out = capsys.readouterr().out
    assert (
        "is damaged" in out and "kept as step_000004.damaged.1, step 2 is used" in out and "resumed from step 2" in out
    )
    after = load_file(folder / "step_000004" / "model.safetensors")
    assert all(torch.equal(value, after[name]) for name, value in before.items()) and (folder / "COMPLETE").exists()
    for step in (2, 4):
        (folder / f"step_00000{step}" / "meta.json").write_bytes(b"x")
    main(settings)
    out = capsys.readouterr().out
    assert "there is none before it: kept as d1.1, starting anew" in out and (folder / "COMPLETE").exists()


def test_too_little_data_is_said_before_training(prepared, capsys):
    long = {**SMALL, "num_iterations": 2, "total_batch_size": 25_600, "device_batch_size": 400, "eval_every": -1}
    main(Settings(**long))
    out = capsys.readouterr().out
    assert "too little data" in out and out.index("too little data") < out.index("step 00001")
    assert "n-gram" not in out
    tables = {"ngram_embeds": 2, "ngram_slots": 1, "model_tag": "tables"}
    main(Settings(**{**long, **tables}))
    assert "n-gram tables learn" in capsys.readouterr().out


def test_tables_forget_what_a_document_left_there_before_it_comes_again():
    config = build_config(resolve(Settings(arch="ngram", depth=2, ngram_slots=1)), 50, 0)
    model = GPT(config)
    model.init_weights()

    def decays(epochs):
        optimizer = model.setup_optimizer()
        fade_tables(optimizer, 4.0, epochs, 1000)
        return {group["label"]: group["lr"] * group["weight_decay"] for group in optimizer.param_groups}

    assert not any(decays(1.0).values())  # read once: as ever
    assert 0 < max(decays(1.1).values()) < max(decays(1.6).values()) < max(decays(3.0).values())
    found = decays(5.0)
    tables = {"value_embeddings", "n-gram_embeddings"}
    assert {name for name, decay in found.items() if decay} == tables
    for name in tables:
        assert (1 - found[name]) ** (1000 / 5) == pytest.approx(math.exp(-4), rel=0.05)
    assert max(decays(900.0).values()) == 1.0  # a pass in a step or two: all is gone, and no more than all


def test_time_is_not_spent_on_evaluations(prepared, monkeypatch):
    from nanochat.train import loop
    from nanochat.train import run as script

    evaluations, clock, measure = [], time.perf_counter, script.evaluate_bpb

    def an_hour_long(*args):
        evaluations.append(1)
        return measure(*args)

    monkeypatch.setattr(script, "evaluate_bpb", an_hour_long)
    monkeypatch.setattr(loop.time, "perf_counter", lambda: clock() + 3600 * len(evaluations))
    main(Settings(**SMALL))
    section = json.loads((run_dir() / "report" / "base_train.json").read_text())
    assert len(evaluations) == 2 and section["metrics"]["training minutes"] < 30
