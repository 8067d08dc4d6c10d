"""Which cluster is this? -> the torchrun line that starts one process a GPU on every node.

    python -m nanochat.launch -- -m scripts.base_train --depth=20   the same command on every node; --dry-run prints it
    python -m nanochat.launch plan --depth=48 --nodes=16            what a size would cost (cluster/plan.py)

Where no scheduler says otherwise it is this machine alone. To say it by hand, set NNODES, NODE_RANK,
MASTER_ADDR, MASTER_PORT and NPROC_PER_NODE on every node.
"""

import os
import pkgutil
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from nanochat import cli
from nanochat.cli import int_flag
from nanochat.errors import UserError

DEFAULT_PORT = 29500  # torchrun's own
MAX_THREADS = 16  # a process of ours has no use for more
# What torchrun hands on. Of SIGUSR1, by which Slurm and others announce the end, it would die and leave orphans behind.
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
SUBCOMMANDS = {"plan": "nanochat.cluster.plan"}  # first word -> module that is run instead; the launcher needs none
SHUTDOWN_SECONDS = 110  # that torchrun leaves processes to save after a signal; schedulers warn 120 s before the end


@dataclass(frozen=True)
class Platform:
    """Names of the variables that hold each fact; of several names the first that is set counts."""

    name: str
    nodes: tuple[str, ...]  # the first of these is what a platform is known by
    node_rank: tuple[str, ...]
    address: tuple[str, ...]
    port: tuple[str, ...]
    gpus: tuple[str, ...]
    check: str = ""  # module:function that is called with the environment and the number of nodes
    hosts: str = ""  # module:function for a list of nodes that is not their names


# From the surest sign to the weakest: Volcengine and Kubeflow also set RANK and WORLD_SIZE, SkyPilot may run on Slurm,
# dstack on Kubernetes. On Volcengine the rack rank numbers the nodes switch by switch, so that neighbours in rank are
# neighbours in the network; the role index does not.
PLATFORMS = (
    Platform(
        "Volcengine", ("MLP_WORKER_NUM",), ("MLP_WORKER_RACK_RANK_INDEX", "MLP_ROLE_INDEX"),
        ("MLP_WORKER_0_HOST", "MLP_WORKER_0_PRIMARY_HOST"), ("MLP_WORKER_0_PORT",), ("MLP_WORKER_GPU",)),
    Platform(
        "SkyPilot", ("SKYPILOT_NUM_NODES",), ("SKYPILOT_NODE_RANK",),
        ("SKYPILOT_NODE_IPS",), ("MASTER_PORT",), ("SKYPILOT_NUM_GPUS_PER_NODE",)),
    Platform(
        "dstack", ("DSTACK_NODES_NUM",), ("DSTACK_NODE_RANK",),
        ("DSTACK_MASTER_NODE_IP", "DSTACK_NODES_IPS"), ("MASTER_PORT",), ("DSTACK_GPUS_PER_NODE",)),
    Platform(
        "Slurm", ("SLURM_NNODES", "SLURM_JOB_NUM_NODES"), ("SLURM_NODEID",),
        ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"), ("MASTER_PORT",), ("SLURM_GPUS_ON_NODE",),
        "nanochat.cluster.slurm:check", "nanochat.cluster.slurm:hosts"),
    Platform(
        "Kubeflow Trainer", ("PET_NNODES",), ("PET_NODE_RANK",),
        ("PET_MASTER_ADDR", "MASTER_ADDR"), ("PET_MASTER_PORT", "MASTER_PORT"), ("PET_NPROC_PER_NODE",)),
    Platform(  # before torchrun, WORLD_SIZE and RANK count nodes here
        "Kubernetes PyTorchJob", ("WORLD_SIZE",), ("RANK",), ("MASTER_ADDR",), ("MASTER_PORT",), ("NPROC_PER_NODE",)),
    Platform("plain", ("NNODES",), ("NODE_RANK",), ("MASTER_ADDR",), ("MASTER_PORT",), ("NPROC_PER_NODE",)),
)  # fmt: skip


@dataclass(frozen=True)
class Cluster:
    """Where this command runs."""

    platform: str
    nodes: int
    node_rank: int
    address: str  # of node 0
    port: int
    gpus_per_node: int  # 0: none, one process on the CPU

    @property
    def processes(self) -> int:
        """Processes on each node."""
        return max(1, self.gpus_per_node)


def visible_gpus() -> int:
    """GPUs that PyTorch can use here; asked only where there is a driver, because importing it takes seconds."""
    if shutil.which("nvidia-smi") is None:
        return 0
    import torch

    return torch.cuda.device_count()


def detect(environment: Mapping[str, str], count_gpus: Callable[[], int] = visible_gpus) -> Cluster:
    """The cluster that `environment` describes; `count_gpus` is called when no variable says how many a node has.

    Raises UserError, naming the variable, for values that are missing, impossible or contradict each other.
    """
    for name in ("TORCHELASTIC_RUN_ID", "LOCAL_RANK"):
        if name in environment:
            raise UserError(
                f"{name}={environment[name]} says that torchrun runs already: start nanochat.launch once on each node, "
                "outside torchrun (or unset it if it is left over)"
            )
    known = (platform for platform in PLATFORMS if any(environment.get(name) for name in platform.nodes))
    platform = next(known, PLATFORMS[-1])
    nodes = _integer(platform.nodes, environment, 1, least=1)
    rank = _integer(platform.node_rank, environment, 0 if nodes == 1 else None)
    if rank >= nodes:
        raise UserError(
            f"{_shown(platform.node_rank, environment)} does not fit {_shown(platform.nodes, environment, '1')}: "
            f"nodes are numbered 0 to {nodes - 1}; correct one of the two"
        )
    if platform.check:
        pkgutil.resolve_name(platform.check)(environment, nodes)
    address = _address(platform, environment) if nodes > 1 else "127.0.0.1"
    # Slurm may put two jobs on one node, so that each needs its own; below where systems pick ports for clients
    job = environment.get("SLURM_JOB_ID", "")
    default_port = 15000 + int(job) % 15000 if job.isdecimal() else DEFAULT_PORT
    port = _integer(platform.port, environment, default_port, least=1, most=65535)
    given = _find(platform.gpus, environment)
    counted = given is None or given[1] in ("auto", "gpu")  # what torchrun itself would ask for
    gpus = count_gpus() if counted else _integer(platform.gpus, environment, None, most=1024)
    return Cluster(platform.name, nodes, rank, address, port, gpus)


def _find(names: Sequence[str], environment: Mapping[str, str]) -> tuple[str, str] | None:
    """(name, value) of the first of `names` that is set and not empty."""
    return next(((name, environment[name].strip()) for name in names if environment.get(name, "").strip()), None)


def _shown(names: Sequence[str], environment: Mapping[str, str], default: str = "") -> str:
    name, value = _find(names, environment) or (names[0], default)
    return f"{name}={value}"


def _integer(
    names: Sequence[str], environment: Mapping[str, str], default: int | None, least: int = 0, most: int = 10**6
) -> int:
    found = _find(names, environment)
    if found is None:
        if default is None:
            raise UserError(f"{' or '.join(names)} is not set: with several nodes each needs it; set it on every node")
        return default
    name, value = found
    if not re.fullmatch(r"[0-9]+", value) or not least <= int(value) <= most:
        raise UserError(f"{name}={value}: expected a whole number from {least} to {most}; set it to one")
    return int(value)


def _address(platform: Platform, environment: Mapping[str, str]) -> str:
    found = _find(platform.address, environment)
    if found is None:
        raise UserError(f"{platform.address[0]} is not set: set it to the address of node 0, the same on every node")
    hosts: list[str] = pkgutil.resolve_name(platform.hosts)(found[1]) if platform.hosts else found[1].split()
    return hosts[0]  # SkyPilot: one line a node


def torchrun_words(cluster: Cluster, max_restarts: int = 0, own: str | None = None) -> list[str]:
    """What comes before `-m scripts.base_train` on this node; empty where one plain process is enough. own: its address
    for the others, where names do not tell."""
    if cluster.nodes == 1:
        if cluster.processes == 1 and not max_restarts:
            return []
        words = ["--standalone", f"--nproc_per_node={cluster.processes}"]
    else:
        words = [f"--nnodes={cluster.nodes}", f"--nproc_per_node={cluster.processes}"]
        if max_restarts:
            # The static rendezvous cannot form again after a failure; this one can, but numbers the nodes by address.
            # Said outright who serves it, because an address such as that of a Kubernetes service is no name that
            # node 0 would know itself by.
            words += ["--rdzv_backend=c10d", f"--rdzv_endpoint={cluster.address}:{cluster.port}", "--rdzv_id=nanochat"]
            words += [f"--rdzv_conf=is_host={1 if cluster.node_rank == 0 else 0}"]
            # Otherwise the others look for rank 0 under its host name, which in containers often only itself knows
            words += [f"--local_addr={own}"] if own else []
        else:
            words += [f"--node_rank={cluster.node_rank}"]
            words += [f"--master_addr={cluster.address}", f"--master_port={cluster.port}"]
    restarts = [f"--max_restarts={max_restarts}"] if max_restarts else []
    return ["torchrun", *words, f"--signals_to_handle={SIGNALS}", *restarts]


def command_line(
    cluster: Cluster, command: Sequence[str], restarts: int, env: Mapping[str, str], cores: int, own: str | None = None
) -> tuple[dict[str, str], list[str]]:
    """(variables to set, words) that start `command` (`-m module …` or `script.py …`) here; own: see torchrun_words."""
    launcher = torchrun_words(cluster, restarts, own)
    if not launcher:
        return {}, ["python", *command]
    added = {}
    if cluster.processes > 1 and not env.get("OMP_NUM_THREADS"):
        # torchrun would set 1, with a warning; all cores for each process would be too many
        added["OMP_NUM_THREADS"] = str(max(1, min(MAX_THREADS, cores // cluster.processes)))
    if not env.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT"):
        added["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(SHUTDOWN_SECONDS)  # torchrun's 30 s are short for large models
    if restarts:
        # Otherwise torch 2.15 gives a second attempt the first one's store, full of addresses of dead processes: of
        # five restarts two came through
        added["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    # `--`, because torchrun would take --run=NAME for the beginning of a flag of its own (--run-path)
    module = ["-m"] if command[0] == "-m" else []
    return added, [*launcher, *module, "--", *command[len(module) :]]


def shell_line(added: Mapping[str, str], words: Sequence[str]) -> str:
    """The same as one could type it."""
    return " ".join([*(f"{name}={shlex.quote(value)}" for name, value in added.items()), shlex.join(words)])


def start(added: Mapping[str, str], words: Sequence[str]) -> None:
    """Become that command: this process is replaced. Raises UserError when torchrun is not installed."""
    # torchrun takes its defaults from PET_ variables; what its line says is to be all there is. RANK and WORLD_SIZE may
    # count nodes, and a lone process would take them for torchrun's.
    unset = ("PET_", "RANK", "WORLD_SIZE")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(unset)}
    arguments = words[1:]
    if words[0] == "torchrun":
        program = shutil.which(words[0]) or shutil.which(words[0], path=os.path.dirname(sys.executable))
        if program is None:
            raise UserError(f"{words[0]} is not on PATH: activate the environment (source .venv/bin/activate)")
        arguments = ["-m", "nanochat.cluster.agent", "--", program, *arguments]
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *arguments], {**environment, **added})


@dataclass(frozen=True)
class Settings:
    """Start a command (after `--`) on this node of whatever cluster this is, one process a GPU. First word `plan`:
    predict instead what a model and a cluster would need."""

    dry_run: bool = False
    """Print the line instead of running it."""
    max_restarts: Annotated[int, int_flag(gte=0)] = 0
    """Times that torchrun starts all processes again after one of them died."""
    nproc_per_node: Annotated[int | None, int_flag(gte=1)] = None
    """Processes on each node; default: one a GPU, 1 without one."""
    show: Literal["platform", "nodes", "node_rank", "address", "port", "processes"] | None = None
    """Print one fact about this cluster and end."""


def main(settings: Settings, command: Sequence[str]) -> None:
    """Show, print or run. Raises UserError as `detect` and `start` do."""
    processes = settings.nproc_per_node
    cluster = detect(os.environ, visible_gpus if processes is None else lambda: processes)
    if processes is not None:
        cluster = replace(cluster, gpus_per_node=processes)
    if settings.show:
        print(getattr(cluster, settings.show))
        return
    if not command:
        print(f"{cluster.platform}: node {cluster.node_rank} of {cluster.nodes}, {cluster.processes} processes on each")
        print(f"node 0 at {cluster.address}, port {cluster.port}; write a command after `--` to start it")
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cluster.node_rank > 0 and not settings.dry_run:
        reach = pkgutil.resolve_name("nanochat.cluster.nodes:reachable")
        cluster = replace(cluster, address=reach(os.environ, cluster.address, cluster.port))
    alone = cluster.nodes == 1 or not settings.max_restarts
    own = None if alone else pkgutil.resolve_name("nanochat.cluster.nodes:own_address")(cluster.address)
    added, words = command_line(cluster, command, settings.max_restarts, os.environ, cores, own)
    line = shell_line(added, words)
    if settings.dry_run:
        print(line)
        return
    print(f"{cluster.platform}, node {cluster.node_rank} of {cluster.nodes}: {line}", flush=True)
    if os.environ.get("NODES_FOLDER"):
        pkgutil.resolve_name("nanochat.cluster.nodes:announce")(os.environ, sys.argv[1:])
    start(added, words)


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1] in SUBCOMMANDS:
        runpy.run_module(SUBCOMMANDS[sys.argv.pop(1)], run_name="__main__", alter_sys=True)
    else:
        cli.run_with_command(main, Settings)
