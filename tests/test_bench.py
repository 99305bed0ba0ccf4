"""The part of a bench that only a GPU can measure, on a tiny shape and a CPU: that it will run when there is one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_larger_shapes_are_trained_by_ours_and_the_peers(tmp_path):
    options = ["--gpu", "--device", "cpu", "--shapes", "tiny", "--rounds", "1", "--steps", "1", "--dry"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, str(ROOT / "bench/training.py"), *options]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr
    rows = [line.strip("|").split("|") for line in ran.stdout.splitlines() if line.startswith("| tiny")]
    systems = ["ours", "peft and Trainer", "peft and Trainer, bf16 autocast"]
    assert [(base.strip(), system.strip()) for _, base, system, *_ in rows] == [
        (base, system) for base in ("NF4", "bf16") for system in systems
    ]
    assert all(float(speed) > 0 for _, _, _, speed, *_ in rows)
