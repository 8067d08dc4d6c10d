import pytest

import nanochat.train.loop  # noqa: F401 - declares its metrics
from nanochat.train import metrics
from nanochat.train.metrics import metric


def test_names_without_a_known_group_are_refused():
    metrics.check(["Loss/train_loss", "Model/spectral_norm/3.attn.c_q"])
    for name in ("loss", "Losses/train_loss", "Loss/", "/x", "loss/x"):
        with pytest.raises(ValueError, match="expected Group/name"):
            metrics.check([name])
        with pytest.raises(ValueError, match="expected Group/name"):
            metric(name, "a figure")


def test_a_name_has_one_meaning(monkeypatch):
    monkeypatch.setattr(metrics, "_declared", {})
    assert metric("Time/x", "a time", "s") == metric("Time/x", "a time", "s") == "Time/x"
    with pytest.raises(ValueError, match="declared twice"):
        metric("Time/x", "another time", "s")


def test_every_group_that_a_run_fills_has_metrics_declared():
    groups = {name.split("/")[0] for name in metrics.declared()}
    assert {"Time", "Loss", "Optimization", "Model", "Hardware", "Activations"} <= groups <= set(metrics.GROUPS)
    assert all(found.meaning for found in metrics.declared().values())
