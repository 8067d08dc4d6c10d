"""Shell scripts of the project, and running a copy of them."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPTS = ("speedrun.sh", "dev/settings.sh", "dev/setup.sh", "dev/stages.sh", "pretrain.sh", "runtests.sh", ".ci/run")


def shell(tree, script, *words, path=None, **environment):
    everything = {
        "PATH": path or os.environ["PATH"],
        "HOME": str(tree / "home"),
        "CALLS": str(tree / "calls"),
        **environment,
    }
    return subprocess.run(
        ["bash", script, *words], cwd=tree, env=everything, capture_output=True, text=True, timeout=60
    )
