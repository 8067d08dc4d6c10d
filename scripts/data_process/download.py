"""Download text that others have tokenized with GPT-2's tokenizer: FineWeb or FineWeb-Edu, 10⁸ tokens a file.

    python -m scripts.data_process.download --dataset=fineweb10B --shards=9

Into tokenized_data/<dataset> of the artifact store, for `scripts.base_train --source=bin:fineweb10B`. Run it again to
go on where it stopped; files that are here are not fetched again. HF_ENDPOINT names a mirror. The validation file
always comes along.
"""

from typing import Annotated, Literal

from nanochat import cli
from nanochat.cli import alias, int_flag


@cli.program
class Settings:
    """Download tokenized text; what is here already is kept."""

    dataset: Literal["fineweb10B", "finewebedu10B"] = "fineweb10B"
    """fineweb10B or finewebedu10B."""

    shards: Annotated[int, int_flag(gte=1), alias("-n")] = 9
    """Train files to have, of 10⁸ tokens and 200 MB each; the validation file comes on top."""

    num_workers: Annotated[int, int_flag(gte=1, lte=64), alias("-w")] = 4
    """Files fetched at the same time."""


from pathlib import Path
from typing import Any, NamedTuple

from nanochat.data.bins import describe_folder, read_header, tokenized_dir
from nanochat.dataset import fetch_files
from nanochat.errors import UserError
from nanochat.files import sha256_file


class TokenDataset(NamedTuple):
    """A dataset repository: <name>_val_000000.bin and train files numbered from 1."""

    repo: str
    name: str
    train_files: int


DATASETS = {
    "fineweb10B": TokenDataset("kjj0/fineweb10B-gpt2", "fineweb", 103),
    "finewebedu10B": TokenDataset("kjj0/finewebedu10B-gpt2", "finewebedu", 99),  # the last one is half as long
}


def main(settings: Settings) -> None:
    """Get what `settings` ask for. Raises UserError for more files than there are, and what hub.download raises."""
    spec, folder = DATASETS[settings.dataset], tokenized_dir() / settings.dataset
    if settings.shards > spec.train_files:
        raise UserError(
            f"--shards={settings.shards}: {settings.dataset} has {spec.train_files} train files; choose 1 to that many"
        )
    train = (f"{spec.name}_train_{index:06d}.bin" for index in range(1, settings.shards + 1))
    fetch_files(
        {"source": settings.dataset, "kind": "hub", "repo": spec.repo, "revision": "main"},
        folder,
        {f"{spec.name}_val_000000.bin": "val", **dict.fromkeys(train, "train")},
        describe=_describe,
        otherwise="use scripts.data_process.tokenize_text, which needs none",
        num_workers=settings.num_workers,
    )
    found = describe_folder(folder)
    for split in ("train", "val"):
        files = found.files(split)
        print(f"{settings.dataset} {split}: {len(files)} files, {sum(map(read_header, files)):,} tokens")
    print(f"in {folder}")


def _describe(path: Path, split: str, name: str) -> dict[str, Any]:
    tokens = read_header(path, name)
    return {"split": split, "size": path.stat().st_size, "sha256": sha256_file(path), "tokens": tokens}


if __name__ == "__main__":
    cli.run(main, Settings)
