"""Reinforcement learning from the outside: it raises the reward, resumes, and says what is wrong."""

import json
import re
import sys
from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from nanochat import checkpoint, cli, sandbox
from nanochat.errors import UserError
from nanochat.paths import checkpoint_dir, run_dir, tokenizer_dir
from nanochat.tasks import arithmetic
from nanochat.tasks.arithmetic import Arithmetic
from nanochat.tokenizer import RustBPETokenizer
from nanochat.train import chat
from scripts import chat_rl, chat_sft
from tests.chat_setup import in_store, kill_before_the_ledgers_line, make_base, make_text
from tests.data.test_text_rows import write_source

SMALL = {"task": "Arithmetic", "num_iterations": 4, "questions_per_step": 4, "num_samples": 4, "max_new_tokens": 20,
         "device_batch_size": 8, "eval_every": -1, "eval_questions": 8, "eval_samples": 2,
         "device_type": "cpu"}  # fmt: skip


@pytest.fixture(scope="module")
def sft_store(tmp_path_factory):
    with in_store(tmp_path_factory.mktemp("sft")) as folder:
        make_text()
        make_base()
        chat_sft.main(chat_sft.Settings(source_stage="base", tasks="Arithmetic:60", num_iterations=2, eval_every=-1,
                                        eval_tokens=512, device_type="cpu"))  # fmt: skip
    return folder


@pytest.fixture
def store(sft_store, tmp_path):
    """A store with an SFT model that has seen a few conversations."""
    with in_store(tmp_path, sft_store):
        yield tmp_path


@pytest.fixture(scope="module")
def rl_store(sft_store, tmp_path_factory):
    """After four steps of reinforcement: nobody but rl() writes into it."""
    with in_store(tmp_path_factory.mktemp("rl"), sft_store) as folder:
        rl()
    return folder


@pytest.fixture
def trained(rl_store):
    with in_store(rl_store):
        yield rl_store


def rl(**changes):
    chat_rl.main(chat_rl.Settings(**{**SMALL, **changes}))


def test_writes_a_checkpoint_and_a_section(trained):
    folder = checkpoint_dir("rl", "m")
    assert checkpoint.committed_steps(folder) == [4] and (folder / "COMPLETE").exists()
    meta = checkpoint.read_meta(folder, 4)
    assert meta["parent"]["stage"] == "sft" and meta["loader"]["position"] == 16
    section = json.loads((run_dir() / "report" / "chat_rl.json").read_text())
    assert [row[0] for row in section["tables"][0]["rows"]] == ["pass@1", "pass@2"] and section["synthetic"]
    lines = [json.loads(line) for line in (run_dir() / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "RL/reward" in line] == [1, 2, 3, 4]
    assert checkpoint.load_model("rl", torch.device("cpu"))[2]["tag"] == "m"


def test_several_tasks_are_practised_together(store):
    rl(task="Arithmetic:30,Arithmetic:10*2", num_iterations=1)
    section = json.loads((run_dir() / "report" / "chat_rl.json").read_text())
    assert section["facts"]["questions"] == 50 and "test questions of Arithmetic" in section["tables"][0]["title"]


class Lengths(Arithmetic):
    """Even a model that has learnt nothing earns something here, and not always the same."""

    def reward(self, conversation, completion):
        return len(completion) % 7 / 7


def practise(out_tag, **changes):
    """A few steps of reinforcement learning on Lengths."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_rl, "make_task", lambda name, split, source: Lengths(split, size=200))
        rl(num_iterations=4, num_samples=8, save_every=2, out_tag=out_tag, **changes)


def saved(stage, tag, step):
    path = checkpoint_dir(stage, tag) / f"step_{step:06d}" / "model.safetensors"
    return load_file(path if path.exists() else checkpoint.export(checkpoint_dir(stage, tag), step))


def test_a_stopped_run_continues_bit_for_bit(store):
    practise("whole")
    practise("parts", resume="auto")
    folder = checkpoint_dir("rl", "parts")
    (folder / "COMPLETE").unlink()
    (folder / "step_000004" / "COMMITTED").unlink()
    practise("parts", resume="auto")
    before, half, whole, parts = (
        saved("sft", "m", 2),
        saved("rl", "whole", 2),
        saved("rl", "whole", 4),
        saved("rl", "parts", 4),
    )
    for name in whole:
        assert torch.equal(whole[name], parts[name])
        assert not torch.equal(whole[name], half[name]) and not torch.equal(half[name], before[name])


def test_a_kill_before_the_ledger_knows_of_the_end_trains_nothing_again(store, capsys):
    assert kill_before_the_ledgers_line("rl", partial(rl, resume="auto", num_iterations=1)) == "finished"
    assert "rl/m is complete: nothing to do" in capsys.readouterr().out


def test_nothing_moves_where_there_is_nothing_to_learn(trained):
    """No answer of this model earns anything on Arithmetic, so there is no gradient to follow."""
    before, after = saved("sft", "m", 2), saved("rl", "m", 4)
    assert all(torch.equal(before[name], after[name]) for name in before)
    lines = [json.loads(line) for line in (run_dir() / "metrics.jsonl").read_text().splitlines()]
    assert {line["Optimization/lr_multiplier"] for line in lines if "RL/reward" in line} == {0.0}


def test_a_run_that_cannot_start_leaves_the_earlier_one_in_place(trained):
    with pytest.raises(UserError, match="no horizon"):
        rl(resume="auto", num_iterations=-1, num_epochs=0)
    assert checkpoint.committed_steps(checkpoint_dir("rl", "m")) == [4]


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--task=Nothing"], 1, "unknown task 'Nothing'"),
        (["--task=Identity"], 1, "--task=Identity: its answers are not generated"),
        (["--task=GSM8K"], 1, "scripts.chat_data"),
        (["--num-samples=1"], 2, "--num-samples"),
        (["--max-new-tokens=120"], 1, "--max-new-tokens=120: the longest question of Arithmetic has"),
        (["--source-stage=mid"], 1, "no mid checkpoint"),
    ],
)
def test_bad_input_is_one_line(store, monkeypatch, capsys, flags, code, message):
    changed = {flag.partition("=")[0] for flag in flags}
    words = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    words = [word for word in words if word.partition("=")[0] not in changed]
    monkeypatch.setattr(sys, "argv", ["chat_rl", *words, *flags])
    with pytest.raises(SystemExit) as end:
        cli.run(chat_rl.main, chat_rl.Settings)
    assert end.value.code == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert not checkpoint_dir("rl", "m").exists()


def test_it_raises_the_reward_on_generated_arithmetic(tmp_path, monkeypatch):
    """A two-layer model that has half learnt one-step problems from worked examples practises on others without."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("NANOCHAT_RUN_ID", "test")

    def easy(name, split, source=None, count=None):
        return Arithmetic(split, size=count)

    # one wording of a few problems of one step with numbers up to 9: all of them take longer to learn
    for number, value in (("LARGE_SHARE", 0.0), ("SMALL", 9), ("LARGEST_FACTOR", 9)):
        monkeypatch.setattr(arithmetic, number, value)
    few = [t._replace(text=re.sub(r"\[([^|]*).*?\]", r"\1", t.text)) for t in arithmetic.TEMPLATES if len(t.steps) == 1]
    monkeypatch.setattr(arithmetic, "TEMPLATES", few[25::3])
    monkeypatch.setattr(chat_rl, "make_task", easy)
    monkeypatch.setattr(chat, "make_task", easy)
    monkeypatch.setattr(chat, "parse_tasks", lambda spec, split, source: [easy(spec, split, source, 2000)])
    task = easy("", "train", count=800)
    documents = [" ".join(spoken(task[i]) for i in range(first, first + 40)) for first in range(0, 800, 40)]
    write_source([documents[:8], documents[8:16], documents[16:]])
    RustBPETokenizer.train_from_iterator(documents, 500).save(tokenizer_dir())
    make_base(depth=2, max_seq_len=64, device_batch_size=16, num_iterations=10)
    chat_sft.main(chat_sft.Settings(source_stage="base", tasks="Arithmetic:2000", num_iterations=110, init_lr_frac=1.0,
                                    eval_every=-1, eval_tokens=512, device_type="cpu"))  # fmt: skip
    rl(num_iterations=40, questions_per_step=16, num_samples=8, max_new_tokens=18, device_batch_size=64,
       init_lr_frac=0.3, eval_questions=64, eval_samples=4)  # fmt: skip
    section = json.loads((run_dir() / "report" / "chat_rl.json").read_text())
    before, after = section["metrics"]["first pass@1"], section["metrics"]["final pass@1"]
    assert 0.2 < before < 0.8 and after > before + 0.15, (before, after)


def spoken(conversation):
    """All that is said, as plain text."""
    contents = [message["content"] for message in conversation["messages"]]
    return " ".join(c if isinstance(c, str) else "".join(part["text"] for part in c) for c in contents)


def test_questions_answered_by_code_are_refused_without_a_sandbox_unless_told(monkeypatch, capsys):
    class Code(Arithmetic):
        runs_code = True

    monkeypatch.setattr(chat_rl, "make_task", lambda name, split, *more: Code(split))
    monkeypatch.setattr(sandbox, "isolation_level", sandbox.Isolation)
    monkeypatch.setenv(sandbox.ALLOW_UNSAFE, "0")
    with pytest.raises(UserError, match=r"grants no namespaces, Landlock or seccomp.*--unsafe-exec"):
        chat_rl.question_task("Arithmetic", "train", None)
    sandbox.allow_unsafe(cli.parse(chat_rl.Settings, ["--unsafe-exec"]).unsafe_exec)
    assert chat_rl.question_task("Arithmetic", "train", None).runs_code
    assert "WARNING: Arithmetic: this kernel grants no namespaces" in capsys.readouterr().out
