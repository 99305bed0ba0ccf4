"""The Triton LoRA kernels, run by Triton's interpreter on the CPU, against the formula written in torch.

The interpreter runs the same source as a GPU would, without its compiler: it proves arithmetic, masks and pointers, not
speed, and not that a GPU's compiler takes it. With a CUDA device the same tests run there.
"""

import os
import subprocess
import sys

import pytest
import torch

from loraplex_server.engine.lora_table import LoraTable
from loraplex_server.engine.triton_lora import BLOCKED_TOKENS, add_lora

pytest.importorskip("triton", reason="pip install 'loraplex[kernels]'; scripts/test does")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on which tests/conftest.py asks for the interpreter

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RANKS = [1, 4, 16, 17, 64, 100, 256]


@pytest.fixture(autouse=True)
def unwritten_memory_is_nan():
    """So that a kernel which reads what none has written is caught; torch fills it so in this mode."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Layer:
    """A LoRA layer with adapters in some of its slots, the weights kept as tensors beside the table."""

    def __init__(self, inputs: int, outputs: int, ranks: list[int], dtype: torch.dtype, seed: int = 0) -> None:
        random = torch.Generator().manual_seed(seed)
        self.inputs, self.outputs = inputs, outputs
        draw = lambda *shape: torch.randn(*shape, generator=random).to(dtype).to(DEVICE)  # noqa: E731
        self.weights = [(draw(r, inputs), draw(outputs, r)) if r else None for r in ranks]
        self.scalings = [0.5 + 0.25 * slot for slot in range(len(ranks))]
        self.table = LoraTable(
            a=torch.tensor([w[0].data_ptr() if w else 0 for w in self.weights], device=DEVICE),
            b=torch.tensor([w[1].data_ptr() if w else 0 for w in self.weights], device=DEVICE),
            rank=torch.tensor(ranks, dtype=torch.int32, device=DEVICE),
            scaling=torch.tensor(self.scalings, device=DEVICE),
            dtype=dtype,
            max_rank=max(ranks),
        )

    def expected(self, out: torch.Tensor, x: torch.Tensor, slots: list[int]) -> torch.Tensor:
        """The formula, token by token, in float64."""
        result = out.double()
        for token, slot in enumerate(slots):
            if slot >= 0 and (weights := self.weights[slot]):
                a, b = weights
                result[token] += self.scalings[slot] * (b.double() @ (a.double() @ x[token].double()))
        return result

    def assert_added(self, slots: list[int], dtype: torch.dtype, seed: int = 1) -> None:
        """The kernels add what the formula does, and nothing where no adapter is."""
        random = torch.Generator().manual_seed(seed)
        x = torch.randn(len(slots), self.inputs, generator=random).to(dtype).to(DEVICE)
        out = torch.randn(len(slots), self.outputs, generator=random).to(dtype).to(DEVICE)
        expected, before = self.expected(out, x, slots), out.clone()
        add_lora(out, x, torch.tensor(slots, dtype=torch.int32, device=DEVICE), self.table)
        assert_close(out, expected)
        for token, slot in enumerate(slots):
            changed = slot >= 0 and self.weights[slot] is not None
            assert torch.equal(out[token], before[token]) != changed, (token, slot)


def assert_close(out: torch.Tensor, expected: torch.Tensor) -> None:
    """Sums are in float32; what is left is the rounding of the result to its own dtype: half a step, here one."""
    step = torch.finfo(out.dtype).eps
    size = float(expected.abs().max())
    torch.testing.assert_close(out.double(), expected, rtol=step, atol=max(1e-5, step * 0.01) * size)


def spread(tokens: int, slots: int, seed: int = 2) -> list[int]:
    """Slots in no order, -1 among them."""
    return (torch.randint(0, slots + 1, (tokens,), generator=torch.Generator().manual_seed(seed)) - 1).tolist()


@pytest.mark.parametrize("tokens", [1, 2, 37, BLOCKED_TOKENS - 1, BLOCKED_TOKENS, BLOCKED_TOKENS + 9])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_ranks_empty_slots_and_base_tokens(tokens, dtype):
    layer = Layer(96, 80, [*RANKS, 0], dtype)
    layer.assert_added(spread(tokens, len(RANKS) + 1), dtype)


@pytest.mark.parametrize("tokens", [5, BLOCKED_TOKENS + 5], ids=["single", "blocked"])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (65, 129), (130, 63), (2500, 70)])
def test_sizes_that_are_no_multiple_of_a_block(tokens, inputs, outputs):
    layer = Layer(inputs, outputs, [3, 0, 20], torch.float32)
    layer.assert_added(spread(tokens, 3), torch.float32)


def test_runs_of_tokens_as_a_prompt_has_them():
    layer = Layer(64, 64, [8, 16, 4], torch.bfloat16)
    layer.assert_added([-1] * 7 + [2] * 60 + [0] * 33 + [1] * 40 + [2] * 3, torch.bfloat16)


@pytest.mark.parametrize("tokens", [3, BLOCKED_TOKENS], ids=["single", "blocked"])
def test_tokens_of_the_base_alone_change_nothing(tokens):
    Layer(64, 64, [8], torch.float32).assert_added([-1] * tokens, torch.float32)


@pytest.mark.parametrize("tokens", [6, BLOCKED_TOKENS + 1], ids=["single", "blocked"])
def test_adapters_in_float32_under_a_model_in_bfloat16(tokens):
    layer = Layer(96, 80, [4, 64], torch.float32)
    layer.assert_added(spread(tokens, 2), torch.bfloat16)


@pytest.mark.parametrize("tokens", [4, BLOCKED_TOKENS + 2], ids=["single", "blocked"])
def test_rows_may_lie_apart_and_what_is_between_them_stays(tokens):
    """As when out is a part of a wider projection."""
    layer = Layer(48, 40, [5, 9], torch.float32)
    slots = spread(tokens, 2)
    wide_x, wide_out = torch.randn(tokens, 100, device=DEVICE), torch.randn(tokens, 90, device=DEVICE)
    x, out, untouched = wide_x[:, 30:78], wide_out[:, 20:60], wide_out.clone()
    expected = layer.expected(out, x, slots)
    add_lora(out, x, torch.tensor(slots, dtype=torch.int32, device=DEVICE), layer.table)
    assert_close(out, expected)
    assert torch.equal(wide_out[:, :20], untouched[:, :20]) and torch.equal(wide_out[:, 60:], untouched[:, 60:])


def test_a_token_gets_the_same_bits_whatever_is_beside_it():
    """Padding a step to the size of a graph must not move an answer."""
    layer = Layer(2500, 70, [3, 20], torch.float32)
    x = torch.randn(8, 2500, device=DEVICE)
    alone, padded = torch.zeros(3, 70, device=DEVICE), torch.zeros(8, 70, device=DEVICE)
    add_lora(alone, x[:3], torch.tensor([1, 0, 1], dtype=torch.int32, device=DEVICE), layer.table)
    add_lora(padded, x, torch.tensor([1, 0, 1, -1, -1, 0, -1, -1], dtype=torch.int32, device=DEVICE), layer.table)
    assert torch.equal(alone, padded[:3])


def test_a_table_changed_in_place_is_seen_by_the_next_call():
    """As when an adapter comes to a slot while a captured graph holds the table."""
    layer, other = Layer(32, 32, [4, 0], torch.float32), Layer(32, 32, [0, 4], torch.float32, seed=9)
    for name in ("a", "b", "rank", "scaling"):
        getattr(layer.table, name).copy_(getattr(other.table, name))
    layer.weights, layer.scalings = other.weights, other.scalings
    layer.assert_added([0, 1, -1], torch.float32)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda c: c | {"out": c["out"].t()}, "out has strides"),
        (lambda c: c | {"x": c["x"].t()}, "x has strides"),
        (lambda c: c | {"out": c["out"][:1].expand(8, 8)}, "do not overlap"),
        (lambda c: c | {"x": c["x"][None]}, r"\(tokens, features\)"),
        (lambda c: c | {"x": c["x"].double()}, "float64"),
        (lambda c: c | {"slots": c["slots"].long()}, "int32"),
        (lambda c: c | {"slots": c["slots"][:5]}, r"slots \(5,\)"),
        (lambda c: c | {"out": c["out"][:5]}, "out has 5 tokens"),
    ],
)
def test_what_the_kernels_cannot_take_is_refused(spoil, named):
    layer = Layer(8, 8, [2], torch.float32)
    call = {"out": torch.zeros(8, 8), "x": torch.zeros(8, 8), "slots": torch.zeros(8, dtype=torch.int32)}
    with pytest.raises(ValueError, match=named):
        add_lora(**spoil(call), table=layer.table)


def test_without_triton_the_module_imports_and_a_call_says_what_is_missing():
    code = """
import sys, torch
sys.modules["triton"] = None
from loraplex_server.engine.lora_table import LoraTable
from loraplex_server.engine.triton_lora import add_lora
one = torch.ones(1, dtype=torch.int32)
try:
    add_lora(torch.ones(1, 1), torch.ones(1, 1), one, LoraTable(one, one, one, one, torch.float32, 1))
except RuntimeError as error:
    assert "need Triton" in str(error), error
else:
    raise AssertionError("not refused")
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
