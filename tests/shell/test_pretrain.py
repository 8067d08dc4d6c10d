import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanochat import ledger

ROOT = Path(__file__).parents[2]

# Logs what it is called with. Where this runs, who joins in and what tasks read are the real thing; with RUN set, so is
# the launcher of a stage, up to a torchrun that only logs, and with CHECKS the check of all flags.
PYTHON = """#!/usr/bin/env bash
if [ "$1" = -c ]; then exec "$REAL" "$@"; fi
if [ "$2 $3" = "nanochat.pipeline check" ]; then
  if [ -n "${CHECKS:-}" ]; then exec "$REAL" "$@"; else exec cat >/dev/null; fi
fi
case $2 in nanochat.launch | nanochat.cluster.nodes | scripts.chat_data) exec "$REAL" "$@" ;; esac
printf ' %q' "$@" >>"$CALLS" && echo >>"$CALLS"
if [ -n "${RUN:-}" ] && [ "$2" = nanochat.pipeline ]; then
  while [ "$1" != -- ]; do shift || exit 0; done
  if [ "$4" = nanochat.launch ]; then exec "$REAL" "${@:3}"; fi
fi
"""
# As the real one, that of node 0 ends only once the other node has come.
TORCHRUN = """#!/usr/bin/env bash
echo "$NODE_RANK $*" >>"$CALLS.torchrun"
if [ "$NODE_RANK" = 0 ]; then
  for ((tries = 0; tries < 600; tries++)); do
    [ "$(grep -c ^1 "$CALLS.torchrun")" -lt "$(grep -c ^0 "$CALLS.torchrun")" ] || break
    sleep 0.05
  done
  exit "${CODE:-0}"
fi
"""


@pytest.fixture
def tree(tmp_path):
    """pretrain.sh in a folder of its own, with stand-ins for all that takes time."""
    shutil.copy(ROOT / "pretrain.sh", tmp_path)
    shutil.copytree(ROOT / "profiles", tmp_path / "profiles")
    (tmp_path / "dev").mkdir()
    for name in ("dev/settings.sh", "dev/stages.sh"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "dev" / "setup.sh").write_text("PATH=$PWD/bin:$PATH\n")
    (tmp_path / "bin").mkdir()
    for name, text in (("python", PYTHON), ("torchrun", TORCHRUN)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def start(tree, *words, **environment):
    everything = {
        "PATH": os.environ["PATH"],
        "HOME": str(tree),
        "PYTHONPATH": str(ROOT),
        "REAL": sys.executable,
        "CALLS": str(tree / "calls"),
        "NANOCHAT_BASE_DIR": str(tree / "store"),
        "NPROC_PER_NODE": "8",
        "CUDA_VISIBLE_DEVICES": "",
        **environment,
    }
    return subprocess.Popen(
        ["bash", "pretrain.sh", *words],
        cwd=tree,
        env=everything,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )


def finish(process):
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def stages(tree):
    """Stage -> words of its command, of all calls of the stage runner."""
    found = {}
    for line in (tree / "calls").read_text().splitlines():
        words = shlex.split(line)
        if words[:3] == ["-m", "nanochat.pipeline", "run"]:
            found[words[3]] = words[words.index("--") + 1 :] if "--" in words else []
    return found


PRETRAIN = ["dataset", "tok_train", "tok_eval", "dataset_rest", "eval_bundle", "base_train", "base_loss", "base_eval"]
POSTTRAIN = ["chat_data", "mid_train", "chat_eval_mid", "chat_sft", "chat_eval_sft"]


def test_pretraining_is_its_stages_and_no_more(tree):
    code, _, err = finish(start(tree, "--depth=20"))
    assert code == 0, err
    commands = stages(tree)
    assert list(commands) == PRETRAIN
    assert commands["dataset"][-2:] == ["-n", "8"] and commands["dataset_rest"][-2:] == ["-n", "240"]
    launcher = ["python", "-m", "nanochat.launch", "--nproc-per-node=8", "--", "-m"]
    for stage in ("base_train", "base_loss", "base_eval"):
        assert commands[stage][:7] == [*launcher, f"scripts.{stage}"]
    train = commands["base_train"]
    assert {"--depth=20", "--parallel=auto", "--resume=auto", "--device-batch-size=16"} <= set(train)
    assert "--model-tag=pretrain-d20-fineweb-edu" in train and "--device-batch-size=16" in commands["base_loss"]
    assert set(PRETRAIN + POSTTRAIN) <= set(ledger.STAGES)


# depth, shards, rows: what the table says, and depths between its rows
TABLE = [
    *[(4, 80, 32), (12, 80, 32), (14, 150, 32), (20, 240, 16), (21, 300, 16), (22, 300, 16), (26, 500, 8)],
    *[(32, 800, 4), (40, 1500, 1), (44, 2000, 1), (48, 2500, 1), (56, 3500, 1), (64, 5000, 1), (72, 5000, 1)],
]


def test_the_table(tree):
    depths = " ".join(str(depth) for depth, _, _ in TABLE)
    script = f"for DEPTH in {depths}; do (source profiles/pretrain.sh; echo $DEPTH $SHARDS $ROWS); done"
    done = subprocess.run(["bash", "-c", script], cwd=tree, env={}, capture_output=True, text=True, check=True)
    assert [tuple(map(int, line.split())) for line in done.stdout.splitlines()] == TABLE
    code, _, err = finish(start(tree, NPROC_PER_NODE="1", MODEL_DEPTH="21", SOURCE="climbmix"))
    assert code == 0, err
    commands = stages(tree)
    assert commands["dataset_rest"][-2:] == ["-n", "300"]
    assert {"--depth=21", "--device-batch-size=16"} <= set(commands["base_train"])


def test_flags_go_before_the_table_and_others_to_base_train(tree):
    words = [
        "--depth",
        "26",
        "--device_batch_size=2",
        "--shards=30",
        "--parallel=hsdp",
        "--save-every=7",
        "--no-compile",
    ]
    assert finish(start(tree, *words, "--total-batch-size=1048576", MODEL_DEPTH="32"))[0] == 0
    commands = stages(tree)
    assert commands["dataset_rest"][-2:] == ["-n", "30"]
    asked = {"--depth=26", "--device-batch-size=2", "--parallel=hsdp", "--save-every=7", "--no-compile"}
    assert asked | {"--total-batch-size=1048576"} <= set(commands["base_train"])


def test_rows_are_no_more_than_the_batch_has_for_each_gpu_and_shards_no_more_than_the_source_has(tree):
    code, out, _ = finish(start(tree, "--depth=24", "--shards=2500", "--use-fsdp", NPROC_PER_NODE="64"))
    assert code == 0 and "asks for 2500 shards and fineweb-edu has 1822" in out
    commands = stages(tree)
    assert commands["dataset_rest"][-2:] == ["-n", "1822"]
    assert {"--device-batch-size=4", "--parallel=fsdp"} <= set(commands["base_train"])


def test_posttrain_needs_a_base_model_and_fullrun_makes_it(tree):
    code, _, err = finish(start(tree, "--posttrain", "--depth=12"))
    assert code == 1 and err.startswith("error: --posttrain: no finished base model") and err.count("\n") == 1
    complete = tree / "store/checkpoints/base/pretrain-d12-fineweb-edu/COMPLETE"
    complete.parent.mkdir(parents=True)
    complete.touch()
    assert finish(start(tree, "--posttrain", "--depth=12"))[0] == 0
    assert list(stages(tree)) == POSTTRAIN
    (tree / "calls").unlink()
    assert finish(start(tree, "--fullrun", "--depth=12"))[0] == 0
    assert list(stages(tree)) == [*PRETRAIN, *POSTTRAIN, "chat_rl", "chat_eval_rl"]
    assert (tree / "calls").read_text().splitlines()[-1] == " -m nanochat.report generate"


@pytest.mark.parametrize(
    "words",
    [["--depth=x"], ["d20"], ["--postrain"], ["--mup", "--width=100"]],
)
def test_mistakes_are_one_line_before_the_first_stage(tree, words):
    code, _, err = finish(start(tree, *words, CHECKS="1"))
    assert code == 1 and err.startswith(f"error: {words[-1]}") and err.count("\n") == 1
    assert not (tree / "calls").exists()


def test_flags_of_base_train_pass_however_they_are_typed_and_the_end_says_how_to_continue(tree):
    (tree / "bin/python").write_text(PYTHON.replace("printf", 'echo "$NANOCHAT_CONTINUE"; printf'))
    words = ["--Depth=4", "--width", "1024", "--mup", "--core-metric-every", "-1", "--no-compile", "--run=a b"]
    code, out, err = finish(start(tree, "--depth=26", *words, SOURCE="climbmix"))
    assert code == 0, err
    asked = {"--depth=4", "--width=1024", "--mup", "--core-metric-every=-1", "--no-compile"}
    assert asked <= set(stages(tree)["base_train"])
    assert f"SOURCE=climbmix bash pretrain.sh --depth=26 {shlex.join(words[:-1])} --run=a\\ b\n" in out


@pytest.mark.parametrize(
    ("environment", "needle"),
    [
        ({"MODEL_DEPTH": "x"}, "MODEL_DEPTH=x: expected a whole number above 0"),
        ({"DEPTH": "-4"}, "DEPTH=-4: expected"),
        ({"PARALLEL": "dp"}, "PARALLEL=dp: expected auto, ddp, fsdp or hsdp"),
        ({"MAX_RESTARTS": "often"}, "MAX_RESTARTS=often: expected a whole number"),
        ({"WAIT_SECONDS": "0"}, "WAIT_SECONDS=0: expected"),
        ({"NPROC_PER_NODE": "0"}, "NPROC_PER_NODE=0: expected"),
        ({"SHARDS": "1e3"}, "SHARDS=1e3: expected"),
        ({"TASK_DATA": "nowhere"}, "TASK_DATA=nowhere: no such folder"),
        ({"TASK_DATA": "profiles", "FULLRUN": "1"}, "TASK_DATA=profiles: none of SmolTalk, MMLU, GSM8K, "),
    ],
)
def test_settings_that_cannot_be_are_named_as_written_before_the_first_stage(tree, environment, needle):
    code, _, err = finish(start(tree, CHECKS="1", **environment))
    assert code == 1 and err.startswith(f"error: {needle}") and err.count("\n") == 1, err
    assert not (tree / "calls").exists()


def two_nodes(tree, *words, **environment):
    plain = {"RUN": "1", "NNODES": "2", "MASTER_ADDR": "127.0.0.1", **environment}
    processes = [start(tree, *words, NODE_RANK=str(rank), **plain) for rank in (1, 0)]
    other, first = (finish(process) for process in processes)
    return first, other


def test_on_two_nodes_the_ledger_is_node_0s_and_training_runs_on_both(tree):
    first, other = two_nodes(tree, "--depth=12")
    assert (first[0], other[0]) == (0, 0), (first, other)
    assert list(stages(tree)) == PRETRAIN and (tree / "calls").read_text().count("nanochat.pipeline") == len(PRETRAIN)
    lines = (tree / "calls.torchrun").read_text().splitlines()
    by_rank = {rank: [line[2:] for line in lines if line.startswith(rank)] for rank in "01"}
    assert len(by_rank["0"]) == 3
    assert by_rank["1"] == [line.replace("--node_rank=0", "--node_rank=1") for line in by_rank["0"]]


def test_on_two_nodes_a_failure_ends_both_with_its_code(tree):
    first, other = two_nodes(tree, "--depth=12", CODE="5")
    assert (first[0], other[0]) == (5, 5), (first, other)


def test_a_node_that_never_comes_is_named(tree):
    alone = {"NNODES": "3", "MASTER_ADDR": "127.0.0.1", "NODE_RANK": "0", "WAIT_SECONDS": "1"}
    code, out, err = finish(start(tree, "--depth=12", **alone))
    assert code == 1 and "waiting for nodes 1 2 of 3" in out and "error: nodes 1 2 of 3 did not join in 1 s" in err
    assert not (tree / "calls").exists()


SAVES = """
import signal, sys, time
def save(number, frame):
    open(sys.argv[1] + "/saved", "w")
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGUSR1, save)
open(sys.argv[1] + "/ready", "w")
time.sleep(60)
"""


def test_a_warning_of_slurm_to_all_of_its_processes_lets_the_stage_save(tree):
    """SIGUSR1 to the whole process group, with the real stage runner."""
    (tree / "saves.py").write_text(SAVES)
    run = 'exec "$REAL" -m nanochat.pipeline run "$4" -- "$REAL" saves.py "$PWD"'
    (tree / "bin/python").write_text(
        PYTHON.replace("printf", f'if [ "$2" = nanochat.pipeline ]; then {run}; fi\nprintf')
    )
    process = start(tree, "--depth=12")
    for _ in range(600):
        if (tree / "ready").exists():
            break
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGUSR1)
    code, out, err = finish(process)
    assert code == 75 and (tree / "saved").exists(), (out, err)
    assert "NPROC_PER_NODE=8 bash pretrain.sh --depth=12\n" in err
