"""Processes that share out weights, gradients and optimizer state train what one process does.

The slow tests start two, with torchrun and gloo on the CPU; those of ZeRO need DeepSpeed (the extra `deepspeed`).
"""

import json
import re
import shutil
import signal
import sys
from importlib.util import find_spec

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close
from trainer.test_team import STEPS, start, torchrun

from loraplex_trainer.encoding import Example
from loraplex_trainer.sharding import ShardedTeam

needs_deepspeed = pytest.mark.skipif(
    not (find_spec("deepspeed") and shutil.which("c++")),
    reason="scripts/test --all, or: pip install -c constraints.txt 'loraplex[deepspeed]'; apt-get install g++",
)
ZERO = [pytest.param(f"zero{stage}", marks=needs_deepspeed) for stage in (1, 2, 3)]
# Shares of a step differ, and gradients are really clipped; adamw's decay and the schedule are in it too.
TRAINING = STEPS | {"max_steps": 6, "batch_size": 3, "max_grad_norm": 0.05, "weight_decay": 0.1}


def assert_same_adapter(tmp_path, one: str, other: str, atol: float = 2e-4) -> None:
    weights = [load_file(tmp_path / f"adapters/{name}/adapter_model.safetensors") for name in (one, other)]
    assert_close(*weights, rtol=0, atol=atol)
    configs = [(tmp_path / f"adapters/{name}/adapter_config.json").read_text() for name in (one, other)]
    assert configs[0] == configs[1]


def test_every_process_computes_as_often_as_the_others():
    """A forward is an exchange: a process with one part too few would leave the others waiting for ever."""
    for count in (1, 2, 3, 5, 9, 12):
        examples = [Example(tuple(range(3 + i)), ((1, 2),)) for i in range(count)]
        for size, batch in ((2, 4), (2, 1), (3, 2), (4, 3)):
            parts = [ShardedTeam(rank, size).parts(examples, batch) for rank in range(size)]
            assert len({len(mine) for mine in parts}) == 1
            assert all([part.is_last for part in mine] == [False] * (len(mine) - 1) + [True] for mine in parts)
            counted = [example for mine in parts for part in mine if part.counts for example in part.examples]
            assert sorted(counted, key=lambda example: len(example.ids)) == examples


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["strategy=fsdp"], ["training.distributed.strategy", "'fsdp'", "torchrun"]),
        (["strategy=zero4"], ["training.distributed.strategy", "zero4", "'zero3'"]),
        (["offload=cpu"], ["training.distributed.offload", "'ddp'", "zero3"]),
        (["offload=disk", "strategy=fsdp"], ["training.distributed.offload", "disk", "'cpu'"]),
    ],
)
def test_what_cannot_be_shared_out_is_refused(write_run, train, overrides, words):
    result = train(write_run(), *(f"training.distributed.{override}" for override in overrides), exit_code=2)
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert all(word in result.stderr for word in words), result.stderr


def test_an_optimizer_whose_state_cannot_be_cut_is_refused(write_run, train):
    result = train(write_run(training__optimizer="adamw_8bit"), "fsdp=full_shard", exit_code=2)
    assert "training.optimizer: 'adamw_8bit'" in result.stderr and "adamw or sgd" in result.stderr


@pytest.mark.parametrize("override", ["lora.dora=true", "base.quantization=int8", "base.device_map=auto"])
def test_what_is_not_shared_out_is_refused(write_run, train, override):
    result = train(write_run(base__device="auto"), override, "fsdp=full_shard", exit_code=2)
    assert override.partition("=")[0] in result.stderr and "'fsdp'" in result.stderr


def test_deepspeed_that_is_not_there_is_asked_for(write_run, train, monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    result = train(write_run(), "training.distributed.strategy=zero2", exit_code=2)
    assert "pip install 'loraplex[deepspeed]'" in result.stderr


def test_an_accelerate_that_was_told_something_else_is_refused(write_run, train, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    result = train(write_run(), exit_code=2)
    assert "'ddp'" in result.stderr and "FSDP" in result.stderr and "run file" in result.stderr


def test_the_preflight_says_what_is_shared_out(write_run, train):
    result = train(write_run(), "training.distributed.strategy=fsdp", "--check", "--no-timing")
    assert "fsdp: of this the processes share out, each its part: base, adapter, gradients, optimizer" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("quantization", "offload"), [("none", "none"), ("nf4", "cpu")])
@pytest.mark.parametrize("strategy", ["fsdp", *ZERO])
def test_the_loss_is_that_of_one_process(
    strategy, quantization, offload, write_run, train, receipt, tmp_path, base_folder
):
    """With the loss measured on the way and the best step kept; each process holds half of what is shared out."""
    base = {"model": str(base_folder), "quantization": quantization, "dtype": "float32", "device": "cpu"}
    training = TRAINING | {"evaluate_every": 2, "keep": "best"}
    train(write_run(name="one", base=base, training=training))
    shared = training | {"distributed": {"strategy": strategy, "offload": offload}}
    out, _ = torchrun(write_run(name="several", base=base, training=shared))
    one, several = receipt("one"), receipt("several")
    assert several["processes"] == 2 and bool(several["versions"].get("deepspeed")) == (strategy != "fsdp")
    assert one["losses"]["train_last"] < one["losses"]["train_first"] - 0.1
    assert several["losses"] == pytest.approx(one["losses"], abs=2e-5)
    assert several["kept_step"] == one["kept_step"]
    for ours, theirs in zip(several["evaluations"], one["evaluations"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=2e-5)
    assert_same_adapter(tmp_path, "one", "several")
    told = re.search(r"about ([\d,]+) of the ([\d,]+) bytes", out)
    held, whole = (int(number.replace(",", "")) for number in told.groups())
    # DeepSpeed leaves small weights whole, which much of this small adapter is.
    assert held < {"fsdp": 0.51, "zero3": 0.65}.get(strategy, 1.01) * whole


@pytest.mark.slow
def test_a_run_goes_on_with_another_strategy_and_number_of_processes(write_run, train, receipt, tmp_path):
    """Stopped and resumed again and again, it ends as if nothing had been: the optimizer's state goes along."""
    training = TRAINING | {"max_steps": 100, "batch_size": 8, "accumulation_steps": 1}
    train(write_run(name="one", training=training))
    ways = ["fsdp", "zero3", "zero2", "fsdp"] if find_spec("deepspeed") else ["fsdp", "ddp", "fsdp"]
    for number, strategy in enumerate(ways):
        run = write_run(name="parts", training=training | {"distributed": {"strategy": strategy}})
        is_last = number == len(ways) - 1
        with start(run, *(["--resume"] if number else []), processes=3 if number == 2 else 2) as process:
            steps = 0
            for line in process.stdout:
                steps += line.startswith("step ")
                if steps == 3 and not is_last:
                    process.send_signal(signal.SIGINT)
                    break
            _, err = process.communicate(timeout=300)
        assert process.returncode == 0 if is_last else "interrupted at step" in err, err
    assert receipt("parts")["losses"] == pytest.approx(receipt("one")["losses"], abs=1e-3)


@pytest.mark.slow
@needs_deepspeed
def test_a_deepspeed_file_is_taken_as_it_is(write_run, train, receipt, tmp_path):
    """The one that large language models were first trained with here, its sizes apart."""
    (tmp_path / "zero.json").write_text(json.dumps(JSON))
    training = {"max_steps": 4, "max_grad_norm": None, "log_every_steps": 1}
    same = training | {"batch_size": 4, "accumulation_steps": 2, "learning_rate": 1e-3, "weight_decay": 3e-7}
    train(write_run(name="one", training=same | {"betas": [0.8, 0.999]}))
    run = write_run(name="several", training=training | {"distributed": {"deepspeed": str(tmp_path / "zero.json")}})
    out, _ = torchrun(run)
    assert "gradient_accumulation_steps: 1, in each of 2 processes -> training.accumulation_steps: 2" in out
    assert receipt("several")["losses"] == pytest.approx(receipt("one")["losses"], abs=2e-5)
    assert_same_adapter(tmp_path, "one", "several")


JSON = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 1,
    "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "betas": [0.8, 0.999], "eps": 1e-8, "weight_decay": 3e-7}},
    "zero_optimization": {
        "stage": 1,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "overlap_comm": False,
        "contiguous_gradients": False,
    },
}
