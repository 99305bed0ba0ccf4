"""Several processes train what one does. The slow tests start real ones, with torchrun and gloo on the CPU."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from loraplex_trainer.team import Team

STEPS = {"max_steps": 8, "batch_size": 4, "accumulation_steps": 3, "learning_rate": 1e-2, "log_every_steps": 1}


def start(run, *arguments: str, processes: int = 2, launcher: list[str] | None = None) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    launcher = launcher or ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.Popen(
        [sys.executable, "-u", "-m", *launcher, "-m", "loraplex_trainer", str(run), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def torchrun(run, *arguments: str, exit_code: int = 0, **options) -> tuple[str, str]:
    with start(run, *arguments, **options) as process:
        out, err = process.communicate(timeout=300)
    assert (process.returncode == 0) == (exit_code == 0), err
    return out, err


def test_a_step_is_shared_out_whole():
    """Each example once, whatever the number of processes; sorted ones spread evenly."""
    chosen = list(range(11))
    for size in (1, 2, 3, 16):
        shares = [Team(rank, size).share(chosen) for rank in range(size)]
        assert sorted(example for share in shares for example in share) == chosen
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RANK": "x"}, "no WORLD_SIZE"),
        ({"RANK": "1"}, "RANK=1 and no WORLD_SIZE"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "no LOCAL_RANK"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "no MASTER_ADDR"),
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE='x': a whole number"),
        ({"RANK": "-1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK='-1'"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "rank below"),
    ],
)
def test_an_environment_that_no_torchrun_made_is_told(write_run, train, monkeypatch, environment, words):
    """They were tracebacks, or nothing at all: RANK=1 takes a process for one that leaves the talking to another."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert words in train(write_run(), exit_code=2).stderr


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("processes", [2, 3])
def test_the_loss_is_that_of_one_process(quantization, processes, write_run, train, receipt, tmp_path, base_folder):
    """Also where the last step of an epoch has fewer examples, and with the loss measured on the way."""
    base = {"model": str(base_folder), "quantization": quantization, "dtype": "float32", "device": "cpu"}
    training = STEPS | {"max_steps": 5, "evaluate_every": 2, "keep": "best"}
    train(write_run(name="one", base=base, training=training))
    out, _ = torchrun(write_run(name="several", base=base, training=training), processes=processes)
    assert out.count("step 1/5") == 1 and out.count("adapter: ") == 1  # the first process alone speaks
    one, several = receipt("one"), receipt("several")
    assert (one["processes"], several["processes"]) == (1, processes)
    assert one["losses"]["train_last"] < one["losses"]["train_first"] - 0.1
    assert several["losses"] == pytest.approx(one["losses"], abs=2e-5)
    for ours, theirs in zip(several["evaluations"], one["evaluations"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=2e-5)
    torch.testing.assert_close(
        *(load_file(tmp_path / f"adapters/{name}/adapter_model.safetensors") for name in ("one", "several")),
        rtol=0,
        atol=2e-4,
    )
    assert sorted(path.name for path in (tmp_path / "adapters").iterdir()) == ["one", "several"]


@pytest.mark.slow
def test_interrupted_and_resumed_with_dropout_it_ends_as_if_nothing_had_been(write_run, receipt, tmp_path):
    training = STEPS | {"max_steps": 300, "save_every": 1000}
    lora = {"rank": 4, "alpha": 8, "dropout": 0.2}
    torchrun(write_run(name="whole", training=training, lora=lora))
    run = write_run(name="parts", training=training, lora=lora)
    with start(run) as process:
        for line in process.stdout:
            if line.startswith("step 5/"):
                process.send_signal(signal.SIGINT)
                break
        process.communicate(timeout=120)
    assert json.loads((tmp_path / "adapters/parts/.checkpoint/progress.json").read_text())["step"] < 300
    torchrun(run, "--resume")
    assert receipt("parts")["losses"] == pytest.approx(receipt("whole")["losses"], abs=1e-6)


@pytest.mark.slow
def test_a_mistake_is_told_once(write_run):
    _, err = torchrun(write_run(), "data.train=no-such.jsonl", exit_code=2)
    assert err.count("error: no-such.jsonl") == 1


@pytest.mark.slow
@pytest.mark.slow
def test_a_base_on_several_devices_is_not_shared_out(write_run, base_folder):
    base = {"model": str(base_folder), "quantization": "none", "dtype": "float32", "device_map": {"": "cpu"}}
    _, err = torchrun(write_run(base=base), exit_code=2)
    assert err.count("error: base.device_map") == 1


def test_a_launcher_that_starts_one_process_for_two_is_told_of(write_run):
    """`accelerate launch --cpu --num_processes 2` runs one, in silence: the run took twice the time expected."""
    launcher = ["accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    _, err = torchrun(write_run(), launcher=launcher, exit_code=2)
    assert "accelerate launch was asked for several processes and started one" in err and "torchrun" in err


def test_data_parallel_is_refused_with_the_reason(write_run, train):
    result = train(write_run(), "data_parallel=true", exit_code=2)
    assert "GPU 0" in result.stderr and "torchrun" in result.stderr
