"""Put an evaluation bundle into the artifact store, where base_train and base_eval look for it.

    python -m scripts.make_eval_bundle --source=pydocs          # generated from held-out text, no network needed
    python -m scripts.make_eval_bundle --from-dir=/data/eval_bundle   # a bundle in the published layout, checked

A published bundle that already stands there is not replaced by a generated one.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from nanochat import cli
from nanochat.data.sources import iter_documents, source_flag
from nanochat.errors import UserError
from nanochat.eval.bundle import load_bundle
from nanochat.paths import eval_bundle_dir
from nanochat.sections import write_section


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Make or copy an evaluation bundle."""

    source: Annotated[str, source_flag("Text whose validation split the tasks are made from")] = "pydocs"
    from_dir: Path | None = None
    """Copy the bundle in this folder (core.yaml, eval_meta_data.csv, eval_data/) instead of making one."""


def check(settings: Settings) -> None:
    """Raises UserError where there is no whole bundle in from_dir."""
    if settings.from_dir is not None:
        load_bundle(settings.from_dir.expanduser())


if __name__ == "__main__" and cli.checking:
    cli.start(Settings, check)

from nanochat.eval.offline_bundle import copy_bundle, write_offline_bundle


def main(settings: Settings) -> None:
    target = eval_bundle_dir()
    if settings.from_dir is not None:
        bundle = copy_bundle(settings.from_dir.expanduser(), target)
    elif (target / "core.yaml").exists() and load_bundle(target).kind == "published":
        print(f"{target} holds a published bundle, which is kept; move it away to have one made from {settings.source}")
        return
    else:
        if any(path.is_file() for path in target.rglob("*")) and not (target / "core.yaml").exists():
            raise UserError(f"{target} is there but holds no core.yaml; move it away, then run this again")
        bundle = write_offline_bundle(iter_documents(settings.source, "val"), settings.source, target)
    items = sum(len(task.items) for task in bundle.tasks)
    print(f"{bundle.name}: {items:,} items in {target}")
    for note in bundle.notes:
        print(note)
    rows = [[task.label, task.kind, task.num_fewshot, len(task.items), task.baseline] for task in bundle.tasks]
    table = {"title": bundle.name, "columns": ["Task", "Kind", "Shots", "Items", "Guessing %"], "rows": rows}
    recorded = cli.as_dict(settings)
    if settings.from_dir is not None:
        del recorded["source"]  # nothing was made from it, and the report's title names the sources that were used
    section = {
        "settings": recorded,
        "metrics": {"tasks": len(rows), "items": items},
        "tables": [table],
        "notes": bundle.notes,
        "synthetic": bundle.kind != "published",
    }
    write_section("eval_bundle", "Evaluation tasks", section)


if __name__ == "__main__":
    cli.run(main, Settings)
