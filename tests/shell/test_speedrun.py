"""speedrun.sh: the stages that it walks through, with a python that only logs; and the whole tiny chain, as a newcomer
runs it, which takes minutes on two cores and so runs only with `bash runtests.sh --all`."""

import getpass
import json
import os
import re
import subprocess
import time

import pytest

from nanochat import ledger, paths
from nanochat.ledger import STAGES
from tests.shell.scripts import ROOT, shell

STAGE_LIMIT_SECONDS = 720


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"PROFILE": "huge"}, "error: PROFILE=huge: expected auto, tiny, mini or full"),
        ({"PROFILE": "full"}, "error: PROFILE=full needs an NVIDIA GPU"),
        ({"PROFILE": "tiny", "RUN_RL": "yes"}, "error: RUN_RL=yes: expected 0 or 1"),
        ({"PROFILE": "tiny", "SOURCE": "local:nowhere"}, "error: SOURCE=local:nowhere: no such folder"),
    ],
)
def test_speedrun_refuses_what_cannot_work(tree, bare_path, environment, message):
    done = shell(tree, "speedrun.sh", path=str(bare_path), **environment)
    assert done.returncode == 1
    assert done.stderr.startswith(message) and done.stderr.count("\n") == 1
    assert not (tree / "calls").exists()


BEFORE_SETUP = [
    *[({"PROFILE": "huge"}, "PROFILE=huge: expected auto"), ({"RUN_RL": "yes"}, "RUN_RL=yes: expected 0 or 1")],
    *[({name: "abc"}, f"{name}=abc: expected a whole number above 0") for name in ("DEPTH", "SHARDS", "VOCAB_SIZE")],
    *[({"NPROC_PER_NODE": value}, f"NPROC_PER_NODE={value}: expected") for value in ("0", "abc", "-1", "1.5", "08")],
    *[({"DEPTH": value}, f"DEPTH={value}: expected") for value in ("0", "-4", " 4", "4 ", "0x4", "9" * 20, "4;ls")],
    ({"NANOCHAT_DTYPE": "fp16"}, "NANOCHAT_DTYPE=fp16: expected bfloat16 or float32"),
    *[({"USD_PER_HOUR": value}, f"USD_PER_HOUR={value}: expected a price") for value in ("much", "-2", "2,5")],
    ({"PARALLEL": "zero"}, "PARALLEL=zero: expected auto, ddp, fsdp or hsdp"),
    ({"SOURCE": "local:"}, "SOURCE=local:: expected a folder"),
    ({"SOURCE": "local:requirements.lock"}, "SOURCE=local:requirements.lock: a file: name the folder"),
    ({"TASK_DATA": "/no/where"}, "TASK_DATA=/no/where: no such folder"),
    ({"EVAL_BUNDLE": "no\nwhere"}, "EVAL_BUNDLE=no where: no such folder"),
    (["--depth=abc"], "--depth=abc: expected a whole number above 0"),
    (["--depth", "abc"], "--depth=abc: expected a whole number above 0"),
    (["--depth"], "--depth: expected a value after it"),
    (["--depth="], "--depth=: expected a value after it"),
    (["--source=local:"], "--source=local:: expected a folder"),
    (["--task_data=nowhere"], "--task_data=nowhere: no such folder"),
    (["--profile=large"], "--profile=large: expected auto"),
    (["--run-rl=2"], "--run-rl=2: expected 0 or 1"),
    (["help"], "help: expected flags such as --depth=8"),
    (["DEPTH=8"], "DEPTH=8: expected flags such as --depth=8"),
    (["-d", "8"], "-d: expected flags"),
    (["--"], "--: expected flags"),
    ([""], ": expected flags"),
]


@pytest.mark.parametrize(("given", "message"), BEFORE_SETUP, ids=str)
def test_a_mistake_that_needs_no_environment_is_named_before_anything_is_installed(tree, bare_path, given, message):
    (tree / "dev/setup.sh").write_text('echo set up >>"$CALLS"\n')
    words, environment = (given, {}) if isinstance(given, list) else ([], given)
    done = shell(tree, "speedrun.sh", *words, path=str(bare_path), **environment)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1
    assert not (tree / "calls").exists()


@pytest.mark.parametrize("script", ["speedrun.sh", "pretrain.sh"])
@pytest.mark.parametrize("words", [["--help"], ["-h"], ["--depth=8", "--help"], ["--mup", "-h"]])
def test_help_shows_how_it_is_used_and_all_overrides_and_runs_nothing(tree, bare_path, script, words):
    (tree / "dev/setup.sh").write_text('echo set up >>"$CALLS"\n')
    done = shell(tree, script, *words, path=str(bare_path))
    assert (done.returncode, done.stderr) == (0, "") and not (tree / "calls").exists()
    assert f"bash {script} " in done.stdout and "#" not in done.stdout.replace("python -m", "")
    for name in ("DEPTH", "SOURCE", "NPROC_PER_NODE", "WANDB_RUN", "TASK_DATA", "NANOCHAT_BASE_DIR"):
        assert re.search(rf"^{name}\b.* \w", done.stdout, re.M)
    assert ("RUN_RL" in done.stdout) == (script == "speedrun.sh")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--dept=8"], "--dept=8: Unknown option: --dept. Did you mean --depth?"),
        ({"EVAL_BUNDLE": "profiles"}, "EVAL_BUNDLE=profiles: no evaluation bundle: "),
    ],
    ids=str,
)
def test_what_the_stages_would_refuse_is_refused_before_the_first_one(tree, bare_path, given, message):
    words, environment = (given, {}) if isinstance(given, list) else ([], given)
    done = shell(tree, "speedrun.sh", *words, path=str(bare_path), CHECKS="1", **environment)
    assert done.returncode == 1 and done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1
    assert not (tree / "calls").exists()


def test_flags_set_what_the_environment_sets_and_reach_base_train(tree, bare_path):
    words = ["--depth", "6", "--source=pydocs", "--vocab_size=600", "--run=w", "--model-tag=a-b", "--nproc-per-node=2"]
    extra = ["--num-iterations=7", "--save_every", "9", "--mup", "--device-batch-size=4"]
    done = shell(tree, "speedrun.sh", *words, *extra, path=str(bare_path), DEPTH="5")
    assert done.returncode == 0, done.stderr
    lines = {line.split()[3]: line.split() for line in (tree / "calls").read_text().splitlines() if " run " in line}
    train = lines["base_train"]
    assert {"--depth=6", "--run=w", "--model-tag=a-b", "--nproc-per-node=2", "--mup", "--save_every=9"} <= set(train)
    assert [word for word in train if word.startswith("--num-it")] == ["--num-iterations=7"]  # not the profile's
    assert not any(word.startswith("--save-every") for word in train)
    assert "--vocab-size=600" in lines["tok_train"]
    for stage in ("base_train", "base_loss"):
        assert [word for word in lines[stage] if word.startswith("--device-batch")] == ["--device-batch-size=4"]


def test_another_horizon_takes_the_place_of_the_profiles(tree, bare_path):
    done = shell(tree, "speedrun.sh", "--target-flops=1e15", path=str(bare_path))
    assert done.returncode == 0, done.stderr
    train = next(line for line in (tree / "calls").read_text().splitlines() if "run base_train" in line)
    assert "--target-flops=1e15" in train and "--num-iterations" not in train


def test_without_a_home_the_store_is_where_the_system_says(tree, bare_path):
    (tree / "dev/setup.sh").write_text('PATH=$PWD/.venv/bin:$PATH; echo "store: $NANOCHAT_BASE_DIR"\n')
    done = shell(tree, "speedrun.sh", path=str(bare_path), HOME="")
    home = os.path.expanduser("~" + getpass.getuser())
    assert done.returncode == 0, done.stderr
    assert f"store: {home}/.cache/nanochat\n" in done.stdout
    done = shell(tree, "speedrun.sh", "--nanochat-base-dir=~/x y", path=str(bare_path), HOME="/h m")
    assert "store: /h m/x y\n" in done.stdout


def walk(tree, bare_path, **environment):
    """(what python was called with, what was printed)"""
    done = shell(tree, "speedrun.sh", path=str(bare_path), **environment)
    assert done.returncode == 0, done.stderr
    return (tree / "calls").read_text().splitlines(), done.stdout


def calls(tree, bare_path, **environment):
    return walk(tree, bare_path, **environment)[0]


def talks_to(out, model):
    return all(f"python -m scripts.{name} {model}" in out for name in ("chat_cli", "chat_web"))


def test_tiny_is_the_whole_chain_without_a_gpu_and_says_how_to_talk_to_the_model(tree, bare_path):
    made, out = walk(tree, bare_path)
    assert talks_to(out, "-i sft -g tiny-d4-pydocs")
    stages = [line.split()[3] for line in made if "nanochat.pipeline run" in line]
    assert stages == [stage for stage in STAGES if stage != "dataset_rest"]
    assert [line.split()[3] for line in made if "--skip=" in line] == ["chat_rl", "chat_eval_rl"]
    assert made[-1] == "-m nanochat.report generate"
    assert "--source=pydocs" in made[0] and "--depth=4" in made[4]
    assert not any("nanochat.launch" in line for line in made)


def test_the_chain_and_the_ledgers_table_say_the_same(tree, bare_path):
    """And every stage that reads the text says so: tok_eval did not, and its numbers of an edited folder stayed."""
    made = calls(tree, bare_path, RUN_RL="1", SOURCE="climbmix", SHARDS="20")
    readers = [line for line in made if "--source=climbmix" in line and "nanochat.dataset" not in line]
    assert len(readers) >= 5 and all("--in base_data/climbmix" in line for line in readers)
    assert "-n 8" in made[0] and "shard_0000[0-7].parquet" in made[0] and "-n 20" in made[3]  # the tokenizer's first
    lines = {line.split()[3]: line for line in made if "nanochat.pipeline run" in line}
    assert list(lines) == list(STAGES)
    writers = {}
    for stage, line in lines.items():
        below = set(STAGES[stage].needs).union(*(writers[need]["below"] for need in STAGES[stage].needs))
        for path in re.findall(r"--in (\S+)", line):
            wrote = {name for name, at in writers.items() for out in at["outs"] if f"{path}/".startswith(f"{out}/")}
            assert wrote and wrote <= below, (stage, path)
        writers[stage] = {"below": below, "outs": re.findall(r"--out (\S+)", line)}


def test_the_chat_stages_hang_together(tree, bare_path):
    made, out = walk(tree, bare_path, RUN_RL="1", RUN_ID="r")
    assert talks_to(out, "-i rl -g r")
    lines = {line.split()[3]: line for line in made if "nanochat.pipeline run" in line}
    assert not any("--skip" in line for line in made)
    for stage, parent in (("mid_train", "base"), ("chat_sft", "mid"), ("chat_rl", "sft")):
        assert f"--in checkpoints/{parent}/r --in task_data/pydocs/words.txt" in lines[stage]
        assert f"--out checkpoints/{lines[stage].split('checkpoints/')[2].split('/')[0]}/r/COMPLETE" in lines[stage]
        assert "--model-tag=r --resume=auto" in lines[stage]
    for stage in ("mid", "sft", "rl"):
        assert f"scripts.chat_eval -i {stage} -g r" in lines[f"chat_eval_{stage}"]
    assert "task_data/hub" not in "".join(made)


CHAT_STAGES = ("mid_train", "chat_eval_mid", "chat_sft", "chat_eval_sft", "chat_rl", "chat_eval_rl")


def chat_data_read(made):
    """For each chat stage, the patterns below task_data that it names with --in."""
    lines = {line.split()[3]: line for line in made if "nanochat.pipeline run" in line}
    return {stage: sorted(set(re.findall(r"--in (task_data\S*)", lines[stage]))) for stage in CHAT_STAGES}


@pytest.fixture
def gpu(bare_path):
    """A driver; the python of `tree` sees one GPU where it is asked."""
    driver = bare_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\nexit 0\n")
    driver.chmod(0o755)


@pytest.mark.parametrize("environment", [{}, {"TASK_DATA": "my tasks"}])
def test_the_chat_stages_of_tiny_find_what_chat_data_makes(tree, bare_path, store, environment):
    from scripts import chat_data
    from tests.tasks.test_words import documents, put_text

    (tree / "my tasks").mkdir()
    made = calls(tree, bare_path, RUN_RL="1", **environment)
    tasks = re.search(r"scripts.chat_data --source=pydocs --tasks=(\S+)$", "\n".join(made), re.M).group(1)
    put_text("pydocs", documents(150), documents(40, seed=1))
    chat_data.main(chat_data.Settings(source="pydocs", tasks=tasks))
    for patterns in chat_data_read(made).values():
        assert patterns and ledger.missing(patterns) == []
        assert ledger.fingerprint(patterns).keys() == ledger.fingerprint(["task_data"]).keys()


@pytest.mark.usefixtures("gpu")
def test_task_data_comes_from_a_folder(tree, bare_path):
    (tree / "my tasks").mkdir()
    made = calls(tree, bare_path, PROFILE="mini", RUN_RL="1", TASK_DATA="my tasks")
    data = next(line for line in made if "run chat_data" in line)
    assert f"--from-dir={tree / 'my tasks'}" in data and f"--in {tree / 'my tasks'} --out" in data
    for patterns in chat_data_read(made).values():
        assert [pattern for pattern in patterns if "hub" in pattern] == ["task_data/hub/GSM8K"]
    assert "--task=GSM8K" in next(line for line in made if "run chat_rl" in line)


@pytest.mark.usefixtures("gpu")
def test_the_full_profile_reads_the_data_sets_it_names(tree, bare_path):
    made = calls(tree, bare_path, PROFILE="full", RUN_RL="1")
    hub = [f"task_data/hub/{name}" for name in ("ARC-Challenge", "ARC-Easy", "GSM8K", "MMLU", "SmolTalk")]
    words = [f"task_data/fineweb-edu/words.{suffix}" for suffix in ("json", "txt")]
    for patterns in chat_data_read(made).values():
        assert patterns == sorted(hub + words)


def test_overrides_reach_the_stages(tree, bare_path):
    (tree / "my text").mkdir()
    made = calls(tree, bare_path, SOURCE="local:my text", DEPTH="6", NPROC_PER_NODE="2", RUN_ID="a/b", WANDB_RUN="w")
    train = next(line for line in made if "run base_train" in line)
    source = f"local:{tree / 'my text'}"
    assert re.search(rf"run dataset --in {source} --out base_data/local-\S+ -- ", made[0])
    tag = paths.slug("a/b")
    assert f"--source={source}" in train and "--depth=6" in train and "--run=w" in train
    assert f"--model-tag={tag} " in train and tag != "a-b"
    assert "-- python -m nanochat.launch --nproc-per-node=2 -- -m scripts.base_train" in train
    assert f"--out checkpoints/base/{tag} " in train


@pytest.mark.parametrize("name", ["模型 (2)", "x" * 250, "-r"])
def test_shell_and_python_agree_on_folder_names(tree, bare_path, name):
    folder = tree / name
    folder.mkdir()
    made = calls(tree, bare_path, SOURCE=f"local:{folder}", RUN_ID=name)
    assert f"--out base_data/{paths.slug(f'local:{folder}')} --" in made[0]
    assert f"--model-tag={paths.slug(name)} " in next(line for line in made if "run base_train" in line)


@pytest.mark.slow
def test_tiny_from_nothing_to_a_report_and_again(tmp_path):
    environment = {**os.environ, "NANOCHAT_BASE_DIR": str(tmp_path), "PROFILE": "tiny", "RUN_RL": "1"}
    environment.pop("OMP_NUM_THREADS", None)
    started = time.monotonic()
    first = subprocess.run(["bash", "speedrun.sh"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr[-2000:]
    assert time.monotonic() - started < STAGE_LIMIT_SECONDS

    def section(stage):
        return json.loads((tmp_path / f"runs/tiny-d4-pydocs/report/{stage}.json").read_text())

    predictors = {
        name: bpb
        for table in section("base_loss")["tables"]
        if "Predictor" in table["columns"]
        for name, bpb in table["rows"]
    }
    model = predictors.pop("this model")
    assert model < predictors.pop("xz -9e after train text")  # which reads all of it, the model a fifth
    assert model < 0.9 * min(predictors.values())

    mid, sft = (section(f"chat_eval_{stage}")["metrics"] for stage in ("mid", "sft"))
    for task in ("Arithmetic", "SimpleSpelling", "SpellingBee"):  # guessing is near 0 in all of them
        assert sft[task] > 0.9 and sft[task] > mid[task] - 0.03, (task, mid[task], sft[task])
    practised = section("chat_rl")["metrics"]  # of answers that are nearly all right already
    assert practised["final pass@1"] > practised["first pass@1"] - 0.05, practised

    report = (tmp_path / "report/report.md").read_text()
    assert "offline text: pydocs" in report and "CORE-offline" in report
    assert "| Metric | BASE | MID | SFT | RL |" in report and "ChatCORE-offline" in report

    asked = [
        "bash",
        "-c",
        f"source .venv/bin/activate && python -m benchmarks.plain_questions -i rl --out={tmp_path}/asked",
    ]
    subprocess.run(asked, cwd=ROOT, env=environment, check=True, capture_output=True)
    assert json.loads((tmp_path / "asked").read_text())["right"] >= 18

    talk = ["bash", "-c", "source .venv/bin/activate && python -m scripts.chat_cli -i rl -t 0 -p 'Who are you?'"]
    answer = subprocess.run(talk, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert answer.returncode == 0 and answer.stdout.strip(), answer.stderr

    again = subprocess.run(["bash", "speedrun.sh"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert again.returncode == 0 and again.stdout.count(": done on ") == sum(
        not stage.optional for stage in STAGES.values()
    )
