"""How the rows of one optimizer step are dealt to ranks and micro-batches: any number of ranks takes any batch.

Rank r of W takes rows r, r + W, … of the global batch. Every rank makes the same number of micro-batches of the same
shape, because under sharded parameters each forward pass is a collective. The rows that are missing for that are
filler: none of their targets counts, so that loss and gradient stay those of one rank.
"""

from typing import NamedTuple

from nanochat.errors import UserError


class BatchPlan(NamedTuple):
    """One optimizer step on each rank."""

    rows_per_step: int
    """Rows in the global batch, filler left out."""
    device_batch_size: int
    """Rows of each micro-batch: at most what was asked for."""
    batches_per_step: int
    """Micro-batches on each rank."""
    filler_rows: int
    """Masked rows a step, over all ranks."""
    note: str | None
    """What the user should know: a device batch that was lowered, work that is lost to filler."""


def even_batches(rows: int, most: int) -> tuple[int, int]:
    """(batches, rows in each) for `rows` rows in as few batches of at most `most` as will do, all of one size."""
    batches = -(-rows // most)
    return batches, -(-rows // max(batches, 1))


def plan_batch(total_batch_size: int, device_batch_size: int, max_seq_len: int, world_size: int) -> BatchPlan:
    """Deal total_batch_size tokens in rows of max_seq_len to world_size ranks, in micro-batches of at most
    device_batch_size rows. Raises UserError when the rows do not make up the batch."""
    rows = total_batch_size // max_seq_len
    if total_batch_size % max_seq_len:
        raise UserError(
            f"--total-batch-size={total_batch_size} is no multiple of --max-seq-len={max_seq_len}; "
            f"{max(rows, 1) * max_seq_len} would be"
        )
    batches, size = even_batches(-(-rows // world_size), device_batch_size)
    filler = world_size * batches * size - rows
    said = []
    if size < device_batch_size:
        dealt = f"{rows:,} rows a step on {world_size:,} rank(s)"
        said.append(f"device batch of {size} instead of {device_batch_size}: {dealt}")
    if filler:
        full = rows + filler
        idle = f" ({world_size - rows:,} ranks have nothing else)" if world_size > rows else ""
        said.append(
            f"{100 * filler / full:.1f} % of the positions are filler{idle}; "
            f"--total-batch-size={full * max_seq_len} would have none"
        )
    return BatchPlan(rows, size, batches, filler, "; ".join(said) or None)
