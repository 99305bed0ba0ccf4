"""A 4-bit layer gives the product with its dequantized weight, whichever way it goes."""

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, has_avx512bf16
from bitsandbytes.nn.modules import Linear4bit

from loraplex_server.engine.config import EngineConfig
from loraplex_server.engine.engine import Engine
from loraplex_server.engine.model import load_base
from loraplex_server.engine.quantized import FUSED_ROWS, choose_kernels
from loraplex_server.kernels.native import native

needs_fused_kernel = pytest.mark.skipif(not has_avx512bf16(), reason="needs a CPU with AVX-512 BF16")
needs_our_kernel = pytest.mark.skipif(not native(), reason=f"{native().why_not}; gcc comes with: apt-get install gcc")
OURS, THEIRS = EngineConfig(), EngineConfig(kernels=False)


def first_layer(base) -> Linear4bit:
    return next(layer for layer in base.model.modules() if isinstance(layer, Linear4bit))


@pytest.mark.parametrize("config", [pytest.param(OURS, marks=needs_our_kernel), THEIRS], ids=["ours", "theirs"])
@pytest.mark.parametrize("rows", [1, FUSED_ROWS, FUSED_ROWS + 1, 16, 40, 300])
@pytest.mark.parametrize("load", [{}, {"quantization": "fp4"}, {"double_quantization": False}], ids=str)
@needs_fused_kernel
@torch.no_grad()
def test_every_way_gives_the_product_with_the_dequantized_weight(base_folder, config, rows, load):
    base = load_base(str(base_folder), device="cpu", **load)
    layer = first_layer(base)
    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).bfloat16().float()
    Engine(base, config)
    assert (layer.weight.quant_state is None) == config.kernels
    x = torch.randn(1, rows, layer.in_features, dtype=base.dtype, generator=torch.Generator().manual_seed(rows))
    out = layer(x)
    assert (out.dtype, out.shape) == (base.dtype, (1, rows, layer.out_features))
    expected = x.float() @ weight.T
    # Ours has the dequantized weights bit for bit and rounds its sums once; bitsandbytes' rounds scales to 8 bits too.
    close = 2**-8 if config.kernels else 0.02
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=close * float(expected.abs().max()))


@needs_our_kernel
@torch.no_grad()
def test_in_our_kernel_a_row_gets_the_same_bits_in_any_company(base_folder):
    base = load_base(str(base_folder), device="cpu")
    Engine(base)
    layer = first_layer(base)
    x = torch.randn(200, layer.in_features, dtype=base.dtype, generator=torch.Generator().manual_seed(0))
    together = layer(x)
    for first, last in ((0, 1), (1, 3), (5, 8), (4, 8), (3, 8), (7, 19), (20, 36), (50, 67), (0, 130), (199, 200)):
        assert torch.equal(layer(x[first:last]), together[first:last])


@needs_our_kernel
@torch.no_grad()
def test_our_kernel_takes_more_inputs_and_rows_than_it_does_at_once():
    torch.manual_seed(0)
    layer = Linear4bit(4160, 96, compute_dtype=torch.bfloat16, quant_type="nf4").to("cpu")
    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).bfloat16().float()
    choose_kernels(torch.nn.Sequential(layer))
    assert layer.weight.quant_state is None
    x = torch.randn(300, 4160).bfloat16()
    out, expected = layer(x), x.float() @ weight.T + layer.bias.bfloat16().float()
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=2**-8 * float(expected.abs().max()))
    assert torch.equal(layer(x[130:135]), out[130:135])


@needs_our_kernel
def test_our_kernel_keeps_the_weights_once(base_folder):
    base = load_base(str(base_folder), device="cpu")
    before = [layer.weight.nbytes for layer in base.model.modules() if isinstance(layer, Linear4bit)]
    Engine(base)
    assert [layer.weight.nbytes for layer in base.model.modules() if isinstance(layer, Linear4bit)] == before


@needs_fused_kernel
@torch.no_grad()
def test_without_our_kernel_few_rows_go_the_fused_way_and_lean_goes_it_always(base_folder):
    for config, rows, packed in (
        (THEIRS, FUSED_ROWS, True),
        (THEIRS, FUSED_ROWS + 1, False),
        (EngineConfig(kernels=False, lean=True), 40, True),
    ):
        base = load_base(str(base_folder), device="cpu")
        Engine(base, config)
        layer = first_layer(base)
        layer(torch.ones(1, rows, layer.in_features, dtype=base.dtype))
        assert getattr(layer.weight.quant_state, "packing_format_for_cpu", False) == packed, (config.lean, rows)
