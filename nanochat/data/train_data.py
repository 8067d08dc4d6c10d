"""What a base model is trained on, whether it is tokenised on the way or was before: one front for both.

fineweb-edu, climbmix, pydocs, local:DIR    text (nanochat.dataset), tokenised with the store's tokenizer
bin:DIR                                     token files (nanochat.data.bins), DIR a path or a name below
                                            tokenized_data/ in the store
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nanochat.data.batching import BatchPlan
from nanochat.data.bin_loader import BinLoader, bin_horizon_in_epochs, fixed_rows_from_bin
from nanochat.data.bins import TokenFolder, describe_folder
from nanochat.dataloader import TrainLoader, fixed_rows, horizon_in_epochs
from nanochat.dataset import canonical
from nanochat.errors import UserError
from nanochat.runtime import print0
from nanochat.tokenizer import RustBPETokenizer, get_token_bytes, get_tokenizer

PREFIX = "bin:"


@dataclass(frozen=True)
class TrainData:
    """Text or token files, and who knows what the tokens mean."""

    source: str
    tokenizer: RustBPETokenizer | None
    """None: the tokens are of a tokenizer that is not at hand; then there are no bytes to count, and no samples."""
    folder: TokenFolder | None
    """Of token files; None: text."""

    @property
    def vocab_size(self) -> int:
        if self.folder is not None:
            return self.folder.vocab_size
        return self._known.get_vocab_size()

    @property
    def document_token(self) -> int:
        """Starts every document."""
        return self.folder.document_token if self.folder is not None else self._known.get_bos_token_id()

    @property
    def tokenizer_hash(self) -> str:
        if self.tokenizer is not None:
            return self.tokenizer.hash
        assert self.folder is not None
        return self.folder.tokenizer_hash or "gpt2"

    @property
    def fingerprint(self) -> str | None:
        """Changes with the token files; text is told apart by its source."""
        return self.folder.fingerprint if self.folder is not None else None

    @property
    def _known(self) -> RustBPETokenizer:
        assert self.tokenizer is not None, "text is always tokenised with the store's tokenizer"
        return self.tokenizer

    def loader(
        self,
        plan: BatchPlan,
        sequence_len: int,
        device: torch.device,
        rank: int,
        world_size: int,
        seed: int,
        state: dict[str, Any] | None,
    ) -> TrainLoader | BinLoader:
        """Micro-batches of this rank; state: where an earlier run stopped. Token files keep their order, whatever the
        seed."""
        shape = plan.rows_per_step, sequence_len, plan.device_batch_size, device, rank, world_size
        if self.folder is not None:
            return BinLoader(self.folder, *shape, state=state)
        return TrainLoader(self._known, self.source, *shape, seed=seed, state=state)

    def val_rows(self, sequence_len: int, tokens: int) -> np.ndarray:
        """Rows (N, sequence_len + 1) to validate on, the same for every number of ranks."""
        tokens = max(tokens, sequence_len)
        if self.folder is not None:
            return fixed_rows_from_bin(self.folder, "val", sequence_len, tokens)
        return fixed_rows(self._known, self.source, "val", sequence_len, tokens)

    def horizon_in_epochs(self, sequence_len: int, tokens: int, rows_per_step: int) -> tuple[float, float]:
        """(epochs that training on so many tokens makes, share of the tokens that are in no row), estimated."""
        if self.folder is not None:
            return bin_horizon_in_epochs(self.folder, sequence_len, tokens)
        return horizon_in_epochs(self._known, self.source, sequence_len, tokens, rows_per_step)

    def token_bytes(self, device: torch.device) -> torch.Tensor | None:
        """(vocab,) bytes of each token; None where the tokenizer is not at hand."""
        return get_token_bytes(device) if self.tokenizer is not None else None


def open_data(source: str) -> TrainData:
    """The data of --source. Raises UserError where there are none."""
    if not source.startswith(PREFIX):
        return TrainData(canonical(source), get_tokenizer(), None)
    folder = describe_folder(source.removeprefix(PREFIX))
    tokenizer = _tokenizer_of(folder)
    if tokenizer is None:
        whose = folder.tokenizer_hash or "GPT-2's"
        print0(f"note: {folder.path} has tokens of {whose} tokenizer: losses per token, no samples, no CORE")
    return TrainData(f"{PREFIX}{folder.path}", tokenizer, folder)


def _tokenizer_of(folder: TokenFolder) -> RustBPETokenizer | None:
    """The store's tokenizer if it made the files."""
    if folder.tokenizer_hash is None:
        return None
    try:
        tokenizer = get_tokenizer()
    except UserError:  # none has been trained, and none is needed
        return None
    return tokenizer if tokenizer.hash == folder.tokenizer_hash else None
