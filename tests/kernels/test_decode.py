import os
import subprocess
import sys
from importlib import import_module

import pytest

from nanochat.kernels.pointwise import TRITON

OLD = TRITON and tuple(map(int, import_module("triton").__version__.split(".")[:2])) < (3, 7)


@pytest.mark.slow
@pytest.mark.skipif(not TRITON, reason="needs Triton")
@pytest.mark.skipif(
    OLD, reason="the interpreter of Triton 3.6 takes no number of a kernel as the end of a range, with NumPy 2.4"
)
def test_decoding_by_the_interpreter_of_triton():
    """On a CPU, in a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.kernels.interpreted"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
