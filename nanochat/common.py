"""Names that notebooks and outside test suites import; the code lives in paths.py and runtime.py."""

from nanochat.paths import get_base_dir
from nanochat.runtime import compute_cleanup, compute_init, get_dist_info, print0

__all__ = ["compute_cleanup", "compute_init", "get_base_dir", "get_dist_info", "print0"]
