"""Run a function in several gloo processes, for tests of what is distributed."""

import multiprocessing
import os
import socket
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _child(
    rank: int,
    world_size: int,
    port: int,
    environment: dict[str, str],
    function: Callable[..., Any],
    args: tuple[Any, ...],
    results,
    heard: str | None,
) -> None:
    if heard is not None:
        output = os.open(heard, os.O_WRONLY | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
    os.environ.clear()  # it is that of the server, which may be older than the test
    os.environ.update(environment)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        results[rank] = function(*args)
        dist.barrier()
    finally:
        dist.destroy_process_group()


# The processes of a test are forked from one server that has imported what takes seconds, instead of each importing it:
# 2.6 s of CPU for each rank, half of it for what sharding and optimizers import when they are first used.
multiprocessing.set_forkserver_preload(
    [
        *("hypothesis", "pytest", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint"),
        *("nanochat.engine", "nanochat.gpt", "nanochat.parallel", "nanochat.saver"),
    ]
)


def _apart(
    rank: int, world: int, port: int, environment: dict[str, str], function: Callable[[], Any], errors: str
) -> None:
    os.dup2(os.open(errors, os.O_WRONLY), 2)
    os.environ.clear()
    os.environ.update(environment)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    function()


class Apart:
    """A process of a test that may end as it likes: nothing waits for it, no process group is made."""

    def __init__(self, rank: int, world: int, port: int, function: Callable[[], Any]) -> None:
        self.errors = tempfile.NamedTemporaryFile(mode="r")  # noqa: SIM115 (it lives as long as this)
        about = (rank, world, port, dict(os.environ), function, self.errors.name)
        self.process = multiprocessing.get_context("forkserver").Process(target=_apart, args=about)
        self.process.start()

    def end(self, seconds: float) -> tuple[int | None, str]:
        """(exit code, what it said on stderr) once it has ended; None: it has not within so many seconds."""
        self.process.join(seconds)
        return self.process.exitcode, self.errors.read()


def run_processes(world_size: int, function: Callable[..., Any], *args: Any, heard: bool = False) -> list[Any]:
    """Results of `function(*args)` (a module-level function; plain Python or numpy results) by rank.

    heard: what they print reaches capfd, by a file: the server is older than the test and has another stdout.
    """
    context = mp.get_context("forkserver")
    with context.Manager() as manager, tempfile.NamedTemporaryFile() as output:
        results = manager.dict()
        about = (world_size, free_port(), dict(os.environ), function, args, results, output.name if heard else None)
        try:
            mp.start_processes(_child, about, nprocs=world_size, join=True, start_method="forkserver")
        finally:
            os.write(1, output.read())
        return [results[rank] for rank in range(world_size)]
