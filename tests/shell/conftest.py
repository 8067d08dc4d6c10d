import shutil
import subprocess
import sys

import pytest

from tests.shell.scripts import ROOT, SCRIPTS


@pytest.fixture
def tree(tmp_path):
    """The scripts in a folder of their own, with an environment that looks finished and a python that only logs."""
    shutil.copytree(ROOT / "profiles", tmp_path / "profiles")
    for name in SCRIPTS[:5]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "requirements.lock").write_text("x==1\n")
    (tmp_path / "rustbpe").mkdir()
    (tmp_path / "rustbpe" / "lib.rs").write_text("fn main() {}\n")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        '#!/bin/sh\ncase "$*" in --version) echo Python 3.11.0;; '
        "*visible_gpus*) nvidia-smi 2>/dev/null && echo 1 || echo 0;; "
        f'*--print-inputs | *nanochat.paths*) PYTHONPATH={ROOT} exec {sys.executable} "$@";; '
        f'*pipeline\\ check*) [ -z "$CHECKS" ] && cat >/dev/null || PYTHONPATH={ROOT} exec {sys.executable} "$@";; '
        '-c*) ;; *) echo "$@" >> "$CALLS";; esac\n'
    )
    python.chmod(0o755)
    stamp = "find requirements.lock rustbpe -type f | LC_ALL=C sort | xargs cksum; echo Python 3.11.0"
    made = subprocess.run(["bash", "-c", stamp], cwd=tmp_path, capture_output=True, text=True, check=True)
    (tmp_path / ".venv" / ".setup-stamp").write_text(made.stdout)
    return tmp_path


@pytest.fixture
def bare_path(tree):
    """A PATH with the usual tools, but no python, uv or cargo."""
    folder = tree / "bin"
    folder.mkdir()
    for tool in ("bash", "sh", "find", "sort", "xargs", "cksum", "cmp", "dirname", "env", "rm", "cat", "tr", "sed"):
        (folder / tool).symlink_to(shutil.which(tool))
    return folder
