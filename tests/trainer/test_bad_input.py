"""What goes wrong on the way of a run: one clear line, what was good is kept, and nothing half written is left."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from loraplex_server.engine.model import load_base
from loraplex_trainer.data import encode_split, epoch_order, read_split
from loraplex_trainer.encoding import encoder_for
from loraplex_trainer.errors import OutOfMemory
from loraplex_trainer.run_file import load_config

SPACE = ["unshare", "--map-root-user", "--mount"]


def test_a_loss_that_is_not_finite_names_its_batch(write_run, train, settings):
    """The examples named are those that the step of that number sees."""
    path = write_run(training__save_every=1, training__warmup_ratio=1.0, training__max_steps=30)
    result = train(path, "training.learning_rate=1e36", exit_code=1)
    step = int(result.stderr.split(" at step ")[1].split(",")[0])
    named = result.stderr.split("whose examples are ")[1].split(": look")[0].split(", ")
    config = load_config(path)
    encoder = encoder_for(load_base(**config.base.load_options), config.data)
    examples = encode_split(read_split(config.data.train, config.data), encoder).examples
    epoch, place = divmod(step - 1, 6)
    order = epoch_order([len(example.ids) for example in examples], 8, config.training.seed, epoch)
    assert named == [f"{config.data.train}:{index + 1}" for index in sorted(order[place])]


class NoRoom(TorchDispatchMode):
    """An allocator that has room for matrices of few rows only, and says so as torch's own does."""

    def __init__(self, rows: int, error: type[Exception], words: str) -> None:
        super().__init__()
        self.rows, self.error, self.words = rows, error, words

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.embedding.default and out.shape[0] > self.rows:
            raise self.error(self.words)
        return out


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2.00 GiB"),
        (RuntimeError, "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        (MemoryError, ""),
    ],
)
def test_out_of_memory_says_what_to_lower_and_that_is_enough(write_run, train, error, words, receipt):
    run = write_run(training__accumulation_steps=2)
    with NoRoom(rows=4, error=error, words=words):
        result = train(run, exit_code=1)
        assert result.stderr.count("\n") == 1 and "out of memory at step 1, with 8 examples" in result.stderr
        told = "set training.batch_size to 4 and training.accumulation_steps to 4"
        assert told in result.stderr
        train(run, "training.batch_size=4", "training.accumulation_steps=4")
    assert receipt()["steps"] == 6
    with NoRoom(rows=0, error=error, words=words):
        result = train(run, "training.batch_size=1", exit_code=1)
    assert "lower data.max_tokens to " in result.stderr


@pytest.mark.parametrize(
    ("quantization", "advice"),
    [("none", "by nf4: set base.quantization to nf4, or take a smaller base"), ("nf4", "the least: take a smaller")],
)
def test_a_base_that_does_not_fit_is_told_with_what_would(
    write_run, train, tmp_path, monkeypatch, quantization, advice
):
    def no_room(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    run = write_run(base__quantization=quantization)
    monkeypatch.setattr("transformers.modeling_utils.convert_and_load_state_dict_in_model", no_room)
    error = train(run, exit_code=1).stderr
    assert "error: base.model: " in error and "does not fit into memory: " in error and " MiB of weights by " in error
    assert advice in error
    assert not (tmp_path / "adapters/tagger").exists()


@pytest.mark.parametrize("options", [[], ["--check", "--no-timing"]])
@pytest.mark.parametrize(
    ("method", "advice"), [("lora", "lora.rank"), ("ia3", "ia3.target_modules"), ("prompt", "prompt.virtual_tokens")]
)
def test_an_adapter_that_does_not_fit_is_told_with_what_to_lower(
    write_run, train, monkeypatch, method, advice, options
):
    def no_room(*_: object, **__: object) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr("loraplex_trainer.adapter.get_peft_model", no_room)
    error = train(write_run(method=method, lora={}), *options, exit_code=1).stderr
    assert "error: the adapter does not fit into memory beside the base: " in error and advice in error


def test_another_runtime_error_is_not_called_out_of_memory(write_run, train):
    with NoRoom(rows=4, error=RuntimeError, words="shapes differ"), pytest.raises(RuntimeError, match="shapes differ"):
        train(write_run())
    assert not issubclass(RuntimeError, OutOfMemory)


def test_two_trainings_of_one_name_do_not_share_a_folder(write_run, train, tmp_path):
    """Each threw away what the other was making: the second is refused while the first is at work, and only then."""
    run = write_run(training={"max_steps": 2000, "batch_size": 8, "log_every_steps": 1})
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    first = subprocess.Popen(
        [sys.executable, "-u", "-m", "loraplex_trainer", str(run)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert first.stdout
    with first:
        for line in first.stdout:
            if line.startswith("step 3/"):
                break
        before = (tmp_path / "adapters").exists()
        result = train(run, exit_code=2)
        assert "name" in result.stderr and "another training of this name" in result.stderr and before
        train(run, "name=other", "training.max_steps=1")  # beside it, under a name of its own
        first.send_signal(signal.SIGINT)
        first.stdout.read()
        assert first.wait(timeout=60) == 130
    train(run, "training.max_steps=1")  # and the same name once the first is gone


TRAIN_UNTIL_FULL = """
import json, subprocess, sys
from pathlib import Path
from click.testing import CliRunner
from loraplex_trainer.__main__ import train
disk, run, *rooms = sys.argv[1:]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], check=True)
for pages in map(int, rooms):
    filler = Path(disk) / "filler"
    free = subprocess.run(["stat", "-fc", "%a", disk], check=True, capture_output=True, text=True)
    filler.write_bytes(bytes(4096 * (int(free.stdout) - pages)))
    result = CliRunner().invoke(train, [run])
    left = sorted(str(path.relative_to(disk)) for path in Path(disk).rglob("*") if path.is_file() and path != filler)
    filler.unlink()
    subprocess.run(f"rm -rf {disk}/*", shell=True, check=True)
    subprocess.run(f"rm -rf {disk}/.[a-z]*", shell=True, check=True)
    print(json.dumps({"pages": pages, "code": result.exit_code, "said": result.stderr, "left": left}))
"""


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_nothing_half_written(write_run, tmp_path):
    """With room for so many pages: from none to all that a run needs, so that each of its writes fails once."""
    if not shutil.which("unshare") or subprocess.run([*SPACE, "true"], capture_output=True).returncode:
        pytest.skip(f"needs a mount namespace of its own: `{' '.join(SPACE)} true` must work here")
    disk = tmp_path / "disk"
    disk.mkdir()
    run = write_run(output=str(disk / "adapters"), training={"max_steps": 1, "batch_size": 8}, data__heldout=None)
    rooms = [1, 3, 10, 60, 90, 110, 130, 500]
    done = subprocess.run(
        [*SPACE, sys.executable, "-c", TRAIN_UNTIL_FULL, str(disk), str(run), *map(str, rooms)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    outcomes = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert {outcome["code"] for outcome in outcomes} == {0, 1}
    for outcome in outcomes:
        names = {Path(path).name for path in outcome["left"]}
        if outcome["code"]:
            assert outcome["said"].count("\n") == 1 and "No space left" in outcome["said"], outcome
            # nothing, or a whole checkpoint
            assert names in (set(), {"progress.json", "state.safetensors"}), outcome
        else:
            assert "receipt.json" in names and "progress.json" not in names
