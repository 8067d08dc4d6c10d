"""Submitting to clusters: Volcengine, Slurm, SkyPilot, Kubeflow Trainer."""

import importlib.util
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import train_speed
from nanochat import cli, launch

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/golden/volc_dry_run.yaml"
SECRET = "s3cret-value"


def _load(path):
    spec = importlib.util.spec_from_file_location("volc_render", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


render = _load(ROOT / "volc/render.py")

ACCOUNT = {
    "VOLC_QUEUE_ID": "q-1",
    "VOLC_FLAVOR": "a-flavor",
    "VOLC_IMAGE": "registry/nanochat:1",
    "VOLC_STORAGE_TYPE": "Vepfs",
    "VOLC_STORAGE_PATH": "team",
    "VOLC_MOUNT_PATH": "/mnt/store",
}
COMMAND = ["bash", "pretrain.sh", "--depth=32"]


@pytest.fixture
def tree(tmp_path):
    """volc/ in a folder of its own, where no volc/config of this machine counts."""
    (tmp_path / "volc").mkdir()
    for name in ("volc_submit.sh", "render.py", "config.example"):
        shutil.copy(ROOT / "volc" / name, tmp_path / "volc")
    (tmp_path / "bin").mkdir()
    return tmp_path


def submit(tree, *words, **environment):
    everything = {
        "PATH": f"{tree / 'bin'}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "TMPDIR": str(tree),
        "SEEN": str(tree / "seen"),
        **environment,
    }
    command = ["bash", "volc/volc_submit.sh", *words]
    return subprocess.run(command, cwd=tree, env=everything, capture_output=True, text=True, timeout=60)


def test_the_dry_run_is_the_golden_file(tree):
    environment = {**ACCOUNT, "NNODES": "4", "WANDB_API_KEY": SECRET, "WANDB_RUN": "d32"}
    done = submit(tree, "--dry-run", *COMMAND, **environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == GOLDEN.read_text(), "if this is meant to change, write it anew"
    task = yaml.safe_load(done.stdout)
    assert task["Framework"] == "PyTorchDDP" and task["TaskRoleSpecs"][0]["RoleReplicas"] == 4
    assert task["Entrypoint"] == "cd /root/nanochat && exec bash pretrain.sh --depth=32"
    assert task["UserCodePath"] == "./" and task["RemoteMountCodePath"] == "/root/nanochat/"
    assert {"Failed", "InstanceReclaimed"} <= set(task["RetryOptions"]["PolicySets"])


def marks(text):
    """(names marked in the task, names listed below it)."""
    task, _, listed = text.partition("\n# Missing: ")
    names = re.findall("<missing (.*?)>", task)
    assert all(yaml.safe_load(text)[field] for field in ("TaskName", "Entrypoint", "Storages", "Envs"))
    return set(names), set(re.findall("^#   (.*?)  ", listed, re.M))


def test_without_a_config_the_dry_run_marks_what_is_missing_and_lists_it_below(tree):
    done = submit(tree, "--dry-run", *COMMAND, NNODES="4")
    assert (done.returncode, done.stderr) == (0, "")
    queue = "VOLC_QUEUE_ID or VOLC_QUEUE_NAME"
    names = {*ACCOUNT, queue} - {"VOLC_QUEUE_ID", "VOLC_STORAGE_PATH"}
    assert marks(done.stdout) == (names, names)
    task = yaml.safe_load(done.stdout)
    assert task["ResourceQueueID"] == f"<missing {queue}>" and task["ImageUrl"] == "<missing VOLC_IMAGE>"
    assert task["TaskRoleSpecs"] == [{"RoleName": "worker", "RoleReplicas": 4, "Flavor": "<missing VOLC_FLAVOR>"}]
    assert re.search("^#   VOLC_FLAVOR +instance type of a node", done.stdout, re.M)


@pytest.mark.parametrize(
    ("known", "names"),
    [
        ({"VOLC_STORAGE_TYPE": "Nas"}, {"VOLC_STORAGE_ID or VOLC_NAS_ADDR"}),
        ({"VOLC_STORAGE_TYPE": "Nas", "VOLC_ACCESS_POINT": "ap-1"}, {"VOLC_STORAGE_ID"}),
        ({"VOLC_STORAGE_TYPE": "VepfsAP"}, {"VOLC_STORAGE_ID", "VOLC_ACCESS_POINT"}),
        ({"VOLC_REGISTRY_USERNAME": "me"}, {"VOLC_REGISTRY_TOKEN"}),
        ({"VOLC_REGISTRY_TOKEN": SECRET}, {"VOLC_REGISTRY_USERNAME"}),
        ({"VOLC_QUEUE_ID": "", "VOLC_QUEUE_NAME": "a-queue"}, set()),
    ],
)
def test_what_is_missing_follows_from_what_is_set(known, names):
    shown = render.render(render.make_task({**ACCOUNT, **known}, COMMAND), hide=True)
    assert set(render.missing(shown)) == names and SECRET not in shown


def test_everything_missing_is_asked_for_by_name_at_once_and_nothing_is_sent(tree):
    stand_in(tree)
    done = submit(tree, *COMMAND, VOLC_FLAVOR="x")
    assert done.returncode == 1 and done.stderr.startswith("error: not set: ") and done.stderr.count("\n") == 1
    for name in ACCOUNT:
        assert (name in done.stderr) == (name not in ("VOLC_FLAVOR", "VOLC_STORAGE_PATH"))
    assert not (tree / "seen").exists()


VEPFS = {"VOLC_STORAGE_TYPE": "Vepfs"}
VEPFS_AP = {"VOLC_STORAGE_TYPE": "VepfsAP", "VOLC_STORAGE_ID": "vepfs-1", "VOLC_ACCESS_POINT": "ap-1"}
NAS = {"VOLC_STORAGE_TYPE": "Nas", "VOLC_STORAGE_ID": "nas-1"}


@pytest.mark.parametrize(
    ("known", "fields", "base"),
    [
        (VEPFS, {"SubPath": "team"}, "nanochat"),
        ({**VEPFS, "VOLC_STORAGE_PATH": ""}, {}, "nanochat"),
        ({**VEPFS, "VOLC_STORAGE_ID": "vepfs-1"}, {"SubPath": "team"}, "nanochat"),
        (VEPFS_AP, {"VepfsId": "vepfs-1", "VepfsAccessPointId": "ap-1"}, "team/nanochat"),
        (NAS, {"NasId": "nas-1"}, "team/nanochat"),
        ({**NAS, "VOLC_STORAGE_PATH": "/a/b/"}, {"NasId": "nas-1"}, "a/b/nanochat"),
        ({"VOLC_STORAGE_TYPE": "Nas", "VOLC_NAS_ADDR": "n.example"}, {"NasAddr": "n.example"}, "team/nanochat"),
        ({**NAS, "VOLC_NAS_ADDR": "n.example"}, {"NasId": "nas-1", "NasAddr": "n.example"}, "team/nanochat"),
        (
            {**NAS, "VOLC_ACCESS_POINT": "ap-1"},
            {"NasId": "nas-1", "NasAccessPonintId": "ap-1", "SubPath": "team"},
            "nanochat",
        ),
    ],
)
def test_each_type_of_store_has_the_fields_of_the_manual(known, fields, base):
    """Artifacts are in the folder that VOLC_STORAGE_PATH names, whether the mount begins there or above it."""
    task = render.make_task({**ACCOUNT, **known}, COMMAND)
    assert task["Storages"] == [{"Type": known["VOLC_STORAGE_TYPE"], **fields, "MountPath": "/mnt/store"}]
    assert {one["Name"]: one["Value"] for one in task["Envs"]}["NANOCHAT_BASE_DIR"] == f"/mnt/store/{base}"


@pytest.mark.parametrize(
    ("known", "name"),
    [
        ({**VEPFS, "VOLC_STORAGE_ID": "vepfs-1"}, "VOLC_STORAGE_ID"),
        ({**VEPFS, "VOLC_ACCESS_POINT": "ap-1"}, "VOLC_ACCESS_POINT"),
        ({**VEPFS_AP, "VOLC_NAS_ADDR": "n.example"}, "VOLC_NAS_ADDR"),
        ({**NAS, "VOLC_NAS_ADDR": "n.example", "VOLC_ACCESS_POINT": "ap-1"}, "VOLC_NAS_ADDR"),
    ],
)
def test_a_setting_that_the_store_does_not_take_is_named(monkeypatch, capsys, known, name):
    monkeypatch.setattr(os, "environ", {**ACCOUNT, **known})
    render.main(["--dry-run", *COMMAND])
    shown = capsys.readouterr().out
    assert f"# not sent: {name}, " in shown and known[name] not in yaml.safe_dump(yaml.safe_load(shown))


def test_deadline_reserved_nodes_and_a_private_registry(tree):
    known = {"VOLC_ACTIVE_DEADLINE_SECONDS": "864000", "VOLC_RESERVE_RESOURCE_ON_RETRY": "1"}
    registry = {"VOLC_REGISTRY_USERNAME": "me", "VOLC_REGISTRY_TOKEN": SECRET}
    task = yaml.safe_load(submit(tree, "--dry-run", *COMMAND, **ACCOUNT, **known, **registry).stdout)
    assert task["ActiveDeadlineSeconds"] == 864000 and task["RetryOptions"]["EnableReserveResourceOnRetry"] is True
    assert task["ImageCredential"] == {"RegistryUsername": "me", "RegistryToken": "***"}
    sent = render.make_task({**ACCOUNT, **registry}, COMMAND)
    assert sent["ImageCredential"]["RegistryToken"] == SECRET and "ActiveDeadlineSeconds" not in sent


EXTRA = f"""
DelayExitTimeSeconds: 600
Tags: [a, b]
DiagOptions: [{{Name: LogDetection, Enable: true}}]
RetryOptions: {{MaxRetryTimes: 9, PolicySets: [Failed]}}
TaskRoleSpecs: [{{RoleName: worker, GpuRate: 0.5}}]
Storages: [{{Type: Tos, Bucket: data, MountPath: /data}}, {{MountPath: /mnt/store, ReadOnly: false}}]
Envs: [{{Name: PROXY, Value: "http://me:{SECRET}@proxy"}}, {{Name: MINE, Value: {SECRET}, IsPrivate: true}}]
CustomServices: [{{AccessToken: {SECRET}}}]
"""


@pytest.mark.parametrize("way", ["inline", "file"])
def test_further_fields_are_passed_through(tree, way):
    (tree / "more.yaml").write_text(EXTRA)
    extra = EXTRA if way == "inline" else "more.yaml"
    done = submit(tree, "--dry-run", *COMMAND, **ACCOUNT, VOLC_EXTRA_YAML=extra)
    assert done.returncode == 0 and SECRET not in done.stdout + done.stderr
    task = render.make_task({**ACCOUNT, "VOLC_EXTRA_YAML": EXTRA}, COMMAND)
    assert yaml.safe_load(done.stdout) == yaml.safe_load(render.render(task, hide=True))
    assert (task["DelayExitTimeSeconds"], task["Tags"], task["DiagOptions"][0]["Enable"]) == (600, ["a", "b"], True)
    assert task["RetryOptions"]["MaxRetryTimes"] == 9 and task["RetryOptions"]["PolicySets"] == ["Failed"]
    assert task["RetryOptions"]["EnableRetry"] and task["Entrypoint"].endswith("--depth=32")
    assert task["TaskRoleSpecs"] == [{"RoleName": "worker", "RoleReplicas": 1, "Flavor": "a-flavor", "GpuRate": 0.5}]
    store = {"Type": "Vepfs", "SubPath": "team", "MountPath": "/mnt/store", "ReadOnly": False}
    assert task["Storages"] == [store, {"Type": "Tos", "Bucket": "data", "MountPath": "/data"}]
    private = {one["Name"]: one["IsPrivate"] for one in task["Envs"]}
    assert private == {"NANOCHAT_BASE_DIR": False, "PROXY": True, "MINE": True}


def test_the_example_filled_in_is_a_config_and_the_environment_goes_before_it(tree):
    text = (tree / "volc/config.example").read_text()
    for name, value in ACCOUNT.items():
        text, times = re.subn(rf"^{name}=", f"{name}='{value}'", text, flags=re.M)
        assert times == 1
    (tree / "volc/config").write_text(text)
    assert submit(tree, "--dry-run", *COMMAND).returncode == 0
    task = yaml.safe_load(submit(tree, "--dry-run", *COMMAND, VOLC_FLAVOR="other", VOLC_CODE_PATH="/code dir").stdout)
    assert task["TaskRoleSpecs"][0] == {"RoleName": "worker", "RoleReplicas": 1, "Flavor": "other"}
    assert task["Entrypoint"].startswith("cd '/code dir' && ") and "UserCodePath" not in task


VOLC = """#!/usr/bin/env bash
cp -p "${@: -1}" "$SEEN" && echo "$*" >"$SEEN.words" && find . -type f | sort >"$SEEN.files"
echo "submitted${ID:+, task_id=$ID}"
exit "${CODE:-0}"
"""


def stand_in(tree):
    (tree / "bin/volc").write_text(VOLC)
    (tree / "bin/volc").chmod(0o755)


@pytest.mark.parametrize("name", ["HF_ENDPOINT", "HTTPS_PROXY", "SOURCE"])
@pytest.mark.parametrize("address", ["http://user:{}@mirror:8080/hub", "https://{}@mirror", "http://u:a/{}@mirror"])
def test_an_address_with_a_password_is_private(name, address):
    known = {**ACCOUNT, "VOLC_ENVS": "HTTPS_PROXY", name: address.format(SECRET)}
    shown = render.render(render.make_task(known, COMMAND), hide=True)
    assert SECRET not in shown
    assert {"Name": name, "Value": "***", "IsPrivate": True} in yaml.safe_load(shown)["Envs"]


def test_an_address_without_one_is_shown():
    task = render.make_task({**ACCOUNT, "HF_ENDPOINT": "https://mirror.example/a@b"}, COMMAND)
    assert "https://mirror.example/a@b" in render.render(task, hide=True)


@pytest.mark.parametrize("code", [0, 3])
def test_submission_hands_over_secrets_and_leaves_none_behind(tree, code):
    stand_in(tree)
    secrets = {"HF_TOKEN": SECRET, "VOLC_SECRETS": "MY_KEY", "MY_KEY": "another one"}
    done = submit(tree, *COMMAND, **ACCOUNT, **secrets, CODE=str(code))
    shown, _, commands = done.stdout.partition("submitted\n")
    assert done.returncode == code and ("logs --task TASK_ID --instance worker_0 -f" in commands) == (code == 0)
    assert SECRET not in done.stdout + done.stderr and "another one" not in done.stdout + done.stderr
    private = {
        one["Name"]: one["Value"] for one in yaml.safe_load((tree / "seen").read_text())["Envs"] if one["IsPrivate"]
    }
    assert private == {"HF_TOKEN": SECRET, "MY_KEY": "another one"}
    words = (tree / "seen.words").read_text().split()
    assert words[:3] == ["ml_task", "submit", "--conf"] and not Path(words[3]).exists()
    assert stat.S_IMODE((tree / "seen").stat().st_mode) == 0o600
    assert {one["Value"] for one in yaml.safe_load(shown)["Envs"] if one["IsPrivate"]} == {"***"}


def test_what_follows_a_submission_is_said_with_its_id(tree):
    stand_in(tree)
    done = submit(tree, *COMMAND, **ACCOUNT, ID="t-20261116120106-vx7d4")
    for command in ("get --id", "logs --task", "export --task", "cancel --id"):
        assert f"volc ml_task {command} t-20261116120106-vx7d4" in done.stdout


@pytest.mark.parametrize("repository", [True, False])
def test_a_clean_export_is_uploaded(tree, repository):
    """Tracked or not ignored, and neither environments nor what was built; from an unpacked archive too."""
    stand_in(tree)
    (tree / ".gitignore").write_text("*.log\n/volc/config\n.venv/\nrustbpe/target/\nbin/\nseen*\n")
    for name in ("new.py", "a b.txt", "old.log", "gone.py", "rustbpe/target/x.so", ".venv-uv/uv", "other/.git/HEAD"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("x")
    (tree / ".venv").symlink_to(ROOT)
    (tree / "elsewhere").symlink_to(ROOT)
    (tree / "volc/config").write_text("VOLC_TASK_NAME=mine\n")
    expected = [".gitignore", "a b.txt", "new.py", "volc/config.example", "volc/render.py", "volc/volc_submit.sh"]
    if repository:
        for words in (["init", "-q"], ["add", "-f", "old.log", "gone.py"]):
            subprocess.run(["git", *words], cwd=tree, check=True)
        expected.append("old.log")  # tracked all the same
    (tree / "gone.py").unlink()
    done = submit(tree, *COMMAND, **ACCOUNT, GIT_DIR=str(tree / "no-such"))
    assert done.returncode == 0, done.stderr
    sent = (tree / "seen.files").read_text().split("\n")[:-1]
    assert sent == sorted(f"./{name}" for name in expected), done.stdout
    assert f": {len(expected)} files, " in done.stdout and "# not sent: elsewhere, " in done.stdout
    done = submit(tree, *COMMAND, **ACCOUNT, VOLC_CODE_PATH="/code")
    assert done.returncode == 0 and (tree / "seen.files").read_text() == ""


def test_nothing_that_is_tracked_looks_like_what_is_left_out():
    listed = subprocess.run(["git", "-C", ROOT, "ls-files"], capture_output=True, text=True).stdout.splitlines()
    assert [name for name in listed if render.LEFT_OUT & {*Path(name).parts}] == []


def test_without_the_cli_it_says_so_and_writes_nothing(tree):
    for tool in ("bash", "env", "dirname"):
        (tree / "bin" / tool).symlink_to(shutil.which(tool))
    before = sorted(tree.rglob("*"))
    done = submit(tree, *COMMAND, **ACCOUNT, PATH=str(tree / "bin"))
    assert done.returncode == 1 and "volc CLI is not on PATH" in done.stderr
    assert [path for path in sorted(tree.rglob("*")) if "__pycache__" not in str(path)] == before


@pytest.mark.parametrize(
    ("words", "environment", "needle"),
    [
        (["--dry-run"], {}, "no command"),
        (["--nodes=4", *COMMAND], {}, "--nodes=4"),
        (["--dry-run", *COMMAND], {"NNODES": "four"}, "NNODES=four"),
        (["--dry-run", *COMMAND], {"NNODES": "0"}, "NNODES=0"),
        (
            ["--dry-run", *COMMAND],
            {"VOLC_STORAGE_TYPE": "Disk"},
            "VOLC_STORAGE_TYPE=Disk",
        ),
        (["--dry-run", *COMMAND], {"VOLC_STORAGE_TYPE": "Tos"}, "VOLC_STORAGE_TYPE=Tos: object storage"),
        (["--dry-run", *COMMAND], {"VOLC_SECRETS": "NOT_SET"}, "NOT_SET"),
        (["--dry-run", *COMMAND], {"VOLC_PRIORITY": "high"}, "VOLC_PRIORITY=high"),
    ],
)
def test_mistakes_are_one_line(tree, words, environment, needle):
    done = submit(tree, *words, **{**ACCOUNT, **environment})
    assert done.returncode == 1 and needle in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("known", "needle"),
    [
        ({"VOLC_STORAGE_TYPE": "Sfcs"}, "VOLC_STORAGE_TYPE=Sfcs: object storage"),
        ({"VOLC_STORAGE_TYPE": "vepfs"}, "VOLC_STORAGE_TYPE=vepfs: expected Vepfs, VepfsAP, Nas"),
        ({"VOLC_ACTIVE_DEADLINE_SECONDS": "24h"}, "VOLC_ACTIVE_DEADLINE_SECONDS=24h"),
        ({"VOLC_RESERVE_RESOURCE_ON_RETRY": "yes"}, "VOLC_RESERVE_RESOURCE_ON_RETRY=yes"),
        ({"VOLC_EXTRA_YAML": "{Tags: [\n"}, "VOLC_EXTRA_YAML='{Tags: ["),
        ({"VOLC_EXTRA_YAML": "[a]"}, "VOLC_EXTRA_YAML='[a]': expected fields"),
        ({"VOLC_EXTRA_YAML": "7"}, "VOLC_EXTRA_YAML='7': expected fields"),
        ({"VOLC_EXTRA_YAML": "{Envs: {A: b}}"}, "VOLC_EXTRA_YAML='{Envs: {A: b}}': expected"),
        ({"VOLC_EXTRA_YAML": "{Envs: }"}, "VOLC_EXTRA_YAML='{Envs: }': expected"),
        ({"VOLC_EXTRA_YAML": "no-such.yaml"}, "No such file"),
        ({"VOLC_EXTRA_YAML": "{Storages: }"}, "VOLC_EXTRA_YAML='{Storages: }': expected"),
        ({"VOLC_MOUNT_PATH": "/"}, "VOLC_MOUNT_PATH=/: expected a folder"),
        ({"VOLC_MOUNT_PATH": "//."}, "VOLC_MOUNT_PATH=//.: expected a folder"),
        ({"VOLC_MOUNT_PATH": "/root/"}, "MountPath /root/ hides /root/nanochat"),
        ({"VOLC_EXTRA_YAML": "{Storages: [{Type: Tos, MountPath: /root}]}"}, "MountPath /root hides"),
        ({"VOLC_EXTRA_YAML": "{Storages: [{Type: Tos, MountPath: /mnt/store}]}"}, "of Type Tos: object storage"),
        ({"VOLC_EXTRA_YAML": "{Storages: [{Type: Sfcs, MountPath: /mnt/store/nanochat/}]}"}, "of Type Sfcs: object"),
        (
            {
                "VOLC_EXTRA_YAML": "{Storages: [{Type: Tos, MountPath: /b}], "
                "Envs: [{Name: NANOCHAT_BASE_DIR, Value: /b/x}]}"
            },
            "NANOCHAT_BASE_DIR=/b/x is in a storage of Type Tos",
        ),
        ({"VOLC_MOUNT_PATH": "store"}, "VOLC_MOUNT_PATH=store: expected a folder in the task"),
        ({"VOLC_CODE_PATH": "nanochat"}, "VOLC_CODE_PATH=nanochat: expected a folder in the task"),
    ],
)
def test_further_mistakes_are_one_line(known, needle):
    with pytest.raises(render.Mistake) as caught:
        render.make_task({**ACCOUNT, **known}, COMMAND)
    assert needle in str(caught.value) and "\n" not in str(caught.value)


def test_a_mount_hides_the_code_only_where_it_is_over_it():
    for known in ({"VOLC_MOUNT_PATH": "/root/nano"}, {"VOLC_MOUNT_PATH": "/root", "VOLC_CODE_PATH": "/root/nanochat"}):
        assert render.make_task({**ACCOUNT, **known}, COMMAND)["Storages"][0]["MountPath"] == known["VOLC_MOUNT_PATH"]


def test_a_damaged_config_names_the_line(tree):
    for line in ("VOLC_IMAGE='open", "VOLC_IMAGE: x", "VOLC_IMAGE=two words"):
        (tree / "volc/config").write_text(f"# first\n{line}\n")
        done = submit(tree, "--dry-run", *COMMAND, **ACCOUNT)
        assert done.returncode == 1 and "line 2" in done.stderr and done.stderr.count("\n") == 1


@given(st.text(), st.text(min_size=1), st.lists(st.text(), min_size=1), st.booleans())
def test_any_value_survives_yaml(image, secret, command, hide):
    known = {**ACCOUNT, "VOLC_IMAGE": image or "x", "HF_TOKEN": secret, "VOLC_ENVS": "ANY", "ANY": secret[::-1]}
    task = yaml.safe_load(render.render(render.make_task(known, command), hide))
    values = {one["Name"]: one["Value"] for one in task["Envs"]}
    assert task["ImageUrl"] == (image or "x") and task["Description"] == shlex.join(command)
    assert values["ANY"] == secret[::-1] and values["HF_TOKEN"] == ("***" if hide else secret)


# ----------------------------------------------------------------------------------------------------------------------
# Slurm, SkyPilot, Kubeflow Trainer


def sbatch_options(text):
    return dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", text, re.M))


def test_slurm_starts_one_launcher_a_node_and_warns_before_the_end():
    text = (ROOT / "slurm/pretrain.sbatch").read_text()
    options = sbatch_options(text)
    assert options["ntasks-per-node"] == "1" and options["signal"] == "USR1@120" and "requeue" in options


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (75, True), (143, False)])
def test_slurm_goes_on_after_a_stop_and_not_after_a_failure(tmp_path, code, requeued):
    for name in ("srun", "scontrol"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@"\n' + (f"exit {code}\n" if name == "srun" else ""))
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "7"}
    script = ["bash", str(ROOT / "slurm/pretrain.sbatch"), "--depth=32", "--run=a b"]
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert done.returncode == code and done.stdout.splitlines()[0].endswith(" bash pretrain.sh --depth=32 --run=a b")
    assert ("scontrol requeue 7" in done.stdout) == requeued


def test_skypilot_runs_the_same_command_on_every_node():
    task = yaml.safe_load((ROOT / "sky/pretrain.yaml").read_text())
    assert task["run"].strip() == "exec bash pretrain.sh $ARGS"
    assert task["envs"]["NANOCHAT_BASE_DIR"].startswith(tuple(task["volumes"]))
    subprocess.run(["bash", "-n"], input=task["setup"] + task["run"], text=True, check=True)
    sky = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
    cluster = launch.detect({**sky, "SKYPILOT_NUM_GPUS_PER_NODE": task["resources"]["accelerators"].split(":")[1]})
    assert (cluster.nodes, cluster.node_rank, cluster.address, cluster.processes) == (2, 1, "10.0.0.1", 8)


def test_kubeflow_trainer_runs_the_same_command_on_every_node():
    """The manifest was checked against the CRDs of Trainer 2.2 and 2.3, unknown fields refused."""
    job = yaml.safe_load((ROOT / "kubeflow/pretrain.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    trainer, (patch,) = job["spec"]["trainer"], job["spec"]["runtimePatches"]
    assert trainer["command"][:2] == ["bash", "-c"] and trainer["command"][2].endswith("exec bash pretrain.sh $ARGS")
    (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    mounts = {one["name"]: one["mountPath"] for one in pod["containers"][0]["volumeMounts"]}
    environment = {one["name"]: one.get("value", "") for one in trainer["env"]}
    assert environment["NANOCHAT_BASE_DIR"].startswith(mounts["store"]) and {v["name"] for v in pod["volumes"]} == {
        *mounts
    }
    # What Trainer sets in the container "node"; GPUs are counted, because it says "auto" where some are requested
    pet = {"PET_NNODES": str(trainer["numNodes"]), "PET_NPROC_PER_NODE": "auto", "PET_NODE_RANK": "3"}
    pet |= {"PET_MASTER_ADDR": "nanochat-x-node-0-0.nanochat-x", "PET_MASTER_PORT": "29500"}
    gpus = trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"]
    cluster = launch.detect({**environment, **pet}, lambda: gpus)
    assert cluster == launch.Cluster("Kubeflow Trainer", 4, 3, pet["PET_MASTER_ADDR"], 29500, 8)


@pytest.mark.parametrize(
    "script", ["pretrain.sh", "volc/volc_submit.sh", "slurm/pretrain.sbatch", "benchmarks/scale.sh"]
)
def test_scripts_are_strict_and_parse(script):
    assert "set -euo pipefail" in (ROOT / script).read_text()
    subprocess.run(["bash", "-n", ROOT / script], check=True)


def scale(tree, *words, **environment):
    everything = {"PATH": f"{tree / 'bin'}:{os.environ['PATH']}", **environment}
    done = subprocess.run(
        ["bash", "benchmarks/scale.sh", *words], cwd=tree, env=everything, capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout.splitlines()


def test_the_commands_of_the_scale_table():
    code, lines = scale(ROOT, "--dry-run")
    assert code == 0 and len(lines) == len(set(lines)) == 11 * 4 * (1 + 7 * 3)
    assert all("--parallel=ddp" in line for line in lines if line.startswith("1 x 1 GPUs: "))
    groups = {line[:5]: line for line in lines if "--parallel=hsdp" in line and "--node-size=" in line}
    assert {start: re.search(r"--node-size=(\d+)", line)[1] for start, line in groups.items()} == {
        "1 x 2": "1", "1 x 4": "2", "1 x 8": "4",
    }  # fmt: skip
    wanted = "--depth=48 --parallel=hsdp --device-batch-size=0 --total-batch-size=524288"
    assert sum(wanted in line and line.startswith("16 x 8 GPUs: ") for line in lines) == 4
    for line in [line for line in lines if line.startswith("1 x 8") and "--depth=20 " in line]:
        settings = cli.parse(train_speed.Settings, line.split("benchmarks.train_speed ")[1].split())
        assert ("fp8" in line) == (settings.fp8 == "all") and ("_ngram" in line) == (settings.arch == "ngram")


STAND_IN = """#!/usr/bin/env bash
case "$*" in
  *--show=node_rank) echo 0 ;;
  *--show=nodes) echo 1 ;;
  *--show=processes) echo 8 ;;
  *--parallel=ddp*) echo "out of memory" && exit 1 ;;
  *) words=$* && echo "$words" >>calls && echo '{"mfu": 0.5}' >"${words##*--out=}" ;;
esac
"""


def test_a_row_that_fails_does_not_stop_the_others_and_results_are_kept(tmp_path):
    for folder in ("bin", "dev", "benchmarks"):
        (tmp_path / folder).mkdir()
    shutil.copy(ROOT / "benchmarks/scale.sh", tmp_path / "benchmarks")
    shutil.copytree(ROOT / "profiles", tmp_path / "profiles")
    (tmp_path / "dev/setup.sh").touch()
    (tmp_path / "bin/python").write_text(STAND_IN)
    (tmp_path / "bin/python").chmod(0o755)
    for _ in range(2):
        code, lines = scale(tmp_path, DEPTHS="20", VARIANTS="classic")
        assert code == 1 and "out of memory" in lines
    assert (tmp_path / "benchmarks/results/scale_d20_8gpu_fsdp_classic.json").read_text() == '{"mfu": 0.5}\n'
    assert len((tmp_path / "calls").read_text().splitlines()) == 2
    assert scale(tmp_path, "--all")[0] == 2
