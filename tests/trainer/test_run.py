"""A run as a whole: what it leaves on disk, how it is interrupted and resumed, what its receipt says."""

import hashlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from loraplex_registry.base import fingerprint_base
from loraplex_trainer.errors import Interrupted
from loraplex_trainer.run import train as run_training
from loraplex_trainer.run_file import load_config

LONG = {"max_steps": 150, "batch_size": 8, "learning_rate": 5e-3, "log_every_steps": 1, "save_every": 1000}


def interrupt(run: Path, number: signal.Signals, after: str) -> tuple[int, str]:
    """Starts the command in a process of its own and sends it a signal once `after` is on its output."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "loraplex_trainer", str(run)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout and process.stderr
    with process:
        for line in process.stdout:
            if line.startswith(after):
                process.send_signal(number)
                break
        process.stdout.read()
        return process.wait(timeout=60), process.stderr.read()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(number, write_run, train, receipt, tmp_path):
    """With dropout on: weights, optimizer, place in the data and random state must all come back."""
    lora = {"rank": 4, "alpha": 8, "dropout": 0.2}
    train(write_run(name="whole", training=LONG, lora=lora))
    run = write_run(name="parts", training=LONG, lora=lora)
    exit_code, message = interrupt(run, number, after="step 20/")
    assert exit_code == 128 + number
    (line,) = [line for line in message.splitlines() if "interrupted" in line]
    assert line.endswith(f"loraplex train {run} --resume")
    folder = tmp_path / "adapters/parts"
    assert [path.name for path in folder.iterdir()] == [".checkpoint"]
    assert {path.suffix for path in (folder / ".checkpoint").iterdir()} == {".safetensors", ".json"}
    stopped_at = json.loads((folder / ".checkpoint/progress.json").read_text())["step"]
    assert 20 <= stopped_at < LONG["max_steps"]

    result = train(run, "--resume")
    assert f"step {stopped_at}/" not in result.stdout and f"step {stopped_at + 1}/" in result.stdout
    torch.testing.assert_close(
        *(load_file(tmp_path / "adapters" / name / "adapter_model.safetensors") for name in ("whole", "parts")),
        rtol=0,
        atol=1e-6,
    )
    assert receipt("parts")["losses"] == pytest.approx(receipt("whole")["losses"], abs=1e-6)
    assert receipt("parts")["steps"] == LONG["max_steps"]
    assert not (folder / ".checkpoint").exists()


def test_a_signal_during_a_report_still_leaves_a_checkpoint(write_run):
    """It came after "is a save due?" and before "shall we stop?": the run said it was interrupted and saved nothing."""

    class Trip(io.StringIO):
        def write(self, text: str) -> int:
            if text.startswith("step 3/"):
                signal.raise_signal(signal.SIGINT)
            return super().write(text)

    config = load_config(write_run())
    with pytest.raises(Interrupted) as stop:
        run_training(config, resume=False, console=Console(file=Trip()))
    assert json.loads((config.folder / ".checkpoint/progress.json").read_text())["step"] == stop.value.step
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("at", [5, 6], ids=["during the last step", "after it"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_last_step_stops_the_run_before_it_is_scored(write_run, train, number, at):
    """It was read by nobody: the run scored, and ended as if nobody had asked it to stop."""

    class Trip(io.StringIO):
        def write(self, text: str) -> int:
            if text.startswith(f"step {at}/"):
                signal.raise_signal(number)
            return super().write(text)

    config, screen = load_config(run := write_run()), Trip()
    with pytest.raises(Interrupted) as stop:
        run_training(config, resume=False, console=Console(file=screen))
    assert (stop.value.exit_code, stop.value.step) == (128 + number, 6)
    assert "scoring" not in screen.getvalue()
    assert [path.name for path in config.folder.iterdir()] == [".checkpoint"]
    output = train(run, "--resume").output
    assert "scoring" in output and "step 6/6" not in output
    assert (config.folder / "receipt.json").is_file()


@pytest.fixture
def interrupted(write_run, train, tmp_path) -> Path:
    """A run file whose run stopped at a bad step, with the checkpoint of the step before."""
    run = write_run(training={"max_steps": 30, "batch_size": 8, "save_every": 1, "warmup_ratio": 1.0})
    train(run, "training.learning_rate=1e36", exit_code=1)
    assert (tmp_path / "adapters/tagger/.checkpoint").is_dir()
    return run


def test_a_checkpoint_of_another_run_is_not_resumed(interrupted, train, tmp_path):
    result = train(interrupted, "training.learning_rate=0.001", "--resume", exit_code=2)
    assert "training.learning_rate was 1e+36 and is 0.001 now" in result.stderr
    data = tmp_path / "train.jsonl"
    data.write_text(data.read_text() + data.read_text().splitlines()[0])
    result = train(interrupted, "training.learning_rate=1e36", "--resume", exit_code=2)
    assert "train_sha256" in result.stderr


APART = "is damaged: progress.json and state.safetensors are not as they were written together"


def of_progress(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Damage to progress.json alone."""

    def damage(checkpoint: Path) -> None:
        path = checkpoint / "progress.json"
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return damage


def of_state(change: Callable[[str, torch.Tensor], torch.Tensor | None]) -> Callable[[Path], None]:
    """Damage to tensors, by their names; None: it is left out."""

    def damage(checkpoint: Path) -> None:
        path = checkpoint / "state.safetensors"
        changed = {name: change(name, tensor) for name, tensor in load_file(path).items()}
        save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, path)

    return damage


def folder_at(name: str) -> Callable[[Path], None]:
    def damage(checkpoint: Path) -> None:
        (checkpoint / name).unlink()
        (checkpoint / name).mkdir()

    return damage


def without(kind: str) -> Callable[[Path], None]:
    return of_state(lambda name, tensor: None if name.startswith(kind) else tensor)


def of_another_shape(kind: str) -> Callable[[Path], None]:
    return of_state(lambda name, tensor: tensor.flatten()[:1].clone() if name.startswith(kind) else tensor)


DAMAGES = {
    "no table": (of_progress(lambda _: []), "is damaged: progress.json is no JSON object"),
    "null": (of_progress(lambda _: None), "is damaged: progress.json is no JSON object"),
    "old": (of_progress(lambda was: was | {"format": "loraplex.checkpoint/2"}), "'loraplex.checkpoint/2', and this"),
    "no losses": (of_progress(lambda was: {key: was[key] for key in was if key != "losses"}), APART),
    "no run": (of_progress(lambda was: was | {"run": None}), APART),
    "a key more": (of_progress(lambda was: was | {"more": 1}), APART),
    "another step": (of_progress(lambda was: was | {"step": 1_000_000_000}), APART),
    "no digest": (of_progress(lambda was: was | {"sha256": None}), APART),
    "a folder for progress": (folder_at("progress.json"), "is damaged: [Errno 21] Is a directory"),
    "a folder for state": (folder_at("state.safetensors"), "is damaged: [Errno 21] Is a directory"),
    "no state": (lambda checkpoint: (checkpoint / "state.safetensors").unlink(), "is damaged: [Errno 2] No such file"),
    "half of state": (lambda checkpoint: os.truncate(checkpoint / "state.safetensors", 1000), APART),
    "no optimizer": (without("optimizer/"), APART),
    "no random state": (without("random/"), APART),
    "weights to broadcast": (of_another_shape("adapter/"), APART),
    "optimizer's shapes": (of_another_shape("optimizer/exp_avg"), APART),  # torch wrote past their end
}


def test_a_new_start_tells_of_the_checkpoint_that_it_replaces(interrupted, write_run, train, tmp_path):
    """It was replaced in silence, and hours of training with it."""
    folder = tmp_path / "adapters/tagger/.checkpoint"
    step = json.loads((folder / "progress.json").read_text())["step"]
    told = f"a checkpoint of step {step} is in {folder}: --resume goes on with it; this run begins anew\n"
    first, other = interrupted.rename(tmp_path / "first.yaml"), write_run(name="other")
    short = ["training.max_steps=1", "training.learning_rate=1e-3"]
    assert told not in train(first, *short, "--resume", exit_code=2).output
    assert f"tagger: {told}" in train(first, other, *short, "lora.target_modules=[none]", exit_code=2).stdout
    assert told in train(first, *short).stdout
    assert "checkpoint of step" not in train(first, *short).stdout  # a finished run leaves none


def test_a_damaged_checkpoint_is_named_and_left_as_it_is(interrupted, write_run, train, tmp_path):
    """Some were a traceback, some the end of the process, and some went on from another state than was saved."""
    folder, whole = tmp_path / "adapters/tagger/.checkpoint", tmp_path / "whole"
    folder.rename(whole)
    first, other = interrupted.rename(tmp_path / "first.yaml"), write_run(name="other")
    for name, (damage, words) in DAMAGES.items():
        shutil.copytree(whole, folder)
        damage(folder)
        before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        for runs in ([first], [first, other]):
            (line,) = train(*runs, "--resume", exit_code=2).stderr.splitlines()
            assert line.startswith(f"error: the checkpoint {folder} is ") and words in line, (name, line)
            assert line.endswith(": start anew without --resume"), (name, line)
        assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
        shutil.rmtree(folder)


def test_nothing_to_resume_is_an_error_not_a_fresh_start(write_run, train):
    assert "nothing to resume" in train(write_run(), "--resume", exit_code=2).stderr


def test_a_finished_adapter_stays_until_the_next_is_complete(interrupted, write_run, train, tmp_path):
    folder = tmp_path / "adapters/tagger"
    train(write_run())
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    train(interrupted, "training.learning_rate=1e36", exit_code=1)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    train(write_run(training__seed=7))
    after = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert after.keys() == before.keys() and after["adapter_model.safetensors"] != before["adapter_model.safetensors"]
    assert [path.name for path in folder.parent.iterdir()] == ["tagger"]


def test_a_crash_between_the_two_renames_of_the_swap_loses_nothing(write_run, train, tmp_path):
    train(write_run())
    folder = tmp_path / "adapters/tagger"
    before = (folder / "receipt.json").read_bytes()
    folder.rename(tmp_path / "adapters/.tagger.old")
    train(write_run(), "--resume", exit_code=2)  # any later run, also one that does nothing
    assert (folder / "receipt.json").read_bytes() == before
    assert [path.name for path in folder.parent.iterdir()] == ["tagger"]


def test_the_receipt_says_what_the_adapter_was_made_of(write_run, train, receipt, tmp_path, base_folder, settings):
    result = train(write_run(base__quantization="nf4", base__dtype="float32"), "training.seed=3")
    folder = tmp_path / "adapters/tagger"
    assert sorted(path.name for path in folder.iterdir()) == [
        ".training",
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "receipt.json",
    ]
    written = receipt()
    assert written["format"] == "loraplex.receipt/1" and written["name"] == "tagger" and written["seed"] == 3
    assert written["config"]["training"]["seed"] == 3  # resolved: the override and the defaults
    assert written["config"]["training"]["max_grad_norm"] == 1.0
    assert written["base"] == {
        "id": str(base_folder),
        "path": str(base_folder.resolve()),
        "revision": None,
        "fingerprint": fingerprint_base(base_folder),
        "quantization": "nf4+double:float32",
    }
    for name, count in (("train", 48), ("heldout", 8)):
        content = Path(settings["data"][name]).read_bytes()
        assert written["data"][name]["sha256"] == "sha256:" + hashlib.sha256(content).hexdigest()
        assert written["data"][name]["examples"] == count
        assert 0 < written["data"][name]["answer_tokens"] < written["data"][name]["tokens"]
    for name, digest in written["files"].items():
        assert digest == "sha256:" + hashlib.sha256((folder / name).read_bytes()).hexdigest()
    assert written["files"].keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert written["template"] == {"form": "prompt_completion", "prompt": "{quote} ->:", "completion": " {tags}"}
    assert written["mask"] == {"loss_on": ["completion"], "end_of_sequence": 48}
    assert written["versions"]["torch"] == torch.__version__ and written["versions"]["bitsandbytes"]
    assert written["versions"]["cuda"] == torch.version.cuda and "deepspeed" not in written["versions"]
    assert written["processes"] == 1 and written["hardware"]["gpus"] == torch.cuda.device_count()
    assert written["losses"]["train_last"] < written["losses"]["train_first"]
    assert written["losses"]["heldout"] > 0 and written["parent"] is None
    names = {"heldout_loss", "stop_rate"}
    assert written["metrics"].keys() == names | {f"base_{name}" for name in names} and written["goldens"] == []
    assert written["wall_seconds"] > 0 and written["peak_memory_bytes"] > 50_000_000
    assert written["hardware"]["cores"] >= 1 and written["hardware"]["cpu"]
    assert socket.gethostname() not in json.dumps(written["hardware"])
    assert f"adapter: {folder}" in result.stdout and "registry push tagger" in result.stdout


def test_the_log_says_loss_rate_speed_and_time_left(write_run, train):
    result = train(write_run(), "training.log_every_steps=2")
    lines = [line for line in result.stdout.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["2/6", "4/6", "6/6"]
    assert all(word in lines[0] for word in ("loss ", "lr ", "tokens/s", "s left"))


def test_a_terminal_gets_a_bar_with_the_same_numbers(write_run):
    screen = io.StringIO()
    run_training(load_config(write_run()), resume=False, console=Console(file=screen, force_terminal=True, width=120))
    assert all(word in screen.getvalue() for word in ("6/6", "loss ", "lr ", "tokens/s", "0:00:00"))
    assert "step 1/6" not in screen.getvalue()


@pytest.mark.parametrize(
    ("override", "exit_code", "words"),
    [
        ("base.model=./no-such-base", 2, ["no-such-base"]),
        ("data.train=no-such.jsonl", 2, ["no-such.jsonl", "No such file"]),
        ("data.prompt='{text} ->:'", 2, ["train.jsonl:1", "'text'"]),
        ("data.max_tokens=9999", 2, ["data.max_tokens", "9999", "256"]),
        ("output=/dev/null", 2, ["output", "/dev/null", "Not a directory"]),
    ],
)
def test_a_mistake_is_one_line_and_an_exit_code(write_run, train, override, exit_code, words):
    result = train(write_run(), override, exit_code=exit_code)
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("error: ") and all(word in line for word in words), result.stderr


def test_importing_the_command_imports_no_torch():
    code = "import sys, loraplex_trainer.__main__; print('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert answer.stdout.strip() == "False"
