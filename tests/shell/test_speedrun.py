"""The whole tiny chain, as a newcomer runs it. Minutes on two cores, so only with `bash runtests.sh --all`."""

import json
import os
import subprocess
import time

import pytest

from nanochat.ledger import STAGES
from nanochat.paths import REPO

STAGE_LIMIT_SECONDS = 720


@pytest.mark.slow
def test_tiny_from_nothing_to_a_report_and_again(tmp_path):
    environment = {**os.environ, "NANOCHAT_BASE_DIR": str(tmp_path), "PROFILE": "tiny", "RUN_RL": "1"}
    environment.pop("OMP_NUM_THREADS", None)
    started = time.monotonic()
    first = subprocess.run(["bash", "speedrun.sh"], cwd=REPO, env=environment, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr[-2000:]
    assert time.monotonic() - started < STAGE_LIMIT_SECONDS

    def section(stage):
        return json.loads((tmp_path / f"runs/tiny-d4-pydocs/report/{stage}.json").read_text())

    predictors = {
        name: bpb
        for table in section("base_loss")["tables"]
        if "Predictor" in table["columns"]
        for name, bpb in table["rows"]
    }
    model = predictors.pop("this model")
    assert model < 0.9 * min(predictors.values())

    mid, sft = (section(f"chat_eval_{stage}")["metrics"] for stage in ("mid", "sft"))
    for task in ("Arithmetic", "SimpleSpelling", "SpellingBee"):  # guessing is near 0 in all of them
        assert sft[task] > 0.35 and sft[task] > mid[task] + 0.2, (task, mid[task], sft[task])
    practised = section("chat_rl")["metrics"]
    assert practised["final pass@1"] > practised["first pass@1"] + 0.03, practised

    report = (tmp_path / "report/report.md").read_text()
    assert "offline text: pydocs" in report and "CORE-offline" in report
    assert "| Metric | BASE | MID | SFT | RL |" in report and "ChatCORE-offline" in report

    talk = ["bash", "-c", "source .venv/bin/activate && python -m scripts.chat_cli -i rl -t 0 -p 'Who are you?'"]
    answer = subprocess.run(talk, cwd=REPO, env=environment, capture_output=True, text=True)
    assert answer.returncode == 0 and answer.stdout.strip(), answer.stderr

    again = subprocess.run(["bash", "speedrun.sh"], cwd=REPO, env=environment, capture_output=True, text=True)
    assert again.returncode == 0 and again.stdout.count(": done on ") == sum(
        not stage.optional for stage in STAGES.values()
    )
