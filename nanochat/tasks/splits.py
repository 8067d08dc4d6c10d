"""The hashing that gives every generated item to train or to test, and seeds its random choices.

Everything here depends on values alone, never on the process, PYTHONHASHSEED or Python's global random state.
"""

import hashlib
import random

from nanochat.tasks.common import Split


def stable_hash(*parts: object) -> int:
    """64 bits over `parts` (strings, numbers, tuples of them) written in ASCII: the same everywhere, never below 0."""
    return int.from_bytes(hashlib.blake2b(ascii(parts).encode(), digest_size=8).digest(), "big")


def split_of(*identity: object, test_share: float = 0.1) -> Split:
    """The one split that an item may stand in, from what identifies it."""
    # apart from the hashes that seed generators: an item's split must not tell anything about its other choices
    return "test" if stable_hash("split", *identity) < test_share * 2**64 else "train"


def item_rng(*identity: object) -> random.Random:
    """The random choices of one item."""
    return random.Random(stable_hash("item", *identity))
