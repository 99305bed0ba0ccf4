"""The Triton kernels go through Triton's compiler and NVIDIA's assembler, which come in Triton's wheel."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# The most that a block may have: CUDA C++ Programming Guide, technical specifications. 99 KiB is what GPUs of 8.6 and
# 8.9 allow, the least after Turing; a 9.0 has more.
SHARED_BYTES = {75: 64 << 10, 90: 99 << 10}


def test_every_kernel_becomes_machine_code_for_the_gpus_from_turing_to_hopper(tmp_path):
    """A GPU's compiler refuses what the interpreter runs: shapes, types, names that are not known in every branch."""
    pytest.importorskip("triton", reason="pip install 'loraplex[kernels]'; scripts/test does")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_CACHE_DIR": str(tmp_path)}
    script = Path(__file__).parents[1] / "compile_kernels.py"
    done = subprocess.run(
        [sys.executable, script, *map(str, SHARED_BYTES)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 15
    for capability, kernel, dtype, code, shared in lines:
        assert int(code) > 0 and int(shared) <= SHARED_BYTES[int(capability)], (capability, kernel, dtype, shared)
