import functools
import socket
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from nanochat import cli
from nanochat.cluster import preflight
from nanochat.cluster.preflight import ALL_REDUCE, DISK, MATMUL, MEMORY, Measurement, table, warnings
from nanochat.errors import UserError
from tests.processes import run_processes

CPU = torch.device("cpu")
NAMES = {"matmul_tflops": MATMUL, "disk_mbytes": DISK, "free_gib": MEMORY}


def sane(rank: int, **changes) -> Measurement:
    clock = {name: changes.pop(name, usual) for name, usual in (("clock_seconds", 0.0), ("clock_accuracy", 0.01))}
    values = {MATMUL: 700.0, ALL_REDUCE: 300.0, MEMORY: 70.0} | {NAMES[name]: value for name, value in changes.items()}
    return Measurement(rank, f"host{rank // 2}", values, **clock)


def measured_with_one_bad_rank(folder: str, bad: int):
    """Rank `bad` multiplies a hundred times slower than it does, and its clock is five seconds ahead."""
    rank = dist.get_rank()
    socket.gethostname = lambda: f"host{rank}"
    if rank == bad:
        tflops = preflight.matmul_tflops
        preflight.matmul_tflops = lambda device: tflops(device) / 100
        preflight.clock_offset = functools.partial(preflight.clock_offset, clock=lambda: time.time() + 5)
    return preflight.check(CPU, Path(folder) / "new")


@pytest.mark.parametrize("bad", [0, 2])
def test_a_slow_rank_and_a_clock_that_is_off_are_named(tmp_path, capfd, bad):
    results = run_processes(3, measured_with_one_bad_rank, str(tmp_path), bad, heard=True)
    assert results[0] == results[1] == results[2]
    assert [m.host for m in results[0]] == ["host0", "host1", "host2"]
    assert all(min(m.values[name] for name in (MATMUL, ALL_REDUCE, DISK)) > 0 for m in results[0])
    for m in results[0]:  # all run on this machine, so the true offset is known
        true = {0: 0.0, 2: 5.0}[bad] * (m.rank == 2) - {0: 5.0, 2: 0.0}[bad] * (m.rank != 0)
        assert abs(m.clock_seconds - true) <= m.clock_accuracy + 1e-6
    out = capfd.readouterr().out
    assert "preflight: 3 rank(s) on 3 host(s)" in out
    lines = [line for line in out.splitlines() if "matmul" in line and line.startswith("warning: ")]
    assert any(line.startswith(f"warning: rank {bad} on host{bad}: matmul") for line in lines)
    lines = [line for line in out.splitlines() if "clock is" in line]
    assert len(lines) == 1 and lines[0].startswith(f"warning: rank {bad} on host{bad}: its clock is +5.0")
    assert not list((tmp_path / "new").iterdir())


def unwritable_on_host_1(folder: str):
    rank = dist.get_rank()
    socket.gethostname = lambda: f"host{rank}"
    try:
        preflight.check(CPU, Path(folder) / ("file" if rank == 1 else "fine"))
    except UserError as error:
        return str(error)
    return None


def test_a_disk_that_cannot_be_written_is_a_user_error_on_all_ranks(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    for message in run_processes(2, unwritable_on_host_1, str(tmp_path)):
        assert message is not None and message.startswith("rank 1 on host1 cannot write to ")


def test_healthy_ranks_are_not_warned_about():
    assert warnings([sane(0), sane(1, matmul_tflops=650.0), sane(2, clock_seconds=0.9), sane(3, free_gib=60.0)]) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"matmul_tflops": 500.0}, "matmul, TFLOP/s 500.00, 71 % of the median 700.00"),
        ({"free_gib": 30.0}, "free memory"),
        ({"clock_seconds": -1.5}, "its clock is -1.50 s"),
    ],
)
def test_what_is_off_is_named(changes, words):
    lines = warnings([sane(0), sane(1), sane(2), sane(3, **changes)])
    assert len(lines) == 1 and lines[0].startswith("rank 3 on host1: ") and words in lines[0]


def test_a_clock_is_not_blamed_beyond_what_is_known():
    assert warnings([sane(0), sane(1), sane(2, clock_seconds=2.0, clock_accuracy=1.5)]) == []


def test_slow_disks_are_compared_among_those_that_wrote():
    disks = [sane(0, disk_mbytes=900.0), sane(1), sane(2, disk_mbytes=800.0), sane(3), sane(4, disk_mbytes=90.0)]
    (line,) = warnings(disks)
    assert line.startswith("rank 4 on host2: disk write, MB/s 90.00")
    assert "rank 4 on host2" in next(line for line in table(disks).splitlines() if "disk" in line)


def test_the_command_runs_alone(store, capsys):
    preflight.main(cli.parse(preflight.Settings, ["--device-type=cpu"]))
    out = capsys.readouterr().out
    assert "preflight: 1 rank(s) on 1 host(s)" in out and "matmul" in out
    assert "warning" not in out and "all-reduce" not in out
