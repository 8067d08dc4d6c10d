import os
import subprocess
import sys

import pytest
import torch

from nanochat.kernels.pointwise import TRITON


@pytest.mark.slow
@pytest.mark.skipif(not TRITON or torch.cuda.is_available(), reason="needs Triton, and no GPU: these run there")
def test_decoding_by_the_interpreter_of_triton():
    """On a CPU, in a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.kernels.interpreted"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
