"""Which trained models the artifact store holds."""

from nanochat.checkpoint import committed_steps
from nanochat.errors import UserError
from nanochat.paths import checkpoint_dir, get_base_dir, slug

STAGES = ("base", "mid", "sft", "rl")


def list_models() -> dict[str, list[str]]:
    """Stage -> tags of its runs that have at least one whole checkpoint; stages without any are left out."""
    found = {}
    for stage in STAGES:
        folder = checkpoint_dir(stage, "x").parent
        if tags := sorted(path.name for path in folder.glob("*") if committed_steps(path)):
            found[stage] = tags
    return found


def require_model(stage: str, tag: str | None = None) -> None:
    """Raises UserError that lists the models of all stages where this one is not there; tag None: any of the stage."""
    found = list_models()
    tags = found.get(stage, [])
    if not tags or (tag is not None and slug(tag) not in tags):
        there = "; ".join(f"{name}: {', '.join(names)}" for name, names in found.items())
        missing = f"no {stage} checkpoint" + (f" tagged {tag}" if tag is not None else "")
        advice = f"there are {there}" if there else "there are none at all: train one first, with `bash speedrun.sh`"
        raise UserError(f"{missing} in {get_base_dir() / 'checkpoints'}; {advice}")
