"""events.py: what is handed to TensorBoard; and, where that is installed, what it reads."""

import sys
import types

import pytest

from nanochat.errors import UserError
from nanochat.report.events import export
from tests.report.runs import write_run


@pytest.fixture
def written(monkeypatch):
    """(tag, value, step, seconds since the stage began) in order, by a stand-in of the package."""
    found = []

    class SummaryWriter:
        def __init__(self, folder):
            self.folder = folder

        def add_scalar(self, tag, value, step, walltime):
            found.append((self.folder.rsplit("/", 1)[1], tag, value, step, walltime))

        def add_text(self, tag, text):
            found.append((tag, text))

        def close(self):
            pass

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    return found


def test_every_metric_is_a_scalar_over_steps_and_time(store, monkeypatch, written):
    folder = write_run("a", monkeypatch, steps=10)
    assert export(folder) == folder / "tensorboard"
    assert written.pop() == ("settings", "|setting|value|\n|---|---|\n|depth|4|\n|model_tag|a|")
    losses = [row for row in written if row[1] == "Loss/train_loss"]
    assert [row[3] for row in losses] == list(range(1, 11)) and {row[0] for row in losses} == {"base"}
    assert losses[-1][4] - losses[0][4] == pytest.approx(18.0)  # 2 s a step
    assert len([row for row in written if row[1] == "Loss/val_bpb"]) == 2
    assert not {row[1] for row in written} & {"stage", "step", "tokens"}


def test_without_the_package_or_metrics_it_is_one_line(store, monkeypatch, written):
    folder = write_run("a", monkeypatch, steps=10)
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="has no records"):
        export(folder)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="uv pip install tensorboard=="):
        export(folder)


def test_tensorboard_reads_it(store, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = export(write_run("a", monkeypatch, steps=10))
    export(folder.parent)  # once more: written anew
    (events,) = (folder / "base").iterdir()
    found = accumulator.EventAccumulator(str(events))
    found.Reload()
    assert [event.step for event in found.Scalars("Loss/train_loss")] == list(range(1, 11))
