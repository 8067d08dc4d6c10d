"""Make a checkpoint of a folder that Hugging Face Transformers loads: of scripts.export_hf, or another nanochat model.

python -m scripts.import_hf d20-hf
python -m scripts.import_hf OWNER/NAME --stage=sft --model-tag=theirs     from the hub, or HF_ENDPOINT
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from nanochat import cli
from nanochat.cli import alias


@dataclass(frozen=True)
class Settings:
    """Import a model from Transformers into the artifact store."""

    source: str
    """A folder, or the name of a repository on the hub."""
    stage: Annotated[Literal["base", "mid", "sft", "rl"] | None, alias("-i")] = None
    """Training stage that it becomes a checkpoint of; default: that it was exported from."""
    model_tag: Annotated[str | None, alias("-g")] = None
    """Name among the stage's checkpoints; default: that it was exported from."""


if __name__ == "__main__":
    cli.start(Settings)  # before torch is imported, which takes seconds

from nanochat.errors import UserError
from nanochat.hf.load import find_folder, load, write


def main(settings: Settings) -> None:
    model, tokenizer, about = load(find_folder(settings.source))
    stage = settings.stage or about.get("stage")
    tag = settings.model_tag or about.get("tag")
    if stage is None or tag is None:
        raise UserError(f"{settings.source} does not say which stage and run it is of: give --stage and --model-tag")
    write(model, tokenizer, about, stage, tag)
    print(f"`python -m scripts.chat_cli -i {stage} -g {tag}` talks to it")


if __name__ == "__main__":
    cli.run(main, Settings)
