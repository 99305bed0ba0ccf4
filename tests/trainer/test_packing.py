"""Packing: several examples in a row, with the loss and the gradients of rows of their own."""

import io
import math
import signal

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tiny import make_base

from loraplex_server.engine.model import load_base
from loraplex_server.engine.upstream import quiet
from loraplex_trainer.adapter import attach_adapter, trainable_parameters
from loraplex_trainer.data import make_batch
from loraplex_trainer.encoding import Example
from loraplex_trainer.errors import ConfigError, Interrupted
from loraplex_trainer.loop import loss_sum
from loraplex_trainer.packing import pack, prepare_packing
from loraplex_trainer.run import train as run_training
from loraplex_trainer.run_file import load_config
from loraplex_trainer.sections import LoraSection


def examples(count: int, seed: int = 0, longest: int = 40) -> list[Example]:
    """Of 4 to `longest` tokens; some with two spans."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for at in range(count):
        length = 4 + int(torch.randint(longest - 3, (1,), generator=generator))
        ids = tuple(torch.randint(1, 300, (length,), generator=generator).tolist())
        middle = 1 + int(torch.randint(length - 2, (1,), generator=generator))
        made.append(Example(ids, ((1, 2), (middle + 1, length)) if at % 3 == 0 and middle > 1 else ((middle, length),)))
    return made


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen2-window", "gpt2", "bloom-heads", "gemma3_text"])
def model(request, tmp_path_factory):
    quiet()
    folder = make_base(tmp_path_factory.mktemp(request.param), request.param)
    base = load_base(str(folder), quantization="none", device="cpu", dtype="float32")
    torch.manual_seed(1)
    model = attach_adapter(base, LoraSection(rank=4))
    with torch.no_grad():  # an adapter that already does something, so that every gradient is there
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    prepare_packing(model)
    return model.eval()  # without gpt2's own dropout, which no two passes share


def loss_and_gradients(model, batches: list[list[Example]]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    total = sum(loss_sum(model, make_batch(rows, pad_id=0)) for rows in batches)
    total.backward()
    return total.item(), {name: parameter.grad.clone() for name, parameter in trainable_parameters(model).items()}


def test_packed_loss_and_gradients_are_the_unpacked_ones(model):
    """One row an example, without padding, is the reference; packed rows of different fill are padded together."""
    alone = examples(12)
    rows = pack(alone, 64, seed=3)
    assert len(rows) < 12 and max(len(row.starts) for row in rows) > 2
    expected, reference = loss_and_gradients(model, [[example] for example in alone])
    assert expected / sum(example.answer_tokens for example in alone) > 1
    for batches in ([list(rows)], [[row] for row in rows]):
        loss, gradients = loss_and_gradients(model, batches)
        assert loss == pytest.approx(expected, rel=1e-6)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, reference[name], rtol=1e-4, atol=1e-5)


def test_an_example_does_not_see_the_one_before_it(model):
    """The trap: with an attention mask, or with a cache, logits differ by about 1 and nothing says so."""
    first, other, last = examples(3, seed=5)
    with torch.no_grad():
        losses = [
            loss_sum(model, make_batch(pack([Example(one.ids, ((1, 2),)), last], 200, seed=0), pad_id=0)).item()
            - loss_sum(model, make_batch([Example(one.ids, ((1, 2),))], pad_id=0)).item()
            for one in (first, other)
        ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


@pytest.mark.parametrize("family", ["jamba", "falcon", "opt"])
def test_a_model_in_which_examples_would_see_each_other_is_refused(tmp_path, family):
    """Jamba's state runs through the whole row, Falcon's ALiBi knows no positions, OPT counts its own."""
    base = load_base(str(make_base(tmp_path / "base", family)), quantization="none", device="cpu", dtype="float32")
    model = attach_adapter(base, LoraSection(rank=4))
    with pytest.raises(ConfigError, match=rf"data\.packing.*'{family}'.*see each other"):
        prepare_packing(model)
    assert model.training


def test_rows_are_filled_well_and_nothing_is_lost():
    lengths = examples(2000, longest=300)
    rows = pack(lengths, 512, seed=1)
    tokens = sum(len(example.ids) for example in lengths)
    assert len(rows) <= math.ceil(tokens / 512) * 1.01
    assert all(len(row.ids) <= 512 for row in rows)
    parts = [
        row.ids[start:stop]
        for row in rows
        for start, stop in zip(row.starts, (*row.starts[1:], len(row.ids)), strict=True)
    ]
    assert sorted(parts) == sorted(example.ids for example in lengths)
    assert sum(row.answer_tokens for row in rows) == sum(example.answer_tokens for example in lengths)


def test_a_seed_gives_the_same_rows_and_another_one_others():
    some = examples(200)
    assert pack(some, 64, seed=1) == pack(some, 64, seed=1) != pack(some, 64, seed=2)


STEPS = {"max_steps": 6, "batch_size": 2, "learning_rate": 1e-2, "log_every_steps": 1, "save_every": 3}


def test_a_packed_run_has_the_losses_of_one_that_is_not(write_run, train, receipt):
    """All 48 examples in one step: the packed rows' loss is the unpacked one's, and so is the adapter after it."""
    for name, packing in (("plain", False), ("packed", True)):
        steps = STEPS | {"batch_size": 48, "max_steps": 2}
        result = train(write_run(name=name, data__packing=packing, training=steps))
        assert ("48 examples in " in result.stdout) is packing
    plain, packed = (receipt(name)["losses"] for name in ("plain", "packed"))
    assert packed == pytest.approx(plain, abs=1e-4) and packed["train_last"] < packed["train_first"]


def test_a_packed_run_goes_on_as_if_nothing_had_been(write_run, tmp_path):
    class Trip(io.StringIO):
        def write(self, text: str) -> int:
            if text.startswith("step 4/"):
                signal.raise_signal(signal.SIGINT)
            return super().write(text)

    whole = run_training(
        load_config(write_run(name="whole", data__packing=True, training=STEPS)),
        resume=False,
        console=Console(file=io.StringIO()),
    )
    config = load_config(write_run(name="parts", data__packing=True, training=STEPS))
    with pytest.raises(Interrupted):
        run_training(config, resume=False, console=Console(file=Trip()))
    parts = run_training(config, resume=True, console=Console(file=io.StringIO()))
    weights = [load_file(folder / "adapter_model.safetensors") for folder in (whole, parts)]
    torch.testing.assert_close(*weights, rtol=0, atol=1e-6)
