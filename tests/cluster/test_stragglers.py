import re
import socket
import time

import torch
import torch.distributed as dist

from nanochat.cluster.stragglers import StragglerReport, slowest
from tests.processes import run_processes

HOSTS = ["host0", "host1", "host2"]


def steps_with_stragglers():
    """Rank 1 waits for data in steps 1-4, rank 2 computes slowly in steps 5-8."""
    rank = dist.get_rank()
    socket.gethostname = lambda: HOSTS[rank]
    stragglers = StragglerReport(torch.device("cpu"), every=4)
    results = []
    for step in range(1, 9):
        begun = time.perf_counter()
        if rank == 1 and step <= 4:
            time.sleep(0.1)
        data = time.perf_counter() - begun
        host = time.perf_counter() - begun
        dist.all_reduce(torch.ones(1))
        with stragglers.forward():
            if rank == 2 and step > 4:
                time.sleep(0.1)
        dist.all_reduce(torch.ones(1))
        stragglers.record(host, data)
        results.append(stragglers.report(step))
    return results


def test_slow_ranks_are_named(capfd):
    results = run_processes(3, steps_with_stragglers, heard=True)
    assert results[0] == results[1] == results[2]
    assert [bool(result) for result in results[0]] == [False, False, False, True] * 2
    waiting, computing = results[0][3], results[0][7]
    assert waiting["Stragglers/data_wait_max_over_median"] > 10 > waiting["Stragglers/forward_max_over_median"]
    assert computing["Stragglers/forward_max_over_median"] > 10 > computing["Stragglers/data_wait_max_over_median"]
    out = capfd.readouterr().out
    named = re.findall(r"slowest: rank (\d) on (\w+), (data wait|host|forward) .*: (\d+) % of the step", out)
    assert [name[:3] for name in named] == [("1", "host1", "data wait"), ("2", "host2", "forward")]
    assert all(50 < int(share) <= 100 for *_, share in named)
    assert out.count("max/median of 3 ranks over 4 steps") == 2


def test_nobody_is_named_who_costs_nothing():
    assert slowest({"data wait": [0.0, 1e-5, 1e-6], "forward": [0.5, 0.51, 0.5]}, 1.0, HOSTS) is None


def test_the_costliest_is_named_with_its_share():
    line = slowest({"data wait": [0.0, 0.05, 0.0], "forward": [0.8, 0.5, 0.5]}, 1.2, HOSTS)
    assert line is not None and line.startswith("slowest: rank 0 on host0, forward 0.8000 s") and "25 %" in line


def test_alone_there_is_nobody_to_compare_with():
    stragglers = StragglerReport(torch.device("cpu"), every=2)
    for step in range(1, 5):
        stragglers.record(0.1, 0.05)
        assert not stragglers.report(step)
