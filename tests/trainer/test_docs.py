"""Every command of docs/training.md, run as it is written, block after block, in one folder.

The folder is a clone's, with fewer rows and steps: what the commands do is tested here, what is learnt elsewhere.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from trainer.test_sharding import needs_deepspeed

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"^```sh\n(.*?)^```", (ROOT / "docs" / "training.md").read_text(), flags=re.M | re.S)
OF_DEEPSPEED = [block for block in BLOCKS if "zero" in block or "deepspeed" in block]
BARS = {"tag_f1>=0.9": "tag_f1>=0", "general_loss<4": "general_loss<40"}  # what two steps do reach
# The commands as console scripts of this very interpreter, installed or not.
SCRIPTS = {
    "loraplex": "-m loraplex",
    "registry": "-m loraplex registry",
    "torchrun": "-m torch.distributed.run",
    "python": "",
}


@pytest.fixture
def clone(tmp_path) -> Path:
    """demo/ with two steps of training and a few rows, and a run.yaml of one's own."""
    folder = tmp_path / "clone"
    shutil.copytree(ROOT / "demo" / "base", folder / "demo" / "base")
    (folder / "demo" / "quotes").mkdir()
    for path in (ROOT / "demo" / "quotes").glob("*.jsonl"):
        rows = path.read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / "demo" / "quotes" / path.name).write_text("".join(rows[:24]), encoding="utf-8")
    run = yaml.safe_load((ROOT / "demo" / "quotes-tagger.yaml").read_text(encoding="utf-8"))
    run["training"] |= {"max_steps": 2, "batch_size": 4}
    run["evaluation"] |= {"examples": 4, "samples": 1, "max_tokens": 4}
    for name, path in (("quotes-tagger", "demo/quotes-tagger.yaml"), ("run", "run.yaml")):
        (folder / path).write_text(yaml.safe_dump(run | {"name": name}, sort_keys=False), encoding="utf-8")
    zero = {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"stage": 2}}
    (folder / "zero2.json").write_text(json.dumps(zero), encoding="utf-8")
    return folder


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name, module in SCRIPTS.items():
        script = bin_folder / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" {module} "$@"\n')
        script.chmod(0o755)
    return os.environ | {
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(str(Path(path).resolve()) for path in sys.path if path),
        "LORAPLEX_HOME": str(tmp_path / "home"),
        "OMP_NUM_THREADS": "1",
    }


def run_blocks(blocks: list[str], folder: Path, environment: dict[str, str]) -> None:
    for block in blocks:
        for bar, reached in BARS.items():
            block = block.replace(bar, reached)
        command = ["bash", "-euo", "pipefail", "-c", block]
        ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
        assert ran.returncode == 0, f"{block}\n{ran.stdout}\n{ran.stderr}"
        assert "[transformers]" not in ran.stderr, ran.stderr


def test_every_command_works_as_it_is_written(clone, environment):
    run_blocks([block for block in BLOCKS if block not in OF_DEEPSPEED], clone, environment)
    assert {path.name for path in (clone / "adapters").glob("[a-z]*")} >= {"quotes-tagger", "run"}
    assert (clone / "merged" / "merge.json").is_file()


@pytest.mark.slow
@needs_deepspeed
def test_those_of_deepspeed_too(clone, environment):
    """In a folder of their own: at its first use DeepSpeed compiles for minutes."""
    assert len(OF_DEEPSPEED) > 1
    run_blocks(OF_DEEPSPEED, clone, environment)
    assert (clone / "adapters" / "run" / "receipt.json").is_file()
