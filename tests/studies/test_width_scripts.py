"""The run_*.sh scripts from the outside, with stand-ins for all that takes time: which commands they start."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanochat import cli
from scripts import base_train

ROOT = Path(__file__).parents[2]
BASIC, MUP, GROUP = "run_basic_speedrun.sh", "run_mup_width.sh", "run_mup_width_group_scaling.sh"

# Logs what it is called with, and under which names. Training ends as CODE says, and is complete then; what starts it
# on several GPUs is the real thing up to a torchrun that is this as well; the comparison ends as REPORT says.
PYTHON = """#!/usr/bin/env bash
case $2 in nanochat.launch) exec "$REAL" "$@" ;; esac
[ -z "${SLEEP:-}" ] || trap 'echo saved >"$CALLS.saved"; exit 0' TERM
echo $$ >"$CALLS.pid"
printf '%q ' "$(basename "$0")" "${NANOCHAT_RUN_ID:-none}" "${WANDB_PROJECT:-none}" "$@" >>"$CALLS" && echo >>"$CALLS"
[ -z "${SLEEP:-}" ] || for i in {1..600}; do sleep 0.05; done
[ "${CODE:-0}" = 0 ] || exit "$CODE"
[ "$2" != scripts.mup_transfer ] || exit "${REPORT:-0}"
folder=$NANOCHAT_BASE_DIR/checkpoints/base/$NANOCHAT_RUN_ID
[ -z "${NANOCHAT_RUN_ID:-}" ] || { mkdir -p "$folder" && touch "$folder/COMPLETE"; }
"""


@pytest.fixture
def tree(tmp_path):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "dev").mkdir()
    (tmp_path / "bin").mkdir()
    for name in (BASIC, MUP, GROUP, "width_runs.sh"):
        shutil.copy(ROOT / "scripts" / name, tmp_path / "scripts")
    shutil.copy(ROOT / "dev/stages.sh", tmp_path / "dev")
    (tmp_path / "dev/setup.sh").write_text("touch set-up\nPATH=$PWD/bin:$PATH\n")
    for name in ("python", "torchrun"):
        (tmp_path / "bin" / name).write_text(PYTHON)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def start(tree, script, *words, **environment):
    everything = {"PATH": os.environ["PATH"], "HOME": str(tree), "PYTHONPATH": str(ROOT), "REAL": sys.executable,
                  "CALLS": str(tree / "calls"), "NANOCHAT_BASE_DIR": str(tree / "store"), **environment}  # fmt: skip
    return subprocess.Popen(["bash", f"scripts/{script}", *map(str, words)], cwd=tree, env=everything, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)  # fmt: skip


def run(tree, script, *words, **environment):
    process = start(tree, script, *words, **environment)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def calls(tree):
    """Words of each command: program, run id, W&B project, arguments."""
    path = tree / "calls"
    return [shlex.split(line) for line in path.read_text().splitlines()] if path.exists() else []


COMMON = {
    "--arch=speedrun",
    "--depth=12",
    "--head-dim=128",
    "--total-batch-size=393216",
    "--resume=auto",
    "--run=dummy",
}


def test_the_basic_run(tree):
    code, _, err = run(tree, BASIC, 768, 1750, 1337)
    assert code == 0, err
    ((program, run_id, _, *words),) = calls(tree)
    assert (program, words[:2]) == ("python", ["-m", "scripts.base_train"])
    asked = {"--width=768", "--iterations=1750", "--seed=1337", "--source=fineweb-edu", f"--model-tag={run_id}"}
    assert asked | COMMON <= set(words) and "--mup" not in words
    cli.parse(base_train.Settings, words[2:])  # which refuses what it does not know and what is given twice


def test_a_width_under_mup_with_further_flags_and_text(tree):
    environment = {"SOURCE": "bin:fineweb10B", "WANDB_RUN": "a b"}
    code, _, err = run(tree, MUP, 1024, 768, 1000, 1337, "--depth=6", "--head_dim=64", "--no-compile", **environment)
    assert code == 0, err
    ((_, run_id, _, *words),) = calls(tree)
    asked = {"--mup", "--width=1024", "--base-width=768", "--iterations=1000", "--seed=1337"}
    asked |= {"--run=a b-w1024-base768"}
    assert asked | {"--depth=6", "--head-dim=64", "--no-compile", "--source=bin:fineweb10B"} <= set(words)
    assert "--depth=12" not in words and "--head-dim=128" not in words
    assert "1024" in run_id and "768" in run_id


def test_on_several_gpus_torchrun_starts_it(tree):
    code, _, err = run(tree, MUP, 1024, 768, 1000, 1337, NPROC_PER_NODE="2")
    assert code == 0, err
    ((program, *_, words),) = [(call[0], call) for call in calls(tree)]
    assert program == "torchrun" and any(word.replace("_", "-") == "--nproc-per-node=2" for word in words)
    assert {"scripts.base_train", "--mup", "--width=1024"} <= set(words)


def test_a_group_trains_the_base_and_every_width_alike_and_compares_them(tree):
    code, _, err = run(tree, GROUP, 256, "512 1024 768", 1000, 1337)
    assert code == 0, err
    *trained, last = calls(tree)
    flags = [set(words) for *_, words in ((call[0], call[3:]) for call in trained)]
    for width, words in zip((256, 512, 768, 1024), flags, strict=True):
        assert {"--mup", f"--width={width}", "--base-width=256", "--iterations=1000", "--seed=1337"} | COMMON <= words
    assert all(len(words - flags[0]) == 2 for words in flags[1:])  # the width and the tag
    assert {call[2] for call in trained} == {"speedrun-mup-group"}
    tags = [call[1] for call in trained]
    assert len(set(tags)) == 4
    assert last[3:] == ["-m", "scripts.mup_transfer", "--widths=256,512,768,1024", f"--compare-runs={','.join(tags)}"]


def test_every_call_goes_through_all_widths_and_base_train_knows_what_is_finished(tree):
    assert run(tree, GROUP, 256, "512", 1000, 1337, CODE="3")[0] == 3
    assert len(calls(tree)) == 1  # the first failed, and nothing came after it
    for _ in range(2):
        (tree / "calls").unlink()
        assert run(tree, GROUP, 256, "512", 1000, 1337)[0] == 0
        *trained, _ = calls(tree)
        assert len(trained) == 2 and all("--resume=auto" in call for call in trained)


def test_a_group_fails_where_wider_is_not_better(tree):
    """As the comparison does, which tests/studies/test_mup_transfer.py has."""
    code, _, err = run(tree, GROUP, 256, "512 768", 1000, 1337, REPORT="1")
    assert code == 1 and err == "" and len(calls(tree)) == 4


@pytest.mark.parametrize(
    ("script", "words"),
    [(BASIC, [768, 1750]), (BASIC, []), (MUP, [1024, 768, 1000]), (GROUP, [256, "512", 1000])],
)
def test_too_few_words_show_the_usage(tree, script, words):
    code, out, err = run(tree, script, *words)
    assert code == 2 and out == "" and f"bash scripts/{script}" in err and "SOURCE" in err and "set -euo" not in err
    assert not (tree / "set-up").exists() and not calls(tree)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (BASIC, ["wide", 1750, 1337]),
        (BASIC, [800, 1750, 1337]),
        (BASIC, [768, 0, 1337]),
        (BASIC, [768, 1750, -1]),
        (BASIC, [768, "1e3", 1]),
        (MUP, [1024, 700, 1000, 1337]),
        (GROUP, [256, "", 1000, 1337]),
        (GROUP, [256, "512 many", 1000, 1337]),
        (GROUP, [256, "256", 1000, 1337]),
        (GROUP, [256, "512", 1000, 1337, "--head-dim=0"]),
    ],
)
def test_impossible_numbers_are_refused_in_one_line_before_anything_is_set_up(tree, script, words):
    code, out, err = run(tree, script, *words)
    assert code == 1 and out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert not (tree / "set-up").exists() and not calls(tree)


def test_base_train_refuses_what_the_script_sets_itself_and_what_it_does_not_know(tree, capsys):
    assert run(tree, MUP, 768, 768, 10, 1337, "--no_such=1")[0] == 0
    ((_, _, _, *given),) = calls(tree)
    assert "--no-such=1" in given
    given.remove("--no-such=1")
    cli.parse(base_train.Settings, given[2:])
    wrong = ("depth=6", "--mup", "--seed=5", "--num-iterations=5", "--base-width=512", "--model-tag=x", "--no-such=1")
    for flag in wrong:
        with pytest.raises(SystemExit):
            cli.parse(base_train.Settings, [*given[2:], flag])
        assert capsys.readouterr().err.count("\n") == 1


def test_mistakes_in_the_environment_are_refused(tree):
    code, _, err = run(tree, BASIC, 768, 10, 1, NPROC_PER_NODE="two")
    assert code == 1 and err.startswith("error: ") and err.count("\n") == 1 and not calls(tree)


def test_training_that_was_stopped_from_outside_is_not_taken_for_finished(tree):
    """A signal that reaches training alone: it saves, and ends with 0, but it has not come to its end."""
    process = start(tree, GROUP, 256, "512", 1000, 1337, SLEEP="1")
    for _ in range(600):
        if calls(tree):
            break
        time.sleep(0.05)
    os.kill(int((tree / "calls.pid").read_text()), signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75 and "call again to continue" in err and len(calls(tree)) == 1
    (tree / "calls").unlink()
    assert run(tree, GROUP, 256, "512", 1000, 1337)[0] == 0 and len(calls(tree)) == 3


def test_training_that_fails_at_once_fails_the_script(tree):
    """So soon that bash has buried it before it is asked whether it lives."""
    (tree / "dev/setup.sh").write_text('PATH=$PWD/bin:$PATH\nkill() { sleep 0.3; builtin kill "$@"; }\n')
    code, _, _ = run(tree, BASIC, 768, 10, 1, CODE="3")
    assert code == 3 and not (tree / "store/runs").exists()


@pytest.mark.parametrize(("name", "expected"), [("us", "us-w{}"), ("auto", "auto"), ("dummy", "dummy")])
def test_each_width_of_a_group_has_a_name_of_its_own(tree, name, expected):
    assert run(tree, GROUP, 256, "512", 1000, 1337, WANDB_RUN=name)[0] == 0
    named = [[word for word in call if word.startswith("--run=")] for call in calls(tree)[:2]]
    assert named == [[f"--run={expected.format(width)}"] for width in (256, 512)]


@pytest.mark.parametrize(
    ("script", "words"),
    [(BASIC, [768, 10, 1]), (MUP, [1024, 768, 10, 1]), (GROUP, [256, "512", 10, 1])],
)
def test_the_users_project_stands(tree, script, words):
    assert run(tree, script, *words, WANDB_PROJECT="mine")[0] == 0
    assert {call[2] for call in calls(tree)} == {"mine"}


def test_a_signal_lets_training_save_and_nothing_follows(tree):
    process = start(tree, GROUP, 256, "512", 1000, 1337, SLEEP="1")
    for _ in range(600):
        if calls(tree):
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75 and (tree / "calls.saved").exists() and len(calls(tree)) == 1
    (tree / "calls").unlink()
    assert run(tree, GROUP, 256, "512", 1000, 1337)[0] == 0 and len(calls(tree)) == 3
