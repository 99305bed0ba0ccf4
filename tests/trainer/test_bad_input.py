"""What goes wrong on the way of a run: one clear line, what was good is kept, and nothing half written is left."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import modeling_utils
from transformers.integrations.bitsandbytes import Bnb4bitQuantize

from loraplex_server.engine.model import load_base
from loraplex_trainer import served
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


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"data__heldout": None}, "loss after the last step"),
        ({}, "loss after the last step"),
        ({"training__evaluate_every": 1, "training__keep": "best"}, "held-out loss"),
    ],
)
def test_a_last_step_that_overflows_is_not_complete(write_run, train, tmp_path, changes, what):
    """No step came after it whose loss would have told."""
    result = train(write_run(**changes), "training.learning_rate=1e30", "training.max_steps=1", exit_code=1)
    assert result.stderr.startswith(f"error: the {what} is nan at step 1, whose examples are {tmp_path}/train.jsonl:")
    assert result.stderr.count("\n") == 1 and "lower training.learning_rate" in result.stderr
    assert not [path for path in (tmp_path / "adapters").rglob("*") if path.is_file()]


def test_a_last_step_of_several_that_overflows_leaves_the_others(write_run, train, tmp_path):
    good = write_run(name="good").rename(tmp_path / "good.yaml")
    bad = write_run(name="bad", training__learning_rate=1e30)
    result = train(good, bad, "training.max_steps=1", exit_code=1)
    assert result.stderr.startswith("error: bad: the loss after the last step is nan at step 1")
    assert [path.parent.name for path in (tmp_path / "adapters").glob("*/receipt.json")] == ["good"]


class NoRoom(TorchDispatchMode):
    """An allocator that has room for matrices of few rows, or tokens, only, and says so as torch's own does."""

    def __init__(self, rows: int, error: type[Exception], words: str, tokens: int = 10**9) -> None:
        super().__init__()
        self.rows, self.error, self.words, self.tokens = rows, error, words, tokens

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.embedding.default:
            rows, tokens, _ = out.shape
            if rows > self.rows or rows * tokens > self.tokens:
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


def test_held_out_examples_that_do_not_fit_say_what_to_lower(write_run, train, receipt, settings):
    heldout = Path(settings["data"]["heldout"])
    heldout.write_text(heldout.read_text().replace('"quote": "', '"quote": "' + "a longer one " * 6))
    run = write_run(training__evaluate_every=2, evaluation={"metric": "none", "general": "none"})
    with NoRoom(rows=8, error=torch.OutOfMemoryError, words="CUDA out of memory", tokens=300):
        error = train(run, exit_code=1).stderr
        assert error.count("\n") == 1 and "out of memory at step 2, with 8 examples of up to " in error
        assert "set training.batch_size to 4 and training.accumulation_steps to 2" in error


def test_too_much_together_says_what_to_halve_and_that_is_enough(write_run, train, receipt, tmp_path):
    runs = [write_run(name=name).rename(tmp_path / f"{name}.yaml") for name in ("one", "other")]
    with NoRoom(rows=8, error=torch.OutOfMemoryError, words="CUDA out of memory", tokens=250):
        error = train(*runs, exit_code=1).stderr
        assert error.count("\n") == 1 and "out of memory with 16 examples of 2 runs, of up to " in error
        assert "halve training.batch_size of each and double training.accumulation_steps" in error
        train(*runs, "training.batch_size=4", "training.accumulation_steps=2")
    assert receipt("one")["steps"] == receipt("other")["steps"] == 6


def test_scoring_that_does_not_fit_costs_no_training(write_run, train, receipt, monkeypatch):
    run = write_run(evaluation={"samples": 1, "max_tokens": 8})
    with monkeypatch.context() as patched:
        patched.setattr(
            served, "load_base", Mock(side_effect=RuntimeError("DefaultCPUAllocator: can't allocate memory"))
        )
        error = train(run, exit_code=1).stderr
    assert error.count("\n") == 1 and "out of memory while the adapter was scored" in error and "--resume" in error
    assert "step 1/" not in train(run, "--resume").stdout
    assert receipt()["steps"] == 6


@pytest.mark.parametrize(
    ("quantization", "advice"),
    [("none", "by nf4: set base.quantization to nf4, or take a smaller base"), ("nf4", "the least: take a smaller")],
)
def test_a_base_that_does_not_fit_is_told_with_what_would(
    write_run, train, tmp_path, monkeypatch, quantization, advice
):
    load = modeling_utils.convert_and_load_state_dict_in_model  # pyright: ignore[reportPrivateImportUsage]
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def no_room(load_config: Any, **more: Any) -> Any:
        if load_config.device_map == {"": "meta"}:
            return load(load_config=load_config, **more)
        raise error

    run = write_run(base__quantization=quantization)
    if quantization == "none":
        monkeypatch.setattr(modeling_utils, "convert_and_load_state_dict_in_model", no_room)
    else:  # transformers keeps this error for a table, and raises one of its own
        monkeypatch.setattr(Bnb4bitQuantize, "convert", Mock(side_effect=error))
    error = train(run, exit_code=1).stderr
    assert "error: base.model: " in error and "does not fit into memory: " in error and " MiB of weights by " in error
    assert advice in error
    assert not (tmp_path / "adapters/tagger").exists()


@pytest.mark.parametrize("flags", [(), ("--check", "--no-timing")], ids=["train", "check"])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda whole: whole[:-1], "its weights are no whole safetensors files"),
        (
            lambda whole: whole.replace(b'"model.norm.weight"', b'"model.norm.weighs"'),
            "lacks 1 of its weights: model.norm",
        ),
    ],
)
def test_a_base_that_is_not_whole_is_refused(write_run, train, base_folder, tmp_path, damage, words, flags):
    """It was trained on random numbers in place of what was missing."""
    folder = shutil.copytree(base_folder, tmp_path / "base")
    (folder / "model.safetensors").write_bytes(damage((base_folder / "model.safetensors").read_bytes()))
    message = train(write_run(base__model=str(folder)), *flags, exit_code=2).stderr
    assert f"base '{folder}'" in message and words in message and message.count("\n") == 1


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
