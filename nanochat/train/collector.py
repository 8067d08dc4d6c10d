"""Python's garbage collector, run on all ranks at the same step.

Left to itself it starts whenever enough objects have come up, which is at another step on each rank: then some rank
is always collecting and the others wait for it. Measured on a 12-layer model: 328,000 tracked objects, nearly all from
imports, and 0.18 s for a full collection.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# A training step leaves 1 to 2 tracked objects and no cycles, so a young collection after 1 to 100 steps took under
# 0.01 ms: its cost does not matter here. What 100 bounds is how much garbage a wasteful loader or logger may pile up.
EVERY = 100


@contextmanager
def scheduled() -> Iterator[Callable[[int], None]]:
    """Turns the automatic collector off and yields `collect(step)`, to be called after every step on all ranks.

    The first call collects everything and freezes what is left (it lives for the whole run, and need not be walked
    again); later ones collect the young objects when `step` is a multiple of EVERY. Objects that outlive such a
    collection and die in a cycle later wait for a full one (the trainer's, after an evaluation). At the end, by
    exception too, the collector is as it was.
    """
    was_enabled = gc.isenabled()
    frozen = False

    def collect(step: int) -> None:
        nonlocal frozen
        if not frozen:
            gc.collect()
            gc.freeze()
            frozen = True
        elif step % EVERY == 0:
            gc.collect(1)

    gc.disable()
    try:
        yield collect
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()
