"""A 4-bit layer gives the same whichever way it goes: fused for few rows, dequantized for many."""

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, has_avx512bf16
from bitsandbytes.nn.modules import Linear4bit

from loraplex_server.engine.config import EngineConfig
from loraplex_server.engine.engine import Engine
from loraplex_server.engine.model import load_base
from loraplex_server.engine.quantized import FUSED_ROWS

needs_fused_kernel = pytest.mark.skipif(not has_avx512bf16(), reason="needs a CPU with AVX-512 BF16")


def first_layer(base) -> Linear4bit:
    return next(layer for layer in base.model.modules() if isinstance(layer, Linear4bit))


@needs_fused_kernel
@pytest.mark.parametrize("rows", [1, FUSED_ROWS, FUSED_ROWS + 1, 40])
@torch.no_grad()
def test_both_ways_give_the_product_with_the_dequantized_weight(base_folder, rows):
    base = load_base(str(base_folder), device="cpu")
    layer = first_layer(base)
    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    Engine(base)
    x = torch.randn(1, rows, layer.in_features, dtype=base.dtype, generator=torch.Generator().manual_seed(rows))
    out = layer(x)
    assert (out.dtype, out.shape) == (base.dtype, (1, rows, layer.out_features))
    expected = x.float() @ weight.T
    # bfloat16 in and out, and scales rounded to it in the fused kernel: 8 bits of mantissa.
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=0.02 * float(expected.abs().max()))


@needs_fused_kernel
@torch.no_grad()
def test_few_rows_go_the_fused_way_and_lean_goes_it_always(base_folder):
    for config, rows, packed in (
        (EngineConfig(), FUSED_ROWS, True),
        (EngineConfig(), FUSED_ROWS + 1, False),
        (EngineConfig(lean=True), 40, True),
    ):
        base = load_base(str(base_folder), device="cpu")
        Engine(base, config)
        layer = first_layer(base)
        layer(torch.ones(1, rows, layer.in_features, dtype=base.dtype))
        assert getattr(layer.weight.quant_state, "packing_format_for_cpu", False) == packed, (config.lean, rows)
