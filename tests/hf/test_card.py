"""The model card of an export."""

import re
import time

import pytest
import yaml

from nanochat.hf.card import model_card
from nanochat.report import EMPTY
from tests.hf.conftest import meta_of


def section(stage: str, **more):
    return {**EMPTY, "synthetic": False, "stage": stage, "title": stage, "time": time.time(), **more}


def report(about):
    table = {
        "title": "Tasks",
        "columns": ["Task", "Items", "Accuracy"],
        "rows": [["GSM8K", 1319, 0.25], ["<b>|x", 1, 0]],
    }
    shown = {**about["settings"], **about["recipe"]}
    return {
        "run": "r1",
        "hardware": {"gpus": [{"name": "H100"}] * 8, "processor": "x"},
        "stage_seconds": 7200.0,
        "summary": {"columns": ["Metric", "SFT"], "rows": [["GSM8K", "0.2500 ± 0.0119"]]},
        "sections": [
            section("chat_sft", settings=shown, notes=["A note."]),
            section("chat_eval_sft", tables=[table], synthetic=True),
            section("chat_eval_rl", tables=[{**table, "title": "Other"}]),
        ],
    }


def test_the_card_says_what_the_report_says(make_model, tokenizer):
    model = make_model("speedrun")
    about = meta_of(model, tokenizer, tag="d4_x")
    card = model_card(model, about, report(about))
    front = yaml.safe_load(card.split("---")[1])
    assert front == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["nanochat"]}
    for text in (
        "# d4_x, sft",
        f"{model.num_params():,} parameters",
        "2 h 0 min in stages on 8 × H100",
        "| GSM8K | 0.2500 ± 0.0119 |",
        "| GSM8K | 1,319 | 0.2500 |",
        "&lt;b&gt;\\|x",
        "synthetic data in chat_eval_sft",
        "A note.",
        "trust_remote_code=True",
    ):
        assert text in card, text
    assert "Other" not in card


def test_the_report_of_another_model_is_not_shown(make_model, tokenizer):
    model = make_model("nanochat")
    about = meta_of(model, tokenizer)
    other = report({**about, "settings": {"depth": 99}})
    for found in (other, {}):
        card = model_card(model, about, found)
        assert "No report of the run that trained it was at hand." in card and "GSM8K" not in card
    assert "from_pretrained(folder)\n" in card and "remote" not in card


@pytest.mark.parametrize("name", ["nanochat", "everything"])
def test_the_example_of_the_card_runs(name, exports, transformers, monkeypatch, capsys):
    """As it stands there, and without being asked whether the folder's code may run."""
    _, folder = exports(name)
    monkeypatch.chdir(folder)
    exec(re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1], {})
    assert "<|assistant_start|>" in capsys.readouterr().out
