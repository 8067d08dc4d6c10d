import os
import signal
import time

import pytest
import torch

from nanochat import common, runtime
from nanochat.errors import UserError
from tests.processes import run_processes


def test_a_lone_process():
    assert runtime.get_dist_info() == (False, 0, 0, 1)
    assert runtime.compute_init("cpu") == (False, 0, 0, 1, torch.device("cpu"))


def test_half_of_torchrun_s_environment_is_a_user_error(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="LOCAL_RANK, WORLD_SIZE"):
        runtime.get_dist_info()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set but RANK, LOCAL_RANK is not: start with torchrun, or unset it"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0 is set but RANK, WORLD_SIZE is not"),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": ""}, "RANK=0, LOCAL_RANK=0 is set but WORLD_SIZE is not"),
        (
            {"RANK": "one", "LOCAL_RANK": "0", "WORLD_SIZE": "2"},
            "RANK=one, LOCAL_RANK=0, WORLD_SIZE=2: no ranks of one",
        ),
        ({"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, "RANK=2, LOCAL_RANK=0, WORLD_SIZE=2: no ranks of one"),
        ({"RANK": "0", "LOCAL_RANK": "-1", "WORLD_SIZE": "2"}, "RANK=0, LOCAL_RANK=-1, WORLD_SIZE=2: no ranks of one"),
    ],
)
def test_half_of_what_torchrun_sets_is_one_line(monkeypatch, environment, message):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, environment.get(name, ""))
    with pytest.raises(UserError, match=f"^{message}"):
        runtime.compute_init("cpu")


@pytest.mark.parametrize("environment", [{}, {"MASTER_ADDR": "127.0.0.1"}, {"MASTER_ADDR": "h", "MASTER_PORT": "x"}])
def test_ranks_without_a_meeting_point_are_one_line(monkeypatch, environment):
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"^the ranks do not meet \(.*\): start with torchrun"):
        runtime.compute_init("cpu")


def test_a_lone_process_may_have_a_world_of_one(monkeypatch):
    for name, value in {"RANK": "", "LOCAL_RANK": "", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    assert runtime.get_dist_info() == (False, 0, 0, 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_device_that_is_not_there():
    with pytest.raises(UserError, match=r"--device-type=cuda: no such device here \(present: "):
        runtime.compute_init("cuda")


def test_compute_dtype_override(monkeypatch):
    assert runtime.compute_dtype(torch.device("cpu")) == torch.float32
    monkeypatch.setenv("NANOCHAT_DTYPE", "bfloat16")
    assert runtime.compute_dtype(torch.device("cpu")) == torch.bfloat16
    monkeypatch.setenv("NANOCHAT_DTYPE", "int8")
    with pytest.raises(UserError, match="NANOCHAT_DTYPE=int8"):
        runtime.compute_dtype(torch.device("cpu"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_are_remembered(number):
    signal.signal(number, signal.SIG_DFL)
    stop = runtime.StopSignal()
    assert not stop.agreed(torch.device("cpu"))
    os.kill(os.getpid(), number)
    assert stop.agreed(torch.device("cpu")) and stop.received == signal.Signals(number).name
    stop.restore()
    assert signal.getsignal(number) is signal.SIG_DFL


def stop_on_rank_one():
    import torch.distributed as dist

    stop = runtime.StopSignal()
    answers = [stop.agreed(torch.device("cpu"))]
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    answers += [stop.agreed(torch.device("cpu")) for _ in range(2)]
    wishing = runtime.StopSignal()
    return answers + [wishing.agreed(torch.device("cpu"), wish=dist.get_rank() == 1) for _ in range(2)]


def test_all_ranks_agree_to_stop_at_the_same_call():
    # one call later than a lone process: nobody waits for the answer
    assert run_processes(2, stop_on_rank_one) == [[False, False, True, False, True]] * 2


def test_printing_is_rank_0_s(monkeypatch, capsys):
    common.print0("a", 1)
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    common.print0("b")
    assert capsys.readouterr().out == "a 1\n"


@pytest.fixture
def stop():
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    installed = runtime.StopSignal()
    yield installed
    installed.restore()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT, signal.SIGTERM])
def test_work_that_may_be_dropped_is_dropped_at_once_and_not_begun_again(stop, number):
    os.kill(os.getpid(), signal.SIGHUP)
    assert stop.received is None  # what is ignored stays ignored
    with runtime.interruptible():
        runtime.heartbeat()
    with pytest.raises(runtime.Stopped), runtime.interruptible():
        os.kill(os.getpid(), number)
        time.sleep(30)
    runtime.heartbeat()  # elsewhere it is only remembered
    assert stop.received == signal.Signals(number).name
    with pytest.raises(runtime.Stopped), runtime.interruptible():
        raise AssertionError("begun again")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_within_a_finalizer_is_found_at_the_next_heartbeat(stop):
    class Finalized:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0)

    with pytest.raises(runtime.Stopped), runtime.interruptible():
        Finalized()
        runtime.heartbeat()


def test_a_second_ctrl_c_ends_at_once_and_other_signals_do_not(stop):
    for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):  # as they come by several ways
        os.kill(os.getpid(), number)
    stop._at -= 2
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(30)


def stopped_in_an_evaluation():
    import torch.distributed as dist

    from nanochat.eval.bpb import measure_bpb
    from nanochat.eval.scores import gather_records

    installed = runtime.StopSignal()
    ones = torch.ones(2, 3, dtype=torch.long)

    def model(x, y, loss_reduction):
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return torch.ones(2, 3)

    outcomes = []
    for measure in (
        lambda: measure_bpb(model, [(ones, ones)], ones[0]),
        lambda: gather_records(lambda: {dist.get_rank(): {"passed": True}}),
    ):
        try:
            measure()
            outcomes.append("measured")
        except runtime.Stopped:
            outcomes.append("stopped")
    installed.restore()
    return [*outcomes, installed.received]


def test_where_a_signal_stops_one_rank_in_an_evaluation_all_leave_it_together():
    left = ["stopped", "stopped"]
    assert run_processes(2, stopped_in_an_evaluation) == [[*left, None], [*left, "SIGTERM"]]
