"""Names that notebooks and outside test suites import; the code lives in paths.py and runtime.py."""

from nanochat.paths import get_base_dir as get_base_dir
from nanochat.runtime import compute_cleanup as compute_cleanup
from nanochat.runtime import compute_init as compute_init
from nanochat.runtime import get_dist_info as get_dist_info
from nanochat.runtime import print0 as print0
