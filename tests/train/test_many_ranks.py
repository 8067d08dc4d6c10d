"""Training from the outside on several ranks (gloo, on the CPU): however the model is spread, a run ends where one
process ends; stopped, killed or broken, it goes on from its last checkpoint on any number of ranks."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TextIO

import psutil
import pytest
import torch
from safetensors.torch import load_file

from nanochat import checkpoint, cli
from nanochat.paths import checkpoint_dir, get_base_dir, tokenizer_dir
from nanochat.runtime import compute_cleanup
from nanochat.tokenizer import RustBPETokenizer
from scripts import base_train
from tests.data.test_text_rows import write_source
from tests.processes import free_port, run_processes
from tests.scripts.test_base_train import SMALL, words

STEPS = 100
LIMIT = 240  # seconds until a job counts as hung; the longest takes 40 on two cores
RUN = {**SMALL, "depth": 2, "num_iterations": STEPS, "eval_every": STEPS // 2, "sample_every": STEPS, "save_every": 20}
ROUNDING = 1e-5  # relative. Measured in 200 steps on 2 ranks: losses 1.4e-7, norms 3.4e-6, weights 7e-6
NOT_INHERITED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")

# ----------------------------------------------------------------------------------------------------------------------
# Jobs


class Job:
    """A pretraining run under nanochat.launch: one agent a node, whose output comes together line by line."""

    def __init__(self, tag: str, agents: list[subprocess.Popen[bytes]], output: TextIO) -> None:
        self.tag, self.agents, self.output = tag, agents, output
        self.text = ""

    def wait_for(self, words_: str) -> None:
        """Read on until a line contains these words."""
        for line in self.output:
            self.text += line
            if words_ in line:
                return
        pytest.fail(f"{self.tag} ended without saying {words_!r}:\n{self.text}")

    def end(self) -> list[int]:
        """Read to the end. Returns the exit codes of the agents."""
        self.text += self.output.read()
        return [agent.wait() for agent in self.agents]

    def members(self) -> list[psutil.Process]:
        """Its processes, older ones first. Known by their environment: torchrun puts workers into sessions of their
        own, so that no process group holds them all."""
        ours = {"NANOCHAT_RUN_ID": self.tag, "NANOCHAT_BASE_DIR": str(get_base_dir())}
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                environment = process.environ()
                if all(environment.get(name) == value for name, value in ours.items()):
                    found.append(process)
        return sorted(found, key=lambda process: process.pid)

    def worker(self, rank: int) -> psutil.Process:
        """The process of this rank."""
        (found,) = (process for process in self.members() if process.environ().get("RANK") == str(rank))
        return found

    def kill(self) -> None:
        """End all of it, as a power cut does."""
        while found := self.members():  # until the last is gone, those included that were just being started
            for process in found:
                with suppress(psutil.Error):
                    process.kill()
            time.sleep(0.05)


@contextmanager
def job(tag: str, *flags: str, ranks: int = 1, launcher: Sequence[str] = (), nodes: Sequence[list[str]] = ([],)):
    """Start a run on each of `nodes` (words before the program: `env NAME=VALUE`, for one); nothing of it is left."""
    given = {flag.partition("=")[0].replace("_", "-") for flag in flags}
    usual = [f"--{name.replace('_', '-')}={value}" for name, value in {**RUN, "model_tag": tag}.items()]
    asked = [*(word for word in usual if word.partition("=")[0] not in given), *flags]
    launch = ["-m", "nanochat.launch", f"--nproc-per-node={ranks}", *launcher, "--", "-m", "scripts.base_train", *asked]
    environment = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
    environment.update(NANOCHAT_RUN_ID=tag, OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1")
    reading, writing = os.pipe()
    started = Job(tag, [], os.fdopen(reading))
    timer = threading.Timer(LIMIT, started.kill)
    timer.start()
    try:
        try:
            for node in nodes:
                words_ = [*node, sys.executable, *launch]
                agent = subprocess.Popen(words_, env=environment, stdout=writing, stderr=subprocess.STDOUT)
                started.agents.append(agent)
        finally:
            os.close(writing)
        yield started
    finally:
        timer.cancel()
        started.kill()
        started.end()
        started.output.close()


def finish(tag: str, *flags: str, **how) -> str:
    """Run a job that is to succeed. Returns its output."""
    with job(tag, *flags, **how) as started:
        codes = started.end()
        assert not any(codes), started.text
        return started.text


def folder(tag: str) -> Path:
    return checkpoint_dir("base", tag)


def metrics(tag: str, name: str) -> dict[int, float]:
    """Step -> value; no step may have two."""
    lines = (get_base_dir() / "runs" / tag / "metrics.jsonl").read_text().splitlines()
    found = [(record["step"], record[name]) for record in map(json.loads, lines) if name in record]
    assert len(found) == len(dict(found)), f"{tag}: {name} is there twice"
    return dict(found)


def report(tag: str) -> dict:
    return json.loads((get_base_dir() / "runs" / tag / "report" / "base_train.json").read_text())


def weights(tag: str) -> dict[str, torch.Tensor]:
    return load_file(checkpoint.step_dir(folder(tag), STEPS) / "model.safetensors")


def assert_same_run(tag: str, other: str) -> None:
    """Every step is there once, and all that was measured, and the final weights, are the other run's but for rounding.

    The norms are asked for because Muon and AdamW alone would hide gradients that are too large or too small.
    """
    every, evaluated = range(1, STEPS + 1), (STEPS // 2, STEPS)
    for name, steps, near in (
        ("Loss/train_loss", every, ROUNDING),
        ("Optimization/grad_norm", every, 10 * ROUNDING),
        ("Loss/val_bpb", evaluated, ROUNDING),
    ):
        values = metrics(tag, name)
        assert sorted(values) == list(steps), name
        assert values == pytest.approx(metrics(other, name), rel=near), name
    theirs = weights(other)
    for name, tensor in weights(tag).items():
        assert (tensor - theirs[name]).norm() < 10 * ROUNDING * theirs[name].norm(), name


def assert_same_bits(tag: str, other: str) -> None:
    for name in ("Loss/train_loss", "Loss/val_bpb", "Optimization/grad_norm"):
        assert metrics(tag, name) == metrics(other, name)
    theirs = weights(other)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in weights(tag).items())


# ----------------------------------------------------------------------------------------------------------------------
# What they are compared with


@pytest.fixture(scope="module", autouse=True)
def store(tmp_path_factory) -> Iterator[None]:
    """An artifact store with a small data set and tokenizer for the whole module; each run has a tag of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(tmp_path_factory.mktemp("many_ranks")))
        documents = [words(seed) for seed in range(24)]
        write_source([documents[:10], documents[10:20], documents[20:]])
        RustBPETokenizer.train_from_iterator(documents, 300).save(tokenizer_dir())
        yield


def undisturbed(tag: str, **changes: str | bool) -> None:
    """A whole run in this process, or in the process group that this one is in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_RUN_ID", tag)
        patch.setattr(base_train, "compute_cleanup", lambda: None)  # the process group is the test's
        base_train.main(base_train.Settings(**{**RUN, "model_tag": tag, **changes}))


@pytest.fixture(scope="module")
def one(store) -> str:
    """One process that nothing disturbed."""
    undisturbed("one")
    compute_cleanup()
    return "one"


@pytest.fixture(scope="module")
def two(store) -> str:
    """Two ranks under fsdp that nothing disturbed."""
    run_processes(2, partial(undisturbed, "two", parallel="fsdp"))
    return "two"


# Gives a process another host name, in a namespace of its own, and becomes the program after it.
ON_HOST = "import os, socket, sys; socket.sethostname(sys.argv[1]); os.execv(sys.argv[2], sys.argv[2:])"


@pytest.fixture
def hosts() -> Iterator[list[list[str]]]:
    """For each of two nodes the words that start a program there: one machine, but another network address and host
    name each, with nothing but a virtual cable between them."""
    names = [f"nanochat-{os.getpid()}-{number}" for number in (0, 1)]
    lines = [f"netns add {name}" for name in names]
    lines += [f"-n {names[0]} link add cable type veth peer name cable netns {names[1]}"]
    for number, name in enumerate(names):
        lines += [f"-n {name} address add 10.77.0.{number + 1}/24 dev cable"]
        lines += [f"-n {name} link set {device} up" for device in ("lo", "cable")]
    port = free_port()
    try:
        try:
            for line in [*(f"ip {line}" for line in lines), "unshare --uts true"]:
                subprocess.run(line.split(), check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = getattr(error, "stderr", None) or str(error)
            pytest.skip(f"network namespaces cannot be made here (needs root and iproute2): {reason.strip()}")
        variables = f"NNODES=2 MASTER_ADDR=10.77.0.1 MASTER_PORT={port} GLOO_SOCKET_IFNAME=cable"
        starts = [f"ip netns exec {name} env NODE_RANK={number} {variables}" for number, name in enumerate(names)]
        renames = [["unshare", "--uts", sys.executable, "-c", ON_HOST, f"host{number}"] for number in (0, 1)]
        yield [[*start.split(), *rename] for start, rename in zip(starts, renames, strict=True)]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)  # the cable goes with it


# ----------------------------------------------------------------------------------------------------------------------
# Tests


def test_fsdp_ends_where_one_process_ends(one, two):
    assert_same_run(two, one)
    meta = checkpoint.read_meta(folder(two), STEPS)
    assert meta["world_size"] == len(meta["rng"]) == 2
    assert meta["loader"] == checkpoint.read_meta(folder(one), STEPS)["loader"]
    greedy, expected = ([s for s in report(tag)["samples"] if s["prompt"]] for tag in (two, one))
    assert greedy == expected and len(greedy) == 7


def test_flags_that_contradict_each_other(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["base_train", "--use-fsdp", "--parallel=ddp", "--device-type=cpu"])
    with pytest.raises(SystemExit) as end:
        cli.run(base_train.main, base_train.Settings)
    assert end.value.code == 1
    error = "error: --use-fsdp and --parallel=ddp contradict each other: give one of them\n"
    assert capsys.readouterr().err == error


def test_stopped_by_a_signal_to_one_rank_the_rest_is_bit_for_bit(two, capfd):
    with job("stopped", "--parallel=fsdp", "--resume=auto", ranks=2) as started:
        started.wait_for("step 00003/")
        started.worker(1).send_signal(signal.SIGTERM)
        assert started.end() == [0], started.text
    assert "stopped by another rank at step" in started.text
    stopped_at = checkpoint.committed_steps(folder("stopped"))[-1]
    assert 3 <= stopped_at < STEPS
    run_processes(2, partial(undisturbed, "stopped", use_fsdp=True, resume="auto"), heard=True)
    text = capfd.readouterr().out
    assert f"resumed from step {stopped_at} in" in text and "parallel: fsdp" in text
    assert_same_bits("stopped", two)


@pytest.mark.slow
def test_killed_resumed_and_resharded_4_2_1_4(one):
    words_ = f"env NNODES=2 MASTER_ADDR=127.0.0.1 MASTER_PORT={free_port()}".split()
    nodes = [[*words_, f"NODE_RANK={number}"] for number in (0, 1)]
    with job("moving", "--parallel=hsdp", "--resume=auto", ranks=2, nodes=nodes) as started:
        started.wait_for("step_000020")
        started.kill()
        started.end()
    assert "saved" in started.text and "parallel: hsdp" in started.text
    begun_at = [checkpoint.committed_steps(folder("moving"))[-1]]
    with job("moving", "--parallel=fsdp", "--resume=auto", ranks=2) as started:
        started.wait_for(f"step {begun_at[-1] + 3:05d}/")
        started.agents[0].send_signal(signal.SIGTERM)
        started.end()  # torchrun hands the signal on
    assert f"resumed from step {begun_at[-1]} in" in started.text and "stopped by SIGTERM" in started.text
    begun_at.append(checkpoint.committed_steps(folder("moving"))[-1])
    with job("moving", "--device-batch-size=1", "--resume=auto") as started:
        started.wait_for(f"step {begun_at[-1] + 3:05d}/")
        started.agents[0].send_signal(signal.SIGTERM)
        assert started.end() == [0], started.text
    assert f"resumed from step {begun_at[-1]} in" in started.text
    begun_at.append(checkpoint.committed_steps(folder("moving"))[-1])
    text = finish("moving", "--parallel=ddp", "--resume=auto", ranks=4)
    assert f"resumed from step {begun_at[-1]} in" in text and "parallel: ddp" in text
    assert 20 <= begun_at[0] < begun_at[1] < begun_at[2] < STEPS
    assert_same_run("moving", one)


@pytest.mark.slow
def test_a_killed_worker_is_started_again(two):
    with job("elastic", "--parallel=fsdp", ranks=2, launcher=["--max-restarts=1"]) as started:
        started.wait_for("step_000020")
        started.worker(1).kill()
        assert started.end() == [0], started.text
    assert started.text.count("resumed from step") == 1
    assert_same_bits("elastic", two)


@pytest.mark.slow
def test_three_ranks_that_the_batch_does_not_fit(one):
    text = finish("three", "--parallel=fsdp", ranks=3)
    assert "device batch of 3 instead of 4" in text and "% of the positions are filler" in text
    assert_same_run("three", one)


@pytest.mark.slow
def test_two_nodes(one, hosts):
    text = finish("nodes", ranks=2, nodes=hosts)
    assert "parallel: hsdp (2 nodes: " in text
    assert "preflight: 4 rank(s) on 2 host(s)" in text
    assert_same_run("nodes", one)


@pytest.mark.slow
def test_a_worker_killed_on_the_second_of_two_nodes(one, hosts):
    with job("nodes-elastic", launcher=["--max-restarts=1"], nodes=hosts) as started:
        started.wait_for("step_000020")
        started.worker(1).kill()
        assert started.end() == [0, 0], started.text
    assert started.text.count("resumed from step") == 1
    assert_same_run("nodes-elastic", one)
