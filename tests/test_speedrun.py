"""The whole tiny chain, as a newcomer runs it. Minutes on two cores, so only with `bash runtests.sh --all`."""

import json
import os
import subprocess
import time

import pytest

from nanochat.ledger import REPO


@pytest.mark.slow
def test_tiny_from_nothing_to_a_report_and_again(tmp_path):
    environment = {**os.environ, "NANOCHAT_BASE_DIR": str(tmp_path), "PROFILE": "tiny"}
    environment.pop("OMP_NUM_THREADS", None)
    started = time.monotonic()
    first = subprocess.run(["bash", "speedrun.sh"], cwd=REPO, env=environment, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr[-2000:]
    assert time.monotonic() - started < 360

    loss = json.loads((tmp_path / "runs/tiny-d4-pydocs/report/base_loss.json").read_text())
    predictors = {
        name: bpb for table in loss["tables"] if "Predictor" in table["columns"] for name, bpb in table["rows"]
    }
    model = predictors.pop("this model")
    assert model < 0.9 * min(predictors.values())
    report = (tmp_path / "report/report.md").read_text()
    assert "offline text: pydocs" in report and "CORE-offline" in report

    again = subprocess.run(["bash", "speedrun.sh"], cwd=REPO, env=environment, capture_output=True, text=True)
    assert again.returncode == 0 and again.stdout.count(": done on ") == 7
