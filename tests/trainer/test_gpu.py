"""Training on CUDA devices: the CPU's losses are the oracle. Run with `pytest -m gpu`; no GPU has run it yet.

Nothing here is of a GPU alone: with a `device` that says "cpu" all of it runs, and must pass.
"""

import pytest
import torch
from trainer.test_optimizing import WIDE, interrupt_and_go_on
from trainer.test_team import torchrun

pytestmark = pytest.mark.gpu
STEPS = {"max_steps": 6, "batch_size": 8, "learning_rate": 1e-2, "log_every_steps": 1}
# A GPU may add in another order each time, and rounds a few weights to the code beside the CPU's.
AGAIN, OTHERWISE = 1e-3, {"float32": 5e-3, "bfloat16": 5e-2, "float16": 5e-2}


@pytest.fixture
def device() -> str:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return "cuda"


@pytest.fixture
def devices(device) -> str:
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    return device


@pytest.fixture
def losses(write_run, train, receipt, base_folder):
    """What a run's receipt says of its losses; a run is named by where, and on what it is."""

    def of(name: str, device: str, quantization: str = "none", dtype: str = "float32", **changes) -> dict[str, float]:
        base = {"model": str(base_folder), "quantization": quantization, "dtype": dtype, "device": device}
        train(write_run(name=name, base=base, **{"training": STEPS, **changes}))
        written = receipt(name)
        assert (written["hardware"]["gpu"] is not None) == torch.cuda.is_available()
        assert written["losses"]["train_last"] < written["losses"]["train_first"] - 0.2
        return written["losses"]

    return of


@pytest.mark.parametrize("dtype", OTHERWISE)
@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8", "none"])
def test_the_losses_are_those_of_the_cpu(losses, device, quantization, dtype):
    """float16 too: gradients of a mean over many tokens are too small for it."""
    reference = losses("cpu", "cpu", quantization)
    assert losses("device", device, quantization, dtype) == pytest.approx(reference, abs=OTHERWISE[dtype])


def test_packed_losses_are_the_unpacked_ones(losses, device, settings):
    """The kernels of attention are others than the CPU's, and so is what they make of positions that begin anew."""
    whole = {"training": STEPS | {"batch_size": 48, "max_steps": 4}}
    found = [
        losses("packed" if packing else "rows", device, data=settings["data"] | {"packing": packing}, **whole)
        for packing in (False, True)
    ]
    assert found[1] == pytest.approx(found[0], abs=AGAIN)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_activations_computed_again_are_those_that_were_kept(losses, device, quantization):
    """With dropout, whose random numbers are the device's own."""
    lora = {"rank": 4, "alpha": 8, "dropout": 0.2}
    kept = losses("kept", device, quantization, lora=lora)
    again = losses("again", device, quantization, lora=lora, training=STEPS | {"gradient_checkpointing": True})
    assert again == pytest.approx(kept, abs=AGAIN)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"])
def test_every_optimizer_learns_and_goes_on(losses, write_run, receipt, device, optimizer, base_folder):
    """Its state, and the random numbers of dropout, come back to the device; paged state to what can be paged out."""
    training = STEPS | {"max_steps": 12, "learning_rate": 1e-3, "optimizer": optimizer, "save_every": 1000}
    whole = losses("whole", device, lora=WIDE, training=training)
    base = {"model": str(base_folder), "quantization": "none", "dtype": "float32", "device": device}
    interrupt_and_go_on(write_run(name="parts", base=base, lora=WIDE, training=training), step=5)
    assert receipt("parts")["losses"] == pytest.approx(whole, abs=AGAIN)


def test_the_engine_scores_it_there(losses, receipt, device):
    """After the training, on a base loaded anew, with kernels and graphs of the server's."""
    evaluation = {"metric": "exact_match", "general": "none", "samples": 1, "goldens": 2}
    trained = losses("scored", device, "nf4", "bfloat16", evaluation=evaluation)
    written = receipt("scored")
    assert written["metrics"]["heldout_loss"] == pytest.approx(trained["heldout"], abs=OTHERWISE["bfloat16"])
    assert written["not_served"] is None and len(written["goldens"]) == 2


@pytest.mark.parametrize("place", ["auto", "balanced"])
def test_a_base_spread_over_gpus_has_the_losses_of_one(losses, write_run, train, receipt, devices, place, base_folder):
    base = {"model": str(base_folder), "quantization": "nf4", "dtype": "float32", "device_map": place}
    train(write_run(name="spread", base=base, training=STEPS))
    assert receipt("spread")["losses"] == pytest.approx(losses("one", devices, "nf4"), abs=AGAIN)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_have_the_losses_of_one(losses, write_run, receipt, devices, strategy, base_folder):
    """By nccl; each process has a GPU of its own."""
    base = {"model": str(base_folder), "quantization": "nf4", "dtype": "float32", "device": devices}
    torchrun(write_run(name="two", base=base, training=STEPS | {"distributed": {"strategy": strategy}}))
    assert receipt("two")["losses"] == pytest.approx(losses("one", devices, "nf4"), abs=AGAIN)
