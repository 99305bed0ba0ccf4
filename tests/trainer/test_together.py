"""Several adapters on one base: in one batch, each gets what a pass of its own gives it, and becomes what it would."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, LlamaConfig, MistralConfig

from loraplex_server.engine.model import load_base
from loraplex_server.kernels.native import native
from loraplex_trainer.adapter import attach_adapter
from loraplex_trainer.config import RunConfig
from loraplex_trainer.data import make_batch
from loraplex_trainer.encoding import Example
from loraplex_trainer.errors import ConfigError
from loraplex_trainer.fast import use_kernels
from loraplex_trainer.loop import Loop, loss_sum
from loraplex_trainer.packing import joined, prepare_packing
from loraplex_trainer.together import Member, share, train_together

LORAS = (
    {"rank": 4, "alpha": 8},
    {"rank": 12, "alpha": 8, "rslora": True, "target_modules": ("q_proj", "down_proj")},
    {"rank": 3, "alpha": 16, "target_modules": ("v_proj", "up_proj", "o_proj")},
)
DTYPES = [
    pytest.param("float32", id="torch"),
    pytest.param(
        "bfloat16",
        id="kernels",
        marks=pytest.mark.skipif(not native(), reason=f"{native().why_not}; gcc comes with: apt-get install gcc"),
    ),
]


def config(number, lora=None, packing=False, **training) -> RunConfig:
    settings = {"max_steps": 5, "batch_size": 3, "learning_rate": 1e-2, "seed": number}
    return RunConfig.model_validate(
        {
            "name": f"run-{number}",
            "base": {"model": "none"},
            "data": {"train": Path("none"), "packing": packing},
            "lora": LORAS[number] | (lora or {}),
            "training": settings | training,
        }
    )


def examples(number, count=7, packed=False) -> list[Example]:
    """Of other lengths for each run."""
    random = torch.Generator().manual_seed(number)
    sizes = torch.randint(6, 8 + 9 * number, (count,), generator=random).tolist()
    made = [Example(tuple(torch.randint(2, 300, (n,), generator=random).tolist()), ((n // 2, n),)) for n in sizes]
    return [joined(made[i : i + 2]) for i in range(0, count, 2)] if packed else made


def alone(base_folder, dtype, run: RunConfig, rows) -> Loop:
    base = load_base(str(base_folder), device="cpu", dtype=dtype)
    torch.manual_seed(run.training.seed)
    model = attach_adapter(base, run.lora)
    assert bool(use_kernels(model)) == (dtype == "bfloat16")
    return Loop(model, rows, run, 0)


def together(base_folder, dtype, runs, rows, ragged=True):
    base = load_base(str(base_folder), device="cpu", dtype=dtype)
    shared = share(base, runs)
    if shared.ragged and not ragged:
        shared.model.get_base_model().set_attn_implementation("sdpa")
        shared = replace(shared, ragged=None)
    assert bool(shared.ragged) == ragged
    loops = [
        Loop(shared.model, mine, run, 0, adapter=name, generators=shared.generators[name])
        for (name, run, mine) in zip(shared.generators, runs, rows, strict=True)
    ]
    return shared, loops


def with_b(loop: Loop) -> Loop:
    """B begins at zero, so A would have no gradient."""
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in loop.parameters.items():
            if "lora_B" in name:
                parameter.normal_(std=0.05, generator=random)
    return loop


def compare(found: dict, expected: dict, bits: bool, close: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        tensor = tensor.detach()
        if bits:
            assert torch.equal(found[name], tensor), name
        else:
            torch.testing.assert_close(found[name].detach(), tensor, rtol=0, atol=close * float(tensor.abs().max()))


def check_gradients(base_folder, dtype, bits: bool, ragged=True, packed=False) -> None:
    """Of one batch of three runs against a pass of each, on a base of its own."""
    runs = [config(number, packing=packed and number != 1) for number in range(3)]
    rows = [examples(number, packed=runs[number].data.packing) for number in range(3)]
    shared, loops = together(base_folder, dtype, runs, rows, ragged)
    shared.model.train()
    batches = [(with_b(loop).adapter, make_batch(mine, 0)) for loop, mine in zip(loops, rows, strict=True)]
    with shared.losses(batches, 0) as losses:
        torch.stack([loss * (number + 1) for number, loss in enumerate(losses)]).sum().backward()
    for number, (loop, mine) in enumerate(zip(loops, rows, strict=True)):
        separate = with_b(alone(base_folder, dtype, runs[number], mine))
        if packed:
            prepare_packing(separate.model)
        separate.model.train()
        loss = loss_sum(separate.model, make_batch(mine, 0))
        (loss * (number + 1)).backward()
        assert losses[number].item() == pytest.approx(loss.item(), rel=1e-6 if dtype == "float32" else 1e-4)
        found, expected = ({n: p.grad for n, p in run.parameters.items()} for run in (loop, separate))
        compare(found, expected, bits, 0.03 if dtype == "bfloat16" else 1e-5)


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("ragged", [True, False], ids=["ragged", "padded"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_a_mixed_batch_are_those_of_separate_passes(base_folder, dtype, ragged, packed):
    """By kernels a token's result is the same bits in any company, and a run's rows keep their shape when ragged.

    Other products add up in an order that goes by the batch's size, which is a few of float32's roundings; rows that
    are padded further also meet other shapes in attention, which is in bfloat16 there.
    """
    check_gradients(base_folder, dtype, dtype == "bfloat16" and ragged, ragged, packed)


SIZES = {"vocab_size": 384, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
OTHERS = {
    "attention by kernels": LlamaConfig(**SIZES, num_attention_heads=2, num_key_value_heads=1),
    "a window of 8 tokens": MistralConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2, sliding_window=8),
    "no attention to be asked in parts": BloomConfig(vocab_size=384, hidden_size=64, n_layer=2, n_head=4),
}


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_on_other_bases(base_folder, tmp_path, monkeypatch, dtype, name, packed):
    for file in base_folder.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(OTHERS[name]).save_pretrained(tmp_path)
    if ragged := not name.startswith("no "):
        check_gradients(tmp_path, dtype, dtype == "bfloat16", packed=packed)
    else:
        targets = ("all-linear", ("query_key_value",), ("dense", "dense_4h_to_h"))
        loras = tuple({**lora, "target_modules": wanted} for lora, wanted in zip(LORAS, targets, strict=True))
        monkeypatch.setitem(globals(), "LORAS", loras)
        check_gradients(tmp_path, dtype, bits=False, ragged=ragged, packed=packed)


@pytest.mark.parametrize("dtype", [*DTYPES, "float16"])
def test_runs_together_become_what_each_becomes_alone(base_folder, dtype):
    """Of other lengths, steps, batches and optimizers: one is over earlier, one takes a step in pieces.

    Without kernels with dropout too, drawn as alone; kernels are tried out with it before a run alone begins.
    """
    runs = [
        config(0, max_steps=3, accumulation_steps=2, batch_size=2),
        config(1, optimizer="adamw_8bit", learning_rate=3e-3, max_grad_norm=0.1),
        config(
            2, {"dropout": 0.0 if dtype == "bfloat16" else 0.5}, batch_size=4, schedule="constant", weight_decay=0.1
        ),
    ]
    rows = [examples(number) for number in range(3)]
    shared, loops = together(base_folder, dtype, runs, rows)
    taken = []
    train_together(shared, [Member(loop, lambda loop: bool(taken.append(loop.adapter))) for loop in loops])
    assert taken == ["run0", "run1", "run2"] * 3 + ["run1", "run2"] * 2
    for run, mine, loop in zip(runs, rows, loops, strict=True):
        separate = alone(base_folder, dtype, run, mine)
        separate.run(lambda _: False)
        assert loop.losses == pytest.approx(separate.losses, rel=1e-3 if dtype == "float16" else 1e-5)
        assert (loop.step, loop.tokens_done) == (separate.step, separate.tokens_done)
        compare(
            loop.parameters, separate.parameters, bits=dtype == "bfloat16", close=0.03 if dtype == "float16" else 1e-3
        )


def test_what_a_run_is_measured_by_is_its_own_adapter(base_folder):
    runs, rows = [config(number) for number in range(2)], [examples(number) for number in range(2)]
    shared, loops = together(base_folder, "float32", runs, rows)

    def after_step(loop: Loop) -> bool:
        if loop.step == 2:
            loop.measure(rows[1])
        return False

    train_together(shared, [Member(loop, after_step) for loop in loops])
    for run, mine, loop in zip(runs, rows, loops, strict=True):
        separate = alone(base_folder, "float32", run, mine)
        separate.run(after_step)
        assert loop.evaluations == [(2, pytest.approx(separate.evaluations[0][1], rel=1e-5))]
    assert loops[0].evaluations != loops[1].evaluations


def test_a_run_that_fails_leaves_the_others_at_work(base_folder):
    runs, rows = [config(number) for number in range(3)], [examples(number) for number in range(3)]
    shared, loops = together(base_folder, "float32", runs, rows)

    def after_step(loop: Loop) -> bool:
        loop.read_losses()
        if loop.adapter == "run1" and loop.step == 2:
            with torch.no_grad():
                next(iter(loop.parameters.values())).fill_(float("nan"))
        return False

    members = [Member(loop, after_step) for loop in loops]
    train_together(shared, members)
    assert [type(member.error).__name__ for member in members] == ["NoneType", "NotFinite", "NoneType"]
    assert [loop.step for loop in loops] == [5, 3, 5]
    separate = alone(base_folder, "float32", runs[2], rows[2])
    separate.run(lambda _: False)
    compare(loops[2].parameters, separate.parameters, bits=False, close=1e-3)


def test_a_layer_that_is_given_other_tokens_is_refused(base_folder):
    runs = [config(0), config(1, {"target_modules": ("lm_head",)})]
    shared, loops = together(base_folder, "float32", runs, [examples(0), examples(1)])
    with pytest.raises(ConfigError, match=r"a layer of the base is given .* tokens: several adapters cannot"):
        train_together(shared, [Member(loop, lambda _: False) for loop in loops])
