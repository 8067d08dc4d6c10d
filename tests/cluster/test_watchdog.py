import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from nanochat.cluster import watchdog
from nanochat.cluster.watchdog import RankStatus, diagnosis
from tests.processes import Apart, free_port, run_processes

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 2.0
ENOUGH = 90  # seconds for processes to start on a busy machine, and far below the 30 minutes they would hang


def start(world: int, scenario: Callable[[], None]) -> list[Apart]:
    port = free_port()
    return [Apart(rank, world, port, scenario) for rank in range(world)]


def read_the_shard():
    time.sleep(1000)


def loop(trouble, rank: int = 1, limit: float = LIMIT) -> None:
    """Steps with one collective each; in step 3 `rank` gets into `trouble` while it loads data."""
    dist.init_process_group("gloo")
    dog = watchdog.Watchdog(first=30, limit=limit)
    for step in range(10):
        dog.mark(step, "data")
        if step == 3 and dist.get_rank() == rank:
            trouble()
        dog.mark(step, "update")
        dist.all_reduce(torch.ones(1))
    dog.close()


def hang_once():
    """Rank 1 hangs in the first attempt of torchrun; the second one goes through."""
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    loop(read_the_shard if first else lambda: time.sleep(0.5))  # time enough to notice an alarm of old
    print(f"rank {dist.get_rank()} came through")
    dist.destroy_process_group()


@pytest.mark.slow
def test_torchrun_restarts_after_a_rank_was_stuck():
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1", "--standalone"]
    program = "from tests.cluster import test_watchdog; test_watchdog.hang_once()"
    command += ["--no-python", sys.executable, "-c", program]
    # Without this torchrun lets the store of the first attempt serve the second, where gloo then finds old addresses.
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=ENOUGH
    )
    assert sorted(re.findall(r"rank \d came through", done.stdout)) == ["rank 0 came through", "rank 1 came through"]
    assert done.stderr.count("is behind the others") >= 1


def stop_process():
    os.kill(os.getpid(), signal.SIGSTOP)


def hang_on_rank_1():
    loop(read_the_shard)


def stop_rank_1():
    loop(stop_process)


def stop_rank_0():
    loop(stop_process, rank=0, limit=1.0)


def test_a_hanging_rank_is_named_with_its_stack_and_all_end():
    codes, errors = zip(*(rank.end(ENOUGH) for rank in start(3, hang_on_rank_1)), strict=True)
    assert codes == (1, 1, 1)
    line, stack = re.search(r"(rank \d on \S+ is behind the others.*)\n((?s:.*))", errors[0]).groups()
    assert line.startswith("rank 1 on ") and ": in step 3, phase data for " in line
    assert "in read_the_shard" in stack
    assert "in step 3, phase update: rank 0, 2" in stack
    assert "in read_the_shard" in errors[1]  # its own log has it too


def test_a_stopped_rank_is_named_as_giving_no_answer():
    ranks = start(2, stop_rank_1)
    try:
        code, error = ranks[0].end(ENOUGH)
        assert code == 1
        stopped = rf"rank 1 on \S+ gives no answer .*process {ranks[1].process.pid}\); last heard of in "
        assert re.search(stopped, error)
        assert "is behind the others" not in error
    finally:
        ranks[1].process.kill()


def test_a_rank_ends_though_the_store_stopped_with_rank_0():
    ranks = start(2, stop_rank_0)
    try:
        code, error = ranks[1].end(ENOUGH)
        assert code == 1
        assert "in all_reduce" in error
    finally:
        ranks[0].process.kill()


def alone():
    """Long first step and evaluation are let pass; then a hang."""
    dog = watchdog.Watchdog(first=30, limit=0.3)
    dog.mark(7, "forward")  # as after a resume
    time.sleep(1)
    dog.mark(8, "data")
    dog.mark(8, "evaluate")
    time.sleep(1)
    print("came this far", file=sys.stderr)
    dog.mark(8, "data")
    read_the_shard()


def test_a_lone_process_ends_with_its_stack_but_long_phases_may_take_long():
    code, error = start(1, alone)[0].end(ENOUGH)
    assert code == 1
    before, after = error.split("came this far")
    assert "watchdog" not in before
    assert "in step 8, phase data" in after and "in read_the_shard" in after


def slow_but_sure():
    """Rank 0 waits for rank 1 for longer than the limit, while rank 1 works and says so; then it saves for as long."""
    before = threading.active_count()
    dog = watchdog.Watchdog(first=30, limit=LIMIT)
    slow = dist.get_rank() == 1
    for step in range(3):
        for _ in range(5):
            dog.mark(step, "forward")
            time.sleep(0.3 * LIMIT if slow and step == 1 else 0.01)
        if slow and step == 2:
            dog.mark(step, "save")
            time.sleep(1.5 * LIMIT)
        dist.all_reduce(torch.ones(1))
    begun = time.perf_counter()
    dog.close()
    return time.perf_counter() - begun, dog.thread.is_alive(), threading.active_count() - before


def test_no_alarm_while_some_rank_works_and_close_leaves_no_thread():
    for seconds, alive, further in run_processes(2, slow_but_sure):
        assert seconds < 1 and not alive and further == 0


def miss_a_collective():
    dist.init_process_group("gloo")
    dist.new_group()
    watchdog.lower_timeout(1.0)
    begun = time.perf_counter()
    store = dist.distributed_c10d._get_default_store()
    if dist.get_rank() == 0:
        try:
            dist.all_reduce(torch.ones(1))
        except RuntimeError:
            print(f"failed after {time.perf_counter() - begun:.1f} s", file=sys.stderr)
        store.set("failed", "1")
    else:
        store.wait(["failed"])
    os._exit(0)


def test_collectives_fail_after_the_lowered_timeout():
    errors = [rank.end(ENOUGH)[1] for rank in start(2, miss_a_collective)]
    assert 0.9 < float(re.search(r"failed after (\S+) s", errors[0]).group(1)) < 30


def test_lower_timeout_alone_has_nothing_to_do():
    watchdog.lower_timeout(1.0)


def status(rank: int, step: int, number: int, stack: str = "here") -> RankStatus:
    phase = ("data", "forward", "update")[number]
    return RankStatus(rank, f"host{rank}", 100 + rank, step, phase, number, seconds=9.0, stack=stack)


@pytest.mark.parametrize(
    ("everyone", "named"),
    [
        ([status(0, 5, 1), status(1, 5, 0), status(2, 5, 2)], [1]),  # by phase
        ([status(0, 5, 0), status(1, 4, 2), status(2, 5, 2)], [1]),  # by step first
        ([status(0, 5, 2), status(1, 5, 0), status(2, 5, 0)], [1, 2]),
        ([status(0, 5, 2), status(1, 5, 2), status(2, 5, 2, stack="")], [2]),  # the silent one
        ([status(0, 5, 2), status(1, 5, 2)], []),
    ],
)
def test_the_diagnosis_names_who_is_behind_or_silent(everyone, named):
    text = diagnosis(everyone)
    found = re.findall(r"rank (\d) on host\d (?:is behind|gives no answer)", text)
    assert [int(rank) for rank in found] == named
    assert ("all ranks are at the same place" in text) == (not named)


def test_a_diagnosis_over_a_thousand_ranks_stays_short():
    text = diagnosis([status(rank, 5, 2 if rank >= 8 else 0, stack="a stack") for rank in range(1024)])
    assert text.count("a stack") == watchdog.NAMED and len(text.splitlines()) < 20
    assert "rank 8, 9, 10, 11, 12, 13, 14, 15 and 1008 more" in text
    text = diagnosis([status(rank, 5, 2, stack="") for rank in range(1024)])
    assert text.count("gives no answer") == watchdog.NAMED and "and 1016 more ranks" in text
