"""The model card of an export: report/model_card.md.j2, filled from the checkpoint and the report of its run."""

from collections.abc import Mapping
from typing import Any

from nanochat.gpt import GPT
from nanochat.hf.names import is_classic
from nanochat.report import data_label, escape, templates

SECTIONS = {"base": "base_train", "mid": "mid_train", "sft": "chat_sft", "rl": "chat_rl"}  # of a training stage
EVALUATIONS = {"base": ("base_loss", "base_eval")}  # of the other stages: chat_eval_<stage>


def model_card(model: GPT, about: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    """about: what the checkpoint's meta.json says. report: report.json, of whatever run; what it says is shown where it
    is about this model."""
    sections = {section["stage"]: section for section in report.get("sections", [])}
    stage = about["stage"]
    is_ours = SECTIONS[stage] in sections and _is_of(sections[SECTIONS[stage]], about)
    shown = [sections[name] for name in EVALUATIONS.get(stage, (f"chat_eval_{stage}",)) if name in sections]
    template = templates(escape).get_template("model_card.md.j2")
    card: str = template.render(
        about=about,
        classic=is_classic(model.config),
        config=model.config,
        parameters=model.num_params(),
        report=report if is_ours else None,
        label=data_label(list(sections.values())).strip() if is_ours else "",
        sections=[sections[SECTIONS[stage]], *shown] if is_ours else [],
    )
    return card


def _is_of(section: Mapping[str, Any], about: Mapping[str, Any]) -> bool:
    """Whether the section of a training stage is of the run that made this checkpoint: it shows the same settings."""
    changed = {**about.get("recipe", {}), **about.get("model_config", {})}  # these are shown in place of the flags
    settings = {name: value for name, value in about.get("settings", {}).items() if name not in changed}
    return bool(settings) and all(section["settings"].get(name) == value for name, value in settings.items())
