import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from nanochat import ledger
from nanochat.ledger import STAGES

ROOT = Path(__file__).parents[2]
SCRIPTS = ("speedrun.sh", "runtests.sh", "dev/setup.sh", "dev/stages.sh", ".ci/run")


def lock_entries():
    text = (ROOT / "requirements.lock").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.lstrip().startswith("#")]
    return {re.match(r"[\w.-]+==[^\s;]+", line).group(): line for line in lines}


def test_the_lock_holds_every_pin_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    pins = project["project"]["dependencies"] + project["dependency-groups"]["dev"]
    locked = {name.lower().replace("_", "-") for name in lock_entries()}
    for pin in pins:
        assert "==" in pin, f"{pin} is not pinned exactly"
        assert pin.lower().replace("_", "-") in locked, f"{pin} is not in requirements.lock: compile it anew (README)"


def test_the_lock_has_hashes_and_names_no_place():
    entries = lock_entries()
    assert len(entries) > 50
    for name, line in entries.items():
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", line), name
    text = (ROOT / "requirements.lock").read_text()
    assert "://" not in text and not re.search(r"^\s*-(?!-hash)", text, re.M)


@pytest.mark.parametrize("script", SCRIPTS)
def test_shell_scripts_are_strict_and_parse(script):
    assert "set -euo pipefail" in (ROOT / script).read_text()
    subprocess.run(["bash", "-n", ROOT / script], check=True)


@pytest.mark.parametrize("profile", sorted((ROOT / "profiles").iterdir()), ids=lambda path: path.stem)
def test_profiles_parse_and_run_nothing(profile):
    subprocess.run(["bash", "-n", profile], check=True)
    assert not re.search(r"\b(python|stage|echo)\b", re.sub(r"#.*", "", profile.read_text()))


@pytest.fixture
def tree(tmp_path):
    """The scripts in a folder of their own, with an environment that looks finished and a python that only logs."""
    shutil.copytree(ROOT / "profiles", tmp_path / "profiles")
    for name in SCRIPTS[:4]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "requirements.lock").write_text("x==1\n")
    (tmp_path / "rustbpe").mkdir()
    (tmp_path / "rustbpe" / "lib.rs").write_text("fn main() {}\n")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        '#!/bin/sh\ncase "$*" in --version) echo Python 3.11.0;; '
        "*visible_gpus*) nvidia-smi 2>/dev/null && echo 1 || echo 0;; "
        f'*--print-inputs) PYTHONPATH={ROOT} exec {sys.executable} "$@";; '
        '-c*) ;; *) echo "$@" >> "$CALLS";; esac\n'
    )
    python.chmod(0o755)
    stamp = "find requirements.lock rustbpe -type f | LC_ALL=C sort | xargs cksum; echo Python 3.11.0"
    made = subprocess.run(["bash", "-c", stamp], cwd=tmp_path, capture_output=True, text=True, check=True)
    (tmp_path / ".venv" / ".setup-stamp").write_text(made.stdout)
    return tmp_path


def shell(tree, script, path=None, **environment):
    everything = {
        "PATH": path or os.environ["PATH"],
        "HOME": str(tree / "home"),
        "CALLS": str(tree / "calls"),
        **environment,
    }
    return subprocess.run(["bash", script], cwd=tree, env=everything, capture_output=True, text=True, timeout=60)


def test_set_up_has_nothing_to_do_the_second_time(tree):
    done = shell(tree, "dev/setup.sh")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.fixture
def bare_path(tree):
    """A PATH with the usual tools, but no python, uv or cargo."""
    folder = tree / "bin"
    folder.mkdir()
    for tool in ("bash", "sh", "find", "sort", "xargs", "cksum", "cmp", "dirname", "env", "rm", "cat", "tr"):
        (folder / tool).symlink_to(shutil.which(tool))
    return folder


def test_a_machine_without_python_is_told_so(tree, bare_path):
    (tree / "requirements.lock").write_text("x==2\n")
    done = shell(tree, "dev/setup.sh", path=str(bare_path))
    assert done.returncode == 1
    assert done.stderr.startswith("error: no Python 3.11 or newer found") and done.stderr.count("\n") == 1


def test_a_machine_without_cargo_is_told_how_to_get_it_before_anything_is_installed(tree, bare_path):
    (tree / "requirements.lock").write_text("x==2\n")
    (bare_path / "python3").symlink_to(tree / ".venv" / "bin" / "python")
    done = shell(tree, "dev/setup.sh", path=str(bare_path), UV="/bin/false")
    assert done.returncode == 1
    assert done.stderr.startswith("error: cargo not found: install Rust") and done.stderr.count("\n") == 1


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


def calls(tree, bare_path, **environment):
    done = shell(tree, "speedrun.sh", path=str(bare_path), **environment)
    assert done.returncode == 0, done.stderr
    return (tree / "calls").read_text().splitlines()


def test_tiny_is_the_whole_chain_without_a_gpu(tree, bare_path):
    made = calls(tree, bare_path)
    stages = [line.split()[3] for line in made if "nanochat.pipeline run" in line]
    assert stages == [stage for stage in STAGES if stage != "dataset_rest"]
    assert [line.split()[3] for line in made if "--skip=" in line] == ["chat_rl", "chat_eval_rl"]
    assert made[-1] == "-m nanochat.report generate"
    assert "--source=pydocs" in made[0] and "--depth=4" in made[4]
    assert not any("nanochat.launch" in line for line in made)


def test_the_chain_and_the_ledgers_table_say_the_same(tree, bare_path):
    made = calls(tree, bare_path, RUN_RL="1", SOURCE="climbmix", SHARDS="20")
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
    made = calls(tree, bare_path, RUN_RL="1", RUN_ID="r")
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


def test_the_end_says_how_to_talk_to_the_model(tree, bare_path):
    done = shell(tree, "speedrun.sh", path=str(bare_path), RUN_ID="r")
    assert "python -m scripts.chat_cli -i sft -g r" in done.stdout
    done = shell(tree, "speedrun.sh", path=str(bare_path), RUN_ID="r", RUN_RL="1")
    assert "python -m scripts.chat_cli -i rl -g r" in done.stdout


@pytest.fixture
def gpu(bare_path):
    """A driver; the python of `tree` sees one GPU where it is asked."""
    driver = bare_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\nexit 0\n")
    driver.chmod(0o755)


@pytest.mark.parametrize("environment", [{}, {"TASK_DATA": "my tasks"}, {"TASK_DATA": "nowhere"}])
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
    assert f"--source={source}" in train and "--depth=6" in train and "--run=w" in train and "--model-tag=a-b" in train
    assert "-- python -m nanochat.launch --nproc-per-node=2 -- -m scripts.base_train" in train
    assert "--out checkpoints/base/a-b" in train


def test_shell_and_python_agree_on_folder_names(tree, bare_path):
    from nanochat import paths

    folder = tree / "my--text (2)"
    folder.mkdir()
    made = calls(tree, bare_path, SOURCE=f"local:{folder}")
    assert f"--out base_data/{paths.slug(f'local:{folder}')} --" in made[0]


def test_a_large_source_gets_the_tokenizers_shards_first(tree, bare_path):
    made = calls(tree, bare_path, PROFILE="tiny", SOURCE="climbmix", SHARDS="20")
    stages = [line.split()[3] for line in made if "nanochat.pipeline run" in line]
    assert stages[:4] == ["dataset", "tok_train", "tok_eval", "dataset_rest"]
    assert "-n 8" in made[0] and "shard_0000[0-7].parquet" in made[0] and "-n 20" in made[3]
