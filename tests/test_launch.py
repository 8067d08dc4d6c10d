import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat import launch
from nanochat.cluster import nodes, slurm
from nanochat.cluster.slurm import expand_hosts
from nanochat.errors import UserError
from nanochat.launch import Cluster, command_line, detect, shell_line, torchrun_words

ROOT = Path(__file__).parent.parent


def no_count():
    raise AssertionError("a variable says how many GPUs there are")


SIGNALS = f"--signals_to_handle={launch.SIGNALS}"

# One fake environment a platform: node 1 of 2 nodes with 8 GPUs, node 0 at host0, port 3333.
ENVIRONMENTS = {
    "Volcengine": {
        "MLP_WORKER_NUM": "2",
        "MLP_WORKER_GPU": "8",
        "MLP_ROLE_INDEX": "1",
        "MLP_WORKER_0_HOST": "host0",
        "MLP_WORKER_0_PORT": "3333",
    },
    "SkyPilot": {
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NODE_IPS": "host0\nhost1",
        "SKYPILOT_NUM_GPUS_PER_NODE": "8",
        "MASTER_PORT": "3333",
    },
    "dstack": {
        "DSTACK_NODES_NUM": "2",
        "DSTACK_NODE_RANK": "1",
        "DSTACK_MASTER_NODE_IP": "host0",
        "DSTACK_GPUS_PER_NODE": "8",
        "MASTER_PORT": "3333",
    },
    "Slurm": {
        "SLURM_NNODES": "2",
        "SLURM_NODEID": "1",
        "SLURM_JOB_NODELIST": "host[0-1]",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_STEP_ID": "0",
        "MASTER_PORT": "3333",
    },
    "Kubeflow Trainer": {
        "PET_NNODES": "2",
        "PET_NODE_RANK": "1",
        "PET_MASTER_ADDR": "host0",
        "PET_MASTER_PORT": "3333",
        "PET_NPROC_PER_NODE": "8",
    },
    "Kubernetes PyTorchJob": {
        "WORLD_SIZE": "2",
        "RANK": "1",
        "MASTER_ADDR": "host0",
        "MASTER_PORT": "3333",
        "NPROC_PER_NODE": "8",
    },
    "plain": {
        "NNODES": "2",
        "NODE_RANK": "1",
        "MASTER_ADDR": "host0",
        "MASTER_PORT": "3333",
        "NPROC_PER_NODE": "8",
    },
}


@pytest.fixture(autouse=True)
def _no_slurm(monkeypatch):
    """Machines with scontrol must not change the outcome."""
    monkeypatch.setattr(slurm, "_ask_scontrol", lambda nodelist: [])


@pytest.mark.parametrize("platform", ENVIRONMENTS)
def test_every_platform_gives_the_same_cluster_and_line(platform):
    cluster = detect(ENVIRONMENTS[platform], no_count)
    assert cluster == Cluster(platform, 2, 1, "host0", 3333, 8)
    line = "torchrun --nnodes=2 --nproc_per_node=8 --node_rank=1 --master_addr=host0 --master_port=3333"
    added, words = command_line(cluster, ["-m", "x"], 0, {}, cores=64)
    assert shell_line(added, words) == f"OMP_NUM_THREADS=8 TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110 {line} {SIGNALS} -m -- x"


@pytest.mark.parametrize("platform", ENVIRONMENTS)
def test_platforms_that_also_set_the_names_of_pytorchjob_are_not_taken_for_it(platform):
    generic = {"WORLD_SIZE": "16", "RANK": "9", "MASTER_ADDR": "other"} if platform != "Kubernetes PyTorchJob" else {}
    if platform == "plain":
        return  # there the job's names count
    cluster = detect({**generic, **ENVIRONMENTS[platform]}, no_count)
    assert (cluster.platform, cluster.nodes, cluster.node_rank, cluster.address) == (platform, 2, 1, "host0")


@given(st.integers(1, 64), st.data())
def test_volcengine_rack_rank_goes_before_role_index(nodes, data):
    rack, role = (data.draw(st.integers(0, nodes - 1)) for _ in range(2))
    environment = {**ENVIRONMENTS["Volcengine"], "MLP_WORKER_NUM": str(nodes), "MLP_ROLE_INDEX": str(role)}
    assert detect(environment, no_count).node_rank == role
    assert detect({**environment, "MLP_WORKER_RACK_RANK_INDEX": str(rack)}, no_count).node_rank == rack
    assert detect({**environment, "MLP_WORKER_RACK_RANK_INDEX": ""}, no_count).node_rank == role


def test_the_address_of_node_0_by_other_names():
    without = {name: value for name, value in ENVIRONMENTS["Volcengine"].items() if name != "MLP_WORKER_0_HOST"}
    assert detect({**without, "MLP_WORKER_0_PRIMARY_HOST": "vpc0"}, no_count).address == "vpc0"
    without = {name: value for name, value in ENVIRONMENTS["dstack"].items() if name != "DSTACK_MASTER_NODE_IP"}
    assert detect({**without, "DSTACK_NODES_IPS": "host0\nhost1"}, no_count).address == "host0"


@pytest.mark.parametrize(
    ("rdma", "vpc", "expected"),
    [
        (TimeoutError(), None, "vpc"),
        (OSError("no route"), ConnectionRefusedError(), "vpc"),  # node 0 is there, if not yet listening
        (None, OSError(), "rdma"),
        (ConnectionRefusedError(), None, "rdma"),
        (TimeoutError(), socket.gaierror(), "rdma"),
    ],
)
def test_a_node_takes_the_address_of_node_0_that_answers(monkeypatch, rdma, vpc, expected):
    def connect(address, timeout):
        if (answer := {"rdma": rdma, "vpc": vpc}[address[0]]) is not None:
            raise answer
        return socket.socket()

    monkeypatch.setattr(socket, "create_connection", connect)
    assert nodes.reachable({"MLP_WORKER_0_PRIMARY_HOST": "vpc"}, "rdma", 1) == expected


@pytest.mark.parametrize("environment", [{}, {"MLP_WORKER_0_PRIMARY_HOST": "one"}, {"MLP_WORKER_0_PRIMARY_HOST": ""}])
def test_a_lone_address_is_not_tried(environment, monkeypatch):
    monkeypatch.delattr(socket, "create_connection")
    assert nodes.reachable(environment, "one", 1) == "one"


def test_this_machine_alone():
    assert detect({}, lambda: 8) == Cluster("plain", 1, 0, "127.0.0.1", 29500, 8)
    assert detect({}, lambda: 0).processes == 1
    assert detect({"PET_NNODES": "1", "PET_NPROC_PER_NODE": "auto"}, lambda: 4).gpus_per_node == 4
    assert detect({"WORLD_SIZE": "1", "RANK": "0"}, lambda: 2).nodes == 1


@pytest.mark.parametrize("platform", ENVIRONMENTS)
@pytest.mark.parametrize("field", ["nodes", "node_rank", "gpus", "port"])
@pytest.mark.parametrize("value", ["two", "-1", "1.5", "1:4"])
def test_values_that_are_no_numbers_are_named(platform, field, value):
    row = next(row for row in launch.PLATFORMS if row.name == platform)
    name = next(name for name in getattr(row, field) if name in ENVIRONMENTS[platform])
    with pytest.raises(UserError, match=f"{name}={value}.*set it"):
        detect({**ENVIRONMENTS[platform], name: value}, no_count)


@pytest.mark.parametrize("platform", ENVIRONMENTS)
def test_what_is_missing_is_named(platform):
    row = next(row for row in launch.PLATFORMS if row.name == platform)
    for names in (row.node_rank, row.address):
        environment = {k: v for k, v in ENVIRONMENTS[platform].items() if k not in names}
        with pytest.raises(UserError, match=f"{names[0]}.* is not set.*set it"):
            detect(environment, no_count)


@pytest.mark.parametrize("platform", ENVIRONMENTS)
def test_a_rank_beyond_the_nodes_names_both(platform):
    row = next(row for row in launch.PLATFORMS if row.name == platform)
    rank = next(name for name in row.node_rank if name in ENVIRONMENTS[platform])
    with pytest.raises(UserError, match=f"{rank}=2 does not fit {row.nodes[0]}=2"):
        detect({**ENVIRONMENTS[platform], rank: "2"}, no_count)


@pytest.mark.parametrize("name", ["TORCHELASTIC_RUN_ID", "LOCAL_RANK"])
def test_inside_torchrun_is_refused(name):
    with pytest.raises(UserError, match=f"{name}=0 .*outside torchrun"):
        detect({**ENVIRONMENTS["plain"], name: "0"}, no_count)


def test_slurm_needs_one_launcher_a_node():
    with pytest.raises(UserError, match=r"SLURM_LOCALID=1.*ntasks-per-node=1"):
        detect({**ENVIRONMENTS["Slurm"], "SLURM_LOCALID": "1"}, no_count)
    without = {name: value for name, value in ENVIRONMENTS["Slurm"].items() if name != "SLURM_STEP_ID"}
    with pytest.raises(UserError, match="srun"):
        detect(without, no_count)


def test_two_slurm_jobs_use_two_ports():
    environment = {name: value for name, value in ENVIRONMENTS["Slurm"].items() if name != "MASTER_PORT"}
    one, two = (detect({**environment, "SLURM_JOB_ID": job}, no_count).port for job in ("120000", "120001"))
    assert one != two and 1024 <= one < 32768


@pytest.mark.parametrize(
    ("nodelist", "hosts"),
    [
        ("gpu1", ["gpu1"]),
        ("gpu[01-03,07],login1", ["gpu01", "gpu02", "gpu03", "gpu07", "login1"]),
        ("r[1-2]n[8-9]x", ["r1n8x", "r1n9x", "r2n8x", "r2n9x"]),
        ("a-b,c", ["a-b", "c"]),
        ("n[099-101]", ["n099", "n100", "n101"]),
    ],
)
def test_slurm_node_lists(nodelist, hosts):
    assert expand_hosts(nodelist) == hosts


@given(st.lists(st.integers(0, 999), min_size=1, max_size=20))
def test_a_list_in_brackets_is_its_numbers(numbers):
    assert expand_hosts(f"n[{','.join(f'{number:03d}' for number in numbers)}]") == [f"n{n:03d}" for n in numbers]


@pytest.mark.parametrize("nodelist", ["n[1-", "n1]", "n[a-b]", "n[]", ""])
def test_damaged_node_lists_are_one_line(nodelist):
    with pytest.raises(UserError, match="SLURM_JOB_NODELIST"):
        slurm.hosts(nodelist)


def test_the_line_on_one_node():
    assert torchrun_words(Cluster("plain", 1, 0, "", 1, 0)) == torchrun_words(Cluster("plain", 1, 0, "", 1, 1)) == []
    eight = Cluster("plain", 1, 0, "", 1, 8)
    assert torchrun_words(eight) == ["torchrun", "--standalone", "--nproc_per_node=8", SIGNALS]
    assert torchrun_words(eight, 3) == ["torchrun", "--standalone", "--nproc_per_node=8", SIGNALS, "--max_restarts=3"]
    one = Cluster("plain", 1, 0, "", 1, 1)
    assert torchrun_words(one, 2) == ["torchrun", "--standalone", "--nproc_per_node=1", SIGNALS, "--max_restarts=2"]


def test_restarts_over_nodes_take_the_rendezvous_that_can_form_again():
    for rank, host in ((0, 1), (1, 0)):
        words = torchrun_words(Cluster("plain", 2, rank, "h", 7, 8), 3)
        assert {"--rdzv_backend=c10d", "--rdzv_endpoint=h:7", f"--rdzv_conf=is_host={host}"} <= set(words)
        assert "--max_restarts=3" in words and not any("master" in word for word in words)


def test_variables_are_set_only_where_they_are_not():
    def added(processes, environment, cores, restarts=1):
        return command_line(Cluster("plain", 1, 0, "", 1, processes), ["-m", "x"], restarts, environment, cores)[0]

    assert added(8, {}, 64, restarts=0) == {"OMP_NUM_THREADS": "8", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "110"}
    assert added(8, {}, 64)["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"  # attempts must not share it
    assert added(8, {}, 2)["OMP_NUM_THREADS"] == "1"
    assert "OMP_NUM_THREADS" not in added(1, {}, 64)
    assert added(8, {"OMP_NUM_THREADS": "3", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "9"}, 64, restarts=0) == {}
    assert added(1, {}, 64, restarts=0) == {}


# ----------------------------------------------------------------------------------------------------------------------
# The command line, in a process of its own


def shell(*words, **environment):
    names = {name for row in launch.PLATFORMS for field in vars(row).values() if field != row.name for name in field}
    left = {k: v for k, v in os.environ.items() if k not in names | {"OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"}}
    command = [sys.executable, "-m", "nanochat.launch", *words]
    done = subprocess.run(command, cwd=ROOT, env={**left, **environment}, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


def test_scontrol_is_asked_where_it_is(tmp_path):
    stand_in = tmp_path / "scontrol"
    stand_in.write_text('#!/bin/sh\n[ "$*" = "show hostnames host[0-1]" ] && echo a.example && echo b.example\n')
    stand_in.chmod(0o755)
    environment = {**ENVIRONMENTS["Slurm"], "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    assert shell("--show=address", **environment)[:2] == (0, "a.example\n")


def test_dry_run_and_show():
    code, out, _ = shell("--dry-run", "--", "-m", "scripts.base_train", "--run=a b", **ENVIRONMENTS["Volcengine"])
    assert code == 0 and out.endswith("-m -- scripts.base_train '--run=a b'\n") and " torchrun --nnodes=2 " in out
    assert shell("--show=node_rank", **ENVIRONMENTS["Volcengine"])[:2] == (0, "1\n")
    assert shell("--show=processes", "--nproc_per_node", "3")[:2] == (0, "3\n")
    assert "node 0 of 1, 2 processes" in shell("--nproc-per-node=2")[1]


def test_mistakes_are_one_line():
    for words, environment, needle in (
        (["--dry-run", "--", "-m", "x"], {"NNODES": "2"}, "NODE_RANK is not set"),
        (["--max-restarts=-1", "--", "-m", "x"], {}, "max-restarts"),
        (["--no-such"], {}, "--no-such"),
    ):
        code, _, err = shell(*words, **environment)
        assert code in (1, 2) and needle in err and err.startswith("error: ") and err.count("\n") == 1


def test_it_becomes_torchrun_with_the_line_it_printed(tmp_path):
    stand_in = tmp_path / "torchrun"
    stand_in.write_text('#!/bin/sh\necho "$OMP_NUM_THREADS" "$PET_NNODES" "$@"; exit 7\n')
    stand_in.chmod(0o755)
    environment = {**ENVIRONMENTS["Kubeflow Trainer"], "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    code, out, _ = shell("--", "-m", "x", "--y=1", OMP_NUM_THREADS="2", **environment)
    first, second = out.splitlines()
    assert code == 7 and first.endswith(f" torchrun {second.removeprefix('2  ')}")  # and no PET_ variable beside it


def test_one_process_is_plain_python(tmp_path):
    (tmp_path / "show.py").write_text("import sys; print(sys.argv[1:])")
    code, out, _ = shell("--nproc-per-node=1", "--", str(tmp_path / "show.py"), "a b")
    assert code == 0 and out.endswith("['a b']\n")


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--max-restarts=1"]])
def test_two_nodes_of_one_host_meet(tmp_path, flags):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script = tmp_path / "show.py"
    script.write_text(
        "import os, sys\nwords = ['at', *(os.environ[k] for k in ('RANK', 'WORLD_SIZE')), *sys.argv[1:]]\n"
        "os.write(1, (' '.join(words) + '\\n').encode())"  # at once: two processes write to one pipe
    )
    command = [sys.executable, "-m", "nanochat.launch", *flags, "--", str(script), "--run=x", "-m", "a b"]
    plain = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NPROC_PER_NODE": "2"}
    agents = [
        subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **plain, "NODE_RANK": str(rank)}, stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    out = "".join(agent.communicate(timeout=120)[0] for agent in agents)
    assert [agent.returncode for agent in agents] == [0, 0]
    lines = sorted(line for line in out.splitlines() if line.startswith("at "))
    assert lines == [f"at {rank} 4 --run=x -m a b" for rank in range(4)]


WORKER = """
import signal, sys, time

def save(*_):
    print("saved", flush=True)
    sys.exit(0)

signal.signal(signal.SIGUSR1, save)
print("ready", flush=True)
time.sleep(120)
"""


def run_and_signal(tmp_path, script, number):
    """(exit code, stdout, stderr) of two processes that are sent a signal, by way of the launcher, once both have said
    that they are ready."""
    (tmp_path / "worker.py").write_text(script)
    command = [sys.executable, "-m", "nanochat.launch", "--nproc-per-node=2", "--", str(tmp_path / "worker.py")]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    seen = ""
    try:
        while seen.count("ready") < 2 and (line := job.stdout.readline()):
            seen += line
        job.send_signal(number)
        rest, err = job.communicate(timeout=60)
    finally:
        job.kill()
    return job.returncode, seen + rest, err


def run_two(tmp_path, script, *words, **environment):
    """(exit code, stdout, stderr) of a script as two processes under torchrun."""
    (tmp_path / "script.py").write_text(script)
    command = [sys.executable, "-m", "nanochat.launch", "--nproc-per-node=2", "--", str(tmp_path / "script.py"), *words]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=100
    )


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        ("sys.exit(2)", 2, ["error: it is so"]),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, ["error: it is so", "error: rank 0 was killed by SIGKILL"]),
    ],
)
def test_a_mistake_is_said_by_the_processes_and_not_by_torchrun(tmp_path, end, code, said):
    only_one = "import os, signal, sys, time\nif os.environ['RANK'] == '1': time.sleep(60)\n"
    done = run_two(tmp_path, f"{only_one}print('error: it is so', file=sys.stderr, flush=True)\n{end}\n")
    assert done.returncode == code
    assert done.stderr.splitlines() == said


USER_ERROR = """
import os, sys, time
from nanochat.errors import UserError, exit_on_user_error
def main():
    if os.environ["RANK"] == "0" and "late" in sys.argv:
        time.sleep(1.5)
    if os.environ["RANK"] in sys.argv[1:]:
        raise UserError("it is so")
    time.sleep(60)
exit_on_user_error(main)
"""


@pytest.mark.parametrize(
    ("ranks", "said"),
    [
        (["0", "1"], "error: it is so\n"),
        (["0", "1", "late"], "error: it is so\n"),
        (["1"], "error: it is so (rank 1)\n"),
    ],
)
def test_a_users_mistake_is_one_line_whichever_ranks_met_it(tmp_path, ranks, said):
    done = run_two(tmp_path, USER_ERROR, *ranks, PYTHONPATH=str(ROOT))
    assert (done.returncode, done.stderr) == (1, said)


@pytest.mark.parametrize(("name", "code"), [("SIGUSR1", 0), ("SIGTERM", 75)])  # the first announces the end
def test_processes_hear_of_a_signal_and_decide_the_exit_code_when_they_have_saved(tmp_path, name, code):
    script = WORKER.replace("SIGUSR1", name).replace("sys.exit(0)", f"sys.exit({code})")
    found, out, err = run_and_signal(tmp_path, script, signal.Signals[name])
    assert (found, err, out.count("saved")) == (code, "", 2)


def test_processes_that_do_not_save_end_it_with_the_signal(tmp_path):
    script = "import time; print('ready', flush=True); time.sleep(60)"
    code, _, err = run_and_signal(tmp_path, script, signal.SIGTERM)
    assert (code, err) == (128 + signal.SIGTERM, "")


def test_a_lone_process_is_not_told_the_rank_of_its_node(tmp_path):
    (tmp_path / "show.py").write_text(
        "import os; print([name for name in ('RANK', 'WORLD_SIZE') if name in os.environ])"
    )
    plain = {**os.environ, "RANK": "0", "WORLD_SIZE": "1", "NPROC_PER_NODE": "1", "MASTER_ADDR": "here"}
    command = [sys.executable, "-m", "nanochat.launch", "--", str(tmp_path / "show.py")]
    done = subprocess.run(command, cwd=ROOT, env=plain, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stderr


def test_own_address_is_one_that_others_can_use():
    assert nodes.own_address("127.0.0.1") is None  # of no use to anybody else
    assert nodes.own_address("no such host") is None
