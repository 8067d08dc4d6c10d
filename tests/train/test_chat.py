"""mid_train and chat_sft from the outside: what they inherit, write, repeat, and say to bad input."""

import json
import shutil
import sys
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from nanochat import checkpoint, cli
from nanochat.errors import UserError
from nanochat.paths import checkpoint_dir, run_dir, tokenizer_dir
from nanochat.tasks.registry import parse_tasks
from nanochat.tokenizer import RustBPETokenizer
from nanochat.train import chat
from nanochat.train.chat import inherit, plan_steps
from scripts import chat_sft, mid_train
from tests.chat_setup import in_store, kill_before_the_ledgers_line, make_base, make_text

SMALL = {"tasks": "Arithmetic:60,Identity:40", "num_iterations": 4, "eval_tokens": 1024, "eval_every": 2,
         "device_type": "cpu"}  # fmt: skip


@pytest.fixture(scope="module")
def base_store(tmp_path_factory):
    with in_store(tmp_path_factory.mktemp("store")) as folder:
        make_text()
        make_base()
    return folder


@pytest.fixture
def store(base_store, tmp_path):
    """A copy of the store with a base model in it."""
    with in_store(tmp_path, base_store):
        yield tmp_path


def mid(**changes):
    mid_train.main(mid_train.Settings(**{**SMALL, **changes}))


def sft(**changes):
    chat_sft.main(chat_sft.Settings(**{**SMALL, **changes}))


def last_weights(stage, tag="m", step=4):
    return load_file(checkpoint_dir(stage, tag) / f"step_{step:06d}" / "model.safetensors")


def test_base_to_mid_to_sft(store):
    mid()
    sft()
    for stage, parent in (("mid", "base"), ("sft", "mid")):
        folder = checkpoint_dir(stage, "m")
        assert checkpoint.committed_steps(folder) == [4] and (folder / "COMPLETE").exists()
        meta = checkpoint.read_meta(folder, 4)
        assert meta["parent"]["stage"] == parent and meta["parent"]["tag"] == "m"
        base = checkpoint.read_meta(checkpoint_dir("base", "m"), 3)["recipe"]
        assert meta["recipe"] == base  # sequence length, batch, source and rates
        model, _, _ = checkpoint.load_model(stage, torch.device("cpu"))
        assert model.config.sequence_len == 128
    lines = [json.loads(line) for line in (run_dir() / "metrics.jsonl").read_text().splitlines()]
    for stage in ("mid", "sft"):
        assert [line["step"] for line in lines if line["stage"] == stage and "Loss/val_bpb" in line] == [2, 4]
        section = json.loads(
            (run_dir() / "report" / f"{'mid_train' if stage == 'mid' else 'chat_sft'}.json").read_text()
        )
        assert section["synthetic"] and len(section["samples"]) == 6
        assert [row[:2] for row in section["tables"][0]["rows"]] == [["Arithmetic", 60], ["Identity", 40]]
    mid_section = json.loads((run_dir() / "report" / "mid_train.json").read_text())
    assert mid_section["metrics"]["share of positions trained on"] > 0.95  # stream, all tokens
    assert section["metrics"]["share of positions trained on"] < 0.7  # whole conversations, answers


def test_the_answers_of_conversations_are_learnt(store):
    sft(source_stage="base", num_iterations=60, tasks="Identity:20", out_tag="long", eval_every=-1)
    lines = [json.loads(line) for line in (run_dir() / "metrics.jsonl").read_text().splitlines()]
    losses = [line["Loss/train_loss"] for line in lines if line["stage"] == "sft" and "Loss/train_loss" in line]
    assert losses[-1] < 0.5 * losses[0]


def test_a_stopped_run_continues_bit_for_bit(store):
    mid(save_every=2, out_tag="whole")
    mid(save_every=2, out_tag="parts", resume="auto")
    folder = checkpoint_dir("mid", "parts")
    (folder / "COMPLETE").unlink()
    (folder / "step_000004" / "COMMITTED").unlink()  # as if it had been stopped after step 2
    mid(save_every=2, out_tag="parts", resume="auto")
    whole, parts = last_weights("mid", "whole"), last_weights("mid", "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert not checkpoint_dir("mid", "parts.1").exists()


def test_a_kill_before_the_ledger_knows_of_the_end_trains_nothing_again(store, capsys):
    for stage, train in {"base": make_base, "mid": mid, "sft": sft}.items():
        assert kill_before_the_ledgers_line(stage, partial(train, resume="auto")) == "finished"
        assert f"{stage}/m is complete: nothing to do" in capsys.readouterr().out


def test_runs_never_share_a_folder(store, capsys):
    mid()
    with pytest.raises(UserError, match=r"holds a run already .*, complete.: --out-tag=NAME writes elsewhere"):
        mid()
    make_base(model_tag="other")
    mid(model_tag="other")
    assert checkpoint.committed_steps(checkpoint_dir("mid", "other")) == [4]
    # the same tag and settings on a base model that was trained anew is another run
    (checkpoint_dir("mid", "m") / "COMPLETE").unlink()
    checkpoint.set_aside(checkpoint_dir("base", "m"))
    make_base(num_iterations=2)
    mid(model_tag="m", resume="auto")
    assert "differs in parent: kept as m.1" in capsys.readouterr().out


def test_batches_without_a_single_target_train_on_and_have_no_loss(store, tmp_path, capsys):
    """Answers that lie behind the end of the row: every target is masked, which is said; the loss is never 0 or NaN."""
    question = {"role": "user", "content": "word1 " * 200}
    lines = [json.dumps([question, {"role": "assistant", "content": "yes"}])] * 6
    lines.append(json.dumps([{"role": "user", "content": "word2"}, {"role": "assistant", "content": "word3"}]))
    (tmp_path / "long.jsonl").write_text("\n".join(lines))
    sft(source_stage="base", tasks=str(tmp_path / "long.jsonl"), num_iterations=14, eval_every=-1, max_seq_len=64,
        device_batch_size=1, total_batch_size=64, out_tag="masked", eval_tokens=1024)  # fmt: skip
    records = [json.loads(line) for line in (run_dir() / "metrics.jsonl").read_text().splitlines()]
    losses = [line["Loss/train_loss"] for line in records if line["stage"] == "sft" and "Loss/train_loss" in line]
    steps = [line["step"] for line in records if line["stage"] == "sft" and "Optimization/grad_norm" in line]
    assert steps == list(range(1, 15)) and len(losses) == 2 and min(losses) > 1
    said = capsys.readouterr().out
    assert "note: 85.7% of the conversations are longer than a row of 64 tokens" in said
    assert "nothing is left to train on of 85.7%" in said and said.count("has no target") == 1
    metrics = json.loads((run_dir() / "report" / "chat_sft.json").read_text())["metrics"]
    assert metrics["steps without a target"] == 12 and 1 < metrics["final train_loss"] < 10
    assert all(value.isfinite().all() for value in last_weights("sft", "masked", 14).values())


RECIPE = {"source": "pydocs", "max_seq_len": 128, "device_batch_size": 32, "total_batch_size": 8192,
          "matrix_lr": 0.02, "embedding_lr": 0.2, "unembedding_lr": 0.004, "scalar_lr": 0.04,
          "value_embedding_lr": 0.2, "weight_decay": 0.1, "use_muon": True}  # fmt: skip


def test_what_is_inherited():
    assert inherit(mid_train.Settings(), RECIPE) == RECIPE
    smaller = inherit(mid_train.Settings(total_batch_size=2048, embedding_lr=0.3), RECIPE)
    assert smaller["matrix_lr"] == pytest.approx(0.01) and smaller["embedding_lr"] == 0.3
    assert inherit(mid_train.Settings(device_batch_size=5), RECIPE)["device_batch_size"] == 5


def test_steps():
    assert plan_steps(mid_train.Settings(num_epochs=2), rows=100, rows_per_step=8) == 25
    assert plan_steps(mid_train.Settings(num_iterations=7), 100, 8) == 7
    assert plan_steps(mid_train.Settings(num_epochs=0.001), 100, 8) == 1
    with pytest.raises(UserError, match="no horizon"):
        plan_steps(mid_train.Settings(num_epochs=0), 100, 8)


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--tasks=Nothing"], 1, "unknown task 'Nothing': expected SmolTalk"),
        (["--tasks="], 1, "no tasks given"),
        (["--tasks=GSM8K"], 1, "scripts.chat_data"),
        (["--tasks=absent.jsonl"], 1, "absent.jsonl"),
        (["--model-tag=d99"], 1, "no base checkpoint tagged d99"),
        (["--total-batch-size=100"], 1, "--total-batch-size=100 is no multiple of"),
        (["--max-seq-len=4096"], 1, "--max-seq-len=4096: the model was trained on rows of 128"),
        (["--packing=loose"], 2, "--packing"),
        (["--num-iterations=0"], 2, "--num-iterations"),
        (
            ["--max-seq-len=4", "--packing=bestfit", "--loss-on=assistant"],
            1,
            "--max-seq-len=4: no answer lies within a row",
        ),
    ],
)
def test_bad_input_is_one_line(store, monkeypatch, capsys, flags, code, message):
    usual = {"tasks": "Identity", "num_iterations": 1, "device_type": "cpu"}
    changed = {flag.partition("=")[0] for flag in flags}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in usual.items()]
    words = [word for word in words if word.partition("=")[0] not in changed]
    monkeypatch.setattr(sys, "argv", ["mid_train", *words, *flags])
    with pytest.raises(SystemExit) as end:
        cli.run(mid_train.main, mid_train.Settings)
    assert end.value.code == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert not checkpoint_dir("mid", "m").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "chats.jsonl:2"),
        ('[{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]', "chats.jsonl:2: message 1: role is"),
        ('[{"role": "user", "content": "a"}, {"role": "assistant", "content": [{"type": "image", "text": ""}]}]',
         "unknown type 'image'"),
        ("[]", "chats.jsonl:2"),
    ],
)  # fmt: skip
def test_bad_lines_of_a_file_are_named(store, tmp_path, line, message):
    good = '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]'
    (tmp_path / "chats.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(UserError) as error:
        mid(tasks=str(tmp_path / "chats.jsonl"))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_model_is_trained_on_with_its_own_tokenizer_and_only_with_that(store, capsys):
    own = checkpoint_dir("base", "m") / "tokenizer"
    wanted = json.loads((own / "meta.json").read_text())["hash"]
    RustBPETokenizer.train_from_iterator(["something else altogether"], 300).save(tokenizer_dir())
    mid()
    assert checkpoint.read_meta(checkpoint_dir("mid", "m"), 4)["tokenizer_hash"] == wanted
    assert json.loads((checkpoint_dir("mid", "m") / "tokenizer" / "meta.json").read_text())["hash"] == wanted
    for folder in (own, checkpoint_dir("mid", "m") / "tokenizer"):
        shutil.rmtree(folder)
    with pytest.raises(UserError, match=f"was trained with tokenizer {wanted}, .* put that tokenizer into {own}"):
        mid(out_tag="other")


def test_no_parent(store):
    with pytest.raises(UserError, match=r"no mid checkpoint in .*: run `python -m scripts\.mid_train` first"):
        sft()


def test_other_data_under_the_same_name_is_another_run(store, tmp_path, capsys):
    path = tmp_path / "mine.jsonl"

    def write(answer):
        talk = [{"role": "user", "content": "word1"}, {"role": "assistant", "content": answer}]
        path.write_text(f"{json.dumps(talk)}\n")

    options = {"tasks": str(path), "num_iterations": 2, "eval_every": -1, "resume": "auto"}
    write("word2")
    mid(**options)
    (checkpoint_dir("mid", "m") / "COMPLETE").unlink()
    write("word3")
    mid(**options)
    assert "differs in data: kept as m.1" in capsys.readouterr().out


def test_held_out_answers_behind_the_end_of_the_row_do_not_stop_a_run(store, tmp_path, monkeypatch, capsys):
    question = {"role": "user", "content": "word1 " * 200}
    (tmp_path / "long.jsonl").write_text(json.dumps([question, {"role": "assistant", "content": "yes"}]))
    monkeypatch.setattr(chat, "held_out", lambda spec, source: parse_tasks(str(tmp_path / "long.jsonl"), "train")[0])
    sft(source_stage="base", num_iterations=2)
    assert "nothing is measured on the way: no held-out answer" in capsys.readouterr().out


def test_a_tag_is_found_as_it_was_written(store):
    make_base(model_tag="my run", num_iterations=1)
    mid(model_tag="my run", num_iterations=1)
    assert checkpoint.committed_steps(checkpoint_dir("mid", "my run")) == [1]
